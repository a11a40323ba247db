//! Directories of the host that a VM sees live, by 9p.
//!
//! Unlike the workspace nothing is copied: a change on either side is on the other at once. They are exported with
//! `accessmode='mapped'` as the workspace is (see [`dev_box_comm::share`]): a guest's links, owners and modes stay in
//! extended attributes, so that no link of a guest's making ever is one on the host.

use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::workspace::Owner;

/// How many directories one VM may have mounted.
pub const MAX_MOUNTS: usize = 16;

/// Where mounts go in the guest that name no place.
const DEFAULT_PARENT: &str = "/mnt";

/// Directories of the guest that it does not work without.
const VITAL: [&str; 4] = ["/proc", "/sys", "/dev", "/run"];

/// A directory of the host, and where the guest has it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LiveMount {
    /// The directory on the host.
    pub source: PathBuf,
    /// Where it is mounted in the guest; absolute.
    pub target: PathBuf,
    /// Whether the guest may change it.
    pub writable: bool,
}

/// What a VM has mounted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Mounts {
    /// They, in the order in which they are mounted.
    pub list: Vec<LiveMount>,
    /// As whom the host reads and writes them: QEMU runs as this user. What the guest creates is this user's, and what this
    /// user may not do there, no guest may. `None`: as the user QEMU runs as anyway, who may only read.
    pub owner: Option<Owner>,
}

/// What is wrong with a mount.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MountError {
    /// No directory is named.
    #[error("expected DIR, DIR:/guest/path or DIR:/guest/path:rw")]
    Empty,
    /// The place in the guest cannot be used.
    #[error("{path:?} is no place for a mount: an absolute path in the guest, without `..`, and not {why}")]
    Target {
        /// The path.
        path: PathBuf,
        /// What it is.
        why: &'static str,
    },
    /// There is no name to make a place of.
    #[error("{0:?} has no name to mount it by: say where, as in {0:?}:/mnt/name")]
    Nameless(PathBuf),
    /// The directory's path is not absolute.
    #[error("{0:?} is not an absolute path of this host")]
    Relative(PathBuf),
    /// Two at one place.
    #[error("{0:?} is mounted on twice")]
    Twice(PathBuf),
    /// Too many.
    #[error("{0} mounts: {MAX_MOUNTS} at most")]
    TooMany(usize),
    /// Root, or nobody, would own what the guest writes.
    #[error(
        "a writable mount needs a user to own what the guest writes, and never root: say who with --mount-owner USER"
    )]
    NoOwner,
}

impl LiveMount {
    /// The same with another path of the same directory: a relative one made absolute.
    #[must_use]
    pub fn at(self, source: PathBuf) -> Self {
        Self { source, ..self }
    }
}

/// What `DIR[:/guest/path][:rw|:ro]` means; read-only unless it says otherwise, at `/mnt/NAME` unless it says where.
///
/// # Errors
/// [`MountError`].
///
/// ```
/// let mount: dev_box_exec::LiveMount = "/srv/data:/data:rw".parse()?;
/// assert_eq!((mount.target.to_str(), mount.writable), (Some("/data"), true));
/// # Ok::<(), dev_box_exec::mount::MountError>(())
/// ```
impl FromStr for LiveMount {
    type Err = MountError;

    fn from_str(text: &str) -> Result<Self, MountError> {
        let (rest, writable) = match text.rsplit_once(':') {
            Some((rest, "rw")) => (rest, true),
            Some((rest, "ro")) => (rest, false),
            _ => (text, false),
        };
        let (source, target) = match rest.rfind(":/") {
            Some(at) => (rest.get(..at), rest.get(at + 1..).map(PathBuf::from)),
            None => (Some(rest), None),
        };
        let source =
            source.filter(|source| !source.is_empty()).map(PathBuf::from).ok_or(MountError::Empty)?;
        let target = match target {
            Some(target) => target,
            None => default_target(&source)?,
        };
        check_target(&target)?;
        Ok(Self { source, target, writable })
    }
}

impl Mounts {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Whether a guest may write to one of them.
    #[must_use]
    pub fn any_writable(&self) -> bool {
        self.list.iter().any(|mount| mount.writable)
    }

    /// Checks them as a whole, wherever they come from. Nothing is looked up on the host.
    ///
    /// # Errors
    /// [`MountError`].
    pub fn check(&self) -> Result<(), MountError> {
        if self.list.len() > MAX_MOUNTS {
            return Err(MountError::TooMany(self.list.len()));
        }
        for (index, mount) in self.list.iter().enumerate() {
            if !mount.source.is_absolute() {
                return Err(MountError::Relative(mount.source.clone()));
            }
            check_target(&mount.target)?;
            if self.list.iter().take(index).any(|before| before.target == mount.target) {
                return Err(MountError::Twice(mount.target.clone()));
            }
        }
        match self.owner {
            Some(Owner { uid: 0, .. }) if !self.is_empty() => Err(MountError::NoOwner),
            None if self.any_writable() => Err(MountError::NoOwner),
            _ => Ok(()),
        }
    }
}

fn default_target(source: &Path) -> Result<PathBuf, MountError> {
    let name = source.file_name().ok_or_else(|| MountError::Nameless(source.to_owned()))?;
    Ok(Path::new(DEFAULT_PARENT).join(name))
}

fn check_target(target: &Path) -> Result<(), MountError> {
    let refuse = |why| Err(MountError::Target { path: target.to_owned(), why });
    if !target.is_absolute() {
        return refuse("relative");
    }
    if target.components().any(|part| part == Component::ParentDir) {
        return refuse("one with `..` in it");
    }
    if target.components().count() < 2 {
        return refuse("the root");
    }
    if VITAL.iter().any(|vital| target.starts_with(vital)) {
        return refuse("among what the guest needs to run (/proc, /sys, /dev, /run)");
    }
    if target == Path::new(dev_box_comm::share::TARGET) {
        return refuse("the workspace's");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(text: &str) -> (String, String, bool) {
        let LiveMount { source, target, writable } = text.parse().unwrap();
        (source.display().to_string(), target.display().to_string(), writable)
    }

    fn mount(text: &str) -> LiveMount {
        text.parse().unwrap()
    }

    #[test]
    fn a_directory_a_place_and_whether_it_may_be_written() {
        let is = |source: &str, target: &str, writable| (source.to_owned(), target.to_owned(), writable);
        assert_eq!(parsed("/srv/data"), is("/srv/data", "/mnt/data", false));
        assert_eq!(parsed("/srv/data:rw"), is("/srv/data", "/mnt/data", true));
        assert_eq!(parsed("data:/d:ro"), is("data", "/d", false));
        assert_eq!(parsed("/a:b:/c:rw"), is("/a:b", "/c", true));
        assert_eq!(parsed("/a:b"), is("/a:b", "/mnt/a:b", false));
        for bad in
            ["", ":/x", ":rw", "/", "..", "/a:/", "/a:/x/../y", "/a:/proc/x", "/a:/dev", "/a:/workspace"]
        {
            assert!(bad.parse::<LiveMount>().is_err(), "{bad}");
        }
    }

    #[test]
    fn all_of_them_are_checked_together() {
        let owner = Some(Owner { uid: 1000, gid: 1000 });
        let check =
            |list: &[&str], owner| Mounts { list: list.iter().map(|m| mount(m)).collect(), owner }.check();
        assert_eq!(check(&[], None), Ok(()));
        assert_eq!(check(&["/a", "/b"], None), Ok(()));
        assert_eq!(check(&["/a:rw"], owner), Ok(()));
        assert_eq!(check(&["/a:rw"], None), Err(MountError::NoOwner));
        let root = Some(Owner { uid: 0, gid: 0 });
        assert_eq!(check(&["/a"], root), Err(MountError::NoOwner));
        assert_eq!(check(&["/a/x", "/b/x"], owner), Err(MountError::Twice("/mnt/x".into())));
        assert_eq!(check(&["a"], owner), Err(MountError::Relative("a".into())));
        let many: Vec<String> = (0..17).map(|n| format!("/{n}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(check(&many, owner), Err(MountError::TooMany(17)));
    }

    #[test]
    fn what_was_written_by_somebody_else_is_checked_as_well() {
        let smuggled = LiveMount { target: "/dev/../etc".into(), ..mount("/a") };
        assert!(Mounts { list: vec![smuggled], owner: None }.check().is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_survived_and_what_is_taken_is_sound(text in "\\PC{0,40}") {
            if let Ok(mount) = text.parse::<LiveMount>() {
                prop_assert!(check_target(&mount.target).is_ok());
                let text = format!("{}:{}:{}", mount.source.display(), mount.target.display(), if mount.writable { "rw" } else { "ro" });
                prop_assert_eq!(text.parse::<LiveMount>().unwrap(), mount);
            }
        }
    }
}
