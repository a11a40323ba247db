//! Jobs that go on without their client: started, attached to again, left, listed, signalled.

use std::future::pending;
use std::sync::Arc;

use dev_box_comm::message::{
    Attach, ExecRequest, Exited, GuestError, JobEntry, Kill, Message, PtySize, Replay, Request,
};
use dev_box_comm::session::{CallError, LaneReader, Session, StreamError, StreamParts};
use tokio::sync::watch;
use tokio::time::{Duration, Instant, sleep, timeout};

use crate::cancel::{Cancel, Urgency};
use crate::executor::process::feed;
use crate::job::Stdin;
use crate::sink::{OutputSink, OutputStream};
use crate::terminal::one_line;

/// An agent that does not say how much it has kept sends that at once: silence this long after it has shown that it runs means
/// that it has come.
const SILENCE: Duration = Duration::from_secs(2);

/// How long the guest may be silent while something is due.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long all of it may take of the guest's time: one that says next to nothing now and then is not waited for without end.
const LONGEST: Duration = Duration::from_secs(600);

/// The same, once an agent that does not say how much there is has shown that it runs: the job may write on for ever.
const LONGEST_UNTOLD: Duration = Duration::from_secs(10);

/// More than an agent keeps, of both streams: what comes after it is new.
const KEPT: u64 = 1 << 20;

/// Why a background job was not reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackgroundError {
    /// The guest says why.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The stream or the session ended first.
    #[error("the connection to the VM ended")]
    Stream(#[from] StreamError),
    /// Its jobs, or what it has kept of the output of one, did not come, or not all of it.
    #[error("the guest has not sent what was asked for within {} s", .0.as_secs())]
    Silent(Duration),
    /// The guest answered something else than it should.
    #[error("the guest broke the protocol: {0}")]
    Violation(&'static str),
    /// More than one job's id begins so.
    #[error("the ids of {} jobs begin with {beginning}: {}", jobs.len(), jobs.join(", "))]
    Ambiguous {
        /// What was asked for.
        beginning: String,
        /// Their ids, the guest's own words, without control characters.
        jobs: Vec<String>,
    },
    /// The output could not be passed on.
    #[error("the output cannot be written")]
    Sink(#[source] std::io::Error),
}

impl From<CallError> for BackgroundError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Guest(error) => error.into(),
            CallError::Stream(error) => error.into(),
            _ => Self::Violation("it answered a request with something else"),
        }
    }
}

/// Starts a job that goes on by itself; gives its id.
///
/// # Errors
/// [`BackgroundError`].
pub async fn start(session: &Session, request: ExecRequest) -> Result<String, BackgroundError> {
    let request = ExecRequest { background: true, ..request };
    let mut stream = session.open(Request::Exec(request)).await?;
    loop {
        match stream.recv().await? {
            Some(Message::Started(started)) => {
                return started
                    .job
                    .ok_or(BackgroundError::Violation("it did not say what the job is called"));
            }
            Some(Message::Failed(error)) => return Err(error.into()),
            Some(Message::Unknown) => {}
            _ => return Err(BackgroundError::Violation("it did not say whether the job started")),
        }
    }
}

/// The jobs the guest knows. Its claim; bounded by the protocol.
///
/// # Errors
/// [`BackgroundError`].
pub async fn list(session: &Session) -> Result<Vec<JobEntry>, BackgroundError> {
    let mut all = Vec::new();
    for message in session.call(Request::Jobs).await? {
        if let Message::Jobs { jobs } = message {
            all.extend(jobs);
        }
    }
    Ok(all)
}

/// The id of the job that is called so, or of the only one whose id begins so; what matches none is given back for the guest to refuse.
///
/// # Errors
/// [`BackgroundError`]; [`Ambiguous`](BackgroundError::Ambiguous) when it could be several.
pub async fn find(session: &Session, beginning: &str) -> Result<String, BackgroundError> {
    let listed = timeout(PATIENCE, list(session)).await.map_err(|_| BackgroundError::Silent(PATIENCE))?;
    let known = listed?.into_iter().map(|job| job.job);
    let mut matching: Vec<String> = known.filter(|id| id.starts_with(beginning)).collect();
    if beginning.is_empty() || matching.iter().any(|id| id == beginning) {
        return Ok(beginning.to_owned());
    }
    match matching.len() {
        0 | 1 => Ok(matching.pop().unwrap_or_else(|| beginning.to_owned())),
        _ => {
            let jobs = matching.iter().map(|id| one_line(id.as_bytes())).collect();
            Err(BackgroundError::Ambiguous { beginning: beginning.to_owned(), jobs })
        }
    }
}

/// Whether the guest says, within `patience`, that no job goes on in it. Its claim.
pub async fn at_rest(session: &Session, patience: Duration) -> bool {
    let jobs = tokio::time::timeout(patience, list(session)).await;
    matches!(jobs, Ok(Ok(jobs)) if jobs.iter().all(|job| job.exited.is_some()))
}

/// Sends a signal to all of a job.
///
/// # Errors
/// [`BackgroundError`].
pub async fn kill(session: &Session, job: &str, signal: i32) -> Result<(), BackgroundError> {
    session.call(Request::Kill(Kill { job: job.to_owned(), signal })).await?;
    Ok(())
}

/// How a time with a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Attended {
    /// The job's end came first.
    Exited(Exited),
    /// It goes on: the caller cancelled, nobody read the output, or only what was kept had been asked for.
    Left,
}

/// What is given to a job that is attached to.
#[derive(Debug, Default)]
pub struct Attachment {
    /// For its standard input, where it has one.
    pub stdin: Stdin,
    /// The sizes of its terminal, where it has one.
    pub resizes: Option<watch::Receiver<PtySize>>,
    /// Leave a job that goes on once what the guest has kept of its output is here.
    pub recent_only: bool,
}

/// Attaches to a job: the last of its output, then what it writes, until it ends or the caller cancels. The job goes on
/// whatever becomes of this.
///
/// # Errors
/// [`BackgroundError`].
pub async fn attach(
    session: &Session,
    request: Attach,
    attachment: Attachment,
    sink: Arc<dyn OutputSink>,
    cancel: &Cancel,
) -> Result<Attended, BackgroundError> {
    let StreamParts { mut sender, mut receiver, input, output, errors, .. } =
        session.open(Request::Attach(request)).await?.split();
    let heard = Heard::default();
    let outputs = async {
        tokio::try_join!(
            pass_on(output, OutputStream::Stdout, &*sink, &heard),
            pass_on(errors, OutputStream::Stderr, &*sink, &heard)
        )
    };
    let recent =
        async { if attachment.recent_only { replayed(&heard, session).await } else { pending().await } };
    let resizing = async {
        let Some(mut sizes) = attachment.resizes else { return };
        // The first at once: the job may have been given another one's size.
        sizes.mark_changed();
        while sizes.changed().await.is_ok() {
            let size = *sizes.borrow_and_update();
            if sender.send(Message::Resize(size)).await.is_err() {
                return;
            }
        }
    };
    let feeding = feed(attachment.stdin, input);
    tokio::pin!(outputs, recent, resizing, feeding);
    let (mut fed, mut resized, mut written, mut last) = (false, false, false, None);
    while !(written && last.is_some()) {
        tokio::select! {
            biased;
            () = cancel.reached(Urgency::Graceful) => return Ok(Attended::Left),
            message = receiver.recv(), if last.is_none() => match message? {
                Some(Message::Started(started)) => heard.started(started.replay),
                Some(Message::Unknown) => {}
                Some(Message::Exited(exited)) => last = Some(Attended::Exited(exited)),
                Some(Message::Failed(error)) => return Err(error.into()),
                _ => return Err(BackgroundError::Violation("it said something that has no place in a job's stream")),
            },
            done = &mut outputs, if !written => match done {
                Ok(_) => written = true,
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(Attended::Left),
                Err(error) => return Err(BackgroundError::Sink(error)),
            },
            came = &mut recent, if last.is_none() => return came.map(|()| Attended::Left),
            () = &mut feeding, if !fed => fed = true,
            () = &mut resizing, if !resized => resized = true,
        }
    }
    Ok(last.unwrap_or(Attended::Left))
}

/// What came of a job's output so far, in bytes.
#[derive(Debug, Clone, Copy, Default)]
struct Progress {
    /// What the guest said of it when it attached, once it has.
    started: Option<Option<Replay>>,
    received: u64,
    /// Passed on.
    stdout: u64,
    stderr: u64,
}

impl Progress {
    /// Whether all that was kept is here, as far as can be told without waiting.
    fn is_complete(&self) -> bool {
        let replay = self.started.flatten();
        self.stdout + self.stderr > KEPT
            || replay.is_some_and(|replay| self.stdout >= replay.stdout && self.stderr >= replay.stderr)
    }

    fn is_with_the_sink(&self) -> bool {
        self.received > self.stdout + self.stderr
    }
}

#[derive(Debug, Default)]
struct Heard(watch::Sender<Progress>);

impl Heard {
    fn started(&self, replay: Option<Replay>) {
        // Who says it again says nothing new.
        self.0.send_if_modified(|progress| {
            let first = progress.started.is_none();
            progress.started.get_or_insert(replay);
            first
        });
    }

    fn received(&self, bytes: u64) {
        self.0.send_modify(|progress| progress.received += bytes);
    }

    fn passed_on(&self, stream: OutputStream, bytes: u64) {
        self.0.send_modify(|progress| match stream {
            OutputStream::Stdout => progress.stdout += bytes,
            OutputStream::Stderr => progress.stderr += bytes,
        });
    }
}

/// Waits until what the guest has kept of the output is here. Time counts only while it is the guest's turn.
async fn replayed(heard: &Heard, session: &Session) -> Result<(), BackgroundError> {
    let mut progress = heard.0.subscribe();
    // Of an older agent, which does not say how much there is. Not a ping: a daemon between would answer that.
    let answer = async { timeout(PATIENCE, list(session)).await };
    tokio::pin!(answer);
    let (mut answered, mut left) = (false, LONGEST);
    loop {
        let now = *progress.borrow_and_update();
        if now.is_complete() {
            return Ok(());
        }
        let (is_theirs, began) = (!now.is_with_the_sink(), Instant::now());
        let silence = if answered { SILENCE } else { PATIENCE };
        tokio::select! {
            biased;
            _ = progress.changed() => {}
            answer = &mut answer, if is_theirs && !answered && matches!(now.started, Some(None)) => match answer {
                // Whoever reads the stream hears of that.
                Ok(Err(BackgroundError::Stream(StreamError::Closed(_)))) => pending().await,
                Ok(_) => {
                    (answered, left) = (true, LONGEST_UNTOLD);
                    continue;
                }
                Err(_) => return Err(BackgroundError::Silent(PATIENCE)),
            },
            () = sleep(silence.min(left)), if is_theirs => {
                return if answered { Ok(()) } else { Err(BackgroundError::Silent(silence.min(left))) };
            }
        }
        if is_theirs {
            left = left.saturating_sub(began.elapsed());
        }
    }
}

async fn pass_on(
    mut lane: LaneReader,
    stream: OutputStream,
    sink: &dyn OutputSink,
    heard: &Heard,
) -> std::io::Result<()> {
    while let Some(bytes) = lane.next().await {
        let length = bytes.len() as u64;
        heard.received(length);
        sink.write(stream, bytes).await?;
        heard.passed_on(stream, length);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
