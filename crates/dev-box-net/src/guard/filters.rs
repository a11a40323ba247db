//! What of libvirt's filters is in force: the chains that it made of them in ebtables' table `nat`.
//!
//! ```text
//!   PREROUTING   -i TAP -j libvirt-I-TAP    what the VM sends
//!   POSTROUTING  -o TAP -j libvirt-O-TAP    what comes to it
//! ```
//!
//! Read by nft, which sees what the ebtables of nf_tables writes, and only as far as a filter of [`crate::xml::nwfilter`] makes
//! it. Not by `ebtables -L`: to list, it takes the last rule of each chain out and puts it back, and whoever changes a chain
//! at that moment, as libvirt does for every VM, is refused.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use serde_json::Value;

use super::FirewallError;
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

/// A rule, as far as it is read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Rule {
    /// The interface that it is for, where it is for one.
    interface: Option<String>,
    /// Whether it asks for anything else.
    conditional: bool,
    verdict: Option<Verdict>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    Accept,
    Drop,
    Jump(String),
}

impl Rule {
    fn read(value: &Value) -> Self {
        let mut rule = Self::default();
        for (kind, part) in
            value["expr"].as_array().into_iter().flatten().filter_map(Value::as_object).flatten()
        {
            let key = part["left"]["meta"]["key"].as_str();
            match kind.as_str() {
                "counter" => {}
                "accept" => rule.verdict = Some(Verdict::Accept),
                "drop" => rule.verdict = Some(Verdict::Drop),
                "jump" => {
                    rule.verdict = part["target"].as_str().map(|target| Verdict::Jump(target.to_owned()));
                }
                "match" if part["op"] == "==" && matches!(key, Some("iifname" | "oifname")) => {
                    rule.interface = part["right"].as_str().map(str::to_owned);
                    rule.conditional |= rule.interface.is_none();
                }
                _ => rule.conditional = true,
            }
        }
        rule
    }
}

type Chains = BTreeMap<String, Vec<Rule>>;

/// The VMs whose filter is in force, by address: both chains are there, packets are led to them, and they end with
/// dropping what is left. One whose filter is anything less is not among them.
pub(super) fn read(listing: &str) -> Result<BTreeMap<Ipv4Addr, FilterRules>, FirewallError> {
    let document: Value =
        serde_json::from_str(listing).map_err(|error| FirewallError::Listing(error.to_string()))?;
    let items = document["nftables"].as_array();
    let items = items.ok_or_else(|| FirewallError::Listing("no \"nftables\"".to_owned()))?;
    let mut chains = Chains::new();
    for rule in items.iter().map(|item| &item["rule"]).filter(|rule| rule.is_object()) {
        let chain = rule["chain"].as_str().unwrap_or_default();
        chains.entry(chain.to_owned()).or_default().push(Rule::read(rule));
    }
    let taps = chains.keys().filter_map(|name| name.strip_prefix("libvirt-I-"));
    let found = taps.filter_map(|tap| {
        let address = address_of_tap(tap)?;
        let out = in_force(&chains, "PREROUTING", "libvirt-I-", tap)?;
        let inward = in_force(&chains, "POSTROUTING", "libvirt-O-", tap)?;
        Some((address, FilterRules { out, inward }))
    });
    Ok(found.collect())
}

fn in_force(chains: &Chains, base: &str, prefix: &str, tap: &str) -> Option<Verdicts> {
    let chain = format!("{prefix}{tap}");
    let leads = |rule: &Rule| {
        !rule.conditional
            && rule.interface.as_deref() == Some(tap)
            && rule.verdict == Some(Verdict::Jump(chain.clone()))
    };
    let ways = chains.get(base)?;
    let place = ways.iter().position(leads)?;
    let concerns = |rule: &&Rule| rule.interface.as_deref().is_none_or(|interface| interface == tap);
    let accepts = |rule: &&Rule| rule.verdict == Some(Verdict::Accept);
    if let Some(rule) = ways.iter().take(place).filter(concerns).find(accepts) {
        tracing::warn!(?rule, chain = base, tap, "packets are led past libvirt's filter");
        return None;
    }
    let rules = chains.get(&chain)?;
    // What comes after the first that is for all packets is never reached: a chain's policy, for one.
    let last = rules.iter().position(|rule| !rule.conditional && rule.interface.is_none())?;
    let reached = rules.get(..=last)?;
    let count =
        |verdict: Verdict| reached.iter().filter(|rule| rule.verdict.as_ref() == Some(&verdict)).count();
    (reached.last()?.verdict == Some(Verdict::Drop))
        .then(|| Verdicts { accepts: count(Verdict::Accept), drops: count(Verdict::Drop) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const COUNTER: &str = r#"{"counter":{"packets":0,"bytes":0}}"#;

    /// A line a rule: its chain, its interface or `-`, its condition or `-`, its verdict.
    const RULES: &str = "\
PREROUTING vnet7 - libvirt-I-vnet7
PREROUTING dbt0ad50002 - libvirt-I-dbt0ad50002
POSTROUTING dbt0ad50002 - libvirt-O-dbt0ad50002
libvirt-I-dbt0ad50002 - mac drop
libvirt-I-dbt0ad50002 - 22 accept
libvirt-I-dbt0ad50002 - 80 accept
libvirt-I-dbt0ad50002 - - drop
libvirt-I-dbt0ad50002 - - accept
libvirt-O-dbt0ad50002 - 22 accept
libvirt-O-dbt0ad50002 - - drop
";

    fn listing(rules: &str) -> String {
        let mut items = vec![json!({"metainfo": {"json_schema_version": 1}})];
        for rule in rules.lines() {
            let [chain, interface, condition, verdict] =
                rule.split(' ').collect::<Vec<_>>().try_into().unwrap();
            let mut parts = Vec::new();
            if interface != "-" {
                let key = if chain == "PREROUTING" { "iifname" } else { "oifname" };
                let left = json!({"meta": {"key": key}});
                parts.push(json!({"match": {"op": "==", "left": left, "right": interface}}));
            }
            if condition != "-" {
                parts.push(json!({"xt": {"type": "match", "name": condition}}));
            }
            parts.push(serde_json::from_str(COUNTER).unwrap());
            parts.push(match verdict {
                "accept" | "drop" => json!({verdict: null}),
                chain => json!({"jump": {"target": chain}}),
            });
            items.push(json!({"rule": {"family": "bridge", "table": "nat", "chain": chain, "expr": parts}}));
        }
        json!({"nftables": items}).to_string()
    }

    #[test]
    fn rules_in_force_are_counted() {
        let found = read(&listing(RULES)).unwrap();
        let expected =
            FilterRules { out: Verdicts { accepts: 2, drops: 2 }, inward: Verdicts { accepts: 1, drops: 1 } };
        assert_eq!(found, BTreeMap::from([(Ipv4Addr::new(10, 213, 0, 2), expected)]));
    }

    #[test]
    fn what_is_taken_away_or_led_past_is_not_in_force() {
        for (whole, part) in [
            ("PREROUTING dbt0ad50002 - libvirt-I-dbt0ad50002\n", ""),
            ("POSTROUTING dbt0ad50002 - libvirt-O-dbt0ad50002", "POSTROUTING dbt0ad50002 - accept"),
            ("PREROUTING dbt0ad50002 -", "PREROUTING dbt0ad50002 vlan"),
            ("PREROUTING vnet7 - libvirt-I-vnet7", "PREROUTING - - accept"),
            ("PREROUTING vnet7 - libvirt-I-vnet7", "PREROUTING dbt0ad50002 - accept"),
            ("libvirt-I-dbt0ad50002 - - drop\n", ""),
            ("libvirt-I-dbt0ad50002 - mac drop", "libvirt-I-dbt0ad50002 - - accept"),
            ("libvirt-O-dbt0ad50002 - 22 accept\nlibvirt-O-dbt0ad50002 - - drop\n", ""),
        ] {
            let changed = RULES.replace(whole, part);
            assert_ne!(changed, RULES);
            assert!(read(&listing(&changed)).unwrap().is_empty(), "{whole}");
        }
        let others = RULES.replace("vnet7 - libvirt-I-vnet7", "vnet7 - accept");
        assert_eq!(read(&listing(&others)).unwrap().len(), 1, "another's packets");
        let fewer = RULES.replace("libvirt-I-dbt0ad50002 - mac drop\n", "");
        assert_ne!(read(&listing(&fewer)).unwrap(), read(&listing(RULES)).unwrap());
    }

    #[test]
    fn what_is_no_listing_is_refused() {
        for text in ["", "{}", "nonsense"] {
            assert!(matches!(read(text), Err(FirewallError::Listing(_))), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_rules_are_read(rules in "((PREROUTING|libvirt-I-dbt0ad50002|x) (-|dbt0ad50002) (-|y) (accept|drop|z)\n){0,30}") {
            read(&listing(&rules)).unwrap();
        }
    }
}
