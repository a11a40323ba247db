//! [`Gateway`]: lets clients share the one channel of a VM that somebody else owns.
//!
//! ```text
//! client ══ session of its own ══▶ gateway: may it? audited? ══ stream by stream ══▶ the VM's session
//! ```
//! Each client speaks the agent's own protocol. What would change who the VM is, or what its owner relies on, is the
//! owner's alone and refused here: identity, the workspace's mount, power, caches.

use std::sync::Arc;
use std::time::Duration;

use dev_box_comm::hello::HandshakeError;
use dev_box_comm::message::{self, GuestError, GuestErrorKind, Message, Request, WireBytes};
use dev_box_comm::session::{GuestStream, Io, Session, Stream, StreamError};
use dev_box_comm::{GuestHello, Relayed, relay};
use dev_box_core::id::VmName;
use dev_box_observe::audit::{Argv, EnvNames, ExitStatus, FileTotals, Text};
use dev_box_observe::{Act, Actor, AuditEvent, AuditSink, Entry, Outcome};
use tokio::time::{Instant, timeout};
use tokio_util::task::TaskTracker;
use tracing::{Instrument as _, Span, info_span};

use self::left::Left;
pub use self::left::LeftJob;
use self::told::Told;
use crate::executor::measure;
use crate::watched::Watcher;

mod left;
mod told;

/// How long a client waits while the VM has as many streams open as it allows.
const OPEN_PATIENCE: Duration = Duration::from_secs(10);

/// Serves one VM's clients. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Gateway {
    vm: VmName,
    session: Session,
    audit: Arc<dyn AuditSink>,
    rights: Rights,
    watcher: Option<Arc<dyn Watcher>>,
}

/// What its clients may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rights {
    /// Run commands, and move files.
    Use,
    /// And have the VM's share mounted: they hold the VM.
    Hold,
}

impl Gateway {
    /// A gateway to the VM behind `session`.
    #[must_use]
    pub fn new(vm: VmName, session: Session, audit: Arc<dyn AuditSink>) -> Self {
        Self { vm, session, audit, rights: Rights::Use, watcher: None }
    }

    /// The same for the one who holds the VM: the workspace's mount is theirs, too.
    #[must_use]
    pub fn for_holder(self) -> Self {
        Self { rights: Rights::Hold, ..self }
    }

    /// Tells `watcher` of the output of commands, and has it look before the holder's begin, whose files were staged by then, and before those
    /// are unmounted, to be collected.
    #[must_use]
    pub fn watched_by(self, watcher: Arc<dyn Watcher>) -> Self {
        Self { watcher: Some(watcher), ..self }
    }

    /// Serves one client's connection until the client, or the VM, is gone; streams that are open then are reset, and what
    /// they ran in the foreground ends. What is done is audited as asked for by `actor`.
    ///
    /// Dropping the future closes the connection.
    ///
    /// # Errors
    /// [`HandshakeError`]: the client does not speak the protocol.
    pub async fn serve(&self, io: impl Io, actor: Actor) -> Result<(), HandshakeError> {
        let (client, mut incoming, _) = Session::accept(io, GuestHello::new("")).await?;
        let streams = TaskTracker::new();
        loop {
            tokio::select! {
                next = incoming.next() => {
                    let Some((request, stream)) = next else { break };
                    let (gateway, actor) = (self.clone(), actor.clone());
                    let span = job_of(&request).map_or_else(Span::none, |job| info_span!("job", id = job));
                    let passing = async move { Box::pin(gateway.pass(request, stream, &actor)).await };
                    streams.spawn(passing.instrument(span));
                }
                reason = self.session.closed() => {
                    tracing::debug!(vm = %self.vm, %reason, "the VM is gone, and its clients with it");
                    break;
                }
            }
        }
        client.close();
        streams.close();
        // The streams of a closed session end by themselves; their last records are written before this returns.
        streams.wait().await;
        Ok(())
    }

    /// Follows jobs that were left alone while the VM was somebody else's, who did not live to see their ends: each is on record when this
    /// returns, as the guest's word, also of those that ended while nobody looked. Ends with the VM.
    pub async fn take_up(&self, jobs: Vec<LeftJob>) {
        self.left(jobs).record().await;
    }

    fn left(&self, jobs: Vec<LeftJob>) -> Left {
        Left { session: self.session.clone(), audit: Arc::clone(&self.audit), vm: self.vm.clone(), jobs }
    }

    /// Carries out one request, or says why not.
    async fn pass(&self, request: Request, mut client: GuestStream, actor: &Actor) {
        let job = job_of(&request).map(str::to_owned);
        let entry = |event: AuditEvent| {
            let entry = Entry::fact(event).by(actor.clone()).vm(&self.vm);
            match &job {
                Some(job) => entry.job(job),
                None => entry,
            }
        };
        let result = Ending::of(&request);
        let (act, guest) = match self.begin(request, entry).await {
            Ok(begun) => begun,
            Err(refusal) => {
                // A client that is gone needs no answer.
                let _ = client.send(Message::Failed(refusal)).await;
                return;
            }
        };
        let began = Instant::now();
        let signalled = |message: &Message| {
            if let Message::Signal { number } = message {
                self.audit.note(entry(AuditEvent::ExecSignal { signal: *number }));
            }
        };
        // A file that is read is no output.
        let (watcher, vm) = (self.watcher.as_deref().filter(|_| result == Ending::Command), &self.vm);
        let told = watcher.map(|watcher| Told::to(move |bytes| watcher.output(vm, bytes)));
        let came = |bytes| {
            if let Some(told) = &told {
                told.came(bytes);
            }
        };
        let relayed = relay(client, guest, signalled, came).await;
        drop(told);
        let took = began.elapsed();
        if result == Ending::Command {
            measure::relayed(&relayed, took);
        }
        if let (Ending::Background, None, Some(job)) = (&result, &relayed.last, &job) {
            let left = LeftJob { job: job.clone(), actor: actor.clone(), age: Duration::ZERO, begun: true };
            tokio::spawn(self.left(vec![left]).record().in_current_span());
        }
        if let Some(act) = act
            && let Err(error) = result.write(act, &relayed, took).await
        {
            // The act is done and its outcome delivered.
            tracing::error!(vm = %self.vm, %error, "the end of an act could not be audited");
        }
    }

    async fn begin(
        &self,
        request: Request,
        entry: impl Fn(AuditEvent) -> Entry,
    ) -> Result<(Option<Act>, Stream), GuestError> {
        admit(&request, self.rights)?;
        let around = matches!(request, Request::Exec(_) | Request::Unmount(_)) && self.rights == Rights::Hold;
        if let Some(watcher) = self.watcher.as_ref().filter(|_| around) {
            watcher.look(&self.vm).await;
        }
        let act = match intent(&request) {
            Some(event) => Some(Act::begin(&self.audit, entry(event)).await.map_err(|error| {
                GuestError::new(
                    GuestErrorKind::Other,
                    format!("not done, since it cannot be audited: {error}"),
                )
            })?),
            None => None,
        };
        let opened = timeout(OPEN_PATIENCE, self.session.open(request)).await;
        let refusal = match opened {
            Ok(Ok(stream)) => return Ok((act, stream)),
            Ok(Err(StreamError::Closed(reason))) => GuestError::lost(&reason),
            Ok(Err(error)) => GuestError::new(GuestErrorKind::Other, error.to_string()),
            Err(_) => {
                GuestError::new(GuestErrorKind::TooMany, "the VM has too much to do at once: try again")
            }
        };
        if let Some(act) = act
            && let Err(error) = act.finish(Outcome::failed(&refusal)).await
        {
            tracing::error!(vm = %self.vm, %error, "the failure of an act could not be audited");
        }
        Err(refusal)
    }
}

/// What a client may ask.
fn admit(request: &Request, rights: Rights) -> Result<(), GuestError> {
    match request {
        Request::Mount(_) | Request::Unmount(_) if rights == Rights::Hold => Ok(()),
        Request::Configure(_)
        | Request::Mount(_)
        | Request::Unmount(_)
        | Request::Shutdown(_)
        | Request::Sync(_) => Err(GuestError::new(
            GuestErrorKind::PermissionDenied,
            "only the daemon that owns the VM may do that",
        )),
        _ => Ok(()),
    }
}

fn job_of(request: &Request) -> Option<&str> {
    match request {
        Request::Exec(exec) => exec.job.as_deref(),
        Request::Kill(kill) => Some(&kill.job),
        Request::Attach(attach) => Some(&attach.job),
        _ => None,
    }
}

/// What is audited before it is done; reading what jobs there are, or a directory, is not.
fn intent(request: &Request) -> Option<AuditEvent> {
    let guest_path = |path: &WireBytes| Text::lossy(path.as_bytes());
    let totals = FileTotals::default();
    Some(match request {
        Request::Exec(exec) => AuditEvent::Exec {
            argv: Argv::of(exec.argv.iter().map(WireBytes::as_bytes)),
            env: EnvNames::names(exec.env.iter().map(|(name, _)| name.as_bytes())),
            cwd: exec.cwd.as_ref().map(guest_path),
            user: exec.user.as_deref().map(Text::new),
            pty: exec.pty.is_some(),
            timeout_ms: exec.timeout_ms,
        },
        Request::Kill(kill) => AuditEvent::ExecSignal { signal: kill.signal },
        Request::WriteFile(file) => {
            AuditEvent::FilesIn { root: guest_path(&file.path), totals, digest: None }
        }
        Request::Unpack(tree) => AuditEvent::FilesIn { root: guest_path(&tree.path), totals, digest: None },
        Request::ReadFile(file) => {
            AuditEvent::FilesOut { root: guest_path(&file.path), totals, digest: None }
        }
        Request::Pack(tree) => AuditEvent::FilesOut { root: guest_path(&tree.path), totals, digest: None },
        _ => return None,
    })
}

/// What the result of an act tells, besides whether it worked.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Ending {
    /// How a command ended.
    Command,
    /// That a command was started which goes on without its client.
    Background,
    /// How much went in. The daemon knows the path in the guest, not the client's.
    FilesIn(Text),
    /// How much came out.
    FilesOut(Text),
    /// Nothing.
    Plain,
}

impl Ending {
    fn of(request: &Request) -> Self {
        match (request, intent(request)) {
            (Request::Exec(exec), _) if exec.background => Self::Background,
            (Request::Exec(_), _) => Self::Command,
            (_, Some(AuditEvent::FilesIn { root, .. })) => Self::FilesIn(root),
            (_, Some(AuditEvent::FilesOut { root, .. })) => Self::FilesOut(root),
            _ => Self::Plain,
        }
    }

    async fn write(
        self,
        mut act: Act,
        relayed: &Relayed,
        took: Duration,
    ) -> Result<(), dev_box_observe::AuditError> {
        let outcome = match &relayed.last {
            Some(Message::Failed(error)) => Outcome::failed(error),
            None if self == Self::Background => Outcome::Ok,
            None => Outcome::Abandoned,
            Some(_) => Outcome::Ok,
        };
        let totals = |bytes| FileTotals { bytes, ..FileTotals::default() };
        let event = match (self, &relayed.last) {
            // It never ran.
            (Self::Command, Some(Message::Failed(_))) | (Self::Plain, _) | (Self::Background, None) => None,
            (Self::Command | Self::Background, last) => Some(AuditEvent::ExecEnd {
                exit: exit(last.as_ref(), relayed.abandoned),
                stdout_bytes: relayed.output,
                stderr_bytes: relayed.errors,
                truncated: false,
                took_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
            }),
            (Self::FilesIn(root), _) => {
                Some(AuditEvent::FilesIn { root, totals: totals(relayed.input), digest: None })
            }
            (Self::FilesOut(root), _) => {
                Some(AuditEvent::FilesOut { root, totals: totals(relayed.output), digest: None })
            }
        };
        if let Some(event) = event {
            act.set_event(event);
        }
        act.finish(outcome).await.map(drop)
    }
}

fn exit(last: Option<&Message>, abandoned: bool) -> ExitStatus {
    match last {
        Some(Message::Exited(exited)) if exited.timed_out => ExitStatus::TimedOut,
        Some(Message::Exited(exited)) => match exited.status {
            message::ExitStatus::Code(code) => ExitStatus::Code(code),
            message::ExitStatus::Signal(signal) => ExitStatus::Signal(signal),
        },
        _ if abandoned => ExitStatus::Cancelled,
        _ => ExitStatus::Lost,
    }
}

#[cfg(test)]
mod tests;
