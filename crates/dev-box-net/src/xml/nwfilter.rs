//! The libvirt network filter: what holds at a VM's tap even when our own tables are gone.
//!
//! All rules are of the Ethernet kind (libvirt makes ebtables rules of them), because rules of the IP kind silently
//! do nothing while `bridge-nf-call-iptables` is 0. So the filter knows no connections: it holds identity, the static
//! classes and the ports, in both directions; [`crate::guard`] holds these too, and the rest.

use std::io;

use ipnet::Ipv4Net;
use sha2::{Digest, Sha256};

use super::Xml;
use crate::network::NetworkShape;
use crate::policy::{Destinations, EgressPolicy, Protocol, special_ranges};

/// A filter and its name, which has a digest of its rules in it: a filter of that name is this filter, and a
/// changed policy has another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilterDefinition {
    /// libvirt's name for it.
    pub name: String,
    /// `<filter>` XML.
    pub xml: String,
}

/// The priorities of rules in libvirt's filters go from minus this to this.
const MAX_PRIORITY: i64 = 1000;

/// With more combinations of an allowed range and a port than this there would be more rules than priorities: then
/// the filter holds the ranges, and leaves their ports to the guard.
const MAX_ALLOW_BY_PORT: usize = 512;

/// The filter for VMs on `network` under `policy`. An interface that refers to it gives the parameter `IP`.
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
    FilterDefinition { name, xml }
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

#[derive(Debug)]
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
    let by_port = policy.allow().len() * policy.ports().len() <= MAX_ALLOW_BY_PORT;
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
    for direction in [Direction::Out, Direction::In] {
        rules.push(range(Action::Drop, direction, network.subnet().range(), None));
        rules.extend(policy.deny().iter().map(|deny| range(Action::Drop, direction, *deny, None)));
        for allow in policy.allow() {
            if by_port {
                rules.extend(ports(policy).map(|port| range(Action::Accept, direction, *allow, Some(port))));
            } else {
                rules.push(range(Action::Accept, direction, *allow, None));
            }
        }
        rules.extend(special_ranges().map(|special| range(Action::Drop, direction, special, None)));
        if policy.destinations() == Destinations::Public {
            rules.extend(ports(policy).map(|port| {
                let (_, first, last) = sides(direction);
                let attributes = [("protocol", port.0), (first, port.1.as_str()), (last, port.2.as_str())];
                rule(Action::Accept, direction, "ip", &attributes)
            }));
        }
    }
    rules.push(rule(Action::Drop, Direction::Out, "mac", &[]));
    rules.push(rule(Action::Drop, Direction::In, "mac", &[]));
    rules
}

/// The attributes for the other side's address and ports.
fn sides(direction: Direction) -> (&'static str, &'static str, &'static str) {
    match direction {
        Direction::Out => ("dstipaddr", "dstportstart", "dstportend"),
        Direction::In => ("srcipaddr", "srcportstart", "srcportend"),
    }
}

fn range(action: Action, direction: Direction, range: Ipv4Net, port: Option<(&str, String, String)>) -> Rule {
    let (address, first, last) = sides(direction);
    let mask = if address == "dstipaddr" { "dstipmask" } else { "srcipmask" };
    let mut attributes = vec![(address, range.addr().to_string()), (mask, range.prefix_len().to_string())];
    if let Some((protocol, start, end)) = port {
        attributes.extend([("protocol", protocol.to_owned()), (first, start), (last, end)]);
    }
    Rule { action, direction, protocol: "ip", attributes }
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
