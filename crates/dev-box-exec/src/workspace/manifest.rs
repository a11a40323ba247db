//! What was staged: the base against which changes are found.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::{Path, PathBuf};

use super::Kind;
use super::beneath::Stamp;
use super::copy::{Hash, Sum};
use super::ignored::IgnoreRules;

/// How long the kernel's clock for file times may stand still (1/HZ at its worst, with room).
pub(super) const CLOCK_STEP_NS: i128 = 20_000_000;

/// An entry as it was staged.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) kind: Kind,
    /// Permission bits.
    pub(super) mode: u32,
    /// The staged copy. Its change time is the host kernel's: a guest cannot set it.
    pub(super) staged: Stamp,
    /// Of the contents (a link: its target); not for large files and directories.
    pub(super) digest: Option<Hash>,
    /// The file it was copied from.
    pub(super) source: Stamp,
    /// Its number in the manifest.
    pub(super) index: usize,
}

/// What was put into a staging directory.
#[derive(Debug, Default)]
pub struct Manifest {
    entries: BTreeMap<PathBuf, Entry>,
    newest_ctime_ns: i128,
    pub(super) rules: IgnoreRules,
}

impl Manifest {
    /// How many files, directories and links were staged.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing was.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many of them are regular files.
    #[must_use]
    pub fn files(&self) -> u64 {
        self.entries.values().filter(|entry| entry.kind == Kind::File).count() as u64
    }

    /// One digest over all that was staged: paths, modes, sizes and contents (of files larger than 16 MiB the size only).
    #[must_use]
    pub fn digest(&self) -> String {
        let mut sum = Sum::default();
        for (path, entry) in &self.entries {
            // A directory's size is its file system's affair.
            let size = if entry.kind == Kind::Directory { 0 } else { entry.staged.size };
            sum.add(path, entry.mode, size, entry.digest.as_ref());
        }
        sum.finish()
    }

    pub(super) fn insert(&mut self, path: PathBuf, mut entry: Entry) {
        entry.index = self.entries.len();
        self.newest_ctime_ns = self.newest_ctime_ns.max(entry.staged.ctime_ns);
        self.entries.insert(path, entry);
    }

    pub(super) fn get(&self, path: &Path) -> Option<&Entry> {
        self.entries.get(path)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&PathBuf, &Entry)> {
        self.entries.iter()
    }

    /// `path` and everything below it.
    pub(super) fn at_and_below<'a>(&'a self, path: &'a Path) -> impl Iterator<Item = &'a Entry> {
        // Paths compare component by component, so what is below a directory follows it without a gap.
        self.entries
            .range::<Path, _>((Bound::Included(path), Bound::Unbounded))
            .take_while(move |(below, _)| below.starts_with(path))
            .map(|(_, entry)| entry)
    }

    /// Whether a file could have been written to after it was staged without its change time moving on.
    pub(super) fn is_racy(&self, entry: &Entry) -> bool {
        entry.staged.ctime_ns + CLOCK_STEP_NS >= self.newest_ctime_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_below_a_directory() {
        let stamp = |ctime_ns| Stamp { dev: 0, ino: 0, size: 0, mtime_ns: 0, ctime_ns };
        let mut manifest = Manifest::default();
        assert!(manifest.is_empty());
        for (at, path) in ["b", "a", "a/x", "a/x/y", "a-b", "a.c", "aa"].into_iter().enumerate() {
            let staged = stamp(at as i128 * CLOCK_STEP_NS);
            let entry = Entry { kind: Kind::File, mode: 0, staged, digest: None, source: stamp(0), index: 0 };
            manifest.insert(path.into(), entry);
        }
        assert_eq!(manifest.len(), 7);
        let below: Vec<usize> = manifest.at_and_below(Path::new("a")).map(|entry| entry.index).collect();
        assert_eq!(below, [1, 2, 3]);
        let racy: Vec<_> =
            manifest.iter().filter(|(_, entry)| manifest.is_racy(entry)).map(|(path, _)| path).collect();
        assert_eq!(racy, [Path::new("a.c"), Path::new("aa")]);
    }
}
