//! A port that outlives its conversations.

use tokio::sync::oneshot;

use super::driver::Carrier;
use super::wire::Wire;
use super::{Incoming, Io, Session, SessionConfig, handshake, sane, start};
use crate::hello::{GuestHello, HandshakeError, HostHello};
use crate::mux::Role;

/// The guest's end of a port that outlives its conversations (virtio-serial).
///
/// ```text
///             accept: a hello was found and answered
/// waiting ───────────────────────────────────────────▶ in use by a session
///    ▲                                                      │ the session closed: new hello, nonsense, CLOSE, end of file,
///    └──────────────────────────────────────────────────────┘ last handle dropped
/// ```
/// The next [`accept`](GuestPort::accept) looks for the next hello in what the port gives, half-read frames included.
#[derive(Debug)]
pub struct GuestPort {
    config: SessionConfig,
    carrier: Option<Carrier>,
    in_use: Option<oneshot::Receiver<Carrier>>,
}

impl GuestPort {
    /// Takes the port.
    pub fn new(io: impl Io) -> Self {
        Self::with_config(io, SessionConfig::default())
    }

    /// As [`GuestPort::new`] with deadlines and limits.
    pub fn with_config(io: impl Io, config: SessionConfig) -> Self {
        let carrier = Carrier { wire: Wire::new(Box::new(io)), hello: None };
        Self { config, carrier: Some(carrier), in_use: None }
    }

    /// Waits for the session before this to end (it does not end it), then for the host's hello, and answers.
    /// Cancellation safe. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`HandshakeError::Eof`] and [`HandshakeError::Io`]: the port has nobody at its other end, or failed. After any error
    /// `accept` may be called again.
    pub async fn accept(
        &mut self,
        mut hello: GuestHello,
    ) -> Result<(Session, Incoming, HostHello), HandshakeError> {
        if let Some(in_use) = &mut self.in_use {
            let back = in_use.await;
            self.in_use = None;
            self.carrier = back.ok();
        }
        let Some(carrier) = &mut self.carrier else { return Err(HandshakeError::Eof) };
        if carrier.hello.is_none() {
            carrier.hello = Some(handshake::wait_for_host(&mut carrier.wire).await?);
        }
        let Some(host) = carrier.hello.take() else { return Err(HandshakeError::Eof) };
        hello.limits = sane(hello.limits);
        let own = hello.limits;
        carrier.wire.decoder.restart_sequence();
        let identity = handshake::answer(&mut carrier.wire, &host, hello).await?;
        let Some(carrier) = self.carrier.take() else { return Err(HandshakeError::Eof) };
        let (back, in_use) = oneshot::channel();
        self.in_use = Some(in_use);
        let owner = start(carrier.wire, Role::Guest, identity, (own, host.limits), &self.config, Some(back));
        Ok((Session { owner: owner.clone() }, Incoming { owner }, host))
    }
}
