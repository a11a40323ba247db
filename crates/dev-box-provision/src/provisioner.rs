//! [`LibvirtProvisioner`]: makes a VM for each request, cloned from a template or booted, and takes it away again.
//!
//! ```text
//!                                                     +-> plug in --+
//!  request -> claim -> disk -> network -> start [-> load]            +-> configure -> ReadyVm
//!               |        |        |          |         +-> connect --+      |
//!               +--------+--------+----------+---------------+--------------+---- failed, or nobody waits: torn down
//! ```
//! The first half ends when QEMU runs: a shell waits there. What was used and is a clone can be made as good as new in place.
//!
//! A VM starts with its interface's link down: the guard stands before it starts, and libvirt, which takes a second or so, puts
//! the filter on while the guest boots. Then the link goes up. See docs/adr/0007.
//!
//! A VM is made on a task of its own, so that a caller who goes away half-way leaves nothing behind: the task notices
//! between two steps, and takes down what there is.

mod ending;
mod fork;
mod power;
mod raise;
mod reset;
mod shells;
mod taps;

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

use dev_box_comm::hello::GuestHello;
use dev_box_comm::session::Session;
use dev_box_comm::transport::{self, Dial, Preference, Probes, TransportKind};
use dev_box_core::accel::{self, Accelerator};
use dev_box_core::clock::{Clock, EasternTime};
use dev_box_core::connection::LibvirtConnection;
use dev_box_core::id::{VmId, VmName};
use dev_box_exec::sink::BoxFuture;
use dev_box_exec::{NetworkMode, ProvisionError, Provisioner, ReadyVm, TransportChoice, VmRequest};
use dev_box_image::template::{HostFacts, Shape, Template, TemplateError, TemplateStore};
use dev_box_image::{Digest, Image, ImageName, ImageStore, OverlayError, SpaceLimits};
use dev_box_net::policy::PolicyStoreError;
use dev_box_net::watch::WatchHandle;
use dev_box_net::{EgressPolicy, NetEvent, VmNetwork};
use dev_box_observe::AuditSink;
use tokio::sync::{broadcast, oneshot};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

use crate::admission::{HostMemory, MemoryLimits, Promises};
use crate::blocking::{self, BlockingError};
use crate::console;
use crate::holds::Holds;
use crate::identity;
use crate::machine::Machine;
use crate::mounts;
use crate::network_watch::{self, NetworkNews};
use crate::reach::{self, Address, Reach, ReachError};
use crate::stopwatch::Stopwatch;
use crate::template::{self, TemplateUse};
use crate::vm_dir::{QemuUser, VmDir};

use ending::Use;
use shells::{Kind, Shelf};
use taps::TapShelf;

pub use fork::{Fork, ForkError, HoldError, Original};
pub use power::{Paused, ResumeError};
pub(crate) use taps::Lent;

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
    /// Of the host's memory.
    pub memory: MemoryLimits,
}

/// Makes VMs, by cloning a template where one serves, else by booting. A clone of it is another handle to the same one.
#[derive(Debug, Clone)]
pub struct LibvirtProvisioner(pub(crate) Arc<Inner>, TemplateUse);

/// What a VM comes from.
#[derive(Debug)]
enum Origin {
    /// A boot of its image.
    Boot,
    /// A boot of its image, with its memory in this file.
    Recorded(PathBuf),
    /// The moment of a VM that goes on, to become a template's; it never runs.
    Moment(Box<Moment>),
    /// A template.
    Clone(Box<Template>),
}

/// Where the moment of a VM is put.
#[derive(Debug, Clone)]
struct Moment {
    /// Its memory.
    ram: PathBuf,
    /// Its disk.
    disk: PathBuf,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Boot => f.write_str("a boot"),
            Self::Recorded(_) => f.write_str("a boot that becomes a template"),
            Self::Moment(_) => f.write_str("a VM that is forked"),
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
    /// The moment of another VM.
    Moment(Moment),
    /// This template, whatever else there is.
    Clone(Box<Template>),
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
    promises: Promises,
    shelf: Shelf,
    taps: TapShelf,
    pub(crate) holds: Holds,
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
        let promises = Promises::in_root(&settings.state_root);
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
                promises,
                shelf: Shelf::default(),
                taps: TapShelf::default(),
                holds: Holds::default(),
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

    /// Which of its VMs stay paused: also for those who pause one for a reason of their own.
    #[must_use]
    pub fn holds(&self) -> Holds {
        self.0.holds.clone()
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.0.settings
    }

    pub(crate) fn connection(&self) -> &LibvirtConnection {
        &self.0.connection
    }

    /// Where VMs have their directories.
    pub(crate) fn vms(&self) -> PathBuf {
        self.0.settings.state_root.join("vms")
    }

    /// Where the disk of a VM of ours lies.
    pub(crate) fn overlay_of(&self, name: &VmName) -> PathBuf {
        VmDir::overlay_in(&self.vms(), name)
    }

    /// Tells a VM of ours again what it was told of itself when it was made.
    pub(crate) async fn tell_again(
        &self,
        vm: &ReadyVm,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let network = self
            .0
            .machines()
            .get(&vm.name)
            .and_then(|machine| machine.lease.as_ref().map(identity::network_again));
        let identity = identity::identity(&vm.name, VmId::random(), network)?;
        Ok(identity::tell(&vm.session, &*self.0.clock, identity).await?)
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

    /// Keeps `count` shells from now on: clones for VMs like `request` whose QEMU runs already, so that the next such VM only
    /// loads its devices. They are made one at a time, in the background; each counts as a VM of the host's memory and
    /// addresses, and holds its template in use. 0 takes them away.
    pub async fn keep_shells(&self, request: &VmRequest, count: usize) {
        self.0.keep_shells(Kind::new(request, &self.1), count).await;
    }

    /// How many shells wait to become VMs like `request`.
    #[must_use]
    pub fn shells(&self, request: &VmRequest) -> usize {
        self.0.shells(&Kind::new(request, &self.1))
    }

    /// Has `count` taps for VMs under that network policy from now on, those that VMs use among them: prepared in the background,
    /// one at a time, and used again by one VM after the other. A VM that finds none waits for libvirt to put its filter in
    /// force: a second or so. At most 64; 0 takes away those that wait.
    ///
    /// # Errors
    /// There is no such policy.
    pub async fn keep_taps(&self, network: &NetworkMode, count: usize) -> Result<(), PolicyStoreError> {
        let policy = self.0.network.policies().get(network)?;
        self.0.keep_taps(&policy, count).await;
        Ok(())
    }

    /// How many taps wait for VMs under that policy.
    ///
    /// # Errors
    /// There is no such policy.
    pub fn waiting_taps(&self, network: &NetworkMode) -> Result<usize, PolicyStoreError> {
        Ok(self.0.waiting_taps(&self.0.network.policies().get(network)?))
    }

    fn make(&self, request: &VmRequest, wanted: Wanted) -> BoxFuture<'_, Result<ReadyVm, ProvisionError>> {
        let gone = CancellationToken::new();
        // Dropped with the future below: then nobody waits for the VM any more.
        let waiting = gone.clone().drop_guard();
        let (reply, answer) = oneshot::channel();
        let (inner, request) = (Arc::clone(&self.0), request.clone());
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
        Box::pin(self.0.clear_shelf()).await;
        self.0.work.close();
        self.0.work.wait().await;
        self.0.clear_taps().await;
    }
}

impl Provisioner for LibvirtProvisioner {
    fn provision<'a>(&'a self, request: &'a VmRequest) -> BoxFuture<'a, Result<ReadyVm, ProvisionError>> {
        self.make(request, Wanted::Ready(self.1.clone()))
    }

    fn check<'a>(&'a self, vm: &'a ReadyVm) -> BoxFuture<'a, Result<(), ProvisionError>> {
        Box::pin(async move {
            match vm.facts.network {
                Some(_) => self.0.verified(&vm.name).await.map_err(step("verifying the VM's network")),
                None => Ok(()),
            }
        })
    }

    fn retire(&self, vm: ReadyVm) -> BoxFuture<'_, Result<(), ProvisionError>> {
        let inner = Arc::clone(&self.0);
        let task = self.0.work.spawn(async move {
            vm.session.close();
            inner.take_down(&vm.name).await
        });
        Box::pin(async move { task.await.unwrap_or_else(|join| Err(step("retire")(join))) })
    }

    fn reset(&self, vm: ReadyVm) -> BoxFuture<'_, Result<ReadyVm, ProvisionError>> {
        let (reply, answer) = oneshot::channel();
        let inner = Arc::clone(&self.0);
        self.0.work.spawn(async move {
            if let Err(Ok(unwanted)) = reply.send(inner.reset(vm).await)
                && let Err(error) = inner.take_down(&unwanted.name).await
            {
                tracing::warn!(vm = %unwanted.name, %error, "a VM nobody waited for was not removed");
            }
        });
        Box::pin(async move { answer.await.unwrap_or(Err(ProvisionError::ShuttingDown)) })
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
#[derive(Debug)]
struct Plan {
    name: VmName,
    image: Image,
    accelerator: Accelerator,
    why_not_kvm: Option<String>,
    transport: TransportKind,
    cid: Option<u32>,
    policy: EgressPolicy,
    /// As whom its QEMU runs.
    qemu: QemuUser,
}

impl Inner {
    pub(crate) fn machines(&self) -> MutexGuard<'_, HashMap<VmName, Machine>> {
        // A map of owned values is whole whatever panicked beside it.
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn dial(&self, address: Address<'_>) -> Box<dyn Dial> {
        self.reach.dial(address)
    }

    /// The vsock address of a VM that is ready.
    pub(crate) fn cid_of(&self, name: &VmName) -> Option<u32> {
        self.machines().get(name)?.cid
    }

    /// VMs that are ready and have a network.
    pub(crate) fn networked(&self) -> Vec<VmName> {
        let machines = self.machines();
        machines.iter().filter(|(_, machine)| machine.lease.is_some()).map(|(name, _)| name.clone()).collect()
    }

    /// Has the networks of all VMs looked after, from the first one on.
    pub(crate) fn watch_networks(self: &Arc<Self>) {
        self.watching.call_once(|| {
            tokio::spawn(network_watch::watch_over(Arc::downgrade(self), self.watch.clone()));
        });
    }

    async fn make(
        self: &Arc<Self>,
        request: &VmRequest,
        wanted: Wanted,
        gone: &CancellationToken,
    ) -> Result<ReadyVm, ProvisionError> {
        if let Wanted::Ready(templates) = &wanted
            && let Some(vm) = self.activate(&Kind::new(request, templates), request, gone).await
        {
            return Ok(vm);
        }
        self.watch_networks();
        let mut watch = Stopwatch::start();
        let (mut machine, plan, origin) = self.claim(request, wanted, &mut watch).await?;
        let policy = plan.policy.clone();
        let made = async {
            let started = self.start(&mut machine, plan, &origin, request, &mut watch, gone).await?;
            self.finish(&mut machine, started, &origin, request, watch, gone).await
        };
        let made = match made.await {
            Ok(vm) => {
                tracing::info!(vm = %vm.name, from = %origin, steps = ?vm.facts.timings, "a VM is ready");
                self.machines().insert(vm.name.clone(), machine);
                Ok(vm)
            }
            Err(error) => {
                self.abandon(machine).await;
                Err(error)
            }
        };
        self.make_taps(&policy);
        made
    }

    /// What a VM comes from, and its place on this host: memory, and a directory with its lock.
    async fn claim(
        &self,
        request: &VmRequest,
        wanted: Wanted,
        watch: &mut Stopwatch,
    ) -> Result<(Machine, Plan, Origin), ProvisionError> {
        let plan = self.plan(request)?;
        let origin = self.origin(&plan, request, wanted).await?;
        let host = HostMemory::read().map_err(step("looking at the host's memory"))?;
        let (promises, memory, limits) =
            (self.promises.clone(), request.resources.memory, self.settings.memory);
        let promise = blocking::run(move || promises.make(host, memory, limits)).await;
        let promise =
            promise.map_err(|why| ProvisionError::Exhausted { resource: "memory", what: why.to_string() })?;
        let dir = VmDir::create(&self.settings.state_root.join("vms"), &plan.name, plan.qemu)
            .map_err(step("making the VM's directory"))?;
        watch.step("claim");
        Ok((Machine::new(dir, promise), plan, origin))
    }

    /// Takes down what nobody is to have.
    async fn abandon(self: &Arc<Self>, machine: Machine) {
        let name = machine.dir.name().clone();
        if let Err(left) = self.end(machine, Use::GivenUp).await {
            tracing::warn!(vm = %name, error = &left as &dyn std::error::Error, "not all of it could be removed; `dev-box gc` tries again");
        }
    }

    async fn origin(
        &self,
        plan: &Plan,
        request: &VmRequest,
        wanted: Wanted,
    ) -> Result<Origin, ProvisionError> {
        let mounts = !request.mounts.is_empty();
        let templates = match wanted {
            // A 9p device cannot be plugged in later, and a state with one mounted cannot be saved.
            Wanted::Recorded(_) | Wanted::Ready(TemplateUse::Named(_)) if mounts => {
                return Err(unsatisfiable(
                    "a VM with live mounts is booted: it cannot be made from a template, or be one",
                ));
            }
            Wanted::Ready(_) if mounts => return Ok(Origin::Boot),
            Wanted::Recorded(ram) => return Ok(Origin::Recorded(ram)),
            Wanted::Moment(moment) => return Ok(Origin::Moment(Box::new(moment))),
            Wanted::Clone(template) => return Ok(Origin::Clone(template)),
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

    async fn take_down(self: &Arc<Self>, name: &VmName) -> Result<(), ProvisionError> {
        let Some(machine) = self.machines().remove(name) else { return Ok(()) };
        self.end(machine, Use::Ended).await.map_err(step("removing the VM"))
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
            qemu: mounts::user(&request.mounts, self.settings.qemu).map_err(unsatisfiable)?,
        })
    }

    /// Fails between two steps when the caller has gone or the provisioner is closing.
    fn wanted(&self, gone: &CancellationToken) -> Result<(), ProvisionError> {
        if gone.is_cancelled() || self.closing.is_cancelled() {
            return Err(ProvisionError::ShuttingDown);
        }
        Ok(())
    }

    async fn connect(&self, dir: &VmDir, cid: Option<u32>) -> Result<(Session, GuestHello), ProvisionError> {
        let socket = dir.channel();
        let address = match cid {
            Some(cid) => Address::Vsock(cid),
            None => Address::Serial(&socket),
        };
        let waited = self.settings.boot_timeout;
        let connected = reach::connect(&*self.reach.dial(address), Instant::now() + waited).await;
        match connected {
            Ok(answered) => Ok(answered),
            Err(ReachError::Silent) => {
                Err(ProvisionError::NoAnswer { waited, console: console::tail(&dir.console()) })
            }
            Err(source) => {
                Err(step("booting the VM")(BootError { console: console::tail(&dir.console()), source }))
            }
        }
    }
}

fn word(transport: TransportKind) -> &'static str {
    match transport {
        TransportKind::Serial => "serial",
        TransportKind::Vsock => "vsock",
    }
}

/// A context id nobody else is likely to have; the kernel refuses one that is taken. 0 to 2 are reserved (vsock(7)).
fn random_cid() -> Result<u32, ProvisionError> {
    let random = getrandom::u32().map_err(step("choosing a vsock address"))?;
    Ok((random >> 1).max(3))
}
