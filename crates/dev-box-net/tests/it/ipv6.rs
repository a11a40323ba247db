//! IPv6 under a policy that enables it: the guard alone, with `bridge-nf-call-iptables` off and on.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::thread;
use std::time::Duration;

use dev_box_net::EgressPolicy;
use dev_box_net::guard::{DropReason, Firewall as _};
use dev_box_net::identity::{ipv6_of, mac_of};

use crate::frame6::{Body, Packet6};
use crate::guard::{all_arrive, both_ways, custom, none_arrives};
use crate::lab::{GATEWAY, Lab, Place, VM_A, VM_B, run};
use crate::probe::{Kind, Probe};

/// Every place answers datagrams at this port, by IPv6.
pub(crate) const PORT: u16 = 4446;
const HOST_WAN: &str = "2a01:4f8:1::1";
const WORLD: &str = "2a01:4f8:1::2";
pub(crate) const PUBLIC: &str = "2606:4700:4700::1111";
/// Not public, and yet in the world.
const SPECIAL: [&str; 6] =
    ["fd12::1", "2001:db8::9", "2002:a00:1::1", "64:ff9b::a00:1", "2001:10::1", "fec0::9"];

fn address(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

/// Gives everybody the IPv6 addresses of a network that has it, and the world some.
pub(crate) fn with_addresses(lab: &Lab) {
    let ip = |place, command: &str| run(&format!("ip -n {} -6 {command}", lab.name(place)));
    let gateway = ipv6_of(GATEWAY);
    ip(Place::Host, &format!("address add {gateway}/120 dev devbox0 nodad"));
    for (place, of) in [(Place::VmA, VM_A), (Place::VmB, VM_B)] {
        ip(place, &format!("address del fd00:213::{}/64 dev eth0", of.octets()[3]));
        ip(place, &format!("address add {}/120 dev eth0 nodad", ipv6_of(of)));
        ip(place, &format!("route add default via {gateway}"));
    }
    ip(Place::Host, &format!("address add {HOST_WAN}/64 dev wan0 nodad"));
    ip(Place::World, &format!("address add {WORLD}/64 dev eth0 nodad"));
    ip(Place::Host, &format!("route add default via {WORLD}"));
    ip(Place::World, &format!("route add fddb::/96 via {HOST_WAN}"));
    for there in SPECIAL.into_iter().chain([PUBLIC]) {
        ip(Place::World, &format!("address add {there}/128 dev lo"));
    }
    let nat = "add table ip6 labnat; add chain ip6 labnat post { type nat hook postrouting priority 100; }; \
               add rule ip6 labnat post ip6 saddr fddb::/96 ip6 daddr != fddb::/96 masquerade";
    let nft = ["netns", "exec", &lab.name(Place::Host), "nft", nat];
    assert!(Command::new("ip").args(nft).status().unwrap().success());
}

fn without_libvirts_nat(lab: &Lab) {
    let nft = ["netns", "exec", &lab.name(Place::Host), "nft", "delete table ip6 labnat"];
    assert!(Command::new("ip").args(nft).status().unwrap().success());
}

fn to(place: Place, there: impl Into<IpAddr>) -> Probe {
    Probe::datagram(place, there, PORT)
}

fn forbidden() -> Vec<(Probe, DropReason)> {
    use DropReason as Why;
    let a = Place::VmA;
    let mut probes = vec![
        (to(a, ipv6_of(GATEWAY)), Why::Gateway),
        (to(a, address(HOST_WAN)), Why::Host),
        (to(a, ipv6_of(VM_B)), Why::Neighbour),
        (Probe::datagram(a, address(PUBLIC), PORT + 1), Why::Port),
    ];
    probes.extend(SPECIAL.map(|there| (to(a, address(there)), Why::Special)));
    let (own, b, gateway) = (ipv6_of(VM_A), ipv6_of(VM_B), ipv6_of(GATEWAY));
    let seen = |packet: Packet6, at| Probe { from: a, kind: Kind::Seen6(packet, at) };
    let plain = Packet6::new(address(PUBLIC), Body::Udp(PORT));
    let to_b = Packet6 { target: b, ..plain.clone() };
    let at_b = Packet6 { target_mac: mac_of(VM_B), ..plain.clone() };
    probes.extend([
        (seen(Packet6 { target_mac: mac_of(VM_B), ..to_b.clone() }, Place::VmB), Why::Neighbour),
        (seen(to_b, Place::VmB), Why::Neighbour),
        (seen(at_b, Place::VmB), Why::Neighbour),
        (seen(Packet6 { source: b, ..plain.clone() }, Place::World), Why::Spoofed),
        (seen(Packet6 { source: address("fd00:213::2"), ..plain.clone() }, Place::World), Why::Spoofed),
        (seen(Packet6 { extension: true, ..plain }, Place::World), Why::Protocol),
    ]);
    // As the gateway, as B, and as a router (RFC 4861: 136 and 134); and who asks for B (135).
    let discovery = |kind, about| Packet6::new(address("ff02::1"), Body::Discovery(kind, about)).into_group();
    probes.extend([
        (seen(discovery(136, gateway), Place::VmB), Why::Neighbour),
        (seen(discovery(136, own), Place::VmB), Why::Neighbour),
        (seen(Packet6 { source: b, ..discovery(136, b) }, Place::VmB), Why::Spoofed),
        (seen(Packet6 { source: gateway, ..discovery(134, gateway) }, Place::VmB), Why::Spoofed),
        (seen(discovery(134, own), Place::VmB), Why::Neighbour),
        (seen(discovery(135, b), Place::VmB), Why::Neighbour),
    ]);
    probes
}

fn ipv6(rest: &str) -> EgressPolicy {
    custom(&format!("ipv6 = true\nports = ['udp/{PORT}', 'tcp/443']\n{rest}"))
}

#[test]
fn the_same_classes_hold() {
    both_ways(|lab, _| {
        with_addresses(lab);
        let socket = lab.within(Place::World, || UdpSocket::bind(("::", PORT + 1)).unwrap());
        lab.answer(Place::World, socket);
        let expected = forbidden();
        let probes: Vec<Probe> = expected.iter().map(|(probe, _)| probe.clone()).collect();
        for probe in &probes {
            to(Place::VmB, ipv6_of(GATEWAY)).arrives(lab);
            assert!(
                probe.arrives(lab),
                "did not arrive without the guard, so that it proves nothing: {probe:?}"
            );
        }
        lab.guard(&ipv6(""));
        none_arrives(lab, &probes);
        let traffic = lab.firewall.traffic().unwrap().remove(&VM_A).unwrap();
        for (probe, reason) in &expected {
            let counted = traffic.dropped.get(reason).map_or(0, |count| count.packets);
            let least = expected.iter().filter(|(_, other)| other == reason).count() as u64;
            assert!(counted >= least, "{reason}: {counted} of {least} counted: {probe:?}, {traffic:?}");
        }
        all_arrive(lab, &[to(Place::VmA, address(PUBLIC))], "although the policy allows it");

        // Nothing comes in unasked, and nothing is open to a VM whose policy has no IPv6.
        let inward = [to(Place::World, ipv6_of(VM_A)), to(Place::Host, ipv6_of(VM_A))];
        none_arrives(lab, &inward);
        lab.guard(&custom(&format!("ports = ['udp/{PORT}']")));
        none_arrives(lab, &[to(Place::VmA, address(PUBLIC))]);
        none_arrives(lab, &probes);
        for vm in [VM_A, VM_B] {
            lab.firewall.remove(vm).unwrap();
        }
        lab.firewall.clear().unwrap();
        all_arrive(lab, &inward, "without the guard, so that it proves nothing");
    });
}

#[test]
fn lists_ports_and_translation_are_the_policy_s() {
    both_ways(|lab, _| {
        with_addresses(lab);
        let a = Place::VmA;
        lab.guard(&ipv6("allow = ['fd12::/32']"));
        all_arrive(lab, &[to(a, address("fd12::1"))], "although listed");
        none_arrives(lab, &[to(a, address(PUBLIC)), to(a, address("2001:db8::9"))]);
        lab.guard(&ipv6("deny = ['2606:4700:4700::/48']"));
        none_arrives(lab, &[to(a, address(PUBLIC)), to(a, address("fd12::1"))]);
        let dropped = lab.firewall.traffic().unwrap().remove(&VM_A).unwrap().dropped;
        assert!(dropped[&DropReason::Denied].packets > 0 && dropped[&DropReason::Destination].packets > 0);

        // An established connection is judged again, and the guard translates by itself.
        without_libvirts_nat(lab);
        lab.guard(&ipv6(""));
        let listener = lab.within(Place::World, || TcpListener::bind((PUBLIC, 443)).unwrap());
        let server = thread::spawn(move || {
            let (mut stream, from) = listener.accept().unwrap();
            let mut buffer = [0; 5];
            while stream.read_exact(&mut buffer).is_ok() && stream.write_all(&buffer).is_ok() {}
            from.ip()
        });
        let mut stream = lab.within(a, || TcpStream::connect((PUBLIC, 443)).unwrap());
        let answered = |stream: &mut TcpStream, wait| {
            stream.set_read_timeout(Some(wait)).unwrap();
            let mut buffer = [0; 5];
            stream.write_all(b"hello").is_ok() && stream.read_exact(&mut buffer).is_ok()
        };
        assert!(answered(&mut stream, Duration::from_secs(30)));
        lab.guard(&ipv6("deny = ['2606:4700:4700::/48']"));
        let still = answered(&mut stream, Duration::from_millis(700));
        assert!(!still, "a change that forbids it cuts it");
        lab.guard(&ipv6(""));
        drop(stream);
        assert_eq!(server.join().unwrap(), address(HOST_WAN));
    });
}

#[test]
fn a_fingerprint_is_of_the_ipv6_rules_too() {
    let Some(lab) = Lab::new() else { return };
    lab.guard(&ipv6(""));
    let sound = lab.firewall.inspect(&[VM_A]).unwrap();
    let host = lab.name(Place::Host);
    for tampering in [
        format!("delete element inet dev_box from-guest6 {{ {} }}", ipv6_of(VM_A)),
        "flush chain bridge dev_box dbt0ad50002.out6".to_owned(),
        "flush chain inet dev_box dbt0ad50002.pre6".to_owned(),
    ] {
        assert!(
            Command::new("ip").args(["netns", "exec", &host, "nft", &tampering]).status().unwrap().success()
        );
        assert_ne!(lab.firewall.inspect(&[VM_A]).unwrap(), sound, "{tampering}");
        lab.guard(&ipv6(""));
        assert_eq!(lab.firewall.inspect(&[VM_A]).unwrap(), sound, "{tampering}");
    }
    let around = format!(
        "delete element inet dev_box from-guest6 {{ {0} }}; add element inet dev_box from-guest6 {{ {0} : accept }}",
        ipv6_of(VM_A)
    );
    assert!(Command::new("ip").args(["netns", "exec", &host, "nft", &around]).status().unwrap().success());
    lab.guard(&ipv6(""));
    assert_eq!(lab.firewall.inspect(&[VM_A]).unwrap(), sound);
    lab.firewall.remove(VM_A).unwrap();
    lab.firewall.remove(VM_B).unwrap();
    let output =
        Command::new("ip").args(["netns", "exec", &host, "nft", "list", "ruleset"]).output().unwrap();
    let left = String::from_utf8(output.stdout).unwrap();
    assert!(!left.contains("dbt0ad5"), "{left}");
}
