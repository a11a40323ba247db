//! Putting a copy of a directory into a VM's staging directory.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{self, FileType, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid};
use rustix::io::Errno;

use super::attributes;
use super::beneath::{self, Bounds, Meta, Stamp};
use super::copy::{self, Budget, Buffer, CopyError, Hash};
use super::ignored::{IgnoreRules, MAX_IGNORE_FILE};
use super::limits::{Stop, Tally};
use super::manifest::{CLOCK_STEP_NS, Entry, Manifest};
use super::{Kind, LimitReached, Owner, Refusal, Refused, WorkspaceIn};

/// Files up to this size are digested while they are staged, so that one that was touched, or written with the same
/// contents, does not come back as changed.
pub(super) const DIGEST_MAX: u64 = 16 << 20;

/// Why a workspace could not be staged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StageError {
    /// It is not there.
    #[error("the workspace {} does not exist", .0.display())]
    Missing(PathBuf),
    /// It is a file.
    #[error("the workspace {} is not a directory", .0.display())]
    NotADirectory(PathBuf),
    /// It, or something in it, cannot be read.
    #[error("cannot read {} of the workspace: run dev-box as a user who may, or remove it", path.display())]
    Unreadable {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is too large.
    #[error("the workspace {} has {limit}: leave files out (--git), or raise the limit", root.display())]
    Limit {
        /// The workspace.
        root: PathBuf,
        /// Which limit.
        #[source]
        limit: LimitReached,
    },
    /// The staging directory has something in it already.
    #[error("the staging directory {} is not empty", .0.display())]
    InUse(PathBuf),
    /// The staging directory's filesystem cannot hold the attributes that 9p needs.
    #[error("the filesystem of {} has no user extended attributes: put the state directory on one that has", .0.display())]
    NoAttributes(PathBuf),
    /// Writing failed.
    #[error("cannot stage {}", path.display())]
    Write {
        /// What was being written.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It was told to stop.
    #[error("staging was stopped")]
    Stopped,
}

/// What was staged.
#[derive(Debug, Default)]
pub struct Staged {
    /// The base for finding changes.
    pub manifest: Manifest,
    /// Bytes copied.
    pub bytes: u64,
    /// Entries left out because of `.gitignore`; a directory counts as one.
    pub ignored: u64,
    /// Entries that cannot be copied: FIFOs, sockets, devices.
    pub skipped: Vec<Refused>,
}

/// Copies `workspace.source` into `share`, which must be empty. Blocking.
///
/// The source is not followed out of itself: links are copied as links. A file that goes away meanwhile is left out.
///
/// # Errors
/// [`StageError`]; what was staged so far stays for the VM's retirement to remove.
pub fn stage(
    share: &Path,
    share_owner: Option<Owner>,
    workspace: &WorkspaceIn,
    stop: &Stop,
) -> Result<Staged, StageError> {
    let share_error = |error: Errno| write_error(share, error);
    let to = beneath::open_root(share).map_err(share_error)?;
    if !beneath::list(&to, 0).map_err(share_error)?.is_some_and(|names| names.is_empty()) {
        return Err(StageError::InUse(share.to_owned()));
    }
    let mut root_mode = 0o755;
    let mut stager = Stager {
        share_owner,
        guest_owner: workspace.guest_owner,
        root: PathBuf::new(),
        git: workspace.git,
        tally: Tally::new(workspace.limits_in),
        budget: Budget::new(workspace.limits_in.bytes),
        buffer: Buffer::new(),
        stop,
        staged: Staged::default(),
    };
    if let Some(source) = &workspace.source {
        let from = open_source(source)?;
        root_mode = beneath::meta(&from).map_err(|error| unreadable(source, error))?.mode;
        stager.root.clone_from(source);
        if workspace.git {
            let canonical = source
                .canonicalize()
                .map_err(|error| StageError::Unreadable { path: source.clone(), source: error })?;
            stager.staged.manifest.rules = IgnoreRules::around(&canonical);
        }
        stager.directory(&from, &to, Path::new(""), 0)?;
    }
    // Last, so that the guest's user may write even if the source was read-only for its group and others.
    match attributes::write(&to, Kind::Directory, root_mode | 0o700, workspace.guest_owner) {
        Err(Errno::OPNOTSUPP) => return Err(StageError::NoAttributes(share.to_owned())),
        done => done.map_err(share_error)?,
    }
    let Stager { staged, budget, .. } = stager;
    settle(&staged.manifest);
    Ok(Staged { bytes: budget.used(), ..staged })
}

/// Finds mistakes before a VM is made: a workspace that is not there, not a directory, or cannot be opened. Blocking.
///
/// # Errors
/// [`StageError`], as [`stage`] would give.
pub fn precheck(workspace: &WorkspaceIn) -> Result<(), StageError> {
    match &workspace.source {
        Some(source) => open_source(source).map(drop),
        None => Ok(()),
    }
}

/// Waits until a write to any staged file moves its change time, where no digest would tell.
fn settle(manifest: &Manifest) {
    let blind =
        |entry: &Entry| entry.kind != Kind::Directory && entry.digest.is_none() && manifest.is_racy(entry);
    if manifest.iter().any(|(_, entry)| blind(entry)) {
        std::thread::sleep(Duration::from_nanos(u64::try_from(CLOCK_STEP_NS).unwrap_or_default()));
    }
}

fn open_source(source: &Path) -> Result<OwnedFd, StageError> {
    beneath::open_root(source).map_err(|error| match error {
        Errno::NOENT => StageError::Missing(source.to_owned()),
        Errno::NOTDIR => StageError::NotADirectory(source.to_owned()),
        error => unreadable(source, error),
    })
}

fn unreadable(path: &Path, error: Errno) -> StageError {
    StageError::Unreadable { path: path.to_owned(), source: error.into() }
}

fn write_error(path: &Path, error: Errno) -> StageError {
    StageError::Write { path: path.to_owned(), source: error.into() }
}

struct Stager<'a> {
    share_owner: Option<Owner>,
    guest_owner: Owner,
    root: PathBuf,
    git: bool,
    tally: Tally,
    budget: Budget,
    buffer: Buffer,
    stop: &'a Stop,
    staged: Staged,
}

impl Stager<'_> {
    fn directory(&mut self, from: &OwnedFd, to: &OwnedFd, dir: &Path, depth: u32) -> Result<(), StageError> {
        if self.git {
            self.read_ignore_file(from, dir)?;
        }
        let names = beneath::list(from, self.tally.room())
            .map_err(|error| unreadable(&self.root.join(dir), error))?;
        let Some(names) = names else { return Err(self.limit(self.tally.too_many())) };
        for name in names {
            if self.stop.is_stopped() {
                return Err(StageError::Stopped);
            }
            let path = dir.join(&name);
            let name = Path::new(&name);
            match self.entry(from, to, name, &path, depth) {
                // It went away, or became something else, between being listed and being opened.
                Err(StageError::Unreadable { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                done => done?,
            }
        }
        Ok(())
    }

    fn entry(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        name: &Path,
        path: &Path,
        depth: u32,
    ) -> Result<(), StageError> {
        let full = self.root.join(path);
        let unread = |error| unreadable(&full, error);
        let meta = beneath::meta_at(from, name).map_err(unread)?;
        let is_dir = meta.kind == FileType::Directory;
        // git itself never looks into its own directory for something to ignore.
        if self.git && name != Path::new(".git") && self.staged.manifest.rules.names(path, is_dir) {
            self.staged.ignored += 1;
            return Ok(());
        }
        self.tally.entry(path, depth).map_err(|limit| self.limit(limit))?;
        match meta.kind {
            FileType::Directory => {
                let from = beneath::open_dir(from, name, Bounds::Mounts).map_err(unread)?;
                let wrote = |error| write_error(path, error);
                fs::mkdirat(to, name, Mode::RWXU).map_err(wrote)?;
                let to = beneath::open_dir(to, name, Bounds::OneFilesystem).map_err(wrote)?;
                self.directory(&from, &to, path, depth + 1)?;
                self.record(to.as_fd(), path, Kind::Directory, &meta, None)
            }
            FileType::RegularFile => {
                let from = beneath::open_file(from, name, Bounds::Mounts).map_err(unread)?;
                let meta = beneath::meta(&from).map_err(unread)?;
                let to = create(to, name).map_err(|error| write_error(path, error))?;
                let digest = self.contents(&from, &to, path, meta.stamp.size)?;
                self.record(to.as_fd(), path, Kind::File, &meta, digest)
            }
            FileType::Symlink => {
                let target = fs::readlinkat(from, name, Vec::new()).map_err(unread)?.into_bytes();
                let to = create(to, name).map_err(|error| write_error(path, error))?;
                let mut file = File::from(to);
                file.write_all(&target)
                    .map_err(|source| StageError::Write { path: path.to_owned(), source })?;
                self.record(file.as_fd(), path, Kind::Symlink, &meta, Some(copy::hash_bytes(&target)))
            }
            special => {
                let why = attributes::refuse_type(special).err().unwrap_or(Refusal::Device);
                self.staged.skipped.push(Refused { path: path.to_owned(), why });
                Ok(())
            }
        }
    }

    fn contents(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        path: &Path,
        size: u64,
    ) -> Result<Option<Hash>, StageError> {
        self.tally.file_size(size).map_err(|limit| self.limit(limit))?;
        let copied = copy::copy_contents(from, to, size, &mut self.budget, &mut self.buffer, self.stop);
        copied.map_err(|error| match error {
            CopyError::Limit(limit) => self.limit(limit),
            CopyError::Read(error) => unreadable(&self.root.join(path), error),
            CopyError::Write(error) => write_error(path, error),
            CopyError::Stopped => StageError::Stopped,
        })?;
        if size > DIGEST_MAX {
            return Ok(None);
        }
        // Of the copy: the source may be changing.
        copy::hash(to, size, &mut self.buffer).map(Some).map_err(|error| write_error(path, error))
    }

    /// Gives a staged entry its meaning and its owner, and notes it. Nothing changes it after that but the guest.
    fn record(
        &mut self,
        to: impl AsFd,
        path: &Path,
        kind: Kind,
        source: &Meta,
        digest: Option<Hash>,
    ) -> Result<(), StageError> {
        let staged = self.dress(to, kind, source).map_err(|error| match error {
            Errno::OPNOTSUPP => StageError::NoAttributes(path.to_owned()),
            error => write_error(path, error),
        })?;
        let mode = source.mode & 0o777;
        let entry = Entry { kind, mode, staged, digest, source: source.stamp, index: 0 };
        self.staged.manifest.insert(path.to_owned(), entry);
        Ok(())
    }

    fn dress(&self, to: impl AsFd, kind: Kind, source: &Meta) -> Result<Stamp, Errno> {
        attributes::write(&to, kind, source.mode, self.guest_owner)?;
        set_mtime(&to, source.stamp.mtime_ns)?;
        if let Some(owner) = self.share_owner {
            fs::fchown(&to, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))?;
        }
        Ok(beneath::meta(&to)?.stamp)
    }

    fn read_ignore_file(&mut self, from: &OwnedFd, dir: &Path) -> Result<(), StageError> {
        let full = self.root.join(dir).join(".gitignore");
        let unread = |error| unreadable(&full, error);
        let file = match beneath::open_file(from, Path::new(".gitignore"), Bounds::Mounts) {
            Ok(file) => file,
            // git does not follow a link there either.
            Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => return Ok(()),
            Err(error) => return Err(unread(error)),
        };
        let meta = beneath::meta(&file).map_err(unread)?;
        if meta.kind != FileType::RegularFile || meta.stamp.size > MAX_IGNORE_FILE {
            return Ok(());
        }
        let mut contents = Vec::new();
        File::from(file)
            .take(MAX_IGNORE_FILE)
            .read_to_end(&mut contents)
            .map_err(|source| StageError::Unreadable { path: full.clone(), source })?;
        self.staged.manifest.rules.enter(dir, &contents);
        Ok(())
    }

    fn limit(&self, limit: LimitReached) -> StageError {
        StageError::Limit { root: self.root.clone(), limit }
    }
}

fn create(dir: &OwnedFd, name: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    fs::openat(dir, name, flags, Mode::RUSR | Mode::WUSR)
}

/// Sets a file's modification time and leaves its access time alone.
pub(super) fn set_mtime(file: impl AsFd, mtime_ns: i128) -> Result<(), Errno> {
    let seconds = i64::try_from(mtime_ns.div_euclid(1_000_000_000)).unwrap_or_default();
    let nanos = i64::try_from(mtime_ns.rem_euclid(1_000_000_000)).unwrap_or_default();
    fs::futimens(
        file,
        &Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: seconds, tv_nsec: nanos },
        },
    )
}

#[cfg(test)]
#[path = "stage_tests.rs"]
mod tests;
