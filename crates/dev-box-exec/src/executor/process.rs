//! The process in the guest, from the request that starts it to its end.
//!
//! ```text
//!   Running --timeout, cancel, failed sink--> Ending: TERM --grace--> KILL --patience--> reset
//!      |    --closed sink--> Ending: PIPE --grace--> KILL ...           |
//!      '------------------------- Exited -------------------------------'--> the first reason counts
//! ```
//!
//! The host keeps the deadline: none of this depends on what the guest does or says.

use std::future::pending;
use std::time::Duration;

use bytes::Bytes;
use dev_box_comm::message::{ExecRequest, ExitStatus, Exited, Message, PtySize, Request};
use dev_box_comm::session::{LaneWriter, MessageReceiver, MessageSender, Session, StreamParts};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::failure::Cause;
use super::output::{SinkFault, pump};
use crate::cancel::{Cancel, CancelSource, Urgency};
use crate::job::{OutputCaps, Stdin};
use crate::outcome::Captured;
use crate::sink::{OutputSink, OutputStream};

const SIGKILL: i32 = 9;
const SIGPIPE: i32 = 13;
const SIGTERM: i32 = 15;

/// One read of standard input.
const INPUT_CHUNK: usize = 32 << 10;

/// How long a message may wait for room in its stream's queue: only a guest that has taken none for long has filled that.
const ROOM: Duration = Duration::from_secs(5);

/// How long the end of a job that was cancelled is waited for after KILL.
const UNWANTED: Duration = Duration::from_secs(5);

/// How long output that has come may take to get into the sink of a job that dev-box ended.
const LAST_OUTPUT: Duration = Duration::from_secs(10);

/// How long the guest may take for what takes no time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// From the request to `Started`.
    pub(super) start: Duration,
    /// From KILL to `Exited`.
    pub(super) kill: Duration,
}

impl Default for Patience {
    /// Beyond what an emulated guest on a busy host needs: to give up too soon fails a job, or leaves its files behind. A guest
    /// that is gone ends its session, and who interrupts is not kept waiting; but of one that stands still this is how long it
    /// takes to say so.
    fn default() -> Self {
        Self { start: Duration::from_secs(60), kill: Duration::from_secs(20) }
    }
}

/// What is needed to run a process.
pub(super) struct Plan<'a> {
    pub(super) request: ExecRequest,
    pub(super) stdin: Stdin,
    pub(super) resizes: Option<watch::Receiver<PtySize>>,
    pub(super) timeout: Option<Duration>,
    pub(super) grace: Duration,
    pub(super) caps: OutputCaps,
    pub(super) sink: &'a dyn OutputSink,
    pub(super) cancel: &'a Cancel,
    pub(super) patience: Patience,
}

/// How a process that was started ended.
#[derive(Debug)]
pub(super) struct End {
    /// Why dev-box ended it, if it did.
    pub(super) why: Option<Why>,
    /// What the guest said about its end, if it did.
    pub(super) exited: Option<Exited>,
    pub(super) stdout: Captured,
    pub(super) stderr: Captured,
}

/// Why dev-box ended a process.
#[derive(Debug)]
pub(super) enum Why {
    TimedOut,
    Cancelled,
    /// The sink was closed: that ends it as it would in a pipeline, and is nobody's failure.
    Unread,
    Failed(Cause),
}

/// A process that has started.
pub(super) struct Process {
    parts: StreamParts,
    stdin: Stdin,
    resizes: Option<watch::Receiver<PtySize>>,
}

/// Asks the guest to start the process and waits until it has.
pub(super) async fn start(session: &Session, plan: &mut Plan<'_>) -> Result<Process, Cause> {
    let request = Request::Exec(std::mem::take(&mut plan.request));
    let started = async {
        let mut stream = session.open(request).await?;
        loop {
            match stream.recv().await? {
                Some(Message::Started(_)) => return Ok(stream.split()),
                Some(Message::Failed(source)) => {
                    return Err(Cause::guest("the command could not be started", source));
                }
                Some(Message::Unknown) => {}
                Some(_) => {
                    return Err(Cause::Violation("it said something else than that the process started"));
                }
                None => return Err(Cause::Violation("it did not say whether the process started")),
            }
        }
    };
    let patience = plan.patience.start;
    let parts = tokio::select! {
        biased;
        () = plan.cancel.reached(Urgency::Graceful) => Err(Cause::Cancelled),
        started = timeout(patience, started) => started.unwrap_or(Err(Cause::Silent(patience))),
    }?;
    Ok(Process { parts, stdin: std::mem::take(&mut plan.stdin), resizes: plan.resizes.take() })
}

/// Runs a started process to its end, whatever happens. Dropping the future resets its stream: the guest ends it.
pub(super) async fn run(process: Process, plan: &Plan<'_>) -> End {
    let StreamParts { sender, receiver, input, output, errors, .. } = process.parts;
    // One fault for each stream.
    let (faults, faulty) = mpsc::channel(2);
    let hurry = CancelSource::new();
    let outputs = Box::pin(async {
        tokio::join!(
            pump(output, OutputStream::Stdout, plan.sink, plan.caps, hurry.token(), faults.clone()),
            pump(errors, OutputStream::Stderr, plan.sink, plan.caps, hurry.token(), faults.clone()),
        )
    });
    tokio::pin!(outputs);
    let mut state =
        Control { sender, receiver, resizes: process.resizes, faults: faulty, hurry: &hurry, plan };
    let mut control = Box::pin(state.conduct());
    let mut feeding = Box::pin(feed(process.stdin, input));
    let (mut captured, mut fed) = (None, false);
    let (why, exited) = loop {
        tokio::select! {
            biased;
            end = &mut control => break end,
            both = &mut outputs, if captured.is_none() => captured = Some(both),
            () = &mut feeding, if !fed => fed = true,
        }
    };
    let (stdout, stderr) = match captured {
        Some(captured) => captured,
        None => {
            // What has come is still on its way to the sink: at the sink's pace after an orderly end, else for a while.
            let orderly = why.is_none() && exited.is_some();
            let enough = if orderly { None } else { Instant::now().checked_add(LAST_OUTPUT) };
            let wanted = if orderly { Urgency::Graceful } else { Urgency::Immediate };
            tokio::select! {
                biased;
                both = &mut outputs => both,
                () = plan.cancel.reached(wanted) => {
                    hurry.cancel_now();
                    outputs.await
                }
                () = until(enough) => {
                    hurry.cancel_now();
                    outputs.await
                }
            }
        }
    };
    End { why, exited, stdout, stderr }
}

struct Control<'a> {
    sender: MessageSender,
    receiver: MessageReceiver,
    resizes: Option<watch::Receiver<PtySize>>,
    faults: mpsc::Receiver<SinkFault>,
    hurry: &'a CancelSource,
    plan: &'a Plan<'a>,
}

/// How far ending the process has come.
enum Ending {
    Not,
    /// Asked to end; KILL at this time.
    Asked(Instant),
    /// Killed; given up at this time.
    Killed(Instant),
}

impl Control<'_> {
    async fn conduct(&mut self) -> (Option<Why>, Option<Exited>) {
        let deadline = self.plan.timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut ending = Ending::Not;
        let mut why = None;
        loop {
            let (next, wanted) = match ending {
                Ending::Not => (deadline, Urgency::Graceful),
                Ending::Asked(at) | Ending::Killed(at) => (Some(at), Urgency::Immediate),
            };
            let (reason, signal) = tokio::select! {
                biased;
                message = self.receiver.recv() => match self.judge(message) {
                    Ok(Some(exited)) => return (why, Some(exited)),
                    Ok(None) => continue,
                    // The first reason counts: a guest that dies while it is being stopped has been stopped.
                    Err(cause) => {
                        self.sender.reset();
                        return (why.or(Some(Why::Failed(cause))), None);
                    }
                },
                () = self.plan.cancel.reached(wanted) => {
                    if self.plan.cancel.urgency() == Urgency::Immediate {
                        self.sender.reset();
                        return (why.or(Some(Why::Cancelled)), None);
                    }
                    (Why::Cancelled, SIGTERM)
                }
                () = until(next) => match ending {
                    Ending::Not => (Why::TimedOut, SIGTERM),
                    Ending::Asked(_) => {
                        // Unread output holds up the news of the end: from here on it is dropped.
                        self.hurry.cancel_now();
                        self.signal(SIGKILL).await;
                        let patience = match why {
                            Some(Why::TimedOut) => self.plan.patience.kill,
                            // Its files are not collected.
                            _ => self.plan.patience.kill.min(UNWANTED),
                        };
                        ending = Ending::Killed(Instant::now() + patience);
                        continue;
                    }
                    Ending::Killed(_) => {
                        self.sender.reset();
                        return (why, None);
                    }
                },
                size = resized(&mut self.resizes) => {
                    // One that is lost looks odd until the next.
                    self.tell(Message::Resize(size)).await;
                    continue;
                }
                Some(fault) = self.faults.recv() => match fault {
                    SinkFault::Closed => (Why::Unread, SIGPIPE),
                    SinkFault::Failed(cause) => (Why::Failed(cause), SIGTERM),
                },
            };
            if why.is_none() {
                why = Some(reason);
                self.signal(signal).await;
                ending = Ending::Asked(Instant::now() + self.plan.grace);
            }
        }
    }

    /// The end of the process, if that is what the guest says.
    fn judge(
        &self,
        message: Result<Option<Message>, dev_box_comm::session::StreamError>,
    ) -> Result<Option<Exited>, Cause> {
        match message? {
            Some(Message::Exited(exited)) if plausible(exited.status) => Ok(Some(exited)),
            Some(Message::Exited(_)) => {
                Err(Cause::Violation("it reported an exit status that does not exist"))
            }
            Some(Message::Failed(source)) => Err(Cause::guest("the guest lost the process", source)),
            Some(Message::Unknown) => Ok(None),
            Some(_) => {
                Err(Cause::Violation("it said something that has no place in a running process's stream"))
            }
            None => Err(Cause::Violation("it ended the stream without saying how the process ended")),
        }
    }

    async fn signal(&mut self, number: i32) {
        // A guest that takes no messages is dealt with by the next step.
        let taken = self.tell(Message::Signal { number }).await;
        tracing::debug!(number, taken, "signalled the job");
    }

    /// Whether there was room for the message. Nothing else is looked at meanwhile, but whoever wants to be gone at once.
    async fn tell(&mut self, message: Message) -> bool {
        tokio::select! {
            biased;
            () = self.plan.cancel.reached(Urgency::Immediate) => false,
            sent = timeout(ROOM, self.sender.send(message)) => matches!(sent, Ok(Ok(()))),
        }
    }
}

/// The terminal's next size. Cancel-safe.
async fn resized(sizes: &mut Option<watch::Receiver<PtySize>>) -> PtySize {
    match sizes {
        Some(resizes) => {
            if resizes.changed().await.is_ok() {
                return *resizes.borrow_and_update();
            }
            // Nobody changes it any more.
            *sizes = None;
            pending().await
        }
        None => pending().await,
    }
}

fn plausible(status: ExitStatus) -> bool {
    match status {
        ExitStatus::Code(code) => (0..=255).contains(&code),
        ExitStatus::Signal(signal) => (1..=127).contains(&signal),
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => pending().await,
    }
}

/// Feeds standard input; ends when there is no more, or nobody takes it.
pub(crate) async fn feed(stdin: Stdin, mut lane: LaneWriter) {
    match stdin {
        Stdin::Null => {}
        Stdin::Bytes(bytes) => {
            let _ = lane.write(bytes).await;
        }
        Stdin::Reader(mut reader) => feed_from(&mut *reader, &mut lane).await,
    }
    lane.finish();
}

async fn feed_from(reader: &mut (dyn AsyncRead + Send + Unpin), lane: &mut LaneWriter) {
    let mut buffer = vec![0; INPUT_CHUNK];
    loop {
        match reader.read(&mut buffer).await {
            Ok(0) => return,
            Ok(got) => {
                let bytes = Bytes::copy_from_slice(buffer.get(..got).unwrap_or_default());
                if lane.write(bytes).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(%error, "reading the job's standard input failed: it ends here");
                return;
            }
        }
    }
}
