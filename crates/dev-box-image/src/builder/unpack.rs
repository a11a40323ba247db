//! A root file system from a stranger's tarball.
//!
//! Names are checked before anything is made, every path is resolved as if the target were the machine's root, and
//! entries, bytes and the ratio of both are limited while unpacking, not by what headers claim.

use std::fs::File;
use std::io::{self, Read, Seek as _, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dev_box_core::size::ByteSize;
use rustix::fs::{AtFlags, FileType, Gid, Mode, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use tar::{Entry, EntryType};

use super::{BuildError, Job};
use crate::command::Command;
use crate::tree::{Place, Tree};

/// What a tarball may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnpackLimits {
    /// Entries at most.
    pub entries: u64,
    /// Bytes unpacked at most.
    pub bytes: ByteSize,
    /// Bytes unpacked for each byte of the tarball at most (beyond the first 64 MiB).
    pub ratio: u64,
    /// Directories above an entry at most.
    pub depth: usize,
}

impl Default for UnpackLimits {
    /// 2 million entries, 64 GiB, 100 bytes a byte, 64 directories deep.
    fn default() -> Self {
        Self { entries: 2_000_000, bytes: ByteSize::gib(64), ratio: 100, depth: 64 }
    }
}

/// Unpacked without regard to the ratio.
const RATIO_FREE: u64 = 64 << 20;
/// Told about once in so many bytes.
const PROGRESS_INTERVAL: u64 = 16 << 20;
const COPY_BUFFER: usize = 1 << 17;
/// A link's target at most (PATH_MAX).
const MAX_TARGET: usize = 4095;

/// Why a tarball is not fit.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// It cannot be read, or is no tarball.
    #[error("cannot read it as a tarball (plain, gzip, xz or zstd)")]
    Read(#[source] io::Error),
    /// It holds nothing.
    #[error("it is empty")]
    Empty,
    /// A name leads elsewhere.
    #[error("entry `{name}`: {why}")]
    Name {
        /// The name, cut.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Something no root file system of ours may hold.
    #[error("entry `{name}` is {what}, which is not accepted")]
    Kind {
        /// The name, cut.
        name: String,
        /// What it is.
        what: &'static str,
    },
    /// Too many entries.
    #[error("it has more than {0} entries")]
    TooMany(u64),
    /// Too much in it.
    #[error("it unpacks to more than {0}")]
    TooLarge(ByteSize),
    /// A bomb.
    #[error("it unpacks to more than {0} times its size: it looks like a decompression bomb")]
    Ratio(u64),
    /// An entry could not be made.
    #[error("entry `{name}` cannot be made")]
    Make {
        /// The name, cut.
        name: String,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Stopped on request.
    #[error("stopped on request")]
    Cancelled,
}

/// Unpacks the build's tarball.
pub(super) fn tarball(job: &Job<'_>, path: &Path, root: &Path) -> Result<(), BuildError> {
    let unreadable = |source| BuildError::Unreadable { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(unreadable)?;
    let packed = file.metadata().map_err(unreadable)?.len();
    let program = decompressor(&mut file).map_err(unreadable)?;
    let reader: Box<dyn Read> = match program {
        None => Box::new(file),
        Some(program) => {
            let command = Command::new(program).arg("-dc");
            let step = crate::progress::Step::Root;
            job.builder
                .commands
                .filter(&command, file)
                .map_err(|source| BuildError::Command { step, source })?
        }
    };
    let mut last = 0;
    let mut watch = |done: u64| {
        if done.saturating_sub(last) >= PROGRESS_INTERVAL {
            last = done;
            job.progress.bytes(done, None);
        }
        !job.builder.cancel.is_cancelled()
    };
    let skipped =
        unpack(reader, packed, root, &job.builder.unpack, &mut watch).map_err(|source| match source {
            UnpackError::Cancelled => BuildError::Cancelled,
            source => BuildError::Unpack { tarball: path.to_owned(), source },
        })?;
    if skipped > 0 {
        job.progress
            .detail(&format!("{skipped} devices, sockets and pipes left out: the guest makes its own"));
    }
    Ok(())
}

/// The program that decompresses a file, by its first bytes.
fn decompressor(file: &mut File) -> io::Result<Option<&'static str>> {
    let mut magic = Vec::new();
    file.take(6).read_to_end(&mut magic)?;
    file.rewind()?;
    Ok(match magic.as_slice() {
        [0x1f, 0x8b, ..] => Some("gzip"),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => Some("xz"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some("zstd"),
        _ => None,
    })
}

/// Counts what passes, and ends with an error beyond the limits: the tar reader itself skips and buffers without
/// asking us.
struct Metered<R> {
    inner: R,
    passed: Arc<AtomicU64>,
    most: u64,
}

impl<R: Read> Read for Metered<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        let passed = self.passed.fetch_add(count as u64, Ordering::Relaxed) + count as u64;
        if passed > self.most { Err(io::Error::other("more than allowed")) } else { Ok(count) }
    }
}

/// Unpacks a tar stream of `packed` bytes on the disk below `root`. `watch` hears of the bytes so far and may stop it. Returns how many
/// devices and the like were left out.
pub(super) fn unpack(
    reader: impl Read,
    packed: u64,
    root: &Path,
    limits: &UnpackLimits,
    watch: &mut dyn FnMut(u64) -> bool,
) -> Result<u64, UnpackError> {
    let tree = Tree::open(root).map_err(UnpackError::Read)?;
    let by_ratio = packed.saturating_mul(limits.ratio).max(RATIO_FREE);
    let most = limits.bytes.as_bytes().min(by_ratio);
    let passed = Arc::new(AtomicU64::new(0));
    // Headers and padding come on top of the content.
    let stream_most = most.saturating_add(limits.entries.saturating_mul(2048));
    let mut archive =
        tar::Archive::new(Metered { inner: reader, passed: Arc::clone(&passed), most: stream_most });
    let mut state = Unpacker { tree, limits, by_ratio, most, bytes: 0, entries: 0, skipped: 0, watch };
    let over = || passed.load(Ordering::Relaxed) > stream_most;
    let entries = archive.entries().map_err(UnpackError::Read)?;
    for entry in entries {
        let entry = match entry {
            Ok(entry) => entry,
            Err(_) if over() => return Err(state.too_large()),
            Err(error) => return Err(UnpackError::Read(error)),
        };
        match state.entry(entry) {
            Err(UnpackError::Make { .. }) if over() => return Err(state.too_large()),
            other => other?,
        }
    }
    if state.entries == 0 { Err(UnpackError::Empty) } else { Ok(state.skipped) }
}

struct Unpacker<'a> {
    tree: Tree,
    limits: &'a UnpackLimits,
    by_ratio: u64,
    most: u64,
    bytes: u64,
    entries: u64,
    skipped: u64,
    watch: &'a mut dyn FnMut(u64) -> bool,
}

/// A name fit for a message.
fn shown(path: &Path) -> String {
    path.to_string_lossy().chars().filter(|c| !c.is_control()).take(200).collect()
}

/// An archive's name as a path below the root: no `..`, not absolute; empty for the root itself.
fn relative(path: &Path, depth: usize) -> Result<PathBuf, UnpackError> {
    let refuse = |why| UnpackError::Name { name: shown(path), why };
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::CurDir => {}
            Component::Normal(name) if name.as_bytes().contains(&0) => {
                return Err(refuse("a NUL byte in the name"));
            }
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => return Err(refuse("`..` in the name")),
            Component::RootDir | Component::Prefix(_) => return Err(refuse("an absolute name")),
        }
    }
    if clean.components().count() > depth {
        return Err(refuse("too deep"));
    }
    if clean.file_name().is_some_and(|name| name.as_bytes().starts_with(b".wh.")) {
        return Err(refuse(
            "a mark of a container layer: export the whole file system, such as by `docker export`",
        ));
    }
    Ok(clean)
}

impl Unpacker<'_> {
    fn too_large(&self) -> UnpackError {
        if self.by_ratio < self.limits.bytes.as_bytes() {
            UnpackError::Ratio(self.limits.ratio)
        } else {
            UnpackError::TooLarge(self.limits.bytes)
        }
    }

    fn entry<R: Read>(&mut self, mut entry: Entry<'_, R>) -> Result<(), UnpackError> {
        let kind = entry.header().entry_type();
        if matches!(kind, EntryType::XGlobalHeader) {
            return Ok(());
        }
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(UnpackError::TooMany(self.limits.entries));
        }
        if !(self.watch)(self.bytes) {
            return Err(UnpackError::Cancelled);
        }
        let name = entry.path().map_err(UnpackError::Read)?.into_owned();
        let path = relative(&name, self.limits.depth)?;
        let make = |source| UnpackError::Make { name: shown(&name), source };
        let refuse = |what| UnpackError::Kind { name: shown(&name), what };
        if path.as_os_str().is_empty() {
            return if kind.is_dir() {
                Ok(())
            } else {
                Err(refuse("something else than a directory in place of /"))
            };
        }
        let attributes = Attributes::of(&entry).map_err(UnpackError::Read)?;
        match kind {
            EntryType::Directory => self.directory(&path, &attributes).map_err(make),
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                self.file(&mut entry, &path, &name, &attributes)
            }
            EntryType::Symlink => {
                let target = target(&entry, &name)?;
                let place = self.tree.place(&path).map_err(make)?;
                symlink(&place, &target, &attributes).map_err(make)
            }
            EntryType::Link => {
                let target = relative(&target(&entry, &name)?, self.limits.depth)?;
                self.hard_link(&path, &target).map_err(make)
            }
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                if kind != EntryType::Fifo && !path.starts_with("dev") {
                    return Err(refuse("a device outside /dev"));
                }
                self.skipped += 1;
                Ok(())
            }
            _ => Err(refuse("of a kind no file system has")),
        }
    }

    fn directory(&self, path: &Path, attributes: &Attributes) -> io::Result<()> {
        let place = self.tree.place(path)?;
        // A link to a directory, such as /bin, may stand where an archive names one again.
        if matches!(place.kind()?, Some(FileType::Symlink)) && self.tree.make_directories(path).is_ok() {
            return Ok(());
        }
        match rustix::fs::mkdirat(&place.directory, &place.name, Mode::from_raw_mode(0o700)) {
            Ok(()) => {}
            Err(Errno::EXIST) if place.kind()? == Some(FileType::Directory) => {}
            Err(error) => return Err(error.into()),
        }
        attributes.apply(&place, false)
    }

    fn file<R: Read>(
        &mut self,
        entry: &mut Entry<'_, R>,
        path: &Path,
        name: &Path,
        attributes: &Attributes,
    ) -> Result<(), UnpackError> {
        let make = |source| UnpackError::Make { name: shown(name), source };
        // What the header claims is refused early; what comes is counted all the same.
        if self.bytes.saturating_add(entry.size()) > self.most {
            return Err(self.too_large());
        }
        let place = self.tree.place(path).map_err(make)?;
        place.clear().map_err(make)?;
        let mut file = place.create(0o600).map_err(make)?;
        let mut buffer = vec![0; COPY_BUFFER];
        loop {
            let count = match entry.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(make(error)),
            };
            self.bytes = self.bytes.saturating_add(count as u64);
            if self.bytes > self.most {
                return Err(self.too_large());
            }
            if !(self.watch)(self.bytes) {
                return Err(UnpackError::Cancelled);
            }
            file.write_all(buffer.get(..count).unwrap_or_default()).map_err(make)?;
        }
        attributes.apply(&place, false).map_err(make)
    }

    fn hard_link(&self, path: &Path, target: &Path) -> io::Result<()> {
        let from = self.tree.place(target)?;
        if from.kind()? == Some(FileType::Directory) {
            return Err(io::Error::other("a hard link to a directory"));
        }
        let to = self.tree.place(path)?;
        if path != target {
            to.clear()?;
            rustix::fs::linkat(&from.directory, &from.name, &to.directory, &to.name, AtFlags::empty())?;
        }
        Ok(())
    }
}

fn target<R: Read>(entry: &Entry<'_, R>, name: &Path) -> Result<PathBuf, UnpackError> {
    let target = entry.link_name().map_err(UnpackError::Read)?.unwrap_or_default().into_owned();
    let length = target.as_os_str().len();
    if length == 0 || length > MAX_TARGET || target.as_os_str().as_bytes().contains(&0) {
        return Err(UnpackError::Name { name: shown(name), why: "a link without a usable target" });
    }
    Ok(target)
}

/// A link's target is the guest's business: nothing here follows it beyond the root.
fn symlink(place: &Place, target: &Path, attributes: &Attributes) -> io::Result<()> {
    place.clear()?;
    rustix::fs::symlinkat(target, &place.directory, &place.name)?;
    attributes.apply(place, true)
}

/// Owner, mode and time of an entry.
struct Attributes {
    owner: u32,
    group: u32,
    mode: u32,
    time: i64,
}

impl Attributes {
    fn of<R: Read>(entry: &Entry<'_, R>) -> io::Result<Self> {
        let header = entry.header();
        // The last value, (uid_t)-1, means "leave as it is" to chown.
        let id = |id: u64| u32::try_from(id).ok().filter(|id| *id != u32::MAX).unwrap_or(0);
        Ok(Self {
            owner: id(header.uid()?),
            group: id(header.gid()?),
            mode: header.mode()? & 0o7777,
            time: i64::try_from(header.mtime()?).unwrap_or(0).clamp(0, 0xffff_ffff),
        })
    }

    fn apply(&self, place: &Place, link: bool) -> io::Result<()> {
        let (at, name) = (&place.directory, &place.name);
        if rustix::process::geteuid().is_root() {
            let (owner, group) = (Uid::from_raw(self.owner), Gid::from_raw(self.group));
            rustix::fs::chownat(at, name, Some(owner), Some(group), AtFlags::SYMLINK_NOFOLLOW)?;
        }
        if !link {
            // After the owner, whose change takes set-id bits away. The name was just made by us and is no link.
            rustix::fs::chmodat(at, name, Mode::from_raw_mode(self.mode), AtFlags::empty())?;
        }
        let time = Timespec { tv_sec: self.time, tv_nsec: 0 };
        let times = Timestamps { last_access: time, last_modification: time };
        Ok(rustix::fs::utimensat(at, name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
    }
}

#[cfg(test)]
mod tests;
