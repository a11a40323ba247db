//! A connection with the codec on it.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWrite};

use super::Io;
use crate::frame::{Decoder, Encoder, Frame, FrameError, WriteQueue};
use crate::hello::HandshakeError;
use crate::message::{JsonError, encode};

/// Slices of one write.
const SLICES: usize = 16;

/// A connection, what was read from it and not decoded, what was encoded and not written.
pub(super) struct Wire {
    io: Box<dyn Io>,
    pub(super) decoder: Decoder,
    encoder: Encoder,
    out: WriteQueue,
    flushed: bool,
}

impl std::fmt::Debug for Wire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Wire")
            .field("to_write", &self.out.len())
            .field("to_decode", &self.decoder.buffered())
            .finish()
    }
}

/// Why no frame comes.
#[derive(Debug)]
pub(super) enum WireError {
    Eof,
    Io(io::Error),
    Frame(FrameError),
    /// Too much that is no hello.
    Noise,
}

impl From<io::Error> for WireError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<WireError> for HandshakeError {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Eof => Self::Eof,
            WireError::Io(error) => Self::Io(error.kind(), error.to_string()),
            WireError::Frame(error) => Self::Malformed(error.to_string()),
            WireError::Noise => Self::NoHello(super::handshake::MAX_SKIPPED),
        }
    }
}

impl Wire {
    pub(super) fn new(io: Box<dyn Io>) -> Self {
        let out = if io.is_write_vectored() { WriteQueue::new() } else { WriteQueue::contiguous() };
        Self { io, decoder: Decoder::hunting(), encoder: Encoder::new(), out, flushed: true }
    }

    /// Forgets what an earlier conversation left to write, and counts frames from 0 again.
    pub(super) fn restart_sending(&mut self) {
        self.out = if self.io.is_write_vectored() { WriteQueue::new() } else { WriteQueue::contiguous() };
        self.encoder = Encoder::new();
    }

    pub(super) fn push(&mut self, frame: &Frame) {
        self.encoder.encode(frame, &mut self.out);
    }

    pub(super) fn push_hello(&mut self, hello: &impl Serialize) -> Result<(), JsonError> {
        let json = encode(hello)?;
        let max = crate::frame::MAX_HELLO - crate::hello::MAGIC.len();
        if json.len() > max {
            return Err(JsonError::TooLong { len: json.len(), max });
        }
        self.push(&Frame::Hello(Bytes::from(json)));
        Ok(())
    }

    /// Bytes encoded and not written.
    pub(super) fn unwritten(&self) -> usize {
        self.out.len()
    }

    /// Writes all there is.
    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.out.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES];
            let filled = self.out.fill(&mut slices);
            let slices = slices.get(..filled).unwrap_or_default();
            let written = ready!(Pin::new(&mut *self.io).poll_write_vectored(cx, slices))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.out.advance(written);
            self.flushed = false;
        }
        if !self.flushed {
            ready!(Pin::new(&mut *self.io).poll_flush(cx))?;
            self.flushed = true;
        }
        Poll::Ready(Ok(()))
    }

    /// Reads once. The error is `None` at the connection's end.
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Option<io::Error>>> {
        let mut space = self.decoder.space();
        let read = pin!(self.io.read_buf(&mut space));
        match ready!(std::future::Future::poll(read, cx)) {
            Ok(0) => Poll::Ready(Err(None)),
            Ok(_) => Poll::Ready(Ok(())),
            Err(error) => Poll::Ready(Err(Some(error))),
        }
    }

    /// The next frame, writing meanwhile; gives up when more than `most` bytes are no frame. Cancellation safe. For the
    /// handshake.
    pub(super) async fn next_frame(&mut self, most: u64) -> Result<Frame, WireError> {
        poll_fn(|cx| {
            if let Poll::Ready(Err(error)) = self.poll_write(cx) {
                return Poll::Ready(Err(error.into()));
            }
            loop {
                match self.decoder.next_frame() {
                    Ok(Some(frame)) => return Poll::Ready(Ok(frame)),
                    Ok(None) if self.decoder.skipped() > most => return Poll::Ready(Err(WireError::Noise)),
                    Ok(None) => {
                        ready!(self.poll_read(cx))
                            .map_err(|error| error.map_or(WireError::Eof, WireError::Io))?;
                    }
                    Err(error) => return Poll::Ready(Err(WireError::Frame(error))),
                }
            }
        })
        .await
    }

    /// Writes all there is.
    pub(super) async fn write_all(&mut self) -> io::Result<()> {
        poll_fn(|cx| self.poll_write(cx)).await
    }
}
