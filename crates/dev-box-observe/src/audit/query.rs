//! Reading the log: query, follow, export. What is read here is not verified; see [`verify`](super::verify()).

use std::{
    fmt,
    fs::File,
    io::{self, BufReader, Read as _, Seek as _, SeekFrom, Write},
    path::{Path, PathBuf},
};

use dev_box_core::clock::EasternTime;

use super::{
    Evidence, MAX_LINE, Record,
    segment::{self, Line, read_line},
};

/// How often [`tail`] looks for the end anew because its segment went between the list and the look into it.
const MAX_AGAIN: usize = 8;

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
    /// A line is not a record. The next one is read all the same; see [`Tail::next_record`].
    #[error("{} is not an audit record", place(path, *line))]
    NotARecord {
        /// The file.
        path: PathBuf,
        /// The line, from 1; not known in the file in whose midst a [`tail`] began.
        line: Option<u64>,
    },
    /// The export could not be written.
    #[error("cannot write the export")]
    Write(#[source] io::Error),
}

/// A line in words.
fn place(path: &Path, line: Option<u64>) -> String {
    match line {
        Some(line) => format!("line {line} of {}", path.display()),
        None => format!("a line of {}", path.display()),
    }
}

/// Lines of the log that are no records, and were passed over.
///
/// Displays as a sentence that says where the first is and what to do; see [`is_empty`](Self::is_empty).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Skipped {
    lines: u64,
    first: Option<(PathBuf, Option<u64>)>,
}

impl Skipped {
    /// How many.
    #[must_use]
    pub fn lines(&self) -> u64 {
        self.lines
    }

    /// Whether every line was a record.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.lines == 0
    }

    /// The file of the first, and its line from 1 where that is known.
    #[must_use]
    pub fn first(&self) -> Option<(&Path, Option<u64>)> {
        self.first.as_ref().map(|(path, line)| (path.as_path(), *line))
    }

    fn count(&mut self, path: PathBuf, line: Option<u64>) {
        self.lines += 1;
        self.first.get_or_insert((path, line));
    }
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.first(), self.lines) {
            (None, _) => f.write_str("every line is an audit record"),
            (Some((path, line)), 1) => {
                write!(f, "{} is not an audit record (see `dev-box audit verify`)", place(path, line))
            }
            (Some((path, line)), lines) => {
                let place = place(path, line);
                write!(
                    f,
                    "{lines} lines are not audit records, the first is {place} (see `dev-box audit verify`)"
                )
            }
        }
    }
}

/// What [`export`] wrote, and what it could not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Exported {
    /// How many records were written.
    pub records: u64,
    /// Lines of the whole log, whatever the filter, that nobody can tell whether they were wanted.
    pub skipped: Skipped,
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
    /// The last line's number in it, unless reading began in its midst.
    line_number: Option<u64>,
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
        line_number: Some(0),
        line: Vec::new(),
    }
}

/// The domain of the VM that a record leases under `name`.
fn leased(record: &Record, name: &str) -> Option<String> {
    let of_lease = record.action == "lease.acquire" && record.outcome.status() == "ok";
    record.vm.clone().filter(|_| of_lease && record.details["name"] == name)
}

/// The domains of the VMs that their holders called `name`, such as a daemon's clients: those that the log has a lease of. Lines
/// that are no records are passed over.
///
/// # Errors
/// [`ReadError::Io`].
pub fn called(dir: &Path, name: &str) -> Result<Vec<String>, ReadError> {
    let leases =
        Filter { action: Some("lease.acquire".into()), status: Some("ok".into()), ..Filter::default() };
    let (mut domains, mut skipped) = (Vec::new(), Skipped::default());
    let mut records = query(dir, leases);
    while let Some(record) = records.next_record(&mut skipped)? {
        domains.extend(leased(&record, name));
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
    for again in 0.. {
        let Some(last) = segment::list(dir).map_err(io_error(dir))?.pop() else { break };
        let path = segment::path(dir, last);
        let mut file = match File::open(&path) {
            // Closed and pruned since it was listed: there is a later one then.
            Err(error) if error.kind() == io::ErrorKind::NotFound && again < MAX_AGAIN => continue,
            opened => opened.map_err(io_error(&path))?,
        };
        tail.offset = end_of_lines(&mut file).map_err(io_error(&path))?;
        tail.line_number = None;
        tail.open = Some((last, BufReader::new(file)));
        break;
    }
    Ok(tail)
}

/// Writes the wanted records to `out` as they are on disk (bytes, hashes and all). Lines that are no records are passed over.
///
/// # Errors
/// [`ReadError::Io`] and [`ReadError::Write`]; what was written until then stays.
pub fn export(dir: &Path, filter: Filter, out: &mut impl Write) -> Result<Exported, ReadError> {
    let mut tail = query(dir, filter);
    let mut exported = Exported::default();
    while tail.next_record(&mut exported.skipped)?.is_some() {
        out.write_all(&tail.line).and_then(|()| out.write_all(b"\n")).map_err(ReadError::Write)?;
        exported.records += 1;
    }
    out.flush().map_err(ReadError::Write)?;
    Ok(exported)
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
        for next in segments.into_iter().filter(|&first| current.is_none_or(|current| first > current)) {
            if current.is_some() && !self.closed {
                // Records may have come between the end that was seen and the rotation: look once more.
                self.closed = true;
                return Ok(true);
            }
            let path = segment::path(&self.dir, next);
            let file = match File::open(&path) {
                // Pruned since it was listed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.map_err(|source| ReadError::Io { path, source })?,
            };
            self.open = Some((next, BufReader::new(file)));
            self.closed = false;
            self.offset = 0;
            self.line_number = Some(0);
            return Ok(true);
        }
        Ok(false)
    }

    /// The next wanted record; `None` when there is nothing more for now. Lines that are no records are passed over, and counted
    /// in `skipped`.
    ///
    /// # Errors
    /// [`ReadError::Io`].
    pub fn next_record(&mut self, skipped: &mut Skipped) -> Result<Option<Record>, ReadError> {
        loop {
            match self.step() {
                Err(ReadError::NotARecord { path, line }) => skipped.count(path, line),
                other => return other,
            }
        }
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
                found @ (Line::Whole | Line::TooLong) => {
                    self.offset += consumed;
                    self.line_number = self.line_number.map(|number| number + 1);
                    // Of one that is too long only a part was kept, which may look like a whole.
                    let record = Record::parse(&self.line).ok().filter(|_| found == Line::Whole);
                    let Some(record) = record else {
                        return Err(ReadError::NotARecord { path: self.path(), line: self.line_number });
                    };
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
