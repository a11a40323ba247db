//! From counters to what was done between two looks at them. Pure.

use dev_box_core::libvirt::DomainStats;
use dev_box_observe::anomaly::Observation;
use dev_box_observe::metrics::VmUsage;

/// A VM's counters at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Look {
    /// Monotonic, in ms.
    pub(super) at_ms: u64,
    pub(super) cpu_ns: u64,
    pub(super) read_bytes: u64,
    pub(super) written_bytes: u64,
    pub(super) sent_bytes: u64,
    pub(super) received_bytes: u64,
}

impl Look {
    pub(super) fn of(at_ms: u64, stats: &DomainStats) -> Self {
        let sum = |each: &mut dyn Iterator<Item = u64>| each.fold(0_u64, u64::saturating_add);
        Self {
            at_ms,
            cpu_ns: stats.cpu_time_ns.unwrap_or_default(),
            read_bytes: sum(&mut stats.blocks.iter().map(|block| block.read_bytes)),
            written_bytes: sum(&mut stats.blocks.iter().map(|block| block.write_bytes)),
            // The host's end of the cable: what the guest sends is what the host's device transmits for it.
            sent_bytes: sum(&mut stats.nics.iter().map(|nic| nic.tx_bytes)),
            received_bytes: sum(&mut stats.nics.iter().map(|nic| nic.rx_bytes)),
        }
    }

    /// What was done since `before`. Nothing is when no time has passed.
    pub(super) fn since(&self, before: &Self, vcpus: u32) -> Vec<Observation> {
        let span_ms = self.at_ms.saturating_sub(before.at_ms);
        if span_ms == 0 {
            return Vec::new();
        }
        // A counter that went back (another QEMU, a reset) says nothing.
        let grown = |now: u64, before: u64| now.saturating_sub(before);
        let (sent, received) =
            (grown(self.sent_bytes, before.sent_bytes), grown(self.received_bytes, before.received_bytes));
        let disk = grown(self.read_bytes, before.read_bytes)
            .saturating_add(grown(self.written_bytes, before.written_bytes));
        let available_ns = span_ms as f64 * 1e6 * f64::from(vcpus.max(1));
        let cpu = (grown(self.cpu_ns, before.cpu_ns) as f64 / available_ns).clamp(0.0, 1.0);
        let net_bytes = sent.saturating_add(received);
        vec![
            Observation::Usage { span_ms, cpu, disk_bytes: disk, net_bytes },
            Observation::Traffic { span_ms, sent_bytes: sent, received_bytes: received },
        ]
    }

    /// As metrics.
    pub(super) fn usage(&self, stats: &DomainStats, proportional_bytes: u64) -> VmUsage {
        VmUsage {
            cpu_seconds: self.cpu_ns as f64 / 1e9,
            memory_bytes: stats.memory.as_bytes(),
            resident_bytes: stats.rss.map_or(0, |rss| rss.as_bytes()),
            proportional_bytes,
            read_bytes: self.read_bytes,
            written_bytes: self.written_bytes,
            sent_bytes: self.sent_bytes,
            received_bytes: self.received_bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use dev_box_core::libvirt::{BlockStats, NicStats};

    use super::*;

    fn look(at_ms: u64, cpu_ms: u64, bytes: u64) -> Look {
        Look {
            at_ms,
            cpu_ns: cpu_ms * 1_000_000,
            read_bytes: bytes,
            written_bytes: bytes,
            sent_bytes: bytes,
            received_bytes: 2 * bytes,
        }
    }

    #[test]
    fn differences_become_rates() {
        let observations = look(3_000, 3_000, 500).since(&look(1_000, 1_000, 100), 2);
        assert_eq!(
            observations[0],
            Observation::Usage { span_ms: 2_000, cpu: 0.5, disk_bytes: 800, net_bytes: 1_200 }
        );
        let traffic = Observation::Traffic { span_ms: 2_000, sent_bytes: 400, received_bytes: 800 };
        assert_eq!(observations[1], traffic);
    }

    #[test]
    fn counters_that_go_back_and_time_that_stands_still_say_nothing() {
        assert_eq!(look(1_000, 5, 5).since(&look(1_000, 1, 1), 1), []);
        let observations = look(2_000, 0, 0).since(&look(1_000, 900, 900), 1);
        let traffic = Observation::Traffic { span_ms: 1_000, sent_bytes: 0, received_bytes: 0 };
        assert_eq!(observations[1], traffic);
        let Observation::Usage { cpu, .. } = look(2_000, 9_000, 0).since(&look(1_000, 0, 0), 1)[0] else {
            panic!()
        };
        assert_eq!(cpu, 1.0, "QEMU's own threads count, but not beyond all of it");
    }

    #[test]
    fn all_disks_and_interfaces_are_added_up() {
        let block = |bytes| BlockStats { read_bytes: bytes, write_bytes: 1, ..BlockStats::default() };
        let nic = NicStats { tx_bytes: 7, rx_bytes: 9, ..NicStats::default() };
        let stats = DomainStats {
            blocks: vec![block(1), block(u64::MAX)],
            nics: vec![nic],
            ..DomainStats::default()
        };
        let look = Look::of(5, &stats);
        assert_eq!((look.read_bytes, look.written_bytes), (u64::MAX, 2));
        assert_eq!((look.sent_bytes, look.received_bytes), (7, 9));
        let usage = look.usage(&stats, 3);
        assert_eq!((usage.proportional_bytes, usage.sent_bytes), (3, 7));
    }
}
