//! Everything the daemon holds, and what it does with it. Routes only translate.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dev_box::DevBox;
use dev_box::comm::session::{Io, Session};
use dev_box::core::clock::{Clock, EasternTime, SystemClock};
use dev_box::core::id::{IdError, VmName};
use dev_box::exec::pool::Ending;
use dev_box::exec::{Gateway, ProvisionError, Provisioner, ReadyVm, VmRequest, background};
use dev_box::net::policy::PolicyStoreError;
use dev_box::observe::anomaly::VmFinding;
use dev_box::observe::audit::Text;
use dev_box::observe::{Act, AuditError, AuditEvent, Entry, Outcome};
use scopeguard::ScopeGuard;
use tokio::sync::{Mutex, broadcast};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::api::{Happening, NewVm, VmInfo, VmState};
use super::events::Events;
use super::pools::Pools;
use super::socket::Peer;
use super::telling::Telling;
use super::vms::{Reservation, Vms, VmsError};
use crate::args::{NotYours, VmOptions};
use crate::exit::Failure;

/// How long a guest may take to say that nothing goes on in it.
const LAST_LOOK: Duration = Duration::from_secs(2);

/// The daemon. What another subject needs (a pool, metrics) is a field more.
#[derive(Debug)]
pub(crate) struct Daemon {
    pub(crate) dev_box: DevBox,
    pub(crate) vms: Vms,
    pub(crate) pools: Pools,
    pub(crate) events: Events,
    pub(crate) started_at: EasternTime,
    /// Cancelled when the daemon is to end: nothing new begins, and what would go on for ever ends.
    pub(crate) stopping: CancellationToken,
    /// Work that outlives the request it began with; waited for at the end.
    pub(crate) tasks: TaskTracker,
    /// Whoever pauses a VM, or lets one run on: one at a time.
    pub(super) power: Mutex<()>,
    pub(super) findings: Arc<AtomicU64>,
    clock: Arc<dyn Clock>,
}

/// Why there is no VM.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CreateError {
    #[error(transparent)]
    Vms(#[from] VmsError),
    #[error("no name could be made up")]
    Name(#[source] IdError),
    #[error(transparent)]
    Policy(#[from] PolicyStoreError),
    #[error(transparent)]
    Mounts(#[from] NotYours),
    #[error("the VM could not be made")]
    Provision(#[source] ProvisionError),
    #[error("no pool of the daemon has such a VM")]
    NoPool,
    #[error("no VM of the daemon's pool came free within {} s", .0.as_secs())]
    Busy(Duration),
    #[error("nothing is done that the audit log would not show")]
    Audit(#[from] AuditError),
    #[error("the daemon is stopping")]
    Stopping,
}

/// Says what is found, until nothing more can be.
async fn tell(mut found: broadcast::Receiver<VmFinding>, events: Events, count: Arc<AtomicU64>) {
    loop {
        match found.recv().await {
            Ok(VmFinding { vm, finding }) => {
                count.fetch_add(1, Ordering::Relaxed);
                let rule = finding.rule.name().to_owned();
                events.say(Happening::Finding { vm, rule, score: finding.score, why: finding.why });
            }
            Err(broadcast::error::RecvError::Lagged(missed)) => {
                count.fetch_add(missed, Ordering::Relaxed);
                events.say(Happening::Missed { events: missed });
            }
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

impl Daemon {
    pub(crate) async fn new(dev_box: DevBox) -> Self {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let (events, findings) = (Events::new(Arc::clone(&clock)), Arc::<AtomicU64>::default());
        if let Some(observer) = dev_box.observer() {
            tokio::spawn(tell(observer.findings(), events.clone(), Arc::clone(&findings)));
        }
        let pools = Pools::begin(&dev_box).await;
        let vms = Vms::held_by(dev_box.provisioner().holds());
        Self {
            dev_box,
            pools,
            vms,
            events,
            findings,
            started_at: clock.now(),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
            power: Mutex::default(),
            clock,
        }
    }

    /// Makes a VM and keeps it. Dropping the future leaves nothing behind.
    pub(crate) async fn create(self: &Arc<Self>, mut new: NewVm, peer: &Peer) -> Result<VmInfo, CreateError> {
        if self.stopping.is_cancelled() {
            return Err(CreateError::Stopping);
        }
        new.vm.mount = new.vm.mount.for_peer(peer.ids())?;
        let name = match new.name {
            Some(name) => name,
            None => VmName::generate("vm").map_err(CreateError::Name)?,
        };
        let request = new.vm.request(&self.dev_box, "serve")?;
        let reservation = self.reserve(&name, &request.image, new.vm, peer)?;
        self.events.say(Happening::VmStarting { vm: name.clone() });
        let began = Instant::now();
        let provisioner =
            self.pools.provisioner(&self.dev_box, reservation.options().templates(), peer.actor());
        let machine = match self.lease(&*provisioner, &request, &name, Duration::MAX, peer).await {
            Ok(machine) => machine,
            Err(error) => {
                let told = Failure::new(error.to_string()).to_string();
                self.events.say(Happening::VmFailed { vm: name, error: told });
                return Err(error);
            }
        };
        let info = self.settle(reservation, machine).await;
        let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.events.say(Happening::VmReady { vm: name.clone(), took_ms });
        Ok(info)
    }

    /// Keeps the name of a VM that is asked for.
    pub(super) fn reserve(
        &self,
        name: &VmName,
        image: &str,
        options: VmOptions,
        peer: &Peer,
    ) -> Result<Reservation, VmsError> {
        self.vms.reserve(VmInfo {
            name: name.clone(),
            domain: None,
            state: VmState::Starting,
            owner: peer.to_string(),
            image: image.to_owned(),
            created_at: self.clock.now(),
            options,
        })
    }

    /// Has a VM that is ready under its name, on record for a successor, and looked after. Given up, the VM is retired.
    pub(super) async fn settle(self: &Arc<Self>, reservation: Reservation, machine: ReadyVm) -> VmInfo {
        let machine = self.guarded(machine);
        let note = reservation.note(&machine.name);
        if let Err(error) = self.dev_box.provisioner().keep(&machine, note).await {
            tracing::warn!(vm = %reservation.name(), error = %Failure::new(error), "a VM will not outlive this daemon if that is killed");
        }
        let machine = ScopeGuard::into_inner(machine);
        let (name, domain, session) =
            (reservation.name().clone(), machine.name.clone(), machine.session.clone());
        let info = reservation.fill(machine);
        let daemon = Arc::clone(self);
        self.tasks.spawn(async move {
            let reason = session.closed().await.fate();
            // The session keeps the channel: let it go before what is left is taken down.
            drop(session);
            if let Some(machine) = daemon.vms.lose(&name, &domain, &reason) {
                tracing::warn!(vm = %name, reason, "a VM is lost");
                daemon.events.say(Happening::VmLost { vm: name, reason });
                daemon.retire(machine, Ending::Abnormal).await;
            }
        });
        info
    }

    /// A VM that is retired when whoever waits for it leaves first.
    pub(super) fn guarded(
        self: &Arc<Self>,
        machine: ReadyVm,
    ) -> ScopeGuard<ReadyVm, impl FnOnce(ReadyVm) + use<>> {
        let daemon = Arc::clone(self);
        scopeguard::guard(machine, move |machine| {
            let tasks = daemon.tasks.clone();
            tasks.spawn(async move { daemon.retire(machine, Ending::Abnormal).await });
        })
    }

    /// A VM in that client's hands, who calls it so, within `patience` on top of what whoever makes it has: one that was ready has nothing else
    /// in the audit that names them.
    pub(super) async fn lease(
        self: &Arc<Self>,
        provisioner: &dyn Provisioner,
        request: &VmRequest,
        name: &VmName,
        patience: Duration,
        peer: &Peer,
    ) -> Result<ReadyVm, CreateError> {
        let (image, name) = (Text::new(&request.image), Some(Text::display(name)));
        let event = AuditEvent::LeaseAcquire { image, profile: None, name };
        let mut act = Act::begin(&self.dev_box.audit(), Entry::intent(event).by(peer.actor())).await?;
        let error = match timeout(patience, provisioner.provision(request)).await {
            Ok(Ok(machine)) => {
                let machine = self.guarded(machine);
                act.set_vm(&machine.name);
                act.finish(Outcome::Ok).await?;
                return Ok(ScopeGuard::into_inner(machine));
            }
            Ok(Err(error)) => CreateError::Provision(error),
            Err(_) => CreateError::Busy(patience),
        };
        act.finish(Outcome::failed(&error)).await?;
        Err(error)
    }

    /// Removes a VM, or the memory of one that is lost; returns when nothing of it is left, or its pool has it.
    pub(crate) async fn remove(self: &Arc<Self>, name: &VmName) -> Result<(), VmsError> {
        // A panic in there is logged by the runtime, and the name stays taken.
        let _ = self.begin_removal(name, None)?.await;
        Ok(())
    }

    /// Begins that, and goes on when nobody waits any more. How the use of the VM ended is asked of the VM where not given.
    pub(super) fn begin_removal(
        self: &Arc<Self>,
        name: &VmName,
        ending: Option<Ending>,
    ) -> Result<JoinHandle<()>, VmsError> {
        let machine = self.vms.take(name)?;
        let (daemon, name) = (Arc::clone(self), name.clone());
        Ok(self.tasks.spawn(async move {
            if let Some(machine) = machine {
                let ending = match ending {
                    Some(ending) => ending,
                    None => daemon.ending(&machine).await,
                };
                daemon.retire(machine, ending).await;
            }
            daemon.vms.forget(&name);
            daemon.events.say(Happening::VmRemoved { vm: name });
        }))
    }

    pub(super) fn now(&self) -> EasternTime {
        self.clock.now()
    }

    /// How the use of a VM ends that is given back: in the middle of a job is no end in order. Asked only where that matters.
    async fn ending(&self, machine: &ReadyVm) -> Ending {
        let in_order =
            self.pools.reuses(&machine.name) && background::at_rest(&machine.session, LAST_LOOK).await;
        if in_order { Ending::InOrder } else { Ending::Abnormal }
    }

    pub(super) async fn retire(&self, machine: ReadyVm, ending: Ending) {
        let name = machine.name.clone();
        self.dev_box.audit().note(Entry::fact(AuditEvent::LeaseRelease {}).vm(&name));
        if let Err(error) = self.pools.take_back(&self.dev_box, machine, ending).await {
            tracing::error!(vm = %name, error = %Failure::new(error), "not all of it could be removed; `dev-box gc` tries again");
        }
    }

    /// One client's way to a VM.
    pub(crate) fn gateway(&self, domain: VmName, session: Session) -> Gateway {
        let known = self.vms.list().into_iter().find(|info| info.domain.as_ref() == Some(&domain));
        let vm = known.map_or_else(|| domain.clone(), |info| info.name);
        let telling = Telling { behind: self.dev_box.audit(), events: self.events.clone(), vm };
        let gateway = Gateway::new(domain, session, Arc::new(telling));
        match self.dev_box.watcher() {
            Some(watcher) => gateway.watched_by(watcher),
            None => gateway,
        }
    }

    /// Serves one client of a VM's channel until one of the three is gone.
    pub(crate) async fn serve_channel(&self, gateway: Gateway, io: impl Io, peer: &Peer) {
        tokio::select! {
            served = gateway.serve(io, peer.actor()) => {
                if let Err(error) = served {
                    tracing::warn!(%peer, %error, "a client did not speak the protocol");
                }
            }
            () = self.stopping.cancelled() => {}
        }
    }

    /// Takes everything down. Nothing else may be running any more.
    pub(crate) async fn close(self: Arc<Self>) {
        for (name, machine) in self.vms.take_all() {
            let daemon = Arc::clone(&self);
            self.tasks.spawn(async move {
                daemon.retire(machine, Ending::Abnormal).await;
                daemon.events.say(Happening::VmRemoved { vm: name });
            });
        }
        self.tasks.close();
        self.tasks.wait().await;
        self.pools.shut_down().await;
        match Arc::try_unwrap(self) {
            Ok(daemon) => {
                let audit = daemon.dev_box.audit();
                daemon.dev_box.close().await;
                // Only now is there nothing else to say.
                let ended = Entry::fact(AuditEvent::ProcessStop {}).by(dev_box::actor());
                if let Err(error) = audit.append(ended).await {
                    tracing::error!(error = %Failure::new(error), "the daemon's end is not in the audit log");
                }
                dev_box::close_audit(audit).await;
            }
            Err(_) => tracing::error!("the daemon is still in use at its end: this is a bug"),
        }
    }
}
