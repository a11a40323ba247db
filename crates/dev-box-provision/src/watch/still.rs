//! VMs that stand still: for their network's sake, for a forensic bundle that any process makes, because somebody paused them.
//!
//! A guest that goes on is in the past. Its clock is set before it is asked for anything again: else it would be found to have
//! turned it back. As long as it stands, its channel does not take the silence for a breach.

use std::sync::Arc;

use dev_box_comm::session::{DeadlineHold, Session};
use dev_box_core::connection::ConnectionEvent;
use dev_box_core::id::VmName;
use dev_box_core::libvirt::DomainEventKind;
use dev_box_core::state::VmState;
use tokio::sync::broadcast;
use tokio::time::{Duration, timeout};

use super::{Shared, whole};
use crate::identity;

/// How long the agent of a VM that goes on may take to set its clock. Nothing else is asked of it meanwhile.
const WAKING: Duration = Duration::from_secs(10);

/// Whether a VM's CPUs stand.
#[derive(Debug, Clone)]
pub(super) enum Still {
    Runs,
    Stands(#[expect(dead_code, reason = "held, not read")] Arc<DeadlineHold>),
    /// It goes on, and its clock is not set yet.
    Wakes,
}

/// Listens to libvirt; what is missed of it, the next look sees.
pub(super) async fn follow(shared: Arc<Shared>, mut events: broadcast::Receiver<ConnectionEvent>) {
    loop {
        let event = match events.recv().await {
            Ok(ConnectionEvent::Domain { event, .. }) => event,
            Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => continue,
            Err(broadcast::error::RecvError::Closed) => return,
        };
        let state = match event.kind {
            DomainEventKind::Paused => VmState::Paused,
            DomainEventKind::Resumed => VmState::Running,
            _ => continue,
        };
        if let Ok(vm) = VmName::new(event.name) {
            saw(&shared, &vm, state);
        }
    }
}

/// A VM was in this state a moment ago.
pub(super) fn saw(shared: &Arc<Shared>, vm: &VmName, state: VmState) {
    let mut vms = whole(&shared.vms);
    let Some(watched) = vms.get_mut(vm) else { return };
    match (&watched.still, state) {
        (Still::Runs | Still::Wakes, VmState::Paused) => {
            watched.still = Still::Stands(Arc::new(watched.session.hold_deadlines()));
            watched.stops += 1;
        }
        (Still::Stands(_), VmState::Running) => {
            watched.still = Still::Wakes;
            let waking = wake(Arc::clone(shared), vm.clone(), watched.session.clone(), watched.stops);
            tokio::spawn(waking);
        }
        _ => {}
    }
}

async fn wake(shared: Arc<Shared>, vm: VmName, session: Session, stops: u64) {
    let answer = timeout(WAKING, identity::set_clock(&session, &*shared.parts.clock)).await;
    // Gone, or stopped again: then its clock is set another time.
    match whole(&shared.vms).get_mut(&vm).filter(|watched| watched.stops == stops) {
        Some(watched) => watched.still = Still::Runs,
        None => return,
    }
    match answer {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::warn!(%vm, error = &error as &dyn std::error::Error, "its clock is late");
        }
        Err(_) => tracing::warn!(%vm, "its clock is late: its agent did not answer"),
    }
}
