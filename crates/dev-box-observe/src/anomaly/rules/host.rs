//! What a VM does to the machine: mining, mass change, forks, memory, output, clock.

use super::{Hits, Observation, Rule, RuleConfig, within};
use crate::anomaly::window::Sums;

const MINUTE: u64 = 60_000;
/// For what part of the time the CPUs are saturated that mine.
const SATURATED: f64 = 0.85;
const FORKS_MS: u64 = 10_000;

#[derive(Debug, Clone)]
pub(super) struct HostRules {
    /// Time covered, time busy, disk bytes, network bytes, time with traffic.
    usage: Sums<5>,
    /// For how long it has looked like mining, in ms: a window says no more than that it does.
    mining_ms: f64,
    /// Time covered, time short of memory.
    memory: Sums<2>,
    /// For how long memory has been short, in ms.
    short_ms: f64,
    /// Files that look encrypted, and those times their entropy.
    files: Sums<2>,
    forks: Sums<1>,
    output: Sums<1>,
    clock: Option<i64>,
}

impl HostRules {
    pub(super) fn new(config: &RuleConfig) -> Self {
        // A window forgets up to a twelfth early: it must be that much longer than what is asked of it.
        let at_least = |ms: u64| ms.saturating_add(ms / 6);
        Self {
            usage: Sums::new(at_least(config.mining_ms)),
            mining_ms: 0.0,
            memory: Sums::new(at_least(config.memory_ms)),
            short_ms: 0.0,
            files: Sums::new(MINUTE),
            forks: Sums::new(FORKS_MS),
            output: Sums::new(10_000),
            clock: None,
        }
    }

    pub(super) fn observe(
        &mut self,
        config: &RuleConfig,
        now: u64,
        observation: &Observation,
        hits: &mut Hits,
    ) {
        match observation {
            Observation::Usage { span_ms, cpu, disk_bytes, net_bytes } => {
                let span = *span_ms as f64;
                let busy = if *cpu >= config.mining_cpu { span } else { 0.0 };
                let talking = if *net_bytes > 0 { span } else { 0.0 };
                let sums = self.usage.add(now, [span, busy, *disk_bytes as f64, *net_bytes as f64, talking]);
                self.mining(config, span, sums, hits);
            }
            Observation::Memory { span_ms, available } => {
                let short = if *available < config.memory_available { *span_ms as f64 } else { 0.0 };
                let [covered, short] = self.memory.add(now, [*span_ms as f64, short]);
                let needed = config.memory_ms as f64;
                // A moment of relief does not end it.
                if short < needed || short < 0.9 * covered {
                    self.short_ms = 0.0;
                    return;
                }
                self.short_ms = short.max(self.short_ms + *span_ms as f64);
                hits.over(Rule::MemoryPressure, self.short_ms, needed, || {
                    format!(
                        "less than {:.0} % of its memory was available for {:.0} s",
                        config.memory_available * 100.0,
                        self.short_ms / 1000.0
                    )
                });
            }
            Observation::FilesChanged { count, changes } => {
                // Each of the sample stands for as many: text that is rewritten beside them hides none. What was
                // compressed before (pictures, git's objects) is moved, linked and packed by honest work.
                let each = *count as f64 / changes.len().max(1) as f64;
                let random = |entropy: f64| entropy >= config.change_entropy;
                let risen = changes.iter().filter(|it| random(it.after) && !it.before.is_some_and(random));
                let (number, sum) =
                    risen.fold((0.0, 0.0), |(number, sum), it| (number + 1.0, sum + it.after.min(8.0)));
                let [files, weighted] = self.files.add(now, [each * number, each * sum]);
                let entropy = weighted / files.max(1.0);
                if number > 0.0 {
                    hits.over(Rule::MassChange, files, config.change_files as f64, || {
                        format!(
                            "{files:.0} files were rewritten within a minute as what looks encrypted: {entropy:.1} bits a byte on average"
                        )
                    });
                }
            }
            Observation::Processes { span_ms, started, running } => {
                let [forks] = self.forks.add(now, [within(FORKS_MS, *span_ms, *started)]);
                hits.over(Rule::ForkRate, forks, config.forks as f64, || {
                    format!("{forks:.0} processes were started within ten seconds")
                });
                hits.over(Rule::ForkRate, *running as f64, config.processes as f64, || {
                    format!("{running} processes run at once")
                });
            }
            Observation::Output { bytes } => {
                let [bytes] = self.output.add(now, [*bytes as f64]);
                hits.over(Rule::OutputFlood, bytes, config.output_bytes as f64, || {
                    format!("{:.0} MiB of output came within ten seconds", bytes / f64::from(1 << 20))
                });
            }
            Observation::ClockOffset { offset_ms } => {
                let jump = self.clock.map_or(0, |before| before.abs_diff(*offset_ms));
                self.clock = Some(*offset_ms);
                hits.over(Rule::ClockJump, jump as f64, config.clock_jump_ms as f64, || {
                    format!("the guest's clock moved by {:.1} s against the host's", jump as f64 / 1000.0)
                });
            }
            _ => {}
        }
    }

    /// `span` of this were seen last; the sums are those of the window.
    fn mining(
        &mut self,
        config: &RuleConfig,
        span: f64,
        [covered, busy, disk, net, talking]: [f64; 5],
        hits: &mut Hits,
    ) {
        let needed = config.mining_ms as f64;
        let seconds = covered / 1000.0;
        let (disk_rate, net_rate) = (disk / seconds, net / seconds);
        // A pause now and then is no way around; tests and builds pause more.
        let share = busy / covered;
        let quiet_disk = disk_rate < config.mining_disk_rate;
        // A thin flow, but steady: work comes in and results go out all the time.
        let thin = net_rate > 0.0 && net_rate < config.mining_net_rate && talking >= 0.5 * covered;
        let saturated = share >= SATURATED;
        if covered < needed || !saturated || !quiet_disk || !thin {
            self.mining_ms = 0.0;
            return;
        }
        self.mining_ms = covered.max(self.mining_ms + span);
        hits.over(Rule::Mining, self.mining_ms, needed, || {
            format!(
                "its CPUs were saturated for {:.0} s ({:.0} % of the time lately) with {:.0} KiB/s of disk and a steady {:.1} KiB/s of network",
                self.mining_ms / 1000.0,
                share * 100.0,
                disk_rate / 1024.0,
                net_rate / 1024.0
            )
        });
    }
}
