//! [`VmResponder`]: what is done about a finding, on the host, to VMs of any process here.
//!
//! Findings come at any time, also while another is responded to. A snapshot holds its VM still and lets it go on afterwards, so a
//! pause that comes meanwhile waits for its end: otherwise the VM would run again. A kill waits for nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use dev_box_core::clock::Clock;
use dev_box_core::connection::LibvirtConnection;
use dev_box_core::id::VmName;
use dev_box_core::state::VmState;
use dev_box_core::vm::{Vm, VmError};
use dev_box_net::{NftThrottle, ThrottleError, VmNetwork};
use dev_box_observe::alert::Webhook;
use dev_box_observe::anomaly::{Finding, RespondError, RespondFuture, Responder};
use dev_box_observe::audit::{AuditSink, ResponseAction, Text};
use dev_box_observe::{Act, AuditEvent, Entry, Outcome};

use crate::blocking;
use crate::forensics::{self, ForensicsRequest};
use crate::holds::Holds;

/// What slows a VM down.
pub trait Throttle: std::fmt::Debug + Send + Sync {
    /// Slows down what comes from the VM behind this tap. Twice is once. Blocking.
    ///
    /// # Errors
    /// [`ThrottleError`].
    fn slow(&self, tap: &str) -> Result<(), ThrottleError>;
}

impl Throttle for NftThrottle {
    fn slow(&self, tap: &str) -> Result<(), ThrottleError> {
        Self::slow(self, tap)
    }
}

/// What responses are made with.
#[derive(Debug, Clone)]
pub struct Means {
    /// Where the domains are.
    pub connection: LibvirtConnection,
    /// Whose counters go into a bundle.
    pub network: VmNetwork,
    /// Where it is kept that a VM stays paused.
    pub holds: Holds,
    /// What slows VMs down.
    pub throttle: Arc<dyn Throttle>,
    /// Who is told; the log only, where there is none.
    pub webhook: Option<Arc<Webhook>>,
    /// Where bundles go.
    pub forensics_dir: PathBuf,
    /// The audit log, for bundles.
    pub audit_dir: PathBuf,
    /// For the names and dates of bundles.
    pub clock: Arc<dyn Clock>,
    /// Where it is put on record that there is a bundle.
    pub audit: Arc<dyn AuditSink>,
}

/// How many bundles of one VM are made in response to what it does, before somebody has taken some away: what a guest does over and
/// over is not to fill the disk.
pub const MAX_BUNDLES: usize = 8;

/// Why no bundle is made.
#[derive(Debug, thiserror::Error)]
enum BundlesError {
    #[error("there are {MAX_BUNDLES} bundles of this VM in {}: remove some, or move them elsewhere", .0.display())]
    Many(PathBuf),
    #[error("{} cannot be used for bundles", .0.display())]
    Dir(PathBuf, #[source] std::io::Error),
}

/// Makes the directory of bundles, and refuses another one of a VM that has enough.
fn room_for_another(dir: &Path, vm: &str) -> Result<(), BundlesError> {
    let failed = |source| BundlesError::Dir(dir.to_owned(), source);
    std::fs::create_dir_all(dir).map_err(failed)?;
    let prefix = format!("{vm}-");
    let names = std::fs::read_dir(dir).map_err(failed)?.flatten().map(|entry| entry.file_name());
    let of_it = names.filter(|name| name.as_encoded_bytes().starts_with(prefix.as_bytes())).count();
    if of_it < MAX_BUNDLES { Ok(()) } else { Err(BundlesError::Many(dir.to_owned())) }
}

/// Responds to findings about VMs.
#[derive(Debug)]
pub struct VmResponder {
    means: Means,
    /// Who holds a VM still, or wants to.
    holding: Mutex<BTreeMap<String, Weak<tokio::sync::Mutex<()>>>>,
}

impl VmResponder {
    /// A responder with these means.
    #[must_use]
    pub fn new(means: Means) -> Self {
        Self { means, holding: Mutex::default() }
    }

    /// The VM's turn to be held still: one response at a time.
    fn turn(&self, vm: &str) -> Arc<tokio::sync::Mutex<()>> {
        let mut holding = self.holding.lock().unwrap_or_else(PoisonError::into_inner);
        holding.retain(|_, turn| turn.strong_count() > 0);
        if let Some(turn) = holding.get(vm).and_then(Weak::upgrade) {
            return turn;
        }
        let turn = Arc::default();
        holding.insert(vm.to_owned(), Arc::downgrade(&turn));
        turn
    }

    async fn act(&self, vm: &str, action: ResponseAction, finding: &Finding) -> Result<(), RespondError> {
        match action {
            ResponseAction::Log => Ok(()),
            ResponseAction::Alert => self.alert(vm, finding).await,
            ResponseAction::Throttle => self.throttle(vm).await,
            ResponseAction::Pause => self.pause(vm).await,
            ResponseAction::Snapshot => self.snapshot(vm, finding).await,
            // Its owner finds the channel closed, and removes the rest.
            ResponseAction::Kill => {
                idempotent(self.find(vm).await?.destroy().await).map_err(|error| named(vm, error))?;
                tracing::warn!(vm, "it was ended");
                Ok(())
            }
        }
    }

    async fn find(&self, vm: &str) -> Result<Vm, RespondError> {
        Vm::find(&self.means.connection, vm).await.map_err(|error| named(vm, error))
    }

    async fn alert(&self, vm: &str, finding: &Finding) -> Result<(), RespondError> {
        let Some(webhook) = &self.means.webhook else {
            tracing::error!(vm, rule = %finding.rule, why = finding.why, "ALERT (there is no observe.webhook_url)");
            return Ok(());
        };
        webhook.send(vm, finding).await.map_err(failed)
    }

    async fn throttle(&self, vm: &str) -> Result<(), RespondError> {
        let template = self.find(vm).await?.template().await.map_err(|error| named(vm, error))?;
        let tap = template.spec().interface.as_ref().and_then(|interface| interface.target_dev.clone());
        // What has no network is slow enough.
        let Some(tap) = tap else { return Ok(()) };
        let throttle = Arc::clone(&self.means.throttle);
        blocking::run(move || throttle.slow(&tap)).await.map_err(failed)?;
        tracing::warn!(vm, "what it sends is slowed down");
        Ok(())
    }

    async fn pause(&self, vm: &str) -> Result<(), RespondError> {
        let turn = self.turn(vm);
        let _held = turn.lock().await;
        let domain = self.find(vm).await?;
        // Also of one that stands still for another reason, which will end.
        if let Ok(name) = VmName::new(vm) {
            self.means.holds.hold(&name);
        }
        let state = domain.state().await.map_err(|error| named(vm, error))?.state;
        if state == VmState::Paused {
            return Ok(());
        }
        idempotent(domain.pause().await).map_err(|error| named(vm, error))?;
        tracing::warn!(
            vm,
            "it was paused: `dev-box resume` lets it go on where a daemon has it, and `virsh resume` any other"
        );
        Ok(())
    }

    async fn snapshot(&self, vm: &str, finding: &Finding) -> Result<(), RespondError> {
        let turn = self.turn(vm);
        let _held = turn.lock().await;
        let (dir, name) = (self.means.forensics_dir.clone(), vm.to_owned());
        blocking::run(move || room_for_another(&dir, &name)).await.map_err(failed)?;
        let stamp = self.means.clock.now().to_string().replace(':', "");
        let request = ForensicsRequest {
            vm: vm.to_owned(),
            archive: self.means.forensics_dir.join(format!("{vm}-{}-{stamp}.tar", finding.rule)),
            audit_dir: self.means.audit_dir.clone(),
            reason: format!("{}: {}", finding.rule, finding.why),
            leave_paused: false,
        };
        let Means { connection, network, clock, holds, audit, .. } = &self.means;
        let archive = Text::new(&request.archive.to_string_lossy());
        let event = AuditEvent::VmForensics { archive, reason: Text::new(&request.reason) };
        // Made all the same where the log does not take it: what happened is worth more than its record.
        let act = Act::begin(audit, Entry::intent(event).vm(vm)).await;
        let made = forensics::collect(connection, network, &**clock, holds, &request).await;
        if let Ok(act) = act {
            let outcome = made.as_ref().map_or_else(|error| Outcome::failed(error), |_| Outcome::Ok);
            act.finish(outcome).await?;
        }
        let manifest = made.map_err(failed)?;
        tracing::warn!(vm, archive = %request.archive.display(), files = manifest.files.len(), "a forensic bundle was made");
        Ok(())
    }
}

impl Responder for VmResponder {
    fn respond<'a>(&'a self, vm: &'a str, action: ResponseAction, finding: &'a Finding) -> RespondFuture<'a> {
        Box::pin(self.act(vm, action, finding))
    }
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> RespondError {
    RespondError::Failed(Box::new(error))
}

fn named(vm: &str, error: VmError) -> RespondError {
    match error {
        VmError::NotFound { .. } => RespondError::Gone { vm: vm.to_owned() },
        error => failed(error),
    }
}

/// One that does not run any more is as dead as it is to be.
fn idempotent(result: Result<(), VmError>) -> Result<(), VmError> {
    match result {
        Err(VmError::Illegal(_)) => Ok(()),
        other => other,
    }
}
