//! Files and trees between the host and a guest, along its channel: sizes beyond memory, at the pace of the slower side.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use bytes::{Buf, Bytes};
use dev_box_comm::message::{GuestError, Message, ReadFile, Request, Tree, WireBytes, WriteFile};
use dev_box_comm::session::{
    CallError, LaneEnd, LaneReader, LaneWriter, MessageReceiver, Session, StreamError,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::workspace::archive::{self, ArchiveError, Packed, Unpacked};
use crate::workspace::{Limits, Owner, Stop};

/// One read of a file of the host's.
const CHUNK: usize = 256 << 10;

/// Chunks between the channel and a thread that packs or unpacks.
const QUEUED: usize = 8;

/// Why something did not come over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// The guest could not.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The stream or the session ended first.
    #[error("the connection to the VM ended")]
    Stream(#[from] StreamError),
    /// The guest answered something else than it should.
    #[error("the guest broke the protocol: {0}")]
    Violation(&'static str),
    /// The guest sent more than it may.
    #[error("the file has more than {0} bytes")]
    TooLarge(u64),
    /// The guest listed more than may be kept, in bytes.
    #[error("the list takes more than {0} bytes")]
    TooLong(usize),
    /// Something of the host's could not be read or written.
    #[error("the host's file failed")]
    Host(#[source] io::Error),
    /// A tree did not come over as a whole.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// A worker thread failed.
    #[error("a worker thread failed")]
    Worker(#[from] tokio::task::JoinError),
}

impl From<CallError> for TransferError {
    fn from(error: CallError) -> Self {
        match error {
            CallError::Guest(error) => error.into(),
            CallError::Stream(error) => error.into(),
            _ => Self::Violation("it answered a request with something else"),
        }
    }
}

/// Writes a file of the guest, whole or not at all; gives how many bytes it has.
///
/// # Errors
/// [`TransferError`].
pub async fn put_file(
    session: &Session,
    request: WriteFile,
    from: &mut (impl AsyncRead + Unpin),
) -> Result<u64, TransferError> {
    let mut parts = session.open(Request::WriteFile(request)).await?.split();
    let mut sent = 0;
    loop {
        let mut buffer = Vec::with_capacity(CHUNK);
        // Dropping the stream here makes the guest forget what it has of the file.
        if from.read_buf(&mut buffer).await.map_err(TransferError::Host)? == 0 {
            break;
        }
        sent += buffer.len() as u64;
        if parts.input.write(buffer.into()).await.is_err() {
            // Its last message says why.
            break;
        }
    }
    parts.input.finish();
    conclude(&mut parts.receiver).await?;
    Ok(sent)
}

/// Reads a file of the guest, at most so many bytes of it; gives how many it had.
///
/// # Errors
/// [`TransferError`]; what was written before stays.
pub async fn get_file(
    session: &Session,
    path: &Path,
    most: u64,
    to: &mut (impl AsyncWrite + Unpin),
) -> Result<u64, TransferError> {
    let request = ReadFile { path: path.into(), offset: 0, length: None };
    let mut parts = session.open(Request::ReadFile(request)).await?.split();
    let mut got = 0u64;
    while let Some(bytes) = parts.output.next().await {
        got += bytes.len() as u64;
        if got > most {
            return Err(TransferError::TooLarge(most));
        }
        to.write_all(&bytes).await.map_err(TransferError::Host)?;
    }
    to.flush().await.map_err(TransferError::Host)?;
    conclude(&mut parts.receiver).await?;
    match parts.output.end() {
        Some(LaneEnd::Finished) => Ok(got),
        _ => Err(TransferError::Violation("it ended a file without saying that it is whole")),
    }
}

/// Copies the content of a directory of the host's into one of the guest's, which is made when it is not there.
///
/// # Errors
/// [`TransferError`]; what was unpacked before stays.
pub async fn put_tree(
    session: &Session,
    dir: PathBuf,
    path: &Path,
    owner: Option<String>,
    limits: Limits,
) -> Result<Packed, TransferError> {
    let request = Tree { owner, ..tree(path, &limits) };
    let mut parts = session.open(Request::Unpack(request)).await?.split();
    let (writer, mut chunks) = mpsc::channel(QUEUED);
    let stop = StopOnDrop::default();
    let packing = {
        let stop = stop.0.clone();
        tokio::task::spawn_blocking(move || archive::pack(&dir, Chunks::new(writer), &limits, &stop))
    };
    feed(&mut chunks, &mut parts.input).await;
    // A guest that takes no more has said why, and packing ends with its reader.
    drop(chunks);
    let packed = packing.await?;
    if packed.is_ok() {
        parts.input.finish();
    } else if !matches!(packed, Err(ArchiveError::Send(_) | ArchiveError::Host { what: "send", .. })) {
        return Ok(packed?);
    }
    conclude(&mut parts.receiver).await?;
    Ok(packed?)
}

/// Copies the content of a directory of the guest's into one of the host's, which is made when it is not there. See
/// [`archive`] for what is not taken.
///
/// # Errors
/// [`TransferError`]; what was unpacked before stays.
pub async fn get_tree(
    session: &Session,
    path: &Path,
    into: PathBuf,
    owner: Option<Owner>,
    limits: Limits,
) -> Result<Unpacked, TransferError> {
    let mut parts = session.open(Request::Pack(tree(path, &limits))).await?.split();
    let (chunks, reader) = mpsc::channel(QUEUED);
    let stop = StopOnDrop::default();
    let mut unpacking = {
        let stop = stop.0.clone();
        tokio::task::spawn_blocking(move || {
            archive::unpack(ChunkReader::new(reader), &into, &limits, owner, &stop)
        })
    };
    let unpacked = tokio::select! {
        biased;
        unpacked = &mut unpacking => unpacked?,
        () = drain(&mut parts.output, chunks) => unpacking.await?,
    };
    match unpacked {
        // The archive's end may come before the lane's.
        Ok(unpacked) => {
            while parts.output.next().await.is_some() {}
            conclude(&mut parts.receiver).await?;
            Ok(unpacked)
        }
        // Why the stream broke off is in the guest's last message.
        Err(ArchiveError::Read(error)) => {
            conclude(&mut parts.receiver).await?;
            Err(ArchiveError::Read(error).into())
        }
        Err(error) => Err(error.into()),
    }
}

fn tree(path: &Path, limits: &Limits) -> Tree {
    Tree {
        path: WireBytes::from(path),
        owner: None,
        max_entries: Some(limits.entries),
        max_bytes: Some(limits.bytes),
    }
}

async fn conclude(receiver: &mut MessageReceiver) -> Result<(), TransferError> {
    loop {
        match receiver.recv().await? {
            Some(Message::Done) => return Ok(()),
            Some(Message::Failed(error)) => return Err(error.into()),
            Some(Message::Unknown) => {}
            Some(_) | None => {
                return Err(TransferError::Violation("it ended a transfer with something else"));
            }
        }
    }
}

async fn feed(chunks: &mut mpsc::Receiver<Bytes>, lane: &mut LaneWriter) {
    while let Some(chunk) = chunks.recv().await {
        if lane.write(chunk).await.is_err() {
            return;
        }
    }
}

async fn drain(lane: &mut LaneReader, chunks: mpsc::Sender<Bytes>) {
    while let Some(chunk) = lane.next().await {
        if chunks.send(chunk).await.is_err() {
            return;
        }
    }
}

/// Stops blocking work when the future that waits for it is dropped.
#[derive(Debug, Default)]
struct StopOnDrop(Stop);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// What a thread writes, in chunks to a task.
struct Chunks {
    buffer: Vec<u8>,
    to: mpsc::Sender<Bytes>,
}

impl Chunks {
    fn new(to: mpsc::Sender<Bytes>) -> Self {
        Self { buffer: Vec::with_capacity(CHUNK), to }
    }

    fn send(&mut self) -> io::Result<()> {
        let full = std::mem::replace(&mut self.buffer, Vec::with_capacity(CHUNK));
        self.to.blocking_send(full.into()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.buffer.len() >= CHUNK {
            self.send()?;
        }
        let take = bytes.len().min(CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(bytes.get(..take).unwrap_or_default());
        Ok(take)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() { Ok(()) } else { self.send() }
    }
}

/// What a task hands over, for a thread to read.
struct ChunkReader {
    rest: Bytes,
    from: mpsc::Receiver<Bytes>,
}

impl ChunkReader {
    fn new(from: mpsc::Receiver<Bytes>) -> Self {
        Self { rest: Bytes::new(), from }
    }
}

impl Read for ChunkReader {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if self.rest.is_empty() {
            match self.from.blocking_recv() {
                Some(bytes) => self.rest = bytes,
                None => return Ok(0),
            }
        }
        let take = to.len().min(self.rest.len());
        if let Some(to) = to.get_mut(..take) {
            self.rest.copy_to_slice(to);
        }
        Ok(take)
    }
}

#[cfg(test)]
pub(crate) mod tests;
