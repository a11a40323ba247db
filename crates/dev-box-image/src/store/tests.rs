use super::*;
use crate::manifest::tests::sample;
use crate::manifest::{FileEntry, Files};

fn store() -> (tempfile::TempDir, ImageStore) {
    let directory = tempfile::tempdir().unwrap();
    let store = ImageStore::open(directory.path().join("state")).unwrap();
    (directory, store)
}

fn name(text: &str) -> ImageName {
    text.parse().unwrap()
}

/// Publishes an image whose kernel has the given content.
fn publish(store: &ImageStore, called: &str, kernel: &str) -> Image {
    let staging = store.staging(&name(called)).unwrap();
    let at = staging.path().to_owned();
    fs::write(at.join(KERNEL), kernel).unwrap();
    fs::write(at.join(INITRAMFS), "initramfs").unwrap();
    let mut disk = crate::qcow2::empty_overlay(Path::new("/x"), ByteSize::gib(1)).unwrap().0;
    disk[8..16].fill(0);
    fs::write(at.join(DISK), disk).unwrap();
    let entry = |file: &str| FileEntry::of(&at.join(file)).unwrap();
    let mut manifest = sample(called);
    manifest.files = Files { kernel: entry(KERNEL), initramfs: entry(INITRAMFS), disk: entry(DISK) };
    manifest.digest = manifest.files.digest();
    manifest.input = crate::Digest::of(kernel.as_bytes());
    store.publish(staging, &manifest).unwrap()
}

fn builds(store: &ImageStore) -> usize {
    fs::read_dir(store.builds()).unwrap().count()
}

#[test]
fn an_image_is_found_listed_verified_and_removed() {
    let (_directory, store) = store();
    assert!(store.list().unwrap().is_empty());
    let missing = store.get(&name("x")).unwrap_err();
    assert!(missing.to_string().contains("dev-box image build --name x"), "{missing}");
    let image = publish(&store, "x", "kernel");
    publish(&store, "a", "kernel");
    assert_eq!(store.get(&name("x")).unwrap(), image);
    let names: Vec<String> =
        store.list().unwrap().into_iter().map(|image| image.manifest.name.to_string()).collect();
    assert_eq!(names, ["a", "x"]);
    image.verify().unwrap();
    assert_eq!(fs::read_to_string(image.kernel()).unwrap(), "kernel");
    assert!(image.initramfs().is_file() && image.disk().is_file());
    assert_eq!(fs::metadata(image.disk()).unwrap().permissions().mode() & 0o777, 0o444);
    store.remove(&name("x")).unwrap();
    assert!(!image.dir.exists());
    assert!(matches!(store.remove(&name("x")), Err(StoreError::Missing { .. })));
    assert_eq!(builds(&store), 1);
}

#[test]
fn the_hypervisor_can_pass_and_others_cannot_list() {
    let (directory, store) = store();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(store.root()), 0o711);
    assert_eq!(mode(&store.images), 0o755);
    let image = publish(&store, "x", "k");
    assert_eq!(mode(&image.dir), 0o755);
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    assert!(matches!(ImageStore::open(file.join("x")), Err(StoreError::Io { .. })));
}

#[test]
fn a_second_build_replaces_the_first_but_not_under_a_vm() {
    let (_directory, store) = store();
    let first = publish(&store, "x", "one");
    let vm = store.root().join("vms/a");
    fs::create_dir_all(&vm).unwrap();
    let overlay =
        Overlay::create(&store.get(&name("x")).unwrap().disk(), &vm.join("overlay.qcow2"), None).unwrap();
    assert_eq!(overlay.base(), first.disk());
    let second = publish(&store, "x", "two");
    assert_eq!(store.get(&name("x")).unwrap(), second);
    // Held by the overlay's owner, then by the overlay's own header, then by nobody.
    assert!(store.sweep().unwrap().is_empty());
    drop(overlay);
    assert!(store.sweep().unwrap().is_empty());
    assert!(first.disk().is_file());
    Overlay::remove(&vm.join("overlay.qcow2")).unwrap();
    assert_eq!(store.sweep().unwrap(), [first.dir]);
    assert_eq!(store.get(&name("x")).unwrap(), second);
    // The same input again, while the former result is still there.
    let third = publish(&store, "x", "two");
    assert_ne!(third.dir, second.dir);
    assert_eq!(store.sweep().unwrap(), [second.dir]);
}

#[test]
fn a_vm_whose_image_a_build_has_just_removed_lies_on_the_new_one() {
    let (directory, store) = store();
    let path = directory.path().join("overlay.qcow2");
    let make = |image: &Image| store.overlay(image.clone(), &path, None, &SpaceLimits::default());
    let first = publish(&store, "x", "one");
    let second = publish(&store, "x", "two");
    // As long as it is there it is the one that was asked for.
    let (overlay, lies_on) = make(&first).unwrap();
    assert_eq!((&lies_on, overlay.base()), (&first, first.disk().as_path()));
    drop(overlay);
    Overlay::remove(&path).unwrap();
    assert_eq!(store.sweep().unwrap(), std::slice::from_ref(&first.dir));
    let (overlay, lies_on) = make(&first).unwrap();
    assert_eq!((&lies_on, overlay.base()), (&second, second.disk().as_path()));
    // Other errors are its own, and one that is gone for good is.
    assert!(matches!(make(&second), Err(OverlayError::Io { verb: "make", .. })));
    drop(overlay);
    Overlay::remove(&path).unwrap();
    store.remove(&name("x")).unwrap();
    assert!(make(&first).unwrap_err().has_no_base());
}

#[test]
fn an_image_is_found_while_builds_take_its_name() {
    let (_directory, store) = store();
    publish(&store, "x", "0");
    let done = std::sync::atomic::AtomicBool::new(false);
    let failed = std::thread::scope(|scope| {
        scope.spawn(|| {
            for n in 1..200 {
                publish(&store, "x", &n.to_string());
                store.sweep().unwrap();
            }
            done.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        let mut failed = Vec::new();
        while !done.load(std::sync::atomic::Ordering::SeqCst) {
            failed.extend(store.get(&name("x")).err());
        }
        failed
    });
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn an_image_in_use_is_not_removed() {
    let (_directory, store) = store();
    let image = publish(&store, "x", "k");
    let vm = store.root().join("vms/a");
    fs::create_dir_all(&vm).unwrap();
    let path = vm.join("overlay.qcow2");
    let overlay = Overlay::create(&image.disk(), &path, None).unwrap();
    for _ in 0..2 {
        match store.remove(&name("x")) {
            Err(error @ StoreError::InUse { .. }) => {
                assert!(error.to_string().contains("vms/a/overlay.qcow2"), "{error}");
            }
            other => panic!("{other:?}"),
        }
    }
    drop(overlay);
    assert!(matches!(store.remove(&name("x")), Err(StoreError::InUse { .. })));
    Overlay::remove(&path).unwrap();
    let _building = store.try_lock(&name("x")).unwrap().unwrap();
    assert!(matches!(store.remove(&name("x")), Err(StoreError::Busy { .. })));
    drop(_building);
    store.remove(&name("x")).unwrap();
}

#[test]
fn damage_is_told_and_can_be_removed() {
    let (_directory, store) = store();
    let image = publish(&store, "x", "k");
    fs::set_permissions(image.kernel(), Permissions::from_mode(0o644)).unwrap();
    fs::write(image.kernel(), "K").unwrap();
    assert!(matches!(image.verify(), Err(StoreError::Altered { file: KERNEL, .. })));
    fs::remove_file(image.initramfs()).unwrap();
    assert!(matches!(store.get(&name("x")), Err(StoreError::Incomplete { file: INITRAMFS, .. })));
    let manifest = image.dir.join(crate::manifest::MANIFEST);
    fs::remove_file(&manifest).unwrap();
    fs::write(&manifest, "{").unwrap();
    assert!(matches!(store.get(&name("x")), Err(StoreError::Manifest { .. })));
    assert!(store.list().unwrap().is_empty());
    assert_eq!(store.entries().unwrap().len(), 1);
    fs::remove_file(image.disk()).unwrap();
    store.remove(&name("x")).unwrap();
    // A link to nowhere counts as an image that is not there, and goes as well.
    symlink("nowhere", store.images.join("y")).unwrap();
    assert!(matches!(store.get(&name("y")), Err(StoreError::Missing { .. })));
    store.remove(&name("y")).unwrap();
    assert!(store.entries().unwrap().is_empty());
}

#[test]
fn remains_go_and_what_is_being_built_stays() {
    let (_directory, store) = store();
    let image = publish(&store, "x", "k");
    let dead = store.builds().join(".tmp-x.abc123");
    fs::create_dir_all(dead.join("work/root")).unwrap();
    let foreign = store.builds().join("README");
    fs::write(&foreign, "").unwrap();
    let building = store.try_lock(&name("x")).unwrap().unwrap();
    assert!(store.sweep().unwrap().is_empty());
    drop(building);
    assert_eq!(store.sweep().unwrap(), [dead]);
    assert!(image.dir.exists() && foreign.exists());
    assert!(store.images.join("x").exists());
}

#[test]
fn names_of_builds_tell_their_owner() {
    let owner = |text: &str| owner_of(Path::new(text)).map(|name| name.to_string());
    assert_eq!(owner("/b/.tmp-my-image.Ab12").as_deref(), Some("my-image"));
    assert_eq!(owner("/b/my-image-0123456789ab.2").as_deref(), Some("my-image"));
    assert_eq!(owner("/b/README"), None);
    assert_eq!(owner("/b/.tmp-"), None);
}

#[test]
fn state_roots_may_share_their_images() {
    let (directory, store) = store();
    let image = publish(&store, "x", "k");
    let other = directory.path().join("other");
    fs::create_dir(&other).unwrap();
    symlink(store.root().join("images"), other.join("images")).unwrap();
    let sharing = ImageStore::open(&other).unwrap();
    assert_eq!(sharing.get(&name("x")).unwrap(), image);
    assert!(sharing.sweep().unwrap().is_empty());
    for root in [store.root(), sharing.root()] {
        let vm = root.join("vms/a");
        fs::create_dir_all(&vm).unwrap();
        let path = vm.join("overlay.qcow2");
        drop(Overlay::create(&image.disk(), &path, None).unwrap());
        assert!(matches!(sharing.remove(&name("x")), Err(StoreError::InUse { .. })));
        Overlay::remove(&path).unwrap();
    }
    sharing.remove(&name("x")).unwrap();
    assert!(!image.dir.exists() && store.list().unwrap().is_empty());
}
