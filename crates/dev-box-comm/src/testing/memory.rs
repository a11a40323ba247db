//! In-memory transport.

use std::io;
use std::path::Path;

use tokio::io::{DuplexStream, duplex};
use tokio::net::UnixListener;
use tokio::sync::mpsc;

use crate::transport::{BoxFuture, Connection, Dial, DialError, Listen};

/// Bytes in flight each way.
const CAPACITY: usize = 64 * 1024;

/// Dials the [`MemoryListen`] it was made with, as the context id given.
#[derive(Debug, Clone)]
pub struct MemoryDial {
    cid: u32,
    to: mpsc::Sender<(u32, DuplexStream)>,
}

/// Accepts from one context id, as the vsock listener does.
#[derive(Debug)]
pub struct MemoryListen {
    peer: u32,
    from: mpsc::Receiver<(u32, DuplexStream)>,
    refused: u64,
}

/// A transport in memory; its dialler has context id 2 (the host's), and the listener takes only that.
pub fn memory() -> (MemoryDial, MemoryListen) {
    let (to, from) = mpsc::channel(16);
    (MemoryDial { cid: 2, to }, MemoryListen { peer: 2, from, refused: 0 })
}

impl MemoryDial {
    /// The same way, but as somebody else.
    #[must_use]
    pub fn as_cid(&self, cid: u32) -> Self {
        Self { cid, to: self.to.clone() }
    }
}

impl Dial for MemoryDial {
    fn dial(&self) -> BoxFuture<'_, Result<Connection, DialError>> {
        Box::pin(async move {
            let (ours, theirs) = duplex(CAPACITY);
            match self.to.send((self.cid, theirs)).await {
                Ok(()) => Ok(Box::new(ours) as Connection),
                Err(_) => Err(DialError::from_io(self.describe(), io::ErrorKind::ConnectionRefused.into())),
            }
        })
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}

impl Listen for MemoryListen {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Connection>> {
        Box::pin(async move {
            loop {
                let Some((cid, stream)) = self.from.recv().await else {
                    return Err(io::ErrorKind::ConnectionAborted.into());
                };
                if cid == self.peer {
                    return Ok(Box::new(stream) as Connection);
                }
                self.refused += 1;
            }
        })
    }

    fn refused(&self) -> u64 {
        self.refused
    }
}

/// A unix socket in the place of QEMU's.
#[derive(Debug)]
pub struct UnixListen {
    listener: UnixListener,
}

impl UnixListen {
    /// Binds `path`.
    ///
    /// # Errors
    /// As bind(2).
    pub fn bind(path: &Path) -> io::Result<Self> {
        UnixListener::bind(path).map(|listener| Self { listener })
    }
}

impl Listen for UnixListen {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Connection>> {
        Box::pin(async move {
            let (stream, _) = self.listener.accept().await?;
            Ok(Box::new(stream) as Connection)
        })
    }

    fn refused(&self) -> u64 {
        0
    }
}
