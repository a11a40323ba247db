//! How a VM's agent is reached: the way in, by transport, and the first conversation on it.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use dev_box_comm::hello::{GuestHello, HandshakeError, HostHello};
use dev_box_comm::session::{Session, SessionConfig};
use dev_box_comm::transport::{Dial, DialError, UnixDial};
use tokio::time::{Instant, sleep, timeout_at};

/// Between two tries to dial a VM that is about to listen.
const RETRY: Duration = Duration::from_millis(10);

/// Where a VM's agent answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Address<'a> {
    /// The unix socket of its virtio-serial port.
    Serial(&'a Path),
    /// Its vsock context id.
    Vsock(u32),
}

/// Makes the way in; a double hands out an in-memory one.
pub trait Reach: fmt::Debug + Send + Sync {
    /// What dials the agent at `address`.
    fn dial(&self, address: Address<'_>) -> Box<dyn Dial>;
}

/// The real transports.
#[derive(Debug, Clone, Copy, Default)]
pub struct Transports;

impl Reach for Transports {
    fn dial(&self, address: Address<'_>) -> Box<dyn Dial> {
        match address {
            Address::Serial(socket) => Box::new(UnixDial::new(socket)),
            #[cfg(feature = "vsock")]
            Address::Vsock(cid) => Box::new(dev_box_comm::transport::VsockDial::new(cid)),
            #[cfg(not(feature = "vsock"))]
            Address::Vsock(cid) => Box::new(NoVsock(cid)),
        }
    }
}

/// Stands in where the feature `vsock` is off; `transport::choose` does not choose it then.
#[cfg(not(feature = "vsock"))]
#[derive(Debug)]
struct NoVsock(u32);

#[cfg(not(feature = "vsock"))]
impl Dial for NoVsock {
    fn dial(
        &self,
    ) -> dev_box_comm::transport::BoxFuture<'_, Result<dev_box_comm::transport::Connection, DialError>> {
        let unsupported = std::io::Error::from(std::io::ErrorKind::Unsupported);
        Box::pin(std::future::ready(Err(DialError::from_io(self.describe(), unsupported))))
    }

    fn describe(&self) -> String {
        format!("vsock:{}", self.0)
    }
}

/// Why an agent could not be reached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReachError {
    /// Nothing answered before the deadline.
    #[error("no answer in time")]
    Silent,
    /// No connection.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// A connection, and no understanding.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
}

/// Dials until there is an answer, and says hello.
///
/// The VM may only be starting: a socket that is not there yet is tried again until `deadline`. On vsock a connection is
/// refused until the agent listens; on virtio-serial QEMU keeps the hello until the agent opens its port.
pub(crate) async fn connect(dial: &dyn Dial, deadline: Instant) -> Result<(Session, GuestHello), ReachError> {
    loop {
        let connection = match timeout_at(deadline, dial.dial()).await {
            Err(_) => return Err(ReachError::Silent),
            Ok(Err(error)) if error.is_retryable() => {
                if timeout_at(deadline, sleep(RETRY)).await.is_err() {
                    return Err(ReachError::Silent);
                }
                continue;
            }
            Ok(connection) => connection?,
        };
        let config = SessionConfig {
            hello: deadline.saturating_duration_since(Instant::now()).max(RETRY),
            ..SessionConfig::default()
        };
        return Ok(Session::connect_with(connection, HostHello::fresh()?, config).await?);
    }
}
