//! The client of qemu-guest-agent.
//!
//! What the agent answers is the guest's word: it is bounded in size, depth and length of texts, stripped of control
//! characters, and evidence of nothing. Libvirt owns the channel and carries the commands.
//!
//! ```text
//!            answer in time
//!          +---------------+
//!          v               |
//!       in step ---- command ---- no answer ----> out of step
//!          ^                                          |
//!          +---- guest-sync, id returned ------------+   (before the next command)
//! ```
//!
//! The QMP of the agent has a `guest-sync-delimited` for this, whose answer begins with the byte 0xFF. Libvirt takes that
//! byte for an error and closes its side of the channel for good (11.3.0), so the plain `guest-sync` it is; a half answer
//! before it is libvirt's to skip, which syncs before every command itself.

mod reply;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::clock::EasternTime;
use crate::id::VmId;
use crate::libvirt::{Domains, LibvirtError};
use crate::vm::Vm;

pub use reply::{AgentInfo, OsInfo, ReplyError};

/// How long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How often getting into step again is tried before giving up.
const SYNC_ATTEMPTS: u32 = 3;
/// The first interval between looks for an agent that is not there yet, and the longest.
const POLL: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// Why a command of the guest agent failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AgentError {
    /// Libvirt refused, or the agent does not answer.
    #[error(transparent)]
    Libvirt(#[from] LibvirtError),
    /// The answer is not one.
    #[error("the guest agent's answer to {command} is refused")]
    Reply {
        /// The command.
        command: &'static str,
        /// What is wrong with it.
        source: ReplyError,
    },
    /// The agent says no.
    #[error("the guest agent refuses {command}: {text}")]
    Refused {
        /// The command.
        command: &'static str,
        /// Its words: at most 256 characters, no control characters.
        text: String,
    },
    /// Answers do not belong to questions, and that could not be mended.
    #[error("the guest agent is out of step: restart qemu-guest-agent in the guest")]
    OutOfStep,
}

/// The agent of one VM. Clones share what is known about being in step.
#[derive(Debug, Clone)]
pub struct GuestAgent {
    vm: Vm,
    wire: Wire,
}

/// The blocking half: also used where several commands must not be torn apart.
#[derive(Debug, Clone)]
pub(crate) struct Wire {
    id: VmId,
    timeout: Duration,
    out_of_step: Arc<AtomicBool>,
}

impl GuestAgent {
    /// The agent of `vm`, with 5 s for an answer.
    #[must_use]
    pub fn new(vm: &Vm) -> Self {
        Self { vm: vm.clone(), wire: Wire::new(vm.id()) }
    }

    /// With another time for an answer (rounded up to seconds, 1 s to 1 h).
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.wire.timeout = timeout;
        self
    }

    /// Whether it answers.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn ping(&self) -> Result<(), AgentError> {
        self.run(|wire, libvirt| wire.ask(libvirt, "guest-ping", None).map(drop)).await
    }

    /// Waits until it answers: a guest that has just been started has no agent yet.
    ///
    /// # Errors
    /// What stood in the way last when `limit` is over; at once what waiting does not mend.
    pub async fn wait_ready(&self, limit: Duration) -> Result<(), AgentError> {
        let deadline = Instant::now() + limit;
        let mut interval = POLL.0;
        loop {
            let answered = self.ping().await;
            let silent =
                matches!(&answered, Err(AgentError::Libvirt(LibvirtError::AgentUnresponsive { .. })));
            if !silent || Instant::now() + interval >= deadline {
                return answered;
            }
            sleep(interval).await;
            interval = interval.saturating_mul(2).min(POLL.1);
        }
    }

    /// Its version and how many commands it offers.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn info(&self) -> Result<AgentInfo, AgentError> {
        self.run(|wire, libvirt| wire.read(libvirt, "guest-info", None, reply::agent_info)).await
    }

    /// What the guest says it is. Fields it leaves out are empty.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn os_info(&self) -> Result<OsInfo, AgentError> {
        self.run(|wire, libvirt| wire.read(libvirt, "guest-get-osinfo", None, reply::os_info)).await
    }

    /// Freezes the guest's file systems, so that a disk-only snapshot is consistent; gives how many. Thaw soon: what
    /// writes in the guest hangs. ([`NewSnapshot::freeze`](crate::snapshot::NewSnapshot::freeze) does both.)
    ///
    /// # Errors
    /// [`AgentError`]; when the answer does not come in time, thawing was tried.
    pub async fn freeze(&self) -> Result<u64, AgentError> {
        self.run(|wire, libvirt| wire.freeze(libvirt)).await
    }

    /// Thaws them; gives how many.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn thaw(&self) -> Result<u64, AgentError> {
        self.run(|wire, libvirt| wire.thaw(libvirt)).await
    }

    /// Sets the guest's clock.
    ///
    /// # Errors
    /// [`AgentError`].
    pub async fn set_time(&self, time: EasternTime) -> Result<(), AgentError> {
        let arguments = json!({"time": time.unix_nanos()});
        self.run(move |wire, libvirt| wire.ask(libvirt, "guest-set-time", Some(&arguments)).map(drop)).await
    }

    async fn run<T, F>(&self, command: F) -> Result<T, AgentError>
    where
        T: Send + 'static,
        F: FnOnce(&Wire, &dyn Domains) -> Result<T, AgentError> + Send + 'static,
    {
        let wire = self.wire.clone();
        self.vm.connection().call(move |libvirt| pass(command(&wire, libvirt))).await?
    }
}

/// Libvirt's own errors go through [`call`](crate::connection::LibvirtConnection::call), which must see a lost
/// connection; the others go around it.
fn pass<T>(result: Result<T, AgentError>) -> Result<Result<T, AgentError>, LibvirtError> {
    match result {
        Err(AgentError::Libvirt(error)) => Err(error),
        other => Ok(other),
    }
}

impl Wire {
    pub(crate) fn new(id: VmId) -> Self {
        Self { id, timeout: TIMEOUT, out_of_step: Arc::default() }
    }

    pub(crate) fn freeze(&self, libvirt: &dyn Domains) -> Result<u64, AgentError> {
        let frozen = self.read(libvirt, "guest-fsfreeze-freeze", None, reply::count);
        if frozen.is_err() {
            // It may have frozen all or some of them, and merely not said so.
            let _ = self.thaw(libvirt);
        }
        frozen
    }

    pub(crate) fn thaw(&self, libvirt: &dyn Domains) -> Result<u64, AgentError> {
        self.read(libvirt, "guest-fsfreeze-thaw", None, reply::count)
    }

    fn read<T>(
        &self,
        libvirt: &dyn Domains,
        command: &'static str,
        arguments: Option<&Value>,
        read: impl FnOnce(&Value) -> Result<T, ReplyError>,
    ) -> Result<T, AgentError> {
        let value = self.ask(libvirt, command, arguments)?;
        read(&value).map_err(|source| AgentError::Reply { command, source })
    }

    fn ask(
        &self,
        libvirt: &dyn Domains,
        command: &'static str,
        arguments: Option<&Value>,
    ) -> Result<Value, AgentError> {
        if self.out_of_step.load(Ordering::SeqCst) {
            self.sync(libvirt)?;
        }
        self.send(libvirt, command, arguments)
    }

    fn send(
        &self,
        libvirt: &dyn Domains,
        command: &'static str,
        arguments: Option<&Value>,
    ) -> Result<Value, AgentError> {
        let mut question = json!({"execute": command});
        if let (Some(arguments), Some(object)) = (arguments, question.as_object_mut()) {
            object.insert("arguments".into(), arguments.clone());
        }
        let answer = libvirt.agent(self.id, &question.to_string(), self.timeout);
        if matches!(answer, Err(LibvirtError::AgentUnresponsive { .. } | LibvirtError::TimedOut { .. })) {
            // Its late answer would be taken for the next question's.
            self.out_of_step.store(true, Ordering::SeqCst);
        }
        match reply::parse(&answer?) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(text)) => Err(AgentError::Refused { command, text }),
            Err(source) => {
                self.out_of_step.store(true, Ordering::SeqCst);
                Err(AgentError::Reply { command, source })
            }
        }
    }

    /// Asks for a number that only this question has, until it comes back.
    fn sync(&self, libvirt: &dyn Domains) -> Result<(), AgentError> {
        for _ in 0..SYNC_ATTEMPTS {
            let token = Uuid::new_v4().as_fields().0;
            let arguments = json!({"id": token});
            match self.send(libvirt, "guest-sync", Some(&arguments)) {
                Ok(value) if value.as_u64() == Some(u64::from(token)) => {
                    self.out_of_step.store(false, Ordering::SeqCst);
                    return Ok(());
                }
                // An older answer: it is out of the way now.
                Ok(_) | Err(AgentError::Reply { .. } | AgentError::Refused { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Err(AgentError::OutOfStep)
    }
}
