//! All that is watched of one VM: its rules, its numbers together, and what VMs of its kind usually do. Pure.

use super::{Baseline, Finding, Joint, Observation, RuleConfig, Score, VmRules};

/// Odd minutes in a row before numbers alone are a finding: work begins and ends, and each time a minute or two is odd.
const IN_A_ROW: u32 = 5;
/// How long numbers are quiet after a finding: they say the same again and again.
const QUIET_MS: u64 = 600_000;
const MINUTE_MS: u64 = 60_000;

/// One VM. Memory is constant.
///
/// # Examples
/// ```
/// use dev_box_observe::anomaly::{Baseline, Observation, Rule, RuleConfig, VmWatch};
/// let mut watch = VmWatch::new(RuleConfig::default(), Baseline::default());
/// let dropped = Observation::Dropped { address: "169.254.169.254".parse()?, port: Some(80) };
/// assert_eq!(watch.observe(5, &dropped)[0].rule, Rule::MetadataContact);
/// # Ok::<_, std::net::AddrParseError>(())
/// ```
#[derive(Debug, Clone)]
pub struct VmWatch {
    rules: VmRules,
    joint: Joint<3>,
    usual: Baseline,
    learnt: Baseline,
    minute: Minute,
    odd_by_itself: u32,
    odd_by_profile: u32,
    quiet_until: u64,
}

/// The minute so far.
#[derive(Debug, Clone, Copy, Default)]
struct Minute {
    span_ms: f64,
    cpu: f64,
    disk: f64,
    network: f64,
}

impl VmWatch {
    /// A new VM, of which `usual` is known.
    #[must_use]
    pub fn new(rules: RuleConfig, usual: Baseline) -> Self {
        Self {
            rules: VmRules::new(rules),
            // Of minutes: an agent builds, waits and installs by turns, and only what is unlike all of that is odd.
            joint: Joint::new(super::baseline::SERIES, 0.01, 8.0),
            usual,
            learnt: Baseline::default(),
            minute: Minute::default(),
            odd_by_itself: 0,
            odd_by_profile: 0,
            quiet_until: 0,
        }
    }

    /// The same, where more is done about findings from this score on: see [`VmRules::acting_from`].
    #[must_use]
    pub fn acting_from(self, score: f64) -> Self {
        Self { rules: self.rules.acting_from(score), ..self }
    }

    /// Takes an observation made at `at_ms` of a monotonic clock, and returns what it completes.
    pub fn observe(&mut self, at_ms: u64, observation: &Observation) -> Vec<Finding> {
        let mut findings = self.rules.observe(at_ms, observation);
        if let Observation::Usage { span_ms, cpu, disk_bytes, net_bytes } = observation {
            let span = (*span_ms as f64).max(1.0);
            let sample = Minute {
                span_ms: span,
                cpu: cpu * span,
                disk: *disk_bytes as f64,
                network: *net_bytes as f64,
            };
            findings.extend(self.numbers(at_ms, sample));
        }
        findings
    }

    /// What this VM has taught of its profile.
    #[must_use]
    pub fn learnt(&self) -> &Baseline {
        &self.learnt
    }

    fn numbers(&mut self, at_ms: u64, sample: Minute) -> Option<Finding> {
        self.minute.add(sample);
        if self.minute.span_ms < MINUTE_MS as f64 {
            return None;
        }
        let minute = std::mem::take(&mut self.minute).rates();
        let by_itself = self.joint.update(minute.map(Some)).filter(Score::is_odd);
        let by_profile = self.usual.score(minute).filter(Score::is_odd);
        let in_a_row = |odd: bool, so_far: u32| if odd { so_far.saturating_add(1) } else { 0 };
        self.odd_by_itself = in_a_row(by_itself.is_some(), self.odd_by_itself);
        self.odd_by_profile = in_a_row(by_profile.is_some(), self.odd_by_profile);
        if by_profile.is_none() {
            // What is odd is not learnt, or an attack that lasts would become the usual.
            self.learnt.learn(minute);
        }
        let (what, score) = match (by_profile, by_itself) {
            (Some(score), _) if self.odd_by_profile == IN_A_ROW => ("unlike VMs of its kind", score),
            (_, Some(score)) if self.odd_by_itself == IN_A_ROW => ("unlike before", score),
            _ => return None,
        };
        if at_ms < self.quiet_until {
            return None;
        }
        self.quiet_until = at_ms.saturating_add(QUIET_MS);
        Some(score.finding(what, at_ms))
    }
}

impl Minute {
    fn add(&mut self, sample: Self) {
        self.span_ms += sample.span_ms;
        self.cpu += sample.cpu;
        self.disk += sample.disk;
        self.network += sample.network;
    }

    /// The use of the CPUs, and the logarithms of bytes a second: ten times as much is a step of the same size from
    /// anywhere.
    fn rates(self) -> [f64; 3] {
        let a_second = |bytes: f64| (1.0 + bytes.max(0.0) * 1000.0 / self.span_ms.max(1.0)).ln();
        [self.cpu / self.span_ms.max(1.0), a_second(self.disk), a_second(self.network)]
    }
}

#[cfg(test)]
mod tests {
    use super::super::Rule;
    use super::*;

    fn statistical(findings: &[Finding]) -> usize {
        findings.iter().filter(|finding| finding.rule == Rule::Statistical).count()
    }

    fn usage(cpu: f64, disk_bytes: u64, net_bytes: u64) -> Observation {
        Observation::Usage { span_ms: 5_000, cpu, disk_bytes, net_bytes }
    }

    /// Feeds five-second samples; how many findings by numbers alone.
    fn feed(watch: &mut VmWatch, from: u64, samples: impl IntoIterator<Item = Observation>) -> usize {
        let seen = samples.into_iter().enumerate().map(|(step, observation)| {
            statistical(&watch.observe((from + step as u64) * 5_000, &observation))
        });
        seen.sum()
    }

    #[test]
    fn a_combination_that_lasts_is_found_once_and_a_burst_is_not() {
        let mut watch = VmWatch::new(RuleConfig::default(), Baseline::default());
        let work = |step: u64| {
            usage(0.3 + 0.05 * (step % 5) as f64, 1_000_000 + step % 7 * 100_000, 2_000 + step % 3)
        };
        assert_eq!(feed(&mut watch, 0, (0..720).map(work)), 0, "an hour");
        assert_eq!(feed(&mut watch, 720, (0..24).map(|_| usage(1.0, 0, 50_000_000))), 0, "two minutes");
        assert_eq!(feed(&mut watch, 744, (0..240).map(work)), 0);
        assert_eq!(feed(&mut watch, 984, (0..90).map(|_| usage(1.0, 0, 50_000_000))), 1, "seven minutes");
    }

    #[test]
    fn what_is_unusual_for_the_profile_is_found_and_not_learnt() {
        let mut usual = Baseline::default();
        for minute in 0..400_u32 {
            usual.learn([0.2 + f64::from(minute % 4) * 0.05, 10.0, 3.0]);
        }
        let quiet = |_| usage(0.25, 100_000, 100);
        let mut watch = VmWatch::new(RuleConfig::default(), usual.clone());
        assert_eq!(feed(&mut watch, 0, (0..240).map(quiet)), 0);
        let learnt = watch.learnt().clone();
        let mut watch = VmWatch::new(RuleConfig::default(), usual);
        assert_eq!(feed(&mut watch, 0, (0..240).map(|_| usage(0.25, 100_000, 80_000_000))), 1);
        assert_ne!(&learnt, watch.learnt());
        assert_eq!(watch.learnt(), &Baseline::default());
    }
}
