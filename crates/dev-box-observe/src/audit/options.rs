//! Where the log lies and how it behaves; and why it would not open.

use std::{path::PathBuf, time::Duration};

use super::{keyfile::KeyFileError, sink::how_to_go_on};

/// Whoever has the lock syncs, dozens may wait, in no order, and a job that cannot be recorded fails: longer than a busy disk
/// stalls.
const LOCK_TIMEOUT: Duration = Duration::from_secs(60);

/// How an [`AuditLog`](super::AuditLog) behaves.
#[derive(Debug, Clone)]
pub struct AuditOptions {
    /// The log's directory; made with mode 0700 when it is not there.
    pub dir: PathBuf,
    /// Where the first key is put when a chain begins. The log never needs it again: move it off the host, and give
    /// it to [`verify`](super::verify()).
    pub first_key: PathBuf,
    /// Files to append signed heads to. At least one should lie where the host cannot take it back (a share that
    /// only takes appends); heads also go out as tracing events of the target `dev_box::audit::head`.
    pub heads: Vec<PathBuf>,
    /// How often a head is exported while records are written (default 60 s), besides at rotation and close.
    pub head_interval: Duration,
    /// A file of heads in the log's own directory is put away, in the place of the one before, when it has this size (default 1 MiB: a head a
    /// minute for two days and more).
    pub max_heads_bytes: u64,
    /// A segment is closed when it has this size (default 64 MiB).
    pub max_segment_bytes: u64,
    /// A segment is closed when it is this old (default 24 h, by the wall clock).
    pub max_segment_age: Duration,
    /// Disk space set aside for the end of running work (default 4 MiB: the results of thousands of jobs). When it
    /// cannot be set aside any more, new work is refused.
    pub reserve_bytes: u64,
    /// How long an entry may wait for company (default 10 ms). One that somebody awaits is written at once, with everything
    /// queued by then, unless so many were lately that they had better share a sync.
    pub group_window: Duration,
    /// How many entries may wait to be written (default 1024).
    pub queue: usize,
    /// How long to wait for other processes that write (default 60 s: a disk may stall). When it is closed the log waits so long
    /// once more, however much is queued.
    pub lock_timeout: Duration,
    /// Whether the writer's thread goes before all that is not real-time, as `SCHED_RR` of the least priority (sched(7); default no): on a host
    /// whose processors are all taken, intents wait for the disk then, and not for a turn. It computes for some tens of microseconds an entry. What
    /// the kernel refuses (it takes `CAP_SYS_NICE`) is logged, and not asked for again.
    pub real_time: bool,
}

impl AuditOptions {
    /// The defaults for a log in `dir`.
    ///
    /// # Examples
    /// ```
    /// use dev_box_observe::audit::AuditOptions;
    /// let options = AuditOptions::new("/var/lib/dev-box/audit", "/etc/dev-box/audit-first.key");
    /// assert_eq!(options.group_window.as_millis(), 10);
    /// ```
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>, first_key: impl Into<PathBuf>) -> Self {
        let dir = dir.into();
        Self {
            heads: vec![dir.join("heads.jsonl")],
            dir,
            first_key: first_key.into(),
            head_interval: Duration::from_secs(60),
            max_heads_bytes: 1 << 20,
            max_segment_bytes: 64 << 20,
            max_segment_age: Duration::from_secs(24 * 3600),
            reserve_bytes: 4 << 20,
            group_window: Duration::from_millis(10),
            queue: 1024,
            lock_timeout: LOCK_TIMEOUT,
            real_time: false,
        }
    }
}

/// Why the log did not open.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A file or directory could not be used.
    #[error("cannot use {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A key file is wrong.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// There is a first key, but the log that goes with it is gone.
    #[error("{} is the key of an audit log that is no longer in {} (restore the log, or put the key away to begin a new chain)", key.display(), dir.display())]
    LogGone {
        /// The key.
        key: PathBuf,
        /// Where the log should be.
        dir: PathBuf,
    },
    /// Segments are there, but where the chain stands is not known.
    #[error("the audit log in {} has lost its state ({})", dir.display(), how_to_go_on(dir, key))]
    StateLost {
        /// The log.
        dir: PathBuf,
        /// Its first key, or where that was put when the log began.
        key: PathBuf,
    },
    /// Another process holds the log's lock.
    #[error("another process has held the audit log's lock for {waited:?}")]
    Busy {
        /// How long was waited.
        waited: Duration,
    },
    /// The log is not as it was left.
    #[error("the audit log was changed from outside: {what} ({})", how_to_go_on(dir, key))]
    Tampered {
        /// What does not fit.
        what: String,
        /// The log.
        dir: PathBuf,
        /// Its first key, or where that was put when the log began.
        key: PathBuf,
    },
    /// The writer's thread could not be started.
    #[error("cannot start the audit writer")]
    Thread(#[source] std::io::Error),
}
