//! A connection that fails as scripted.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// Wraps a connection; what is *read* from it is late, cut, corrupted, or stops, as scripted. Writes pass untouched.
#[derive(Debug)]
pub struct Faulty<T> {
    inner: T,
    offset: u64,
    delay: Option<Duration>,
    alarm: Option<Pin<Box<Sleep>>>,
    chunk: usize,
    cut_after: Option<u64>,
    silent_after: Option<u64>,
    corrupt: Vec<(u64, u8)>,
}

impl<T> Faulty<T> {
    /// No faults yet.
    pub fn new(inner: T) -> Self {
        Self {
            inner,
            offset: 0,
            delay: None,
            alarm: None,
            chunk: usize::MAX,
            cut_after: None,
            silent_after: None,
            corrupt: Vec::new(),
        }
    }

    /// Every read takes so long.
    #[must_use]
    pub fn delay(mut self, delay: Duration) -> Self {
        self.delay = Some(delay);
        self
    }

    /// A read gives at most so many bytes (a guest's virtio-serial read: 4096).
    #[must_use]
    pub fn chunk(mut self, bytes: usize) -> Self {
        self.chunk = bytes.max(1);
        self
    }

    /// End of file after so many bytes.
    #[must_use]
    pub fn cut_after(mut self, bytes: u64) -> Self {
        self.cut_after = Some(bytes);
        self
    }

    /// Silence after so many bytes.
    #[must_use]
    pub fn silent_after(mut self, bytes: u64) -> Self {
        self.silent_after = Some(bytes);
        self
    }

    /// The byte at this offset is XORed with `mask`.
    #[must_use]
    pub fn corrupt(mut self, offset: u64, mask: u8) -> Self {
        self.corrupt.push((offset, mask));
        self
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Faulty<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let until = |limit: Option<u64>| limit.map_or(u64::MAX, |limit| limit.saturating_sub(this.offset));
        if until(this.cut_after) == 0 {
            return Poll::Ready(Ok(()));
        }
        if until(this.silent_after) == 0 {
            return Poll::Pending;
        }
        let room = until(this.cut_after).min(until(this.silent_after));
        let most = this.chunk.min(out.remaining()).min(usize::try_from(room).unwrap_or(usize::MAX));
        if let Some(delay) = this.delay {
            let alarm = this.alarm.get_or_insert_with(|| Box::pin(sleep(delay)));
            ready!(alarm.as_mut().poll(cx));
        }
        let mut bytes = vec![0; most];
        let mut part = ReadBuf::new(&mut bytes);
        ready!(Pin::new(&mut this.inner).poll_read(cx, &mut part))?;
        if let (Some(delay), Some(alarm)) = (this.delay, &mut this.alarm) {
            alarm.as_mut().reset(Instant::now() + delay);
        }
        let read = part.filled_mut();
        for (offset, mask) in &this.corrupt {
            let at = offset.checked_sub(this.offset).and_then(|at| usize::try_from(at).ok());
            if let Some(byte) = at.and_then(|at| read.get_mut(at)) {
                *byte ^= mask;
            }
        }
        this.offset += read.len() as u64;
        out.put_slice(read);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Faulty<T> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}
