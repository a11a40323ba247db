//! Files in the guest. Paths are absolute and mean what they mean to the guest's root user.

use serde::{Deserialize, Serialize};

use super::WireBytes;

/// Read a file: its bytes come on lane 1, then `Done`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadFile {
    /// Which.
    pub path: WireBytes,
    /// First byte.
    #[serde(default)]
    pub offset: u64,
    /// How many at most; to the end where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub length: Option<u64>,
}

/// Write a file from lane 0; `Done` once it is in place. A reset before lane 0 was finished leaves the old file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteFile {
    /// Which.
    pub path: WireBytes,
    /// Permission bits of a new file; `0o644` where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
    /// How to write.
    #[serde(default)]
    pub how: WriteMode,
    /// Make missing parent directories.
    #[serde(default)]
    pub parents: bool,
    /// Owner by name or number; root where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Wait until it is on disk before `Done`.
    #[serde(default)]
    pub sync: bool,
}

/// How [`WriteFile`] puts bytes into a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WriteMode {
    /// Into a new file beside it, renamed over it at the end: readers see the old or the new, never half.
    #[default]
    Replace,
    /// As `Replace`, but fails when it exists.
    CreateNew,
    /// At the end of what is there.
    Append,
}

/// One path, for requests that need no more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathRequest {
    /// Which.
    pub path: WireBytes,
    /// Follow a symlink at its end.
    #[serde(default)]
    pub follow: bool,
}

/// Make a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MakeDir {
    /// Which.
    pub path: WireBytes,
    /// Permission bits; `0o755` where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
    /// Make missing parents, and accept that it exists.
    #[serde(default)]
    pub parents: bool,
    /// Owner by name or number; root where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
}

/// Move a file or directory, `rename(2)`; across filesystems it fails.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rename {
    /// From.
    pub from: WireBytes,
    /// To.
    pub to: WireBytes,
    /// Replace what is there.
    #[serde(default)]
    pub replace: bool,
}

/// Remove a file, or a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remove {
    /// Which.
    pub path: WireBytes,
    /// With everything beneath.
    #[serde(default)]
    pub recursive: bool,
    /// Accept that it is not there.
    #[serde(default)]
    pub missing_ok: bool,
}

/// Watch a directory: `Changed` messages until the stream is reset. The first has no changes: what changes from now on is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// Which.
    pub path: WireBytes,
    /// With everything beneath.
    #[serde(default)]
    pub recursive: bool,
}

/// A tree as a tar stream: `Pack` sends it on lane 1, `Unpack` takes it from lane 0; then `Done`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tree {
    /// The directory whose content the archive holds; made if absent when unpacking.
    pub path: WireBytes,
    /// Owner of everything unpacked, by name or number; as the archive says where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Most entries; the agent's own limit where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_entries: Option<u64>,
    /// Most bytes; the agent's own limit where not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
}

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A FIFO, socket or device.
    #[serde(other)]
    Other,
}

/// A file's metadata.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileStat {
    /// Kind.
    pub kind: FileKind,
    /// Size in bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    #[serde(default)]
    pub uid: u32,
    /// Group.
    #[serde(default)]
    pub gid: u32,
    /// Last change of its content: nanoseconds since 1970-01-01 UTC, by the guest's clock.
    #[serde(default)]
    pub modified_ns: i64,
    /// Where a symlink points.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub link: Option<WireBytes>,
}

/// One entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirEntry {
    /// Its name, without the directory.
    pub name: WireBytes,
    /// Its metadata.
    #[serde(flatten)]
    pub stat: FileStat,
}

/// Something changed under a watched directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// Relative to what is watched.
    pub path: WireBytes,
    /// What.
    pub kind: ChangeKind,
}

/// Kinds of change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChangeKind {
    /// New, or moved here.
    Created,
    /// Content changed.
    Modified,
    /// Gone, or moved away.
    Removed,
    /// Too many at once: list it again.
    #[serde(other)]
    Overflow,
}
