//! Shells: clones whose QEMU runs and whose network is filtered, and which only wait for their template's devices.
//!
//! ```text
//!  keep --> made, one at a time, in the background --> on the shelf --taken--> activated: devices, agent, identity
//!                                                          \-- no longer wanted, or closing: taken down
//! ```
//! Libvirt takes most of what a clone costs to start QEMU. A shell has that behind it, and has no page of the guest's yet.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dev_box_exec::{ProvisionError, ReadyVm, VmRequest};
use tokio_util::sync::CancellationToken;

use super::ending::Use;
use super::raise::Started;
use super::{Inner, Origin, Wanted};
use crate::machine::Machine;
use crate::stopwatch::Stopwatch;
use crate::template::TemplateUse;

/// What a shell can become.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Kind {
    request: VmRequest,
    templates: TemplateUse,
}

impl Kind {
    pub(super) fn new(request: &VmRequest, templates: &TemplateUse) -> Self {
        // What it is for says nothing of what it is.
        let request = VmRequest { purpose: "shell".to_owned(), ..request.clone() };
        Self { request, templates: templates.clone() }
    }
}

/// One that waits.
#[derive(Debug)]
pub(super) struct Shell {
    machine: Machine,
    started: Started,
    origin: Origin,
}

#[derive(Debug, Default)]
struct Kept {
    wanted: usize,
    being_made: bool,
    ready: VecDeque<Shell>,
}

/// All shells of a provisioner.
#[derive(Debug, Default)]
pub(super) struct Shelf(Mutex<HashMap<Kind, Kept>>);

impl Shelf {
    fn kept(&self) -> MutexGuard<'_, HashMap<Kind, Kept>> {
        // A map of owned values is whole whatever panicked beside it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets how many are wanted; gives those that are too many.
    fn want(&self, kind: &Kind, wanted: usize) -> Vec<Shell> {
        let mut kept = self.kept();
        let kept = kept.entry(kind.clone()).or_default();
        kept.wanted = wanted;
        let surplus = kept.ready.len().saturating_sub(wanted);
        kept.ready.drain(..surplus).collect()
    }

    fn take(&self, kind: &Kind) -> Option<Shell> {
        self.kept().get_mut(kind)?.ready.pop_front()
    }

    /// Whether somebody is to make one now: at most one of a kind at a time.
    fn begin(&self, kind: &Kind) -> bool {
        let mut kept = self.kept();
        let Some(kept) = kept.get_mut(kind) else { return false };
        let begin = !kept.being_made && kept.ready.len() < kept.wanted;
        kept.being_made |= begin;
        begin
    }

    /// Takes what was made; gives it back when nobody wants it any more.
    fn end(&self, kind: &Kind, made: Option<Shell>) -> Option<Shell> {
        let mut kept = self.kept();
        let Some(kept) = kept.get_mut(kind) else { return made };
        kept.being_made = false;
        match made {
            Some(shell) if kept.ready.len() < kept.wanted => kept.ready.push_back(shell),
            other => return other,
        }
        None
    }

    /// Takes all away, and wants none.
    fn clear(&self) -> Vec<Shell> {
        self.kept().drain().flat_map(|(_, kept)| kept.ready).collect()
    }

    /// How many wait.
    fn count(&self, kind: &Kind) -> usize {
        self.kept().get(kind).map_or(0, |kept| kept.ready.len())
    }
}

impl Inner {
    /// Keeps so many from now on.
    pub(super) async fn keep_shells(self: &Arc<Self>, kind: Kind, wanted: usize) {
        let surplus = self.shelf.want(&kind, wanted);
        self.refill(&kind);
        self.drop_shells(surplus).await;
    }

    pub(super) fn shells(&self, kind: &Kind) -> usize {
        self.shelf.count(kind)
    }

    /// Makes what is missing, in the background. A failure is left at that until the next call.
    fn refill(self: &Arc<Self>, kind: &Kind) {
        if self.closing.is_cancelled() || !self.shelf.begin(kind) {
            return;
        }
        let (inner, kind) = (Arc::clone(self), kind.clone());
        self.work.spawn(async move {
            let made = inner.shell(&kind).await;
            let failed = made.is_err();
            let made = made.inspect_err(|error| {
                tracing::warn!(
                    error = error as &dyn std::error::Error,
                    "no shell was made: the next VM takes longer"
                );
            });
            let unwanted = inner.shelf.end(&kind, made.ok());
            if !failed {
                inner.refill(&kind);
            }
            inner.drop_shells(unwanted).await;
        });
    }

    async fn shell(self: &Arc<Self>, kind: &Kind) -> Result<Shell, ProvisionError> {
        let mut watch = Stopwatch::start();
        let never = CancellationToken::new();
        let (mut machine, plan, origin) =
            self.claim(&kind.request, Wanted::Ready(kind.templates.clone()), &mut watch).await?;
        let started = async {
            if !matches!(origin, Origin::Clone(_)) {
                let what = "no template serves it, and only a clone can wait".to_owned();
                return Err(ProvisionError::Unsatisfiable { what });
            }
            let mut started =
                self.start(&mut machine, plan, &origin, &kind.request, &mut watch, &never).await?;
            self.plug_in(&mut started).await?;
            watch.step("plug in");
            Ok(started)
        };
        match started.await {
            Ok(started) => {
                tracing::info!(vm = %machine.dir.name(), steps = ?watch.steps(), "a shell waits");
                Ok(Shell { machine, started, origin })
            }
            Err(error) => {
                self.abandon(machine).await;
                Err(error)
            }
        }
    }

    /// A VM from a shell, when there is one and it comes up.
    pub(super) async fn activate(
        self: &Arc<Self>,
        kind: &Kind,
        request: &VmRequest,
        gone: &CancellationToken,
    ) -> Option<ReadyVm> {
        let shell = self.shelf.take(kind)?;
        let watch = Stopwatch::start();
        let Shell { mut machine, started, origin } = shell;
        let finished = self.finish(&mut machine, started, &origin, request, watch, gone).await;
        self.refill(kind);
        match finished {
            Ok(vm) => {
                tracing::info!(vm = %vm.name, steps = ?vm.facts.timings, "a shell became a VM");
                self.machines().insert(vm.name.clone(), machine);
                Some(vm)
            }
            Err(error) => {
                tracing::warn!(vm = %machine.dir.name(), error = &error as &dyn std::error::Error, "a shell did not come up");
                self.abandon(machine).await;
                None
            }
        }
    }

    /// Takes all shells down.
    pub(super) async fn clear_shelf(self: &Arc<Self>) {
        self.drop_shells(self.shelf.clear()).await;
    }

    async fn drop_shells(self: &Arc<Self>, shells: impl IntoIterator<Item = Shell>) {
        for Shell { machine, .. } in shells {
            // Nothing is wrong with it: its tap serves another.
            let name = machine.dir.name().clone();
            if let Err(left) = self.end(machine, Use::Ended).await {
                tracing::warn!(vm = %name, error = &left as &dyn std::error::Error, "not all of a shell could be removed; `dev-box gc` tries again");
            }
        }
    }
}
