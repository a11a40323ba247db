//! This process's terminal, lent to a program in a VM.
//!
//! While it is lent it is raw: keys go to the program as they are, Ctrl-C included, unless it is to have none, and what the
//! program writes goes to the terminal as it is. It is given back as it was on every way out: [`Lent`] does so when it is dropped, by a return, an
//! error or a panic, and `interrupt` turns signals into returns, or calls [`give_back`] when it gives up. What a program left switched on (the alternate screen, a
//! mouse, a hidden cursor) is switched off.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use dev_box::exec::sink::{BoxFuture, OutputSink, OutputStream};
use dev_box::exec::terminal::Modes;
use dev_box::exec::{PtySize, Terminal};
use nix::sys::termios::{self, LocalFlags, SetArg, Termios};
use tokio::io::{AsyncWriteExt, Stdout};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::exit::Failure;

/// Ctrl-P Ctrl-Q, as docker has it.
const DETACH: [u8; 2] = [0x10, 0x11];

/// A size for programs whose terminal has none.
const USUAL: PtySize = PtySize { rows: 24, cols: 80 };

/// What puts the terminal back, while it is lent: for those who have no [`Lent`] in hand.
static OUT: Mutex<Option<Undo>> = Mutex::new(None);

#[derive(Debug, Clone)]
struct Undo {
    before: Termios,
    modes: Arc<Mutex<Modes>>,
}

/// Puts the terminal back as it was, if it is lent. May be done again.
pub(crate) fn give_back() {
    let Some(Undo { before, modes }) = OUT.lock().unwrap_or_else(PoisonError::into_inner).clone() else {
        return;
    };
    let undo = std::mem::take(&mut *modes.lock().unwrap_or_else(PoisonError::into_inner)).undo();
    let mut out = io::stdout().lock();
    // It may be gone; then there is nothing to give back.
    let _ = out.write_all(undo.as_bytes()).and_then(|()| out.flush());
    let _ = termios::tcsetattr(io::stdin(), SetArg::TCSADRAIN, &before);
}

/// The terminal while it is lent.
#[derive(Debug)]
pub(crate) struct Lent {
    modes: Arc<Mutex<Modes>>,
    sizes: watch::Receiver<PtySize>,
    watching: tokio::task::JoinHandle<()>,
}

impl Lent {
    /// Makes this process's terminal raw; with `keys`, Ctrl-C and its like are no signals any more. Must be called within a
    /// runtime.
    ///
    /// # Errors
    /// Standard input is no terminal.
    pub(crate) fn take(keys: bool) -> Result<Self, Failure> {
        if !io::stdin().is_terminal() {
            return Err(Failure::new(
                "--tty: standard input is no terminal: leave it out, or use a terminal",
            ));
        }
        let before = termios::tcgetattr(io::stdin()).map_err(Failure::new)?;
        let (told, sizes) = watch::channel(size());
        let mut changes = signal(SignalKind::window_change()).map_err(Failure::new)?;
        let mut continues = signal(SignalKind::from_raw(nix::libc::SIGCONT)).map_err(Failure::new)?;
        let again = before.clone();
        let watching = tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = changes.recv() => {}
                    // Whoever stopped us has given the terminal to somebody else meanwhile.
                    _ = continues.recv() => { let _ = raw(&again, keys); }
                }
                if told.send(size()).is_err() {
                    return;
                }
            }
        });
        // Made first: from here on whatever fails gives it back.
        let lent = Self { modes: Arc::default(), sizes, watching };
        let undo = Undo { before: before.clone(), modes: Arc::clone(&lent.modes) };
        *OUT.lock().unwrap_or_else(PoisonError::into_inner) = Some(undo);
        raw(&before, keys).map_err(Failure::new)?;
        Ok(lent)
    }

    /// For a job that is to have a terminal as large as this one.
    pub(crate) fn terminal(&self) -> Terminal {
        Terminal { size: *self.sizes.borrow(), resizes: Some(self.sizes.clone()) }
    }

    /// The sizes from now on.
    pub(crate) fn sizes(&self) -> watch::Receiver<PtySize> {
        self.sizes.clone()
    }

    /// Where the program's output goes.
    pub(crate) fn screen(&self) -> Arc<dyn OutputSink> {
        Arc::new(Screen { modes: Arc::clone(&self.modes), out: tokio::sync::Mutex::new(tokio::io::stdout()) })
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.watching.abort();
        give_back();
        *OUT.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

fn raw(before: &Termios, keys: bool) -> nix::Result<()> {
    let mut raw = before.clone();
    termios::cfmakeraw(&mut raw);
    if !keys {
        // Nobody would read them, and nothing could end the wait.
        raw.local_flags |= before.local_flags & LocalFlags::ISIG;
    }
    termios::tcsetattr(io::stdin().as_fd(), SetArg::TCSADRAIN, &raw)
}

/// The size of this process's terminal; a usual one where there is none.
pub(crate) fn size() -> PtySize {
    nix::ioctl_read_bad!(window_size, nix::libc::TIOCGWINSZ, nix::libc::winsize);
    let mut size = nix::libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    #[expect(unsafe_code, reason = "the terminal's size is read with an ioctl")]
    // SAFETY: the kernel writes one `winsize` to where the pointer leads, which is one.
    let done = unsafe { window_size(nix::libc::STDIN_FILENO, &raw mut size) };
    if done.is_err() || size.ws_row == 0 || size.ws_col == 0 {
        return USUAL;
    }
    PtySize { rows: size.ws_row, cols: size.ws_col }
}

/// Passes on everything, and remembers what is to be undone.
#[derive(Debug)]
struct Screen {
    modes: Arc<Mutex<Modes>>,
    out: tokio::sync::Mutex<Stdout>,
}

impl OutputSink for Screen {
    fn write(&self, _: OutputStream, bytes: Bytes) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            self.modes.lock().unwrap_or_else(PoisonError::into_inner).feed(&bytes);
            let mut out = self.out.lock().await;
            out.write_all(&bytes).await?;
            out.flush().await
        })
    }
}

/// Looks for the keys by which a person leaves a program that does not end.
#[derive(Debug, Default)]
pub(crate) struct DetachKeys {
    /// The first of the two came, and waits for the second.
    begun: bool,
}

impl DetachKeys {
    /// Appends what is to be passed on of `typed` to `out`; true when the keys came, and nothing after them counts.
    pub(crate) fn feed(&mut self, typed: &[u8], out: &mut Vec<u8>) -> bool {
        let [first, second] = DETACH;
        for &byte in typed {
            if std::mem::take(&mut self.begun) {
                if byte == second {
                    return true;
                }
                out.push(first);
            }
            if byte == first {
                self.begun = true;
            } else {
                out.push(byte);
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_detach_keys_are_found_and_nothing_else_is_lost() {
        let fed = |parts: &[&[u8]]| {
            let (mut keys, mut out) = (DetachKeys::default(), Vec::new());
            let left = parts.iter().any(|part| keys.feed(part, &mut out));
            (out, left)
        };
        assert_eq!(fed(&[b"ls\r"]), (b"ls\r".to_vec(), false));
        assert_eq!(fed(&[b"a\x10\x11b"]), (b"a".to_vec(), true));
        assert_eq!(fed(&[b"a\x10", b"\x11"]), (b"a".to_vec(), true));
        assert_eq!(fed(&[b"\x10", b"x"]), (b"\x10x".to_vec(), false));
        assert_eq!(fed(&[b"\x10\x10\x11"]), (b"\x10".to_vec(), true), "the first was for the program");
        assert_eq!(fed(&[b"\x11\x10"]), (b"\x11".to_vec(), false));
    }
}
