//! Counting a tree against its limits, and stopping half-way.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::beneath::PATH_MAX;
use super::{LimitReached, Limits};

/// Tells blocking work to stop. Clones share the flag.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Makes the work end with an error as soon as it looks.
    pub fn stop(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was told to stop.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a walk has seen so far.
#[derive(Debug)]
pub(super) struct Tally {
    limits: Limits,
    entries: u64,
    path_bytes: u64,
}

impl Tally {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, entries: 0, path_bytes: 0 }
    }

    /// How many names a directory may still have: what is listed is memory, too.
    pub(super) fn room(&self) -> u64 {
        self.limits.entries.saturating_sub(self.entries)
    }

    pub(super) fn too_many(&self) -> LimitReached {
        LimitReached::Entries(self.limits.entries)
    }

    /// Takes one more entry into account.
    pub(super) fn entry(&mut self, path: &Path, depth: u32) -> Result<(), LimitReached> {
        let bytes = path.as_os_str().len();
        if bytes > PATH_MAX {
            return Err(LimitReached::PathLength(PATH_MAX));
        }
        self.entries += 1;
        self.path_bytes += bytes as u64;
        if self.entries > self.limits.entries {
            return Err(self.too_many());
        }
        if self.path_bytes > self.limits.path_bytes {
            return Err(LimitReached::PathBytes(self.limits.path_bytes));
        }
        if depth > self.limits.depth {
            return Err(LimitReached::Depth(self.limits.depth));
        }
        Ok(())
    }

    pub(super) fn file_size(&self, size: u64) -> Result<(), LimitReached> {
        if size > self.limits.file_size { Err(LimitReached::FileSize(self.limits.file_size)) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_is_kept() {
        let limits = Limits { entries: 2, depth: 1, bytes: 0, file_size: 10, path_bytes: 8 };
        let mut tally = Tally::new(limits);
        assert_eq!(tally.room(), 2);
        tally.entry(Path::new("abcd"), 1).unwrap();
        assert_eq!(tally.entry(Path::new("abcde"), 0), Err(LimitReached::PathBytes(8)));
        assert_eq!(tally.entry(Path::new("a"), 0), Err(LimitReached::Entries(2)));
        assert_eq!(tally.room(), 0);
        assert_eq!(Tally::new(limits).entry(Path::new("a"), 2), Err(LimitReached::Depth(1)));
        let long = "x".repeat(PATH_MAX + 1);
        assert_eq!(Tally::new(limits).entry(Path::new(&long), 0), Err(LimitReached::PathLength(PATH_MAX)));
        assert_eq!(tally.file_size(10), Ok(()));
        assert_eq!(tally.file_size(11), Err(LimitReached::FileSize(10)));
    }
}
