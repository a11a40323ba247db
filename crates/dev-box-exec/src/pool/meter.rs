//! A pool's numbers as metrics. Several pools add up in them, so each reports differences.

use std::collections::BTreeMap;

use dev_box_observe::metrics::{LEASE_ACQUIRE_SECONDS, POOL_VMS, POOL_WAITING, VM_RESET_SECONDS};
use tokio::time::Instant;

use super::machine::{Ticket, VmNumber};
use super::{PoolError, PoolStatus};

/// What was last reported of one pool.
#[derive(Debug, Default)]
pub(super) struct Meter {
    reported: PoolStatus,
    /// When callers that wait asked, and whether they had to wait at all.
    asked: BTreeMap<Ticket, (Instant, bool)>,
    /// When leases ended whose VMs are not gone yet.
    ended: BTreeMap<VmNumber, Instant>,
}

impl Meter {
    /// Somebody asks.
    pub(super) fn asked(&mut self, ticket: Ticket) {
        self.asked.insert(ticket, (Instant::now(), false));
    }

    /// They were not served at once.
    pub(super) fn waits(&mut self, ticket: Ticket) {
        if let Some((_, waited)) = self.asked.get_mut(&ticket) {
            *waited = true;
        }
    }

    /// They have a VM.
    pub(super) fn granted(&mut self, ticket: Ticket) {
        if let Some((since, waited)) = self.asked.remove(&ticket) {
            LEASE_ACQUIRE_SECONDS.record(since.elapsed(), &[if waited { "miss" } else { "hit" }]);
        }
    }

    /// They were turned away.
    pub(super) fn refused(&mut self, ticket: Ticket, error: &PoolError) {
        if let Some((since, _)) = self.asked.remove(&ticket) {
            let outcome = if matches!(error, PoolError::Timeout { .. }) { "timeout" } else { "failed" };
            LEASE_ACQUIRE_SECONDS.record(since.elapsed(), &[outcome]);
        }
    }

    /// They went away themselves.
    pub(super) fn abandoned(&mut self, ticket: Ticket) {
        self.asked.remove(&ticket);
    }

    /// A lease ended.
    pub(super) fn returned(&mut self, vm: VmNumber) {
        self.ended.insert(vm, Instant::now());
    }

    /// Its VM is gone: nothing of it can reach another lease.
    pub(super) fn gone(&mut self, vm: VmNumber) {
        if let Some(since) = self.ended.remove(&vm) {
            VM_RESET_SECONDS.record(since.elapsed(), &["replace"]);
        }
    }

    /// Its VM is as good as new, in place.
    pub(super) fn reset(&mut self, vm: VmNumber) {
        if let Some(since) = self.ended.remove(&vm) {
            VM_RESET_SECONDS.record(since.elapsed(), &["rewind"]);
        }
    }

    /// How it stands now.
    pub(super) fn report(&mut self, now: PoolStatus) {
        let before = std::mem::replace(&mut self.reported, now);
        let now = &self.reported;
        for (state, before, now) in [
            ("filling", before.making, now.making),
            ("ready", before.ready, now.ready),
            ("leased", before.leased, now.leased),
            ("resetting", before.resetting, now.resetting),
            ("retiring", before.retiring, now.retiring),
        ] {
            if before != now {
                POOL_VMS.change(now as f64 - before as f64, &[state]);
            }
        }
        if before.waiting != now.waiting {
            POOL_WAITING.change(now.waiting as f64 - before.waiting as f64, &[]);
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.report(PoolStatus::default());
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use dev_box_observe::metrics::Exporter;

    use super::*;

    #[test]
    fn pools_add_up_and_leave_nothing() {
        let exporter = Exporter::local();
        exporter.with(|| {
            let (mut one, mut other) = (Meter::default(), Meter::default());
            one.report(PoolStatus { ready: 2, waiting: 1, ..PoolStatus::default() });
            other.report(PoolStatus { ready: 3, leased: 1, ..PoolStatus::default() });
            other.report(PoolStatus { ready: 1, leased: 3, ..PoolStatus::default() });
            let text = exporter.render();
            for line in [
                "dev_box_pool_vms{state=\"ready\"} 3\n",
                "dev_box_pool_vms{state=\"leased\"} 3\n",
                "dev_box_pool_waiting 1\n",
            ] {
                assert!(text.contains(line), "{line} in {text}");
            }
        });
        assert!(exporter.render().contains("dev_box_pool_vms{state=\"ready\"} 0\n"));
    }

    #[test]
    fn each_caller_is_counted_once_by_how_it_ended() {
        let exporter = Exporter::local();
        exporter.with(|| {
            let mut meter = Meter::default();
            for ticket in 0..4 {
                meter.asked(ticket);
            }
            meter.granted(0);
            meter.waits(1);
            meter.granted(1);
            meter.refused(2, &PoolError::Timeout { waited: Duration::ZERO });
            meter.abandoned(3);
            meter.granted(3);
            meter.returned(7);
            meter.gone(7);
            meter.gone(8);
            meter.returned(9);
            meter.reset(9);
        });
        let text = exporter.render();
        for line in [
            "dev_box_lease_acquire_seconds_count{outcome=\"hit\"} 1\n",
            "dev_box_lease_acquire_seconds_count{outcome=\"miss\"} 1\n",
            "dev_box_lease_acquire_seconds_count{outcome=\"timeout\"} 1\n",
            "dev_box_vm_reset_seconds_count{method=\"replace\"} 1\n",
            "dev_box_vm_reset_seconds_count{method=\"rewind\"} 1\n",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
