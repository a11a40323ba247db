//! Forks: VMs that run on from the moment of one that runs on, too.
//!
//! ```text
//!  original   runs -> unmounts -> stands still: machine to a file, disk copied -> clock, mounts -> runs
//!                                                    |
//!  moment     QEMU that never runs: all of it loaded, memory into a shared file -> devices saved -> ends
//!                                                    |
//!  forks      clones of that template, like those of any
//! ```
//! The original stands still for as long as it takes to write its memory and to copy its disk, and not for the rest. Its memory
//! is not a template's, as it is the VM's own; so the file that QEMU writes is loaded once, by a QEMU whose memory is a
//! shared file, and from there on it is a template as [`crate::template`] makes them, which its clones map.
//!
//! What is begun here goes on when nobody waits for it any more: the original runs again in any case.

use std::error::Error;
use std::time::{Duration, Instant};

use dev_box_comm::message::{Configure, Request};
use dev_box_comm::session::{CallError, Session};
use dev_box_core::accel::{Accelerator, AcceleratorPolicy};
use dev_box_core::id::{IdError, VmName};
use dev_box_core::size::ByteSize;
use dev_box_core::spec::{NetworkMode, VmSpec};
use dev_box_core::state::VmState;
use dev_box_core::vm::{Vm, VmError};
use dev_box_exec::sink::BoxFuture;
use dev_box_exec::{
    Mounts, ProvisionError, Provisioner, ReadyVm, Resources, TransportChoice, VmFacts, VmRequest,
};
use dev_box_image::template::{
    Template, TemplateError, TemplateHold, TemplateManifest, TemplateStaging, TemplateStore,
};
use dev_box_image::{ImageName, Overlay, space};
use dev_box_net::policy::BROUGHT;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use super::ending::Use;
use super::{Inner, LibvirtProvisioner, Moment, ResumeError, Wanted, step};
use crate::admission::HostMemory;
use crate::blocking::{self, BlockingError};
use crate::mounts::{self, MountsError};
use crate::stopwatch::Stopwatch;
use crate::template::{self, MonitorError, monitor};
use crate::vm_dir::{QemuUser, VmDir};

/// How long the agent may take to hold the jobs.
const ANSWER: Duration = Duration::from_secs(10);

/// A VM to be forked.
#[derive(Debug, Clone)]
pub struct Original {
    /// It.
    pub vm: VmName,
    /// The channel to its agent.
    pub session: Session,
    /// What is known of it.
    pub facts: VmFacts,
    /// What it has mounted.
    pub mounts: Mounts,
}

/// Why a VM was not forked. It runs as before, but for `Resume` and `Remount`; nothing else is left.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// Its memory has another name than a clone's.
    #[error("it was made by an earlier dev-box, and cannot be forked: make it anew")]
    Unforkable,
    /// It stands still already, or has ended.
    #[error("it is {0}: only a VM that runs can be forked")]
    NotRunning(VmState),
    /// The host is out of something.
    #[error("not enough {resource}: {what}")]
    Exhausted {
        /// `memory` or `disk`.
        resource: &'static str,
        /// The figures.
        what: String,
    },
    /// What of the host it has mounted is in use.
    #[error("a VM cannot be forked while a directory of the host is mounted and used in it")]
    Busy(#[source] Box<dyn Error + Send + Sync>),
    /// Its mounts could not be taken away.
    #[error("what it has mounted could not be unmounted")]
    Unmount(#[source] Box<dyn Error + Send + Sync>),
    /// Libvirt does not tell about it.
    #[error("it cannot be looked at")]
    Look(#[source] VmError),
    /// It was put under another policy while it ran, under which its clones cannot be.
    #[error("its network policy cannot be carried over")]
    Network(#[source] Box<dyn Error + Send + Sync>),
    /// Its jobs were not held.
    #[error("its agent could not have its jobs stand still")]
    Hold(#[source] HoldError),
    /// It did not stand still.
    #[error("it could not be paused")]
    Pause(#[source] VmError),
    /// Its memory and devices were not written.
    #[error("its state could not be saved")]
    Save(#[source] MonitorError),
    /// There is no directory for it, or its disk was not copied.
    #[error("its files could not be made")]
    Files(#[from] BlockingError<TemplateError>),
    /// There is no name for it.
    #[error("no name could be made up")]
    Name(#[source] Box<dyn Error + Send + Sync>),
    /// It was not let run on as it should be.
    #[error("it was paused to be forked, and does not run on as it should: try `dev-box resume`")]
    Resume(#[source] ResumeError),
    /// It runs on without a mount.
    #[error("it runs on, and what it had mounted could not be mounted again")]
    Remount(#[source] Box<dyn Error + Send + Sync>),
    /// A step on the way from its moment to a template failed.
    #[error("no template was made of it")]
    Template(#[source] ProvisionError),
    /// Nothing begins any more.
    #[error("shutting down: no VM is forked")]
    ShuttingDown,
}

/// A VM's moment, from which clones run on: it makes them, for its own [`request`](Self::request). It lives as long as this or one of
/// them does.
#[derive(Debug)]
pub struct Fork {
    template: Template,
    request: VmRequest,
    paused: Duration,
    hold: Option<TemplateHold>,
    provisioner: LibvirtProvisioner,
}

impl Fork {
    /// What its clones are, as what the original is.
    #[must_use]
    pub fn request(&self) -> &VmRequest {
        &self.request
    }

    /// For how long the original stood still.
    #[must_use]
    pub fn paused(&self) -> Duration {
        self.paused
    }
}

impl Drop for Fork {
    fn drop(&mut self) {
        self.hold = None;
        // Outside of a runtime the next sweep finds it.
        if let Ok(runtime) = Handle::try_current() {
            let inner = self.provisioner.0.clone();
            self.provisioner.0.work.spawn_on(async move { inner.forget_forks().await }, &runtime);
        }
    }
}

impl Provisioner for Fork {
    fn provision<'a>(&'a self, request: &'a VmRequest) -> BoxFuture<'a, Result<ReadyVm, ProvisionError>> {
        self.provisioner.make(request, Wanted::Clone(Box::new(self.template.clone())))
    }

    fn check<'a>(&'a self, vm: &'a ReadyVm) -> BoxFuture<'a, Result<(), ProvisionError>> {
        self.provisioner.check(vm)
    }

    fn retire(&self, vm: ReadyVm) -> BoxFuture<'_, Result<(), ProvisionError>> {
        self.provisioner.retire(vm)
    }
}

impl LibvirtProvisioner {
    /// Takes a running VM's moment, for `count` clones. It stands still meanwhile, and runs on, its clock right and its mounts there,
    /// before this returns; whoever asks for anything else to be done to it has to wait until then, also when this future is dropped.
    ///
    /// # Errors
    /// [`ForkError`].
    pub async fn fork(&self, original: Original, count: usize) -> Result<Fork, ForkError> {
        let (reply, answer) = oneshot::channel();
        let provisioner = self.clone();
        let task = async move {
            // Nobody waits: it is dropped, and gone.
            let _ = reply.send(provisioner.moment_of(original, count).await);
        };
        self.0.work.spawn(task.instrument(tracing::Span::current()));
        answer.await.unwrap_or(Err(ForkError::ShuttingDown))
    }

    async fn moment_of(&self, original: Original, count: usize) -> Result<Fork, ForkError> {
        if self.0.closing.is_cancelled() {
            return Err(ForkError::ShuttingDown);
        }
        let mut watch = Stopwatch::start();
        let domain = Vm::find(self.connection(), original.vm.as_str()).await.map_err(ForkError::Look)?;
        match domain.state().await.map_err(ForkError::Look)?.state {
            VmState::Running => {}
            other => return Err(ForkError::NotRunning(other)),
        }
        let spec = domain.template().await.map_err(ForkError::Look)?.into_spec();
        if !template::can_be_forked(&spec.qemu_arguments) {
            return Err(ForkError::Unforkable);
        }
        let request = request_of(&spec, &original, self.network_now(&original.vm, &spec).await?);
        let disk = self.overlay_of(&original.vm);
        self.admit(&request, Overlay::allocated(&disk).unwrap_or(ByteSize::bytes(0)), count).await?;
        let usual = self.settings().qemu;
        let qemu = spec.run_as.map_or(usual, |user| QemuUser { uid: user.uid, gid: user.gid });
        let staged = self.stage(&request, qemu).await?;
        watch.step("claim");

        let began = Instant::now();
        let staged = self.freeze(&original, &domain, staged, qemu).await?;
        let paused = began.elapsed();
        watch.step("pause");

        self.load_and_save(&request, &staged).await?;
        watch.step("load and save");
        let (template, hold) = self.publish(&request, &original.facts, staged, qemu).await?;
        watch.step("publish");
        tracing::info!(vm = %original.vm, template = %template.manifest.name, steps = ?watch.steps(), "a VM was forked");
        Ok(Fork { template, request, paused, hold: Some(hold), provisioner: self.clone() })
    }

    /// What its network may do: that with which it was started, or what it was put under since.
    async fn network_now(&self, vm: &VmName, spec: &VmSpec) -> Result<NetworkMode, ForkError> {
        let lease = {
            let machines = self.0.machines();
            let lease = machines.get(vm).and_then(|machine| machine.lease.as_ref());
            lease.map(|lease| (lease.shape().clone(), lease.address))
        };
        let Some((shape, address)) = lease else { return Ok(spec.network.clone()) };
        let network = self.0.network.clone();
        let record = blocking::run(move || network.record_of(&shape, address)).await;
        let record = record.map_err(|error| ForkError::Network(error.into()))?;
        // One that was brought along is known by its name to the process alone to which it was.
        let is_brought = matches!(&spec.network, NetworkMode::Named(name) if name.starts_with(BROUGHT));
        match record.filter(|record| record.is_changed() || is_brought) {
            Some(record) => {
                let brought = self.0.network.policies().bring(record.policy);
                brought.map_err(|error| ForkError::Network(error.into()))
            }
            None => Ok(spec.network.clone()),
        }
    }

    /// Before anything is done to the original.
    async fn admit(&self, request: &VmRequest, disk: ByteSize, count: usize) -> Result<(), ForkError> {
        let memory = request.resources.memory.as_bytes();
        let clones = ByteSize::bytes(memory.saturating_mul(u64::try_from(count.max(1)).unwrap_or(u64::MAX)));
        let no_memory = |what: String| ForkError::Exhausted { resource: "memory", what };
        let host = HostMemory::read().map_err(|error| no_memory(error.to_string()))?;
        // Each takes its own when it is made.
        let (promises, limits) = (self.0.promises.clone(), self.settings().memory);
        let promised = blocking::run(move || promises.check(host, clones, limits)).await;
        promised.map_err(|why| no_memory(why.to_string()))?;
        // The file that QEMU writes and the one that clones map are there together for a while.
        let needed = ByteSize::bytes(memory.saturating_mul(2).saturating_add(disk.as_bytes()));
        let room = space::require(&self.settings().state_root, needed, &self.settings().space);
        room.map_err(|why| ForkError::Exhausted { resource: "disk", what: why.to_string() })
    }

    async fn stage(&self, request: &VmRequest, qemu: QemuUser) -> Result<TemplateStaging, ForkError> {
        let name = VmName::generate("fork").map_err(|error: IdError| ForkError::Name(error.into()))?;
        let name: ImageName = name.as_str().parse().map_err(|error| ForkError::Name(Box::new(error)))?;
        let (root, memory) = (self.settings().state_root.clone(), request.resources.memory.as_bytes());
        let staged = blocking::run(move || {
            let staged = TemplateStore::forks(root)?.stage_fork(&name)?;
            staged.prepare_fork(memory, qemu.uid, qemu.gid)?;
            Ok::<_, TemplateError>(staged)
        });
        Ok(staged.await?)
    }

    /// From a VM that runs to a VM that runs.
    async fn freeze(
        &self,
        original: &Original,
        domain: &Vm,
        staged: TemplateStaging,
        qemu: QemuUser,
    ) -> Result<TemplateStaging, ForkError> {
        let Original { vm, session, mounts, .. } = original;
        mounts::unmount(session, mounts).await.map_err(|error| match error {
            MountsError::Busy(_) | MountsError::Jobs => ForkError::Busy(error.into()),
            _ => ForkError::Unmount(error.into()),
        })?;
        let frozen = async {
            // What goes on in a fork begins when that knows who it is: its agent's next word to them is theirs to go on.
            hold_jobs(session).await.map_err(ForkError::Hold)?;
            // A verification of its network that ends meanwhile is no reason to let it run.
            let moment = self.0.holds.moment(vm);
            let was_held = self.0.watch.is_held(vm);
            let paused = match self.stop(vm, session).await {
                Ok(paused) => paused,
                Err(error) => {
                    drop(moment);
                    // Where it stood still for its network's sake, which may have been found sound since.
                    if was_held || self.0.watch.is_held(vm) {
                        let _ = self.go_on(vm, session).await;
                    }
                    // They go on by themselves after a while.
                    let _ = timeout(ANSWER, session.call(Request::Configure(Configure::default()))).await;
                    return Err(ForkError::Pause(error));
                }
            };
            let saved = self.save_whole(vm, domain, staged, qemu).await;
            drop(moment);
            let resumed = self.go_on(vm, session).await.map_err(ForkError::Resume);
            drop(paused);
            resumed.and(saved)
        };
        let frozen = frozen.await;
        if let Err(ForkError::Resume(error)) = &frozen
            && error.is_paused()
        {
            // Its agent answers nobody.
            return frozen;
        }
        let mounted = mounts::mount(session, mounts).await;
        let staged = frozen?;
        mounted.map_err(|error| ForkError::Remount(error.into()))?;
        Ok(staged)
    }

    async fn save_whole(
        &self,
        vm: &VmName,
        domain: &Vm,
        staged: TemplateStaging,
        qemu: QemuUser,
    ) -> Result<TemplateStaging, ForkError> {
        monitor::save_whole(domain, &staged.moment()).await.map_err(|error| match error {
            MonitorError::Mounted => ForkError::Busy(error.into()),
            error => ForkError::Save(error),
        })?;
        // QEMU has let go of it until it goes on.
        let disk = VmDir::overlay_in(&self.vms(), vm);
        let copied = blocking::run(move || {
            staged.copy_disk(&disk, qemu.gid)?;
            Ok::<_, TemplateError>(staged)
        });
        Ok(copied.await?)
    }

    /// What QEMU wrote becomes a template's memory and devices.
    async fn load_and_save(&self, request: &VmRequest, staged: &TemplateStaging) -> Result<(), ForkError> {
        let inner = &self.0;
        let (mut watch, never) = (Stopwatch::start(), CancellationToken::new());
        let moment = Moment { ram: staged.ram(), disk: staged.disk() };
        let claimed = inner.claim(request, Wanted::Moment(moment), &mut watch).await;
        let (mut machine, plan, origin) = claimed.map_err(ForkError::Template)?;
        let done = async {
            let started = inner.start(&mut machine, plan, &origin, request, &mut watch, &never).await?;
            let saved = async {
                monitor::load_whole(&started.vm, &staged.moment()).await?;
                if machine.lease.is_some() {
                    // A clone's stays unplugged until its filter stands.
                    monitor::link_down(&started.vm).await?;
                }
                monitor::leave_ram_alone(&started.vm).await?;
                monitor::save(&started.vm, &staged.state()).await
            };
            saved.await.map_err(step("loading the moment"))
        };
        let done = done.await;
        // Its files are nobody's only when its QEMU is gone.
        let gone = inner.end(machine, Use::GivenUp).await;
        done.map_err(ForkError::Template)?;
        gone.map_err(|left| ForkError::Template(step("removing the moment's VM")(left)))
    }

    async fn publish(
        &self,
        request: &VmRequest,
        facts: &VmFacts,
        staged: TemplateStaging,
        qemu: QemuUser,
    ) -> Result<(Template, TemplateHold), ForkError> {
        let (shape, host, image) = self.describe(request).await.map_err(ForkError::Template)?;
        // The image may have been built anew since it was booted.
        let digest = facts.image_digest.as_ref().and_then(|digest| digest.parse().ok());
        let root = self.settings().state_root.clone();
        let published = blocking::run(move || {
            let ([ram, state, disk], hold) = staged.seal_fork(qemu.gid)?;
            let manifest = TemplateManifest {
                format: TemplateManifest::FORMAT,
                name: staged.name().clone(),
                created: image.now,
                image: image.name,
                image_digest: digest.unwrap_or(image.digest),
                setup: Vec::new(),
                shape,
                host,
                ram,
                state,
                disk,
            };
            Ok::<_, TemplateError>((TemplateStore::forks(root)?.publish(staged, &manifest)?, hold))
        });
        Ok(published.await?)
    }
}

impl Inner {
    /// Removes the moments from which no VM runs on any more.
    pub(super) async fn forget_forks(&self) {
        let root = self.settings.state_root.clone();
        let removed = blocking::run(move || match TemplateStore::existing_forks(root) {
            Some(forks) => forks.remove_unused(),
            None => Ok(Vec::new()),
        });
        match removed.await {
            Ok(removed) if removed.is_empty() => {}
            Ok(removed) => tracing::debug!(?removed, "what VMs were forked from is gone with them"),
            Err(error) => tracing::warn!(
                error = &error as &dyn Error,
                "what a VM was forked from stays until `dev-box gc`"
            ),
        }
    }
}

/// Why a VM's jobs were not held.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// The agent says why.
    #[error("it was not done")]
    Refused(#[source] CallError),
    /// The agent says nothing.
    #[error("it has not answered within {} s", ANSWER.as_secs())]
    Silent,
}

async fn hold_jobs(session: &Session) -> Result<(), HoldError> {
    let hold = Configure { hold_jobs: true, ..Configure::default() };
    match timeout(ANSWER, session.call(Request::Configure(hold))).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(HoldError::Refused(error)),
        Err(_) => Err(HoldError::Silent),
    }
}

/// What a clone of it has to be: by what it is, and not by what was asked for, once.
fn request_of(spec: &VmSpec, original: &Original, network: NetworkMode) -> VmRequest {
    VmRequest {
        image: original.facts.image.clone(),
        resources: Resources {
            cpus: spec.resources.vcpus,
            memory: spec.resources.memory,
            disk: spec.resources.disk,
        },
        network,
        accelerator: match spec.accelerator {
            Accelerator::Kvm => AcceleratorPolicy::Kvm,
            Accelerator::Tcg => AcceleratorPolicy::Tcg,
        },
        transport: match spec.vsock_cid {
            Some(_) => TransportChoice::Vsock,
            None => TransportChoice::Serial,
        },
        mounts: original.mounts.clone(),
        purpose: "fork".to_owned(),
    }
}
