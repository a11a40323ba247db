//! Files and trees along lanes: threads that may block at one end, the stream at the other, a few buffers between.

use std::io::{self, Read, Write};

use bytes::{Bytes, BytesMut};
use dev_box_comm::message::{GuestError, GuestErrorKind, ReadFile, Tree, WriteFile};
use dev_box_comm::session::{GuestStream, LaneEnd};
use tokio::sync::mpsc;

use super::answers::{blocking, conclude};
use crate::files::{content, tree};

/// Bytes read at a time.
const PART: usize = 256 * 1024;
/// Parts between a thread and the stream.
const PARTS: usize = 4;

/// Sends a file on lane 1.
pub(super) async fn read(request: &ReadFile, stream: GuestStream) {
    let request = request.clone();
    upward(stream, move |parts| {
        let mut reader = content::Reader::open(&request)?;
        loop {
            let mut buffer = BytesMut::zeroed(PART);
            let length = reader.read(&mut buffer)?;
            buffer.truncate(length);
            if length == 0 || parts.blocking_send(buffer.freeze()).is_err() {
                return Ok(());
            }
        }
    })
    .await;
}

/// Sends a tree on lane 1.
pub(super) async fn pack(request: Tree, stream: GuestStream) {
    upward(stream, move |parts| {
        let mut writer = PartWriter { parts, buffer: BytesMut::new() };
        tree::pack(&request, &mut writer)
    })
    .await;
}

/// Puts lane 0 into a file.
pub(super) async fn write(request: WriteFile, stream: GuestStream) {
    downward(stream, move |parts| {
        let mut writer = content::Writer::open(&request)?;
        while let Some(part) = parts.next_part()? {
            writer.write(&part)?;
        }
        writer.finish()
    })
    .await;
}

/// Unpacks lane 0 into a directory.
pub(super) async fn unpack(request: Tree, stream: GuestStream) {
    downward(stream, move |parts| {
        tree::unpack(&request, &mut *parts)?;
        // What follows the archive's end is padding; an upload that was given up is not whole.
        while parts.next_part()?.is_some() {}
        Ok(())
    })
    .await;
}

/// Runs `work` on a thread, sending what it produces along lane 1.
async fn upward(
    mut stream: GuestStream,
    work: impl FnOnce(mpsc::Sender<Bytes>) -> Result<(), GuestError> + Send + 'static,
) {
    let (sender, mut parts) = mpsc::channel(PARTS);
    let working = tokio::spawn(blocking(move || work(sender)));
    while let Some(part) = parts.recv().await {
        if stream.parts().output.write(part).await.is_err() {
            // Dropping the receiver ends the thread's work.
            return;
        }
    }
    stream.parts().output.finish();
    let outcome = working.await.unwrap_or_else(|_| Err(GuestError::new(GuestErrorKind::Other, "cancelled")));
    conclude(&mut stream, outcome).await;
}

/// Runs `work` on a thread, giving it what lane 0 brings.
async fn downward(
    mut stream: GuestStream,
    work: impl FnOnce(&mut PartReader) -> Result<(), GuestError> + Send + 'static,
) {
    let (sender, parts) = mpsc::channel(PARTS);
    let mut working =
        tokio::spawn(blocking(move || work(&mut PartReader { parts, part: Bytes::new(), ended: false })));
    let outcome = loop {
        tokio::select! {
            // It has failed, or had enough.
            outcome = &mut working => break outcome,
            part = stream.parts().input.next() => {
                let last = part.is_none();
                let part = match part {
                    Some(part) => Part::Bytes(part),
                    None if stream.parts().input.end() == Some(LaneEnd::Finished) => Part::End,
                    None => Part::Abandoned,
                };
                let sent = sender.send(part).await;
                if last || sent.is_err() {
                    break (&mut working).await;
                }
            }
        }
    };
    let outcome = outcome.unwrap_or_else(|_| Err(GuestError::new(GuestErrorKind::Other, "cancelled")));
    conclude(&mut stream, outcome).await;
}

/// What lane 0 brought.
enum Part {
    Bytes(Bytes),
    /// The host has finished the lane.
    End,
    /// The stream was reset, or the session closed.
    Abandoned,
}

/// The thread's end of lane 0.
struct PartReader {
    parts: mpsc::Receiver<Part>,
    part: Bytes,
    ended: bool,
}

impl PartReader {
    /// The next bytes; none at the lane's proper end.
    fn next_part(&mut self) -> Result<Option<Bytes>, GuestError> {
        if !self.part.is_empty() {
            return Ok(Some(std::mem::take(&mut self.part)));
        }
        if self.ended {
            return Ok(None);
        }
        match self.parts.blocking_recv() {
            Some(Part::Bytes(part)) => Ok(Some(part)),
            Some(Part::End) => {
                self.ended = true;
                Ok(None)
            }
            Some(Part::Abandoned) | None => {
                Err(GuestError::new(GuestErrorKind::Cancelled, "the upload was given up"))
            }
        }
    }
}

impl Read for PartReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.part.is_empty() {
            let next = self.next_part().map_err(|error| io::Error::other(error.text.raw().to_owned()))?;
            self.part = next.unwrap_or_default();
        }
        let length = self.part.len().min(buffer.len());
        let taken = self.part.split_to(length);
        if let Some(target) = buffer.get_mut(..length) {
            target.copy_from_slice(&taken);
        }
        Ok(length)
    }
}

/// The thread's end of lane 1: collects what is written into parts.
struct PartWriter {
    parts: mpsc::Sender<Bytes>,
    buffer: BytesMut,
}

impl Write for PartWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= PART {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let part = self.buffer.split().freeze();
        self.parts.blocking_send(part).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))
    }
}
