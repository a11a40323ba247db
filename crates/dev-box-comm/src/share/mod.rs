//! Rules of the 9p workspace, without IO: what QEMU's `accessmode='mapped'` writes, what the guest mounts, how much.
//!
//! ```text
//!  host: staging directory ── QEMU, virtio-9p, mapped ──▶ guest: mount -t 9p
//!        regular files, 0600, libvirt-qemu's               files, symlinks, owners, modes as the guest meant them
//!        + extended attributes user.virtfs.*
//! ```
//! Under `mapped` everything a guest makes is a plain file or directory of QEMU's user; what the guest meant lies in four
//! extended attributes, each a little-endian integer (QEMU's documentation of `security_model=mapped-xattr`,
//! `hw/9pfs/9p-local.c`). A symlink is a regular file whose content is its target. The attributes are the guest's word:
//! [`decode`] says what may be made of them, and refuses the rest.

mod limits;
mod meta;

pub use limits::{Limits, OverLimit, Tally};
pub use meta::{Attributes, HostKind, Kind, Meta, Refusal, attributes, check_symlink, decode};

/// The share's mount tag.
pub const TAG: &str = "workspace";
/// Longest mount tag, in bytes: QEMU's `MAX_TAG_LEN`, 32, less its final NUL.
pub const MAX_TAG: usize = 31;
/// Where the workspace is mounted in the guest.
pub const TARGET: &str = "/workspace";
/// `fmode` of the export: mode of the host's files.
pub const FMODE: u32 = 0o600;
/// `dmode` of the export: mode of the host's directories.
pub const DMODE: u32 = 0o700;
/// Largest message of 9p that Linux 6.1's virtio transport takes, in bytes.
pub const MSIZE: u32 = 512_000;

/// Extended attribute that holds the owner, u32.
pub const XATTR_UID: &str = "user.virtfs.uid";
/// Extended attribute that holds the group, u32.
pub const XATTR_GID: &str = "user.virtfs.gid";
/// Extended attribute that holds type and permissions, as `st_mode`, u32.
pub const XATTR_MODE: &str = "user.virtfs.mode";
/// Extended attribute that holds a device's number, u64.
pub const XATTR_RDEV: &str = "user.virtfs.rdev";

/// Options of the guest's mount(2).
///
/// `cache=none`, so that the host sees what was written and a job sees what was staged; `access=client`, so that every user
/// of the guest works under its own number and the guest's kernel checks permissions.
///
/// ```
/// let options = dev_box_comm::share::mount_options();
/// assert!(options.contains("trans=virtio") && options.contains("cache=none"));
/// ```
pub fn mount_options() -> String {
    format!("trans=virtio,version=9p2000.L,msize={MSIZE},cache=none,access=client")
}

/// Whether `tag` may be a mount tag: 1 to 31 of `[A-Za-z0-9._-]`.
pub fn valid_tag(tag: &str) -> bool {
    (1..=MAX_TAG).contains(&tag.len())
        && tag.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags() {
        assert!(valid_tag(TAG) && valid_tag(&"a".repeat(31)));
        for bad in ["", "a b", "a,b", "ä", &"a".repeat(32)] {
            assert!(!valid_tag(bad), "{bad}");
        }
    }

    #[test]
    fn options_have_no_surprises() {
        assert_eq!(mount_options(), "trans=virtio,version=9p2000.L,msize=512000,cache=none,access=client");
    }
}
