//! What host and guest say to each other inside a stream.
//!
//! The host opens a stream with a [`Request`]; then [`Message`]s go both ways, beside the stream's lanes of bytes.
//! The guest ends the stream with one *last* message ([`Message::is_last`]); nothing of it comes after that.
//!
//! ```text
//!           request                    lane 0 (host to guest)  lane 1 (guest to host)  lane 2   last message
//!           Exec, Attach               stdin                   stdout                  stderr   Exited | Failed
//!           ReadFile, Pack             -                       content                 -        Done | Failed
//!           WriteFile, Unpack          content                 -                       -        Done | Failed
//!           Echo, Forward              bytes                   bytes                   -        Done | Failed
//!           all others                 -                       -                       -        Done | Failed
//! ```
//!
//! Form: JSON objects with a `type`, for example `{"type":"started","pid":412}`. Unknown fields are ignored. A request
//! of an unknown `type` is answered `Failed` with [`GuestErrorKind::Unsupported`] by the session itself; a message of an
//! unknown `type` arrives as [`Message::Unknown`]. `VERSIONING.md` says what may change.
//! Parsing is bounded: [`MAX_JSON`] bytes, [`MAX_DEPTH`] levels.

mod bytes;
mod error;
mod exec;
mod files;
mod json;
mod machine;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use bytes::{GuestText, WireBytes};
pub use error::{GuestError, GuestErrorKind};
pub use exec::{
    Attach, ExecRequest, ExitStatus, Exited, JobEntry, Kill, Limits, PtySize, Replay, Started, Usage,
    valid_job_id,
};
pub use files::{
    Change, ChangeKind, DirEntry, FileKind, FileStat, MakeDir, PathRequest, ReadFile, Remove, Rename, Tree,
    Watch, WriteFile, WriteMode,
};
pub use json::{JsonError, MAX_DEPTH, MAX_JSON, decode, encode};
pub use machine::{Configure, Forward, GuestInfo, Ipv6Config, Mount, NetworkConfig, Shutdown, Sync, Unmount};

/// What the host asks; the payload that opens a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Request {
    /// Run a process.
    Exec(ExecRequest),
    /// Attach to a background job again.
    Attach(Attach),
    /// List jobs: [`Message::Jobs`] (several when long), then `Done`.
    Jobs,
    /// Signal a job by its id.
    Kill(Kill),
    /// Tell the guest who it is.
    Configure(Configure),
    /// Mount the workspace.
    Mount(Mount),
    /// Unmount the workspace.
    Unmount(Unmount),
    /// Ask for [`Message::Info`], then `Done`.
    Info,
    /// Power off; `Done` comes before it does.
    Shutdown(Shutdown),
    /// Write out, and drop caches.
    Sync(Sync),
    /// Send lane 0 back on lane 1; `Done` when lane 0 is finished.
    Echo,
    /// Connect to a port of the guest's loopback.
    Forward(Forward),
    /// Read a file.
    ReadFile(ReadFile),
    /// Write a file.
    WriteFile(WriteFile),
    /// [`Message::Stat`], then `Done`.
    Stat(PathRequest),
    /// [`Message::Entries`] (several when long), then `Done`.
    List(PathRequest),
    /// Make a directory.
    MakeDir(MakeDir),
    /// Move.
    Rename(Rename),
    /// Remove.
    Remove(Remove),
    /// Watch a directory.
    Watch(Watch),
    /// A tree out of the guest.
    Pack(Tree),
    /// A tree into the guest.
    Unpack(Tree),
    /// A request this side does not know. Never sent; the session answers it and does not hand it on.
    #[serde(other, skip_serializing)]
    Unknown,
}

/// What goes along a stream after its request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Message {
    /// Guest: the process runs.
    Started(Started),
    /// Guest, last: the process ended, and all its output was sent.
    Exited(Exited),
    /// Guest, last: it did not work.
    Failed(GuestError),
    /// Guest, last: it worked.
    Done,
    /// Guest: about itself.
    Info(GuestInfo),
    /// Guest: some jobs.
    Jobs {
        /// They.
        jobs: Vec<JobEntry>,
    },
    /// Guest: a file's metadata.
    Stat(FileStat),
    /// Guest: some entries of a directory.
    Entries {
        /// They.
        entries: Vec<DirEntry>,
    },
    /// Guest: changes under a watched directory.
    Changed {
        /// They.
        changes: Vec<Change>,
    },
    /// Host: signal the job's process group.
    Signal {
        /// The signal's number.
        number: i32,
    },
    /// Host: the terminal's new size.
    Resize(PtySize),
    /// A message this side does not know; to be ignored. Never sent.
    #[serde(other, skip_serializing)]
    Unknown,
}

impl Message {
    /// Whether the guest's side of the stream ends with it.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Exited(_) | Self::Failed(_) | Self::Done)
    }
}
