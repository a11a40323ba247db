//! The file of the first key, and the rule for every secret file: its owner's, and nobody else's to read.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
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

    /// Writes a new key file with mode 0600, synced.
    pub(crate) fn write_new(&self, path: &Path) -> Result<(), KeyFileError> {
        let io = |source| KeyFileError::Io { path: path.to_owned(), source };
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).map_err(io)?;
        file.write_all(format!("{MAGIC} {} {}\n", self.chain, self.key.to_hex()).as_bytes()).map_err(io)?;
        file.sync_all().map_err(io)
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
