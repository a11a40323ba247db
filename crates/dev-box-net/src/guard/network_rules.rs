//! Libvirt's own rules for its network: that what VMs send is forwarded, and leaves in the host's name. Libvirt makes them when it
//! starts the network, with iptables or with nftables, and does not look after them.
//!
//! ```text
//!   iptables: nat POSTROUTING -> LIBVIRT_PRT    filter FORWARD -> LIBVIRT_FWO, LIBVIRT_FWI
//!   nftables: table ip libvirt_network: guest_nat    forward -> guest_output, guest_input
//! ```
//!
//! They keep nobody in: that is the guard's, which also translates addresses where libvirt does not.

use std::collections::BTreeMap;

use serde_json::Value;

use super::FirewallError;
use super::filters::FilterRule;
use crate::network::NetworkShape;

/// The table that libvirt makes with nftables.
pub(super) const NFT_TABLE: [&str; 2] = ["ip", "libvirt_network"];

/// What of libvirt's rules for a network stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetworkRules {
    /// Whether what VMs send leaves in the host's name.
    pub nat: bool,
    /// Whether what VMs send, and the answers, are accepted to be forwarded.
    pub forward: bool,
    /// Whether what no rule accepts is forwarded (the policy of iptables' chain FORWARD): where it is not, nothing gets out
    /// without [`NetworkRules::forward`].
    pub forwards_the_rest: bool,
}

impl NetworkRules {
    /// As libvirt makes them.
    pub const WHOLE: Self = Self { nat: true, forward: true, forwards_the_rest: true };
    /// What is left of them after a flush.
    pub const GONE: Self = Self { nat: false, forward: false, forwards_the_rest: true };

    /// Whether all of them stand.
    pub fn is_whole(self) -> bool {
        self.nat && self.forward
    }

    /// Whether packets can get out: the guard translates addresses itself, but what another table drops is dropped.
    pub fn carries(self) -> bool {
        self.forward || self.forwards_the_rest
    }

    /// Reads both ways to have them: what `iptables-save` writes, and nft's listing of [`NFT_TABLE`], where there is one.
    pub(super) fn read(
        iptables: &str,
        nft: Option<&str>,
        shape: &NetworkShape,
    ) -> Result<Self, FirewallError> {
        let tables = Iptables::read(iptables);
        let nft = nft.map(NftTable::read).transpose()?.unwrap_or_default();
        Ok(Self {
            nat: tables.nat(shape) || nft.nat(shape),
            forward: tables.forward(shape) || nft.forward(shape),
            forwards_the_rest: tables.forwards_the_rest,
        })
    }
}

/// Rules by table and chain.
#[derive(Debug)]
struct Iptables<'a> {
    tables: BTreeMap<&'a str, BTreeMap<&'a str, Vec<FilterRule>>>,
    forwards_the_rest: bool,
}

impl<'a> Iptables<'a> {
    fn read(text: &'a str) -> Self {
        let mut all = Self { tables: BTreeMap::new(), forwards_the_rest: true };
        let mut table = "";
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('*') {
                table = name;
            } else if let Some(rule) = line.strip_prefix("-A ") {
                let (chain, rule) = rule.split_once(' ').unwrap_or((rule, ""));
                all.tables.entry(table).or_default().entry(chain).or_default().push(FilterRule::read(rule));
            } else if table == "filter" && line.starts_with(":FORWARD ") {
                all.forwards_the_rest = line.starts_with(":FORWARD ACCEPT");
            }
        }
        all
    }

    /// The rules of a chain, and of the chains that all its packets are led to.
    fn reached(&self, table: &str, base: &str) -> Vec<&FilterRule> {
        let of = |chain: &str| {
            let rules = self.tables.get(table).and_then(|chains| chains.get(chain));
            rules.map_or_else(Default::default, Vec::as_slice)
        };
        let led_to = of(base).iter().filter(|rule| rule.is_for_all()).flat_map(|rule| of(rule.target()));
        of(base).iter().chain(led_to).collect()
    }

    fn nat(&self, shape: &NetworkShape) -> bool {
        let subnet = shape.subnet().to_string();
        self.reached("nat", "POSTROUTING").into_iter().any(|rule| {
            ["MASQUERADE", "SNAT"].contains(&rule.target())
                && rule.has("-s", &subnet)
                && !rule.speaks_of("-p")
        })
    }

    fn forward(&self, shape: &NetworkShape) -> bool {
        let (subnet, bridge) = (shape.subnet().to_string(), shape.bridge());
        let accepts = |address, interface| {
            let accepts = |rule: &FilterRule| {
                rule.target() == "ACCEPT" && rule.has(address, &subnet) && rule.has(interface, bridge)
            };
            self.reached("filter", "FORWARD").into_iter().any(accepts)
        };
        accepts("-s", "-i") && accepts("-d", "-o")
    }
}

/// Of a table: each rule with its chain.
#[derive(Debug, Default)]
struct NftTable(Vec<(String, Vec<Value>)>);

impl NftTable {
    fn read(text: &str) -> Result<Self, FirewallError> {
        let document: Value =
            serde_json::from_str(text).map_err(|error| FirewallError::Listing(error.to_string()))?;
        let items = document.get("nftables").and_then(Value::as_array);
        let items = items.ok_or_else(|| FirewallError::Listing("no \"nftables\"".to_owned()))?;
        let rule = |item: &Value| {
            let rule = item.get("rule")?;
            Some((rule.get("chain")?.as_str()?.to_owned(), rule.get("expr")?.as_array()?.clone()))
        };
        Ok(Self(items.iter().filter_map(rule).collect()))
    }

    /// Whether a chain has a rule that does this, and for these packets.
    fn does(&self, chain: &str, verdict: &[&str], wanted: &[(&str, &str, &Value)]) -> bool {
        self.0.iter().filter(|(name, _)| name == chain).any(|(_, expressions)| {
            expressions
                .iter()
                .any(|expression| verdict.iter().any(|verdict| expression.get(verdict).is_some()))
                && wanted.iter().all(|(kind, field, value)| {
                    expressions.iter().any(|expression| {
                        let matched = expression.get("match");
                        let left = matched.and_then(|matched| matched.get("left")?.get(kind)?.as_object());
                        let is_it = left.is_some_and(|left| left.values().any(|name| name == field));
                        is_it && matched.and_then(|matched| matched.get("right")) == Some(value)
                    })
                })
                && !expressions.iter().any(of_one_protocol)
        })
    }

    fn leads(&self, to: &str) -> bool {
        let to = Value::from(to);
        self.0.iter().any(|(chain, expressions)| {
            chain == "forward"
                && expressions
                    .iter()
                    .any(|expression| expression.get("jump").and_then(|jump| jump.get("target")) == Some(&to))
        })
    }

    fn nat(&self, shape: &NetworkShape) -> bool {
        self.does("guest_nat", &["masquerade", "snat"], &[("payload", "saddr", &subnet(shape))])
    }

    fn forward(&self, shape: &NetworkShape) -> bool {
        let (subnet, bridge) = (subnet(shape), Value::from(shape.bridge()));
        let accepts = |chain, address, interface| {
            let wanted = [("payload", address, &subnet), ("meta", interface, &bridge)];
            self.leads(chain) && self.does(chain, &["accept"], &wanted)
        };
        accepts("guest_output", "saddr", "iif") && accepts("guest_input", "daddr", "oif")
    }
}

fn of_one_protocol(expression: &Value) -> bool {
    let left = expression.get("match").and_then(|matched| matched.get("left")?.get("meta")?.get("key"));
    left.is_some_and(|key| key == "l4proto")
}

/// As nft writes it.
fn subnet(shape: &NetworkShape) -> Value {
    let net = shape.subnet().range();
    serde_json::json!({ "prefix": { "addr": net.addr().to_string(), "len": net.prefix_len() } })
}

#[cfg(test)]
mod tests;
