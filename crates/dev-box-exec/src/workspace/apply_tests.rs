use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::time::{Duration, UNIX_EPOCH};

use super::super::fixture::{Fixture, REGULAR, lines, set_mode};
use super::super::{ResultFileError, read_json, scan};
use super::*;

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap()
}

/// Every name below a directory.
fn tree(root: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut todo = vec![root.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            found.push(path.strip_prefix(root).unwrap().display().to_string());
            if path.symlink_metadata().unwrap().is_dir() {
                todo.push(path);
            }
        }
    }
    found.sort();
    found
}

#[test]
fn only_what_changed_comes_out_as_the_guest_meant_it() {
    let fixture = Fixture::new();
    fixture.file("same", "x");
    fixture.file("dir/changed", "old");
    fixture.file("dir/same", "x");
    fs::set_permissions(fixture.source.join("dir"), fs::Permissions::from_mode(0o750)).unwrap();
    let workspace = fixture.workspace();
    let staged = fixture.stage(&workspace);
    fs::write(fixture.share.join("dir/changed"), "new").unwrap();
    let modified = UNIX_EPOCH + Duration::from_millis(1_500_000_000_250);
    File::open(fixture.share.join("dir/changed")).unwrap().set_modified(modified).unwrap();
    fixture.guest("tool", 0o106_755, "#!/bin/sh\n");
    fixture.guest_link("link", "dir/changed");
    fixture.guest_link("shadow", "/etc/shadow");
    fixture.guest_dir("empty", 0o000);
    fs::remove_file(fixture.share.join("same")).unwrap();
    let collected = fixture.collect(&staged, &workspace);
    assert_eq!(
        lines(&collected.changes),
        [
            "dir/changed File Modified Applied",
            "empty Directory Created Applied",
            "link Symlink Created Applied",
            "same File Deleted Reported",
            "shadow Symlink Created Applied",
            "tool File Created Applied",
        ]
    );
    assert_eq!((collected.refused, collected.bytes, collected.ignored), (vec![], 13, 0));
    let out = |path: &str| fixture.output.join(path);
    assert_eq!(tree(&fixture.output), ["dir", "dir/changed", "empty", "link", "shadow", "tool"]);
    assert_eq!(read(out("dir/changed")), "new");
    assert_eq!(out("dir/changed").metadata().unwrap().modified().unwrap(), modified);
    assert_eq!(out("tool").metadata().unwrap().mode(), 0o100_755, "set-user-id is gone");
    assert_eq!(out("dir").metadata().unwrap().mode(), 0o040_750);
    assert_eq!(out("empty").metadata().unwrap().mode(), 0o040_700, "its owner can remove it");
    assert_eq!(out("link").read_link().unwrap(), Path::new("dir/changed"));
    assert_eq!(out("shadow").read_link().unwrap(), Path::new("/etc/shadow"));
    assert!(read(fixture.source.join("same")) == "x" && read(fixture.source.join("dir/changed")) == "old");
}

#[test]
fn an_output_directory_keeps_what_else_is_in_it() {
    let fixture = Fixture::new();
    let workspace = fixture.workspace();
    fs::create_dir(&fixture.output).unwrap();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("precious"), "precious").unwrap();
    fs::write(fixture.output.join("kept"), "kept").unwrap();
    fs::write(fixture.output.join("replaced"), "old").unwrap();
    symlink(outside.path().join("precious"), fixture.output.join("link")).unwrap();
    symlink(outside.path(), fixture.output.join("dirlink")).unwrap();
    fs::create_dir(fixture.output.join("dir")).unwrap();
    let staged = fixture.stage(&workspace);
    fixture.guest("replaced", REGULAR, "new");
    fixture.guest("link", REGULAR, "new");
    fixture.guest("dir", REGULAR, "a file where a directory is");
    fixture.guest_dir("dirlink", 0o755);
    fixture.guest("dirlink/precious", REGULAR, "overwritten");
    fixture.guest_dir("kept", 0o755);
    let collected = fixture.collect(&staged, &workspace);
    assert_eq!(
        lines(&collected.changes),
        [
            "dir File Created Conflict { kept_as: Some(\"dir.dev-box-tag\") }",
            "dirlink Directory Created Conflict { kept_as: None }",
            "kept Directory Created Conflict { kept_as: None }",
            "link File Created Applied",
            "replaced File Created Applied",
        ]
    );
    let blocked = Refused { path: "dirlink/precious".into(), why: Refusal::BlockedByDestination };
    assert_eq!(collected.refused, [blocked]);
    assert_eq!(read(outside.path().join("precious")), "precious");
    assert_eq!(
        (read(fixture.output.join("replaced")), read(fixture.output.join("link"))),
        ("new".into(), "new".into())
    );
    assert_eq!(read(fixture.output.join("kept")), "kept");
}

#[test]
fn a_write_back_leaves_what_changed_on_the_host() {
    let fixture = Fixture::new();
    for path in [
        "theirs",
        "ours",
        "both",
        "deleted-there",
        "deleted-here",
        "deleted-and-changed",
        "dir/file",
        "old/file",
    ] {
        fixture.file(path, "old");
    }
    let workspace = fixture.write_back();
    let staged = fixture.stage(&workspace);
    let (guest, host) = (|path: &str| fixture.share.join(path), |path: &str| fixture.source.join(path));
    for path in ["theirs", "both", "deleted-here", "dir/file"] {
        fs::write(guest(path), "the guest's").unwrap();
    }
    fixture.guest("created", 0o100_755, "the guest's");
    fixture.guest("created-twice", REGULAR, "the guest's");
    for path in ["deleted-there", "deleted-and-changed"] {
        fs::remove_file(guest(path)).unwrap();
    }
    fs::remove_dir_all(guest("old")).unwrap();
    for path in ["ours", "both", "created-twice", "deleted-and-changed"] {
        fs::write(host(path), "the host's").unwrap();
    }
    fs::remove_file(host("deleted-here")).unwrap();
    let collected = fixture.collect(&staged, &workspace);
    assert_eq!(
        lines(&collected.changes),
        [
            "both File Modified Conflict { kept_as: Some(\"both.dev-box-tag\") }",
            "created File Created Applied",
            "created-twice File Created Conflict { kept_as: Some(\"created-twice.dev-box-tag\") }",
            "deleted-and-changed File Deleted Conflict { kept_as: None }",
            "deleted-here File Modified Applied",
            "deleted-there File Deleted Applied",
            "dir/file File Modified Applied",
            "old Directory Deleted Applied",
            "old/file File Deleted Applied",
            "theirs File Modified Applied",
        ]
    );
    assert_eq!(collected.refused, []);
    assert_eq!(
        tree(&fixture.source),
        [
            "both",
            "both.dev-box-tag",
            "created",
            "created-twice",
            "created-twice.dev-box-tag",
            "deleted-and-changed",
            "deleted-here",
            "dir",
            "dir/file",
            "ours",
            "theirs",
        ]
    );
    for (path, contents) in [
        ("theirs", "the guest's"),
        ("ours", "the host's"),
        ("both", "the host's"),
        ("both.dev-box-tag", "the guest's"),
        ("created", "the guest's"),
        ("created-twice", "the host's"),
        ("deleted-and-changed", "the host's"),
        ("deleted-here", "the guest's"),
        ("dir/file", "the guest's"),
    ] {
        assert_eq!(read(host(path)), contents, "{path}");
    }
    assert_eq!(host("created").metadata().unwrap().mode(), 0o100_755);
}

#[test]
fn a_write_back_deletes_only_when_told_to() {
    let fixture = Fixture::new();
    fixture.file("gone", "x");
    let mut workspace = fixture.write_back();
    workspace.collect = CollectTo::WriteBack { delete: false };
    let staged = fixture.stage(&workspace);
    fs::remove_file(fixture.share.join("gone")).unwrap();
    assert_eq!(lines(&fixture.collect(&staged, &workspace).changes), ["gone File Deleted Reported"]);
    assert_eq!(read(fixture.source.join("gone")), "x");
}

#[test]
fn kinds_may_change_in_a_write_back() {
    let fixture = Fixture::new();
    fixture.file("file", "x");
    fixture.file("edited", "x");
    fixture.file("dir/file", "x");
    symlink("file", fixture.source.join("link")).unwrap();
    let workspace = fixture.write_back();
    let staged = fixture.stage(&workspace);
    for name in ["file", "edited"] {
        fs::remove_file(fixture.share.join(name)).unwrap();
        fixture.guest_dir(name, 0o755);
        fixture.guest(format!("{name}/inside"), REGULAR, "new");
    }
    fs::remove_dir_all(fixture.share.join("dir")).unwrap();
    fixture.guest("dir", REGULAR, "a file now");
    fixture.guest("link", REGULAR, "a file now");
    fs::write(fixture.source.join("edited"), "by the host").unwrap();
    let collected = fixture.collect(&staged, &workspace);
    assert_eq!(
        lines(&collected.changes),
        [
            "dir File Modified Conflict { kept_as: Some(\"dir.dev-box-tag\") }",
            "dir/file File Deleted Applied",
            "edited Directory Modified Conflict { kept_as: None }",
            "file Directory Modified Applied",
            "file/inside File Created Applied",
            "link File Modified Applied",
        ]
    );
    assert_eq!(
        collected.refused,
        [Refused { path: "edited/inside".into(), why: Refusal::BlockedByDestination }]
    );
    assert_eq!(read(fixture.source.join("edited")), "by the host");
    assert_eq!(read(fixture.source.join("file/inside")), "new");
    assert_eq!(read(fixture.source.join("link")), "a file now");
    assert_eq!(read(fixture.source.join("dir.dev-box-tag")), "a file now");
}

#[test]
fn a_write_back_does_not_follow_the_workspaces_links() {
    let fixture = Fixture::new();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("precious"), "precious").unwrap();
    fixture.file("dir/precious", "x");
    let workspace = fixture.write_back();
    let staged = fixture.stage(&workspace);
    fs::write(fixture.share.join("dir/precious"), "overwritten").unwrap();
    fixture.guest("dir/more", REGULAR, "more");
    // Meanwhile the directory became a link on the host.
    fs::remove_dir_all(fixture.source.join("dir")).unwrap();
    symlink(outside.path(), fixture.source.join("dir")).unwrap();
    let collected = fixture.collect(&staged, &workspace);
    assert!(collected.refused.iter().all(|refused| refused.why == Refusal::BlockedByDestination));
    assert_eq!((collected.refused.len(), collected.changes.len()), (2, 0));
    assert_eq!(tree(outside.path()), ["precious"]);
    assert_eq!(read(outside.path().join("precious")), "precious");
    // And deletions through it are not done either.
    fs::remove_file(fixture.share.join("dir/precious")).unwrap();
    let collected = fixture.collect(&staged, &workspace);
    assert!(
        lines(&collected.changes)
            .contains(&"dir/precious File Deleted Conflict { kept_as: None }".to_owned())
    );
    assert_eq!(read(outside.path().join("precious")), "precious");
}

#[test]
fn a_write_back_with_git_leaves_ignored_files_alone() {
    let fixture = Fixture::new();
    fixture.file(".gitignore", "target/\n.env\n");
    fixture.file(".env", "SECRET=1");
    fixture.file("target/old", "x");
    let mut workspace = fixture.write_back();
    workspace.git = true;
    let staged = fixture.stage(&workspace);
    fixture.guest(".gitignore", REGULAR, "# the guest's own rules do not count\n");
    fixture.guest(".env", REGULAR, "SECRET=2");
    fixture.guest_dir("target", 0o755);
    fixture.guest("target/new", REGULAR, "x");
    let collected = fixture.collect(&staged, &workspace);
    assert_eq!(lines(&collected.changes), [".gitignore File Modified Applied"]);
    assert_eq!(collected.ignored, 3);
    assert_eq!(read(fixture.source.join(".env")), "SECRET=1");
}

#[test]
fn names_may_be_anything() {
    let fixture = Fixture::new();
    let workspace = fixture.workspace();
    let staged = fixture.stage(&workspace);
    let long = "n".repeat(255);
    let names: [&[u8]; 5] = [b"new\nline", b"\xff\xfe", b"\x1b[31m", b"-rf", long.as_bytes()];
    for name in names {
        fixture.guest(OsStr::from_bytes(name), REGULAR, name);
    }
    let collected = fixture.collect(&staged, &workspace);
    assert_eq!(collected.changes.len(), names.len());
    for name in names {
        assert_eq!(fs::read(fixture.output.join(OsStr::from_bytes(name))).unwrap(), name);
    }
    let json = serde_json::to_string(&collected).unwrap();
    assert!(json.contains("new\\nline") && json.contains("\\u001b[31m"), "{json}");
}

#[test]
fn holes_stay_holes_and_do_not_count() {
    let fixture = Fixture::new();
    let mut workspace = fixture.workspace();
    workspace.limits_out.bytes = 1 << 20;
    workspace.limits_out.file_size = 1 << 40;
    let staged = fixture.stage(&workspace);
    fixture.guest("sparse", REGULAR, "");
    let sparse = File::options().write(true).open(fixture.share.join("sparse")).unwrap();
    sparse.set_len(1 << 36).unwrap();
    sparse.write_all_at(b"x", 1 << 35).unwrap();
    drop(sparse);
    let destination = Destination::open(&workspace).unwrap().unwrap();
    let found = scan(&fixture.hostile(), &staged.manifest, workspace.limits_out, &Stop::default()).unwrap();
    let collected = apply(
        found,
        &fixture.hostile(),
        &staged.manifest,
        &destination,
        workspace.limits_out,
        "t",
        &Stop::default(),
    );
    assert!(collected.unwrap().bytes < 1 << 20);
    let meta = fixture.output.join("sparse").metadata().unwrap();
    assert!(meta.len() == 1 << 36 && meta.blocks() * 512 < 1 << 20);
}

#[test]
fn a_bomb_is_stopped_and_leaves_no_temporary() {
    let fixture = Fixture::new();
    let mut workspace = fixture.workspace();
    let staged = fixture.stage(&workspace);
    fixture.guest("a", REGULAR, vec![1; 1000]);
    fixture.guest("b", REGULAR, vec![1; 1000]);
    workspace.limits_out.bytes = 1500;
    let destination = Destination::open(&workspace).unwrap().unwrap();
    let run = |limits: Limits, stop: &Stop| {
        apply(fixture.scan(&staged), &fixture.hostile(), &staged.manifest, &destination, limits, "t", stop)
            .unwrap_err()
    };
    let error = run(workspace.limits_out, &Stop::default());
    assert!(matches!(error, CollectError::Limit(LimitReached::Bytes(1500))), "{error}");
    assert_eq!(tree(&fixture.output), ["a"]);
    let error = run(Limits { file_size: 999, ..Limits::default() }, &Stop::default());
    assert!(matches!(error, CollectError::Limit(LimitReached::FileSize(999))), "{error}");
    let stop = Stop::default();
    stop.stop();
    assert!(matches!(run(Limits::default(), &stop), CollectError::Stopped));
}

#[test]
fn what_changes_between_scan_and_apply_is_refused() {
    let fixture = Fixture::new();
    let workspace = fixture.workspace();
    let staged = fixture.stage(&workspace);
    for name in ["becomes-link", "becomes-device", "goes", "real-link", "swapped-dir"] {
        if name == "swapped-dir" {
            fixture.guest_dir(name, 0o755);
            fixture.guest("swapped-dir/passwd", REGULAR, "x");
        } else {
            fixture.guest(name, REGULAR, "x");
        }
    }
    let found = fixture.scan(&staged);
    set_mode(&fixture.share.join("becomes-link"), 0o120_777);
    set_mode(&fixture.share.join("becomes-device"), 0o020_666);
    fs::remove_file(fixture.share.join("goes")).unwrap();
    fs::remove_file(fixture.share.join("real-link")).unwrap();
    symlink("/etc/passwd", fixture.share.join("real-link")).unwrap();
    fs::remove_dir_all(fixture.share.join("swapped-dir")).unwrap();
    symlink("/etc", fixture.share.join("swapped-dir")).unwrap();
    let destination = Destination::open(&workspace).unwrap().unwrap();
    let limits = Limits::default();
    let collected =
        apply(found, &fixture.hostile(), &staged.manifest, &destination, limits, "t", &Stop::default())
            .unwrap();
    let refused: Vec<_> =
        collected.refused.iter().map(|refused| (refused.path.to_str().unwrap(), &refused.why)).collect();
    assert_eq!(
        refused,
        [
            ("becomes-device", &Refusal::Device),
            ("becomes-link", &Refusal::Changed),
            ("goes", &Refusal::Changed),
            ("real-link", &Refusal::RealSymlink),
            ("swapped-dir/passwd", &Refusal::Changed),
        ]
    );
    assert_eq!(tree(&fixture.output), ["swapped-dir"], "an empty directory, made as the scan had it");
}

#[test]
fn results_belong_to_the_invoking_user() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can give files away");
        return;
    }
    let fixture = Fixture::new();
    let mut workspace = fixture.workspace();
    workspace.owner = Some(Owner { uid: 1234, gid: 1235 });
    let staged = fixture.stage(&workspace);
    fixture.guest_dir("dir", 0o755);
    fixture.guest("dir/file", REGULAR, "x");
    fixture.guest_link("dir/link", "/etc/shadow");
    fixture.collect(&staged, &workspace);
    for path in ["", "dir", "dir/file", "dir/link"] {
        let meta = fixture.output.join(path).symlink_metadata().unwrap();
        assert_eq!((meta.uid(), meta.gid()), (1234, 1235), "{path}");
    }
}

#[test]
fn destinations_are_checked_early() {
    let fixture = Fixture::new();
    let open = |collect: CollectTo| Destination::open(&WorkspaceIn { collect, ..fixture.workspace() });
    assert!(open(CollectTo::Nothing).unwrap().is_none());
    fixture.file("file", "x");
    for bad in ["file", "file/below"] {
        let error = open(CollectTo::Directory(fixture.source.join(bad))).unwrap_err();
        assert!(
            matches!(&error, CollectError::Destination { .. }) && error.to_string().contains(bad),
            "{error}"
        );
    }
    let nothing = WorkspaceIn { source: None, ..fixture.write_back() };
    assert!(matches!(Destination::open(&nothing), Err(CollectError::NoWorkspace)));
    let deep = fixture.output.join("a/b");
    assert!(open(CollectTo::Directory(deep.clone())).unwrap().is_some());
    assert!(deep.is_dir());
}

#[test]
fn errors_of_a_name_concern_that_name_only() {
    let fixture = Fixture::new();
    let destination = Destination::open(&fixture.workspace()).unwrap().unwrap();
    let (share, manifest) = (fixture.hostile(), Manifest::default());
    let apply = Apply {
        share: &share,
        manifest: &manifest,
        to: &destination,
        tally: Tally::new(Limits::default()),
        budget: Budget::new(0),
        buffer: Buffer::new(),
        suffix: String::new(),
        temporaries: 0,
        modes: BTreeMap::new(),
        parent: None,
        refused: Vec::new(),
        sum: Sum::default(),
        stop: &Stop::default(),
    };
    for error in [Errno::INVAL, Errno::NAMETOOLONG, Errno::ILSEQ] {
        assert!(matches!(apply.classify::<()>(Path::new("x"), error), Ok(Err(Refusal::System(_)))));
    }
    for error in [Errno::NOSPC, Errno::DQUOT, Errno::IO, Errno::ROFS] {
        let failed = apply.classify::<()>(Path::new("x"), error).unwrap_err();
        assert!(
            matches!(&failed, CollectError::Destination { path, .. } if path.ends_with("output/x")),
            "{failed}"
        );
    }
}

#[test]
fn a_full_disk_is_an_error_and_leaves_no_temporary() {
    let mount = tempfile::tempdir().unwrap();
    let options = c"size=64k";
    if let Err(error) = mount_tmpfs(mount.path(), options) {
        eprintln!("skipped: cannot mount a small filesystem: {error}");
        return;
    }
    let fixture = Fixture::new();
    let output = mount.path().join("output");
    let workspace = WorkspaceIn { collect: CollectTo::Directory(output.clone()), ..fixture.workspace() };
    let staged = fixture.stage(&workspace);
    fixture.guest("large", REGULAR, vec![1; 1 << 20]);
    let destination = Destination::open(&workspace).unwrap().unwrap();
    let (found, share) = (fixture.scan(&staged), fixture.hostile());
    let done = apply(found, &share, &staged.manifest, &destination, Limits::default(), "t", &Stop::default());
    let left = tree(&output);
    drop(destination);
    let _ = std::process::Command::new("umount").arg("-l").arg(mount.path()).status();
    let error = done.unwrap_err();
    assert!(
        matches!(&error, CollectError::Destination { source, .. } if source.kind() == io::ErrorKind::StorageFull),
        "{error}"
    );
    assert!(left.is_empty(), "{left:?}");
}

fn mount_tmpfs(at: &Path, options: &std::ffi::CStr) -> io::Result<()> {
    let done = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", options.to_str().unwrap(), "tmpfs"])
        .arg(at)
        .output()?;
    if done.status.success() {
        Ok(())
    } else {
        Err(io::Error::other(String::from_utf8_lossy(&done.stderr).into_owned()))
    }
}

#[test]
fn a_result_file_is_read_when_the_job_wrote_it() {
    let fixture = Fixture::new();
    fixture.file("staged.json", "{\"old\": true}");
    let staged = fixture.staged();
    let json = |path: &str| read_json(&fixture.hostile(), &staged.manifest, Path::new(path));
    assert_eq!(json("result.json").unwrap(), None);
    assert_eq!(json("staged.json").unwrap(), None, "it was there before");
    fixture.guest("staged.json", REGULAR, "{\"new\": [1, 2]}");
    assert_eq!(json("staged.json").unwrap().unwrap()["new"][1], 2);
    fixture.guest("bad", REGULAR, "{");
    assert!(matches!(json("bad"), Err(ResultFileError::Json(_))));
    fixture.guest("deep", REGULAR, "[".repeat(10_000));
    assert!(matches!(json("deep"), Err(ResultFileError::Json(_))));
    fixture.guest("large", REGULAR, vec![b' '; (1 << 20) + 1]);
    assert!(matches!(json("large"), Err(ResultFileError::TooLarge)));
    fixture.guest_link("link", "staged.json");
    assert!(matches!(json("link"), Err(ResultFileError::NotAFile)));
    fixture.guest("fifo", 0o010_644, "");
    assert!(matches!(json("fifo"), Err(ResultFileError::Refused(Refusal::Fifo))));
    symlink("/etc/passwd", fixture.share.join("real")).unwrap();
    assert!(matches!(json("real"), Err(ResultFileError::Refused(Refusal::RealSymlink))));
    for path in ["../x", "/etc/passwd", "a/../b", "."] {
        assert!(matches!(json(path), Err(ResultFileError::BadPath)), "{path}");
    }
}
