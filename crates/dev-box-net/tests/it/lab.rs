//! Namespaces: `host` (bridge, NAT, services), `vm-a`, `vm-b`, and `world` (everything that is not the host).

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use dev_box_core::id::VmName;
use dev_box_net::guard::{Firewall, NftFirewall, VmGuard};
use dev_box_net::identity::{mac_of, tap_of};
use dev_box_net::network::NetworkShape;
use dev_box_net::{EgressPolicy, Subnet};
use nix::sched::{CloneFlags, setns};

/// VM A's address; B's is the next one.
pub(crate) const VM_A: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 2);
pub(crate) const VM_B: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 3);
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 1);
/// The host's address towards the world, another public one, and one as a container engine's bridge has.
pub(crate) const HOST_WAN: Ipv4Addr = Ipv4Addr::new(45, 33, 32, 1);
pub(crate) const HOST_OTHER: Ipv4Addr = Ipv4Addr::new(93, 184, 216, 1);
pub(crate) const HOST_PRIVATE: Ipv4Addr = Ipv4Addr::new(172, 20, 0, 1);
/// Addresses in the world.
pub(crate) const PUBLIC: Ipv4Addr = Ipv4Addr::new(1, 1, 1, 1);
pub(crate) const PUBLIC_TOO: Ipv4Addr = Ipv4Addr::new(8, 8, 8, 8);
pub(crate) const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
pub(crate) const SPECIAL: [Ipv4Addr; 8] = [
    METADATA,
    Ipv4Addr::new(10, 66, 0, 1),
    Ipv4Addr::new(172, 16, 5, 5),
    Ipv4Addr::new(192, 168, 77, 1),
    Ipv4Addr::new(100, 64, 0, 1),
    Ipv4Addr::new(198, 18, 0, 1),
    Ipv4Addr::new(203, 0, 113, 9),
    Ipv4Addr::new(192, 0, 2, 9),
];
const TCP_PORTS: [u16; 7] = [22, 53, 80, 443, 8080, 9418, 25];
const UDP_PORTS: [u16; 5] = [53, 67, 123, 443, 4444];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Host,
    VmA,
    VmB,
    World,
}

/// Datagrams that reached a socket of some place.
pub(crate) type Arrived = Arc<Mutex<Vec<(Place, Vec<u8>)>>>;

pub(crate) struct Lab {
    prefix: String,
    pub(crate) arrived: Arrived,
    pub(crate) firewall: NftFirewall,
    _listeners: Vec<TcpListener>,
}

static COUNT: AtomicU32 = AtomicU32::new(0);

/// The reason these tests cannot run here, if there is one.
pub(crate) fn missing() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root");
    }
    let has = |program: &str, argument: &str| Command::new(program).arg(argument).output().is_ok();
    if !has("ip", "-V") || !has("nft", "--version") {
        return Some("needs the programs ip and nft");
    }
    None
}

impl Lab {
    /// `None`, said on standard error, where it cannot be built.
    pub(crate) fn new() -> Option<Self> {
        Self::listening(&TCP_PORTS, &UDP_PORTS)
    }

    /// Without anybody on port 53, where a resolver is to be.
    pub(crate) fn without_dns() -> Option<Self> {
        let but_dns = |ports: &[u16]| ports.iter().copied().filter(|port| *port != 53).collect::<Vec<_>>();
        Self::listening(&but_dns(&TCP_PORTS), &but_dns(&UDP_PORTS))
    }

    fn listening(tcp: &[u16], udp: &[u16]) -> Option<Self> {
        if let Some(why) = missing() {
            eprintln!("SKIPPED: {why}");
            return None;
        }
        let prefix = format!("dbnet{}-{}-", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let host = format!("{prefix}host");
        let mut lab = Self {
            firewall: NftFirewall::with_commands(
                &["ip", "netns", "exec", &host, "nft"],
                &["ip", "netns", "exec", &host, "ebtables-save"],
                &["ip", "netns", "exec", &host, "iptables-save"],
            ),
            prefix,
            arrived: Arrived::default(),
            _listeners: Vec::new(),
        };
        lab.wire();
        lab.serve(tcp, udp);
        Some(lab)
    }

    pub(crate) fn name(&self, place: Place) -> String {
        let name = match place {
            Place::Host => "host",
            Place::VmA => "vm-a",
            Place::VmB => "vm-b",
            Place::World => "world",
        };
        format!("{}{name}", self.prefix)
    }

    fn ip(&self, place: Place, command: &str) {
        run(&format!("ip -n {} {command}", self.name(place)));
    }

    fn wire(&self) {
        for place in [Place::Host, Place::VmA, Place::VmB, Place::World] {
            run(&format!("ip netns add {}", self.name(place)));
            self.ip(place, "link set lo up");
        }
        let shape = shape();
        self.ip(Place::Host, &format!("link add devbox0 address {} type bridge", shape.gateway_mac()));
        self.ip(Place::Host, &format!("address add {GATEWAY}/24 dev devbox0"));
        self.ip(Place::Host, "-6 address add fd00:213::1/64 dev devbox0 nodad");
        self.ip(Place::Host, "link set devbox0 up");
        for (place, address) in [(Place::VmA, VM_A), (Place::VmB, VM_B)] {
            let (tap, mac, ns) = (tap_of(address), mac_of(address), self.name(place));
            self.ip(
                Place::Host,
                &format!("link add {tap} type veth peer name eth0 address {mac} netns {ns}"),
            );
            self.ip(Place::Host, &format!("link set {tap} master devbox0 up"));
            self.ip(place, &format!("address add {address}/24 dev eth0"));
            let last = address.octets()[3];
            self.ip(place, &format!("-6 address add fd00:213::{last}/64 dev eth0 nodad"));
            self.ip(place, "link set eth0 up");
            self.ip(place, &format!("route add default via {GATEWAY}"));
        }
        let world = self.name(Place::World);
        self.ip(Place::Host, &format!("link add wan0 type veth peer name eth0 netns {world}"));
        self.ip(Place::Host, &format!("address add {HOST_WAN}/24 dev wan0"));
        self.ip(Place::Host, &format!("address add {HOST_OTHER}/32 dev lo"));
        self.ip(Place::Host, &format!("address add {HOST_PRIVATE}/32 dev lo"));
        self.ip(Place::Host, "link set wan0 up");
        self.ip(Place::World, "address add 45.33.32.2/24 dev eth0");
        self.ip(Place::World, "link set eth0 up");
        self.ip(Place::Host, "route add default via 45.33.32.2");
        // The world knows the way to the VMs, so that nothing but the guard keeps it from them.
        self.ip(Place::World, &format!("route add 10.213.0.0/24 via {HOST_WAN}"));
        for address in SPECIAL.into_iter().chain([PUBLIC, PUBLIC_TOO]) {
            self.ip(Place::World, &format!("address add {address}/32 dev lo"));
        }
        self.within(Place::Host, || {
            fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
            fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        });
        let masquerade = "add table ip labnat; add chain ip labnat post { type nat hook postrouting priority 100; }; \
                          add rule ip labnat post ip saddr 10.213.0.0/24 ip daddr != 10.213.0.0/24 masquerade";
        let status =
            Command::new("ip").args(["netns", "exec", &self.name(Place::Host), "nft", masquerade]).status();
        assert!(status.unwrap().success());
    }

    fn serve(&mut self, tcp: &[u16], udp: &[u16]) {
        for place in [Place::Host, Place::World, Place::VmA, Place::VmB] {
            for port in tcp.iter().copied() {
                let listener = self.within(place, || TcpListener::bind(any(port)).unwrap());
                self._listeners.push(listener);
            }
            for port in udp.iter().copied() {
                self.answer(place, self.within(place, || UdpSocket::bind(any(port)).unwrap()));
            }
            self.answer(place, self.within(place, || UdpSocket::bind("[::]:4446").unwrap()));
        }
    }

    /// Answers datagrams at a socket of that place, and notes them.
    pub(crate) fn answer(&self, place: Place, socket: UdpSocket) {
        let arrived = Arc::clone(&self.arrived);
        thread::spawn(move || echo(place, &socket, &arrived));
    }

    /// Runs `work` in the namespace, on a thread of its own.
    pub(crate) fn within<T: Send>(&self, place: Place, work: impl FnOnce() -> T + Send) -> T {
        let path = format!("/run/netns/{}", self.name(place));
        thread::scope(|scope| {
            let worker = scope.spawn(move || {
                setns(File::open(path).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            worker.join().unwrap()
        })
    }

    /// Sets the sysctl that makes bridged frames pass iptables; `false` when this kernel has it not.
    pub(crate) fn set_bridge_nf(&self, on: bool) -> bool {
        let value = if on { "1" } else { "0" };
        self.within(Place::Host, || fs::write("/proc/sys/net/bridge/bridge-nf-call-iptables", value).is_ok())
    }

    /// Puts both VMs under `policy`.
    pub(crate) fn guard(&self, policy: &EgressPolicy) {
        for (name, address) in [("dev-box-a", VM_A), ("dev-box-b", VM_B)] {
            self.firewall.apply(&guard(name, address, policy)).unwrap();
        }
    }
}

pub(crate) fn guard(name: &str, address: Ipv4Addr, policy: &EgressPolicy) -> VmGuard {
    VmGuard::new(VmName::new(name).unwrap(), shape(), address, policy.clone()).unwrap()
}

impl Drop for Lab {
    fn drop(&mut self) {
        for place in [Place::Host, Place::VmA, Place::VmB, Place::World] {
            let _ = Command::new("ip").args(["netns", "del", &self.name(place)]).status();
        }
    }
}

pub(crate) fn shape() -> NetworkShape {
    let subnet: Subnet = "10.213.0.0/24".parse().unwrap();
    NetworkShape::new("dev-box", "devbox0", subnet).unwrap()
}

fn any(port: u16) -> SocketAddr {
    (Ipv4Addr::UNSPECIFIED, port).into()
}

fn echo(place: Place, socket: &UdpSocket, arrived: &Arrived) {
    let mut buffer = [0; 2048];
    while let Ok((length, from)) = socket.recv_from(&mut buffer) {
        arrived.lock().unwrap().push((place, buffer[..length].to_vec()));
        let _ = socket.send_to(&buffer[..length], from);
    }
}

pub(crate) fn run(command: &str) {
    let mut words = command.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}
