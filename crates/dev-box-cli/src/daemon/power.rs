//! VMs paused, and let run on.

use dev_box::core::id::VmName;
use dev_box::core::vm::VmError;
use dev_box::observe::{Act, AuditError, AuditEvent, Entry, Outcome};
use dev_box::provision::provisioner::ResumeError;

use super::api::Happening;
use super::socket::Peer;
use super::state::Daemon;
use super::vms::VmsError;

/// Why a VM is not as it was wanted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PowerError {
    #[error(transparent)]
    Vms(#[from] VmsError),
    #[error("the VM was not paused")]
    Pause(#[source] VmError),
    #[error(transparent)]
    Resume(#[from] ResumeError),
    #[error("nothing is done that the audit log would not show")]
    Audit(#[from] AuditError),
}

impl Daemon {
    /// Stops a VM's CPUs. Its clients wait; new ones are told.
    pub(crate) async fn pause(&self, name: &VmName, peer: &Peer) -> Result<(), PowerError> {
        let _alone = self.power.lock().await;
        let (domain, session) = self.vms.channel(name)?;
        let act = self.begin(AuditEvent::VmPause {}, &domain, peer).await?;
        self.dev_box.watched_provisioner().paused(&domain, true);
        match self.dev_box.provisioner().pause(&domain, &session).await {
            Ok(paused) => {
                self.vms.set_paused(name, &domain, Some(paused));
                self.events.say(Happening::VmPaused { vm: name.clone() });
                act.finish(Outcome::Ok).await?;
                Ok(())
            }
            Err(error) => {
                self.dev_box.watched_provisioner().paused(&domain, false);
                act.finish(Outcome::failed(&error)).await?;
                Err(PowerError::Pause(error))
            }
        }
    }

    /// Lets it run on, its clock right; also one that was paused by somebody else, as a response to what it did.
    pub(crate) async fn resume(&self, name: &VmName, peer: &Peer) -> Result<(), PowerError> {
        let _alone = self.power.lock().await;
        let (domain, session) = self.vms.resumable(name)?;
        let act = self.begin(AuditEvent::VmResume {}, &domain, peer).await?;
        let resumed = self.dev_box.provisioner().resume(&domain, &session).await;
        // Whatever its agent says of the clock, it runs.
        if !resumed.as_ref().is_err_and(ResumeError::is_paused) {
            self.vms.set_paused(name, &domain, None);
            self.dev_box.watched_provisioner().paused(&domain, false);
            self.events.say(Happening::VmResumed { vm: name.clone() });
        }
        let outcome = resumed.as_ref().map_or_else(|error| Outcome::failed(error), |()| Outcome::Ok);
        act.finish(outcome).await?;
        Ok(resumed?)
    }

    pub(super) async fn begin(
        &self,
        event: AuditEvent,
        domain: &VmName,
        peer: &Peer,
    ) -> Result<Act, AuditError> {
        Act::begin(&self.dev_box.audit(), Entry::intent(event).by(peer.actor()).vm(domain)).await
    }
}
