//! Sums and distinct counts over the last while, in memory that does not grow.

use std::array;

/// How many parts a window has: it forgets in steps of a twelfth.
const PARTS: usize = 12;

/// The sum of `N` numbers over a window. Between 11/12 of it and all of it is covered.
#[derive(Debug, Clone)]
pub(crate) struct Sums<const N: usize> {
    part_ms: u64,
    /// The number of the newest part since time 0.
    newest: u64,
    parts: [[f64; N]; PARTS],
}

impl<const N: usize> Sums<N> {
    pub(crate) fn new(window_ms: u64) -> Self {
        Self { part_ms: (window_ms / PARTS as u64).max(1), newest: 0, parts: [[0.0; N]; PARTS] }
    }

    /// Adds, and returns the sums. Time that goes backwards counts as now.
    pub(crate) fn add(&mut self, at_ms: u64, numbers: [f64; N]) -> [f64; N] {
        let part = (at_ms / self.part_ms).max(self.newest);
        let stale = (part - self.newest).min(PARTS as u64);
        for step in 0..stale {
            if let Some(slot) = self.parts.get_mut(((part - step) % PARTS as u64) as usize) {
                *slot = [0.0; N];
            }
        }
        self.newest = part;
        if let Some(slot) = self.parts.get_mut((part % PARTS as u64) as usize) {
            for (sum, number) in slot.iter_mut().zip(numbers) {
                // What is not a number says nothing; negative amounts do not exist.
                *sum += if number.is_finite() { number.max(0.0) } else { 0.0 };
            }
        }
        array::from_fn(|index| self.parts.iter().filter_map(|slot| slot.get(index)).sum())
    }
}

/// How many different keys were seen within a window; counts up to a limit.
#[derive(Debug, Clone)]
pub(crate) struct Distinct<K> {
    window_ms: u64,
    limit: usize,
    /// Each key with when it was last seen.
    seen: Vec<(K, u64)>,
}

impl<K: PartialEq> Distinct<K> {
    pub(crate) fn new(window_ms: u64, limit: usize) -> Self {
        Self { window_ms, limit: limit.max(1), seen: Vec::new() }
    }

    /// Notes a key and returns how many different ones there are now.
    pub(crate) fn see(&mut self, at_ms: u64, key: K) -> usize {
        self.count(at_ms);
        if let Some((_, seen)) = self.seen.iter_mut().find(|(known, _)| *known == key) {
            *seen = (*seen).max(at_ms);
        } else {
            if self.seen.len() >= self.limit {
                let oldest = self.seen.iter().enumerate().min_by_key(|(_, (_, seen))| *seen);
                if let Some((index, _)) = oldest {
                    self.seen.swap_remove(index);
                }
            }
            self.seen.push((key, at_ms));
        }
        self.seen.len()
    }

    /// How many different ones there are now.
    pub(crate) fn count(&mut self, at_ms: u64) -> usize {
        self.seen.retain(|(_, seen)| at_ms.saturating_sub(*seen) < self.window_ms);
        self.seen.len()
    }
}

/// States by key, the least recently used of which goes when there are too many.
#[derive(Debug, Clone)]
pub(crate) struct Recent<K, V> {
    limit: usize,
    /// With the number of its last use.
    held: Vec<(K, V, u64)>,
    uses: u64,
}

impl<K: PartialEq, V> Recent<K, V> {
    pub(crate) fn new(limit: usize) -> Self {
        Self { limit: limit.max(1), held: Vec::new(), uses: 0 }
    }

    /// The state of a key, made where there is none.
    pub(crate) fn entry(&mut self, key: K, make: impl FnOnce() -> V) -> Option<&mut V> {
        self.uses += 1;
        let index = match self.held.iter().position(|(known, ..)| *known == key) {
            Some(index) => index,
            None => {
                if self.held.len() >= self.limit {
                    let oldest = self.held.iter().enumerate().min_by_key(|(_, (.., used))| *used);
                    if let Some((index, _)) = oldest {
                        self.held.swap_remove(index);
                    }
                }
                self.held.push((key, make(), self.uses));
                self.held.len() - 1
            }
        };
        let (_, state, used) = self.held.get_mut(index)?;
        *used = self.uses;
        Some(state)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn sums_lie_between_those_of_a_shorter_and_the_whole_window(
            steps in proptest::collection::vec((0..400_u64, 0..10_u32), 1..80),
        ) {
            let mut sums = Sums::new(1200);
            let mut all: Vec<(u64, f64)> = Vec::new();
            let mut now = 0;
            for (step, number) in steps {
                now += step;
                all.push((now, f64::from(number)));
                let [sum] = sums.add(now, [f64::from(number)]);
                let within = |window: u64| -> f64 {
                    all.iter().filter(|(at, _)| now - at < window).map(|(_, number)| number).sum()
                };
                prop_assert!(within(1100) <= sum && sum <= within(1200), "{} {sum} {}", within(1100), within(1200));
            }
        }

        #[test]
        fn distinct_counts_what_a_set_would(keys in proptest::collection::vec((0..300_u64, 0..8_u8), 1..60)) {
            let mut distinct = Distinct::new(1000, 64);
            let mut all = Vec::new();
            let mut now = 0;
            for (step, key) in keys {
                now += step;
                all.push((now, key));
                let expected: std::collections::BTreeSet<_> =
                    all.iter().filter(|(at, _)| now - at < 1000).map(|(_, key)| key).collect();
                prop_assert_eq!(distinct.see(now, key), expected.len());
            }
        }

        #[test]
        fn memory_stays_bounded(keys in proptest::collection::vec(any::<u32>(), 1..300)) {
            let (mut distinct, mut recent) = (Distinct::new(1000, 7), Recent::new(5));
            for (at, key) in keys.into_iter().enumerate() {
                prop_assert!(distinct.see(at as u64, key) <= 7);
                recent.entry(key, || key).unwrap();
                prop_assert!(recent.held.len() <= 5);
            }
        }
    }

    #[test]
    fn the_least_recently_used_goes_and_time_never_goes_back() {
        let mut recent = Recent::new(2);
        for key in ["a", "b", "a", "c"] {
            *recent.entry(key, || 0).unwrap() += 1;
        }
        assert_eq!(*recent.entry("a", || 0).unwrap(), 2);
        assert_eq!(*recent.entry("b", || 0).unwrap(), 0);
        let mut sums = Sums::new(120);
        assert_eq!(sums.add(1000, [1.0]), [1.0]);
        assert_eq!(sums.add(10, [1.0]), [2.0]);
        assert_eq!(sums.add(1000, [f64::NAN]), [2.0]);
        assert_eq!(sums.add(u64::MAX, [-5.0]), [0.0]);
    }
}
