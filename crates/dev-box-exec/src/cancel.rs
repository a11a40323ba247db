//! Cancelling a job: a first request stops it gracefully, a second one at once.
//!
//! ```text
//!   Running --cancel--> Graceful --cancel--> Immediate
//! ```

use std::sync::Arc;

use tokio::sync::watch;

/// How urgently a job is to end. Ordered: `Running < Graceful < Immediate`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Urgency {
    /// Not at all.
    #[default]
    Running,
    /// TERM, grace, KILL; results are collected where that is safe.
    Graceful,
    /// At once: nothing is waited for.
    Immediate,
}

/// The side that cancels. Clones share the state; dropping it cancels nothing.
///
/// # Examples
/// ```
/// use dev_box_exec::cancel::{CancelSource, Urgency};
///
/// let source = CancelSource::new();
/// let cancel = source.token();
/// assert_eq!(source.cancel(), Urgency::Graceful);
/// assert_eq!(source.cancel(), Urgency::Immediate);
/// assert_eq!(cancel.urgency(), Urgency::Immediate);
/// ```
#[derive(Debug, Clone)]
pub struct CancelSource(Arc<watch::Sender<Urgency>>);

impl Default for CancelSource {
    fn default() -> Self {
        Self::new()
    }
}

impl CancelSource {
    /// A source nobody has cancelled yet.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(Urgency::Running)))
    }

    /// One step more urgent; returns the new urgency. May be called from a signal handler's task.
    pub fn cancel(&self) -> Urgency {
        self.raise(|now| if now == Urgency::Running { Urgency::Graceful } else { Urgency::Immediate })
    }

    /// At once, whatever was asked before.
    pub fn cancel_now(&self) -> Urgency {
        self.raise(|_| Urgency::Immediate)
    }

    fn raise(&self, step: impl Fn(Urgency) -> Urgency) -> Urgency {
        let mut after = Urgency::Running;
        self.0.send_modify(|now| {
            *now = step(*now);
            after = *now;
        });
        after
    }

    /// The other side.
    #[must_use]
    pub fn token(&self) -> Cancel {
        Cancel(self.0.subscribe())
    }
}

/// The side that is cancelled: cheap to clone.
#[derive(Debug, Clone)]
pub struct Cancel(watch::Receiver<Urgency>);

impl Cancel {
    /// A token that is never cancelled.
    #[must_use]
    pub fn never() -> Self {
        CancelSource::new().token()
    }

    /// What has been asked for so far.
    #[must_use]
    pub fn urgency(&self) -> Urgency {
        *self.0.borrow()
    }

    /// Resolves when at least `wanted` has been asked for; never, when the source is gone before. Cancel-safe.
    pub async fn reached(&self, wanted: Urgency) {
        let mut watch = self.0.clone();
        if watch.wait_for(|now| *now >= wanted).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_token_wakes_at_the_urgency_it_waits_for() {
        let source = CancelSource::default();
        let cancel = source.token();
        let immediate = tokio::spawn({
            let cancel = cancel.clone();
            async move { cancel.reached(Urgency::Immediate).await }
        });
        source.cancel();
        cancel.reached(Urgency::Graceful).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(!immediate.is_finished());
        assert_eq!(source.cancel(), Urgency::Immediate);
        immediate.await.unwrap();
        assert_eq!(source.cancel(), Urgency::Immediate, "there is nothing beyond");
    }

    #[tokio::test(start_paused = true)]
    async fn a_dropped_source_cancels_nothing() {
        let cancel = Cancel::never();
        let waited = tokio::time::timeout(Duration::from_secs(9), cancel.reached(Urgency::Graceful)).await;
        assert!(waited.is_err());
        let source = CancelSource::new();
        let cancel = source.token();
        assert_eq!(source.cancel_now(), Urgency::Immediate);
        drop(source);
        cancel.reached(Urgency::Immediate).await;
    }
}
