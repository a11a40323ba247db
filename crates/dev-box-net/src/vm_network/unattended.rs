//! VMs that run on when the process that started them has ended: whoever looks after one next takes its lease over.
//!
//! ```text
//!   start: attach, drop the lease        (runs: rules stand, record stays, the tap keeps the address)        stop: adopt, detach
//! ```

use dev_box_core::id::VmName;
use dev_box_core::libvirt::Networks;

use super::{NetError, NetLease, VmNetwork};
use crate::identity::{mac_of, tap_of};
use crate::lease::Owner;

impl VmNetwork {
    /// Takes over the lease on record in this VM's name, as its owner from now on. `None` when there is none, or when
    /// a process that lives holds it.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn adopt<L: Networks + ?Sized>(
        &self,
        libvirt: &L,
        vm: &VmName,
    ) -> Result<Option<NetLease>, NetError> {
        let Some(shape) = self.find(libvirt)? else { return Ok(None) };
        let leases = self.leases(&shape)?;
        let named = leases.list()?.into_iter().find_map(|(address, (owner, record))| {
            (owner == Owner::Dead && record?.vm == *vm).then_some(address)
        });
        let Some(mut lock) = named.map(|address| leases.adopt(address)).transpose()?.flatten() else {
            return Ok(None);
        };
        // Somebody else may have had it, and gone, between the look and the lock.
        let Some(record) = lock.record().filter(|record| record.vm == *vm) else { return Ok(None) };
        let (policy, filter, address) = (record.policy.clone(), record.filter.clone(), lock.address());
        let filter_policy = record.filter_policy().clone();
        if record.fingerprint.is_none() {
            // Its owner died before the rules stood, or before that was written down.
            self.apply(&shape, record, &mut lock, true)?;
        }
        Ok(Some(NetLease {
            vm: vm.clone(),
            mac: mac_of(address),
            address,
            prefix: shape.subnet().prefix(),
            gateway: shape.gateway(),
            ipv6: shape.ipv6_of(address).filter(|_| filter_policy.ipv6()),
            dns: vec![shape.gateway()],
            tap: tap_of(address),
            network: shape.name().to_owned(),
            bridge: shape.bridge().to_owned(),
            filter,
            policy,
            filter_policy,
            shape,
            lock,
        }))
    }
}
