//! Mounting: the seam between what is to be mounted where and Linux.

use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags};

/// One thing to mount, as mount(2) wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountSpec {
    /// Device, tag or name of the source.
    pub source: String,
    /// Where; an absolute path.
    pub target: PathBuf,
    /// File system type.
    pub kind: &'static str,
    /// `MS_*` flags.
    pub flags: MsFlags,
    /// The file system's own options, comma-separated.
    pub data: String,
}

impl MountSpec {
    /// A file system that has no device: `source` is its type.
    #[must_use]
    pub fn pseudo(kind: &'static str, target: &str, flags: MsFlags, data: &str) -> Self {
        Self { source: kind.to_owned(), target: PathBuf::from(target), kind, flags, data: data.to_owned() }
    }
}

/// What is needed of mount(2) and umount2(2).
pub trait Mounts {
    /// Mounts, the target directory being there.
    ///
    /// # Errors
    /// What mount(2) said.
    fn mount(&self, spec: &MountSpec) -> io::Result<()>;
    /// Moves a mount to another directory (`MS_MOVE`).
    ///
    /// # Errors
    /// What mount(2) said.
    fn relocate(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Unmounts; `detach` takes it out of sight even when it is busy (`MNT_DETACH`).
    ///
    /// # Errors
    /// What umount2(2) said.
    fn unmount(&self, target: &Path, detach: bool) -> io::Result<()>;
}

/// The kernel's own.
#[derive(Debug, Clone, Copy, Default)]
pub struct Linux;

impl Mounts for Linux {
    fn mount(&self, spec: &MountSpec) -> io::Result<()> {
        let data = (!spec.data.is_empty()).then_some(spec.data.as_str());
        nix::mount::mount(Some(spec.source.as_str()), &spec.target, Some(spec.kind), spec.flags, data)?;
        Ok(())
    }

    fn relocate(&self, from: &Path, to: &Path) -> io::Result<()> {
        nix::mount::mount(Some(from), to, None::<&str>, MsFlags::MS_MOVE, None::<&str>)?;
        Ok(())
    }

    fn unmount(&self, target: &Path, detach: bool) -> io::Result<()> {
        let flags = if detach { MntFlags::MNT_DETACH } else { MntFlags::empty() };
        nix::mount::umount2(target, flags | MntFlags::UMOUNT_NOFOLLOW)?;
        Ok(())
    }
}

/// The double: keeps a table, refuses what it was told to refuse.
#[cfg(test)]
pub(crate) mod fake {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Debug, Clone, Default)]
    pub(crate) struct FakeMounts {
        inner: Arc<Mutex<State>>,
    }

    #[derive(Debug, Default)]
    struct State {
        table: Vec<MountSpec>,
        refusals: Vec<(PathBuf, i32)>,
        busy: Vec<PathBuf>,
    }

    impl FakeMounts {
        pub(crate) fn refuse(&self, target: &str, errno: i32) {
            self.inner.lock().unwrap().refusals.push((target.into(), errno));
        }

        pub(crate) fn make_busy(&self, target: &Path) {
            self.inner.lock().unwrap().busy.push(target.into());
        }

        /// Nothing is in use any more.
        pub(crate) fn make_idle(&self) {
            self.inner.lock().unwrap().busy.clear();
        }

        pub(crate) fn table(&self) -> Vec<MountSpec> {
            self.inner.lock().unwrap().table.clone()
        }
    }

    impl Mounts for FakeMounts {
        fn mount(&self, spec: &MountSpec) -> io::Result<()> {
            let mut state = self.inner.lock().unwrap();
            if let Some((_, errno)) = state.refusals.iter().find(|(target, _)| *target == spec.target) {
                return Err(io::Error::from_raw_os_error(*errno));
            }
            state.table.push(spec.clone());
            Ok(())
        }

        fn relocate(&self, from: &Path, to: &Path) -> io::Result<()> {
            let mut state = self.inner.lock().unwrap();
            let Some(moved) = state.table.iter_mut().find(|spec| spec.target == from) else {
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            };
            moved.target = to.to_owned();
            Ok(())
        }

        fn unmount(&self, target: &Path, detach: bool) -> io::Result<()> {
            let mut state = self.inner.lock().unwrap();
            if !detach && state.busy.iter().any(|busy| busy == target) {
                return Err(io::Error::from_raw_os_error(libc::EBUSY));
            }
            let before = state.table.len();
            state.table.retain(|spec| spec.target != target);
            if state.table.len() == before { Err(io::Error::from_raw_os_error(libc::EINVAL)) } else { Ok(()) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_refuses_what_is_not_there() {
        let spec = MountSpec::pseudo("tmpfs", "/nowhere/at/all", MsFlags::empty(), "size=1m");
        assert!(Linux.mount(&spec).is_err());
        assert!(Linux.relocate(Path::new("/nowhere/a"), Path::new("/nowhere/b")).is_err());
        assert!(Linux.unmount(Path::new("/nowhere/a"), true).is_err());
    }
}
