//! Opening things beneath a directory that somebody hostile may be changing at the same time.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{self, AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// `PATH_MAX` less the terminating NUL.
pub(super) const PATH_MAX: usize = 4095;

/// What every open here has: nothing is waited for (FIFOs), nothing is inherited, no terminal becomes ours.
const ALWAYS: OFlags = OFlags::CLOEXEC.union(OFlags::NONBLOCK).union(OFlags::NOCTTY).union(OFlags::NOFOLLOW);

/// How far a path may lead.
#[derive(Debug, Clone, Copy)]
pub(super) enum Bounds {
    /// Not to another filesystem either: a staging directory.
    OneFilesystem,
    /// Mount points are fine: a directory of the user's.
    Mounts,
}

impl Bounds {
    fn resolve(self) -> ResolveFlags {
        let always = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        match self {
            Self::OneFilesystem => always | ResolveFlags::NO_XDEV,
            Self::Mounts => always,
        }
    }
}

/// The facts about an open file that are used here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) dev: u64,
    pub(super) ino: u64,
    pub(super) size: u64,
    /// Nanoseconds since 1970; a guest can set it.
    pub(super) mtime_ns: i128,
    /// Nanoseconds since 1970; only the host's kernel sets it.
    pub(super) ctime_ns: i128,
}

/// Metadata of an entry, of the host's own file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Meta {
    pub(super) stamp: Stamp,
    pub(super) kind: FileType,
    pub(super) mode: u32,
    pub(super) uid: u32,
}

#[expect(clippy::unnecessary_cast, reason = "the fields' types differ between architectures")]
impl From<fs::Stat> for Meta {
    fn from(stat: fs::Stat) -> Self {
        let nanos = |seconds: i128, nanos: i128| seconds * 1_000_000_000 + nanos;
        Self {
            stamp: Stamp {
                dev: stat.st_dev as u64,
                ino: stat.st_ino as u64,
                size: u64::try_from(stat.st_size).unwrap_or(0),
                mtime_ns: nanos(stat.st_mtime.into(), stat.st_mtime_nsec.into()),
                ctime_ns: nanos(stat.st_ctime.into(), stat.st_ctime_nsec.into()),
            },
            kind: FileType::from_raw_mode(stat.st_mode),
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
        }
    }
}

/// Opens a directory the caller trusts: links on the way to it are followed.
pub(super) fn open_root(path: &Path) -> Result<OwnedFd, Errno> {
    fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Opens the directory `path` beneath `root`; an empty path is `root` itself.
pub(super) fn open_dir(root: impl AsFd, path: &Path, bounds: Bounds) -> Result<OwnedFd, Errno> {
    open(root, path, OFlags::RDONLY | OFlags::DIRECTORY, bounds)
}

/// Opens a file beneath `root` for reading. What it is has to be checked on the descriptor afterwards.
pub(super) fn open_file(root: impl AsFd, path: &Path, bounds: Bounds) -> Result<OwnedFd, Errno> {
    open(root, path, OFlags::RDONLY, bounds)
}

fn open(root: impl AsFd, path: &Path, flags: OFlags, bounds: Bounds) -> Result<OwnedFd, Errno> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    // RESOLVE_BENEATH may report a rename race; trying again is what openat2(2) says.
    let mut last = Errno::AGAIN;
    for _ in 0..8 {
        match fs::openat2(&root, path, flags | ALWAYS, Mode::empty(), bounds.resolve()) {
            Err(Errno::AGAIN) => last = Errno::AGAIN,
            done => return done,
        }
    }
    Err(last)
}

/// Metadata of `name` in `dir`; links are not followed.
pub(super) fn meta_at(dir: impl AsFd, name: &Path) -> Result<Meta, Errno> {
    Ok(fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?.into())
}

/// Metadata of an open file.
pub(super) fn meta(file: impl AsFd) -> Result<Meta, Errno> {
    Ok(fs::fstat(file)?.into())
}

/// The names in a directory, sorted, at most `limit` of them; `None` if there are more.
pub(super) fn list(dir: impl AsFd, limit: u64) -> Result<Option<Vec<OsString>>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        if names.len() as u64 >= limit {
            return Ok(None);
        }
        names.push(OsStr::from_bytes(name).to_owned());
    }
    names.sort_unstable();
    Ok(Some(names))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn nothing_outside_can_be_opened() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("outside"), "x").unwrap();
        let inside = dir.path().join("root");
        std::fs::create_dir_all(inside.join("sub")).unwrap();
        std::fs::write(inside.join("sub/file"), "y").unwrap();
        symlink("/etc/passwd", inside.join("absolute")).unwrap();
        symlink("../outside", inside.join("relative")).unwrap();
        symlink("sub", inside.join("within")).unwrap();
        let root = open_root(&inside).unwrap();
        for bounds in [Bounds::OneFilesystem, Bounds::Mounts] {
            let open = |path: &str| open_file(&root, Path::new(path), bounds).map(drop);
            assert_eq!(open("sub/file"), Ok(()));
            assert_eq!(open("../outside"), Err(Errno::XDEV));
            assert_eq!(open("/etc/passwd"), Err(Errno::XDEV));
            for link in ["absolute", "relative", "within", "within/file"] {
                assert_eq!(open(link), Err(Errno::LOOP), "{link}");
            }
            // With O_DIRECTORY that is what a link at the end gives.
            assert_eq!(open_dir(&root, Path::new("within"), bounds).map(drop), Err(Errno::NOTDIR));
            assert!(open_dir(&root, Path::new(""), bounds).is_ok());
        }
    }

    #[test]
    fn lists_are_sorted_and_limited() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b", "a", "c"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let root = open_root(dir.path()).unwrap();
        assert_eq!(list(&root, 3).unwrap().unwrap(), ["a", "b", "c"]);
        assert_eq!(list(&root, 2).unwrap(), None);
        let file = open_file(&root, Path::new("a"), Bounds::Mounts).unwrap();
        assert_eq!(list(&file, 2), Err(Errno::NOTDIR));
    }
}
