//! Watching a directory (inotify(7)), with everything beneath it when asked.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use dev_box_comm::message::{Change, ChangeKind, GuestError, GuestErrorKind, Message, Watch, WireBytes};
use dev_box_comm::session::GuestStream;
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::Interest;

use super::answers::conclude;
use crate::descriptor::watch as watch_descriptor;
use crate::files::{failed, path_of};

/// Directories watched for one request at most.
pub const MAX_DIRECTORIES: usize = 4096;
/// Changes in one message.
const CHANGES: usize = 64;

/// Says that it watches, by a message of no changes, then sends what changes until the host resets the stream.
pub(super) async fn watch(request: &Watch, mut stream: GuestStream) {
    let outcome = tell(request, &mut stream).await;
    conclude(&mut stream, outcome).await;
}

async fn tell(request: &Watch, stream: &mut GuestStream) -> Result<(), GuestError> {
    let root = path_of(&request.path)?;
    let mut watches = Watches::open(&root, request.recursive)?;
    let descriptor: OwnedFd =
        watches.inotify.as_fd().try_clone_to_owned().map_err(|error| failed("watch", &root, &error))?;
    let ready =
        watch_descriptor(descriptor, Interest::READABLE).map_err(|error| failed("watch", &root, &error))?;
    if stream.send(Message::Changed { changes: Vec::new() }).await.is_err() {
        return Ok(());
    }
    loop {
        tokio::select! {
            readable = ready.readable() => {
                let mut readable = readable.map_err(|error| failed("watch", &root, &error))?;
                let changes = watches.read()?;
                if changes.is_empty() {
                    readable.clear_ready();
                }
                for part in changes.chunks(CHANGES) {
                    if stream.send(Message::Changed { changes: part.to_vec() }).await.is_err() {
                        return Ok(());
                    }
                }
            }
            message = stream.parts().receiver.recv() => {
                if message.is_err() {
                    return Ok(());
                }
            }
        }
    }
}

/// The kernel's watches and what they are on.
struct Watches {
    inotify: Inotify,
    root: PathBuf,
    recursive: bool,
    directories: HashMap<WatchDescriptor, PathBuf>,
}

impl Watches {
    fn open(root: &Path, recursive: bool) -> Result<Self, GuestError> {
        let flags = InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK;
        let inotify = Inotify::init(flags).map_err(|error| failed("watch", root, &io::Error::from(error)))?;
        let mut watches = Self { inotify, root: root.to_owned(), recursive, directories: HashMap::new() };
        watches.add(Path::new(""))?;
        Ok(watches)
    }

    /// Watches a directory and, when asked, those beneath it.
    fn add(&mut self, relative: &Path) -> Result<(), GuestError> {
        let path = self.root.join(relative);
        if self.directories.len() >= MAX_DIRECTORIES {
            let text = format!("more than {MAX_DIRECTORIES} directories beneath {}", self.root.display());
            return Err(GuestError::new(GuestErrorKind::TooMany, text));
        }
        let what = AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_ONLYDIR
            | AddWatchFlags::IN_DONT_FOLLOW;
        let added = self.inotify.add_watch(&path, what);
        let descriptor = added.map_err(|error| failed("watch", &path, &io::Error::from(error)))?;
        self.directories.insert(descriptor, relative.to_owned());
        if self.recursive {
            for entry in std::fs::read_dir(&path).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    self.add_if_there(&relative.join(entry.file_name()))?;
                }
            }
        }
        Ok(())
    }

    /// As [`add`](Self::add); a directory that is gone already is passed over.
    fn add_if_there(&mut self, relative: &Path) -> Result<(), GuestError> {
        match self.add(relative) {
            Err(error) if error.kind == GuestErrorKind::TooMany => Err(error),
            _ => Ok(()),
        }
    }

    /// What has changed since the last call; nothing when there is nothing to read.
    fn read(&mut self) -> Result<Vec<Change>, GuestError> {
        let events = match self.inotify.read_events() {
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Vec::new()),
            outcome => outcome.map_err(|error| failed("watch", &self.root, &io::Error::from(error)))?,
        };
        let mut changes: Vec<Change> = Vec::new();
        for event in events {
            let Some(change) = self.change(&event)? else { continue };
            if changes.last() != Some(&change) {
                changes.push(change);
            }
        }
        if changes.is_empty() {
            // Something was read that is no news: there may be more.
            return self.read();
        }
        Ok(changes)
    }

    fn change(&mut self, event: &InotifyEvent) -> Result<Option<Change>, GuestError> {
        if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            return Ok(Some(Change { path: WireBytes::default(), kind: ChangeKind::Overflow }));
        }
        if event.mask.contains(AddWatchFlags::IN_IGNORED) {
            self.directories.remove(&event.wd);
            return Ok(None);
        }
        let Some(directory) = self.directories.get(&event.wd) else { return Ok(None) };
        let path = event.name.as_ref().map_or_else(|| directory.clone(), |name| directory.join(name));
        let appeared = event.mask.intersects(AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO);
        let kind = if appeared {
            ChangeKind::Created
        } else if event.mask.intersects(AddWatchFlags::IN_DELETE | AddWatchFlags::IN_MOVED_FROM) {
            ChangeKind::Removed
        } else {
            ChangeKind::Modified
        };
        if appeared && self.recursive && event.mask.contains(AddWatchFlags::IN_ISDIR) {
            self.add_if_there(&path)?;
        }
        Ok(Some(Change { path: path.into(), kind }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(watches: &mut Watches) -> Vec<(String, ChangeKind)> {
        let changes = watches.read().unwrap().into_iter();
        changes.map(|change| (change.path.as_path().to_string_lossy().into_owned(), change.kind)).collect()
    }

    #[test]
    fn changes_are_told_with_their_paths() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("old")).unwrap();
        let mut watches = Watches::open(root.path(), true).unwrap();
        assert!(seen(&mut watches).is_empty());
        std::fs::write(root.path().join("old/file"), "x").unwrap();
        let told = seen(&mut watches);
        assert!(told.contains(&("old/file".into(), ChangeKind::Created)), "{told:?}");
        assert!(told.contains(&("old/file".into(), ChangeKind::Modified)), "{told:?}");
        std::fs::create_dir(root.path().join("new")).unwrap();
        assert_eq!(seen(&mut watches), [("new".into(), ChangeKind::Created)]);
        std::fs::write(root.path().join("new/file"), "").unwrap();
        assert_eq!(seen(&mut watches)[0], ("new/file".into(), ChangeKind::Created));
        std::fs::rename(root.path().join("old/file"), root.path().join("moved")).unwrap();
        let told = seen(&mut watches);
        assert_eq!(told, [("old/file".into(), ChangeKind::Removed), ("moved".into(), ChangeKind::Created)]);
        std::fs::remove_dir_all(root.path().join("new")).unwrap();
        assert!(seen(&mut watches).contains(&("new".into(), ChangeKind::Removed)));
    }

    #[test]
    fn what_cannot_be_watched_is_refused() {
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("file"), "").unwrap();
        for (name, kind) in [("file", GuestErrorKind::NotADirectory), ("none", GuestErrorKind::NotFound)] {
            let Err(error) = Watches::open(&root.path().join(name), false) else {
                panic!("{name} is watched")
            };
            assert_eq!(error.kind, kind);
        }
    }
}
