//! The workspace: a copy of a directory goes into a VM's 9p staging directory, and what changed comes back.
//!
//! ```text
//!   source --stage--> staging directory (9p, accessmode mapped) --mounted in the guest, unmounted--> scan --> apply
//!             |                                                                                      ^        |
//!             '-- Manifest: what was put there ------------------------------------------------------'   destination
//! ```
//!
//! The staging directory is hostile from the moment a guest has had it mounted: QEMU writes there for the guest, and a
//! guest that broke out of QEMU writes there directly. So after that, everything is opened with `openat2(2)` and
//! `RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV`, only regular files and
//! directories that belong to QEMU's user are touched, and count, depth, bytes and memory are limited. The
//! destination is opened the same way: a link in it is never followed.
//!
//! Under `accessmode='mapped'` a guest's modes, owners, links and devices are extended attributes of plain files
//! (`user.virtfs.*`, see [`dev_box_comm::share`]).
//!
//! What comes back:
//! - regular files, with the guest's permission bits (set-user-id, set-group-id and sticky are removed), its
//!   modification times and holes; hard links come back as separate files;
//! - directories; those of the destination that were there already keep their mode;
//! - symbolic links, with the target the guest gave them, **also when it leads out of the destination**: they are
//!   made, never followed, and marked [`Change::escapes`];
//! - deletions are reported; they are carried out only for `WriteBack { delete: true }`.
//!
//! What does not: FIFOs, devices, sockets (real ones and those that only the guest sees as such), files that belong
//! to somebody else, files on another filesystem. They are listed in [`Collected::refused`].

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, Serializer};

mod apply;
pub mod archive;
mod attributes;
mod beneath;
mod copy;
#[cfg(test)]
mod fixture;
mod ignored;
mod limits;
mod manifest;
mod place;
mod result_file;
mod scan;
mod stage;

pub use apply::{CollectError, Destination, apply};
pub use limits::Stop;
pub use manifest::Manifest;
pub use result_file::{MAX_RESULT_FILE, ResultFileError, read_json};
pub use scan::{HostileShare, Scan, scan};
pub use stage::{StageError, Staged, precheck, stage};

/// A user and group, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// Limits of a tree, on its way in or out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Files, directories and links.
    pub entries: u64,
    /// Directories above a file.
    pub depth: u32,
    /// Bytes copied (holes in files are not).
    pub bytes: u64,
    /// Size of one file, holes included.
    pub file_size: u64,
    /// All paths together, in bytes: what the list of entries takes of host memory.
    pub path_bytes: u64,
}

impl Default for Limits {
    /// 200,000 entries, depth 64, 8 GiB, 64 GiB for one (sparse) file, 32 MiB of paths.
    fn default() -> Self {
        Self { entries: 200_000, depth: 64, bytes: 8 << 30, file_size: 64 << 30, path_bytes: 32 << 20 }
    }
}

/// A limit that was reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LimitReached {
    /// See [`Limits::entries`].
    #[error("more than {0} files and directories")]
    Entries(u64),
    /// See [`Limits::depth`].
    #[error("directories nested deeper than {0}")]
    Depth(u32),
    /// See [`Limits::bytes`].
    #[error("more than {0} bytes of contents")]
    Bytes(u64),
    /// See [`Limits::file_size`].
    #[error("a file larger than {0} bytes")]
    FileSize(u64),
    /// See [`Limits::path_bytes`].
    #[error("paths that together take more than {0} bytes")]
    PathBytes(u64),
    /// `PATH_MAX`.
    #[error("a path longer than {0} bytes")]
    PathLength(usize),
}

/// Where what changed goes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum CollectTo {
    /// Nowhere: it is discarded with the VM.
    #[default]
    Nothing,
    /// Into this directory, made if it is not there; files of the same name are replaced.
    Directory(PathBuf),
    /// Back into the workspace. A file that changed on both sides is a conflict: the host's stays as it is and the
    /// guest's is put beside it, see [`Action::Conflict`].
    WriteBack {
        /// Whether files the guest deleted are deleted (unless they changed on the host meanwhile).
        delete: bool,
    },
}

/// A job's files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkspaceIn {
    /// The directory that is copied in; `None`: the guest gets an empty one.
    pub source: Option<PathBuf>,
    /// Whether what `.gitignore` names is left out, of the copy and of a write-back. `.git` itself goes along.
    /// A tracked file that a pattern matches is left out as well.
    pub git: bool,
    /// Where it is mounted in the guest.
    pub guest_path: PathBuf,
    /// Whom it belongs to in the guest, unless the job names a user: then it is that user's.
    pub guest_owner: Owner,
    /// Limits on the way in.
    pub limits_in: Limits,
    /// Limits on the way out.
    pub limits_out: Limits,
    /// Where what changed goes.
    pub collect: CollectTo,
    /// Whom collected files belong to: the invoking user. `None`: this process's user.
    pub owner: Option<Owner>,
    /// The file whose JSON becomes [`ExecutionResult::output`](crate::ExecutionResult::output), if the job wrote it;
    /// relative to the workspace.
    pub result_file: Option<PathBuf>,
}

impl Default for WorkspaceIn {
    /// An empty workspace at `/workspace`, owned by the guest's root, not collected.
    fn default() -> Self {
        Self {
            source: None,
            git: false,
            guest_path: PathBuf::from(dev_box_comm::share::TARGET),
            guest_owner: Owner { uid: 0, gid: 0 },
            limits_in: Limits::default(),
            limits_out: Limits::default(),
            collect: CollectTo::Nothing,
            owner: None,
            result_file: Some(PathBuf::from("result.json")),
        }
    }
}

impl WorkspaceIn {
    /// A copy of `source`, otherwise the default.
    #[must_use]
    pub fn copy_of(source: impl Into<PathBuf>) -> Self {
        Self { source: Some(source.into()), ..Self::default() }
    }
}

/// What an entry is, as the guest meant it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
}

/// How an entry differs from what was staged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ChangeKind {
    /// It was not there.
    Created,
    /// Its contents, target or mode are different, or it is of another kind.
    Modified,
    /// It is not there any more.
    Deleted,
}

/// What was done about a change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Nothing: it is only reported.
    Reported,
    /// It was brought over (or deleted).
    Applied,
    /// It changed on the host as well, or something else is in its place there: the host's was left alone. The
    /// guest's version lies beside it under this name, where there is one to keep.
    Conflict {
        /// Relative to the destination.
        #[serde(serialize_with = "optional_path")]
        kept_as: Option<PathBuf>,
    },
}

/// A difference between what was staged and what the guest left.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// Relative to the workspace. Bytes the guest chose: hostile to a terminal, perhaps not UTF-8 (in JSON replaced).
    #[serde(serialize_with = "path")]
    pub path: PathBuf,
    /// How it differs.
    pub change: ChangeKind,
    /// What it is (for a deletion: was).
    pub kind: Kind,
    /// Permission bits in the guest.
    pub mode: u32,
    /// Size in bytes; 0 for directories and deletions.
    pub size: u64,
    /// A link whose target leads out of the workspace: absolute, or by `..`. Do not follow it.
    pub escapes: bool,
    /// What was done about it.
    pub action: Action,
}

/// Why an entry was not taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// A FIFO, for the guest or for real.
    #[error("a FIFO")]
    Fifo,
    /// A socket.
    #[error("a socket")]
    Socket,
    /// A hard link inside an archive: what it leads to may be anything.
    #[error("a hard link")]
    HardLink,
    /// A name that leads out of the directory, or is none.
    #[error("its name leads out of the directory")]
    LeadsOut,
    /// A block or character device.
    #[error("a device")]
    Device,
    /// A real symbolic link: under accessmode mapped a guest's link is never one.
    #[error("a real symbolic link in the staging directory")]
    RealSymlink,
    /// It belongs to someone else than QEMU's user: no guest can have made it.
    #[error("belongs to user {uid}, not to QEMU's")]
    ForeignOwner {
        /// Whom.
        uid: u32,
    },
    /// It is on another filesystem.
    #[error("lies on another filesystem")]
    OtherFilesystem,
    /// A link whose target is empty, too long, or holds a NUL.
    #[error("a symbolic link without a usable target")]
    BadTarget,
    /// Its attributes make no sense.
    #[error("has malformed attributes")]
    BadAttributes,
    /// It changed or went away while it was read.
    #[error("changed while it was read")]
    Changed,
    /// The destination's path to it leads through a symbolic link, or through something that is not a directory.
    #[error("the way to it in the destination leads through something that is not a directory")]
    BlockedByDestination,
    /// The system refused.
    #[error("{0}")]
    System(String),
}

/// An entry that was not taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Refused {
    /// Relative to the workspace; see [`Change::path`].
    #[serde(serialize_with = "path")]
    pub path: PathBuf,
    /// Why.
    pub why: Refusal,
}

/// What collecting found and did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Collected {
    /// All differences, sorted by path.
    pub changes: Vec<Change>,
    /// What was not taken, sorted by path.
    pub refused: Vec<Refused>,
    /// Entries that were left out because `.gitignore` names them (write-back with `git` only).
    pub ignored: u64,
    /// Bytes copied.
    pub bytes: u64,
    /// One digest over all files that were copied: paths, modes, sizes and contents (of files larger than 16 MiB the size
    /// only). `None` where none was.
    pub digest: Option<String>,
}

fn path<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

fn optional_path<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    match path {
        Some(path) => serializer.serialize_some(&path.to_string_lossy()),
        None => serializer.serialize_none(),
    }
}
