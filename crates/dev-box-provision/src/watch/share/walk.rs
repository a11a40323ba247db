//! What is in a share, within limits. What was known before comes first: else a guest hides its files behind as many new ones as
//! are looked at.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::os::unix::fs::{DirEntryExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::SystemTime;

/// The most entries looked at.
pub(super) const MAX_ENTRIES: usize = 20_000;
/// The most names listed. A name costs a tenth of a look at what has it.
const MAX_LISTED: usize = 10 * MAX_ENTRIES;
/// The deepest directory looked into.
const MAX_DEPTH: usize = 24;

/// A file or a directory, whatever it is called: one that was moved or linked is what it was. With [`Outline::is_of`], since the number of
/// one that is gone is given to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Id {
    device: u64,
    inode: u64,
}

impl Id {
    pub(super) fn of(meta: &Metadata) -> Self {
        Self { device: meta.dev(), inode: meta.ino() }
    }
}

/// What a file looks like from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Outline {
    changed_ns: i64,
    size: u64,
    /// When it was made, where the file system knows.
    born: Option<SystemTime>,
}

impl Outline {
    pub(super) fn of(meta: &Metadata) -> Self {
        // The host kernel's own time: a guest sets the other one as it likes.
        let changed_ns = meta.ctime().saturating_mul(1_000_000_000).saturating_add(meta.ctime_nsec());
        Self { changed_ns, size: meta.size(), born: meta.created().ok() }
    }

    /// Whether a file that looked like this is the one that has its number now.
    pub(super) fn is_of(&self, now: &Self) -> bool {
        self.born == now.born
    }
}

/// Where a file is. The directory is kept once for all in it: a guest makes paths long.
#[derive(Debug)]
pub(super) struct Place {
    dir: Rc<Path>,
    name: OsString,
}

impl Place {
    pub(super) fn path(&self) -> PathBuf {
        self.dir.join(&self.name)
    }
}

/// What is there.
#[derive(Debug, Default)]
pub(super) struct Walk {
    pub(super) files: HashMap<Id, (Outline, Place)>,
    pub(super) dirs: HashSet<Id>,
    /// Something was passed over.
    pub(super) partial: bool,
    /// Directories to list.
    ahead: Vec<Dir>,
    looked_at: usize,
}

#[derive(Debug)]
struct Dir {
    path: Rc<Path>,
    device: u64,
    depth: usize,
}

/// Walks what is beneath, first of all what is `known` and where it is known. Follows no links but the roots, which are the
/// host's.
pub(super) fn walk(roots: &[impl AsRef<Path>], known: impl Fn(&Id) -> bool) -> Walk {
    let mut walk = Walk::default();
    for root in roots {
        if let Ok(meta) = fs::metadata(root) {
            walk.enter(&meta, || root.as_ref().into(), 0);
        }
    }
    // Whatever is new, with how deep it lies.
    let mut later: Vec<(Place, usize)> = Vec::new();
    let mut listed = 0;
    loop {
        if let Some(dir) = walk.ahead.pop() {
            let Ok(list) = fs::read_dir(&dir.path) else { continue };
            for entry in list.flatten() {
                listed += 1;
                if listed > MAX_LISTED {
                    walk.partial = true;
                    return walk;
                }
                let Ok(kind) = entry.file_type() else { continue };
                let id = Id { device: dir.device, inode: entry.ino() };
                // Nothing is read of another kind; and of a file's many names one is enough.
                if !kind.is_dir() && (!kind.is_file() || walk.files.contains_key(&id)) {
                    continue;
                }
                let place = Place { dir: Rc::clone(&dir.path), name: entry.file_name() };
                if known(&id) {
                    let Ok(meta) = entry.metadata() else { continue };
                    if !walk.take(&meta, place, dir.depth) {
                        return walk;
                    }
                } else if later.len() < MAX_ENTRIES {
                    later.push((place, dir.depth));
                } else {
                    walk.partial = true;
                }
            }
        } else if let Some((place, depth)) = later.pop() {
            let Ok(meta) = fs::symlink_metadata(place.path()) else { continue };
            if !walk.take(&meta, place, depth) {
                return walk;
            }
        } else {
            return walk;
        }
    }
}

impl Walk {
    /// Whether there was room for it.
    fn take(&mut self, meta: &Metadata, place: Place, depth: usize) -> bool {
        if self.looked_at == MAX_ENTRIES {
            self.partial = true;
            return false;
        }
        self.looked_at += 1;
        if meta.is_file() {
            self.files.insert(Id::of(meta), (Outline::of(meta), place));
        } else if depth < MAX_DEPTH {
            self.enter(meta, || place.path().into(), depth + 1);
        }
        true
    }

    fn enter(&mut self, meta: &Metadata, path: impl FnOnce() -> Rc<Path>, depth: usize) {
        let id = Id::of(meta);
        // Once only: what is mounted live may lie in what is mounted live.
        if meta.is_dir() && self.dirs.insert(id) {
            self.ahead.push(Dir { path: path(), device: id.device, depth });
        }
    }
}
