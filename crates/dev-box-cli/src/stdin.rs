//! Standard input for a job.
//!
//! Not `tokio::io::stdin`: a read that blocks there holds a thread of the runtime, so that the runtime could never be
//! waited for, as `main` does. Here the thread is nobody's, and ends with the process.

use std::io;
use std::thread;

use tokio::net::unix::pipe;

/// Standard input, to read without blocking. Reading begins at once, and stops when the reader is dropped.
///
/// # Errors
/// No pipe or no thread can be made.
pub(crate) fn reader() -> io::Result<pipe::Receiver> {
    let (ours, mut theirs) = io::pipe()?;
    thread::Builder::new().name("stdin".into()).spawn(move || {
        // An end that is gone is the normal end of a job that reads no more.
        let _ = io::copy(&mut io::stdin().lock(), &mut theirs);
    })?;
    pipe::Receiver::from_owned_fd(ours.into())
}
