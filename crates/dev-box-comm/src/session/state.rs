//! What a session's driver and handles share.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Waker};

use tokio::sync::{Notify, Semaphore, watch};

use super::CloseReason;
use crate::mux::Mux;

/// What a task may wait for on a stream; each by one handle only.
#[derive(Debug, Clone, Copy)]
pub(super) enum Slot {
    Receive,
    Send,
    Lane(u8),
}

const SLOTS: usize = 5;

impl Slot {
    fn index(self) -> usize {
        match self {
            Self::Receive => 0,
            Self::Send => 1,
            Self::Lane(lane) => (2 + usize::from(lane)).min(SLOTS - 1),
        }
    }
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) mux: Mux,
    wakers: HashMap<u32, [Option<Waker>; SLOTS]>,
    pub(super) accept: Option<Waker>,
    pub(super) incoming_gone: bool,
    pub(super) driver: Option<Waker>,
    /// This side wants the session closed.
    pub(super) closing: bool,
    pub(super) closed: Option<CloseReason>,
    /// Permits of `slots` in use.
    pub(super) taken: u32,
    pongs_seen: u64,
}

impl State {
    /// Has the handle woken when its stream is touched.
    pub(super) fn wait(&mut self, id: u32, slot: Slot, cx: &Context<'_>) {
        let wakers = self.wakers.entry(id).or_default();
        if let Some(entry) = wakers.get_mut(slot.index())
            && !entry.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()))
        {
            *entry = Some(cx.waker().clone());
        }
    }

    pub(super) fn forget_wakers(&mut self, id: u32) {
        self.wakers.remove(&id);
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    state: Mutex<State>,
    pub(super) closed: watch::Sender<Option<CloseReason>>,
    /// One permit per stream that may be opened.
    pub(super) slots: Semaphore,
    pub(super) pong: Notify,
    pub(super) holds: AtomicU32,
    pub(super) hold_epoch: AtomicU64,
}

impl Shared {
    pub(super) fn new(mux: Mux, streams: u32) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                mux,
                wakers: HashMap::new(),
                accept: None,
                incoming_gone: false,
                driver: None,
                closing: false,
                closed: None,
                taken: 0,
                pongs_seen: 0,
            }),
            closed: watch::Sender::new(None),
            slots: Semaphore::new((streams as usize).min(Semaphore::MAX_PERMITS)),
            pong: Notify::new(),
            holds: AtomicU32::new(0),
            hold_epoch: AtomicU64::new(0),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way; and a poisoned session must still close.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A handle's change: wakes the driver when there is something to send, and whoever was touched.
    pub(super) fn with<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.lock();
        let result = change(&mut state);
        let driver = if state.mux.has_frames() || state.closing { state.driver.take() } else { None };
        self.wake_touched(state);
        if let Some(waker) = driver {
            waker.wake();
        }
        result
    }

    /// The driver's change: wakes whoever was touched.
    pub(super) fn drive<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.lock();
        let result = change(&mut state);
        self.wake_touched(state);
        result
    }

    fn wake_touched(&self, mut state: MutexGuard<'_, State>) {
        let mut wake: Vec<Waker> = Vec::new();
        for id in state.mux.take_touched() {
            if let Some(wakers) = state.wakers.get_mut(&id) {
                wake.extend(wakers.iter_mut().filter_map(Option::take));
            }
        }
        if state.mux.accept_waiting()
            && let Some(waker) = state.accept.take()
        {
            wake.push(waker);
        }
        let freed = state.taken.saturating_sub(state.mux.live());
        state.taken -= freed;
        let ponged = state.mux.ponged();
        let new_pong = ponged != state.pongs_seen;
        state.pongs_seen = ponged;
        drop(state);
        if freed > 0 {
            self.slots.add_permits(freed as usize);
        }
        if new_pong {
            self.pong.notify_waiters();
        }
        wake.into_iter().for_each(Waker::wake);
    }

    /// The end: everybody is told.
    pub(super) fn close(&self, reason: CloseReason) {
        let mut state = self.lock();
        if state.closed.is_none() {
            state.closed = Some(reason.clone());
        }
        let mut wake: Vec<Waker> =
            state.wakers.drain().flat_map(|(_, wakers)| wakers.into_iter().flatten()).collect();
        wake.extend(state.accept.take());
        drop(state);
        self.slots.close();
        self.closed.send_modify(|slot| {
            slot.get_or_insert(reason);
        });
        self.pong.notify_waiters();
        wake.into_iter().for_each(Waker::wake);
    }

    pub(super) fn held(&self) -> bool {
        self.holds.load(Ordering::Acquire) > 0
    }
}

/// Dropped with the last handle of any kind: the session closes.
#[derive(Debug)]
pub(super) struct Owner {
    pub(super) shared: Arc<Shared>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.with(|state| state.closing = true);
    }
}
