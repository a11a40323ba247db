//! Builds with the real programs: needs root, the programs that `cargo xtask setup` installs, and Debian's mirror.
#![cfg(feature = "testing")]
#![expect(clippy::unwrap_used, reason = "a test ends at the first thing that is wrong")]

use std::fs;
use std::net::{TcpStream, ToSocketAddrs as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use dev_box_core::size::ByteSize;
use dev_box_image::testing::{RecordingProgress, chain, skip};
use dev_box_image::{Build, Builder, Cancel, Image, ImageName, ImageStore, Outcome, Overlay, Progress, Step};

/// Why a build cannot be tried here.
fn hindrance() -> Option<String> {
    let id = Command::new("id").arg("-u").output().ok()?;
    if id.stdout != b"0\n" {
        return Some("needs root".into());
    }
    for program in ["mmdebstrap", "dpkg-deb", "mke2fs", "qemu-img", "debugfs", "tar"] {
        if Command::new(program).arg("--version").output().is_err() {
            return Some(format!("{program} is not installed"));
        }
    }
    let mirror = "deb.debian.org:80".to_socket_addrs().ok().and_then(|mut addresses| addresses.next());
    let reached = mirror.map(|address| TcpStream::connect_timeout(&address, Duration::from_secs(10)));
    if !matches!(reached, Some(Ok(_))) {
        return Some("deb.debian.org cannot be reached".into());
    }
    None
}

struct World {
    directory: tempfile::TempDir,
    store: ImageStore,
    agent: PathBuf,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = ImageStore::open(directory.path().join("state")).unwrap();
        let agent = directory.path().join("dev-box-guest");
        fs::write(&agent, "#!/bin/sh\necho dev-box-guest 1.2.3\n").unwrap();
        assert!(Command::new("chmod").arg("0755").arg(&agent).status().unwrap().success());
        Self { directory, store, agent }
    }

    fn name() -> ImageName {
        "real".parse().unwrap()
    }

    fn tarball(&self) -> PathBuf {
        let tree = self.directory.path().join("tree");
        fs::create_dir_all(tree.join("etc")).unwrap();
        fs::create_dir_all(tree.join("usr/bin")).unwrap();
        fs::write(tree.join("etc/os-release"), "ID=tiny\n").unwrap();
        fs::write(tree.join("usr/bin/tool"), "tool").unwrap();
        let tarball = self.directory.path().join("tiny.tar.gz");
        let tar =
            Command::new("tar").arg("-czf").arg(&tarball).arg("-C").arg(&tree).arg(".").status().unwrap();
        assert!(tar.success());
        tarball
    }

    fn build(&self, build: &Build) -> Outcome {
        let progress = RecordingProgress::default();
        Builder::system()
            .build(&self.store, build, &progress)
            .unwrap_or_else(|error| panic!("{}\n{:#?}", chain(&error), progress.details()))
    }

    fn builds(&self) -> usize {
        fs::read_dir(self.store.root().join("images/.builds")).unwrap().count()
    }
}

/// The content of a file in the image's file system, as debugfs(8) reads it.
fn read_in(image: &Image, scratch: &Path, command: &str) -> String {
    let raw = scratch.join("check.raw");
    let convert =
        Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(image.disk()).arg(&raw).status();
    assert!(convert.unwrap().success());
    let output = Command::new("debugfs").arg("-R").arg(command).arg(&raw).output().unwrap();
    fs::remove_file(raw).unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn check(image: &Image, scratch: &Path) {
    image.verify().unwrap();
    let kernel = fs::read(image.kernel()).unwrap();
    assert!(kernel.starts_with(b"\x7fELF"), "the kernel is still packed");
    let initramfs = fs::read(image.initramfs()).unwrap();
    assert!(initramfs.starts_with(b"070701"));
    for module in
        ["virtio_pci", "virtio_blk", "virtio_console", "virtio_net", "ext4", "9p", "9pnet_virtio", "overlay"]
    {
        assert!(image.manifest.kernel.modules.iter().any(|name| name == module), "{module}");
    }
    let check = Command::new("qemu-img").arg("check").arg(image.disk()).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stderr));
    assert_eq!(read_in(image, scratch, "cat /etc/hostname"), "dev-box\n");
    assert!(read_in(image, scratch, "stat /workspace").contains("Type: directory"));
    assert!(read_in(image, scratch, "stat /etc/resolv.conf").contains("Type: regular"));
    let stats = read_in(image, scratch, "stats");
    assert!(stats.contains("dev-box") && stats.contains("clean"), "{stats}");
}

#[test]
fn a_tarball_becomes_an_image_that_stays_until_something_changes() {
    if let Some(reason) = hindrance() {
        return skip("image::real_build::tarball", &reason);
    }
    let world = World::new();
    let mut build = Build::tar(World::name(), world.agent.clone(), world.tarball());
    build.disk_size = ByteSize::gib(1);
    assert!(matches!(world.build(&build), Outcome::Built(_)));
    let image = world.store.get(&World::name()).unwrap();
    assert_eq!(image.manifest.agent.version, "1.2.3");
    check(&image, world.directory.path());
    assert_eq!(read_in(&image, world.directory.path(), "cat /usr/bin/tool"), "tool");

    let started = Instant::now();
    assert!(matches!(world.build(&build), Outcome::Unchanged(_)));
    assert!(started.elapsed() < Duration::from_secs(60));

    fs::write(&world.agent, "#!/bin/sh\necho dev-box-guest 1.2.4\n").unwrap();
    assert!(matches!(world.build(&build), Outcome::Built(_)));
    let renewed = world.store.get(&World::name()).unwrap();
    assert_eq!(renewed.manifest.files.disk, image.manifest.files.disk);
    assert_eq!(renewed.manifest.agent.version, "1.2.4");
    renewed.verify().unwrap();
    assert_eq!(world.builds(), 1);

    let overlay = Overlay::create(&renewed.disk(), &world.directory.path().join("o.qcow2"), None).unwrap();
    assert_eq!(overlay.size(), ByteSize::gib(1));
    assert!(world.store.remove(&World::name()).is_err());
    drop(overlay);
    world.store.remove(&World::name()).unwrap();
    assert_eq!(world.builds(), 0);
}

/// Asks for a stop as soon as a step says something.
struct StopAt(Step, Cancel, std::sync::Mutex<Option<Step>>);

impl Progress for StopAt {
    fn step(&self, step: Step) {
        *self.2.lock().unwrap() = Some(step);
    }

    fn detail(&self, _: &str) {
        if *self.2.lock().unwrap() == Some(self.0) {
            self.1.cancel();
        }
    }
}

#[test]
fn a_stop_in_the_bootstrap_leaves_no_file_and_no_mount() {
    if let Some(reason) = hindrance() {
        return skip("image::real_build::stop", &reason);
    }
    let world = World::new();
    let cancel = Cancel::default();
    let progress = StopAt(Step::Root, cancel.clone(), std::sync::Mutex::new(None));
    let build = Build::packages(World::name(), world.agent.clone());
    let stopped = Builder::system().cancelled_by(&cancel).build(&world.store, &build, &progress);
    assert!(matches!(stopped, Err(dev_box_image::BuildError::Cancelled)), "{stopped:?}");
    assert_eq!(world.builds(), 0);
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(world.store.root().to_str().unwrap()), "{mounts}");
}

#[test]
#[ignore = "downloads and installs 150 packages: a minute or two"]
fn packages_become_an_image() {
    if let Some(reason) = hindrance() {
        return skip("image::real_build::packages", &reason);
    }
    let world = World::new();
    assert!(matches!(world.build(&Build::packages(World::name(), world.agent.clone())), Outcome::Built(_)));
    let image = world.store.get(&World::name()).unwrap();
    check(&image, world.directory.path());
    let names: Vec<&str> = image.manifest.packages.iter().map(|package| package.name.as_str()).collect();
    for name in dev_box_image::builder::BASE_PACKAGES {
        assert!(names.contains(&name), "{name}");
    }
    assert!(read_in(&image, world.directory.path(), "cat /etc/gitconfig").contains("directory = *"));
}
