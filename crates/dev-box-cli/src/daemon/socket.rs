//! The daemon's socket: one daemon at it, one group before it, a bounded number of peers on it.
//!
//! A lock beside the socket says who listens, so that a second daemon is refused and the socket of a dead one replaced,
//! without a moment in which two could believe they are the one. Who may connect is the file's mode; that the peer is who
//! the mode lets in is checked again by what the kernel says of it.

use std::fmt;
use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use dev_box::exec::Owner;
use dev_box::observe::Actor;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::{Gid, Group, Uid, User};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Peers at a time; more wait until one is gone.
const PEERS: usize = 256;

/// After an accept that failed for want of something: it will fail again at once otherwise.
const PAUSE: Duration = Duration::from_millis(100);

/// Why the daemon cannot listen.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    #[error("a daemon is running already at {}: stop it first, or give this one a socket of its own (daemon.socket)", .0.display())]
    Running(PathBuf),
    #[error(
        "there is no group `{0}`: make it (groupadd --system {0}), or change daemon.group in the configuration"
    )]
    NoGroup(String),
    #[error("cannot {what} {}", path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
}

/// Who is at the other end, by what the kernel says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Peer {
    uid: u32,
    gid: u32,
    name: Option<String>,
}

impl Peer {
    /// Its user and group.
    pub(crate) fn ids(&self) -> Owner {
        Owner { uid: self.uid, gid: self.gid }
    }

    /// For the audit.
    pub(crate) fn actor(&self) -> Actor {
        Actor::user(self.uid, self.name.as_deref())
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Some(name) => f.write_str(name),
            None => write!(f, "uid {}", self.uid),
        }
    }
}

/// The listening socket; gone from the file system when dropped.
#[derive(Debug)]
pub(crate) struct DaemonSocket {
    listener: UnixListener,
    path: PathBuf,
    group: Option<Gid>,
    peers: Arc<Semaphore>,
    _lock: Flock<File>,
}

impl DaemonSocket {
    /// Listens at `path`, for root, this process's user, and the members of `group`.
    pub(crate) fn bind(path: &Path, group: Option<&str>) -> Result<Self, SocketError> {
        let failed = |what, path: &Path| {
            let path = path.to_owned();
            move |source| SocketError::Io { what, path, source }
        };
        let group = group.map(gid_of).transpose()?;
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(failed("make", dir))?;
        }
        let beside = |suffix: &str| {
            let mut name = path.as_os_str().to_owned();
            name.push(suffix);
            PathBuf::from(name)
        };
        let lock_path = beside(".lock");
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&lock_path);
        let file = file.map_err(failed("open", &lock_path))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            nix::errno::Errno::EWOULDBLOCK => SocketError::Running(path.to_owned()),
            errno => failed("lock", &lock_path)(errno.into()),
        })?;
        // Made beside its place and moved there whole: nobody meets it with another mode, and a dead one is replaced.
        let new = beside(".new");
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed("remove", &new)(error));
            }
            _ => {}
        }
        let listener = UnixListener::bind(&new).map_err(failed("listen at", &new))?;
        let mode = if group.is_some() { 0o660 } else { 0o600 };
        std::fs::set_permissions(&new, Permissions::from_mode(mode))
            .map_err(failed("set the mode of", &new))?;
        if let Some(gid) = group {
            chown(&new, None, Some(gid.as_raw())).map_err(failed("set the group of", &new))?;
        }
        std::fs::rename(&new, path).map_err(failed("put in place", path))?;
        Ok(Self {
            listener,
            path: path.to_owned(),
            group,
            peers: Arc::new(Semaphore::new(PEERS)),
            _lock: lock,
        })
    }

    fn admit(&self, stream: &UnixStream) -> io::Result<Peer> {
        let credentials = stream.peer_cred()?;
        let uid = Uid::from_raw(credentials.uid());
        let user = User::from_uid(uid).ok().flatten();
        let known = uid.is_root()
            || uid == Uid::effective()
            || self.group.is_some_and(|group| {
                Gid::from_raw(credentials.gid()) == group
                    || user.as_ref().is_some_and(|user| is_member(user, group))
            });
        if !known {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("uid {uid} may not use this daemon"),
            ));
        }
        Ok(Peer { uid: uid.as_raw(), gid: credentials.gid(), name: user.map(|user| user.name) })
    }
}

impl Drop for DaemonSocket {
    fn drop(&mut self) {
        // Before the lock goes: a successor's socket is not ours to remove.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn gid_of(name: &str) -> Result<Gid, SocketError> {
    match Group::from_name(name) {
        Ok(Some(group)) => Ok(group.gid),
        Ok(None) | Err(_) => Err(SocketError::NoGroup(name.to_owned())),
    }
}

/// Whether it is among the user's groups, as whoever manages this host's users says.
fn is_member(user: &User, group: Gid) -> bool {
    let Ok(name) = std::ffi::CString::new(user.name.as_str()) else { return false };
    nix::unistd::getgrouplist(&name, user.gid).is_ok_and(|groups| groups.contains(&group))
}

impl Listener for DaemonSocket {
    type Io = PeerStream;
    type Addr = Peer;

    async fn accept(&mut self) -> (PeerStream, Peer) {
        loop {
            // Never closed.
            let Ok(permit) = Arc::clone(&self.peers).acquire_owned().await else {
                std::future::pending().await
            };
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::error!(%error, "accepting a connection failed");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            match self.admit(&stream) {
                Ok(peer) => return (PeerStream { stream, _permit: permit }, peer),
                Err(error) => tracing::warn!(%error, "a connection was refused"),
            }
        }
    }

    fn local_addr(&self) -> io::Result<Peer> {
        Ok(Peer { uid: Uid::effective().as_raw(), gid: Gid::effective().as_raw(), name: None })
    }
}

impl Connected<IncomingStream<'_, DaemonSocket>> for Peer {
    fn connect_info(stream: IncomingStream<'_, DaemonSocket>) -> Self {
        stream.remote_addr().clone()
    }
}

/// A peer's connection, which counts as long as it lives, also after an upgrade.
#[derive(Debug)]
pub(crate) struct PeerStream {
    stream: UnixStream,
    _permit: OwnedSemaphorePermit,
}

impl AsyncRead for PeerStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for PeerStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_second_daemon_is_refused_and_a_dead_ones_socket_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/d.sock");
        let mut first = DaemonSocket::bind(&path, None).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(DaemonSocket::bind(&path, None), Err(SocketError::Running(at)) if at == path));
        let (_client, (_, peer)) = tokio::join!(UnixStream::connect(&path), first.accept());
        assert_eq!(peer.uid, Uid::effective().as_raw());
        drop(first);
        assert!(!path.exists());
        // What a daemon that was killed leaves: a socket nobody listens at.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(UnixStream::connect(&path).await.is_err());
        let mut next = DaemonSocket::bind(&path, None).unwrap();
        let (client, _) = tokio::join!(UnixStream::connect(&path), next.accept());
        client.unwrap();
    }

    #[test]
    fn a_group_must_exist() {
        let error = DaemonSocket::bind(Path::new("/nonexistent/d.sock"), Some("no-such-group")).unwrap_err();
        assert!(error.to_string().contains("groupadd"), "{error}");
        assert_eq!(gid_of("root").unwrap().as_raw(), 0);
    }

    #[tokio::test]
    async fn a_group_lets_its_members_in() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.sock");
        let own = Group::from_gid(Gid::effective()).unwrap().unwrap();
        let _socket = DaemonSocket::bind(&path, Some(&own.name)).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o660);
        let root = User::from_uid(Uid::from_raw(0)).unwrap().unwrap();
        assert!(is_member(&root, root.gid));
        assert!(!is_member(&root, Gid::from_raw(54_321)));
    }
}
