//! The workspace: a 9p share over virtio, mounted when a job starts and unmounted when it ends.

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use dev_box_comm::message::{GuestError, GuestErrorKind, Mount, Unmount};
use nix::mount::MsFlags;

use super::Surroundings;
use crate::files::{failed, owner_of, path_of};
use crate::mounts::MountSpec;

/// How long an unmount may wait for processes that are just ending: with much memory to give back, on a busy host, that takes seconds.
const BUSY_PATIENCE: Duration = Duration::from_secs(8);
/// Who asks for a lazy one has mostly been refused after the wait above.
const LAZY_PATIENCE: Duration = Duration::from_millis(500);
/// Between two tries.
const PAUSE: Duration = Duration::from_millis(5);

/// Mounts the share of this tag, making the directory.
///
/// # Errors
/// `NotFound` when the VM has no such share, `Busy` when it is mounted already, and what the kernel said.
pub fn mount(surroundings: &Surroundings, wanted: &Mount) -> Result<(), GuestError> {
    let target = target(&wanted.target)?;
    let owner = owner_of(wanted.owner.as_deref())?;
    let good = wanted.tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if !good || !(1..=31).contains(&wanted.tag.len()) {
        let text = format!("`{}` is no tag of a share", wanted.tag);
        return Err(GuestError::new(GuestErrorKind::InvalidRequest, text));
    }
    std::fs::create_dir_all(&target).map_err(|error| failed("make", &target, &error))?;
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
    flags.set(MsFlags::MS_RDONLY, wanted.read_only);
    let spec = MountSpec {
        source: wanted.tag.clone(),
        target: target.clone(),
        kind: "9p",
        flags,
        data: options().to_owned(),
    };
    surroundings.mounts.mount(&spec).map_err(|error| failed("mount the share on", &target, &error))?;
    if let Some(owner) = owner
        && let Err(error) = std::os::unix::fs::lchown(&target, Some(owner.uid), Some(owner.gid))
    {
        let _ = surroundings.mounts.unmount(&target, true);
        return Err(failed("change the owner of", &target, &error));
    }
    Ok(())
}

/// `cache=none`: what the host sees is what was written; `msize` as large as the kernel takes; every user by its own number.
fn options() -> &'static str {
    "trans=virtio,version=9p2000.L,msize=512000,cache=none,access=client"
}

/// Unmounts. What is still busy is tried again for some seconds, as processes that were killed may be on their way out.
///
/// # Errors
/// `Busy` while something uses it and `lazy` was not asked for; `InvalidRequest` when nothing is mounted there.
pub fn unmount(surroundings: &Surroundings, wanted: &Unmount) -> Result<(), GuestError> {
    unmount_within(surroundings, wanted, if wanted.lazy { LAZY_PATIENCE } else { BUSY_PATIENCE })
}

fn unmount_within(
    surroundings: &Surroundings,
    wanted: &Unmount,
    patience: Duration,
) -> Result<(), GuestError> {
    let target = target(&wanted.target)?;
    let deadline = Instant::now() + patience;
    loop {
        match surroundings.mounts.unmount(&target, false) {
            Ok(()) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                if Instant::now() < deadline {
                    std::thread::sleep(PAUSE);
                } else if wanted.lazy {
                    let detached = surroundings.mounts.unmount(&target, true);
                    return detached.map_err(|error| failed("detach", &target, &error));
                } else {
                    return Err(failed("unmount", &target, &error));
                }
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                let text = format!("nothing is mounted on {}", target.display());
                return Err(GuestError::new(GuestErrorKind::InvalidRequest, text));
            }
            Err(error) => return Err(failed("unmount", &target, &error)),
        }
    }
}

/// A directory that is not the machine's own.
fn target(path: &dev_box_comm::message::WireBytes) -> Result<PathBuf, GuestError> {
    let path = path_of(path)?;
    let climbs = path.components().any(|part| matches!(part, std::path::Component::ParentDir));
    if climbs || path.components().count() < 2 {
        let error = io::Error::from_raw_os_error(libc::EINVAL);
        return Err(failed("mount on", &path, &error));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use dev_box_comm::message::WireBytes;

    use super::*;
    use crate::agent::tests::{Doubles, surroundings};

    fn wanted(target: PathBuf) -> Mount {
        Mount { tag: "workspace".into(), target: target.into(), read_only: false, owner: None }
    }

    #[test]
    fn a_share_is_mounted_and_unmounted() {
        let Doubles { surroundings, mounts, root, .. } = surroundings();
        let target = root.path().join("work/space");
        mount(&surroundings, &Mount { read_only: true, ..wanted(target.clone()) }).unwrap();
        let table = mounts.table();
        assert_eq!((table[0].source.as_str(), table[0].kind), ("workspace", "9p"));
        assert!(table[0].flags.contains(MsFlags::MS_RDONLY));
        assert!(table[0].data.contains("msize=512000") && table[0].data.contains("cache=none"));
        let away = Unmount { target: target.into(), lazy: false };
        unmount(&surroundings, &away).unwrap();
        let again = unmount(&surroundings, &away).unwrap_err();
        assert_eq!(again.kind, GuestErrorKind::InvalidRequest);
    }

    #[test]
    fn a_busy_share_is_detached_only_when_asked() {
        let Doubles { surroundings, mounts, root, .. } = surroundings();
        let target = root.path().join("w");
        mount(&surroundings, &wanted(target.clone())).unwrap();
        mounts.make_busy(&target);
        let away = Unmount { target: target.into(), lazy: false };
        let refused = unmount_within(&surroundings, &away, Duration::from_millis(20));
        assert_eq!(refused.unwrap_err().kind, GuestErrorKind::Busy);
        unmount(&surroundings, &Unmount { lazy: true, ..away }).unwrap();
        assert!(mounts.table().is_empty());
    }

    #[test]
    fn a_share_that_is_busy_for_a_while_is_waited_for() {
        let Doubles { surroundings, mounts, root, .. } = surroundings();
        let target = root.path().join("w");
        mount(&surroundings, &wanted(target.clone())).unwrap();
        mounts.make_busy(&target);
        let ending = std::thread::spawn({
            let mounts = mounts.clone();
            move || {
                // Longer than a lazy one would wait.
                std::thread::sleep(LAZY_PATIENCE * 2);
                mounts.make_idle();
            }
        });
        unmount(&surroundings, &Unmount { target: target.into(), lazy: false }).unwrap();
        assert!(mounts.table().is_empty());
        ending.join().unwrap();
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        let Doubles { surroundings, mounts, root, .. } = surroundings();
        let target = root.path().join("w");
        for tag in ["", "a,b", "x".repeat(32).as_str()] {
            let refused =
                mount(&surroundings, &Mount { tag: tag.into(), ..wanted(target.clone()) }).unwrap_err();
            assert_eq!(refused.kind, GuestErrorKind::InvalidRequest);
        }
        for target in ["/", "relative", "/a/../.."] {
            let refused = mount(&surroundings, &wanted(target.into())).unwrap_err();
            assert_eq!(refused.kind, GuestErrorKind::InvalidRequest, "{target}");
            let away = Unmount { target: WireBytes::from(target), lazy: true };
            assert_eq!(unmount(&surroundings, &away).unwrap_err().kind, GuestErrorKind::InvalidRequest);
        }
        mounts.refuse(target.to_str().unwrap(), libc::ENOENT);
        assert_eq!(mount(&surroundings, &wanted(target.clone())).unwrap_err().kind, GuestErrorKind::NotFound);
        let stranger = Mount { owner: Some("no-such-user".into()), ..wanted(target) };
        assert_eq!(mount(&surroundings, &stranger).unwrap_err().kind, GuestErrorKind::NotFound);
    }

    #[test]
    fn the_mount_can_be_given_to_a_user() {
        let Doubles { surroundings, root, .. } = surroundings();
        let target = root.path().join("w");
        let me = nix::unistd::geteuid().to_string();
        mount(&surroundings, &Mount { owner: Some(me), ..wanted(target.clone()) }).unwrap();
        if !nix::unistd::geteuid().is_root() {
            let other = Mount { owner: Some("1".into()), ..wanted(target) };
            assert_eq!(mount(&surroundings, &other).unwrap_err().kind, GuestErrorKind::PermissionDenied);
        }
    }
}
