//! The libvirt network filter: what holds at a VM's tap even when our own tables are gone.
//!
//! All rules are of the Ethernet kind (libvirt makes ebtables rules of them), because rules of the IP kind silently
//! do nothing while `bridge-nf-call-iptables` is 0. So the filter knows no connections: it holds identity and the ports
//! in both directions, and the static classes on the way out; [`crate::guard`] holds these too, and the rest.

use std::fmt::Write as _;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

use dev_box_core::spec::MacAddress;
use ipnet::{IpNet, Ipv6Net};
use sha2::{Digest, Sha256};

use super::Xml;
use crate::guard::{FilterRule, FilterRules};
use crate::identity::ipv6_of;
use crate::network::NetworkShape;
use crate::policy::{Destinations, EgressPolicy, Protocol, special_ranges};

/// A filter and its name, which has a digest of its rules in it: a filter of that name is this filter, and a
/// changed policy has another one.
#[derive(Debug, Clone)]
pub struct FilterDefinition {
    /// libvirt's name for it.
    pub name: String,
    /// `<filter>` XML.
    pub xml: String,
    rules: Vec<Rule>,
}

impl FilterDefinition {
    /// The parameters that an interface which refers to it gives, beside `IP`.
    pub fn parameters(policy: &EgressPolicy, address: Ipv4Addr) -> Vec<(String, String)> {
        match policy.ipv6() {
            true => vec![("IP6".to_owned(), ipv6_of(address).to_string())],
            false => Vec::new(),
        }
    }

    /// The rules that libvirt makes of it for an interface.
    pub fn in_force(&self, mac: MacAddress, address: Ipv4Addr) -> FilterRules {
        let mut found = FilterRules::default();
        for rule in &self.rules {
            let side = match rule.direction {
                Direction::Out => &mut found.out,
                Direction::In => &mut found.inward,
            };
            side.push(FilterRule::read(&rule.in_force(mac, address)));
        }
        found
    }
}

/// The priorities of rules in libvirt's filters go from minus this to this.
const MAX_PRIORITY: i64 = 1000;

/// With more combinations of an allowed range and a port than this there would be more rules than priorities: then
/// the filter holds the ranges, and leaves their ports to the guard.
const MAX_ALLOW_BY_PORT: usize = 512;

/// The filter for VMs on `network` under `policy`. An interface that refers to it gives the parameter `IP`, and these
/// [parameters](FilterDefinition::parameters).
///
/// <https://libvirt.org/formatnwfilter.html>
pub fn nwfilter(network: &NetworkShape, policy: &EgressPolicy) -> FilterDefinition {
    let rules = rules(network, policy);
    let digest = Sha256::digest(format!("{rules:?}"));
    let digest = hex::encode(digest.get(..8).unwrap_or_default());
    let name = format!("{}{digest}", name_prefix(network));
    let xml = Xml::document(|xml| {
        xml.element("filter", &[("name", &name), ("chain", "root")], |xml| {
            rules.iter().enumerate().try_for_each(|(index, rule)| rule.write(xml, index))
        })
    });
    FilterDefinition { name, xml, rules }
}

/// What the names of a network's filters begin with.
pub fn name_prefix(network: &NetworkShape) -> String {
    format!("{}-filter-", network.name())
}

#[derive(Debug, Clone, Copy)]
enum Action {
    Accept,
    Drop,
}

#[derive(Debug, Clone, Copy)]
enum Direction {
    Out,
    In,
}

#[derive(Debug, Clone)]
struct Rule {
    action: Action,
    direction: Direction,
    protocol: &'static str,
    attributes: Vec<(&'static str, String)>,
}

impl Rule {
    fn write(&self, xml: &mut Xml, index: usize) -> io::Result<()> {
        let action = match self.action {
            Action::Accept => "accept",
            Action::Drop => "drop",
        };
        let direction = match self.direction {
            Direction::Out => "out",
            Direction::In => "in",
        };
        // Rules of one priority have no order, so each has its own.
        let priority =
            i64::try_from(index).unwrap_or(i64::MAX).saturating_sub(MAX_PRIORITY).min(MAX_PRIORITY);
        let attributes = [("action", action), ("direction", direction), ("priority", &priority.to_string())];
        let inner: Vec<(&str, &str)> =
            self.attributes.iter().map(|(key, value)| (*key, value.as_str())).collect();
        xml.element("rule", &attributes, |xml| xml.empty(self.protocol, &inner))
    }

    /// As ebtables has it.
    fn in_force(&self, mac: MacAddress, address: Ipv4Addr) -> String {
        let value = |key: &str| {
            let found = self.attributes.iter().find(|(name, _)| *name == key);
            found.map(|(_, value)| {
                let value = value.replace("$MAC", &mac.to_string());
                value.replace("$IP6", &ipv6_of(address).to_string()).replace("$IP", &address.to_string())
            })
        };
        let not = if value("match").as_deref() == Some("no") { "! " } else { "" };
        let mut text = match self.protocol {
            "arp" => "-p ARP".to_owned(),
            "ip" => "-p IPv4".to_owned(),
            IPV6 => "-p IPv6".to_owned(),
            _ => String::new(),
        };
        let word = if self.protocol == IPV6 { "ip6" } else { "ip" };
        for (key, and, option) in [
            ("srcmacaddr", None, "-s"),
            ("arpsrcmacaddr", None, "--arp-mac-src"),
            ("arpsrcipaddr", None, "--arp-ip-src"),
            ("arpdstipaddr", None, "--arp-ip-dst"),
            ("srcipaddr", Some(("srcipmask", '/')), "--{}-src"),
            ("dstipaddr", Some(("dstipmask", '/')), "--{}-dst"),
            ("protocol", None, "--{}-proto"),
            ("srcportstart", Some(("srcportend", ':')), "--{}-sport"),
            ("dstportstart", Some(("dstportend", ':')), "--{}-dport"),
            ("type", Some(("typeend", ':')), "--{}-icmp-type"),
        ] {
            let Some(first) = value(key) else { continue };
            let option = option.replace("{}", word);
            // Writing to a String cannot fail.
            let _ = write!(text, " {option} {not}{first}");
            if let Some((second, sign)) = and.and_then(|(key, sign)| Some((value(key)?, sign))) {
                let _ = write!(text, "{sign}{second}");
            }
        }
        let target = match self.action {
            Action::Accept => "ACCEPT",
            Action::Drop => "DROP",
        };
        text + " -j " + target
    }
}

fn rule(
    action: Action,
    direction: Direction,
    protocol: &'static str,
    attributes: &[(&'static str, &str)],
) -> Rule {
    let attributes = attributes.iter().map(|(key, value)| (*key, (*value).to_owned())).collect();
    Rule { action, direction, protocol, attributes }
}

fn rules(network: &NetworkShape, policy: &EgressPolicy) -> Vec<Rule> {
    let (gateway, gateway_mac) = (network.gateway().to_string(), network.gateway_mac().to_string());
    let mut rules = vec![
        rule(Action::Drop, Direction::Out, "mac", &[("match", "no"), ("srcmacaddr", "$MAC")]),
        rule(Action::Drop, Direction::In, "mac", &[("match", "no"), ("srcmacaddr", &gateway_mac)]),
    ];
    let own = [("arpsrcmacaddr", "$MAC"), ("arpsrcipaddr", "$IP")];
    for destination in [gateway.as_str(), "$IP"] {
        let attributes = [own[0], own[1], ("arpdstipaddr", destination)];
        rules.push(rule(Action::Accept, Direction::Out, "arp", &attributes));
    }
    rules.push(rule(
        Action::Accept,
        Direction::In,
        "arp",
        &[("arpsrcmacaddr", &gateway_mac), ("arpsrcipaddr", &gateway), ("arpdstipaddr", "$IP")],
    ));
    rules.push(rule(Action::Drop, Direction::Out, "ip", &[("match", "no"), ("srcipaddr", "$IP")]));
    rules.push(rule(Action::Drop, Direction::In, "ip", &[("match", "no"), ("dstipaddr", "$IP")]));
    for protocol in ["udp", "tcp"] {
        for direction in [Direction::Out, Direction::In] {
            let (address, first, last) = sides(direction);
            let attributes =
                [(address, gateway.as_str()), ("protocol", protocol), (first, "53"), (last, "53")];
            rules.push(rule(Action::Accept, direction, "ip", &attributes));
        }
    }
    if policy.ipv6() {
        rules.extend(neighbour_discovery());
    }
    rules.extend(outbound(network, policy));
    rules.extend(inbound(network, policy));
    rules.push(rule(Action::Drop, Direction::Out, "mac", &[]));
    rules.push(rule(Action::Drop, Direction::In, "mac", &[]));
    rules
}

/// libvirt's word for IPv6 by ebtables; `ip` is the other.
const IPV6: &str = "ipv6";

/// Public addresses are in here (RFC 4291): so that the special ranges outside are one rule.
const UNICAST: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);

/// Nothing but the VM's own address, and solicitations and advertisements (RFC 4861) wherever they go: what is in them is the
/// guard's.
fn neighbour_discovery() -> Vec<Rule> {
    let (out, inward) = (Direction::Out, Direction::In);
    let messages = [("protocol", "icmpv6"), ("type", "135"), ("typeend", "136")];
    vec![
        rule(Action::Drop, out, IPV6, &[("match", "no"), ("srcipaddr", "$IP6")]),
        rule(Action::Accept, out, IPV6, &messages),
        rule(Action::Accept, inward, IPV6, &messages),
        rule(Action::Drop, inward, IPV6, &[("match", "no"), ("dstipaddr", "$IP6")]),
    ]
}

/// What may leave: the static classes are held here.
fn outbound(network: &NetworkShape, policy: &EgressPolicy) -> Vec<Rule> {
    let out = Direction::Out;
    let mut rules = Vec::new();
    if !policy.allow().is_empty() {
        // Otherwise one of the special ranges covers it.
        rules.extend(neighbours(network, policy).map(|near| range(Action::Drop, out, near, None)));
    }
    rules.extend(policy.deny().iter().map(|deny| range(Action::Drop, out, *deny, None)));
    for allow in policy.allow() {
        if by_port(policy) {
            rules.extend(ports(policy).map(|port| range(Action::Accept, out, *allow, Some(port))));
        } else {
            rules.push(range(Action::Accept, out, *allow, None));
        }
    }
    let special = IpNet::aggregate(&special_ranges().filter(|special| by_itself(policy, special)).collect());
    rules.extend(special.into_iter().map(|special| range(Action::Drop, out, special, None)));
    if policy.ipv6() {
        let mut outside = range(Action::Drop, out, UNICAST.into(), None);
        outside.attributes.push(("match", "no".to_owned()));
        rules.push(outside);
    }
    if opens_public(policy) {
        rules.extend(at_any_address(policy, out));
    }
    rules
}

/// Whether a special range has a rule of its own.
fn by_itself(policy: &EgressPolicy, special: &IpNet) -> bool {
    match special {
        IpNet::V4(_) => true,
        IpNet::V6(special) => policy.ipv6() && UNICAST.contains(special),
    }
}

fn neighbours(network: &NetworkShape, policy: &EgressPolicy) -> impl Iterator<Item = IpNet> {
    let subnet = network.subnet();
    let ipv6 = policy.ipv6().then(|| subnet.range6().into());
    [subnet.range().into()].into_iter().chain(ipv6)
}

/// Whether any public address may be written to, as far as this filter can tell: which addresses a name has is known to
/// the guard only.
fn opens_public(policy: &EgressPolicy) -> bool {
    policy.destinations() == Destinations::Public || !policy.domains().is_empty()
}

/// What may come in: answers, as far as a filter that knows no connections can tell them. The gateway's MAC and the VM's
/// address are checked before; an answer to an address that the VM cannot write to is of no use, so the classes are not
/// repeated here: libvirt runs a command for each rule at each start of a VM.
fn inbound(network: &NetworkShape, policy: &EgressPolicy) -> Vec<Rule> {
    let inward = Direction::In;
    let mut rules: Vec<Rule> =
        neighbours(network, policy).map(|near| range(Action::Drop, inward, near, None)).collect();
    let public = opens_public(policy);
    for allow in policy.allow() {
        if !by_port(policy) {
            rules.push(range(Action::Accept, inward, *allow, None));
        } else if !public {
            rules.extend(ports(policy).map(|port| range(Action::Accept, inward, *allow, Some(port))));
        }
    }
    if public {
        rules.extend(at_any_address(policy, inward));
    }
    rules
}

fn by_port(policy: &EgressPolicy) -> bool {
    policy.allow().len() * policy.ports().len() <= MAX_ALLOW_BY_PORT
}

fn at_any_address(policy: &EgressPolicy, direction: Direction) -> impl Iterator<Item = Rule> + '_ {
    let (_, first, last) = sides(direction);
    let families = if policy.ipv6() { &["ip", IPV6][..] } else { &["ip"] };
    families.iter().flat_map(move |family| {
        ports(policy).map(move |(protocol, start, end)| {
            let attributes = vec![("protocol", protocol.to_owned()), (first, start), (last, end)];
            Rule { action: Action::Accept, direction, protocol: family, attributes }
        })
    })
}

/// The attributes for the other side's address and ports.
fn sides(direction: Direction) -> (&'static str, &'static str, &'static str) {
    match direction {
        Direction::Out => ("dstipaddr", "dstportstart", "dstportend"),
        Direction::In => ("srcipaddr", "srcportstart", "srcportend"),
    }
}

fn range(action: Action, direction: Direction, range: IpNet, port: Option<(&str, String, String)>) -> Rule {
    let (address, first, last) = sides(direction);
    let mask = if address == "dstipaddr" { "dstipmask" } else { "srcipmask" };
    let mut attributes = vec![(address, range.addr().to_string()), (mask, range.prefix_len().to_string())];
    if let Some((protocol, start, end)) = port {
        attributes.extend([("protocol", protocol.to_owned()), (first, start), (last, end)]);
    }
    let protocol = if matches!(range, IpNet::V6(_)) { IPV6 } else { "ip" };
    Rule { action, direction, protocol, attributes }
}

fn ports(policy: &EgressPolicy) -> impl Iterator<Item = (&'static str, String, String)> + '_ {
    policy.ports().iter().map(|port| {
        let protocol = match port.protocol() {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        (protocol, port.first().to_string(), port.last().to_string())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::mac_of;

    fn shape() -> NetworkShape {
        NetworkShape::new("dev-box", "devbox0", "10.213.0.0/24".parse().unwrap()).unwrap()
    }

    #[test]
    fn golden_nat_filtered() {
        insta::assert_snapshot!(nwfilter(&shape(), &EgressPolicy::NatFiltered).xml);
    }

    #[test]
    fn golden_custom() {
        let policy = EgressPolicy::from_toml(
            "mode='custom'\nports=['tcp/443','udp/5000-5001']\nallow=['10.9.0.0/16']\ndeny=['10.9.9.0/24']",
        );
        insta::assert_snapshot!(nwfilter(&shape(), &policy.unwrap()).xml);
    }

    #[test]
    fn golden_ipv6() {
        let policy = EgressPolicy::from_toml(
            "mode='custom'\nipv6=true\nports=['tcp/443']\nallow=['fd12::/32']\ndeny=['2606:4700::/32']\n\
             destinations='public'",
        );
        insta::assert_snapshot!(nwfilter(&shape().with_ipv6(), &policy.unwrap()).xml);
    }

    #[test]
    fn golden_in_force() {
        // As ebtables-save listed it of a VM.
        let address = Ipv4Addr::new(10, 213, 0, 2);
        let rules = nwfilter(&shape(), &EgressPolicy::NatFiltered).in_force(mac_of(address), address);
        let listed = |texts: &str| texts.lines().map(FilterRule::read).collect::<Vec<_>>();
        assert_eq!(rules.out, listed(include_str!("nwfilter/out.txt")));
        assert_eq!(rules.inward, listed(include_str!("nwfilter/in.txt")));
    }

    #[test]
    fn the_name_follows_the_rules() {
        let name = nwfilter(&shape(), &EgressPolicy::NatFiltered).name;
        assert!(name.starts_with("dev-box-filter-") && name.len() == 15 + 16, "{name}");
        let same = EgressPolicy::from_toml("mode = 'custom'\n[limits]\nconnections = 5").unwrap();
        assert_eq!(name, nwfilter(&shape(), &same).name, "limits are the guard's");
        let other = EgressPolicy::from_toml("mode = 'custom'\nports = ['tcp/443']").unwrap();
        assert_ne!(name, nwfilter(&shape(), &other).name);
        let elsewhere = NetworkShape::new("dev-box", "devbox0", "10.213.1.0/24".parse().unwrap()).unwrap();
        assert_ne!(name, nwfilter(&elsewhere, &EgressPolicy::NatFiltered).name);
    }
}
