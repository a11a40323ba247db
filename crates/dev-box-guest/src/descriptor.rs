//! Descriptors of pipes, sockets and devices on tokio's reactor.

use std::io;
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers a descriptor; it need not be non-blocking when every call on it is (`MSG_DONTWAIT`), or none is made.
///
/// # Errors
/// What epoll said, such as `EPERM` for a plain file.
#[expect(unsafe_code, reason = "tokio wants to be told that the descriptor stays the same")]
pub fn watch(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor for as long as it lives.
    unsafe { AsyncFd::register_with_interest(descriptor, interest) }.map_err(io::Error::from)
}

/// Makes reads and writes return at once, then registers the descriptor.
///
/// # Errors
/// What the kernel said.
pub fn watch_nonblocking(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = OFlag::from_bits_truncate(fcntl(&descriptor, FcntlArg::F_GETFL)?);
    fcntl(&descriptor, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    watch(descriptor, interest)
}

/// A pipe that no program inherits: the end to read, the end to write.
///
/// # Errors
/// What the kernel said.
pub fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(nix::unistd::pipe2(OFlag::O_CLOEXEC)?)
}
