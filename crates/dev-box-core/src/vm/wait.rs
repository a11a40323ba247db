//! Waiting for a state: told by lifecycle events, and looked up at growing intervals in case one is missed. A connection that
//! breaks meanwhile opens itself again, and is no end.

use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::{Vm, VmError};
use crate::connection::{ConnectionEvent, Link};
use crate::libvirt::LibvirtError;
use crate::state::VmState;

/// The first interval between looks, and the longest.
const POLL: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));

impl Vm {
    /// Waits until it is in `state`; at once when it is.
    ///
    /// # Errors
    /// [`VmError::Timeout`], or what the last look failed by when the connection was lost until then and did not come back;
    /// [`VmError::NotFound`] when libvirt does not know it (any more), unless
    /// [`VmState::Undefined`] is what was waited for.
    pub async fn wait_for_state(&self, state: VmState, timeout: Duration) -> Result<(), VmError> {
        self.wait_for_any(&[state], timeout).await.map(|_| ())
    }

    /// Waits until it does not run, whether something of it stays defined or not.
    ///
    /// # Errors
    /// [`VmError::Timeout`], or as [`Vm::wait_for_state`] when the connection is lost.
    pub async fn wait_stopped(&self, timeout: Duration) -> Result<VmState, VmError> {
        self.wait_for_any(&[VmState::Shutoff, VmState::Undefined, VmState::Crashed], timeout).await
    }

    /// Waits until it is in one of `wanted`, and gives that one.
    ///
    /// # Errors
    /// As [`Vm::wait_for_state`].
    pub async fn wait_for_any(&self, wanted: &[VmState], timeout: Duration) -> Result<VmState, VmError> {
        let deadline = Instant::now() + timeout;
        // Subscribed before the first look: what changes after the look is told.
        let mut events = self.connection.subscribe();
        let mut interval = POLL.0;
        let mut last = VmState::Unknown;
        let mut lost = None;
        let expired = |last, lost: Option<LibvirtError>| match lost {
            Some(lost) => lost.into(),
            None => VmError::Timeout {
                name: self.name.clone(),
                wanted: wanted.iter().map(VmState::to_string).collect::<Vec<_>>().join(" or "),
                after: timeout,
                last,
            },
        };
        loop {
            match timeout_at(deadline, self.state()).await {
                Ok(Ok(report)) => {
                    (last, lost) = (report.state, None);
                    if wanted.contains(&last) {
                        return Ok(last);
                    }
                    if last == VmState::Undefined {
                        return Err(VmError::NotFound { name: self.name.clone() });
                    }
                }
                // It broke under the look, which changes nothing, and is being opened again.
                Ok(Err(VmError::Libvirt(error)))
                    if error.is_connection_lost() && *self.connection.link().borrow() != Link::Closed =>
                {
                    lost = Some(error);
                }
                Ok(Err(error)) => return Err(error),
                Err(_) => return Err(expired(last, lost)),
            }
            let next_look = Instant::now() + interval;
            interval = interval.saturating_mul(2).min(POLL.1);
            loop {
                tokio::select! {
                    biased;
                    event = events.recv() => match event {
                        // An event says that something changed; what it is now, only a look tells ("started"
                        // may be "started paused").
                        Ok(ConnectionEvent::Domain { event, .. }) if event.id == self.id => break,
                        Ok(ConnectionEvent::Restored) | Err(RecvError::Lagged(_)) => break,
                        Ok(_) => {}
                        // The connection is gone; the next look says so.
                        Err(RecvError::Closed) => break,
                    },
                    () = sleep_until(deadline) => return Err(expired(last, lost)),
                    () = sleep_until(next_look) => break,
                }
            }
        }
    }
}
