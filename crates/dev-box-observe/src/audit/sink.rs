//! The seam: where entries go.

use std::{
    future::Future,
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
};

use super::{AuditEvent, Entry, Outcome};

/// What [`AuditSink::append`] returns, boxed so that the trait stays object-safe.
pub type AuditFuture<'a> = Pin<Box<dyn Future<Output = Result<Receipt, AuditError>> + Send + 'a>>;

/// Proof that an entry is on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Receipt {
    /// The entry's number in the log, from 1.
    pub seq: u64,
}

/// What to do about a log that takes nothing any more.
pub(super) fn how_to_go_on(dir: &Path, key: &Path) -> String {
    format!(
        "see `dev-box audit verify`; keep a copy, then move {} and {} away to begin a new log",
        dir.display(),
        key.display()
    )
}

/// Why an entry was not written.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum AuditError {
    /// The log has no room but its reserve: it takes the end of running work, and nothing new.
    #[error(
        "the audit log takes no new work: {why} (make room, such as by `dev-box audit prune`, then try again)"
    )]
    Refusing {
        /// What is wrong.
        why: String,
    },
    /// Writing failed.
    #[error("cannot write the audit log")]
    Write(#[source] Arc<std::io::Error>),
    /// The log on disk is not what this chain left there.
    #[error("the audit log was changed from outside: {what} ({})", how_to_go_on(dir, key))]
    Tampered {
        /// What does not fit.
        what: String,
        /// The log.
        dir: PathBuf,
        /// Its first key, or where that was put when the log began.
        key: PathBuf,
    },
    /// The entry came out larger than a record may be.
    #[error("an audit record of {bytes} bytes is larger than {limit}")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// The entry could not be put into JSON.
    #[error("cannot encode an audit record")]
    Encode(#[source] Arc<serde_json::Error>),
    /// The log was closed.
    #[error("the audit log is closed")]
    Closed,
}

/// Where audit entries go. Object-safe: hold it as `Arc<dyn AuditSink>`.
///
/// The sink numbers and dates the entries. Order of two entries of one caller is kept.
pub trait AuditSink: std::fmt::Debug + Send + Sync {
    /// Writes an entry and resolves when it is synced to disk. Await it before the act for an intent.
    ///
    /// Dropping the future does not take the entry back once it was queued.
    ///
    /// # Errors
    /// [`AuditError::Refusing`] when the log must not take on new work: then do not act. Anything else means that
    /// the entry may not be on disk; for an intent: do not act.
    fn append(&self, entry: Entry) -> AuditFuture<'_>;

    /// Queues an entry, and waits for a place in the queue, not for the disk: for results, which are on disk before any later intent that
    /// somebody waits for. One that cannot be written is counted like a [`note`](Self::note) is. Where a sink knows no better, this appends.
    ///
    /// # Errors
    /// [`AuditError::Closed`], and any other where the sink knows at once.
    fn hand_in(&self, entry: Entry) -> Pin<Box<dyn Future<Output = Result<(), AuditError>> + Send + '_>> {
        let appended = self.append(entry);
        Box::pin(async move { appended.await.map(drop) })
    }

    /// Queues an entry without waiting: for facts at a high rate, and for `Drop`. What does not fit is counted, and
    /// the count itself becomes a record ([`AuditEvent::AuditLost`]), so that a loss shows.
    fn note(&self, entry: Entry);

    /// Whether new work may start. Cheap; check it before taking a job on, so that it fails early.
    ///
    /// # Errors
    /// [`AuditError::Refusing`], [`AuditError::Tampered`] or [`AuditError::Closed`].
    fn check(&self) -> Result<(), AuditError>;
}

impl<S: AuditSink + ?Sized> AuditSink for Arc<S> {
    fn append(&self, entry: Entry) -> AuditFuture<'_> {
        (**self).append(entry)
    }

    fn hand_in(&self, entry: Entry) -> Pin<Box<dyn Future<Output = Result<(), AuditError>> + Send + '_>> {
        (**self).hand_in(entry)
    }

    fn note(&self, entry: Entry) {
        (**self).note(entry);
    }

    fn check(&self) -> Result<(), AuditError> {
        (**self).check()
    }
}

/// A sink that keeps nothing: for programs that use one crate alone and want no audit.
#[derive(Debug, Clone, Copy, Default)]
pub struct NullSink;

impl AuditSink for NullSink {
    fn append(&self, _entry: Entry) -> AuditFuture<'_> {
        Box::pin(std::future::ready(Ok(Receipt { seq: 0 })))
    }

    fn note(&self, _entry: Entry) {}

    fn check(&self) -> Result<(), AuditError> {
        Ok(())
    }
}

/// An act between its intent and its result.
///
/// Dropping it without [`finish`](Self::finish) notes [`Outcome::Abandoned`].
///
/// # Examples
/// ```
/// use std::sync::Arc;
/// use dev_box_observe::{Act, AuditEvent, AuditSink, Entry, NullSink, Outcome};
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let sink: Arc<dyn AuditSink> = Arc::new(NullSink);
/// let destroy = AuditEvent::VmDestroy { reason: "job ended".into() };
/// let act = Act::begin(&sink, Entry::intent(destroy).vm("dev-box-1a2b3c4d")).await?;
/// // ... destroy it ...
/// act.finish(Outcome::Ok).await?;
/// # Ok::<_, dev_box_observe::AuditError>(()) }).unwrap();
/// ```
#[derive(Debug)]
#[must_use = "dropping an act says that it was abandoned"]
pub struct Act {
    sink: Arc<dyn AuditSink>,
    /// The result's entry as far as it is known; `None` once finished.
    pending: Option<Entry>,
}

impl Act {
    /// Writes the intent and waits until it is on disk. `intent.outcome` is set to [`Outcome::Intent`].
    ///
    /// # Errors
    /// As [`AuditSink::append`]; then the act must not happen.
    pub async fn begin(sink: &Arc<dyn AuditSink>, mut intent: Entry) -> Result<Self, AuditError> {
        intent.outcome = Outcome::Intent;
        let mut pending = intent.clone();
        let receipt = sink.append(intent).await?;
        pending.intent = Some(receipt.seq);
        Ok(Self { sink: Arc::clone(sink), pending: Some(pending) })
    }

    /// The number of the intent's record.
    #[must_use]
    pub fn intent_seq(&self) -> u64 {
        self.pending.as_ref().and_then(|entry| entry.intent).unwrap_or_default()
    }

    /// Names the VM, when it became known only after the intent.
    pub fn set_vm(&mut self, vm: impl std::fmt::Display) {
        if let Some(entry) = &mut self.pending {
            entry.subject.vm = Some(super::Text::display(vm));
        }
    }

    /// Names the lease, when it became known only after the intent.
    pub fn set_lease(&mut self, lease: impl std::fmt::Display) {
        if let Some(entry) = &mut self.pending {
            entry.subject.lease = Some(super::Text::display(lease));
        }
    }

    /// Says with another event how it came out: an exec's end has its exit status and counts.
    pub fn set_event(&mut self, event: AuditEvent) {
        if let Some(entry) = &mut self.pending {
            entry.event = event;
        }
    }

    /// Writes the result, with the event of the intent where nobody [set another](Self::set_event).
    ///
    /// # Errors
    /// As [`AuditSink::append`]. The act has happened; the caller decides what an unaudited result means (a VM is
    /// destroyed, not handed out again).
    pub async fn finish(mut self, outcome: Outcome) -> Result<Receipt, AuditError> {
        let entry = self.result(outcome)?;
        self.sink.append(entry).await
    }

    /// As [`finish`](Self::finish), without waiting for the disk ([`AuditSink::hand_in`]): where whatever comes of the act has an intent of
    /// its own, which is on disk after this.
    ///
    /// # Errors
    /// As [`AuditSink::hand_in`].
    pub async fn settle(mut self, outcome: Outcome) -> Result<(), AuditError> {
        let entry = self.result(outcome)?;
        self.sink.hand_in(entry).await
    }

    fn result(&mut self, outcome: Outcome) -> Result<Entry, AuditError> {
        let entry = self.pending.take().ok_or(AuditError::Closed)?;
        Ok(Entry { outcome, ..entry })
    }
}

impl Drop for Act {
    fn drop(&mut self) {
        if let Some(mut entry) = self.pending.take() {
            entry.outcome = Outcome::Abandoned;
            self.sink.note(entry);
        }
    }
}
