//! A VM's serial console on this terminal.
//!
//! While attached, the terminal is raw: every key goes to the guest, Ctrl-C and Ctrl-Z too, and only the escape key leaves.
//! [`Raw`] puts the terminal back on every way out: leaving, the VM's end, an error, a panic, SIGTERM and SIGHUP.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::path::Path;
use std::process::ExitCode;

use dev_box::core::id::VmName;
use dev_box::exec::terminal::Neutraliser;
use dev_box::provision::user_vm::Console;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::exit::Failure;
use crate::interrupt::Endings;
use crate::{output, stdin};

/// Ctrl-], as virsh and telnet have it.
const ESCAPE: u8 = 0x1d;
/// What a guest may have left on: bold and colours off, the cursor visible, the usual character set, no bracketed paste.
const TIDY: &[u8] = b"\x1b[0m\x1b[?25h\x0f\x1b[?2004l\r\n";

/// The terminal of standard input in raw mode; dropping it puts back what was.
struct Raw {
    before: Termios,
}

impl Raw {
    /// `None` where standard input is no terminal.
    fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Flush, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Nothing is left to be told, and nobody to tell it to.
        let _ = tcsetattr(io::stdin(), OptionalActions::Flush, &self.before);
        if io::stdout().is_terminal() {
            let _ = io::stdout().write_all(TIDY).and_then(|()| io::stdout().flush());
        }
    }
}

/// Why it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// The escape key, the end of input that is no terminal, or a signal.
    Left,
    /// The VM ended.
    Over,
}

/// Joins the console and this terminal until one of them ends.
pub(crate) async fn attach(name: &VmName, mut console: Console) -> Result<ExitCode, Failure> {
    let raw = Raw::enter().map_err(Failure::new)?;
    if raw.is_some() {
        // The terminal is raw: a line ends with both.
        output::note(format_args!("attached to {name}; Ctrl-] leaves\r"));
    }
    let ended = join(&mut console).await;
    drop(raw);
    console.detach().await.map_err(Failure::new)?;
    match ended.map_err(Failure::new)? {
        Ended::Left => Ok(ExitCode::SUCCESS),
        Ended::Over => Err(Failure::new(format!("{name} has stopped"))),
    }
}

async fn join(console: &mut Console) -> io::Result<Ended> {
    let (mut from_guest, mut to_guest) = console.stream.split();
    let mut keys = stdin::reader()?;
    let mut endings = Endings::listen()?;
    let (mut typed, mut shown) = (vec![0; 1024], vec![0; 16 * 1024]);
    loop {
        tokio::select! {
            read = from_guest.read(&mut shown) => match read {
                Ok(0) => return Ok(Ended::Over),
                Ok(count) => {
                    let mut out = io::stdout().lock();
                    out.write_all(shown.get(..count).unwrap_or_default())?;
                    out.flush()?;
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(Ended::Over),
                Err(error) => return Err(error),
            },
            read = keys.read(&mut typed) => {
                let typed = typed.get(..read?).unwrap_or_default();
                let (before, left) = until_escape(typed);
                match to_guest.write_all(before).await {
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(Ended::Over),
                    written => written?,
                }
                if left || typed.is_empty() {
                    return Ok(Ended::Left);
                }
            }
            () = endings.recv() => return Ok(Ended::Left),
        }
    }
}

/// What goes to the guest, and whether the escape key follows.
fn until_escape(typed: &[u8]) -> (&[u8], bool) {
    match typed.iter().position(|&byte| byte == ESCAPE) {
        Some(at) => (typed.get(..at).unwrap_or_default(), true),
        None => (typed, false),
    }
}

/// Prints what was logged of a console, as text and nothing else.
pub(crate) fn print_log(log: &Path) -> Result<(), Failure> {
    let mut file = match File::open(log) {
        Ok(file) => file,
        // It has never run.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Failure::new(format!("cannot read {}: {error}", log.display()))),
    };
    let (mut neutraliser, mut chunk, mut text) = (Neutraliser::new(), vec![0; 64 << 10], String::new());
    let mut out = io::stdout().lock();
    loop {
        let count = file.read(&mut chunk).map_err(Failure::new)?;
        if count == 0 {
            neutraliser.finish(&mut text);
        } else {
            neutraliser.feed(chunk.get(..count).unwrap_or_default(), &mut text);
        }
        out.write_all(text.as_bytes()).map_err(Failure::new)?;
        text.clear();
        if count == 0 {
            return out.flush().map_err(Failure::new);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_key_ends_it_and_what_came_before_goes_to_the_guest() {
        assert_eq!(until_escape(b"ls\r"), (&b"ls\r"[..], false));
        assert_eq!(until_escape(b"ls\x1dlost"), (&b"ls"[..], true));
        assert_eq!(until_escape(b"\x1d"), (&b""[..], true));
    }
}
