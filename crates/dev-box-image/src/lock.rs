//! Locks that end with their holder: flock(2) on a file.
//!
//! Some of these files are removed by whoever holds their lock. What is opened before that and locked after it is a file without a
//! name, which the next one does not find: so each lock is looked at again once it is had.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use dev_box_core::file_lock::has_name;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// A held lock; dropping it lets go.
#[derive(Debug)]
pub(crate) struct Lock {
    // Held open: the kernel's lock belongs to the open file.
    _file: File,
}

impl Lock {
    /// Takes the lock alone, making the file if need be; `None` when someone has it.
    ///
    /// # Errors
    /// What opening or locking said.
    pub(crate) fn try_alone(path: &Path) -> io::Result<Option<Self>> {
        let open = || OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path);
        Self::take(path, open, FlockOperation::NonBlockingLockExclusive)
    }

    /// Takes the lock of an existing file that is only read, alone; `None` when someone has it.
    ///
    /// # Errors
    /// What opening or locking said.
    pub(crate) fn try_existing(path: &Path) -> io::Result<Option<Self>> {
        Self::take(path, || File::open(path), FlockOperation::NonBlockingLockExclusive)
    }

    /// Shares the lock of an existing file; `None` when someone has it alone.
    ///
    /// # Errors
    /// What opening or locking said.
    pub(crate) fn try_shared(path: &Path) -> io::Result<Option<Self>> {
        Self::take(path, || File::open(path), FlockOperation::NonBlockingLockShared)
    }

    fn take(
        path: &Path,
        open: impl Fn() -> io::Result<File>,
        operation: FlockOperation,
    ) -> io::Result<Option<Self>> {
        loop {
            let file = open()?;
            match flock(&file, operation) {
                Ok(()) if has_name(&file, path)? => return Ok(Some(Self { _file: file })),
                // Removed before it was locked: the next one is another file, or none.
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn one_alone_or_many_together() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        assert!(Lock::try_shared(&path).is_err());
        let alone = Lock::try_alone(&path).unwrap().unwrap();
        assert!(Lock::try_alone(&path).unwrap().is_none());
        assert!(Lock::try_shared(&path).unwrap().is_none());
        drop(alone);
        let first = Lock::try_shared(&path).unwrap().unwrap();
        let second = Lock::try_shared(&path).unwrap().unwrap();
        assert!(Lock::try_existing(&path).unwrap().is_none());
        drop((first, second));
        assert!(Lock::try_existing(&path).unwrap().is_some());
        assert!(Lock::try_alone(directory.path()).is_err());
    }

    #[test]
    fn a_file_without_a_name_is_no_lock() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let opened = std::cell::Cell::new(0);
        // It goes, and another takes its name, between the opening and the locking.
        let open = || {
            opened.set(opened.get() + 1);
            let file = File::create(&path)?;
            if opened.get() == 1 {
                fs::remove_file(&path)?;
                File::create(&path)?;
            }
            Ok(file)
        };
        let lock = Lock::take(&path, open, FlockOperation::NonBlockingLockExclusive).unwrap().unwrap();
        assert_eq!(opened.get(), 2);
        assert!(Lock::try_alone(&path).unwrap().is_none(), "it is the named one's");
        drop(lock);
        // Gone for good.
        let open = || {
            let file = File::open(&path)?;
            fs::remove_file(&path)?;
            Ok(file)
        };
        let gone = Lock::take(&path, open, FlockOperation::NonBlockingLockShared).unwrap_err();
        assert_eq!(gone.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_lock_that_its_holders_remove_has_one_holder() {
        use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let held = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..5000 {
                        let Some(lock) = Lock::try_alone(&path).unwrap() else { continue };
                        assert!(!held.swap(true, SeqCst), "two have it");
                        held.store(false, SeqCst);
                        fs::remove_file(&path).unwrap();
                        drop(lock);
                    }
                });
            }
        });
    }
}
