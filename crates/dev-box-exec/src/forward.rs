//! A guest's server on a port of the host's: over the control channel, not the network, so that it works for isolated VMs.
//!
//! ```text
//!   client --TCP--> Forwarder --stream of the session--> agent --TCP--> 127.0.0.1:PORT in the guest
//! ```
//!
//! Both directions flow at the pace of the slower end, and end by themselves, as TCP's do. At most [`MAX_CONNECTIONS`] are open;
//! further clients wait to be accepted.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::BytesMut;
use dev_box_comm::message::{Forward, GuestError, Message, Request};
use dev_box_comm::session::{Session, StreamError, StreamParts};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// Most connections at once, of the streams that an agent allows.
pub const MAX_CONNECTIONS: usize = 32;
/// Most bytes read at once.
const PART: usize = 16 * 1024;

/// A listening port of the host's that leads to one of a guest's.
#[derive(Debug)]
pub struct Forwarder {
    listener: TcpListener,
    port: u16,
}

/// One connection ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForwardError {
    /// Nobody listens there, or the agent is too old.
    #[error("the guest did not connect to its port {port}")]
    Refused {
        /// The guest's port.
        port: u16,
        /// What the agent says.
        #[source]
        source: GuestError,
    },
    /// The VM is gone, or its agent gave the stream up.
    #[error("the channel to the guest ended")]
    Channel(#[from] StreamError),
    /// The agent ended the stream without saying how it went.
    #[error("the guest's agent ended the stream without an answer")]
    NoAnswer,
    /// The client on the host.
    #[error("the connection on the host ended")]
    Client(#[from] io::Error),
}

impl Forwarder {
    /// Listens at `address` (port 0: any that is free) for clients of the guest's `port`.
    ///
    /// # Errors
    /// The address cannot be listened at.
    pub async fn bind(address: SocketAddr, port: u16) -> io::Result<Self> {
        Ok(Self { listener: TcpListener::bind(address).await?, port })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// The socket does not say.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves clients until the session is closed. Dropped, it ends their connections.
    ///
    /// # Errors
    /// No client can be accepted any more.
    pub async fn run(&self, session: &Session) -> io::Result<()> {
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            let permit = tokio::select! {
                permit = Arc::clone(&room).acquire_owned() => permit.map_err(io::Error::other)?,
                _ = session.closed() => return Ok(()),
            };
            let (client, from) = tokio::select! {
                accepted = self.listener.accept() => accepted?,
                _ = session.closed() => return Ok(()),
            };
            // Those that ended leave nothing to be remembered.
            while connections.try_join_next().is_some() {}
            let (session, port) = (session.clone(), self.port);
            connections.spawn(async move {
                if let Err(error) = connect(&session, port, client).await {
                    tracing::info!(%from, port, error = &error as &dyn std::error::Error, "a forwarded connection ended");
                }
                drop(permit);
            });
        }
    }
}

/// Joins a client to the guest's port, until both directions have ended.
///
/// # Errors
/// [`ForwardError`].
pub async fn connect(session: &Session, port: u16, client: TcpStream) -> Result<(), ForwardError> {
    let _ = client.set_nodelay(true);
    let stream = session.open(Request::Forward(Forward { port })).await?;
    let StreamParts { mut receiver, mut input, mut output, .. } = stream.split();
    let (mut from, mut to) = client.into_split();
    let inward = async {
        loop {
            let mut buffer = BytesMut::with_capacity(PART);
            if from.read_buf(&mut buffer).await? == 0 {
                input.finish();
                return Ok::<_, ForwardError>(());
            }
            input.write(buffer.freeze()).await?;
        }
    };
    let outward = async {
        while let Some(bytes) = output.next().await {
            to.write_all(&bytes).await?;
        }
        Ok::<_, ForwardError>(to.shutdown().await?)
    };
    let last = async {
        loop {
            match receiver.recv().await? {
                Some(message) if message.is_last() => return Ok(message),
                Some(_) => {}
                None => return Err(ForwardError::NoAnswer),
            }
        }
    };
    // The guest's last message says that it has read all it will: a client that goes on writing is not waited for.
    let client_failed = async {
        match inward.await {
            Ok(()) => std::future::pending().await,
            Err(error) => error,
        }
    };
    tokio::select! {
        both = async { tokio::try_join!(last, outward) } => match both?.0 {
            Message::Failed(source) => Err(ForwardError::Refused { port, source }),
            _ => Ok(()),
        },
        error = client_failed => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use dev_box_comm::hello::{GuestHello, HostHello};
    use dev_box_comm::message::GuestErrorKind;
    use dev_box_comm::session::{GuestStream, GuestStreamParts};

    use super::*;

    /// A guest whose port 80 gives back what it gets, and which has no other.
    async fn serve(mut stream: GuestStream, port: u16) {
        let last = if port == 80 {
            let GuestStreamParts { input, output, .. } = stream.parts();
            while let Some(bytes) = input.next().await {
                if output.write(bytes).await.is_err() {
                    return;
                }
            }
            output.finish();
            Message::Done
        } else {
            let error = io::Error::from(io::ErrorKind::ConnectionRefused);
            Message::Failed(GuestError::from_io("forward", &error))
        };
        let _ = stream.send(last).await;
    }

    async fn session() -> Session {
        let (host, guest) = tokio::io::duplex(64 * 1024);
        tokio::spawn(async move {
            let (_session, mut incoming, _) = Session::accept(guest, GuestHello::new("boot")).await.unwrap();
            while let Some((request, stream)) = incoming.next().await {
                let Request::Forward(forward) = request else { panic!("{request:?}") };
                tokio::spawn(serve(stream, forward.port));
            }
        });
        Session::connect(host, HostHello::fresh().unwrap()).await.unwrap().0
    }

    async fn forwarder(port: u16) -> (Forwarder, SocketAddr) {
        let forwarder = Forwarder::bind((Ipv4Addr::LOCALHOST, 0).into(), port).await.unwrap();
        let address = forwarder.local_addr().unwrap();
        (forwarder, address)
    }

    #[tokio::test]
    async fn many_clients_have_their_own_connections() {
        let (session, (forwarder, address)) = (session().await, forwarder(80).await);
        let clients = async {
            // More than there is room for at once: the rest waits.
            let mut clients = JoinSet::new();
            for number in 0..MAX_CONNECTIONS + 10 {
                clients.spawn(async move {
                    let mut client = TcpStream::connect(address).await.unwrap();
                    let sent = format!("client {number} ").repeat(5000);
                    let (mut read, mut write) = client.split();
                    let mut back = String::new();
                    let written = async {
                        write.write_all(sent.as_bytes()).await.unwrap();
                        write.shutdown().await.unwrap();
                    };
                    let (_, got) = tokio::join!(written, read.read_to_string(&mut back));
                    got.unwrap();
                    assert!(back == sent, "client {number}");
                });
            }
            while let Some(client) = clients.join_next().await {
                client.unwrap();
            }
        };
        tokio::select! {
            ended = forwarder.run(&session) => panic!("{ended:?}"),
            () = clients => {}
        }
    }

    #[tokio::test]
    async fn a_port_without_a_server_closes_the_connection() {
        let (session, (forwarder, address)) = (session().await, forwarder(81).await);
        let client = async {
            let mut client = TcpStream::connect(address).await.unwrap();
            assert_eq!(client.read(&mut [0]).await.unwrap_or(0), 0);
        };
        tokio::select! {
            ended = forwarder.run(&session) => panic!("{ended:?}"),
            () = client => {}
        }
        let server = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = server.local_addr().unwrap();
        let _client = TcpStream::connect(address).await.unwrap();
        let error = connect(&session, 81, server.accept().await.unwrap().0).await.unwrap_err();
        let ForwardError::Refused { port: 81, source } = error else { panic!("{error:?}") };
        assert_eq!(source.kind, GuestErrorKind::from(io::ErrorKind::ConnectionRefused));
    }

    #[tokio::test]
    async fn a_client_that_goes_away_ends_the_stream() {
        let session = session().await;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let server = listener.accept().await.unwrap().0;
        drop(client);
        let done = tokio::time::timeout(Duration::from_secs(60), connect(&session, 80, server)).await;
        done.unwrap().unwrap();
    }

    #[tokio::test]
    async fn it_ends_with_the_session() {
        let (session, (forwarder, _)) = (session().await, forwarder(80).await);
        let closing = session.clone();
        let (ended, ()) = tokio::join!(forwarder.run(&session), async move { closing.close() });
        ended.unwrap();
    }
}
