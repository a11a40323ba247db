//! A file's metadata as the guest meant it.

/// `S_IFMT` and its values, inode(7).
const S_IFMT: u32 = 0o170_000;
const S_IFSOCK: u32 = 0o140_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFREG: u32 = 0o100_000;
const S_IFBLK: u32 = 0o060_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFIFO: u32 = 0o010_000;

/// `PATH_MAX` less its NUL: the longest symlink target.
const MAX_LINK: usize = 4095;

/// What the host has in the staging directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// Anything else: nothing that QEMU makes under `mapped`.
    Other,
}

/// What the guest means by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symlink; the host's file holds its target.
    Symlink,
}

/// A file as the guest means it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meta {
    /// Kind.
    pub kind: Kind,
    /// Permission bits, `0o000..=0o777`: set-user-id, set-group-id and sticky do not leave the guest.
    pub mode: u32,
    /// Owner, where one was recorded.
    pub uid: Option<u32>,
    /// Group, where one was recorded.
    pub gid: Option<u32>,
}

/// Raw values of the attributes; `None` where the file has none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes<'a> {
    /// `user.virtfs.uid`
    pub uid: Option<&'a [u8]>,
    /// `user.virtfs.gid`
    pub gid: Option<&'a [u8]>,
    /// `user.virtfs.mode`
    pub mode: Option<&'a [u8]>,
}

/// Why a file is not brought back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// An attribute that is no little-endian integer of its size.
    #[error("its attribute {0} has the wrong size")]
    Size(&'static str),
    /// A named pipe.
    #[error("a FIFO")]
    Fifo,
    /// A socket.
    #[error("a socket")]
    Socket,
    /// A block or character device.
    #[error("a device")]
    Device,
    /// A type in the attributes that the host's file cannot have.
    #[error("its attributes give it a type ({0:#o}) that the host's file cannot have")]
    Type(u32),
    /// Neither a file nor a directory on the host.
    #[error("neither a file nor a directory on the host")]
    HostKind,
    /// A symlink's target that is empty, too long, or contains NUL.
    #[error("a symlink whose target is empty, longer than 4095 bytes, or contains NUL")]
    Link,
}

/// What a file is, by its attributes and by what lies on the host (`host_mode`: its permission bits there).
///
/// Files without attributes were made on the host's side; they are what they are there.
///
/// # Errors
/// [`Refusal`].
///
/// ```
/// use dev_box_comm::share::{Attributes, HostKind, Kind, decode};
/// let mode = 0o120_777u32.to_le_bytes();
/// let meta = decode(HostKind::File, 0o600, Attributes { mode: Some(&mode), ..Default::default() })?;
/// assert_eq!(meta.kind, Kind::Symlink);
/// # Ok::<(), dev_box_comm::share::Refusal>(())
/// ```
pub fn decode(host: HostKind, host_mode: u32, attributes: Attributes<'_>) -> Result<Meta, Refusal> {
    let natural = match host {
        HostKind::File => S_IFREG,
        HostKind::Directory => S_IFDIR,
        HostKind::Other => return Err(Refusal::HostKind),
    };
    let mode = number(attributes.mode, super::XATTR_MODE)?.unwrap_or(natural | (host_mode & 0o777));
    let uid = number(attributes.uid, super::XATTR_UID)?;
    let gid = number(attributes.gid, super::XATTR_GID)?;
    let kind = match (host, mode & S_IFMT) {
        (_, S_IFIFO) => return Err(Refusal::Fifo),
        (_, S_IFSOCK) => return Err(Refusal::Socket),
        (_, S_IFBLK | S_IFCHR) => return Err(Refusal::Device),
        (HostKind::File, S_IFREG) => Kind::File,
        (HostKind::File, S_IFLNK) => Kind::Symlink,
        (HostKind::Directory, S_IFDIR) => Kind::Directory,
        (_, other) => return Err(Refusal::Type(other)),
    };
    Ok(Meta { kind, mode: mode & 0o777, uid, gid })
}

fn number(raw: Option<&[u8]>, name: &'static str) -> Result<Option<u32>, Refusal> {
    match raw {
        None => Ok(None),
        Some(bytes) => bytes.try_into().map(|b| Some(u32::from_le_bytes(b))).map_err(|_| Refusal::Size(name)),
    }
}

/// The attributes for a staged file: name and value of each.
pub fn attributes(kind: Kind, mode: u32, uid: u32, gid: u32) -> [(&'static str, [u8; 4]); 3] {
    let kind = match kind {
        Kind::File => S_IFREG,
        Kind::Directory => S_IFDIR,
        Kind::Symlink => S_IFLNK,
    };
    [
        (super::XATTR_UID, uid.to_le_bytes()),
        (super::XATTR_GID, gid.to_le_bytes()),
        (super::XATTR_MODE, (kind | (mode & 0o777)).to_le_bytes()),
    ]
}

/// Whether bytes may be a symlink's target. Where it leads is decided by whoever follows it; nothing here does.
///
/// # Errors
/// [`Refusal::Link`].
pub fn check_symlink(target: &[u8]) -> Result<(), Refusal> {
    if target.is_empty() || target.len() > MAX_LINK || target.contains(&0) {
        Err(Refusal::Link)
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn with_mode(host: HostKind, mode: u32) -> Result<Meta, Refusal> {
        let mode = mode.to_le_bytes();
        decode(host, 0o600, Attributes { mode: Some(&mode), ..Attributes::default() })
    }

    #[test]
    fn what_a_guest_may_mean() {
        assert_eq!(with_mode(HostKind::File, 0o104_755).unwrap().mode, 0o755);
        assert_eq!(with_mode(HostKind::File, 0o010_644), Err(Refusal::Fifo));
        assert_eq!(with_mode(HostKind::File, 0o140_644), Err(Refusal::Socket));
        assert_eq!(with_mode(HostKind::File, 0o020_644), Err(Refusal::Device));
        assert_eq!(with_mode(HostKind::File, 0o060_644), Err(Refusal::Device));
        assert_eq!(with_mode(HostKind::File, 0o040_755), Err(Refusal::Type(0o040_000)));
        assert_eq!(with_mode(HostKind::Directory, 0o120_777), Err(Refusal::Type(0o120_000)));
        assert_eq!(with_mode(HostKind::File, 0), Err(Refusal::Type(0)));
        assert_eq!(decode(HostKind::Other, 0, Attributes::default()), Err(Refusal::HostKind));
        let plain = decode(HostKind::Directory, 0o2750, Attributes::default()).unwrap();
        assert_eq!(plain, Meta { kind: Kind::Directory, mode: 0o750, uid: None, gid: None });
        for bad in [&b""[..], b"abc", b"12345678"] {
            let uid = Attributes { uid: Some(bad), ..Attributes::default() };
            assert_eq!(decode(HostKind::File, 0, uid), Err(Refusal::Size("user.virtfs.uid")));
        }
    }

    #[test]
    fn symlink_targets() {
        assert_eq!(check_symlink(b"../x"), Ok(()));
        for bad in [&b""[..], b"a\0b", &[b'a'; 4096]] {
            assert_eq!(check_symlink(bad), Err(Refusal::Link));
        }
    }

    proptest! {
        #[test]
        fn attributes_are_read_as_written(uid: u32, gid: u32, mode in 0..=0o777u32, kind in 0..3usize) {
            let kind = [Kind::File, Kind::Directory, Kind::Symlink][kind];
            let host = if kind == Kind::Directory { HostKind::Directory } else { HostKind::File };
            let [u, g, m] = attributes(kind, mode, uid, gid);
            let raw = Attributes { uid: Some(&u.1), gid: Some(&g.1), mode: Some(&m.1) };
            let meta = Meta { kind, mode, uid: Some(uid), gid: Some(gid) };
            prop_assert_eq!(decode(host, 0o600, raw), Ok(meta));
        }

        #[test]
        fn any_attributes_are_survived(host in 0..3usize, host_mode: u32, mode: Option<Vec<u8>>, uid: Option<Vec<u8>>) {
            let host = [HostKind::File, HostKind::Directory, HostKind::Other][host];
            let raw = Attributes { uid: uid.as_deref(), gid: None, mode: mode.as_deref() };
            if let Ok(meta) = decode(host, host_mode, raw) {
                prop_assert!(meta.mode <= 0o777);
                prop_assert_eq!(meta.kind == Kind::Directory, host == HostKind::Directory);
            }
        }
    }
}
