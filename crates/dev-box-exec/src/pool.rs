//! [`VmPool`]: VMs that are ready before they are asked for.
//!
//! ```text
//!   acquire ---> queue (FIFO) ---> Lease ---> dropped ---> retired
//!                  ^                 |                        |
//!   Provisioner -> ready <------ refilled to `min` <----------+
//!                    ^               | released, and the pool rewinds
//!                    +--- reset <----+
//! ```
//! One task owns all of it: a pure state machine decides, and the task carries out. Making, checking and taking down are
//! tasks of their own, so that a hand-over waits for none of them: it is a message there and a message back.
//!
//! A lease ends by being dropped, and its VM is never used again: it is taken down, and another takes its place. Only in a
//! pool that was told to ([`ResetPolicy::Rewind`]) a VM whose lease was released in order is made as good as new instead.

mod driver;
mod machine;
mod meter;
mod pooled;

use std::sync::Arc;
use std::time::Duration;

use scopeguard::ScopeGuard;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::provisioner::{Provisioner, ReadyVm, VmRequest};
use driver::{Command, Driver};

pub use pooled::PooledProvisioner;

/// Commands under way: senders wait when the driver does not keep up.
const COMMANDS: usize = 64;

/// How long a ready VM may be silent before it is given up. A VM that is dead ends its session, which is noticed at once;
/// one that is silent is most often paused, or not scheduled on a busy host, which making another would not help.
pub const SILENCE: Duration = Duration::from_secs(20);

/// What becomes of a VM after its lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResetPolicy {
    /// It is taken down, and another takes its place: no two leases ever share a VM's process.
    #[default]
    Replace,
    /// It is reset in place, when its lease ended in order: for leases of one trust domain, since whoever took over the VM's
    /// process in one lease would have it in the next.
    Rewind,
}

/// How a lease ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It was given back: its agent answers, and what was started in it was awaited.
    InOrder,
    /// Nobody said so: whoever had it panicked, was cancelled, or lost the VM.
    Abnormal,
}

/// How a pool behaves. [`PoolSettings::new`] fills in what has a default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolSettings {
    /// VMs that are kept ready.
    pub min: usize,
    /// VMs at most: those being made, ready, leased, and those not gone yet.
    pub max: usize,
    /// What becomes of a VM after its lease ([`ResetPolicy::Replace`]).
    pub reset: ResetPolicy,
    /// VMs being made at a time: the number of cores.
    pub parallel: usize,
    /// Callers that may wait at a time.
    pub max_waiting: usize,
    /// A VM that was ready longer than this is replaced (an hour).
    pub max_age: Duration,
    /// A VM above `min` that nobody wanted for this long goes (five minutes).
    pub idle: Duration,
    /// Between two checks of a ready VM (one second); one that does not answer for as long is not handed out until it does.
    pub check: Duration,
    /// A ready VM that does not answer for this long is replaced ([`SILENCE`]).
    pub silence: Duration,
    /// The pause after making a VM failed (a second); it doubles with each failure in a row.
    pub backoff: Duration,
    /// The longest such pause (a minute).
    pub backoff_max: Duration,
    /// After so many failures in a row (3) callers are told at once, until the pause is over.
    pub breaker: u32,
}

impl PoolSettings {
    /// A pool of `min` to `max` VMs; `max` is at least one and `min` at most `max`.
    #[must_use]
    pub fn new(min: usize, max: usize) -> Self {
        let max = max.max(1);
        Self {
            min: min.min(max),
            max,
            reset: ResetPolicy::default(),
            parallel: std::thread::available_parallelism().map_or(1, usize::from),
            max_waiting: 1024,
            max_age: Duration::from_secs(3600),
            idle: Duration::from_secs(300),
            check: Duration::from_secs(1),
            silence: SILENCE,
            backoff: Duration::from_secs(1),
            backoff_max: Duration::from_secs(60),
            breaker: 3,
        }
    }
}

/// Why there is no VM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// None came free in time.
    #[error("no VM came free within {} ms: wait longer, or enlarge the pool", waited.as_millis())]
    Timeout {
        /// How long the caller waited.
        waited: Duration,
    },
    /// The pool is closing, or gone.
    #[error("the pool is shutting down")]
    ShuttingDown,
    /// Too many wait already.
    #[error("{waiting} callers wait for a VM already: no more are let in")]
    Exhausted {
        /// How many.
        waiting: usize,
    },
    /// VMs cannot be made.
    #[error("the pool cannot make VMs: {why}")]
    Unhealthy {
        /// The last failure.
        why: String,
    },
}

/// A pool's numbers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PoolStatus {
    /// VMs that are kept ready.
    pub min: usize,
    /// VMs at most.
    pub max: usize,
    /// Ready now, those included that do not answer at the moment.
    pub ready: usize,
    /// In somebody's hands.
    pub leased: usize,
    /// Being made.
    pub making: usize,
    /// Being reset in place.
    pub resetting: usize,
    /// Being taken down.
    pub retiring: usize,
    /// Callers that wait.
    pub waiting: usize,
    /// VMs made since the beginning.
    pub made: u64,
    /// VMs handed over.
    pub granted: u64,
    /// VMs reset in place.
    pub reset: u64,
    /// VMs that could not be reset, and went instead.
    pub lost: u64,
    /// Callers turned away.
    pub refused: u64,
    /// VMs that could not be made.
    pub failed: u64,
    /// Ready VMs that died, or did not answer for too long.
    pub unhealthy: u64,
    /// The longest that a caller waited who got one.
    pub longest_wait: Duration,
    /// Why the last VM could not be made, until one can.
    pub trouble: Option<String>,
}

/// A pool of VMs of one kind. A clone is another handle to the same one; when the last goes, the pool shuts down.
///
/// ```no_run
/// use std::sync::Arc;
/// use std::time::Duration;
/// use dev_box_exec::pool::{PoolSettings, VmPool};
/// # async fn example(provisioner: Arc<dyn dev_box_exec::Provisioner>, request: dev_box_exec::VmRequest)
/// # -> Result<(), dev_box_exec::pool::PoolError> {
/// let pool = VmPool::new(PoolSettings::new(2, 8), provisioner, request);
/// let lease = pool.acquire(Duration::from_secs(30)).await?;
/// println!("{}", lease.vm().name);
/// drop(lease);
/// pool.shutdown().await;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct VmPool {
    commands: mpsc::Sender<Command>,
}

impl VmPool {
    /// A pool of VMs that meet `request`. It begins to fill at once; needs a tokio runtime.
    pub fn new(settings: PoolSettings, provisioner: Arc<dyn Provisioner>, request: VmRequest) -> Self {
        let (commands, inbox) = mpsc::channel(COMMANDS);
        tokio::spawn(Driver::new(settings, provisioner, request, inbox).run());
        Self { commands }
    }

    /// Waits until `min` VMs are ready.
    ///
    /// # Errors
    /// [`PoolError::Unhealthy`] when making them fails, [`PoolError::ShuttingDown`].
    pub async fn initialize(&self) -> Result<(), PoolError> {
        loop {
            let status = self.status().await.ok_or(PoolError::ShuttingDown)?;
            if status.ready + status.leased >= status.min {
                return Ok(());
            }
            if let Some(why) = status.trouble {
                return Err(PoolError::Unhealthy { why });
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Gets a VM, in the order in which callers asked. Dropping the future gives up the place in the queue.
    ///
    /// # Errors
    /// [`PoolError`].
    pub async fn acquire(&self, timeout: Duration) -> Result<Lease, PoolError> {
        let (reply, answer) = oneshot::channel();
        let gone = CancellationToken::new();
        let _waiting = gone.clone().drop_guard();
        let command = Command::Acquire { deadline: Instant::now() + timeout, reply, gone };
        self.commands.send(command).await.map_err(|_| PoolError::ShuttingDown)?;
        let mut lease = answer.await.map_err(|_| PoolError::ShuttingDown)??;
        lease.0.claimed = true;
        Ok(lease)
    }

    /// Ends a lease in order. See [`Lease::release`].
    pub fn release(&self, lease: Lease) {
        lease.release();
    }

    /// The numbers; `None` when the pool has shut down.
    pub async fn status(&self) -> Option<PoolStatus> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(Command::Status(reply)).await.ok()?;
        answer.await.ok()
    }

    /// Keeps `ready` VMs ready from now on, `max` at most, and tries at once even after failures.
    pub async fn fill(&self, ready: usize) {
        let _ = self.commands.send(Command::Fill(ready)).await;
    }

    /// Takes all ready VMs away and keeps none from now on; leases go on, and who asks is still served.
    pub async fn drain(&self) {
        let _ = self.commands.send(Command::Drain).await;
    }

    /// Turns everybody away, and waits until all VMs are gone, the leased ones when their leases end. One that was being made is given
    /// up; its provisioner takes it down, and knows when that is done.
    pub async fn shutdown(&self) {
        let _ = self.commands.send(Command::Shutdown).await;
        self.commands.closed().await;
    }
}

/// A VM in somebody's hands. Dropped, the VM goes back to the pool, which takes it down; see also [`release`](Self::release).
#[derive(Debug)]
pub struct Lease(ScopeGuard<Held, fn(Held)>);

/// A leased VM, and the way back for it.
#[derive(Debug)]
struct Held {
    vm: ReadyVm,
    back: oneshot::Sender<Returned>,
    claimed: bool,
}

impl Held {
    fn dropped(self) {
        let Self { vm, back, claimed } = self;
        // Fails only when the driver is gone with its runtime: then the process ends, and a sweep finds the VM.
        let _ = back.send(Returned { vm, ending: claimed.then_some(Ending::Abnormal) });
    }
}

/// What comes back of a lease.
#[derive(Debug)]
struct Returned {
    vm: ReadyVm,
    /// How the lease ended; `None` when nobody had it.
    ending: Option<Ending>,
}

impl Returned {
    fn released(vm: ReadyVm) -> Self {
        // Whatever is said: a VM that went away, or broke the protocol, is not used again.
        let alive = vm.session.close_reason().is_none();
        Self { vm, ending: Some(if alive { Ending::InOrder } else { Ending::Abnormal }) }
    }
}

impl Lease {
    fn new(vm: ReadyVm, back: oneshot::Sender<Returned>) -> Self {
        Self(scopeguard::guard(Held { vm, back, claimed: false }, Held::dropped))
    }

    /// The VM.
    #[must_use]
    pub fn vm(&self) -> &ReadyVm {
        &self.0.vm
    }

    /// Ends the lease in order: the VM's agent answers, and what was started in it was awaited. A pool that rewinds uses it
    /// again; every other takes it down, as if the lease had been dropped.
    pub fn release(self) {
        let Held { vm, back, .. } = self.part();
        let _ = back.send(Returned::released(vm));
    }

    /// Whoever has the parts sees to the VM's way back.
    fn part(self) -> Held {
        ScopeGuard::into_inner(self.0)
    }
}

#[cfg(test)]
mod tests;
