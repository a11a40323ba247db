//! Small JSON files about VMs: replaced as a whole, read within bounds.

use std::fs::OpenOptions;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::fs::OFlags;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Larger ones are not read, in bytes.
const MAX: u64 = 1 << 20;

/// Replaces a file: whoever reads meanwhile sees the old one or the new one, and so does who comes after a crash.
///
/// # Errors
/// The file system's.
pub(crate) fn replace(path: &Path, record: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec_pretty(record)?;
    let new = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
    file.write_all(&text)?;
    file.sync_all()?;
    std::fs::rename(&new, path)
}

/// Reads one. A link is not followed, and what is no record of that type is refused as `InvalidData`.
///
/// # Errors
/// The file system's, and `InvalidData`.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    let nofollow = OFlags::NOFOLLOW.union(OFlags::NONBLOCK).bits();
    let file = OpenOptions::new().read(true).custom_flags(nofollow.cast_signed()).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "no regular file"));
    }
    let mut text = Vec::new();
    if file.take(MAX + 1).read_to_end(&mut text)? as u64 > MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "too long for a record"));
    }
    Ok(serde_json::from_slice(&text)?)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn what_was_written_is_read_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        replace(&path, &[1, 2]).unwrap();
        replace(&path, &[1, 2, 3]).unwrap();
        assert_eq!(read::<Vec<u32>>(&path).unwrap(), [1, 2, 3]);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let link = dir.path().join("link");
        symlink(&path, &link).unwrap();
        assert!(read::<Vec<u32>>(&link).is_err(), "a link is not followed");
        assert!(read::<Vec<u32>>(dir.path()).is_err(), "a directory");
        assert_eq!(read::<Vec<String>>(&path).unwrap_err().kind(), io::ErrorKind::InvalidData);
        fs::write(&path, vec![b' '; (MAX + 1) as usize]).unwrap();
        assert!(read::<Vec<u32>>(&path).unwrap_err().to_string().contains("too long"));
        fs::write(&path, "[1, 2").unwrap();
        assert!(read::<Vec<u32>>(&path).is_err(), "half of one");
    }
}
