//! A directory tree treated as another machine's root: whatever links lie in it, no path leads out.
//!
//! Every path is resolved by openat2(2) with `RESOLVE_IN_ROOT`: an absolute link means from this root, `..` at the
//! root stays there, and links of /proc are not followed.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, openat, openat2};
use rustix::io::Errno;

/// A root that is not ours.
#[derive(Debug)]
pub(crate) struct Tree {
    root: OwnedFd,
}

/// A place in the tree: an open directory and the last part of a path.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) directory: OwnedFd,
    pub(crate) name: PathBuf,
}

impl Tree {
    /// Takes a directory as the root.
    pub(crate) fn open(root: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { root: rustix::fs::open(root, flags, Mode::empty())? })
    }

    fn resolve(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let relative = path.strip_prefix("/").unwrap_or(path);
        let relative = if relative.as_os_str().is_empty() { Path::new(".") } else { relative };
        let how = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        openat2(&self.root, relative, flags | OFlags::CLOEXEC, Mode::empty(), how)
    }

    /// A path's directory, made where it is missing, and its last part.
    pub(crate) fn place(&self, path: &Path) -> io::Result<Place> {
        let Some(name) = path.file_name() else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a path without a name"));
        };
        let parent = path.parent().unwrap_or(Path::new(""));
        let directory = match self.resolve(parent, OFlags::PATH | OFlags::DIRECTORY) {
            Err(Errno::NOENT) => {
                self.make_directories(parent)?;
                self.resolve(parent, OFlags::PATH | OFlags::DIRECTORY)?
            }
            other => other?,
        };
        Ok(Place { directory, name: PathBuf::from(name) })
    }

    /// Makes a directory (mode 0755) and those above it.
    pub(crate) fn make_directories(&self, path: &Path) -> io::Result<()> {
        let mut done = PathBuf::new();
        for part in path.components() {
            let Component::Normal(name) = part else { continue };
            let parent = self.resolve(&done, OFlags::PATH | OFlags::DIRECTORY)?;
            match rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => done.push(name),
                Err(error) => return Err(error.into()),
            }
        }
        // What is there may be a file, or a link to nowhere.
        self.resolve(&done, OFlags::PATH | OFlags::DIRECTORY)?;
        Ok(())
    }

    /// Sets a directory's permission bits.
    pub(crate) fn set_mode(&self, path: &Path, mode: u32) -> io::Result<()> {
        let directory = self.resolve(path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        Ok(rustix::fs::fchmod(&directory, Mode::from_raw_mode(mode & 0o7777))?)
    }

    /// Writes a file in place of whatever has the name (but not of a directory).
    pub(crate) fn write(&self, path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
        let place = self.place(path)?;
        place.clear()?;
        place.create(mode)?.write_all(content)
    }

    /// Adds to the end of a file, which is made if need be (mode 0644).
    pub(crate) fn append(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        let mut whole = self.read(path, 1 << 20)?.unwrap_or_default();
        whole.extend_from_slice(content);
        self.write(path, &whole, 0o644)
    }

    /// A file's content, cut at `limit` bytes; `None` when there is no such file. Devices and the like are refused.
    pub(crate) fn read(&self, path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
        let opened = match self.resolve(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            other => File::from(other?),
        };
        if !opened.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let mut bytes = Vec::new();
        opened.take(limit).read_to_end(&mut bytes)?;
        Ok(Some(bytes))
    }

    /// Removes what has that name, with all beneath it. Nothing there is as good.
    pub(crate) fn remove(&self, path: &Path) -> io::Result<()> {
        let (Some(name), parent) = (path.file_name(), path.parent().unwrap_or(Path::new(""))) else {
            return Ok(());
        };
        match self.resolve(parent, OFlags::PATH | OFlags::DIRECTORY) {
            Ok(directory) => Place { directory, name: name.into() }.remove_all(),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes all that lies in a directory, keeping the directory itself.
    pub(crate) fn empty(&self, path: &Path) -> io::Result<()> {
        let directory = match self.resolve(path, OFlags::RDONLY | OFlags::DIRECTORY) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
            other => other?,
        };
        for name in names_in(&directory)? {
            let directory = directory.try_clone()?;
            Place { directory, name }.remove_all()?;
        }
        Ok(())
    }
}

fn names_in(directory: &OwnedFd) -> io::Result<Vec<PathBuf>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(PathBuf::from(OsStr::from_bytes(name)));
        }
    }
    Ok(names)
}

impl Place {
    /// What is there, links not followed.
    pub(crate) fn kind(&self) -> io::Result<Option<FileType>> {
        match rustix::fs::statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(FileType::from_raw_mode(stat.st_mode))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes what is there unless it is a directory.
    pub(crate) fn clear(&self) -> io::Result<()> {
        match rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes a file that was not there.
    pub(crate) fn create(&self, mode: u32) -> io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(openat(&self.directory, &self.name, flags, Mode::from_raw_mode(0o600))?);
        rustix::fs::fchmod(&file, Mode::from_raw_mode(mode & 0o7777))?;
        Ok(file)
    }

    fn remove_all(&self) -> io::Result<()> {
        if self.kind()? != Some(FileType::Directory) {
            return self.clear();
        }
        // The standard library's removal follows no links beneath the path it is given.
        std::fs::remove_dir_all(
            Path::new(&format!("/proc/self/fd/{}", self.directory.as_raw_fd())).join(&self.name),
        )
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn tree() -> (tempfile::TempDir, Tree) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("root")).unwrap();
        let tree = Tree::open(&directory.path().join("root")).unwrap();
        (directory, tree)
    }

    #[test]
    fn no_link_leads_out() {
        let (outer, tree) = tree();
        let root = outer.path().join("root");
        std::fs::create_dir(outer.path().join("outside")).unwrap();
        std::fs::write(outer.path().join("outside/secret"), "secret").unwrap();
        symlink("../outside", root.join("climb")).unwrap();
        symlink(outer.path().join("outside"), root.join("absolute")).unwrap();
        symlink("/proc/self/root", root.join("magic")).unwrap();
        for path in ["climb/secret", "absolute/secret", "../outside/secret", "magic/etc/passwd"] {
            let read = tree.read(Path::new(path), 100);
            assert!(matches!(read, Ok(None) | Err(_)), "{path}: {read:?}");
            assert!(tree.remove(Path::new(path)).is_ok());
        }
        // Not even a way up shows what lies there.
        let _ = tree.write(Path::new("climb/new"), b"x", 0o644);
        let _ = tree.write(Path::new("absolute/new"), b"x", 0o644);
        let _ = tree.empty(Path::new("climb"));
        let names: Vec<_> = std::fs::read_dir(outer.path().join("outside")).unwrap().collect();
        assert_eq!(names.len(), 1);
        assert_eq!(std::fs::read_to_string(outer.path().join("outside/secret")).unwrap(), "secret");
    }

    #[test]
    fn a_link_is_replaced_not_followed_and_links_within_work() {
        let (outer, tree) = tree();
        let root = outer.path().join("root");
        std::fs::write(outer.path().join("victim"), "untouched").unwrap();
        std::fs::create_dir_all(root.join("usr/etc")).unwrap();
        symlink("/usr/etc", root.join("etc")).unwrap();
        symlink(outer.path().join("victim"), root.join("usr/etc/resolv.conf")).unwrap();
        tree.write(Path::new("etc/resolv.conf"), b"new", 0o640).unwrap();
        assert_eq!(std::fs::read_to_string(root.join("usr/etc/resolv.conf")).unwrap(), "new");
        assert_eq!(std::fs::read_to_string(outer.path().join("victim")).unwrap(), "untouched");
        tree.append(Path::new("/etc/resolv.conf"), b" and more").unwrap();
        assert_eq!(tree.read(Path::new("etc/resolv.conf"), 5).unwrap().unwrap(), b"new a");
        assert!(tree.write(Path::new("usr/etc"), b"x", 0o644).is_err());
        assert!(tree.write(Path::new("/"), b"x", 0o644).is_err());
    }

    #[test]
    fn removal_and_emptying_go_as_far_as_the_root() {
        let (outer, tree) = tree();
        let root = outer.path().join("root");
        tree.write(Path::new("var/cache/apt/a/b"), b"x", 0o644).unwrap();
        tree.write(Path::new("var/cache/apt/c"), b"x", 0o644).unwrap();
        symlink("nowhere", root.join("dangling")).unwrap();
        tree.empty(Path::new("var/cache/apt")).unwrap();
        assert!(root.join("var/cache/apt").is_dir());
        assert_eq!(std::fs::read_dir(root.join("var/cache/apt")).unwrap().count(), 0);
        tree.remove(Path::new("var")).unwrap();
        assert!(!root.join("var").exists());
        for path in ["gone", "gone/further", "/"] {
            tree.remove(Path::new(path)).unwrap();
        }
        tree.empty(Path::new("gone")).unwrap();
        assert!(root.exists());
        assert!(tree.make_directories(Path::new("dangling/x")).is_err());
    }

    #[test]
    fn only_regular_files_are_read() {
        let (outer, tree) = tree();
        let pipe = outer.path().join("root/pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        assert!(tree.read(Path::new("pipe"), 10).is_err());
        assert!(tree.read(Path::new("."), 10).is_err());
        assert!(Tree::open(&pipe).is_err());
    }
}
