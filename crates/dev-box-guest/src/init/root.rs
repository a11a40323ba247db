//! Leaving the initramfs for the root disk, and the settings a kernel needs before anything runs.

use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::init::layout::{self, NEW_ROOT};
use crate::mounts::{MountSpec, Mounts};
use crate::network;

/// Points descriptors 0, 1 and 2 at the console, which the kernel does only when the initramfs has the node.
pub fn attach_console() {
    let Ok(console) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/console") else { return };
    for target in 0..3 {
        if console.as_raw_fd() != target {
            // SAFETY-free wrapper: nix checks the result; a console we cannot have is no reason to stop.
            let _ = duplicate(&console, target);
        }
    }
}

#[expect(unsafe_code, reason = "dup2 onto a fixed descriptor number")]
fn duplicate(file: &std::fs::File, target: i32) -> io::Result<()> {
    // SAFETY: dup2 takes two numbers; 0, 1 and 2 belong to nobody else in pid 1.
    if unsafe { libc::dup2(file.as_raw_fd(), target) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Moves the early mounts onto the new root, makes it `/`, and frees the initramfs.
///
/// # Errors
/// What the kernel refused; the machine cannot go on then.
pub fn switch(mounts: &dyn Mounts, early: &[MountSpec]) -> io::Result<()> {
    let new_root = Path::new(NEW_ROOT);
    for spec in early {
        let target = layout::beneath(new_root, &spec.target);
        std::fs::create_dir_all(&target)?;
        mounts.relocate(&spec.target, &target)?;
    }
    empty_initramfs(Path::new("/"))?;
    std::env::set_current_dir(new_root)?;
    mounts.relocate(Path::new("."), Path::new("/"))?;
    nix::unistd::chroot(".")?;
    std::env::set_current_dir("/")
}

/// Removes what lies on the initramfs, whose memory would otherwise be lost for good. Other file systems are not entered.
fn empty_initramfs(root: &Path) -> io::Result<()> {
    let device = std::fs::symlink_metadata(root)?.dev();
    remove_beneath(root, device, 0);
    Ok(())
}

fn remove_beneath(directory: &Path, device: u64, depth: usize) {
    // Deeper than any initramfs of ours.
    if depth > 32 {
        return;
    }
    let Ok(entries) = std::fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        let Ok(metadata) = std::fs::symlink_metadata(&path) else { continue };
        if metadata.dev() != device {
            continue;
        }
        if metadata.is_dir() {
            remove_beneath(&path, device, depth + 1);
            let _ = std::fs::remove_dir(&path);
        } else {
            let _ = std::fs::remove_file(&path);
        }
    }
}

/// Loopback, a name, and limits worth having; none of them worth failing for.
pub fn settle() {
    let _ = network::loopback_up();
    let _ = nix::unistd::sethostname("dev-box");
    for (path, value) in [
        // A job's crash must not run a program in the initial namespaces, nor fill the disk.
        ("/proc/sys/kernel/core_pattern", "core"),
        ("/proc/sys/fs/suid_dumpable", "0"),
        // One huge job must not take all process numbers from the agent.
        ("/proc/sys/kernel/pid_max", "131072"),
        ("/proc/sys/vm/panic_on_oom", "0"),
    ] {
        let _ = std::fs::write(path, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mounts::fake::FakeMounts;

    #[test]
    fn only_the_one_file_system_is_emptied() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("a/b/c")).unwrap();
        std::fs::write(root.path().join("a/b/module.ko"), "x").unwrap();
        std::os::unix::fs::symlink("/etc", root.path().join("a/link")).unwrap();
        let device = std::fs::symlink_metadata(root.path()).unwrap().dev();
        remove_beneath(root.path(), device + 1, 0);
        assert!(root.path().join("a/b/module.ko").exists());
        empty_initramfs(root.path()).unwrap();
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
        assert!(Path::new("/etc").is_dir());
        assert!(empty_initramfs(&root.path().join("gone")).is_err());
    }

    #[test]
    fn an_early_mount_that_cannot_be_moved_stops_the_switch() {
        if nix::unistd::geteuid().is_root() {
            // As root the directories beneath the new root would really be made.
            eprintln!("skipped: needs an unprivileged user");
            return;
        }
        assert!(switch(&FakeMounts::default(), &layout::early()).is_err());
    }
}
