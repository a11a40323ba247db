//! Directories of this host that a VM sees live, and whose they are.

use std::path::Path;

use clap::{Args, ValueHint};
use dev_box::exec::{LiveMount, Mounts, Owner};
use nix::unistd::{Gid, Uid, User};
use serde::{Deserialize, Serialize};

/// On the command line; in a request to the daemon, with absolute paths and numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Args, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct MountArgs {
    /// Let the VM see this directory live, at /mnt/NAME or the path given: read-only, or with :rw for writing; what the guest
    /// creates there is the invoking user's. QEMU then runs as that user (see docs/running-jobs.md for the price).
    #[arg(long = "mount", value_name = "DIR[:/PATH][:rw]", value_parser = mount, value_hint = ValueHint::DirPath)]
    pub(crate) mounts: Vec<LiveMount>,

    /// The user that mounts are read and written as, by name or number; never root
    /// [default: the invoking user, also under sudo].
    #[arg(long, value_name = "USER", requires = "mounts", value_parser = owner)]
    pub(crate) mount_owner: Option<Owner>,
}

/// Somebody asks for mounts as somebody else.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("only root may have mounts as another user than itself: leave --mount-owner out")]
pub(crate) struct NotYours;

impl MountArgs {
    /// The same, for whoever runs this program, where it does not say for whom.
    pub(crate) fn for_invoker(mut self) -> Self {
        if !self.mounts.is_empty() && self.mount_owner.is_none() {
            let sudo = |name| std::env::var(name).ok()?.parse().ok();
            let ids = (Uid::effective().as_raw(), Gid::effective().as_raw());
            self.mount_owner = invoker(ids, sudo("SUDO_UID"), sudo("SUDO_GID"));
        }
        self
    }

    /// The same, as far as a peer of the daemon's may have it: a peer who is not root has mounts as itself.
    pub(crate) fn for_peer(mut self, peer: Owner) -> Result<Self, NotYours> {
        if !self.mounts.is_empty() && peer.uid != 0 {
            if self.mount_owner.is_some_and(|owner| owner.uid != peer.uid) {
                return Err(NotYours);
            }
            self.mount_owner = Some(peer);
        }
        Ok(self)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.mounts.is_empty()
    }

    pub(crate) fn mounts(&self) -> Mounts {
        Mounts { list: self.mounts.clone(), owner: self.mount_owner }
    }
}

/// Who stands behind this process: `None` when it is root and nobody else.
fn invoker((uid, gid): (u32, u32), sudo_uid: Option<u32>, sudo_gid: Option<u32>) -> Option<Owner> {
    let user = if uid == 0 { (sudo_uid?, sudo_gid?) } else { (uid, gid) };
    (user.0 != 0).then_some(Owner { uid: user.0, gid: user.1 })
}

fn mount(text: &str) -> Result<LiveMount, String> {
    let mount: LiveMount = text
        .parse()
        .or_else(|error| {
            // `.` has no name of its own, and its absolute path has.
            let real = Path::new(text.trim_end_matches(":rw")).canonicalize().map_err(|_| error)?;
            let suffix = if text.ends_with(":rw") { ":rw" } else { "" };
            format!("{}{suffix}", real.display()).parse()
        })
        .map_err(|error: dev_box::exec::mount::MountError| error.to_string())?;
    let real = mount.source.canonicalize().map_err(|error| format!("{}: {error}", mount.source.display()))?;
    if !real.is_dir() {
        return Err(format!("{} is not a directory", mount.source.display()));
    }
    Ok(mount.at(real))
}

fn owner(text: &str) -> Result<Owner, String> {
    let user = match text.parse() {
        Ok(uid) => User::from_uid(Uid::from_raw(uid)),
        Err(_) => User::from_name(text),
    };
    match user {
        Ok(Some(user)) if user.uid.is_root() => Err("never root".to_owned()),
        Ok(Some(user)) => Ok(Owner { uid: user.uid.as_raw(), gid: user.gid.as_raw() }),
        Ok(None) => Err("there is no such user on this host".to_owned()),
        Err(errno) => Err(errno.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALICE: Owner = Owner { uid: 1000, gid: 100 };

    fn args(owner: Option<Owner>) -> MountArgs {
        MountArgs { mounts: vec!["/srv".parse().unwrap()], mount_owner: owner }
    }

    #[test]
    fn the_invoker_is_never_root() {
        assert_eq!(invoker((1000, 100), None, None), Some(ALICE));
        assert_eq!(invoker((0, 0), Some(1000), Some(100)), Some(ALICE));
        assert_eq!(invoker((0, 0), None, None), None);
        assert_eq!(invoker((0, 0), Some(0), Some(0)), None);
        assert_eq!(invoker((1000, 100), Some(7), Some(7)), Some(ALICE), "only root may be somebody else");
    }

    #[test]
    fn a_peer_has_mounts_as_itself_and_root_as_whom_it_says() {
        let root = Owner { uid: 0, gid: 0 };
        assert_eq!(args(None).for_peer(ALICE).unwrap().mount_owner, Some(ALICE));
        assert_eq!(args(Some(ALICE)).for_peer(ALICE).unwrap().mount_owner, Some(ALICE));
        assert_eq!(args(Some(root)).for_peer(ALICE), Err(NotYours));
        assert_eq!(args(Some(ALICE)).for_peer(root).unwrap().mount_owner, Some(ALICE));
        assert_eq!(args(None).for_peer(root).unwrap().mount_owner, None);
        assert_eq!(MountArgs::default().for_peer(ALICE), Ok(MountArgs::default()));
    }

    #[test]
    fn a_directory_is_told_by_its_real_path() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        let link = real.join("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let mounted = mount(&format!("{}:rw", link.display())).unwrap();
        assert_eq!(
            (mounted.source, mounted.target.to_str(), mounted.writable),
            (real, Some("/mnt/link"), true)
        );
        assert_eq!(mount(".").unwrap().source, std::env::current_dir().unwrap().canonicalize().unwrap());
        assert!(mount("/no/such/directory").is_err());
        assert!(mount("/etc/passwd").unwrap_err().contains("not a directory"));
    }

    #[test]
    fn owners_are_users_of_this_host() {
        assert!(owner("root").is_err() && owner("0").is_err() && owner("no-such-user").is_err());
        assert_eq!(owner("nobody").unwrap().uid, 65_534);
    }
}
