//! Putting one entry into a destination: beneath its root, atomically, following nothing.

use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, Gid, Mode, OFlags, RenameFlags, Uid};
use rustix::io::Errno;

use super::beneath::{self, Bounds, Stamp};
use super::{Owner, Refusal};

/// Longest file name on Linux, in bytes.
const NAME_MAX: usize = 255;

/// What may be replaced by a new entry.
#[derive(Debug, Clone, Copy)]
pub(super) enum Replace {
    /// Any file or link.
    Anything,
    /// Only this file, unchanged since.
    Only(Stamp),
    /// Nothing: there must be none.
    Nothing,
}

/// How placing ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Placed {
    /// It is there.
    Done,
    /// Something else is in its place, which was left alone; the new entry lies under this name.
    Beside(OsString),
}

/// An entry under a temporary name; removed when dropped before it is placed.
#[derive(Debug)]
pub(super) struct Pending<'a> {
    dir: &'a OwnedFd,
    name: OsString,
    placed: bool,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if !self.placed {
            let _ = fs::unlinkat(self.dir, &self.name, AtFlags::empty());
        }
    }
}

impl<'a> Pending<'a> {
    /// An empty file of mode 0600 in `dir`.
    pub(super) fn file(dir: &'a OwnedFd, name: OsString) -> Result<(Self, OwnedFd), Errno> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = fs::openat(dir, &name, flags, Mode::RUSR | Mode::WUSR)?;
        Ok((Self { dir, name, placed: false }, file))
    }

    /// A link in `dir`.
    pub(super) fn link(
        dir: &'a OwnedFd,
        name: OsString,
        target: &[u8],
        owner: Option<Owner>,
    ) -> Result<Self, Errno> {
        fs::symlinkat(OsStr::from_bytes(target), dir, &name)?;
        let pending = Self { dir, name, placed: false };
        if let Some(owner) = owner {
            let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
            fs::chownat(dir, &pending.name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        Ok(pending)
    }

    /// Moves it to `name`, if what is there may be replaced; else beside it, with `suffix` after the name.
    ///
    /// Between looking at what is there and replacing it lies a moment in which another process may write to it; for
    /// [`Replace::Nothing`] there is none.
    pub(super) fn place(mut self, name: &OsStr, replace: Replace, suffix: &str) -> Result<Placed, Errno> {
        let there = match beneath::meta_at(self.dir, Path::new(name)) {
            Ok(there) => Some(there),
            Err(Errno::NOENT) => None,
            Err(error) => return Err(error),
        };
        let may = match (replace, there) {
            (_, Some(there)) if there.kind == FileType::Directory => false,
            (Replace::Only(stamp), Some(there)) => there.stamp == stamp,
            // Deleted on the host, changed in the guest: the guest's is the only version there is.
            (Replace::Only(_) | Replace::Nothing, None) => self.rename(name, RenameFlags::NOREPLACE)?,
            (Replace::Nothing, Some(_)) => false,
            (Replace::Anything, _) => true,
        };
        if self.placed || (may && self.rename(name, RenameFlags::empty())?) {
            return Ok(Placed::Done);
        }
        for attempt in 0..100 {
            let beside = beside(name, suffix, attempt);
            if self.rename(&beside, RenameFlags::NOREPLACE)? {
                return Ok(Placed::Beside(beside));
            }
        }
        Err(Errno::EXIST)
    }

    /// Whether it could be moved there.
    fn rename(&mut self, to: &OsStr, flags: RenameFlags) -> Result<bool, Errno> {
        match fs::renameat_with(self.dir, &self.name, self.dir, to, flags) {
            Ok(()) => {
                self.placed = true;
                Ok(true)
            }
            Err(Errno::EXIST | Errno::ISDIR | Errno::NOTEMPTY) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// `name.suffix`, cut so that it is a name.
fn beside(name: &OsStr, suffix: &str, attempt: u32) -> OsString {
    let suffix = if attempt == 0 { format!(".{suffix}") } else { format!(".{suffix}.{attempt}") };
    let keep = NAME_MAX.saturating_sub(suffix.len()).min(name.len());
    let mut beside = OsStr::from_bytes(name.as_bytes().get(..keep).unwrap_or_default()).to_owned();
    beside.push(suffix);
    beside
}

/// Opens the directory `path` beneath `root`, making what is missing of it; says which were made, outermost first.
pub(super) fn make_dirs(
    root: &OwnedFd,
    path: &Path,
    owner: Option<Owner>,
) -> Result<(OwnedFd, Vec<PathBuf>), DirError> {
    match beneath::open_dir(root, path, Bounds::Mounts) {
        Ok(dir) => return Ok((dir, Vec::new())),
        Err(Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    let mut made = Vec::new();
    let mut dir = beneath::open_dir(root, Path::new(""), Bounds::Mounts)?;
    let mut at = PathBuf::new();
    for name in path.iter() {
        at.push(name);
        match fs::mkdirat(&dir, name, Mode::RWXU) {
            Ok(()) => made.push(at.clone()),
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        dir = beneath::open_dir(&dir, Path::new(name), Bounds::Mounts)?;
        if let (Some(owner), true) = (owner, made.last() == Some(&at)) {
            fs::fchown(&dir, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))?;
        }
    }
    Ok((dir, made))
}

/// Why a directory of the destination cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum DirError {
    /// A link, or no directory, is in the way.
    Blocked,
    /// The system refused.
    System(Errno),
}

impl From<Errno> for DirError {
    fn from(error: Errno) -> Self {
        match error {
            Errno::LOOP | Errno::NOTDIR => Self::Blocked,
            error => Self::System(error),
        }
    }
}

impl From<Errno> for Refusal {
    fn from(error: Errno) -> Self {
        Self::System(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn pending<'a>(dir: &'a OwnedFd, text: &str) -> Pending<'a> {
        let (pending, file) = Pending::file(dir, ".temporary".into()).unwrap();
        rustix::io::write(&file, text.as_bytes()).unwrap();
        pending
    }

    #[test]
    fn a_file_is_placed_or_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let root = beneath::open_root(dir.path()).unwrap();
        drop(pending(&root, "x"));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let name = OsStr::new("name");
        assert_eq!(pending(&root, "1").place(name, Replace::Nothing, "s").unwrap(), Placed::Done);
        let stamp = beneath::meta_at(&root, Path::new("name")).unwrap().stamp;
        assert_eq!(pending(&root, "2").place(name, Replace::Only(stamp), "s").unwrap(), Placed::Done);
        // That made another file of it.
        let beside = |name: &str| Placed::Beside(name.into());
        assert_eq!(pending(&root, "3").place(name, Replace::Only(stamp), "s").unwrap(), beside("name.s"));
        assert_eq!(pending(&root, "4").place(name, Replace::Nothing, "s").unwrap(), beside("name.s.1"));
        assert_eq!(pending(&root, "5").place(name, Replace::Anything, "s").unwrap(), Placed::Done);
        let mut seen: Vec<String> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| {
                let path = entry.unwrap().path();
                format!("{}={}", path.file_name().unwrap().display(), std::fs::read_to_string(&path).unwrap())
            })
            .collect();
        seen.sort();
        assert_eq!(seen, ["name.s.1=4", "name.s=3", "name=5"]);
    }

    #[test]
    fn a_directory_is_never_replaced_and_a_link_is_replaced_itself() {
        let dir = tempfile::tempdir().unwrap();
        let root = beneath::open_root(dir.path()).unwrap();
        std::fs::create_dir(dir.path().join("dir")).unwrap();
        let placed = pending(&root, "x").place(OsStr::new("dir"), Replace::Anything, "s").unwrap();
        assert_eq!(placed, Placed::Beside("dir.s".into()));
        let outside = tempfile::NamedTempFile::new().unwrap();
        symlink(outside.path(), dir.path().join("link")).unwrap();
        let placed = pending(&root, "x").place(OsStr::new("link"), Replace::Anything, "s").unwrap();
        assert_eq!(placed, Placed::Done);
        assert!(dir.path().join("link").symlink_metadata().unwrap().is_file());
        assert_eq!(std::fs::read(outside.path()).unwrap(), b"");
        let link = Pending::link(&root, ".l".into(), b"/etc/passwd", None).unwrap();
        assert_eq!(link.place(OsStr::new("new"), Replace::Nothing, "s").unwrap(), Placed::Done);
        assert_eq!(dir.path().join("new").read_link().unwrap(), Path::new("/etc/passwd"));
    }

    #[test]
    fn long_names_are_cut() {
        let long = OsString::from("n".repeat(255));
        let cut = beside(&long, "job", 3);
        assert_eq!(cut.len(), 255);
        assert!(cut.to_str().unwrap().ends_with("n.job.3"));
    }

    #[test]
    fn directories_are_made_beneath_and_not_through_links() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let root = beneath::open_root(dir.path()).unwrap();
        let (_, made) = make_dirs(&root, Path::new("a/b/c"), None).unwrap();
        assert_eq!(made, [Path::new("a"), Path::new("a/b"), Path::new("a/b/c")]);
        let (_, made) = make_dirs(&root, Path::new("a/b/d"), None).unwrap();
        assert_eq!(made, [Path::new("a/b/d")]);
        assert!(make_dirs(&root, Path::new(""), None).unwrap().1.is_empty());
        symlink(outside.path(), dir.path().join("link")).unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        for blocked in ["link", "link/x", "file", "file/x"] {
            assert_eq!(
                make_dirs(&root, Path::new(blocked), None).unwrap_err(),
                DirError::Blocked,
                "{blocked}"
            );
        }
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
        assert_eq!(DirError::from(Errno::NOSPC), DirError::System(Errno::NOSPC));
    }
}
