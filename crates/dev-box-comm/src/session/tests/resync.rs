//! A port that outlives its conversations: stale bytes, half frames, corruption, rewinds.

use tokio::io::AsyncWriteExt;

use super::*;
use crate::frame::{Encoder, Frame, WriteQueue};
use crate::mux::Violation;
use crate::testing::Faulty;

fn config() -> SessionConfig {
    SessionConfig { hello: Duration::from_secs(20), ..SessionConfig::default() }
}

/// A virtio-serial port in memory: the guest's end stays, hosts come and go.
///
/// A pump carries bytes between the guest's end and whichever host's end is plugged in.
struct SerialPort {
    plug: tokio::sync::mpsc::Sender<DuplexStream>,
}

impl SerialPort {
    fn new() -> (Self, DuplexStream) {
        let (guest, mut inner) = duplex(32 * 1024);
        let (plug, mut plugged) = tokio::sync::mpsc::channel::<DuplexStream>(1);
        tokio::spawn(async move {
            while let Some(mut host) = plugged.recv().await {
                // Ends when the host's end is dropped.
                let _ = tokio::io::copy_bidirectional(&mut host, &mut Unending(&mut inner)).await;
            }
        });
        (Self { plug }, guest)
    }

    async fn host(&self) -> DuplexStream {
        let (ours, theirs) = duplex(32 * 1024);
        self.plug.send(theirs).await.unwrap();
        ours
    }
}

/// The port's inner end never hears that a host went away.
struct Unending<'a>(&'a mut DuplexStream);

impl tokio::io::AsyncRead for Unending<'_> {
    fn poll_read(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut *self.get_mut().0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Unending<'_> {
    fn poll_write(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        std::pin::Pin::new(&mut *self.get_mut().0).poll_write(cx, bytes)
    }

    fn poll_flush(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// The host is gone: stop pumping, whatever the guest does.
    fn poll_shutdown(
        self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Poll::Ready(Err(std::io::ErrorKind::NotConnected.into()))
    }
}

/// A guest's agent on a port: serves session after session.
fn agent(io: impl Io) -> tokio::task::JoinHandle<Vec<CloseReason>> {
    tokio::spawn(async move {
        let mut port = GuestPort::with_config(io, config());
        let (mut reasons, mut sessions) = (Vec::new(), Vec::<Session>::new());
        loop {
            match port.accept(guest_hello()).await {
                Ok((session, incoming, _)) => {
                    sessions.push(session.clone());
                    tokio::spawn(serve(incoming));
                    reasons.push(session.closed().await);
                }
                Err(HandshakeError::Eof) => return reasons,
                Err(_) => {}
            }
        }
    })
}

fn fresh(n: u8) -> HostHello {
    HostHello::with_nonce(Nonce::from_bytes([n; 16]))
}

#[tokio::test(start_paused = true)]
async fn hosts_come_and_go_on_one_port() {
    let (port, guest) = SerialPort::new();
    let agent = agent(guest);
    for n in 0..5 {
        let (host, _) = Session::connect_with(port.host().await, fresh(n), config()).await.unwrap();
        host.call(Request::Info).await.unwrap();
        host.close();
        host.closed().await;
    }
    assert!(!agent.is_finished());
}

#[tokio::test(start_paused = true)]
async fn a_new_hello_supersedes_the_session_and_half_a_frame_before_it() {
    for cut in [0, 3, 11, 12, 500, 30_000] {
        let (mut host, guest) = duplex(64 * 1024);
        let agent = agent(guest);
        // A host that dies in the middle of a frame, its hello answered or not.
        let mut queue = WriteQueue::contiguous();
        let mut encoder = Encoder::new();
        encoder.encode(&Frame::Hello(Bytes::from(encode(&fresh(1)).unwrap())), &mut queue);
        encoder.encode(
            &Frame::Open { stream: 1, request: Bytes::from_static(b"{\"type\":\"echo\"}") },
            &mut queue,
        );
        host.write_all(&queue.into_bytes()).await.unwrap();
        let mut queue = WriteQueue::contiguous();
        encoder.encode(
            &Frame::Data { stream: 1, lane: 0, payload: Bytes::from(vec![0xAB; 40_000]) },
            &mut queue,
        );
        host.write_all(&queue.into_bytes()[..cut]).await.unwrap();
        // The next host on the same port.
        let began = Instant::now();
        let (session, hello) = Session::connect_with(host, fresh(2), config()).await.unwrap();
        assert_eq!(hello.boot_id, "boot-1");
        session.call(Request::Info).await.unwrap();
        assert!(began.elapsed() < Duration::from_millis(500), "cut at {cut}: {:?}", began.elapsed());
        session.close();
        session.closed().await;
        let reasons = agent.await.unwrap();
        let first = reasons.first().unwrap();
        if cut == 0 {
            assert_eq!(*first, CloseReason::Superseded);
        } else {
            assert!(matches!(first, CloseReason::Violation(Violation::Frame(_))), "cut at {cut}: {first}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn stale_bytes_from_the_guest_are_skipped() {
    // After a rewind: the rest of a frame, a whole frame, an old answer, noise with the magic in it.
    let mut stale = vec![0xEE; 5_000];
    let mut queue = WriteQueue::contiguous();
    let mut encoder = Encoder::new();
    encoder.encode(&Frame::Data { stream: 1, lane: 1, payload: Bytes::from(vec![1; 9_000]) }, &mut queue);
    let old =
        serde_json::json!({"version": "0", "generations": {"min": 1, "max": 1}, "nonce": fresh(7).nonce});
    encoder.encode(&Frame::Hello(Bytes::from(old.to_string())), &mut queue);
    encoder.encode(&Frame::Ping(5), &mut queue);
    stale.extend_from_slice(&queue.into_bytes());
    stale.extend_from_slice(&crate::hello::MAGIC);
    stale.extend_from_slice(&[0x0C, 0, 0]);
    let (host, mut guest) = duplex(64 * 1024);
    guest.write_all(&stale).await.unwrap();
    let _agent = agent(guest);
    let (session, _) = Session::connect_with(host, fresh(2), config()).await.unwrap();
    session.call(Request::Info).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn corruption_towards_the_guest_ends_the_session_and_the_next_one_works() {
    let (host, guest) = duplex(64 * 1024);
    // Somewhere behind the hello.
    let agent = agent(Faulty::new(guest).chunk(4096).corrupt(2_000, 0x40));
    let (mut ours, theirs) = duplex(64 * 1024);
    let pump = tokio::spawn(async move {
        let mut host = host;
        let _ = tokio::io::copy_bidirectional(&mut ours, &mut Unending(&mut host)).await;
        host
    });
    let (session, _) = Session::connect_with(theirs, fresh(1), config()).await.unwrap();
    let mut parts = session.open(Request::Echo).await.unwrap().split();
    parts.input.write(Bytes::from(vec![1; 20_000])).await.unwrap();
    assert_eq!(session.closed().await, CloseReason::Peer(PeerClose::Violation));
    drop((parts, session));
    let host = pump.await.unwrap();
    let (session, _) = Session::connect_with(host, fresh(2), config()).await.unwrap();
    session.call(Request::Info).await.unwrap();
    assert!(!agent.is_finished());
}

#[tokio::test(start_paused = true)]
async fn a_hello_sent_before_the_agent_listens_is_answered_when_it_does() {
    let (host, guest) = duplex(64 * 1024);
    let connecting = tokio::spawn(Session::connect_with(host, fresh(1), config()));
    tokio::time::sleep(Duration::from_secs(5)).await;
    let _agent = agent(guest);
    let (session, _) = connecting.await.unwrap().unwrap();
    session.call(Request::Info).await.unwrap();
    // The repeats of the hello that the guest read later did no harm.
    tokio::time::sleep(Duration::from_secs(5)).await;
    session.call(Request::Info).await.unwrap();
    assert_eq!(session.close_reason(), None);
}

#[tokio::test(start_paused = true)]
async fn nobody_answers() {
    let (host, guest) = duplex(1024);
    let error = Session::connect(host, fresh(1)).await.unwrap_err();
    assert!(matches!(error, HandshakeError::Deadline(..)), "{error}");
    drop(guest);
    let (host, guest) = duplex(1024);
    drop(guest);
    let error = Session::connect(host, fresh(1)).await.unwrap_err();
    assert!(matches!(error, HandshakeError::Eof | HandshakeError::Io(..)), "{error}");
}

#[tokio::test(start_paused = true)]
async fn endless_noise_is_no_hello() {
    let (host, mut guest) = duplex(256 * 1024);
    tokio::spawn(async move { while guest.write_all(&[0x55; 65_536]).await.is_ok() {} });
    let error = Session::connect(host, fresh(1)).await.unwrap_err();
    assert!(matches!(error, HandshakeError::NoHello(_) | HandshakeError::Deadline(..)), "{error}");
}

#[tokio::test]
async fn a_connection_cut_anywhere_is_an_end_of_file() {
    for cut in [300u64, 1_000, 5_000, 40_000] {
        let (host, guest) = duplex(64 * 1024);
        let host = Faulty::new(host).cut_after(cut).chunk(777);
        let (connected, accepted) =
            tokio::join!(Session::connect(host, host_hello()), Session::accept(guest, guest_hello()));
        let (session, _) = connected.unwrap();
        let (_guest, incoming, _) = accepted.unwrap();
        tokio::spawn(serve(incoming));
        let mut parts = session.open(Request::Echo).await.unwrap().split();
        let _ = parts.input.write(Bytes::from(vec![3; 100_000])).await;
        while parts.output.next().await.is_some() {}
        assert_eq!(parts.output.end(), Some(LaneEnd::Closed(CloseReason::Eof)));
        assert_eq!(parts.receiver.recv().await, Err(StreamError::Closed(CloseReason::Eof)));
        assert_eq!(session.closed().await, CloseReason::Eof);
    }
}
