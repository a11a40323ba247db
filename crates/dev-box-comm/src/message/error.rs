//! What the guest says when something did not work.

use std::io;

use serde::{Deserialize, Serialize};

use super::GuestText;
use crate::session::CloseReason;

/// Why a request failed in the guest. It is the guest's claim, nothing the host observed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("the guest answered: {text} ({kind:?})")]
pub struct GuestError {
    /// The kind, for decisions.
    pub kind: GuestErrorKind,
    /// For people; `Display` escapes control characters.
    #[serde(default)]
    pub text: GuestText,
    /// The `errno` behind it, when there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub errno: Option<i32>,
}

/// Kinds of failure in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum GuestErrorKind {
    /// No such file, command (exit 127), job.
    NotFound,
    /// Not executable (exit 126), not readable, not allowed.
    PermissionDenied,
    /// It is there already.
    AlreadyExists,
    /// The request makes no sense (empty argv, a NUL in a path, a size out of range).
    InvalidRequest,
    /// This agent does not know that request.
    Unsupported,
    /// A path component is not a directory.
    NotADirectory,
    /// A directory where a file was needed.
    IsADirectory,
    /// A directory that is not empty.
    NotEmpty,
    /// Disk, inodes or quota used up.
    NoSpace,
    /// Memory used up.
    OutOfMemory,
    /// A limit of the agent's own: jobs, watches, open files.
    TooMany,
    /// In use: a mounted share, a file being executed.
    Busy,
    /// It took longer than allowed.
    TimedOut,
    /// Cancelled before it ended.
    Cancelled,
    /// There is no such user, or group, to run as. Older agents say `NotFound`.
    UnknownUser,
    /// The directory to run in cannot be entered: it is missing, is none, or is closed to the user. Older agents say what
    /// the system says, as of a command.
    WorkingDirectory,
    /// The VM is gone: the word of the daemon between, which has seen it.
    VmLost,
    /// Anything else, and kinds this side does not know.
    #[serde(other)]
    Other,
}

impl GuestError {
    /// An error of `kind` with text for people.
    pub fn new(kind: GuestErrorKind, text: impl Into<GuestText>) -> Self {
        Self { kind, text: text.into(), errno: None }
    }

    /// What a daemon tells its client of a VM whose session closed.
    #[must_use]
    pub fn lost(reason: &CloseReason) -> Self {
        Self::new(GuestErrorKind::VmLost, reason.fate())
    }

    /// From an IO error, saying what was being done to what: `"open /etc/x"`.
    pub fn from_io(what: &str, error: &io::Error) -> Self {
        Self {
            kind: GuestErrorKind::from(error.kind()),
            text: GuestText::new(format!("{what}: {error}")),
            errno: error.raw_os_error(),
        }
    }
}

impl From<io::ErrorKind> for GuestErrorKind {
    fn from(kind: io::ErrorKind) -> Self {
        match kind {
            io::ErrorKind::NotFound => Self::NotFound,
            io::ErrorKind::PermissionDenied => Self::PermissionDenied,
            io::ErrorKind::AlreadyExists => Self::AlreadyExists,
            io::ErrorKind::InvalidInput => Self::InvalidRequest,
            io::ErrorKind::Unsupported => Self::Unsupported,
            io::ErrorKind::NotADirectory => Self::NotADirectory,
            io::ErrorKind::IsADirectory => Self::IsADirectory,
            io::ErrorKind::DirectoryNotEmpty => Self::NotEmpty,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoSpace,
            io::ErrorKind::OutOfMemory => Self::OutOfMemory,
            io::ErrorKind::ResourceBusy | io::ErrorKind::ExecutableFileBusy => Self::Busy,
            io::ErrorKind::TimedOut => Self::TimedOut,
            _ => Self::Other,
        }
    }
}
