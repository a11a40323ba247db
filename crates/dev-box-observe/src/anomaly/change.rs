//! Change point: a level that moved and stays moved, however little, by cumulative sums.
//!
//! ```text
//!  Learning ──n numbers──> Watching ──sum over the threshold──> alarm ──> Learning (the new level)
//! ```
//!
//! (E. S. Page, "Continuous Inspection Schemes", 1954.) Each number counts at most three deviations, so that one
//! spike is no change.

use super::{Score, Why, score_of};

/// What a number may be off without counting, in deviations: half the smallest shift worth noticing.
const SLACK: f64 = 0.5;
const MOST: f64 = 3.0;

/// A two-sided CUSUM that learns its level from the first numbers, and anew after each change.
///
/// # Examples
/// ```
/// use dev_box_observe::anomaly::Change;
/// let mut detector = Change::new(30, 8.0);
/// for number in 0..100 {
///     detector.update(Some(f64::from(number % 7)));
/// }
/// let found = (0..50).find(|number| {
///     detector.update(Some(3.0 + f64::from(number % 7))).is_some_and(|score| score.is_odd())
/// });
/// assert!(found.is_some());
/// ```
#[derive(Debug, Clone)]
pub struct Change {
    learn: u32,
    threshold: f64,
    seen: u32,
    mean: f64,
    squares: f64,
    up: f64,
    down: f64,
}

impl Change {
    /// A detector that learns from `learn` numbers (at least 8) and alarms when the sum of deviations reaches
    /// `threshold` (8 gives about one false alarm in a million normal numbers).
    #[must_use]
    pub fn new(learn: u32, threshold: f64) -> Self {
        let (learn, threshold) = (learn.max(8), threshold.max(1.0));
        Self { learn, threshold, seen: 0, mean: 0.0, squares: 0.0, up: 0.0, down: 0.0 }
    }

    /// Takes a number. `None` while learning, and for what is missing; an odd score is the alarm, given once.
    pub fn update(&mut self, number: Option<f64>) -> Option<Score> {
        let number = number.filter(|number| number.is_finite()).map(|number| number.clamp(-1e100, 1e100))?;
        if self.seen < self.learn {
            self.seen += 1;
            let off = number - self.mean;
            self.mean += off / f64::from(self.seen);
            self.squares += off * (number - self.mean);
            return None;
        }
        let sigma = (self.squares / f64::from(self.learn - 1)).sqrt().max(self.mean.abs() * 0.01).max(1e-9);
        let off = ((number - self.mean) / sigma).clamp(-MOST, MOST);
        self.up = (self.up + off - SLACK).max(0.0);
        self.down = (self.down - off - SLACK).max(0.0);
        let sum = self.up.max(self.down);
        let deviation = if self.up >= self.down { sum } else { -sum };
        let why = Why::Moved { from: self.mean, sum: deviation };
        let score = Score { score: score_of(sum, self.threshold), deviation, why };
        if score.is_odd() {
            *self = Self::new(self.learn, self.threshold);
        }
        Some(score)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn learnt() -> Change {
        let mut detector = Change::new(30, 8.0);
        for number in 0..30 {
            assert!(detector.update(Some(f64::from(number % 5))).is_none());
        }
        detector
    }

    fn alarms(detector: &mut Change, numbers: impl IntoIterator<Item = f64>) -> usize {
        numbers
            .into_iter()
            .filter(|number| detector.update(Some(*number)).is_some_and(|s| s.is_odd()))
            .count()
    }

    #[test]
    fn a_shift_is_found_once_and_becomes_the_level() {
        let mut detector = learnt();
        assert_eq!(alarms(&mut detector, (0..500).map(|n| f64::from(n % 5))), 0);
        assert_eq!(alarms(&mut detector, (0..500).map(|n| 2.5 + f64::from(n % 5))), 1);
        assert_eq!(alarms(&mut detector, (0..100).map(|n| f64::from(n % 5) - 3.0)), 1);
    }

    #[test]
    fn one_spike_is_no_change() {
        let mut detector = learnt();
        assert_eq!(alarms(&mut detector, [1e9]), 0);
        assert_eq!(alarms(&mut detector, (0..100).map(|n| f64::from(n % 5))), 0);
    }

    proptest! {
        #[test]
        fn any_numbers_give_bounded_scores(
            numbers in proptest::collection::vec(proptest::option::of(any::<f64>()), 0..200),
        ) {
            let mut detector = Change::new(8, 8.0);
            for number in numbers {
                if let Some(score) = detector.update(number) {
                    prop_assert!((0.0..=1.0).contains(&score.score), "{score:?}");
                }
            }
        }
    }
}
