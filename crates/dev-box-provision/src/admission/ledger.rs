//! What each process of a state root has promised, where the others see it.
//!
//! ```text
//! <state root>/promises/
//!   lock     held (flock) by whoever decides
//!   NUMBER   one a provisioner that has promised anything: so many KiB as it is bytes long; held (flock) for as long as that lives
//! ```
//! The kernel drops a file's lock with its process: one whose lock can be had counts for nothing, and goes. A file's length is
//! replaced in one step and read in one, so that what is given back needs no lock; it has no contents and takes no room.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

const PROMISES: &str = "promises";
const LOCK: &str = "lock";
/// How long others may take for their decisions.
const DECIDED_WITHIN: Duration = Duration::from_secs(20);
/// From one try for the lock to the next.
const AGAIN: Duration = Duration::from_millis(1);
/// Bytes of memory for which a file has one.
const UNIT: u64 = 1024;

/// What this process has promised, and where it says so.
#[derive(Debug)]
pub(super) struct Ledger {
    dir: PathBuf,
    bytes: u64,
    /// While there is anything to say.
    file: Option<(PathBuf, File)>,
}

/// Nobody else decides while this lives.
#[derive(Debug)]
pub(super) struct Deciding(#[expect(dead_code, reason = "held open for its lock")] File);

impl Deciding {
    /// Waits until nobody else decides, which takes nobody longer than to read a few files. Polls: a thread that the kernel
    /// queues for a lock could not be called off where its holder was stopped.
    ///
    /// # Errors
    /// The file system's; `TimedOut`.
    pub(super) fn begin(dir: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let mut open = OpenOptions::new();
        let lock = open.write(true).create(true).truncate(false).mode(0o600).open(dir.join(LOCK))?;
        let began = Instant::now();
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(Self(lock)),
                Err(TryLockError::WouldBlock) if began.elapsed() < DECIDED_WITHIN => thread::sleep(AGAIN),
                Err(TryLockError::WouldBlock) => return Err(io::ErrorKind::TimedOut.into()),
                Err(TryLockError::Error(error)) => return Err(error),
            }
        }
    }
}

impl Ledger {
    pub(super) fn in_root(state_root: &Path) -> Self {
        Self { dir: state_root.join(PROMISES), bytes: 0, file: None }
    }

    /// Bytes that are promised here.
    pub(super) fn own(&self) -> u64 {
        self.bytes
    }

    /// Where everybody says it.
    pub(super) fn dir(&self) -> PathBuf {
        self.dir.clone()
    }

    /// Bytes that others have promised: no more while they are locked out.
    ///
    /// # Errors
    /// The file system's.
    pub(super) fn others(&self, _: &Deciding) -> io::Result<u64> {
        let mut others = 0_u64;
        for entry in fs::read_dir(&self.dir)? {
            let path = entry?.path();
            let is_own = self.file.as_ref().is_some_and(|(own, _)| *own == path);
            if !is_own && !path.ends_with(LOCK) {
                others = others.saturating_add(promised(&path)?);
            }
        }
        Ok(others)
    }

    /// Says that so much is promised here.
    ///
    /// # Errors
    /// The file system's: it is not promised then.
    pub(super) fn set(&mut self, bytes: u64, _: &Deciding) -> io::Result<()> {
        if self.file.is_none() {
            let number = getrandom::u64().map_err(|error| io::Error::other(error.to_string()))?;
            let path = self.dir.join(format!("{number:016x}"));
            let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            // Before anybody counts it.
            file.try_lock()?;
            self.file = Some((path, file));
        }
        self.write(bytes)?;
        self.bytes = bytes;
        Ok(())
    }

    /// So much is promised no more.
    pub(super) fn release(&mut self, bytes: u64) {
        self.bytes = self.bytes.saturating_sub(bytes);
        if self.bytes > 0 {
            if let Err(error) = self.write(self.bytes) {
                tracing::warn!(%error, "others count a VM's memory as promised for longer than it is");
            }
        } else if let Some((path, _file)) = self.file.take() {
            // One that stays is nobody's from here on, and goes when the next one is counted.
            let _ = fs::remove_file(path);
        }
    }

    fn write(&self, bytes: u64) -> io::Result<()> {
        self.file.as_ref().map_or(Ok(()), |(_, file)| file.set_len(bytes.div_ceil(UNIT)))
    }
}

/// Bytes that the process of this file has promised, if it lives; its file goes if it does not.
fn promised(path: &Path) -> io::Result<u64> {
    let nofollow = OFlags::NOFOLLOW.union(OFlags::NONBLOCK).bits();
    let file = match OpenOptions::new().read(true).custom_flags(nofollow.cast_signed()).open(path) {
        Ok(file) => file,
        // Given back meanwhile; or a link, which is none of ours.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => return Ok(0),
        Err(error) => return Err(error),
    };
    let found = file.metadata()?;
    if !found.is_file() {
        return Ok(0);
    }
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Ok(found.len().saturating_mul(UNIT)),
        Err(TryLockError::Error(error)) => Err(error),
        Ok(()) => match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(0),
        },
    }
}
