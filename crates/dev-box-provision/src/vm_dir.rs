//! A VM's directory on the host, and how its owner is known to be alive.
//!
//! ```text
//! <state root>/vms/NAME/
//!   lock           held (flock) by the owning process for as long as it lives
//!   overlay.qcow2  the VM's disk, over the image's
//!   share/         what the guest sees by 9p; belongs to QEMU's user
//!   channel.sock   the control channel's host end (virtio-serial)
//!   console.log    what the guest's kernel and init print
//!   kept.json      what the next owner needs to know, see [`crate::kept`]
//! <state root>/user-vms/NAME/                                    see [`crate::user_vm`]; besides:
//!   vm.json        what the VM is
//!   console.sock   where its console can be attached to
//! ```
//!
//! The kernel drops the lock with the process, however it ends: a lock that can be had means that nobody owns the
//! directory, and [`crate::sweep`] may remove what belongs to it. A directory appears under its name only once its
//! lock is held: it is made as `.new-...` and renamed, and is removed the other way round, each time by a name that nothing
//! else has: what somebody who was killed left keeps no name in use. Whoever removes one has its lock until nothing of it is
//! left; where there is none, it is made for that, so that a maker who was only slow finds out.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dev_box_core::file_lock::has_name;
use dev_box_core::id::VmName;
use rustix::fs::{FlockOperation, flock};
use uuid::Uuid;

/// How old a directory must be that is unfinished, or without a lock, before it counts as abandoned: its maker needs
/// microseconds.
const UNLOCKED_GRACE: Duration = Duration::from_secs(60);
/// How long a lock is tried for while nobody but lookers has it, who each let it go at once.
const LOOKED_AT: Duration = Duration::from_secs(2);
/// From one try to the next.
const BETWEEN_TRIES: Duration = Duration::from_millis(2);
const NEW: &str = ".new-";
const LOCK: &str = "lock";
const OVERLAY: &str = "overlay.qcow2";
const CONSOLE_LOG: &str = "console.log";
const CONSOLE_SOCKET: &str = "console.sock";
const KEPT: &str = "kept.json";
/// The record of a user's VM.
pub(crate) const RECORD: &str = "vm.json";

/// Why a VM's directory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum VmDirError {
    /// A file operation failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A VM of that name exists.
    #[error("a VM named {0} exists already")]
    Exists(VmName),
    /// Another process owns it.
    #[error("the VM {0} belongs to another running process")]
    Owned(VmName),
}

impl VmDirError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

/// User and group QEMU runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QemuUser {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
}

/// A VM's directory, owned by this process until it is dropped.
///
/// Dropping it releases the lock and leaves the files; [`VmDir::remove`] takes them away.
#[derive(Debug)]
pub struct VmDir {
    name: VmName,
    path: PathBuf,
    // Held for its lock.
    _lock: File,
}

impl VmDir {
    /// Makes the directory of a new VM beneath `root` (`<state root>/vms`) and takes its lock.
    ///
    /// # Errors
    /// The name is in use, or the file system refuses.
    pub fn create(root: &Path, name: &VmName, qemu: QemuUser) -> Result<Self, VmDirError> {
        // Passable for QEMU's user, listable for nobody but us.
        DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(root)
            .map_err(VmDirError::io("create the directory", root))?;
        let path = root.join(name.as_str());
        let new = unfinished_in(root);
        DirBuilder::new().mode(0o711).create(&new).map_err(VmDirError::io("create the directory", &new))?;
        let made = Self::fill(&new, qemu).and_then(|lock| {
            // rename(2) replaces an empty directory only, and a VM's is never empty.
            fs::rename(&new, &path).map_err(|source| match source.kind() {
                io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists => {
                    VmDirError::Exists(name.clone())
                }
                _ => VmDirError::Io { action: "name the directory", path: path.clone(), source },
            })?;
            Ok(lock)
        });
        match made {
            Ok(lock) => Ok(Self { name: name.clone(), path, _lock: lock }),
            Err(error) => {
                let _ = fs::remove_dir_all(&new);
                Err(error)
            }
        }
    }

    fn fill(dir: &Path, qemu: QemuUser) -> Result<File, VmDirError> {
        let lock = dir.join(LOCK);
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&lock)
            .map_err(VmDirError::io("create the lock", &lock))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|errno| VmDirError::io("lock", &lock)(errno.into()))?;
        // From here on nobody takes it for abandoned; whoever did before has removed it.
        if !has_name(&file, &lock).map_err(VmDirError::io("examine", &lock))? {
            return Err(VmDirError::io("lock", &lock)(io::ErrorKind::NotFound.into()));
        }
        let share = dir.join("share");
        DirBuilder::new().mode(0o700).create(&share).map_err(VmDirError::io("create the share", &share))?;
        chown(&share, Some(qemu.uid), Some(qemu.gid))
            .map_err(VmDirError::io("give QEMU's user the share", &share))?;
        Ok(file)
    }

    /// Takes over the directory of a VM whose owner is gone.
    ///
    /// # Errors
    /// Its owner lives, or the file system refuses.
    pub fn adopt(root: &Path, name: &VmName) -> Result<Self, VmDirError> {
        let path = root.join(name.as_str());
        let lock = take_lock(&path, name, Missing::Fails)?;
        Ok(Self { name: name.clone(), path, _lock: lock })
    }

    /// As [`VmDir::adopt`]; also one that has lost its lock, which nobody can own, once it is too old to be just being made.
    pub(crate) fn adopt_abandoned(root: &Path, name: &VmName) -> Result<Self, VmDirError> {
        let path = root.join(name.as_str());
        match take_lock(&path, name, Missing::Fails) {
            Err(VmDirError::Io { source, .. })
                if source.kind() == io::ErrorKind::NotFound && is_old_directory(&path) =>
            {
                let lock = take_lock(&path, name, Missing::IsMade)?;
                Ok(Self { name: name.clone(), path, _lock: lock })
            }
            other => Ok(Self { name: name.clone(), path, _lock: other? }),
        }
    }

    /// The VM's name.
    pub fn name(&self) -> &VmName {
        &self.name
    }

    /// The VM's disk.
    pub fn overlay(&self) -> PathBuf {
        self.path.join(OVERLAY)
    }

    /// The disk of the VM of that name beneath `root`, whoever owns it.
    pub(crate) fn overlay_in(root: &Path, name: &VmName) -> PathBuf {
        root.join(name.as_str()).join(OVERLAY)
    }

    /// What the guest sees by 9p.
    pub fn share(&self) -> PathBuf {
        self.path.join("share")
    }

    /// The control channel's host end.
    pub fn channel(&self) -> PathBuf {
        self.path.join("channel.sock")
    }

    /// The guest's console.
    pub fn console(&self) -> PathBuf {
        self.path.join(CONSOLE_LOG)
    }

    /// The same, of the VM of that name beneath `root`, whoever owns it.
    pub(crate) fn console_in(root: &Path, name: &VmName) -> PathBuf {
        root.join(name.as_str()).join(CONSOLE_LOG)
    }

    /// Held by whoever is attached to the console of the VM of that name beneath `root`.
    pub(crate) fn console_lock_in(root: &Path, name: &VmName) -> PathBuf {
        root.join(name.as_str()).join("console.lock")
    }

    /// Where a user's VM's console can be attached to.
    pub(crate) fn console_socket(&self) -> PathBuf {
        self.path.join(CONSOLE_SOCKET)
    }

    /// The same, of the VM of that name beneath `root`, whoever owns it.
    pub(crate) fn console_socket_in(root: &Path, name: &VmName) -> PathBuf {
        root.join(name.as_str()).join(CONSOLE_SOCKET)
    }

    /// What is on record of a VM that is to outlive its owner, beneath `root`, whoever owns it.
    pub(crate) fn kept_in(root: &Path, name: &VmName) -> PathBuf {
        root.join(name.as_str()).join(KEPT)
    }

    /// Takes that away: nobody is to own it next.
    pub(crate) fn forget_kept(&self) {
        let kept = self.path.join(KEPT);
        match fs::remove_file(&kept) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %kept.display(), %error, "what is on record of a VM that goes stays");
            }
            _ => {}
        }
    }

    /// What a user's VM is.
    pub(crate) fn record(&self) -> PathBuf {
        self.path.join(RECORD)
    }

    /// Removes the directory with all that is in it.
    ///
    /// # Errors
    /// The file system refuses; what could be removed is gone then.
    pub fn remove(self) -> Result<(), VmDirError> {
        // Out of sight first: whoever lists VMs never sees half of one.
        let gone = self.path.parent().map(unfinished_in);
        let path = gone.filter(|gone| fs::rename(&self.path, gone).is_ok()).unwrap_or(self.path);
        remove_locked(&path).map_err(VmDirError::io("remove", &path))
    }
}

/// What a directory beneath `root` is called before it is a VM's, and after it was.
fn unfinished_in(root: &Path) -> PathBuf {
    root.join(format!("{NEW}{}", Uuid::new_v4().simple()))
}

/// Removes a directory whose lock the caller has; that goes last, so that nobody else begins before this has ended.
fn remove_locked(dir: &Path) -> io::Result<()> {
    let missing_is_fine = |result: io::Result<()>| match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    };
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_name() == LOCK {
            continue;
        }
        let is_dir = entry.file_type()?.is_dir();
        let path = entry.path();
        missing_is_fine(if is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) })?;
    }
    missing_is_fine(fs::remove_dir_all(dir))
}

/// The VMs whose locks this process holds, by its open files: whoever asks may have no time to wait for those who know.
pub(crate) fn owned() -> Vec<VmName> {
    let open = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let mut names: Vec<_> = open.filter_map(|fd| owned_by(&fs::read_link(fd.path()).ok()?)).collect();
    names.sort();
    names
}

/// The VM whose lock this file is.
fn owned_by(file: &Path) -> Option<VmName> {
    let dir = file.parent().filter(|_| file.ends_with("lock"))?;
    dir.parent()?.ends_with("vms").then(|| dir.file_name()?.to_str()?.parse().ok())?
}

/// What a lock that is not there means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Missing {
    /// That there is nothing to be had.
    Fails,
    /// That the directory is to be had by making it.
    IsMade,
}

fn take_lock(dir: &Path, name: &VmName, missing: Missing) -> Result<File, VmDirError> {
    let deadline = Instant::now() + LOOKED_AT;
    loop {
        if let Some(lock) = try_lock(dir, FlockOperation::NonBlockingLockExclusive, missing)? {
            return Ok(lock);
        }
        if is_locked(dir)? || Instant::now() >= deadline {
            return Err(VmDirError::Owned(name.clone()));
        }
        std::thread::sleep(BETWEEN_TRIES);
    }
}

/// Whether somebody owns it. Lookers share the lock for that moment: none takes another for an owner.
fn is_locked(dir: &Path) -> Result<bool, VmDirError> {
    Ok(try_lock(dir, FlockOperation::NonBlockingLockShared, Missing::Fails)?.is_none())
}

/// `None` while somebody else has it.
fn try_lock(dir: &Path, how: FlockOperation, missing: Missing) -> Result<Option<File>, VmDirError> {
    let lock = dir.join(LOCK);
    loop {
        let file = OpenOptions::new()
            .write(true)
            .create(missing == Missing::IsMade)
            .truncate(false)
            .mode(0o600)
            .open(&lock)
            .map_err(VmDirError::io("open the lock", &lock))?;
        match flock(&file, how) {
            // Removed between the opening and the locking it is nobody's; there may be another.
            Ok(()) if has_name(&file, &lock).map_err(VmDirError::io("examine", &lock))? => {
                return Ok(Some(file));
            }
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(errno) => return Err(VmDirError::io("lock", &lock)(errno.into())),
        }
    }
}

/// The VMs beneath `root` by name, whoever owns them.
///
/// # Errors
/// The directory cannot be read; one that is not there holds none.
pub fn list(root: &Path) -> Result<Vec<VmName>, VmDirError> {
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(VmDirError::io("read the directory", root)(error)),
    };
    let mut names: Vec<VmName> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    names.sort();
    Ok(names)
}

/// Whether the VM of that name beneath `root` has a directory and no owner. Looking changes nothing, and is in nobody's way.
pub(crate) fn is_abandoned(root: &Path, name: &VmName) -> bool {
    let dir = root.join(name.as_str());
    match is_locked(&dir) {
        Ok(locked) => !locked,
        Err(VmDirError::Io { source, .. }) => {
            source.kind() == io::ErrorKind::NotFound && is_old_directory(&dir)
        }
        Err(_) => false,
    }
}

/// Removes half-made and half-removed directories whose maker is gone.
pub(crate) fn remove_unfinished(root: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
    let mut removed = Vec::new();
    for entry in entries.flatten() {
        let Some(name) = entry.file_name().to_str().and_then(|name| name.strip_prefix(NEW)?.parse().ok())
        else {
            continue;
        };
        let path = entry.path();
        if !is_old_directory(&path) {
            continue;
        }
        // Held until it is gone: a maker who was stopped for so long does not go on in it.
        let Ok(_lock) = take_lock(&path, &name, Missing::IsMade) else { continue };
        match remove_locked(&path) {
            Ok(()) => removed.push(path),
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "an unfinished VM's directory stays");
            }
        }
    }
    removed
}

/// Whether it is a directory in which nothing was made or removed for longer than a maker takes.
fn is_old_directory(path: &Path) -> bool {
    let examined = fs::symlink_metadata(path);
    examined.is_ok_and(|meta| {
        meta.is_dir() && meta.modified().is_ok_and(|at| at.elapsed().is_ok_and(|age| age > UNLOCKED_GRACE))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn me() -> QemuUser {
        QemuUser { uid: rustix::process::getuid().as_raw(), gid: rustix::process::getgid().as_raw() }
    }

    fn name(text: &str) -> VmName {
        text.parse().unwrap()
    }

    #[test]
    fn a_directory_has_one_owner() {
        let root = tempfile::tempdir().unwrap();
        let dir = VmDir::create(root.path(), &name("a"), me()).unwrap();
        assert!(dir.share().is_dir());
        assert!(matches!(VmDir::create(root.path(), &name("a"), me()), Err(VmDirError::Exists(_))));
        assert!(matches!(VmDir::adopt(root.path(), &name("a")), Err(VmDirError::Owned(_))));
        drop(dir);
        VmDir::adopt(root.path(), &name("a")).unwrap().remove().unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_this_process_owns_is_known_by_its_open_files() {
        let root = tempfile::tempdir().unwrap();
        let vms = root.path().join("vms");
        let dir = VmDir::create(&vms, &name("owned-here"), me()).unwrap();
        assert!(owned().contains(&name("owned-here")));
        drop(dir);
        assert!(!owned().contains(&name("owned-here")));
        for none in ["/x/vms/.new-a/lock", "/x/vms/a/share", "/x/user-vms/a/lock", "/lock", "socket:[1]", ""]
        {
            assert_eq!(owned_by(Path::new(none)), None, "{none}");
        }
    }

    #[test]
    fn a_failed_creation_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let dir = VmDir::create(root.path(), &name("a"), me()).unwrap();
        assert!(VmDir::create(root.path(), &name("a"), me()).is_err());
        assert_eq!(list(root.path()).unwrap(), [name("a")]);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
        drop(dir);
    }

    fn age(path: &Path) {
        let dir = File::open(path).unwrap();
        let at = dir.metadata().unwrap().modified().unwrap() - UNLOCKED_GRACE * 2;
        dir.set_modified(at).unwrap();
    }

    #[test]
    fn unfinished_directories_go_once_their_maker_has() {
        let root = tempfile::tempdir().unwrap();
        let dir = VmDir::create(root.path(), &name("a"), me()).unwrap();
        let new = root.path().join(".new-a");
        fs::rename(root.path().join("a"), &new).unwrap();
        age(&new);
        assert!(remove_unfinished(root.path()).is_empty(), "its maker lives");
        drop(dir);
        fs::write(new.join("overlay.qcow2"), "").unwrap();
        assert!(
            remove_unfinished(root.path()).is_empty(),
            "may have been made just now, its lock not taken yet"
        );
        age(&new);
        assert_eq!(remove_unfinished(root.path()), [new]);
        let new = root.path().join(".new-b");
        fs::create_dir(&new).unwrap();
        assert!(remove_unfinished(root.path()).is_empty(), "may be about to be locked");
        age(&new);
        assert_eq!(remove_unfinished(root.path()), [new]);
        let other = root.path().join("other");
        fs::create_dir(&other).unwrap();
        age(&other);
        assert!(remove_unfinished(root.path()).is_empty(), "not ours");
        assert!(other.is_dir());
    }

    #[test]
    fn who_looks_is_no_owner_and_finds_one() {
        let root = tempfile::tempdir().unwrap();
        let (vm, path) = (name("a"), root.path().join("a"));
        let look = || try_lock(&path, FlockOperation::NonBlockingLockShared, Missing::Fails).unwrap();
        assert!(!is_abandoned(root.path(), &vm), "there is none");
        let dir = VmDir::create(root.path(), &vm, me()).unwrap();
        assert!(!is_abandoned(root.path(), &vm));
        assert!(look().is_none());
        drop(dir);
        let looker = look().unwrap();
        assert!(is_abandoned(root.path(), &vm), "another looks, too");
        let looks = std::thread::spawn(move || {
            std::thread::sleep(BETWEEN_TRIES * 50);
            drop(looker);
        });
        let dir = VmDir::adopt(root.path(), &vm).unwrap();
        looks.join().unwrap();
        assert!(!is_abandoned(root.path(), &vm));
        drop(dir);
        fs::remove_file(path.join(LOCK)).unwrap();
        assert!(!is_abandoned(root.path(), &vm), "may be just being made");
        age(&path);
        assert!(is_abandoned(root.path(), &vm));
        assert!(!path.join(LOCK).exists(), "looking changes nothing");
    }

    #[test]
    fn lookers_by_the_dozen_keep_nobody_out() {
        let root = tempfile::tempdir().unwrap();
        let vm = name("a");
        drop(VmDir::create(root.path(), &vm, me()).unwrap());
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|threads| {
            for _ in 0..4 {
                threads.spawn(|| {
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        is_abandoned(root.path(), &vm);
                        std::thread::sleep(BETWEEN_TRIES);
                    }
                });
            }
            let adopted: Vec<_> = (0..20).map(|_| VmDir::adopt(root.path(), &vm).map(drop)).collect();
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(adopted.iter().all(Result::is_ok), "{adopted:?}");
        });
    }

    #[test]
    fn a_lock_that_was_removed_is_no_lock() {
        let root = tempfile::tempdir().unwrap();
        let dir = VmDir::create(root.path(), &name("a"), me()).unwrap();
        let path = root.path().join("a");
        assert!(has_name(&dir._lock, &path.join(LOCK)).unwrap());
        fs::remove_file(path.join(LOCK)).unwrap();
        assert!(!has_name(&dir._lock, &path.join(LOCK)).unwrap());
        // Another file of its name is nobody's.
        drop(take_lock(&path, &name("a"), Missing::IsMade).unwrap());
        assert!(!has_name(&dir._lock, &path.join(LOCK)).unwrap());
        drop(VmDir::adopt(root.path(), &name("a")).unwrap());
    }

    #[test]
    fn a_directory_without_a_lock_is_an_orphan_once_it_is_old() {
        let root = tempfile::tempdir().unwrap();
        let vm = name("a");
        drop(VmDir::create(root.path(), &vm, me()).unwrap());
        let path = root.path().join("a");
        fs::remove_file(path.join(LOCK)).unwrap();
        let missing = |result: Result<VmDir, VmDirError>| matches!(result, Err(VmDirError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound);
        assert!(missing(VmDir::adopt_abandoned(root.path(), &vm)), "somebody may be about to");
        age(&path);
        assert!(missing(VmDir::adopt(root.path(), &vm)));
        VmDir::adopt_abandoned(root.path(), &vm).unwrap().remove().unwrap();
        assert!(missing(VmDir::adopt_abandoned(root.path(), &vm)));
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_unfinished_keeps_no_name_in_use() {
        let root = tempfile::tempdir().unwrap();
        // Removed by one who was killed in it; earlier versions had its name in that.
        drop(VmDir::create(root.path(), &name("a"), me()).unwrap());
        fs::rename(root.path().join("a"), root.path().join(".new-a")).unwrap();
        let again = VmDir::create(root.path(), &name("a"), me()).unwrap();
        assert_eq!(list(root.path()).unwrap(), [name("a")]);
        let (one, other) = (unfinished_in(root.path()), unfinished_in(root.path()));
        assert_ne!(one, other);
        // Whatever it is called, it is swept.
        for path in [&one, &root.path().join(".new-a")] {
            fs::create_dir_all(path).unwrap();
            age(path);
        }
        assert_eq!(remove_unfinished(root.path()).len(), 2);
        again.remove().unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_lock_goes_last() {
        let root = tempfile::tempdir().unwrap();
        let dir = VmDir::create(root.path(), &name("a"), me()).unwrap();
        let path = root.path().join("a");
        for sub in ["share/deep/er", "snapshots"] {
            fs::create_dir_all(path.join(sub)).unwrap();
        }
        fs::write(path.join("share/deep/file"), "x").unwrap();
        std::os::unix::fs::symlink("/nonexistent", path.join("link")).unwrap();
        dir.remove().unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
        remove_locked(&path).unwrap();
    }

    #[test]
    fn a_missing_root_holds_no_vms() {
        assert!(list(Path::new("/nonexistent/vms")).unwrap().is_empty());
    }

    #[test]
    fn an_unwritable_root_is_named() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        let error = VmDir::create(&file.join("vms"), &name("a"), me()).unwrap_err();
        assert!(error.to_string().contains("vms"), "{error}");
    }
}
