use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, symlink};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, Mode};

use super::super::LimitReached;
use super::super::fixture::{Fixture, REGULAR, lines, set_mode};
use super::*;

fn refusals(found: &Scan) -> Vec<(String, Refusal)> {
    found.refused.iter().map(|refused| (refused.path.display().to_string(), refused.why.clone())).collect()
}

#[test]
fn nothing_touched_nothing_changed() {
    let fixture = Fixture::new();
    fixture.file("dir/file", "x");
    File::create(fixture.source.join("large")).unwrap().set_len(32 << 20).unwrap();
    symlink("dir", fixture.source.join("link")).unwrap();
    let staged = fixture.staged();
    let found = fixture.scan(&staged);
    assert_eq!((found.changes, found.refused), (vec![], vec![]));
}

#[test]
fn every_kind_of_change_is_found() {
    let fixture = Fixture::new();
    for path in [
        "same",
        "contents",
        "mode",
        "gone",
        "touched",
        "becomes-dir",
        "becomes-link",
        "was-dir/in-it",
        "dir/kept",
    ] {
        fixture.file(path, "12345");
    }
    symlink("old", fixture.source.join("link")).unwrap();
    symlink("same", fixture.source.join("same-link")).unwrap();
    let staged = fixture.staged();
    let share = |path: &str| fixture.share.join(path);
    fs::write(share("contents"), "54321").unwrap();
    set_mode(&share("mode"), 0o100_755);
    fs::remove_file(share("gone")).unwrap();
    File::open(share("touched"))
        .unwrap()
        .set_modified(std::time::UNIX_EPOCH + Duration::from_secs(1))
        .unwrap();
    fs::remove_file(share("becomes-dir")).unwrap();
    fixture.guest_dir("becomes-dir", 0o755);
    fixture.guest("becomes-dir/new", REGULAR, "new");
    fixture.guest_link("becomes-link", "same");
    fs::remove_dir_all(share("was-dir")).unwrap();
    fixture.guest("was-dir", REGULAR, "a file now");
    fixture.guest_link("link", "new target");
    set_mode(&share("dir"), 0o040_700);
    assert_eq!(
        lines(&fixture.scan(&staged).changes),
        [
            "becomes-dir Directory Modified Reported",
            "becomes-dir/new File Created Reported",
            "becomes-link Symlink Modified Reported",
            "contents File Modified Reported",
            "dir Directory Modified Reported",
            "gone File Deleted Reported",
            "link Symlink Modified Reported",
            "mode File Modified Reported",
            "was-dir File Modified Reported",
            "was-dir/in-it File Deleted Reported",
        ]
    );
}

/// A guest may put size and modification time back; the change time is the host kernel's.
#[test]
fn a_change_that_is_hidden_is_found() {
    let fixture = Fixture::new();
    fixture.file("small", "12345");
    let large = File::create(fixture.source.join("large")).unwrap();
    large.set_len(32 << 20).unwrap();
    let staged = fixture.staged();
    for name in ["small", "large"] {
        let path = fixture.share.join(name);
        let modified = path.metadata().unwrap().modified().unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(b"54321", 0).unwrap();
        file.set_modified(modified).unwrap();
    }
    assert_eq!(
        lines(&fixture.scan(&staged).changes),
        ["large File Modified Reported", "small File Modified Reported"]
    );
}

#[test]
fn special_files_are_refused_at_once() {
    let fixture = Fixture::new();
    fixture.file("was-a-file", "x");
    let staged = fixture.staged();
    for (name, kind) in
        [("fifo", 0o010_644_u32), ("socket", 0o140_644), ("block", 0o060_644), ("char", 0o020_644)]
    {
        fixture.guest(format!("virtual-{name}"), kind, "");
    }
    fixture.guest("odd", 0, "");
    let at = |name: &str| fixture.share.join(name);
    rustix::fs::mknodat(rustix::fs::CWD, at("real-fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at("real-socket")).unwrap();
    fs::remove_file(at("was-a-file")).unwrap();
    rustix::fs::mknodat(rustix::fs::CWD, at("was-a-file"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    symlink("/etc/shadow", at("real-link")).unwrap();
    symlink("/etc", at("real-dir-link")).unwrap();
    let mut expected = vec![
        ("odd", Refusal::BadAttributes),
        ("real-dir-link", Refusal::RealSymlink),
        ("real-fifo", Refusal::Fifo),
        ("real-link", Refusal::RealSymlink),
        ("real-socket", Refusal::Socket),
        ("virtual-block", Refusal::Device),
        ("virtual-char", Refusal::Device),
        ("virtual-fifo", Refusal::Fifo),
        ("virtual-socket", Refusal::Socket),
        ("was-a-file", Refusal::Fifo),
    ];
    let null = rustix::fs::makedev(1, 3);
    match rustix::fs::mknodat(rustix::fs::CWD, at("real-device"), FileType::CharacterDevice, Mode::RUSR, null)
    {
        Ok(()) => expected.insert(1, ("real-device", Refusal::Device)),
        Err(error) => eprintln!("without a real device: mknod: {error}"),
    }
    expected.sort_by_key(|(name, _)| *name);
    let before = Instant::now();
    let found = fixture.scan(&staged);
    assert!(before.elapsed() < Duration::from_secs(60), "nothing blocks");
    let expected: Vec<_> = expected.into_iter().map(|(name, why)| (name.to_owned(), why)).collect();
    assert_eq!(refusals(&found), expected);
    assert_eq!(found.changes, [], "what is refused is not reported as deleted");
}

#[test]
fn a_directory_that_cannot_be_looked_into_is_not_deleted() {
    let fixture = Fixture::new();
    fixture.file("dir/a", "x");
    fixture.file("dir/sub/b", "x");
    let staged = fixture.staged();
    set_mode(&fixture.share.join("dir"), 0o100_644);
    let found = fixture.scan(&staged);
    assert_eq!(refusals(&found), [("dir".to_owned(), Refusal::BadAttributes)]);
    assert_eq!(found.changes, []);
}

#[test]
fn files_of_others_are_refused() {
    let fixture = Fixture::new();
    let staged = fixture.staged();
    fixture.guest("file", REGULAR, "x");
    let me = rustix::process::geteuid().as_raw();
    let share = HostileShare::open(&fixture.share, Some(Owner { uid: me + 1, gid: 0 })).unwrap();
    let found = scan(&share, &staged.manifest, Limits::default(), &Stop::default()).unwrap();
    assert_eq!(refusals(&found), [("file".to_owned(), Refusal::ForeignOwner { uid: me })]);
    let share = HostileShare::open(&fixture.share, Some(Owner { uid: me, gid: 0 })).unwrap();
    let found = scan(&share, &staged.manifest, Limits::default(), &Stop::default()).unwrap();
    assert_eq!(lines(&found.changes), ["file File Created Reported"]);
}

#[test]
fn another_filesystem_is_refused() {
    let fixture = Fixture::new();
    let share = fixture.hostile();
    let root = HostileShare::open(Path::new("/"), None).unwrap();
    assert_eq!(root.entry(Path::new("proc/self")).unwrap_err(), Refusal::OtherFilesystem);
    assert_eq!(share.entry(Path::new("missing")).unwrap_err(), Refusal::Changed);
    assert_eq!(share.entry(Path::new("..")).unwrap_err(), Refusal::Changed);
    assert_eq!(share.entry(Path::new("../source/x")).unwrap_err(), Refusal::OtherFilesystem);
}

#[test]
fn names_may_be_anything() {
    let fixture = Fixture::new();
    let long = "n".repeat(255);
    let names: [&[u8]; 7] = [b"new\nline", b"\xff\xfe", b"\x1b[31m", b" ", b"-rf", b"\\", long.as_bytes()];
    for name in names {
        fs::write(fixture.source.join(OsStr::from_bytes(name)), "old").unwrap();
    }
    let staged = fixture.staged();
    assert_eq!(staged.manifest.len(), names.len());
    for name in names {
        fixture.guest(OsStr::from_bytes(name), REGULAR, "changed");
    }
    let found = fixture.scan(&staged);
    let mut expected: Vec<&OsStr> = names.iter().map(|name| OsStr::from_bytes(name)).collect();
    expected.sort();
    assert_eq!(found.changes.iter().map(|change| change.path.as_os_str()).collect::<Vec<_>>(), expected);
    assert!(found.changes.iter().all(|change| change.change == ChangeKind::Modified));
}

#[test]
fn links_are_read_and_judged() {
    let fixture = Fixture::new();
    fixture.file("dir/x", "x");
    let staged = fixture.staged();
    for (name, target) in [
        ("absolute", "/etc/shadow"),
        ("up", "../outside"),
        ("dir/up-and-in", "../file"),
        ("dir/up-and-out", "../../file"),
        ("in", "dir/x"),
        ("zigzag", "dir/../dir/../../x"),
        ("dangling", "./nowhere"),
    ] {
        fixture.guest_link(name, target);
    }
    fixture.guest_link("empty", "");
    fixture.guest_link("nul", "a\0b");
    fixture.guest_link("long", vec![b'x'; 4096]);
    fixture.guest_link("longest", vec![b'x'; 4095]);
    let found = fixture.scan(&staged);
    let escaping: Vec<_> = found
        .changes
        .iter()
        .filter(|change| change.escapes)
        .map(|change| change.path.to_str().unwrap())
        .collect();
    assert_eq!(escaping, ["absolute", "dir/up-and-out", "up", "zigzag"]);
    assert_eq!(found.changes.len(), 8);
    let bad: Vec<_> = refusals(&found);
    assert_eq!(bad, ["empty", "long", "nul"].map(|name| (name.to_owned(), Refusal::BadTarget)));
}

#[test]
fn a_tree_that_is_too_large_is_refused_before_anything_is_written() {
    let fixture = Fixture::new();
    let staged = fixture.staged();
    fixture.guest_dir("a", 0o755);
    fixture.guest_dir("a/b", 0o755);
    fixture.guest("a/b/file", REGULAR, "12345");
    let with = |limits: Limits| match scan(&fixture.hostile(), &staged.manifest, limits, &Stop::default()) {
        Err(CollectError::Limit(limit)) => Some(limit),
        Ok(_) => None,
        Err(error) => panic!("{error}"),
    };
    let all = Limits::default();
    assert_eq!(with(Limits { entries: 2, ..all }), Some(LimitReached::Entries(2)));
    assert_eq!(with(Limits { depth: 1, ..all }), Some(LimitReached::Depth(1)));
    assert_eq!(with(Limits { file_size: 4, ..all }), Some(LimitReached::FileSize(4)));
    assert_eq!(with(Limits { path_bytes: 11, ..all }), Some(LimitReached::PathBytes(11)));
    assert_eq!(with(Limits { entries: 3, depth: 2, file_size: 5, path_bytes: 12, bytes: 0 }), None);
    let stop = Stop::default();
    stop.stop();
    let stopped = scan(&fixture.hostile(), &staged.manifest, all, &stop);
    assert!(matches!(stopped, Err(CollectError::Stopped)));
}

#[test]
fn a_deep_tree_ends_at_the_limit() {
    let fixture = Fixture::new();
    let staged = fixture.staged();
    let mut path = PathBuf::new();
    for _ in 0..200 {
        path.push("d");
        fs::create_dir(fixture.share.join(&path)).unwrap();
    }
    let done = scan(&fixture.hostile(), &staged.manifest, Limits::default(), &Stop::default());
    assert!(matches!(done, Err(CollectError::Limit(LimitReached::Depth(64)))));
}

#[test]
fn a_hundred_thousand_files_are_counted_and_bounded() {
    let fixture = Fixture::in_memory();
    let staged = fixture.staged();
    let many = fixture.share.join("many");
    fs::create_dir(&many).unwrap();
    let first = many.join("0");
    File::create(&first).unwrap();
    // Links to one file: as many names, a fraction of the time.
    let mut from = first;
    for at in 1..100_000 {
        let name = many.join(at.to_string());
        if fs::hard_link(&from, &name).is_err() {
            File::create(&name).unwrap();
            from = name;
        }
    }
    let limits = Limits { entries: 50_000, ..Limits::default() };
    // The shortest of a few: any may be held up.
    let noticed = (0..3).map(|_| {
        let before = Instant::now();
        let done = scan(&fixture.hostile(), &staged.manifest, limits, &Stop::default());
        assert!(matches!(done, Err(CollectError::Limit(LimitReached::Entries(50_000)))));
        before.elapsed()
    });
    let noticed = noticed.min().unwrap();
    let before = Instant::now();
    let found = fixture.scan(&staged);
    assert!(
        noticed * 3 < before.elapsed() * 2,
        "noticed while listing: {noticed:?} of {:?}",
        before.elapsed()
    );
    assert_eq!(found.changes.len(), 100_001);
}

#[test]
fn a_share_that_is_not_there() {
    let fixture = Fixture::new();
    let error = HostileShare::open(&fixture.share.join("missing"), None).unwrap_err();
    assert!(matches!(&error, CollectError::Share { .. }), "{error}");
}
