//! The session on an in-memory connection.

mod basics;
mod cancel;
mod hostile;
mod resync;

use tokio::io::{DuplexStream, duplex};

use super::*;
use crate::hello::{GuestHello, HostHello, Nonce};

fn host_hello() -> HostHello {
    HostHello::with_nonce(Nonce::from_bytes(*b"0123456789abcdef"))
}

fn guest_hello() -> GuestHello {
    GuestHello::new("boot-1")
}

/// Both ends of a session.
async fn pair() -> (Session, Session, Incoming) {
    pair_on(duplex(64 * 1024)).await
}

async fn pair_on((host, guest): (DuplexStream, DuplexStream)) -> (Session, Session, Incoming) {
    let (host, guest) =
        tokio::join!(Session::connect(host, host_hello()), Session::accept(guest, guest_hello()));
    let (host, hello) = host.unwrap();
    let (guest, incoming, from_host) = guest.unwrap();
    assert_eq!(hello.boot_id, "boot-1");
    assert_eq!(from_host.nonce, host_hello().nonce);
    (host, guest, incoming)
}

/// A guest that serves `Echo`, `Info`, and refuses the rest.
async fn serve(mut incoming: Incoming) {
    while let Some((request, stream)) = incoming.next().await {
        tokio::spawn(async move {
            let mut parts = stream.split();
            match request {
                Request::Echo => {
                    while let Some(bytes) = parts.input.next().await {
                        if parts.output.write(bytes).await.is_err() {
                            return;
                        }
                    }
                    parts.output.finish();
                    let _ = parts.sender.send(Message::Done).await;
                }
                Request::Info => {
                    let _ = parts.sender.send(Message::Info(Default::default())).await;
                    let _ = parts.sender.send(Message::Done).await;
                }
                _ => {
                    let error = GuestError::new(crate::message::GuestErrorKind::NotFound, "no");
                    let _ = parts.sender.send(Message::Failed(error)).await;
                }
            }
        });
    }
}
