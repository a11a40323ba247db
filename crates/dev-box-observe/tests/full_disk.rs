//! A disk that is really full: a file system of two mebibytes.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use dev_box_core::clock::SystemClock;
use dev_box_observe::{
    AuditError, AuditEvent, AuditSink as _, Entry, Outcome,
    audit::{AuditLog, AuditOptions, verify},
};

/// A small file system, mounted; needs the right to mount.
struct Small(PathBuf);

impl Small {
    fn mount(at: &Path) -> Option<Self> {
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=2m,mode=700", "none"]).arg(at).output();
        mounted.ok().filter(|output| output.status.success()).map(|_| Self(at.to_owned()))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[tokio::test]
async fn a_full_disk_refuses_new_work_and_lets_running_work_end() {
    let dir = tempfile::tempdir().unwrap();
    let small = dir.path().join("small");
    fs::create_dir(&small).unwrap();
    let Some(_mounted) = Small::mount(&small) else {
        eprintln!("SKIPPED: no right to mount a small file system here");
        return;
    };
    let mut options = AuditOptions::new(small.join("audit"), dir.path().join("first.key"));
    options.heads = vec![dir.path().join("heads.jsonl")];
    options.reserve_bytes = 256 << 10;
    let log = AuditLog::open(options.clone(), Arc::new(SystemClock)).unwrap();
    let intent = log.append(Entry::intent(AuditEvent::VmStart {}).vm("vm-1")).await.unwrap();

    // Somebody else fills the disk, to the last block.
    let ballast = small.join("ballast");
    assert!(fs::write(&ballast, vec![0; 8 << 20]).is_err(), "it is small");

    // Facts go on, out of what was set aside, until it no longer suffices for a full reserve; then new work is refused.
    let mut refused = None;
    for _ in 0..4000 {
        log.append(Entry::fact(AuditEvent::VmPause {})).await.unwrap();
        if let Err(error) = log.append(Entry::intent(AuditEvent::VmStart {})).await {
            refused = Some(error);
            break;
        }
    }
    assert!(matches!(refused, Some(AuditError::Refusing { .. })), "{refused:?}");
    assert!(matches!(log.check(), Err(AuditError::Refusing { .. })));

    // The end of running work still fits: some hundred kilobytes of it.
    for _ in 0..300 {
        log.append(Entry::result(AuditEvent::VmStart {}, Outcome::Ok).of_intent(intent.seq)).await.unwrap();
    }
    fs::remove_file(ballast).unwrap();
    log.append(Entry::fact(AuditEvent::VmPause {})).await.unwrap();
    log.check().unwrap();
    log.append(Entry::intent(AuditEvent::VmStart {})).await.unwrap();
    log.close();
    let report = verify(&options.dir, &options.first_key, &options.heads).unwrap();
    assert_eq!(report.problem, None);
}

/// Half a head would spoil the one after it as well, and the log would be said not to be as it was written.
#[test]
fn a_full_disk_leaves_no_half_of_a_head() {
    let dir = tempfile::tempdir().unwrap();
    let small = dir.path().join("small");
    fs::create_dir(&small).unwrap();
    let Some(_mounted) = Small::mount(&small) else {
        eprintln!("SKIPPED: no right to mount a small file system here");
        return;
    };
    let heads = small.join("heads.jsonl");
    let mut options = AuditOptions::new(dir.path().join("audit"), dir.path().join("first.key"));
    options.heads = vec![heads.clone()];
    // Each log exports a head of its own at its end.
    let one_more = || {
        let log = AuditLog::open(options.clone(), Arc::new(SystemClock)).unwrap();
        log.note(Entry::fact(AuditEvent::VmPause {}));
        log.close();
        fs::metadata(&heads).unwrap().len()
    };
    one_more();
    assert!(fs::write(small.join("ballast"), vec![0; 8 << 20]).is_err(), "it is small");
    // Until the last block that the file has is full.
    let mut length = 0;
    while let more = one_more()
        && more > length
    {
        length = more;
    }
    assert!(fs::read(&heads).unwrap().ends_with(b"}\n"), "whole lines");
    fs::remove_file(small.join("ballast")).unwrap();
    assert!(one_more() > length);
    let report = verify(&options.dir, &options.first_key, &options.heads).unwrap();
    assert_eq!((report.problem, report.bad_heads), (None, 0));
}
