//! The rules: what honest work does not do. One [`VmRules`] a VM; thresholds with their reasons in [`RuleConfig`].
//!
//! Each rule is quiet for [`RuleConfig::quiet_ms`] after it found something, so that an attack is one finding a
//! minute and not one a packet.

mod config;
mod dns;
mod host;
mod network;
#[cfg(test)]
mod tests;

pub use config::{RuleConfig, RuleConfigError};

use std::net::IpAddr;

use super::{Finding, Rule, score_of};
use crate::audit::Evidence;

/// Something the host saw of a VM, or that its agent claims.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Observation {
    /// A packet was dropped.
    Dropped {
        /// Where it was to go.
        address: IpAddr,
        /// Its port, where the protocol has ports.
        port: Option<u16>,
    },
    /// A connection was let through.
    Connected {
        /// Where to.
        address: IpAddr,
        /// Its port.
        port: Option<u16>,
    },
    /// Bytes crossed the VM's interface since the last such observation.
    Traffic {
        /// Out of the VM.
        sent_bytes: u64,
        /// Into the VM.
        received_bytes: u64,
    },
    /// A name was looked up.
    Query {
        /// The name, as asked for.
        name: String,
        /// Whether the answer was that there is no such name.
        nxdomain: bool,
    },
    /// How the VM used the machine over the last `span_ms`.
    Usage {
        /// How long this covers.
        span_ms: u64,
        /// Mean use of its virtual CPUs, 0 to 1.
        cpu: f64,
        /// Bytes its disks read and wrote.
        disk_bytes: u64,
        /// Bytes over its interface, both ways.
        net_bytes: u64,
    },
    /// Memory (the guest's claim: from outside, memory that caches fill looks like memory that is short).
    Memory {
        /// How long this covers.
        span_ms: u64,
        /// What part is free to be used, 0 to 1.
        available: f64,
    },
    /// Existing files in the workspace share were changed.
    FilesChanged {
        /// How many.
        count: u64,
        /// The entropy of the new contents of a sample of them, in bits a byte (0 to 8); 0 of one too short to say.
        entropies: Vec<f64>,
    },
    /// Processes in the guest (the guest's claim).
    Processes {
        /// Started since the last such observation.
        started: u64,
        /// Running now.
        running: u64,
    },
    /// Output arrived from a job.
    Output {
        /// How much.
        bytes: u64,
    },
    /// What the guest's clock says, less the host's (the guest's claim).
    ClockOffset {
        /// In milliseconds.
        offset_ms: i64,
    },
}

/// The rules over one VM. Memory is bounded by the configuration's limits, whatever the guest does.
///
/// # Examples
/// ```
/// use dev_box_observe::anomaly::{Observation, Rule, RuleConfig, VmRules};
/// let mut rules = VmRules::new(RuleConfig::default());
/// let dropped = Observation::Dropped { address: "169.254.169.254".parse()?, port: Some(80) };
/// let findings = rules.observe(1000, &dropped);
/// assert_eq!(findings[0].rule, Rule::MetadataContact);
/// # Ok::<_, std::net::AddrParseError>(())
/// ```
#[derive(Debug, Clone)]
pub struct VmRules {
    config: RuleConfig,
    network: network::NetworkRules,
    dns: dns::DnsRules,
    host: host::HostRules,
    /// When each rule last found something.
    last: [Option<u64>; Rule::ALL.len()],
    /// The latest time seen.
    now_ms: u64,
}

impl VmRules {
    /// Rules for a new VM. A configuration that [`RuleConfig::validate`] refuses still does no harm: a threshold of
    /// zero finds everything.
    #[must_use]
    pub fn new(config: RuleConfig) -> Self {
        Self {
            network: network::NetworkRules::new(&config),
            dns: dns::DnsRules::new(&config),
            host: host::HostRules::new(&config),
            config,
            last: [None; Rule::ALL.len()],
            now_ms: 0,
        }
    }

    /// Takes an observation made at `at_ms` of a monotonic clock, and returns what it completes.
    pub fn observe(&mut self, at_ms: u64, observation: &Observation) -> Vec<Finding> {
        let now = at_ms.max(self.now_ms);
        self.now_ms = now;
        let mut hits = Hits(Vec::new());
        let config = &self.config;
        match observation {
            Observation::Dropped { .. } | Observation::Connected { .. } | Observation::Traffic { .. } => {
                self.network.observe(config, now, observation, &mut hits);
            }
            Observation::Query { name, nxdomain } => {
                self.dns.observe(config, now, name, *nxdomain, &mut hits);
            }
            _ => self.host.observe(config, now, observation, &mut hits),
        }
        let mut findings = Vec::new();
        for hit in hits.0 {
            let last =
                Rule::ALL.iter().position(|rule| *rule == hit.rule).and_then(|at| self.last.get_mut(at));
            let Some(last) = last else { continue };
            if last.is_some_and(|last| now.saturating_sub(last) < self.config.quiet_ms) {
                continue;
            }
            *last = Some(now);
            let evidence = match hit.rule {
                Rule::ForkRate | Rule::ClockJump | Rule::MemoryPressure => Evidence::Guest,
                _ => Evidence::Host,
            };
            findings.push(Finding { rule: hit.rule, score: hit.score, why: hit.why, evidence, at_ms: now });
        }
        findings
    }
}

struct Hit {
    rule: Rule,
    score: f64,
    why: String,
}

/// Collects what the rules find, before quiet times are looked at.
struct Hits(Vec<Hit>);

impl Hits {
    fn certain(&mut self, rule: Rule, why: String) {
        self.0.push(Hit { rule, score: 1.0, why });
    }

    /// A hit when `size` reaches `threshold`.
    fn over(&mut self, rule: Rule, size: f64, threshold: f64, why: impl FnOnce() -> String) {
        if size >= threshold {
            self.0.push(Hit { rule, score: score_of(size, threshold).max(0.5), why: why() });
        }
    }
}
