//! How much came, told in lumps: every watched VM's observations go through one bounded queue, and a guest that sends its output
//! byte by byte must not fill it.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// So many bytes are told at once.
const LUMP: u64 = 64 << 10;
/// What is less is told when more comes after this, or at the end.
const EVERY: Duration = Duration::from_secs(1);

/// Counts bytes, and tells of them; of the last when it is dropped.
pub(super) struct Told<F: Fn(u64)> {
    tell: F,
    /// Not yet told, and when something was last.
    waiting: Mutex<(u64, Instant)>,
}

impl<F: Fn(u64)> Told<F> {
    /// Tells `tell`, which must not block.
    pub(super) fn to(tell: F) -> Self {
        Self { tell, waiting: Mutex::new((0, Instant::now())) }
    }

    /// So many more came.
    pub(super) fn came(&self, bytes: u64) {
        let due = {
            // Numbers only: whole whatever panicked beside them.
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            waiting.0 = waiting.0.saturating_add(bytes);
            if waiting.0 < LUMP && waiting.1.elapsed() < EVERY {
                return;
            }
            waiting.1 = Instant::now();
            std::mem::take(&mut waiting.0)
        };
        (self.tell)(due);
    }
}

impl<F: Fn(u64)> Drop for Told<F> {
    fn drop(&mut self) {
        let (rest, _) = *self.waiting.get_mut().unwrap_or_else(PoisonError::into_inner);
        if rest > 0 {
            (self.tell)(rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_is_told_when_it_is_much_or_late_and_at_the_end() {
        let heard = Mutex::new(Vec::new());
        let told = Told::to(|bytes| heard.lock().unwrap().push(bytes));
        let so_far = || heard.lock().unwrap().clone();
        (0..10).for_each(|_| told.came(1));
        assert!(so_far().is_empty());
        told.came(LUMP);
        assert_eq!(so_far(), [LUMP + 10]);
        told.came(1);
        tokio::time::advance(EVERY).await;
        told.came(2);
        told.came(4);
        assert_eq!(so_far(), [LUMP + 10, 3]);
        drop(told);
        assert_eq!(so_far(), [LUMP + 10, 3, 4]);
        drop(Told::to(|_| panic!("there was nothing")));
    }
}
