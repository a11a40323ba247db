//! Made-up VMs: agents at honest work, and attacks among it. Seeded: the same seed is the same hour, on every machine.
//!
//! What the numbers are modelled on: builds saturate the CPUs and write much, tests saturate them in bursts, installations
//! download from a handful of hosts by a dozen names, git talks to one, and between all that an agent waits for its model
//! with a slow trickle to one address. Attacks do what each rule is for, from well above its threshold to just above it.

use std::net::IpAddr;

use super::{ContentChange, Observation, Rule};

/// Time between two looks at a VM.
const STEP_MS: u64 = 2_000;

/// What is seen, and when (ms).
pub type Seen = (u64, Observation);

/// Numbers without a pattern, from a seed (splitmix64).
#[derive(Debug, Clone)]
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn part(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low).max(1)
    }

    fn chance(&mut self, of: f64) -> bool {
        self.part() < of
    }
}

/// What an agent is doing.
#[derive(Debug, Clone, Copy)]
enum Phase {
    Waiting,
    Build,
    Test,
    Install,
    Git,
    Format,
}

/// `hours` of honest work.
#[must_use]
pub fn benign(seed: u64, hours: u64) -> Vec<Seen> {
    let mut dice = Dice(seed);
    let mut seen = Vec::new();
    let model = IpAddr::from([198, 51, 100, (seed % 200) as u8 + 1]);
    let end = hours * 3_600_000;
    let (mut at, mut phase, mut until) = (0, Phase::Waiting, 0);
    let mut drift = 0_i64;
    while at < end {
        if at >= until {
            phase = match dice.between(0, 10) {
                0..4 => Phase::Waiting,
                4..6 => Phase::Build,
                6 => Phase::Test,
                7 => Phase::Install,
                8 => Phase::Git,
                _ => Phase::Format,
            };
            until = at
                + match phase {
                    Phase::Waiting => dice.between(5_000, 120_000),
                    Phase::Build => dice.between(20_000, 600_000),
                    Phase::Test => dice.between(10_000, 400_000),
                    Phase::Install => dice.between(10_000, 90_000),
                    Phase::Git => dice.between(4_000, 20_000),
                    Phase::Format => dice.between(2_000, 6_000),
                };
        }
        step(at, phase, model, &mut dice, &mut seen);
        drift += dice.between(0, 3) as i64 - 1;
        seen.push((at, Observation::ClockOffset { offset_ms: drift }));
        at += STEP_MS;
    }
    seen
}

fn step(at: u64, phase: Phase, model: IpAddr, dice: &mut Dice, seen: &mut Vec<Seen>) {
    let mut see = |observation| seen.push((at, observation));
    let noise = dice.part();
    // CPU, disk, sent, received, forks, running, free memory, output.
    let (cpu, disk, sent, received, forks, running, free, output) = match phase {
        Phase::Waiting => (0.05 * noise, 4_096, 400 + dice.between(0, 3_000), 2_000, 1, 12, 0.8, 200),
        Phase::Build => (0.85 + 0.15 * noise, dice.between(1 << 20, 80 << 20), 0, 0, 150, 40, 0.3, 40_000),
        Phase::Test => (0.5 + 0.5 * noise, dice.between(0, 8 << 20), 300, 300, 400, 60, 0.4, 400_000),
        Phase::Install => (
            0.6 * noise,
            dice.between(1 << 20, 40 << 20),
            60_000,
            dice.between(1 << 20, 20 << 20),
            60,
            25,
            0.5,
            9_000,
        ),
        Phase::Git => (0.3 * noise, 1 << 20, dice.between(2_000, 4 << 20), 1 << 20, 30, 16, 0.7, 2_000),
        Phase::Format => (0.7 * noise, 8 << 20, 0, 0, 50, 20, 0.6, 3_000),
    };
    see(Observation::Usage { span_ms: STEP_MS, cpu, disk_bytes: disk, net_bytes: sent + received });
    see(Observation::Traffic { span_ms: STEP_MS, sent_bytes: sent, received_bytes: received });
    see(Observation::Processes { span_ms: STEP_MS, started: forks + dice.between(0, 1 + forks), running });
    see(Observation::Memory { span_ms: STEP_MS, available: (free - 0.2 * noise).max(0.04) });
    see(Observation::Output { bytes: output });
    match phase {
        Phase::Waiting if dice.chance(0.2) => see(Observation::Connected { address: model, port: Some(443) }),
        Phase::Install => {
            for _ in 0..dice.between(1, 8) {
                let host = dice.between(0, 12);
                let name = format!("mirror{host}.cdn.example.net");
                see(Observation::Query { name, nxdomain: dice.chance(0.05) });
                let address = IpAddr::from([203, 0, 113, host as u8]);
                see(Observation::Connected { address, port: Some(443) });
            }
            // A mirror that is down, a telemetry port that is not let out.
            if dice.chance(0.2) {
                let address = IpAddr::from([203, 0, 113, 200 + dice.between(0, 5) as u8]);
                see(Observation::Dropped { address, port: Some(8443) });
                see(Observation::DroppedPackets { packets: 4 });
            }
        }
        Phase::Git => {
            see(Observation::Connected { address: IpAddr::from([140, 82, 112, 3]), port: Some(22) });
            // It moves and links what it packed before.
            let changes = vec![ContentChange { before: Some(7.9), after: 7.9 }; 20];
            see(Observation::FilesChanged { count: 400, changes });
        }
        Phase::Build => {
            // An archive or a picture among them.
            let after = (0..20).map(|_| if dice.chance(0.05) { 7.8 } else { 5.0 + 1.5 * dice.part() });
            let changes = after.map(|after| ContentChange { before: None, after }).collect();
            see(Observation::FilesChanged { count: dice.between(0, 60), changes });
        }
        Phase::Format => {
            let after = (0..20).map(|_| 4.0 + dice.part());
            let changes = after.map(|after| ContentChange { before: Some(4.5), after }).collect();
            see(Observation::FilesChanged { count: dice.between(50, 600), changes });
        }
        _ => {}
    }
}

/// What a rule is for, beginning at `at` ms; `strength` 0 is just above its threshold, 1 is far above. Empty for rules that
/// this makes no attack for.
#[must_use]
pub fn attack(rule: Rule, seed: u64, at: u64, strength: f64) -> Vec<Seen> {
    let mut dice = Dice(seed ^ 0xa77a_c4ed);
    let more = 1.2 + strength.clamp(0.0, 1.0) * 4.0;
    let times = |number: f64| (number * more) as u64;
    let spread =
        |count: u64, over_ms: u64, dice: &mut Dice, each: &mut dyn FnMut(u64, &mut Dice) -> Observation| {
            (0..count)
                .map(|number| (at + number * over_ms / count.max(1), each(number, dice)))
                .collect::<Vec<_>>()
        };
    match rule {
        Rule::MetadataContact => {
            vec![(at, Observation::Dropped { address: IpAddr::from([169, 254, 169, 254]), port: Some(80) })]
        }
        Rule::PrivateContact => vec![(
            at,
            Observation::Dropped { address: IpAddr::from([10, 0, dice.next() as u8, 1]), port: Some(22) },
        )],
        Rule::PortScan => spread(times(21.0), 40_000, &mut dice, &mut |number, _| Observation::Dropped {
            address: IpAddr::from([192, 0, 2, 7]),
            port: Some(1000 + number as u16),
        }),
        Rule::FanOut => spread(times(150.0), 40_000, &mut dice, &mut |number, _| Observation::Connected {
            address: IpAddr::from([203, (number >> 8) as u8, number as u8, 1]),
            port: Some(443),
        }),
        Rule::DnsTunnel => spread(times(50.0), 40_000, &mut dice, &mut |_, dice| {
            let label: String = (0..48)
                .map(|_| char::from(b"abcdefghijklmnopqrstuvwxyz234567"[dice.between(0, 32) as usize]))
                .collect();
            Observation::Query { name: format!("{label}.t.example.org"), nxdomain: false }
        }),
        Rule::Beaconing => {
            let period = dice.between(6_000, 60_000);
            let jitter = 0.04;
            let mut now = at;
            let mut seen = Vec::new();
            for _ in 0..times(11.0) {
                now += (period as f64 * (1.0 + jitter * (2.0 * dice.part() - 1.0))) as u64;
                seen.push((
                    now,
                    Observation::Connected { address: IpAddr::from([45, 33, 32, 156]), port: Some(443) },
                ));
            }
            seen
        }
        Rule::EgressVolume => spread(60, 120_000, &mut dice, &mut |_, _| Observation::Traffic {
            span_ms: 2_000,
            sent_bytes: times(f64::from(1_u32 << 30)) / 60,
            received_bytes: 0,
        }),
        Rule::Mining => (0..times(160.0))
            .map(|number| {
                let net_bytes = 300 + dice.between(0, 400);
                (
                    at + number * STEP_MS,
                    Observation::Usage {
                        span_ms: STEP_MS,
                        cpu: 0.97 + 0.03 * dice.part(),
                        disk_bytes: 2_000,
                        net_bytes,
                    },
                )
            })
            .collect(),
        Rule::MassChange => spread(10, 20_000, &mut dice, &mut |_, dice| Observation::FilesChanged {
            count: times(200.0) / 10 + 1,
            changes: vec![ContentChange { before: Some(4.5), after: 7.6 + 0.3 * dice.part() }],
        }),
        Rule::ForkRate => spread(4, 8_000, &mut dice, &mut |_, _| Observation::Processes {
            span_ms: 2_000,
            started: times(5_000.0) / 4 + 1,
            running: 90,
        }),
        Rule::MemoryPressure => spread(times(20.0), times(20.0) * STEP_MS, &mut dice, &mut |_, _| {
            Observation::Memory { span_ms: STEP_MS, available: 0.01 }
        }),
        Rule::OutputFlood => spread(20, 8_000, &mut dice, &mut |_, _| Observation::Output {
            bytes: times(f64::from(256_u32 << 20)) / 20,
        }),
        Rule::ClockJump => vec![
            (at, Observation::ClockOffset { offset_ms: 0 }),
            (at + 1, Observation::ClockOffset { offset_ms: times(5_000.0) as i64 }),
        ],
        Rule::Statistical => Vec::new(),
    }
}

/// An attack in the midst of honest work, in the order of time. While an attack lasts that is seen by the VM's use of the
/// machine as a whole, it is the attack that is seen.
#[must_use]
pub fn attacked(rule: Rule, seed: u64, hours: u64, strength: f64) -> Vec<Seen> {
    let attack = attack(rule, seed, hours * 3_600_000 / 2, strength);
    let (from, to) = (attack.first().map_or(0, |seen| seen.0), attack.last().map_or(0, |seen| seen.0));
    let same_kind = |seen: &Seen| {
        attack
            .first()
            .is_some_and(|first| std::mem::discriminant(&first.1) == std::mem::discriminant(&seen.1))
            && matches!(
                seen.1,
                Observation::Usage { .. } | Observation::Memory { .. } | Observation::ClockOffset { .. }
            )
    };
    let mut all: Vec<Seen> = benign(seed, hours)
        .into_iter()
        .filter(|seen| !(same_kind(seen) && (from..=to).contains(&seen.0)))
        .collect();
    all.extend(attack);
    all.sort_by_key(|seen| seen.0);
    all
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::{Baseline, RuleConfig, VmWatch};
    use super::*;

    /// Seeds that nothing was tuned on.
    const HELD_OUT: u64 = 1_000;

    fn findings(seen: &[Seen]) -> Vec<(u64, Rule)> {
        let mut watch = VmWatch::new(RuleConfig::default(), Baseline::default());
        seen.iter()
            .flat_map(|(at, observation)| watch.observe(*at, observation))
            .map(|finding| (finding.at_ms, finding.rule))
            .collect()
    }

    #[test]
    fn the_same_seed_is_the_same_work() {
        assert_eq!(benign(7, 1), benign(7, 1));
        assert_ne!(benign(7, 1), benign(8, 1));
    }

    #[test]
    fn honest_work_raises_less_than_an_alert_a_day() {
        let mut false_alerts: BTreeMap<Rule, usize> = BTreeMap::new();
        let days = 4;
        for seed in 0..days {
            for (_, rule) in findings(&benign(HELD_OUT + seed, 24)) {
                *false_alerts.entry(rule).or_default() += 1;
            }
        }
        let all: usize = false_alerts.values().sum();
        assert!(all as u64 <= days, "{all} in {days} VM-days: {false_alerts:?}");
    }

    #[test]
    fn each_attack_is_found_by_its_rule_and_little_else_is() {
        for rule in Rule::ALL.into_iter().filter(|rule| *rule != Rule::Statistical) {
            let (mut found, mut right, mut wrong, runs) = (0, 0, 0, 20);
            for seed in 0..runs {
                let findings = findings(&attacked(rule, HELD_OUT + seed, 1, seed as f64 / 20.0));
                let hits = findings.iter().filter(|(_, by)| *by == rule).count();
                found += u64::from(hits > 0);
                right += hits;
                // An attack that also looks unusual in numbers is no false alert.
                wrong += findings.iter().filter(|(_, by)| *by != rule && *by != Rule::Statistical).count();
            }
            let recall = found as f64 / runs as f64;
            let precision = right as f64 / (right + wrong).max(1) as f64;
            assert!(
                recall >= 0.95 && precision >= 0.9,
                "{rule}: recall {recall:.2}, precision {precision:.2}"
            );
        }
    }
}
