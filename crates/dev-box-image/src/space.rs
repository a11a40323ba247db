//! Room on the disk: asked for before anything is written.

use std::io;
use std::path::{Path, PathBuf};

use dev_box_core::size::ByteSize;

/// How much of the host's disk may be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpaceLimits {
    /// Bytes that stay free for the host, whatever we write.
    pub keep_free: ByteSize,
    /// The largest disk an overlay may show its guest, which is also about the most it can grow to.
    pub overlay_max: ByteSize,
}

impl Default for SpaceLimits {
    /// 1 GiB stays free; an overlay has at most 64 GiB.
    fn default() -> Self {
        Self { keep_free: ByteSize::gib(1), overlay_max: ByteSize::gib(64) }
    }
}

/// There is no room, or nobody can tell.
#[derive(Debug, thiserror::Error)]
pub enum SpaceError {
    /// Too little is free.
    #[error(
        "not enough room at {}: {needed} is needed and {kept} kept free, {free} is there; make room, or use another state root",
        .path.display()
    )]
    Full {
        /// Where.
        path: PathBuf,
        /// What the work would take.
        needed: ByteSize,
        /// What must stay free.
        kept: ByteSize,
        /// What is free.
        free: ByteSize,
    },
    /// The file system would not say.
    #[error("cannot tell how much room there is at {}", .path.display())]
    Unknown {
        /// Where.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// Bytes an unprivileged writer could still use on the file system of `path`.
///
/// # Errors
/// What statvfs(3) said.
pub fn free_at(path: &Path) -> io::Result<ByteSize> {
    let room = rustix::fs::statvfs(path)?;
    Ok(ByteSize::bytes(room.f_bavail.saturating_mul(room.f_frsize)))
}

/// Refuses work that would take `needed` bytes when that would leave less than the limits keep free.
///
/// # Errors
/// [`SpaceError`].
pub fn require(path: &Path, needed: ByteSize, limits: &SpaceLimits) -> Result<(), SpaceError> {
    let free = free_at(path).map_err(|source| SpaceError::Unknown { path: path.to_owned(), source })?;
    enough(path, needed, limits, free)
}

fn enough(path: &Path, needed: ByteSize, limits: &SpaceLimits, free: ByteSize) -> Result<(), SpaceError> {
    let kept = limits.keep_free;
    if needed.as_bytes() > free.as_bytes().saturating_sub(kept.as_bytes()) {
        return Err(SpaceError::Full { path: path.to_owned(), needed, kept, free });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_free_counts() {
        let limits = SpaceLimits { keep_free: ByteSize::gib(1), ..SpaceLimits::default() };
        let at = Path::new("/x");
        assert!(enough(at, ByteSize::gib(2), &limits, ByteSize::gib(3)).is_ok());
        let error = enough(at, ByteSize::gib(2), &limits, ByteSize::bytes((3 << 30) - 1)).unwrap_err();
        assert!(error.to_string().contains("2GiB is needed"), "{error}");
        assert!(enough(at, ByteSize::bytes(u64::MAX), &limits, ByteSize::bytes(u64::MAX)).is_err());
    }

    #[test]
    fn a_real_file_system_answers() {
        let directory = tempfile::tempdir().unwrap();
        assert!(free_at(directory.path()).unwrap().as_bytes() > 0);
        let all = SpaceLimits { keep_free: ByteSize::bytes(u64::MAX), ..SpaceLimits::default() };
        assert!(matches!(require(directory.path(), ByteSize::gib(1), &all), Err(SpaceError::Full { .. })));
        let gone = directory.path().join("gone");
        assert!(matches!(require(&gone, ByteSize::gib(1), &all), Err(SpaceError::Unknown { .. })));
    }
}
