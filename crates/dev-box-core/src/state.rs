//! The states of a VM, and which operation is legal in which.
//!
//! ```text
//!              define                    start
//!  Undefined ----------> Shutoff <==================> Running <-----> Paused
//!      ^  ^   undefine      ^     destroy, power-off   |    resume/pause |
//!      |  |                 |                          | shutdown        |
//!      |  |                 +------- ShuttingDown <----+                 |
//!      |  |                              |                               |
//!      |  +------- transient: destroy, power-off, crash ---- Crashed <---+
//!      +------------------------------------------------------ (persistent: stays, startable)
//! ```
//!
//! A transient VM has no `Shutoff`: it goes from an active state straight to `Undefined`. An operation that the table
//! does not allow is refused with [`IllegalTransition`] before libvirt is asked.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What a VM is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Libvirt knows no such domain.
    Undefined,
    /// Defined, not running.
    Shutoff,
    /// Executing guest code (libvirt's `running` and `blocked`).
    Running,
    /// Stopped by the host, memory kept.
    Paused,
    /// The guest was asked to power off, or is doing so.
    ShuttingDown,
    /// The guest or QEMU failed.
    Crashed,
    /// The guest suspended itself.
    Suspended,
    /// Libvirt itself does not know.
    Unknown,
}

impl VmState {
    /// Every state.
    pub const ALL: [Self; 8] = [
        Self::Undefined,
        Self::Shutoff,
        Self::Running,
        Self::Paused,
        Self::ShuttingDown,
        Self::Crashed,
        Self::Suspended,
        Self::Unknown,
    ];

    /// The name in logs and output.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Undefined => "undefined",
            Self::Shutoff => "shutoff",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::ShuttingDown => "shutting_down",
            Self::Crashed => "crashed",
            Self::Suspended => "suspended",
            Self::Unknown => "unknown",
        }
    }

    /// Whether a QEMU process may be there.
    #[must_use]
    pub const fn is_active(self) -> bool {
        matches!(self, Self::Running | Self::Paused | Self::ShuttingDown | Self::Suspended | Self::Unknown)
    }

    /// From libvirt's `virDomainState`.
    #[must_use]
    pub const fn from_libvirt(raw: u32) -> Self {
        match raw {
            1 | 2 => Self::Running,
            3 => Self::Paused,
            4 => Self::ShuttingDown,
            5 => Self::Shutoff,
            6 => Self::Crashed,
            7 => Self::Suspended,
            _ => Self::Unknown,
        }
    }

    /// The state that `operation` leads to, where it is legal.
    ///
    /// `persistent` says whether the domain stays defined when it stops.
    ///
    /// # Errors
    /// [`IllegalTransition`] where the table has no such arrow.
    pub fn after(self, operation: Operation, persistent: bool) -> Result<Self, IllegalTransition> {
        use Operation as Op;
        let stopped = if persistent { Self::Shutoff } else { Self::Undefined };
        match (operation, self) {
            (Op::Define, Self::Undefined) => Ok(Self::Shutoff),
            (Op::Create, Self::Undefined)
            | (Op::Start, Self::Shutoff | Self::Crashed)
            | (Op::Resume, Self::Paused)
            | (Op::Reboot, Self::Running)
            | (Op::Restore, Self::Shutoff | Self::Running | Self::Paused | Self::Crashed) => {
                Ok(Self::Running)
            }
            (Op::Shutdown, Self::Running | Self::ShuttingDown) => Ok(Self::ShuttingDown),
            (Op::Pause, Self::Running) => Ok(Self::Paused),
            (
                Op::Destroy,
                Self::Running
                | Self::Paused
                | Self::ShuttingDown
                | Self::Suspended
                | Self::Crashed
                | Self::Unknown,
            ) => Ok(stopped),
            (Op::Undefine, Self::Shutoff | Self::Crashed) => Ok(Self::Undefined),
            (Op::Snapshot, Self::Running | Self::Paused | Self::Shutoff)
            | (Op::Plug, Self::Running | Self::Paused) => Ok(self),
            (operation, state) => Err(IllegalTransition { operation, state }),
        }
    }
}

impl fmt::Display for VmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What may be done to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Make it known to libvirt, without starting it.
    Define,
    /// Make and start a transient VM.
    Create,
    /// Start a defined one.
    Start,
    /// Ask the guest to power off.
    Shutdown,
    /// Ask the guest to reboot.
    Reboot,
    /// Stop its CPUs.
    Pause,
    /// Let its CPUs run on.
    Resume,
    /// End its QEMU at once.
    Destroy,
    /// Make libvirt forget it.
    Undefine,
    /// Take a snapshot.
    Snapshot,
    /// Go back to a snapshot.
    Restore,
    /// Change its interface's filter or link.
    Plug,
}

impl Operation {
    /// Every operation.
    pub const ALL: [Self; 12] = [
        Self::Define,
        Self::Create,
        Self::Start,
        Self::Shutdown,
        Self::Reboot,
        Self::Pause,
        Self::Resume,
        Self::Destroy,
        Self::Undefine,
        Self::Snapshot,
        Self::Restore,
        Self::Plug,
    ];
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Define => "define",
            Self::Create => "create",
            Self::Start => "start",
            Self::Shutdown => "shut down",
            Self::Reboot => "reboot",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Destroy => "destroy",
            Self::Undefine => "undefine",
            Self::Snapshot => "snapshot",
            Self::Restore => "restore",
            Self::Plug => "plug in or unplug",
        })
    }
}

/// The operation is not legal in the VM's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cannot {operation} a VM that is {state}{}", hint(*.operation, *.state))]
pub struct IllegalTransition {
    /// What was asked for.
    pub operation: Operation,
    /// The state it was asked in.
    pub state: VmState,
}

fn hint(operation: Operation, state: VmState) -> &'static str {
    match (operation, state) {
        (Operation::Create | Operation::Define, _) => ": the name is taken",
        (_, VmState::Undefined) => ": define or create it first",
        (Operation::Shutdown | Operation::Reboot, VmState::Paused) => ": resume it first, or destroy it",
        (Operation::Undefine, _) => ": destroy it first",
        (Operation::Start, VmState::Paused) => ": resume it",
        _ => "",
    }
}

/// Why a VM is in its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StateReason {
    /// Libvirt gives none that matters here.
    Unspecified,
    /// Started.
    Booted,
    /// Came from a saved or migrated state.
    Restored,
    /// A snapshot was reverted to, or is being taken.
    Snapshot,
    /// Someone paused or resumed it.
    ByUser,
    /// A disk failed, or the host's is full.
    IoError,
    /// The watchdog fired.
    Watchdog,
    /// The guest powered off.
    GuestShutdown,
    /// Someone destroyed it.
    Destroyed,
    /// QEMU died.
    Crashed,
    /// The guest's kernel panicked.
    Panicked,
    /// It could not be started, or run on.
    Failed,
    /// It is being started.
    StartingUp,
}

impl StateReason {
    /// From libvirt's state and the reason number that belongs to it (`virDomainPausedReason` and its like).
    #[must_use]
    pub const fn from_libvirt(state: u32, reason: u32) -> Self {
        match (state, reason) {
            (1, 1) => Self::Booted,
            (1, 2 | 3) => Self::Restored,
            (1, 4) | (3, 7 | 9) | (5, 7) => Self::Snapshot,
            (1, 5) | (3 | 4, 1) => Self::ByUser,
            (3, 5) => Self::IoError,
            (3, 6) => Self::Watchdog,
            (1, 10) | (3, 10) | (5, 3) => Self::Crashed,
            (3, 11) => Self::StartingUp,
            (5, 1) => Self::GuestShutdown,
            (5, 2) => Self::Destroyed,
            (5, 6 | 8) => Self::Failed,
            (6, 1) => Self::Panicked,
            _ => Self::Unspecified,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table() {
        use {Operation as O, VmState as S};
        let legal =
            |op: O| -> Vec<S> { S::ALL.into_iter().filter(|state| state.after(op, true).is_ok()).collect() };
        assert_eq!(legal(O::Define), [S::Undefined]);
        assert_eq!(legal(O::Create), [S::Undefined]);
        assert_eq!(legal(O::Start), [S::Shutoff, S::Crashed]);
        assert_eq!(legal(O::Shutdown), [S::Running, S::ShuttingDown]);
        assert_eq!(legal(O::Reboot), [S::Running]);
        assert_eq!(legal(O::Pause), [S::Running]);
        assert_eq!(legal(O::Resume), [S::Paused]);
        assert_eq!(
            legal(O::Destroy),
            [S::Running, S::Paused, S::ShuttingDown, S::Crashed, S::Suspended, S::Unknown]
        );
        assert_eq!(legal(O::Undefine), [S::Shutoff, S::Crashed]);
        assert_eq!(legal(O::Snapshot), [S::Shutoff, S::Running, S::Paused]);
        assert_eq!(legal(O::Plug), [S::Running, S::Paused]);
        assert_eq!(legal(O::Restore), [S::Shutoff, S::Running, S::Paused, S::Crashed]);
    }

    #[test]
    fn what_is_transient_leaves_nothing() {
        assert_eq!(VmState::Running.after(Operation::Destroy, false), Ok(VmState::Undefined));
        assert_eq!(VmState::Running.after(Operation::Destroy, true), Ok(VmState::Shutoff));
        for state in VmState::ALL {
            for operation in Operation::ALL {
                if let Ok(next) = state.after(operation, false) {
                    let gains = matches!(operation, Operation::Define | Operation::Snapshot);
                    assert!(gains || next != VmState::Shutoff, "{operation} from {state}");
                }
            }
        }
    }

    #[test]
    fn errors_name_operation_and_state() {
        for state in VmState::ALL {
            for operation in Operation::ALL {
                if let Err(error) = state.after(operation, true) {
                    let text = error.to_string();
                    assert!(
                        text.contains(&state.to_string()) && text.contains(&operation.to_string()),
                        "{text}"
                    );
                }
            }
        }
        let error = VmState::Paused.after(Operation::Shutdown, true).unwrap_err();
        assert!(error.to_string().ends_with("resume it first, or destroy it"));
    }

    #[test]
    fn numbers_of_libvirt() {
        let states: Vec<_> = (0..9).map(VmState::from_libvirt).collect();
        assert_eq!(states[1], states[2]);
        assert_eq!(states[0], VmState::Unknown);
        assert_eq!(states[8], VmState::Unknown);
        assert_eq!(StateReason::from_libvirt(3, 5), StateReason::IoError);
        assert_eq!(StateReason::from_libvirt(5, 1), StateReason::GuestShutdown);
        assert_eq!(StateReason::from_libvirt(6, 1), StateReason::Panicked);
        assert_eq!(StateReason::from_libvirt(99, 99), StateReason::Unspecified);
        assert!(VmState::Paused.is_active() && !VmState::Shutoff.is_active());
    }
}
