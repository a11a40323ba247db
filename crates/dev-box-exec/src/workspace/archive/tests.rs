use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use proptest::prelude::*;

use super::*;

fn unpacked(archive: &[u8], into: &Path) -> Result<Unpacked, ArchiveError> {
    unpack(archive, into, &Limits::default(), None, &Stop::default())
}

fn packed(dir: &Path) -> Vec<u8> {
    let mut archive = Vec::new();
    pack(dir, &mut archive, &Limits::default(), &Stop::default()).unwrap();
    archive
}

/// Name, kind, target, content.
type Entry<'a> = (&'a [u8], EntryType, &'a [u8], &'a [u8]);

/// An archive with these entries, whatever they are called, and its end.
fn archive(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (name, kind, link, content) in entries {
        let mut header = Header::new_gnu();
        let gnu = header.as_gnu_mut().unwrap();
        gnu.name[..name.len()].copy_from_slice(name);
        gnu.linkname[..link.len()].copy_from_slice(link);
        header.set_entry_type(*kind);
        header.set_mode(0o6755);
        header.set_size(content.len() as u64);
        header.set_cksum();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(content);
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
    }
    bytes.resize(bytes.len() + 2 * BLOCK, 0);
    bytes
}

#[test]
fn a_tree_survives_the_way() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let name = OsStr::from_bytes(b"not utf-8 \xff\n");
    let deep = from.path().join("n".repeat(200)).join("m".repeat(255));
    std::fs::create_dir_all(&deep).unwrap();
    std::fs::write(deep.join(name), "content").unwrap();
    std::fs::set_permissions(deep.join(name), std::fs::Permissions::from_mode(0o751)).unwrap();
    symlink("/etc/shadow", from.path().join("link")).unwrap();
    let sparse = File::create(from.path().join("sparse")).unwrap();
    sparse.set_len(1 << 30).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"middle", 500 << 20).unwrap();
    let archive = packed(from.path());
    assert!(archive.len() < 1 << 20, "holes are not sent: {}", archive.len());
    let done = unpacked(&archive, &to.path().join("made")).unwrap();
    assert_eq!((done.files, done.directories, done.links, done.refusals), (2, 2, 1, 0));
    let to = to.path().join("made");
    let file = to.join("n".repeat(200)).join("m".repeat(255)).join(name);
    assert_eq!(std::fs::read(&file).unwrap(), b"content");
    assert_eq!(file.metadata().unwrap().mode() & 0o7777, 0o751);
    assert_eq!(std::fs::read_link(to.join("link")).unwrap(), Path::new("/etc/shadow"));
    let meta = to.join("sparse").metadata().unwrap();
    assert_eq!(meta.len(), 1 << 30);
    assert!(meta.blocks() * 512 < 1 << 20, "holes stay holes");
    let mut middle = [0; 6];
    std::os::unix::fs::FileExt::read_exact_at(
        &File::open(to.join("sparse")).unwrap(),
        &mut middle,
        500 << 20,
    )
    .unwrap();
    assert_eq!(&middle, b"middle");
}

#[test]
fn nothing_gets_out() {
    let dir = tempfile::tempdir().unwrap();
    let (outside, into) = (dir.path().join("outside"), dir.path().join("into"));
    std::fs::create_dir_all(&outside).unwrap();
    std::fs::create_dir_all(&into).unwrap();
    let file = EntryType::Regular;
    let target = outside.as_os_str().as_bytes();
    let archive = archive(&[
        (b"../outside/a", file, b"", b"x"),
        (b"/tmp/dev-box-b", file, b"", b"x"),
        (b"sub/../../outside/c", file, b"", b"x"),
        (b"link", EntryType::Symlink, target, b""),
        (b"link/d", file, b"", b"x"),
        (b"hard", EntryType::Link, b"/etc/shadow", b""),
        (b"fifo", EntryType::Fifo, b"", b""),
        (b"device", EntryType::Char, b"", b""),
        (b"empty link", EntryType::Symlink, b"", b""),
        (b"good", file, b"", b"yes"),
    ]);
    let done = unpacked(&archive, &into).unwrap();
    assert_eq!((done.files, done.links, done.refusals), (1, 1, 8), "{:?}", done.refused);
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
    assert!(!Path::new("/tmp/dev-box-b").exists());
    assert_eq!(std::fs::read(into.join("good")).unwrap(), b"yes");
    assert_eq!(into.join("good").metadata().unwrap().mode() & 0o7777, 0o755, "no set-id bits");
    assert!(
        std::fs::read_dir(&into).unwrap().all(|e| !e
            .unwrap()
            .file_name()
            .as_bytes()
            .starts_with(b".dev-box"))
    );
}

#[test]
fn a_link_that_was_there_is_replaced_not_followed() {
    let dir = tempfile::tempdir().unwrap();
    let outside = dir.path().join("outside");
    std::fs::write(&outside, "old").unwrap();
    let into = dir.path().join("into");
    std::fs::create_dir_all(into.join("taken")).unwrap();
    symlink(&outside, into.join("file")).unwrap();
    let file = EntryType::Regular;
    let done =
        unpacked(&archive(&[(b"file", file, b"", b"new"), (b"taken", file, b"", b"")]), &into).unwrap();
    assert_eq!((done.files, done.refusals), (1, 1));
    assert_eq!(std::fs::read(&outside).unwrap(), b"old");
    assert_eq!(std::fs::read(into.join("file")).unwrap(), b"new");
}

#[test]
fn too_much_is_too_much() {
    let to = tempfile::tempdir().unwrap();
    let limited =
        |limits: Limits, bytes: &[u8]| unpack(bytes, to.path(), &limits, None, &Stop::default()).unwrap_err();
    let file = EntryType::Regular;
    let two = archive(&[(b"a", file, b"", &[1; 600]), (b"b", file, b"", &[1; 600])]);
    let few = Limits { entries: 1, ..Limits::default() };
    assert!(matches!(limited(few, &two), ArchiveError::Limit(LimitReached::Entries(1))));
    let small = Limits { bytes: 1000, ..Limits::default() };
    assert!(matches!(limited(small, &two), ArchiveError::Limit(LimitReached::Bytes(1000))));
    let flat = Limits { depth: 1, ..Limits::default() };
    let deep = archive(&[(b"a/b/c", file, b"", b"")]);
    assert!(matches!(limited(flat, &deep), ArchiveError::Limit(LimitReached::Depth(1))));
    let name = archive(&[(b"././@LongLink", EntryType::GNULongName, b"", &[b'x'; 5000])]);
    assert!(matches!(limited(Limits::default(), &name), ArchiveError::Malformed(_)));
    // A refused entry's bytes count as well: they came.
    let refused = archive(&[(b"../a", file, b"", &[1; 2000])]);
    assert!(matches!(limited(small, &refused), ArchiveError::Limit(LimitReached::Bytes(1000))));
    let stop = Stop::default();
    stop.stop();
    let stopped = unpack(&*two, to.path(), &Limits::default(), None, &stop);
    assert!(matches!(stopped, Err(ArchiveError::Stopped)));
    assert!(matches!(pack(to.path(), io::sink(), &few, &stop), Ok(_) | Err(ArchiveError::Stopped)));
}

#[test]
fn special_files_are_left_out_and_named() {
    let from = tempfile::tempdir().unwrap();
    let at = |name: &str| from.path().join(name);
    std::fs::create_dir(at("sub")).unwrap();
    std::fs::write(at("sub/file"), "kept").unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, at("sub/fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    let mut archive = Vec::new();
    let packed = pack(from.path(), &mut archive, &Limits::default(), &Stop::default()).unwrap();
    let refused: Vec<_> = packed.refused.iter().map(|one| (one.path.to_str().unwrap(), &one.why)).collect();
    assert_eq!(refused, [("socket", &Refusal::Socket), ("sub/fifo", &Refusal::Fifo)]);
    assert_eq!((packed.refusals, packed.entries), (2, 2));
    let to = tempfile::tempdir().unwrap();
    let done = unpacked(&archive, to.path()).unwrap();
    assert_eq!((done.directories, done.files, done.refusals), (1, 1, 0));
}

/// As an agent sends them, and as none does: however many there are, a hundred have names, and all count.
#[test]
fn special_entries_are_named_and_counted() {
    let name = |n: usize| format!("dir/{n}").into_bytes();
    let names: Vec<_> = (0..150).map(name).collect();
    let kinds = [EntryType::Fifo, EntryType::Char, EntryType::Block];
    let mut entries: Vec<Entry<'_>> = names
        .iter()
        .zip(kinds.iter().cycle())
        .map(|(name, kind)| (&**name, *kind, &b""[..], &b""[..]))
        .collect();
    // One that claims to have content, which is skipped.
    entries.insert(1, (b"fat", EntryType::Fifo, b"", &[7; 700]));
    entries.push((b"last", EntryType::Regular, b"", b"x"));
    let mut bytes = archive(&entries);
    let socket = Header::from_byte_slice(&bytes[..BLOCK]).clone();
    let mut socket = socket;
    socket.set_mode(0o140_755);
    socket.set_cksum();
    bytes[..BLOCK].copy_from_slice(socket.as_bytes());
    let to = tempfile::tempdir().unwrap();
    let done = unpacked(&bytes, to.path()).unwrap();
    assert_eq!((done.files, done.directories, done.refusals, done.refused.len()), (1, 0, 151, 100));
    let first: Vec<_> =
        done.refused.iter().take(4).map(|one| (one.path.to_str().unwrap(), &one.why)).collect();
    let wanted = [
        ("dir/0", &Refusal::Socket),
        ("fat", &Refusal::Fifo),
        ("dir/1", &Refusal::Device),
        ("dir/2", &Refusal::Device),
    ];
    assert_eq!(first, wanted);
    assert_eq!(std::fs::read_dir(to.path()).unwrap().count(), 1, "nothing is made of them");
    let few = Limits { entries: 151, ..Limits::default() };
    let refused = unpack(&*bytes, to.path(), &few, None, &Stop::default());
    assert!(matches!(refused, Err(ArchiveError::Limit(LimitReached::Entries(151)))), "{refused:?}");
}

#[test]
fn what_is_no_archive_is_said_so() {
    let to = tempfile::tempdir().unwrap();
    assert!(matches!(unpacked(b"short", to.path()), Err(ArchiveError::Read(_))));
    assert!(matches!(unpacked(&[1; 1024], to.path()), Err(ArchiveError::Malformed(_))));
    let cut = &archive(&[(b"a", EntryType::Regular, b"", &[1; 600])])[..700];
    assert!(matches!(unpacked(cut, to.path()), Err(ArchiveError::Read(_))));
    assert_eq!(std::fs::read_dir(to.path()).unwrap().count(), 0, "no half file is left");
    let missing = pack(&to.path().join("missing"), io::sink(), &Limits::default(), &Stop::default());
    assert!(matches!(missing, Err(ArchiveError::Host { .. })));
}

proptest! {
    #[test]
    fn any_bytes_end_in_order(start in prop::collection::vec(any::<u8>(), 0..700), at in 0usize..1500, byte: u8) {
        let to = tempfile::tempdir().unwrap();
        let into = to.path().join("into");
        let _ = unpacked(&start, &into);
        let mut bytes = archive(&[(b"a/b", EntryType::Regular, b"", &[7; 100]), (b"c", EntryType::Symlink, b"/x", b"")]);
        let at = at.min(bytes.len() - 1);
        bytes[at] = byte;
        let _ = unpacked(&bytes, &into);
        prop_assert_eq!(std::fs::read_dir(to.path()).unwrap().count(), 1);
    }
}
