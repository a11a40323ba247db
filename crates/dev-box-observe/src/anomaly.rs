//! Odd behaviour, found in what the host sees: pure, streaming, constant memory.
//!
//! ```text
//!  Observation ─> VmWatch: VmRules, ──> Finding {rule, score, why} ──> Plan ──> Responder (pause, kill, ...)
//!                 Baseline, Joint                                       └──> AuditSink, before and after
//!  numbers ─> SeriesDetector: RobustZ, Seasonal ──> score, and why; Change beside it, for levels
//! ```
//!
//! But for the [`Observer`], which is the task around all this, nothing here reads a clock or does IO: the caller gives the time of every observation in milliseconds of a
//! monotonic clock, so that a test replays hours in microseconds. Time that goes backwards is taken as standing
//! still. What the guest alone claims is marked so in the finding.
//!
//! A score is 0 to 1, and 0.5 is exactly the threshold, for rules and detectors alike.

mod baseline;
mod change;
mod joint;
pub mod nab;
mod observer;
mod respond;
mod robust;
mod rules;
mod seasonal;
mod series;
mod watch;
mod window;
#[cfg(any(test, feature = "testing"))]
pub mod workload;

pub use baseline::{Baseline, BaselineStore};
pub use change::Change;
pub use joint::Joint;
pub use observer::{Observer, ObserverSettings, VmFinding};
#[cfg(any(test, feature = "testing"))]
pub use respond::RecordingResponder;
pub use respond::{Plan, RespondError, RespondFuture, Responder, respond};
pub use robust::RobustZ;
pub use rules::{ContentChange, Observation, RuleConfig, RuleConfigError, VmRules};
pub use seasonal::Seasonal;
pub use series::SeriesDetector;
pub use watch::VmWatch;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::audit::{AuditEvent, Evidence, Text};

/// What can be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Rule {
    /// The address of a cloud's instance metadata was contacted.
    MetadataContact,
    /// A private, link-local or otherwise not public address was contacted.
    PrivateContact,
    /// Many different destinations were tried and dropped.
    PortScan,
    /// Many different destinations were reached.
    FanOut,
    /// Data goes out in the names of look-ups.
    DnsTunnel,
    /// One destination is contacted at regular intervals.
    Beaconing,
    /// Much was sent.
    EgressVolume,
    /// The processor is busy for minutes with little IO and a thin steady flow.
    Mining,
    /// Many files were changed, into something that looks encrypted.
    MassChange,
    /// Processes multiply.
    ForkRate,
    /// Memory is short.
    MemoryPressure,
    /// Output comes faster than anyone reads.
    OutputFlood,
    /// The guest's clock jumped.
    ClockJump,
    /// A number is far from what it was.
    Statistical,
}

impl Rule {
    /// Every rule.
    pub const ALL: [Self; 14] = [
        Self::MetadataContact,
        Self::PrivateContact,
        Self::PortScan,
        Self::FanOut,
        Self::DnsTunnel,
        Self::Beaconing,
        Self::EgressVolume,
        Self::Mining,
        Self::MassChange,
        Self::ForkRate,
        Self::MemoryPressure,
        Self::OutputFlood,
        Self::ClockJump,
        Self::Statistical,
    ];

    /// The name in records, metrics and the configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::MetadataContact => "metadata_contact",
            Self::PrivateContact => "private_contact",
            Self::PortScan => "port_scan",
            Self::FanOut => "fan_out",
            Self::DnsTunnel => "dns_tunnel",
            Self::Beaconing => "beaconing",
            Self::EgressVolume => "egress_volume",
            Self::Mining => "mining",
            Self::MassChange => "mass_change",
            Self::ForkRate => "fork_rate",
            Self::MemoryPressure => "memory_pressure",
            Self::OutputFlood => "output_flood",
            Self::ClockJump => "clock_jump",
            Self::Statistical => "statistical",
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Something odd.
#[derive(Debug, Clone, PartialEq)]
pub struct Finding {
    /// What found it.
    pub rule: Rule,
    /// How odd, 0 to 1; 0.5 is the threshold.
    pub score: f64,
    /// Why, for a person.
    pub why: String,
    /// Whether the host saw it or the guest claims it.
    pub evidence: Evidence,
    /// When, in milliseconds of the caller's monotonic clock.
    pub at_ms: u64,
}

impl Finding {
    /// As an audit event.
    #[must_use]
    pub fn event(&self) -> AuditEvent {
        AuditEvent::Finding {
            rule: Text::new(self.rule.name()),
            score: self.score,
            why: Text::new(&self.why),
        }
    }
}

/// How odd a number is, and why.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Score {
    /// 0 to 1; 0.5 is the threshold.
    pub score: f64,
    /// How far off, in standard deviations or what stands for them.
    pub deviation: f64,
    /// Why; displayed for a person.
    pub why: Why,
}

/// What a score was made from. Put into words only when somebody reads it: most scores say that all is well.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Why {
    /// Far from the middle of the latest numbers.
    FromMedian {
        /// The number.
        number: f64,
        /// The median.
        median: f64,
        /// How far off, in robust deviations.
        deviation: f64,
    },
    /// Far from the usual.
    FromMean {
        /// The number.
        number: f64,
        /// The mean.
        mean: f64,
        /// How far off, in standard deviations.
        deviation: f64,
        /// Whether that is the mean of the slot of the season, or of the whole series.
        of_slot: bool,
    },
    /// A level that moved.
    Moved {
        /// The level before.
        from: f64,
        /// The sum of deviations, negative downwards.
        sum: f64,
    },
    /// A combination that is not usual.
    Together {
        /// How unusual, in normal deviations.
        deviation: f64,
        /// The number that is furthest off.
        name: &'static str,
        /// By how many of its own deviations.
        by: f64,
    },
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FromMedian { number, median, deviation } => {
                write!(f, "{number:.6} is {deviation:+.1} robust deviations from the median {median:.6}")
            }
            Self::FromMean { number, mean, deviation, of_slot } => {
                let place = if *of_slot { "its slot" } else { "the series" };
                write!(f, "{number:.6} is {deviation:+.1} deviations from the mean {mean:.6} of {place}")
            }
            Self::Moved { from, sum } => {
                let direction = if *sum < 0.0 { "down" } else { "up" };
                write!(f, "the level moved {direction} from {from:.6} (sum of deviations {:.1})", sum.abs())
            }
            Self::Together { deviation, name, by } => {
                write!(f, "together {deviation:+.1} deviations from usual; most of all {name} ({by:+.1})")
            }
        }
    }
}

impl Score {
    /// Whether it reaches the threshold.
    #[must_use]
    pub fn is_odd(&self) -> bool {
        self.score >= 0.5
    }

    /// As a finding of [`Rule::Statistical`] about the series `name`.
    #[must_use]
    pub fn finding(&self, name: &str, at_ms: u64) -> Finding {
        let why = format!("{name}: {}", self.why);
        Finding { rule: Rule::Statistical, score: self.score, why, evidence: Evidence::Host, at_ms }
    }
}

/// Maps a size to 0..1 with `threshold` at 0.5: it halves the distance to 1 with each further threshold.
pub(crate) fn score_of(size: f64, threshold: f64) -> f64 {
    if !size.is_finite() || threshold <= 0.0 {
        return if size > 0.0 { 1.0 } else { 0.0 };
    }
    (1.0 - (-size.max(0.0) / threshold).exp2()).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rules_have_their_names_everywhere() {
        let known = crate::metrics::FINDINGS.description.labels[0].values;
        assert_eq!(Rule::ALL.map(Rule::name).as_slice(), known);
        for rule in Rule::ALL {
            assert_eq!(serde_json::to_value(rule).unwrap(), rule.name());
            assert_eq!(rule.to_string(), rule.name());
        }
    }

    #[test]
    fn reasons_are_words() {
        let score = Score { score: 0.9, deviation: 5.0, why: Why::Moved { from: 1.0, sum: -9.0 } };
        let finding = score.finding("vm-1 cpu", 7);
        assert_eq!(finding.why, "vm-1 cpu: the level moved down from 1.000000 (sum of deviations 9.0)");
        assert_eq!((finding.rule, finding.at_ms), (Rule::Statistical, 7));
        let far = Why::FromMedian { number: 9.0, median: 1.0, deviation: 8.0 };
        assert_eq!(far.to_string(), "9.000000 is +8.0 robust deviations from the median 1.000000");
    }

    #[test]
    fn the_threshold_is_a_half() {
        assert!((score_of(3.0, 3.0) - 0.5).abs() < 1e-12);
        assert_eq!(score_of(f64::INFINITY, 3.0), 1.0);
        assert_eq!(score_of(f64::NAN, 3.0), 0.0);
        assert_eq!(score_of(1.0, 0.0), 1.0);
    }

    proptest! {
        #[test]
        fn scores_are_bounded_and_grow(a in 0.0..1e12_f64, b in 0.0..1e12_f64, threshold in 1e-3..1e9_f64) {
            let (low, high) = (a.min(b), a.max(b));
            prop_assert!(score_of(low, threshold) <= score_of(high, threshold));
            prop_assert!((0.0..=1.0).contains(&score_of(high, threshold)));
        }
    }
}
