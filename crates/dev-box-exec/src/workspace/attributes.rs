//! A guest's metadata on a descriptor: the IO beneath the rules of [`dev_box_comm::share`].

use std::os::fd::AsFd;

use dev_box_comm::share::{self, Attributes, HostKind};
use rustix::fs::{self, FileType, XattrFlags};
use rustix::io::Errno;

use super::{Kind, Owner, Refusal};

/// What an entry is for the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GuestMeta {
    pub(super) kind: Kind,
    /// Permission bits, without set-user-id, set-group-id and sticky.
    pub(super) mode: u32,
}

/// Gives a staged file or directory its meaning in the guest.
pub(super) fn write(file: impl AsFd, kind: Kind, mode: u32, owner: Owner) -> Result<(), Errno> {
    let kind = match kind {
        Kind::File => share::Kind::File,
        Kind::Directory => share::Kind::Directory,
        Kind::Symlink => share::Kind::Symlink,
    };
    for (name, value) in share::attributes(kind, mode, owner.uid, owner.gid) {
        fs::fsetxattr(&file, name, &value, XattrFlags::empty())?;
    }
    Ok(())
}

/// What a guest means an entry to be; `host` is the type and mode of the host's file.
pub(super) fn read(file: impl AsFd, host: FileType, host_mode: u32) -> Result<GuestMeta, Refusal> {
    let mut value = [0; 8];
    let mode = match fs::fgetxattr(&file, share::XATTR_MODE, &mut value[..]) {
        Ok(len) => value.get(..len),
        // Made by nobody through 9p; the host's own mode is what there is.
        Err(Errno::NODATA | Errno::OPNOTSUPP) => None,
        Err(Errno::RANGE) => return Err(Refusal::BadAttributes),
        Err(error) => return Err(Refusal::System(error.to_string())),
    };
    let host = match host {
        FileType::RegularFile => HostKind::File,
        FileType::Directory => HostKind::Directory,
        _ => HostKind::Other,
    };
    let meta = share::decode(host, host_mode, Attributes { mode, ..Attributes::default() })?;
    let kind = match meta.kind {
        share::Kind::File => Kind::File,
        share::Kind::Directory => Kind::Directory,
        share::Kind::Symlink => Kind::Symlink,
    };
    Ok(GuestMeta { kind, mode: meta.mode })
}

impl From<share::Refusal> for Refusal {
    fn from(refusal: share::Refusal) -> Self {
        match refusal {
            share::Refusal::Fifo => Self::Fifo,
            share::Refusal::Socket => Self::Socket,
            share::Refusal::Device | share::Refusal::HostKind => Self::Device,
            share::Refusal::Link => Self::BadTarget,
            share::Refusal::Size(_) | share::Refusal::Type(_) => Self::BadAttributes,
        }
    }
}

/// Why a host file of this type is not even opened.
pub(super) fn refuse_type(host: FileType) -> Result<(), Refusal> {
    match host {
        FileType::RegularFile | FileType::Directory => Ok(()),
        FileType::Fifo => Err(Refusal::Fifo),
        FileType::Socket => Err(Refusal::Socket),
        FileType::Symlink => Err(Refusal::RealSymlink),
        _ => Err(Refusal::Device),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn set(file: &File, mode: &[u8]) {
        fs::fsetxattr(file, share::XATTR_MODE, mode, XattrFlags::empty()).unwrap();
    }

    #[test]
    fn what_is_written_is_read() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let owner = Owner { uid: 1000, gid: 100 };
        for kind in [Kind::File, Kind::Symlink] {
            write(file.as_file(), kind, 0o104_755, owner).unwrap();
            let read = read(file.as_file(), FileType::RegularFile, 0o600).unwrap();
            assert_eq!(read, GuestMeta { kind, mode: 0o755 }, "set-user-id does not come back");
        }
        let mut raw = [0; 4];
        fs::fgetxattr(file.as_file(), share::XATTR_UID, &mut raw[..]).unwrap();
        assert_eq!(raw, [0xe8, 3, 0, 0]);
        let dir = File::open(dir.path()).unwrap();
        write(&dir, Kind::Directory, 0o750, owner).unwrap();
        let read = read(&dir, FileType::Directory, 0o700).unwrap();
        assert_eq!(read, GuestMeta { kind: Kind::Directory, mode: 0o750 });
    }

    #[test]
    fn devices_of_the_guests_and_nonsense_are_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let file = file.as_file();
        let plain = read(file, FileType::RegularFile, 0o640).unwrap();
        assert_eq!(plain, GuestMeta { kind: Kind::File, mode: 0o640 }, "no attributes: the host's mode");
        for (mode, refusal) in [
            (0o010_644_u32, Refusal::Fifo),
            (0o140_644, Refusal::Socket),
            (0o020_644, Refusal::Device),
            (0o060_644, Refusal::Device),
            (0o040_755, Refusal::BadAttributes),
            (0, Refusal::BadAttributes),
            (u32::MAX, Refusal::BadAttributes),
        ] {
            set(file, &mode.to_le_bytes());
            assert_eq!(read(file, FileType::RegularFile, 0o600), Err(refusal), "{mode:o}");
        }
        assert_eq!(read(file, FileType::Fifo, 0o600), Err(Refusal::Device));
        for bad in [&b""[..], b"abc", b"12345", &[0; 1000]] {
            set(file, bad);
            assert_eq!(read(file, FileType::RegularFile, 0o600), Err(Refusal::BadAttributes));
        }
    }

    #[test]
    fn real_special_files_are_not_opened() {
        for (kind, refusal) in [
            (FileType::Fifo, Refusal::Fifo),
            (FileType::Socket, Refusal::Socket),
            (FileType::Symlink, Refusal::RealSymlink),
            (FileType::BlockDevice, Refusal::Device),
            (FileType::CharacterDevice, Refusal::Device),
            (FileType::Unknown, Refusal::Device),
        ] {
            assert_eq!(refuse_type(kind), Err(refusal));
        }
        assert_eq!((refuse_type(FileType::RegularFile), refuse_type(FileType::Directory)), (Ok(()), Ok(())));
    }
}
