//! A person at a terminal: the program on a pseudo-terminal, keys in, what it shows out.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use nix::pty::{Winsize, openpty};
use nix::sys::signal::Signal;
use nix::sys::termios::{Termios, tcgetattr};

use crate::{Finished, Host, Running};

/// The program and its terminal.
#[derive(Debug)]
pub struct Screen {
    keys: File,
    /// Keeps the terminal there, to be looked at when the program is gone.
    terminal: OwnedFd,
    running: Running,
    shown: Receiver<Vec<u8>>,
    seen: Vec<u8>,
}

impl Screen {
    /// Starts `dev-box` with these arguments on a terminal of this size.
    pub fn open(host: &Host, args: &[&str], rows: u16, columns: u16) -> Self {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = openpty(&size, None).expect("a pseudo-terminal");
        let end = || pty.slave.try_clone().expect("a descriptor");
        let mut command = host.command();
        command.args(args).env("TERM", "xterm").stdin(end()).stdout(end()).stderr(end());
        let running = host.spawn(&mut command);
        let mut output = File::from(pty.master.try_clone().expect("a descriptor"));
        let (sender, shown) = sync_channel(1024);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(got @ 1..) = output.read(&mut buffer) {
                if sender.send(buffer[..got].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { keys: File::from(pty.master), terminal: pty.slave, running, shown, seen: Vec::new() }
    }

    /// Types.
    pub fn type_keys(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).expect("the terminal takes keys");
    }

    /// Waits until `text` was shown since the last wait; panics with what was.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str, limit: Duration) {
        let until = Instant::now() + limit;
        loop {
            let at = self.seen.windows(text.len()).position(|window| window == text.as_bytes());
            if let Some(at) = at {
                self.seen.drain(..at + text.len());
                return;
            }
            match self.shown.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    panic!("`{}` was not shown; but: {}", text.escape_debug(), self.seen.escape_ascii());
                }
            }
        }
    }

    /// Everything shown since the last wait, what comes in the next moment included.
    pub fn rest(&mut self) -> Vec<u8> {
        while let Ok(bytes) = self.shown.recv_timeout(Duration::from_millis(200)) {
            self.seen.extend(bytes);
        }
        std::mem::take(&mut self.seen)
    }

    /// Makes it another size, and says so as a terminal does.
    pub fn resize(&self, rows: u16, columns: u16) {
        nix::ioctl_write_ptr_bad!(set_size, nix::libc::TIOCSWINSZ, Winsize);
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        #[expect(unsafe_code, reason = "a terminal's size is set with an ioctl")]
        // SAFETY: the kernel reads one `winsize` from where the pointer leads, which is one.
        unsafe { set_size(self.terminal.as_raw_fd(), &raw const size) }.expect("a terminal");
        self.running.signal(Signal::SIGWINCH);
    }

    /// The terminal's settings.
    pub fn settings(&self) -> Termios {
        tcgetattr(self.terminal.as_fd()).expect("a terminal")
    }

    /// The program.
    pub fn program(&self) -> &Running {
        &self.running
    }

    /// Waits for the program's end; gives that, how it left the terminal, and what it showed last.
    pub fn finish(self) -> (Finished, Termios, Vec<u8>) {
        let Self { keys, terminal, running, shown, mut seen } = self;
        let finished = running.finish();
        let settings = tcgetattr(terminal.as_fd()).expect("a terminal");
        // With the last of its other ends what is shown comes to its end, unless somebody else holds one.
        drop(terminal);
        while let Ok(bytes) = shown.recv_timeout(Duration::from_secs(2)) {
            seen.extend(bytes);
        }
        drop(keys);
        (finished, settings, seen)
    }
}
