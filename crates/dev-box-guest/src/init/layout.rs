//! Which file systems are mounted where, and the few directories, links and settings a root file system is expected to have.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use nix::mount::MsFlags;

use crate::mounts::{MountSpec, Mounts};

/// Where the root disk is mounted before it becomes `/`.
pub const NEW_ROOT: &str = "/newroot";

/// Mounted in the initramfs and moved along.
#[must_use]
pub fn early() -> Vec<MountSpec> {
    let strict = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    vec![
        MountSpec::pseudo("proc", "/proc", strict, ""),
        MountSpec::pseudo("sysfs", "/sys", strict, ""),
        MountSpec::pseudo("devtmpfs", "/dev", MsFlags::MS_NOSUID, "mode=0755"),
    ]
}

/// Mounted after the root disk has become `/`.
#[must_use]
pub fn late() -> Vec<MountSpec> {
    let data = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    let strict = data | MsFlags::MS_NOEXEC;
    vec![
        MountSpec::pseudo(
            "devpts",
            "/dev/pts",
            MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
            "gid=5,mode=620,ptmxmode=666",
        ),
        MountSpec::pseudo("tmpfs", "/dev/shm", data, "mode=1777"),
        MountSpec::pseudo("tmpfs", "/run", data, "mode=0755,size=25%"),
        MountSpec::pseudo("tmpfs", "/tmp", data, "mode=1777,size=50%"),
        MountSpec::pseudo("cgroup2", "/sys/fs/cgroup", strict, "nsdelegate"),
    ]
}

/// The root disk.
#[must_use]
pub fn root_disk(device: &Path) -> MountSpec {
    MountSpec {
        source: device.to_string_lossy().into_owned(),
        target: PathBuf::from(NEW_ROOT),
        kind: "ext4",
        flags: MsFlags::MS_NOATIME,
        data: String::new(),
    }
}

/// Mounts all of `specs`, making the directories beneath `prefix` first, and returns those that failed: what is
/// indispensable shows when it is used.
pub fn mount_all(mounts: &dyn Mounts, prefix: &Path, specs: &[MountSpec]) -> Vec<(PathBuf, io::Error)> {
    let mut failed = Vec::new();
    for spec in specs {
        let directory = beneath(prefix, &spec.target);
        let made = std::fs::create_dir_all(&directory);
        let mounted = made.and_then(|()| mounts.mount(&MountSpec { target: directory, ..spec.clone() }));
        if let Err(error) = mounted {
            failed.push((spec.target.clone(), error));
        }
    }
    failed
}

/// Links every program expects in `/dev`, and `/etc/mtab`.
pub fn links(prefix: &Path) {
    for (link, target) in [
        ("dev/fd", "/proc/self/fd"),
        ("dev/stdin", "/proc/self/fd/0"),
        ("dev/stdout", "/proc/self/fd/1"),
        ("dev/stderr", "/proc/self/fd/2"),
        ("etc/mtab", "/proc/self/mounts"),
    ] {
        // One that is there already is as good.
        let _ = std::os::unix::fs::symlink(target, prefix.join(link));
    }
    // Both are where programs that expect a service manager look.
    for (directory, mode) in [("run/lock", 0o1777), ("run/user", 0o755)] {
        let path = prefix.join(directory);
        if std::fs::create_dir_all(&path).is_ok() {
            let _ = std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode));
        }
    }
}

/// An absolute path as it is called beneath another root.
#[must_use]
pub fn beneath(prefix: &Path, path: &Path) -> PathBuf {
    prefix.join(path.strip_prefix("/").unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mounts::fake::FakeMounts;

    #[test]
    fn everything_is_mounted_in_order_and_a_failure_does_not_stop_it() {
        let root = tempfile::tempdir().unwrap();
        let mounts = FakeMounts::default();
        mounts.refuse(root.path().join("dev/shm").to_str().unwrap(), libc::ENOMEM);
        let failed = mount_all(&mounts, root.path(), &late());
        assert_eq!(failed.len(), 1);
        assert_eq!(failed[0].0, Path::new("/dev/shm"));
        let targets: Vec<PathBuf> = mounts.table().into_iter().map(|spec| spec.target).collect();
        let wanted: Vec<PathBuf> =
            ["dev/pts", "run", "tmp", "sys/fs/cgroup"].iter().map(|path| root.path().join(path)).collect();
        assert_eq!(targets, wanted);
        assert!(root.path().join("tmp").is_dir());
    }

    #[test]
    fn links_are_made_once_and_what_is_there_stays() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("dev")).unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::fs::write(root.path().join("etc/mtab"), "mine").unwrap();
        links(root.path());
        links(root.path());
        assert_eq!(std::fs::read_link(root.path().join("dev/fd")).unwrap(), Path::new("/proc/self/fd"));
        assert_eq!(std::fs::read_to_string(root.path().join("etc/mtab")).unwrap(), "mine");
        let lock = std::fs::symlink_metadata(root.path().join("run/lock")).unwrap();
        assert!(lock.is_dir());
        assert_eq!(lock.permissions().mode() & 0o7777, 0o1777);
    }

    #[test]
    fn the_disk_is_named_and_ext4() {
        let spec = root_disk(Path::new("/dev/vdb"));
        assert_eq!((spec.source.as_str(), spec.kind), ("/dev/vdb", "ext4"));
        assert_eq!(early().len(), 3);
    }
}
