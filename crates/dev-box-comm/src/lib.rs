//! The control channel between host and guest: frames, messages, multiplexed streams, transports.
//!
//! Layers, from the wire up; each knows only those above it in this list:
//!
//! | module | what | IO |
//! |---|---|---|
//! | [`frame`] | the wire grammar; encoder and decoder | none |
//! | [`message`] | requests and messages inside frames; JSON with limits | none |
//! | [`hello`] | the first frame each way: generations, nonce, limits | none |
//! | [`mux`] | streams, lanes, credit: a pure state machine | none |
//! | [`session`] | the driver task and the handles | any `AsyncRead + AsyncWrite` |
//! | [`relay`](mod@relay) | a stream of one session handed on to another | none of its own |
//! | [`transport`] | how a connection comes to be: unix socket, vsock | yes |
//! | [`share`] | rules of the 9p workspace | none |
//!
//! Everything that comes from the other side is taken to be hostile: lengths are checked before anything is allocated,
//! counts, depths and times are bounded, and every breach is a typed reason that closes the session, never a panic.

pub mod frame;
pub mod hello;
pub mod message;
pub mod mux;
pub mod relay;
pub mod session;
pub mod share;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod transport;

pub use hello::{GuestHello, HandshakeError, HostHello, Nonce};
pub use message::{Message, Request};
pub use relay::{Relayed, relay};
pub use session::{CloseReason, GuestStream, Incoming, LaneReader, LaneWriter, Session, Stream};

/// Name of the virtio-serial port.
pub const SERIAL_PORT_NAME: &str = "dev-box.channel.0";

/// The vsock port the guest's agent listens on.
pub const VSOCK_PORT: u32 = 5227;
