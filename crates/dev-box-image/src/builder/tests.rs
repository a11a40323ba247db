use std::fs;
use std::time::Instant;

use dev_box_core::clock::FakeClock;

use super::*;
use crate::Quiet;
use crate::testing::{FakeCommands, RecordingProgress};

struct World {
    directory: tempfile::TempDir,
    store: ImageStore,
    commands: Arc<FakeCommands>,
    builder: Builder,
    build: Build,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = ImageStore::open(directory.path().join("state")).unwrap();
        let commands = Arc::new(FakeCommands::new());
        let no_limits = SpaceLimits { keep_free: ByteSize::bytes(0), ..SpaceLimits::default() };
        let builder =
            Builder::new(Arc::clone(&commands) as Arc<dyn Commands>, Arc::new(FakeClock::default()))
                .limits(no_limits)
                .patience(Duration::ZERO);
        let agent = directory.path().join("dev-box-guest");
        fs::write(&agent, "agent").unwrap();
        let build = Build::packages("x".parse().unwrap(), agent);
        Self { directory, store, commands, builder, build }
    }

    fn build(&self) -> Result<Outcome, BuildError> {
        self.builder.build(&self.store, &self.build, &Quiet)
    }

    /// Directories among the builds.
    fn lying_around(&self) -> usize {
        fs::read_dir(self.store.root().join("images/.builds")).unwrap().count()
    }

    fn tarball(&self, magic: &[u8]) -> PathBuf {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(4);
        header.set_mode(0o755);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        builder.append_data(&mut header, "usr/bin/tool", b"tool".as_slice()).unwrap();
        let path = self.directory.path().join("root.tar");
        let mut bytes = magic.to_vec();
        bytes.extend(builder.into_inner().unwrap());
        fs::write(&path, bytes).unwrap();
        path
    }
}

#[test]
fn packages_become_an_image() {
    let world = World::new();
    let progress = RecordingProgress::default();
    let Outcome::Built(manifest) = world.builder.build(&world.store, &world.build, &progress).unwrap() else {
        panic!("not built")
    };
    assert_eq!(progress.steps(), Step::ALL);
    let image = world.store.get(&manifest.name).unwrap();
    assert_eq!(image.manifest, manifest);
    image.verify().unwrap();
    assert_eq!(manifest.created.to_string(), "2026-01-15T12:00:00.000-05:00");
    assert_eq!(manifest.agent.version, "9.8.7");
    assert_eq!(manifest.kernel.version, "6.1.0-1-amd64");
    assert_eq!(manifest.kernel.package.version, "6.1.1-1");
    assert_eq!(manifest.packages.len(), 1);
    let modules = &manifest.kernel.modules;
    assert!(modules.starts_with(&["virtio".to_owned(), "virtio_pci".to_owned()]), "{modules:?}");
    let order: Vec<String> =
        initramfs::modules_in(&image.initramfs()).unwrap().into_iter().map(|m| m.name).collect();
    assert_eq!(&order, modules);
    // Only the image's own files are there.
    assert_eq!(fs::read_dir(&image.dir).unwrap().count(), 4);
    assert_eq!(world.lying_around(), 1);
    assert!(progress.details().iter().any(|line| line.contains("left out")), "{:?}", progress.details());
}

#[test]
fn the_same_input_is_not_built_again_unless_forced() {
    let mut world = World::new();
    let built = world.build().unwrap();
    let ran = world.commands.ran().len();
    let again = world.build().unwrap();
    assert!(matches!(again, Outcome::Unchanged(_)));
    assert_eq!(again.manifest(), built.manifest());
    assert_eq!(world.commands.ran().len(), ran);
    world.build.force = true;
    assert!(matches!(world.build().unwrap(), Outcome::Built(_)));
    assert!(world.commands.ran().len() > ran);
    assert_eq!(world.lying_around(), 1);
}

#[test]
fn a_new_agent_needs_a_new_initramfs_only() {
    let world = World::new();
    let first = world.build().unwrap();
    let ran = world.commands.ran().len();
    fs::write(&world.build.agent, "another agent").unwrap();
    let second = world.build().unwrap();
    assert!(matches!(second, Outcome::Built(_)));
    let (first, second) = (first.manifest(), second.manifest());
    assert_eq!(first.files.disk, second.files.disk);
    assert_eq!(first.kernel, second.kernel);
    assert_ne!(first.files.initramfs.digest, second.files.initramfs.digest);
    // Nothing but the agent was asked for its version.
    assert_eq!(world.commands.ran().len(), ran + 1);
    world.store.get(&second.name).unwrap().verify().unwrap();
    assert_eq!(world.lying_around(), 1);
}

#[test]
fn a_tarball_becomes_an_image() {
    let mut world = World::new();
    world.build.source = BuildSource::Tar(world.tarball(b""));
    let outcome = world.build().unwrap();
    let manifest = outcome.manifest();
    assert!(matches!(&manifest.source, Source::Tar { file, .. } if file == "root.tar"));
    assert!(manifest.packages.is_empty());
    let ran = world.commands.ran().join("\n");
    assert!(ran.contains("--variant=custom") && !ran.contains("--variant=minbase"), "{ran}");
    let mut world = World::new();
    // The fake's decompressors pass bytes on as they are, which makes this no tarball.
    world.build.source = BuildSource::Tar(world.tarball(&[0x1f, 0x8b]));
    assert!(matches!(world.build(), Err(BuildError::Unpack { .. })));
    assert!(world.commands.ran().iter().any(|line| line == "gzip -dc"));
    world.commands.uninstall("gzip");
    assert!(matches!(world.build(), Err(BuildError::Command { step: Step::Root, .. })));
    assert_eq!(world.lying_around(), 0);
}

#[test]
fn a_failure_leaves_the_image_that_was_there() {
    let mut world = World::new();
    let first = world.build().unwrap();
    world.build.force = true;
    for program in ["mmdebstrap", "dpkg-deb", "mke2fs", "qemu-img", "xz", "zstd", "gzip"] {
        world.commands.fail(Some(program));
        let error = world.build().unwrap_err();
        let text = crate::testing::chain(&error);
        assert!(text.contains(program) || text.contains("kernel"), "{program}: {text}");
        let image = world.store.get(&world.build.name).unwrap();
        assert_eq!(&image.manifest, first.manifest());
        image.verify().unwrap();
        assert_eq!(world.lying_around(), 1, "{program}");
    }
    world.commands.fail(None);
    world.build().unwrap();
    world.commands.uninstall("mmdebstrap");
    let text = crate::testing::chain(&world.build().unwrap_err());
    assert!(text.contains("not installed"), "{text}");
}

#[test]
fn a_stop_leaves_nothing() {
    for program in ["mmdebstrap", "dpkg-deb", "mke2fs", "qemu-img"] {
        let world = World::new();
        let cancel = Cancel::default();
        world.commands.cancel_during(program, &cancel);
        let builder = world.builder.clone().cancelled_by(&cancel);
        let stopped = builder.build(&world.store, &world.build, &Quiet);
        assert!(matches!(stopped, Err(BuildError::Cancelled)), "{program}: {stopped:?}");
        assert_eq!(world.lying_around(), 0, "{program}");
        assert!(world.store.entries().unwrap().is_empty());
    }
}

#[test]
fn two_builders_do_not_meet() {
    let world = World::new();
    let held = world.store.try_lock(&world.build.name).unwrap().unwrap();
    let progress = RecordingProgress::default();
    let busy = world.builder.build(&world.store, &world.build, &progress);
    assert!(matches!(busy, Err(BuildError::Busy { .. })), "{busy:?}");
    let cancel = Cancel::default();
    cancel.cancel();
    let patient = world.builder.clone().patience(Duration::from_secs(60)).cancelled_by(&cancel);
    assert!(matches!(patient.build(&world.store, &world.build, &progress), Err(BuildError::Cancelled)));
    let started = Instant::now();
    let progress = RecordingProgress::default();
    let waits = || progress.details().iter().any(|line| line.contains("waiting"));
    let patient = world.builder.clone().patience(Duration::from_secs(600));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !waits() && started.elapsed() < Duration::from_secs(60) {
                std::thread::sleep(Duration::from_millis(5));
            }
            drop(held);
        });
        assert!(patient.build(&world.store, &world.build, &progress).is_ok());
    });
    assert!(started.elapsed() < Duration::from_secs(300));
    assert!(waits());
}

#[test]
fn what_cannot_be_is_told_before_anything_runs() {
    let mut world = World::new();
    world.build.agent = "/nowhere/agent".into();
    assert!(matches!(world.build(), Err(BuildError::Unreadable { .. })));
    world.build.agent = "/bin/sh".into();
    assert!(world.build().unwrap_err().to_string().contains("linked dynamically"));
    world.build.disk_size = ByteSize::mib(1);
    assert!(matches!(world.build(), Err(BuildError::Input(_))));
    let mut world = World::new();
    world.builder = world
        .builder
        .clone()
        .limits(SpaceLimits { keep_free: ByteSize::bytes(u64::MAX), ..SpaceLimits::default() });
    assert!(matches!(world.build(), Err(BuildError::Space(_))));
    world.build.source = BuildSource::Tar(world.tarball(b""));
    assert!(matches!(world.build(), Err(BuildError::Space(_))));
    assert!(world.commands.ran().is_empty());
    assert_eq!(world.lying_around(), 0);
    if !rustix::process::geteuid().is_root() {
        let refused = Builder::system().build(&world.store, &world.build, &Quiet);
        assert!(matches!(refused, Err(BuildError::NotRoot)));
    }
}

#[test]
fn what_a_dead_builder_left_is_removed_by_the_next() {
    let world = World::new();
    let dead = world.store.root().join("images/.builds/.tmp-x.dead00/work/root");
    fs::create_dir_all(&dead).unwrap();
    world.build().unwrap();
    assert_eq!(world.lying_around(), 1);
}
