//! The file of the first key, and the rule for every secret file: its owner's, and nobody else's to read.

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    io::Errno,
};

use super::chain::Key;

/// Why a secret file was not used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyFileError {
    /// It is not there, or cannot be read.
    #[error("cannot use the key file {}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others may read or write it.
    #[error("{} has mode {mode:04o}: others can reach the secret in it (chmod 600 it; whoever has read it can forge what it signs)", path.display())]
    Exposed {
        /// Which.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It belongs to somebody else.
    #[error("{} belongs to uid {owner}, not to root or to uid {us}, who runs this", path.display())]
    Foreign {
        /// Which.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Who we are.
        us: u32,
    },
    /// Its content is not a key.
    #[error("{} is not a dev-box audit key", path.display())]
    Malformed {
        /// Which.
        path: PathBuf,
    },
}

const MAGIC: &str = "dev-box-audit-key-1";

/// The first key and the chain it belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirstKey {
    /// The chain's id, in its first record too.
    pub chain: String,
    /// The key of record 1.
    pub key: Key,
}

impl FirstKey {
    /// Reads a key file; it must be its owner's alone.
    ///
    /// # Errors
    /// [`KeyFileError`].
    pub fn read(path: &Path) -> Result<Self, KeyFileError> {
        let io = |source| KeyFileError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        check_private(path, &file)?;
        let mut text = String::new();
        file.take(1024).read_to_string(&mut text).map_err(io)?;
        let malformed = || KeyFileError::Malformed { path: path.to_owned() };
        let mut words = text.split_ascii_whitespace();
        let (Some(MAGIC), Some(chain), Some(key), None) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(malformed());
        };
        Ok(Self { chain: chain.to_owned(), key: Key::from_hex(key).map_err(|_| malformed())? })
    }

    /// Has the key file be there, as a whole or not at all, synced, with mode 0600. Where there is one already, that stays. Gives what
    /// is there.
    pub(crate) fn put(&self, path: &Path) -> Result<Self, KeyFileError> {
        let io = |source| KeyFileError::Io { path: path.to_owned(), source };
        let dir = match path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        let name = path.file_name().ok_or_else(|| io(io::ErrorKind::InvalidInput.into()))?;
        // A process that died in here left a copy of a key that is to be kept elsewhere.
        sweep(dir, name).map_err(io)?;
        if !path.exists() {
            let beside = dir.join(beside(name).map_err(io)?);
            let placed = self.write(&beside).and_then(|()| place(&beside, path));
            if placed.is_err() {
                let _ = fs::remove_file(&beside);
            }
            placed.map_err(io)?;
            File::open(dir).and_then(|dir| dir.sync_all()).map_err(io)?;
        }
        Self::read(path)
    }

    fn write(&self, path: &Path) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(format!("{MAGIC} {} {}\n", self.chain, self.key.to_hex()).as_bytes())?;
        file.sync_all()
    }
}

/// How the names begin of files on their way to be a key file.
fn prefix(name: &OsStr) -> OsString {
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push(".new-");
    prefix
}

/// A name that nobody has.
fn beside(name: &OsStr) -> io::Result<OsString> {
    let mut number = [0; 8];
    getrandom::fill(&mut number).map_err(|error| io::Error::other(error.to_string()))?;
    let mut beside = prefix(name);
    beside.push(hex::encode(number));
    Ok(beside)
}

/// Takes away what was on its way: only who has the log's lock puts a key.
fn sweep(dir: &Path, name: &OsStr) -> io::Result<()> {
    let prefix = prefix(name);
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(prefix.as_encoded_bytes()) {
            match fs::remove_file(entry.path()) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

/// Gives the file its name, unless something has that.
fn place(from: &Path, to: &Path) -> io::Result<()> {
    let placed = match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Not every file system can (NFS).
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            fs::hard_link(from, to).and_then(|()| fs::remove_file(from))
        }
        renamed => renamed.map_err(io::Error::from),
    };
    match placed {
        // Somebody was first.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => fs::remove_file(from),
        placed => placed,
    }
}

/// Refuses a file that others may read or write, or that is somebody else's.
pub(crate) fn check_private(path: &Path, file: &File) -> Result<(), KeyFileError> {
    let metadata = file.metadata().map_err(|source| KeyFileError::Io { path: path.to_owned(), source })?;
    let us = rustix::process::geteuid().as_raw();
    let owner = metadata.uid();
    if owner != us && owner != 0 {
        return Err(KeyFileError::Foreign { path: path.to_owned(), owner, us });
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::Exposed { path: path.to_owned(), mode });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u8) -> FirstKey {
        FirstKey { chain: hex::encode([number; 16]), key: Key::from_bytes([number; 32]) }
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_key_is_there_as_a_whole_and_nothing_is_left_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("first.key");
        // As a process leaves it that is killed over it, and others' files.
        for name in [".first.key.new-0123456789abcdef", ".first.key.new-", ".first.key", "first.key.old"] {
            fs::write(dir.path().join(name), "dev-box-aud").unwrap();
        }
        assert_eq!(key(1).put(&path).unwrap(), key(1));
        assert_eq!(names(dir.path()), [".first.key", "first.key", "first.key.old"]);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        // Killed after that, where no name can be taken without a link.
        fs::hard_link(&path, dir.path().join(".first.key.new-1")).unwrap();
        assert_eq!(key(1).put(&path).unwrap(), key(1));
        assert_eq!(names(dir.path()).len(), 3);
    }

    #[test]
    fn who_is_second_gets_what_the_first_put() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("first.key");
        key(1).put(&path).unwrap();
        assert_eq!(key(2).put(&path).unwrap(), key(1));
        // In between, too.
        let late = dir.path().join("late");
        key(2).write(&late).unwrap();
        place(&late, &path).unwrap();
        assert_eq!((FirstKey::read(&path).unwrap(), late.exists()), (key(1), false));
    }

    #[test]
    fn what_is_no_key_stays_and_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("first.key");
        key(1).write(&path).unwrap();
        fs::write(&path, "").unwrap();
        assert!(matches!(key(1).put(&path), Err(KeyFileError::Malformed { .. })));
        assert_eq!(names(dir.path()), ["first.key"]);
    }
}
