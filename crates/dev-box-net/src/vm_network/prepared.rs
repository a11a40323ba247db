//! Taps whose filter is in force before there is a VM: [`PreparedTap`].
//!
//! ```text
//!   prepare: address, tap on the bridge, filter bound   (waits)   attach_prepared: rules, names -> NetLease   (VM)
//!                                                          ^                                                    |
//!                                                          +------------- keep: rules, names away --------------+
//! ```
//! libvirt takes a second or so to put a filter in force, of which nothing depends on the VM: its address, its Ethernet address
//! and its tap's name go together. While a tap waits, the guard lets nothing through that comes from it.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use dev_box_core::id::VmName;
use dev_box_core::libvirt::{LibvirtError, Networks, NwFilters, past_conflicts};

use super::upkeep::LOOKS;
use super::{NetError, NetLease, VmNetwork, libvirt_failed};
use crate::identity::{mac_of, tap_of};
use crate::lease::{AddressLease, LeaseRecord, TapUse};
use crate::network::NetworkShape;
use crate::policy::EgressPolicy;
use crate::xml::filter_binding::filter_binding;
use crate::xml::nwfilter::FilterDefinition;

/// A tap that waits for a VM, its filter in force. When its process dies, or drops this, [`VmNetwork::sweep`] removes it.
#[derive(Debug)]
pub struct PreparedTap {
    shape: NetworkShape,
    record: LeaseRecord,
    lock: AddressLease,
}

impl PreparedTap {
    /// The policy whose filter it has.
    pub fn policy(&self) -> &EgressPolicy {
        &self.record.policy
    }

    /// Its name on the host.
    pub fn tap(&self) -> String {
        tap_of(self.lock.address())
    }
}

impl VmNetwork {
    /// Makes a tap for a VM under `policy` that is to come. `None` under `isolated`. A second or so.
    ///
    /// # Errors
    /// [`NetError`]; nothing is left then.
    pub fn prepare<L: Networks + NwFilters + ?Sized>(
        &self,
        libvirt: &L,
        policy: &EgressPolicy,
    ) -> Result<Option<PreparedTap>, NetError> {
        if policy.is_isolated() {
            return Ok(None);
        }
        let nobody = VmName::disposable();
        let (shape, record, lock) = self.claim(libvirt, &nobody, policy, None, TapUse::Waiting)?;
        let address = lock.address();
        let made = self.taps.make(&tap_of(address), mac_of(address), shape.bridge()).map_err(NetError::from);
        match made.and_then(|()| bind(libvirt, &record, address)) {
            Ok(()) => Ok(Some(PreparedTap { shape, record, lock })),
            Err(error) => Err(self.undo(libvirt, lock, &shape, &record, error)),
        }
    }

    /// Gives a VM a tap that waited.
    ///
    /// # Errors
    /// [`NetError`]; the tap is gone then.
    pub fn attach_prepared<L: NwFilters + ?Sized>(
        &self,
        libvirt: &L,
        vm: &VmName,
        tap: PreparedTap,
    ) -> Result<NetLease, NetError> {
        let PreparedTap { shape, record, lock } = tap;
        let (name, bridge) = (tap_of(lock.address()), shape.bridge());
        if self.settings.host.is_joined(&name, bridge) != Some(true)
            && let Err(error) = self.taps.rejoin(&name, bridge)
        {
            return Err(self.undo(libvirt, lock, &shape, &record, error.into()));
        }
        let record = LeaseRecord { vm: vm.clone(), tap: TapUse::Prepared, ..record };
        self.open(libvirt, shape, record, lock)
    }

    /// Takes everything of a VM's network away but its tap, which waits for the next VM. To be called when the VM is gone.
    /// `None` when the tap cannot serve another one, and is gone like all of it: libvirt made it, somebody has it open, or its
    /// filter is not in force.
    ///
    /// # Errors
    /// [`NetError`]; what is left is found by [`VmNetwork::sweep`].
    pub fn keep<L: NwFilters + ?Sized>(
        &self,
        libvirt: &L,
        lease: NetLease,
    ) -> Result<Option<PreparedTap>, NetError> {
        let address = lease.address;
        let record = LeaseRecord {
            vm: VmName::disposable(),
            policy: lease.filter_policy.clone(),
            filter: lease.filter.clone(),
            filter_policy: None,
            fingerprint: None,
            tap: TapUse::Waiting,
        };
        let in_force = || {
            let records = BTreeMap::from([(address, record.clone())]);
            let in_force = self.filters_in_force(&lease.shape, &records, LOOKS, &mut None)?;
            Ok::<_, NetError>(in_force.get(&address) == Some(&true))
        };
        if !lease.is_prepared() || self.settings.host.has_open_tap(&tap_of(address)) || !in_force()? {
            self.detach(libvirt, lease)?;
            return Ok(None);
        }
        let NetLease { shape, mut lock, .. } = lease;
        self.set_aside(&mut lock, &record)?;
        self.close(address)?;
        Ok(Some(PreparedTap { shape, record, lock }))
    }

    /// Takes a tap away that waits.
    ///
    /// # Errors
    /// [`NetError`]; what is left is found by [`VmNetwork::sweep`].
    pub fn discard<L: NwFilters + ?Sized>(&self, libvirt: &L, tap: PreparedTap) -> Result<(), NetError> {
        let PreparedTap { shape, record, lock } = tap;
        self.end(libvirt, lock, &shape, &record.filter, record.tap)
    }

    /// Puts the filter of a prepared tap in force anew: libvirt does so only where it was not bound.
    pub(super) fn rebind<L: NwFilters + ?Sized>(
        &self,
        libvirt: &L,
        record: &LeaseRecord,
        address: Ipv4Addr,
    ) -> Result<(), NetError> {
        unbind(libvirt, address)?;
        bind(libvirt, record, address)
    }

    /// The tap first: without it nothing passes, filtered or not.
    pub(super) fn remove_tap<L: NwFilters + ?Sized>(
        &self,
        libvirt: &L,
        address: Ipv4Addr,
    ) -> Result<(), NetError> {
        self.taps.remove(&tap_of(address))?;
        unbind(libvirt, address)
    }
}

fn bind<L: NwFilters + ?Sized>(libvirt: &L, record: &LeaseRecord, address: Ipv4Addr) -> Result<(), NetError> {
    let parameters = FilterDefinition::parameters(record.filter_policy(), address);
    let xml = filter_binding(&record.filter, &parameters, address);
    past_conflicts(|| libvirt.bind_filter(&xml)).map_err(libvirt_failed("put the tap's filter in force"))
}

fn unbind<L: NwFilters + ?Sized>(libvirt: &L, address: Ipv4Addr) -> Result<(), NetError> {
    match libvirt.unbind_filter(&tap_of(address)) {
        Ok(()) | Err(LibvirtError::NoSuchFilter { .. }) => Ok(()),
        Err(error) => Err(libvirt_failed("take the filter off the tap")(error)),
    }
}

#[cfg(test)]
mod tests;
