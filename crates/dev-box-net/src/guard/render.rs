//! The rules as nft's input text; those of IPv6 in [`ipv6`], those that report in [`reports`]. Everything in it comes from typed values,
//! so nothing can break out of it.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use ipnet::IpNet;

use super::{DropReason, VmGuard};
use crate::identity::{ipv6_of, resolver_port_of, tap_of};
use crate::policy::{Destinations, EgressPolicy, METADATA, PortRule, Protocol, special_ranges};
use crate::throttle;

mod base;
mod ipv6;
mod reports;

pub(super) use reports::render_forget_reached;

/// The name of both tables.
pub(super) const TABLE: &str = "dev_box";

/// How long an address that a name had stays open after its last packet; more than the longest a guest may keep an
/// answer ([`crate::resolver::MAX_TTL`]).
const NAME_LIFE: &str = "1h";
/// How long a destination counts as known after it was reported.
const SEEN_LIFE: &str = "1h";
/// Most addresses that a VM's names have at once, and most destinations that are remembered.
const SET_SIZE: u32 = 8192;

/// The drops that each half of a VM's rules can make.
const BRIDGE_REASONS: [DropReason; 9] = [
    DropReason::Spoofed,
    DropReason::Protocol,
    DropReason::Gateway,
    DropReason::Neighbour,
    DropReason::Denied,
    DropReason::Special,
    DropReason::Destination,
    DropReason::Port,
    DropReason::Unsolicited,
];
const INET_REASONS: [DropReason; 11] = [
    DropReason::Protocol,
    DropReason::Gateway,
    DropReason::Host,
    DropReason::Neighbour,
    DropReason::Denied,
    DropReason::Special,
    DropReason::Destination,
    DropReason::Port,
    DropReason::Rate,
    DropReason::Connections,
    DropReason::Unsolicited,
];

const BRIDGE_CHAINS: [&str; 5] = ["in", "in-ports", "out", "out-ports", "metadata"];
const INET_CHAINS: [&str; 12] = [
    "direct",
    "pre",
    "resolver",
    "input",
    "output",
    "out",
    "out-ports",
    "open",
    "in",
    "in-ports",
    "nat",
    "metadata",
];
const BRIDGE_COUNTERS: [&str; 2] = ["sent", "received"];
const INET_COUNTERS: [&str; 1] = ["connections"];

/// A VM's sets: name, type of its elements, how long one lives.
type Sets = [(&'static str, &'static str, &'static str)];
/// Addresses that the names of the policy have: the resolver puts them in.
const NAMES: (&str, &str, &str) = ("names", "ipv4_addr", NAME_LIFE);
/// Destinations that were reported.
const SEEN: (&str, &str, &str) = ("seen", "ipv4_addr . inet_service", SEEN_LIFE);
const BRIDGE_SETS: [(&str, &str, &str); 1] = [NAMES];
const INET_SETS: [(&str, &str, &str); 2] = [NAMES, SEEN];

/// Dispatch maps: name, key type, the chain a VM's element jumps to.
const BRIDGE_MAPS: [(&str, &str, &str); 2] = [("from-guest", "ifname", "out"), ("to-guest", "ifname", "in")];
const INET_MAPS: [(&str, &str, &str); 8] = [
    ("direct-by", "ifname", "direct"),
    ("prerouting-by", "ipv4_addr", "pre"),
    ("resolver-by", "ipv4_addr", "resolver"),
    ("input-by", "ipv4_addr", "input"),
    ("output-by", "ipv4_addr", "output"),
    ("from-guest", "ipv4_addr", "out"),
    ("to-guest", "ipv4_addr", "in"),
    ("nat-by", "ipv4_addr", "nat"),
];

/// The families that have a table of ours.
pub(super) const FAMILIES: [&str; 3] = ["bridge", "inet", "arp"];

/// One family's part of the text.
struct Script<'a> {
    family: &'static str,
    text: &'a mut String,
}

impl Script<'_> {
    fn line(&mut self, verb: &str, object: &str, rest: std::fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "{verb} {object} {} {TABLE} {rest}", self.family);
    }

    fn rule(&mut self, chain: &str, rule: std::fmt::Arguments<'_>) {
        self.line("add", "rule", format_args!("{chain} {rule}"));
    }

    fn table(&mut self) {
        let _ = writeln!(self.text, "add table {} {TABLE}", self.family);
    }

    fn base(&mut self, name: &str, hook: &str, priority: i32) {
        self.base_of("filter", name, hook, priority);
    }

    fn base_of(&mut self, kind: &str, name: &str, hook: &str, priority: i32) {
        self.line(
            "add",
            "chain",
            format_args!("{name} {{ type {kind} hook {hook} priority {priority}; policy accept; }}"),
        );
        self.line("flush", "chain", format_args!("{name}"));
    }
}

/// One transaction that puts a VM's rules in place, whatever stood there before.
pub fn render_apply(guard: &VmGuard) -> String {
    let mut text = String::with_capacity(16 * 1024);
    base::bridge(&mut Script { family: "bridge", text: &mut text });
    base::inet(&mut Script { family: "inet", text: &mut text });
    base::arp(&mut Script { family: "arp", text: &mut text });
    let mut inet = Script { family: "inet", text: &mut text };
    inet.line("add", "element", format_args!("bridges {{ \"{}\" }}", guard.network().bridge()));
    let rules = Rules::new(guard);
    rules.bridge(&mut Script { family: "bridge", text: &mut text });
    rules.inet(&mut Script { family: "inet", text: &mut text });
    if guard.is_for_a_new_vm() {
        // An entry outlives the process that made it, and would slow down whoever has the tap next.
        text.push_str(&throttle::render_release(&guard.tap()));
    }
    text
}

/// One transaction that removes the rules of an address, whether or not there are any.
pub fn render_remove(address: Ipv4Addr) -> String {
    let tap = tap_of(address);
    let mut text = String::with_capacity(8 * 1024);
    for (family, own) in OWN {
        let mut script = Script { family, text: &mut text };
        // What is added here and deleted below never fails to be deleted.
        script.table();
        maps(&mut script, own.maps);
        skeleton(&mut script, &tap, own);
        elements(&mut script, address, own.maps);
    }
    for (family, own) in OWN {
        let mut script = Script { family, text: &mut text };
        for (map, key, _) in own.maps {
            script.line("delete", "element", format_args!("{map} {{ {} }}", element_key(key, address)));
        }
        for chain in own.chains {
            script.line("delete", "chain", format_args!("{tap}.{chain}"));
        }
        for reason in own.reasons {
            script.line("delete", "chain", format_args!("{tap}.drop.{reason}"));
            script.line("delete", "counter", format_args!("{tap}.drop.{reason}"));
        }
        for counter in own.counters {
            script.line("delete", "counter", format_args!("{tap}.{counter}"));
        }
        for (set, ..) in own.sets {
            script.line("delete", "set", format_args!("{tap}.{set}"));
        }
    }
    text
}

/// For each map the transaction that removes an address's entry, which fails where there is none.
pub(super) fn render_entries(address: Ipv4Addr) -> Vec<String> {
    let of = |(family, own): (&'static str, &Own)| {
        let entry = |(map, key, _): &(&str, &str, &str)| {
            format!("delete element {family} {TABLE} {map} {{ {} }}\n", element_key(key, address))
        };
        own.maps.iter().map(entry).collect::<Vec<_>>()
    };
    OWN.into_iter().flat_map(of).collect()
}

/// One transaction that removes our tables.
pub fn render_clear() -> String {
    let clear = |(family, table): (&str, &str)| {
        format!("add table {family} {table}\ndelete table {family} {table}\n")
    };
    let throttle = ("bridge", throttle::TABLE);
    FAMILIES.map(|family| (family, TABLE)).into_iter().chain([throttle]).map(clear).collect()
}

/// What a VM has in a family's table.
struct Own {
    maps: &'static [(&'static str, &'static str, &'static str)],
    chains: &'static [&'static str],
    reasons: &'static [DropReason],
    counters: &'static [&'static str],
    sets: &'static Sets,
}

const BRIDGE: Own = Own {
    maps: &BRIDGE_MAPS,
    chains: &BRIDGE_CHAINS,
    reasons: &BRIDGE_REASONS,
    counters: &BRIDGE_COUNTERS,
    sets: &BRIDGE_SETS,
};
const INET: Own = Own {
    maps: &INET_MAPS,
    chains: &INET_CHAINS,
    reasons: &INET_REASONS,
    counters: &INET_COUNTERS,
    sets: &INET_SETS,
};

/// All that a VM can have. What refers to the rest comes first, so that it can go first.
const OWN: [(&str, &Own); 4] =
    [("bridge", &BRIDGE), ("inet", &INET), ("bridge", &ipv6::BRIDGE), ("inet", &ipv6::INET)];

fn maps(script: &mut Script<'_>, maps: &[(&str, &str, &str)]) {
    for (map, key, _) in maps {
        script.line("add", "map", format_args!("{map} {{ type {key} : verdict; }}"));
    }
}

/// A VM's sets and counters, and its chains, emptied.
fn skeleton(script: &mut Script<'_>, tap: &str, own: &Own) {
    for (set, kind, life) in own.sets {
        script.line(
            "add",
            "set",
            format_args!(
                "{tap}.{set} {{ type {kind}; flags dynamic, timeout; timeout {life}; size {SET_SIZE}; }}"
            ),
        );
    }
    for counter in own.counters {
        script.line("add", "counter", format_args!("{tap}.{counter}"));
    }
    for reason in own.reasons {
        script.line("add", "counter", format_args!("{tap}.drop.{reason}"));
        script.line("add", "chain", format_args!("{tap}.drop.{reason}"));
        script.line("flush", "chain", format_args!("{tap}.drop.{reason}"));
    }
    for chain in own.chains {
        script.line("add", "chain", format_args!("{tap}.{chain}"));
        script.line("flush", "chain", format_args!("{tap}.{chain}"));
    }
}

/// What a map's key is for a VM.
fn element_key(kind: &str, address: Ipv4Addr) -> String {
    match kind {
        "ifname" => format!("\"{}\"", tap_of(address)),
        "ipv6_addr" => ipv6_of(address).to_string(),
        _ => address.to_string(),
    }
}

/// A VM's entries in the dispatch maps.
fn elements(script: &mut Script<'_>, address: Ipv4Addr, maps: &[(&str, &str, &str)]) {
    let tap = tap_of(address);
    for (map, key, chain) in maps {
        let key = element_key(key, address);
        script.line("add", "element", format_args!("{map} {{ {key} : jump {tap}.{chain} }}"));
    }
}

/// Which end of a packet is the other side.
#[derive(Clone, Copy)]
enum Direction {
    Out,
    In,
}

impl Direction {
    fn chain(self) -> &'static str {
        match self {
            Self::Out => "out",
            Self::In => "in",
        }
    }

    fn address(self) -> &'static str {
        match self {
            Self::Out => "daddr",
            Self::In => "saddr",
        }
    }

    fn port(self) -> &'static str {
        match self {
            Self::Out => "dport",
            Self::In => "sport",
        }
    }
}

/// Which addresses a packet has.
#[derive(Clone, Copy)]
enum Ip {
    V4,
    V6,
}

impl Ip {
    /// nft's word for its header.
    fn word(self) -> &'static str {
        match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
        }
    }

    /// What names of chains and sets end with.
    fn suffix(self) -> &'static str {
        match self {
            Self::V4 => "",
            Self::V6 => "6",
        }
    }

    fn has(self, range: &IpNet) -> bool {
        match self {
            Self::V4 => matches!(range, IpNet::V4(_)),
            Self::V6 => matches!(range, IpNet::V6(_)),
        }
    }

    /// `{ a, b }`; `None` for no range, because nft has no empty anonymous set.
    fn ranges(self, ranges: impl Iterator<Item = IpNet>) -> Option<String> {
        let list: Vec<String> =
            ranges.filter(|range| self.has(range)).map(|range| range.to_string()).collect();
        (!list.is_empty()).then(|| format!("{{ {} }}", list.join(", ")))
    }
}

struct Rules<'a> {
    guard: &'a VmGuard,
    tap: String,
}

impl<'a> Rules<'a> {
    fn new(guard: &'a VmGuard) -> Self {
        Self { guard, tap: guard.tap() }
    }

    fn policy(&self) -> &EgressPolicy {
        self.guard.policy()
    }

    fn drop_to(&self, reason: DropReason) -> String {
        format!("goto {}.drop.{reason}", self.tap)
    }

    fn bridge(&self, script: &mut Script<'_>) {
        let tap = &self.tap;
        skeleton(script, tap, &BRIDGE);
        if self.policy().ipv6() {
            skeleton(script, tap, &ipv6::BRIDGE);
        }
        self.forget_names(script);
        self.drops(script, &BRIDGE_REASONS);
        self.bridge_out(script);
        self.bridge_in(script);
        if self.policy().ipv6() {
            self.bridge_out6(script);
            self.bridge_in6(script);
        }
        elements(script, self.guard.address(), &BRIDGE_MAPS);
    }

    fn forget_names(&self, script: &mut Script<'_>) {
        if self.guard.forgets_names() {
            script.line("flush", "set", format_args!("{}.names", self.tap));
            if self.policy().ipv6() {
                script.line("flush", "set", format_args!("{}.names6", self.tap));
            }
        }
    }

    /// What the address's last VM reached is news again.
    fn forget_reached(&self, script: &mut Script<'_>) {
        if self.guard.is_for_a_new_vm() {
            script.text.push_str(&render_forget_reached(self.guard.address(), self.policy().ipv6()));
        }
    }

    fn bridge_out(&self, script: &mut Script<'_>) {
        let (guard, network) = (self.guard, self.guard.network());
        let (mac, address, gateway) = (guard.mac(), guard.address(), network.gateway());
        let (spoofed, protocol) = (self.drop_to(DropReason::Spoofed), self.drop_to(DropReason::Protocol));
        let chain = format!("{}.out", self.tap);
        script.rule(&chain, format_args!("counter name \"{}.sent\"", self.tap));
        script.rule(&chain, format_args!("ether saddr != {mac} {spoofed}"));
        script.rule(&chain, format_args!("ether type 8021q {protocol}"));
        script.rule(
            &chain,
            format_args!(
                "ether type arp arp htype 1 arp ptype ip arp hlen 6 arp plen 4 arp operation {{ request, reply }} \
                 arp saddr ether {mac} arp saddr ip {address} arp daddr ip {{ {gateway}, {address} }} accept"
            ),
        );
        script.rule(&chain, format_args!("ether type arp {spoofed}"));
        if self.policy().ipv6() {
            script.rule(&chain, format_args!("ether type ip6 goto {}.out6", self.tap));
        }
        script.rule(&chain, format_args!("ether type != ip {protocol}"));
        script.rule(&chain, format_args!("ip version != 4 {protocol}"));
        script.rule(&chain, format_args!("ip saddr != {address} {spoofed}"));
        script.rule(&chain, format_args!("ip hdrlength != 5 {protocol}"));
        script.rule(&chain, format_args!("ip frag-off & 0x3fff != 0 {protocol}"));
        script.rule(
            &chain,
            format_args!("ether daddr != {} {}", network.gateway_mac(), self.drop_to(DropReason::Neighbour)),
        );
        script
            .rule(&chain, format_args!("ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport 53 accept"));
        self.classes(script, Ip::V4, Direction::Out);
        self.ports(script, Direction::Out, "accept");
    }

    fn bridge_in(&self, script: &mut Script<'_>) {
        let (guard, network) = (self.guard, self.guard.network());
        let (mac, address, gateway) = (guard.mac(), guard.address(), network.gateway());
        let gateway_mac = network.gateway_mac();
        let (neighbour, unsolicited) =
            (self.drop_to(DropReason::Neighbour), self.drop_to(DropReason::Unsolicited));
        let chain = format!("{}.in", self.tap);
        script.rule(&chain, format_args!("counter name \"{}.received\"", self.tap));
        script.rule(&chain, format_args!("ether saddr != {gateway_mac} {neighbour}"));
        script.rule(&chain, format_args!("ether type 8021q {}", self.drop_to(DropReason::Protocol)));
        script.rule(
            &chain,
            format_args!(
                "ether type arp ether daddr {{ {mac}, ff:ff:ff:ff:ff:ff }} arp saddr ether {gateway_mac} \
                 arp saddr ip {gateway} arp daddr ip {address} accept"
            ),
        );
        if self.policy().ipv6() {
            script.rule(&chain, format_args!("ether type ip6 goto {}.in6", self.tap));
        }
        script.rule(&chain, format_args!("ether type != ip {}", self.drop_to(DropReason::Protocol)));
        script.rule(&chain, format_args!("ether daddr != {mac} {neighbour}"));
        script.rule(&chain, format_args!("ip daddr != {address} {unsolicited}"));
        script
            .rule(&chain, format_args!("ip saddr {gateway} meta l4proto {{ tcp, udp }} th sport 53 accept"));
        self.classes(script, Ip::V4, Direction::In);
        // The host put these together and took them apart again; connection tracking judged the whole.
        let ports = format!("{}.in-ports", self.tap);
        script.rule(&ports, format_args!("ip frag-off & 0x1fff != 0 accept"));
        self.ports(script, Direction::In, "accept");
    }

    /// The address of the other side: gateway, neighbours, denied, allowed, special (where clouds have their metadata first), public, in
    /// this order.
    fn classes(&self, script: &mut Script<'_>, ip: Ip, direction: Direction) {
        let (policy, subnet) = (self.policy(), self.guard.network().subnet());
        let (gateway, neighbours) = match ip {
            Ip::V4 => (subnet.gateway().to_string(), subnet.to_string()),
            Ip::V6 => (ipv6_of(subnet.gateway()).to_string(), subnet.range6().to_string()),
        };
        let (tap, word, side) = (&self.tap, ip.word(), direction.address());
        let chain = format!("{tap}.{}{}", direction.chain(), ip.suffix());
        let ports = format!("goto {tap}.{}-ports", direction.chain());
        let mut rule = |ranges: &str, verdict: &str| {
            script.rule(&chain, format_args!("{word} {side} {ranges} {verdict}"));
        };
        rule(&gateway, &self.drop_to(DropReason::Gateway));
        rule(&neighbours, &self.drop_to(DropReason::Neighbour));
        if let Some(deny) = ip.ranges(policy.deny().iter().copied()) {
            rule(&deny, &self.drop_to(DropReason::Denied));
        }
        if let Some(allow) = ip.ranges(policy.allow().iter().copied()) {
            rule(&allow, &ports);
        }
        if let (Direction::Out, Some(metadata)) = (direction, ip.ranges(METADATA.into_iter())) {
            rule(&metadata, &format!("goto {tap}.metadata"));
        }
        if let Some(special) = ip.ranges(special_ranges()) {
            rule(&special, &self.drop_to(DropReason::Special));
        }
        // After the special ranges: whatever a name's answer says, it opens public addresses only.
        if !policy.domains().is_empty() {
            let names = format!("@{tap}.names{}", ip.suffix());
            match direction {
                // What is used stays open.
                Direction::Out => {
                    let renew = format!("update {names} {{ {word} daddr timeout {NAME_LIFE} }} {ports}");
                    rule(&names, &renew);
                }
                Direction::In => rule(&names, &ports),
            }
        }
        let last = match policy.destinations() {
            Destinations::Public => ports,
            Destinations::Listed => self.drop_to(DropReason::Destination),
        };
        script.rule(&chain, format_args!("{last}"));
    }

    fn ports(&self, script: &mut Script<'_>, direction: Direction, verdict: &str) {
        let (policy, side) = (self.policy(), direction.port());
        let chain = format!("{}.{}-ports", self.tap, direction.chain());
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            if let Some(set) = ports(policy.ports(), protocol) {
                script.rule(&chain, format_args!("{protocol} {side} {set} {verdict}"));
            }
        }
        script.rule(&chain, format_args!("{}", self.drop_to(DropReason::Port)));
    }

    fn inet(&self, script: &mut Script<'_>) {
        let tap = &self.tap;
        let (address, gateway) = (self.guard.address(), self.guard.network().gateway());
        skeleton(script, tap, &INET);
        if self.policy().ipv6() {
            skeleton(script, tap, &ipv6::INET);
        }
        self.forget_names(script);
        self.forget_reached(script);
        self.drops(script, &INET_REASONS);

        let chain = format!("{tap}.direct");
        script.rule(&chain, format_args!("{}", self.drop_to(DropReason::Protocol)));

        // Before anyone's DNAT: none of the host's addresses, on whatever interface, but the gateway's resolver.
        let (host, rate) = (self.drop_to(DropReason::Host), self.drop_to(DropReason::Rate));
        let chain = format!("{tap}.pre");
        script
            .rule(&chain, format_args!("ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport 53 accept"));
        script.rule(&chain, format_args!("ip daddr {gateway} {}", self.drop_to(DropReason::Gateway)));
        script.rule(&chain, format_args!("fib daddr type != unicast {host}"));
        script.rule(&chain, format_args!("accept"));

        // The resolver of this VM's own, on its own port: libvirt's answers every name.
        let port = if self.policy().domains().is_empty() {
            53
        } else {
            let port = resolver_port_of(address);
            let chain = format!("{tap}.resolver");
            script.rule(
                &chain,
                format_args!(
                    "ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport 53 dnat ip to {gateway}:{port}"
                ),
            );
            port
        };
        script.rule(&format!("{tap}.resolver"), format_args!("accept"));

        let chain = format!("{tap}.input");
        let new = self.policy().limits().new_connections_per_second;
        let limit = format!("limit rate over {new}/second burst {} packets", new.get().saturating_mul(2));
        script.rule(&chain, format_args!("ip daddr != {gateway} {host}"));
        script.rule(&chain, format_args!("meta l4proto udp {limit} {rate}"));
        script.rule(&chain, format_args!("ct state new meta l4proto tcp {limit} {rate}"));
        self.report_queries(script, port);
        script.rule(&chain, format_args!("meta l4proto {{ tcp, udp }} th dport {port} accept"));
        script.rule(&chain, format_args!("{}", self.drop_to(DropReason::Gateway)));

        let chain = format!("{tap}.output");
        let reply = format!("ip saddr {gateway} meta l4proto {{ tcp, udp }} th sport {port}");
        self.report_answers(script, port);
        script.rule(&chain, format_args!("{reply} ct state established ct direction reply accept"));
        script.rule(&chain, format_args!("{}", self.drop_to(DropReason::Unsolicited)));

        self.forward(script, &limit);
        // As libvirt has it: no port below 1024, which some take for the host's root.
        let (chain, subnet) = (format!("{tap}.nat"), self.guard.network().subnet());
        script.rule(&chain, format_args!("ip daddr {subnet} accept"));
        script.rule(&chain, format_args!("meta l4proto {{ tcp, udp }} masquerade to :1024-65535"));
        script.rule(&chain, format_args!("masquerade"));
        elements(script, address, &INET_MAPS);
        if self.policy().ipv6() {
            self.inet6(script);
            elements(script, address, ipv6::INET.maps);
        }
    }

    fn forward(&self, script: &mut Script<'_>, limit: &str) {
        let tap = &self.tap;
        let limits = self.policy().limits();
        let unsolicited = self.drop_to(DropReason::Unsolicited);
        let chain = format!("{tap}.out");
        script.rule(&chain, format_args!("ct state != {{ new, established }} {unsolicited}"));
        script.rule(&chain, format_args!("ct direction reply {unsolicited}"));
        self.classes(script, Ip::V4, Direction::Out);
        self.ports(script, Direction::Out, &format!("goto {tap}.open"));

        let chain = format!("{tap}.open");
        let rate = self.drop_to(DropReason::Rate);
        if let Some(bytes) = limits.egress_bytes_per_second {
            // A burst of a fifth of a second, and never less than a full-sized packet, beside what the kernel lets gather: the
            // bytes of one second.
            let burst = (bytes.get() / 5).max(64 * 1024);
            script.rule(
                &chain,
                format_args!("limit rate over {bytes} bytes/second burst {burst} bytes {rate}"),
            );
        }
        script.rule(&chain, format_args!("ct state established accept"));
        script.rule(&chain, format_args!("{limit} {rate}"));
        script.rule(
            &chain,
            format_args!("ct count over {} {}", limits.connections, self.drop_to(DropReason::Connections)),
        );
        script.rule(&chain, format_args!("counter name \"{tap}.connections\""));
        self.report_new(script, Ip::V4);
        if self.policy().ipv6() {
            self.report_new(script, Ip::V6);
        }
        script.rule(&chain, format_args!("accept"));

        let chain = format!("{tap}.in");
        script.rule(&chain, format_args!("ct state != established {unsolicited}"));
        script.rule(&chain, format_args!("ct direction original {unsolicited}"));
        self.classes(script, Ip::V4, Direction::In);
        self.ports(script, Direction::In, "accept");
    }
}

fn ports(rules: &[PortRule], protocol: Protocol) -> Option<String> {
    let list: Vec<String> =
        rules.iter().filter(|rule| rule.protocol() == protocol).map(|rule| rule.ports()).collect();
    (!list.is_empty()).then(|| format!("{{ {} }}", list.join(", ")))
}

#[cfg(test)]
mod tests;
