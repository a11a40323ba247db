//! Behind the handles: the present driver, the one crossing from tokio to blocking calls, and the task that opens a
//! broken connection again.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use tokio::sync::{Notify, Semaphore, broadcast, oneshot, watch};
use tokio::task::{AbortHandle, spawn_blocking};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::history::{History, Seen, Times};
use super::{ConnectionEvent, EVENT_BACKLOG, Link, OpenOptions};
use crate::clock::Clock;
use crate::id::VmId;
use crate::libvirt::{Access, CloseReason, Connector, DriverEvent, EventSink, Libvirt, LibvirtError};

type Result<T> = std::result::Result<T, LibvirtError>;

/// What all handles share.
pub(super) struct Inner {
    options: OpenOptions,
    connector: Arc<dyn Connector>,
    present: Mutex<Present>,
    link: watch::Sender<Link>,
    events: broadcast::Sender<ConnectionEvent>,
    history: Mutex<History>,
    /// Bounds the blocking calls under way.
    lanes: Arc<Semaphore>,
    /// Wakes the task that opens it again.
    broken: Arc<Notify>,
    supervisor: OnceLock<AbortHandle>,
}

/// The present driver. The generation tells an event of an earlier one from the present one's.
struct Present {
    generation: u64,
    driver: Option<Arc<dyn Libvirt>>,
}

pub(super) async fn open(options: OpenOptions, connector: Arc<dyn Connector>) -> Result<Arc<Inner>> {
    let inner = Arc::new(Inner {
        lanes: Arc::new(Semaphore::new(options.calls)),
        options,
        connector,
        present: Mutex::new(Present { generation: 0, driver: None }),
        link: watch::Sender::new(Link::Down { reason: CloseReason::Client, attempts: 0 }),
        events: broadcast::Sender::new(EVENT_BACKLOG),
        history: Mutex::default(),
        broken: Arc::new(Notify::new()),
        supervisor: OnceLock::new(),
    });
    connect(&inner).await?;
    let task = tokio::spawn(supervise(Arc::downgrade(&inner), inner.broken.clone()));
    let _ = inner.supervisor.set(task.abort_handle());
    Ok(inner)
}

/// One attempt.
async fn connect(inner: &Arc<Inner>) -> Result<()> {
    let generation = inner.present().generation + 1;
    let sink = event_sink(Arc::downgrade(inner), generation);
    let (connector, uri, access) = (inner.connector.clone(), inner.options.uri.clone(), inner.options.access);
    inner.present().generation = generation;
    let driver = spawn_blocking(move || connector.connect(&uri, access, sink))
        .await
        .map_err(|error| LibvirtError::ConnectionLost { message: error.to_string() })??;
    // The driver may have died before it arrived here; its `Closed` found nothing to close.
    let alive = driver.is_alive();
    if matches!(*inner.link.borrow(), Link::Closed) || !alive {
        release(driver);
        return Err(LibvirtError::ConnectionLost { message: "closed while it was being opened".into() });
    }
    inner.present().driver = Some(driver);
    inner.link.send_replace(Link::Up);
    Ok(())
}

fn event_sink(inner: Weak<Inner>, generation: u64) -> EventSink {
    Arc::new(move |event| {
        let Some(inner) = inner.upgrade() else { return };
        match event {
            DriverEvent::Domain(event) => {
                let at = inner.options.clock.now();
                if let Some(seen) = Seen::in_event(event.kind) {
                    inner.history().note(event.id, seen, at);
                }
                // No subscriber, no event: that is no failure.
                let _ = inner.events.send(ConnectionEvent::Domain { event, at });
            }
            DriverEvent::Closed(reason) => inner.lost(generation, reason),
        }
        dispose(inner);
    })
}

/// An event's handle may be the last one: the connection must not be closed on libvirt's own event thread.
fn dispose(inner: Arc<Inner>) {
    if Arc::strong_count(&inner) == 1 {
        std::thread::spawn(move || drop(inner));
    }
}

/// Closing talks to the daemon: not on a thread of tokio's.
fn release(driver: Arc<dyn Libvirt>) {
    std::thread::spawn(move || drop(driver));
}

async fn supervise(inner: Weak<Inner>, broken: Arc<Notify>) {
    loop {
        broken.notified().await;
        let mut attempts = 0u32;
        loop {
            let Some(strong) = inner.upgrade() else { return };
            let reason = match *strong.link.borrow() {
                Link::Down { reason, .. } => reason,
                Link::Up => break,
                Link::Closed => return,
            };
            match connect(&strong).await {
                Ok(()) => {
                    info!(uri = strong.options.uri, attempts, "connection to libvirt restored");
                    let _ = strong.events.send(ConnectionEvent::Restored);
                    break;
                }
                Err(error) => {
                    attempts = attempts.saturating_add(1);
                    if attempts == 1 {
                        warn!(uri = strong.options.uri, %error, "connection to libvirt not restored yet");
                    }
                    let closed = strong.link.send_if_modified(|link| {
                        let down = matches!(link, Link::Down { .. });
                        if down {
                            *link = Link::Down { reason, attempts };
                        }
                        down
                    });
                    if !closed {
                        return;
                    }
                }
            }
            let (first, longest) = strong.options.backoff;
            drop(strong);
            sleep(first.saturating_mul(1 << attempts.min(16).saturating_sub(1)).min(longest)).await;
        }
    }
}

/// The one place where a blocking call leaves tokio.
pub(super) async fn call<T, F, U>(inner: &Arc<Inner>, call: F, undo: U) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce(&dyn Libvirt) -> Result<T> + Send + 'static,
    U: FnOnce(&dyn Libvirt, T) + Send + 'static,
{
    let closed = || LibvirtError::ConnectionLost { message: "the connection was closed".into() };
    let lane = inner.lanes.clone().acquire_owned().await.map_err(|_| closed())?;
    let (generation, driver) = inner.driver().await?;
    let (answer, answered) = oneshot::channel();
    spawn_blocking(move || {
        let result = call(&*driver);
        let made = result.map(|value| Made(Some((value, undo, Arc::downgrade(&driver)))));
        if let Err(Ok(mut unwanted)) = answer.send(made)
            && let Some((value, undo, _)) = unwanted.0.take()
        {
            undo(&*driver, value);
        }
        drop(driver);
        drop(lane);
    });
    let cut_off =
        || LibvirtError::OperationFailed { code: 1, message: "the call panicked or was cut off".into() };
    let result = match answered.await {
        Ok(made) => made.and_then(|mut made| made.0.take().map(|(value, ..)| value).ok_or_else(cut_off)),
        Err(_) => Err(cut_off()),
    };
    if let Err(error) = &result
        && error.is_connection_lost()
    {
        inner.lost(generation, CloseReason::Error);
    }
    result
}

/// What a call made, on its way to whoever asked: who goes away between the answer and the look at it has it undone too.
struct Made<T, U>(Option<(T, U, Weak<dyn Libvirt>)>)
where
    T: Send + 'static,
    U: FnOnce(&dyn Libvirt, T) + Send + 'static;

impl<T, U> Drop for Made<T, U>
where
    T: Send + 'static,
    U: FnOnce(&dyn Libvirt, T) + Send + 'static,
{
    fn drop(&mut self) {
        let Some((value, undo, driver)) = self.0.take() else { return };
        // Undoing blocks, and this is a thread of tokio's; so does closing, if this is the driver's last use.
        let undoing = std::thread::Builder::new().spawn(move || {
            if let Some(driver) = driver.upgrade() {
                undo(&*driver, value);
            }
        });
        if let Err(error) = undoing {
            warn!(%error, "what a call made that nobody waited for is not undone");
        }
    }
}

pub(super) async fn close(inner: &Arc<Inner>) {
    inner.link.send_replace(Link::Closed);
    inner.lanes.close();
    inner.broken.notify_one();
    let driver = inner.present().driver.take();
    // A driver that panics while it closes has closed all the same.
    let _ = spawn_blocking(move || drop(driver)).await;
}

impl Inner {
    pub(super) fn uri(&self) -> &str {
        &self.options.uri
    }

    pub(super) fn access(&self) -> Access {
        self.options.access
    }

    pub(super) fn clock(&self) -> &Arc<dyn Clock> {
        &self.options.clock
    }

    pub(super) fn link(&self) -> watch::Receiver<Link> {
        self.link.subscribe()
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<ConnectionEvent> {
        self.events.subscribe()
    }

    pub(super) fn times(&self, id: VmId) -> Times {
        self.history().of(id)
    }

    pub(super) fn saw(&self, id: VmId, seen: Seen) {
        let at = self.options.clock.now();
        self.history().note(id, seen, at);
    }

    /// The present driver; waits for it while the link is down.
    pub(super) async fn driver(&self) -> Result<(u64, Arc<dyn Libvirt>)> {
        let mut link = self.link.subscribe();
        let settled = link.wait_for(|link| !matches!(link, Link::Down { .. }));
        let gone = |message: &str| LibvirtError::ConnectionLost { message: message.to_owned() };
        match timeout(self.options.patience, settled).await {
            Err(_) => return Err(gone("it has not come back in time")),
            Ok(Err(_)) => return Err(gone("the connection was closed")),
            Ok(Ok(state)) => {
                if *state == Link::Closed {
                    return Err(gone("the connection was closed"));
                }
            }
        }
        let present = self.present();
        let driver = present.driver.clone().ok_or_else(|| gone("it broke again"))?;
        Ok((present.generation, driver))
    }

    /// The driver of that generation is dead.
    fn lost(&self, generation: u64, reason: CloseReason) {
        let driver = {
            let mut present = self.present();
            if present.generation != generation {
                return;
            }
            present.driver.take()
        };
        let Some(driver) = driver else { return };
        release(driver);
        let was_up = self.link.send_if_modified(|link| {
            let up = *link == Link::Up;
            if up {
                *link = Link::Down { reason, attempts: 0 };
            }
            up
        });
        if was_up {
            warn!(uri = self.options.uri, ?reason, "connection to libvirt lost");
            let _ = self.events.send(ConnectionEvent::Lost(reason));
            self.broken.notify_one();
        }
    }

    fn present(&self) -> MutexGuard<'_, Present> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(task) = self.supervisor.get() {
            task.abort();
        }
        if let Some(driver) = self.present().driver.take() {
            release(driver);
        }
    }
}
