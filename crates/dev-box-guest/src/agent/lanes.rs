//! Moving bytes between descriptors and a stream's lanes, and the requests that are nothing else.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use dev_box_comm::message::{Forward, GuestError};
use dev_box_comm::session::{GuestStream, GuestStreamParts, LaneEnd, LaneReader, LaneWriter};
use nix::fcntl::{FcntlArg, fcntl};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::answers::conclude;
use super::replay::Replay;

/// A pipe holds no more, unless told to.
pub(crate) const PART: usize = 64 * 1024;

/// Parts that follow each other faster than this are a stream, not words.
const QUICK: Duration = Duration::from_millis(2);
/// So many quick parts in a row, and they are collected.
const STREAK: u32 = 3;
/// How long they are.
const COLLECT: Duration = Duration::from_millis(1);
/// Bytes a pipe may hold then: a program that writes little at a time is not to be interrupted each time.
const STREAM_PIPE: libc::c_int = 1 << 20;

/// What a descriptor gives, in parts of at most [`PART`] bytes.
///
/// Many a program writes a few kilobytes at a time. Woken for each, an agent on the same processor would spend its time
/// changing places with the program; so once parts come thick and fast the pipe is made larger and emptied every millisecond.
pub(crate) struct Source {
    descriptor: Arc<AsyncFd<OwnedFd>>,
    buffer: BytesMut,
    /// Length of the part before, until the next is asked for.
    given: Option<usize>,
    last: Option<Instant>,
    streak: u32,
}

impl Source {
    pub(crate) fn new(descriptor: Arc<AsyncFd<OwnedFd>>) -> Self {
        Self { descriptor, buffer: BytesMut::new(), given: None, last: None, streak: 0 }
    }

    /// Takes note of a part, and waits for more to come when it was one small part of many.
    async fn collect(&mut self, length: usize) {
        let now = Instant::now();
        let quick = self.last.replace(now).is_some_and(|last| now.duration_since(last) < QUICK + COLLECT);
        self.streak = if quick { self.streak.saturating_add(1) } else { 0 };
        if self.streak == STREAK {
            // A terminal cannot be made larger, and needs not.
            let _ = fcntl(self.descriptor.get_ref(), FcntlArg::F_SETPIPE_SZ(STREAM_PIPE));
        }
        if self.streak >= STREAK && length < PART {
            tokio::time::sleep(COLLECT).await;
        }
    }

    /// The next bytes; none at the end, which for a terminal is that nobody has its other end.
    #[expect(unsafe_code, reason = "reads into memory that need not be initialised first")]
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        if let Some(length) = self.given.take() {
            self.collect(length).await;
        }
        loop {
            let mut ready = self.descriptor.readable().await.ok()?;
            self.buffer.reserve(PART);
            let free = self.buffer.spare_capacity_mut();
            let (start, length) = (free.as_mut_ptr(), free.len().min(PART));
            let read = ready.try_io(|descriptor| {
                // SAFETY: the buffer has that much room and nobody else looks at it meanwhile.
                let read = unsafe { libc::read(descriptor.as_raw_fd(), start.cast(), length) };
                usize::try_from(read).map_err(|_| io::Error::last_os_error())
            });
            match read {
                Ok(Ok(0)) => return None,
                Ok(Ok(length)) => {
                    // SAFETY: the kernel has written that many bytes.
                    unsafe { self.buffer.set_len(length) };
                    return Some(self.part(length));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(_)) => return None,
                Err(_would_block) => {}
            }
        }
    }
}

impl Source {
    /// What the buffer holds.
    fn part(&mut self, length: usize) -> Bytes {
        self.given = Some(length);
        if length * 4 >= PART {
            return self.buffer.split().freeze();
        }
        // A small part must not hold on to a large buffer while it waits for the host.
        let part = Bytes::copy_from_slice(&self.buffer);
        self.buffer.clear();
        part
    }
}

/// Sends what a descriptor gives along a lane, and finishes the lane at its end. Gives a descriptor back that is at its end: closing it can wait until
/// the host has been told.
pub(crate) async fn drain_to_lane(
    descriptor: Arc<AsyncFd<OwnedFd>>,
    mut lane: LaneWriter,
) -> Option<Arc<AsyncFd<OwnedFd>>> {
    let mut source = Source::new(descriptor);
    while let Some(part) = source.next().await {
        lane.write(part).await.ok()?;
    }
    lane.finish();
    Some(source.descriptor)
}

/// Keeps the last of what a descriptor gives.
pub(crate) async fn drain_to_replay(descriptor: Arc<AsyncFd<OwnedFd>>, replay: Arc<Replay>) {
    let mut source = Source::new(descriptor);
    while let Some(part) = source.next().await {
        replay.push(&part);
    }
    replay.finish();
}

/// Sends what is remembered and what comes along a lane.
pub(crate) async fn follow(replay: Arc<Replay>, mut place: u64, mut lane: LaneWriter) {
    while let Some(part) = replay.next(&mut place).await {
        if lane.write(part).await.is_err() {
            return;
        }
    }
    lane.finish();
}

/// Writes what a lane brings to a descriptor. True when the host finished the lane.
pub(crate) async fn fill_from_lane(lane: &mut LaneReader, descriptor: &AsyncFd<OwnedFd>) -> bool {
    while let Some(part) = lane.next().await {
        if write_all(descriptor, &part).await.is_err() {
            return false;
        }
    }
    lane.end() == Some(LaneEnd::Finished)
}

/// Writes everything to a descriptor that does not block.
pub(crate) async fn write_all(descriptor: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = descriptor.writable().await?;
        match ready.try_io(|descriptor| Ok(nix::unistd::write(descriptor.get_ref(), bytes)?)) {
            Ok(Ok(written)) => bytes = bytes.get(written..).unwrap_or_default(),
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
    Ok(())
}

/// Sends lane 0 back on lane 1.
pub(super) async fn echo(mut stream: GuestStream) {
    loop {
        let GuestStreamParts { input, output, .. } = stream.parts();
        let Some(part) = input.next().await else { break };
        if output.write(part).await.is_err() {
            return;
        }
    }
    stream.parts().output.finish();
    conclude(&mut stream, Ok(())).await;
}

/// Joins a stream to a server on the guest's loopback, each direction ending by itself.
pub(super) async fn forward(request: Forward, mut stream: GuestStream) {
    let connected = match TcpStream::connect(("127.0.0.1", request.port)).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            TcpStream::connect(("::1", request.port)).await.map_err(|_| error)
        }
        outcome => outcome,
    };
    let outcome = match connected {
        Ok(socket) => join(socket, stream.parts()).await,
        Err(error) => Err(error),
    };
    let failed = |error| GuestError::from_io(&format!("forward to port {}", request.port), &error);
    conclude(&mut stream, outcome.map_err(failed)).await;
}

async fn join(mut socket: TcpStream, parts: &mut GuestStreamParts) -> io::Result<()> {
    let _ = socket.set_nodelay(true);
    let (mut from, mut to) = socket.split();
    let GuestStreamParts { input, output, receiver, .. } = parts;
    let inward = async {
        while let Some(part) = input.next().await {
            to.write_all(&part).await?;
        }
        to.shutdown().await
    };
    let outward = async {
        loop {
            let mut buffer = BytesMut::with_capacity(PART / 4);
            if from.read_buf(&mut buffer).await? == 0 || output.write(buffer.freeze()).await.is_err() {
                output.finish();
                return Ok(());
            }
        }
    };
    let given_up = async { while receiver.recv().await.is_ok_and(|message| message.is_some()) {} };
    tokio::select! {
        both = async { tokio::try_join!(inward, outward) } => both.map(|_| ()),
        // The host reset the stream: the server must not wait for a client that is gone.
        () = given_up => Ok(()),
    }
}
