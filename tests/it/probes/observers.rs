//! What arrives where, seen by packet sockets.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

use super::guest::PLACES;

/// The names of the probes that arrived.
pub(crate) type Seen = Arc<Mutex<BTreeSet<String>>>;

/// What the world sends to the guest that tries.
pub(crate) const INBOUND: &[u8] = b"probe:inbound-world;";

/// A packet is on its way for less than this.
pub(crate) const SETTLE: Duration = Duration::from_millis(1500);
/// Each probe is sent every half second or two.
const ROUND: Duration = Duration::from_secs(4);
const LIMIT: Duration = Duration::from_secs(120);

/// Whatever was on its way is nothing that arrived.
pub(crate) fn forget(seen: &Seen) {
    thread::sleep(SETTLE);
    seen.lock().unwrap().clear();
}

#[track_caller]
pub(crate) fn all_arrive(seen: &Seen, names: &[&str], when: &str) {
    let start = Instant::now();
    loop {
        let missing: Vec<&str> = {
            let seen = seen.lock().unwrap();
            names.iter().copied().filter(|name| !seen.contains(*name)).collect()
        };
        if missing.is_empty() {
            return;
        }
        assert!(start.elapsed() < LIMIT, "{missing:?} did not arrive {when}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// For as long as each of them is tried at least once.
#[track_caller]
pub(crate) fn none_arrive(seen: &Seen, names: &[&str], when: &str) {
    thread::sleep(ROUND);
    let arrived: Vec<&&str> = {
        let seen = seen.lock().unwrap();
        names.iter().filter(|name| seen.contains(**name)).collect()
    };
    assert!(arrived.is_empty(), "{arrived:?} arrived {when}");
}

/// Looks at what passes an interface.
pub(crate) fn observe(sniffer: OwnedFd, over: Arc<AtomicBool>, look: impl Fn(&[u8]) + Send + 'static) {
    thread::spawn(move || {
        let mut buffer = [0; 2048];
        while !over.load(Ordering::Relaxed) {
            match recv(sniffer.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => look(&buffer[..length]),
                Err(_) => thread::sleep(Duration::from_millis(2)),
            }
        }
    });
}

pub(crate) fn note(seen: &Seen, bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Some((name, _)) = text.split_once("probe:").and_then(|(_, rest)| rest.split_once(';')) {
        seen.lock().unwrap().insert(name.to_owned());
    }
}

/// Destination and port of a TCP packet that opens a connection, in an Ethernet frame.
fn opening(frame: &[u8]) -> Option<(Ipv4Addr, u16)> {
    let ip = frame.get(14..)?;
    let opens = frame.get(12..14)? == [8, 0] && *ip.get(9)? == 6 && ip.get(33)? & 0x12 == 2;
    let address = <[u8; 4]>::try_from(ip.get(16..20)?).ok()?;
    opens.then(|| Some((address.into(), u16::from_be_bytes([*ip.get(22)?, *ip.get(23)?]))))?
}

fn has(frame: &[u8], bytes: &[u8]) -> bool {
    frame.windows(bytes.len()).any(|window| window == bytes)
}

pub(super) fn at_world(seen: &Seen, frame: &[u8]) {
    // What the world sends itself passes here as well.
    if has(frame, INBOUND) {
        return;
    }
    note(seen, frame);
    // A frame made by hand has its name in it, and counts for that alone.
    if let (Some((address, port)), false) = (opening(frame), has(frame, b"probe:")) {
        let address = address.to_string();
        let place = PLACES.iter().find(|(to, at, _)| *to == address && *at == port);
        if let Some((.., name)) = place {
            seen.lock().unwrap().insert((*name).to_owned());
        }
    }
}

/// At the neighbour's tap, where its own frames pass as well.
pub(super) fn at_neighbour(seen: &Seen, frame: &[u8], neighbour: Ipv4Addr) {
    let own = [&[2, 0xdb][..], &neighbour.octets()].concat();
    if frame.get(6..12) != Some(&own) {
        note(seen, frame);
    }
}

/// At the tap of the guest that tries: what it sends proves nothing here.
pub(super) fn at_guest(seen: &Seen, frame: &[u8], guest: Ipv4Addr) {
    if opening(frame) == Some((guest, 8080)) {
        seen.lock().unwrap().insert("inbound".to_owned());
    }
    // What its neighbour sends; the guest itself sends nothing of that name.
    if has(frame, INBOUND) || has(frame, b"probe:back-") {
        note(seen, frame);
    }
}

/// A packet(7) socket bound to that interface of the present namespace.
pub(crate) fn packet_socket(interface: &str) -> OwnedFd {
    let all = SockProtocol::EthAll;
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, all).unwrap();
    bind(socket.as_raw_fd(), &link_address(interface)).unwrap();
    socket
}

/// The interface's address as the kernel tells it: family, protocol and index filled in.
fn link_address(interface: &str) -> LinkAddr {
    nix::ifaddrs::getifaddrs()
        .unwrap()
        .find(|entry| {
            entry.interface_name == interface
                && entry.address.is_some_and(|address| address.as_link_addr().is_some())
        })
        .and_then(|entry| entry.address)
        .and_then(|address| address.as_link_addr().copied())
        .unwrap()
}
