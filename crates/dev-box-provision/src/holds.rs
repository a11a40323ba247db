//! [`Holds`]: which VMs stay paused, whoever lets others run on.
//!
//! A VM stands still for its user, in response to a finding, or until its network is as it should be, and for several of these at
//! once. The network's watch lets run again only what nobody else holds.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dev_box_core::id::VmName;

/// VMs of a provisioner that were paused to stay so, those that stand still for a moment, and those that its network's watch has
/// stopped. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Holds {
    held: Arc<Mutex<BTreeSet<VmName>>>,
    still: Arc<Mutex<BTreeSet<VmName>>>,
    stopped: Arc<Mutex<BTreeSet<VmName>>>,
}

/// While something reads a VM that stands still for it: whoever does that lets the VM go on afterwards, and nobody before.
#[derive(Debug)]
pub(crate) struct Moment {
    holds: Holds,
    vm: VmName,
}

impl Drop for Moment {
    fn drop(&mut self) {
        self.holds.still().remove(&self.vm);
    }
}

fn whole(names: &Mutex<BTreeSet<VmName>>) -> MutexGuard<'_, BTreeSet<VmName>> {
    // A set of names is whole whatever panicked beside it.
    names.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Holds {
    fn held(&self) -> MutexGuard<'_, BTreeSet<VmName>> {
        whole(&self.held)
    }

    fn still(&self) -> MutexGuard<'_, BTreeSet<VmName>> {
        whole(&self.still)
    }

    /// The watch over its network has stopped it; or found it stopped for a moment, after which it leaves it to the watch.
    pub(crate) fn stopped(&self, vm: &VmName) {
        whole(&self.stopped).insert(vm.clone());
    }

    /// Somebody's moment is on: it stands still, and will not for long.
    pub(crate) fn is_still(&self, vm: &VmName) -> bool {
        self.still().contains(vm)
    }

    /// Whether the watch has stopped it, and not let it go.
    pub(crate) fn is_stopped(&self, vm: &VmName) -> bool {
        whole(&self.stopped).contains(vm)
    }

    /// The watch has nothing against it any more.
    pub(crate) fn unstop(&self, vm: &VmName) {
        whole(&self.stopped).remove(vm);
    }

    /// Nobody lets it run until the moment is over, and who begins one lets it run on then.
    pub(crate) fn moment(&self, vm: &VmName) -> Moment {
        self.still().insert(vm.clone());
        Moment { holds: self.clone(), vm: vm.clone() }
    }

    /// Whether the watch over its network may let it run: nobody else has stopped it.
    pub(crate) fn lets_go(&self, vm: &VmName) -> bool {
        !self.holds(vm) && !self.still().contains(vm)
    }

    /// It stays paused from now on: said before it is paused.
    pub fn hold(&self, vm: &VmName) {
        self.held().insert(vm.clone());
    }

    /// It may run on.
    pub fn release(&self, vm: &VmName) {
        self.held().remove(vm);
    }

    /// Whether it stays paused.
    #[must_use]
    pub fn holds(&self, vm: &VmName) -> bool {
        self.held().contains(vm)
    }

    /// Forgets those that are not there any more.
    pub(crate) fn keep(&self, is_there: impl Fn(&VmName) -> bool) {
        self.held().retain(&is_there);
        whole(&self.stopped).retain(&is_there);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_lets_a_vm_run_in_somebody_elses_moment() {
        let (holds, vm) = (Holds::default(), VmName::new("dev-box-a").unwrap());
        assert!(holds.lets_go(&vm));
        let moment = holds.moment(&vm);
        assert!(!holds.lets_go(&vm) && !holds.holds(&vm), "but it is not to last");
        holds.hold(&vm);
        drop(moment);
        assert!(!holds.lets_go(&vm), "a hold outlasts it");
        holds.release(&vm);
        assert!(holds.lets_go(&vm));
    }
}
