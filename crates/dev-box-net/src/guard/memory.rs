//! What was found of rules is remembered for as long as the kernel's nftables have not changed: listing them takes a process and
//! some 10 ms of processor time, and the watch over VMs asks every second.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::FirewallError;
use super::generation::Counter;

/// What was found last, and the kernel's count of changes at which it was so.
#[derive(Debug)]
pub(super) struct Memory<T>(Mutex<Option<(u32, T)>>);

impl<T> Default for Memory<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Clone> Memory<T> {
    /// What is remembered where that `fits` and nothing has changed since, or what `look` finds. It says as well whether all
    /// that changes it is counted; what is not is looked at each time.
    pub(super) fn get(
        &self,
        fits: impl FnOnce(&T) -> bool,
        look: impl FnOnce() -> Result<(T, bool), FirewallError>,
    ) -> Result<T, FirewallError> {
        // Held while looking, so that whoever asks meanwhile need not.
        let mut last = self.last();
        let uncounted =
            |error: &std::io::Error| tracing::debug!(%error, "changes of nftables cannot be counted");
        let counter = Counter::open().inspect_err(uncounted).ok();
        // Asked before, so that what changes meanwhile is found the next time.
        let now = counter.as_ref().and_then(|counter| counter.current().inspect_err(uncounted).ok());
        if let (Some(now), Some((then, found))) = (now, last.as_ref())
            && now == *then
            && fits(found)
        {
            return Ok(found.clone());
        }
        let (found, counted) = look()?;
        *last = now.filter(|_| counted).map(|now| (now, found.clone()));
        Ok(found)
    }

    pub(super) fn forget(&self) {
        // Whoever looks just now began before, and is waited for.
        *self.last() = None;
    }

    /// The change that made the kernel's count this number left alone what is remembered here. Only if it was the first one since
    /// is nothing else to be looked at.
    pub(super) fn survives(&self, change: u32) {
        if let Some((then, _)) = self.last().as_mut()
            && then.checked_add(1) == Some(change)
        {
            *then = change;
        }
    }

    fn last(&self) -> MutexGuard<'_, Option<(u32, T)>> {
        // Replaced as a whole: right whatever panicked beside it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
