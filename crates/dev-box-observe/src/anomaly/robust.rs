//! Robust z-score: distance from the median in units of the median absolute deviation.
//!
//! One outlier moves a mean and swells a standard deviation; it moves neither of these. The window is kept sorted, so
//! an update costs a few binary searches and a short move. (B. Iglewicz and D. Hoaglin, "How to Detect and Handle Outliers",
//! 1993, give the factor and the usual threshold of 3.5.)

use std::collections::VecDeque;

use super::{Score, Why, score_of};

/// Makes the MAD of a normal distribution its standard deviation.
const MAD_TO_SIGMA: f64 = 1.4826;

/// A robust z-score over the last `window` numbers.
///
/// # Examples
/// ```
/// use dev_box_observe::anomaly::RobustZ;
/// let mut detector = RobustZ::new(64, 3.5);
/// for number in 0..64 {
///     detector.update(Some(100.0 + f64::from(number % 5)));
/// }
/// assert!(!detector.update(Some(104.0)).unwrap().is_odd());
/// assert!(detector.update(Some(160.0)).unwrap().is_odd());
/// assert!(detector.update(None).is_none(), "missing data is no news");
/// ```
#[derive(Debug, Clone)]
pub struct RobustZ {
    window: usize,
    threshold: f64,
    order: VecDeque<f64>,
    sorted: Vec<f64>,
}

impl RobustZ {
    /// A detector over `window` numbers (8 to 4096) whose threshold is so many robust standard deviations.
    #[must_use]
    pub fn new(window: usize, threshold: f64) -> Self {
        let window = window.clamp(8, 4096);
        Self {
            window,
            threshold: threshold.max(0.1),
            order: VecDeque::with_capacity(window),
            sorted: Vec::with_capacity(window),
        }
    }

    /// Scores a number against those before it, then takes it in. `None` while there are fewer than eight, and for
    /// what is missing or no number.
    pub fn update(&mut self, number: Option<f64>) -> Option<Score> {
        let number = number.filter(|number| number.is_finite())?;
        let score = (self.sorted.len() >= 8).then(|| self.score(number));
        let full = self.order.len() == self.window;
        match if full { self.order.pop_front() } else { None } {
            Some(oldest) => self.replace(oldest, number),
            None => {
                let at = self.sorted.partition_point(|kept| *kept < number);
                self.sorted.insert(at, number);
            }
        }
        self.order.push_back(number);
        score
    }

    /// Puts `new` in the place of `old`, moving only what lies between them.
    fn replace(&mut self, old: f64, new: f64) {
        let from = self.sorted.partition_point(|kept| *kept < old);
        let to = self.sorted.partition_point(|kept| *kept < new);
        let at = if to > from {
            self.sorted.copy_within(from + 1..to, from);
            to - 1
        } else {
            self.sorted.copy_within(to..from, to + 1);
            to
        };
        if let Some(place) = self.sorted.get_mut(at) {
            *place = new;
        }
    }

    fn score(&self, number: f64) -> Score {
        let median = self.median();
        let mad = self.mad(median);
        // A constant series has no deviation; a hundredth of its size is the least that counts as one.
        let sigma = (mad * MAD_TO_SIGMA).max(median.abs() * 0.01).max(1e-9);
        let deviation = ((number - median) / sigma).clamp(-1e9, 1e9);
        let score = score_of(deviation.abs(), self.threshold);
        let why = Why::FromMedian { number, median, deviation };
        Score { score, deviation, why }
    }

    fn median(&self) -> f64 {
        middle(&self.sorted)
    }

    /// The median of the distances. Those below the median and those above it are sorted already, so the middle of both
    /// together is found by halving, not by walking.
    fn mad(&self, median: f64) -> f64 {
        let (below, above) = self.sorted.split_at(self.sorted.partition_point(|kept| *kept < median));
        let down = |at: usize| {
            below.len().checked_sub(at + 1).and_then(|at| below.get(at)).map(|kept| median - kept)
        };
        let up = |at: usize| above.get(at).map(|kept| kept - median);
        // The smallest half: so many of those below, the rest of those above.
        let half = self.sorted.len() / 2 + 1;
        let (mut least, mut most) = (half.saturating_sub(above.len()), half.min(below.len()));
        while least < most {
            let try_at = usize::midpoint(least, most);
            if down(try_at) < up(half - try_at - 1) {
                least = try_at + 1;
            } else {
                most = try_at;
            }
        }
        let (of_below, of_above) = (least, half.saturating_sub(least));
        let last = |taken: usize, distance: &dyn Fn(usize) -> Option<f64>| {
            taken.checked_sub(1).and_then(distance).unwrap_or_default()
        };
        let (lower, upper) = (last(of_below, &down), last(of_above, &up));
        let greatest = lower.max(upper);
        if self.sorted.len() % 2 == 1 {
            return greatest;
        }
        let next = if lower > upper {
            upper.max(last(of_below.saturating_sub(1), &down))
        } else {
            lower.max(last(of_above.saturating_sub(1), &up))
        };
        f64::midpoint(greatest, next)
    }
}

fn middle(sorted: &[f64]) -> f64 {
    let half = sorted.len() / 2;
    let upper = sorted.get(half).copied().unwrap_or_default();
    if sorted.len() % 2 == 1 {
        return upper;
    }
    f64::midpoint(upper, half.checked_sub(1).and_then(|at| sorted.get(at)).copied().unwrap_or(upper))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn median_and_mad_are_those_of_a_full_sort(numbers in proptest::collection::vec(-1e6..1e6_f64, 1..60)) {
            let mut detector = RobustZ::new(16, 3.5);
            for number in &numbers {
                detector.update(Some(*number));
            }
            let mut last: Vec<f64> = numbers.iter().rev().take(16).copied().collect();
            last.sort_by(f64::total_cmp);
            prop_assert_eq!(&last, &detector.sorted);
            let median = middle(&last);
            let mut distances: Vec<f64> = last.iter().map(|number| (number - median).abs()).collect();
            distances.sort_by(f64::total_cmp);
            prop_assert!((detector.mad(median) - middle(&distances)).abs() < 1e-9);
        }

        #[test]
        fn any_numbers_give_bounded_scores_and_memory(
            numbers in proptest::collection::vec(proptest::option::of(any::<f64>()), 0..100),
        ) {
            let mut detector = RobustZ::new(8, 3.5);
            for number in numbers {
                if let Some(score) = detector.update(number) {
                    prop_assert!((0.0..=1.0).contains(&score.score), "{score:?}");
                }
                prop_assert!(detector.sorted.len() <= 8 && detector.sorted.len() == detector.order.len());
            }
        }
    }

    #[test]
    fn outliers_do_not_hide_each_other() {
        let mut detector = RobustZ::new(50, 3.5);
        for number in 0..50 {
            detector.update(Some(10.0 + f64::from(number % 3)));
        }
        for _ in 0..10 {
            assert!(detector.update(Some(100.0)).unwrap().is_odd());
        }
    }

    #[test]
    fn a_constant_series_finds_a_change_but_not_noise() {
        let mut detector = RobustZ::new(16, 3.5);
        for _ in 0..16 {
            detector.update(Some(1000.0));
        }
        assert!(!detector.update(Some(1000.0)).unwrap().is_odd());
        assert!(!detector.update(Some(1010.0)).unwrap().is_odd());
        assert!(detector.update(Some(1100.0)).unwrap().is_odd());
    }
}
