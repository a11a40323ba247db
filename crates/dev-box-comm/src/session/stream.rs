//! A stream's handles.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use bytes::Bytes;

use super::state::{Owner, Slot, State};
use super::{CloseReason, StreamError};
use crate::frame::MAX_MESSAGE;
use crate::message::{JsonError, Message, encode};
use crate::mux::{End, Read, Refused};

/// What all halves of a stream hold; the last one dropped forgets the stream.
#[derive(Debug)]
pub(super) struct Core {
    owner: Arc<Owner>,
    id: u32,
}

impl Core {
    pub(super) fn new(owner: Arc<Owner>, id: u32) -> Arc<Self> {
        Arc::new(Self { owner, id })
    }

    fn with<R>(&self, change: impl FnOnce(&mut State, u32) -> R) -> R {
        self.owner.shared.with(|state| change(state, self.id))
    }

    /// Tries until the queue is not full.
    async fn queue(
        &self,
        slot: Slot,
        mut attempt: impl FnMut(&mut State, u32) -> Result<(), Refused>,
    ) -> Result<(), StreamError> {
        poll_fn(|cx| {
            self.with(|state, id| {
                if let Some(reason) = &state.closed {
                    return Poll::Ready(Err(StreamError::Closed(reason.clone())));
                }
                match attempt(state, id) {
                    Ok(()) => Poll::Ready(Ok(())),
                    Err(Refused::Full) => {
                        state.wait(id, slot, cx);
                        Poll::Pending
                    }
                    Err(Refused::Ended) => Poll::Ready(Err(StreamError::Ended)),
                    Err(Refused::Reset) => Poll::Ready(Err(StreamError::Reset)),
                }
            })
        })
        .await
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        self.with(|state, id| {
            state.mux.release(id);
            state.forget_wakers(id);
        });
    }
}

/// What the two message halves hold; dropped with the second, it resets a stream that has not ended.
#[derive(Debug)]
struct Life {
    core: Arc<Core>,
}

impl Drop for Life {
    fn drop(&mut self) {
        self.core.with(|state, id| state.mux.reset(id));
    }
}

fn halves(core: &Arc<Core>) -> (MessageSender, MessageReceiver) {
    let life = Arc::new(Life { core: Arc::clone(core) });
    (MessageSender { life: Arc::clone(&life) }, MessageReceiver { life })
}

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

impl Stream {
    pub(super) fn new(core: Arc<Core>) -> Self {
        let (sender, receiver) = halves(&core);
        let input = LaneWriter { core: Arc::clone(&core), lane: 0 };
        let output = LaneReader { core: Arc::clone(&core), lane: 1 };
        let errors = LaneReader { core, lane: 2 };
        Self { parts: StreamParts { sender, receiver, input, output, errors } }
    }
}

impl GuestStream {
    pub(super) fn new(core: Arc<Core>) -> Self {
        let (sender, receiver) = halves(&core);
        let input = LaneReader { core: Arc::clone(&core), lane: 0 };
        let output = LaneWriter { core: Arc::clone(&core), lane: 1 };
        let errors = LaneWriter { core, lane: 2 };
        Self { parts: GuestStreamParts { sender, receiver, input, output, errors } }
    }
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
pub struct MessageSender {
    life: Arc<Life>,
}

impl MessageSender {
    /// The stream's number in its session, for logs.
    pub fn id(&self) -> u32 {
        self.life.core.id
    }

    /// Queues a message; waits while the queue is full (the other side does not read). Dropped before it returned, nothing
    /// was queued.
    ///
    /// A *last* message ([`Message::is_last`]) ends this side of the stream: it goes out after everything written to the
    /// stream's lanes before it, and the lanes end with it. The handles may be dropped once this returned.
    ///
    /// # Errors
    /// [`StreamError`]: reset, ended (by an earlier last message), closed, or too long.
    pub async fn send(&mut self, message: Message) -> Result<(), StreamError> {
        let payload = Bytes::from(encode(&message).map_err(StreamError::TooLong)?);
        if payload.len() > MAX_MESSAGE {
            return Err(StreamError::TooLong(JsonError::TooLong { len: payload.len(), max: MAX_MESSAGE }));
        }
        let last = message.is_last();
        let attempt = |state: &mut State, id| state.mux.send(id, payload.clone(), last);
        self.life.core.queue(Slot::Send, attempt).await
    }

    /// After a last message: waits until the other side has confirmed the end, having everything that was sent, or the session
    /// has closed. Set a time-out around it: a stopped one never does.
    pub async fn closed(&mut self) {
        poll_fn(|cx| {
            self.life.core.with(|state, id| {
                if state.closed.is_some() || state.mux.is_closed(id) {
                    return Poll::Ready(());
                }
                state.wait(id, Slot::Send, cx);
                Poll::Pending
            })
        })
        .await;
    }

    /// Resets the stream now, whatever other halves exist.
    pub fn reset(&mut self) {
        self.life.core.with(|state, id| state.mux.reset(id));
    }
}

/// Receives a stream's messages.
#[derive(Debug)]
pub struct MessageReceiver {
    life: Arc<Life>,
}

impl MessageReceiver {
    /// The next message; `None` after the last. Cancellation safe.
    ///
    /// # Errors
    /// [`StreamError::Reset`] or [`StreamError::Closed`] after every message that came before that was handed out.
    pub async fn recv(&mut self) -> Result<Option<Message>, StreamError> {
        Ok(self.receive_costed().await?.map(|(message, _)| message))
    }

    /// The same, with the credit that the message took.
    pub(super) async fn receive_costed(&mut self) -> Result<Option<(Message, u32)>, StreamError> {
        poll_fn(|cx| {
            self.life.core.with(|state, id| match state.mux.receive_costed(id) {
                Read::Item(costed) => Poll::Ready(Ok(Some(costed))),
                Read::End(End::Finished | End::Unfinished) => Poll::Ready(Ok(None)),
                Read::End(End::Reset) => Poll::Ready(Err(StreamError::Reset)),
                Read::End(End::Local) => Poll::Ready(Err(StreamError::Ended)),
                Read::Empty => match &state.closed {
                    Some(reason) => Poll::Ready(Err(StreamError::Closed(reason.clone()))),
                    None => {
                        state.wait(id, Slot::Receive, cx);
                        Poll::Pending
                    }
                },
            })
        })
        .await
    }
}

/// Writes one lane.
///
/// Dropped without [`finish`](LaneWriter::finish) it sends nothing: the reader sees no end until the stream ends.
#[derive(Debug)]
pub struct LaneWriter {
    core: Arc<Core>,
    lane: u8,
}

impl LaneWriter {
    /// Queues bytes; waits while the lane's queue is full (the reader does not read, or the channel is slow). Dropped
    /// before it returned, nothing was queued. Any size, also empty; split into frames as needed, never copied twice.
    ///
    /// # Errors
    /// [`StreamError`].
    pub async fn write(&mut self, bytes: Bytes) -> Result<(), StreamError> {
        let attempt = |state: &mut State, id| state.mux.write(id, self.lane, bytes.clone());
        self.core.queue(Slot::Lane(self.lane), attempt).await
    }

    /// Waits until everything queued was handed to the connection.
    ///
    /// # Errors
    /// [`StreamError`].
    pub async fn flush(&mut self) -> Result<(), StreamError> {
        let attempt = |state: &mut State, id| match state.mux.written(id, self.lane) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Refused::Full),
            Err(refused) => Err(refused),
        };
        self.core.queue(Slot::Lane(self.lane), attempt).await
    }

    /// Ends the lane: the reader sees the end after all that was written. Never waits; more than once is the same as once.
    pub fn finish(&mut self) {
        self.core.with(|state, id| state.mux.finish(id, self.lane));
    }
}

/// Reads one lane.
///
/// While it is not read, only this lane of this stream stalls. Dropped, what comes is thrown away as if it were read.
#[derive(Debug)]
pub struct LaneReader {
    core: Arc<Core>,
    lane: u8,
}

impl LaneReader {
    /// The next bytes, at most 64 KiB, never empty; `None` at the end, and [`end`](LaneReader::end) then says which kind.
    /// Cancellation safe.
    pub async fn next(&mut self) -> Option<Bytes> {
        poll_fn(|cx| {
            self.core.with(|state, id| match state.mux.read(id, self.lane) {
                Read::Item(bytes) => Poll::Ready(Some(bytes)),
                Read::End(_) => Poll::Ready(None),
                Read::Empty if state.closed.is_some() => Poll::Ready(None),
                Read::Empty => {
                    state.wait(id, Slot::Lane(self.lane), cx);
                    Poll::Pending
                }
            })
        })
        .await
    }

    /// How the lane ended; `None` while it has not, or while there is something to read.
    pub fn end(&self) -> Option<LaneEnd> {
        self.core.with(|state, id| match state.mux.lane_end(id, self.lane) {
            Some(End::Finished) => Some(LaneEnd::Finished),
            Some(End::Unfinished) => Some(LaneEnd::Unfinished),
            Some(End::Reset | End::Local) => Some(LaneEnd::Reset),
            None => state.closed.clone().filter(|_| state.mux.lane_empty(id, self.lane)).map(LaneEnd::Closed),
        })
    }
}

impl Drop for LaneReader {
    fn drop(&mut self) {
        self.core.with(|state, id| state.mux.discard(id, self.lane));
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
