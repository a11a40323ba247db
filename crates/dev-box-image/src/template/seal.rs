//! How a published file is known again.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::fs::{FallocateFlags, SeekFrom as Extent, fallocate, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::digest::{Digest, DigestBuilder};

/// The unit in which free memory becomes a hole.
const PAGE: usize = 4096;
const CHUNK: usize = 256 * PAGE;
static ZEROS: [u8; PAGE] = [0; PAGE];

/// Length, time of the last change and digest of a file. Its holes are not read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seal {
    /// Its length in bytes.
    pub bytes: u64,
    /// When its content last changed, in nanoseconds since 1970 by the file system's clock. Compared, never shown.
    pub changed_ns: i64,
    /// Of where its data lie and what they are; a file that is kept for a short time only has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
}

impl Seal {
    /// Reads a file.
    ///
    /// # Errors
    /// What reading it said.
    pub fn of(path: &Path) -> io::Result<Self> {
        Ok(Self { digest: Some(digest(path)?), ..Self::unread(path)? })
    }

    /// The same, without reading it.
    pub(super) fn unread(path: &Path) -> io::Result<Self> {
        let meta = path.metadata()?;
        Ok(Self { bytes: meta.len(), changed_ns: changed(&meta), digest: None })
    }

    /// Whether size and time are those of the sealed file.
    pub(super) fn holds(&self, path: &Path) -> Result<(), &'static str> {
        let Ok(meta) = path.metadata() else { return Err("is not there") };
        match () {
            () if meta.len() != self.bytes => Err("has another size"),
            () if changed(&meta) != self.changed_ns => Err("was written to"),
            () => Ok(()),
        }
    }

    /// Whether its bytes are, where they were read when it was sealed.
    pub(super) fn holds_every_byte(&self, path: &Path) -> Result<(), &'static str> {
        self.holds(path)?;
        let Some(sealed) = self.digest else { return Ok(()) };
        match digest(path) {
            Ok(found) if found == sealed => Ok(()),
            Ok(_) => Err("has other content"),
            Err(_) => Err("cannot be read"),
        }
    }
}

fn changed(meta: &std::fs::Metadata) -> i64 {
    meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec())
}

/// The next stretch of data at or after `from`; a file system that knows no holes calls everything data.
pub(super) fn data(file: &File, from: u64) -> io::Result<Option<(u64, u64)>> {
    let start = match seek(file, Extent::Data(from)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    Ok(Some((start, seek(file, Extent::Hole(start))?)))
}

/// Zero pages do not count, be they written or holes: a copy that loses or gains holes is the same file.
fn digest(path: &Path) -> io::Result<Digest> {
    let mut file = File::open(path)?;
    let mut state = DigestBuilder::default();
    each_chunk(&mut file, |at, chunk| {
        for (index, page) in chunk.chunks(PAGE).enumerate() {
            if !is_zero(page) {
                state.update(&(at + (index * PAGE) as u64).to_le_bytes());
                state.update(page);
            }
        }
        Ok(())
    })?;
    Ok(state.finish())
}

fn each_chunk(file: &mut File, mut look: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut position = 0;
    while let Some((start, end)) = data(file, position)? {
        let mut at = start - start % PAGE as u64;
        file.seek(SeekFrom::Start(at))?;
        while at < end {
            let want = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
            let chunk = buffer.get_mut(..want).unwrap_or_default();
            file.read_exact(chunk)?;
            look(at, chunk)?;
            at += want as u64;
        }
        position = end;
    }
    Ok(())
}

fn is_zero(page: &[u8]) -> bool {
    // One memcmp, however the crate is built.
    ZEROS.get(..page.len()) == Some(page)
}

/// Gives pages of zeros back to the file system.
pub(super) fn punch(path: &Path) -> io::Result<()> {
    let mut reader = File::open(path)?;
    let writer = OpenOptions::new().write(true).open(path)?;
    each_chunk(&mut reader, |at, chunk| {
        let mut run: Option<(usize, usize)> = None;
        let mut holes = Vec::new();
        for (index, page) in chunk.chunks(PAGE).enumerate() {
            match (&mut run, page.len() == PAGE && is_zero(page)) {
                (Some((_, end)), true) => *end = index + 1,
                (None, true) => run = Some((index, index + 1)),
                (_, false) => holes.extend(run.take()),
            }
        }
        holes.extend(run);
        for (from, to) in holes {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match fallocate(&writer, flags, at + (from * PAGE) as u64, ((to - from) * PAGE) as u64) {
                Ok(()) => {}
                // Then it is only larger than it need be.
                Err(Errno::OPNOTSUPP) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    })
}
