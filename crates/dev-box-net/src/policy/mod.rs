//! What a VM may reach: [`EgressPolicy`], its TOML form, its limits and its digest.
//!
//! A policy says nothing of how it is enforced; [`crate::guard`] and [`crate::xml::nwfilter`] do that.

mod class;
mod document;
mod domain;
mod port;
pub mod store;
mod validate;

use std::fmt;
use std::num::NonZeroU32;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use class::{AddressClass, Overridable};
pub(crate) use class::{METADATA, special_ranges};
pub use document::{LimitsDocument, PolicyDocument};
pub use domain::{DomainPattern, InvalidDomain};
pub use port::{InvalidPort, PortRule, Protocol};
pub use store::{BROUGHT, PolicyStore, PolicyStoreError};
pub use validate::{
    ListName, MAX_CIDRS, MAX_DOCUMENT_BYTES, MAX_DOMAINS, MAX_PORTS, PolicyError, PolicyProblem,
};

/// Where a VM's packets may go.
///
/// Whatever the policy, a VM reaches neither the host (at any of its addresses), nor another VM, nor the gateway
/// except its resolver, and nothing can open a connection to it. By IPv6 it reaches nothing unless a custom policy enables that;
/// then the same is open and closed as by IPv4.
///
/// ```
/// use dev_box_net::EgressPolicy;
/// let policy = EgressPolicy::from_toml(r#"
///     mode = "custom"
///     ports = ["tcp/443", "udp/443"]
///     deny = ["8.8.8.0/24"]
///     [limits]
///     connections = 64
/// "#)?;
/// assert_ne!(policy.digest(), EgressPolicy::default().digest());
/// # Ok::<(), dev_box_net::PolicyError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "PolicyDocument", into = "PolicyDocument")]
pub enum EgressPolicy {
    /// DNS at the gateway, and TCP 80, 443, 22 and 9418 to public addresses. The default.
    #[default]
    NatFiltered,
    /// No network interface at all.
    Isolated,
    /// Ports, addresses and limits of the user's choice. Boxed: it is many times the others' size.
    Custom(Box<CustomPolicy>),
}

/// A validated custom policy; made from a [`PolicyDocument`] or from TOML.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CustomPolicy {
    pub(crate) destinations: Destinations,
    pub(crate) ipv6: bool,
    pub(crate) ports: Vec<PortRule>,
    pub(crate) allow: Vec<IpNet>,
    pub(crate) deny: Vec<IpNet>,
    pub(crate) domains: Vec<DomainPattern>,
    pub(crate) limits: Limits,
}

impl CustomPolicy {
    /// Whether all public addresses, or only listed ones, may be reached.
    pub fn destinations(&self) -> Destinations {
        self.destinations
    }

    /// Whether IPv6 is enabled.
    pub fn ipv6(&self) -> bool {
        self.ipv6
    }

    /// Ports that may be reached at every allowed address; sorted, disjoint.
    pub fn ports(&self) -> &[PortRule] {
        &self.ports
    }

    /// Ranges that may be reached beyond (or instead of) the public ones; sorted, disjoint.
    pub fn allow(&self) -> &[IpNet] {
        &self.allow
    }

    /// Ranges that may not be reached although another rule would allow them; sorted, disjoint.
    pub fn deny(&self) -> &[IpNet] {
        &self.deny
    }

    /// Names whose addresses may be reached; sorted.
    pub fn domains(&self) -> &[DomainPattern] {
        &self.domains
    }
}

/// Which addresses are open, given an allowed port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Destinations {
    /// Every public address, and what `allow` adds.
    Public,
    /// Only what `allow` and `domains` name.
    Listed,
}

/// What bounds a VM's use of the host's network; each is enforced on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections open at once (entries of the host's connection tracking table).
    pub connections: NonZeroU32,
    /// New connections and DNS queries a second; twice as many may come in one burst.
    pub new_connections_per_second: NonZeroU32,
    /// Bytes a second the VM may send; what exceeds it is dropped. `None`: as fast as it goes.
    pub egress_bytes_per_second: Option<NonZeroU32>,
}

impl Limits {
    /// What holds unless a policy says otherwise: enough for any build, too little to fill the host's tables.
    pub const DEFAULT: Self = Self {
        connections: NonZeroU32::MIN.saturating_add(4095),
        new_connections_per_second: NonZeroU32::MIN.saturating_add(999),
        egress_bytes_per_second: None,
    };
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl EgressPolicy {
    /// Reads a policy from TOML.
    ///
    /// # Errors
    /// [`PolicyError`], naming the line and the field: malformed TOML, an unknown field, a rule that is malformed,
    /// doubled, without effect, or reaches what no policy may reach, and more rules than [`MAX_CIDRS`] and its like.
    pub fn from_toml(text: &str) -> Result<Self, PolicyError> {
        validate::from_toml(text)
    }

    /// The policy as TOML, rules sorted, defaults written out.
    pub fn to_toml(&self) -> String {
        // A document is plain strings and numbers, so that writing it cannot fail.
        toml::to_string(&PolicyDocument::from(self.clone())).unwrap_or_default()
    }

    /// Whether VMs under this policy have no interface.
    pub fn is_isolated(&self) -> bool {
        matches!(self, Self::Isolated)
    }

    /// The limits that hold under this policy.
    pub fn limits(&self) -> Limits {
        match self {
            Self::Custom(custom) => custom.limits,
            Self::NatFiltered | Self::Isolated => Limits::DEFAULT,
        }
    }

    /// Names that this policy lets a VM reach; empty unless it is custom.
    pub fn domains(&self) -> &[DomainPattern] {
        match self {
            Self::Custom(custom) => &custom.domains,
            Self::NatFiltered | Self::Isolated => &[],
        }
    }

    /// What the resolver of a VM's own goes by.
    pub(crate) fn names(&self) -> (&[DomainPattern], bool) {
        (self.domains(), self.ipv6())
    }

    /// A digest of what the policy means: equal for policies that differ only in the order of their rules or in
    /// whether defaults are written out, and stable from version to version, so that it can be put on record.
    pub fn digest(&self) -> PolicyDigest {
        let document = PolicyDocument::from(self.clone());
        let mut hasher = Sha256::new();
        hasher.update(b"dev-box egress policy 1\n");
        // Field order is the struct's, lists are sorted: the text is canonical.
        hasher.update(serde_json::to_vec(&document).unwrap_or_default());
        PolicyDigest(hasher.finalize().into())
    }

    /// The ports open at allowed addresses, sorted and disjoint.
    pub fn ports(&self) -> &[PortRule] {
        match self {
            Self::NatFiltered => &port::NAT_FILTERED,
            Self::Isolated => &[],
            Self::Custom(custom) => &custom.ports,
        }
    }

    /// Whether IPv6 is enabled: only where a custom policy says so.
    pub fn ipv6(&self) -> bool {
        matches!(self, Self::Custom(custom) if custom.ipv6)
    }

    pub(crate) fn destinations(&self) -> Destinations {
        match self {
            Self::NatFiltered => Destinations::Public,
            Self::Isolated => Destinations::Listed,
            Self::Custom(custom) => custom.destinations,
        }
    }

    pub(crate) fn allow(&self) -> &[IpNet] {
        match self {
            Self::Custom(custom) => &custom.allow,
            Self::NatFiltered | Self::Isolated => &[],
        }
    }

    pub(crate) fn deny(&self) -> &[IpNet] {
        match self {
            Self::Custom(custom) => &custom.deny,
            Self::NatFiltered | Self::Isolated => &[],
        }
    }
}

/// SHA-256 of a policy's meaning; shown as `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PolicyDigest([u8; 32]);

impl fmt::Display for PolicyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", hex::encode(self.0))
    }
}

impl fmt::Debug for PolicyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PolicyDigest({self})")
    }
}

#[cfg(test)]
mod tests;
