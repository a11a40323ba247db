use dev_box_core::accel::Accelerator;
use dev_box_core::size::ByteSize;

use super::*;
use crate::digest::Digest;

pub(super) fn me() -> (u32, u32) {
    (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
}

pub(super) fn name(text: &str) -> ImageName {
    text.parse().unwrap()
}

fn shape() -> Shape {
    Shape {
        cpus: 1,
        memory: ByteSize::mib(1),
        disk: ByteSize::gib(1),
        network: "isolated".into(),
        transport: "serial".into(),
    }
}

fn host() -> HostFacts {
    HostFacts {
        accelerator: Accelerator::Tcg,
        qemu: "10.0.2".into(),
        libvirt: "11.3.0".into(),
        machine: "q35".into(),
        cpu: "max".into(),
    }
}

fn store() -> (tempfile::TempDir, TemplateStore) {
    let root = tempfile::tempdir().unwrap();
    let store = TemplateStore::open(root.path()).unwrap();
    (root, store)
}

fn staged(store: &TemplateStore, replace: bool) -> (TemplateStaging, TemplateManifest) {
    let staged = store.stage(&name("t"), replace).unwrap();
    staged.prepare(1 << 20, me().0, me().1).unwrap();
    let mut ram = vec![0; 1 << 20];
    ram[5 * 4096..7 * 4096].fill(7);
    fs::write(staged.ram(), &ram).unwrap();
    fs::write(staged.state(), "devices").unwrap();
    fs::write(staged.disk(), "a disk").unwrap();
    let manifest = manifest("t", staged.seal(me().1).unwrap());
    (staged, manifest)
}

pub(super) fn manifest(of: &str, [ram, state, disk]: [Seal; 3]) -> TemplateManifest {
    TemplateManifest {
        format: TemplateManifest::FORMAT,
        name: name(of),
        created: "2026-01-15T12:00:00.000-05:00".parse().unwrap(),
        image: name("default"),
        image_digest: Digest::of(b"image"),
        setup: vec!["true".into()],
        shape: shape(),
        host: host(),
        ram,
        state,
        disk,
    }
}

fn publish(store: &TemplateStore) -> Template {
    let (staged, manifest) = staged(store, false);
    store.publish(staged, &manifest).unwrap()
}

#[test]
fn a_template_appears_whole_and_goes_whole() {
    let (root, store) = store();
    assert!(matches!(store.get(&name("t")), Err(TemplateError::Missing(_))));
    let template = publish(&store);
    assert_eq!(store.get(&name("t")).unwrap(), template);
    template.verify().unwrap();
    let (manifest, digest) = (&template.manifest, template.manifest.digest());
    let other = TemplateManifest { disk: manifest.ram.clone(), ..manifest.clone() }.digest();
    assert!(digest.is_some() && other.is_some() && digest != other, "{digest:?}");
    let unread = Seal { digest: None, ..manifest.ram.clone() };
    assert_eq!(TemplateManifest { ram: unread, ..manifest.clone() }.digest(), None);
    // Free memory is a hole.
    assert!(template.allocated() < 64 << 10, "{}", template.allocated());
    assert_eq!(fs::metadata(template.ram()).unwrap().permissions().mode() & 0o777, 0o440);
    assert_eq!(store.entries().unwrap().len(), 1);
    store.remove(&name("t")).unwrap();
    assert!(matches!(store.remove(&name("t")), Err(TemplateError::Missing(_))));
    let left: Vec<_> = fs::read_dir(root.path().join(TEMPLATES)).unwrap().flatten().collect();
    assert_eq!(left.len(), 1, "the locks alone: {left:?}");
}

#[test]
fn what_is_truncated_replaced_or_written_to_is_not_used() {
    let (_root, store) = store();
    let template = publish(&store);
    let tamper = |path: PathBuf, change: &dyn Fn(&Path)| {
        let (bytes, meta) = (fs::read(&path).unwrap(), fs::metadata(&path).unwrap());
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        change(&path);
        let error = store.get(&name("t")).unwrap_err();
        assert!(matches!(&error, TemplateError::Altered { .. }), "{error}");
        assert!(error.to_string().contains("--force"), "says what to do: {error}");
        fs::write(&path, bytes).unwrap();
        File::options().write(true).open(&path).unwrap().set_modified(meta.modified().unwrap()).unwrap();
        store.get(&name("t")).unwrap();
    };
    for path in [template.ram(), template.state(), template.disk()] {
        tamper(path.clone(), &|path| File::options().write(true).open(path).unwrap().set_len(3).unwrap());
        tamper(path.clone(), &|path| {
            let same_length = vec![1; usize::try_from(fs::metadata(path).unwrap().len()).unwrap()];
            fs::write(path, same_length).unwrap();
        });
        tamper(path, &|path| fs::remove_file(path).unwrap());
    }
    // Someone who sets the time back is found out by reading.
    let before = fs::metadata(template.ram()).unwrap().modified().unwrap();
    fs::set_permissions(template.ram(), Permissions::from_mode(0o600)).unwrap();
    fs::write(template.ram(), vec![9; 1 << 20]).unwrap();
    File::options().write(true).open(template.ram()).unwrap().set_modified(before).unwrap();
    template.check().unwrap();
    assert!(matches!(template.verify(), Err(TemplateError::Altered { file: RAM, .. })));
    fs::write(template.dir.join(MANIFEST), "{").unwrap();
    assert!(matches!(store.get(&name("t")), Err(TemplateError::Manifest { .. })));
    fs::write(template.dir.join(MANIFEST), r#"{"format": 9}"#).unwrap();
    let error = store.get(&name("t")).unwrap_err();
    assert!(matches!(
        error,
        TemplateError::Manifest { source: TemplateManifestError::Generation { found: 9, .. }, .. }
    ));
    store.remove(&name("t")).unwrap();
}

#[test]
fn one_name_has_one_maker_and_is_replaced_only_when_asked_for() {
    let (_root, store) = store();
    let (first, manifest) = staged(&store, false);
    assert!(matches!(store.stage(&name("t"), false), Err(TemplateError::Busy(_))));
    assert!(store.sweep().unwrap().is_empty(), "its maker lives");
    store.publish(first, &manifest).unwrap();
    assert!(matches!(store.stage(&name("t"), false), Err(TemplateError::Exists(_))));
    let (second, manifest) = staged(&store, true);
    assert!(store.get(&name("t")).is_ok(), "until the other is whole");
    store.publish(second, &TemplateManifest { setup: Vec::new(), ..manifest }).unwrap();
    assert!(store.get(&name("t")).unwrap().manifest.setup.is_empty());
}

#[test]
fn a_clone_keeps_its_template() {
    let (root, store) = store();
    let template = publish(&store);
    let overlay = root.path().join("vms/a/overlay.qcow2");
    fs::create_dir_all(overlay.parent().unwrap()).unwrap();
    let disk = template.disk().canonicalize().unwrap();
    fs::write(&overlay, crate::qcow2::empty_overlay(&disk, ByteSize::gib(1)).unwrap().0).unwrap();
    let error = store.remove(&name("t")).unwrap_err();
    assert!(matches!(&error, TemplateError::InUse { by, .. } if by.len() == 1), "{error}");
    assert!(matches!(store.stage(&name("t"), true), Err(TemplateError::InUse { .. })));
    fs::remove_file(&overlay).unwrap();
    let held = Lock::try_shared(&template.disk()).unwrap().unwrap();
    assert!(matches!(store.remove(&name("t")), Err(TemplateError::InUse { .. })));
    drop(held);
    store.remove(&name("t")).unwrap();
}

#[test]
fn what_a_dead_maker_left_is_swept() {
    let (root, store) = store();
    drop(staged(&store, false));
    assert!(store.sweep().unwrap().is_empty(), "a maker that gives up leaves nothing");
    let torn = root.path().join(TEMPLATES).join(".tmp-t.Ab12");
    fs::create_dir(&torn).unwrap();
    fs::write(torn.join(RAM), "half").unwrap();
    assert!(store.entries().unwrap().is_empty(), "a torn one is none");
    assert_eq!(store.sweep().unwrap(), [torn]);
}

#[test]
fn what_does_not_fit_is_named() {
    let (_root, store) = store();
    let manifest = publish(&store).manifest;
    let (image, digest) = (name("default"), Digest::of(b"image"));
    manifest.serves((&image, &digest), &shape(), &host()).unwrap();
    let what = |image: (&ImageName, &Digest), shape: &Shape, host: &HostFacts| {
        manifest.serves(image, shape, host).unwrap_err().what
    };
    let own = (&image, &digest);
    assert_eq!(what((&name("other"), &digest), &shape(), &host()), "the image");
    assert_eq!(what((&image, &Digest::of(b"rebuilt")), &shape(), &host()), "the image's digest");
    assert_eq!(what(own, &Shape { cpus: 2, ..shape() }, &host()), "CPUs:");
    assert_eq!(what(own, &Shape { memory: ByteSize::mib(2), ..shape() }, &host()), "memory of");
    assert_eq!(what(own, &Shape { network: "nat-filtered".into(), ..shape() }, &host()), "the network");
    assert_eq!(what(own, &shape(), &HostFacts { qemu: "10.0.3".into(), ..host() }), "QEMU");
    assert_eq!(what(own, &shape(), &HostFacts { libvirt: "12".into(), ..host() }), "libvirt");
    assert_eq!(what(own, &shape(), &HostFacts { cpu: "other".into(), ..host() }), "the CPU");
    let error = manifest.serves(own, &Shape { cpus: 2, ..shape() }, &host()).unwrap_err();
    assert_eq!(error.to_string(), "the template `t` has CPUs: 1, and 2 is wanted");
}
