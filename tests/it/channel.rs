//! The channel of a real VM, by its socket: what its guest is told of the host's end comes by another way than what that end says.

use std::path::{Path, PathBuf};
use std::time::Duration;

use dev_box::comm::HostHello;
use dev_box::comm::message::Request;
use dev_box::comm::session::Session;
use dev_box::exec::{NetworkMode, Provisioner as _};
use dev_box_tests::Host;
use tokio::io::{DuplexStream, copy_bidirectional, duplex};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};

use crate::in_process::InProcess;

const SOON: Duration = Duration::from_secs(60);
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

    let mut connected = Cable::connect(&socket).await;
    // A host that is held up opens it later than at once.
    let mut held_up = 0;
    for round in 0..10 {
        let (cable, session) = &connected;
        cable.pull(Duration::ZERO).await;
        let answered = timeout(SOON / 3, session.call(Request::Info)).await;
        if !matches!(answered, Ok(Ok(_))) {
            held_up += 1;
            assert!(held_up < 3, "round {round}: {answered:?}");
            drop(connected);
            connected = Cable::connect(&socket).await;
        }
    }
    let (cable, session) = connected;
    // A guest that is slow notices it later.
    for out in [LONG, 5 * LONG] {
        cable.pull(out).await;
        let answered = timeout(LONG, session.call(Request::Info)).await;
        if !matches!(answered, Ok(Ok(_))) {
            break;
        }
        assert!(out < 5 * LONG, "the guest has given this session up: {answered:?}");
    }
    drop((cable, session));

    let (cable, session) = Cable::connect(&socket).await;
    assert!(timeout(SOON, session.call(Request::Info)).await.unwrap().is_ok(), "another one is served");
    drop((cable, session));
    clones.retire(vm).await.unwrap();
    world.close().await;
    host.assert_clean();
}
