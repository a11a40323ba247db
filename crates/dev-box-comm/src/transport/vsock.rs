//! vsock(7): sockets between a host and its guests, without a network.

use std::io;

use tokio_vsock::{VMADDR_CID_ANY, VsockAddr, VsockListener, VsockStream};

use super::{BoxFuture, Connection, Dial, DialError, Listen};
use crate::VSOCK_PORT;

/// The host's context id, as a guest sees it.
pub const HOST_CID: u32 = 2;

/// Dials a guest by its context id, and checks that it is the one that answered.
#[derive(Debug, Clone, Copy)]
pub struct VsockDial {
    cid: u32,
    port: u32,
}

impl VsockDial {
    /// The agent of the guest with context id `cid`.
    pub fn new(cid: u32) -> Self {
        Self { cid, port: VSOCK_PORT }
    }

    /// Another port than [`VSOCK_PORT`].
    #[must_use]
    pub fn port(mut self, port: u32) -> Self {
        self.port = port;
        self
    }
}

impl Dial for VsockDial {
    fn dial(&self) -> BoxFuture<'_, Result<Connection, DialError>> {
        Box::pin(async move {
            let connected = VsockStream::connect(VsockAddr::new(self.cid, self.port)).await;
            let stream = connected.map_err(|error| connect_error(self.describe(), error))?;
            let peer = stream.peer_addr().map_err(|error| DialError::from_io(self.describe(), error))?;
            let actual = peer.cid();
            if actual != self.cid {
                return Err(DialError::WrongPeer { at: self.describe(), expected: self.cid, actual });
            }
            Ok(Box::new(stream) as Connection)
        })
    }

    fn describe(&self) -> String {
        format!("vsock:{}:{}", self.cid, self.port)
    }
}

/// vsock says in its own way that nobody is there: a guest without a listener resets the connection, one that is not up
/// yet is no device, or does not answer.
fn connect_error(at: String, source: io::Error) -> DialError {
    use io::ErrorKind::{ConnectionReset, HostUnreachable, NetworkUnreachable, TimedOut};
    /// `ENODEV`, errno(3); it has no kind of its own.
    const NO_DEVICE: i32 = 19;
    match source.kind() {
        ConnectionReset | HostUnreachable | NetworkUnreachable | TimedOut => {
            DialError::NotThere { at, source }
        }
        _ if source.raw_os_error() == Some(NO_DEVICE) => DialError::NotThere { at, source },
        _ => DialError::from_io(at, source),
    }
}

/// Listens for the host: connections from any other context id (a process in the guest has the loopback's) are closed
/// before a byte is read.
#[derive(Debug)]
pub struct VsockListen {
    listener: VsockListener,
    peer: u32,
    refused: u64,
}

impl VsockListen {
    /// On `port`, for the host only.
    ///
    /// # Errors
    /// No vsock in this kernel, or the port is taken.
    pub fn bind(port: u32) -> io::Result<Self> {
        Self::bind_for(port, HOST_CID)
    }

    /// On `port`, for context id `peer` only.
    ///
    /// # Errors
    /// As [`VsockListen::bind`].
    pub fn bind_for(port: u32, peer: u32) -> io::Result<Self> {
        let listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))?;
        Ok(Self { listener, peer, refused: 0 })
    }
}

impl Listen for VsockListen {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<Connection>> {
        Box::pin(async move {
            loop {
                let (stream, address) = self.listener.accept().await?;
                if address.cid() == self.peer {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_there_is_worth_another_try() {
        // ECONNRESET: no listener; ENODEV, ETIMEDOUT, EHOSTUNREACH: no guest yet; ECONNREFUSED. And EACCES is not.
        for (errno, retryable) in
            [(104, true), (19, true), (110, true), (113, true), (111, true), (13, false)]
        {
            let error = connect_error("vsock:5:1".to_owned(), io::Error::from_raw_os_error(errno));
            assert_eq!(error.is_retryable(), retryable, "{errno}: {error:?}");
        }
    }
}
