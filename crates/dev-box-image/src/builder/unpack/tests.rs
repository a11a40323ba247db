use std::cell::Cell;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};

use proptest::prelude::*;
use tar::{Builder, Header};

use super::*;

fn header(kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_000_000_000);
    header
}

/// An archive of entries: kind, name (as it stands, checked by nobody), link target, content.
fn archive(entries: &[(EntryType, &str, &str, &[u8])]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (kind, name, target, content) in entries {
        let mut header = header(*kind, content.len() as u64);
        let gnu = header.as_gnu_mut().unwrap();
        gnu.name[..name.len()].copy_from_slice(name.as_bytes());
        gnu.linkname[..target.len()].copy_from_slice(target.as_bytes());
        header.set_cksum();
        builder.append(&header, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

struct Target {
    outer: tempfile::TempDir,
}

impl Target {
    fn new() -> Self {
        let outer = tempfile::tempdir().unwrap();
        fs::create_dir(outer.path().join("root")).unwrap();
        Self { outer }
    }

    fn root(&self) -> PathBuf {
        self.outer.path().join("root")
    }

    fn unpack_within(&self, bytes: &[u8], limits: UnpackLimits) -> Result<u64, UnpackError> {
        unpack(bytes, bytes.len() as u64, &self.root(), &limits, &mut |_| true)
    }

    fn unpack(&self, bytes: &[u8]) -> Result<u64, UnpackError> {
        self.unpack_within(bytes, UnpackLimits::default())
    }

    /// Nothing lies beside the root.
    fn kept_inside(&self) -> bool {
        fs::read_dir(self.outer.path()).unwrap().count() == 1
    }
}

const FILE: EntryType = EntryType::Regular;
const DIR: EntryType = EntryType::Directory;
const SYMLINK: EntryType = EntryType::Symlink;
const LINK: EntryType = EntryType::Link;

#[test]
fn an_ordinary_root_file_system_is_unpacked_as_it_was() {
    let target = Target::new();
    let bytes = archive(&[
        (DIR, "./", "", b""),
        (DIR, "./usr/bin/", "", b""),
        (SYMLINK, "./bin", "usr/bin", b""),
        (FILE, "./bin/tool", "", b"tool"),
        (DIR, "./bin", "", b""),
        (LINK, "./usr/bin/same", "./usr/bin/tool", b""),
        (SYMLINK, "./etc/mtab", "/proc/self/mounts", b""),
        (EntryType::Char, "./dev/null", "", b""),
        (EntryType::Fifo, "./run/pipe", "", b""),
    ]);
    assert_eq!(target.unpack(&bytes).unwrap(), 2);
    let root = target.root();
    assert_eq!(fs::read_link(root.join("bin")).unwrap(), Path::new("usr/bin"));
    assert_eq!(fs::read(root.join("usr/bin/tool")).unwrap(), b"tool");
    assert_eq!(fs::metadata(root.join("usr/bin/same")).unwrap().nlink(), 2);
    assert_eq!(fs::read_link(root.join("etc/mtab")).unwrap(), Path::new("/proc/self/mounts"));
    assert_eq!(fs::metadata(root.join("usr/bin/tool")).unwrap().mtime(), 1_000_000_000);
    assert!(!root.join("dev/null").exists());
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    for name in ["../evil", "a/../../evil", "/evil", "./a/../evil"] {
        let target = Target::new();
        let error = target.unpack(&archive(&[(FILE, name, "", b"x")])).unwrap_err();
        assert!(matches!(error, UnpackError::Name { .. }), "{name}: {error}");
        let error =
            target.unpack(&archive(&[(FILE, "good", "", b"x"), (LINK, "evil", name, b"")])).unwrap_err();
        assert!(matches!(error, UnpackError::Name { .. }), "{name}: {error}");
        assert!(target.kept_inside());
    }
    let deep = "d/".repeat(48) + "f";
    let limits = UnpackLimits { depth: 40, ..UnpackLimits::default() };
    assert!(matches!(
        Target::new().unpack_within(&archive(&[(FILE, &deep, "", b"")]), limits),
        Err(UnpackError::Name { why: "too deep", .. })
    ));
    let layer = Target::new().unpack(&archive(&[(FILE, "etc/.wh.passwd", "", b"")])).unwrap_err();
    assert!(layer.to_string().contains("docker export"), "{layer}");
    assert!(Target::new().unpack(&archive(&[(SYMLINK, "x", "", b"")])).is_err());
}

#[test]
fn links_do_not_lead_out_whatever_is_written_through_them() {
    let target = Target::new();
    let outside = target.outer.path().join("outside");
    let absolute = outside.to_str().unwrap();
    for link in ["../outside", "/../outside", absolute, "../../../../../../../../../../tmp"] {
        fs::create_dir_all(&outside).unwrap();
        let _ = fs::remove_dir_all(target.root());
        fs::create_dir(target.root()).unwrap();
        let _ = target.unpack(&archive(&[(SYMLINK, "way", link, b""), (FILE, "way/evil", "", b"x")]));
        let _ = target.unpack(&archive(&[(SYMLINK, "file", link, b""), (FILE, "file", "", b"x")]));
        let _ = target.unpack(&archive(&[(SYMLINK, "h", link, b""), (LINK, "same", "h", b"")]));
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0, "{link}");
        assert!(!Path::new("/tmp/evil").exists());
        fs::remove_dir(&outside).unwrap();
        assert!(target.kept_inside());
    }
}

#[test]
fn what_no_root_file_system_holds_is_refused() {
    let refused = |kind: EntryType, name: &str| {
        let error = Target::new().unpack(&archive(&[(kind, name, "", b"")])).unwrap_err();
        assert!(matches!(error, UnpackError::Kind { .. }), "{name}: {error}");
    };
    refused(EntryType::Block, "disk");
    refused(EntryType::Char, "etc/null");
    refused(EntryType::new(b'Z'), "x");
    refused(FILE, "./");
    let directory_link = archive(&[(DIR, "d", "", b""), (LINK, "e", "d", b"")]);
    assert!(matches!(Target::new().unpack(&directory_link), Err(UnpackError::Make { .. })));
    let over_directory = archive(&[(FILE, "d/x", "", b""), (FILE, "d", "", b"")]);
    assert!(matches!(Target::new().unpack(&over_directory), Err(UnpackError::Make { .. })));
    let under_file = archive(&[(FILE, "f", "", b""), (FILE, "f/x", "", b"")]);
    assert!(matches!(Target::new().unpack(&under_file), Err(UnpackError::Make { .. })));
    let directory_over_file = archive(&[(FILE, "f", "", b""), (DIR, "f", "", b"")]);
    assert!(matches!(Target::new().unpack(&directory_over_file), Err(UnpackError::Make { .. })));
}

#[test]
fn entries_bytes_and_ratio_are_limited() {
    let small = UnpackLimits { entries: 2, bytes: ByteSize::bytes(10), ..UnpackLimits::default() };
    let many = archive(&[(DIR, "a", "", b""), (DIR, "b", "", b""), (DIR, "c", "", b"")]);
    assert!(matches!(Target::new().unpack_within(&many, small), Err(UnpackError::TooMany(2))));
    let large = archive(&[(FILE, "a", "", b"12345"), (FILE, "b", "", b"678901")]);
    assert!(matches!(Target::new().unpack_within(&large, small), Err(UnpackError::TooLarge(_))));
    // 80 MiB from what claims to be 1 KiB on the disk.
    let target = Target::new();
    let zeroes = vec![0; 40 << 20];
    let bomb = archive(&[(FILE, "a", "", &zeroes), (FILE, "b", "", &zeroes)]);
    let bombed = unpack(bomb.as_slice(), 1024, &target.root(), &UnpackLimits::default(), &mut |_| true);
    assert!(matches!(bombed, Err(UnpackError::Ratio(100))), "{bombed:?}");
    // And one whose headers never end.
    let limits = UnpackLimits { entries: 10, bytes: ByteSize::bytes(10), ..UnpackLimits::default() };
    let mut endless = archive(&[(DIR, "a", "", b"")]);
    endless.truncate(512);
    let mut long_name = header(EntryType::GNULongName, 1 << 40);
    long_name.set_cksum();
    endless.extend_from_slice(long_name.as_bytes());
    let stream = endless.as_slice().chain(io::repeat(b'x').take(1 << 20));
    let target = Target::new();
    let root = target.root();
    let refused = unpack(stream, 1024, &root, &limits, &mut |_| true).unwrap_err();
    assert!(matches!(refused, UnpackError::TooLarge(_) | UnpackError::Read(_)), "{refused}");
}

#[test]
fn what_is_no_tarball_is_told() {
    assert!(matches!(Target::new().unpack(b""), Err(UnpackError::Empty)));
    assert!(matches!(Target::new().unpack(&[b'x'; 2000]), Err(UnpackError::Read(_))));
    let bytes = archive(&[(FILE, "a", "", &[7; 3000])]);
    assert!(Target::new().unpack(&bytes[..1024]).is_err());
    let nowhere = unpack(bytes.as_slice(), 1, Path::new("/nowhere"), &UnpackLimits::default(), &mut |_| true);
    assert!(matches!(nowhere, Err(UnpackError::Read(_))));
}

#[test]
fn a_stop_is_heard_between_entries_and_within_one() {
    let target = Target::new();
    let large = vec![1; 1 << 20];
    let bytes = archive(&[(FILE, "a", "", &large)]);
    let calls = Cell::new(0);
    let mut third = |_| {
        calls.set(calls.get() + 1);
        calls.get() < 3
    };
    let stopped = unpack(bytes.as_slice(), 1 << 20, &target.root(), &UnpackLimits::default(), &mut third);
    assert!(matches!(stopped, Err(UnpackError::Cancelled)));
}

#[test]
fn the_format_is_known_by_its_first_bytes() {
    let of = |bytes: &[u8]| {
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, bytes).unwrap();
        file.rewind().unwrap();
        decompressor(&mut file).unwrap()
    };
    assert_eq!(of(&[0x1f, 0x8b, 8]), Some("gzip"));
    assert_eq!(of(b"\xfd7zXZ\0more"), Some("xz"));
    assert_eq!(of(&[0x28, 0xb5, 0x2f, 0xfd]), Some("zstd"));
    assert_eq!(of(b"./"), None);
    assert_eq!(of(b""), None);
}

#[test]
fn modes_survive_and_owners_do_where_we_may() {
    let target = Target::new();
    let mut builder = Builder::new(Vec::new());
    let mut tool = header(FILE, 0);
    tool.set_mode(0o4755);
    tool.set_uid(12);
    tool.set_path("sudo").unwrap();
    tool.set_cksum();
    builder.append(&tool, io::empty()).unwrap();
    target.unpack(&builder.into_inner().unwrap()).unwrap();
    let metadata = fs::metadata(target.root().join("sudo")).unwrap();
    assert_eq!(metadata.mode() & 0o7777, 0o4755);
    if rustix::process::geteuid().is_root() {
        assert_eq!(metadata.uid(), 12);
    }
    // A link that stands in the way of a file is replaced.
    symlink("/etc/passwd", target.root().join("config")).unwrap();
    target.unpack(&archive(&[(FILE, "config", "", b"mine")])).unwrap();
    assert_eq!(fs::read(target.root().join("config")).unwrap(), b"mine");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn whatever_the_archive_nothing_leaves_the_root(
        entries in proptest::collection::vec((0usize..4, "[a-c./]{1,6}", "[a-c./]{1,6}"), 1..10)
    ) {
        let target = Target::new();
        let entries: Vec<_> = entries
            .iter()
            .map(|(kind, name, link)| ([FILE, DIR, SYMLINK, LINK][*kind], name.as_str(), link.as_str(), b"".as_slice()))
            .collect();
        let _ = target.unpack(&archive(&entries));
        prop_assert!(target.kept_inside());
    }
}
