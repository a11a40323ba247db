//! Live mounts: as whom QEMU has them, and the guest's side of them.
//!
//! QEMU opens what the guest asks for with its own rights, so whoever it runs as decides what a mount can reach. With an
//! owner it is the owner, by a label of the domain's own; without, the user that all VMs' QEMUs have, read-only. Before a
//! VM is made the directory is opened with that user's eyes: a caller cannot have a VM show what the caller may not see.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use dev_box_comm::message::{GuestErrorKind, Mount, Request, Unmount};
use dev_box_comm::session::{CallError, Session};
use dev_box_core::spec::Share;
use dev_box_exec::mount::MountError;
use dev_box_exec::{Mounts, Owner, background};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use tokio::time::timeout;

use crate::vm_dir::QemuUser;

/// How long the guest may take to mount one.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where libvirt keeps, for each domain, files that its QEMU opens by their paths.
const LIBVIRT: &str = "/var/lib/libvirt/qemu";

/// Why a VM cannot have its mounts.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MountsError {
    #[error(transparent)]
    Invalid(#[from] MountError),
    #[error(
        "cannot mount {path:?}: user {uid}, as whom QEMU would read it, cannot open it ({source}); give that user the right, or choose another with --mount-owner"
    )]
    Closed { path: PathBuf, uid: u32, source: io::Error },
    #[error("the guest could not mount {target:?}")]
    Guest { target: PathBuf, source: CallError },
    #[error("the guest did not mount, or unmount, {0:?} within {limit} s", limit = PATIENCE.as_secs())]
    Silent(PathBuf),
    #[error("{0:?} is in use in it: end what works there, or leave the directory, and try again")]
    Busy(PathBuf),
    #[error(
        "a job goes on in it, and each has what is mounted: `dev-box ps VM` lists them, `dev-box kill VM JOB` ends one; try again then"
    )]
    Jobs,
    #[error("the guest could not unmount {target:?}")]
    Unmount { target: PathBuf, source: CallError },
}

/// The user QEMU is to run as, `usual` without a say of the request's. Blocks for a moment.
///
/// # Errors
/// The mounts are no good, or the user cannot open one of them.
pub(crate) fn user(mounts: &Mounts, usual: QemuUser) -> Result<QemuUser, MountsError> {
    mounts.check()?;
    if mounts.is_empty() {
        return Ok(usual);
    }
    let user = match mounts.owner {
        Some(Owner { uid, gid }) => QemuUser { uid, gid: group(gid, Path::new(LIBVIRT)) },
        None => usual,
    };
    for mount in &mounts.list {
        opened_as(user, &mount.source).map_err(|source| MountsError::Closed {
            path: mount.source.clone(),
            uid: user.uid,
            source,
        })?;
    }
    Ok(user)
}

/// Debian closes libvirt's directory to all but a group of its own: QEMU has to be in it, or it does not get at its files.
fn group(own: u32, libvirt: &Path) -> u32 {
    match fs::metadata(libvirt) {
        Ok(meta) if meta.mode() & 0o001 == 0 && meta.mode() & 0o010 != 0 => meta.gid(),
        _ => own,
    }
}

/// Whether this user can list the directory, by what the kernel says: permissions, access lists and all.
fn opened_as(user: QemuUser, path: &Path) -> io::Result<()> {
    // The identity in question is a thread's own: it goes with this one.
    thread::scope(|scope| {
        let looking = scope.spawn(|| {
            setfsgid(Gid::from_raw(user.gid));
            setfsuid(Uid::from_raw(user.uid));
            fs::read_dir(path).map(drop)
        });
        looking.join().unwrap_or_else(|_| Err(io::Error::other("the check did not end")))
    })
}

/// The devices.
pub(crate) fn shares(mounts: &Mounts) -> impl Iterator<Item = Share> {
    mounts.list.iter().enumerate().map(|(index, mount)| Share {
        tag: tag(index),
        path: mount.source.clone(),
        read_only: !mount.writable,
    })
}

fn tag(index: usize) -> String {
    format!("mount-{index}")
}

/// Has the guest mount them. What is read-only is so on the host's side, whatever the guest does.
///
/// # Errors
/// The first that it could not.
pub(crate) async fn mount(session: &Session, mounts: &Mounts) -> Result<(), MountsError> {
    mount_from(session, mounts, 0).await
}

async fn mount_from(session: &Session, mounts: &Mounts, first: usize) -> Result<(), MountsError> {
    for (index, mount) in mounts.list.iter().enumerate().skip(first) {
        let request = Request::Mount(Mount {
            tag: tag(index),
            target: mount.target.as_path().into(),
            read_only: !mount.writable,
            owner: None,
        });
        let target = || mount.target.clone();
        timeout(PATIENCE, session.call(request))
            .await
            .map_err(|_| MountsError::Silent(target()))?
            .map_err(|source| MountsError::Guest { target: target(), source })?;
    }
    Ok(())
}

/// Has the guest unmount them, in the reverse order, all or none. A job has a copy of all mounts, which unmounting does not end: so
/// none is to go on.
///
/// # Errors
/// The first that it could not, as [`MountsError::Busy`] where something uses it. The others are mounted again then.
pub(crate) async fn unmount(session: &Session, mounts: &Mounts) -> Result<(), MountsError> {
    if !mounts.is_empty() && !background::at_rest(session, PATIENCE).await {
        return Err(MountsError::Jobs);
    }
    for (index, live) in mounts.list.iter().enumerate().rev() {
        let request = Request::Unmount(Unmount { target: live.target.as_path().into(), lazy: false });
        let target = || live.target.clone();
        let failed = match timeout(PATIENCE, session.call(request)).await {
            Ok(Ok(_)) => continue,
            // Somebody in the guest was faster.
            Ok(Err(CallError::Guest(error))) if error.kind == GuestErrorKind::InvalidRequest => continue,
            Ok(Err(CallError::Guest(error))) if error.kind == GuestErrorKind::Busy => {
                MountsError::Busy(target())
            }
            Ok(Err(source)) => MountsError::Unmount { target: target(), source },
            Err(_) => MountsError::Silent(target()),
        };
        mount_from(session, mounts, index.saturating_add(1)).await?;
        return Err(failed);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const USUAL: QemuUser = QemuUser { uid: 64_055, gid: 993 };

    fn mounts(path: &Path, writable: bool, owner: Option<Owner>) -> Mounts {
        let mount = format!("{}:/m{}", path.display(), if writable { ":rw" } else { "" });
        Mounts { list: vec![mount.parse().unwrap()], owner }
    }

    #[test]
    fn the_owner_is_whom_qemu_runs_as() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(user(&Mounts::default(), USUAL).unwrap(), USUAL);
        assert_eq!(user(&mounts(dir.path(), false, None), USUAL).unwrap(), USUAL);
        let owner = Some(Owner { uid: 5555, gid: 5556 });
        assert_eq!(user(&mounts(dir.path(), true, owner), USUAL).unwrap().uid, 5555);
        assert!(matches!(user(&mounts(dir.path(), true, None), USUAL), Err(MountsError::Invalid(_))));
    }

    #[test]
    fn what_the_user_may_not_see_is_not_mounted() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        // Another's, and this process may all: so it is not this process's rights that are asked for.
        let closed =
            user(&mounts(dir.path(), true, Some(Owner { uid: 5555, gid: 5555 })), USUAL).unwrap_err();
        assert!(closed.to_string().contains("user 5555"), "{closed}");
        assert!(fs::read_dir(dir.path()).is_ok(), "the caller's own rights are as they were");
        let missing = user(&mounts(&dir.path().join("x"), false, None), USUAL);
        assert!(matches!(missing, Err(MountsError::Closed { .. })));
    }

    #[test]
    fn the_group_is_libvirts_where_nobody_else_gets_in() {
        let dir = tempfile::tempdir().unwrap();
        let gid = dir.path().metadata().unwrap().gid();
        for (mode, expected) in [(0o750, gid), (0o751, gid + 1), (0o700, gid + 1)] {
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(group(gid + 1, dir.path()), expected, "{mode:o}");
        }
        assert_eq!(group(7, &dir.path().join("none")), 7);
    }

    #[test]
    fn a_mount_is_a_share_with_a_tag_of_its_own() {
        let mut all = mounts(Path::new("/a"), true, None);
        all.list.push("/b".parse().unwrap());
        let shares: Vec<_> = shares(&all).map(|share| (share.tag, share.read_only)).collect();
        assert_eq!(shares, [("mount-0".to_owned(), false), ("mount-1".to_owned(), true)]);
    }
}
