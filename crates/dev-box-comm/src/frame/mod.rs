//! The wire grammar, its encoder and its decoder.
//!
//! # Grammar (all integers little-endian)
//! ```text
//! connection = *OCTET hello *frame           ; each way; what precedes the hello is skipped
//! frame      = length type lane sequence stream payload crc
//! length     = u32   ; bytes after this field: 12 + the payload's, so 12 ..= 12 + 262144
//! type       = u8    ; see below
//! lane       = u8    ; DATA, FINISH: 0..=2. CREDIT: 0..=2, or 3 for messages. MESSAGE: 1 when last, else 0. Others: 0
//! sequence   = u16   ; counts this side's frames from 0, wrapping; 0 and not counted for HELLO and PAD
//! stream     = u32   ; 0 for HELLO, PAD, PING, PONG, CLOSE; others 1.., rising with every OPEN
//! payload    = *OCTET
//! crc        = u32   ; CRC-32/ISO-HDLC of everything before it, length included
//! ```
//! | type | | from | payload |
//! |---|---|---|---|
//! | 1 | HELLO | both | [`MAGIC`] and JSON, at most 16 KiB; the host's first |
//! | 2 | PAD | both | zeros, ignored: completes a frame that was cut short, so that a HELLO behind it is found |
//! | 3 | OPEN | host | JSON, a [`Request`](crate::message::Request) |
//! | 4 | MESSAGE | both | JSON, a [`Message`](crate::message::Message), at most 64 KiB |
//! | 5 | DATA | both | 1 byte to 64 KiB |
//! | 6 | FINISH | both | none: the lane ended |
//! | 7 | CREDIT | both | u32 above 0: so many more bytes may be sent |
//! | 8 | RESET | both | none: the sender gave the stream up, or confirms that the other did |
//! | 9 | END | host | none: confirms the guest's last message |
//! | 10 | PING | both | u64 |
//! | 11 | PONG | both | the PING's u64 |
//! | 12 | CLOSE | both | u8 reason: 0 done, 1 violation, 2 deadline |
//!
//! The form of a frame and of HELLO never change; the rest is what a *generation* fixes (see `VERSIONING.md`).
//!
//! # Decoder
//! ```text
//!              HELLO found                        anything wrong
//! hunting ────────────────────▶ locked ─────────────────────────────▶ failed
//!    ▲  skips all else            │ frames, in order                     │
//!    └────────────────────────────┴──────────── resync() ────────────────┘ (the failed frame's bytes are searched again)
//! ```
//! The length is checked before anything is allocated for it. The CRC finds corruption and lost synchrony; it is no
//! defence against a forger, and nothing treats it as one.

mod decode;
mod encode;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod tests;

use bytes::{Buf, Bytes};

use crate::hello::MAGIC;

pub use decode::Decoder;
pub use encode::{Encoder, WriteQueue};

/// Longest payload of any frame, in bytes.
pub const MAX_PAYLOAD: usize = 256 * 1024;
/// Longest payload of a DATA frame, in bytes.
pub const MAX_DATA: usize = 64 * 1024;
/// Longest payload of a MESSAGE frame, in bytes.
pub const MAX_MESSAGE: usize = 64 * 1024;
/// Longest payload of a HELLO frame, in bytes.
pub const MAX_HELLO: usize = 16 * 1024;
/// Bytes before the payload.
pub const HEADER: usize = 12;
/// Bytes of a frame besides its payload.
pub const OVERHEAD: usize = HEADER + 4;
/// Lanes of a stream.
pub const LANES: u8 = 3;
/// The number by which CREDIT means the stream's messages.
pub const MESSAGES: u8 = 3;

/// What `length` counts besides the payload.
const LENGTH_BASE: usize = OVERHEAD - 4;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// A hello; the payload without its magic.
    Hello(Bytes),
    /// Padding of this many bytes.
    Pad(usize),
    /// A new stream.
    Open {
        /// Its number.
        stream: u32,
        /// The request, JSON.
        request: Bytes,
    },
    /// A message.
    Message {
        /// Stream.
        stream: u32,
        /// The sender's side of the stream ends with it.
        last: bool,
        /// The message, JSON.
        payload: Bytes,
    },
    /// Bytes of a lane.
    Data {
        /// Stream.
        stream: u32,
        /// 0, 1 or 2.
        lane: u8,
        /// Never empty.
        payload: Bytes,
    },
    /// End of a lane.
    Finish {
        /// Stream.
        stream: u32,
        /// 0, 1 or 2.
        lane: u8,
    },
    /// Leave to send more.
    Credit {
        /// Stream.
        stream: u32,
        /// 0, 1, 2 or [`MESSAGES`].
        lane: u8,
        /// How much more, in bytes; above 0.
        bytes: u32,
    },
    /// The stream is given up.
    Reset {
        /// Stream.
        stream: u32,
    },
    /// The guest's last message was seen.
    End {
        /// Stream.
        stream: u32,
    },
    /// A sign of life is asked for.
    Ping(u64),
    /// The sign of life.
    Pong(u64),
    /// The session ends.
    Close(u8),
}

/// Why bytes are no frame.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// A length below 12 or above the maximum; nothing was allocated for it.
    #[error("a frame's length is {0}, it must be 12 to {max}", max = LENGTH_BASE + MAX_PAYLOAD)]
    Length(u32),
    /// The check sum does not fit: corruption, or lost synchrony.
    #[error("a frame's CRC32 is {got:#010x}, it should be {expected:#010x}")]
    Crc {
        /// Of what came.
        expected: u32,
        /// What came with it.
        got: u32,
    },
    /// A frame was lost, repeated or replayed.
    #[error("frame number {got} came where {expected} should be: one was lost, or one was replayed")]
    Sequence {
        /// The next in order.
        expected: u16,
        /// What came.
        got: u16,
    },
    /// A type that this generation does not have.
    #[error("a frame of unknown type {0}")]
    UnknownType(u8),
    /// A payload, lane or stream that its type does not allow.
    #[error("a frame of type {kind}: {what}")]
    Malformed {
        /// The type.
        kind: u8,
        /// What is wrong with it.
        what: &'static str,
    },
}

impl Frame {
    /// The type's number on the wire.
    pub fn kind(&self) -> u8 {
        match self {
            Self::Hello(_) => 1,
            Self::Pad(_) => 2,
            Self::Open { .. } => 3,
            Self::Message { .. } => 4,
            Self::Data { .. } => 5,
            Self::Finish { .. } => 6,
            Self::Credit { .. } => 7,
            Self::Reset { .. } => 8,
            Self::End { .. } => 9,
            Self::Ping(_) => 10,
            Self::Pong(_) => 11,
            Self::Close(_) => 12,
        }
    }

    fn lane(&self) -> u8 {
        match self {
            Self::Data { lane, .. } | Self::Finish { lane, .. } | Self::Credit { lane, .. } => *lane,
            Self::Message { last, .. } => u8::from(*last),
            _ => 0,
        }
    }

    fn stream(&self) -> u32 {
        match self {
            Self::Open { stream, .. }
            | Self::Message { stream, .. }
            | Self::Data { stream, .. }
            | Self::Finish { stream, .. }
            | Self::Credit { stream, .. }
            | Self::Reset { stream }
            | Self::End { stream } => *stream,
            _ => 0,
        }
    }

    /// Whether it has a place in the sequence.
    fn counted(&self) -> bool {
        !matches!(self, Self::Hello(_) | Self::Pad(_))
    }

    /// Makes sense of a frame whose length and CRC are right.
    fn parse(header: Header, mut payload: Bytes) -> Result<Self, FrameError> {
        let Header { kind, lane, stream, sequence } = header;
        let require = |ok: bool, what| if ok { Ok(()) } else { Err(FrameError::Malformed { kind, what }) };
        let size = payload.len();
        if !(1..=12).contains(&kind) {
            return Err(FrameError::UnknownType(kind));
        }
        if matches!(kind, 1 | 2 | 10..=12) {
            require(stream == 0, "its stream is not 0")?;
        } else {
            require(stream != 0, "its stream is 0")?;
        }
        if matches!(kind, 1 | 2) {
            require(sequence == 0, "it carries a sequence number")?;
        }
        let lane_ok = match kind {
            4 => lane <= 1,
            5 | 6 => lane < LANES,
            7 => lane <= MESSAGES,
            _ => lane == 0,
        };
        require(lane_ok, "no such lane")?;
        Ok(match kind {
            1 => {
                require(size <= MAX_HELLO, "too long")?;
                require(payload.starts_with(&MAGIC), "its magic is not there")?;
                payload.advance(MAGIC.len());
                Self::Hello(payload)
            }
            2 => {
                require(payload.iter().all(|&b| b == 0), "padding that is not zero")?;
                Self::Pad(size)
            }
            3 => Self::Open { stream, request: payload },
            4 => {
                require(size <= MAX_MESSAGE, "too long")?;
                Self::Message { stream, last: lane == 1, payload }
            }
            5 => {
                require((1..=MAX_DATA).contains(&size), "it must carry 1 to 65536 bytes")?;
                Self::Data { stream, lane, payload }
            }
            7 => {
                require(size == 4, "it must carry 4 bytes")?;
                let bytes = payload.get_u32_le();
                require(bytes > 0, "no credit in it")?;
                Self::Credit { stream, lane, bytes }
            }
            6 | 8 | 9 => {
                require(size == 0, "it must carry nothing")?;
                match kind {
                    6 => Self::Finish { stream, lane },
                    8 => Self::Reset { stream },
                    _ => Self::End { stream },
                }
            }
            10 | 11 => {
                require(size == 8, "it must carry 8 bytes")?;
                let token = payload.get_u64_le();
                if kind == 10 { Self::Ping(token) } else { Self::Pong(token) }
            }
            _ => {
                require(size == 1, "it must carry 1 byte")?;
                Self::Close(payload.get_u8())
            }
        })
    }
}

/// A header's fields behind the length.
#[derive(Debug, Clone, Copy)]
struct Header {
    kind: u8,
    lane: u8,
    sequence: u16,
    stream: u32,
}

impl Header {
    fn parse(bytes: &[u8; HEADER]) -> Self {
        let [_, _, _, _, kind, lane, s0, s1, a, b, c, d] = *bytes;
        Self { kind, lane, sequence: u16::from_le_bytes([s0, s1]), stream: u32::from_le_bytes([a, b, c, d]) }
    }
}

/// Checks a claimed length; gives the whole frame's size in bytes.
fn frame_size(length: u32) -> Result<usize, FrameError> {
    let size = usize::try_from(length).map_err(|_| FrameError::Length(length))?;
    if (LENGTH_BASE..=LENGTH_BASE + MAX_PAYLOAD).contains(&size) {
        Ok(size + 4)
    } else {
        Err(FrameError::Length(length))
    }
}
