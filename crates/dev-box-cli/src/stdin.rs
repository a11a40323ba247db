//! Standard input for a job.
//!
//! Not `tokio::io::stdin`: a read that blocks there holds a thread of the runtime, so that the runtime could never be
//! waited for, as `main` does. Here the thread is nobody's, and ends with the process.

use std::io::{self, Read, Write};
use std::thread;

use tokio::net::unix::pipe;

use crate::tty::DetachKeys;

/// Standard input, to read without blocking. Reading begins at once, and stops when the reader is dropped.
///
/// # Errors
/// No pipe or no thread can be made.
pub(crate) fn reader() -> io::Result<pipe::Receiver> {
    pump(|from, to| io::copy(from, to).map(drop))
}

/// As [`reader`], for a terminal that is lent: `leave` is called when the detach keys are pressed.
///
/// # Errors
/// As [`reader`].
pub(crate) fn keyboard(leave: impl Fn() + Send + 'static) -> io::Result<pipe::Receiver> {
    pump(move |from, to| {
        let (mut keys, mut typed) = (DetachKeys::default(), [0; 4096]);
        loop {
            let got = match from.read(&mut typed) {
                Ok(0) => return Ok(()),
                Ok(got) => typed.get(..got).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let mut passed = Vec::with_capacity(got.len() + 1);
            let left = keys.feed(got, &mut passed);
            to.write_all(&passed)?;
            if left {
                leave();
                return Ok(());
            }
        }
    })
}

fn pump(
    copy: impl FnOnce(&mut io::StdinLock<'_>, &mut io::PipeWriter) -> io::Result<()> + Send + 'static,
) -> io::Result<pipe::Receiver> {
    let (ours, mut theirs) = io::pipe()?;
    thread::Builder::new().name("stdin".into()).spawn(move || {
        // An end that is gone is the normal end of a job that reads no more.
        let _ = copy(&mut io::stdin().lock(), &mut theirs);
    })?;
    pipe::Receiver::from_owned_fd(ours.into())
}
