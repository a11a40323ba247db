//! VMs forked: others run on from where one is.
//!
//! ```text
//! names taken ──▶ moment (a task of its own: the original runs again, whoever still waits) ──▶ clones, some at a time ──▶ listed
//!      └─────────────────────┴── failed, or nobody waits: none of them, and nothing of the moment ──┘
//! ```

use std::num::NonZero;
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use dev_box::core::id::VmName;
use dev_box::exec::pool::Ending;
use dev_box::observe::{AuditError, AuditEvent, Outcome};
use dev_box::provision::provisioner::{Fork, ForkError};
use futures::{StreamExt, TryStreamExt, stream};
use scopeguard::ScopeGuard;
use tokio::task::JoinError;

use super::api::{ForkInfo, Happening, NewForks};
use super::socket::Peer;
use super::state::{CreateError, Daemon};
use super::vms::VmsError;

/// So many clones of one moment at a time.
pub(crate) const MOST: u32 = 16;

/// Why a VM was not forked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ForkFailure {
    #[error(transparent)]
    Vms(#[from] VmsError),
    #[error("a VM can be forked into 1 to {MOST} others at a time")]
    Count,
    #[error("more names than VMs are given")]
    Names,
    #[error("VM {0} was not forked")]
    Fork(VmName, #[source] ForkError),
    #[error(transparent)]
    Create(#[from] CreateError),
    #[error("nothing is done that the audit log would not show")]
    Audit(#[from] AuditError),
    #[error("it was interrupted")]
    Interrupted(#[from] JoinError),
}

impl Daemon {
    /// Makes VMs that run on from where that one is: all of them, or none. Dropping the future leaves nothing but the original,
    /// which runs.
    pub(crate) async fn fork(
        self: &Arc<Self>,
        name: &VmName,
        new: NewForks,
        peer: &Peer,
    ) -> Result<ForkInfo, ForkFailure> {
        if self.stopping.is_cancelled() {
            return Err(CreateError::Stopping.into());
        }
        let began = Instant::now();
        let (original, options) = self.vms.original(name)?;
        let mut reservations = Vec::new();
        for name in names(new)? {
            let image = &original.facts.image;
            reservations.push(self.reserve(&name, image, options.clone(), peer)?);
        }
        let count = u32::try_from(reservations.len()).unwrap_or(MOST);
        let moment = {
            let (daemon, name, peer) = (Arc::clone(self), name.clone(), peer.clone());
            self.tasks.spawn(async move { daemon.moment(&name, count, &peer).await })
        };
        let fork = Arc::new(moment.await??);
        let paused_ms = milliseconds(fork.paused());

        let watched = self.dev_box.watched_provisioner().over(Arc::clone(&fork) as _).by(peer.actor());
        let at_a_time = available_parallelism().map_or(1, NonZero::get);
        let called: Vec<_> = reservations.iter().map(|kept| kept.name().clone()).collect();
        let (watched, request) = (&watched, fork.request());
        let machines: Vec<_> = stream::iter(called)
            .map(|name| async move { self.lease(watched, request, &name, Duration::MAX, peer).await })
            .buffered(at_a_time)
            .map_ok(|machine| self.guarded(machine))
            .try_collect()
            .await?;
        let daemon = Arc::clone(self);
        let mut vms = scopeguard::guard(Vec::new(), move |vms: Vec<super::api::VmInfo>| {
            for vm in vms {
                // An error: somebody else has removed it.
                let _ = daemon.begin_removal(&vm.name, Some(Ending::Abnormal));
            }
        });
        for (reservation, machine) in reservations.into_iter().zip(machines) {
            vms.push(self.settle(reservation, ScopeGuard::into_inner(machine)).await);
        }
        let vms = ScopeGuard::into_inner(vms);
        let took_ms = milliseconds(began.elapsed());
        for vm in &vms {
            self.events.say(Happening::VmReady { vm: vm.name.clone(), took_ms });
        }
        Ok(ForkInfo { of: name.clone(), paused_ms, took_ms, vms })
    }

    /// Takes a VM's moment. Nobody pauses it, or lets it run on, meanwhile.
    async fn moment(&self, name: &VmName, count: u32, peer: &Peer) -> Result<Fork, ForkFailure> {
        let _alone = self.power.lock().await;
        // As it is now: it may have waited.
        let (original, _) = self.vms.original(name)?;
        let domain = original.vm.clone();
        let event = |paused_ms| AuditEvent::VmFork { clones: count, paused_ms };
        let mut act = self.begin(event(None), &domain, peer).await?;
        let watched = self.dev_box.watched_provisioner();
        watched.paused(&domain, true);
        let clones = usize::try_from(count).unwrap_or(usize::MAX);
        let forked = self.dev_box.provisioner().fork(original, clones).await;
        let stands = matches!(forked, Err(ForkError::NotRunning(_) | ForkError::Resume(_)));
        watched.paused(&domain, stands);
        match forked {
            Ok(fork) => {
                let paused_ms = milliseconds(fork.paused());
                self.events.say(Happening::VmForked { vm: name.clone(), clones: count, paused_ms });
                act.set_event(event(Some(paused_ms)));
                act.finish(Outcome::Ok).await?;
                Ok(fork)
            }
            Err(error) => {
                act.finish(Outcome::failed(&error)).await?;
                Err(ForkFailure::Fork(name.clone(), error))
            }
        }
    }
}

/// Those given, and made up ones for the rest.
fn names(new: NewForks) -> Result<Vec<VmName>, ForkFailure> {
    let NewForks { count, mut names } = new;
    if !(1..=MOST).contains(&count) {
        return Err(ForkFailure::Count);
    }
    let count = usize::try_from(count).map_err(|_| ForkFailure::Count)?;
    if names.len() > count {
        return Err(ForkFailure::Names);
    }
    while names.len() < count {
        names.push(VmName::generate("fork").map_err(CreateError::Name)?);
    }
    Ok(names)
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(count: u32, given: &[&str]) -> NewForks {
        NewForks { count, names: given.iter().map(|name| name.parse().unwrap()).collect() }
    }

    #[test]
    fn names_that_are_not_given_are_made_up() {
        let all = names(new(3, &["a", "b"])).unwrap();
        assert_eq!((all.len(), all[0].as_str(), all[1].as_str()), (3, "a", "b"));
        assert!(all[2].as_str().starts_with("fork-"));
        assert!(matches!(names(new(1, &["a", "b"])), Err(ForkFailure::Names)));
        for count in [0, MOST + 1, u32::MAX] {
            assert!(matches!(names(new(count, &[])), Err(ForkFailure::Count)));
        }
        assert_eq!(names(new(MOST, &[])).unwrap().len(), 16);
    }
}
