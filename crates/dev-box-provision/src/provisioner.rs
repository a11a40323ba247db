//! [`LibvirtProvisioner`]: makes a VM for each request, cloned from a template or booted, and takes it away again.
//!
//! ```text
//!                                                     +-> plug in --+
//!  request -> claim -> disk -> network -> start [-> load]            +-> configure -> ReadyVm
//!               |        |        |          |         +-> connect --+      |
//!               +--------+--------+----------+---------------+--------------+---- failed, or nobody waits: torn down
//! ```
//! A VM starts with its interface's link down: the guard stands before it starts, and libvirt, which takes a second or so, puts
//! the filter on while the guest boots. Then the link goes up. See docs/adr/0007.
//!
//! A VM is made on a task of its own, so that a caller who goes away half-way leaves nothing behind: the task notices
//! between two steps, and takes down what there is.

use std::collections::HashMap;
use std::fmt;
use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

use dev_box_comm::message::Request;
use dev_box_comm::session::Session;
use dev_box_comm::share;
use dev_box_comm::transport::{self, Preference, Probes, TransportKind};
use dev_box_core::accel::{self, Accelerator};
use dev_box_core::clock::{Clock, EasternTime};
use dev_box_core::connection::LibvirtConnection;
use dev_box_core::id::VmName;
use dev_box_core::libvirt::{LibvirtError, StartMode};
use dev_box_core::spec::{
    BootSource, Channel, Disk, DiskCache, Ownership, ResourceProfile, RunAs, Share, VmSpec,
};
use dev_box_core::template::VmTemplate;
use dev_box_core::vm::{Vm, VmError};
use dev_box_exec::sink::BoxFuture;
use dev_box_exec::workspace::Owner;
use dev_box_exec::{NetworkFacts, ProvisionError, Provisioner, ReadyVm, TransportChoice, VmFacts, VmRequest};
use dev_box_image::template::{HostFacts, Shape, Template, TemplateError, TemplateStore};
use dev_box_image::{Digest, Image, ImageName, ImageStore, Overlay, OverlayError, SpaceLimits};
use dev_box_net::watch::WatchHandle;
use dev_box_net::{EgressPolicy, NetEvent, NetLease, VmNetwork};
use dev_box_observe::AuditSink;
use tokio::sync::{broadcast, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

use crate::blocking::{self, BlockingError};
use crate::console;
use crate::identity::{self, network_config};
use crate::machine::Machine;
use crate::network_watch::{self, EventsTask, NetworkNews};
use crate::reach::{self, Address, Reach, ReachError};
use crate::stopwatch::Stopwatch;
use crate::template::{self, TemplateUse};
use crate::vm_dir::{QemuUser, VmDir};

/// How VMs are made here.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The state root: VMs have their directories in `vms` beneath it.
    pub state_root: PathBuf,
    /// The user QEMU runs as.
    pub qemu: QemuUser,
    /// Who asks, for the domains' metadata.
    pub owner: String,
    /// From the start of QEMU to the agent's first answer.
    pub boot_timeout: Duration,
    /// Of the host's disk.
    pub space: SpaceLimits,
}

/// Makes VMs, by cloning a template where one serves, else by booting. A clone of it is another handle to the same one.
#[derive(Debug, Clone)]
pub struct LibvirtProvisioner(Arc<Inner>, TemplateUse);

/// What a VM comes from.
#[derive(Debug)]
enum Origin {
    /// A boot of its image.
    Boot,
    /// A boot of its image, with its memory in this file.
    Recorded(PathBuf),
    /// A template.
    Clone(Box<Template>),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Boot => f.write_str("a boot"),
            Self::Recorded(_) => f.write_str("a boot that becomes a template"),
            Self::Clone(template) => write!(f, "the template {}", template.manifest.name),
        }
    }
}

/// What a VM is to come from.
#[derive(Debug)]
enum Wanted {
    /// What serves best.
    Ready(TemplateUse),
    /// A boot with its memory in this file.
    Recorded(PathBuf),
}

/// What of an image a template remembers, and when.
pub(crate) struct Made {
    pub(crate) name: ImageName,
    pub(crate) digest: Digest,
    pub(crate) now: EasternTime,
}

pub(crate) struct Inner {
    settings: Settings,
    pub(crate) connection: LibvirtConnection,
    images: ImageStore,
    pub(crate) network: VmNetwork,
    pub(crate) news: NetworkNews,
    pub(crate) watch: WatchHandle,
    watching: Once,
    reach: Arc<dyn Reach>,
    clock: Arc<dyn Clock>,
    machines: Mutex<HashMap<VmName, Machine>>,
    work: TaskTracker,
    pub(crate) closing: CancellationToken,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LibvirtProvisioner").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl LibvirtProvisioner {
    /// A provisioner over these parts.
    #[must_use]
    pub fn new(
        settings: Settings,
        connection: LibvirtConnection,
        images: ImageStore,
        network: VmNetwork,
        reach: Arc<dyn Reach>,
        clock: Arc<dyn Clock>,
    ) -> Self {
        Self(
            Arc::new(Inner {
                settings,
                connection,
                images,
                network,
                news: NetworkNews::new(Arc::clone(&clock)),
                watch: WatchHandle::default(),
                watching: Once::new(),
                reach,
                clock,
                machines: Mutex::default(),
                work: TaskTracker::new(),
                closing: CancellationToken::new(),
            }),
            TemplateUse::default(),
        )
    }

    /// The same, with another choice of templates.
    #[must_use]
    pub fn using(&self, templates: TemplateUse) -> Self {
        Self(Arc::clone(&self.0), templates)
    }

    /// The templates of this state root.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn templates(&self) -> Result<TemplateStore, BlockingError<TemplateError>> {
        Ok(TemplateStore::open(&self.0.settings.state_root)?)
    }

    /// Has what VMs' networks see audited from now on: drops, new destinations, DNS, tampering.
    pub fn audit_network_to(&self, sink: Arc<dyn AuditSink>) {
        self.0.news.audit_to(sink);
    }

    /// What VMs' networks see, from now on. Who falls behind loses the oldest, and is told how many.
    #[must_use]
    pub fn network_events(&self) -> broadcast::Receiver<NetEvent> {
        self.0.news.subscribe()
    }

    /// Whether VMs' networks are as they should be.
    #[must_use]
    pub fn network_watch(&self) -> WatchHandle {
        self.0.watch.clone()
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.0.settings
    }

    pub(crate) fn connection(&self) -> &LibvirtConnection {
        &self.0.connection
    }

    /// Where the disk of a VM of ours lies.
    pub(crate) fn overlay_of(&self, name: &VmName) -> PathBuf {
        VmDir::overlay_in(&self.0.settings.state_root.join("vms"), name)
    }

    /// Boots a VM whose memory lies in `ram`.
    pub(crate) async fn provision_recorded(
        &self,
        request: &VmRequest,
        ram: PathBuf,
    ) -> Result<ReadyVm, ProvisionError> {
        self.make(request, Wanted::Recorded(ram)).await
    }

    /// What a template of this request, made here and now, depends on.
    pub(crate) async fn describe(
        &self,
        request: &VmRequest,
    ) -> Result<(Shape, HostFacts, Made), ProvisionError> {
        let plan = self.0.plan(request)?;
        let host = template::host_facts(&self.0.connection, plan.accelerator).await;
        let manifest = plan.image.manifest;
        let made = Made { name: manifest.name, digest: manifest.digest, now: self.0.clock.now() };
        Ok((template::shape(request, word(plan.transport)), host.map_err(step("asking libvirt"))?, made))
    }

    fn make(&self, request: &VmRequest, wanted: Wanted) -> BoxFuture<'_, Result<ReadyVm, ProvisionError>> {
        let gone = CancellationToken::new();
        // Dropped with the future below: then nobody waits for the VM any more.
        let waiting = gone.clone().drop_guard();
        let (reply, answer) = oneshot::channel();
        let (inner, request) = (Arc::clone(&self.0), request.clone());
        inner.watching.call_once(|| {
            tokio::spawn(network_watch::watch_over(Arc::downgrade(&inner), inner.watch.clone()));
        });
        // What is logged of it belongs to whoever asked.
        let span = tracing::Span::current();
        let task = async move {
            let made = inner.make(&request, wanted, &gone).await;
            if let Err(Ok(unwanted)) = reply.send(made)
                && let Err(error) = inner.take_down(&unwanted.name).await
            {
                tracing::warn!(vm = %unwanted.name, %error, "a VM nobody waited for was not removed");
            }
        };
        self.0.work.spawn(task.instrument(span));
        Box::pin(async move {
            let _waiting = waiting;
            answer.await.unwrap_or(Err(ProvisionError::ShuttingDown))
        })
    }

    /// Makes no further VM, gives up those being made, and waits until everything given up or retired is gone.
    /// VMs that are in use stay.
    pub async fn drain(&self) {
        self.0.closing.cancel();
        self.0.work.close();
        self.0.work.wait().await;
    }
}

impl Provisioner for LibvirtProvisioner {
    fn provision<'a>(&'a self, request: &'a VmRequest) -> BoxFuture<'a, Result<ReadyVm, ProvisionError>> {
        self.make(request, Wanted::Ready(self.1.clone()))
    }

    fn retire(&self, vm: ReadyVm) -> BoxFuture<'_, Result<(), ProvisionError>> {
        let inner = Arc::clone(&self.0);
        let task = self.0.work.spawn(async move {
            vm.session.close();
            inner.take_down(&vm.name).await
        });
        Box::pin(async move { task.await.unwrap_or_else(|join| Err(step("retire")(join))) })
    }
}

/// There is no disk, or QEMU's user cannot have it.
#[derive(Debug, thiserror::Error)]
enum DiskError {
    #[error(transparent)]
    Overlay(OverlayError),
    #[error("cannot give QEMU's user the disk")]
    Owner(#[source] std::io::Error),
}

/// The VM ended, or its agent did not understand us.
#[derive(Debug, thiserror::Error)]
#[error("the guest did not come up{}", ending(console))]
struct BootError {
    console: String,
    source: ReachError,
}

fn ending(console: &str) -> String {
    if console.is_empty() { String::new() } else { format!("; its console ends with:\n{console}\n") }
}

fn step<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    step: &'static str,
) -> impl FnOnce(E) -> ProvisionError {
    move |source| ProvisionError::Step { step: step.to_owned(), source: source.into() }
}

fn unsatisfiable(what: impl fmt::Display) -> ProvisionError {
    ProvisionError::Unsatisfiable { what: what.to_string() }
}

/// What is decided before anything is made.
struct Plan {
    name: VmName,
    image: Image,
    accelerator: Accelerator,
    why_not_kvm: Option<String>,
    transport: TransportKind,
    cid: Option<u32>,
    policy: EgressPolicy,
}

impl Inner {
    fn machines(&self) -> MutexGuard<'_, HashMap<VmName, Machine>> {
        // A map of owned values is whole whatever panicked beside it.
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// VMs that are ready and have a network.
    pub(crate) fn networked(&self) -> Vec<VmName> {
        let machines = self.machines();
        machines.iter().filter(|(_, machine)| machine.lease.is_some()).map(|(name, _)| name.clone()).collect()
    }

    async fn make(
        &self,
        request: &VmRequest,
        wanted: Wanted,
        gone: &CancellationToken,
    ) -> Result<ReadyVm, ProvisionError> {
        let mut watch = Stopwatch::start();
        let plan = self.plan(request)?;
        let origin = self.origin(&plan, request, wanted).await?;
        let dir = VmDir::create(&self.settings.state_root.join("vms"), &plan.name, self.settings.qemu)
            .map_err(step("making the VM's directory"))?;
        watch.step("claim");
        let mut machine = Machine::new(dir);
        match self.raise(&mut machine, plan, &origin, request, watch, gone).await {
            Ok(vm) => {
                tracing::info!(vm = %vm.name, from = %origin, steps = ?vm.facts.timings, "a VM is ready");
                self.machines().insert(vm.name.clone(), machine);
                Ok(vm)
            }
            Err(error) => {
                let name = machine.dir.name().clone();
                if let Err(left) = machine.tear_down(&self.connection, &self.network).await {
                    tracing::warn!(vm = %name, error = &left as &dyn std::error::Error, "not all of it could be removed; `dev-box gc` tries again");
                }
                Err(error)
            }
        }
    }

    async fn origin(
        &self,
        plan: &Plan,
        request: &VmRequest,
        wanted: Wanted,
    ) -> Result<Origin, ProvisionError> {
        let templates = match wanted {
            Wanted::Recorded(ram) => return Ok(Origin::Recorded(ram)),
            Wanted::Ready(TemplateUse::Never) => return Ok(Origin::Boot),
            Wanted::Ready(templates) => templates,
        };
        let host = template::host_facts(&self.connection, plan.accelerator).await;
        let host = host.map_err(step("asking libvirt"))?;
        let (root, image) = (self.settings.state_root.clone(), plan.image.clone());
        let shape = template::shape(request, word(plan.transport));
        let chosen = blocking::run(move || {
            let store = TemplateStore::open(root)?;
            template::choose(&store, &templates, &image, &shape, &host)
        });
        Ok(match chosen.await.map_err(unsatisfiable)? {
            Some(template) => Origin::Clone(Box::new(template)),
            None => Origin::Boot,
        })
    }

    async fn take_down(&self, name: &VmName) -> Result<(), ProvisionError> {
        let Some(machine) = self.machines().remove(name) else { return Ok(()) };
        machine.tear_down(&self.connection, &self.network).await.map_err(step("removing the VM"))
    }

    fn plan(&self, request: &VmRequest) -> Result<Plan, ProvisionError> {
        let image = request.image.parse().map_err(unsatisfiable)?;
        let image = self.images.get(&image).map_err(unsatisfiable)?;
        let detected = request
            .accelerator
            .choose(accel::detect())
            .map_err(|why| unsatisfiable(format_args!("KVM is required and does not work here: {why}")))?;
        let preference = match request.transport {
            TransportChoice::Auto => Preference::Auto,
            TransportChoice::Serial => Preference::Serial,
            TransportChoice::Vsock => Preference::Vsock,
        };
        let transport = transport::choose(preference, &Probes::read()).map_err(unsatisfiable)?.kind;
        let cid = match transport {
            TransportKind::Serial => None,
            TransportKind::Vsock => Some(random_cid()?),
        };
        Ok(Plan {
            name: VmName::disposable(),
            image,
            accelerator: detected.accelerator,
            why_not_kvm: detected.why_not_kvm.map(|why| why.to_string()),
            transport,
            cid,
            policy: self
                .network
                .policies()
                .get(&request.network)
                .map_err(step("finding the network policy"))?,
        })
    }

    /// Fails between two steps when the caller has gone or the provisioner is closing.
    fn wanted(&self, gone: &CancellationToken) -> Result<(), ProvisionError> {
        if gone.is_cancelled() || self.closing.is_cancelled() {
            return Err(ProvisionError::ShuttingDown);
        }
        Ok(())
    }

    async fn raise(
        &self,
        machine: &mut Machine,
        plan: Plan,
        origin: &Origin,
        request: &VmRequest,
        mut watch: Stopwatch,
        gone: &CancellationToken,
    ) -> Result<ReadyVm, ProvisionError> {
        let base = match origin {
            Origin::Clone(template) => template.disk(),
            Origin::Boot | Origin::Recorded(_) => plan.image.disk(),
        };
        let path = machine.dir.overlay();
        let (size, limits, qemu) = (request.resources.disk, self.settings.space, self.settings.qemu);
        let overlay = blocking::run(move || {
            let overlay =
                Overlay::create_within(&base, &path, Some(size), &limits).map_err(DiskError::Overlay)?;
            chown(overlay.path(), Some(qemu.uid), Some(qemu.gid)).map_err(DiskError::Owner)?;
            Ok::<_, DiskError>(overlay)
        });
        machine.overlay = Some(overlay.await.map_err(step("making the disk"))?);
        watch.step("disk");
        self.wanted(gone)?;

        let (network, vm, policy) = (self.network.clone(), plan.name.clone(), plan.policy.clone());
        let attached =
            blocking::with_libvirt(&self.connection, move |libvirt| network.attach(libvirt, &vm, &policy))
                .await;
        machine.lease = attached.map_err(step("attaching the network"))?;
        let events = |lease| EventsTask::start(&self.network, lease, self.news.clone());
        machine.events = machine.lease.as_ref().map(events);
        watch.step("network");
        self.wanted(gone)?;

        let mut spec = self.spec(&machine.dir, &plan, request, machine.lease.as_ref());
        let id = spec.id;
        let mode = match origin {
            Origin::Boot => StartMode::Running,
            Origin::Recorded(ram) => {
                spec.qemu_arguments = template::recording_arguments(ram, spec.resources.memory);
                StartMode::Running
            }
            Origin::Clone(template) => {
                spec.qemu_arguments = template::clone_arguments(template);
                StartMode::Paused
            }
        };
        let template = VmTemplate::new(spec).map_err(unsatisfiable)?;
        machine.started = true;
        let vm = Vm::create_in(&self.connection, &template.unplugged(), mode).await;
        let vm = vm.map_err(step("starting the VM"))?;
        watch.step("start");
        if let Origin::Clone(origin) = origin {
            template::wake(&vm, origin).await.map_err(step("loading the template"))?;
            watch.step("load");
        }

        let plug = async {
            match vm.plug_in(&template).await {
                // It is over, of which its channel tells more.
                Err(error) if is_over(&error) => std::future::pending().await,
                plugged => plugged.map_err(step("putting the network's filter in force")),
            }
        };
        let ((session, agent), ()) = tokio::select! {
            both = async { tokio::try_join!(self.connect(&machine.dir, &plan), plug) } => both?,
            () = gone.cancelled() => return Err(ProvisionError::ShuttingDown),
            () = self.closing.cancelled() => return Err(ProvisionError::ShuttingDown),
        };
        watch.step(if matches!(origin, Origin::Clone(_)) { "answer" } else { "boot" });

        let network = machine.lease.as_ref().map(network_config);
        let identity = identity::identity(&plan.name, id, &*self.clock, network)
            .map_err(step("configuring the guest"))?;
        let configured =
            async { session.call(Request::Configure(identity)).await.map_err(step("configuring the guest")) };
        let verified = async {
            match &machine.lease {
                Some(lease) => self.verified(&lease.vm).await.map_err(step("verifying the VM's network")),
                None => Ok(()),
            }
        };
        tokio::try_join!(configured, verified)?;
        watch.step("configure");

        let QemuUser { uid, gid } = self.settings.qemu;
        Ok(ReadyVm {
            name: plan.name,
            session,
            share: machine.dir.share(),
            share_owner: Some(Owner { uid, gid }),
            facts: VmFacts {
                accelerator: plan.accelerator,
                why_not_kvm: plan.why_not_kvm,
                image: request.image.clone(),
                image_digest: Some(plan.image.manifest.digest.to_string()),
                transport: match plan.transport {
                    TransportKind::Vsock => TransportChoice::Vsock,
                    TransportKind::Serial => TransportChoice::Serial,
                },
                agent_version: agent,
                network: machine.lease.as_ref().map(|lease| network_facts(lease, request.network.as_str())),
                timings: watch.steps(),
            },
        })
    }

    async fn connect(&self, dir: &VmDir, plan: &Plan) -> Result<(Session, String), ProvisionError> {
        let socket = dir.channel();
        let address = match plan.cid {
            Some(cid) => Address::Vsock(cid),
            None => Address::Serial(&socket),
        };
        let waited = self.settings.boot_timeout;
        let connected = reach::connect(&*self.reach.dial(address), Instant::now() + waited).await;
        match connected {
            Ok((session, hello)) => Ok((session, hello.version)),
            Err(ReachError::Silent) => {
                Err(ProvisionError::NoAnswer { waited, console: console::tail(&dir.console()) })
            }
            Err(source) => {
                Err(step("booting the VM")(BootError { console: console::tail(&dir.console()), source }))
            }
        }
    }

    fn spec(&self, dir: &VmDir, plan: &Plan, request: &VmRequest, lease: Option<&NetLease>) -> VmSpec {
        let transport = word(plan.transport);
        // To write-protect the kernel in the guest takes a third of a second when it is translated, and nothing beyond
        // the guest relies on it.
        let hardening = match plan.accelerator {
            Accelerator::Kvm => "",
            Accelerator::Tcg => " rodata=off",
        };
        let boot = BootSource::DirectKernel {
            kernel: plan.image.kernel(),
            initrd: Some(plan.image.initramfs()),
            cmdline: format!(
                "console=ttyS0 panic=-1 quiet cryptomgr.notests dev-box.root=/dev/vda \
                 dev-box.transport={transport}{hardening}"
            ),
        };
        let ownership = Ownership {
            owner: self.settings.owner.clone(),
            purpose: request.purpose.clone(),
            lease: None,
            created: self.clock.now(),
        };
        let mut spec = VmSpec::new(plan.name.clone(), plan.accelerator, boot, ownership);
        spec.resources = ResourceProfile {
            vcpus: request.resources.cpus,
            memory: request.resources.memory,
            disk: request.resources.disk,
            // The virtual CPUs, and half a CPU for QEMU's own threads.
            cpu_quota_percent: Some(request.resources.cpus.saturating_mul(100).saturating_add(50)),
            ..ResourceProfile::default()
        };
        // The disk goes with the VM: nobody needs it flushed.
        spec.disks = vec![Disk { cache: DiskCache::Unsafe, ..Disk::qcow2(dir.overlay(), "vda") }];
        spec.shares = vec![Share { tag: share::TAG.to_owned(), path: dir.share(), read_only: false }];
        spec.channels =
            vec![Channel { name: dev_box_comm::SERIAL_PORT_NAME.to_owned(), socket: dir.channel() }];
        // No file is given to QEMU's user: the image's are every VM's, and an owner may change what is read-only.
        let QemuUser { uid, gid } = self.settings.qemu;
        spec.run_as = (uid != 0).then_some(RunAs { uid, gid });
        spec.vsock_cid = plan.cid;
        spec.console_log = Some(dir.console());
        spec.network = request.network.clone();
        spec.interface = lease.map(NetLease::interface);
        spec
    }
}

fn is_over(error: &VmError) -> bool {
    match error {
        VmError::Illegal(_) | VmError::NotFound { .. } => true,
        VmError::Libvirt(error) => {
            error.is_not_found() || matches!(error, LibvirtError::InvalidOperation { .. })
        }
        _ => false,
    }
}

fn word(transport: TransportKind) -> &'static str {
    match transport {
        TransportKind::Serial => "serial",
        TransportKind::Vsock => "vsock",
    }
}

fn network_facts(lease: &NetLease, policy: &str) -> NetworkFacts {
    NetworkFacts {
        policy: policy.to_owned(),
        policy_digest: lease.policy_digest().to_string(),
        mac: lease.mac.to_string(),
        address: lease.address,
        tap: lease.tap.clone(),
    }
}

/// A context id nobody else is likely to have; the kernel refuses one that is taken. 0 to 2 are reserved (vsock(7)).
fn random_cid() -> Result<u32, ProvisionError> {
    let random = getrandom::u32().map_err(step("choosing a vsock address"))?;
    Ok((random >> 1).max(3))
}
