//! The log itself: a bounded queue and one writer.
//!
//! ```text
//!  append ──permit──┐                      ┌─ awaited entry: at once; while the log is busy, when the window is over
//!  hand_in ─permit──┼─> queue ─> writer ───┤
//!  note ──try───────┘                      └─ no awaited one: when the window is over
//!     └ full: counted
//! ```
//!
//! While the writer syncs one group, the next one gathers in the queue; a busy log waits for more of them ([`Pace`]).

use std::{
    collections::VecDeque,
    future::Future,
    io,
    pin::Pin,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use dev_box_core::clock::Clock;
use tokio::sync::{Semaphore, oneshot};

use super::{
    AuditError, AuditFuture, AuditOptions, AuditSink, Entry, OpenError, Receipt,
    journal::{Health, Journal},
    pace::Pace,
    volume::{Disk, Volume},
};
use crate::metrics;

/// The most entries written with one sync.
const MAX_GROUP: usize = 256;
/// How often the writer looks whether it can write again.
const RETRY: Duration = Duration::from_secs(1);

type Waiter = oneshot::Sender<Result<Receipt, AuditError>>;

/// An entry on its way to the disk.
#[derive(Debug)]
struct Queued {
    entry: Entry,
    waiter: Option<Waiter>,
    since: Instant,
}

#[derive(Debug, Default)]
struct Queue {
    waiting: VecDeque<Queued>,
    /// Whether somebody awaits an entry in there.
    urgent: bool,
    dropped: u64,
    closed: bool,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    /// Signals the writer.
    filled: Condvar,
    /// As many permits as the queue has places left.
    places: Semaphore,
    health: Mutex<Health>,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_health(&self, health: &Health) {
        metrics::AUDIT_REFUSING.set(if matches!(health, Health::Good) { 0.0 } else { 1.0 }, &[]);
        *self.health.lock().unwrap_or_else(PoisonError::into_inner) = health.clone();
    }

    fn push(&self, entry: Entry, waiter: Option<Waiter>) -> Result<(), AuditError> {
        let mut queue = self.queue();
        if queue.closed {
            return Err(AuditError::Closed);
        }
        // The writer is woken for what changes how long it waits, and not a thousand times a second.
        let matters = queue.waiting.is_empty()
            || (waiter.is_some() && !queue.urgent)
            || queue.waiting.len() + 1 >= MAX_GROUP;
        queue.urgent |= waiter.is_some();
        queue.waiting.push_back(Queued { entry, waiter, since: Instant::now() });
        drop(queue);
        if matters {
            self.filled.notify_one();
        }
        Ok(())
    }
}

/// The hash-chained audit log.
///
/// Any number of these, in any number of processes, may write to one directory. Dropping one waits until what was
/// queued is written.
///
/// # Examples
/// ```
/// use std::sync::Arc;
/// use dev_box_core::clock::SystemClock;
/// use dev_box_observe::{AuditEvent, AuditSink, Entry, audit::{AuditLog, AuditOptions, verify}};
///
/// # let dir = tempfile::tempdir()?;
/// let options = AuditOptions::new(dir.path().join("audit"), dir.path().join("first.key"));
/// let log = AuditLog::open(options, Arc::new(SystemClock))?;
/// # tokio::runtime::Builder::new_current_thread().build()?.block_on(async {
/// let receipt = log.append(Entry::intent(AuditEvent::VmStop {}).vm("dev-box-1a2b3c4d")).await?;
/// assert_eq!(receipt.seq, 2); // 1 is the chain's beginning
/// # Ok::<_, dev_box_observe::AuditError>(()) })?;
/// drop(log);
///
/// let report = verify(&dir.path().join("audit"), &dir.path().join("first.key"), &[])?;
/// assert!(report.problem.is_none());
/// # Ok::<_, Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct AuditLog {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<()>>,
}

impl AuditLog {
    /// Opens the log, or begins a chain where there is none, and starts its writer. Blocks for a few file operations.
    ///
    /// # Errors
    /// [`OpenError`]; in particular when the log on disk is not as it was left.
    pub fn open(options: AuditOptions, clock: Arc<dyn Clock>) -> Result<Self, OpenError> {
        Self::open_on(options, clock, Arc::new(Disk))
    }

    pub(crate) fn open_on(
        options: AuditOptions,
        clock: Arc<dyn Clock>,
        volume: Arc<dyn Volume>,
    ) -> Result<Self, OpenError> {
        let real_time = options.real_time;
        let places = options.queue.clamp(1, Semaphore::MAX_PERMITS);
        let journal = Journal::open(options, clock, volume)?;
        let shared = Arc::new(Shared {
            queue: Mutex::default(),
            filled: Condvar::new(),
            places: Semaphore::new(places),
            health: Mutex::new(journal.health().clone()),
        });
        let theirs = Arc::clone(&shared);
        let writer = std::thread::Builder::new()
            .name("dev-box-audit".to_owned())
            .spawn(move || {
                if real_time && let Err(error) = go_first() {
                    tracing::debug!(%error, "the audit writer waits for its turn like others");
                }
                write_groups(&theirs, journal);
            })
            .map_err(OpenError::Thread)?;
        Ok(Self { shared, writer: Some(writer) })
    }

    /// Writes what is queued, exports a last head, and ends. Later entries fail. Blocks, at most about twice
    /// [`AuditOptions::lock_timeout`] when others write.
    pub fn close(mut self) {
        self.end();
    }

    pub(crate) fn end(&mut self) {
        self.shared.queue().closed = true;
        self.shared.places.close();
        self.shared.filled.notify_one();
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!("the audit writer panicked");
        }
    }
}

impl Drop for AuditLog {
    fn drop(&mut self) {
        self.end();
    }
}

impl AuditSink for AuditLog {
    fn append(&self, entry: Entry) -> AuditFuture<'_> {
        Box::pin(async move {
            let began = Instant::now();
            let place = self.shared.places.acquire().await.map_err(|_| AuditError::Closed)?;
            let (done, receipt) = oneshot::channel();
            self.shared.push(entry, Some(done))?;
            // The writer gives it back when it takes the entry.
            place.forget();
            let written = receipt.await.map_err(|_| AuditError::Closed)?;
            metrics::AUDIT_WAIT_SECONDS.record(began.elapsed(), &[]);
            written
        })
    }

    fn hand_in(&self, entry: Entry) -> Pin<Box<dyn Future<Output = Result<(), AuditError>> + Send + '_>> {
        Box::pin(async move {
            let place = self.shared.places.acquire().await.map_err(|_| AuditError::Closed)?;
            self.shared.push(entry, None)?;
            place.forget();
            Ok(())
        })
    }

    fn note(&self, entry: Entry) {
        match self.shared.places.try_acquire() {
            Ok(place) => {
                if self.shared.push(entry, None).is_ok() {
                    place.forget();
                }
            }
            Err(_) => self.shared.queue().dropped += 1,
        }
    }

    fn check(&self) -> Result<(), AuditError> {
        if self.shared.places.is_closed() {
            return Err(AuditError::Closed);
        }
        match &*self.shared.health.lock().unwrap_or_else(PoisonError::into_inner) {
            Health::Good => Ok(()),
            Health::Refusing(why) => Err(AuditError::Refusing { why: why.clone() }),
            Health::Failed(error @ AuditError::Tampered { .. }) => Err(error.clone()),
            Health::Failed(error) => {
                let source = std::error::Error::source(error).map(|cause| format!(": {cause}"));
                Err(AuditError::Refusing { why: format!("{error}{}", source.unwrap_or_default()) })
            }
        }
    }
}

/// Closes the queue when the writer ends, however it ends, so that nobody waits for a writer that is gone.
struct Ending<'a>(&'a Shared);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.places.close();
        let mut queue = self.0.queue();
        queue.closed = true;
        queue.waiting.clear();
    }
}

/// Has this thread, and what it starts not, run as soon as it can.
pub(super) fn go_first() -> io::Result<()> {
    let least = libc::sched_param { sched_priority: 1 };
    #[expect(unsafe_code, reason = "sched_setscheduler has no safe wrapper")]
    // SAFETY: plain numbers, of this thread.
    let refused =
        unsafe { libc::sched_setscheduler(0, libc::SCHED_RR | libc::SCHED_RESET_ON_FORK, &raw const least) };
    if refused == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn write_groups(shared: &Shared, mut journal: Journal) {
    let _ending = Ending(shared);
    let window = journal.options().group_window;
    let head_interval = journal.options().head_interval;
    let mut pace = Pace::new(window, Instant::now());
    let mut next_head = Instant::now() + head_interval;
    let mut next_retry = Instant::now() + RETRY;
    loop {
        let wake = next_head.min(next_retry);
        let (group, dropped, closed) = next_group(shared, &mut pace, window, wake);
        journal.count_lost(dropped, "the queue was full");
        if closed {
            journal.end_soon();
        }
        let empty = group.is_empty();
        if !empty {
            let oldest = group.iter().map(|queued| queued.since).min();
            let (entries, waiters): (Vec<_>, Vec<_>) =
                group.into_iter().map(|queued| (queued.entry, queued.waiter)).unzip();
            let start = Instant::now();
            let results = journal.append(entries);
            metrics::AUDIT_GROUP_SECONDS.record(start.elapsed(), &[]);
            if let Some(oldest) = oldest {
                metrics::AUDIT_LAG_SECONDS.record(oldest.elapsed(), &[]);
            }
            count(&results, dropped);
            shared.set_health(journal.health());
            for (waiter, result) in waiters.into_iter().zip(results) {
                match waiter {
                    // Who no longer waits does not want to know.
                    Some(waiter) => drop(waiter.send(result)),
                    None => {
                        if let Err(error) = result {
                            tracing::error!(%error, "an audit entry was lost");
                        }
                    }
                }
            }
        }
        let now = Instant::now();
        if now >= next_retry || (closed && empty) {
            journal.tick();
            shared.set_health(journal.health());
            next_retry = now + RETRY;
        }
        if now >= next_head || (closed && empty) {
            journal.export_head();
            next_head = now + head_interval;
        }
        if closed && empty {
            return;
        }
    }
}

fn count(results: &[Result<Receipt, AuditError>], dropped: u64) {
    let (mut written, mut refused, mut failed) = (0, 0, 0);
    for result in results {
        match result {
            Ok(_) => written += 1,
            Err(AuditError::Refusing { .. }) => refused += 1,
            Err(_) => failed += 1,
        }
    }
    for (number, outcome) in
        [(written, "written"), (refused, "refused"), (failed, "failed"), (dropped, "dropped")]
    {
        if number > 0 {
            metrics::AUDIT_RECORDS.add(number, &[outcome]);
        }
    }
}

/// Waits for a group: until an awaited entry is there and the pace allows it, an entry has waited long enough, the queue is full of notes, the
/// log is closed, or it is `wake`.
fn next_group(shared: &Shared, pace: &mut Pace, window: Duration, wake: Instant) -> (Vec<Queued>, u64, bool) {
    let mut queue = shared.queue();
    let (mut deadline, mut waited) = (None, false);
    loop {
        let now = Instant::now();
        if !queue.waiting.is_empty() {
            deadline.get_or_insert(now + window);
        }
        let due = match deadline {
            Some(deadline) if queue.urgent => Some(pace.due(now).min(deadline)),
            other => other,
        };
        let full = queue.waiting.len() >= MAX_GROUP;
        if due.is_some_and(|due| now >= due) || queue.closed || full || now >= wake {
            break;
        }
        waited |= queue.urgent;
        let until = due.unwrap_or(wake).min(wake);
        let woken = shared.filled.wait_timeout(queue, until.saturating_duration_since(now));
        queue = woken.unwrap_or_else(PoisonError::into_inner).0;
    }
    let take = queue.waiting.len().min(MAX_GROUP);
    let group: Vec<_> = queue.waiting.drain(..take).collect();
    queue.urgent = queue.waiting.iter().any(|queued| queued.waiter.is_some());
    let dropped = std::mem::take(&mut queue.dropped);
    let closed = queue.closed;
    drop(queue);
    if take > 0 {
        pace.taken(take, waited, Instant::now());
    }
    shared.places.add_permits(take);
    (group, dropped, closed)
}
