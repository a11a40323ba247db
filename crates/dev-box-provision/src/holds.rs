//! [`Holds`]: which VMs stay paused, whoever lets others run on.
//!
//! A VM stands still for its user, in response to a finding, or until its network is as it should be, and for several of these at
//! once. The network's watch lets run again only what nobody else holds.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dev_box_core::id::VmName;

/// VMs of a provisioner that were paused to stay so. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Holds(Arc<Mutex<BTreeSet<VmName>>>);

impl Holds {
    fn held(&self) -> MutexGuard<'_, BTreeSet<VmName>> {
        // A set of names is whole whatever panicked beside it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.held().retain(is_there);
    }
}
