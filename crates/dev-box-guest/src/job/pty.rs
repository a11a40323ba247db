//! A terminal for a job: the master stays with the agent, the slave becomes the job's standard streams (pty(7)).

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// A new terminal.
#[derive(Debug)]
pub struct Pty {
    /// The agent's end; never blocks.
    pub master: OwnedFd,
    /// The job's end.
    pub slave: OwnedFd,
}

impl Pty {
    /// Opens a terminal of this size, the slave belonging to `owner`.
    ///
    /// # Errors
    /// What the kernel said, such as `ENOSPC` when there are no more terminals.
    #[expect(unsafe_code, reason = "terminal ioctls have no safe wrapper")]
    pub fn open(size: Size, owner: u32) -> io::Result<Self> {
        use std::os::unix::fs::OpenOptionsExt as _;
        let master: OwnedFd = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
            .open("/dev/ptmx")?
            .into();
        let unlocked: libc::c_int = 0;
        // SAFETY: TIOCSPTLCK reads one number, which outlives the call.
        if unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        // SAFETY: TIOCGPTPEER takes open flags and returns a new descriptor.
        let slave = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
        if slave < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let slave = unsafe { OwnedFd::from_raw_fd(slave) };
        resize(&master, size)?;
        if owner != 0 {
            std::os::unix::fs::fchown(slave.as_fd(), Some(owner), None)?;
        }
        Ok(Self { master, slave })
    }
}

/// Changes a terminal's size; its foreground process group gets WINCH from the kernel.
///
/// # Errors
/// What the kernel said.
#[expect(unsafe_code, reason = "terminal ioctls have no safe wrapper")]
pub fn resize(master: &impl AsFd, size: Size) -> io::Result<()> {
    let window = libc::winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one structure, which outlives the call.
    if unsafe { libc::ioctl(master.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const window) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_has_the_size_it_was_given() {
        let pty = Pty::open(Size { rows: 24, columns: 80 }, 0).unwrap();
        assert!(std::io::IsTerminal::is_terminal(&pty.slave));
        resize(&pty.master, Size { rows: 50, columns: 132 }).unwrap();
        let shown = std::process::Command::new("stty").arg("size").stdin(pty.slave).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&shown.stdout).trim(), "50 132");
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(resize(&file, Size { rows: 1, columns: 1 }).is_err());
    }
}
