//! What is to be run.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use dev_box_comm::message::{Limits, PtySize};
use dev_box_core::id::JobId;
use tokio::io::AsyncRead;
use tokio::sync::watch;

use crate::workspace::WorkspaceIn;

/// Where a job's standard input comes from.
#[derive(Default)]
pub enum Stdin {
    /// Empty, and closed from the start.
    #[default]
    Null,
    /// These bytes, then closed.
    Bytes(Bytes),
    /// Everything this yields, then closed. Read no faster than the job takes it; a read that fails closes it.
    Reader(Box<dyn AsyncRead + Send + Unpin>),
}

impl fmt::Debug for Stdin {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => out.write_str("Null"),
            Self::Bytes(bytes) => write!(out, "Bytes({} bytes)", bytes.len()),
            Self::Reader(_) => out.write_str("Reader"),
        }
    }
}

/// Limits of what a job may send back on each of its two output streams. More is drained and dropped, so that the
/// job still comes to its end, and is marked as truncated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutputCaps {
    /// Bytes passed to the sink.
    pub streamed: u64,
    /// Bytes kept in memory for the result: the first of them. This is the job's share of host memory.
    pub kept: usize,
}

impl Default for OutputCaps {
    /// 1 GiB streamed, 1 MiB kept.
    fn default() -> Self {
        Self { streamed: 1 << 30, kept: 1 << 20 }
    }
}

/// A job. [`Job::new`] fills in what has a default.
///
/// # Examples
/// ```
/// use std::time::Duration;
/// use dev_box_exec::Job;
///
/// let mut job = Job::new(["make", "test"]);
/// job.timeout = Some(Duration::from_secs(600));
/// job.env.push(("CI".into(), "1".into()));
/// assert!(job.workspace.is_none());
/// ```
#[derive(Debug)]
pub struct Job {
    /// Names the job in logs, audit and results.
    pub id: JobId,
    /// The command and its arguments; no shell is put between. Bytes need not be UTF-8.
    pub argv: Vec<OsString>,
    /// Variables set besides the image's own.
    pub env: Vec<(OsString, OsString)>,
    /// The directory to run in; with a workspace, that is the default.
    pub cwd: Option<PathBuf>,
    /// A user of the image; by default root.
    pub user: Option<String>,
    /// From the job's start to TERM; `None`: no limit.
    pub timeout: Option<Duration>,
    /// Between TERM and KILL.
    pub grace: Duration,
    /// The files that go with it.
    pub workspace: Option<WorkspaceIn>,
    /// Limits of its output.
    pub caps: OutputCaps,
    /// Its standard input.
    pub stdin: Stdin,
    /// The terminal it runs on, if it is to have one: its output is then one stream, on standard output.
    pub terminal: Option<Terminal>,
    /// What it may use, all its processes together.
    pub limits: Limits,
    /// Its file creation mask; `0o022` where not given.
    pub umask: Option<u32>,
}

/// A terminal for a job.
#[derive(Debug, Clone)]
pub struct Terminal {
    /// Its size at first.
    pub size: PtySize,
    /// Its size from then on, when it can change.
    pub resizes: Option<watch::Receiver<PtySize>>,
}

impl Job {
    /// A job with this command line, a grace of 5 seconds, and defaults for the rest.
    #[must_use]
    pub fn new<A: Into<OsString>>(argv: impl IntoIterator<Item = A>) -> Self {
        Self {
            id: JobId::random(),
            argv: argv.into_iter().map(Into::into).collect(),
            env: Vec::new(),
            cwd: None,
            user: None,
            timeout: None,
            grace: Duration::from_secs(5),
            workspace: None,
            caps: OutputCaps::default(),
            stdin: Stdin::Null,
            terminal: None,
            limits: Limits::default(),
            umask: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jobs_debug_output_does_not_hold_its_input() {
        let mut job = Job::new(["cat"]);
        for (stdin, shown) in [
            (Stdin::Null, "Null"),
            (Stdin::Bytes("secret".into()), "Bytes(6 bytes)"),
            (Stdin::Reader(Box::new(tokio::io::empty())), "Reader"),
        ] {
            job.stdin = stdin;
            let text = format!("{job:?}");
            assert!(text.contains(shown) && !text.contains("secret"), "{text}");
        }
    }
}
