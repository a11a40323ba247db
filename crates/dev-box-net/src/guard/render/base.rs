//! The chains that all VMs share: they lead each packet to the chains of the VM whose it is, and drop what is nobody's.

use super::{BRIDGE_MAPS, INET_MAPS, Script, ipv6, maps};
use crate::identity::TAP_PREFIX;

pub(super) fn bridge(script: &mut Script<'_>) {
    script.table();
    maps(script, &BRIDGE_MAPS);
    // Before br_netfilter (0), and before libvirt's filter (ebtables' nat, -300 and 300), so that what both would drop is
    // counted and reported here.
    for (chain, hook, priority, direction, map) in [
        ("from-taps", "prerouting", -310, "iifname", "from-guest"),
        ("postrouting", "postrouting", 290, "oifname", "to-guest"),
    ] {
        script.base(chain, hook, priority);
        script.rule(chain, format_args!("{direction} vmap @{map}"));
        script.rule(chain, format_args!("{direction} \"{TAP_PREFIX}*\" drop"));
    }
}

pub(super) fn inet(script: &mut Script<'_>) {
    script.table();
    script.line("add", "set", format_args!("bridges {{ type ifname; }}"));
    maps(script, &INET_MAPS);
    maps(script, ipv6::INET.maps);
    // A packet of a VM's comes by its bridge. By the tap itself comes what is addressed to a link-local group
    // (01:80:c2:00:00:0x): the bridge hands it up past its own hooks, and IP would take it.
    script.base("prerouting", "prerouting", -290);
    script.rule("prerouting", format_args!("iifname vmap @direct-by"));
    script.rule("prerouting", format_args!("iifname \"{TAP_PREFIX}*\" drop"));
    script.rule("prerouting", format_args!("iifname @bridges ip saddr vmap @prerouting-by"));
    script.rule("prerouting", format_args!("iifname @bridges ip6 saddr vmap @prerouting6-by"));
    script.rule("prerouting", format_args!("iifname @bridges drop"));
    // Before anyone else's DNAT (-100).
    script.base_of("nat", "resolver", "prerouting", -110);
    script.rule("resolver", format_args!("iifname @bridges ip saddr vmap @resolver-by"));
    script.base("input", "input", -10);
    script.rule("input", format_args!("iifname @bridges ip saddr vmap @input-by"));
    script.rule("input", format_args!("iifname @bridges {}", ipv6::NEIGHBOUR_DISCOVERY));
    script.rule("input", format_args!("iifname @bridges drop"));
    script.base("output", "output", -10);
    script.rule("output", format_args!("oifname @bridges ip daddr vmap @output-by"));
    script.rule("output", format_args!("oifname @bridges {}", ipv6::NEIGHBOUR_DISCOVERY));
    script.rule("output", format_args!("oifname @bridges drop"));
    script.base("forward", "forward", -10);
    // No error that says "packet too big" reaches a VM: so that its connections fit the way beyond the host from the start.
    for direction in ["iifname", "oifname"] {
        script.rule(
            "forward",
            format_args!(
                "{direction} @bridges tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu"
            ),
        );
    }
    // From one VM to another by way of the gateway: the sender's chain judges it, and drops it.
    script.rule("forward", format_args!("iifname @bridges ip saddr vmap @from-guest"));
    script.rule("forward", format_args!("iifname @bridges ip6 saddr vmap @from-guest6"));
    script.rule("forward", format_args!("iifname @bridges drop"));
    script.rule("forward", format_args!("oifname @bridges ip daddr vmap @to-guest"));
    script.rule("forward", format_args!("oifname @bridges ip6 daddr vmap @to-guest6"));
    script.rule("forward", format_args!("oifname @bridges drop"));
    // After libvirt's (100): what it has translated does not come here.
    script.base_of("nat", "nat", "postrouting", 110);
    script.rule("nat", format_args!("ip saddr vmap @nat-by"));
    script.rule("nat", format_args!("ip6 saddr vmap @nat6-by"));
}

/// ARP by the tap itself, as above: the host would tell all its addresses.
pub(super) fn arp(script: &mut Script<'_>) {
    script.table();
    script.base("input", "input", -10);
    script.rule("input", format_args!("iifname \"{TAP_PREFIX}*\" drop"));
}
