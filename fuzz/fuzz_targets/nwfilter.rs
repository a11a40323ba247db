//! Any policy that we take, as libvirt's filter and network: the XML is one that libvirt takes too, and says what we meant.
#![no_main]

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use dev_box_net::EgressPolicy;
use dev_box_net::Subnet;
use dev_box_net::identity::mac_of;
use dev_box_net::network::NetworkShape;
use dev_box_net::xml::network::{FoundNetwork, network_xml};
use dev_box_net::xml::nwfilter::nwfilter;
use libfuzzer_sys::fuzz_target;
use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};

/// What a policy and a network are made of, most of which is refused.
#[derive(Debug, arbitrary::Arbitrary)]
struct Input<'a> {
    name: &'a str,
    bridge: &'a str,
    subnet: [u8; 2],
    ports: Vec<(bool, u16, u8)>,
    allow: Vec<(u32, u8)>,
    deny: Vec<(u32, u8)>,
    ipv6: Option<Vec<(u128, u8)>>,
    domains: Vec<&'a str>,
    rest: &'a str,
}

impl Input<'_> {
    /// A policy as its author writes it.
    fn policy(&self) -> Option<EgressPolicy> {
        let port = |(tcp, first, more): &(bool, u16, u8)| {
            let protocol = if *tcp { "tcp" } else { "udp" };
            format!("{protocol}/{first}-{}", first.saturating_add((*more).into()))
        };
        let range = |(address, bits): &(u32, u8)| {
            let bits = bits % 33;
            let mask = u32::MAX.checked_shl((32 - bits).into()).unwrap_or(0);
            format!("{}/{bits}", Ipv4Addr::from(address & mask))
        };
        let ports: Vec<String> = self.ports.iter().map(port).collect();
        let range6 = |(address, bits): &(u128, u8)| {
            let bits = bits % 129;
            let mask = u128::MAX.checked_shl((128 - bits).into()).unwrap_or(0);
            format!("{}/{bits}", Ipv6Addr::from(address & mask))
        };
        let ranges = |list: &[(u32, u8)]| list.iter().map(range).collect::<Vec<_>>();
        let (mut allow, deny, domains) = (ranges(&self.allow), ranges(&self.deny), &self.domains);
        allow.extend(self.ipv6.iter().flatten().map(range6));
        let ipv6 = self.ipv6.is_some();
        let toml = format!(
            "mode = 'custom'\nipv6 = {ipv6}\nports = {ports:?}\nallow = {allow:?}\ndeny = {deny:?}\ndomains = {domains:?}\n{}",
            self.rest
        );
        EgressPolicy::from_toml(&toml).or_else(|_| EgressPolicy::from_toml(self.rest)).ok()
    }
}

fuzz_target!(|input: Input<'_>| {
    let [a, b] = input.subnet;
    let Ok(subnet) = format!("10.{a}.{b}.0/24").parse::<Subnet>() else { return };
    let named = NetworkShape::new(input.name, input.bridge, subnet);
    let shape =
        named.unwrap_or_else(|_| NetworkShape::new("dev-box", "devbox0", subnet).expect("good names"));
    let shape = if input.ipv6.is_some() { shape.with_ipv6() } else { shape };
    let network = FoundNetwork::read(&network_xml(&shape)).expect("a network");
    assert_eq!(network.bridge.as_deref(), Some(shape.bridge()));
    assert_eq!(network.subnet(), Ok(subnet));
    assert_eq!(network.addresses6.first().copied(), shape.gateway6());
    let Some(policy) = input.policy() else { return };
    let filter = nwfilter(&shape, &policy);
    let address = Ipv4Addr::new(10, a, b, 2);
    let rules = filter.in_force(mac_of(address), address);
    assert_eq!(read(&filter.xml, &filter.name), (rules.out.len(), rules.inward.len()));
});

/// How many rules libvirt reads of a filter, for what leaves and what comes in:
/// <https://libvirt.org/formatnwfilter.html>.
fn read(xml: &str, name: &str) -> (usize, usize) {
    let mut reader = Reader::from_str(xml);
    let (mut out, mut inward) = (0, 0);
    let (mut priorities, mut depth, mut last) = (BTreeSet::new(), 0, i64::MIN);
    loop {
        match reader.read_event().expect("well-formed") {
            Event::Start(element) if depth == 0 => {
                depth += 1;
                assert_eq!(element.name().as_ref(), "filter");
                assert_eq!(value(&element, "name"), name);
                assert_eq!(value(&element, "chain"), "root");
            }
            Event::Start(element) => {
                depth += 1;
                assert_eq!(element.name().as_ref(), "rule");
                let priority: i64 = value(&element, "priority").parse().expect("a number");
                assert!((-1000..=1000).contains(&priority) && priority >= last, "{priority} after {last}");
                assert!(priorities.insert(priority), "rules of one priority have no order: {priority}");
                last = priority;
                match value(&element, "direction").as_str() {
                    "out" => out += 1,
                    "in" => inward += 1,
                    other => panic!("direction {other}"),
                }
                assert!(["accept", "drop"].contains(&value(&element, "action").as_str()));
            }
            Event::Empty(element) => {
                assert_eq!(depth, 2, "a protocol stands in a rule");
                assert!(["mac", "arp", "ip", "ipv6"].contains(&element.name().as_ref()));
                for attribute in element.attributes() {
                    let attribute = attribute.expect("well-formed");
                    check(attribute.key.as_ref(), &attribute.value);
                }
            }
            Event::End(_) => depth -= 1,
            Event::Eof => return (out, inward),
            Event::Text(text) => assert!(text.trim().is_empty()),
            other => panic!("{other:?}"),
        }
    }
}

fn value(element: &BytesStart<'_>, name: &str) -> String {
    let attribute = element.attributes().flatten().find(|attribute| attribute.key.as_ref() == name);
    attribute.map(|attribute| attribute.value.into_owned()).expect(name)
}

fn check(key: &str, value: &str) {
    let fits = match key {
        "match" => value == "no",
        "protocol" => ["tcp", "udp", "icmpv6"].contains(&value),
        "type" | "typeend" => ["135", "136"].contains(&value),
        "srcmacaddr" | "arpsrcmacaddr" => value == "$MAC" || value.split(':').count() == 6,
        "srcipaddr" | "dstipaddr" | "arpsrcipaddr" | "arpdstipaddr" => {
            ["$IP", "$IP6"].contains(&value) || value.parse::<IpAddr>().is_ok()
        }
        "srcipmask" | "dstipmask" => value.parse().is_ok_and(|bits: u8| bits <= 128),
        "srcportstart" | "srcportend" | "dstportstart" | "dstportend" => value.parse::<u16>().is_ok(),
        _ => false,
    };
    assert!(fits, "{key}={value}");
}
