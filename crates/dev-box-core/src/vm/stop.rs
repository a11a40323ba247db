//! Stopping: ask, wait, and then do not ask.

use std::time::Duration;

use super::{Vm, VmError};
use crate::libvirt::{LibvirtError, PowerMethod};
use crate::state::{Operation, VmState};

/// How to stop a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopOptions {
    /// How to ask the guest.
    pub method: PowerMethod,
    /// How long it may take before it is destroyed.
    pub grace: Duration,
}

impl Default for StopOptions {
    /// By any means; 10 s.
    fn default() -> Self {
        Self { method: PowerMethod::Any, grace: Duration::from_secs(10) }
    }
}

/// How a VM came to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stopped {
    /// The guest powered off when it was asked.
    Gracefully,
    /// It was destroyed: it could not be asked, or did not do it in time.
    Destroyed,
    /// It did not run in the first place.
    Already,
}

impl Vm {
    /// Asks the guest to power off, waits, and destroys it when the time is up. A guest that cannot be asked (paused, or
    /// deaf) is destroyed at once.
    ///
    /// # Errors
    /// Libvirt's.
    pub async fn stop(&self, options: StopOptions) -> Result<Stopped, VmError> {
        let report = self.state().await?;
        if matches!(report.state, VmState::Undefined | VmState::Shutoff) {
            return Ok(Stopped::Already);
        }
        if report.state.after(Operation::Shutdown, report.persistent).is_ok() {
            let (id, method) = (self.id, options.method);
            let asked = self.connection.call(move |libvirt| libvirt.shutdown(id, method)).await;
            match asked {
                Ok(()) => match self.wait_stopped(options.grace).await {
                    Ok(_) => return Ok(Stopped::Gracefully),
                    Err(VmError::Timeout { .. }) => {}
                    Err(other) => return Err(other),
                },
                Err(error @ LibvirtError::ConnectionLost { .. }) => return Err(error.into()),
                // Gone meanwhile, or not able to be asked: what follows sorts it out.
                Err(_) => {}
            }
        }
        match self.destroy().await {
            Ok(()) => Ok(Stopped::Destroyed),
            // It stopped by itself just now.
            Err(VmError::Illegal(illegal)) if !illegal.state.is_active() => Ok(Stopped::Gracefully),
            Err(VmError::Libvirt(error)) if error.is_not_found() => Ok(Stopped::Gracefully),
            Err(other) => Err(other),
        }
    }
}
