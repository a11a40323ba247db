//! Checking a log against its first key: is it whole, and if not, where does it begin to be wrong?
//!
//! Memory is constant; time is about two HMACs a record. Only the place where the chain first breaks is named,
//! because nothing behind it can be trusted to be in its place.

use std::{
    fmt,
    fs::{self, File},
    io::{self, BufRead, BufReader},
    path::{Path, PathBuf},
};

use rustix::fs::{FlockOperation, flock};

use super::{
    Head, KeyFileError, Record,
    chain::{Hash, Key},
    keyfile::FirstKey,
    record::{Link, split},
    segment::{self, Line, read_line},
    state::ChainState,
};

/// How far ahead a record is believed to have come from: work for a hostile number, bounded (about ten seconds).
const MAX_LEAP: u64 = 10_000_000;

/// How often it begins anew because a segment went between the list and the look into it.
const MAX_AGAIN: usize = 8;

/// What is wrong with a log.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// The record in this place is not as it was written.
    Edited,
    /// Records are missing from here up to this one.
    Deleted {
        /// The last one missing.
        through: u64,
    },
    /// True records stand in another order, or more than once: this one is not where it belongs.
    Reordered,
    /// The end is missing: more records were written.
    Cut {
        /// The last one known to have been written, from a head or the state.
        through: u64,
    },
    /// The last line is unfinished, or was never acknowledged: a crash, or somebody's addition.
    Torn {
        /// Its size.
        bytes: u64,
    },
    /// The chain is whole, but a head signed for this record names another hash: the log was replaced.
    Forked,
}

impl Fault {
    /// One short word for programs, which stays as it is: `edited`, `deleted`, `reordered`, `cut`, `torn`, `forked`.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Edited => "edited",
            Self::Deleted { .. } => "deleted",
            Self::Reordered => "reordered",
            Self::Cut { .. } => "cut",
            Self::Torn { .. } => "torn",
            Self::Forked => "forked",
        }
    }
}

/// The first thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The first record that is not as it should be.
    pub seq: u64,
    /// The file it is in, or should be.
    pub segment: String,
    /// The line in it, from 1.
    pub line: u64,
    /// What is wrong.
    pub fault: Fault,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seq, segment, line, fault } = self;
        match fault {
            Fault::Edited => write!(f, "record {seq} was edited ({segment}, line {line})"),
            Fault::Deleted { through } if through == seq => {
                write!(f, "record {seq} was deleted ({segment}, before line {line})")
            }
            Fault::Deleted { through } => {
                write!(f, "records {seq} to {through} were deleted ({segment}, before line {line})")
            }
            Fault::Reordered => write!(f, "record {seq} is not in its place ({segment}, line {line})"),
            Fault::Cut { through } => {
                write!(f, "the log was cut: records {seq} to {through} are missing at the end of {segment}")
            }
            Fault::Torn { bytes } => {
                write!(
                    f,
                    "the log ends in {bytes} bytes that are no acknowledged record {seq} ({segment}, line {line})"
                )
            }
            Fault::Forked => write!(f, "record {seq} is not the one a signed head names ({segment})"),
        }
    }
}

/// What verifying found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The chain's id.
    pub chain: String,
    /// The first record there is; above 1 when old segments were pruned.
    pub first_seq: u64,
    /// The last record that is true; 0 when none is.
    pub last_seq: u64,
    /// Its hash.
    pub last_hash: Hash,
    /// How many signed heads were compared.
    pub heads: u64,
    /// Lines in the files of heads that are no head of this chain, or not signed by it.
    pub bad_heads: u64,
    /// What is wrong; `None`: every record is as it was written, in its place.
    pub problem: Option<Problem>,
}

/// Why a log could not be verified at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// The key cannot be used.
    #[error(transparent)]
    Key(#[from] KeyFileError),
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The log is not that of the key.
    #[error("the log in {} is chain {found}, the key is for chain {expected}", dir.display())]
    OtherChain {
        /// The log.
        dir: PathBuf,
        /// The chain of the log.
        found: String,
        /// The chain of the key.
        expected: String,
    },
}

/// What the log's own state says, read under its lock.
struct Claimed {
    segment: u64,
    offset: u64,
    seq: u64,
}

/// Verifies the log in `dir` with the first key in `first_key`, and with the files of signed heads in `heads`.
///
/// The log may be in use: what is written meanwhile is left for the next time, and it begins anew where what it reads is pruned.
///
/// # Errors
/// [`VerifyError`] when it cannot be done; a log that is not whole is not an error but [`Report::problem`].
pub fn verify(dir: &Path, first_key: &Path, heads: &[PathBuf]) -> Result<Report, VerifyError> {
    let mut again = 0..MAX_AGAIN;
    loop {
        let looked = look(dir, first_key, heads);
        let went = |error: &VerifyError| {
            matches!(error, VerifyError::Io { path, source }
                if path == dir && source.kind() == io::ErrorKind::NotFound && dir.exists())
        };
        if !looked.as_ref().is_err_and(went) || again.next().is_none() {
            return looked;
        }
    }
}

fn look(dir: &Path, first_key: &Path, heads: &[PathBuf]) -> Result<Report, VerifyError> {
    let key = FirstKey::read(first_key)?;
    let io_error = |path: &Path| {
        let path = path.to_owned();
        move |source| VerifyError::Io { path, source }
    };
    // Before the log: a head that is exported meanwhile would be beyond its end.
    let mut heads = Heads::read(heads, &key.chain)?;
    let (claimed, segments) = snapshot(dir).map_err(io_error(dir))?;
    if let Some(state) = &claimed
        && state.chain != key.chain
    {
        let found = state.chain.clone();
        return Err(VerifyError::OtherChain { dir: dir.to_owned(), found, expected: key.chain });
    }
    let claimed =
        claimed.map(|state| Claimed { segment: state.segment, offset: state.offset, seq: state.seq });
    let mut walk = Walk::begin(dir, &key, &segments, claimed);
    let problem = walk.run(&mut heads).map_err(io_error(dir))?;
    let mut report = Report {
        chain: key.chain.clone(),
        first_seq: walk.first_seq,
        last_seq: walk.seq,
        last_hash: walk.hash,
        heads: heads.compared,
        bad_heads: heads.bad,
        problem,
    };
    if report.problem.is_none() {
        let claimed_seq = walk.claimed.as_ref().map_or(0, |claimed| claimed.seq);
        // A head beyond the end is believed only if its signature is right: its key is so many steps ahead.
        let from_heads = heads.true_beyond(&walk.key, walk.seq);
        report.heads = heads.compared;
        report.bad_heads = heads.bad;
        let through = claimed_seq.max(from_heads);
        if through > walk.seq {
            report.problem = Some(walk.problem(walk.seq + 1, Fault::Cut { through }));
        }
    }
    Ok(report)
}

/// The state and the list of segments, both of one moment.
fn snapshot(dir: &Path) -> io::Result<(Option<ChainState>, Vec<u64>)> {
    // A copy of a log has neither a lock nor a state.
    let lock = File::open(dir.join("lock")).ok();
    if let Some(lock) = &lock {
        flock(lock, FlockOperation::LockShared)?;
    }
    let state = match File::open(dir.join("state")) {
        Ok(file) => ChainState::load(&file)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    Ok((state, segment::list(dir)?))
}

struct Walk<'a> {
    dir: &'a Path,
    first_key: &'a Key,
    segments: &'a [u64],
    claimed: Option<Claimed>,
    first_seq: u64,
    /// The last true record.
    seq: u64,
    hash: Hash,
    /// The key of the record after it.
    key: Key,
    segment: u64,
    line: u64,
    /// A segment that does not follow on the one before begins with a record the log says it pruned.
    unproved_prev: Option<Hash>,
}

impl<'a> Walk<'a> {
    fn begin(dir: &'a Path, key: &'a FirstKey, segments: &'a [u64], claimed: Option<Claimed>) -> Self {
        Self {
            dir,
            first_key: &key.key,
            segments,
            claimed,
            first_seq: 1,
            seq: 0,
            hash: Hash::ZERO,
            key: key.key.clone(),
            segment: segments.first().copied().unwrap_or(1),
            line: 1,
            unproved_prev: None,
        }
    }

    fn problem(&self, seq: u64, fault: Fault) -> Problem {
        let name = segment::path(Path::new(""), self.segment).display().to_string();
        Problem { seq, segment: name, line: self.line, fault }
    }

    fn run(&mut self, heads: &mut Heads) -> io::Result<Option<Problem>> {
        let segments = self.segments;
        let last = segments.last().copied();
        for &first in segments {
            self.segment = first;
            self.line = 0;
            let is_last = Some(first) == last;
            if let Some(problem) = self.segment(first, is_last, heads)? {
                return Ok(Some(problem));
            }
        }
        if self.unproved_prev.is_some() {
            // Nothing in the log says that the beginning was pruned.
            self.segment = self.first_seq;
            self.line = 1;
            return Ok(Some(self.problem(1, Fault::Deleted { through: self.first_seq - 1 })));
        }
        Ok(None)
    }

    fn segment(&mut self, first: u64, is_last: bool, heads: &mut Heads) -> io::Result<Option<Problem>> {
        let path = segment::path(self.dir, first);
        let file = File::open(&path)?;
        // What is behind the state's end is not acknowledged (and perhaps being written just now).
        let limit = match &self.claimed {
            Some(claimed) if claimed.segment == first => claimed.offset,
            _ => u64::MAX,
        };
        let length = file.metadata()?.len();
        let mut reader = BufReader::with_capacity(256 * 1024, file);
        let mut line = Vec::new();
        let mut consumed = 0;
        loop {
            if consumed >= limit {
                return self.tail(&mut reader, consumed, heads);
            }
            let start = consumed;
            let read = read_line(&mut reader, &mut line, &mut consumed)?;
            self.line += 1;
            match read {
                Line::Whole => {
                    if let Some(problem) = self.record(&line, heads)? {
                        return Ok(Some(problem));
                    }
                }
                Line::Partial if is_last && consumed <= limit => {
                    // With a state that counts these bytes they were a record once, and were cut.
                    let fault = match &self.claimed {
                        Some(claimed) if claimed.seq > self.seq => Fault::Cut { through: claimed.seq },
                        _ => Fault::Torn { bytes: length.saturating_sub(start) },
                    };
                    return Ok(Some(self.problem(self.seq + 1, fault)));
                }
                Line::Partial | Line::TooLong => return self.misplaced(&line).map(Some),
                Line::End => return Ok(None),
            }
        }
    }

    /// What is behind the state's end. True records are records: a process died before it could count them. Anything else
    /// is torn, unless a writer is just putting it there, which is why this holds the lock.
    fn tail(
        &mut self,
        reader: &mut impl BufRead,
        end: u64,
        heads: &mut Heads,
    ) -> io::Result<Option<Problem>> {
        let lock = File::open(self.dir.join("lock")).ok();
        if let Some(lock) = &lock {
            flock(lock, FlockOperation::LockShared)?;
        }
        let now = ChainState::load(&File::open(self.dir.join("state"))?)?;
        if now.is_none_or(|now| now.segment != self.segment || now.offset != end) {
            // The log went on meanwhile: this is no longer its end.
            return Ok(None);
        }
        let length = fs::metadata(segment::path(self.dir, self.segment))?.len();
        let mut line = Vec::new();
        let mut consumed = end;
        loop {
            let start = consumed;
            let read = read_line(reader, &mut line, &mut consumed)?;
            let whole = match read {
                Line::End => return Ok(None),
                Line::Whole => self.record(&line, heads)?.is_none(),
                Line::Partial | Line::TooLong => false,
            };
            self.line += 1;
            if !whole {
                let bytes = length.saturating_sub(start);
                return Ok(Some(self.problem(self.seq + 1, Fault::Torn { bytes })));
            }
        }
    }

    fn record(&mut self, line: &[u8], heads: &mut Heads) -> io::Result<Option<Problem>> {
        let expected = self.seq + 1;
        let (Some((body, hash)), Some(link)) = (split(line), Link::parse(line)) else {
            return self.misplaced(line).map(Some);
        };
        if self.seq == 0 && link.seq > 1 && self.segment == link.seq {
            self.begin_after_pruned(&link);
        } else if link.seq != expected {
            return self.misplaced(line).map(Some);
        }
        if self.key.record_hash(body) != hash || link.prev != self.hash {
            return Ok(Some(self.problem(link.seq, Fault::Edited)));
        }
        self.seq = link.seq;
        self.hash = hash;
        self.key = self.key.next();
        if self.unproved_prev.is_some() {
            self.look_for_prune(line);
        }
        Ok((!heads.agree(self.seq, hash, &self.key)).then(|| self.problem(link.seq, Fault::Forked)))
    }

    /// The log begins late. That is right only if a later record says so; its own hash is proved by its key.
    fn begin_after_pruned(&mut self, link: &Link) {
        if link.seq - 1 > MAX_LEAP.saturating_mul(100) {
            return;
        }
        self.first_seq = link.seq;
        self.key = self.first_key.after(link.seq - 1);
        self.hash = link.prev;
        self.unproved_prev = Some(link.prev);
    }

    fn look_for_prune(&mut self, line: &[u8]) {
        let Ok(record) = Record::parse(line) else { return };
        let Ok(super::AuditEvent::AuditPrune { through_seq, hash }) = record.event() else { return };
        let gone = self.first_seq - 1;
        let follows = self.unproved_prev.is_some_and(|prev| hash == *prev.to_string());
        // More may have been meant to go than went, when the process died over it.
        if through_seq > gone || (through_seq == gone && follows) {
            self.unproved_prev = None;
        }
    }

    /// Something else stands where record `seq + 1` belongs. What happened to that one?
    fn misplaced(&self, line: &[u8]) -> io::Result<Problem> {
        let expected = self.seq + 1;
        let found = Link::parse(line).filter(|link| self.is_true(link.seq, line));
        let fault = match found {
            None => Fault::Edited,
            Some(link) if link.seq < expected => Fault::Reordered,
            Some(_) if self.stands_later(expected)? => Fault::Reordered,
            Some(link) => Fault::Deleted { through: link.seq - 1 },
        };
        Ok(self.problem(expected, fault))
    }

    /// Whether the line is the true record `seq`, wherever it stands.
    fn is_true(&self, seq: u64, line: &[u8]) -> bool {
        let Some((body, hash)) = split(line) else { return false };
        let key = if seq > self.seq {
            let steps = seq - self.seq - 1;
            (steps <= MAX_LEAP).then(|| self.key.after(steps))
        } else {
            seq.checked_sub(1).filter(|&steps| steps <= MAX_LEAP).map(|steps| self.first_key.after(steps))
        };
        key.is_some_and(|key| key.record_hash(body) == hash)
    }

    fn stands_later(&self, seq: u64) -> io::Result<bool> {
        for &first in self.segments.iter().filter(|&&first| first >= self.segment) {
            let mut reader = BufReader::new(File::open(segment::path(self.dir, first))?);
            let (mut line, mut consumed) = (Vec::new(), 0);
            loop {
                match read_line(&mut reader, &mut line, &mut consumed)? {
                    Line::Whole => {
                        if Link::parse(&line).is_some_and(|link| link.seq == seq) && self.is_true(seq, &line)
                        {
                            return Ok(true);
                        }
                    }
                    Line::TooLong => {}
                    Line::Partial | Line::End => break,
                }
            }
        }
        Ok(false)
    }
}

/// Heads from files, in order of their numbers.
struct Heads {
    heads: Vec<Head>,
    next: usize,
    compared: u64,
    bad: u64,
}

/// More than a head a minute for a century.
const MAX_HEADS: usize = 60_000_000;

impl Heads {
    fn read(paths: &[PathBuf], chain: &str) -> Result<Self, VerifyError> {
        let mut heads = Vec::new();
        let mut bad = 0;
        for path in paths {
            let io_error = |source| VerifyError::Io { path: path.clone(), source };
            let mut reader = BufReader::new(File::open(path).map_err(io_error)?);
            let (mut line, mut consumed) = (Vec::new(), 0);
            loop {
                match read_line(&mut reader, &mut line, &mut consumed).map_err(io_error)? {
                    Line::Whole => match Head::parse(&line) {
                        Ok(head) if head.chain == chain && heads.len() < MAX_HEADS => heads.push(head),
                        _ => bad += 1,
                    },
                    Line::Partial | Line::TooLong => bad += 1,
                    Line::End => break,
                }
            }
        }
        heads.sort_by_key(|head| head.seq);
        Ok(Self { heads, next: 0, compared: 0, bad })
    }

    /// Whether every well-signed head for `seq` names `hash`. Call with ascending numbers.
    fn agree(&mut self, seq: u64, hash: Hash, next_key: &Key) -> bool {
        let mut agree = true;
        while let Some(head) = self.heads.get(self.next).filter(|head| head.seq <= seq) {
            self.next += 1;
            if head.seq < seq {
                // Of a record before the first there is: cannot be compared.
                continue;
            }
            if head.is_signed_by(next_key) {
                self.compared += 1;
                agree &= head.hash == hash;
            } else {
                self.bad += 1;
            }
        }
        agree
    }

    /// The highest well-signed head beyond `seq`; 0 for none. `key` is that of record `seq + 1`.
    fn true_beyond(&mut self, key: &Key, seq: u64) -> u64 {
        let mut highest = 0;
        let (mut key, mut at) = (key.clone(), seq + 1);
        for head in self.heads.get(self.next..).unwrap_or_default() {
            let Some(steps) = (head.seq + 1).checked_sub(at).filter(|&steps| steps <= MAX_LEAP) else {
                self.bad += 1;
                continue;
            };
            key = key.after(steps);
            at += steps;
            if head.is_signed_by(&key) {
                self.compared += 1;
                highest = head.seq;
            } else {
                self.bad += 1;
            }
        }
        self.next = self.heads.len();
        highest
    }
}
