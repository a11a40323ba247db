//! Reading the log: query, follow, export. What is read here is not verified; see [`verify`](super::verify()).

use std::{
    fs::File,
    io::{self, BufReader, Read as _, Seek as _, SeekFrom, Write},
    path::{Path, PathBuf},
};

use dev_box_core::clock::EasternTime;

use super::{
    Evidence, MAX_LINE, Record,
    segment::{self, Line, read_line},
};

/// Which records are wanted; everything set must fit.
///
/// # Examples
/// ```
/// use dev_box_observe::audit::Filter;
/// let filter = Filter {
///     vms: vec!["dev-box-1a2b3c4d".into()],
///     action: Some("exec".into()),
///     since: Some("2026-11-01T01:30:00-04:00".parse()?), // the first of the two half past ones of that night
///     ..Filter::default()
/// };
/// # let _ = filter;
/// # Ok::<_, dev_box_core::clock::TimeError>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// The VM's domain is one of these; any, when there are none. See [`called()`].
    pub vms: Vec<String>,
    /// What a VM's holder calls it: whatever VM is leased under it, in a record on the way, is one of `vms` from then on.
    pub name: Option<String>,
    /// The lease.
    pub lease: Option<String>,
    /// The job's id begins so.
    pub job: Option<String>,
    /// An action (`exec.run`), or what is before its dot (`exec`).
    pub action: Option<String>,
    /// An outcome's status: `intent`, `ok`, `failed`, `denied`, `abandoned`, `observed`.
    pub status: Option<String>,
    /// Who says so.
    pub evidence: Option<Evidence>,
    /// From this time on.
    pub since: Option<EasternTime>,
    /// Before this time.
    pub until: Option<EasternTime>,
}

impl Filter {
    /// Whether the record is wanted.
    #[must_use]
    pub fn admits(&self, record: &Record) -> bool {
        fn is(wanted: Option<&String>, found: Option<&String>) -> bool {
            wanted.is_none_or(|wanted| Some(wanted) == found)
        }
        let action = |wanted: &String| {
            let rest = record.action.strip_prefix(wanted.as_str());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        let job = |begins: &str| record.job.as_deref().is_some_and(|job| job.starts_with(begins));
        let vm = || record.vm.as_ref().is_some_and(|vm| self.vms.contains(vm));
        (self.vms.is_empty() || vm())
            && is(self.lease.as_ref(), record.lease.as_ref())
            && self.job.as_deref().is_none_or(job)
            && self.action.as_ref().is_none_or(action)
            && self.status.as_ref().is_none_or(|wanted| wanted == record.outcome.status())
            && self.evidence.is_none_or(|wanted| wanted == record.evidence)
            && self.since.is_none_or(|since| record.utc_ns >= since.unix_nanos())
            && self.until.is_none_or(|until| record.utc_ns < until.unix_nanos())
    }
}

/// Why a record could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A line is not a record. The next one is read all the same.
    #[error("line {line} of {} is not an audit record", path.display())]
    NotARecord {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
    },
    /// The export could not be written.
    #[error("cannot write the export")]
    Write(#[source] io::Error),
}

/// Reads on through the log's segments, also while it grows and rotates. Never blocks on an end: see [`Tail::next`].
#[derive(Debug)]
pub struct Tail {
    dir: PathBuf,
    filter: Filter,
    /// The open segment, by its first record.
    open: Option<(u64, BufReader<File>)>,
    /// Whether a later segment was there before this one was last read to its end: then it grows no more.
    closed: bool,
    /// Where the next line begins in it.
    offset: u64,
    line_number: u64,
    line: Vec<u8>,
}

/// Reads the log from its beginning; ends where it ends now.
///
/// # Examples
/// ```no_run
/// use std::path::Path;
/// use dev_box_observe::audit::{Filter, query};
/// for record in query(Path::new("/var/lib/dev-box/audit"), Filter { job: Some("7f1c".into()), ..Filter::default() }) {
///     let record = record?;
///     let _ = (record.seq, record.time, record.action);
/// }
/// # Ok::<_, dev_box_observe::audit::ReadError>(())
/// ```
pub fn query(dir: &Path, filter: Filter) -> Tail {
    Tail {
        dir: dir.to_owned(),
        filter,
        open: None,
        closed: false,
        offset: 0,
        line_number: 0,
        line: Vec::new(),
    }
}

/// The domain of the VM that a record leases under `name`.
fn leased(record: &Record, name: &str) -> Option<String> {
    let of_lease = record.action == "lease.acquire" && record.outcome.status() == "ok";
    record.vm.clone().filter(|_| of_lease && record.details["name"] == name)
}

/// The domains of the VMs that their holders called `name`, such as a daemon's clients: those that the log has a lease of.
///
/// # Errors
/// When the log cannot be read.
pub fn called(dir: &Path, name: &str) -> Result<Vec<String>, ReadError> {
    let leases =
        Filter { action: Some("lease.acquire".into()), status: Some("ok".into()), ..Filter::default() };
    let mut domains = Vec::new();
    for record in query(dir, leases) {
        domains.extend(leased(&record?, name));
    }
    Ok(domains)
}

/// Follows the log from its end on: the iterator gives `None` when there is nothing new *yet*; ask again later.
///
/// # Errors
/// When the log cannot be read.
pub fn tail(dir: &Path, filter: Filter) -> Result<Tail, ReadError> {
    let mut tail = query(dir, filter);
    let io_error = |path: &Path| {
        let path = path.to_owned();
        move |source| ReadError::Io { path, source }
    };
    if let Some(last) = segment::list(dir).map_err(io_error(dir))?.pop() {
        let path = segment::path(dir, last);
        let mut file = File::open(&path).map_err(io_error(&path))?;
        tail.offset = end_of_lines(&mut file).map_err(io_error(&path))?;
        tail.open = Some((last, BufReader::new(file)));
    }
    Ok(tail)
}

/// Writes the wanted records to `out` as they are on disk (bytes, hashes and all) and returns their number.
///
/// # Errors
/// [`ReadError`]; what was written until then stays.
pub fn export(dir: &Path, filter: Filter, out: &mut impl Write) -> Result<u64, ReadError> {
    let mut tail = query(dir, filter);
    let mut count = 0;
    while let Some(record) = tail.next() {
        record?;
        out.write_all(&tail.line).and_then(|()| out.write_all(b"\n")).map_err(ReadError::Write)?;
        count += 1;
    }
    out.flush().map_err(ReadError::Write)?;
    Ok(count)
}

/// Seeks behind the last newline.
fn end_of_lines(file: &mut File) -> io::Result<u64> {
    let length = file.seek(SeekFrom::End(0))?;
    let start = file.seek(SeekFrom::Start(length.saturating_sub(MAX_LINE as u64)))?;
    let mut bytes = Vec::new();
    file.take(MAX_LINE as u64).read_to_end(&mut bytes)?;
    let end = bytes.iter().rposition(|&byte| byte == b'\n').map_or(start, |at| start + at as u64 + 1);
    file.seek(SeekFrom::Start(end))
}

impl Tail {
    fn path(&self) -> PathBuf {
        self.open.as_ref().map_or_else(|| self.dir.clone(), |(first, _)| segment::path(&self.dir, *first))
    }

    fn io_error(&self, source: io::Error) -> ReadError {
        ReadError::Io { path: self.path(), source }
    }

    /// Goes to the next segment, once this one is known to be read to its end. `false`: there is none.
    fn advance(&mut self) -> Result<bool, ReadError> {
        let segments = segment::list(&self.dir).map_err(|source| self.io_error(source))?;
        let current = self.open.as_ref().map(|(first, _)| *first);
        let Some(next) = segments.into_iter().find(|&first| current.is_none_or(|current| first > current))
        else {
            return Ok(false);
        };
        if current.is_some() && !self.closed {
            // Records may have come between the end that was seen and the rotation: look once more.
            self.closed = true;
            return Ok(true);
        }
        let file = File::open(segment::path(&self.dir, next)).map_err(|source| self.io_error(source))?;
        self.open = Some((next, BufReader::new(file)));
        self.closed = false;
        self.offset = 0;
        self.line_number = 0;
        Ok(true)
    }

    /// The record that came last, byte for byte as it is on disk.
    #[must_use]
    pub fn line(&self) -> &[u8] {
        &self.line
    }

    /// One line; `None`: nothing more for now.
    fn step(&mut self) -> Result<Option<Record>, ReadError> {
        loop {
            let Some((_, reader)) = &mut self.open else {
                if self.advance()? {
                    continue;
                }
                return Ok(None);
            };
            let mut consumed = 0;
            let read = read_line(reader, &mut self.line, &mut consumed);
            match read.map_err(|source| self.io_error(source))? {
                Line::Whole | Line::TooLong => {
                    self.offset += consumed;
                    self.line_number += 1;
                    let not_a_record =
                        |tail: &Self| ReadError::NotARecord { path: tail.path(), line: tail.line_number };
                    let record = Record::parse(&self.line).map_err(|_| not_a_record(self))?;
                    if let Some(name) = &self.filter.name
                        && let Some(domain) = leased(&record, name)
                        && !self.filter.vms.contains(&domain)
                    {
                        self.filter.vms.push(domain);
                    }
                    if self.filter.admits(&record) {
                        return Ok(Some(record));
                    }
                }
                Line::Partial => {
                    // Half written, or cut off by a crash: back to its beginning, and again later.
                    let offset = self.offset;
                    if let Some((_, reader)) = &mut self.open {
                        reader.seek(SeekFrom::Start(offset)).map_err(|source| self.io_error(source))?;
                    }
                    if !self.advance()? {
                        return Ok(None);
                    }
                }
                Line::End => {
                    if !self.advance()? {
                        return Ok(None);
                    }
                }
            }
        }
    }
}

impl Iterator for Tail {
    type Item = Result<Record, ReadError>;

    /// The next wanted record; `None` when there is nothing more for now. May be called again after `None`.
    fn next(&mut self) -> Option<Self::Item> {
        self.step().transpose()
    }
}
