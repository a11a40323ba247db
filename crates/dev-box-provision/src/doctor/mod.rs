//! `doctor`: what this host really offers, and what really guards a running VM; no more than was seen.
//!
//! ```text
//! host  --probe-->  HostFacts  --evaluate-->  [Check]
//! ```
//! Gathering ([`HostFacts::gather`]) touches the system and judges nothing; judging ([`evaluate`]) is pure.

mod apparmor;
mod facts;
mod firewall;
mod host;
mod layers;

use serde::Serialize;

pub use apparmor::{AppArmor, apparmor_fragment};
pub use facts::{Cgroups, HostFacts, LibvirtFacts};
pub use firewall::NetworkFirewall;
pub use host::evaluate;
pub use layers::{LayerError, LayerFacts, evaluate_layers};

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// dev-box works, but weaker or slower than it could.
    Warn,
    /// dev-box does not work, or does not keep a promise.
    Fail,
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// A stable name for programs, such as `accelerator`.
    pub id: &'static str,
    /// How it came out.
    pub status: Status,
    /// What was seen.
    pub detail: String,
    /// What to do about it, unless all is well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

impl Check {
    fn ok(id: &'static str, detail: impl Into<String>) -> Self {
        Self { id, status: Status::Ok, detail: detail.into(), fix: None }
    }

    fn warn(id: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { id, status: Status::Warn, detail: detail.into(), fix: Some(fix.into()) }
    }

    fn fail(id: &'static str, detail: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { id, status: Status::Fail, detail: detail.into(), fix: Some(fix.into()) }
    }
}

/// Whether nothing failed.
pub fn passed(checks: &[Check]) -> bool {
    checks.iter().all(|check| check.status != Status::Fail)
}
