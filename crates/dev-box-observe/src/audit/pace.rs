//! When an awaited entry is written: at once while the log is idle, with others while it is busy.
//!
//! ```text
//!  idle ──eight groups in less than eight windows──> busy: one group a window ──a quiet window, or nobody came──> idle
//! ```
//!
//! Whoever runs one job never waits for company that does not come; a thousand entries a second share a hundred syncs.

use std::time::{Duration, Instant};

/// How many groups may follow each other without a window between them.
const AT_ONCE: u32 = 8;

/// Paces the groups of a log. Pure: the caller says what time it is.
#[derive(Debug)]
pub(crate) struct Pace {
    window: Duration,
    /// When the log would be idle again, if each group took a whole window.
    idle_at: Instant,
}

impl Pace {
    pub(crate) fn new(window: Duration, now: Instant) -> Self {
        Self { window, idle_at: now }
    }

    /// From when on an awaited entry may be written. At most a window after the last group.
    pub(crate) fn due(&self, now: Instant) -> Instant {
        self.idle_at.checked_sub(self.window * AT_ONCE).unwrap_or(now)
    }

    /// A group was taken for writing: so many entries, which waited for company or did not.
    pub(crate) fn taken(&mut self, entries: usize, waited: bool, now: Instant) {
        if waited && entries <= 1 {
            // Only one caller, who appends one entry after another: there is nothing to wait for.
            self.idle_at = now;
        }
        self.idle_at = (self.idle_at.max(now) + self.window).min(now + self.window * (AT_ONCE + 1));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WINDOW: Duration = Duration::from_millis(10);
    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_thousand_a_second_share_a_hundred_groups() {
        let start = Instant::now();
        let mut pace = Pace::new(WINDOW, start);
        let (mut waiting, mut groups, mut waited) = (0, 0, false);
        for step in 0..1000 {
            let now = start + MS * step;
            waiting += 1;
            if now >= pace.due(now) {
                pace.taken(waiting, waited, now);
                (waiting, waited) = (0, false);
                groups += 1;
            } else {
                waited = true;
            }
        }
        assert!((100..=110).contains(&groups), "{groups}");
    }

    #[test]
    fn one_caller_waits_once_in_nine() {
        let start = Instant::now();
        let mut pace = Pace::new(WINDOW, start);
        let (mut now, mut waits) = (start, 0);
        for _ in 0..900 {
            let due = pace.due(now);
            let waited = due > now;
            waits += u32::from(waited);
            now = now.max(due);
            pace.taken(1, waited, now);
        }
        assert!(waits <= 110, "{waits}");
    }

    proptest! {
        #[test]
        fn nobody_waits_longer_than_a_window(
            gaps in proptest::collection::vec((0_u64..30, 1_usize..300, any::<bool>()), 1..100),
        ) {
            let start = Instant::now();
            let mut pace = Pace::new(WINDOW, start);
            let mut now = start;
            for (gap, entries, waited) in gaps {
                now += MS * u32::try_from(gap).unwrap();
                // Groups of notes and full ones are taken whatever the pace says.
                pace.taken(entries, waited, now);
                prop_assert!(pace.due(now) <= now + WINDOW);
            }
        }
    }
}
