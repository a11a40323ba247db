//! Attaching to a VM's serial console.

use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

use dev_box_core::id::VmName;
use dev_box_observe::Act;
use dev_box_observe::Outcome;
use dev_box_observe::audit::AuditEvent;
use tokio::net::UnixStream;

use super::{UserVmError, UserVms};
use crate::vm_dir::VmDir;

/// A console that somebody is attached to. Bytes go both ways as they are: the guest decides what they say.
#[derive(Debug)]
pub struct Console {
    /// The serial port. It ends when QEMU does.
    pub stream: UnixStream,
    act: Act,
    /// QEMU serves one client and lets the others wait without a word: this keeps them away.
    _alone: File,
}

impl Console {
    /// Lets go of it, and puts on record that it was.
    ///
    /// # Errors
    /// The audit log takes no record.
    pub async fn detach(self) -> Result<(), UserVmError> {
        drop(self.stream);
        self.act.finish(Outcome::Ok).await?;
        Ok(())
    }
}

impl UserVms {
    /// Where the console is logged: what the guest wrote, unfiltered, and only the last of it. A VM that never ran has no
    /// log.
    ///
    /// # Errors
    /// [`UserVmError::NotFound`].
    pub fn console_log(&self, name: &VmName) -> Result<PathBuf, UserVmError> {
        self.record(name)?;
        Ok(VmDir::console_in(&self.root(), name))
    }

    /// Attaches to the console of a VM that runs.
    ///
    /// # Errors
    /// [`UserVmError::ConsoleTaken`], [`UserVmError::NotRunning`], [`UserVmError::NotFound`].
    pub async fn console(&self, name: &VmName) -> Result<Console, UserVmError> {
        let (vm, _) = self.inspect(name).await?;
        if !vm.state.is_active() {
            return Err(UserVmError::NotRunning { name: name.clone(), state: vm.state });
        }
        let failed = |source: io::Error| UserVmError::Console { name: name.clone(), source };
        let path = VmDir::console_lock_in(&self.root(), name);
        let alone = File::options().write(true).create(true).truncate(false).mode(0o600).open(path);
        let alone = alone.map_err(failed)?;
        match alone.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(UserVmError::ConsoleTaken { name: name.clone() }),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        let act = self.begin(name, AuditEvent::VmConsole {}).await?;
        match UnixStream::connect(VmDir::console_socket_in(&self.root(), name)).await {
            Ok(stream) => Ok(Console { stream, act, _alone: alone }),
            Err(source) => {
                let error = failed(source);
                act.finish(Outcome::failed(&error)).await?;
                Err(error)
            }
        }
    }
}
