//! [`UserVms`]: VMs that a user keeps: defined in libvirt, with a disk of their own, running on when whoever started them
//! has ended.
//!
//! ```text
//!                         start: network, definition, boot, identity
//!   (nothing) --create--> stopped ------------------------------------> running <--pause, resume--> paused
//!       ^                 |  ^  ^                                        |   |                        |
//!       +-----remove------+  |  +-- stop, destroy, the guest powers off -+---|------------------------+
//!                            +--------------- restore (a snapshot taken while it was off)
//! ```
//! The record in a VM's directory says what it is; libvirt's definition is written from it at each start, so that a
//! definition that somebody removed is no loss. An operation holds the directory's lock for as long as it takes and no
//! longer: the lock orders operations, and says nothing about whether the VM runs. So these VMs lie beside, not among,
//! those that a process owns, which [`crate::sweep`] removes when their locks are free.

mod console;
mod error;
mod guest;
mod power;
mod record;
mod snapshots;

use std::collections::HashMap;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dev_box_core::accel::{self, AcceleratorPolicy};
use dev_box_core::clock::Clock;
use dev_box_core::connection::LibvirtConnection;
use dev_box_core::id::{VmId, VmName};
use dev_box_core::libvirt::{DomainStats, LibvirtError};
use dev_box_core::spec::{DiskIo, ResourceProfile};
use dev_box_core::state::{StateReason, VmState};
use dev_box_core::vm::{Vm, VmError};
use dev_box_image::{ImageName, ImageStore, Overlay};
use dev_box_net::{EgressPolicy, VmNetwork};
use dev_box_observe::audit::{Accel, Actor, AuditEvent};
use dev_box_observe::{Act, AuditSink, Entry, Outcome};
use serde::Serialize;
use tokio::time::{Instant, sleep};

use crate::blocking;
use crate::provisioner::Settings;
use crate::reach::Reach;
use crate::vm_dir::{self, VmDir, VmDirError};

pub use console::Console;
pub use error::UserVmError;
pub use power::{Change, Stop};
pub use record::VmRecord;
pub use snapshots::Restored;

/// The directory of these VMs beneath the state root.
const DIRECTORY: &str = "user-vms";

/// What a new VM is to be.
#[derive(Debug, Clone, PartialEq)]
pub struct NewVm {
    /// Its name: the domain's, and, as far as it can be one, the guest's host name.
    pub name: VmName,
    /// The image its disk lies on.
    pub image: ImageName,
    /// CPUs, memory, disk and limits.
    pub resources: ResourceProfile,
    /// What its network lets through.
    pub policy: EgressPolicy,
    /// How its code is run, for as long as it exists.
    pub accelerator: AcceleratorPolicy,
}

/// A VM as it is now.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct UserVm {
    /// What is on record.
    #[serde(flatten)]
    pub record: VmRecord,
    /// What it does; `undefined` when libvirt does not know it (any more): `start` defines it anew.
    pub state: VmState,
    /// Why.
    pub reason: StateReason,
}

/// The VMs that users keep in one state root. A clone is another handle to the same.
#[derive(Debug, Clone)]
pub struct UserVms {
    settings: Settings,
    connection: LibvirtConnection,
    images: ImageStore,
    network: VmNetwork,
    reach: Arc<dyn Reach>,
    clock: Arc<dyn Clock>,
    audit: Arc<dyn AuditSink>,
    actor: Actor,
}

/// A VM whose lock this process holds.
struct Held {
    dir: VmDir,
    record: VmRecord,
}

impl Held {
    /// Writes the record anew.
    fn save(&self) -> Result<(), UserVmError> {
        self.record.write(&self.dir.record())
    }
}

impl UserVms {
    /// Over these parts, acting for `actor`.
    #[expect(
        clippy::too_many_arguments,
        reason = "each is a part of its own, and the facade is the one caller"
    )]
    #[must_use]
    pub fn new(
        settings: Settings,
        connection: LibvirtConnection,
        images: ImageStore,
        network: VmNetwork,
        reach: Arc<dyn Reach>,
        clock: Arc<dyn Clock>,
        audit: Arc<dyn AuditSink>,
        actor: Actor,
    ) -> Self {
        Self { settings, connection, images, network, reach, clock, audit, actor }
    }

    fn root(&self) -> PathBuf {
        root_in(&self.settings.state_root)
    }

    /// Makes a VM; it does not run yet.
    ///
    /// # Errors
    /// [`UserVmError::Exists`], [`UserVmError::NameTaken`], [`UserVmError::Image`]; nothing is left then.
    pub async fn create(&self, new: NewVm) -> Result<UserVm, UserVmError> {
        let image = self.images.get(&new.image).map_err(UserVmError::Image)?;
        let detected = new.accelerator.choose(accel::detect()).map_err(UserVmError::NoKvm)?;
        let record = VmRecord {
            version: VmRecord::VERSION,
            name: new.name,
            id: VmId::random(),
            owner: self.settings.owner.clone(),
            created: self.clock.now(),
            image: new.image,
            image_digest: image.manifest.digest,
            kernel: image.kernel(),
            initramfs: image.initramfs(),
            accelerator: detected.accelerator,
            resources: new.resources,
            disk_io: guest::disk_io(DiskIo::IoUring),
            policy: new.policy,
            address: None,
            ipv6: None,
            started: None,
            stopped: None,
        };
        let act = self
            .begin(
                &record.name,
                AuditEvent::VmCreate {
                    image: record.image.to_string().into(),
                    digest: Some(record.image_digest.to_string().into()),
                    accelerator: match detected.accelerator {
                        accel::Accelerator::Kvm => Accel::Kvm,
                        accel::Accelerator::Tcg => Accel::Tcg,
                    },
                    why_not_kvm: detected.why_not_kvm.map(|why| why.to_string().into()),
                    vcpus: record.resources.vcpus,
                    memory_mib: record.resources.memory.as_mib(),
                },
            )
            .await?;
        let made = self.make(record, image.disk()).await;
        concluded(act, made).await
    }

    async fn make(&self, record: VmRecord, base: PathBuf) -> Result<UserVm, UserVmError> {
        let dir = self.new_dir(&record.name)?;
        let mut held = Held { dir, record };
        match self.furnish(&mut held, base).await {
            Ok(()) => {
                let (state, reason) = (VmState::Shutoff, StateReason::Unspecified);
                Ok(UserVm { record: held.record, state, reason })
            }
            Err(error) => {
                let name = held.record.name.clone();
                if let Err(left) = held.dir.remove() {
                    tracing::warn!(vm = %name, error = %left, "not all of it could be removed; `dev-box gc` tries again");
                }
                Err(error)
            }
        }
    }

    async fn furnish(&self, held: &mut Held, base: PathBuf) -> Result<(), UserVmError> {
        // What is wrong with the request is said before anything is made.
        let template = self.template(held, None)?;
        let (path, size, limits, qemu) =
            (held.dir.overlay(), held.record.resources.disk, self.settings.space, self.settings.qemu);
        blocking::run(move || {
            let overlay = Overlay::create_within(&base, &path, Some(size), &limits)
                .map_err(|source| UserVmError::Disk(Box::new(source)))?;
            chown(overlay.path(), Some(qemu.uid), Some(qemu.gid))
                .map_err(|source| UserVmError::Disk(Box::new(source)))
        })
        .await
        .map_err(UserVmError::blocking)?;
        held.save()?;
        let mut defined = Vm::define(&self.connection, &template).await;
        if let Err(VmError::Libvirt(LibvirtError::Unsupported { message })) = &defined
            && held.record.disk_io == DiskIo::IoUring
        {
            tracing::info!(vm = %held.record.name, message, "its disk goes by threads");
            held.record.disk_io = DiskIo::Threads;
            held.save()?;
            defined = Vm::define(&self.connection, &self.template(held, None)?).await;
        }
        match defined {
            Ok(_) => Ok(()),
            Err(VmError::Libvirt(LibvirtError::NameTaken { .. })) => {
                Err(UserVmError::NameTaken { name: held.record.name.clone() })
            }
            Err(other) => Err(other.into()),
        }
    }

    /// A directory for a new VM. What a maker that was killed left of that name is removed first.
    fn new_dir(&self, name: &VmName) -> Result<VmDir, UserVmError> {
        let root = self.root();
        match VmDir::create(&root, name, self.settings.qemu) {
            Err(VmDirError::Exists(_)) => {
                remove_unrecorded(&root, name);
                VmDir::create(&root, name, self.settings.qemu).map_err(Into::into)
            }
            other => other.map_err(Into::into),
        }
    }

    /// Removes a VM with its disk and its snapshots. One that runs is destroyed if `force` says so.
    ///
    /// # Errors
    /// [`UserVmError::Running`] without `force`; [`UserVmError::NotFound`], [`UserVmError::Busy`].
    pub async fn remove(&self, name: &VmName, force: bool) -> Result<(), UserVmError> {
        let held = self.hold(name).await?;
        let vm = self.domain(&held).await?;
        if let Some(vm) = &vm
            && !force
            && vm.state().await?.state.is_active()
        {
            return Err(UserVmError::Running { name: name.clone() });
        }
        let act = self.begin(name, AuditEvent::VmDestroy { reason: "removed by its user".into() }).await?;
        let removed = async {
            if let Some(vm) = vm {
                vm.remove().await?;
            }
            self.release_network(name).await?;
            // Unlinking a large disk takes a while.
            blocking::run(move || held.dir.remove()).await.map_err(UserVmError::blocking)
        };
        concluded(act, removed.await).await
    }

    /// All of them, by name, as they are now.
    ///
    /// # Errors
    /// The state root cannot be read, a record neither, or libvirt does not answer.
    pub async fn list(&self) -> Result<Vec<UserVm>, UserVmError> {
        let root = self.root();
        let mut records = Vec::new();
        for name in vm_dir::list(&root)? {
            match VmRecord::read(&root.join(name.as_str())) {
                Ok(record) => records.push(record),
                // Just being made, or just gone.
                Err(UserVmError::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let states = self.connection.call(|libvirt| {
            let mut states = HashMap::new();
            for domain in libvirt.list()? {
                match libvirt.state(domain.id) {
                    Ok(report) => drop(states.insert(domain.id, report)),
                    Err(error) if error.is_not_found() => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(states)
        });
        let states = states.await.map_err(VmError::from)?;
        let state_of = |record: VmRecord| {
            let (state, reason) =
                states.get(&record.id).map_or((VmState::Undefined, StateReason::Unspecified), |report| {
                    (report.state, report.reason)
                });
            UserVm { record, state, reason }
        };
        Ok(records.into_iter().map(state_of).collect())
    }

    /// One of them, and its counters while it runs.
    ///
    /// # Errors
    /// [`UserVmError::NotFound`], or libvirt does not answer.
    pub async fn inspect(&self, name: &VmName) -> Result<(UserVm, Option<DomainStats>), UserVmError> {
        let record = self.record(name)?;
        let Some(vm) = self.find(&record).await? else {
            let (state, reason) = (VmState::Undefined, StateReason::Unspecified);
            return Ok((UserVm { record, state, reason }, None));
        };
        let info = vm.info().await?;
        let stats = info.state.is_active().then_some(info.stats);
        Ok((UserVm { record, state: info.state, reason: info.reason }, stats))
    }

    fn record(&self, name: &VmName) -> Result<VmRecord, UserVmError> {
        VmRecord::read(&self.root().join(name.as_str())).map_err(|error| error.of(name))
    }

    /// Takes the lock of a VM for one operation. One that is under way may be about to end: it is waited for a little.
    async fn hold(&self, name: &VmName) -> Result<Held, UserVmError> {
        let root = self.root();
        let missing = || UserVmError::NotFound { name: name.clone() };
        let deadline = Instant::now() + OTHERS;
        let dir = loop {
            match VmDir::adopt(&root, name) {
                Ok(dir) => break dir,
                Err(VmDirError::Owned(_)) if Instant::now() < deadline => sleep(BETWEEN_TRIES).await,
                Err(VmDirError::Owned(_)) => return Err(UserVmError::Busy { name: name.clone() }),
                Err(VmDirError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                    return Err(missing());
                }
                Err(error) => return Err(error.into()),
            }
        };
        // It may have been removed between the opening of its lock and the locking.
        let record = VmRecord::read(&root.join(name.as_str())).map_err(|error| error.of(name))?;
        Ok(Held { dir, record })
    }

    /// Libvirt's side of a VM; `None` when somebody removed it.
    async fn domain(&self, held: &Held) -> Result<Option<Vm>, UserVmError> {
        self.find(&held.record).await
    }

    async fn find(&self, record: &VmRecord) -> Result<Option<Vm>, UserVmError> {
        match Vm::find(&self.connection, record.name.as_str()).await {
            Ok(vm) if vm.id() == record.id => Ok(Some(vm)),
            Ok(_) => Err(UserVmError::NameTaken { name: record.name.clone() }),
            Err(VmError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The VM that must run for what is asked.
    async fn active(&self, held: &Held) -> Result<Vm, UserVmError> {
        let name = &held.record.name;
        let not_running = |state| UserVmError::NotRunning { name: name.clone(), state };
        let Some(vm) = self.domain(held).await? else { return Err(not_running(VmState::Undefined)) };
        match vm.state().await?.state {
            state if state.is_active() => Ok(vm),
            state => Err(not_running(state)),
        }
    }

    /// Gives back what the network has of a VM that does not run.
    async fn release_network(&self, name: &VmName) -> Result<(), UserVmError> {
        let (network, vm) = (self.network.clone(), name.clone());
        blocking::with_libvirt(&self.connection, move |libvirt| match network.adopt(libvirt, &vm)? {
            Some(lease) => network.detach(libvirt, lease),
            None => Ok(()),
        })
        .await
        .map_err(|source| UserVmError::Network { name: name.clone(), source })
    }

    async fn begin(&self, name: &VmName, event: AuditEvent) -> Result<Act, UserVmError> {
        let entry = Entry::intent(event).by(self.actor.clone()).vm(name);
        Ok(Act::begin(&self.audit, entry).await?)
    }
}

/// Where these VMs lie.
pub(crate) fn root_in(state_root: &Path) -> PathBuf {
    state_root.join(DIRECTORY)
}

/// Removes the directory of a VM that never came to be: one without a record whose maker is gone.
pub(crate) fn remove_unrecorded(root: &Path, name: &VmName) {
    // Nobody's lock is taken for a look: whoever wants to operate on the VM meanwhile would find it busy. Looked at again
    // under the lock, since its maker may have been at it.
    if !root.join(name.as_str()).join(vm_dir::RECORD).exists()
        && let Ok(dir) = VmDir::adopt_abandoned(root, name)
        && !dir.record().exists()
        && let Err(error) = dir.remove()
    {
        tracing::warn!(vm = %name, %error, "what is left of a VM that was never finished stays");
    }
}

/// The result of an act, once it is on record.
async fn concluded<T>(act: Act, result: Result<T, UserVmError>) -> Result<T, UserVmError> {
    match result {
        Ok(value) => {
            act.finish(Outcome::Ok).await?;
            Ok(value)
        }
        Err(error) => {
            // The failure is on its way up already.
            if let Err(audit) = act.finish(Outcome::failed(&error)).await {
                tracing::error!(error = %audit, "the failure of an act could not be audited");
            }
            Err(error)
        }
    }
}

/// How long an operation waits for the one before it, which may take much longer.
const OTHERS: Duration = Duration::from_secs(2);
/// From one try to the next.
const BETWEEN_TRIES: Duration = Duration::from_millis(20);

/// How long a guest may take to answer when it runs already.
const ANSWER: Duration = Duration::from_secs(15);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm_dir::QemuUser;

    #[test]
    fn only_what_never_became_a_vm_and_has_no_maker_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let me =
            QemuUser { uid: rustix::process::getuid().as_raw(), gid: rustix::process::getgid().as_raw() };
        let make = |name: &str| VmDir::create(root.path(), &name.parse().unwrap(), me).unwrap();
        let being_made = make("being-made");
        drop(make("never"));
        let recorded = make("recorded");
        std::fs::write(recorded.record(), "{}").unwrap();
        drop(recorded);
        let unlocked = make("unlocked");
        std::fs::write(unlocked.record(), "{}").unwrap();
        drop(unlocked);
        std::fs::remove_file(root.path().join("unlocked/lock")).unwrap();
        for name in vm_dir::list(root.path()).unwrap() {
            remove_unrecorded(root.path(), &name);
        }
        let left: Vec<String> = vm_dir::list(root.path()).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(left, ["being-made", "recorded", "unlocked"]);
        drop(being_made);
    }
}
