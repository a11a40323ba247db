//! What of libvirt's filters is in force: the chains that it made of them in ebtables' table `nat`.
//!
//! ```text
//!   PREROUTING   -i TAP -j libvirt-I-TAP    what the VM sends
//!   POSTROUTING  -o TAP -j libvirt-O-TAP    what comes to it
//! ```
//!
//! Read from `ebtables-save`, which only reads, and tells every field of a rule. (`ebtables -L` takes the last rule of each
//! chain out and puts it back, so that whoever changes a chain at that moment is refused; nft knows no fields of the rules
//! that ebtables writes.)

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::net::{IpAddr, Ipv4Addr};

use dev_box_core::spec::MacAddress;
use ipnet::IpNet;

use super::FirewallError;
use crate::identity::address_of_tap;

/// How many chains are followed from one to the next before a way is taken to lead anywhere.
const MAX_JUMPS: usize = 8;

/// The rules of a VM's filter, in the order of their chain.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FilterRules {
    /// Of what the VM sends.
    pub out: Vec<FilterRule>,
    /// Of what comes to it.
    pub inward: Vec<FilterRule>,
}

/// A rule as ebtables has it. Two that mean the same are equal, however their fields are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilterRule {
    conditions: BTreeSet<Condition>,
    target: String,
}

/// An option of ebtables, as `--ip-dst ! 10.0.0.0/8`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Condition {
    option: String,
    negated: bool,
    value: String,
}

impl FilterRule {
    /// Reads what `ebtables-save` writes after a chain's name.
    pub(crate) fn read(text: &str) -> Self {
        let mut options: Vec<Condition> = Vec::new();
        let mut negated = false;
        for word in text.split_whitespace() {
            match options.last_mut() {
                _ if word == "!" => negated = true,
                _ if word.starts_with('-') => {
                    // Before the option or after it: versions differ.
                    let negated = std::mem::take(&mut negated);
                    options.push(Condition { option: word.to_owned(), negated, value: String::new() });
                }
                Some(option) => {
                    option.negated |= std::mem::take(&mut negated);
                    option.value += &normal(&option.option, word);
                }
                None => options.push(Condition { option: String::new(), negated, value: word.to_owned() }),
            }
        }
        let (targets, conditions): (Vec<_>, Vec<_>) =
            options.into_iter().partition(|option| option.option == "-j");
        let target = targets.into_iter().next().map(|option| option.value).unwrap_or_default();
        let always = |condition: &Condition| !condition.negated && condition.value == "0.0.0.0/0";
        Self { conditions: conditions.into_iter().filter(|condition| !always(condition)).collect(), target }
    }

    /// Whether it has that condition; `value` as [`normal`] spells it.
    pub(super) fn has(&self, option: &str, value: &str) -> bool {
        self.conditions.iter().any(|known| known.option == option && !known.negated && known.value == value)
    }

    /// Whether a condition of it is about that, whatever it is.
    pub(super) fn speaks_of(&self, option: &str) -> bool {
        self.conditions.iter().any(|known| known.option == option)
    }

    pub(super) fn is_for_all(&self) -> bool {
        self.conditions.is_empty()
    }

    /// What becomes of a packet that it is for.
    pub(super) fn target(&self) -> &str {
        &self.target
    }

    /// Whether it may be for frames of this interface; `option` is `-i` or `-o`.
    fn concerns(&self, option: &str, tap: &str) -> bool {
        let others = |condition: &Condition| {
            let matches = match condition.value.strip_suffix('+') {
                Some(prefix) => tap.starts_with(prefix),
                None => condition.value == tap,
            };
            condition.option == option && !condition.negated && !matches
        };
        !self.conditions.iter().any(others)
    }
}

/// One spelling for what has several.
fn normal(option: &str, value: &str) -> String {
    let address = || Some(value.parse::<IpNet>().ok()?.trunc().to_string());
    let single = || Some(IpNet::from(value.parse::<IpAddr>().ok()?).to_string());
    let masked = || {
        let (address, mask) = value.split_once('/')?;
        let network = IpNet::with_netmask(address.parse().ok()?, mask.parse().ok()?).ok()?;
        Some(network.trunc().to_string())
    };
    let mac = || {
        let value = value.strip_suffix("/ff:ff:ff:ff:ff:ff").unwrap_or(value);
        // The older one leaves out leading zeros.
        let bytes: Vec<String> = value.split(':').map(|byte| format!("{byte:0>2}")).collect();
        Some(bytes.join(":").parse::<MacAddress>().ok()?.to_string())
    };
    let known = match (option, value) {
        ("-p", "IPv4" | "0x800" | "0x0800") => Some("IPv4".to_owned()),
        ("-p", "ARP" | "0x806" | "0x0806") => Some("ARP".to_owned()),
        ("-p", "IPv6" | "0x86dd" | "0x86DD") => Some("IPv6".to_owned()),
        ("--ip-proto" | "--ip6-proto", "tcp" | "6") => Some("tcp".to_owned()),
        ("--ip-proto" | "--ip6-proto", "udp" | "17") => Some("udp".to_owned()),
        ("--ip6-proto", "icmpv6" | "ipv6-icmp" | "58") => Some("icmpv6".to_owned()),
        // With every code.
        ("--ip6-icmp-type", _) => value.strip_suffix("/0:255").map(str::to_owned),
        ("--ip-sport" | "--ip-dport" | "--ip6-sport" | "--ip6-dport", _) => {
            value.split_once(':').and_then(|(first, last)| (first == last).then(|| first.to_owned()))
        }
        _ => address().or_else(single).or_else(masked).or_else(mac),
    };
    known.unwrap_or_else(|| value.to_owned())
}

type Chains<'a> = BTreeMap<&'a str, Vec<FilterRule>>;

/// The VMs whose filter is in force, by address: both chains are there, packets are led to them, and they end with
/// dropping what is left. One whose filter is anything less is not among them.
pub(super) fn read(listing: &str) -> Result<BTreeMap<Ipv4Addr, FilterRules>, FirewallError> {
    let mut chains = Chains::new();
    let mut nat = true;
    for line in listing.lines() {
        if let Some(table) = line.strip_prefix('*') {
            // The older one lists all tables.
            nat = table == "nat";
        } else if let Some(rule) = line.strip_prefix("-A ") {
            if !nat {
                continue;
            }
            let (chain, rule) = rule.split_once(' ').unwrap_or((rule, ""));
            chains.entry(chain).or_default().push(FilterRule::read(rule));
        } else if !line.is_empty() && !line.starts_with(['#', ':']) {
            let line: String = line.chars().take(100).collect();
            return Err(FirewallError::Listing(format!("\"{line}\" is no line of ebtables-save")));
        }
    }
    let taps = chains.keys().filter_map(|name| name.strip_prefix("libvirt-I-"));
    let found = taps.filter_map(|tap| {
        let address = address_of_tap(tap)?;
        let out = in_force(&chains, "PREROUTING", "-i", "libvirt-I-", tap)?;
        let inward = in_force(&chains, "POSTROUTING", "-o", "libvirt-O-", tap)?;
        Some((address, FilterRules { out, inward }))
    });
    Ok(found.collect())
}

fn in_force(
    chains: &Chains<'_>,
    base: &str,
    option: &str,
    prefix: &str,
    tap: &str,
) -> Option<Vec<FilterRule>> {
    let chain = format!("{prefix}{tap}");
    let leads = FilterRule::read(&format!("{option} {tap} -j {chain}"));
    let ways = chains.get(base)?;
    let place = ways.iter().position(|rule| *rule == leads)?;
    let past = |rule: &&FilterRule| rule.concerns(option, tap) && leads_past(chains, rule, 0);
    if let Some(rule) = ways.iter().take(place).find(past) {
        tracing::warn!(?rule, chain = base, tap, "packets may be led past libvirt's filter");
        return None;
    }
    let rules = chains.get(chain.as_str())?;
    // What comes after the first that is for all packets is never reached: a chain's policy, for one.
    let last = rules.iter().position(|rule| rule.conditions.is_empty())?;
    let reached = rules.get(..=last)?;
    (reached.last()?.target == "DROP").then(|| reached.to_vec())
}

/// Whether a packet that a rule is for may be accepted by it, or by a chain that it leads to.
fn leads_past(chains: &Chains<'_>, rule: &FilterRule, jumps: usize) -> bool {
    match rule.target.as_str() {
        "DROP" | "CONTINUE" => false,
        // To the chain's own policy, or back to where the packet came from.
        "RETURN" => jumps == 0,
        chain => match chains.get(chain) {
            Some(rules) if jumps < MAX_JUMPS => rules.iter().any(|rule| leads_past(chains, rule, jumps + 1)),
            _ => true,
        },
    }
}

/// See [`Firewall::filters_mark`](super::Firewall::filters_mark).
pub(super) fn mark(listing: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    // The head has the time in it, and other programs' rules are no filters.
    listing.lines().filter(|line| line.contains("libvirt-")).for_each(|line| line.hash(&mut hasher));
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const VM: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 2);
    const LISTING: &str = "\
# Generated by ebtables-save v1.8.9 (nf_tables) on Fri Nov 27 01:32:28 2026
*nat
:PREROUTING ACCEPT
:libvirt-I-dbt0ad50002 ACCEPT
-A PREROUTING -i vnet7 -j libvirt-I-vnet7
-A PREROUTING -i dbt0ad50002 -j libvirt-I-dbt0ad50002
-A POSTROUTING -o dbt0ad50002 -j libvirt-O-dbt0ad50002
-A libvirt-I-dbt0ad50002 -s ! 02:db:0a:d5:00:02 -j DROP
-A libvirt-I-dbt0ad50002 -p IPv4 --ip-dst 10.0.0.0/8 -j DROP
-A libvirt-I-dbt0ad50002 -p IPv4 --ip-proto tcp --ip-dport 80 -j ACCEPT
-A libvirt-I-dbt0ad50002 -j DROP
-A libvirt-I-dbt0ad50002 -j ACCEPT
-A libvirt-O-dbt0ad50002 -p IPv4 --ip-proto tcp --ip-sport 80 -j ACCEPT
-A libvirt-O-dbt0ad50002 -j DROP
# Completed on Fri Nov 27 01:32:28 2026
";

    /// The same rules, as the older one has them. Recorded from ebtables 2.0.11 with a table in a file (`--atomic-file`), for
    /// which the kernel is not asked.
    const LEGACY: &str = "\
# Generated by ebtables-save v1.0 (legacy) on Fri Nov 27 14:09:38 UTC 2026
*filter
:INPUT ACCEPT
-A INPUT -j DROP

*nat
:PREROUTING ACCEPT
:OUTPUT ACCEPT
:POSTROUTING ACCEPT
:libvirt-I-dbt0ad50002 ACCEPT
:libvirt-O-dbt0ad50002 ACCEPT
-A PREROUTING -i dbt0ad50002 -j libvirt-I-dbt0ad50002
-A POSTROUTING -o dbt0ad50002 -j libvirt-O-dbt0ad50002
-A libvirt-I-dbt0ad50002 -s ! 2:db:a:d5:0:2 -j DROP
-A libvirt-I-dbt0ad50002 -p ARP --arp-ip-src 10.213.0.2 --arp-ip-dst 10.213.0.1 --arp-mac-src 2:db:a:d5:0:2 -j ACCEPT
-A libvirt-I-dbt0ad50002 -p IPv4 --ip-src ! 10.213.0.2 -j DROP
-A libvirt-I-dbt0ad50002 -p IPv4 --ip-dst 10.213.0.1 --ip-proto udp --ip-dport 53 -j ACCEPT
-A libvirt-I-dbt0ad50002 -p IPv4 --ip-dst 10.0.0.0/8 -j DROP
-A libvirt-I-dbt0ad50002 -p IPv4 --ip-proto tcp --ip-dport 80 -j ACCEPT
-A libvirt-I-dbt0ad50002 -p IPv4 --ip-proto udp --ip-dport 8000:8100 -j ACCEPT
-A libvirt-I-dbt0ad50002 -j DROP
-A libvirt-O-dbt0ad50002 -s ! 2:db:a:d5:0:1 -j DROP
-A libvirt-O-dbt0ad50002 -p IPv4 --ip-proto tcp --ip-sport 80 -j ACCEPT
-A libvirt-O-dbt0ad50002 -j DROP

";

    fn found(listing: &str) -> Option<FilterRules> {
        read(listing).unwrap().remove(&VM)
    }

    #[test]
    fn the_mark_is_of_all_chains_and_rules_and_of_nothing_else() {
        let same = LISTING.replace("01:32:28", "01:32:29") + "-A PREROUTING -i eth7 -j ACCEPT\n";
        assert_eq!(mark(LISTING), mark(&same));
        let lines: Vec<&str> = LISTING.lines().filter(|line| line.contains("libvirt-")).collect();
        assert!(lines.len() > 4);
        for gone in lines {
            let rest: String =
                LISTING.lines().filter(|line| *line != gone).map(|line| format!("{line}\n")).collect();
            assert_ne!(mark(LISTING), mark(&rest), "{gone}");
        }
        assert_ne!(
            mark(LISTING),
            mark(&(LISTING.to_owned() + ":libvirt-J-dbt0ad50009 ACCEPT\n")),
            "on its way"
        );
    }

    #[test]
    fn the_older_ebtables_rules_are_the_same_rules() {
        let rules = |texts: &[&str]| texts.iter().map(|text| FilterRule::read(text)).collect();
        // As the filter's definition has them.
        let out = rules(&[
            " -s ! 02:db:0a:d5:00:02 -j DROP",
            "-p ARP --arp-mac-src 02:db:0a:d5:00:02 --arp-ip-src 10.213.0.2 --arp-ip-dst 10.213.0.1 -j ACCEPT",
            "-p IPv4 --ip-src ! 10.213.0.2 -j DROP",
            "-p IPv4 --ip-dst 10.213.0.1 --ip-proto udp --ip-dport 53:53 -j ACCEPT",
            "-p IPv4 --ip-dst 10.0.0.0/8 -j DROP",
            "-p IPv4 --ip-proto tcp --ip-dport 80:80 -j ACCEPT",
            "-p IPv4 --ip-proto udp --ip-dport 8000:8100 -j ACCEPT",
            " -j DROP",
        ]);
        let inward = rules(&[
            " -s ! 02:db:0a:d5:00:01 -j DROP",
            "-p IPv4 --ip-proto tcp --ip-sport 80:80 -j ACCEPT",
            " -j DROP",
        ]);
        let expected = FilterRules { out, inward };
        assert_eq!(found(LEGACY), Some(expected.clone()));
        assert_ne!(found(&LEGACY.replace("2:db:a:d5:0:2", "2:db:a:d5:0:20")), Some(expected));
    }

    #[test]
    fn rules_in_force_are_read() {
        let rules = |texts: &[&str]| texts.iter().map(|text| FilterRule::read(text)).collect();
        let out = rules(&[
            "-s ! 02:db:0a:d5:00:02 -j DROP",
            "-p IPv4 --ip-dst 10.0.0.0/8 -j DROP",
            "-p IPv4 --ip-proto tcp --ip-dport 80 -j ACCEPT",
            "-j DROP",
        ]);
        let inward = rules(&["-p IPv4 --ip-proto tcp --ip-sport 80 -j ACCEPT", "-j DROP"]);
        assert_eq!(found(LISTING), Some(FilterRules { out, inward }));
        assert_eq!(found(&LISTING.replace("*nat", "*filter")), None);
    }

    #[test]
    fn one_rule_has_several_spellings() {
        for (one, other) in [
            ("-s ! 02:db:0a:d5:00:02 -j DROP", "! -s 02:db:0a:d5:00:02/ff:ff:ff:ff:ff:ff -j DROP"),
            ("-s 02:db:0a:d5:00:02 -j DROP", "-s 02:DB:0A:D5:00:02 -j DROP"),
            ("-p IPv4 --ip-src ! 10.0.0.1 -j DROP", "-p 0x0800 ! --ip-src 10.0.0.1/32 -j DROP"),
            (
                "-p ARP --arp-ip-src 10.0.0.1 -j ACCEPT",
                "--arp-ip-src 10.0.0.1/255.255.255.255 -p 0x806 -j ACCEPT",
            ),
            ("--ip-dst 10.0.0.0/8 -j DROP", "--ip-dst 10.0.0.0/255.0.0.0 -j DROP"),
            ("--ip-proto udp --ip-dport 53 -j ACCEPT", "--ip-proto 17 --ip-dport 53:53 -j ACCEPT"),
            ("-p IPv4 --ip-dst 0.0.0.0/0 -j DROP", "-p IPv4 -j DROP"),
            (
                "-p IPv6 --ip6-src ! fddb::ad5:2 -j DROP",
                "-p 0x86DD ! --ip6-src fddb:0::0ad5:0002/128 -j DROP",
            ),
            ("-p IPv6 --ip6-dst 2000::/3 -j DROP", "-p IPv6 --ip6-dst 2000::/e000:: -j DROP"),
            (
                "-p IPv6 --ip6-proto icmpv6 --ip6-icmp-type 135:136 -j ACCEPT",
                "-p IPv6 --ip6-proto ipv6-icmp --ip6-icmp-type 135:136/0:255 -j ACCEPT",
            ),
            ("--ip6-proto tcp --ip6-dport 443:443 -j ACCEPT", "--ip6-proto 6 --ip6-dport 443 -j ACCEPT"),
        ] {
            assert_eq!(FilterRule::read(one), FilterRule::read(other), "{one}");
        }
        for (one, other) in [
            ("-s ! 02:db:0a:d5:00:02 -j DROP", "-s 02:db:0a:d5:00:02 -j DROP"),
            ("--ip-dst 10.0.0.0/8 -j DROP", "--ip-dst 10.0.0.0/9 -j DROP"),
            ("--ip-dst 10.0.0.0/8 -j DROP", "--ip-src 10.0.0.0/8 -j DROP"),
            ("--ip-dport 80 -j ACCEPT", "--ip-dport 80:81 -j ACCEPT"),
            ("--ip-dport 80 -j ACCEPT", "--ip-dport 80 -j DROP"),
            ("--ip-dst ! 0.0.0.0/0 -j DROP", "-j DROP"),
            ("--log -j DROP", "-j DROP"),
            ("-p IPv6 --ip6-dst 2001::/23 -j DROP", "-p IPv6 --ip6-dst 2001::/24 -j DROP"),
            ("--ip6-icmp-type 135:136 -j ACCEPT", "--ip6-icmp-type 135:136/1:1 -j ACCEPT"),
            ("stray -j DROP", "-j DROP"),
        ] {
            assert_ne!(FilterRule::read(one), FilterRule::read(other), "{one}");
        }
    }

    #[test]
    fn what_is_taken_away_or_led_past_is_not_in_force() {
        for (whole, part) in [
            ("-A PREROUTING -i dbt0ad50002 -j libvirt-I-dbt0ad50002\n", ""),
            ("-o dbt0ad50002 -j libvirt-O-dbt0ad50002", "-o dbt0ad50002 -j ACCEPT"),
            ("-i dbt0ad50002 -j", "-i dbt0ad50002 -p IPv4 -j"),
            ("-i vnet7 -j libvirt-I-vnet7", "-j ACCEPT"),
            ("-i vnet7 -j libvirt-I-vnet7", "-j RETURN"),
            ("-i vnet7 -j libvirt-I-vnet7", "-i dbt+ -p IPv4 -j ACCEPT"),
            ("-i vnet7 -j libvirt-I-vnet7", "-i ! vnet7 -j ACCEPT"),
            ("-i vnet7 -j libvirt-I-vnet7", "-j mark --mark-set 1"),
            ("-i vnet7 -j libvirt-I-vnet7\n", "-j other\n-A other -p ARP -j ACCEPT\n"),
            ("-i vnet7 -j libvirt-I-vnet7\n", "-j other\n-A other -j other\n"),
            ("-A libvirt-I-dbt0ad50002 -j DROP\n", ""),
            ("-s ! 02:db:0a:d5:00:02 -j DROP", "-j ACCEPT"),
            ("-A libvirt-O-dbt0ad50002 -j DROP\n", ""),
        ] {
            let changed = LISTING.replace(whole, part);
            assert_ne!(changed, LISTING);
            assert_eq!(found(&changed), None, "{part}");
        }
        for others in [
            "-i vnet7 -j ACCEPT",
            "-i vnet+ -j ACCEPT",
            "-j DROP",
            "-p ARP --log -j CONTINUE",
            "-j other\n-A other -j RETURN",
        ] {
            let changed = LISTING.replace("-i vnet7 -j libvirt-I-vnet7", others);
            assert_eq!(found(&changed), found(LISTING), "{others}");
        }
    }

    #[test]
    fn a_rule_for_another_of_the_same_verdict_is_another() {
        for (one, other) in [
            ("--ip-dst 10.0.0.0/8 -j DROP", "--ip-dst 10.0.0.0/9 -j DROP"),
            ("--ip-dport 80", "--ip-dport 25"),
            ("-s ! 02:db:0a:d5:00:02", "-s ! 02:db:0a:d5:00:03"),
        ] {
            let changed = found(&LISTING.replace(one, other)).unwrap();
            assert_ne!(Some(changed), found(LISTING), "{one}");
        }
    }

    #[test]
    fn what_is_no_listing_is_refused() {
        assert!(read("").unwrap().is_empty());
        for text in ["{}", "nonsense", "Bridge table: nat"] {
            assert!(matches!(read(text), Err(FirewallError::Listing(_))), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_rules_are_read(rules in "(-A (PREROUTING|libvirt-I-dbt0ad50002|x)( (!|-i|-j|--ip-dst|dbt0ad50002|x|1.2.3.4/5|DROP)){0,6}\n){0,30}") {
            read(&rules).unwrap();
        }
    }
}
