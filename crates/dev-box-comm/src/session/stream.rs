//! A stream's handles.

use bytes::Bytes;

use super::{CloseReason, StreamError};
use crate::message::Message;

/// Host: one request's conversation; messages both ways, and lanes of bytes.
///
/// Dropping it before the guest's last message resets it (the guest then stops the job). Once it is split, that happens
/// when both the [`MessageSender`] and the [`MessageReceiver`] are dropped: they own the stream's life, lanes do not.
#[derive(Debug)]
pub struct Stream {
    parts: StreamParts,
}

/// Host: a stream's independent halves; each may live in a task of its own.
#[derive(Debug)]
#[non_exhaustive]
pub struct StreamParts {
    /// Messages to the guest.
    pub sender: MessageSender,
    /// Messages from the guest.
    pub receiver: MessageReceiver,
    /// Lane 0, to the guest: stdin, upload.
    pub input: LaneWriter,
    /// Lane 1, from the guest: stdout, download.
    pub output: LaneReader,
    /// Lane 2, from the guest: stderr.
    pub errors: LaneReader,
}

/// Guest: one request's conversation. Dropping it before a last message was sent resets it.
#[derive(Debug)]
pub struct GuestStream {
    parts: GuestStreamParts,
}

/// Guest: a stream's independent halves; each may live in a task of its own.
#[derive(Debug)]
#[non_exhaustive]
pub struct GuestStreamParts {
    /// Messages to the host.
    pub sender: MessageSender,
    /// Messages from the host. An error here is how a job learns that the host gave up on it.
    pub receiver: MessageReceiver,
    /// Lane 0, from the host: stdin, upload.
    pub input: LaneReader,
    /// Lane 1, to the host: stdout, download.
    pub output: LaneWriter,
    /// Lane 2, to the host: stderr.
    pub errors: LaneWriter,
}

macro_rules! stream_methods {
    ($stream:ty, $parts:ty) => {
        impl $stream {
            /// The stream's number in its session, for logs.
            pub fn id(&self) -> u32 {
                self.parts.sender.id()
            }

            /// Sends a message. See [`MessageSender::send`].
            ///
            /// # Errors
            /// As there.
            pub async fn send(&mut self, message: Message) -> Result<(), StreamError> {
                self.parts.sender.send(message).await
            }

            /// Receives a message. See [`MessageReceiver::recv`].
            ///
            /// # Errors
            /// As there.
            pub async fn recv(&mut self) -> Result<Option<Message>, StreamError> {
                self.parts.receiver.recv().await
            }

            /// The halves, to be used together, without taking the stream apart.
            pub fn parts(&mut self) -> &mut $parts {
                &mut self.parts
            }

            /// Takes the stream apart into halves that may live in tasks of their own.
            pub fn split(self) -> $parts {
                self.parts
            }
        }
    };
}

stream_methods!(Stream, StreamParts);
stream_methods!(GuestStream, GuestStreamParts);

/// Sends a stream's messages.
#[derive(Debug)]
pub struct MessageSender {}

impl MessageSender {
    /// The stream's number in its session, for logs.
    pub fn id(&self) -> u32 {
        todo!()
    }

    /// Queues a message; waits while the queue is full (the other side does not read). Dropped before it returned, nothing
    /// was queued.
    ///
    /// A *last* message ([`Message::is_last`]) ends this side of the stream: it goes out after everything written to the
    /// stream's lanes before it, and the lanes end with it. The handles may be dropped once this returned.
    ///
    /// # Errors
    /// [`StreamError`]: reset, ended (by an earlier last message), closed, or too long.
    pub async fn send(&mut self, _message: Message) -> Result<(), StreamError> {
        todo!()
    }

    /// Resets the stream now, whatever other halves exist.
    pub fn reset(&mut self) {
        todo!()
    }
}

/// Receives a stream's messages.
#[derive(Debug)]
pub struct MessageReceiver {}

impl MessageReceiver {
    /// The next message; `None` after the last. Cancellation safe.
    ///
    /// # Errors
    /// [`StreamError::Reset`] or [`StreamError::Closed`] after every message that came before that was handed out.
    pub async fn recv(&mut self) -> Result<Option<Message>, StreamError> {
        todo!()
    }
}

/// Writes one lane.
///
/// Dropped without [`finish`](LaneWriter::finish) it sends nothing: the reader sees no end until the stream ends.
#[derive(Debug)]
pub struct LaneWriter {}

impl LaneWriter {
    /// Queues bytes; waits while the lane's queue is full (the reader does not read, or the channel is slow). Dropped
    /// before it returned, nothing was queued. Any size, also empty; split into frames as needed, never copied twice.
    ///
    /// # Errors
    /// [`StreamError`].
    pub async fn write(&mut self, _bytes: Bytes) -> Result<(), StreamError> {
        todo!()
    }

    /// Waits until everything queued was handed to the connection.
    ///
    /// # Errors
    /// [`StreamError`].
    pub async fn flush(&mut self) -> Result<(), StreamError> {
        todo!()
    }

    /// Ends the lane: the reader sees the end after all that was written. Never waits; more than once is the same as once.
    pub fn finish(&mut self) {
        todo!()
    }
}

/// Reads one lane.
///
/// While it is not read, only this lane of this stream stalls. Dropped, what comes is thrown away as if it were read.
#[derive(Debug)]
pub struct LaneReader {}

impl LaneReader {
    /// The next bytes, at most 64 KiB, never empty; `None` at the end, and [`end`](LaneReader::end) then says which kind.
    /// Cancellation safe.
    pub async fn next(&mut self) -> Option<Bytes> {
        todo!()
    }

    /// How the lane ended; `None` while it has not, or while there is something to read.
    pub fn end(&self) -> Option<LaneEnd> {
        todo!()
    }
}

/// How a lane ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LaneEnd {
    /// In order: the writer finished it.
    Finished,
    /// The stream's last message came, but the lane was not finished before: what was read may be a part only.
    Unfinished,
    /// The stream was reset.
    Reset,
    /// The session closed.
    Closed(CloseReason),
}
