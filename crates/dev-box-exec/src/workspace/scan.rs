//! Finding what a guest changed in its staging directory, without changing anything.

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use rustix::io::Errno;

use super::attributes::{self, GuestMeta};
use super::beneath::{self, Bounds, Meta};
use super::copy::{self, Buffer};
use super::limits::{Stop, Tally};
use super::manifest::{Entry, Manifest};
use super::{Action, Change, ChangeKind, CollectError, Kind, Limits, Owner, Refusal, Refused};

/// Longest target of a link, as Linux has it.
const TARGET_MAX: u64 = 4095;

/// A staging directory that a guest has had its hands on.
#[derive(Debug)]
pub struct HostileShare {
    root: OwnedFd,
    path: PathBuf,
    owner: Option<Owner>,
}

/// Something in the share that is a file, directory or link and was opened safely.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) file: OwnedFd,
    pub(super) host: Meta,
    pub(super) guest: GuestMeta,
}

impl HostileShare {
    /// Opens the staging directory. `owner`: whom everything in it must belong to, if that is to be checked.
    ///
    /// # Errors
    /// [`CollectError::Share`].
    pub fn open(path: &Path, owner: Option<Owner>) -> Result<Self, CollectError> {
        let root = beneath::open_root(path)
            .map_err(|error| CollectError::Share { path: path.to_owned(), source: error.into() })?;
        Ok(Self { root, path: path.to_owned(), owner })
    }

    /// Opens one entry: never a link, never anything that could block or have a side effect, never another's.
    pub(super) fn entry(&self, path: &Path) -> Result<Opened, Refusal> {
        let parent =
            beneath::open_dir(&self.root, path.parent().unwrap_or(Path::new("")), Bounds::OneFilesystem);
        let name = path.file_name().ok_or(Refusal::Changed)?;
        self.entry_at(&parent.map_err(refusal)?, Path::new(name))
    }

    fn entry_at(&self, dir: &OwnedFd, name: &Path) -> Result<Opened, Refusal> {
        let before = beneath::meta_at(dir, name).map_err(refusal)?;
        attributes::refuse_type(before.kind)?;
        let file = beneath::open_file(dir, name, Bounds::OneFilesystem).map_err(refusal)?;
        let host = beneath::meta(&file).map_err(refusal)?;
        if (host.stamp.dev, host.stamp.ino, host.kind) != (before.stamp.dev, before.stamp.ino, before.kind) {
            return Err(Refusal::Changed);
        }
        if self.owner.is_some_and(|owner| owner.uid != host.uid) {
            return Err(Refusal::ForeignOwner { uid: host.uid });
        }
        let guest = attributes::read(&file, host.kind, host.mode)?;
        Ok(Opened { file, host, guest })
    }

    fn error(&self, below: &Path, error: Errno) -> CollectError {
        CollectError::Share { path: self.path.join(below), source: error.into() }
    }
}

impl Opened {
    /// A link's target.
    pub(super) fn target(&self) -> Result<Vec<u8>, Refusal> {
        if self.host.stamp.size > TARGET_MAX {
            return Err(Refusal::BadTarget);
        }
        let mut target = Vec::new();
        let file = io::BufReader::new(FdReader { file: &self.file, at: 0 });
        file.take(TARGET_MAX + 1)
            .read_to_end(&mut target)
            .map_err(|error| Refusal::System(error.to_string()))?;
        dev_box_comm::share::check_symlink(&target)?;
        Ok(target)
    }

    /// How it differs from what was staged in its place.
    pub(super) fn differs(
        &self,
        staged: Option<&Entry>,
        manifest: &Manifest,
        buffer: &mut Buffer,
    ) -> Result<Option<ChangeKind>, Refusal> {
        let Some(staged) = staged else { return Ok(Some(ChangeKind::Created)) };
        let same_metadata = self.guest.kind == staged.kind && self.guest.mode == staged.mode;
        // Links have no mode of their own.
        if self.guest.kind != staged.kind || (!same_metadata && staged.kind != Kind::Symlink) {
            return Ok(Some(ChangeKind::Modified));
        }
        if staged.kind == Kind::Directory {
            return Ok(None);
        }
        let untouched = self.host.stamp == staged.staged;
        if untouched && (staged.digest.is_none() || !manifest.is_racy(staged)) {
            return Ok(None);
        }
        let same = self.host.stamp.size == staged.staged.size
            && match staged.digest {
                None => false,
                Some(digest) => {
                    let now = copy::hash(&self.file, self.host.stamp.size, buffer);
                    now.map_err(refusal)? == digest
                }
            };
        Ok(if same { None } else { Some(ChangeKind::Modified) })
    }
}

/// Reads a descriptor by position, so that it need not be taken apart.
struct FdReader<'a> {
    file: &'a OwnedFd,
    at: u64,
}

impl Read for FdReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let got = rustix::io::pread(self.file.as_fd(), buffer, self.at)?;
        self.at += got as u64;
        Ok(got)
    }
}

/// An entry's whole contents, at most `limit` bytes; `None` if there are more.
pub(super) fn read_all(opened: &Opened, limit: u64) -> io::Result<Option<Vec<u8>>> {
    let mut contents = Vec::new();
    FdReader { file: &opened.file, at: 0 }.take(limit + 1).read_to_end(&mut contents)?;
    Ok(if contents.len() as u64 > limit { None } else { Some(contents) })
}

pub(super) fn refusal(error: Errno) -> Refusal {
    match error {
        Errno::XDEV => Refusal::OtherFilesystem,
        Errno::LOOP => Refusal::RealSymlink,
        Errno::NOENT | Errno::NOTDIR | Errno::NXIO => Refusal::Changed,
        error => Refusal::System(error.to_string()),
    }
}

/// What a scan found.
#[derive(Debug, Default)]
pub struct Scan {
    /// All differences, sorted by path; nothing was done about them.
    pub changes: Vec<Change>,
    /// What will not be taken.
    pub refused: Vec<Refused>,
}

/// Compares a share with what was staged there. Reads only; nothing is brought over when a limit is reached.
/// Blocking.
///
/// # Errors
/// [`CollectError::Limit`], [`CollectError::Share`], [`CollectError::Stopped`].
pub fn scan(
    share: &HostileShare,
    manifest: &Manifest,
    limits: Limits,
    stop: &Stop,
) -> Result<Scan, CollectError> {
    let mut scanner = Scanner {
        share,
        manifest,
        tally: Tally::new(limits),
        seen: vec![false; manifest.len()],
        buffer: Buffer::new(),
        stop,
        found: Scan::default(),
    };
    scanner.directory(&share.root, Path::new(""), 0)?;
    let Scanner { seen, mut found, .. } = scanner;
    for (path, entry) in manifest.iter() {
        if !seen.get(entry.index).copied().unwrap_or_default() {
            found.changes.push(Change {
                path: path.clone(),
                change: ChangeKind::Deleted,
                kind: entry.kind,
                mode: entry.mode,
                size: 0,
                escapes: false,
                action: Action::Reported,
            });
        }
    }
    found.changes.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    found.refused.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

struct Scanner<'a> {
    share: &'a HostileShare,
    manifest: &'a Manifest,
    tally: Tally,
    /// By number in the manifest: it is still there, or there is no telling.
    seen: Vec<bool>,
    buffer: Buffer,
    stop: &'a Stop,
    found: Scan,
}

impl Scanner<'_> {
    fn directory(&mut self, dir: &OwnedFd, path: &Path, depth: u32) -> Result<(), CollectError> {
        let names = beneath::list(dir, self.tally.room()).map_err(|error| self.share.error(path, error))?;
        let Some(names) = names else { return Err(self.tally.too_many().into()) };
        for name in names {
            if self.stop.is_stopped() {
                return Err(CollectError::Stopped);
            }
            let path = path.join(&name);
            self.tally.entry(&path, depth)?;
            match self
                .share
                .entry_at(dir, Path::new(&name))
                .and_then(|opened| Ok((self.compare(&path, &opened)?, opened)))
            {
                Ok(((), opened)) if opened.guest.kind == Kind::Directory => {
                    self.directory(&opened.file, &path, depth + 1)?;
                }
                Ok(((), opened)) => {
                    if opened.guest.kind == Kind::File {
                        self.tally.file_size(opened.host.stamp.size)?;
                    }
                }
                Err(why) => self.refuse(path, why),
            }
        }
        Ok(())
    }

    fn compare(&mut self, path: &Path, opened: &Opened) -> Result<(), Refusal> {
        let staged = self.manifest.get(path);
        let escapes = match opened.guest.kind {
            Kind::Symlink => leads_out(path, &opened.target()?),
            _ => false,
        };
        if let Some(change) = opened.differs(staged, self.manifest, &mut self.buffer)? {
            let size = if opened.guest.kind == Kind::Directory { 0 } else { opened.host.stamp.size };
            self.found.changes.push(Change {
                path: path.to_owned(),
                change,
                kind: opened.guest.kind,
                mode: opened.guest.mode,
                size,
                escapes,
                action: Action::Reported,
            });
        }
        if let Some(seen) = staged.and_then(|staged| self.seen.get_mut(staged.index)) {
            *seen = true;
        }
        Ok(())
    }

    /// What cannot be looked at is not reported as deleted.
    fn refuse(&mut self, path: PathBuf, why: Refusal) {
        for entry in self.manifest.at_and_below(&path) {
            if let Some(seen) = self.seen.get_mut(entry.index) {
                *seen = true;
            }
        }
        self.found.refused.push(Refused { path, why });
    }
}

/// Whether a link at `path` (relative to the workspace) leads out of the workspace, by its text alone.
fn leads_out(path: &Path, target: &[u8]) -> bool {
    let target = PathBuf::from(std::ffi::OsString::from_vec(target.to_vec()));
    if target.as_os_str().as_bytes().first() == Some(&b'/') {
        return true;
    }
    let mut depth = path.components().count().saturating_sub(1);
    for component in target.components() {
        match component {
            Component::ParentDir if depth == 0 => return true,
            Component::ParentDir => depth -= 1,
            Component::Normal(_) => depth += 1,
            _ => {}
        }
    }
    false
}

#[cfg(test)]
#[path = "scan_tests.rs"]
mod tests;
