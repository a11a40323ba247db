//! A directory being built in, which leaves nothing when it is dropped.

use std::fs;
use std::path::{Path, PathBuf};

use crate::store::{StoreError, io};

/// A temporary directory of the store (mode 0700).
#[derive(Debug)]
pub(crate) struct Staging {
    path: Option<PathBuf>,
}

impl Staging {
    /// Makes one with a fresh name.
    pub(crate) fn new(parent: &Path, prefix: &str) -> Result<Self, StoreError> {
        let directory = tempfile::Builder::new()
            .prefix(prefix)
            .tempdir_in(parent)
            .map_err(io("make a directory in", parent))?;
        Ok(Self { path: Some(directory.keep()) })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        self.path.as_deref().unwrap_or(Path::new("/nonexistent"))
    }

    /// Gives it its final name; from then on it stays.
    pub(crate) fn rename(mut self, target: &Path) -> Result<(), StoreError> {
        if let Some(path) = &self.path {
            fs::rename(path, target).map_err(io("rename to", target))?;
        }
        self.path = None;
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Some(path) = &self.path
            && let Err(error) = clear(path)
        {
            tracing::warn!(path = %path.display(), %error, "a build's remains could not be removed");
        }
    }
}

/// Removes a directory and all beneath it, unless something is mounted there: a bootstrap that was killed may have
/// left the host's own /dev or /proc mounted, and those are not ours to empty.
pub(crate) fn clear(path: &Path) -> Result<(), StoreError> {
    let mounts =
        fs::read_to_string("/proc/self/mountinfo").map_err(io("read", Path::new("/proc/self/mountinfo")))?;
    if let Some(mount) = mounted_beneath(&mounts, path) {
        let source = std::io::Error::other("a file system is mounted there: unmount it by hand");
        return Err(StoreError::Io { verb: "remove", path: mount, source });
    }
    fs::remove_dir_all(path).map_err(io("remove", path))
}

/// The first mount point below a directory (proc_pid_mountinfo(5): the fifth field).
fn mounted_beneath(mounts: &str, path: &Path) -> Option<PathBuf> {
    mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .find(|at| at.starts_with(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_when_dropped_and_stays_when_renamed() {
        let parent = tempfile::tempdir().unwrap();
        let staging = Staging::new(parent.path(), "x").unwrap();
        let path = staging.path().to_owned();
        fs::create_dir_all(path.join("a/b")).unwrap();
        drop(staging);
        assert!(!path.exists());
        let target = parent.path().join("kept");
        Staging::new(parent.path(), "x").unwrap().rename(&target).unwrap();
        assert!(target.is_dir());
        fs::write(target.join("file"), "x").unwrap();
        let staging = Staging::new(parent.path(), "x").unwrap();
        let path = staging.path().to_owned();
        // A directory that is not empty cannot be replaced; what was staged goes all the same.
        assert!(staging.rename(&target).is_err());
        assert!(!path.exists());
        assert!(Staging::new(&parent.path().join("none"), "x").is_err());
    }

    #[test]
    fn mounts_beneath_are_found() {
        let table =
            "22 1 0:20 / /proc rw - proc proc rw\n30 22 0:5 / /var/x/root/dev rw - devtmpfs d rw\nbad\n";
        assert_eq!(mounted_beneath(table, Path::new("/var/x")), Some("/var/x/root/dev".into()));
        assert_eq!(mounted_beneath(table, Path::new("/var/xy")), None);
        assert!(clear(Path::new("/proc/sys")).is_err());
    }
}
