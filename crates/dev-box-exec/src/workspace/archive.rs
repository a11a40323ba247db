//! Trees as tar streams (ustar with GNU long names and sparse files): out of a guest, hostile, and into one.
//!
//! Unpacking reads block by block, in constant memory: names have a bound before they are read, counts and bytes a limit.
//! Everything is opened beneath the destination and no link is followed, neither one the archive brought nor one that
//! was there. FIFOs, devices, hard links, and names that climb out are refused, each by itself; set-id bits are dropped.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{self, FileType, Gid, Mode, Uid};
use rustix::io::Errno;
use tar::{EntryType, GnuExtSparseHeader, Header};

use super::attributes;
use super::beneath::{self, PATH_MAX};
use super::limits::Tally;
use super::place::{self, DirError, Pending, Placed, Replace};
use super::{LimitReached, Limits, Owner, Refusal, Refused, Stop};

const BLOCK: usize = 512;

/// How many refusals are kept by name.
const REFUSED: usize = 100;

/// Extents of one sparse file.
const EXTENTS: usize = 100_000;

/// What was unpacked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Regular files.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Symbolic links; they may lead anywhere.
    pub links: u64,
    /// Bytes of contents, holes left out.
    pub bytes: u64,
    /// What was not taken, the first hundred of it.
    pub refused: Vec<Refused>,
    /// How many were not taken altogether.
    pub refusals: u64,
}

/// What was packed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Packed {
    /// Files, directories and links.
    pub entries: u64,
    /// Bytes of contents.
    pub bytes: u64,
    /// What was left out, the first hundred of it.
    pub refused: Vec<Refused>,
    /// How many were left out altogether.
    pub refusals: u64,
}

/// Why a tree did not come over as a whole.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArchiveError {
    /// The stream broke off, or reading it failed.
    #[error("the archive cannot be read")]
    Read(#[source] io::Error),
    /// These bytes are no archive that this reads.
    #[error("not an archive as an agent makes it: {0}")]
    Malformed(&'static str),
    /// Too much of it. What was unpacked before stays.
    #[error("the tree has {0}")]
    Limit(#[from] LimitReached),
    /// Something of the host's could not be read or written.
    #[error("cannot {what} {}", path.display())]
    Host {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The other end takes no more.
    #[error("the archive cannot be sent")]
    Send(#[source] io::Error),
    /// Nobody wants it any more.
    #[error("stopped")]
    Stopped,
}

/// Unpacks a guest's archive into a directory, which is made when it is not there. Blocks.
///
/// Everything belongs to `owner` then; to this process's user where that is not given.
///
/// # Errors
/// [`ArchiveError`]; what was unpacked before stays.
pub fn unpack(
    from: impl Read,
    into: &Path,
    limits: &Limits,
    owner: Option<Owner>,
    stop: &Stop,
) -> Result<Unpacked, ArchiveError> {
    let host = |source: io::Error| ArchiveError::Host { what: "make", path: into.to_owned(), source };
    std::fs::create_dir_all(into).map_err(host)?;
    let root = beneath::open_root(into).map_err(|errno| host(errno.into()))?;
    let mut unpacker = Unpacker {
        blocks: Blocks { from, left: limits.bytes, most: limits.bytes },
        root,
        into,
        owner,
        tally: Tally::new(*limits),
        done: Unpacked::default(),
        number: 0,
    };
    while !stop.is_stopped() {
        if !unpacker.entry()? {
            return Ok(unpacker.done);
        }
    }
    Err(ArchiveError::Stopped)
}

struct Unpacker<'a, R> {
    blocks: Blocks<R>,
    root: OwnedFd,
    into: &'a Path,
    owner: Option<Owner>,
    tally: Tally,
    done: Unpacked,
    number: u64,
}

/// An entry that is taken by its kind and name.
enum Content {
    File { size: u64, extents: Option<Vec<(u64, u64)>>, stored: u64 },
    Directory,
    Link(Vec<u8>),
}

impl<R: Read> Unpacker<'_, R> {
    /// The next entry; false at the end.
    fn entry(&mut self) -> Result<bool, ArchiveError> {
        let (mut long_name, mut long_link) = (None, None);
        let header = loop {
            let Some(header) = self.blocks.header()? else { return Ok(false) };
            match header.entry_type() {
                EntryType::GNULongName => long_name = Some(self.blocks.name(size(&header)?)?),
                EntryType::GNULongLink => long_link = Some(self.blocks.name(size(&header)?)?),
                EntryType::XHeader | EntryType::XGlobalHeader => {
                    return Err(ArchiveError::Malformed("it has pax headers"));
                }
                _ => break header,
            }
        };
        let name = long_name.unwrap_or_else(|| header.path_bytes().into_owned());
        let stored = size(&header)?;
        let Some(path) = inside(&name) else {
            self.refuse(Path::new(OsStr::from_bytes(&name)), Refusal::LeadsOut);
            self.blocks.skip(stored)?;
            return Ok(true);
        };
        self.tally.entry(&path, u32::try_from(path.components().count()).unwrap_or(u32::MAX))?;
        let link = || {
            long_link.or_else(|| header.link_name_bytes().map(|name| name.into_owned())).unwrap_or_default()
        };
        let content = match header.entry_type() {
            EntryType::Regular | EntryType::Continuous => {
                Ok(Content::File { size: stored, extents: None, stored })
            }
            EntryType::GNUSparse => {
                let (size, extents) = self.blocks.extents(&header, stored)?;
                Ok(Content::File { size, extents: Some(extents), stored })
            }
            EntryType::Directory => Ok(Content::Directory),
            EntryType::Symlink => Ok(Content::Link(link())),
            // A socket, which tar has no type for, is a FIFO whose mode says so.
            EntryType::Fifo if is_socket(&header) => Err(Refusal::Socket),
            EntryType::Fifo => Err(Refusal::Fifo),
            EntryType::Char | EntryType::Block => Err(Refusal::Device),
            EntryType::Link => Err(Refusal::HardLink),
            _ => return Err(ArchiveError::Malformed("an entry of unknown type")),
        };
        let mode = header.mode().unwrap_or(0o644) & 0o777;
        match content {
            Ok(Content::File { size, extents, stored }) => {
                self.tally.file_size(size)?;
                let begun = self.blocks.left;
                let placed = self.file(&path, mode, size, extents.as_deref(), stored)?;
                // What was not read of a refused one.
                let read = begun - self.blocks.left;
                self.blocks.skip_rest(stored, read)?;
                self.settle(&path, placed, |done| {
                    done.files += 1;
                    done.bytes += stored;
                });
            }
            Ok(Content::Directory) => {
                self.blocks.skip(stored)?;
                let made = self.directory(&path, mode);
                let made = self.system(&path, made)?;
                self.settle(&path, made, |done| done.directories += 1);
            }
            Ok(Content::Link(target)) => {
                self.blocks.skip(stored)?;
                let placed = match dev_box_comm::share::check_symlink(&target) {
                    Ok(()) => self.link(&path, &target),
                    Err(_) => Err(Refusal::BadTarget.into()),
                };
                let placed = self.system(&path, placed)?;
                self.settle(&path, placed, |done| done.links += 1);
            }
            Err(refusal) => {
                self.refuse(&path, refusal);
                self.blocks.skip(stored)?;
            }
        }
        Ok(true)
    }

    fn settle(&mut self, path: &Path, placed: Result<(), Refusal>, count: impl FnOnce(&mut Unpacked)) {
        match placed {
            Ok(()) => count(&mut self.done),
            Err(refusal) => self.refuse(path, refusal),
        }
    }

    fn refuse(&mut self, path: &Path, why: Refusal) {
        self.done.refusals += 1;
        note(&mut self.done.refused, path, why);
    }

    /// What concerns one entry is its refusal; what concerns the disk ends all.
    fn system<T>(&self, path: &Path, done: Result<T, Obstacle>) -> Result<Result<T, Refusal>, ArchiveError> {
        match done {
            Ok(done) => Ok(Ok(done)),
            Err(Obstacle::Refusal(refusal)) => Ok(Err(refusal)),
            Err(Obstacle::System(errno @ (Errno::NOSPC | Errno::DQUOT | Errno::IO | Errno::ROFS))) => {
                Err(ArchiveError::Host { what: "write", path: self.into.join(path), source: errno.into() })
            }
            Err(Obstacle::System(errno)) => Ok(Err(errno.into())),
        }
    }

    fn parent<'p>(&self, path: &'p Path) -> Result<(OwnedFd, &'p OsStr), Obstacle> {
        let name = path.file_name().ok_or(Refusal::LeadsOut)?;
        let (dir, _) = place::make_dirs(&self.root, path.parent().unwrap_or(Path::new("")), self.owner)?;
        Ok((dir, name))
    }

    /// A name for what is not whole yet.
    fn temporary(&mut self) -> std::ffi::OsString {
        self.number += 1;
        format!(".dev-box-{}-{}", std::process::id(), self.number).into()
    }

    fn file(
        &mut self,
        path: &Path,
        mode: u32,
        size: u64,
        extents: Option<&[(u64, u64)]>,
        stored: u64,
    ) -> Result<Result<(), Refusal>, ArchiveError> {
        let temporary = self.temporary();
        let parent = self.parent(path);
        let (dir, name) = match self.system(path, parent)? {
            Ok(parent) => parent,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let made = Pending::file(&dir, temporary).map_err(Obstacle::from);
        let (pending, fd) = match self.system(path, made)? {
            Ok(made) => made,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let mut file = File::from(fd);
        let whole = [(0, stored)];
        let extents = extents.unwrap_or(&whole);
        let failed =
            |source: io::Error| ArchiveError::Host { what: "write", path: self.into.join(path), source };
        for &(at, length) in extents {
            file.seek(SeekFrom::Start(at)).map_err(failed)?;
            self.blocks.copy(length, &mut file).map_err(|error| match error {
                Copied::Read(error) => error,
                Copied::Write(source) => failed(source),
            })?;
        }
        // Also where a hole comes last.
        file.set_len(size).map_err(failed)?;
        let finished = (|| {
            fs::fchmod(&file, Mode::from_raw_mode(mode))?;
            if let Some(owner) = self.owner {
                fs::fchown(&file, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))?;
            }
            settled(&pending.place(name, Replace::Anything, "guest")?)
        })();
        self.system(path, finished)
    }

    fn directory(&self, path: &Path, mode: u32) -> Result<(), Obstacle> {
        let (dir, _) = place::make_dirs(&self.root, path, self.owner)?;
        // Its own entries come after it.
        fs::fchmod(&dir, Mode::from_raw_mode(mode | 0o700))?;
        Ok(())
    }

    fn link(&mut self, path: &Path, target: &[u8]) -> Result<(), Obstacle> {
        let temporary = self.temporary();
        let (dir, name) = self.parent(path)?;
        settled(&Pending::link(&dir, temporary, target, self.owner)?.place(
            name,
            Replace::Anything,
            "guest",
        )?)
    }
}

fn settled(placed: &Placed) -> Result<(), Obstacle> {
    match placed {
        Placed::Done => Ok(()),
        // A directory is in its place, and stays.
        Placed::Beside(_) => Err(Refusal::BlockedByDestination.into()),
    }
}

/// Why one entry is not there.
enum Obstacle {
    Refusal(Refusal),
    System(Errno),
}

impl From<Errno> for Obstacle {
    fn from(errno: Errno) -> Self {
        Self::System(errno)
    }
}

impl From<Refusal> for Obstacle {
    fn from(refusal: Refusal) -> Self {
        Self::Refusal(refusal)
    }
}

impl From<DirError> for Obstacle {
    fn from(error: DirError) -> Self {
        match error {
            DirError::Blocked => Self::Refusal(Refusal::BlockedByDestination),
            DirError::System(errno) => Self::System(errno),
        }
    }
}

enum Copied {
    Read(ArchiveError),
    Write(io::Error),
}

/// The archive's blocks, and how many bytes of contents may still come.
struct Blocks<R> {
    from: R,
    left: u64,
    most: u64,
}

impl<R: Read> Blocks<R> {
    fn block(&mut self, block: &mut [u8; BLOCK]) -> Result<(), ArchiveError> {
        self.from.read_exact(block).map_err(ArchiveError::Read)
    }

    /// The next header; `None` at the end.
    fn header(&mut self) -> Result<Option<Header>, ArchiveError> {
        let mut header = Header::new_old();
        self.block(header.as_mut_bytes())?;
        if header.as_bytes().iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        // The sum is made with its own field blank.
        let sum: u32 =
            header.as_bytes().iter().enumerate().fold(0, |sum, (at, &byte)| {
                sum + u32::from(if (148..156).contains(&at) { b' ' } else { byte })
            });
        if header.cksum().ok() != Some(sum) {
            return Err(ArchiveError::Malformed("a header's check sum is wrong"));
        }
        Ok(Some(header))
    }

    fn spend(&mut self, bytes: u64) -> Result<(), ArchiveError> {
        self.left = self.left.checked_sub(bytes).ok_or(LimitReached::Bytes(self.most))?;
        Ok(())
    }

    /// The content of an entry that is a name.
    fn name(&mut self, size: u64) -> Result<Vec<u8>, ArchiveError> {
        let size = usize::try_from(size).ok().filter(|&size| size <= PATH_MAX + 1);
        let size = size.ok_or(ArchiveError::Malformed("a name longer than any path"))?;
        let mut name = vec![0; size.next_multiple_of(BLOCK)];
        self.from.read_exact(&mut name).map_err(ArchiveError::Read)?;
        name.truncate(size);
        let end = name.iter().position(|&byte| byte == 0).unwrap_or(size);
        name.truncate(end);
        Ok(name)
    }

    /// The size of a sparse file, and where its stored bytes belong.
    fn extents(&mut self, header: &Header, stored: u64) -> Result<(u64, Vec<(u64, u64)>), ArchiveError> {
        let malformed = ArchiveError::Malformed("a sparse file's map makes no sense");
        let Some(gnu) = header.as_gnu() else { return Err(malformed) };
        let Ok(size) = gnu.real_size() else { return Err(malformed) };
        let mut extents: Vec<(u64, u64)> = Vec::new();
        let (mut end, mut sum) = (0u64, 0u64);
        let mut add = |sparse: &tar::GnuSparseHeader| -> Option<()> {
            if sparse.is_empty() {
                return Some(());
            }
            let (at, length) = (sparse.offset().ok()?, sparse.length().ok()?);
            (at >= end && extents.len() < EXTENTS).then_some(())?;
            end = at.checked_add(length)?;
            sum = sum.checked_add(length)?;
            extents.push((at, length));
            Some(())
        };
        let mut fits = gnu.sparse.iter().all(|sparse| add(sparse).is_some());
        let mut more = gnu.is_extended();
        while more && fits {
            let mut extension = GnuExtSparseHeader::new();
            self.from.read_exact(extension.as_mut_bytes()).map_err(ArchiveError::Read)?;
            fits = extension.sparse().iter().all(|sparse| add(sparse).is_some());
            more = extension.is_extended();
        }
        if fits && end <= size && sum == stored { Ok((size, extents)) } else { Err(malformed) }
    }

    /// Copies so many bytes of content.
    fn copy(&mut self, length: u64, to: &mut impl Write) -> Result<(), Copied> {
        self.spend(length).map_err(Copied::Read)?;
        let mut buffer = [0; 64 << 10];
        let mut left = length;
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
            let part = buffer.get_mut(..want).unwrap_or_default();
            self.from.read_exact(part).map_err(|error| Copied::Read(ArchiveError::Read(error)))?;
            to.write_all(part).map_err(Copied::Write)?;
            left -= want as u64;
        }
        Ok(())
    }

    /// Skips content and its padding.
    fn skip(&mut self, size: u64) -> Result<(), ArchiveError> {
        self.skip_rest(size, 0)
    }

    /// Skips what was not read of content, and its padding.
    fn skip_rest(&mut self, size: u64, read: u64) -> Result<(), ArchiveError> {
        let rest = size - read.min(size);
        self.spend(rest)?;
        let padding = size.next_multiple_of(BLOCK as u64) - size;
        let wanted = rest + padding;
        let skipped =
            io::copy(&mut self.from.by_ref().take(wanted), &mut io::sink()).map_err(ArchiveError::Read)?;
        if skipped == wanted { Ok(()) } else { Err(ArchiveError::Read(io::ErrorKind::UnexpectedEof.into())) }
    }
}

fn is_socket(header: &Header) -> bool {
    header.mode().is_ok_and(|mode| FileType::from_raw_mode(mode) == FileType::Socket)
}

fn size(header: &Header) -> Result<u64, ArchiveError> {
    let size = header.entry_size().ok().filter(|&size| size <= i64::MAX as u64);
    size.ok_or(ArchiveError::Malformed("an entry's size makes no sense"))
}

/// The path of an entry, if it has only names in it and is none of the root's own.
fn inside(name: &[u8]) -> Option<PathBuf> {
    let mut path = PathBuf::new();
    for part in Path::new(OsStr::from_bytes(name)).components() {
        match part {
            Component::Normal(part) => path.push(part),
            Component::CurDir => {}
            _ => return None,
        }
    }
    (!path.as_os_str().is_empty() && !name.contains(&0)).then_some(path)
}

fn note(refused: &mut Vec<Refused>, path: &Path, why: Refusal) {
    if refused.len() < REFUSED {
        refused.push(Refused { path: path.to_owned(), why });
    }
}

/// Writes the content of a directory of the host's as an archive: links as such, what is neither that nor file nor directory left
/// out. Blocks.
///
/// # Errors
/// [`ArchiveError`].
pub fn pack(dir: &Path, to: impl Write, limits: &Limits, stop: &Stop) -> Result<Packed, ArchiveError> {
    let mut packer = Packer {
        archive: tar::Builder::new(to),
        dir,
        limits,
        tally: Tally::new(*limits),
        done: Packed::default(),
    };
    packer.archive.follow_symlinks(false);
    packer.directory(Path::new(""), 0, stop)?;
    packer.archive.into_inner().and_then(|mut to| to.flush()).map_err(ArchiveError::Send)?;
    Ok(packer.done)
}

struct Packer<'a, W: Write> {
    archive: tar::Builder<W>,
    dir: &'a Path,
    limits: &'a Limits,
    tally: Tally,
    done: Packed,
}

impl<W: Write> Packer<'_, W> {
    fn directory(&mut self, relative: &Path, depth: u32, stop: &Stop) -> Result<(), ArchiveError> {
        let dir = self.dir.join(relative);
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| ArchiveError::Host { what, path, source }
        };
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&dir).map_err(failed("list", &dir))? {
            names.push(entry.map_err(failed("list", &dir))?.file_name());
        }
        names.sort();
        for name in names {
            if stop.is_stopped() {
                return Err(ArchiveError::Stopped);
            }
            let (inside, path) = (relative.join(&name), dir.join(&name));
            let meta = path.symlink_metadata().map_err(failed("read", &path))?;
            let kind = meta.file_type();
            // Another end of a FIFO or a device than the one here would be none.
            if !kind.is_symlink()
                && let Err(why) = attributes::refuse_type(FileType::from_raw_mode(meta.mode()))
            {
                self.done.refusals += 1;
                note(&mut self.done.refused, &inside, why);
                continue;
            }
            self.tally.entry(&inside, depth)?;
            if kind.is_file() {
                self.done.bytes += meta.len();
                if self.done.bytes > self.limits.bytes {
                    return Err(LimitReached::Bytes(self.limits.bytes).into());
                }
            }
            self.done.entries += 1;
            // Of the file or of the connection: the error does not say which.
            self.archive.append_path_with_name(&path, &inside).map_err(failed("send", &path))?;
            if kind.is_dir() {
                self.directory(&inside, depth + 1, stop)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
