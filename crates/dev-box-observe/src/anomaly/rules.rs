//! The rules: what honest work does not do. One [`VmRules`] a VM; thresholds with their reasons in [`RuleConfig`].
//!
//! Each rule is quiet for [`RuleConfig::quiet_ms`] after it found something, so that an attack is one finding a
//! minute and not one a packet; unless it gets so odd that more is done about it ([`VmRules::acting_from`]).

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
    /// Packets were dropped, by the counters: those that were reported one by one ([`Dropped`](Self::Dropped)), and
    /// those that were too many for that.
    DroppedPackets {
        /// How many since the last such observation.
        packets: u64,
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
        /// How long this covers; 0 where that is not known.
        span_ms: u64,
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
        /// What became of a sample of them.
        changes: Vec<ContentChange>,
    },
    /// Processes in the guest (the guest's claim).
    Processes {
        /// How long this covers; 0 where that is not known.
        span_ms: u64,
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

/// The contents of a file that was changed: entropies in bits a byte (0 to 8).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ContentChange {
    /// Before, where that is known.
    pub before: Option<f64>,
    /// Now; 0 of a file too short to say.
    pub after: f64,
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
    /// When each rule last found something, and how odd that was.
    last: [Option<(u64, f64)>; Rule::ALL.len()],
    /// The latest time seen.
    now_ms: u64,
    /// The score from which more is done about a finding than to write it down.
    act_from: f64,
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
            act_from: 0.0,
        }
    }

    /// The same, where more is done about findings from this score on
    /// ([`Plan::act_from_score`](super::Plan::act_from_score)): who has just crossed a threshold, which is written
    /// down and no more, is not free to do as he likes while the rule is quiet.
    #[must_use]
    pub fn acting_from(self, score: f64) -> Self {
        Self { act_from: score, ..self }
    }

    /// Takes an observation made at `at_ms` of a monotonic clock, and returns what it completes.
    pub fn observe(&mut self, at_ms: u64, observation: &Observation) -> Vec<Finding> {
        let now = at_ms.max(self.now_ms);
        self.now_ms = now;
        let mut hits = Hits(Vec::new());
        let config = &self.config;
        match observation {
            Observation::Dropped { .. }
            | Observation::DroppedPackets { .. }
            | Observation::Connected { .. }
            | Observation::Traffic { .. } => {
                self.network.observe(config, now, observation, &mut hits);
            }
            Observation::Query { name, nxdomain } => {
                self.dns.observe(config, now, name, *nxdomain, &mut hits);
            }
            _ => self.host.observe(config, now, observation, &mut hits),
        }
        let mut findings = Vec::new();
        // The worst first: of several hits of one rule it is the one to be told.
        hits.0.sort_by(|a, b| b.score.total_cmp(&a.score));
        for hit in hits.0 {
            let last =
                Rule::ALL.iter().position(|rule| *rule == hit.rule).and_then(|at| self.last.get_mut(at));
            let Some(last) = last else { continue };
            let quiet = |(at, score): (u64, f64)| {
                let more_is_done = score < self.act_from && hit.score >= self.act_from;
                now.saturating_sub(at) < self.config.quiet_ms && !more_is_done
            };
            if last.is_some_and(quiet) {
                continue;
            }
            *last = Some((now, hit.score));
            let evidence = match hit.rule {
                Rule::ForkRate | Rule::ClockJump | Rule::MemoryPressure => Evidence::Guest,
                _ => Evidence::Host,
            };
            findings.push(Finding { rule: hit.rule, score: hit.score, why: hit.why, evidence, at_ms: now });
        }
        findings
    }
}

/// How many different ones are told apart where `threshold` are odd: eight times as many, so that a score can say how
/// far beyond (up to 0.99), and no more than eight thousand, since each is looked through.
fn limit(threshold: usize) -> usize {
    threshold.saturating_mul(8).min(8192)
}

/// What part of an amount is a window's, of an observation that covers more time than that: what was seen late is not
/// all of now.
fn within(window_ms: u64, span_ms: u64, amount: u64) -> f64 {
    let amount = amount as f64;
    if span_ms > window_ms { amount * window_ms as f64 / span_ms as f64 } else { amount }
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
