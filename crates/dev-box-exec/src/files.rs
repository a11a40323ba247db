//! Files where they lie in a guest: looked at, listed, moved, removed, watched. Their content comes and goes by [`transfer`](crate::transfer).
//!
//! Paths are absolute and mean what they mean to the guest's root user; what comes back is the guest's claim.
//!
//! ```no_run
//! # async fn example(vm: &dev_box_exec::ReadyVm) -> Result<(), Box<dyn std::error::Error>> {
//! use dev_box_comm::message::{MakeDir, Watch};
//! use dev_box_exec::files;
//!
//! let made = MakeDir { path: "/root/work".into(), mode: None, parents: true, owner: None };
//! files::make_dir(&vm.session, made).await?;
//! let mut changes = files::watch(&vm.session, Watch { path: "/root/work".into(), recursive: true }).await?;
//! for entry in files::list(&vm.session, "/root".as_ref()).await? {
//!     println!("{} {} bytes", String::from_utf8_lossy(entry.name.as_bytes()), entry.stat.size);
//! }
//! let changed = changes.next().await?;
//! # Ok(())
//! # }
//! ```

use std::path::Path;

use dev_box_comm::message::{
    Change, DirEntry, FileStat, MakeDir, Message, PathRequest, Remove, Rename, Request, Watch, WireBytes,
};
use dev_box_comm::session::{Session, Stream};

use crate::transfer::TransferError;

/// Most that a list may take, in bytes of the host's memory: about 200,000 entries.
pub const MAX_LIST_BYTES: usize = 32 << 20;

/// What is at a path; links are followed.
///
/// # Errors
/// [`TransferError`]; `NotFound` of the guest's where nothing is.
pub async fn stat(session: &Session, path: &Path) -> Result<FileStat, TransferError> {
    let request = Request::Stat(PathRequest { path: path.into(), follow: true });
    match session.call(request).await?.into_iter().next() {
        Some(Message::Stat(stat)) => Ok(stat),
        _ => Err(TransferError::Violation("it did not say what is there")),
    }
}

/// What a directory holds, links as such, sorted by name.
///
/// # Errors
/// [`TransferError`]; of the guest's `NotFound`, `NotADirectory`, or `TooMany` where it holds more than an agent lists.
/// [`TooLong`](TransferError::TooLong) where the list takes more than [`MAX_LIST_BYTES`].
pub async fn list(session: &Session, path: &Path) -> Result<Vec<DirEntry>, TransferError> {
    let request = Request::List(PathRequest { path: path.into(), follow: false });
    let mut stream = session.open(request).await?;
    let (mut all, mut size) = (Vec::new(), 0);
    loop {
        match stream.recv().await? {
            Some(Message::Entries { entries }) => {
                size += entries.iter().map(size_of_entry).sum::<usize>();
                if size > MAX_LIST_BYTES {
                    return Err(TransferError::TooLong(MAX_LIST_BYTES));
                }
                all.extend(entries);
            }
            Some(Message::Done) => return Ok(all),
            Some(Message::Failed(error)) => return Err(error.into()),
            Some(Message::Unknown) => {}
            _ => return Err(TransferError::Violation("it answered a list with something else")),
        }
    }
}

/// In memory.
fn size_of_entry(entry: &DirEntry) -> usize {
    size_of::<DirEntry>() + entry.name.len() + entry.stat.link.as_ref().map_or(0, WireBytes::len)
}

/// Makes a directory.
///
/// # Errors
/// [`TransferError`]; of the guest's `AlreadyExists` where there is something and `parents` is not asked for.
pub async fn make_dir(session: &Session, request: MakeDir) -> Result<(), TransferError> {
    done(session, Request::MakeDir(request)).await
}

/// Moves a file or directory within one filesystem.
///
/// # Errors
/// [`TransferError`]; of the guest's `AlreadyExists` where something is in the way that may not be replaced.
pub async fn rename(session: &Session, request: Rename) -> Result<(), TransferError> {
    done(session, Request::Rename(request)).await
}

/// Removes a file or directory.
///
/// # Errors
/// [`TransferError`]; of the guest's `NotFound` unless that is accepted.
pub async fn remove(session: &Session, request: Remove) -> Result<(), TransferError> {
    done(session, Request::Remove(request)).await
}

async fn done(session: &Session, request: Request) -> Result<(), TransferError> {
    session.call(request).await?;
    Ok(())
}

/// Watches a directory. What changes once this has returned is told. (Agents that do not say when they watch let this return with the first change.)
///
/// # Errors
/// [`TransferError`]; of the guest's `TooMany` where it has more directories than an agent watches.
pub async fn watch(session: &Session, request: Watch) -> Result<Changes, TransferError> {
    let stream = session.open(Request::Watch(request)).await?;
    let mut changes = Changes { stream, first: Vec::new() };
    changes.first = changes.receive().await?;
    Ok(changes)
}

/// A watched directory's changes, until this is dropped.
#[derive(Debug)]
pub struct Changes {
    stream: Stream,
    /// Came with the word that it watches.
    first: Vec<Change>,
}

impl Changes {
    /// The next, one or more; waits for them. [`Overflow`](dev_box_comm::message::ChangeKind::Overflow) among them means that some were lost. A
    /// reader that is slow slows down the guest's telling, not its work. Cancellation safe.
    ///
    /// # Errors
    /// [`TransferError`]; the watch has ended then.
    pub async fn next(&mut self) -> Result<Vec<Change>, TransferError> {
        loop {
            let changes = match std::mem::take(&mut self.first) {
                first if first.is_empty() => self.receive().await?,
                first => first,
            };
            if !changes.is_empty() {
                return Ok(changes);
            }
        }
    }

    async fn receive(&mut self) -> Result<Vec<Change>, TransferError> {
        loop {
            match self.stream.recv().await? {
                Some(Message::Changed { changes }) => return Ok(changes),
                Some(Message::Failed(error)) => return Err(error.into()),
                Some(Message::Unknown) => {}
                _ => return Err(TransferError::Violation("it told of something else than changes")),
            }
        }
    }
}

#[cfg(test)]
mod tests;
