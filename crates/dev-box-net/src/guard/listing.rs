//! Reading what nft lists (libnftables-json(5)): which VMs have rules, what the rules are, what they counted.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{Count, DropReason, Fingerprint, FirewallError, Traffic};
use crate::identity::{address_of_tap, ipv4_of};

/// Objects of both tables, in listed order, with what varies without anyone's doing (handles, counts) left out.
#[derive(Debug, Default)]
pub(super) struct Tables {
    objects: Vec<Object>,
    counters: Vec<(String, Count)>,
}

#[derive(Debug)]
struct Object {
    kind: String,
    family: String,
    /// The chain of a rule, the name of anything else.
    name: String,
    value: Value,
}

impl Tables {
    /// Adds a listing.
    pub(super) fn read(&mut self, text: &str) -> Result<(), FirewallError> {
        let listing = |what: &str| FirewallError::Listing(what.to_owned());
        let document: Value =
            serde_json::from_str(text).map_err(|error| FirewallError::Listing(error.to_string()))?;
        // nft 1.0.6 lists some objects twice when the rules change while it reads them.
        let mut seen = BTreeSet::new();
        let items =
            document.get("nftables").and_then(Value::as_array).ok_or_else(|| listing("no \"nftables\""))?;
        for item in items {
            let (kind, value) = item
                .as_object()
                .and_then(|object| object.iter().next())
                .ok_or_else(|| listing("an empty item"))?;
            // A table with a flag may be dormant: nothing in it is in force then.
            let plain_table = kind == "table" && value.get("flags").is_none();
            if kind == "metainfo" || plain_table {
                continue;
            }
            let field = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
            let name = field(if kind == "rule" { "chain" } else { "name" });
            let number = |key: &str| value.get(key).and_then(Value::as_u64).unwrap_or_default();
            if !seen.insert((field("family"), kind, name.clone(), number("handle"))) {
                continue;
            }
            if kind == "counter" {
                self.counters.push((name, Count { packets: number("packets"), bytes: number("bytes") }));
                continue;
            }
            let mut value = value.clone();
            if let Some(fields) = value.as_object_mut() {
                fields.remove("handle");
                if kind == "set" && owner(&name).is_some() {
                    // Filled by the resolver and by the VM's own packets.
                    fields.remove("elem");
                }
            }
            self.objects.push(Object { kind: kind.clone(), family: field("family"), name, value });
        }
        Ok(())
    }

    /// Of each address that any chain belongs to: everything that decides over its packets, which is the base chains, its own
    /// chains, and its entries in the maps.
    pub(super) fn fingerprints(&self) -> BTreeMap<Ipv4Addr, Fingerprint> {
        let mut base = Sha256::new();
        let mut own: BTreeMap<Ipv4Addr, Sha256> =
            self.objects.iter().filter_map(|object| Some((owner(&object.name)?, Sha256::new()))).collect();
        for object in &self.objects {
            if object.kind == "map" {
                let entries = object.value.get("elem").and_then(Value::as_array);
                for entry in entries.into_iter().flatten() {
                    let key = entry.get(0).and_then(Value::as_str).unwrap_or_default();
                    let address = address_of_tap(key).or_else(|| match key.parse().ok()? {
                        IpAddr::V4(address) => Some(address),
                        IpAddr::V6(address) => ipv4_of(address),
                    });
                    if let Some(hasher) = address.and_then(|address| own.get_mut(&address)) {
                        hasher.update(format!("{} {} {entry}\n", object.family, object.name));
                    }
                }
                continue;
            }
            let hasher = match owner(&object.name) {
                Some(address) => own.get_mut(&address),
                None => Some(&mut base),
            };
            if let Some(hasher) = hasher {
                hasher.update(format!("{} {}\n", object.kind, object.value));
            }
        }
        let base = base.finalize();
        let whole = |hasher: Sha256| {
            Fingerprint(format!("sha256:{}", hex::encode(hasher.chain_update(base).finalize())))
        };
        own.into_iter().map(|(address, hasher)| (address, whole(hasher))).collect()
    }

    pub(super) fn traffic(&self) -> BTreeMap<Ipv4Addr, Traffic> {
        let mut all: BTreeMap<Ipv4Addr, Traffic> = BTreeMap::new();
        for (name, count) in &self.counters {
            let Some(address) = owner(name) else { continue };
            let traffic = all.entry(address).or_default();
            match name.split_once('.').map(|(_, what)| what) {
                Some("sent") => traffic.sent = *count,
                Some("received") => traffic.received = *count,
                Some("connections") => traffic.connections = count.packets,
                Some(what) => {
                    let reason = what.strip_prefix("drop.");
                    let reason = DropReason::ALL.into_iter().find(|known| Some(known.as_str()) == reason);
                    // Each half counts for itself; what the first dropped never reaches the second.
                    if let Some(reason) = reason
                        && count.packets > 0
                    {
                        traffic.dropped.entry(reason).or_default().add(*count);
                    }
                }
                None => {}
            }
        }
        all
    }
}

/// The VM to which `TAP.something` belongs.
fn owner(name: &str) -> Option<Ipv4Addr> {
    address_of_tap(name.split_once('.')?.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const VM: Ipv4Addr = Ipv4Addr::new(10, 213, 0, 2);

    fn listing(handle: u32, packets: u32, base_rule: &str, own_rule: &str, map: &str) -> String {
        format!(
            r#"{{"nftables": [{{"metainfo": {{"version": "1.0.6"}}}},
            {{"table": {{"family": "bridge", "name": "dev_box", "handle": {handle}}}}},
            {{"counter": {{"family": "bridge", "name": "dbt0ad50002.sent", "packets": {packets}, "bytes": 60}}}},
            {{"counter": {{"family": "bridge", "name": "dbt0ad50002.received", "packets": 2, "bytes": 80}}}},
            {{"counter": {{"family": "inet", "name": "dbt0ad50002.connections", "packets": 3, "bytes": 80}}}},
            {{"counter": {{"family": "inet", "name": "dbt0ad50002.drop.port", "packets": {packets}, "bytes": 9}}}},
            {{"counter": {{"family": "bridge", "name": "dbt0ad50002.drop.port", "packets": 1, "bytes": 1}}}},
            {{"counter": {{"family": "bridge", "name": "dbt0ad50002.drop.host", "packets": 0, "bytes": 0}}}},
            {{"counter": {{"family": "bridge", "name": "dbt0ad50002.other", "packets": 4, "bytes": 0}}}},
            {{"counter": {{"family": "bridge", "name": "stranger", "packets": 4, "bytes": 0}}}},
            {{"map": {{"family": "bridge", "name": "from-guest", "handle": 9, "elem": [["{map}", {{"jump": 1}}]]}}}},
            {{"chain": {{"family": "bridge", "name": "prerouting", "handle": {handle}}}}},
            {{"chain": {{"family": "bridge", "name": "dbt0ad50002.out", "handle": {handle}}}}},
            {{"chain": {{"family": "bridge", "name": "dbt0ad50003.out", "handle": {handle}}}}},
            {{"rule": {{"family": "bridge", "chain": "prerouting", "handle": 4, "expr": "{base_rule}"}}}},
            {{"rule": {{"family": "bridge", "chain": "dbt0ad50003.out", "handle": 4, "expr": "{packets}"}}}},
            {{"rule": {{"family": "bridge", "chain": "dbt0ad50002.out", "handle": 4, "expr": "{own_rule}"}}}}]}}"#
        )
    }

    fn read(text: &str) -> Tables {
        let mut tables = Tables::default();
        tables.read(text).unwrap();
        tables
    }

    #[test]
    fn a_fingerprint_changes_with_the_rules_and_with_nothing_else() {
        let print = |text: &str| read(text).fingerprints().remove(&VM).unwrap();
        let first = print(&listing(1, 1, "a", "b", "dbt0ad50002"));
        assert_eq!(first, print(&listing(7, 99, "a", "b", "dbt0ad50002")), "handles, counts, another VM");
        assert_ne!(first, print(&listing(1, 1, "x", "b", "dbt0ad50002")), "a base rule");
        assert_ne!(first, print(&listing(1, 1, "a", "x", "dbt0ad50002")), "an own rule");
        assert_ne!(first, print(&listing(1, 1, "a", "b", "dbt0ad50003")), "the map's entry");
        assert!(first.to_string().starts_with("sha256:"));
        let addresses: Vec<_> = read(&listing(1, 1, "a", "b", "c")).fingerprints().into_keys().collect();
        assert_eq!(addresses, [VM, Ipv4Addr::new(10, 213, 0, 3)]);
    }

    #[test]
    fn a_dormant_table_is_not_the_same() {
        let awake = listing(1, 1, "a", "b", "dbt0ad50002");
        let table = r#""name": "dev_box", "handle": 1"#;
        assert!(awake.contains(table));
        // The second is what nft 1.0.6 says of a table that is dormant.
        let [asleep, by_its_name] = ["dormant", "dev_box"]
            .map(|flag| awake.replacen(table, &format!("{table}, \"flags\": \"{flag}\""), 1));
        let print = |text: &str| read(text).fingerprints().remove(&VM).unwrap();
        assert_ne!(print(&awake), print(&asleep));
        assert_ne!(print(&awake), print(&by_its_name));
    }

    #[test]
    fn what_is_listed_twice_is_read_once() {
        let once = listing(1, 5, "a", "b", "dbt0ad50002");
        let mut document: Value = serde_json::from_str(&once).unwrap();
        let items = document["nftables"].as_array_mut().unwrap();
        items.extend(items.clone());
        let (once, twice) = (read(&once), read(&document.to_string()));
        assert_eq!(once.fingerprints(), twice.fingerprints());
        assert_eq!(once.traffic(), twice.traffic());
    }

    #[test]
    fn owners_and_counts_are_read() {
        let tables = read(&listing(1, 5, "a", "b", "c"));
        let traffic = tables.traffic().remove(&VM).unwrap();
        assert_eq!((traffic.sent.packets, traffic.received.bytes, traffic.connections), (5, 80, 3));
        assert_eq!(traffic.dropped.len(), 1, "{traffic:?}");
        assert_eq!(traffic.dropped[&DropReason::Port], Count { packets: 6, bytes: 10 });
        assert_eq!(traffic.dropped_packets(), 6);
    }

    #[test]
    fn what_is_no_listing_is_refused() {
        for text in ["", "[]", "{}", r#"{"nftables": [1]}"#, r#"{"nftables": [{}]}"#] {
            assert!(matches!(Tables::default().read(text), Err(FirewallError::Listing(_))), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in ".{0,300}") {
            let _ = Tables::default().read(&text);
            let _ = Tables::default().read(&format!("{{\"nftables\": [{{\"rule\": \"{text}\"}}]}}"));
        }
    }
}
