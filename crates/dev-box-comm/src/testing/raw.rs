//! A peer that says what it likes.

use std::io;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::frame::{Decoder, Encoder, Frame, WriteQueue};
use crate::hello::{GuestAnswer, GuestHello, HostHello, Nonce};
use crate::session::Io;

/// One end of a connection, spoken by hand: well-formed frames, or any bytes at all.
pub struct RawPeer {
    io: Box<dyn Io>,
    decoder: Decoder,
    /// Numbers the frames sent with [`RawPeer::send`].
    pub encoder: Encoder,
}

impl std::fmt::Debug for RawPeer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RawPeer").field("encoder", &self.encoder).finish_non_exhaustive()
    }
}

impl RawPeer {
    /// On a connection.
    pub fn new(io: impl Io) -> Self {
        Self { io: Box::new(io), decoder: Decoder::hunting(), encoder: Encoder::new() }
    }

    /// Plays the guest: waits for the host's hello and answers as `hello` with the nonce that `nonce` makes of the host's.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn greet_host(
        &mut self,
        hello: &GuestHello,
        nonce: impl FnOnce(&HostHello) -> Nonce,
    ) -> io::Result<HostHello> {
        let Some(Frame::Hello(json)) = self.receive().await? else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let host: HostHello = serde_json::from_slice(&json)?;
        let answer = GuestAnswer { nonce: nonce(&host), hello: hello.clone() };
        self.send(&Frame::Hello(Bytes::from(serde_json::to_vec(&answer)?))).await?;
        Ok(host)
    }

    /// Plays the host: says hello and waits for the answer.
    ///
    /// # Errors
    /// The connection failed, or the answer is no hello.
    pub async fn greet_guest(&mut self, hello: &HostHello) -> io::Result<GuestHello> {
        self.send(&Frame::Hello(Bytes::from(serde_json::to_vec(hello)?))).await?;
        match self.receive().await? {
            Some(Frame::Hello(json)) => Ok(serde_json::from_slice(&json)?),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn send(&mut self, frame: &Frame) -> io::Result<()> {
        let mut queue = WriteQueue::contiguous();
        self.encoder.encode(frame, &mut queue);
        self.send_bytes(&queue.into_bytes()).await
    }

    /// Sends any bytes.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn send_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.io.write_all(bytes).await?;
        self.io.flush().await
    }

    /// The next frame; `None` at the end of the connection.
    ///
    /// # Errors
    /// The connection failed, or what came is no frame.
    pub async fn receive(&mut self) -> io::Result<Option<Frame>> {
        loop {
            if let Some(frame) = self.decoder.next_frame().map_err(io::Error::other)? {
                return Ok(Some(frame));
            }
            if self.io.read_buf(&mut self.decoder.space()).await? == 0 {
                return Ok(None);
            }
        }
    }
}
