//! The double of [`AuditSink`]: remembers, and refuses on demand.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{AuditError, AuditFuture, AuditSink, Entry, Outcome, Receipt};

/// What a [`RecordingSink`] took.
#[derive(Debug, Clone, PartialEq)]
pub struct Recorded {
    /// Its number, from 1.
    pub seq: u64,
    /// The entry.
    pub entry: Entry,
    /// Whether it was appended (and so synced) or only noted.
    pub synced: bool,
}

#[derive(Debug, Default)]
struct State {
    taken: Vec<Recorded>,
    refusing: Option<String>,
    fail_after: Option<u64>,
}

/// Keeps entries in memory, in order. As strict as the real log: refuses new work when told to, and the result of
/// an intent it never saw is a panic.
///
/// # Examples
/// ```
/// use dev_box_observe::{AuditEvent, AuditSink, Entry, RecordingSink};
/// let sink = RecordingSink::new();
/// sink.note(Entry::fact(AuditEvent::VmPause {}).vm("vm-1"));
/// assert_eq!(sink.actions(), ["vm.pause:observed"]);
/// ```
#[derive(Debug, Default)]
pub struct RecordingSink {
    state: Mutex<State>,
}

impl RecordingSink {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// From now on new work is refused, as by a log that is out of room.
    pub fn refuse(&self, why: &str) {
        self.state().refusing = Some(why.to_owned());
    }

    /// New work is taken again.
    pub fn accept(&self) {
        self.state().refusing = None;
    }

    /// After `appends` more appends, every append fails as by a disk that is gone.
    pub fn fail_after(&self, appends: u64) {
        self.state().fail_after = Some(appends);
    }

    /// Everything taken so far.
    #[must_use]
    pub fn recorded(&self) -> Vec<Recorded> {
        self.state().taken.clone()
    }

    /// Everything taken so far, as `action:status`: what most tests compare.
    #[must_use]
    pub fn actions(&self) -> Vec<String> {
        let line = |one: &Recorded| format!("{}:{}", one.entry.event.action(), one.entry.outcome.status());
        self.state().taken.iter().map(line).collect()
    }

    /// The intents without a result so far, by number: empty when everything begun was ended.
    #[must_use]
    pub fn open_intents(&self) -> Vec<u64> {
        let state = self.state();
        let ended = |seq: u64| state.taken.iter().any(|one| one.entry.intent == Some(seq));
        let intents = state.taken.iter().filter(|one| one.entry.outcome == Outcome::Intent);
        intents.map(|one| one.seq).filter(|&seq| !ended(seq)).collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, entry: Entry, synced: bool) -> Result<Receipt, AuditError> {
        let mut state = self.state();
        if synced && let Some(left) = &mut state.fail_after {
            let Some(fewer) = left.checked_sub(1) else {
                return Err(AuditError::Write(std::sync::Arc::new(std::io::Error::other(
                    "scripted failure",
                ))));
            };
            *left = fewer;
        }
        if entry.starts_work()
            && let Some(why) = &state.refusing
        {
            return Err(AuditError::Refusing { why: why.clone() });
        }
        if let Some(intent) = entry.intent {
            let known =
                state.taken.iter().any(|one| one.seq == intent && one.entry.outcome == Outcome::Intent);
            assert!(known, "a result names the intent {intent}, which was never recorded: {entry:?}");
        }
        let seq = state.taken.len() as u64 + 1;
        state.taken.push(Recorded { seq, entry, synced });
        Ok(Receipt { seq })
    }
}

impl AuditSink for RecordingSink {
    fn append(&self, entry: Entry) -> AuditFuture<'_> {
        Box::pin(async move { self.take(entry, true) })
    }

    fn note(&self, entry: Entry) {
        // A note that is refused is lost, as in the real log; only intents of new work can be.
        let _ = self.take(entry, false);
    }

    fn check(&self) -> Result<(), AuditError> {
        match &self.state().refusing {
            Some(why) => Err(AuditError::Refusing { why: why.clone() }),
            None => Ok(()),
        }
    }
}
