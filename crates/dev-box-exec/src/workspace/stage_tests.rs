use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use super::super::fixture::{Fixture, get_attribute};
use super::super::{CollectTo, Limits};
use super::*;

fn refused(fixture: &Fixture, workspace: &WorkspaceIn) -> StageError {
    stage(&fixture.share, None, workspace, &Stop::default()).unwrap_err()
}

#[test]
fn a_tree_is_staged_as_9p_has_it() {
    let fixture = Fixture::new();
    fixture.file("dir/script", "#!/bin/sh\n");
    fixture.file("private", "secret");
    symlink("dir/script", fixture.source.join("link")).unwrap();
    symlink("/etc/shadow", fixture.source.join("outside")).unwrap();
    fs::set_permissions(fixture.source.join("dir/script"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(fixture.source.join("private"), fs::Permissions::from_mode(0o600)).unwrap();
    let mut workspace = fixture.workspace();
    workspace.guest_owner = Owner { uid: 1000, gid: 1001 };
    let staged = fixture.stage(&workspace);
    assert_eq!(staged.manifest.len(), 5);
    assert_eq!(staged.bytes, 16, "contents of files; targets of links are no contents");
    for (path, host, guest, contents) in [
        ("dir/script", 0o100_600, 0o100_755, Some("#!/bin/sh\n")),
        ("private", 0o100_600, 0o100_600, Some("secret")),
        ("dir", 0o040_700, 0o040_755, None),
        ("link", 0o100_600, 0o120_777, Some("dir/script")),
        ("outside", 0o100_600, 0o120_777, Some("/etc/shadow")),
    ] {
        let path = fixture.share.join(path);
        let meta = path.symlink_metadata().unwrap();
        assert_eq!(meta.mode(), host, "{path:?}");
        assert_eq!(get_attribute(&path, "mode"), guest, "{path:?}");
        assert_eq!((get_attribute(&path, "uid"), get_attribute(&path, "gid")), (1000, 1001));
        if let Some(contents) = contents {
            assert_eq!(fs::read_to_string(&path).unwrap(), contents);
        }
    }
    let (from, to) = (fixture.source.join("private"), fixture.share.join("private"));
    assert_eq!(from.metadata().unwrap().modified().unwrap(), to.metadata().unwrap().modified().unwrap());
    assert_eq!(get_attribute(&fixture.share, "mode"), 0o040_755);
}

#[test]
fn without_a_source_the_guest_gets_an_empty_directory() {
    let fixture = Fixture::new();
    let workspace = WorkspaceIn { collect: CollectTo::Nothing, ..WorkspaceIn::default() };
    let staged = fixture.stage(&workspace);
    assert!(staged.manifest.is_empty());
    assert_eq!(get_attribute(&fixture.share, "mode"), 0o040_755);
}

#[test]
fn everything_belongs_to_qemus_user() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can give files away");
        return;
    }
    let fixture = Fixture::new();
    fixture.file("dir/file", "x");
    let owner = Owner { uid: 64055, gid: 108 };
    stage(&fixture.share, Some(owner), &fixture.workspace(), &Stop::default()).unwrap();
    for path in ["dir", "dir/file"] {
        let meta = fixture.share.join(path).metadata().unwrap();
        assert_eq!((meta.uid(), meta.gid()), (owner.uid, owner.gid));
    }
}

#[test]
fn gitignore_is_honoured_when_asked_for() {
    let fixture = Fixture::new();
    fixture.file(".gitignore", "target/\n*.log\n.git\n");
    fixture.file("target/debug/big", "x");
    fixture.file("a.log", "x");
    fixture.file("src/.gitignore", "!keep.log\n");
    fixture.file("src/keep.log", "x");
    fixture.file("src/main.rs", "x");
    fixture.file(".git/HEAD", "ref: x");
    let mut workspace = fixture.workspace();
    workspace.git = true;
    let staged = fixture.stage(&workspace);
    assert_eq!(staged.ignored, 2);
    let paths: Vec<String> = staged.manifest.iter().map(|(path, _)| path.display().to_string()).collect();
    assert_eq!(
        paths,
        [".git", ".git/HEAD", ".gitignore", "src", "src/.gitignore", "src/keep.log", "src/main.rs"]
    );
    let other = Fixture::new();
    other.file(".gitignore", "*.log");
    other.file("a.log", "x");
    assert_eq!(other.staged().manifest.len(), 2, "and not otherwise");
}

#[test]
fn a_gitignore_that_is_no_plain_file_is_not_read() {
    for make in [
        (|path| symlink("/dev/zero", path).unwrap()) as fn(&Path),
        |path| fs::create_dir(path).unwrap(),
        |path| rustix::fs::mknodat(rustix::fs::CWD, path, FileType::Fifo, Mode::RUSR, 0).unwrap(),
        |path| File::create(path).unwrap().set_len(MAX_IGNORE_FILE + 1).unwrap(),
    ] {
        let fixture = Fixture::new();
        make(&fixture.source.join(".gitignore"));
        fixture.file("file", "x");
        let mut workspace = fixture.workspace();
        workspace.git = true;
        assert!(fixture.stage(&workspace).manifest.get(Path::new("file")).is_some());
    }
}

#[test]
fn special_files_are_left_out_and_named() {
    let fixture = Fixture::new();
    fixture.file("file", "x");
    rustix::fs::mknodat(rustix::fs::CWD, fixture.source.join("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(fixture.source.join("socket")).unwrap();
    let staged = fixture.staged();
    assert_eq!(staged.manifest.len(), 1);
    let skipped: Vec<_> =
        staged.skipped.iter().map(|skipped| (skipped.path.to_str().unwrap(), &skipped.why)).collect();
    assert_eq!(skipped, [("fifo", &Refusal::Fifo), ("socket", &Refusal::Socket)]);
}

#[test]
fn a_workspace_that_is_not_there_or_no_directory() {
    let fixture = Fixture::new();
    let missing = WorkspaceIn::copy_of(fixture.source.join("missing"));
    assert!(matches!(refused(&fixture, &missing), StageError::Missing(_)));
    assert!(matches!(precheck(&missing), Err(StageError::Missing(_))));
    assert!(precheck(&fixture.workspace()).is_ok() && precheck(&WorkspaceIn::default()).is_ok());
    fixture.file("file", "x");
    let file = WorkspaceIn::copy_of(fixture.source.join("file"));
    assert!(matches!(refused(&fixture, &file), StageError::NotADirectory(_)));
    let dangling = fixture.source.join("link");
    symlink(&fixture.source, &dangling).unwrap();
    assert!(
        stage(&fixture.share, None, &WorkspaceIn::copy_of(dangling), &Stop::default()).is_ok(),
        "links are followed there"
    );
}

#[test]
fn what_cannot_be_read_is_named() {
    let error = unreadable(Path::new("/w/file"), Errno::ACCESS);
    assert!(error.to_string().contains("/w/file"));
    let source = std::error::Error::source(&error).unwrap();
    assert!(source.to_string().contains("ermission denied"));
}

#[test]
fn a_staging_directory_in_use_is_refused() {
    let fixture = Fixture::new();
    fs::write(fixture.share.join("left"), "over").unwrap();
    assert!(matches!(refused(&fixture, &fixture.workspace()), StageError::InUse(_)));
    fs::remove_dir_all(&fixture.share).unwrap();
    assert!(matches!(refused(&fixture, &fixture.workspace()), StageError::Write { .. }));
}

#[test]
fn every_limit_is_kept() {
    let fixture = Fixture::new();
    fixture.file("a/b/c", "12345");
    fixture.file("d", "12345");
    let with = |limits: Limits| WorkspaceIn { limits_in: limits, ..fixture.workspace() };
    for (limits, reached) in [
        (Limits { entries: 3, ..Limits::default() }, LimitReached::Entries(3)),
        (Limits { entries: 1, ..Limits::default() }, LimitReached::Entries(1)),
        (Limits { depth: 1, ..Limits::default() }, LimitReached::Depth(1)),
        (Limits { bytes: 9, ..Limits::default() }, LimitReached::Bytes(9)),
        (Limits { file_size: 4, ..Limits::default() }, LimitReached::FileSize(4)),
        (Limits { path_bytes: 9, ..Limits::default() }, LimitReached::PathBytes(9)),
    ] {
        match refused(&fixture, &with(limits)) {
            StageError::Limit { limit, .. } => assert_eq!(limit, reached),
            other => panic!("{reached:?}: {other:?}"),
        }
        fs::remove_dir_all(&fixture.share).unwrap();
        fs::create_dir(&fixture.share).unwrap();
    }
    let exact = Limits { entries: 4, depth: 2, bytes: 10, file_size: 5, path_bytes: 10 };
    assert_eq!(fixture.stage(&with(exact)).bytes, 10);
}

#[test]
fn it_stops_when_told_to() {
    let fixture = Fixture::new();
    fixture.file("file", "x");
    let stop = Stop::default();
    stop.stop();
    let error = stage(&fixture.share, None, &fixture.workspace(), &stop).unwrap_err();
    assert!(matches!(error, StageError::Stopped));
}

#[test]
fn large_files_are_not_digested_but_settle() {
    let fixture = Fixture::new();
    fixture.file("small", "x");
    File::create(fixture.source.join("large")).unwrap().set_len(DIGEST_MAX + 1).unwrap();
    let before = std::time::Instant::now();
    let staged = fixture.staged();
    assert!(before.elapsed() >= Duration::from_millis(20), "its change time must be past");
    assert!(staged.manifest.get(Path::new("large")).unwrap().digest.is_none());
    assert!(staged.manifest.get(Path::new("small")).unwrap().digest.is_some());
}
