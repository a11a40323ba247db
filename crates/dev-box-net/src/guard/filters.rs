//! What of libvirt's filters is in force: the chains that it made of them in ebtables' table `nat`.
//!
//! ```text
//!   PREROUTING   -i TAP -j libvirt-I-TAP    what the VM sends
//!   POSTROUTING  -o TAP -j libvirt-O-TAP    what comes to it
//! ```
//!
//! Read as text, which both kinds of ebtables (of nf_tables and legacy) print alike, and only as far as a filter of
//! [`crate::xml::nwfilter`] makes it: each of its rules is one line.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use crate::identity::address_of_tap;

/// How many rules there are of a kind, in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Verdicts {
    /// Rules that accept.
    pub accepts: usize,
    /// Rules that drop.
    pub drops: usize,
}

/// The rules of a VM's filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FilterRules {
    /// Of what the VM sends.
    pub out: Verdicts,
    /// Of what comes to it.
    pub inward: Verdicts,
}

/// A base chain of the table, as far as it is read.
struct Base<'a> {
    name: &'static str,
    interface: &'static str,
    prefix: &'static str,
    lines: &'a [&'a str],
}

/// The VMs whose filter is in force, by address: both chains are there, packets are led to them, and they end with
/// dropping what is left. One whose filter is anything less is not among them.
pub(super) fn read(listing: &str) -> BTreeMap<Ipv4Addr, FilterRules> {
    let chains = chains(listing);
    let of = |name| chains.get(name).map_or(&[][..], Vec::as_slice);
    let base = |name, interface, prefix| Base { name, interface, prefix, lines: of(name) };
    let (pre, post) = (base("PREROUTING", "-i", "libvirt-I-"), base("POSTROUTING", "-o", "libvirt-O-"));
    let taps = chains.keys().filter_map(|name| name.strip_prefix(pre.prefix));
    taps.filter_map(|tap| {
        let address = address_of_tap(tap)?;
        let rules =
            FilterRules { out: in_force(&chains, &pre, tap)?, inward: in_force(&chains, &post, tap)? };
        Some((address, rules))
    })
    .collect()
}

/// The rules of each chain, in order.
fn chains(listing: &str) -> BTreeMap<&str, Vec<&str>> {
    let mut chains: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut current = None;
    for line in listing.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if let Some(header) = line.strip_prefix("Bridge chain: ") {
            current = header.split(',').next();
            chains.entry(current.unwrap_or_default()).or_default();
        } else if let Some(chain) = current {
            chains.entry(chain).or_default().push(line);
        }
    }
    chains
}

fn in_force(chains: &BTreeMap<&str, Vec<&str>>, base: &Base<'_>, tap: &str) -> Option<Verdicts> {
    let chain = format!("{}{tap}", base.prefix);
    let jump = format!("{} {tap} -j {chain}", base.interface);
    let place = base.lines.iter().position(|line| *line == jump)?;
    let of_others = |line: &str| line.starts_with(base.interface) && !line.contains(tap);
    if let Some(passed) =
        base.lines.iter().take(place).find(|line| line.ends_with("-j ACCEPT") && !of_others(line))
    {
        tracing::warn!(rule = passed, chain = base.name, tap, "packets are led past libvirt's filter");
        return None;
    }
    let rules = chains.get(chain.as_str())?;
    let ending = |verdict: &str| rules.iter().filter(|rule| rule.ends_with(verdict)).count();
    (rules.last() == Some(&"-j DROP"))
        .then(|| Verdicts { accepts: ending("-j ACCEPT"), drops: ending("-j DROP") })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LISTING: &str = "Bridge table: nat

Bridge chain: PREROUTING, entries: 2, policy: ACCEPT
-i vnet7 -j libvirt-I-vnet7
-i dbt0ad50002 -j libvirt-I-dbt0ad50002

Bridge chain: OUTPUT, entries: 0, policy: ACCEPT

Bridge chain: POSTROUTING, entries: 1, policy: ACCEPT
-o dbt0ad50002 -j libvirt-O-dbt0ad50002 \n
Bridge chain: libvirt-I-dbt0ad50002, entries: 4, policy: RETURN
-s ! 02:db:0a:d5:00:02 -j DROP
-p IPv4 --ip-proto tcp --ip-dport 22 -j ACCEPT
-p IPv4 --ip-proto tcp --ip-dport 80 -j ACCEPT
-j DROP

Bridge chain: libvirt-O-dbt0ad50002, entries: 2, policy: RETURN
-p IPv4 --ip-proto tcp --ip-sport 22 -j ACCEPT
-j DROP
";

    #[test]
    fn rules_in_force_are_counted() {
        let found = read(LISTING);
        let expected =
            FilterRules { out: Verdicts { accepts: 2, drops: 2 }, inward: Verdicts { accepts: 1, drops: 1 } };
        assert_eq!(found, BTreeMap::from([(Ipv4Addr::new(10, 213, 0, 2), expected)]));
    }

    #[test]
    fn what_is_taken_away_or_led_past_is_not_in_force() {
        for (whole, part) in [
            ("-i dbt0ad50002 -j libvirt-I-dbt0ad50002\n", ""),
            ("-o dbt0ad50002 -j libvirt-O-dbt0ad50002", "-o dbt0ad50002 -j ACCEPT"),
            ("-i vnet7 -j libvirt-I-vnet7", "-j ACCEPT"),
            ("-i vnet7 -j libvirt-I-vnet7", "-i dbt0ad50002 -j ACCEPT"),
            ("80 -j ACCEPT\n-j DROP", "80 -j ACCEPT"),
            ("-p IPv4 --ip-proto tcp --ip-sport 22 -j ACCEPT\n-j DROP\n", ""),
        ] {
            let changed = LISTING.replace(whole, part);
            assert_ne!(changed, LISTING);
            assert!(read(&changed).is_empty(), "{whole}");
        }
        let others = LISTING.replace("-i vnet7 -j libvirt-I-vnet7", "-i vnet7 -j ACCEPT");
        assert_eq!(read(&others).len(), 1, "another's packets");
        let fewer = LISTING.replace("-s ! 02:db:0a:d5:00:02 -j DROP\n", "");
        assert_ne!(read(&fewer), read(LISTING));
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "(Bridge chain: [a-z-]{0,12},|-i dbt0ad50002 -j x|\n|.){0,30}") {
            let _ = read(&text);
        }
    }
}
