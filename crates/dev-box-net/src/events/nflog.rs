//! The NFLOG socket: what the guard's rules report, as netlink messages (libnetfilter_log).

use std::io;
use std::net::Ipv4Addr;
use std::time::Duration;

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::nflog::{
    ConfigCmd, ConfigFlags, ConfigMode, PacketNla, Timeout, ULogMessage, config_request,
};
use netlink_packet_netfilter::{NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};
use netlink_sys::Socket;
use netlink_sys::constants::NETLINK_NETFILTER;
use rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep};

use super::{NetEventKind, Report};
use crate::identity::{log_group_of, tap_of};

/// Most of a packet that is handed up, in bytes; the rules ask for less.
const COPY_RANGE: u32 = 1600;
/// Buffer for one datagram, which may have several reports in it.
const BUFFER: usize = 32 * 1024;
/// What the kernel keeps for us, in bytes; what is beyond is lost, and said to be.
const KERNEL_BUFFER: u32 = 256 * 1024;
/// How long the kernel may collect reports before it hands them up.
const COLLECT: Duration = Duration::from_millis(50);
/// How soon it is asked again whether the last listener has gone.
const AGAIN: Duration = Duration::from_millis(20);
/// Most events of one datagram.
const MAX_EVENTS: usize = 256;

/// The reports of one VM's rules. Dropping it ends them.
#[derive(Debug)]
pub struct EventSource {
    socket: AsyncFd<Socket>,
    tap: String,
    buffer: Vec<u8>,
}

/// Reports cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("the firewall's reports of {address} cannot be {what}")]
pub struct EventSourceError {
    address: Ipv4Addr,
    what: &'static str,
    #[source]
    source: io::Error,
}

impl EventSourceError {
    fn is_refused(&self) -> bool {
        self.source.kind() == io::ErrorKind::PermissionDenied
    }
}

impl EventSource {
    /// Listens to what the rules of that address report, in the network namespace of this thread. One process at a time
    /// may; needs a tokio runtime.
    ///
    /// # Errors
    /// [`EventSourceError`]: not root, or another process listens.
    pub fn open(address: Ipv4Addr) -> Result<Self, EventSourceError> {
        let failed = |what| move |source| EventSourceError { address, what, source };
        let mut socket = Socket::new(NETLINK_NETFILTER).map_err(failed("opened"))?;
        socket.bind_auto().map_err(failed("opened"))?;
        socket.set_rx_buf_sz(KERNEL_BUFFER).map_err(failed("buffered"))?;
        let group = log_group_of(address);
        let collect: Timeout = COLLECT.into();
        let settings =
            vec![ConfigMode::new_packet(COPY_RANGE).into(), ConfigFlags::SEQ.into(), collect.into()];
        for attributes in [vec![ConfigCmd::Bind.into()], settings] {
            let request = config_request(NetfilterProtoFamily::Unspec, group, attributes);
            let mut bytes = vec![0; request.buffer_len()];
            request.serialize(&mut bytes);
            socket.send(&bytes, 0).map_err(failed("asked for"))?;
            acknowledged(&socket).map_err(failed("asked for"))?;
        }
        socket.set_non_blocking(true).map_err(failed("read"))?;
        let socket = registered(socket).map_err(failed("read"))?;
        Ok(Self { socket, tap: tap_of(address), buffer: vec![0; BUFFER] })
    }

    /// As [`EventSource::open`], of an address that another VM has just had: whoever listened to that one may not have ended yet. The
    /// kernel gives no other reason for its refusal to one who is not root, so then it takes as long.
    ///
    /// # Errors
    /// As [`EventSource::open`], where that is so for this long.
    pub async fn open_when_free(address: Ipv4Addr, within: Duration) -> Result<Self, EventSourceError> {
        let until = Instant::now() + within;
        loop {
            match Self::open(address) {
                Err(error) if error.is_refused() && Instant::now() < until => sleep(AGAIN).await,
                opened => return opened,
            }
        }
    }

    /// The next events; waits for one at least. Safe to give up and call again.
    ///
    /// # Errors
    /// What the socket says.
    pub async fn next(&mut self) -> io::Result<Vec<NetEventKind>> {
        loop {
            let mut guard = self.socket.readable().await?;
            let buffer = &mut self.buffer;
            let read = guard.try_io(|socket| socket.get_ref().recv(&mut &mut buffer[..], 0));
            match read {
                Err(_not_ready) => {}
                Ok(Ok(length)) => {
                    let events = events(self.buffer.get(..length).unwrap_or_default(), &self.tap);
                    if !events.is_empty() {
                        return Ok(events);
                    }
                }
                // The kernel's buffer was full. It does not say how many were lost.
                Ok(Err(error)) if error.raw_os_error() == Some(Errno::NOBUFS.raw_os_error()) => {
                    return Ok(vec![NetEventKind::Lost { reports: 1 }]);
                }
                Ok(Err(error)) => return Err(error),
            }
        }
    }
}

#[expect(unsafe_code, reason = "tokio asks for a promise about the descriptor that the type cannot give")]
fn registered(socket: Socket) -> io::Result<AsyncFd<Socket>> {
    // SAFETY: a `Socket` owns its descriptor, and neither it nor we close or replace it before it is dropped.
    Ok(unsafe { AsyncFd::register(socket) }?)
}

/// Waits for the answer to a request; reports that come before it are given up.
fn acknowledged(socket: &Socket) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    for _ in 0..MAX_EVENTS {
        let length = socket.recv(&mut &mut buffer[..], 0)?;
        for message in messages(buffer.get(..length).unwrap_or_default()) {
            if let NetlinkPayload::Error(answer) = message.payload {
                return match answer.code {
                    None => Ok(()),
                    Some(_) => Err(answer.to_io()),
                };
            }
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}

/// The messages of a datagram; what cannot be read ends it.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = NetlinkMessage<NetfilterMessage>> + '_ {
    std::iter::from_fn(move || {
        let message = NetlinkMessage::<NetfilterMessage>::deserialize(bytes).ok()?;
        // Messages begin at multiples of four (netlink(7)).
        let length = usize::try_from(message.header.length).ok()?.next_multiple_of(4).max(16);
        bytes = bytes.get(length..).unwrap_or_default();
        Some(message)
    })
}

fn events(bytes: &[u8], tap: &str) -> Vec<NetEventKind> {
    let mut events = Vec::new();
    for message in messages(bytes).take(MAX_EVENTS) {
        let NetlinkPayload::InnerMessage(NetfilterMessage {
            inner: NetfilterMessageInner::ULog(ULogMessage::Packet(attributes)),
            ..
        }) = message.payload
        else {
            continue;
        };
        match report(attributes).events(tap) {
            Ok(found) => events.extend(found),
            // A guest may send what is no DNS to port 53: it is in the counts.
            Err(error) => tracing::debug!(%error, "left out"),
        }
    }
    events
}

fn report(attributes: Vec<PacketNla>) -> Report {
    let mut report = Report::default();
    for attribute in attributes {
        match attribute {
            PacketNla::Prefix(prefix) => report.prefix = prefix.to_string_lossy().into_owned(),
            PacketNla::Payload(payload) => report.payload = payload,
            // Ethernet: two addresses, then the protocol.
            PacketNla::HwHeader(header) => {
                report.ethertype = match header.get(12..14) {
                    Some([high, low]) => Some(u16::from_be_bytes([*high, *low])),
                    _ => None,
                };
            }
            _ => {}
        }
    }
    report
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// In a network namespace of this thread's own, with the real kernel.
    #[tokio::test]
    async fn the_next_vm_of_an_address_is_listened_to_once_the_last_is_not() {
        use nix::sched::{CloneFlags, unshare};
        if unshare(CloneFlags::CLONE_NEWNET).is_err() {
            eprintln!("SKIPPED: needs root");
            return;
        }
        let address = Ipv4Addr::new(10, 213, 0, 2);
        let last = EventSource::open(address).unwrap();
        let refused = EventSource::open_when_free(address, AGAIN * 2).await.unwrap_err();
        assert!(refused.is_refused(), "{refused}");
        let (next, ()) = tokio::join!(EventSource::open_when_free(address, Duration::from_secs(60)), async {
            sleep(AGAIN * 2).await;
            drop(last);
        });
        next.unwrap();
    }

    proptest! {
        #[test]
        fn any_datagram_is_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = events(&bytes, "dbt0ad50002");
        }
    }
}
