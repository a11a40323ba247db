//! A guest (and once or twice a host) that breaks the rules: the channel closes with a typed reason, and nothing else
//! happens.

use super::*;
use crate::frame::{Frame, FrameError, MAX_PAYLOAD, WriteQueue};
use crate::hello::Generations;
use crate::message::{
    ExecRequest, ExitStatus, Exited, GuestErrorKind, GuestText, JsonError, MAX_DEPTH, Usage,
};
use crate::mux::Violation;
use crate::testing::{MemoryListen, RawPeer, memory};
use crate::transport::{Dial, Listen};

/// A host's session with a guest that is spoken by hand.
async fn with_raw_guest() -> (Session, RawPeer) {
    let (host, guest) = duplex(256 * 1024);
    let mut raw = RawPeer::new(guest);
    let hello = guest_hello();
    let (host, greeted) =
        tokio::join!(Session::connect(host, host_hello()), raw.greet_host(&hello, |host| host.nonce));
    greeted.unwrap();
    (host.unwrap().0, raw)
}

/// As [`with_raw_guest`] with one exec stream opened.
async fn with_exec() -> (Session, RawPeer, Stream) {
    let (host, mut raw) = with_raw_guest().await;
    let stream = host.open(Request::Exec(ExecRequest::new(["true"]))).await.unwrap();
    assert!(matches!(raw.receive().await.unwrap(), Some(Frame::Open { stream: 1, .. })));
    (host, raw, stream)
}

fn message(message: &Message, last: bool) -> Frame {
    Frame::Message { stream: 1, last, payload: Bytes::from(encode(message).unwrap()) }
}

fn json(text: impl Into<Vec<u8>>) -> Frame {
    Frame::Message { stream: 1, last: false, payload: Bytes::from(text.into()) }
}

fn exited() -> Message {
    Message::Exited(Exited {
        status: ExitStatus::Code(0),
        usage: Usage::default(),
        timed_out: false,
        oom_killed: false,
    })
}

/// The bytes of frame number 0 of the guest.
fn first_frame(frame: &Frame) -> Vec<u8> {
    let mut queue = WriteQueue::contiguous();
    crate::frame::Encoder::new().encode(frame, &mut queue);
    queue.into_bytes().to_vec()
}

/// Sends bytes in the place of the guest's first frame; gives the reason the host closed for.
async fn closes_with(bytes: &[u8]) -> CloseReason {
    let (host, mut raw) = with_raw_guest().await;
    raw.send_bytes(bytes).await.unwrap();
    let reason = host.closed().await;
    // The peer is told, and then the connection ends.
    assert_eq!(raw.receive().await.unwrap(), Some(Frame::Close(1)));
    assert_eq!(raw.receive().await.unwrap(), None);
    // Another VM's channel is none the worse.
    let (other, _guest, incoming) = pair().await;
    tokio::spawn(serve(incoming));
    other.call(Request::Info).await.unwrap();
    reason
}

fn frame_fault(error: FrameError) -> CloseReason {
    CloseReason::Violation(Violation::Frame(error))
}

#[tokio::test]
async fn a_length_of_all_ones() {
    assert_eq!(closes_with(&[0xFF; 4]).await, frame_fault(FrameError::Length(u32::MAX)));
}

#[tokio::test]
async fn a_length_of_zero() {
    assert_eq!(closes_with(&[0; 4]).await, frame_fault(FrameError::Length(0)));
}

#[tokio::test]
async fn a_length_of_the_maximum_plus_one() {
    let length = u32::try_from(12 + MAX_PAYLOAD + 1).unwrap();
    assert_eq!(closes_with(&length.to_le_bytes()).await, frame_fault(FrameError::Length(length)));
}

#[tokio::test]
async fn a_wrong_crc() {
    let mut bytes = first_frame(&Frame::Ping(1));
    *bytes.last_mut().unwrap() ^= 1;
    let reason = closes_with(&bytes).await;
    assert!(matches!(reason, CloseReason::Violation(Violation::Frame(FrameError::Crc { .. }))), "{reason}");
}

#[tokio::test]
async fn an_unknown_type() {
    let mut bytes = first_frame(&Frame::Ping(1));
    bytes[4] = 77;
    let end = bytes.len() - 4;
    let crc = crc32fast::hash(&bytes[..end]).to_le_bytes();
    bytes[end..].copy_from_slice(&crc);
    assert_eq!(closes_with(&bytes).await, frame_fault(FrameError::UnknownType(77)));
}

#[tokio::test]
async fn a_replayed_frame() {
    let ping = first_frame(&Frame::Ping(1));
    let (host, mut raw) = with_raw_guest().await;
    raw.send_bytes(&ping).await.unwrap();
    assert_eq!(raw.receive().await.unwrap(), Some(Frame::Pong(1)));
    raw.send_bytes(&ping).await.unwrap();
    assert_eq!(host.closed().await, frame_fault(FrameError::Sequence { expected: 1, got: 0 }));
}

#[tokio::test]
async fn a_replayed_hello() {
    let (host, mut raw) = with_raw_guest().await;
    let hello =
        serde_json::json!({"version": "1", "generations": {"min": 1, "max": 1}, "nonce": host_hello().nonce});
    raw.send(&Frame::Hello(Bytes::from(hello.to_string()))).await.unwrap();
    assert_eq!(host.closed().await, CloseReason::Violation(Violation::UnexpectedHello));
}

#[tokio::test(start_paused = true)]
async fn half_a_header_then_silence() {
    let (host, mut raw) = with_raw_guest().await;
    raw.send_bytes(&first_frame(&Frame::Ping(1))[..6]).await.unwrap();
    let began = Instant::now();
    let gap = SessionConfig::default().gap;
    assert_eq!(host.closed().await, CloseReason::Deadline(FrameDeadline::Gap(gap)));
    assert!(began.elapsed() >= gap && began.elapsed() < gap * 2, "{:?}", began.elapsed());
    assert_eq!(raw.receive().await.unwrap(), Some(Frame::Close(2)));
}

#[tokio::test(start_paused = true)]
async fn half_a_body_then_silence() {
    let (host, mut raw, _stream) = with_exec().await;
    let data = Frame::Data { stream: 1, lane: 1, payload: Bytes::from(vec![7; 60_000]) };
    raw.send_bytes(&first_frame(&data)[..30_000]).await.unwrap();
    assert_eq!(host.closed().await, CloseReason::Deadline(FrameDeadline::Gap(SessionConfig::default().gap)));
}

#[tokio::test(start_paused = true)]
async fn a_frame_that_trickles() {
    let (host, mut raw, _stream) = with_exec().await;
    let data = first_frame(&Frame::Data { stream: 1, lane: 1, payload: Bytes::from(vec![7; 60_000]) });
    let trickle = tokio::spawn(async move {
        // Never silent for as long as the gap.
        for byte in data {
            tokio::time::sleep(Duration::from_secs(1)).await;
            if raw.send_bytes(&[byte]).await.is_err() {
                return;
            }
        }
    });
    assert_eq!(
        host.closed().await,
        CloseReason::Deadline(FrameDeadline::Frame(SessionConfig::default().frame))
    );
    trickle.abort();
}

#[tokio::test(start_paused = true)]
async fn silence_between_frames_is_allowed_and_so_is_a_pause_that_was_announced() {
    let (host, mut raw) = with_raw_guest().await;
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(host.close_reason(), None);
    // The VM is paused in the middle of a frame, for an hour.
    let ping = first_frame(&Frame::Ping(3));
    let hold = host.hold_deadlines();
    raw.send_bytes(&ping[..6]).await.unwrap();
    tokio::time::sleep(Duration::from_secs(3600)).await;
    drop(hold);
    tokio::time::sleep(Duration::from_secs(1)).await;
    raw.send_bytes(&ping[6..]).await.unwrap();
    assert_eq!(raw.receive().await.unwrap(), Some(Frame::Pong(3)));
    // And silence in the middle counts again.
    raw.send_bytes(&ping[..6]).await.unwrap();
    assert!(matches!(host.closed().await, CloseReason::Deadline(_)));
}

#[tokio::test]
async fn an_unknown_version() {
    let (host, guest) = duplex(4096);
    let mut raw = RawPeer::new(guest);
    let mut hello = guest_hello();
    hello.version = "9.9.9\x1b[31m".to_owned();
    hello.generations = Generations { min: 7, max: 9 };
    let (host, greeted) =
        tokio::join!(Session::connect(host, host_hello()), raw.greet_host(&hello, |host| host.nonce));
    greeted.unwrap();
    let error = host.unwrap_err();
    assert!(matches!(error, HandshakeError::Version { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("9.9.9\\u{1b}[31m") && text.contains("7 to 9"), "{text}");
    assert!(text.contains(crate::hello::VERSION) && text.contains("newer dev-box"), "{text}");
}

#[tokio::test]
async fn an_older_agent_is_told_apart_and_the_guest_answers_a_newer_host() {
    let (host, guest) = duplex(4096);
    let mut hello = host_hello();
    hello.generations = Generations { min: 2, max: 3 };
    let (host, guest) = tokio::join!(Session::connect(host, hello), Session::accept(guest, guest_hello()));
    let text = host.unwrap_err().to_string();
    assert!(text.contains("rebuild it with `dev-box image build`") && text.contains("2 to 3"), "{text}");
    assert!(matches!(guest.unwrap_err(), HandshakeError::Version { .. }));
}

#[tokio::test]
async fn output_after_exit() {
    let (host, mut raw, mut stream) = with_exec().await;
    raw.send(&message(&exited(), true)).await.unwrap();
    raw.send(&Frame::Data { stream: 1, lane: 1, payload: Bytes::from_static(b"late") }).await.unwrap();
    assert_eq!(host.closed().await, CloseReason::Violation(Violation::AfterEnd(1)));
    // What came in order is still there.
    assert_eq!(stream.recv().await, Ok(Some(exited())));
    assert_eq!(stream.parts().output.next().await, None);
}

#[tokio::test]
async fn two_exits() {
    let (host, mut raw, mut stream) = with_exec().await;
    raw.send(&message(&exited(), true)).await.unwrap();
    raw.send(&message(&exited(), true)).await.unwrap();
    assert_eq!(host.closed().await, CloseReason::Violation(Violation::AfterEnd(1)));
    assert_eq!(stream.recv().await, Ok(Some(exited())));
    assert_eq!(stream.recv().await, Ok(None));
}

#[tokio::test]
async fn an_exit_that_is_not_marked_and_a_mark_that_is_no_exit() {
    let (host, mut raw, _stream) = with_exec().await;
    raw.send(&message(&exited(), false)).await.unwrap();
    assert_eq!(host.closed().await, CloseReason::Violation(Violation::LastMark(1)));
    let (host, mut raw, _stream) = with_exec().await;
    raw.send(&message(&Message::Signal { number: 9 }, true)).await.unwrap();
    assert_eq!(host.closed().await, CloseReason::Violation(Violation::LastMark(1)));
}

async fn json_fault(payload: impl Into<Vec<u8>>) -> JsonError {
    let (host, mut raw, _stream) = with_exec().await;
    raw.send(&json(payload)).await.unwrap();
    match host.closed().await {
        CloseReason::Violation(Violation::Json { stream: 1, error }) => error,
        other => panic!("closed for {other}"),
    }
}

#[tokio::test]
async fn json_ten_thousand_deep() {
    let deep = format!("{{\"type\":\"x\",\"a\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000));
    assert_eq!(json_fault(deep).await, JsonError::TooDeep);
    let objects = "{\"a\":".repeat(10_000);
    assert_eq!(json_fault(objects).await, JsonError::TooDeep);
    let fits = format!("{{\"type\":\"x\",\"a\":{}{}}}", "[".repeat(MAX_DEPTH - 1), "]".repeat(MAX_DEPTH - 1));
    assert!(crate::message::decode::<Message>(fits.as_bytes()).is_ok());
}

#[tokio::test]
async fn json_that_is_huge() {
    // Longer than a message may be: refused by the frame.
    let (host, mut raw, _stream) = with_exec().await;
    let mut bytes =
        first_frame(&Frame::Data { stream: 1, lane: 1, payload: Bytes::from(vec![b' '; 64 * 1024]) });
    bytes[4] = 4;
    bytes[5] = 0;
    let length = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) + 1;
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    bytes.insert(12, b' ');
    let end = bytes.len() - 4;
    let crc = crc32fast::hash(&bytes[..end]).to_le_bytes();
    bytes[end..].copy_from_slice(&crc);
    raw.send_bytes(&bytes).await.unwrap();
    assert_eq!(host.closed().await, frame_fault(FrameError::Malformed { kind: 4, what: "too long" }));
    // Many at the limit: credit ends.
    let (host, mut raw, _stream) = with_exec().await;
    let filler = format!("{{\"type\":\"x\",\"pad\":\"{}\"}}", "a".repeat(60_000));
    for _ in 0..10 {
        if raw.send(&json(filler.clone())).await.is_err() {
            break;
        }
    }
    assert_eq!(host.closed().await, CloseReason::Violation(Violation::NoCredit { stream: 1, lane: 3 }));
}

#[tokio::test]
async fn text_that_is_not_utf8() {
    assert_eq!(json_fault(*b"{\"type\":\"\xFF\"}").await, JsonError::NotUtf8(9));
}

#[tokio::test]
async fn nul_and_terminal_escapes_in_text_arrive_and_print_harmlessly() {
    let (_host, mut raw, mut stream) = with_exec().await;
    let text = "{\"type\":\"failed\",\"kind\":\"some_new_kind\",\"text\":\"a\\u0000b\\u001b]0;title\\u0007\\u202e\"}";
    raw.send(&Frame::Message { stream: 1, last: true, payload: Bytes::from_static(text.as_bytes()) })
        .await
        .unwrap();
    let Ok(Some(Message::Failed(error))) = stream.recv().await else { panic!("no failure") };
    assert_eq!(error.kind, GuestErrorKind::Other);
    assert_eq!(error.text.raw(), "a\0b\x1b]0;title\x07\u{202e}");
    let shown = error.to_string();
    assert!(!shown.chars().any(|c| c.is_control() || c == '\u{202e}'), "{shown:?}");
    assert!(GuestText::new("é".repeat(5000)).raw().len() <= GuestText::MAX);
}

#[tokio::test]
async fn more_output_than_there_is_credit_for() {
    let (host, mut raw, _stream) = with_exec().await;
    for _ in 0..3 {
        // The window is 64 KiB and nobody reads.
        let data = Frame::Data { stream: 1, lane: 2, payload: Bytes::from(vec![0; 30_000]) };
        raw.send(&data).await.unwrap();
    }
    assert_eq!(host.closed().await, CloseReason::Violation(Violation::NoCredit { stream: 1, lane: 2 }));
}

#[tokio::test]
async fn frames_for_streams_that_never_were_and_frames_only_a_host_sends() {
    let unopened = Frame::Finish { stream: 9, lane: 1 };
    let reason = closes_with(&first_frame(&unopened)).await;
    assert_eq!(reason, CloseReason::Violation(Violation::UnknownStream(9)));
    let open = Frame::Open { stream: 1, request: Bytes::from_static(b"{\"type\":\"info\"}") };
    assert_eq!(closes_with(&first_frame(&open)).await, CloseReason::Violation(Violation::WrongSide(3)));
    let end = Frame::End { stream: 1 };
    assert_eq!(closes_with(&first_frame(&end)).await, CloseReason::Violation(Violation::WrongSide(9)));
    assert_eq!(
        closes_with(&first_frame(&Frame::Pong(1))).await,
        CloseReason::Violation(Violation::UnexpectedPong)
    );
}

#[tokio::test(start_paused = true)]
async fn a_wrong_nonce() {
    let (host, guest) = duplex(1024 * 1024);
    let mut raw = RawPeer::new(guest);
    let hello = guest_hello();
    let (host, greeted) = tokio::join!(
        Session::connect(host, host_hello()),
        raw.greet_host(&hello, |_| Nonce::from_bytes([9; 16]))
    );
    greeted.unwrap();
    let error = host.unwrap_err();
    assert!(matches!(error, HandshakeError::WrongNonce { seen: 1, .. }), "{error}");
}

#[tokio::test]
async fn ten_thousand_connections_from_the_wrong_context() {
    let (dial, listen) = memory();
    let flood = dial.as_cid(1);
    let flooding = tokio::spawn(async move {
        for _ in 0..10_000 {
            flood.dial().await.unwrap();
        }
    });
    async fn accept_one(mut listen: MemoryListen) -> (MemoryListen, GuestPort) {
        let io = listen.accept().await.unwrap();
        (listen, GuestPort::new(io))
    }
    let accepting = tokio::spawn(accept_one(listen));
    flooding.await.unwrap();
    // The host still gets in, and every other connection was refused before a byte of it was read.
    let io = dial.dial().await.unwrap();
    let (listen, mut port) = accepting.await.unwrap();
    assert_eq!(listen.refused(), 10_000);
    let (host, guest) = tokio::join!(Session::connect(io, host_hello()), port.accept(guest_hello()));
    host.unwrap();
    guest.unwrap();
}

#[tokio::test]
async fn a_host_that_opens_too_many_or_out_of_order() {
    let info = Bytes::from_static(b"{\"type\":\"info\"}");
    for (ids, expected) in [
        (vec![1, 2, 3], Violation::TooManyStreams(2)),
        (vec![5, 5], Violation::StreamOrder(5)),
        (vec![5, 4], Violation::StreamOrder(4)),
    ] {
        let (host, guest) = duplex(64 * 1024);
        let mut raw = RawPeer::new(host);
        let mut hello = guest_hello();
        hello.limits.streams = 2;
        let host = host_hello();
        let (greeted, guest) = tokio::join!(raw.greet_guest(&host), Session::accept(guest, hello));
        greeted.unwrap();
        let (guest, _incoming, _) = guest.unwrap();
        for stream in ids {
            raw.send(&Frame::Open { stream, request: info.clone() }).await.unwrap();
        }
        assert_eq!(guest.closed().await, CloseReason::Violation(expected));
    }
}

#[tokio::test]
async fn a_request_of_a_later_generation_is_answered_unsupported() {
    let (host, guest) = duplex(64 * 1024);
    let mut raw = RawPeer::new(host);
    let hello = host_hello();
    let (greeted, guest) = tokio::join!(raw.greet_guest(&hello), Session::accept(guest, guest_hello()));
    greeted.unwrap();
    let (_guest, mut incoming, _) = guest.unwrap();
    let request = Bytes::from_static(b"{\"type\":\"teleport\",\"to\":[1,2,{}]}");
    raw.send(&Frame::Open { stream: 1, request }).await.unwrap();
    let Some(Frame::Message { stream: 1, last: true, payload }) = raw.receive().await.unwrap() else {
        panic!("no answer")
    };
    let Ok(Message::Failed(error)) = crate::message::decode(&payload) else { panic!("no failure") };
    assert_eq!(error.kind, GuestErrorKind::Unsupported);
    raw.send(&Frame::End { stream: 1 }).await.unwrap();
    // And goes on: the next one is handed out.
    raw.send(&Frame::Open { stream: 2, request: Bytes::from_static(b"{\"type\":\"info\"}") }).await.unwrap();
    assert_eq!(incoming.next().await.unwrap().0, Request::Info);
}

#[tokio::test]
async fn a_flood_of_pings_is_answered_without_a_queue() {
    let (host, mut raw) = with_raw_guest().await;
    for n in 0..5_000 {
        raw.send(&Frame::Ping(n)).await.unwrap();
    }
    let mut last = None;
    while last != Some(Frame::Pong(4_999)) {
        last = raw.receive().await.unwrap();
    }
    assert_eq!(host.close_reason(), None);
}
