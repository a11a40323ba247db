//! The channel of a real VM, by its socket: what its guest is told of the host's end comes by another way than what that end says.

use std::path::{Path, PathBuf};
use std::time::Duration;

use dev_box::comm::HostHello;
use dev_box::comm::message::{ChangeKind, ExecRequest, FileKind, MakeDir, Remove, Rename, Request, Watch};
use dev_box::comm::session::Session;
use dev_box::exec::{NetworkMode, Provisioner as _, background, files};
use dev_box_tests::Host;
use tokio::io::{DuplexStream, copy_bidirectional, duplex};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};

use crate::in_process::InProcess;

const SOON: Duration = Duration::from_secs(20);
/// More than the agent takes for a host that comes back.
const LONG: Duration = Duration::from_secs(2);

/// How long the cable is to be out; answered when it is in again.
type Pull = (Duration, oneshot::Sender<()>);

/// Carries bytes between a session and the VM's socket, and is pulled out now and then.
async fn cable(mut ours: DuplexStream, socket: PathBuf, mut pulls: mpsc::Receiver<Pull>) {
    let mut back = None::<oneshot::Sender<()>>;
    loop {
        let mut stream = UnixStream::connect(&socket).await.unwrap();
        if let Some(back) = back.take() {
            back.send(()).unwrap();
        }
        let pulled = tokio::select! {
            pulled = pulls.recv() => pulled,
            _ = copy_bidirectional(&mut ours, &mut stream) => None,
        };
        drop(stream);
        let Some((out, told)) = pulled else { return };
        sleep(out).await;
        back = Some(told);
    }
}

struct Cable(mpsc::Sender<Pull>);

impl Cable {
    async fn connect(socket: &Path) -> (Self, Session) {
        let (near, far) = duplex(64 * 1024);
        let (pulls, pulled) = mpsc::channel(1);
        tokio::spawn(cable(far, socket.to_owned(), pulled));
        let session = timeout(SOON, Session::connect(near, HostHello::fresh().unwrap())).await.unwrap();
        (Self(pulls), session.unwrap().0)
    }

    async fn pull(&self, out: Duration) {
        let (told, back) = oneshot::channel();
        self.0.send((out, told)).await.unwrap();
        back.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_outlives_an_end_that_is_open_again_at_once_and_no_other() {
    let name = "a_session_outlives_an_end_that_is_open_again_at_once_and_no_other";
    let Some(host) = Host::new(name) else { return };
    let world = InProcess::with_template(&host, NetworkMode::Isolated).await;
    let clones = world.clones();
    let vm = world.clone().await;
    vm.session.close();
    vm.session.closed().await;
    let socket = host.root().join("vms").join(vm.name.as_str()).join("channel.sock");

    let (cable, session) = Cable::connect(&socket).await;
    for round in 0..10 {
        cable.pull(Duration::ZERO).await;
        let answered = timeout(SOON, session.call(Request::Info)).await;
        assert!(matches!(answered, Ok(Ok(_))), "round {round}: {answered:?}");
    }
    cable.pull(LONG).await;
    let answered = timeout(LONG, session.call(Request::Info)).await;
    assert!(!matches!(answered, Ok(Ok(_))), "the guest has given this session up: {answered:?}");
    drop((cable, session));

    let (cable, session) = Cable::connect(&socket).await;
    assert!(timeout(SOON, session.call(Request::Info)).await.unwrap().is_ok(), "another one is served");
    drop((cable, session));
    clones.retire(vm).await.unwrap();
    world.close().await;
    host.assert_clean();
}

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
