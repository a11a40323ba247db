//! A session: the protocol on one connection, ready to use.
//!
//! ```text
//!            connect / accept             violation, EOF, deadline, close, new hello
//! connection ────────────────▶ open ──────────────────────────────────────────────────▶ closed(CloseReason)
//! ```
//!
//! One driver task per session owns the connection; [`Session`], [`Stream`] and their halves are handles on the
//! same state. Every handle is cancellation safe: a future that is dropped has either done all it was to do or nothing.

mod driver;
mod handshake;
mod port;
mod state;
mod stream;
#[cfg(test)]
mod tests;
mod wire;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::frame::MAX_MESSAGE;
use crate::hello::{GuestHello, HandshakeError, HostHello, WireLimits};
use crate::message::{GuestError, Message, Request, encode};
use crate::mux::{MESSAGE_COST, Mux, MuxLimits, Refused, Role};
use driver::{Carrier, Driver};
use handshake::Identity;
use state::{Owner, Shared};
use stream::Core;
use wire::Wire;

pub use port::GuestPort;
pub use stream::{
    GuestStream, GuestStreamParts, LaneEnd, LaneReader, LaneWriter, MessageReceiver, MessageSender, Stream,
    StreamParts,
};

/// What a session's connection must be.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Io for T {}

/// Deadlines and limits of one side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionConfig {
    /// For the whole handshake. Host only; the guest waits for ever.
    pub hello: Duration,
    /// Between two reads inside one frame ("half a header, then silence").
    pub gap: Duration,
    /// For one whole frame, from its first byte to its last.
    pub frame: Duration,
    /// Largest window a lane that is being read may grow to, in bytes.
    pub lane_window_max: u32,
    /// What all lanes of the session may grow by together, in bytes.
    pub window_budget: u32,
    /// Bytes a lane's writer may queue before `write` waits.
    pub send_queue: usize,
}

impl Default for SessionConfig {
    fn default() -> Self {
        Self {
            hello: Duration::from_secs(10),
            gap: Duration::from_secs(10),
            frame: Duration::from_secs(30),
            lane_window_max: 1024 * 1024,
            window_budget: 8 * 1024 * 1024,
            send_queue: 128 * 1024,
        }
    }
}

/// A handle on a session; clones are handles on the same one. When the last handle (streams included) is dropped, the
/// session closes.
#[derive(Clone)]
pub struct Session {
    owner: Arc<Owner>,
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("closed", &self.close_reason()).finish_non_exhaustive()
    }
}

impl Session {
    /// The host's side: says hello on a fresh connection and waits for the guest's.
    ///
    /// Bytes before the guest's hello (left over from an earlier conversation on a virtio-serial port) are skipped; the
    /// hello is repeated until it is answered. Uses [`SessionConfig::default`]. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`HandshakeError`]; the connection is closed then.
    pub async fn connect(io: impl Io, hello: HostHello) -> Result<(Self, GuestHello), HandshakeError> {
        Self::connect_with(io, hello, SessionConfig::default()).await
    }

    /// As [`Session::connect`] with deadlines and limits.
    ///
    /// # Errors
    /// [`HandshakeError`].
    pub async fn connect_with(
        io: impl Io,
        mut hello: HostHello,
        config: SessionConfig,
    ) -> Result<(Self, GuestHello), HandshakeError> {
        hello.limits = sane(hello.limits);
        let (wire, guest, identity) = handshake::connect(Box::new(io), &hello, &config).await?;
        let owner = start(wire, Role::Host, identity, (hello.limits, guest.limits), &config, None);
        Ok((Self { owner }, guest))
    }

    /// The guest's side of one connection (vsock): waits for the host's hello and answers. For a virtio-serial port,
    /// which outlives its conversations, use [`GuestPort`].
    ///
    /// # Errors
    /// [`HandshakeError`]; with [`HandshakeError::Version`] the host was answered, so that it can say why.
    pub async fn accept(
        io: impl Io,
        hello: GuestHello,
    ) -> Result<(Self, Incoming, HostHello), HandshakeError> {
        GuestPort::new(io).accept(hello).await
    }

    /// Host: opens a stream with a request. Waits while as many streams are open as the guest allows; one that this side gave
    /// up counts until the guest confirms it, so set a time-out where a guest may have stopped. Cancellation safe: dropped
    /// before it returned, nothing stays open.
    ///
    /// # Errors
    /// [`StreamError::Closed`]; [`StreamError::TooLong`] for a request that does not fit a frame.
    pub async fn open(&self, request: Request) -> Result<Stream, StreamError> {
        let shared = &self.owner.shared;
        let payload = Bytes::from(encode(&request).map_err(StreamError::TooLong)?);
        let Ok(permit) = shared.slots.acquire().await else { return Err(StreamError::Closed(self.reason())) };
        let opened = shared.with(|state| {
            if let Some(reason) = &state.closed {
                return Err(StreamError::Closed(reason.clone()));
            }
            let id = state.mux.open(payload).map_err(|refused| match refused {
                Refused::Reset => StreamError::Reset,
                Refused::Full | Refused::Ended => StreamError::Ended,
            })?;
            // Given back when the stream is closed on the wire.
            permit.forget();
            state.taken += 1;
            Ok(id)
        })?;
        Ok(Stream::new(Core::new(Arc::clone(&self.owner), opened)))
    }

    /// Host: opens a stream and collects every message to the last, which is `Done` (not among them).
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn call(&self, request: Request) -> Result<Vec<Message>, CallError> {
        let mut stream = self.open(request).await?;
        let mut messages = Vec::new();
        let mut left = MAX_CALL_BYTES;
        loop {
            let Some((message, cost)) = stream.parts().receiver.receive_costed().await? else {
                return Err(CallError::Unexpected("an unknown one"));
            };
            match message {
                Message::Done => return Ok(messages),
                Message::Failed(error) => return Err(error.into()),
                Message::Exited(_) => return Err(CallError::Unexpected("exited")),
                message => {
                    left = left.checked_sub(cost).ok_or(CallError::TooMuch)?;
                    messages.push(message);
                }
            }
        }
    }

    /// Asks the other side's session for a sign of life; gives the round trip's time. Set a time-out around it: a
    /// stopped guest never answers.
    ///
    /// # Errors
    /// [`CloseReason`] when the session closed.
    pub async fn ping(&self) -> Result<Duration, CloseReason> {
        let shared = &self.owner.shared;
        let asked = Instant::now();
        let token = shared.with(|state| state.mux.ping());
        loop {
            let answered = shared.pong.notified();
            let mut answered = std::pin::pin!(answered);
            answered.as_mut().enable();
            let (ponged, closed) = shared.with(|state| (state.mux.ponged(), state.closed.clone()));
            if ponged >= token {
                return Ok(asked.elapsed());
            }
            if let Some(reason) = closed {
                return Err(reason);
            }
            answered.await;
        }
    }

    /// Stops the clocks for frames ([`SessionConfig::gap`], [`SessionConfig::frame`]) while the guard lives: to be held
    /// while the VM is paused, which can happen in the middle of a frame.
    #[must_use]
    pub fn hold_deadlines(&self) -> DeadlineHold {
        self.owner.shared.holds.fetch_add(1, Ordering::AcqRel);
        DeadlineHold { owner: Arc::clone(&self.owner) }
    }

    /// Closes the session: tells the other side, writes what is queued in front of that, and ends every stream.
    pub fn close(&self) {
        self.owner.shared.with(|state| state.closing = true);
    }

    /// Waits until the session is closed; gives why. Returns at once when it already is.
    pub async fn closed(&self) -> CloseReason {
        let mut closed = self.owner.shared.closed.subscribe();
        match closed.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or(CloseReason::Local),
            Err(_) => CloseReason::Local,
        }
    }

    /// Why it closed, if it has.
    pub fn close_reason(&self) -> Option<CloseReason> {
        self.owner.shared.closed.borrow().clone()
    }

    fn reason(&self) -> CloseReason {
        self.close_reason().unwrap_or(CloseReason::Local)
    }
}

/// Starts a session's driver.
fn start(
    wire: Wire,
    role: Role,
    identity: Identity,
    (own, peer): (WireLimits, WireLimits),
    config: &SessionConfig,
    back: Option<oneshot::Sender<Carrier>>,
) -> Arc<Owner> {
    // A guest that allows no stream would have every caller wait for ever.
    let peer = WireLimits { streams: peer.streams.max(1), ..peer };
    let limits = MuxLimits {
        own,
        peer,
        lane_window_max: config.lane_window_max,
        window_budget: config.window_budget,
        send_queue: config.send_queue.max(1),
    };
    let shared = Shared::new(Mux::new(role, limits), peer.streams);
    tokio::spawn(Driver::new(wire, Arc::clone(&shared), identity, config).run(back));
    Arc::new(Owner { shared })
}

/// A window in which the longest message fits twice never deadlocks on half-window credit.
fn sane(limits: WireLimits) -> WireLimits {
    #[expect(clippy::cast_possible_truncation, reason = "64 KiB")]
    let message = 2 * (MAX_MESSAGE as u32 + MESSAGE_COST);
    WireLimits {
        streams: limits.streams.max(1),
        lane_window: limits.lane_window.max(4096),
        message_window: limits.message_window.max(message),
    }
}

/// Keeps a session's frame deadlines stopped. See [`Session::hold_deadlines`].
#[derive(Debug)]
pub struct DeadlineHold {
    owner: Arc<Owner>,
}

impl Drop for DeadlineHold {
    fn drop(&mut self) {
        self.owner.shared.hold_epoch.fetch_add(1, Ordering::AcqRel);
        self.owner.shared.holds.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Guest: the streams the host opens, in order. Requests of unknown type never show up here: the session answers them.
/// Dropped, every stream the host opens is reset.
#[derive(Debug)]
pub struct Incoming {
    owner: Arc<Owner>,
}

impl Incoming {
    /// The next request and its stream; `None` when the session is closed. Cancellation safe.
    pub async fn next(&mut self) -> Option<(Request, GuestStream)> {
        let (id, request) = std::future::poll_fn(|cx| {
            self.owner.shared.with(|state| match state.mux.accept() {
                _ if state.closed.is_some() => Poll::Ready(None),
                Some(accepted) => Poll::Ready(Some(accepted)),
                None => {
                    state.accept = Some(cx.waker().clone());
                    Poll::Pending
                }
            })
        })
        .await?;
        Some((request, GuestStream::new(Core::new(Arc::clone(&self.owner), id))))
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.owner.shared.with(|state| {
            state.incoming_gone = true;
            while let Some((id, _)) = state.mux.accept() {
                state.mux.release(id);
            }
        });
    }
}

/// Why a session closed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CloseReason {
    /// This side closed it, or dropped its last handle.
    #[error("closed by this side")]
    Local,
    /// The other side closed it in order.
    #[error("closed by the other side ({0})")]
    Peer(PeerClose),
    /// The connection ended: the guest's QEMU is gone, or the host went away.
    #[error("the connection ended")]
    Eof,
    /// Reading or writing failed.
    #[error("the connection failed: {1}")]
    Io(std::io::ErrorKind, String),
    /// The other side broke the protocol; it is not to be trusted with another try.
    #[error("the other side broke the protocol: {0}")]
    Violation(crate::mux::Violation),
    /// A frame took too long.
    #[error("{0}")]
    Deadline(FrameDeadline),
    /// Guest: the host said hello anew on the same port.
    #[error("the host started a new conversation")]
    Superseded,
}

impl CloseReason {
    /// What it means for a VM whose channel this side held, in words for whoever used it.
    #[must_use]
    pub fn fate(&self) -> String {
        use crate::frame::FrameError;
        use crate::mux::Violation;
        match self {
            Self::Eof | Self::Io(..) => {
                format!("its QEMU is gone: shut down, killed or crashed ({self})")
            }
            // Whoever begins to speak in the middle of a conversation does not know of it.
            Self::Violation(
                Violation::Frame(FrameError::Sequence { got: 0, .. }) | Violation::UnexpectedHello,
            ) => {
                format!("its agent began anew, since it was killed or the guest was restarted ({self})")
            }
            Self::Peer(PeerClose::Done) => "its channel was closed in order".to_owned(),
            _ => self.to_string(),
        }
    }
}

/// What the other side's close frame said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PeerClose {
    /// Nothing more to say.
    #[error("done")]
    Done,
    /// It says we broke the protocol.
    #[error("it says this side broke the protocol")]
    Violation,
    /// It says a frame of ours took too long.
    #[error("it says a frame took too long")]
    Deadline,
    /// A code this side does not know.
    #[error("code {0}")]
    Other(u8),
}

/// Which deadline passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameDeadline {
    /// Silence inside a frame.
    #[error("silence for {0:?} in the middle of a frame")]
    Gap(Duration),
    /// A frame that trickled in too slowly.
    #[error("a frame that was not complete after {0:?}")]
    Frame(Duration),
}

/// Why a stream did not do what was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The other side reset the stream.
    #[error("the other side reset the stream")]
    Reset,
    /// The stream ended: its last message was sent or received, or this side reset it.
    #[error("the stream has ended")]
    Ended,
    /// The session closed.
    #[error("the session closed: {0}")]
    Closed(CloseReason),
    /// The message or request does not fit a frame.
    #[error("does not fit a frame: {0}")]
    TooLong(crate::message::JsonError),
}

/// Why a call got no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The guest says it failed.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The stream or the session ended first.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// More than the answer to a call may be ([`MAX_CALL_BYTES`]).
    #[error("more than {MAX_CALL_BYTES} bytes in answer to one call")]
    TooMuch,
    /// The last message was not `Done`.
    #[error("the guest ended the call with another message than it should: {0}")]
    Unexpected(&'static str),
}

/// Most that [`Session::call`] collects, in bytes on the wire with [`MESSAGE_COST`] for each message. In memory an answer can be eight times
/// as large (many empty words), and still is not much for a host.
pub const MAX_CALL_BYTES: u32 = 4 << 20;
