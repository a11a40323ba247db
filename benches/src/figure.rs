//! One figure: the distribution of a number of samples.

use std::fmt;

use serde::Serialize;

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) enum Unit {
    /// Time of one operation: smaller is better.
    #[serde(rename = "ns")]
    Nanoseconds,
    /// Time of one operation: smaller is better.
    #[serde(rename = "ms")]
    Milliseconds,
    /// Throughput in 2^20 bytes a second: larger is better, and the percentiles are those of the slow side.
    #[serde(rename = "MiB/s")]
    MebibytesPerSecond,
    /// Operations a second: larger is better, as above, and the percentiles are those of the slow side.
    #[serde(rename = "1/s")]
    PerSecond,
    /// Memory in 2^20 bytes: smaller is better.
    #[serde(rename = "MiB")]
    Mebibytes,
    /// How many: smaller is better.
    #[serde(rename = "count")]
    Count,
    /// Of a hundred: smaller is better.
    #[serde(rename = "%")]
    Percent,
}

impl Unit {
    fn as_str(self) -> &'static str {
        match self {
            Self::Nanoseconds => "ns",
            Self::Milliseconds => "ms",
            Self::MebibytesPerSecond => "MiB/s",
            Self::PerSecond => "1/s",
            Self::Mebibytes => "MiB",
            Self::Count => "",
            Self::Percent => "%",
        }
    }
}

/// The percentiles of `n` samples (nearest rank).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Figure {
    /// Which one, such as `codec.encode.64k`.
    pub(crate) name: String,
    pub(crate) unit: Unit,
    /// How many samples.
    pub(crate) n: usize,
    pub(crate) p50: f64,
    pub(crate) p95: f64,
    pub(crate) p99: f64,
}

impl Figure {
    /// The figure of these samples; zeros when there is none.
    pub(crate) fn of(name: impl Into<String>, unit: Unit, mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        if matches!(unit, Unit::MebibytesPerSecond | Unit::PerSecond) {
            // The 95th percentile is what 95 % of the samples reach, so that it is the bad end for every unit.
            samples.reverse();
        }
        Self {
            name: name.into(),
            unit,
            n: samples.len(),
            p50: rank(&samples, 50),
            p95: rank(&samples, 95),
            p99: rank(&samples, 99),
        }
    }
}

/// The nearest rank: the smallest sample that at least `percent` % of all do not exceed.
fn rank(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(0.0)
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = self.unit.as_str();
        let digits = if self.p50 < 100.0 { 2 } else { 0 };
        write!(f, "{:<24} p50 {:>10.digits$} {unit}", self.name, self.p50)?;
        write!(f, "  p95 {:>10.digits$}  p99 {:>10.digits$}  n {}", self.p95, self.p99, self.n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let figure = Figure::of("x", Unit::Nanoseconds, (1..=100).rev().map(f64::from).collect());
        assert_eq!((figure.n, figure.p50, figure.p95, figure.p99), (100, 50.0, 95.0, 99.0));
        let one = Figure::of("x", Unit::Milliseconds, vec![7.0]);
        assert_eq!((one.p50, one.p99), (7.0, 7.0));
        assert_eq!(Figure::of("x", Unit::Milliseconds, Vec::new()).n, 0);
    }

    #[test]
    fn the_bad_end_of_a_throughput_is_the_slow_one() {
        let figure = Figure::of("x", Unit::MebibytesPerSecond, (1..=100).map(f64::from).collect());
        assert_eq!((figure.p50, figure.p95, figure.p99), (51.0, 6.0, 2.0));
    }
}
