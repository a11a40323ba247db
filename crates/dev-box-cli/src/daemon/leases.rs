//! VMs of a pool that are lent for as long as a connection lives: what `dev-box run` takes.
//!
//! ```text
//! POST /v1/leases ──▶ lent ──▶ upgraded: the holder's channel ──▶ the connection ends, however ──▶ retired, as abnormal
//!                                      └── the holder asks for its removal: in order, if the guest says so, too
//! ```
//! Such a VM is listed and used like any other, and has no successor: it goes with its holder, and with its daemon.

use std::sync::Arc;
use std::time::Duration;

use dev_box::comm::session::{Io, Session};
use dev_box::core::id::VmName;
use dev_box::exec::pool::Ending;
use tokio::time::sleep;

use super::api::{Happening, LeaseInfo, NewLease};
use super::socket::Peer;
use super::state::{CreateError, Daemon};

/// How long the files of a VM that is lost are there for its holder, who gives it back after that.
const COLLECT: Duration = Duration::from_secs(60);

/// A VM that is lent; dropped, it is taken back, unless it went before.
#[derive(Debug)]
pub(crate) struct Lent {
    pub(crate) info: LeaseInfo,
    session: Session,
    daemon: Arc<Daemon>,
}

impl Drop for Lent {
    fn drop(&mut self) {
        // An error: its holder has given it back.
        if self.daemon.begin_removal(&self.info.name, Some(Ending::Abnormal)).is_ok() {
            tracing::info!(vm = %self.info.name, "whoever held a VM has gone without giving it back");
        }
    }
}

impl Daemon {
    /// Lends a VM of a pool. Dropping the future gives up the place in the queue, and what came of it.
    pub(crate) async fn lend(self: &Arc<Self>, new: NewLease, peer: &Peer) -> Result<Lent, CreateError> {
        if self.stopping.is_cancelled() {
            return Err(CreateError::Stopping);
        }
        // Of other images, or another log, or with directories of the host in it: never in a pool.
        if new.state_root != self.dev_box.config().host.state_root || !new.vm.mount.is_empty() {
            return Err(CreateError::NoPool);
        }
        let mut request = new.vm.request(&self.dev_box, "run")?;
        request.resources.disk = new.disk;
        if !new.vm.require_kvm {
            request.accelerator = new.accelerator;
        }
        let pool = self.pools.serving(&new.vm.templates(), &request).ok_or(CreateError::NoPool)?;
        let name = VmName::generate("run").map_err(CreateError::Name)?;
        let reservation = self.reserve(&name, &request.image, new.vm, peer)?;
        let patience = Duration::from_millis(self.dev_box.config().pool.wait_ms);
        let machine = self.lease(&*pool, &request, &name, patience, peer).await?;
        let info = LeaseInfo {
            name: name.clone(),
            domain: machine.name.clone(),
            share: machine.share.clone(),
            share_owner: machine.share_owner,
            facts: machine.facts.clone(),
        };
        let session = machine.session.clone();
        // Its holder looks after it, and has its files for a while when it is lost.
        reservation.fill(machine);
        self.events.say(Happening::VmLent { vm: name });
        Ok(Lent { info, session, daemon: Arc::clone(self) })
    }
}

impl Lent {
    /// Serves its holder, until the holder, the VM or the daemon is gone.
    pub(crate) async fn serve(self, io: impl Io, peer: &Peer) {
        let LeaseInfo { name, domain, .. } = &self.info;
        let gateway = self.daemon.gateway(domain.clone(), self.session.clone()).for_holder();
        self.daemon.serve_channel(gateway, io, peer).await;
        if let Some(reason) = self.session.close_reason() {
            let reason = reason.fate();
            self.daemon.vms.lose_lent(name, &reason);
            tracing::warn!(vm = %name, reason, "a VM that was lent is lost");
            self.daemon.events.say(Happening::VmLost { vm: name.clone(), reason });
            tokio::select! {
                () = self.daemon.vms.gone(name) => {}
                () = sleep(COLLECT) => {}
                () = self.daemon.stopping.cancelled() => {}
            }
        }
    }
}
