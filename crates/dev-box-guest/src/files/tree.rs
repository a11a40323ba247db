//! Trees as tar streams (POSIX ustar with GNU long names and sparse files).
//!
//! An archive that is unpacked comes from the host, but may have been made from anything: entries that climb out of the
//! directory are refused, counts and sizes are bounded.

use std::fs::Metadata;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Component, Path};

use dev_box_comm::message::{GuestError, GuestErrorKind, Tree};

use super::{failed, owner_of, path_of};

/// Entries of one archive at most, when the request says nothing.
pub const DEFAULT_ENTRIES: u64 = 1_000_000;
/// Bytes of content at most, when the request says nothing.
pub const DEFAULT_BYTES: u64 = 64 * 1024 * 1024 * 1024;

/// Counts what passes, and refuses what is too much.
#[derive(Debug)]
struct Budget {
    entries: u64,
    bytes: u64,
}

impl Budget {
    fn new(request: &Tree) -> Self {
        Self {
            entries: request.max_entries.unwrap_or(DEFAULT_ENTRIES),
            bytes: request.max_bytes.unwrap_or(DEFAULT_BYTES),
        }
    }

    fn take(&mut self, bytes: u64) -> Result<(), GuestError> {
        match (self.entries.checked_sub(1), self.bytes.checked_sub(bytes)) {
            (Some(entries), Some(bytes)) => {
                (self.entries, self.bytes) = (entries, bytes);
                Ok(())
            }
            (None, _) => Err(GuestError::new(GuestErrorKind::TooMany, "the archive has too many entries")),
            (_, None) => Err(GuestError::new(GuestErrorKind::TooMany, "the archive has too many bytes")),
        }
    }
}

/// Writes the content of a directory as an archive: symlinks as such; of sockets, FIFOs and devices an entry without content, so that the
/// host can name what it leaves out.
///
/// # Errors
/// What the file system said, or the writer.
pub fn pack(request: &Tree, to: impl Write) -> Result<(), GuestError> {
    let root = path_of(&request.path)?;
    let metadata = std::fs::metadata(&root).map_err(|error| failed("pack", &root, &error))?;
    if !metadata.is_dir() {
        return Err(failed("pack", &root, &io::Error::from_raw_os_error(libc::ENOTDIR)));
    }
    let mut budget = Budget::new(request);
    let mut archive = tar::Builder::new(to);
    archive.follow_symlinks(false);
    archive.mode(tar::HeaderMode::Complete);
    pack_directory(&mut archive, &root, Path::new(""), &mut budget)?;
    archive.into_inner().and_then(|mut writer| writer.flush()).map_err(|error| failed("pack", &root, &error))
}

fn pack_directory(
    archive: &mut tar::Builder<impl Write>,
    root: &Path,
    relative: &Path,
    budget: &mut Budget,
) -> Result<(), GuestError> {
    let directory = root.join(relative);
    let entries = std::fs::read_dir(&directory).map_err(|error| failed("list", &directory, &error))?;
    let mut names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
    names.sort();
    for name in names {
        let inside = relative.join(&name);
        let path = directory.join(&name);
        // One that vanishes meanwhile is no error: the tree may be in use.
        let Ok(metadata) = std::fs::symlink_metadata(&path) else { continue };
        let kind = metadata.file_type();
        budget.take(if metadata.is_file() { metadata.len() } else { 0 })?;
        let appended = if kind.is_file() || kind.is_dir() || kind.is_symlink() {
            archive.append_path_with_name(&path, &inside)
        } else {
            append_special(archive, &metadata, &inside)
        };
        appended.map_err(|error| failed("pack", &path, &error))?;
        if metadata.is_dir() {
            pack_directory(archive, root, &inside, budget)?;
        }
    }
    Ok(())
}

/// tar knows no sockets: one is a FIFO whose mode says what it is. The library's own way with FIFOs and devices has their paths wrong.
fn append_special(
    archive: &mut tar::Builder<impl Write>,
    metadata: &Metadata,
    inside: &Path,
) -> io::Result<()> {
    let kind = metadata.file_type();
    let mut header = tar::Header::new_gnu();
    header.set_metadata(metadata);
    header.set_size(0);
    header.set_entry_type(if kind.is_char_device() {
        tar::EntryType::Char
    } else if kind.is_block_device() {
        tar::EntryType::Block
    } else {
        tar::EntryType::Fifo
    });
    archive.append_data(&mut header, inside, io::empty())
}

/// Unpacks an archive into a directory, which is made when it is not there.
///
/// # Errors
/// `InvalidRequest` for what is no archive or climbs out of the directory, `TooMany` past the limits, and what the file system
/// said. What was unpacked before stays.
pub fn unpack(request: &Tree, from: impl Read) -> Result<(), GuestError> {
    let root = path_of(&request.path)?;
    let owner = owner_of(request.owner.as_deref())?;
    std::fs::create_dir_all(&root).map_err(|error| failed("make", &root, &error))?;
    let mut budget = Budget::new(request);
    let mut archive = tar::Archive::new(from);
    archive.set_preserve_permissions(true);
    archive.set_preserve_mtime(true);
    archive.set_preserve_ownerships(owner.is_none() && nix::unistd::geteuid().is_root());
    let broken = |error: io::Error| {
        GuestError::new(GuestErrorKind::InvalidRequest, format!("the archive cannot be read: {error}"))
    };
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let inside = entry.path().map_err(broken)?.into_owned();
        if !stays_inside(&inside) {
            let text = format!("the archive's entry {} leads out of the directory", inside.display());
            return Err(GuestError::new(GuestErrorKind::InvalidRequest, text));
        }
        budget.take(entry.size())?;
        let kind = entry.header().entry_type();
        if kind.is_character_special() || kind.is_block_special() || kind.is_fifo() {
            continue;
        }
        unpack_entry(&mut entry, &root, &inside)?;
        adopt(&root.join(&inside), owner.as_ref().map(|owner| (owner.uid, owner.gid)))?;
    }
    Ok(())
}

fn unpack_entry(entry: &mut tar::Entry<'_, impl Read>, root: &Path, inside: &Path) -> Result<(), GuestError> {
    match entry.unpack_in(root) {
        Ok(true) => Ok(()),
        Ok(false) => {
            let text = format!("the archive's entry {} leads out of the directory", inside.display());
            Err(GuestError::new(GuestErrorKind::InvalidRequest, text))
        }
        Err(error) => Err(failed("unpack", &root.join(inside), &error)),
    }
}

fn adopt(path: &Path, owner: Option<(u32, u32)>) -> Result<(), GuestError> {
    let Some((uid, gid)) = owner else { return Ok(()) };
    std::os::unix::fs::lchown(path, Some(uid), Some(gid))
        .map_err(|error| failed("change the owner of", path, &error))
}

/// Whether a path has only names in it (and `.`).
fn stays_inside(path: &Path) -> bool {
    path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    use proptest::prelude::*;

    use super::*;

    fn tree(path: &Path) -> Tree {
        Tree { path: path.into(), owner: None, max_entries: None, max_bytes: None }
    }

    fn packed(path: &Path) -> Vec<u8> {
        let mut archive = Vec::new();
        pack(&tree(path), &mut archive).unwrap();
        archive
    }

    #[test]
    fn a_tree_survives_the_way() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let deep = from.path().join("a/").join("n".repeat(200)).join("b");
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::write(deep.join("run"), "#!/bin/sh").unwrap();
        std::fs::set_permissions(deep.join("run"), std::fs::Permissions::from_mode(0o751)).unwrap();
        std::os::unix::fs::symlink("/etc/shadow", from.path().join("link")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(from.path().join("socket")).unwrap();
        nix::unistd::mkfifo(&from.path().join("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        let target = to.path().join("made/for/it");
        unpack(&tree(&target), packed(from.path()).as_slice()).unwrap();
        let run = target.join("a").join("n".repeat(200)).join("b/run");
        assert_eq!(std::fs::read_to_string(&run).unwrap(), "#!/bin/sh");
        assert_eq!(std::fs::metadata(&run).unwrap().mode() & 0o7777, 0o751);
        assert_eq!(std::fs::read_link(target.join("link")).unwrap(), Path::new("/etc/shadow"));
        assert!(!target.join("socket").exists() && !target.join("fifo").exists());
    }

    #[test]
    fn special_files_are_entries_without_content() {
        let from = tempfile::tempdir().unwrap();
        let deep = from.path().join("n".repeat(200));
        std::fs::create_dir(&deep).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(from.path().join("socket")).unwrap();
        nix::unistd::mkfifo(&deep.join("fifo"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        std::fs::write(from.path().join("then"), "x").unwrap();
        let archive = packed(from.path());
        let mut archive = tar::Archive::new(archive.as_slice());
        let found: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let header = entry.header();
                let name = entry.path().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
                (name, header.entry_type(), header.mode().unwrap() & libc::S_IFMT, entry.size())
            })
            .skip(1)
            .collect();
        let fifo = tar::EntryType::Fifo;
        let wanted = [
            ("fifo", fifo, libc::S_IFIFO, 0),
            ("socket", fifo, libc::S_IFSOCK, 0),
            ("then", tar::EntryType::Regular, libc::S_IFREG, 1),
        ];
        assert_eq!(found, wanted.map(|(name, kind, mode, size)| (name.to_owned(), kind, mode, size)));
    }

    #[test]
    fn holes_stay_holes() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let file = std::fs::File::create(from.path().join("sparse")).unwrap();
        file.set_len(64 << 20).unwrap();
        let archive = packed(from.path());
        assert!(archive.len() < 1 << 20, "{} bytes", archive.len());
        unpack(&tree(to.path()), archive.as_slice()).unwrap();
        let metadata = std::fs::metadata(to.path().join("sparse")).unwrap();
        assert_eq!(metadata.len(), 64 << 20);
    }

    /// An archive with one entry whose name no well-behaved program would write.
    fn hostile(name: &str, kind: tar::EntryType) -> Vec<u8> {
        let mut header = tar::Header::new_gnu();
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(kind);
        header.set_size(0);
        header.set_mode(0o644);
        header.set_cksum();
        let mut archive = tar::Builder::new(Vec::new());
        archive.append(&header, io::empty()).unwrap();
        archive.into_inner().unwrap()
    }

    #[test]
    fn entries_that_climb_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let inner = root.path().join("inner");
        for name in ["../out", "/etc/out", "a/../../out"] {
            let archive = hostile(name, tar::EntryType::Regular);
            let refused = unpack(&tree(&inner), archive.as_slice()).unwrap_err();
            assert_eq!(refused.kind, GuestErrorKind::InvalidRequest, "{name}");
        }
        for special in [tar::EntryType::Char, tar::EntryType::Block, tar::EntryType::Fifo] {
            unpack(&tree(&inner), hostile("special", special).as_slice()).unwrap();
        }
        assert_eq!(std::fs::read_dir(&inner).unwrap().count(), 0);
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_symlink_in_the_archive_leads_nowhere() {
        let root = tempfile::tempdir().unwrap();
        let (inner, outside) = (root.path().join("inner"), root.path().join("outside"));
        std::fs::create_dir(&outside).unwrap();
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        archive.append_link(&mut header, "way", &outside).unwrap();
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        header.set_mode(0o644);
        archive.append_data(&mut header, "way/file", b"x".as_slice()).unwrap();
        let archive = archive.into_inner().unwrap();
        assert!(unpack(&tree(&inner), archive.as_slice()).is_err());
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    }

    #[test]
    fn limits_hold_both_ways() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in ["a", "b", "c"] {
            std::fs::write(from.path().join(name), "12345").unwrap();
        }
        let archive = packed(from.path());
        let few = |path: &Path| Tree { max_entries: Some(2), ..tree(path) };
        let small = |path: &Path| Tree { max_bytes: Some(14), ..tree(path) };
        for refused in [
            unpack(&few(to.path()), archive.as_slice()),
            unpack(&small(to.path()), archive.as_slice()),
            pack(&few(from.path()), io::sink()),
            pack(&small(from.path()), io::sink()),
        ] {
            assert_eq!(refused.unwrap_err().kind, GuestErrorKind::TooMany);
        }
        assert_eq!(
            pack(&tree(&from.path().join("a")), io::sink()).unwrap_err().kind,
            GuestErrorKind::NotADirectory
        );
        assert_eq!(
            pack(&tree(&from.path().join("x")), io::sink()).unwrap_err().kind,
            GuestErrorKind::NotFound
        );
    }

    #[test]
    fn everything_can_be_given_to_one_owner() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::write(from.path().join("f"), "").unwrap();
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: everything_can_be_given_to_one_owner needs root");
            return;
        }
        let wanted = Tree { owner: Some("4321".into()), ..tree(to.path()) };
        unpack(&wanted, packed(from.path()).as_slice()).unwrap();
        assert_eq!(std::fs::metadata(to.path().join("f")).unwrap().uid(), 4321);
    }

    proptest! {
        #[test]
        fn nonsense_is_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let root = tempfile::tempdir().unwrap();
            let _ = unpack(&tree(&root.path().join("in")), bytes.as_slice());
            prop_assert!(std::fs::read_dir(root.path()).unwrap().count() <= 1);
        }
    }
}
