//! Files for the host: what its requests mean to root in the guest. Everything here blocks, and is called from threads that may.

pub mod content;
pub mod tree;

use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use dev_box_comm::message::{
    DirEntry, FileKind, FileStat, GuestError, GuestErrorKind, MakeDir, PathRequest, Remove, Rename, WireBytes,
};

use crate::passwd::{Accounts, Identity};

/// Entries of one directory that are listed at most; more is an error, since a part would be taken for the whole.
pub const MAX_ENTRIES: usize = 1_000_000;

/// The path of a request: absolute, and without a NUL byte.
///
/// # Errors
/// `InvalidRequest` otherwise.
pub fn path_of(path: &WireBytes) -> Result<PathBuf, GuestError> {
    if path.as_bytes().contains(&0) || !path.as_path().is_absolute() {
        let text = format!("{path:?} is not an absolute path");
        return Err(GuestError::new(GuestErrorKind::InvalidRequest, text));
    }
    Ok(path.as_path().to_owned())
}

/// Who is to own a new file: root, or whom `owner` names.
///
/// # Errors
/// `NotFound` for a user the guest does not have.
pub fn owner_of(owner: Option<&str>) -> Result<Option<Identity>, GuestError> {
    owner
        .map(|owner| {
            Accounts::read(Path::new("/"))
                .resolve(owner)
                .map_err(|error| GuestError::new(GuestErrorKind::NotFound, error.to_string()))
        })
        .transpose()
}

/// An error of the file system, saying what was being done to what.
pub(crate) fn failed(what: &str, path: &Path, error: &io::Error) -> GuestError {
    GuestError::from_io(&format!("{what} {}", path.display()), error)
}

/// Metadata of a path.
///
/// # Errors
/// What the file system said.
pub fn stat(request: &PathRequest) -> Result<FileStat, GuestError> {
    let path = path_of(&request.path)?;
    let metadata = if request.follow { std::fs::metadata(&path) } else { std::fs::symlink_metadata(&path) };
    let metadata = metadata.map_err(|error| failed("stat", &path, &error))?;
    Ok(stat_of(&path, &metadata))
}

fn stat_of(path: &Path, metadata: &std::fs::Metadata) -> FileStat {
    let kind = metadata.file_type();
    let link = if kind.is_symlink() { std::fs::read_link(path).ok().map(WireBytes::from) } else { None };
    FileStat {
        kind: match kind {
            kind if kind.is_file() => FileKind::File,
            kind if kind.is_dir() => FileKind::Directory,
            kind if kind.is_symlink() => FileKind::Symlink,
            _ => FileKind::Other,
        },
        size: if kind.is_block_device() { 0 } else { metadata.size() },
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        modified_ns: metadata.mtime().saturating_mul(1_000_000_000).saturating_add(metadata.mtime_nsec()),
        link,
    }
}

/// A directory's entries, sorted by name. One that vanishes meanwhile is left out.
///
/// # Errors
/// What the file system said; `TooMany` past [`MAX_ENTRIES`].
pub fn list(request: &PathRequest) -> Result<Vec<DirEntry>, GuestError> {
    let path = path_of(&request.path)?;
    if !request.follow && std::fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_symlink()) {
        let error = io::Error::from_raw_os_error(libc::ENOTDIR);
        return Err(failed("list", &path, &error));
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(&path).map_err(|error| failed("list", &path, &error))? {
        let entry = entry.map_err(|error| failed("list", &path, &error))?;
        let Ok(metadata) = entry.metadata() else { continue };
        if found.len() == MAX_ENTRIES {
            let text = format!("{} has more than {MAX_ENTRIES} entries", path.display());
            return Err(GuestError::new(GuestErrorKind::TooMany, text));
        }
        let stat = stat_of(&entry.path(), &metadata);
        found.push(DirEntry { name: WireBytes::from(entry.file_name()), stat });
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// Makes a directory, and with `parents` what is missing above it.
///
/// # Errors
/// What the file system said.
pub fn make_directory(request: &MakeDir) -> Result<(), GuestError> {
    use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
    let path = path_of(&request.path)?;
    let owner = owner_of(request.owner.as_deref())?;
    let mode = request.mode.unwrap_or(0o755) & 0o7777;
    if request.parents {
        if path.is_dir() {
            return Ok(());
        }
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(|error| failed("make", parent, &error))?;
        }
    }
    std::fs::DirBuilder::new().mode(mode).create(&path).map_err(|error| failed("make", &path, &error))?;
    // The agent's own mask must not count.
    let set = std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode));
    set.map_err(|error| failed("set the mode of", &path, &error))?;
    if let Some(owner) = owner {
        let changed = std::os::unix::fs::lchown(&path, Some(owner.uid), Some(owner.gid));
        changed.map_err(|error| failed("change the owner of", &path, &error))?;
    }
    Ok(())
}

/// Moves a file or directory within one file system.
///
/// # Errors
/// `AlreadyExists` without `replace`, and what the file system said.
pub fn rename(request: &Rename) -> Result<(), GuestError> {
    let (from, to) = (path_of(&request.from)?, path_of(&request.to)?);
    let moved = if request.replace { std::fs::rename(&from, &to) } else { rename_new(&from, &to) };
    moved
        .map_err(|error| GuestError::from_io(&format!("move {} to {}", from.display(), to.display()), &error))
}

/// Renames unless the target is there.
pub(crate) fn rename_new(from: &Path, to: &Path) -> io::Result<()> {
    use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
    match renameat2(AT_FDCWD, from, AT_FDCWD, to, RenameFlags::RENAME_NOREPLACE) {
        // A file system (9p) that cannot: the check is then not atomic.
        Err(nix::errno::Errno::EINVAL) if std::fs::symlink_metadata(to).is_err() => std::fs::rename(from, to),
        Err(nix::errno::Errno::EINVAL) => Err(io::Error::from_raw_os_error(libc::EEXIST)),
        outcome => Ok(outcome?),
    }
}

/// Removes a file, an empty directory, or with `recursive` a whole tree; a symlink is removed, never followed.
///
/// # Errors
/// What the file system said.
pub fn remove(request: &Remove) -> Result<(), GuestError> {
    let path = path_of(&request.path)?;
    let metadata = match std::fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && request.missing_ok => return Ok(()),
        outcome => outcome.map_err(|error| failed("remove", &path, &error))?,
    };
    let removed = match (metadata.is_dir(), request.recursive) {
        (true, true) => std::fs::remove_dir_all(&path),
        (true, false) => std::fs::remove_dir(&path),
        (false, _) => std::fs::remove_file(&path),
    };
    removed.map_err(|error| failed("remove", &path, &error))
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;

    use proptest::prelude::*;

    use super::*;

    fn request(path: &Path) -> PathRequest {
        PathRequest { path: path.into(), follow: false }
    }

    #[test]
    fn only_absolute_paths_are_taken() {
        for path in ["", "a", "../a", "/a\0b"] {
            assert_eq!(path_of(&WireBytes::from(path)).unwrap_err().kind, GuestErrorKind::InvalidRequest);
        }
        assert_eq!(path_of(&WireBytes::from("/a b")).unwrap(), Path::new("/a b"));
    }

    #[test]
    fn a_directory_is_listed_with_names_of_any_bytes() {
        let root = tempfile::tempdir().unwrap();
        let odd = OsStr::from_bytes(b"new\nline\xff");
        std::fs::write(root.path().join(odd), "12345").unwrap();
        std::os::unix::fs::symlink("/nowhere", root.path().join("link")).unwrap();
        std::fs::create_dir(root.path().join("dir")).unwrap();
        let made = std::process::Command::new("mkfifo").arg(root.path().join("fifo")).status().unwrap();
        assert!(made.success());
        let entries = list(&request(root.path())).unwrap();
        let kinds: Vec<FileKind> = entries.iter().map(|entry| entry.stat.kind).collect();
        assert_eq!(kinds, [FileKind::Directory, FileKind::Other, FileKind::Symlink, FileKind::File]);
        assert_eq!(entries[3].name.as_bytes(), odd.as_bytes());
        assert_eq!(entries[3].stat.size, 5);
        assert_eq!(entries[2].stat.link, Some(WireBytes::from("/nowhere")));
    }

    #[test]
    fn symlinks_are_followed_only_when_asked() {
        let root = tempfile::tempdir().unwrap();
        let link = root.path().join("link");
        std::os::unix::fs::symlink(root.path(), &link).unwrap();
        assert_eq!(stat(&request(&link)).unwrap().kind, FileKind::Symlink);
        let followed = PathRequest { follow: true, ..request(&link) };
        assert_eq!(stat(&followed).unwrap().kind, FileKind::Directory);
        assert_eq!(list(&request(&link)).unwrap_err().kind, GuestErrorKind::NotADirectory);
        assert_eq!(list(&followed).unwrap().len(), 1);
        let missing = request(&root.path().join("none"));
        assert_eq!(stat(&missing).unwrap_err().kind, GuestErrorKind::NotFound);
        assert_eq!(list(&missing).unwrap_err().kind, GuestErrorKind::NotFound);
    }

    #[test]
    fn directories_are_made_with_their_mode() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a/b");
        let wanted = MakeDir { path: path.clone().into(), mode: Some(0o1777), parents: false, owner: None };
        assert_eq!(make_directory(&wanted).unwrap_err().kind, GuestErrorKind::NotFound);
        let wanted = MakeDir { parents: true, ..wanted };
        make_directory(&wanted).unwrap();
        make_directory(&wanted).unwrap();
        assert_eq!(stat(&request(&path)).unwrap().mode, 0o1777);
        let again = MakeDir { parents: false, ..wanted.clone() };
        assert_eq!(make_directory(&again).unwrap_err().kind, GuestErrorKind::AlreadyExists);
        let nobody = MakeDir { owner: Some("no-such-user".into()), ..wanted };
        assert_eq!(make_directory(&nobody).unwrap_err().kind, GuestErrorKind::NotFound);
        let me = nix::unistd::geteuid().to_string();
        let own = MakeDir { path: root.path().join("c").into(), mode: None, parents: false, owner: Some(me) };
        make_directory(&own).unwrap();
    }

    #[test]
    fn moving_replaces_only_when_told() {
        let root = tempfile::tempdir().unwrap();
        let (from, to) = (root.path().join("from"), root.path().join("to"));
        std::fs::write(&from, "new").unwrap();
        std::fs::write(&to, "old").unwrap();
        let wanted = Rename { from: from.into(), to: to.clone().into(), replace: false };
        assert_eq!(rename(&wanted).unwrap_err().kind, GuestErrorKind::AlreadyExists);
        rename(&Rename { replace: true, ..wanted.clone() }).unwrap();
        assert_eq!(std::fs::read_to_string(&to).unwrap(), "new");
        assert_eq!(rename(&wanted).unwrap_err().kind, GuestErrorKind::NotFound);
    }

    #[test]
    fn removing_never_follows_and_can_forgive() {
        let root = tempfile::tempdir().unwrap();
        let (kept, tree) = (root.path().join("kept"), root.path().join("tree"));
        std::fs::create_dir_all(kept.join("inside")).unwrap();
        std::fs::create_dir(&tree).unwrap();
        std::os::unix::fs::symlink(&kept, tree.join("link")).unwrap();
        let wanted = Remove { path: tree.clone().into(), recursive: false, missing_ok: false };
        assert_eq!(remove(&wanted).unwrap_err().kind, GuestErrorKind::NotEmpty);
        remove(&Remove { recursive: true, ..wanted.clone() }).unwrap();
        assert!(kept.join("inside").is_dir() && !tree.exists());
        assert_eq!(remove(&wanted).unwrap_err().kind, GuestErrorKind::NotFound);
        remove(&Remove { missing_ok: true, ..wanted }).unwrap();
        let directory = Remove { path: kept.join("inside").into(), recursive: false, missing_ok: false };
        remove(&directory).unwrap();
        std::fs::write(kept.join("file"), "").unwrap();
        remove(&Remove { path: kept.join("file").into(), ..directory }).unwrap();
    }

    proptest! {
        #[test]
        fn hostile_paths_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let path = WireBytes::from([b"/nowhere/".as_slice(), &bytes].concat());
            let _ = stat(&PathRequest { path: path.clone(), follow: true });
            let _ = list(&PathRequest { path, follow: false });
        }
    }
}
