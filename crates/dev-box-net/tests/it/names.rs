//! Policies with names: the real dnsmasq, asked by VMs, in front of a name server of the world's.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use dev_box_core::id::VmName;
use dev_box_net::EgressPolicy;
use dev_box_net::events::NetEventKind;
use dev_box_net::guard::{DropReason, Firewall as _, VmGuard};
use dev_box_net::resolver::{DnsmasqResolver, NameService, Resolver as _};
use tempfile::TempDir;

use crate::guard::{answered, both_ways_in, custom, serve_lines, silent};
use crate::ipv6;
use crate::lab::{GATEWAY, Lab, PUBLIC, PUBLIC_TOO, Place, SPECIAL, VM_A, VM_B, shape};
use crate::probe::Probe;
use crate::reports::Listener;

/// The world's name server.
const SERVER: Ipv4Addr = Ipv4Addr::new(45, 33, 32, 2);
const PRIVATE: Ipv4Addr = SPECIAL[1];
const SHARED: Ipv4Addr = SPECIAL[4];

/// How many addresses `long.example` has: an answer of more than a kilobyte.
const LONG: usize = 80;

/// How long an answer is waited for, and one that is not to come.
const PATIENCE: Duration = Duration::from_secs(30);
const SILENCE: Duration = Duration::from_secs(2);

/// Of an IPv4 address; [`ASKS_FOR_IPV6`] at its place makes it one of an IPv6 address (RFC 3596).
fn question(name: &str) -> Vec<u8> {
    let mut question = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        question.push(u8::try_from(label.len()).unwrap());
        question.extend(label.as_bytes());
    }
    question.extend([0, 0, 1, 0, 1]);
    question
}

const ASKS_FOR_IPV6: u8 = 28;

/// The code and the addresses of an answer.
fn read(question: &[u8], answer: &[u8]) -> (u8, Vec<Ipv4Addr>) {
    // An address's record ends with its length, 4, and itself.
    let records = answer[question.len()..].chunks_exact(16);
    let addresses = records.map(|record| <[u8; 4]>::try_from(&record[12..16]).unwrap().into());
    (answer[3] & 15, addresses.take(usize::from(answer[7])).collect())
}

/// A lab with a name server, and resolvers in front of it.
struct Names<'a> {
    lab: &'a Lab,
    dir: TempDir,
    resolver: DnsmasqResolver,
}

impl<'a> Names<'a> {
    fn new(lab: &'a Lab) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let zone = format!(
            "listen-address={SERVER}\nbind-interfaces\nno-resolv\nno-hosts\nlog-facility=/dev/null\n\
             address=/github.com/{PUBLIC}\naddress=/crates.io/{PUBLIC_TOO}\naddress=/other.org/{PUBLIC_TOO}\n\
             address=/inside.example/{PRIVATE}\naddress=/shared.example/{SHARED}\n\
             address=/six.example/{ipv6}\naddress=/inside6.example/fd12::1\n{long}",
            ipv6 = ipv6::PUBLIC,
            long = (0..LONG).map(|n| format!("host-record=long.example,9.9.9.{n}\n")).collect::<String>(),
        );
        let (config, pid) = (dir.path().join("zone"), dir.path().join("server.pid"));
        fs::write(&config, zone).unwrap();
        let status = Command::new("ip")
            .args(["netns", "exec", &lab.name(Place::World), "dnsmasq"])
            .arg(format!("--conf-file={}", config.display()))
            .arg(format!("--pid-file={}", pid.display()))
            .status();
        assert!(status.unwrap().success());
        let resolv_conf = dir.path().join("resolv.conf");
        fs::write(&resolv_conf, format!("nameserver {SERVER}\n")).unwrap();
        let host = lab.name(Place::Host);
        let resolver = DnsmasqResolver::new(dir.path().join("resolvers"), resolv_conf)
            .with_command("ip", ["netns", "exec", &host, "dnsmasq"]);
        Self { lab, dir, resolver }
    }

    /// Puts a VM under a policy, as `VmNetwork` does.
    fn apply(&self, vm: &str, address: Ipv4Addr, policy: &EgressPolicy) {
        let name = VmName::new(vm).unwrap();
        self.resolver.stop(address).unwrap();
        let guard = VmGuard::new(name.clone(), shape(), address, policy.clone()).unwrap();
        self.lab.firewall.apply(&guard.forgetting_names()).unwrap();
        if let Some(names) = NameService::new(name, shape(), address, policy) {
            self.resolver.serve(&names).unwrap();
            assert_eq!(self.resolver.serving().unwrap().get(&address), Some(&names.digest()));
        }
    }

    /// The answer's code and addresses; `None` for silence, which [`SERVER`] is to keep.
    fn ask(&self, from: Place, server: Ipv4Addr, name: &str) -> Option<(u8, Vec<Ipv4Addr>)> {
        let patience = if server == SERVER { SILENCE } else { PATIENCE };
        let question = question(name);
        let socket = self.lab.within(from, || UdpSocket::bind("0.0.0.0:0").unwrap());
        socket.set_read_timeout(Some(patience)).unwrap();
        socket.send_to(&question, (server, 53)).unwrap();
        let mut answer = [0; 1500];
        let length = socket.recv(&mut answer).ok()?;
        Some(read(&question, &answer[..length]))
    }

    /// The answer's code and IPv6 addresses.
    fn ask_for_ipv6(&self, name: &str) -> (u8, Vec<Ipv6Addr>) {
        let mut question = question(name);
        let place = question.len() - 3;
        question[place] = ASKS_FOR_IPV6;
        let socket = self.lab.within(Place::VmA, || UdpSocket::bind("0.0.0.0:0").unwrap());
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.send_to(&question, (GATEWAY, 53)).unwrap();
        let mut answer = [0; 1500];
        let length = socket.recv(&mut answer).unwrap();
        let records = answer[question.len()..length].chunks_exact(28);
        let addresses = records.map(|record| <[u8; 16]>::try_from(&record[12..28]).unwrap().into());
        (answer[3] & 15, addresses.take(usize::from(answer[7])).collect())
    }

    /// The same over TCP, where each message begins with its length (RFC 1035, 4.2.2).
    fn ask_by_tcp(&self, from: Place, server: Ipv4Addr, name: &str) -> Option<(u8, Vec<Ipv4Addr>)> {
        let question = question(name);
        let patience = if server == SERVER { SILENCE } else { PATIENCE };
        let connect = || TcpStream::connect_timeout(&(server, 53).into(), patience);
        let mut stream = self.lab.within(from, connect).ok()?;
        stream.set_read_timeout(Some(patience)).unwrap();
        let length = u16::try_from(question.len()).unwrap().to_be_bytes();
        stream.write_all(&[&length[..], &question].concat()).ok()?;
        let mut length = [0; 2];
        stream.read_exact(&mut length).ok()?;
        let mut answer = vec![0; u16::from_be_bytes(length).into()];
        stream.read_exact(&mut answer).ok()?;
        Some(read(&question, &answer))
    }

    fn connects(&self, from: Place, to: Ipv4Addr) -> bool {
        Probe::connect(from, to, 443).arrives(self.lab)
    }

    fn fails(&self, from: Place, to: Ipv4Addr) -> bool {
        Probe::connect(from, to, 443).is_lost(self.lab)
    }
}

impl Drop for Names<'_> {
    fn drop(&mut self) {
        for address in [VM_A, VM_B] {
            let _ = self.resolver.stop(address);
        }
        if let Ok(pid) = fs::read_to_string(self.dir.path().join("server.pid"))
            && let Ok(pid) = pid.trim().parse()
        {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
        }
    }
}

#[test]
fn names_open_their_own_vm_s_way_and_nothing_else() {
    both_ways_in(Lab::without_dns, |lab, _| {
        for (from, to) in [(Place::VmA, PUBLIC), (Place::VmB, PUBLIC_TOO), (Place::VmA, PRIVATE)] {
            assert!(Probe::connect(from, to, 443).arrives(lab), "did not arrive without the guard: {to}");
        }
        let names = Names::new(lab);
        let listed = "domains = ['github.com', 'inside.example', 'shared.example']";
        names.apply("dev-box-a", VM_A, &custom(listed));
        names.apply("dev-box-b", VM_B, &custom("domains = ['*.crates.io']"));

        assert!(names.fails(Place::VmA, PUBLIC), "nobody has asked for the name yet");
        assert_eq!(names.ask(Place::VmA, GATEWAY, "github.com"), Some((0, vec![PUBLIC])));
        assert!(names.connects(Place::VmA, PUBLIC), "its name is on the list");
        assert!(names.fails(Place::VmB, PUBLIC), "the other VM's name opens no way for this one");
        assert!(Probe::connect(Place::VmA, PUBLIC, 8080).is_lost(lab), "a name opens no other port");

        assert_eq!(names.ask_by_tcp(Place::VmA, GATEWAY, "github.com"), Some((0, vec![PUBLIC])));
        assert_eq!(names.ask_by_tcp(Place::VmA, GATEWAY, "other.org"), Some((3, vec![])), "its own resolver");
        assert_eq!(names.ask_by_tcp(Place::VmA, SERVER, "github.com"), None, "no other server");

        let missing =
            |name: &&str| assert_eq!(names.ask(Place::VmA, GATEWAY, name), Some((3, vec![])), "{name}");
        ["api.github.com", "notgithub.com", "other.org", "static.crates.io", "localhost"]
            .iter()
            .for_each(missing);
        assert_eq!(names.ask(Place::VmB, GATEWAY, "crates.io"), Some((3, vec![])), "only what is below");
        assert_eq!(names.ask(Place::VmB, GATEWAY, "a.b.crates.io"), Some((0, vec![PUBLIC_TOO])));
        assert!(names.connects(Place::VmB, PUBLIC_TOO) && names.fails(Place::VmA, PUBLIC_TOO));

        // Rebinding: private answers are withheld, and one that is not known as such opens nothing all the same.
        assert_eq!(names.ask(Place::VmA, GATEWAY, "inside.example"), Some((0, vec![])));
        assert_eq!(names.ask(Place::VmA, GATEWAY, "shared.example"), Some((0, vec![SHARED])));
        assert!(names.fails(Place::VmA, PRIVATE) && names.fails(Place::VmA, SHARED));
        assert_eq!(names.ask(Place::VmA, SERVER, "github.com"), None, "no other server");

        let dropped = lab.firewall.traffic().unwrap().remove(&VM_A).unwrap().dropped;
        for reason in [DropReason::Destination, DropReason::Special, DropReason::Port] {
            assert!(dropped.get(&reason).is_some_and(|count| count.packets > 0), "{reason}: {dropped:?}");
        }
    });
}

fn is_question(event: &NetEventKind, name: &str) -> bool {
    matches!(event, NetEventKind::DnsQuery { question } if question.name == name)
}

fn is_answer(event: &NetEventKind, name: &str) -> bool {
    match event {
        NetEventKind::DnsAnswer { question, code, .. } => *code == 0 && question.name == name,
        _ => false,
    }
}

#[test]
fn names_are_reported_whichever_way_they_are_asked() {
    both_ways_in(Lab::without_dns, |lab, _| {
        let names = Names::new(lab);
        names.apply("dev-box-a", VM_A, &custom("domains = ['github.com', 'crates.io', 'long.example']"));
        let mut listener = Listener::new(lab);
        let mut reported = |name: &str| {
            let heard = listener.until(PATIENCE, |event| is_answer(event, name));
            assert!(heard.iter().any(|event| is_question(event, name)), "the question {name}: {heard:?}");
            assert!(heard.iter().any(|event| is_answer(event, name)), "the answer {name}: {heard:?}");
        };
        assert_eq!(names.ask(Place::VmA, GATEWAY, "github.com"), Some((0, vec![PUBLIC])));
        reported("github.com");
        assert_eq!(names.ask_by_tcp(Place::VmA, GATEWAY, "crates.io"), Some((0, vec![PUBLIC_TOO])));
        reported("crates.io");
        // More than is reported of a packet.
        let (code, addresses) = names.ask_by_tcp(Place::VmA, GATEWAY, "long.example").unwrap();
        assert_eq!((code, addresses.len()), (0, LONG));
        reported("long.example");
    });
}

#[test]
fn names_open_ipv6_addresses_too() {
    both_ways_in(Lab::without_dns, |lab, _| {
        ipv6::with_addresses(lab);
        let names = Names::new(lab);
        let public: Ipv6Addr = ipv6::PUBLIC.parse().unwrap();
        let probe = Probe::datagram(Place::VmA, public, ipv6::PORT);
        let policy = |first: &str| {
            custom(&format!(
                "{first}\nports = ['udp/{}']\ndomains = ['six.example', 'inside6.example']",
                ipv6::PORT
            ))
        };
        names.apply("dev-box-a", VM_A, &policy("ipv6 = true"));
        assert!(probe.is_lost(lab), "nobody has asked for the name yet");
        assert_eq!(names.ask_for_ipv6("six.example"), (0, vec![public]));
        assert!(probe.arrives(lab), "its name is on the list");
        assert_eq!(names.ask_for_ipv6("inside6.example"), (0, vec![]), "rebinding");
        names.apply("dev-box-a", VM_A, &policy("ipv6 = true"));
        assert!(probe.is_lost(lab), "forgotten");
        names.apply("dev-box-a", VM_A, &policy(""));
        assert_eq!(names.ask_for_ipv6("six.example"), (0, vec![]), "no IPv6, no such address");
        assert!(probe.is_lost(lab));
    });
}

#[test]
fn other_names_cut_what_the_old_ones_opened() {
    both_ways_in(Lab::without_dns, |lab, _| {
        serve_lines(lab, 9000);
        let names = Names::new(lab);
        names.apply("dev-box-a", VM_A, &custom("ports = ['tcp/9000']\ndomains = ['github.com']"));
        names.ask(Place::VmA, GATEWAY, "github.com").unwrap();
        let stream = lab.within(Place::VmA, || TcpStream::connect((PUBLIC, 9000)).unwrap());
        assert!(answered(&stream));
        names.apply("dev-box-a", VM_A, &custom("ports = ['tcp/9000']\ndomains = ['crates.io']"));
        assert!(silent(&stream), "its name is no longer on the list");
        assert_eq!(names.ask(Place::VmA, GATEWAY, "github.com"), Some((3, vec![])));
        assert_eq!(names.ask(Place::VmA, GATEWAY, "crates.io"), Some((0, vec![PUBLIC_TOO])));
        lab.firewall.remove(VM_A).unwrap();
        names.resolver.stop(VM_A).unwrap();
        assert!(names.resolver.serving().unwrap().is_empty());
    });
}
