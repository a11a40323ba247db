//! The rules of IPv6, for VMs whose policy enables it: the same classes, and neighbour discovery (RFC 4861) between the VM and the
//! gateway in place of ARP. Router advertisements pass in no direction: addresses are set by the agent.
//!
//! A policy without IPv6 has none of these chains; what another one left stands unused then, since the bridge half lets
//! no IPv6 through.

use super::{DropReason, Ip, NAME_LIFE, Own, Rules, SEEN_LIFE, Script};
use crate::identity::ipv6_of;

/// A VM's own objects, beside those of IPv4. Ports, drops and limits are shared with these.
pub(super) const BRIDGE: Own = Own {
    maps: &[],
    chains: &["in6", "out6"],
    reasons: &[],
    counters: &[],
    sets: &[("names6", "ipv6_addr", NAME_LIFE)],
};
pub(super) const INET: Own = Own {
    maps: &[
        ("prerouting6-by", "ipv6_addr", "pre6"),
        ("from-guest6", "ipv6_addr", "out6"),
        ("to-guest6", "ipv6_addr", "in6"),
        ("nat6-by", "ipv6_addr", "nat6"),
    ],
    chains: &["pre6", "out6", "in6", "nat6"],
    reasons: &[],
    counters: &[],
    sets: &[("names6", "ipv6_addr", NAME_LIFE), ("seen6", "ipv6_addr . inet_service", SEEN_LIFE)],
};

/// Between the host and its bridge. Which of it a VM may send and get is the bridge half's.
pub(super) const NEIGHBOUR_DISCOVERY: &str =
    "ip6 hoplimit 255 icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept";

/// Where messages of neighbour discovery have their target: after 8 bytes, 16 long.
const TARGET: &str = "@th,64,128";

impl Rules<'_> {
    pub(super) fn bridge_out6(&self, script: &mut Script<'_>) {
        let network = self.guard.network();
        let (own, gateway) = (ipv6_of(self.guard.address()), ipv6_of(network.gateway()));
        let gateway_mac = network.gateway_mac();
        let chain = format!("{}.out6", self.tap);
        let discovery = format!("ip6 saddr {own} ip6 hoplimit 255 icmpv6 type");
        script.rule(
            &chain,
            format_args!("{discovery} nd-neighbor-solicit {TARGET} {:#x} accept", u128::from(gateway)),
        );
        script.rule(
            &chain,
            format_args!(
                "{discovery} nd-neighbor-advert {TARGET} {:#x} ether daddr {gateway_mac} accept",
                u128::from(own)
            ),
        );
        // Every kernel tells its groups; nobody listens.
        script.rule(&chain, format_args!("icmpv6 type {{ mld-listener-report, mld2-listener-report }} drop"));
        script.rule(&chain, format_args!("ip6 saddr != {own} {}", self.drop_to(DropReason::Spoofed)));
        // Neither extension headers nor fragments.
        let protocol = self.drop_to(DropReason::Protocol);
        script.rule(&chain, format_args!("ip6 nexthdr != {{ tcp, udp, icmpv6 }} {protocol}"));
        script.rule(
            &chain,
            format_args!("ether daddr != {gateway_mac} {}", self.drop_to(DropReason::Neighbour)),
        );
        self.classes(script, Ip::V6, super::Direction::Out);
    }

    pub(super) fn bridge_in6(&self, script: &mut Script<'_>) {
        let (guard, network) = (self.guard, self.guard.network());
        let (own, gateway) = (ipv6_of(guard.address()), ipv6_of(network.gateway()));
        let mac = guard.mac();
        let chain = format!("{}.in6", self.tap);
        let discovery = "ip6 hoplimit 255 icmpv6 type";
        script.rule(
            &chain,
            format_args!("{discovery} nd-neighbor-solicit {TARGET} {:#x} accept", u128::from(own)),
        );
        script.rule(
            &chain,
            format_args!(
                "ip6 daddr {own} {discovery} nd-neighbor-advert {TARGET} {:#x} ether daddr {mac} accept",
                u128::from(gateway)
            ),
        );
        script.rule(&chain, format_args!("ether daddr != {mac} {}", self.drop_to(DropReason::Neighbour)));
        script.rule(&chain, format_args!("ip6 daddr != {own} {}", self.drop_to(DropReason::Unsolicited)));
        self.classes(script, Ip::V6, super::Direction::In);
    }

    pub(super) fn inet6(&self, script: &mut Script<'_>) {
        let (tap, subnet) = (&self.tap, self.guard.network().subnet());
        let unsolicited = self.drop_to(DropReason::Unsolicited);

        let (chain, gateway) = (format!("{tap}.pre6"), ipv6_of(subnet.gateway()));
        script.rule(&chain, format_args!("{NEIGHBOUR_DISCOVERY}"));
        script.rule(&chain, format_args!("ip6 daddr {gateway} {}", self.drop_to(DropReason::Gateway)));
        script.rule(&chain, format_args!("fib daddr type != unicast {}", self.drop_to(DropReason::Host)));
        script.rule(&chain, format_args!("accept"));

        let chain = format!("{tap}.out6");
        script.rule(&chain, format_args!("ct state != {{ new, established }} {unsolicited}"));
        script.rule(&chain, format_args!("ct direction reply {unsolicited}"));
        self.classes(script, Ip::V6, super::Direction::Out);

        let chain = format!("{tap}.in6");
        script.rule(&chain, format_args!("ct state != established {unsolicited}"));
        script.rule(&chain, format_args!("ct direction original {unsolicited}"));
        self.classes(script, Ip::V6, super::Direction::In);

        let (chain, neighbours) = (format!("{tap}.nat6"), subnet.range6());
        script.rule(&chain, format_args!("ip6 daddr {neighbours} accept"));
        script.rule(&chain, format_args!("meta l4proto {{ tcp, udp }} masquerade to :1024-65535"));
        script.rule(&chain, format_args!("masquerade"));
    }
}
