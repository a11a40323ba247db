//! Taps that wait for VMs, their filter in force: libvirt takes a second or so for that, which no VM then waits for.
//!
//! ```text
//!  keep --> prepared, one at a time, in the background --> waits --taken--> a VM's --its use ended in order--> waits
//!                                                            \-- closing: taken away           \-- otherwise: gone, another is made
//! ```

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dev_box_core::id::VmName;
use dev_box_net::{EgressPolicy, NetLease, PreparedTap};

use super::Inner;
use crate::blocking;
use crate::machine::Machine;

/// More than this are not kept of one policy: each has an address, and some 80 rules of ebtables.
pub(super) const MAX: usize = 64;

/// After one that could not be made.
const RETRY: Duration = Duration::from_secs(5);

/// One of those that count as made: of who waits, or of who has it.
#[derive(Debug)]
pub(crate) struct Lent(#[expect(dead_code, reason = "it is counted")] Arc<()>);

#[derive(Debug)]
struct Kept {
    policy: EgressPolicy,
    wanted: usize,
    being_made: bool,
    ready: VecDeque<(PreparedTap, Lent)>,
    counter: Arc<()>,
}

impl Kept {
    fn made(&self) -> usize {
        Arc::strong_count(&self.counter).saturating_sub(1)
    }

    fn one_more(&self) -> Lent {
        Lent(Arc::clone(&self.counter))
    }
}

/// All taps of a provisioner.
#[derive(Debug, Default)]
pub(super) struct TapShelf(Mutex<Vec<Kept>>);

impl TapShelf {
    fn kept(&self) -> MutexGuard<'_, Vec<Kept>> {
        // A list of owned values is whole whatever panicked beside it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, policy: &EgressPolicy, ask: impl FnOnce(&mut Kept) -> T) -> Option<T> {
        self.kept().iter_mut().find(|kept| kept.policy == *policy).map(ask)
    }

    /// Sets how many there are to be, used or not; gives those that wait and are too many.
    fn want(&self, policy: &EgressPolicy, wanted: usize) -> Vec<PreparedTap> {
        let wanted = wanted.min(MAX);
        let mut all = self.kept();
        let index = all.iter().position(|kept| kept.policy == *policy).unwrap_or_else(|| {
            let counter = Arc::default();
            let policy = policy.clone();
            all.push(Kept { policy, wanted, being_made: false, ready: VecDeque::new(), counter });
            all.len() - 1
        });
        let Some(kept) = all.get_mut(index) else { return Vec::new() };
        kept.wanted = wanted;
        let surplus = kept.made().saturating_sub(wanted).min(kept.ready.len());
        kept.ready.drain(..surplus).map(|(tap, _)| tap).collect()
    }

    fn take(&self, policy: &EgressPolicy) -> Option<(PreparedTap, Lent)> {
        self.with(policy, |kept| kept.ready.pop_front()).flatten()
    }

    /// Whether somebody is to make one now: at most one of a policy at a time.
    fn begin(&self, policy: &EgressPolicy) -> bool {
        let begin = |kept: &mut Kept| {
            let begin = !kept.being_made && kept.made() < kept.wanted;
            kept.being_made |= begin;
            begin
        };
        self.with(policy, begin).unwrap_or(false)
    }

    /// Takes what was made; gives it back when nobody wants it any more.
    fn end(&self, policy: &EgressPolicy, made: Option<PreparedTap>) -> Option<PreparedTap> {
        let mut all = self.kept();
        let Some(kept) = all.iter_mut().find(|kept| kept.policy == *policy) else { return made };
        kept.being_made = false;
        match made {
            Some(tap) if kept.made() < kept.wanted => kept.ready.push_back((tap, kept.one_more())),
            other => return other,
        }
        None
    }

    /// Whether one that a VM had is wanted back.
    fn wants_back(&self, policy: &EgressPolicy) -> bool {
        self.with(policy, |kept| kept.made() <= kept.wanted).unwrap_or(false)
    }

    fn put_back(&self, policy: &EgressPolicy, tap: PreparedTap, lent: Lent) {
        self.with(policy, |kept| kept.ready.push_back((tap, lent)));
    }

    /// Takes all away, and wants none.
    fn clear(&self) -> Vec<PreparedTap> {
        self.kept().drain(..).flat_map(|kept| kept.ready).map(|(tap, _)| tap).collect()
    }

    /// How many wait.
    fn count(&self, policy: &EgressPolicy) -> usize {
        self.with(policy, |kept| kept.ready.len()).unwrap_or(0)
    }
}

impl Inner {
    /// Has so many from now on, those that VMs use among them.
    pub(super) async fn keep_taps(self: &Arc<Self>, policy: &EgressPolicy, wanted: usize) {
        if policy.is_isolated() {
            return;
        }
        let surplus = self.taps.want(policy, wanted);
        self.make_taps(policy);
        self.discard(surplus).await;
    }

    pub(super) fn waiting_taps(&self, policy: &EgressPolicy) -> usize {
        self.taps.count(policy)
    }

    /// Makes what is missing, in the background, until all of it is there.
    pub(super) fn make_taps(self: &Arc<Self>, policy: &EgressPolicy) {
        if self.closing.is_cancelled() || !self.taps.begin(policy) {
            return;
        }
        let (inner, policy) = (Arc::clone(self), policy.clone());
        self.work.spawn(async move {
            let (network, wanted) = (inner.network.clone(), policy.clone());
            let prepare =
                move |libvirt: &dyn dev_box_core::libvirt::Libvirt| network.prepare(libvirt, &wanted);
            let made = blocking::with_libvirt(&inner.connection, prepare).await;
            let made = made.inspect_err(|error| {
                tracing::warn!(
                    error = error as &dyn std::error::Error,
                    "no tap was prepared: the next VM takes longer"
                );
            });
            let failed = made.is_err();
            let unwanted = inner.taps.end(&policy, made.ok().flatten());
            inner.discard(unwanted).await;
            if failed {
                // The rules of somebody else may have come in between.
                tokio::select! {
                    () = tokio::time::sleep(RETRY) => {}
                    () = inner.closing.cancelled() => {}
                }
            }
            inner.make_taps(&policy);
        });
    }

    /// An interface for a VM on a tap that waited; `None` where none did, or it turned out to be of no use.
    pub(super) async fn attach_prepared(
        &self,
        vm: &VmName,
        policy: &EgressPolicy,
    ) -> Option<(NetLease, Lent)> {
        let (tap, lent) = self.taps.take(policy)?;
        let (network, name) = (self.network.clone(), vm.clone());
        let attached = blocking::with_libvirt(&self.connection, move |libvirt| {
            network.attach_prepared(libvirt, &name, tap)
        });
        match attached.await {
            Ok(lease) => Some((lease, lent)),
            Err(error) => {
                tracing::warn!(%vm, error = &error as &dyn std::error::Error, "a tap that waited cannot be had");
                None
            }
        }
    }

    /// Of a VM whose domain is gone: its tap waits for the next one where that is wanted. Else the machine has its lease as
    /// before.
    pub(super) async fn take_back(self: &Arc<Self>, machine: &mut Machine) {
        let Some(lent) = machine.lent.take() else { return };
        let Some(lease) = machine
            .lease
            .take_if(|lease| !self.closing.is_cancelled() && self.taps.wants_back(lease.filter_policy()))
        else {
            return;
        };
        // What it sees is read from rules that go now.
        machine.events = None;
        let (network, policy) = (self.network.clone(), lease.filter_policy().clone());
        let kept =
            blocking::with_libvirt(&self.connection, move |libvirt| network.keep(libvirt, lease)).await;
        match kept {
            Ok(Some(tap)) => self.taps.put_back(&policy, tap, lent),
            Ok(None) => drop(lent),
            Err(error) => {
                drop(lent);
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "what is left of a VM's network is for the next sweep"
                );
            }
        }
        self.make_taps(&policy);
    }

    /// Takes all of them away.
    pub(super) async fn clear_taps(&self) {
        self.discard(self.taps.clear()).await;
    }

    async fn discard(&self, taps: impl IntoIterator<Item = PreparedTap>) {
        for tap in taps {
            let network = self.network.clone();
            let gone = blocking::with_libvirt(&self.connection, move |libvirt| network.discard(libvirt, tap));
            if let Err(error) = gone.await {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "a tap is left: `dev-box gc` tries again"
                );
            }
        }
    }
}
