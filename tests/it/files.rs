//! Files of a real VM where they lie, by the library: `dev-box` has no commands for these.

use std::path::Path;
use std::time::Duration;

use dev_box::comm::message::{ChangeKind, ExecRequest, FileKind, MakeDir, Remove, Rename, Watch};
use dev_box::exec::{NetworkMode, Provisioner as _, background, files};
use dev_box_tests::Host;
use tokio::time::timeout;

use crate::in_process::InProcess;

const SOON: Duration = Duration::from_secs(60);

/// Names and command lines that take six times as much on the wire, and lists that are longer than a frame.
#[tokio::test(flavor = "multi_thread")]
async fn files_are_listed_moved_and_watched_where_they_lie() {
    let Some(host) = Host::new("files_are_listed_moved_and_watched_where_they_lie") else { return };
    let world = InProcess::with_template(&host, NetworkMode::Isolated).await;
    let clones = world.clones();
    let vm = world.clone().await;
    let session = &vm.session;

    let made = MakeDir { path: "/root/a/b".into(), mode: Some(0o700), parents: true, owner: None };
    files::make_dir(session, made).await.unwrap();
    let watched = Watch { path: "/root/a".into(), recursive: true };
    let mut changes = timeout(SOON, files::watch(session, watched)).await.unwrap().unwrap();
    let links = "python3 - <<'END'\nimport os\nfor n in range(500): os.symlink('\\1' * 1000, b'/root/a/b/\\xff%03d' % n)\nEND";
    world.sh(&vm, links).await;
    let listed = files::list(session, Path::new("/root/a/b")).await.unwrap();
    assert_eq!((listed.len(), listed[7].name.as_bytes()), (500, &b"\xff007"[..]));
    assert!(listed.iter().all(|entry| entry.stat.kind == FileKind::Symlink && entry.stat.size == 1000));
    let mut told = 0;
    while told < 500 {
        let changes = timeout(SOON, changes.next()).await.unwrap().unwrap();
        assert!(changes.iter().all(|change| change.path.as_bytes().starts_with(b"b/\xff")), "{changes:?}");
        told += changes.iter().filter(|change| change.kind == ChangeKind::Created).count();
    }
    drop(changes);
    let moved = Rename { from: "/root/a/b".into(), to: "/root/c".into(), replace: false };
    files::rename(session, moved.clone()).await.unwrap();
    let again = files::rename(session, moved).await.unwrap_err();
    assert!(again.to_string().contains("/root/a/b"), "{again}");
    assert_eq!(files::stat(session, Path::new("/root/c")).await.unwrap().mode, 0o700);
    files::remove(session, Remove { path: "/root/c".into(), recursive: true, missing_ok: false })
        .await
        .unwrap();
    assert!(files::stat(session, Path::new("/root/c")).await.is_err());

    let script = format!("sleep 1000 # {}", "\u{1}".repeat(20_000));
    for _ in 0..20 {
        background::start(session, ExecRequest::new(["/bin/sh", "-c", script.as_str()])).await.unwrap();
    }
    let jobs = background::list(session).await.unwrap();
    assert_eq!(jobs.len(), 20);
    assert!(jobs.iter().all(|job| job.argv[2].as_bytes().ends_with(b"...")), "{jobs:?}");
    clones.retire(vm).await.unwrap();
    world.close().await;
    host.assert_clean();
}
