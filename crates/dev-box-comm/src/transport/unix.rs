//! The unix socket QEMU serves for a virtio-serial port.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use tokio::net::UnixStream;

use super::{BoxFuture, Connection, Dial, DialError};

/// `sun_path` less its terminating NUL, unix(7).
const MAX_PATH: usize = 107;

/// Dials a unix socket. QEMU serves one client at a time: a second one connects, but hears nothing.
#[derive(Debug, Clone)]
pub struct UnixDial {
    path: PathBuf,
}

impl UnixDial {
    /// The socket at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Where.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Dial for UnixDial {
    fn dial(&self) -> BoxFuture<'_, Result<Connection, DialError>> {
        Box::pin(async move {
            if self.path.as_os_str().as_bytes().len() > MAX_PATH {
                return Err(DialError::PathTooLong { path: self.path.clone() });
            }
            match UnixStream::connect(&self.path).await {
                Ok(stream) => Ok(Box::new(stream) as Connection),
                Err(error) => Err(DialError::from_io(self.describe(), error)),
            }
        })
    }

    fn describe(&self) -> String {
        format!("unix:{}", self.path.display())
    }
}
