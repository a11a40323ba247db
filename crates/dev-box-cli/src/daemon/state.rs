//! Everything the daemon holds, and what it does with it. Routes only translate.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use dev_box::DevBox;
use dev_box::comm::session::Io;
use dev_box::core::clock::{Clock, EasternTime, SystemClock};
use dev_box::core::id::{IdError, VmName};
use dev_box::exec::{Gateway, ProvisionError, Provisioner, ReadyVm, VmRequest};
use dev_box::net::policy::PolicyStoreError;
use dev_box::observe::anomaly::VmFinding;
use dev_box::observe::audit::Text;
use dev_box::observe::metrics::VM_SERIES;
use dev_box::observe::{Act, AuditError, AuditEvent, Entry, Outcome};
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::api::{Happening, NewVm, Usage, VmInfo, VmState, VmUse};
use super::events::Events;
use super::pools::Pools;
use super::socket::Peer;
use super::vms::{Reservation, Vms, VmsError};
use crate::args::NotYours;
use crate::exit::Failure;

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
    findings: Arc<AtomicU64>,
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
        Self {
            dev_box,
            pools,
            vms: Vms::default(),
            events,
            findings,
            started_at: clock.now(),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
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
        let reservation = self.vms.reserve(VmInfo {
            name: name.clone(),
            domain: None,
            state: VmState::Starting,
            owner: peer.to_string(),
            image: request.image.clone(),
            created_at: self.clock.now(),
            options: new.vm,
        })?;
        self.events.say(Happening::VmStarting { vm: name.clone() });
        let began = Instant::now();
        let provisioner =
            self.pools.provisioner(&self.dev_box, reservation.options().templates(), peer.actor());
        let machine = match self.lease(&*provisioner, &request, peer).await {
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

    /// Has a VM that is ready under its name, on record for a successor, and looked after.
    pub(super) async fn settle(self: &Arc<Self>, reservation: Reservation, machine: ReadyVm) -> VmInfo {
        let (name, domain, session) =
            (reservation.name().clone(), machine.name.clone(), machine.session.clone());
        let note = reservation.note(&domain);
        if let Err(error) = self.dev_box.provisioner().keep(&machine, note).await {
            tracing::warn!(vm = %name, error = %Failure::new(error), "a VM will not outlive this daemon if that is killed");
        }
        let info = reservation.fill(machine);
        let daemon = Arc::clone(self);
        self.tasks.spawn(async move {
            let reason = session.closed().await.to_string();
            // The session keeps the channel: let it go before what is left is taken down.
            drop(session);
            if let Some(machine) = daemon.vms.lose(&name, &domain, &reason) {
                tracing::warn!(vm = %name, reason, "a VM is lost");
                daemon.events.say(Happening::VmLost { vm: name, reason });
                daemon.retire(machine).await;
            }
        });
        info
    }

    /// A VM in that client's hands: one that was ready has nothing else in the audit that names them.
    async fn lease(
        &self,
        provisioner: &dyn Provisioner,
        request: &VmRequest,
        peer: &Peer,
    ) -> Result<ReadyVm, CreateError> {
        let event = AuditEvent::LeaseAcquire { image: Text::new(&request.image), profile: None };
        let mut act = Act::begin(&self.dev_box.audit(), Entry::intent(event).by(peer.actor())).await?;
        match provisioner.provision(request).await {
            Ok(machine) => {
                act.set_vm(&machine.name);
                match act.finish(Outcome::Ok).await {
                    Ok(_) => Ok(machine),
                    Err(error) => {
                        self.retire(machine).await;
                        Err(error.into())
                    }
                }
            }
            Err(error) => {
                act.finish(Outcome::failed(&error)).await?;
                Err(CreateError::Provision(error))
            }
        }
    }

    /// Removes a VM, or the memory of one that is lost; returns when nothing of it is left.
    pub(crate) async fn remove(self: &Arc<Self>, name: &VmName) -> Result<(), VmsError> {
        let machine = self.vms.take(name)?;
        let (daemon, name) = (Arc::clone(self), name.clone());
        // Goes on when nobody waits any more.
        let gone = self.tasks.spawn(async move {
            if let Some(machine) = machine {
                daemon.retire(machine).await;
            }
            daemon.vms.forget(&name);
            daemon.events.say(Happening::VmRemoved { vm: name });
        });
        // A panic in there is logged by the runtime, and the name stays taken.
        let _ = gone.await;
        Ok(())
    }

    /// What the VMs use.
    pub(crate) fn usage(&self) -> Usage {
        let series = VM_SERIES.snapshot();
        let of = |info: VmInfo| VmUse {
            name: info.name.to_string(),
            state: info.state.to_string(),
            owner: info.owner,
            usage: info.domain.and_then(|domain| series.get(domain.as_str()).copied()).unwrap_or_default(),
        };
        let vms = self.vms.list().into_iter().map(of).collect();
        Usage { at: self.clock.now(), vms, findings: self.findings.load(Ordering::Relaxed) }
    }

    pub(super) async fn retire(&self, machine: ReadyVm) {
        let name = machine.name.clone();
        self.dev_box.audit().note(Entry::fact(AuditEvent::LeaseRelease {}).vm(&name));
        // Whoever used it may have done anything: it is not used again.
        if let Err(error) = self.pools.take_back(&self.dev_box, machine, false).await {
            tracing::error!(vm = %name, error = %Failure::new(error), "not all of it could be removed; `dev-box gc` tries again");
        }
    }

    /// Serves one client of a VM's channel until one of the three is gone.
    pub(crate) async fn serve_channel(
        &self,
        domain: VmName,
        session: dev_box::comm::Session,
        io: impl Io,
        peer: &Peer,
    ) {
        let gateway = Gateway::new(domain, session, self.dev_box.audit());
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
                daemon.retire(machine).await;
                daemon.events.say(Happening::VmRemoved { vm: name });
            });
        }
        self.tasks.close();
        self.tasks.wait().await;
        self.pools.shut_down().await;
        match Arc::try_unwrap(self) {
            Ok(daemon) => daemon.dev_box.close().await,
            Err(_) => tracing::error!("the daemon is still in use at its end: this is a bug"),
        }
    }
}
