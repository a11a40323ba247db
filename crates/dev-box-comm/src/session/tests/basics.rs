//! What a session does when everybody behaves.

use super::*;
use crate::frame::FrameError;
use crate::message::{ExecRequest, ExitStatus, Exited, Started, Usage};
use crate::mux::Violation;

#[tokio::test]
async fn a_call_is_answered() {
    let (host, _guest, incoming) = pair().await;
    tokio::spawn(serve(incoming));
    assert_eq!(host.call(Request::Info).await, Ok(vec![Message::Info(Default::default())]));
    let error = host.call(Request::Jobs).await.unwrap_err();
    assert!(matches!(error, CallError::Guest(_)), "{error}");
    assert!(host.ping().await.unwrap() < Duration::from_secs(60));
}

#[tokio::test]
async fn echo_brings_back_every_byte() {
    let (host, _guest, incoming) = pair().await;
    tokio::spawn(serve(incoming));
    let mut parts = host.open(Request::Echo).await.unwrap().split();
    let sent: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    let copy = Bytes::from(sent.clone());
    tokio::spawn(async move {
        for at in (0..copy.len()).step_by(100_000) {
            parts.input.write(copy.slice(at..(at + 100_000).min(copy.len()))).await.unwrap();
        }
        parts.input.flush().await.unwrap();
        parts.input.finish();
    });
    let mut got = Vec::new();
    while let Some(bytes) = parts.output.next().await {
        assert!(!bytes.is_empty() && bytes.len() <= 64 * 1024);
        got.extend_from_slice(&bytes);
    }
    assert_eq!(parts.output.end(), Some(LaneEnd::Finished));
    assert!(got == sent, "{} bytes came back of {}", got.len(), sent.len());
    assert_eq!(parts.receiver.recv().await, Ok(Some(Message::Done)));
    assert_eq!(parts.receiver.recv().await, Ok(None));
    assert_eq!(parts.errors.next().await, None);
    assert_eq!(parts.errors.end(), Some(LaneEnd::Unfinished));
}

/// Whoever ends after its last words knows when they have been heard.
#[tokio::test(start_paused = true)]
async fn a_streams_end_is_confirmed() {
    let (near, mut wire) = duplex(64 * 1024);
    let (far, mut other) = duplex(64 * 1024);
    let (go, stopped) = tokio::sync::oneshot::channel::<()>();
    tokio::spawn(async move {
        let copying = async { tokio::io::copy_bidirectional(&mut wire, &mut other).await };
        tokio::pin!(copying);
        // Passes for a second, then waits to be told.
        let _ = tokio::time::timeout(Duration::from_secs(1), &mut copying).await;
        let _ = stopped.await;
        let _ = copying.await;
    });
    let (host, guest) =
        tokio::join!(Session::connect(near, host_hello()), Session::accept(far, guest_hello()));
    let (host, _) = host.unwrap();
    let (_guest, mut incoming, _) = guest.unwrap();
    let call = tokio::spawn(async move { host.call(Request::Info).await });
    let (_, mut stream) = incoming.next().await.unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    stream.send(Message::Done).await.unwrap();
    let sender = &mut stream.parts().sender;
    assert!(tokio::time::timeout(Duration::from_secs(5), sender.closed()).await.is_err(), "not heard yet");
    go.send(()).unwrap();
    tokio::time::timeout(Duration::from_secs(5), sender.closed()).await.unwrap();
    assert_eq!(call.await.unwrap(), Ok(Vec::new()));
}

#[tokio::test]
async fn exit_comes_after_all_output() {
    let (host, _guest, mut incoming) = pair().await;
    let exited = Message::Exited(Exited {
        status: ExitStatus::Code(7),
        usage: Usage::default(),
        timed_out: false,
        oom_killed: false,
    });
    let last = exited.clone();
    tokio::spawn(async move {
        let (request, stream) = incoming.next().await.unwrap();
        assert!(matches!(request, Request::Exec(ref exec) if exec.argv.len() == 1));
        let mut parts = stream.split();
        parts.sender.send(Message::Started(Started { pid: 4, job: None, replay: None })).await.unwrap();
        for _ in 0..20 {
            parts.output.write(Bytes::from(vec![b'o'; 10_000])).await.unwrap();
            parts.errors.write(Bytes::from(vec![b'e'; 1_000])).await.unwrap();
        }
        parts.output.finish();
        parts.sender.send(last).await.unwrap();
    });
    let mut parts = host.open(Request::Exec(ExecRequest::new(["true"]))).await.unwrap().split();
    assert!(matches!(parts.receiver.recv().await, Ok(Some(Message::Started(_)))));
    let out = tokio::spawn(async move {
        let mut count = 0;
        while let Some(bytes) = parts.output.next().await {
            count += bytes.len();
        }
        (count, parts.output.end())
    });
    assert_eq!(parts.receiver.recv().await, Ok(Some(exited)));
    let mut errors = 0;
    while let Some(bytes) = parts.errors.next().await {
        errors += bytes.len();
    }
    assert_eq!(errors, 20_000);
    assert_eq!(out.await.unwrap(), (200_000, Some(LaneEnd::Finished)));
}

#[tokio::test]
async fn an_unread_lane_stalls_only_itself() {
    let (host, _guest, mut incoming) = pair().await;
    tokio::spawn(async move {
        while let Some((_, stream)) = incoming.next().await {
            tokio::spawn(async move {
                let mut parts = stream.split();
                let mut out = parts.output;
                tokio::spawn(async move { while out.write(Bytes::from(vec![0; 60_000])).await.is_ok() {} });
                for _ in 0..100 {
                    parts.errors.write(Bytes::from(vec![1; 60_000])).await.unwrap();
                }
                parts.errors.finish();
                // Until the host is done with it.
                while parts.receiver.recv().await.is_ok() {}
            });
        }
    });
    let mut flood = host.open(Request::Exec(ExecRequest::new(["flood"]))).await.unwrap().split();
    let mut count = 0;
    while let Some(bytes) = flood.errors.next().await {
        count += bytes.len();
    }
    assert_eq!(count, 6_000_000);
    // And the session still answers.
    host.ping().await.unwrap();
}

#[tokio::test]
async fn dropping_a_stream_resets_it_at_the_guest() {
    let (host, _guest, mut incoming) = pair().await;
    let stream = host.open(Request::Exec(ExecRequest::new(["sleep"]))).await.unwrap();
    let (_, mut there) = incoming.next().await.unwrap();
    drop(stream);
    assert_eq!(there.recv().await, Err(StreamError::Reset));
    assert_eq!(there.send(Message::Done).await, Err(StreamError::Reset));
    assert_eq!(there.parts().output.write(Bytes::from_static(b"x")).await, Err(StreamError::Reset));
    assert_eq!(there.parts().input.next().await, None);
    assert_eq!(there.parts().input.end(), Some(LaneEnd::Reset));
    host.ping().await.unwrap();
}

#[tokio::test]
async fn dropping_the_guests_stream_resets_it_at_the_host() {
    let (host, _guest, mut incoming) = pair().await;
    let mut stream = host.open(Request::Info).await.unwrap();
    drop(incoming.next().await.unwrap());
    assert_eq!(stream.recv().await, Err(StreamError::Reset));
    drop(incoming);
    let mut stream = host.open(Request::Info).await.unwrap();
    assert_eq!(stream.recv().await, Err(StreamError::Reset));
}

#[tokio::test]
async fn closing_tells_both_sides() {
    let (host, guest, mut incoming) = pair().await;
    let mut stream = host.open(Request::Info).await.unwrap();
    host.close();
    assert_eq!(host.closed().await, CloseReason::Local);
    assert_eq!(guest.closed().await, CloseReason::Peer(PeerClose::Done));
    assert_eq!(stream.recv().await, Err(StreamError::Closed(CloseReason::Local)));
    assert_eq!(stream.parts().output.next().await, None);
    assert_eq!(stream.parts().output.end(), Some(LaneEnd::Closed(CloseReason::Local)));
    assert!(host.open(Request::Info).await.is_err());
    assert_eq!(host.ping().await, Err(CloseReason::Local));
    assert!(incoming.next().await.is_none());
}

#[test]
fn what_became_of_a_vm_is_told_in_words() {
    let number = |got| CloseReason::Violation(Violation::Frame(FrameError::Sequence { expected: 9, got }));
    assert!(CloseReason::Eof.fate().starts_with("its QEMU is gone"));
    for anew in [number(0), CloseReason::Violation(Violation::UnexpectedHello)] {
        assert!(anew.fate().starts_with("its agent began anew"), "{anew}");
    }
    assert_eq!(number(8).fate(), number(8).to_string());
}

#[tokio::test]
async fn dropping_the_last_handle_closes() {
    let (host, guest, _incoming) = pair().await;
    let stream = host.open(Request::Info).await.unwrap();
    let other = host.clone();
    drop((host, other));
    // The stream is a handle too.
    guest.ping().await.unwrap();
    drop(stream);
    assert_eq!(guest.closed().await, CloseReason::Peer(PeerClose::Done));
}

#[tokio::test]
async fn open_waits_while_all_streams_are_taken() {
    let (host, guest) = duplex(4096);
    let mut hello = guest_hello();
    hello.limits.streams = 2;
    let (host, guest) = tokio::join!(Session::connect(host, host_hello()), Session::accept(guest, hello));
    let (host, (_guest, mut incoming, _)) = (host.unwrap().0, guest.unwrap());
    let first = host.open(Request::Info).await.unwrap();
    let _second = host.open(Request::Info).await.unwrap();
    let third = tokio::time::timeout(Duration::from_millis(30), host.open(Request::Info)).await;
    assert!(third.is_err(), "a third stream was opened");
    drop(first);
    host.open(Request::Info).await.unwrap();
    assert!(incoming.next().await.is_some());
}
