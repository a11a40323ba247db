//! [`WatchedProvisioner`]: whatever makes VMs, with every act audited before and after, counted, and told to a [`Watcher`].
//!
//! ```text
//!  provision: intent `vm.create` on disk -> made -> result; `vm.ready`, `net.attach`   -> Watcher::ready
//!  retire:    Watcher::gone -> intent `vm.destroy` -> gone -> result
//!  reset:     Watcher::gone -> intent `vm.reset` -> as good as new -> result                     -> Watcher::ready
//!  the channel closes though nobody retired it: `vm.died`
//! ```

use std::collections::HashMap;
use std::fmt::Debug;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dev_box_comm::session::CloseReason;
use dev_box_core::accel::{self, Accelerator};
use dev_box_core::id::VmName;
use dev_box_observe::audit::{Accel, ResetMethod, Text, Transport};
use dev_box_observe::metrics::{self, Held};
use dev_box_observe::{Act, Actor, AuditEvent, AuditSink, Entry, Outcome};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use crate::provisioner::{ProvisionError, Provisioner, ReadyVm, TransportChoice, VmFacts, VmRequest};
use crate::sink::BoxFuture;

/// Is told what there is to watch. Called from async code: it must not block.
pub trait Watcher: Debug + Send + Sync {
    /// A VM is ready; what it does from now on is somebody's work.
    fn ready(&self, vm: &ReadyVm, request: &VmRequest);

    /// A VM is about to be taken down, or has died.
    fn gone(&self, vm: &VmName);

    /// A VM does not run for a while, so that it cannot be asked; or it does again.
    fn paused(&self, vm: &VmName, paused: bool);

    /// So much output has come from a job in it.
    fn output(&self, vm: &VmName, bytes: u64);

    /// Looks at what a VM has done to files of the host's, now and not when it is time for that: a job's files were just staged, or it is
    /// over, and what it did to them would be seen no more. Takes no longer than a few seconds. By default nobody looks.
    fn look<'a>(&'a self, _vm: &'a VmName) -> BoxFuture<'a, ()> {
        Box::pin(std::future::ready(()))
    }
}

/// A provisioner that audits, counts and tells. See the module.
///
/// Clones share what is known of living VMs, also when they are for others to ask ([`by`](Self::by)) or over another
/// provisioner ([`over`](Self::over)): one of them may retire what another has made. Keep one for as long as its VMs live.
#[derive(Debug, Clone)]
pub struct WatchedProvisioner {
    shared: Arc<Shared>,
    behind: Arc<dyn Provisioner>,
    actor: Actor,
}

#[derive(Debug)]
struct Shared {
    audit: Arc<dyn AuditSink>,
    watcher: Option<Arc<dyn Watcher>>,
    live: Mutex<HashMap<VmName, Live>>,
    /// VMs being taken down, whoever still waits for that.
    ending: TaskTracker,
}

/// A VM that is ready and not retired.
#[derive(Debug)]
struct Live {
    _counted: Held,
    /// Waits for its channel's end.
    death: AbortHandle,
    /// What it is, for when it is another's.
    request: VmRequest,
}

impl Drop for Live {
    fn drop(&mut self) {
        self.death.abort();
    }
}

impl Shared {
    fn live(&self) -> MutexGuard<'_, HashMap<VmName, Live>> {
        // Owned values only: whole whatever panicked beside them.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Once more before it is over, where it may write to what is the user's: what it did since the last look would be seen by
    /// nobody. Staged files are looked at before they are collected, and belong to nobody afterwards.
    async fn look(&self, vm: &VmName, request: Option<&VmRequest>) {
        if let Some(watcher) = &self.watcher
            && request.is_some_and(|request| request.mounts.any_writable())
        {
            watcher.look(vm).await;
        }
    }

    /// Its channel ended and nobody here had ended it.
    fn died(&self, vm: &VmName, why: &CloseReason, actor: Actor) {
        let cause = match why {
            CloseReason::Local => return,
            CloseReason::Violation(_) => "violation",
            CloseReason::Deadline(_) => "silent",
            _ => "ended",
        };
        metrics::VM_DEATHS.add(1, &[cause]);
        let died = AuditEvent::VmDied { how: Text::display(why) };
        self.audit.note(Entry::fact(died).by(actor).vm(vm));
        if let Some(watcher) = &self.watcher {
            watcher.gone(vm);
        }
    }
}

impl WatchedProvisioner {
    /// Over this provisioner, for what `actor` asks; tells `watcher`, if there is one.
    #[must_use]
    pub fn new(
        behind: Arc<dyn Provisioner>,
        audit: Arc<dyn AuditSink>,
        actor: Actor,
        watcher: Option<Arc<dyn Watcher>>,
    ) -> Self {
        let shared = Shared { audit, watcher, live: Mutex::default(), ending: TaskTracker::new() };
        Self { shared: Arc::new(shared), behind, actor }
    }

    /// The same, over another provisioner.
    #[must_use]
    pub fn over(&self, behind: Arc<dyn Provisioner>) -> Self {
        Self { behind, ..self.clone() }
    }

    /// The same, for what `actor` asks.
    #[must_use]
    pub fn by(&self, actor: Actor) -> Self {
        Self { actor, ..self.clone() }
    }

    /// Takes a VM into its care that another process had made and this one has taken over.
    pub fn adopt(&self, vm: &ReadyVm, request: &VmRequest) {
        self.shared.audit.note(self.entry(Entry::fact(AuditEvent::VmAdopt {}), &vm.name));
        self.keep(vm, request);
    }

    /// Tells the watcher, if there is one, that a VM was paused, or runs on.
    pub fn paused(&self, vm: &VmName, paused: bool) {
        if let Some(watcher) = &self.shared.watcher {
            watcher.paused(vm, paused);
        }
    }

    /// Waits until every VM that was given back is gone and its end on record. The provisioner behind has to be there until
    /// then: drain that one afterwards.
    pub async fn drain(&self) {
        self.shared.ending.close();
        self.shared.ending.wait().await;
    }

    fn entry(&self, entry: Entry, vm: &VmName) -> Entry {
        entry.by(self.actor.clone()).vm(vm)
    }

    async fn make(&self, request: &VmRequest) -> Result<ReadyVm, ProvisionError> {
        let began = Instant::now();
        let intended =
            request.accelerator.choose(accel::detect()).map_or(Accelerator::Tcg, |found| found.accelerator);
        let intent = Entry::intent(create(request, intended, None)).by(self.actor.clone());
        let act = Act::begin(&self.shared.audit, intent).await.map_err(|source| ProvisionError::Step {
            step: "auditing the intent".to_owned(),
            source: source.into(),
        })?;
        let starting = metrics::VMS.hold(&["starting"]);
        let made = self.behind.provision(request).await;
        drop(starting);
        match made {
            Ok(vm) => match self.made(act, &vm, request, began.elapsed()).await {
                Ok(()) => {
                    self.keep(&vm, request);
                    Ok(vm)
                }
                Err(error) => {
                    // A VM whose making is not on record is nobody's.
                    if let Err(left) = self.behind.retire(vm).await {
                        tracing::warn!(
                            error = &left as &dyn std::error::Error,
                            "an unaudited VM was not removed"
                        );
                    }
                    Err(error)
                }
            },
            Err(error) => {
                let word = word(intended);
                metrics::VM_STARTS.add(1, &[word, "failed"]);
                metrics::ERRORS.add(1, &[layer(&error)]);
                if let Err(unwritten) = act.finish(Outcome::failed(&error)).await {
                    tracing::error!(error = %unwritten, "a failure could not be audited");
                }
                Err(error)
            }
        }
    }

    async fn made(
        &self,
        mut act: Act,
        vm: &ReadyVm,
        request: &VmRequest,
        took: Duration,
    ) -> Result<(), ProvisionError> {
        count(&vm.facts, took);
        act.set_vm(&vm.name);
        act.set_event(create(request, vm.facts.accelerator, Some(&vm.facts)));
        let written = act.settle(Outcome::Ok).await;
        written.map_err(|source| ProvisionError::Step {
            step: "auditing the VM".to_owned(),
            source: source.into(),
        })?;
        let transport = match vm.facts.transport {
            TransportChoice::Vsock => Transport::Vsock,
            TransportChoice::Serial | TransportChoice::Auto => Transport::Serial,
        };
        for mount in &request.mounts.list {
            let mounted = AuditEvent::FilesMount {
                root: Text::lossy(mount.source.as_os_str().as_bytes()),
                target: Text::lossy(mount.target.as_os_str().as_bytes()),
                writable: mount.writable,
                uid: vm.share_owner.map(|owner| owner.uid),
            };
            self.shared.audit.note(self.entry(Entry::fact(mounted), &vm.name));
        }
        let ready = AuditEvent::VmReady { transport, took_ms: millis(took) };
        self.shared.audit.note(self.entry(Entry::fact(ready), &vm.name));
        if let Some(network) = &vm.facts.network {
            let attached = AuditEvent::NetAttach {
                policy: Text::display(&network.policy),
                digest: Text::display(&network.policy_digest),
                mac: Text::display(&network.mac),
                address: Some(Text::display(network.address)),
            };
            self.shared.audit.note(self.entry(Entry::fact(attached), &vm.name));
        }
        Ok(())
    }

    fn keep(&self, vm: &ReadyVm, request: &VmRequest) {
        if let Some(watcher) = &self.shared.watcher {
            watcher.ready(vm, request);
        }
        let (session, name, kept) = (vm.session.clone(), vm.name.clone(), request.clone());
        let (shared, actor, request) = (Arc::downgrade(&self.shared), self.actor.clone(), request.clone());
        let death = tokio::spawn(async move {
            let why = session.closed().await;
            drop(session);
            if let Some(shared) = shared.upgrade() {
                shared.look(&name, Some(&request)).await;
                shared.died(&name, &why, actor);
            }
        });
        let live =
            Live { _counted: metrics::VMS.hold(&["running"]), death: death.abort_handle(), request: kept };
        self.shared.live().insert(vm.name.clone(), live);
    }

    /// For the watcher, a VM that is as good as new is another one.
    async fn renew(&self, vm: ReadyVm) -> Result<ReadyVm, ProvisionError> {
        let name = vm.name.clone();
        let known = self.shared.live().remove(&name).map(|live| live.request.clone());
        self.shared.look(&name, known.as_ref()).await;
        if let Some(watcher) = &self.shared.watcher {
            watcher.gone(&name);
        }
        let reset = AuditEvent::VmReset { method: ResetMethod::Rewind };
        let begun = Act::begin(&self.shared.audit, self.entry(Entry::intent(reset), &name)).await;
        let (act, request) = match (begun, known) {
            (Ok(act), Some(request)) => (act, request),
            (begun, _) => {
                self.take_down(vm).await?;
                let why = begun.err().map_or_else(
                    || "nobody knows what it is".to_owned(),
                    |error| format!("it could not be audited: {error}"),
                );
                return Err(ProvisionError::NotReset { why });
            }
        };
        let renewed = self.behind.reset(vm).await;
        let outcome = match &renewed {
            Ok(vm) => {
                self.keep(vm, &request);
                Outcome::Ok
            }
            Err(error) => {
                metrics::ERRORS.add(1, &[layer(error)]);
                Outcome::failed(error)
            }
        };
        match (act.settle(outcome).await, renewed) {
            (Ok(_), renewed) => renewed,
            (Err(_), Err(error)) => Err(error),
            (Err(unwritten), Ok(vm)) => {
                self.take_down(vm).await?;
                Err(ProvisionError::NotReset { why: format!("it could not be audited: {unwritten}") })
            }
        }
    }

    async fn take_down(&self, vm: ReadyVm) -> Result<(), ProvisionError> {
        let name = vm.name.clone();
        let known = self.shared.live().remove(&name).map(|live| live.request.clone());
        self.shared.look(&name, known.as_ref()).await;
        if let Some(watcher) = &self.shared.watcher {
            watcher.gone(&name);
        }
        let destroy = AuditEvent::VmDestroy { reason: "its lease ended".into() };
        // What cannot be written down is destroyed all the same: a VM left running is worse than a gap in the log.
        let act = Act::begin(&self.shared.audit, self.entry(Entry::intent(destroy), &name)).await;
        let (began, ending) = (Instant::now(), metrics::VMS.hold(&["ending"]));
        let retired = self.behind.retire(vm).await;
        drop(ending);
        let (word, outcome) = match &retired {
            Ok(()) => ("ok", Outcome::Ok),
            Err(error) => {
                metrics::ERRORS.add(1, &[layer(error)]);
                ("failed", Outcome::failed(error))
            }
        };
        metrics::VM_DESTROY_SECONDS.record(began.elapsed(), &[word]);
        let audited = match act {
            Ok(act) => act.finish(outcome).await.map(drop),
            Err(error) => Err(error),
        };
        if let Err(error) = audited {
            tracing::error!(vm = %name, error = &error as &dyn std::error::Error, "a VM's end is not in the audit log");
        }
        retired
    }
}

impl Provisioner for WatchedProvisioner {
    fn provision<'a>(&'a self, request: &'a VmRequest) -> BoxFuture<'a, Result<ReadyVm, ProvisionError>> {
        Box::pin(self.make(request))
    }

    fn check<'a>(&'a self, vm: &'a ReadyVm) -> BoxFuture<'a, Result<(), ProvisionError>> {
        self.behind.check(vm)
    }

    fn retire(&self, vm: ReadyVm) -> BoxFuture<'_, Result<(), ProvisionError>> {
        let this = self.clone();
        // On a task: what was begun goes on when this future is dropped.
        let task = self.shared.ending.spawn(async move { this.take_down(vm).await });
        Box::pin(async move {
            task.await.unwrap_or_else(|error| {
                Err(ProvisionError::Step { step: "retire".to_owned(), source: error.into() })
            })
        })
    }

    fn reset(&self, vm: ReadyVm) -> BoxFuture<'_, Result<ReadyVm, ProvisionError>> {
        let this = self.clone();
        let (reply, answer) = oneshot::channel();
        self.shared.ending.spawn(async move {
            if let Err(Ok(unwanted)) = reply.send(this.renew(vm).await)
                && let Err(error) = this.take_down(unwanted).await
            {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "a VM nobody waited for was not removed"
                );
            }
        });
        Box::pin(async move { answer.await.unwrap_or(Err(ProvisionError::ShuttingDown)) })
    }
}

fn create(request: &VmRequest, accelerator: Accelerator, facts: Option<&VmFacts>) -> AuditEvent {
    AuditEvent::VmCreate {
        image: Text::new(&request.image),
        digest: facts.and_then(|facts| facts.image_digest.as_deref()).map(Text::new),
        accelerator: match accelerator {
            Accelerator::Kvm => Accel::Kvm,
            Accelerator::Tcg => Accel::Tcg,
        },
        why_not_kvm: facts.and_then(|facts| facts.why_not_kvm.as_deref()).map(Text::new),
        vcpus: request.resources.cpus,
        memory_mib: request.resources.memory.as_bytes() >> 20,
    }
}

/// Counts a VM that was made, by how it came to be.
fn count(facts: &VmFacts, took: Duration) {
    let accelerator = word(facts.accelerator);
    metrics::VM_STARTS.add(1, &[accelerator, "ok"]);
    let step = |name: &str| facts.timings.iter().find(|(step, _)| step == name).map(|(_, took)| *took);
    match step("boot") {
        Some(boot) => metrics::VM_BOOT_SECONDS.record(boot, &[accelerator]),
        None => metrics::VM_CLONE_SECONDS.record(took, &[accelerator]),
    }
}

fn word(accelerator: Accelerator) -> &'static str {
    match accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "tcg",
    }
}

/// Where a failure came from, as far as its step tells.
fn layer(error: &ProvisionError) -> &'static str {
    match error {
        ProvisionError::Unsatisfiable { .. } => "config",
        ProvisionError::NoAnswer { .. } => "guest",
        ProvisionError::Step { step, .. } => match step.as_str() {
            "attaching the network" => "network",
            "making the disk" | "making the VM's directory" => "image",
            "configuring the guest" => "channel",
            "auditing the intent" | "auditing the VM" => "audit",
            "booting the VM" => "guest",
            _ => "libvirt",
        },
        _ => metrics::OTHER,
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
