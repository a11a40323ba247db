//! A guest's metadata on a descriptor: `user.virtfs.*`, as QEMU's `accessmode='mapped'` keeps it (little-endian, see
//! `hw/9pfs/9p-local.c` and QEMU's documentation of `security_model=mapped-xattr`).

use std::os::fd::AsFd;

use rustix::fs::{self, FileType, XattrFlags};
use rustix::io::Errno;

use super::{Kind, Owner, Refusal};

const UID: &str = "user.virtfs.uid";
const GID: &str = "user.virtfs.gid";
const MODE: &str = "user.virtfs.mode";

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
        Kind::File => FileType::RegularFile,
        Kind::Directory => FileType::Directory,
        Kind::Symlink => FileType::Symlink,
    };
    let mode = kind.as_raw_mode() | (mode & 0o7777);
    for (name, value) in [(UID, owner.uid), (GID, owner.gid), (MODE, mode)] {
        fs::fsetxattr(&file, name, &value.to_le_bytes(), XattrFlags::empty())?;
    }
    Ok(())
}

/// What a guest means an entry to be; `host` is the type and mode of the host's file.
pub(super) fn read(file: impl AsFd, host: FileType, host_mode: u32) -> Result<GuestMeta, Refusal> {
    let mut value = [0; 4];
    let mode = match fs::fgetxattr(&file, MODE, &mut value[..]) {
        Ok(4) => u32::from_le_bytes(value),
        // Made by nobody through 9p; the host's own mode is what there is.
        Err(Errno::NODATA | Errno::OPNOTSUPP) => host.as_raw_mode() | (host_mode & 0o7777),
        Ok(_) | Err(Errno::RANGE) => return Err(Refusal::BadAttributes),
        Err(error) => return Err(Refusal::System(error.to_string())),
    };
    let kind = match (host, FileType::from_raw_mode(mode)) {
        (FileType::Directory, FileType::Directory) => Kind::Directory,
        (FileType::RegularFile, FileType::RegularFile) => Kind::File,
        (FileType::RegularFile, FileType::Symlink) => Kind::Symlink,
        (FileType::RegularFile, FileType::Fifo) => return Err(Refusal::Fifo),
        (FileType::RegularFile, FileType::Socket) => return Err(Refusal::Socket),
        (FileType::RegularFile, FileType::BlockDevice | FileType::CharacterDevice) => {
            return Err(Refusal::Device);
        }
        _ => return Err(Refusal::BadAttributes),
    };
    Ok(GuestMeta { kind, mode: mode & 0o777 })
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
        fs::fsetxattr(file, MODE, mode, XattrFlags::empty()).unwrap();
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
        fs::fgetxattr(file.as_file(), UID, &mut raw[..]).unwrap();
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
