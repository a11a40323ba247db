//! The world that guests try to reach by IPv6, the guests, and what became of their tries.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use dev_box::net::identity::{ipv6_of, tap_of};
use dev_box_tests::{Host, Internet, Running, run};
use nix::sys::signal::Signal;

use super::guest::TRY;
use super::network::{BRIDGE, Network};
use crate::probes::layers::{Layer, nft, set_filter, set_guard};
use crate::probes::observers::{self, INBOUND, Seen, note, observe, packet_socket};

/// The first policy of both that have IPv6.
pub(super) const POLICY: &str = "mode = 'custom'\nipv6 = true\nports = ['tcp/443']\n";

/// Of the wire to the world.
const SUBNET: [u8; 3] = [45, 33, 34];
const WIRE: &str = "2a10:1234:1";

/// Who answers at port 443, and as what it is known when its visitor repeats what it was told.
const SERVERS: [(&str, &str); 4] = [
    ("2620:fe::fe", "exchange"),
    ("2620:fe::1:1", "goes-on"),
    ("2620:fe::53", "named"),
    ("45.33.41.1", "exchange-by-ipv4"),
];

/// What is at the world besides.
const RANGES: [&str; 11] = [
    "2620:fe::fe/128",
    "2620:fe::1:1/128",
    "2620:fe::53/128",
    "fd77::/16",
    "2001:db8::/32",
    "3fff::/20",
    "2001:2::/48",
    "2002::/16",
    "64:ff9b::/96",
    "5f00::/16",
    "::ffff:0:0/96",
];

/// Arrived where the host's end of the bridge has it.
const AT_HOST: [&str; 16] = [
    "link-local",
    "link-local-source",
    "multicast",
    "multicast-here",
    "gateway-tcp",
    "gateway-dns",
    "gateway-dns-tcp",
    "rogue-advertisement",
    "rogue-solicitation",
    "duplicate-detection",
    "discovery-for-another",
    "cut-off-public",
    "cut-off-gateway",
    "cut-off-discovery",
    "spoof-discovery",
    "neighbour-direct",
];

/// Arrived at the VM that tries.
const AT_GUEST: [&str; 4] = ["inbound-world", "inbound-host", "advertisement", "advertisement-to-it"];

/// A guest that runs.
struct Guest {
    owner: Option<Running>,
    name: String,
    address: Ipv4Addr,
    ipv6: Vec<String>,
}

/// All of it. Dropped, it goes.
pub(super) struct Stage<'a> {
    host: &'a Host,
    world: Internet,
    seen: Seen,
    over: Arc<AtomicBool>,
    guests: Vec<Guest>,
    _network: Network<'a>,
}

impl<'a> Stage<'a> {
    /// Puts the world up and starts the guests; the reason where that cannot be.
    pub(super) fn set(host: &'a Host) -> Result<Self, String> {
        for program in ["nft", "bridge", "virsh", "ip6tables"] {
            Command::new(program).arg("--version").output().map_err(|_| format!("needs {program}"))?;
        }
        let mut world = Internet::new(SUBNET)?;
        world.add("45.33.41.1")?;
        world.add_ipv6(WIRE, &RANGES)?;
        world.serve_names(host, &[("six.example.com", "2620:fe::53")])?;
        let sniffer = world.inside(|| packet_socket("eth0"))?;
        let network = Network::new(host);
        let mut stage = Self {
            host,
            world,
            seen: Seen::default(),
            over: Arc::default(),
            guests: Vec::new(),
            _network: network,
        };
        let seen = Arc::clone(&stage.seen);
        // What the world sends itself passes here as well.
        observe(sniffer, Arc::clone(&stage.over), move |frame| {
            if named(frame).is_none_or(|name| !AT_GUEST.contains(&name.as_str())) {
                note(&seen, frame);
            }
        });
        stage.serve()?;
        let policy = stage.write(POLICY);
        for (role, network) in [
            ("stay", ["--policy", &policy]),
            ("cut-off", ["--net", "nat-filtered"]),
            ("try", ["--policy", &policy]),
        ] {
            stage.start(role, network);
        }
        stage.meet()?;
        Ok(stage)
    }

    fn serve(&self) -> Result<(), String> {
        for (address, name) in SERVERS {
            let at = SocketAddr::from((address.parse::<IpAddr>().unwrap(), 443));
            let listener = self.world.inside(|| TcpListener::bind(at))?.map_err(|error| error.to_string())?;
            let (seen, over) = (Arc::clone(&self.seen), Arc::clone(&self.over));
            thread::spawn(move || {
                for client in listener.incoming().flatten() {
                    let (seen, over) = (Arc::clone(&seen), Arc::clone(&over));
                    thread::spawn(move || talk(client, name, &seen, &over));
                }
            });
        }
        Ok(())
    }

    fn write(&self, policy: &str) -> String {
        let path = self.host.root().join("policy.toml");
        std::fs::write(&path, policy).unwrap();
        path.to_string_lossy().into_owned()
    }

    fn start(&mut self, role: &str, network: [&str; 2]) {
        let neighbour = self.guests.first().map_or(Ipv4Addr::UNSPECIFIED, |guest| guest.address);
        let mut command = Network::command(self.host);
        command.args(["run", "--quiet"]).args(network).args(["--", "python3", "-c", TRY]);
        command.args([&neighbour.to_string(), role]);
        let before = self.host.vms();
        let mut owner = self.host.spawn(&mut command);
        owner.wait_for_output(&format!("{role} as "));
        let line = owner.line();
        let mut words = line.split(' ');
        let address: Ipv4Addr = words.next().and_then(|word| word.parse().ok()).expect("the guest's address");
        let ipv6: Vec<String> = words.map(str::to_owned).collect();
        let expected = match role {
            "cut-off" => Vec::new(),
            _ => vec![format!("{}/120", ipv6_of(address))],
        };
        assert_eq!(ipv6, expected, "the IPv6 addresses of the guest's interface");
        let name =
            self.host.vms().into_iter().find(|name| !before.contains(name)).expect("the VM's directory");
        self.guests.push(Guest { owner: Some(owner), name, address, ipv6 });
    }

    fn neighbour(&self) -> &Guest {
        &self.guests[0]
    }

    fn guest(&self) -> &Guest {
        &self.guests[2]
    }

    /// Observers, and who comes unasked.
    fn meet(&self) -> Result<(), String> {
        let (neighbour, guest) = (self.neighbour().address, self.guest().address);
        let own = mac(neighbour);
        self.watch(&tap_of(neighbour), move |frame, _| frame.get(6..12) != Some(&own));
        self.watch(&tap_of(guest), |_, name| AT_GUEST.contains(&name));
        let gateway = gateway(guest);
        self.watch(BRIDGE, move |frame, name| {
            frame.get(6..12) != Some(&mac(gateway)) && AT_HOST.contains(&name)
        });
        // The host's own address: what the guard's first look lets by. Beyond it no VM's IPv6 gets up to the host, whatever its rules.
        let _ = nft(&format!("delete table inet {BRIDGE}\n"));
        nft(&format!(
            "add table inet {BRIDGE}\nadd counter inet {BRIDGE} host\n\
             add chain inet {BRIDGE} passed {{ type filter hook prerouting priority -280 ; }}\n\
             add rule inet {BRIDGE} passed iifname \"{BRIDGE}\" ip6 daddr {WIRE}::1 counter name host\n"
        ))?;
        let (seen, over) = (Arc::clone(&self.seen), Arc::clone(&self.over));
        thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                let output = Command::new("nft").args(["reset", "counter", "inet", BRIDGE, "host"]).output();
                let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
                if text.is_ok_and(|text| text.contains("packets") && !text.contains("packets 0 ")) {
                    seen.lock().unwrap().insert("host".to_owned());
                }
                thread::sleep(Duration::from_millis(300));
            }
        });
        self.call_in(guest)
    }

    fn watch(&self, interface: &str, counts: impl Fn(&[u8], &str) -> bool + Send + 'static) {
        let seen = Arc::clone(&self.seen);
        observe(packet_socket(interface), Arc::clone(&self.over), move |frame| {
            if let Some(name) = named(frame).filter(|name| counts(frame, name)) {
                seen.lock().unwrap().insert(name);
            }
        });
    }

    /// Unasked: from the world, as a machine beside the host could, and from the host's end of the bridge.
    fn call_in(&self, guest: Ipv4Addr) -> Result<(), String> {
        // Libvirt's network lets nothing in by itself, which would hide what our layers do.
        run(&forwarded("-I", guest))?;
        let sockets = (0..300).map(|_| self.world.inside(|| UdpSocket::bind("[::]:0").unwrap()));
        let sockets: Vec<UdpSocket> = sockets.collect::<Result<_, _>>()?;
        let over = Arc::clone(&self.over);
        thread::spawn(move || {
            // Each from a port of its own: to the kernel it is never part of what went before. A port comes again after minutes, when the
            // kernel has forgotten it.
            for socket in sockets.iter().cycle() {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                let _ = socket.send_to(INBOUND, (ipv6_of(guest), 8081));
                thread::sleep(Duration::from_millis(900));
            }
        });
        let (socket, over) = (packet_socket(BRIDGE), Arc::clone(&self.over));
        let frames = from_the_gateway(guest);
        thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                for frame in &frames {
                    let _ = nix::sys::socket::send(
                        socket.as_raw_fd(),
                        frame,
                        nix::sys::socket::MsgFlags::empty(),
                    );
                }
                thread::sleep(Duration::from_millis(500));
            }
        });
        Ok(())
    }

    pub(super) fn forget(&self) {
        observers::forget(&self.seen);
    }

    #[track_caller]
    pub(super) fn all_arrive(&self, names: &[&str], when: &str) {
        observers::all_arrive(&self.seen, names, when);
    }

    #[track_caller]
    pub(super) fn none_arrive(&self, names: &[&str], when: &str) {
        observers::none_arrive(&self.seen, names, when);
    }

    /// Each with its IPv6 address, where it has one.
    pub(super) fn is_listed(&self) {
        let text = self.net(&["ls", "--json"]);
        let listed: serde_json::Value = serde_json::from_str(&text).unwrap();
        for guest in &self.guests {
            let found = listed.as_array().unwrap().iter().find(|vm| vm["vm"] == guest.name.as_str()).unwrap();
            let address = guest.ipv6.first().map(|_| ipv6_of(guest.address).to_string());
            assert_eq!(found["ipv6"].as_str(), address.as_deref(), "{text}");
        }
        let shown = self.net(&["show", &self.guest().name]);
        assert!(shown.contains(&ipv6_of(self.guest().address).to_string()), "{shown}");
    }

    pub(super) fn dropped(&self) -> String {
        self.net(&["show", &self.guest().name, "--json"])
    }

    /// Gives the VM that tries another policy.
    pub(super) fn apply(&self, policy: &str) {
        let path = self.write(policy);
        self.net(&["apply", &self.guest().name, "--policy", &path]);
    }

    pub(super) fn stands(&self) -> bool {
        self.host.spawn(Network::command(self.host).args(["net", "verify"])).finish().code() == 0
    }

    fn net(&self, arguments: &[&str]) -> String {
        self.host.spawn(Network::command(self.host).arg("net").args(arguments)).finish().expect_code(0).text()
    }

    pub(super) fn host_forgets_its_neighbours(&self) {
        run(&format!("ip -6 neigh flush dev {BRIDGE}")).unwrap();
    }

    pub(super) fn owners_stop(&self) {
        self.owners(Signal::SIGSTOP);
    }

    pub(super) fn owners_go_on(&self) {
        self.owners(Signal::SIGCONT);
    }

    fn owners(&self, signal: Signal) {
        for guest in &self.guests {
            guest.owner.as_ref().expect("it runs").signal(signal);
        }
    }

    /// Switches a layer for all guests.
    pub(super) fn set_layer(&self, layer: Layer, on: bool) {
        for guest in &self.guests {
            match layer {
                Layer::Guard => set_both_guards(guest, on).unwrap(),
                Layer::Filter => set_filter(&guest.name, &tap_of(guest.address), on),
            }
        }
    }

    /// Ends the guests as a user would.
    pub(super) fn strike(mut self) {
        for guest in &mut self.guests {
            let owner = guest.owner.take().expect("it runs");
            owner.signal(Signal::SIGTERM);
            owner.finish();
        }
    }
}

impl Drop for Stage<'_> {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(guest) = self.guests.get(2) {
            let _ = run(&forwarded("-D", guest.address));
        }
        for guest in &mut self.guests {
            if guest.owner.is_some() {
                // A failed test must not leave a way past the guard.
                let _ = set_both_guards(guest, true);
            }
            if let Some(owner) = guest.owner.take() {
                owner.signal(Signal::SIGCONT);
                owner.end();
            }
        }
        let _ = nft(&format!("delete table inet {BRIDGE}\n"));
    }
}

/// What the world's servers do: a visitor that repeats what it hears, hears it and is heard.
fn talk(mut client: TcpStream, name: &str, seen: &Seen, over: &AtomicBool) {
    let _ = client.set_read_timeout(Some(Duration::from_secs(5)));
    for number in 0_u32.. {
        let said = format!("{name} {number:08}");
        let mut heard = vec![0; said.len()];
        if client.write_all(said.as_bytes()).is_err() || client.read_exact(&mut heard).is_err() {
            return;
        }
        if heard == said.as_bytes() {
            seen.lock().unwrap().insert(name.to_owned());
        }
        if name != "goes-on" || over.load(Ordering::Relaxed) {
            return;
        }
        thread::sleep(Duration::from_millis(500));
    }
}

fn named(frame: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(frame);
    let (name, _) = text.split_once("probe:")?.1.split_once(';')?;
    Some(name.to_owned())
}

fn mac(address: Ipv4Addr) -> [u8; 6] {
    let [a, b, c, d] = address.octets();
    [2, 0xdb, a, b, c, d]
}

fn gateway(guest: Ipv4Addr) -> Ipv4Addr {
    let [a, b, c, _] = guest.octets();
    Ipv4Addr::new(a, b, c, 1)
}

fn forwarded(verb: &str, guest: Ipv4Addr) -> String {
    format!("ip6tables -w {verb} FORWARD -p udp -d {} --dport 8081 -j ACCEPT", ipv6_of(guest))
}

/// Frames as the gateway would send them: router advertisements (RFC 4861, 4.2), and a connection of the host's own.
fn from_the_gateway(guest: Ipv4Addr) -> Vec<Vec<u8>> {
    let gateway = gateway(guest);
    let [a, b, c, d, e, f] = mac(gateway);
    let link_local = Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    let everyone = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    let frame = |to: [u8; 6],
                 (from, at): (Ipv6Addr, Ipv6Addr),
                 (protocol, hops): (u8, u8),
                 head: &[u8],
                 name: &str| {
        let body = [head, format!("probe:{name};").as_bytes()].concat();
        let length = u16::try_from(body.len()).unwrap().to_be_bytes();
        let header = [0x60, 0, 0, 0, length[0], length[1], protocol, hops];
        [&to[..], &mac(gateway), &[0x86, 0xdd], &header, &from.octets(), &at.octets(), &body].concat()
    };
    let advertisement = [134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
    let opening =
        [&443_u16.to_be_bytes()[..], &8080_u16.to_be_bytes(), &[0; 8], &[0x50, 2, 4, 0, 0, 0, 0, 0]].concat();
    let own = ipv6_of(guest);
    vec![
        frame([0x33, 0x33, 0, 0, 0, 1], (link_local, everyone), (58, 255), &advertisement, "advertisement"),
        frame(mac(guest), (link_local, own), (58, 255), &advertisement, "advertisement-to-it"),
        frame(mac(guest), (ipv6_of(gateway), own), (6, 64), &opening, "inbound-host"),
    ]
}

/// The guard's maps of IPv4 and the bridge's, and, of those that have it, of IPv6.
fn set_both_guards(guest: &Guest, on: bool) -> Result<(), String> {
    let (tap, own) = (tap_of(guest.address), ipv6_of(guest.address));
    set_guard(&tap, guest.address, on)?;
    let mut script = String::new();
    if !guest.ipv6.is_empty() {
        for (map, chain) in [("prerouting6-by", "pre6"), ("from-guest6", "out6"), ("to-guest6", "in6")] {
            let verdict = if on { format!("jump {tap}.{chain}") } else { "accept".to_owned() };
            script += &format!("delete element inet dev_box {map} {{ {own} }}\n");
            script += &format!("add element inet dev_box {map} {{ {own} : {verdict} }}\n");
        }
    }
    // What comes in a stranger's name has no entry of its own.
    let [a, b, c, _] = guest.address.octets();
    let stranger = ipv6_of(Ipv4Addr::new(a, b, c, 77));
    for map in ["prerouting6-by", "from-guest6"] {
        script += &format!("add element inet dev_box {map} {{ {stranger} : accept }}\n");
        if on {
            script += &format!("delete element inet dev_box {map} {{ {stranger} }}\n");
        }
    }
    nft(&script)
}
