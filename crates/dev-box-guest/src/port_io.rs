//! The virtio-serial port as a stream of bytes (drivers/char/virtio_console.c).
//!
//! ```text
//!            host opens its end                      read of 0 bytes: the host's end was closed            still closed a while later
//!  Waiting --------------------> Connected (PortIo) -------------------------------------------> In doubt -----------------------> Waiting
//!                                                   <------------------------------------------- open again
//! ```
//! The device has no connections of its own: it only says whether the host's end is open. It says so as a hang-up, which a reactor takes for
//! final; so that a closed port is watched through an edge-triggered epoll of its own, and a [`PortIo`] lives only as long as
//! one opening of the host's end.
//!
//! News of an opening and the bytes that come through it take different queues of the device. A guest that wakes as a clone, or from
//! a file, may read its new host's hello first, and be told only then that its old host has gone, and that there is another. An
//! end of file at once would throw away the hello, or the session that it began, of which that host would never hear.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::time::timeout;

use crate::descriptor::watch;

/// How long the host's end may be closed in the midst of a connection.
const DOUBT: Duration = Duration::from_millis(300);

/// A write carries no more than this, whatever the buffer; more would be copied for nothing.
const MAX_WRITE: usize = 32 * 1024;

/// An open port, whether or not the host's end is.
#[derive(Debug)]
pub struct Port {
    device: OwnedFd,
}

impl Port {
    /// Opens the device node; only one opening at a time is possible.
    ///
    /// # Errors
    /// What open(2) said, `EBUSY` when somebody else has it.
    pub fn open(node: &Path) -> io::Result<Self> {
        use std::os::unix::fs::OpenOptionsExt as _;
        let device =
            std::fs::OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(node)?;
        Ok(Self { device: device.into() })
    }

    /// Any descriptor that hangs up as a port does: for tests.
    #[must_use]
    pub fn from_descriptor(device: OwnedFd) -> Self {
        Self { device }
    }

    /// Waits until the host's end is open, and hands out the stream for as long as it stays so.
    ///
    /// # Errors
    /// What the kernel said about the device.
    pub async fn connection(&self) -> io::Result<PortIo> {
        opened(&self.device).await?;
        PortIo::new(self.device.try_clone()?)
    }
}

/// Waits until the host's end is open.
async fn opened(device: &OwnedFd) -> io::Result<()> {
    if connected(device)? {
        return Ok(());
    }
    let changes = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
    changes.add(device, EpollEvent::new(flags, 0))?;
    let changes = watch(changes.0, Interest::READABLE)?;
    loop {
        let mut ready = changes.readable().await?;
        // Consumes the edge; a change from here on makes the epoll readable again.
        let drained = ready.try_io(|changes| drain(changes.get_ref()));
        if matches!(drained, Ok(Err(_))) {
            return drained.unwrap_or(Ok(()));
        }
        if connected(device)? {
            return Ok(());
        }
    }
}

/// Takes the pending event from an epoll; `WouldBlock` when there is none.
fn drain(epoll: &OwnedFd) -> io::Result<()> {
    let epoll = Epoll(epoll.try_clone()?);
    let mut events = [EpollEvent::empty()];
    match epoll.wait(&mut events, EpollTimeout::ZERO)? {
        0 => Err(io::ErrorKind::WouldBlock.into()),
        _ => Ok(()),
    }
}

/// Whether the host's end is open again in time.
type Doubt = Pin<Box<dyn Future<Output = io::Result<bool>> + Send>>;

/// The stream between two openings of the host's end; reads end when it is closed, and stays so for a while.
///
/// A host that goes and comes back at once leaves a hang-up behind that no longer is: the reactor would call the port ready for
/// ever. So whenever a port that is said to have hung up has merely nothing to say, it is registered afresh.
pub struct PortIo {
    io: AsyncFd<OwnedFd>,
    doubt: Option<Doubt>,
    closed: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl std::fmt::Debug for PortIo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { io, doubt, closed, .. } = self;
        f.debug_struct("PortIo")
            .field("io", io)
            .field("in_doubt", &doubt.is_some())
            .field("closed", closed)
            .finish_non_exhaustive()
    }
}

impl PortIo {
    fn new(device: OwnedFd) -> io::Result<Self> {
        let io = watch(device, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self { io, doubt: None, closed: false, reader: None, writer: None })
    }

    /// Notes that the host's end is closed now.
    fn doubt(&mut self) -> io::Result<()> {
        let device = self.io.get_ref().try_clone()?;
        self.doubt = Some(Box::pin(async move {
            match timeout(DOUBT, opened(&device)).await {
                Ok(opened) => opened.map(|()| true),
                Err(_) => Ok(false),
            }
        }));
        Ok(())
    }

    /// Ready when there is no doubt, or none any more.
    fn poll_doubt(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(doubt) = &mut self.doubt else { return Poll::Ready(Ok(())) };
        let open = ready!(doubt.as_mut().poll(context));
        self.doubt = None;
        self.closed = !open?;
        self.register_afresh()?;
        Poll::Ready(Ok(()))
    }

    /// Forgets what the reactor knows, and has both directions look for themselves.
    fn register_afresh(&mut self) -> io::Result<()> {
        self.io = watch(self.io.get_ref().try_clone()?, Interest::READABLE | Interest::WRITABLE)?;
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
        Ok(())
    }
}

impl AsyncRead for PortIo {
    #[expect(unsafe_code, reason = "reads into memory that need not be initialised first")]
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let this = &mut *self;
            let Poll::Ready(certain) = this.poll_doubt(context) else {
                this.reader = Some(context.waker().clone());
                return Poll::Pending;
            };
            certain?;
            if this.closed {
                return Poll::Ready(Ok(()));
            }
            let Poll::Ready(ready) = this.io.poll_read_ready(context) else {
                this.reader = Some(context.waker().clone());
                return Poll::Pending;
            };
            let mut ready = ready?;
            let hung_up = ready.ready().is_read_closed();
            let read = ready.try_io(|io| {
                // SAFETY: the unfilled part is ours to write, nothing is read from it, and no initialised byte is undone.
                let (start, length) = unsafe {
                    let free = buffer.unfilled_mut();
                    (free.as_mut_ptr(), free.len())
                };
                // SAFETY: the memory is there for the whole call.
                let read = unsafe { libc::read(io.as_raw_fd(), start.cast(), length) };
                usize::try_from(read).map_err(|_| io::Error::last_os_error())
            });
            match read {
                Ok(Ok(0)) if buffer.remaining() > 0 => self.doubt()?,
                Ok(Ok(length)) => {
                    // SAFETY: the kernel has written that many bytes.
                    unsafe { buffer.assume_init(length) };
                    buffer.advance(length);
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                // What a terminal says instead of 0 bytes.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => self.doubt()?,
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) if hung_up => self.register_afresh()?,
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for PortIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let part = bytes.get(..MAX_WRITE).unwrap_or(bytes);
        loop {
            let this = &mut *self;
            let Poll::Ready(certain) = this.poll_doubt(context) else {
                this.writer = Some(context.waker().clone());
                return Poll::Pending;
            };
            certain?;
            if this.closed {
                // Nobody will take it; the reader sees the end of this connection too.
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            let Poll::Ready(ready) = this.io.poll_write_ready(context) else {
                this.writer = Some(context.waker().clone());
                return Poll::Pending;
            };
            let mut ready = ready?;
            let hung_up = ready.ready().is_write_closed();
            match ready.try_io(|io| Ok(nix::unistd::write(io.get_ref(), part)?)) {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(outcome) => return Poll::Ready(outcome),
                Err(_would_block) if hung_up => {
                    if connected(self.io.get_ref())? {
                        self.register_afresh()?;
                    } else {
                        self.doubt()?;
                    }
                }
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Whether the host's end is open now.
fn connected(device: &OwnedFd) -> io::Result<bool> {
    let mut asked = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
    poll(&mut asked, PollTimeout::ZERO)?;
    let [answer] = asked;
    Ok(!answer.revents().is_some_and(|events| events.contains(PollFlags::POLLHUP)))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// A terminal hangs up when its other end is closed and comes back when that is opened again, as a port does.
    fn terminal() -> (Port, std::path::PathBuf) {
        let pty = crate::job::pty::Pty::open(crate::job::pty::Size { rows: 1, columns: 1 }, 0).unwrap();
        let path = std::fs::read_link(format!("/proc/self/fd/{}", pty.slave.as_raw_fd())).unwrap();
        let mut raw = nix::sys::termios::tcgetattr(&pty.slave).unwrap();
        nix::sys::termios::cfmakeraw(&mut raw);
        nix::sys::termios::tcsetattr(&pty.slave, nix::sys::termios::SetArg::TCSANOW, &raw).unwrap();
        (Port::from_descriptor(pty.master), path)
    }

    const LIMIT: Duration = Duration::from_secs(60);

    fn open_other_end(path: &Path) -> std::fs::File {
        std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap()
    }

    #[tokio::test]
    async fn bytes_pass_both_ways_and_a_closed_end_ends_the_stream() {
        let (port, path) = terminal();
        for _ in 0..2 {
            let mut other = open_other_end(&path);
            let mut io = port.connection().await.unwrap();
            std::io::Write::write_all(&mut other, b"hello").unwrap();
            let mut bytes = [0; 5];
            io.read_exact(&mut bytes).await.unwrap();
            assert_eq!(&bytes, b"hello");
            io.write_all(b"there").await.unwrap();
            io.flush().await.unwrap();
            std::io::Read::read_exact(&mut other, &mut bytes).unwrap();
            assert_eq!(&bytes, b"there");
            drop(other);
            let closed = Instant::now();
            assert!(matches!(io.read(&mut bytes).await, Ok(0)));
            assert!(closed.elapsed() >= DOUBT, "{:?}", closed.elapsed());
            assert!(matches!(io.read(&mut bytes).await, Ok(0)), "it stays at its end");
            assert_eq!(io.write(b"more").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
            io.shutdown().await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_closed_end_is_waited_for() {
        let (port, path) = terminal();
        let waiting = tokio::time::timeout(Duration::from_millis(20), port.connection()).await;
        assert!(waiting.is_err(), "nobody has opened the other end");
        let opener = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            let mut other = open_other_end(&path);
            std::io::Write::write_all(&mut other, b"late").unwrap();
            other
        });
        let mut io = tokio::time::timeout(LIMIT, port.connection()).await.unwrap().unwrap();
        let mut bytes = [0; 4];
        io.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"late");
        drop(opener.join().unwrap());
    }

    #[tokio::test]
    async fn an_end_that_is_open_again_in_time_never_was_closed() {
        // Once is enough: who opens it may be held up until it is too late.
        for _ in 0..20 {
            let (port, path) = terminal();
            let other = open_other_end(&path);
            let mut io = port.connection().await.unwrap();
            drop(other);
            let opener = std::thread::spawn(move || {
                std::thread::sleep(DOUBT / 3);
                let mut other = open_other_end(&path);
                let open = Instant::now();
                std::io::Write::write_all(&mut other, b"back").unwrap();
                (other, open)
            });
            let begun = Instant::now();
            let mut bytes = [0; 4];
            // It reads while the end is closed, and is called no more than it takes.
            let polled = polls(tokio::time::timeout(LIMIT, io.read_exact(&mut bytes))).await;
            let (mut other, open) = opener.join().unwrap();
            assert!(polled < 10, "polled {polled} times");
            if bytes != *b"back" && open.duration_since(begun) > DOUBT / 2 {
                continue;
            }
            assert_eq!(&bytes, b"back");
            io.write_all(b"there").await.unwrap();
            let mut bytes = [0; 5];
            std::io::Read::read_exact(&mut other, &mut bytes).unwrap();
            assert_eq!(&bytes, b"there");
            return;
        }
        panic!("it was never opened in time");
    }

    /// How often a future is polled before it is ready.
    async fn polls(future: impl Future) -> usize {
        let mut future = std::pin::pin!(future);
        let mut count = 0;
        std::future::poll_fn(|context| {
            count += 1;
            future.as_mut().poll(context)
        })
        .await;
        count
    }

    #[tokio::test]
    async fn an_end_that_closes_and_opens_at_once_leaves_no_busy_loop() {
        let (port, path) = terminal();
        let first = open_other_end(&path);
        let mut io = port.connection().await.unwrap();
        drop(first);
        // The reactor notes the hang-up; nobody has read before the end is open again.
        tokio::time::sleep(Duration::from_millis(5)).await;
        let mut other = open_other_end(&path);
        let writer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            std::io::Write::write_all(&mut other, b"back").unwrap();
            other
        });
        let mut bytes = [0; 4];
        let polled = polls(tokio::time::timeout(LIMIT, io.read_exact(&mut bytes))).await;
        assert_eq!(&bytes, b"back");
        assert!(polled < 10, "polled {polled} times");
        drop(writer.join().unwrap());
    }

    #[test]
    fn a_node_that_is_not_there_is_an_error() {
        assert_eq!(Port::open(Path::new("/dev/no-such-port")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
