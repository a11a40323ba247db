//! Futures dropped half-way, and halves dropped one by one.

use std::future::Future;

use super::*;
use crate::message::ExecRequest;

fn exec() -> Request {
    Request::Exec(ExecRequest::new(["x"]))
}

/// Polls a future once and drops it.
async fn poll_once<F: Future>(future: F) -> Option<F::Output> {
    let mut future = std::pin::pin!(future);
    std::future::poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}

#[tokio::test]
async fn a_write_that_was_dropped_wrote_nothing_and_one_that_returned_wrote_all() {
    let (host, _guest, mut incoming) = pair().await;
    let mut near = host.open(exec()).await.unwrap().split();
    let (_, far) = incoming.next().await.unwrap();
    let mut far = far.split();
    // Nobody reads: the queue fills, and then every write is dropped while it waits.
    let (mut written, mut dropped) = (0usize, 0);
    while dropped < 50 {
        let bytes = Bytes::from(vec![(written % 251) as u8; 10_007]);
        match poll_once(near.input.write(bytes)).await {
            Some(done) => {
                done.unwrap();
                written += 1;
            }
            None => dropped += 1,
        }
        tokio::task::yield_now().await;
    }
    assert_eq!(poll_once(near.input.flush()).await, None);
    near.input.finish();
    near.input.finish();
    assert_eq!(poll_once(near.input.write(Bytes::new())).await, Some(Err(StreamError::Ended)));
    let mut got = Vec::new();
    while let Some(bytes) = far.input.next().await {
        got.extend_from_slice(&bytes);
    }
    let expected: Vec<u8> = (0..written).flat_map(|n| vec![(n % 251) as u8; 10_007]).collect();
    assert!(got == expected, "{} bytes came of {}", got.len(), expected.len());
}

#[tokio::test]
async fn reads_and_accepts_that_were_dropped_lose_nothing() {
    let (host, _guest, mut incoming) = pair().await;
    for _ in 0..10 {
        assert!(poll_once(incoming.next()).await.is_none());
    }
    let mut near = host.open(exec()).await.unwrap().split();
    let (_, far) = incoming.next().await.unwrap();
    let mut far = far.split();
    let mut got = Vec::new();
    for n in 0..100u8 {
        assert!(poll_once(near.output.next()).await.is_none());
        assert!(poll_once(near.receiver.recv()).await.is_none());
        far.output.write(Bytes::from(vec![n; 10])).await.unwrap();
        far.sender.send(Message::Signal { number: i32::from(n) }).await.unwrap();
        got.extend_from_slice(&near.output.next().await.unwrap());
        assert_eq!(near.receiver.recv().await, Ok(Some(Message::Signal { number: i32::from(n) })));
    }
    assert_eq!(got.len(), 1000);
}

#[tokio::test]
async fn messages_wait_when_nobody_receives_and_arrive_in_order() {
    let (host, _guest, mut incoming) = pair().await;
    let mut near = host.open(exec()).await.unwrap().split();
    let (_, far) = incoming.next().await.unwrap();
    let mut sender = far.split().sender;
    let sending = tokio::spawn(async move {
        let mut sent = 0;
        for number in 0..5_000 {
            sender.send(Message::Signal { number }).await.unwrap();
            sent += 1;
        }
        sender.send(Message::Done).await.unwrap();
        sent
    });
    tokio::time::sleep(Duration::from_millis(30)).await;
    assert!(!sending.is_finished(), "5,000 messages were taken though nobody received");
    for number in 0..5_000 {
        assert_eq!(near.receiver.recv().await, Ok(Some(Message::Signal { number })));
    }
    assert_eq!(near.receiver.recv().await, Ok(Some(Message::Done)));
    assert_eq!(near.receiver.recv().await, Ok(None));
    assert_eq!(near.sender.send(Message::Signal { number: 9 }).await, Err(StreamError::Ended));
    assert_eq!(sending.await.unwrap(), 5_000);
}

#[tokio::test]
async fn the_message_halves_own_the_stream_and_lanes_outlive_them() {
    let (host, _guest, mut incoming) = pair().await;
    // Given up: the lanes end too.
    let near = host.open(exec()).await.unwrap().split();
    let (_, mut far) = incoming.next().await.unwrap();
    let mut output = near.output;
    drop((near.sender, near.receiver));
    assert_eq!(far.recv().await, Err(StreamError::Reset));
    assert_eq!(output.next().await, None);
    assert_eq!(output.end(), Some(LaneEnd::Reset));
    // Ended: what came is still there to read.
    let near = host.open(exec()).await.unwrap().split();
    let (_, mut far) = incoming.next().await.unwrap();
    far.parts().output.write(Bytes::from_static(b"late reader")).await.unwrap();
    far.send(Message::Done).await.unwrap();
    drop(far);
    let (mut receiver, mut output) = (near.receiver, near.output);
    assert_eq!(receiver.recv().await, Ok(Some(Message::Done)));
    drop((near.sender, receiver));
    assert_eq!(output.end(), None);
    assert_eq!(output.next().await.unwrap(), "late reader");
    assert_eq!(output.end(), Some(LaneEnd::Unfinished));
}

#[tokio::test]
async fn an_explicit_reset_and_a_reader_that_is_dropped() {
    let (host, _guest, mut incoming) = pair().await;
    let mut near = host.open(exec()).await.unwrap();
    assert_eq!(near.id(), 1);
    let (_, mut far) = incoming.next().await.unwrap();
    near.parts().sender.reset();
    assert_eq!(near.recv().await, Err(StreamError::Ended));
    assert_eq!(far.recv().await, Err(StreamError::Reset));
    // A reader that is gone stalls nobody.
    let near = host.open(exec()).await.unwrap().split();
    let (_, far) = incoming.next().await.unwrap();
    let mut far = far.split();
    drop(near.output);
    for _ in 0..100 {
        far.output.write(Bytes::from(vec![0; 50_000])).await.unwrap();
    }
    far.output.flush().await.unwrap();
}

#[tokio::test]
async fn what_does_not_fit_is_refused_here_and_closes_nothing() {
    let (host, _guest, mut incoming) = pair().await;
    let mut near = host.open(exec()).await.unwrap();
    let (_, mut far) = incoming.next().await.unwrap();
    let long = GuestError { kind: crate::message::GuestErrorKind::Other, text: "".into(), errno: None };
    let jobs = Message::Jobs {
        jobs: vec![
            crate::message::JobEntry {
                job: "j".into(),
                pid: None,
                argv: vec!["x".repeat(70_000).into()],
                background: false,
                exited: None,
                age_ms: 0
            };
            1
        ],
    };
    assert!(matches!(far.send(jobs).await, Err(StreamError::TooLong(_))));
    assert!(matches!(far.send(Message::Unknown).await, Err(StreamError::TooLong(_))));
    let huge = Request::Exec(ExecRequest::new([vec![b'x'; 300_000]]));
    assert!(matches!(host.open(huge).await, Err(StreamError::TooLong(_))));
    far.send(Message::Failed(long.clone())).await.unwrap();
    assert_eq!(near.recv().await, Ok(Some(Message::Failed(long))));
}

#[tokio::test]
async fn calls_that_get_another_answer_than_they_should() {
    let (host, _guest, mut incoming) = pair().await;
    tokio::spawn(async move {
        let mut calls = 0;
        while let Some((_, mut stream)) = incoming.next().await {
            let exited = crate::message::Exited {
                status: crate::message::ExitStatus::Code(0),
                usage: Default::default(),
                timed_out: false,
                oom_killed: false,
            };
            calls += 1;
            let job = |length| crate::message::JobEntry {
                job: "x".repeat(length),
                pid: None,
                argv: Vec::new(),
                background: false,
                exited: None,
                age_ms: 0,
            };
            match calls {
                1 => stream.send(Message::Exited(exited)).await.unwrap(),
                // A few that are long, and many that are short.
                2 => while stream.send(Message::Jobs { jobs: vec![job(60_000)] }).await.is_ok() {},
                _ => while stream.send(Message::Signal { number: 0 }).await.is_ok() {},
            }
        }
    });
    assert_eq!(host.call(Request::Info).await, Err(CallError::Unexpected("exited")));
    assert_eq!(host.call(Request::Info).await, Err(CallError::TooMuch));
    assert_eq!(host.call(Request::Info).await, Err(CallError::TooMuch));
}
