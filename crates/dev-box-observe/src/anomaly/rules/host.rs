//! What a VM does to the machine: mining, mass change, forks, memory, output, clock.

use super::{Hits, Observation, Rule, RuleConfig};
use crate::anomaly::window::Sums;

const MINUTE: u64 = 60_000;

#[derive(Debug, Clone)]
pub(super) struct HostRules {
    /// Time covered, time busy, disk bytes, network bytes, time with traffic.
    usage: Sums<5>,
    /// Time covered, time short of memory.
    memory: Sums<2>,
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
            memory: Sums::new(at_least(config.memory_ms)),
            files: Sums::new(MINUTE),
            forks: Sums::new(10_000),
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
                mining(config, sums, hits);
            }
            Observation::Memory { span_ms, available } => {
                let short = if *available < config.memory_available { *span_ms as f64 } else { 0.0 };
                let [covered, short] = self.memory.add(now, [*span_ms as f64, short]);
                // A moment of relief does not end it.
                if short >= 0.9 * covered {
                    hits.over(Rule::MemoryPressure, short, config.memory_ms as f64, || {
                        format!(
                            "less than {:.0} % of its memory was available for {:.0} s",
                            config.memory_available * 100.0,
                            short / 1000.0
                        )
                    });
                }
            }
            Observation::FilesChanged { count, entropies } => {
                // Each of the sample stands for as many: text that is rewritten beside them hides none.
                let each = *count as f64 / entropies.len().max(1) as f64;
                let random = entropies.iter().filter(|entropy| **entropy >= config.change_entropy);
                let (number, sum) =
                    random.fold((0.0, 0.0), |(number, sum), entropy| (number + 1.0, sum + entropy.min(8.0)));
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
            Observation::Processes { started, running } => {
                let [forks] = self.forks.add(now, [*started as f64]);
                hits.over(Rule::ForkRate, forks, config.forks as f64, || {
                    format!("{forks} processes were started within ten seconds")
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
}

fn mining(config: &RuleConfig, [covered, busy, disk, net, talking]: [f64; 5], hits: &mut Hits) {
    let needed = config.mining_ms as f64;
    if covered < needed {
        return;
    }
    let seconds = covered / 1000.0;
    let (disk_rate, net_rate) = (disk / seconds, net / seconds);
    let saturated = busy >= 0.95 * covered;
    let quiet_disk = disk_rate < config.mining_disk_rate;
    // A thin flow, but steady: work comes in and results go out all the time.
    let thin = net_rate > 0.0 && net_rate < config.mining_net_rate && talking >= 0.5 * covered;
    if saturated && quiet_disk && thin {
        hits.over(Rule::Mining, busy.max(needed), needed, || {
            format!(
                "its CPUs were saturated for {:.0} s with {:.0} KiB/s of disk and a steady {:.1} KiB/s of network",
                busy / 1000.0,
                disk_rate / 1024.0,
                net_rate / 1024.0
            )
        });
    }
}
