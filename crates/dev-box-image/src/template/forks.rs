//! Templates of forks: the moment of a VM that goes on, kept for as long as VMs lie on it.
//!
//! ```text
//!  ROOT/forks/NAME/   as in ROOT/templates, and while it is made:
//!    moment           the whole machine, memory too, as QEMU wrote it while the VM stood still
//!    disk.qcow2       a copy of the VM's own, which the VM goes on writing to
//!
//!  staging --publish--> held by its maker --let go, and no clone lives--> gone
//! ```
//! Nobody looks one up by its name. It ends with its clones, and those do not outlive the host's next start: so nothing of it is
//! written out for certain, and its files are known again by their sizes and times.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::ioctl_ficlone;

use super::seal::{self, Seal};
use super::{LOCKS, TemplateError, TemplateStaging, TemplateStore, io};
use crate::lock::Lock;
use crate::name::ImageName;

const FORKS: &str = "forks";
const MOMENT: &str = "moment";
/// Whoever forgets a lock has it for a moment: how often, and how long, it is waited for.
const LOCK_INTERVAL: Duration = Duration::from_millis(1);
const LOCK_PATIENCE: Duration = Duration::from_secs(30);

/// Keeps a template while nothing lies on it yet.
#[derive(Debug)]
pub struct TemplateHold {
    _disk: Lock,
}

impl TemplateStaging {
    /// Where QEMU writes the whole machine.
    #[must_use]
    pub fn moment(&self) -> PathBuf {
        self.staging.path().join(MOMENT)
    }

    /// As [`Self::prepare`], with the file for the whole machine.
    ///
    /// # Errors
    /// [`TemplateError::Io`].
    pub fn prepare_fork(&self, memory: u64, uid: u32, gid: u32) -> Result<(), TemplateError> {
        self.prepare(memory, uid, gid)?;
        Self::prepare_file(&self.moment(), 0, uid, gid)
    }

    /// Takes a copy of a disk that nobody writes to meanwhile: shared where the file system can, else without its holes.
    ///
    /// # Errors
    /// [`TemplateError::Io`].
    pub fn copy_disk(&self, from: &Path, gid: u32) -> Result<(), TemplateError> {
        let to = self.disk();
        copy(from, &to).map_err(io("copy", from))?;
        Self::take_back(&to, gid)
    }

    /// As [`Self::seal`], of what is kept for a short time. The whole machine's file goes: memory and devices are there.
    ///
    /// # Errors
    /// [`TemplateError::Io`].
    pub fn seal_fork(&self, gid: u32) -> Result<([Seal; 3], TemplateHold), TemplateError> {
        let moment = self.moment();
        fs::remove_file(&moment).map_err(io("remove", &moment))?;
        let seal = |path: PathBuf| {
            Self::take_back(&path, gid)?;
            Seal::unread(&path).map_err(io("look at", &path))
        };
        let disk = self.disk();
        let hold = Lock::try_shared(&disk).map_err(io("lock", &disk))?;
        let hold = hold.ok_or_else(|| TemplateError::Busy(self.name.clone()))?;
        Ok(([seal(self.ram())?, seal(self.state())?, seal(disk)?], TemplateHold { _disk: hold }))
    }
}

impl TemplateStore {
    /// The forks under a state root. Makes what directories are missing.
    ///
    /// # Errors
    /// [`TemplateError::Io`].
    pub fn forks(root: impl Into<PathBuf>) -> Result<Self, TemplateError> {
        Self::open_in(root.into(), FORKS)
    }

    /// The forks under a state root, where there ever was one: looking makes nothing.
    #[must_use]
    pub fn existing_forks(root: impl Into<PathBuf>) -> Option<Self> {
        let root = root.into();
        let templates = root.join(FORKS);
        templates.is_dir().then_some(Self { root, templates })
    }

    /// Begins one, as [`Self::stage`] does a template, of a name that nobody else will take.
    ///
    /// # Errors
    /// As there.
    pub fn stage_fork(&self, name: &ImageName) -> Result<TemplateStaging, TemplateError> {
        let began = Instant::now();
        loop {
            match self.stage(name, false) {
                Err(TemplateError::Busy(_)) if began.elapsed() < LOCK_PATIENCE => {
                    std::thread::sleep(LOCK_INTERVAL);
                }
                staged => return staged,
            }
        }
    }

    /// Removes every one that nobody holds and on which nothing lies; what lay on one that goes may go, too. Returns their names.
    ///
    /// # Errors
    /// [`TemplateError::Io`], the first; the others are gone then.
    pub fn remove_unused(&self) -> Result<Vec<ImageName>, TemplateError> {
        let mut removed = Vec::new();
        let mut failed = Ok(());
        loop {
            let before = removed.len();
            for name in self.names()? {
                match self.remove(&name) {
                    Ok(()) => removed.push(name),
                    Err(TemplateError::InUse { .. } | TemplateError::Busy(_) | TemplateError::Missing(_)) => {
                    }
                    Err(error) => failed = failed.and(Err(error)),
                }
            }
            if removed.len() == before {
                break;
            }
        }
        self.forget_locks();
        failed.map(|()| removed)
    }

    /// Their names do not come again: no more do their locks.
    fn forget_locks(&self) {
        let Ok(locks) = fs::read_dir(self.templates.join(LOCKS)) else { return };
        for lock in locks.flatten() {
            let made = || self.templates.join(lock.file_name()).exists();
            // Held until it is gone: who has it by then has another file.
            if !made()
                && let Ok(Some(_alone)) = Lock::try_alone(&lock.path())
                && !made()
            {
                let _ = fs::remove_file(lock.path());
            }
        }
    }
}

/// A copy of a file that is not there yet.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let mut source = File::open(from)?;
    let mut target = File::create_new(to)?;
    if ioctl_ficlone(&target, &source).is_ok() {
        return Ok(());
    }
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut position = 0;
    while let Some((start, end)) = seal::data(&source, position)? {
        source.seek(SeekFrom::Start(start))?;
        target.seek(SeekFrom::Start(start))?;
        let copied = io::copy(&mut source.by_ref().take(end - start), &mut target)?;
        if copied != end - start {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        position = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};

    use super::*;
    use crate::overlay::Overlay;
    use crate::space::SpaceLimits;
    use crate::template::tests::{manifest, me, name};

    fn disk(path: &Path, backing: Option<&Path>) {
        let backing = backing.map_or_else(|| PathBuf::from("/nowhere/root.qcow2"), Path::to_owned);
        let size = dev_box_core::size::ByteSize::gib(1);
        fs::write(path, crate::qcow2::empty_overlay(&backing, size).unwrap().0).unwrap();
    }

    fn fork(store: &TemplateStore, name_: &str, of: &Path) -> (super::super::Template, TemplateHold) {
        let staged = store.stage(&name(name_), false).unwrap();
        staged.prepare_fork(1 << 20, me().0, me().1).unwrap();
        staged.copy_disk(of, me().1).unwrap();
        let (seals, hold) = staged.seal_fork(me().1).unwrap();
        (store.publish(staged, &manifest(name_, seals)).unwrap(), hold)
    }

    #[test]
    fn a_fork_lives_as_long_as_what_lies_on_it() {
        let root = tempfile::tempdir().unwrap();
        assert!(TemplateStore::existing_forks(root.path()).is_none());
        let store = TemplateStore::forks(root.path()).unwrap();
        let vms = root.path().join("vms/a");
        fs::create_dir_all(&vms).unwrap();
        let original = vms.join("overlay.qcow2");
        disk(&original, None);
        let (first, hold) = fork(&store, "fork-1", &original);
        assert!(!first.dir.join(MOMENT).exists());
        first.verify().unwrap();
        assert!(store.remove_unused().unwrap().is_empty(), "its maker holds it");

        // A fork of a clone lies on it, too, also while nobody has it open.
        let clone = root.path().join("vms/b.qcow2");
        drop(Overlay::create_within(&first.disk(), &clone, None, &SpaceLimits::default()).unwrap());
        let (second, next) = fork(&store, "fork-2", &clone);
        drop((hold, next));
        let last = root.path().join("vms/c.qcow2");
        drop(Overlay::create_within(&second.disk(), &last, None, &SpaceLimits::default()).unwrap());
        fs::remove_file(&clone).unwrap();
        assert!(store.remove_unused().unwrap().is_empty());
        fs::remove_file(&last).unwrap();
        assert_eq!(store.remove_unused().unwrap(), [name("fork-2"), name("fork-1")]);
        let left: Vec<_> = fs::read_dir(root.path().join(FORKS)).unwrap().flatten().collect();
        assert_eq!(left.len(), 1, "the locks' directory: {left:?}");
        assert_eq!(fs::read_dir(left[0].path()).unwrap().count(), 0);
    }

    #[test]
    fn a_fork_that_is_not_made_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let store = TemplateStore::forks(root.path()).unwrap();
        let staged = store.stage(&name("fork-1"), false).unwrap();
        staged.prepare_fork(1 << 20, me().0, me().1).unwrap();
        assert!(staged.copy_disk(&root.path().join("none"), me().1).is_err());
        assert!(store.remove_unused().unwrap().is_empty());
        drop(staged);
        store.remove_unused().unwrap();
        assert_eq!(fs::read_dir(root.path().join(FORKS)).unwrap().count(), 1);
        assert_eq!(fs::read_dir(root.path().join(FORKS).join(LOCKS)).unwrap().count(), 0);
    }

    #[test]
    fn a_lock_is_not_forgotten_under_its_holder() {
        use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
        let root = tempfile::tempdir().unwrap();
        let store = TemplateStore::forks(root.path()).unwrap();
        let (path, done) = (root.path().join(FORKS).join(LOCKS).join("fork-1"), AtomicBool::new(false));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(SeqCst) {
                        store.forget_locks();
                        std::thread::sleep(Duration::from_micros(50));
                    }
                });
            }
            let (mut went, mut failed) = (0, None);
            for _ in 0..300 {
                match store.stage_fork(&name("fork-1")) {
                    Ok(_staged) => {
                        (0..20).for_each(|_| std::thread::yield_now());
                        went += i32::from(!path.exists());
                    }
                    Err(error) => failed = Some(error),
                }
            }
            done.store(true, SeqCst);
            assert_eq!(went, 0, "under its holder");
            assert!(failed.is_none(), "{failed:?}");
        });
    }

    #[test]
    fn a_copy_has_what_the_file_has_and_its_holes() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let file = File::create_new(&from).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(b"begin", 0).unwrap();
        file.write_all_at(b"middle", 20 << 20).unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(fs::read(&from).unwrap(), fs::read(&to).unwrap());
        assert!(fs::metadata(&to).unwrap().blocks() * 512 < 1 << 20);
        assert!(copy(&from, &to).is_err(), "it is there");
    }
}
