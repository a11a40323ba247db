//! A session: the protocol on one connection, ready to use.
//!
//! ```text
//!            connect / accept             violation, EOF, deadline, close, new hello
//! connection ────────────────▶ open ──────────────────────────────────────────────────▶ closed(CloseReason)
//! ```
//!
//! One driver task per session owns the connection; [`Session`], [`Stream`] and their halves are handles on the
//! same state. Every handle is cancellation safe: a future that is dropped has either done all it was to do or nothing.

mod stream;

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::hello::{GuestHello, HandshakeError, HostHello};
use crate::message::{GuestError, Message, Request};

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
#[derive(Debug, Clone)]
pub struct Session {}

impl Session {
    /// The host's side: says hello on a fresh connection and waits for the guest's.
    ///
    /// Bytes before the guest's hello (left over from an earlier conversation on a virtio-serial port) are skipped; the
    /// hello is repeated until it is answered. Uses [`SessionConfig::default`].
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
        _io: impl Io,
        _hello: HostHello,
        _config: SessionConfig,
    ) -> Result<(Self, GuestHello), HandshakeError> {
        todo!()
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

    /// Host: opens a stream with a request. Waits while as many streams are open as the guest allows.
    ///
    /// # Errors
    /// [`StreamError::Closed`]; [`StreamError::TooLong`] for a request that does not fit a frame.
    pub async fn open(&self, _request: Request) -> Result<Stream, StreamError> {
        todo!()
    }

    /// Host: opens a stream and collects every message to the last, which is `Done` (not among them).
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn call(&self, _request: Request) -> Result<Vec<Message>, CallError> {
        todo!()
    }

    /// Asks the other side's session for a sign of life; gives the round trip's time. Set a time-out around it: a
    /// stopped guest never answers.
    ///
    /// # Errors
    /// [`CloseReason`] when the session closed.
    pub async fn ping(&self) -> Result<Duration, CloseReason> {
        todo!()
    }

    /// Stops the clocks for frames ([`SessionConfig::gap`], [`SessionConfig::frame`]) while the guard lives: to be held
    /// while the VM is paused, which can happen in the middle of a frame.
    #[must_use]
    pub fn hold_deadlines(&self) -> DeadlineHold {
        todo!()
    }

    /// Closes the session: tells the other side, writes what is queued in front of that, and ends every stream.
    pub fn close(&self) {
        todo!()
    }

    /// Waits until the session is closed; gives why. Returns at once when it already is.
    pub async fn closed(&self) -> CloseReason {
        todo!()
    }

    /// Why it closed, if it has.
    pub fn close_reason(&self) -> Option<CloseReason> {
        todo!()
    }
}

/// Keeps a session's frame deadlines stopped. See [`Session::hold_deadlines`].
#[derive(Debug)]
pub struct DeadlineHold {}

/// The guest's end of a port that outlives its conversations (virtio-serial).
///
/// After a session ended because the host said hello anew ([`CloseReason::Superseded`]), sent nonsense, or closed it,
/// the next [`accept`](GuestPort::accept) looks for the next hello in what the port gives, half-read frames included.
#[derive(Debug)]
pub struct GuestPort {}

impl GuestPort {
    /// Takes the port.
    pub fn new(io: impl Io) -> Self {
        Self::with_config(io, SessionConfig::default())
    }

    /// As [`GuestPort::new`] with deadlines and limits.
    pub fn with_config(_io: impl Io, _config: SessionConfig) -> Self {
        todo!()
    }

    /// Waits for the session before this to end (it does not end it), then for the host's hello, and answers.
    /// Cancellation safe.
    ///
    /// # Errors
    /// [`HandshakeError::Eof`] and [`HandshakeError::Io`]: the port itself ended. After other errors `accept` may be called
    /// again.
    pub async fn accept(
        &mut self,
        _hello: GuestHello,
    ) -> Result<(Session, Incoming, HostHello), HandshakeError> {
        todo!()
    }
}

/// Guest: the streams the host opens, in order. Requests of unknown type never show up here: the session answers them.
#[derive(Debug)]
pub struct Incoming {}

impl Incoming {
    /// The next request and its stream; `None` when the session is closed. Cancellation safe.
    pub async fn next(&mut self) -> Option<(Request, GuestStream)> {
        todo!()
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
    /// More messages than a call may have ([`MAX_CALL_MESSAGES`]).
    #[error("more than {MAX_CALL_MESSAGES} messages in answer to one call")]
    TooMany,
    /// The last message was not `Done`.
    #[error("the guest ended the call with another message than it should: {0}")]
    Unexpected(&'static str),
}

/// Most messages [`Session::call`] collects.
pub const MAX_CALL_MESSAGES: usize = 4096;
