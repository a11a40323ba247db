//! What the log asks of a file system: the thin seam behind which tests make disks fail.

use std::{fs::File, io, os::unix::fs::FileExt as _};

use rustix::fs::{FallocateFlags, fallocate};

/// Whether blocks could be set aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reserved {
    Yes,
    /// The disk or the quota is full.
    NoRoom,
    /// The file system cannot do that.
    Unsupported,
}

pub(crate) trait Volume: std::fmt::Debug + Send + Sync {
    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()>;
    fn sync(&self, file: &File) -> io::Result<()>;
    /// Sets blocks aside without making the file longer.
    fn reserve(&self, file: &File, offset: u64, bytes: u64) -> io::Result<Reserved>;
    fn set_len(&self, file: &File, bytes: u64) -> io::Result<()>;
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Disk;

impl Volume for Disk {
    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        file.write_all_at(bytes, offset)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_data()
    }

    fn reserve(&self, file: &File, offset: u64, bytes: u64) -> io::Result<Reserved> {
        use rustix::io::Errno;
        match fallocate(file, FallocateFlags::KEEP_SIZE, offset, bytes) {
            Ok(()) => Ok(Reserved::Yes),
            Err(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => Ok(Reserved::NoRoom),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(Reserved::Unsupported),
            Err(error) => Err(error.into()),
        }
    }

    fn set_len(&self, file: &File, bytes: u64) -> io::Result<()> {
        file.set_len(bytes)
    }
}

/// A disk that fails as scripted.
#[cfg(test)]
#[derive(Debug, Default)]
pub(crate) struct FailingDisk {
    script: std::sync::Mutex<Script>,
}

#[cfg(test)]
#[derive(Debug, Default, Clone)]
pub(crate) struct Script {
    /// Bytes that may still be set aside; `None`: any number.
    pub(crate) room: Option<u64>,
    pub(crate) reserve_unsupported: bool,
    /// The next writes of records fail after this many bytes.
    pub(crate) write_fails_after: Option<usize>,
    pub(crate) sync_fails: bool,
    pub(crate) set_len_fails: bool,
    pub(crate) state_fails: bool,
}

#[cfg(test)]
impl FailingDisk {
    pub(crate) fn script(&self, change: impl FnOnce(&mut Script)) {
        change(&mut self.script.lock().unwrap());
    }

    fn now(&self) -> Script {
        self.script.lock().unwrap().clone()
    }
}

#[cfg(test)]
impl Volume for FailingDisk {
    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        let script = self.now();
        let is_state = bytes.len() == 512 && offset == 0;
        if is_state {
            if script.state_fails {
                return Err(io::Error::other("state: scripted"));
            }
            return Disk.write_at(file, bytes, offset);
        }
        match script.write_fails_after {
            Some(after) => {
                Disk.write_at(file, &bytes[..after.min(bytes.len())], offset)?;
                Err(io::Error::from(io::ErrorKind::StorageFull))
            }
            None => Disk.write_at(file, bytes, offset),
        }
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        if self.now().sync_fails { Err(io::Error::other("sync: scripted")) } else { Disk.sync(file) }
    }

    fn reserve(&self, _file: &File, _offset: u64, bytes: u64) -> io::Result<Reserved> {
        let script = self.now();
        if script.reserve_unsupported {
            return Ok(Reserved::Unsupported);
        }
        Ok(if script.room.is_some_and(|room| room < bytes) { Reserved::NoRoom } else { Reserved::Yes })
    }

    fn set_len(&self, file: &File, bytes: u64) -> io::Result<()> {
        if self.now().set_len_fails {
            Err(io::Error::other("set_len: scripted"))
        } else {
            Disk.set_len(file, bytes)
        }
    }
}
