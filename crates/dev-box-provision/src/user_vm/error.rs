//! Why something could not be done with a user's VM.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use dev_box_comm::session::CallError;
use dev_box_core::accel::NoKvm;
use dev_box_core::id::VmName;
use dev_box_core::snapshot::{SnapshotError, SnapshotName};
use dev_box_core::state::VmState;
use dev_box_core::template::SpecError;
use dev_box_core::vm::VmError;
use dev_box_image::StoreError;
use dev_box_net::NetError;
use dev_box_observe::AuditError;

use crate::blocking::BlockingError;
use crate::vm_dir::VmDirError;

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why something could not be done with a user's VM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UserVmError {
    /// There is none of that name.
    #[error("there is no VM {name}: `dev-box vm ls` lists them, `dev-box vm create {name}` makes one")]
    NotFound {
        /// The name.
        name: VmName,
    },
    /// There is one of that name.
    #[error("there is a VM {name} already: choose another name, or remove it with `dev-box vm rm {name}`")]
    Exists {
        /// The name.
        name: VmName,
    },
    /// Libvirt has a domain of that name that is not this VM.
    #[error(
        "libvirt has a domain {name} that is not dev-box's: choose another name, or remove that one with `virsh undefine {name}`"
    )]
    NameTaken {
        /// The name.
        name: VmName,
    },
    /// Another process works on it.
    #[error("another dev-box command is at work on {name}: try again when it is done")]
    Busy {
        /// The VM.
        name: VmName,
    },
    /// It runs.
    #[error("{name} runs: stop it first (`dev-box vm stop {name}`), or use --force")]
    Running {
        /// The VM.
        name: VmName,
    },
    /// It does not run.
    #[error("{name} does not run (it is {state}): start it with `dev-box vm start {name}`")]
    NotRunning {
        /// The VM.
        name: VmName,
        /// What it does.
        state: VmState,
    },
    /// It is paused.
    #[error("{name} is paused: let it run on with `dev-box vm resume {name}`")]
    Paused {
        /// The VM.
        name: VmName,
    },
    /// The image.
    #[error(transparent)]
    Image(StoreError),
    /// KVM was demanded.
    #[error("KVM is required and does not work here: {0}")]
    NoKvm(NoKvm),
    /// The request makes no sense as a whole.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Its disk.
    #[error("cannot make the disk")]
    Disk(#[source] Cause),
    /// Its directory.
    #[error(transparent)]
    Directory(VmDirError),
    /// Its record.
    #[error("cannot {action} {}", path.display())]
    Record {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Its record makes no sense.
    #[error("{} is not a record that this version reads", path.display())]
    RecordDamaged {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Libvirt.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// A snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A snapshot of a VM that had another address.
    #[error(
        "snapshot {snapshot} is of the time when {name} had the address {address}, which another VM has now: stop that one first"
    )]
    AddressTaken {
        /// The VM.
        name: VmName,
        /// The snapshot.
        snapshot: SnapshotName,
        /// The address.
        address: std::net::Ipv4Addr,
    },
    /// Its network.
    #[error("the network of {name} could not be changed")]
    Network {
        /// The VM.
        name: VmName,
        /// Why.
        source: BlockingError<NetError>,
    },
    /// Somebody is attached to its console.
    #[error("somebody is attached to the console of {name} already: one can be at a time")]
    ConsoleTaken {
        /// The VM.
        name: VmName,
    },
    /// Its console cannot be attached to.
    #[error("cannot attach to the console of {name}")]
    Console {
        /// The VM.
        name: VmName,
        /// Why.
        source: io::Error,
    },
    /// Its agent did not answer.
    #[error("the agent of {name} did not answer within {} s{}", waited.as_secs(), tail(console))]
    NoAnswer {
        /// The VM.
        name: VmName,
        /// How long it had.
        waited: Duration,
        /// The end of the guest's console.
        console: String,
    },
    /// Its agent cannot be talked to.
    #[error("the agent of {name} cannot be reached{}", tail(console))]
    Reach {
        /// The VM.
        name: VmName,
        /// The end of the guest's console.
        console: String,
        /// Why.
        source: Cause,
    },
    /// Its agent refused.
    #[error("the agent of {name} did not take its identity")]
    Identity {
        /// The VM.
        name: VmName,
        /// Why.
        source: CallError,
    },
    /// Its agent is too old for its policy; the text says what to do.
    #[error("{0}")]
    OldAgent(String),
    /// The act could not be written down: it was not done.
    #[error("the audit log takes no record of this")]
    Audit(#[from] AuditError),
    /// The call was cut off.
    #[error("it was interrupted")]
    Interrupted(#[source] Cause),
}

fn tail(console: &str) -> String {
    if console.is_empty() { String::new() } else { format!("; its console ends with:\n{console}\n") }
}

impl From<VmDirError> for UserVmError {
    fn from(error: VmDirError) -> Self {
        match error {
            VmDirError::Exists(name) => Self::Exists { name },
            VmDirError::Owned(name) => Self::Busy { name },
            other => Self::Directory(other),
        }
    }
}

impl UserVmError {
    /// Of a call that blocks.
    pub(super) fn blocking<E: Into<Self>>(error: BlockingError<E>) -> Self {
        match error {
            BlockingError::Failed(error) => error.into(),
            BlockingError::Libvirt(source) => Self::Vm(source.into()),
            BlockingError::Interrupted(join) => Self::Interrupted(Box::new(join)),
        }
    }
}
