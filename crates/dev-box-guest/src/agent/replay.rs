//! The last part of a background job's output, kept for whoever attaches next.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;

/// Bytes kept of one stream.
pub const KEPT: usize = 256 * 1024;
/// Bytes handed out at a time.
const PART: usize = 32 * 1024;

/// A bounded memory of a stream of bytes, with any number of readers, each at its own place. The job is never stalled by a
/// reader: one that is too slow misses what has been forgotten.
#[derive(Debug, Default)]
pub struct Replay {
    ring: Mutex<Ring>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Ring {
    bytes: VecDeque<u8>,
    /// Bytes ever written.
    end: u64,
    finished: bool,
}

impl Ring {
    fn start(&self) -> u64 {
        self.end - self.bytes.len() as u64
    }
}

impl Replay {
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds bytes, forgetting the oldest beyond [`KEPT`].
    pub fn push(&self, bytes: &[u8]) {
        let mut ring = self.ring();
        ring.end += bytes.len() as u64;
        let kept = bytes.get(bytes.len().saturating_sub(KEPT)..).unwrap_or_default();
        let excess = (ring.bytes.len() + kept.len()).saturating_sub(KEPT);
        ring.bytes.drain(..excess);
        ring.bytes.extend(kept);
        drop(ring);
        self.changed.notify_waiters();
    }

    /// Nothing more will come.
    pub fn finish(&self) {
        self.ring().finished = true;
        self.changed.notify_waiters();
    }

    /// The place of a reader that wants the last `bytes` first.
    #[must_use]
    pub fn place(&self, bytes: u64) -> u64 {
        self.tail(bytes).0
    }

    /// The same, and how many bytes there are from it. A reader gets at least as many, whatever is forgotten meanwhile: there is
    /// always as much that is newer.
    #[must_use]
    pub fn tail(&self, bytes: u64) -> (u64, u64) {
        let ring = self.ring();
        let place = ring.end.saturating_sub(bytes).max(ring.start());
        (place, ring.end - place)
    }

    /// The next bytes from `place`, which is moved on; none at the end. Waits for more when there is none yet.
    pub async fn next(&self, place: &mut u64) -> Option<Bytes> {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // From here on a change is noticed, so that none falls between looking and waiting.
            changed.as_mut().enable();
            {
                let ring = self.ring();
                let from = (*place).max(ring.start());
                if from < ring.end {
                    let skip = usize::try_from(from - ring.start()).unwrap_or(usize::MAX);
                    let until = ring.bytes.len().min(skip.saturating_add(PART));
                    let part: Vec<u8> = ring.bytes.range(skip..until).copied().collect();
                    *place = from + part.len() as u64;
                    return Some(Bytes::from(part));
                }
                if ring.finished {
                    return None;
                }
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    async fn rest(replay: &Replay, mut place: u64) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(part) = replay.next(&mut place).await {
            all.extend_from_slice(&part);
        }
        all
    }

    #[tokio::test]
    async fn a_late_reader_gets_the_last_part() {
        let replay = Replay::default();
        replay.push(b"0123456789");
        replay.finish();
        assert_eq!(rest(&replay, replay.place(3)).await, b"789");
        assert_eq!((replay.tail(3), replay.tail(u64::MAX), replay.tail(0)), ((7, 3), (0, 10), (10, 0)));
        assert_eq!(rest(&replay, replay.place(u64::MAX)).await, b"0123456789");
        assert_eq!(rest(&replay, replay.place(0)).await, b"");
    }

    #[tokio::test]
    async fn a_reader_waits_for_more_and_for_the_end() {
        let replay = Arc::new(Replay::default());
        let reading = tokio::spawn({
            let replay = replay.clone();
            async move { rest(&replay, 0).await }
        });
        for part in ["one", "two", "three"] {
            tokio::time::sleep(Duration::from_millis(1)).await;
            replay.push(part.as_bytes());
        }
        replay.finish();
        assert_eq!(reading.await.unwrap(), b"onetwothree");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn memory_is_bounded_and_the_last_bytes_are_right(
            parts in proptest::collection::vec(0_usize..KEPT * 2, 1..6), wanted in 0_u64..KEPT as u64 * 2,
        ) {
            let replay = Replay::default();
            let mut all = Vec::new();
            for (index, length) in parts.into_iter().enumerate() {
                let part: Vec<u8> = (0..length).map(|at| (at * 7 + index) as u8).collect();
                replay.push(&part);
                all.extend(part);
                prop_assert!(replay.ring().bytes.len() <= KEPT);
            }
            replay.finish();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let got = runtime.block_on(rest(&replay, replay.place(wanted)));
            let length = all.len().min(KEPT).min(wanted as usize);
            prop_assert_eq!(&got, &all[all.len() - length..]);
        }
    }
}
