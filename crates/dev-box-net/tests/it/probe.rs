//! One thing that is sent, and whether it arrived.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use dev_box_net::identity::mac_of;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
};

use crate::frame::{BROADCAST, Packet, arp, other};
use crate::frame6::Packet6;
use crate::lab::{Lab, Place, VM_A};

/// How long a packet is waited for that is not to arrive, and one that is.
const SILENCE: Duration = Duration::from_millis(700);
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Clone)]
pub(crate) enum Kind {
    /// A TCP connection is established.
    Connect(SocketAddr),
    /// A datagram reaches a socket somewhere.
    Datagram(SocketAddr),
    /// A packet made by hand reaches a socket somewhere.
    Raw(Packet),
    /// A packet made by hand reaches an interface at that place.
    Seen(Packet, Place),
    /// As `Seen`: one of IPv6.
    Seen6(Packet6, Place),
    /// As `Seen`: ARP (operation, sender's Ethernet and IP address, target's IP address).
    Arp(u8, dev_box_core::spec::MacAddress, Ipv4Addr, Ipv4Addr, Place),
    /// The host answers ARP sent to that Ethernet address, asking for that IP address.
    HostTells(dev_box_core::spec::MacAddress, Ipv4Addr),
    /// As `Seen`: another protocol (target's Ethernet address, its number).
    Other(dev_box_core::spec::MacAddress, u16, Place),
}

#[derive(Debug, Clone)]
pub(crate) struct Probe {
    pub(crate) from: Place,
    pub(crate) kind: Kind,
}

static MARK: AtomicU64 = AtomicU64::new(0);

impl Probe {
    pub(crate) fn connect(from: Place, to: Ipv4Addr, port: u16) -> Self {
        Self { from, kind: Kind::Connect((to, port).into()) }
    }

    pub(crate) fn datagram(from: Place, to: impl Into<IpAddr>, port: u16) -> Self {
        Self { from, kind: Kind::Datagram((to.into(), port).into()) }
    }

    pub(crate) fn raw(from: Place, packet: Packet) -> Self {
        Self { from, kind: Kind::Raw(packet) }
    }

    pub(crate) fn seen(from: Place, packet: Packet, at: Place) -> Self {
        Self { from, kind: Kind::Seen(packet, at) }
    }

    /// Sends it, and says whether it arrived, as it is to.
    pub(crate) fn arrives(&self, lab: &Lab) -> bool {
        self.arrives_within(PATIENCE, lab)
    }

    /// Sends it, and says whether it was lost, as it is to be.
    pub(crate) fn is_lost(&self, lab: &Lab) -> bool {
        !self.arrives_within(SILENCE, lab)
    }

    fn arrives_within(&self, wait: Duration, lab: &Lab) -> bool {
        let number = MARK.fetch_add(1, Ordering::Relaxed);
        let mark = format!("dev-box-mark-{number:016x}");
        let mark = mark.as_bytes();
        // A port of its own, so that connection tracking sees a new connection each time.
        let fresh = |packet: &Packet| Packet {
            source_port: if packet.source_port == 0 {
                20_000 + (number % 20_000) as u16
            } else {
                packet.source_port
            },
            ..packet.clone()
        };
        match &self.kind {
            Kind::Connect(to) => lab.within(self.from, || TcpStream::connect_timeout(to, wait).is_ok()),
            Kind::Datagram(to) => {
                let local = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                let (socket, sent) = lab.within(self.from, || {
                    let socket = UdpSocket::bind(local).unwrap();
                    let sent = socket.send_to(mark, to).is_ok();
                    (socket, sent)
                });
                let arrived = sent && reached(lab, mark, wait);
                // Closed only now: a reply to a closed socket would make the VM send an ICMP error.
                thread::sleep(Duration::from_millis(20));
                drop(socket);
                arrived
            }
            Kind::Raw(packet) => {
                inject(lab, self.from, &fresh(packet).frame(mark));
                reached(lab, mark, wait)
            }
            Kind::Seen(packet, at) => {
                self.sniffed(wait, lab, *at, &fresh(packet).frame(mark), |frame| contains(frame, mark))
            }
            Kind::Seen6(packet, at) => {
                let frame = packet.frame(20_000 + (number % 20_000) as u16, mark);
                self.sniffed(wait, lab, *at, &frame, |frame| contains(frame, mark))
            }
            Kind::Arp(operation, mac, ip, target, at) => self.sniffed(
                wait,
                lab,
                *at,
                &arp(*operation, BROADCAST, (*mac, *ip), *target, mark),
                |frame| contains(frame, mark),
            ),
            Kind::HostTells(group, address) => {
                let question = arp(1, *group, (mac_of(VM_A), VM_A), *address, mark);
                // ARP's operation is at 20, the sender's IP address at 28.
                self.sniffed(wait, lab, self.from, &question, |frame| {
                    frame.get(20..22) == Some(&[0, 2]) && frame.get(28..32) == Some(&address.octets())
                })
            }
            Kind::Other(target, number, at) => {
                self.sniffed(wait, lab, *at, &other(*target, *number, mark), |frame| contains(frame, mark))
            }
        }
    }

    fn sniffed(
        &self,
        wait: Duration,
        lab: &Lab,
        at: Place,
        frame: &[u8],
        is_it: impl Fn(&[u8]) -> bool,
    ) -> bool {
        let sniffer = lab.within(at, || packet_socket("eth0"));
        inject(lab, self.from, frame);
        let end = Instant::now() + wait;
        let mut buffer = [0; 2048];
        while Instant::now() < end {
            match recv(sniffer.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) if is_it(&buffer[..length]) => return true,
                Ok(_) => {}
                Err(_) => thread::sleep(Duration::from_millis(5)),
            }
        }
        false
    }
}

/// What it says of each; sent side by side.
pub(crate) fn all(probes: &[Probe], says: impl Fn(&Probe) -> bool + Sync) -> Vec<bool> {
    thread::scope(|scope| {
        let threads: Vec<_> = probes.iter().map(|probe| scope.spawn(|| says(probe))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn reached(lab: &Lab, mark: &[u8], wait: Duration) -> bool {
    let end = Instant::now() + wait;
    while Instant::now() < end {
        if lab.arrived.lock().unwrap().iter().any(|(_, payload)| contains(payload, mark)) {
            return true;
        }
        thread::sleep(Duration::from_millis(5));
    }
    false
}

fn contains(bytes: &[u8], mark: &[u8]) -> bool {
    bytes.windows(mark.len()).any(|window| window == mark)
}

/// Sends a frame from the place's `eth0`.
pub(crate) fn inject(lab: &Lab, from: Place, frame: &[u8]) {
    let socket = lab.within(from, || packet_socket("eth0"));
    assert_eq!(send(socket.as_raw_fd(), frame, MsgFlags::empty()).unwrap(), frame.len());
}

/// A packet(7) socket bound to that interface of the present namespace.
fn packet_socket(interface: &str) -> OwnedFd {
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
            entry.interface_name == interface && entry.address.is_some_and(|a| a.as_link_addr().is_some())
        })
        .and_then(|entry| entry.address)
        .and_then(|address| address.as_link_addr().copied())
        .unwrap()
}
