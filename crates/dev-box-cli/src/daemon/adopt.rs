//! What becomes of the VMs of a daemon that was killed: its successor takes them over.

use std::sync::Arc;

use dev_box::core::clock::EasternTime;
use dev_box::core::id::VmName;
use dev_box::exec::pool::Ending;
use dev_box::exec::{Gateway, LeftJob, ReadyVm};
use dev_box::net::policy::PolicyStoreError;
use dev_box::observe::audit::{self, Unended};
use dev_box::provision::kept::{AdoptError, Adopted};
use dev_box::provision::vm_dir::VmDirError;
use tokio::task::{JoinSet, spawn_blocking};

use super::api::{Happening, VmInfo, VmState};
use super::state::Daemon;
use super::vms::VmsError;
use crate::exit::Failure;

/// Why a VM that answers is not taken over.
#[derive(Debug, thiserror::Error)]
enum NoteError {
    #[error("what is on record of it is none of a daemon's")]
    Unreadable(#[source] serde_json::Error),
    #[error("what is on record of it is of another VM")]
    Another,
    #[error(transparent)]
    Vms(#[from] VmsError),
    #[error(transparent)]
    Policy(#[from] PolicyStoreError),
}

impl Daemon {
    /// Takes over what can be, all at once, since one that does not answer is waited for; the rest is gone then, or left to the
    /// sweep.
    ///
    /// # Errors
    /// The state root cannot be read.
    pub(super) async fn adopt_all(self: &Arc<Self>) -> Result<(), VmDirError> {
        let mut adopting = JoinSet::new();
        for domain in self.dev_box.provisioner().orphans()? {
            let provisioner = self.dev_box.provisioner().clone();
            adopting.spawn(async move {
                let adopted = provisioner.adopt(&domain).await;
                (domain, adopted)
            });
        }
        // A panic in there is logged by the runtime.
        while let Some(joined) = adopting.join_next().await {
            match joined {
                Ok((_, Ok(adopted))) => self.take_in(adopted).await,
                // Somebody else was faster.
                Ok((_, Err(AdoptError::Dir(_)))) | Err(_) => {}
                Ok((domain, Err(error))) => {
                    let error = Failure::new(error);
                    tracing::warn!(%domain, %error, "a VM of a killed daemon was not taken over");
                }
            }
        }
        Ok(())
    }

    async fn take_in(self: &Arc<Self>, Adopted { vm, note }: Adopted) {
        let domain = vm.name.clone();
        let reservation = match self.read(&vm, note) {
            Ok(reservation) => reservation,
            Err(error) => {
                tracing::warn!(%domain, error = %Failure::new(error), "a VM of a killed daemon is removed");
                return self.retire(vm, Ending::Abnormal).await;
            }
        };
        let (session, until) = (vm.session.clone(), self.now());
        let name = self.settle(reservation, vm).await.name;
        tracing::info!(vm = %name, %domain, "took over a VM of a killed daemon");
        self.events.say(Happening::VmAdopted { vm: name });
        self.take_up(self.gateway(domain.clone(), session), domain, until);
    }

    /// Follows what was left alone in a VM before `until`, and has no end on record. That the log may be long holds nothing up.
    fn take_up(self: &Arc<Self>, gateway: Gateway, domain: VmName, until: EasternTime) {
        let (daemon, dir) = (Arc::clone(self), self.dev_box.config().audit_dir());
        self.tasks.spawn(async move {
            let reading = spawn_blocking({
                let domain = domain.clone();
                move || audit::unended(&dir, domain.as_str(), until)
            });
            let read = tokio::select! {
                read = reading => read,
                () = daemon.stopping.cancelled() => return,
            };
            match read {
                Ok(Ok(jobs)) => {
                    let left = |one: Unended| LeftJob {
                        age: until.since(&one.asked),
                        begun: one.left,
                        job: one.job,
                        actor: one.actor,
                    };
                    drop(daemon);
                    gateway.take_up(jobs.into_iter().map(left).collect()).await;
                }
                Ok(Err(error)) => {
                    let error = Failure::new(error);
                    tracing::warn!(%domain, %error, "the ends of what runs in it from before will not be on record");
                }
                // A panic in there is logged by the runtime.
                Err(_) => {}
            }
        });
    }

    /// The note is no more trusted than any other file: it has to fit the VM that answered.
    fn read(&self, vm: &ReadyVm, note: serde_json::Value) -> Result<super::vms::Reservation, NoteError> {
        let info: VmInfo = serde_json::from_value(note).map_err(NoteError::Unreadable)?;
        check(&info, &vm.name, &vm.facts.image)?;
        let request = info.options.request(&self.dev_box, "serve")?;
        let reservation = self.vms.reserve(VmInfo { state: VmState::Starting, ..info })?;
        self.dev_box.watched_provisioner().adopt(vm, &request);
        Ok(reservation)
    }
}

fn check(info: &VmInfo, domain: &VmName, image: &str) -> Result<(), NoteError> {
    let same = info.domain.as_ref() == Some(domain) && info.image == image && info.state == VmState::Ready;
    if same { Ok(()) } else { Err(NoteError::Another) }
}

#[cfg(test)]
mod tests {
    use dev_box::core::clock::{Clock, SystemClock};

    use super::*;
    use crate::args::VmOptions;

    #[test]
    fn a_note_has_to_fit_its_vm() {
        let domain: VmName = "dev-box-1".parse().unwrap();
        let info = VmInfo {
            name: "work".parse().unwrap(),
            domain: Some(domain.clone()),
            state: VmState::Ready,
            owner: "root".to_owned(),
            image: "default".to_owned(),
            options: VmOptions::default(),
            created_at: SystemClock.now().truncated(),
        };
        let note = serde_json::to_value(&info).unwrap();
        assert_eq!(serde_json::from_value::<VmInfo>(note).unwrap(), info);
        assert!(check(&info, &domain, "default").is_ok());
        assert!(check(&info, &"dev-box-2".parse().unwrap(), "default").is_err());
        assert!(check(&info, &domain, "other").is_err());
        assert!(check(&VmInfo { domain: None, ..info.clone() }, &domain, "default").is_err());
        assert!(check(&VmInfo { state: VmState::Removing, ..info }, &domain, "default").is_err());
    }
}
