//! Snapshots of users' VMs: libvirt's own, with what a VM has outside of libvirt kept in step.
//!
//! A snapshot that has memory knows the network interface of its time: MAC and IP address are in the guest's memory, the
//! tap's name is in libvirt's definition of then. So a VM that is taken back gets that address, or is not taken back.

use std::time::Duration;

use dev_box_core::agent::GuestAgent;
use dev_box_core::id::VmName;
use dev_box_core::libvirt::DeleteScope;
use dev_box_core::snapshot::{
    Contents, NewSnapshot, RestoreMode, RestoreOptions, Snapshot, SnapshotError, SnapshotManager,
    SnapshotName, SnapshotTree,
};
use dev_box_core::state::VmState;
use dev_box_core::vm::Vm;
use dev_box_net::NetLease;
use dev_box_observe::audit::AuditEvent;
use serde::Serialize;

use super::power::end;
use super::record::addresses;
use super::{ANSWER, Held, UserVmError, UserVms, concluded};

/// What became of a restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Restored {
    /// The snapshot.
    pub snapshot: SnapshotName,
    /// What the VM does now.
    pub state: VmState,
}

/// How long the guest's agent may take to be there, where file systems are to be frozen.
const AGENT_WAIT: Duration = Duration::from_secs(20);

async fn take(vm: &Vm, new: NewSnapshot) -> Result<Snapshot, SnapshotError> {
    if new.freeze && vm.state().await.is_ok_and(|report| report.state == VmState::Running) {
        // Of a VM just started, the guest is still booting.
        GuestAgent::new(vm).wait_ready(AGENT_WAIT).await?;
    }
    SnapshotManager::new(vm).create(new).await
}

impl UserVms {
    /// Takes a snapshot: memory and disk of a VM that runs, the disk of one that does not.
    ///
    /// # Errors
    /// [`UserVmError::Snapshot`], [`UserVmError::NotFound`], [`UserVmError::Busy`].
    pub async fn create_snapshot(&self, name: &VmName, new: NewSnapshot) -> Result<Snapshot, UserVmError> {
        let held = self.hold(name).await?;
        let vm = self.known(&held).await?;
        let act = self.begin(name, AuditEvent::SnapshotCreate { name: new.name.to_string().into() }).await?;
        let taken = take(&vm, new).await.map_err(UserVmError::from);
        if taken.is_ok() && vm.state().await.is_ok_and(|report| report.state == VmState::Running) {
            // It stood still meanwhile.
            self.remind(&held).await;
        }
        concluded(act, taken).await
    }

    /// Takes a VM back to a snapshot. What happened since is lost.
    ///
    /// # Errors
    /// [`UserVmError::Snapshot`], [`UserVmError::AddressTaken`], [`UserVmError::NotFound`], [`UserVmError::Busy`].
    pub async fn restore_snapshot(
        &self,
        name: &VmName,
        snapshot: &SnapshotName,
        options: RestoreOptions,
    ) -> Result<Restored, UserVmError> {
        let mut held = self.hold(name).await?;
        let vm = self.known(&held).await?;
        let act = self.begin(name, AuditEvent::SnapshotRestore { name: snapshot.to_string().into() }).await?;
        let restored = self.take_back(&mut held, &vm, snapshot, options).await;
        concluded(act, restored).await
    }

    async fn take_back(
        &self,
        held: &mut Held,
        vm: &Vm,
        name: &SnapshotName,
        options: RestoreOptions,
    ) -> Result<Restored, UserVmError> {
        let snapshots = SnapshotManager::new(vm);
        let snapshot = snapshots.get(name).await?;
        let lease = match options.mode {
            // The same QEMU, hence the same interface.
            RestoreMode::InPlace => self.lease_of(held).await?,
            RestoreMode::Restart => self.lease_for(held, vm, &snapshots, &snapshot).await?,
        };
        let restored = snapshots.restore(name, options).await;
        let state = vm.state().await?.state;
        let result = match (restored, state) {
            (Ok(()), VmState::Running) => self.introduce(held, lease.as_ref(), ANSWER).await,
            (restored, _) => restored.map_err(UserVmError::from),
        };
        let (address, ipv6) = addresses(lease.as_ref());
        drop(lease);
        if state.is_active() {
            if address.is_some() && held.record.address != address {
                (held.record.address, held.record.ipv6) = (address, ipv6);
                held.save()?;
            }
        } else {
            self.stopped(held).await?;
        }
        result?;
        Ok(Restored { snapshot: name.clone(), state })
    }

    /// The lease that a restart of QEMU needs: held, so that nobody takes the address while there is no tap.
    async fn lease_for(
        &self,
        held: &Held,
        vm: &Vm,
        snapshots: &SnapshotManager,
        snapshot: &Snapshot,
    ) -> Result<Option<NetLease>, UserVmError> {
        let machine = snapshots.machine(&snapshot.name).await?;
        let interface = machine.and_then(|machine| machine.into_spec().interface);
        let wanted = interface
            .filter(|_| snapshot.contents == Contents::MemoryAndDisk)
            .and_then(|interface| interface.ip);
        let lease = self.lease_of(held).await?;
        if wanted.is_none() || lease.as_ref().map(|lease| lease.address) == wanted {
            return Ok(lease);
        }
        // It runs with another address, or not at all.
        end(vm).await?;
        drop(lease);
        self.release_network(&held.record.name).await?;
        let lease = self.attach(held, wanted).await?;
        match (&lease, wanted) {
            (Some(got), Some(address)) if got.address != address => {
                drop(lease);
                self.release_network(&held.record.name).await?;
                Err(UserVmError::AddressTaken {
                    name: held.record.name.clone(),
                    snapshot: snapshot.name.clone(),
                    address,
                })
            }
            _ => Ok(lease),
        }
    }

    /// All snapshots of a VM, each under the one it descends from.
    ///
    /// # Errors
    /// [`UserVmError::NotFound`], [`UserVmError::Snapshot`].
    pub async fn snapshots(&self, name: &VmName) -> Result<SnapshotTree, UserVmError> {
        let record = self.record(name)?;
        match self.find(&record).await? {
            Some(vm) => Ok(SnapshotManager::new(&vm).tree().await?),
            None => Ok(SnapshotTree::default()),
        }
    }

    /// Deletes a snapshot, alone (its children move up) or with all that descend from it.
    ///
    /// # Errors
    /// [`UserVmError::NotFound`], [`UserVmError::Snapshot`], [`UserVmError::Busy`].
    pub async fn delete_snapshot(
        &self,
        name: &VmName,
        snapshot: &SnapshotName,
        scope: DeleteScope,
    ) -> Result<(), UserVmError> {
        let held = self.hold(name).await?;
        let vm = self.known(&held).await?;
        let act = self.begin(name, AuditEvent::SnapshotDelete { name: snapshot.to_string().into() }).await?;
        let deleted = SnapshotManager::new(&vm).delete(snapshot, scope).await;
        concluded(act, deleted.map_err(Into::into)).await
    }

    /// Libvirt's side of a VM: defined anew where somebody removed it.
    async fn known(&self, held: &Held) -> Result<Vm, UserVmError> {
        match self.domain(held).await? {
            Some(vm) => Ok(vm),
            None => Ok(Vm::define(&self.connection, &self.template(held, None)?).await?),
        }
    }
}
