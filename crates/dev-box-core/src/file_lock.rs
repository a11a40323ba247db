//! Locks by flock(2) on files that whoever holds them removes.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

/// Whether `file` still is the file of that name. What was opened before somebody removed it, and locked after that, is a file
/// without a name, which the next one does not find: a lock counts once this holds, and is opened anew where it does not.
///
/// # Errors
/// The file system's, but for that nothing has the name.
///
/// # Examples
/// ```
/// use dev_box_core::file_lock::has_name;
///
/// let directory = tempfile::tempdir()?;
/// let path = directory.path().join("lock");
/// let file = std::fs::File::create(&path)?;
/// file.try_lock()?;
/// assert!(has_name(&file, &path)?);
/// std::fs::remove_file(&path)?;
/// assert!(!has_name(&file, &path)?, "nobody else finds it");
/// std::fs::File::create(&path)?;
/// assert!(!has_name(&file, &path)?, "what others find is another one");
/// # Ok::<_, std::io::Error>(())
/// ```
pub fn has_name(file: &File, path: &Path) -> io::Result<bool> {
    let locked = file.metadata()?;
    match fs::metadata(path) {
        Ok(named) => Ok((named.dev(), named.ino()) == (locked.dev(), locked.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_its_name_until_it_goes_or_another_has_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("lock");
        let file = File::create(&path).unwrap();
        assert!(has_name(&file, &path).unwrap());
        fs::remove_file(&path).unwrap();
        assert!(!has_name(&file, &path).unwrap());
        let other = File::create(&path).unwrap();
        assert!(!has_name(&file, &path).unwrap() && has_name(&other, &path).unwrap());
        assert!(has_name(&file, &path.join("beneath a file")).is_err());
    }
}
