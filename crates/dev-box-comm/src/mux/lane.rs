//! One lane in one direction: bytes, and the credit that bounds them.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// Payloads below this are appended to one another, so that a thousand one-byte frames cost a thousand bytes.
const MERGE_BELOW: usize = 4 * 1024;

/// Largest piece handed to a reader, in bytes.
const MAX_PIECE: usize = crate::frame::MAX_DATA;

/// Largest credit a peer may run up, in bytes.
pub(super) const MAX_CREDIT: u32 = 1 << 26;

/// The sending end.
#[derive(Debug)]
pub(super) struct SendLane {
    queue: VecDeque<Bytes>,
    queued: usize,
    credit: u32,
    finish: Finish,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Finish {
    No,
    Wanted,
    Sent,
}

/// What a sending lane puts on the wire next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outgoing {
    Data(Bytes),
    Finish,
}

impl SendLane {
    pub(super) fn new(credit: u32) -> Self {
        Self { queue: VecDeque::new(), queued: 0, credit: credit.min(MAX_CREDIT), finish: Finish::No }
    }

    pub(super) fn queued(&self) -> usize {
        self.queued
    }

    pub(super) fn is_finished(&self) -> bool {
        self.finish != Finish::No
    }

    pub(super) fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.queued += bytes.len();
            self.queue.push_back(bytes);
        }
    }

    pub(super) fn finish(&mut self) {
        if self.finish == Finish::No {
            self.finish = Finish::Wanted;
        }
    }

    /// False when the peer ran up more than it may.
    pub(super) fn grant(&mut self, bytes: u32) -> bool {
        match self.credit.checked_add(bytes) {
            Some(credit) if credit <= MAX_CREDIT => {
                self.credit = credit;
                true
            }
            _ => false,
        }
    }

    pub(super) fn ready(&self) -> bool {
        if self.queued > 0 { self.credit > 0 } else { self.finish == Finish::Wanted }
    }

    /// Nothing queued, and no end that was asked for and not sent.
    pub(super) fn drained(&self) -> bool {
        self.queued == 0 && self.finish != Finish::Wanted
    }

    pub(super) fn next(&mut self, most: usize) -> Option<Outgoing> {
        let Some(front) = self.queue.front_mut() else {
            if self.finish != Finish::Wanted {
                return None;
            }
            self.finish = Finish::Sent;
            return Some(Outgoing::Finish);
        };
        let size = front.len().min(most).min(self.credit as usize);
        if size == 0 {
            return None;
        }
        let bytes = if size == front.len() { self.queue.pop_front()? } else { front.split_to(size) };
        self.queued -= size;
        // At most the credit, by the minimum above.
        self.credit -= u32::try_from(size).unwrap_or(self.credit);
        Some(Outgoing::Data(bytes))
    }

    pub(super) fn clear(&mut self) {
        self.queue.clear();
        self.queued = 0;
        self.finish = Finish::Sent;
    }
}

/// The receiving end.
///
/// Invariant: what the peer may still send, plus what is buffered, never exceeds `window`.
#[derive(Debug)]
pub(super) struct RecvLane {
    queue: VecDeque<Bytes>,
    tail: BytesMut,
    buffered: u32,
    /// Credit the peer holds.
    granted: u32,
    window: u32,
    first_window: u32,
    finished: bool,
    discard: bool,
}

/// What the other side did wrong on a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LaneFault {
    Credit,
    Finished,
}

impl RecvLane {
    pub(super) fn new(window: u32) -> Self {
        let window = window.min(MAX_CREDIT);
        Self {
            queue: VecDeque::new(),
            tail: BytesMut::new(),
            buffered: 0,
            granted: window,
            window,
            first_window: window,
            finished: false,
            discard: false,
        }
    }

    pub(super) fn receive(&mut self, payload: Bytes) -> Result<(), LaneFault> {
        if self.finished {
            return Err(LaneFault::Finished);
        }
        let size = u32::try_from(payload.len()).map_err(|_| LaneFault::Credit)?;
        self.granted = self.granted.checked_sub(size).ok_or(LaneFault::Credit)?;
        if self.discard {
            return Ok(());
        }
        self.buffered += size;
        if payload.len() < MERGE_BELOW {
            if self.tail.len() + payload.len() > MAX_PIECE {
                self.queue.push_back(self.tail.split().freeze());
            }
            self.tail.extend_from_slice(&payload);
        } else {
            if !self.tail.is_empty() {
                self.queue.push_back(std::mem::take(&mut self.tail).freeze());
            }
            self.queue.push_back(payload);
        }
        Ok(())
    }

    pub(super) fn finish(&mut self) -> Result<(), LaneFault> {
        if std::mem::replace(&mut self.finished, true) { Err(LaneFault::Finished) } else { Ok(()) }
    }

    pub(super) fn finished(&self) -> bool {
        self.finished
    }

    pub(super) fn read(&mut self) -> Option<Bytes> {
        let bytes = match self.queue.pop_front() {
            Some(bytes) => bytes,
            None if self.tail.is_empty() => return None,
            None => std::mem::take(&mut self.tail).freeze(),
        };
        self.buffered = self.buffered.saturating_sub(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
        Some(bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.buffered == 0
    }

    /// Nobody reads any more: what comes is thrown away as if it were read.
    pub(super) fn discard(&mut self) {
        self.discard = true;
        self.queue.clear();
        self.tail = BytesMut::new();
        self.buffered = 0;
    }

    /// Whether enough was read that the peer should get credit.
    pub(super) fn wants_credit(&self) -> bool {
        let grantable = self.window.saturating_sub(self.granted.saturating_add(self.buffered));
        !self.finished && grantable > 0 && grantable >= self.window / 2
    }

    /// Credit for the peer. A lane that is read doubles its window, up to `max`, as far as `budget` goes.
    pub(super) fn take_credit(&mut self, max: u32, budget: &mut u32) -> u32 {
        if !self.discard {
            let growth = self.window.min(max.min(MAX_CREDIT).saturating_sub(self.window)).min(*budget);
            self.window += growth;
            *budget -= growth;
        }
        let credit = self.window.saturating_sub(self.granted.saturating_add(self.buffered));
        self.granted += credit;
        credit
    }

    /// What the lane took from the session's budget; given back once.
    pub(super) fn give_back(&mut self) -> u32 {
        let growth = self.window - self.first_window;
        self.window = self.first_window;
        growth
    }

    #[cfg(test)]
    pub(super) fn within_window(&self) -> bool {
        self.granted.saturating_add(self.buffered) <= self.window
    }
}
