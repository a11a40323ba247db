//! VMs that run on when the process that started them has ended: whoever looks after one next takes its lease over.
//!
//! ```text
//!   start: attach, drop the lease        (runs: rules stand, record stays, the tap keeps the address)        stop: adopt, detach
//! ```

use dev_box_core::id::VmName;
use dev_box_core::libvirt::Networks;

use super::{NetError, NetLease, VmNetwork};
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
        let _lock = self.lock()?;
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
        if record.fingerprint.is_none() {
            // Its owner died before the rules stood, or before that was written down.
            self.apply(&shape, record.clone(), &mut lock)?;
        }
        Ok(Some(NetLease::new(shape, record, lock)))
    }
}
