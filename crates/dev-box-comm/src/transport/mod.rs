//! How a connection comes to be.
//!
//! Host: [`Dial`]; guest: [`Listen`]. A virtio-serial port is opened by the guest's agent itself and handed to
//! [`GuestPort`](crate::session::GuestPort).

mod choose;
#[cfg(test)]
mod tests;
mod unix;
#[cfg(feature = "vsock")]
mod vsock;

use std::fmt;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;

use crate::session::Io;

pub use choose::{Choice, Preference, Probes, ReasonForSerial, TransportKind, choose};
pub use unix::UnixDial;
#[cfg(feature = "vsock")]
pub use vsock::{HOST_CID, VsockDial, VsockListen};

/// A boxed future, so that the traits are object-safe.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A connection of any transport.
pub type Connection = Box<dyn Io>;

/// The host's way to a guest.
pub trait Dial: fmt::Debug + Send + Sync {
    /// Makes a connection. That somebody answers on it is the hello's business. Cancellation safe.
    fn dial(&self) -> BoxFuture<'_, Result<Connection, DialError>>;

    /// For messages and logs: `unix:/path`, `vsock:5:5227`.
    fn describe(&self) -> String;
}

/// The guest's way to wait for its host.
pub trait Listen: fmt::Debug + Send {
    /// The next connection from the host; anybody else's is closed at once and counted. Cancellation safe.
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Connection>>;

    /// Connections refused so far because they were not the host's.
    fn refused(&self) -> u64;
}

/// Why no connection came to be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// Nothing there yet, or no more: no socket file, nobody listening. Worth another try while a VM starts.
    #[error("nothing answers at {at}")]
    NotThere {
        /// Where.
        at: String,
        /// The system's error.
        source: io::Error,
    },
    /// The socket is there but not for us.
    #[error("no permission for {at}: run as root, or as the user that owns the VM")]
    PermissionDenied {
        /// Where.
        at: String,
        /// The system's error.
        source: io::Error,
    },
    /// A path longer than a socket's address holds (107 bytes).
    #[error("the socket's path {path} is longer than 107 bytes: choose a shorter state directory")]
    PathTooLong {
        /// The path.
        path: PathBuf,
    },
    /// The other end is not who it should be.
    #[error("the connection to {at} is with context {actual}, not {expected}")]
    WrongPeer {
        /// Where.
        at: String,
        /// Who should have answered.
        expected: u32,
        /// Who did.
        actual: u32,
    },
    /// Anything else.
    #[error("the connection to {at} failed")]
    Io {
        /// Where.
        at: String,
        /// The system's error.
        source: io::Error,
    },
}

impl DialError {
    /// Sorts a system error.
    pub fn from_io(at: String, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Self::NotThere { at, source },
            io::ErrorKind::PermissionDenied => Self::PermissionDenied { at, source },
            _ => Self::Io { at, source },
        }
    }

    /// Whether the other end may only be late.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::NotThere { .. })
    }
}
