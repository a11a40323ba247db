use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use dev_box_comm::message::{ExitStatus, GuestErrorKind, Started};
use dev_box_comm::session::{GuestStream, Incoming};
use dev_box_comm::{GuestHello, HostHello};
use tokio::io::duplex;

use super::*;
use crate::cancel::CancelSource;
use crate::sink::BoxFuture;

async fn pair() -> (Session, Incoming, Session) {
    let (ours, theirs) = duplex(64 << 10);
    let (host, guest) = tokio::join!(
        Session::connect(ours, HostHello::fresh().unwrap()),
        Session::accept(theirs, GuestHello::new("b"))
    );
    let (guest, incoming, _) = guest.unwrap();
    (host.unwrap().0, incoming, guest)
}

#[derive(Debug, Default)]
struct Keep(Mutex<Vec<u8>>);

impl OutputSink for Keep {
    fn write(&self, _: OutputStream, bytes: Bytes) -> BoxFuture<'_, std::io::Result<()>> {
        self.0.lock().unwrap().extend_from_slice(&bytes);
        Box::pin(std::future::ready(Ok(())))
    }
}

#[derive(Debug)]
struct Broken(std::io::ErrorKind);

impl OutputSink for Broken {
    fn write(&self, _: OutputStream, _: Bytes) -> BoxFuture<'_, std::io::Result<()>> {
        Box::pin(std::future::ready(Err(self.0.into())))
    }
}

fn started() -> Message {
    Message::Started(Started { pid: 3, job: Some("job-1".into()), replay: None })
}

fn exited() -> Exited {
    Exited { status: ExitStatus::Code(4), usage: Default::default(), timed_out: false, oom_killed: false }
}

fn request() -> Attach {
    Attach { job: "job-1".into(), replay_bytes: 100, stdin: true }
}

async fn attending(
    sink: Arc<dyn OutputSink>,
    attachment: Attachment,
    cancel: Cancel,
) -> (tokio::task::JoinHandle<Result<Attended, BackgroundError>>, GuestStream, Incoming, Session) {
    let (session, mut incoming, guest) = pair().await;
    let task = tokio::spawn(async move { attach(&session, request(), attachment, sink, &cancel).await });
    let (asked, mut stream) = incoming.next().await.unwrap();
    assert_eq!(asked, Request::Attach(request()));
    stream.send(started()).await.unwrap();
    (task, stream, incoming, guest)
}

#[tokio::test]
async fn a_job_is_started_and_left() {
    let (session, mut incoming, _guest) = pair().await;
    let asked = tokio::spawn(async move {
        let (request, mut stream) = incoming.next().await.unwrap();
        stream.send(started()).await.unwrap();
        (request, stream.recv().await)
    });
    assert_eq!(start(&session, ExecRequest::new(["sleep"])).await.unwrap(), "job-1");
    let (request, after) = asked.await.unwrap();
    assert!(matches!(request, Request::Exec(exec) if exec.background));
    assert_eq!(after, Err(StreamError::Reset));
}

#[tokio::test]
async fn all_output_comes_before_the_end() {
    let keep = Arc::new(Keep::default());
    let (sizes, resizes) = watch::channel(PtySize { rows: 24, cols: 80 });
    let attachment =
        Attachment { stdin: Stdin::Bytes("typed".into()), resizes: Some(resizes), recent_only: false };
    let (task, stream, ..) = attending(keep.clone(), attachment, Cancel::never()).await;
    let mut parts = stream.split();
    assert_eq!(parts.receiver.recv().await, Ok(Some(Message::Resize(PtySize { rows: 24, cols: 80 }))));
    sizes.send(PtySize { rows: 5, cols: 6 }).unwrap();
    assert_eq!(parts.receiver.recv().await, Ok(Some(Message::Resize(PtySize { rows: 5, cols: 6 }))));
    assert_eq!(parts.input.next().await.as_deref(), Some(&b"typed"[..]));
    parts.output.write(Bytes::from(vec![b'x'; 200_000])).await.unwrap();
    parts.sender.send(Message::Exited(exited())).await.unwrap();
    assert_eq!(task.await.unwrap().unwrap(), Attended::Exited(exited()));
    assert_eq!(keep.0.lock().unwrap().len(), 200_000);
}

#[tokio::test]
async fn a_job_that_is_left_is_only_left() {
    let cancel = CancelSource::new();
    let (task, mut stream, ..) =
        attending(Arc::new(Keep::default()), Attachment::default(), cancel.token()).await;
    cancel.cancel();
    assert_eq!(task.await.unwrap().unwrap(), Attended::Left);
    assert_eq!(stream.recv().await, Err(StreamError::Reset), "no signal, nothing");
    for (kind, left) in [(std::io::ErrorKind::BrokenPipe, true), (std::io::ErrorKind::StorageFull, false)] {
        let (task, mut stream, ..) =
            attending(Arc::new(Broken(kind)), Attachment::default(), Cancel::never()).await;
        stream.parts().output.write(Bytes::from_static(b"x")).await.unwrap();
        assert_eq!(task.await.unwrap().is_ok(), left);
    }
}

#[tokio::test]
async fn refusals_and_breaches_are_told_apart() {
    let (task, mut stream, ..) =
        attending(Arc::new(Keep::default()), Attachment::default(), Cancel::never()).await;
    stream.send(Message::Failed(GuestError::new(GuestErrorKind::NotFound, "no"))).await.unwrap();
    assert!(matches!(task.await.unwrap(), Err(BackgroundError::Guest(_))));
    let (task, mut stream, ..) =
        attending(Arc::new(Keep::default()), Attachment::default(), Cancel::never()).await;
    stream.send(Message::Jobs { jobs: Vec::new() }).await.unwrap();
    assert!(matches!(task.await.unwrap(), Err(BackgroundError::Violation(_))));
    let (task, _stream, _incoming, guest) =
        attending(Arc::new(Keep::default()), Attachment::default(), Cancel::never()).await;
    guest.close();
    assert!(matches!(task.await.unwrap(), Err(BackgroundError::Stream(_))));
}

#[tokio::test(start_paused = true)]
async fn jobs_are_listed_and_killed() {
    let (session, mut incoming, _guest) = pair().await;
    tokio::spawn(async move {
        while let Some((request, mut stream)) = incoming.next().await {
            match request {
                Request::Jobs => {
                    let entry = JobEntry {
                        job: "job-1".into(),
                        pid: Some(3),
                        argv: Vec::new(),
                        background: true,
                        exited: None,
                        age_ms: 1,
                    };
                    stream.send(Message::Jobs { jobs: vec![entry.clone()] }).await.unwrap();
                    stream.send(Message::Jobs { jobs: vec![entry] }).await.unwrap();
                }
                Request::Kill(kill) => assert_eq!((kill.job.as_str(), kill.signal), ("job-1", 9)),
                other => panic!("{other:?}"),
            }
            stream.send(Message::Done).await.unwrap();
        }
    });
    assert_eq!(list(&session).await.unwrap().len(), 2);
    assert!(!at_rest(&session, Duration::from_secs(5)).await, "one goes on");
    tokio::time::timeout(Duration::from_secs(5), kill(&session, "job-1", 9)).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_guest_at_rest_says_so_in_time() {
    let (session, mut incoming, _guest) = pair().await;
    let answering = tokio::spawn(async move {
        let (request, mut stream) = incoming.next().await.unwrap();
        assert_eq!(request, Request::Jobs);
        let ended = JobEntry {
            job: "job-1".into(),
            pid: None,
            argv: Vec::new(),
            background: true,
            exited: Some(exited()),
            age_ms: 1,
        };
        stream.send(Message::Jobs { jobs: vec![ended] }).await.unwrap();
        stream.send(Message::Done).await.unwrap();
        // The next is asked in vain.
        incoming.next().await
    });
    assert!(at_rest(&session, Duration::from_secs(2)).await);
    assert!(!at_rest(&session, Duration::from_secs(2)).await, "it does not answer");
    assert!(answering.await.unwrap().is_some());
}

#[tokio::test(start_paused = true)]
async fn what_was_kept_is_enough() {
    let keep = Arc::new(Keep::default());
    let attachment = Attachment { recent_only: true, ..Attachment::default() };
    let (task, mut stream, incoming, _guest) = attending(keep.clone(), attachment, Cancel::never()).await;
    answers(incoming);
    stream.parts().output.write(Bytes::from_static(b"kept")).await.unwrap();
    assert_eq!(task.await.unwrap().unwrap(), Attended::Left);
    assert_eq!(*keep.0.lock().unwrap(), b"kept");
    // A job that never stops writing is left, too.
    let attachment = Attachment { recent_only: true, ..Attachment::default() };
    let (task, mut stream, ..) = attending(keep, attachment, Cancel::never()).await;
    while stream.parts().output.write(Bytes::from(vec![b'x'; 30_000])).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(task.await.unwrap().unwrap(), Attended::Left);
}

/// Keeps what it is given, and takes a minute and a half for it.
#[derive(Debug, Default)]
struct Slow(Keep);

impl OutputSink for Slow {
    fn write(&self, stream: OutputStream, bytes: Bytes) -> BoxFuture<'_, std::io::Result<()>> {
        Box::pin(async move {
            tokio::time::sleep(Duration::from_secs(90)).await;
            self.0.write(stream, bytes).await
        })
    }
}

/// An agent that answers whatever it is asked, but slowly.
fn answers(mut incoming: Incoming) {
    tokio::spawn(async move {
        while let Some((request, mut stream)) = incoming.next().await {
            assert_eq!(request, Request::Jobs);
            tokio::time::sleep(Duration::from_secs(20)).await;
            let _ = stream.send(Message::Done).await;
        }
    });
}

/// Asks for what was kept; the guest answers with `Started` after a while.
async fn recent(
    sink: Arc<dyn OutputSink>,
    replay: Option<Replay>,
) -> (tokio::task::JoinHandle<Result<Attended, BackgroundError>>, GuestStream, Incoming, Session) {
    let (session, mut incoming, guest) = pair().await;
    let attachment = Attachment { recent_only: true, ..Attachment::default() };
    let task =
        tokio::spawn(async move { attach(&session, request(), attachment, sink, &Cancel::never()).await });
    let (_, mut stream) = incoming.next().await.unwrap();
    tokio::time::sleep(Duration::from_secs(5)).await;
    stream.send(Message::Started(Started { pid: 3, job: None, replay })).await.unwrap();
    (task, stream, incoming, guest)
}

#[tokio::test(start_paused = true)]
async fn a_slow_guest_is_waited_for_until_all_is_there_that_it_has_kept() {
    let keep = Arc::new(Keep::default());
    let (task, mut stream, ..) = recent(keep.clone(), Some(Replay { stdout: 6, stderr: 3 })).await;
    for part in ["ke", "pt", "at"] {
        tokio::time::sleep(Duration::from_secs(50)).await;
        stream.parts().output.write(part.into()).await.unwrap();
    }
    tokio::time::sleep(Duration::from_secs(50)).await;
    assert!(!task.is_finished(), "its errors have not come");
    stream.parts().errors.write("err".into()).await.unwrap();
    let began = tokio::time::Instant::now();
    assert_eq!(task.await.unwrap().unwrap(), Attended::Left);
    assert!(began.elapsed() < Duration::from_secs(1), "nothing else is waited for");
    assert_eq!(*keep.0.lock().unwrap(), b"keptaterr");
    let (task, _stream, ..) = recent(keep, Some(Replay { stdout: 0, stderr: 0 })).await;
    assert_eq!(task.await.unwrap().unwrap(), Attended::Left, "there is nothing");
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_gets_all_of_it() {
    for replay in [Some(Replay { stdout: 4, stderr: 0 }), None] {
        let slow = Arc::new(Slow::default());
        let (task, mut stream, incoming, _guest) = recent(slow.clone(), replay).await;
        answers(incoming);
        stream.parts().output.write("kept".into()).await.unwrap();
        assert_eq!(task.await.unwrap().unwrap(), Attended::Left);
        assert_eq!(*slow.0.0.lock().unwrap(), b"kept");
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_does_not_say_how_much_is_given_time() {
    let keep = Arc::new(Keep::default());
    let (task, mut stream, incoming, _guest) = recent(keep.clone(), None).await;
    answers(incoming);
    for (after, part) in [(21, "ke"), (1, "pt")] {
        tokio::time::sleep(Duration::from_secs(after)).await;
        stream.parts().output.write(part.into()).await.unwrap();
    }
    assert_eq!(task.await.unwrap().unwrap(), Attended::Left);
    assert_eq!(*keep.0.lock().unwrap(), b"kept");
}

/// A line a second, for as long as anybody listens.
fn chatters(mut stream: GuestStream, every: Duration) {
    tokio::spawn(async move {
        while stream.parts().output.write("x".into()).await.is_ok() {
            // Who says it again says nothing new.
            let _ = stream.send(Message::Started(Started { pid: 3, job: None, replay: None })).await;
            tokio::time::sleep(every).await;
        }
    });
}

#[tokio::test(start_paused = true)]
async fn a_job_that_never_is_silent_keeps_nobody() {
    let (task, stream, incoming, _guest) = recent(Arc::new(Keep::default()), None).await;
    answers(incoming);
    chatters(stream, Duration::from_secs(1));
    let began = tokio::time::Instant::now();
    assert_eq!(task.await.unwrap().unwrap(), Attended::Left, "of an older agent");
    assert!(began.elapsed() < Duration::from_secs(40), "{:?}", began.elapsed());

    let endless = Some(Replay { stdout: u64::MAX, stderr: u64::MAX });
    let (task, stream, _incoming, _guest) = recent(Arc::new(Keep::default()), endless).await;
    chatters(stream, PATIENCE - Duration::from_secs(1));
    let began = tokio::time::Instant::now();
    assert!(matches!(task.await.unwrap(), Err(BackgroundError::Silent(_))), "nor one that lies");
    assert!(began.elapsed() <= LONGEST + PATIENCE, "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_hangs_has_not_sent_everything() {
    let keep = Arc::new(Keep::default());
    let (task, mut stream, ..) = recent(keep, Some(Replay { stdout: 5, stderr: 0 })).await;
    stream.parts().output.write("kept".into()).await.unwrap();
    assert!(matches!(task.await.unwrap(), Err(BackgroundError::Silent(_))));
    let (task, _stream, _incoming, _guest) = recent(Arc::new(Keep::default()), None).await;
    assert!(matches!(task.await.unwrap(), Err(BackgroundError::Silent(_))), "an older agent");
    let (session, mut incoming, _guest) = pair().await;
    let attachment = Attachment { recent_only: true, ..Attachment::default() };
    let never = Cancel::never();
    let attached = attach(&session, request(), attachment, Arc::new(Keep::default()), &never);
    let (attached, _stream) = tokio::join!(attached, incoming.next());
    assert!(matches!(attached, Err(BackgroundError::Silent(_))), "it does not even say that it has started");
}

#[tokio::test]
async fn a_job_is_found_by_as_much_of_its_id_as_tells_it_from_others() {
    let (session, mut incoming, _guest) = pair().await;
    tokio::spawn(async move {
        while let Some((_, mut stream)) = incoming.next().await {
            let entry = |job: &str| JobEntry {
                job: job.to_owned(),
                pid: None,
                argv: Vec::new(),
                background: true,
                age_ms: 0,
                exited: None,
            };
            let jobs = ["4b1c", "4b1c-long", "4d\u{1b}[2J", "90"].map(entry).to_vec();
            let _ = stream.send(Message::Jobs { jobs }).await;
            let _ = stream.send(Message::Done).await;
        }
    });
    for (asked, wanted) in [("9", "90"), ("4b1c", "4b1c"), ("4b1c-", "4b1c-long"), ("", ""), ("none", "none")]
    {
        assert_eq!(find(&session, asked).await.unwrap(), wanted);
    }
    let refused = find(&session, "4").await.unwrap_err().to_string();
    assert_eq!(refused, "the ids of 3 jobs begin with 4: 4b1c, 4b1c-long, 4d");
}
