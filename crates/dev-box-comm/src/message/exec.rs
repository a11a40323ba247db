//! Running a process in the guest.

use serde::{Deserialize, Serialize};

use super::{GuestError, GuestErrorKind, WireBytes};

/// Run one command.
///
/// The stream it opens: messages from the guest are [`Started`], then exactly one of
/// [`Exited`](super::Message::Exited) and [`Failed`](super::Message::Failed), after which nothing more may come,
/// no output either. Lane 0 is stdin, lane 1 stdout (with a PTY: all output), lane 2 stderr. From the host:
/// [`Signal`](super::Message::Signal), [`Resize`](super::Message::Resize). Resetting the stream kills the whole tree.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Program and arguments; a program without `/` is looked up in the job's `PATH`.
    pub argv: Vec<WireBytes>,
    /// Set on top of the agent's own small environment, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<(WireBytes, WireBytes)>,
    /// Working directory; the user's home where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<WireBytes>,
    /// Name from the guest's `/etc/passwd`, or a number; root where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// File creation mask, `0o000..=0o777`; `0o022` where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub umask: Option<u32>,
    /// Whether lane 0 will carry stdin; otherwise it is `/dev/null`.
    #[serde(default)]
    pub stdin: bool,
    /// Run on a pseudo-terminal of this size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pty: Option<PtySize>,
    /// What it may use.
    #[serde(default)]
    pub limits: Limits,
    /// After this many ms the guest stops it itself (TERM, grace, KILL); the host keeps its own clock too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_ms: Option<u64>,
    /// Between TERM and KILL, in ms.
    #[serde(default = "default_grace_ms")]
    pub grace_ms: u64,
    /// Goes on when the stream is reset; found again by its job id ([`Request::Jobs`](super::Request::Jobs), `Attach`).
    #[serde(default)]
    pub background: bool,
    /// The host's id for the job: `[A-Za-z0-9._-]`, at most 64 bytes. Given to `Attach` and `Kill`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<String>,
}

fn default_grace_ms() -> u64 {
    2_000
}

impl ExecRequest {
    /// Most arguments, and most environment entries.
    pub const MAX_ITEMS: usize = 4096;

    /// A command with defaults for everything else.
    pub fn new<I, S>(argv: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: Into<WireBytes>,
    {
        Self {
            argv: argv.into_iter().map(Into::into).collect(),
            grace_ms: default_grace_ms(),
            ..Self::default()
        }
    }

    /// Rules that hold whoever asks: a program, no NUL anywhere, no `=` in a variable's name, bounded counts.
    ///
    /// # Errors
    /// [`GuestErrorKind::InvalidRequest`], saying which rule.
    pub fn validate(&self) -> Result<(), GuestError> {
        let invalid = |text: &str| Err(GuestError::new(GuestErrorKind::InvalidRequest, text));
        let nul = |bytes: &WireBytes| bytes.as_bytes().contains(&0);
        match self.argv.first() {
            None => return invalid("argv is empty"),
            Some(program) if program.is_empty() => return invalid("the program's name is empty"),
            Some(_) => {}
        }
        if self.argv.len() > Self::MAX_ITEMS || self.env.len() > Self::MAX_ITEMS {
            return invalid("more than 4096 arguments or variables");
        }
        if self.argv.iter().any(nul)
            || self.env.iter().any(|(k, v)| nul(k) || nul(v))
            || self.cwd.iter().any(nul)
        {
            return invalid("a NUL byte in an argument, a variable or the directory");
        }
        if self.env.iter().any(|(k, _)| k.is_empty() || k.as_bytes().contains(&b'=')) {
            return invalid("a variable's name is empty or contains '='");
        }
        if self.umask.is_some_and(|mask| mask > 0o777) {
            return invalid("umask is above 0777");
        }
        if self.job.as_deref().is_some_and(|job| !valid_job_id(job)) {
            return invalid("a job id is 1 to 64 of [A-Za-z0-9._-]");
        }
        Ok(())
    }
}

/// Whether `job` may name a job: 1 to 64 of `[A-Za-z0-9._-]`.
pub fn valid_job_id(job: &str) -> bool {
    (1..=64).contains(&job.len()) && job.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// A terminal's size in character cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PtySize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub cols: u16,
}

/// What a job may use; absent means the agent's default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// CPU time, in ms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_time_ms: Option<u64>,
    /// Memory of the whole tree, in bytes (cgroup `memory.max`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Processes and threads of the whole tree (cgroup `pids.max`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pids: Option<u64>,
    /// Open files of one process (`RLIMIT_NOFILE`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open_files: Option<u64>,
}

/// The process runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// Its pid in the guest's first PID namespace.
    pub pid: u32,
    /// The job's id: the host's, or one the agent made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<String>,
    /// In answer to [`Attach`]: how much of its last output comes first. Older agents do not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay: Option<Replay>,
}

/// How much of a background job's last output is replayed, in bytes. At least as much comes, were it newer output in the place of what
/// was forgotten meanwhile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replay {
    /// On lane 1.
    pub stdout: u64,
    /// On lane 2.
    pub stderr: u64,
}

/// The process ended. The last message of its stream; all its output came before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exited {
    /// How.
    #[serde(flatten)]
    pub status: ExitStatus,
    /// What it used, as the guest says.
    #[serde(default)]
    pub usage: Usage,
    /// The guest's own timeout stopped it.
    #[serde(default)]
    pub timed_out: bool,
    /// The kernel killed something of it for memory.
    #[serde(default)]
    pub oom_killed: bool,
}

/// `SIGXCPU` of Linux, on all its architectures but MIPS (signal(7)): what ends a process whose CPU time is used up.
const SIGXCPU: i32 = 24;

impl Exited {
    /// The limit that ended it, in words for people.
    ///
    /// ```
    /// use dev_box_comm::message::{ExitStatus, Exited};
    /// let spun = Exited { status: ExitStatus::Signal(24), usage: Default::default(), timed_out: false, oom_killed: false };
    /// assert_eq!(spun.limit(), Some("the command had used up its CPU time"));
    /// assert_eq!(Exited { status: ExitStatus::Code(0), ..spun }.limit(), None);
    /// ```
    #[must_use]
    pub fn limit(&self) -> Option<&'static str> {
        match self.status {
            _ if self.oom_killed => Some("the guest killed a process of the job because memory ran out"),
            ExitStatus::Signal(SIGXCPU) => Some("the command had used up its CPU time"),
            _ => None,
        }
    }
}

/// How a process ended: `{"code": 7}` or `{"signal": 9}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It exited with this code, 0 to 255.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

/// What a job used. The guest's claim.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// CPU time in user mode, in us.
    #[serde(default)]
    pub user_us: u64,
    /// CPU time in the kernel, in us.
    #[serde(default)]
    pub system_us: u64,
    /// From start to exit, in us, by the guest's monotonic clock.
    #[serde(default)]
    pub wall_us: u64,
    /// Largest resident size, in bytes.
    #[serde(default)]
    pub max_rss_bytes: u64,
}

/// Attach to a background job again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// The job.
    pub job: String,
    /// How much of its last output to replay first, in bytes.
    #[serde(default)]
    pub replay_bytes: u64,
    /// Whether lane 0 will carry stdin.
    #[serde(default)]
    pub stdin: bool,
}

/// Send a signal to all of a job, whether attached or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kill {
    /// The job.
    pub job: String,
    /// The signal's number.
    pub signal: i32,
}

/// One job the agent knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobEntry {
    /// Its id.
    pub job: String,
    /// Its first process, while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Its command line.
    pub argv: Vec<WireBytes>,
    /// Whether it was started as a background job.
    #[serde(default)]
    pub background: bool,
    /// How it ended, when it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exited: Option<Exited>,
    /// Age in ms, by the guest's monotonic clock.
    #[serde(default)]
    pub age_ms: u64,
}
