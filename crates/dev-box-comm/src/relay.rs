//! One stream handed on to another session, frame for frame in meaning, byte for byte in content.
//!
//! ```text
//! client ──session──▶ relay ──session──▶ guest agent
//!         OPEN, messages, lane 0 ─────▶
//!         ◀───── messages, lanes 1 and 2, the last message
//! ```
//! A daemon that owns a VM's only channel gives its clients sessions of their own, and relays each stream. There is no
//! second protocol: what a client may say, and how a stream ends, is what it would be with the agent itself.
//!
//! Credit is kept end to end: a lane's bytes are taken from one session only when the other one has room for them, so a
//! client that does not read stalls its own lane in the guest and nothing else. A relay holds at most one chunk a lane
//! besides the windows of the two sessions.

use std::future::pending;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::message::{GuestError, Message};
use crate::session::{GuestStream, LaneEnd, LaneReader, LaneWriter, Stream, StreamError};

/// What a relayed stream carried, and how it ended.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Relayed {
    /// Bytes of lane 0, to the guest.
    pub input: u64,
    /// Bytes of lane 1, from the guest.
    pub output: u64,
    /// Bytes of lane 2, from the guest.
    pub errors: u64,
    /// The guest's last message. `None`: the stream was reset, by either side, or a session closed. Of the guest's session
    /// the client is told by a message that is not the guest's.
    pub last: Option<Message>,
    /// Whether it was the client that gave the stream up, or went away.
    pub abandoned: bool,
}

/// Relays a client's stream to the guest and back until it ended on both. `overhear` is shown each message from the client
/// before it goes on; `came` is told how many bytes each chunk from the guest has.
///
/// Dropping the future resets both streams.
pub async fn relay(
    client: GuestStream,
    guest: Stream,
    mut overhear: impl FnMut(&Message) + Send,
    came: impl Fn(u64) + Send + Sync,
) -> Relayed {
    let mut client = client.split();
    let mut guest = guest.split();
    let [input, output, errors] = [const { AtomicU64::new(0) }; 3];
    let mut outputs = Box::pin(async {
        tokio::join!(
            hand_on(guest.output, client.output, &output, &came),
            hand_on(guest.errors, client.errors, &errors, &came)
        )
    });
    let mut outputs_done = false;
    let (last, ending) = {
        let to_guest = async {
            while let Ok(Some(message)) = client.receiver.recv().await {
                overhear(&message);
                // What this version does not know it cannot say again.
                if message != Message::Unknown && guest.sender.send(message).await.is_err() {
                    // The guest ended the stream; its last message says the rest.
                    pending::<()>().await;
                }
            }
        };
        let to_client = async {
            loop {
                match guest.receiver.recv().await {
                    Ok(Some(Message::Unknown)) => {}
                    Ok(Some(last)) if last.is_last() => return (Some(last), Ending::Guest),
                    Ok(Some(message)) => {
                        if client.sender.send(message).await.is_err() {
                            pending::<()>().await;
                        }
                    }
                    // The client's own session goes on: a reset would look like a breach.
                    Err(StreamError::Closed(reason)) => {
                        return (Some(Message::Failed(GuestError::lost(&reason))), Ending::Lost);
                    }
                    Ok(None) | Err(_) => return (None, Ending::Guest),
                }
            }
        };
        let feed = async {
            hand_on(client.input, guest.input, &input, &|_| {}).await;
            pending::<()>().await;
        };
        tokio::pin!(to_guest, to_client, feed);
        loop {
            tokio::select! {
                () = &mut to_guest => break (None, Ending::Client),
                ended = &mut to_client => break ended,
                () = &mut feed => {}
                _ = &mut outputs, if !outputs_done => outputs_done = true,
            }
        }
    };
    let delivered = match &last {
        None => false,
        Some(last) => {
            // All output came before it, and is delivered before it, however slowly the client reads.
            tokio::select! {
                () = async { if !outputs_done { outputs.await; } } => client.sender.send(last.clone()).await.is_ok(),
                // A signal that comes too late is nothing any more.
                () = async { while let Ok(Some(_)) = client.receiver.recv().await {} } => false,
            }
        }
    };
    let count = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed);
    Relayed {
        input: count(&input),
        output: count(&output),
        errors: count(&errors),
        abandoned: ending == Ending::Client || (last.is_some() && !delivered),
        last: last.filter(|_| ending != Ending::Lost),
    }
}

/// Who ended a stream.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    Client,
    Guest,
    /// Nobody: the guest's session closed.
    Lost,
}

/// Moves a lane's bytes until it ends, and ends the other one as it did.
async fn hand_on(
    mut from: LaneReader,
    mut to: LaneWriter,
    count: &AtomicU64,
    came: &(impl Fn(u64) + Send + Sync),
) {
    while let Some(bytes) = from.next().await {
        count.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        came(bytes.len() as u64);
        if to.write(bytes).await.is_err() {
            return;
        }
    }
    if from.end() == Some(LaneEnd::Finished) {
        to.finish();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use tokio::io::duplex;
    use tokio::time::timeout;

    use super::*;
    use crate::message::{ExecRequest, ExitStatus, Exited, GuestErrorKind, Request, Started};
    use crate::session::{GuestStreamParts, Incoming, Session};
    use crate::{GuestHello, HostHello};

    async fn pair() -> (Session, Session, Incoming) {
        let (host, guest) = duplex(64 << 10);
        let (host, guest) = tokio::join!(
            Session::connect(host, HostHello::fresh().unwrap()),
            Session::accept(guest, GuestHello::new("b"))
        );
        let (guest, incoming, _) = guest.unwrap();
        (host.unwrap().0, guest, incoming)
    }

    /// A client, the daemon between, and the guest's incoming streams.
    struct Line {
        client: Session,
        vm: Session,
        guest: Incoming,
        done: tokio::sync::mpsc::Receiver<(Relayed, Vec<Message>)>,
        _ends: (Session, Session),
    }

    async fn line() -> Line {
        let (client, daemon, mut incoming) = pair().await;
        let (vm, agent, guest) = pair().await;
        let (report, done) = tokio::sync::mpsc::channel(8);
        let to = vm.clone();
        tokio::spawn(async move {
            while let Some((request, stream)) = incoming.next().await {
                let (to, report) = (to.clone(), report.clone());
                tokio::spawn(async move {
                    let mut heard = Vec::new();
                    let guest = to.open(request).await.unwrap();
                    let relayed = relay(stream, guest, |message| heard.push(message.clone()), |_| {}).await;
                    let _ = report.send((relayed, heard)).await;
                });
            }
        });
        Line { client, vm, guest, done, _ends: (daemon, agent) }
    }

    fn exec() -> Request {
        Request::Exec(ExecRequest::new(["x"]))
    }

    fn exited(code: i32) -> Message {
        Message::Exited(Exited {
            status: ExitStatus::Code(code),
            usage: Default::default(),
            timed_out: false,
            oom_killed: false,
        })
    }

    async fn started(guest: &mut Incoming) -> GuestStreamParts {
        let (request, stream) = guest.next().await.unwrap();
        assert_eq!(request, exec());
        let mut parts = stream.split();
        parts.sender.send(Message::Started(Started { pid: 7, job: None, replay: None })).await.unwrap();
        parts
    }

    #[tokio::test]
    async fn everything_goes_over_in_order() {
        let mut line = line().await;
        let mut client = line.client.open(exec()).await.unwrap().split();
        let mut guest = started(&mut line.guest).await;
        assert!(matches!(client.receiver.recv().await, Ok(Some(Message::Started(_)))));
        client.input.write(Bytes::from_static(b"in")).await.unwrap();
        client.input.finish();
        client.sender.send(Message::Signal { number: 10 }).await.unwrap();
        assert_eq!(guest.input.next().await.as_deref(), Some(&b"in"[..]));
        assert_eq!(guest.input.next().await, None);
        assert_eq!(guest.input.end(), Some(LaneEnd::Finished));
        assert_eq!(guest.receiver.recv().await, Ok(Some(Message::Signal { number: 10 })));
        let sent = vec![7u8; 300_000];
        guest.output.write(Bytes::from(sent.clone())).await.unwrap();
        guest.errors.write(Bytes::from_static(b"err")).await.unwrap();
        guest.output.finish();
        guest.sender.send(exited(3)).await.unwrap();
        let mut got = Vec::new();
        while let Some(bytes) = client.output.next().await {
            got.extend_from_slice(&bytes);
        }
        assert!(got == sent);
        assert_eq!(client.output.end(), Some(LaneEnd::Finished));
        assert_eq!(client.errors.next().await.as_deref(), Some(&b"err"[..]));
        assert_eq!(client.errors.next().await, None);
        assert_eq!(client.receiver.recv().await, Ok(Some(exited(3))));
        let (relayed, heard) = line.done.recv().await.unwrap();
        let expected =
            Relayed { input: 2, output: 300_000, errors: 3, last: Some(exited(3)), abandoned: false };
        assert_eq!((relayed, heard), (expected, vec![Message::Signal { number: 10 }]));
    }

    #[tokio::test]
    async fn a_client_that_resets_or_goes_away_resets_the_guest() {
        let mut line = line().await;
        let client = line.client.open(exec()).await.unwrap();
        let mut guest = started(&mut line.guest).await;
        drop(client);
        assert_eq!(guest.receiver.recv().await, Err(StreamError::Reset));
        assert!(line.done.recv().await.unwrap().0.abandoned);
        let _client = line.client.open(exec()).await.unwrap();
        let mut guest = started(&mut line.guest).await;
        line.client.close();
        assert_eq!(guest.receiver.recv().await, Err(StreamError::Reset));
        assert!(line.done.recv().await.unwrap().0.abandoned);
    }

    #[tokio::test]
    async fn a_guest_that_resets_is_passed_on_and_one_that_dies_is_told_of() {
        let mut line = line().await;
        let mut client = line.client.open(exec()).await.unwrap();
        let guest = started(&mut line.guest).await;
        client.recv().await.unwrap();
        drop(guest);
        assert_eq!(client.recv().await, Err(StreamError::Reset));
        let (relayed, _) = line.done.recv().await.unwrap();
        assert_eq!((relayed.last, relayed.abandoned), (None, false));
        let mut client = line.client.open(exec()).await.unwrap();
        let _guest = started(&mut line.guest).await;
        client.recv().await.unwrap();
        line.vm.close();
        let Ok(Some(Message::Failed(error))) = client.recv().await else { panic!("not told") };
        assert_eq!(error.kind, GuestErrorKind::VmLost, "{error}");
    }

    #[tokio::test]
    async fn credit_is_kept_from_end_to_end() {
        let mut line = line().await;
        let mut client = line.client.open(exec()).await.unwrap().split();
        let mut guest = started(&mut line.guest).await;
        // Nobody reads: the guest comes to a halt after the windows of two sessions and the queues between.
        let mut sent = 0usize;
        let chunk = Bytes::from(vec![1u8; 64 << 10]);
        while timeout(Duration::from_millis(300), guest.output.write(chunk.clone())).await.is_ok() {
            sent += chunk.len();
            assert!(sent < 8 << 20, "{sent} bytes and nobody reads");
        }
        // Messages and the other lane still pass.
        guest.errors.write(Bytes::from_static(b"e")).await.unwrap();
        assert_eq!(client.errors.next().await.as_deref(), Some(&b"e"[..]));
        guest.sender.send(exited(0)).await.unwrap();
        let mut got = 0;
        client.receiver.recv().await.unwrap();
        while let Some(bytes) = client.output.next().await {
            got += bytes.len();
        }
        assert_eq!(got, sent);
        assert_eq!(client.receiver.recv().await, Ok(Some(exited(0))));
    }

    #[tokio::test]
    async fn a_client_that_goes_before_it_read_all_is_told_of() {
        let mut line = line().await;
        let client = line.client.open(exec()).await.unwrap();
        let mut guest = started(&mut line.guest).await;
        guest.output.write(Bytes::from(vec![1u8; 400 << 10])).await.unwrap();
        let writer = tokio::spawn(async move {
            let _ = guest.output.write(Bytes::from(vec![1u8; 400 << 10])).await;
            let _ = guest.sender.send(exited(0)).await;
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        drop(client);
        let (relayed, _) = line.done.recv().await.unwrap();
        assert!(relayed.abandoned, "{relayed:?}");
        writer.await.unwrap();
    }
}
