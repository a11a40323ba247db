//! A VM stopped in the middle of what it does, and let run on.

use dev_box_comm::session::{CallError, DeadlineHold, Session};
use dev_box_core::id::VmName;
use dev_box_core::vm::{Vm, VmError};
use tokio::time::timeout;

use super::LibvirtProvisioner;
use crate::identity;

/// How long the agent of a VM that runs on may take to set its clock.
const ANSWER: std::time::Duration = std::time::Duration::from_secs(10);

/// A VM that does not run. While this lives its channel does not take the silence for a breach.
#[derive(Debug)]
pub struct Paused(#[expect(dead_code, reason = "held, not read")] DeadlineHold);

/// Why a VM was not let run on as it should be.
#[derive(Debug, thiserror::Error)]
pub enum ResumeError {
    /// It does not run.
    #[error("the VM cannot be let run on")]
    Vm(#[from] VmError),
    /// Its network is not as it should be: what stopped it lets it run on.
    #[error("its network's rules were tampered with: it stays paused until they are back; then try again")]
    Quarantined,
    /// It was paused meanwhile, to stay so.
    #[error("it was paused meanwhile, and stays so")]
    Held,
    /// It runs, in the past.
    #[error("the VM runs on, and its clock was not set: what asks it for the time is told a wrong one")]
    Clock(#[source] CallError),
    /// It runs, in the past, and does not answer.
    #[error("the VM runs on, and its agent has not set its clock within {} s", ANSWER.as_secs())]
    Silent,
}

impl ResumeError {
    /// Whether it still stands.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        matches!(self, Self::Vm(_) | Self::Quarantined | Self::Held)
    }
}

impl LibvirtProvisioner {
    /// Stops a VM's CPUs, wherever they are. Memory, disk and what is on its channel stay.
    ///
    /// # Errors
    /// [`VmError`]; also when it does not run. It is as it was then.
    pub async fn pause(&self, vm: &VmName, session: &Session) -> Result<Paused, VmError> {
        self.0.holds.hold(vm);
        match self.stop(vm, session).await {
            // It stands still for its network's sake, and now for longer.
            Err(VmError::Illegal(_)) if self.0.watch.is_held(vm) => Ok(Paused(session.hold_deadlines())),
            Err(error) => {
                self.0.holds.release(vm);
                Err(error)
            }
            paused => paused,
        }
    }

    /// Lets it run on, whoever paused it, and has its agent set the clock, which has stood still.
    ///
    /// # Errors
    /// [`ResumeError`].
    pub async fn resume(&self, vm: &VmName, session: &Session) -> Result<(), ResumeError> {
        if self.0.watch.is_held(vm) {
            return Err(ResumeError::Quarantined);
        }
        self.0.holds.release(vm);
        self.go_on(vm, session).await
    }

    /// Stops it for a moment.
    pub(super) async fn stop(&self, vm: &VmName, session: &Session) -> Result<Paused, VmError> {
        let hold = session.hold_deadlines();
        Vm::find(&self.0.connection, vm.as_str()).await?.pause().await?;
        Ok(Paused(hold))
    }

    /// The moment is over; unless somebody wants it to last.
    pub(super) async fn go_on(&self, vm: &VmName, session: &Session) -> Result<(), ResumeError> {
        if self.0.watch.is_held(vm) {
            // It found the VM stopped, and is to let it go on.
            self.0.holds.stopped(vm);
            return Err(ResumeError::Quarantined);
        }
        if self.0.holds.holds(vm) {
            return Err(ResumeError::Held);
        }
        Vm::find(&self.0.connection, vm.as_str()).await?.resume().await?;
        match timeout(ANSWER, identity::set_clock(session, &*self.0.clock)).await {
            Ok(set) => set.map_err(ResumeError::Clock),
            Err(_) => Err(ResumeError::Silent),
        }
    }
}
