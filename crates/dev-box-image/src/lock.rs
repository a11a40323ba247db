//! Locks that end with their holder: flock(2) on a file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

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
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path)?;
        Self::take(file, FlockOperation::NonBlockingLockExclusive)
    }

    /// Takes the lock of an existing file that is only read, alone; `None` when someone has it.
    ///
    /// # Errors
    /// What opening or locking said.
    pub(crate) fn try_existing(path: &Path) -> io::Result<Option<Self>> {
        Self::take(File::open(path)?, FlockOperation::NonBlockingLockExclusive)
    }

    /// Shares the lock of an existing file; `None` when someone has it alone.
    ///
    /// # Errors
    /// What opening or locking said.
    pub(crate) fn try_shared(path: &Path) -> io::Result<Option<Self>> {
        Self::take(File::open(path)?, FlockOperation::NonBlockingLockShared)
    }

    fn take(file: File, operation: FlockOperation) -> io::Result<Option<Self>> {
        match flock(&file, operation) {
            Ok(()) => Ok(Some(Self { _file: file })),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
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
}
