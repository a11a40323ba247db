//! Copying a file's contents: holes stay holes, and no more is taken than was allowed.

use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{self, SeekFrom};
use rustix::io::{self, Errno};
use sha2::{Digest, Sha256};

use super::LimitReached;
use super::limits::Stop;

/// One read or write.
const CHUNK: usize = 256 << 10;

/// A SHA-256 digest.
pub(super) type Hash = [u8; 32];

/// How many bytes may still be copied.
#[derive(Debug)]
pub(super) struct Budget {
    limit: u64,
    left: u64,
}

impl Budget {
    pub(super) fn new(limit: u64) -> Self {
        Self { limit, left: limit }
    }

    pub(super) fn used(&self) -> u64 {
        self.limit - self.left
    }

    pub(super) fn take(&mut self, bytes: u64) -> Result<(), LimitReached> {
        match self.left.checked_sub(bytes) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => Err(LimitReached::Bytes(self.limit)),
        }
    }
}

/// Why a copy stopped.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum CopyError {
    Limit(LimitReached),
    Read(Errno),
    Write(Errno),
    Stopped,
}

impl From<LimitReached> for CopyError {
    fn from(limit: LimitReached) -> Self {
        Self::Limit(limit)
    }
}

/// Copies the first `size` bytes of `from` to the empty file `to`. Where `from` has a hole or has shrunk, `to` has a
/// hole. `from` is read by position: a file that grows meanwhile makes no difference.
pub(super) fn copy_contents(
    from: impl AsFd,
    to: impl AsFd,
    size: u64,
    budget: &mut Budget,
    buffer: &mut Buffer,
    stop: &Stop,
) -> Result<(), CopyError> {
    let mut at = 0;
    while let Some((start, end)) = next_data(&from, at, size).map_err(CopyError::Read)? {
        at = start;
        while at < end {
            if stop.is_stopped() {
                return Err(CopyError::Stopped);
            }
            let chunk = buffer.upto(end - at);
            let got = io::retry_on_intr(|| io::pread(&from, &mut *chunk, at)).map_err(CopyError::Read)?;
            if got == 0 {
                break;
            }
            budget.take(got as u64)?;
            let mut data = chunk.get(..got).unwrap_or_default();
            while !data.is_empty() {
                let put = io::retry_on_intr(|| io::pwrite(&to, data, at)).map_err(CopyError::Write)?;
                if put == 0 {
                    return Err(CopyError::Write(Errno::IO));
                }
                data = data.get(put..).unwrap_or_default();
                at += put as u64;
            }
        }
        at = end;
    }
    fs::ftruncate(&to, size).map_err(CopyError::Write)
}

/// The next range of `file` that holds data, at or after `at` and before `size`.
fn next_data(file: impl AsFd, at: u64, size: u64) -> Result<Option<(u64, u64)>, Errno> {
    if at >= size {
        return Ok(None);
    }
    let start = match fs::seek(&file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        // A filesystem that knows no holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((at, size))),
        Err(error) => return Err(error),
    };
    if start >= size {
        return Ok(None);
    }
    let end = fs::seek(&file, SeekFrom::Hole(start)).unwrap_or(size).min(size);
    // A file that changes under us must not make this loop for ever.
    Ok(Some((start, end.max(start + 1).min(size))))
}

/// The digest of the first `size` bytes of `file`.
pub(super) fn hash(file: impl AsFd, size: u64, buffer: &mut Buffer) -> Result<Hash, Errno> {
    let mut digest = Sha256::new();
    let mut at = 0;
    while at < size {
        let chunk = buffer.upto(size - at);
        let got = io::retry_on_intr(|| io::pread(&file, &mut *chunk, at))?;
        if got == 0 {
            break;
        }
        digest.update(chunk.get(..got).unwrap_or_default());
        at += got as u64;
    }
    Ok(digest.finalize().into())
}

/// The digest of something in memory.
pub(super) fn hash_bytes(bytes: &[u8]) -> Hash {
    Sha256::digest(bytes).into()
}

/// A digest over files as they are copied: path, mode, size, and contents where those were read for it.
#[derive(Debug, Default)]
pub(super) struct Sum(Sha256);

impl Sum {
    pub(super) fn add(&mut self, path: &Path, mode: u32, size: u64, contents: Option<&Hash>) {
        let path = path.as_os_str().as_bytes();
        // Lengths first, so that no two lists of files are the same bytes.
        self.0.update((path.len() as u64).to_be_bytes());
        self.0.update(path);
        self.0.update(mode.to_be_bytes());
        self.0.update(size.to_be_bytes());
        match contents {
            Some(contents) => self.0.update(contents),
            None => self.0.update([0]),
        }
    }

    /// In hex, with the algorithm's name.
    pub(super) fn finish(self) -> String {
        format!("sha256:{}", hex::encode(self.0.finalize()))
    }
}

/// One buffer for many files.
#[derive(Debug)]
pub(super) struct Buffer(Vec<u8>);

impl Buffer {
    pub(super) fn new() -> Self {
        Self(vec![0; CHUNK])
    }

    fn upto(&mut self, bytes: u64) -> &mut [u8] {
        let len = usize::try_from(bytes).unwrap_or(usize::MAX).min(self.0.len());
        self.0.get_mut(..len).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    fn copied(from: &File, size: u64, limit: u64) -> (Result<(), CopyError>, File, Budget) {
        let mut to = tempfile::tempfile().unwrap();
        let mut budget = Budget::new(limit);
        let done = copy_contents(from, &to, size, &mut budget, &mut Buffer::new(), &Stop::default());
        to.rewind().unwrap();
        (done, to, budget)
    }

    #[test]
    fn contents_are_copied() {
        let mut from = tempfile::tempfile().unwrap();
        let text: Vec<u8> = (0..CHUNK * 2 + 17).map(|at| (at % 251) as u8).collect();
        from.write_all(&text).unwrap();
        let (done, mut to, budget) = copied(&from, text.len() as u64, u64::MAX);
        done.unwrap();
        let mut read = Vec::new();
        to.read_to_end(&mut read).unwrap();
        assert_eq!(read, text);
        assert_eq!(budget.used(), text.len() as u64);
        assert_eq!(hash(&from, text.len() as u64, &mut Buffer::new()).unwrap(), hash_bytes(&text));
    }

    #[test]
    fn holes_stay_holes() {
        let from = tempfile::tempfile().unwrap();
        from.set_len(1 << 40).unwrap();
        from.write_all_at(b"in the middle", 1 << 30).unwrap();
        from.write_all_at(b"end", (1 << 40) - 3).unwrap();
        let (done, to, budget) = copied(&from, 1 << 40, 1 << 20);
        done.unwrap();
        let meta = to.metadata().unwrap();
        assert_eq!(meta.len(), 1 << 40);
        assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
        assert!(budget.used() < 1 << 20);
        let mut middle = [0; 13];
        to.read_exact_at(&mut middle, 1 << 30).unwrap();
        assert_eq!(&middle, b"in the middle");
        let mut end = [0; 3];
        to.read_exact_at(&mut end, (1 << 40) - 3).unwrap();
        assert_eq!(&end, b"end");
    }

    #[test]
    fn only_holes() {
        let from = tempfile::tempfile().unwrap();
        from.set_len(1 << 20).unwrap();
        let (done, to, budget) = copied(&from, 1 << 20, 0);
        done.unwrap();
        assert_eq!((to.metadata().unwrap().len(), budget.used()), (1 << 20, 0));
    }

    #[test]
    fn the_budget_is_kept() {
        let mut from = tempfile::tempfile().unwrap();
        from.write_all(&[1; 1000]).unwrap();
        let (done, _, _) = copied(&from, 1000, 999);
        assert_eq!(done, Err(CopyError::Limit(LimitReached::Bytes(999))));
    }

    #[test]
    fn it_stops_when_told_to() {
        let mut from = tempfile::tempfile().unwrap();
        from.write_all(&[1; 1000]).unwrap();
        let stop = Stop::default();
        stop.stop();
        let to = tempfile::tempfile().unwrap();
        let done = copy_contents(&from, &to, 1000, &mut Budget::new(1000), &mut Buffer::new(), &stop);
        assert_eq!(done, Err(CopyError::Stopped));
    }

    #[test]
    fn a_file_that_grew_or_shrank_is_cut_to_the_size_it_had() {
        let mut from = tempfile::tempfile().unwrap();
        from.write_all(&[1; 1000]).unwrap();
        let (done, to, _) = copied(&from, 10, 10);
        done.unwrap();
        assert_eq!(to.metadata().unwrap().len(), 10);
        let (done, to, budget) = copied(&from, 5000, 5000);
        done.unwrap();
        assert_eq!((to.metadata().unwrap().len(), budget.used()), (5000, 1000));
        assert!(hash(&from, 5000, &mut Buffer::new()).is_ok());
    }

    #[test]
    fn errors_say_which_side() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "text").unwrap();
        let readable = File::open(&path).unwrap();
        let writable = File::options().write(true).open(&path).unwrap();
        let mut budget = Budget::new(100);
        let copy = |from: &File, to: &File, budget: &mut Budget| {
            copy_contents(from, to, 4, budget, &mut Buffer::new(), &Stop::default())
        };
        assert_eq!(copy(&readable, &readable, &mut budget), Err(CopyError::Write(Errno::BADF)));
        assert_eq!(copy(&writable, &writable, &mut budget), Err(CopyError::Read(Errno::BADF)));
    }
}
