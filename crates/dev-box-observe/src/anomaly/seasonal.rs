//! An exponentially weighted mean and variance, for each slot of a season (an hour of the day, say) its own.

use super::{Score, Why, score_of};

/// Numbers a slot must have seen before it is believed.
const WARM: u32 = 8;

#[derive(Debug, Clone, Copy, Default)]
struct Level {
    seen: u32,
    mean: f64,
    variance: f64,
}

impl Level {
    fn take(&mut self, number: f64, weight: f64) {
        self.seen = self.seen.saturating_add(1);
        // The first numbers are averaged plainly; otherwise the very first would weigh for long.
        let weight = weight.max(1.0 / f64::from(self.seen));
        let off = number - self.mean;
        self.mean += weight * off;
        self.variance = (1.0 - weight) * (self.variance + weight * off * off);
    }
}

/// An EWMA with seasonality: scores a number against the usual one for its slot.
///
/// # Examples
/// ```
/// use dev_box_observe::anomaly::Seasonal;
/// let mut detector = Seasonal::new(24, 0.1, 4.0);
/// for day in 0..20 {
///     for hour in 0..24 {
///         let usual = if hour < 8 { 5.0 } else { 500.0 };
///         detector.update(hour, Some(usual + f64::from(day % 2)));
///     }
/// }
/// assert!(!detector.update(12, Some(500.0)).unwrap().is_odd());
/// assert!(detector.update(3, Some(500.0)).unwrap().is_odd(), "at night that is odd");
/// ```
#[derive(Debug, Clone)]
pub struct Seasonal {
    weight: f64,
    threshold: f64,
    slots: Vec<Level>,
    all: Level,
}

impl Seasonal {
    /// A detector for a season of `slots` (1: no season; at most 1024), giving a new number this `weight` (0.001 to 1), with a
    /// threshold in standard deviations.
    #[must_use]
    pub fn new(slots: usize, weight: f64, threshold: f64) -> Self {
        let weight = if weight.is_finite() { weight.clamp(0.001, 1.0) } else { 0.1 };
        let slots = vec![Level::default(); slots.clamp(1, 1024)];
        Self { weight, threshold: threshold.max(0.1), slots, all: Level::default() }
    }

    /// Scores a number against its slot (or, while that is new, against all slots), then takes it in. `None` while
    /// there is too little to compare with, and for what is missing.
    pub fn update(&mut self, slot: usize, number: Option<f64>) -> Option<Score> {
        // Beyond this squares overflow; no measured quantity is near.
        let number = number.filter(|number| number.is_finite()).map(|number| number.clamp(-1e100, 1e100))?;
        let count = self.slots.len();
        let level = self.slots.get_mut(slot % count)?;
        let of_slot = level.seen >= WARM;
        let against = if of_slot { *level } else { self.all };
        let score = (against.seen >= WARM).then(|| {
            let sigma = against.variance.sqrt().max(against.mean.abs() * 0.01).max(1e-9);
            let deviation = ((number - against.mean) / sigma).clamp(-1e9, 1e9);
            let why = Why::FromMean { number, mean: against.mean, deviation, of_slot };
            Score { score: score_of(deviation.abs(), self.threshold), deviation, why }
        });
        // An odd number is taken in, but only up to the threshold: a new normal is learnt, a spike is not.
        let taken = match &score {
            Some(score) if score.is_odd() => {
                let sigma = against.variance.sqrt().max(against.mean.abs() * 0.01).max(1e-9);
                against.mean + self.threshold * sigma * score.deviation.signum()
            }
            _ => number,
        };
        level.take(taken, self.weight);
        self.all.take(taken, self.weight);
        score
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_numbers_give_bounded_scores(
            numbers in proptest::collection::vec((any::<usize>(), proptest::option::of(any::<f64>())), 0..200),
        ) {
            let mut detector = Seasonal::new(4, 0.2, 4.0);
            for (slot, number) in numbers {
                if let Some(score) = detector.update(slot, number) {
                    prop_assert!((0.0..=1.0).contains(&score.score), "{score:?}");
                }
            }
        }

        #[test]
        fn the_mean_of_the_first_numbers_is_plain(numbers in proptest::collection::vec(-1e3..1e3_f64, 1..9)) {
            let mut level = Level::default();
            for number in &numbers {
                level.take(*number, 0.001);
            }
            let mean = numbers.iter().sum::<f64>() / numbers.len() as f64;
            let variance = numbers.iter().map(|n| (n - mean).powi(2)).sum::<f64>() / numbers.len() as f64;
            prop_assert!((level.mean - mean).abs() < 1e-6);
            prop_assert!((level.variance - variance).abs() < 1e-3);
        }
    }

    #[test]
    fn a_new_normal_is_learnt_in_time() {
        let mut detector = Seasonal::new(1, 0.2, 4.0);
        for number in 0..50 {
            detector.update(0, Some(10.0 + f64::from(number % 2)));
        }
        assert!(detector.update(0, Some(100.0)).unwrap().is_odd());
        for number in 0..200 {
            detector.update(0, Some(100.0 + f64::from(number % 2)));
        }
        assert!(!detector.update(0, Some(100.0)).unwrap().is_odd());
    }

    #[test]
    fn a_new_slot_is_compared_with_the_series() {
        let mut detector = Seasonal::new(2, 0.1, 4.0);
        for number in 0..20 {
            detector.update(0, Some(f64::from(number % 3)));
        }
        let score = detector.update(1, Some(1000.0)).unwrap();
        assert!(score.is_odd() && score.why.to_string().contains("the series"), "{score:?}");
    }
}
