//! Taking the oldest records away, a segment at a time, so that the log does not grow for ever.
//!
//! ```text
//! read the ends of closed segments -> lock: as they were? say what goes -> unlock -> remove, oldest first
//! ```
//!
//! Whoever writes waits for the lock, and a job for whoever writes, so nothing long is done under it. A process that dies over the
//! last step leaves segments that a record says are gone: the log is whole all the same, and the next one removes them.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::Arc,
};

use dev_box_core::clock::{Clock, EasternTime};
use serde::Serialize;

use super::{
    Actor, AuditError, AuditOptions, Hash, MAX_LINE, OpenError,
    journal::{Journal, at},
    record::{Link, split},
    segment,
    volume::Disk,
};

/// What was removed, or would be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Pruned {
    /// Segments.
    pub segments: u64,
    /// Records in them.
    pub records: u64,
    /// Their size, in bytes.
    pub bytes: u64,
    /// The number of the last of these records; none when there are none.
    pub through_seq: Option<u64>,
}

impl Pruned {
    fn of(old: &[Closed]) -> Self {
        let sum = |part: fn(&Closed) -> u64| old.iter().map(part).fold(0, u64::saturating_add);
        Self {
            segments: old.len() as u64,
            records: sum(|one| (one.last - one.first).saturating_add(1)),
            bytes: sum(|one| one.bytes),
            through_seq: old.last().map(|one| one.last),
        }
    }
}

/// A segment that nobody writes to any more, as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Closed {
    /// Its first record.
    pub(super) first: u64,
    /// Its last.
    pub(super) last: u64,
    /// The last one's hash.
    pub(super) hash: Hash,
    /// When that was written.
    utc_ns: i64,
    /// Its size.
    pub(super) bytes: u64,
    inode: u64,
}

impl Closed {
    /// Reads the end of the segment; `None` where that is not a record.
    pub(super) fn read(path: &Path, first: u64) -> io::Result<Option<Self>> {
        let mut file = File::open(path)?;
        let metadata = file.metadata()?;
        let bytes = metadata.len();
        file.seek(SeekFrom::Start(bytes.saturating_sub(MAX_LINE as u64)))?;
        let mut end = Vec::new();
        file.take(MAX_LINE as u64).read_to_end(&mut end)?;
        let line = end.strip_suffix(b"\n").and_then(|lines| lines.rsplit(|&byte| byte == b'\n').next());
        let record = line.and_then(|line| Link::parse(line).zip(split(line)));
        Ok(record.filter(|(link, _)| link.seq >= first).map(|(link, (_, hash))| Self {
            first,
            last: link.seq,
            hash,
            utc_ns: link.utc_ns,
            bytes,
            inode: metadata.ino(),
        }))
    }

    /// Whether it is there as it was found.
    pub(super) fn is_still_in(&self, dir: &Path) -> bool {
        let now = fs::metadata(segment::path(dir, self.first));
        now.is_ok_and(|now| (now.ino(), now.len()) == (self.inode, self.bytes))
    }
}

/// The closed segments whose last record is older than `before`, from the log's beginning to the first that is not.
pub(super) fn older(options: &AuditOptions, before: EasternTime) -> Result<Vec<Closed>, OpenError> {
    let dir = &options.dir;
    let mut segments = segment::list(dir).map_err(at(dir))?;
    // The last is written to.
    segments.pop();
    let mut old = Vec::new();
    for first in segments {
        let path = segment::path(dir, first);
        let found = match Closed::read(&path, first) {
            // Somebody else prunes as well.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            read => read.map_err(at(&path))?,
        };
        let Some(found) = found else {
            // What goes would have to be named by this record's hash.
            return Err(OpenError::Tampered {
                what: format!("{} does not end in a record, and nothing was removed", path.display()),
                dir: dir.clone(),
                key: options.first_key.clone(),
            });
        };
        if found.utc_ns >= before.unix_nanos() {
            break;
        }
        old.push(found);
    }
    Ok(old)
}

/// What [`prune`] would remove. Blocks.
///
/// # Errors
/// [`OpenError::Io`], and [`OpenError::Tampered`] where a segment does not end in a record.
pub fn prunable(options: &AuditOptions, before: EasternTime) -> Result<Pruned, OpenError> {
    older(options, before).map(|old| Pruned::of(&old))
}

/// Removes whole segments whose last record is older than `before`, and records that in the log first, so that
/// [`verify`](super::verify()) knows a pruned beginning from a deleted one. The segment that is written to stays. May run beside any
/// number of writers. Begins no log where there is none. Blocks.
///
/// # Errors
/// As [`prunable`], and what [`AuditLog::open`](super::AuditLog::open) fails by; writing and removing fail as [`OpenError::Io`].
pub fn prune(
    options: AuditOptions,
    clock: Arc<dyn Clock>,
    before: EasternTime,
    by: Actor,
) -> Result<Pruned, OpenError> {
    let old = older(&options, before)?;
    if old.is_empty() {
        return Ok(Pruned::default());
    }
    let dir = options.dir.clone();
    let mut journal = Journal::open(options, clock, Arc::new(Disk))?;
    let old = journal.say_pruned(old, by).map_err(|error| match error {
        AuditError::Tampered { what, dir, key } => OpenError::Tampered { what, dir, key },
        other => OpenError::Io { path: dir.clone(), source: io::Error::other(other) },
    })?;
    for one in &old {
        let path = segment::path(&dir, one.first);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            removed => removed.map_err(at(&path))?,
        }
    }
    Ok(Pruned::of(&old))
}
