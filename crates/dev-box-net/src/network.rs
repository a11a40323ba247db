//! The shape of a network of VMs: name, bridge, subnet; everything else follows from these.

use std::fmt;
use std::net::Ipv4Addr;

use dev_box_core::spec::MacAddress;
use ipnet::Ipv6Net;

use crate::identity::{TAP_PREFIX, ipv6_of, mac_of};
use crate::subnet::Subnet;
use crate::vm_network::Ipv6Lease;

/// A libvirt network of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkShape {
    name: String,
    bridge: String,
    subnet: Subnet,
    ipv6: bool,
}

/// A name that a network or a bridge cannot have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{name}\" cannot name a {what}: {rule}")]
pub struct InvalidName {
    what: &'static str,
    name: String,
    rule: &'static str,
}

impl NetworkShape {
    /// Checks the names: `name` 1 to 32 of `a-z 0-9 -`, `bridge` 1 to 15 of the same and no tap's name.
    ///
    /// # Errors
    /// [`InvalidName`].
    pub fn new(name: &str, bridge: &str, subnet: Subnet) -> Result<Self, InvalidName> {
        check("network", name, 32, "use 1 to 32 of a-z, 0-9 and -, starting with a letter")?;
        check("bridge", bridge, 15, "use 1 to 15 of a-z, 0-9 and -, starting with a letter")?;
        if bridge.starts_with(TAP_PREFIX) {
            let rule = "names of taps begin like that";
            return Err(InvalidName { what: "bridge", name: bridge.to_owned(), rule });
        }
        Ok(Self { name: name.to_owned(), bridge: bridge.to_owned(), subnet, ipv6: false })
    }

    /// The same, with IPv6.
    #[must_use]
    pub fn with_ipv6(self) -> Self {
        Self { ipv6: true, ..self }
    }

    /// The bridge's IPv6 address and the length of the range's prefix, where the network has IPv6.
    pub fn gateway6(&self) -> Option<Ipv6Net> {
        self.ipv6.then(|| self.subnet.gateway6())
    }

    /// The IPv6 address that goes with an IPv4 address of the network, where it has IPv6.
    pub fn ipv6_of(&self, address: Ipv4Addr) -> Option<Ipv6Lease> {
        let gateway = self.gateway6()?;
        Some(Ipv6Lease { address: ipv6_of(address), prefix: gateway.prefix_len(), gateway: gateway.addr() })
    }

    /// libvirt's name for it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The bridge's interface name.
    pub fn bridge(&self) -> &str {
        &self.bridge
    }

    /// The VMs' subnet.
    pub fn subnet(&self) -> Subnet {
        self.subnet
    }

    /// The bridge's address, where the resolver answers.
    pub fn gateway(&self) -> Ipv4Addr {
        self.subnet.gateway()
    }

    /// The bridge's Ethernet address.
    pub fn gateway_mac(&self) -> MacAddress {
        mac_of(self.gateway())
    }
}

impl fmt::Display for NetworkShape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, bridge, subnet, .. } = self;
        match self.gateway6() {
            Some(gateway) => write!(f, "{name} (bridge {bridge}, {subnet}, {})", gateway.trunc()),
            None => write!(f, "{name} (bridge {bridge}, {subnet})"),
        }
    }
}

fn check(what: &'static str, name: &str, max: usize, rule: &'static str) -> Result<(), InvalidName> {
    let characters =
        name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    let first = name.bytes().next().is_some_and(|byte| byte.is_ascii_lowercase());
    if characters && first && name.len() <= max {
        return Ok(());
    }
    Err(InvalidName { what, name: name.chars().take(64).collect(), rule })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        let subnet: Subnet = "10.213.0.0/24".parse().unwrap();
        let shape = NetworkShape::new("dev-box", "devbox0", subnet).unwrap();
        assert_eq!(shape.to_string(), "dev-box (bridge devbox0, 10.213.0.0/24)");
        assert_eq!(shape.gateway_mac().to_string(), "02:db:0a:d5:00:01");
        let address = "10.213.0.7".parse().unwrap();
        assert_eq!((shape.gateway6(), shape.ipv6_of(address)), (None, None));
        let shape = shape.with_ipv6();
        assert_eq!(shape.to_string(), "dev-box (bridge devbox0, 10.213.0.0/24, fddb::ad5:0/120)");
        let lease = shape.ipv6_of(address).unwrap();
        assert_eq!((lease.address.to_string().as_str(), lease.prefix), ("fddb::ad5:7", 120));
        assert_eq!(lease.gateway.to_string(), "fddb::ad5:1");
        for (name, bridge, part) in [
            ("", "devbox0", "cannot name a network"),
            ("a'b", "devbox0", "cannot name a network"),
            ("dev-box", "0box", "cannot name a bridge"),
            ("dev-box", "a-bridge-too-long", "cannot name a bridge"),
            ("dev-box", "dbt0", "names of taps"),
        ] {
            let error = NetworkShape::new(name, bridge, subnet).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
