//! Bringing what a guest changed to where it is wanted.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{self, AtFlags, FileType, Gid, Mode, Uid};
use rustix::io::Errno;

use super::beneath::{self, Bounds};
use super::copy::{self, Budget, Buffer, CopyError, Sum};
use super::limits::{Stop, Tally};
use super::manifest::Manifest;
use super::place::{self, DirError, Pending, Placed, Replace};
use super::scan::{HostileShare, Opened, Scan};
use super::stage::{DIGEST_MAX, set_mtime};
use super::{
    Action, Change, ChangeKind, CollectTo, Collected, Kind, LimitReached, Limits, Owner, Refusal, Refused,
    WorkspaceIn,
};

/// Why what changed could not be brought back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CollectError {
    /// The staging directory itself could not be read.
    #[error("cannot read the staging directory {}", path.display())]
    Share {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The guest left too much.
    #[error(
        "the guest left {0}: nothing more was brought back (raise the limit, or have the job write less)"
    )]
    Limit(#[from] LimitReached),
    /// The destination could not be opened or made.
    #[error("cannot write results to {}", path.display())]
    Destination {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A write-back was asked for, and nothing was copied in.
    #[error("nothing can be written back without a workspace")]
    NoWorkspace,
    /// It was told to stop.
    #[error("collecting was stopped")]
    Stopped,
}

/// Where results go, opened before the job runs, so that a mistake is found early.
#[derive(Debug)]
pub struct Destination {
    root: OwnedFd,
    path: PathBuf,
    owner: Option<Owner>,
    write_back: bool,
    delete: bool,
    honour_ignore: bool,
}

impl Destination {
    /// Opens (and for [`CollectTo::Directory`] makes) the destination; `None` if nothing is to be collected. Blocking.
    ///
    /// # Errors
    /// [`CollectError::Destination`], [`CollectError::NoWorkspace`].
    pub fn open(workspace: &WorkspaceIn) -> Result<Option<Self>, CollectError> {
        let (path, write_back, delete) = match (&workspace.collect, &workspace.source) {
            (CollectTo::Nothing, _) => return Ok(None),
            (CollectTo::Directory(path), _) => (path, false, false),
            (CollectTo::WriteBack { delete }, Some(source)) => (source, true, *delete),
            (CollectTo::WriteBack { .. }, None) => return Err(CollectError::NoWorkspace),
        };
        let failed = |source: io::Error| CollectError::Destination { path: path.clone(), source };
        let made = !write_back && !path.exists();
        if made {
            std::fs::create_dir_all(path).map_err(failed)?;
        }
        let root = beneath::open_root(path).map_err(|error| failed(error.into()))?;
        if let (true, Some(owner)) = (made, workspace.owner) {
            chown(&root, owner).map_err(|error| failed(error.into()))?;
        }
        rustix::fs::accessat(&root, ".", fs::Access::WRITE_OK | fs::Access::EXEC_OK, AtFlags::EACCESS)
            .map_err(|error| failed(error.into()))?;
        Ok(Some(Self {
            root,
            path: path.clone(),
            owner: workspace.owner,
            write_back,
            delete,
            honour_ignore: write_back && workspace.git,
        }))
    }

    fn error(&self, below: &Path, error: Errno) -> CollectError {
        CollectError::Destination { path: self.path.join(below), source: error.into() }
    }
}

fn chown(file: &OwnedFd, owner: Owner) -> Result<(), Errno> {
    fs::fchown(file, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))
}

/// Brings what a [`scan`](super::scan) found to `destination`. Blocking.
///
/// Each file appears whole or not at all: it is written under a temporary name (`.dev-box-...`) in its directory and
/// renamed. Into a directory, files and links of the same name are replaced. In a write-back, a file that is not the one
/// that was staged any more (or that was not staged) is a conflict: it stays, and the guest's version is put beside it as
/// `NAME.dev-box-TAG`.
///
/// # Errors
/// [`CollectError`]; what was brought over until then stays.
pub fn apply(
    scan: Scan,
    share: &HostileShare,
    manifest: &Manifest,
    destination: &Destination,
    limits: Limits,
    tag: &str,
    stop: &Stop,
) -> Result<Collected, CollectError> {
    let mut apply = Apply {
        share,
        manifest,
        to: destination,
        tally: Tally::new(limits),
        budget: Budget::new(limits.bytes),
        buffer: Buffer::new(),
        suffix: format!("dev-box-{tag}"),
        temporaries: 0,
        modes: BTreeMap::new(),
        parent: None,
        refused: scan.refused,
        sum: Sum::default(),
        stop,
    };
    let mut changes = scan.changes;
    let found = changes.len();
    if destination.honour_ignore {
        changes.retain(|change| !manifest.rules.cover(&change.path, change.kind == Kind::Directory));
    }
    let ignored = (found - changes.len()) as u64;
    if destination.delete {
        // A directory after what was in it.
        for change in changes.iter_mut().rev().filter(|change| change.change == ChangeKind::Deleted) {
            change.action = apply.delete(change)?;
        }
    }
    let mut kept = Vec::with_capacity(changes.len());
    for mut change in changes {
        if change.change != ChangeKind::Deleted {
            if stop.is_stopped() {
                return Err(CollectError::Stopped);
            }
            match apply.bring(&change)? {
                Ok(action) => change.action = action,
                Err(why) => {
                    apply.refused.push(Refused { path: change.path, why });
                    continue;
                }
            }
        }
        kept.push(change);
    }
    apply.set_directory_modes()?;
    let Apply { mut refused, budget, sum, temporaries, .. } = apply;
    refused.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    let digest = (temporaries > 0).then(|| sum.finish());
    Ok(Collected { changes: kept, refused, ignored, bytes: budget.used(), digest })
}

struct Apply<'a> {
    share: &'a HostileShare,
    manifest: &'a Manifest,
    to: &'a Destination,
    tally: Tally,
    budget: Budget,
    buffer: Buffer,
    suffix: String,
    temporaries: u64,
    /// Directories that were made or whose mode the guest changed: set at the end, when nothing more goes into them.
    modes: BTreeMap<PathBuf, u32>,
    /// The directory used last.
    parent: Option<(PathBuf, OwnedFd)>,
    refused: Vec<Refused>,
    sum: Sum,
    stop: &'a Stop,
}

/// Fatal for the collection; or only for this entry.
type Entry<T> = Result<Result<T, Refusal>, CollectError>;

impl Apply<'_> {
    fn bring(&mut self, change: &Change) -> Entry<Action> {
        if change.kind == Kind::Directory {
            return self.directory(change);
        }
        let opened = match self.share.entry(&change.path) {
            Ok(opened) if opened.guest.kind == change.kind => opened,
            Ok(_) => return Ok(Err(Refusal::Changed)),
            Err(why) => return Ok(Err(why)),
        };
        let Some(name) = change.path.file_name() else { return Ok(Err(Refusal::Changed)) };
        let dir = change.path.parent().unwrap_or(Path::new(""));
        let parent = match self.parent.take() {
            Some((path, parent)) if path == dir => parent,
            _ => match self.make_dirs(dir)? {
                Ok(parent) => parent,
                Err(why) => return Ok(Err(why)),
            },
        };
        let placed = self.contents(&parent, &opened, change).and_then(|pending| match pending {
            Ok(pending) => match pending.place(name, self.replace(&change.path), &self.suffix) {
                Ok(placed) => Ok(Ok(placed)),
                Err(error) => self.classify(&change.path, error),
            },
            Err(why) => Ok(Err(why)),
        });
        let action = match placed {
            Ok(Ok(Placed::Done)) => Ok(Ok(Action::Applied)),
            Ok(Ok(Placed::Beside(name))) => Ok(Ok(Action::Conflict { kept_as: Some(dir.join(name)) })),
            Ok(Err(why)) => Ok(Err(why)),
            Err(error) => Err(error),
        };
        self.parent = Some((dir.to_owned(), parent));
        action
    }

    fn replace(&self, path: &Path) -> Replace {
        match self.manifest.get(path) {
            _ if !self.to.write_back => Replace::Anything,
            Some(entry) if entry.kind != Kind::Directory => Replace::Only(entry.source),
            _ => Replace::Nothing,
        }
    }

    /// The entry, whole, under a temporary name.
    fn contents<'d>(&mut self, parent: &'d OwnedFd, opened: &Opened, change: &Change) -> Entry<Pending<'d>> {
        self.temporaries += 1;
        let name = format!(".{}-{:x}.tmp", self.suffix, self.temporaries).into();
        if change.kind == Kind::Symlink {
            let target = match opened.target() {
                Ok(target) => target,
                Err(why) => return Ok(Err(why)),
            };
            self.sum.add(&change.path, change.mode, target.len() as u64, Some(&copy::hash_bytes(&target)));
            return match Pending::link(parent, name, &target, self.to.owner) {
                Ok(pending) => Ok(Ok(pending)),
                Err(error) => self.classify(&change.path, error),
            };
        }
        let size = opened.host.stamp.size;
        self.tally.file_size(size)?;
        let (pending, file) = match Pending::file(parent, name) {
            Ok(pending) => pending,
            Err(error) => return self.classify(&change.path, error),
        };
        match copy::copy_contents(&opened.file, &file, size, &mut self.budget, &mut self.buffer, self.stop) {
            Ok(()) => {}
            Err(CopyError::Limit(limit)) => return Err(limit.into()),
            Err(CopyError::Stopped) => return Err(CollectError::Stopped),
            Err(CopyError::Read(error)) => return Ok(Err(error.into())),
            Err(CopyError::Write(error)) => return self.classify(&change.path, error),
        }
        // Of the copy: the guest may still be writing to its own.
        let contents = (size <= DIGEST_MAX).then(|| copy::hash(&file, size, &mut self.buffer)).transpose();
        match contents {
            Ok(contents) => self.sum.add(&change.path, opened.guest.mode, size, contents.as_ref()),
            Err(error) => return self.classify(&change.path, error),
        }
        let dressed = set_mtime(&file, opened.host.stamp.mtime_ns)
            .and_then(|()| self.to.owner.map_or(Ok(()), |owner| chown(&file, owner)))
            .and_then(|()| fs::fchmod(&file, Mode::from_raw_mode(opened.guest.mode)));
        match dressed {
            Ok(()) => Ok(Ok(pending)),
            Err(error) => self.classify(&change.path, error),
        }
    }

    fn directory(&mut self, change: &Change) -> Entry<Action> {
        // A file of the user's that the guest replaced by a directory makes room, if it is still the one staged.
        if let Some(staged) = self.manifest.get(&change.path).filter(|entry| entry.kind != Kind::Directory) {
            let Ok(parent) = beneath::open_dir(&self.to.root, parent_of(&change.path), Bounds::Mounts) else {
                return Ok(Err(Refusal::BlockedByDestination));
            };
            let name = Path::new(change.path.file_name().unwrap_or_default());
            let there = beneath::meta_at(&parent, name).ok();
            let ours = there.is_some_and(|there| self.to.write_back && there.stamp == staged.source);
            if ours {
                fs::unlinkat(&parent, name, AtFlags::empty())
                    .map_err(|error| self.to.error(&change.path, error))?;
            }
        }
        match self.make_dirs(&change.path)? {
            Ok(_) => {
                if change.change == ChangeKind::Modified {
                    self.modes.insert(change.path.clone(), change.mode);
                }
                Ok(Ok(Action::Applied))
            }
            Err(_) => Ok(Ok(Action::Conflict { kept_as: None })),
        }
    }

    fn make_dirs(&mut self, path: &Path) -> Entry<OwnedFd> {
        match place::make_dirs(&self.to.root, path, self.to.owner) {
            Ok((dir, made)) => {
                for path in made {
                    let mode = self.share.entry(&path).map_or(0o755, |opened| opened.guest.mode);
                    self.modes.insert(path, mode);
                }
                Ok(Ok(dir))
            }
            Err(DirError::Blocked) => Ok(Err(Refusal::BlockedByDestination)),
            Err(DirError::System(error)) => self.classify(path, error),
        }
    }

    fn delete(&mut self, change: &Change) -> Result<Action, CollectError> {
        let Some(staged) = self.manifest.get(&change.path) else { return Ok(Action::Reported) };
        let Ok(parent) = beneath::open_dir(&self.to.root, parent_of(&change.path), Bounds::Mounts) else {
            return Ok(Action::Conflict { kept_as: None });
        };
        let name = Path::new(change.path.file_name().unwrap_or_default());
        let there = match beneath::meta_at(&parent, name) {
            Ok(there) => there,
            Err(Errno::NOENT) => return Ok(Action::Applied),
            Err(error) => return Err(self.to.error(&change.path, error)),
        };
        let flags = match staged.kind {
            Kind::Directory if there.kind == FileType::Directory => AtFlags::REMOVEDIR,
            Kind::File | Kind::Symlink if there.stamp == staged.source => AtFlags::empty(),
            _ => return Ok(Action::Conflict { kept_as: None }),
        };
        match fs::unlinkat(&parent, name, flags) {
            Ok(()) => Ok(Action::Applied),
            Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(Action::Conflict { kept_as: None }),
            Err(error) => Err(self.to.error(&change.path, error)),
        }
    }

    fn set_directory_modes(&mut self) -> Result<(), CollectError> {
        for (path, mode) in std::mem::take(&mut self.modes).into_iter().rev() {
            let Ok(dir) = beneath::open_dir(&self.to.root, &path, Bounds::Mounts) else { continue };
            // Its owner must be able to look into it and to remove it.
            let mode = Mode::from_raw_mode(mode | 0o700);
            fs::fchmod(&dir, mode).map_err(|error| self.to.error(&path, error))?;
        }
        Ok(())
    }

    /// A name or link the destination's filesystem cannot hold concerns that entry; a full disk concerns all.
    fn classify<T>(&self, path: &Path, error: Errno) -> Entry<T> {
        match error {
            Errno::INVAL | Errno::NAMETOOLONG | Errno::ILSEQ | Errno::OPNOTSUPP | Errno::EXIST => {
                Ok(Err(error.into()))
            }
            error => Err(self.to.error(path, error)),
        }
    }
}

fn parent_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new(""))
}

#[cfg(test)]
#[path = "apply_tests.rs"]
mod tests;
