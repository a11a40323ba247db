//! The written form of a policy, as serde sees it.

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

use super::{CustomPolicy, Destinations, EgressPolicy, Limits};

/// A policy as written, not yet validated; becomes an [`EgressPolicy`] by `try_from`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct PolicyDocument {
    /// `nat-filtered`, `isolated` or `custom`. The fields below are for `custom` only.
    pub mode: String,
    /// `public` or `listed`. Without it: `listed` when `allow` or `domains` has a rule, otherwise `public`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destinations: Option<Destinations>,
    /// Whether IPv6 is enabled, with the same classes; the network must have it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ipv6: bool,
    /// Ports, as `tcp/443` or `udp/8000-8100`. Without it: those of `nat-filtered`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<Vec<String>>,
    /// CIDRs that may be reached.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<String>,
    /// CIDRs that may not be reached, whatever else allows them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deny: Vec<String>,
    /// Names that may be reached: `github.com`, `*.crates.io`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub domains: Vec<String>,
    /// Limits; what is left out has its default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<LimitsDocument>,
}

/// [`Limits`] as written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct LimitsDocument {
    /// Connections open at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connections: Option<NonZeroU32>,
    /// New connections and DNS queries a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_connections_per_second: Option<NonZeroU32>,
    /// Bytes a second the VM may send.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress_bytes_per_second: Option<NonZeroU32>,
}

pub(super) const NAT_FILTERED: &str = "nat-filtered";
pub(super) const ISOLATED: &str = "isolated";
pub(super) const CUSTOM: &str = "custom";

impl LimitsDocument {
    pub(super) fn limits(self) -> Limits {
        Limits {
            connections: self.connections.unwrap_or(Limits::DEFAULT.connections),
            new_connections_per_second: self
                .new_connections_per_second
                .unwrap_or(Limits::DEFAULT.new_connections_per_second),
            egress_bytes_per_second: self.egress_bytes_per_second,
        }
    }
}

impl From<EgressPolicy> for PolicyDocument {
    fn from(policy: EgressPolicy) -> Self {
        match policy {
            EgressPolicy::NatFiltered => Self { mode: NAT_FILTERED.to_owned(), ..Self::default() },
            EgressPolicy::Isolated => Self { mode: ISOLATED.to_owned(), ..Self::default() },
            EgressPolicy::Custom(custom) => Self::from(*custom),
        }
    }
}

impl From<CustomPolicy> for PolicyDocument {
    fn from(custom: CustomPolicy) -> Self {
        fn texts<T: ToString>(rules: &[T]) -> Vec<String> {
            rules.iter().map(T::to_string).collect()
        }
        Self {
            mode: CUSTOM.to_owned(),
            destinations: Some(custom.destinations),
            ipv6: custom.ipv6,
            ports: Some(texts(&custom.ports)),
            allow: texts(&custom.allow),
            deny: texts(&custom.deny),
            domains: texts(&custom.domains),
            limits: Some(LimitsDocument {
                connections: Some(custom.limits.connections),
                new_connections_per_second: Some(custom.limits.new_connections_per_second),
                egress_bytes_per_second: custom.limits.egress_bytes_per_second,
            }),
        }
    }
}
