//! One series of numbers, scored row by row: the detectors together, for any series whatever.
//!
//! ```text
//!  value ─┬─> Seasonal (hour of the week) ─┐
//!         ├─> RobustZ of the value ────────┼─> surprise ─> how unusual are the last few surprises ─> score 0..1
//!         └─> RobustZ of the step ─────────┘
//! ```
//! A noisy series surprises all the time: what counts is whether it surprises more than it used to (the anomaly likelihood
//! of Ahmad et al., "Unsupervised real-time anomaly detection for streaming data", 2017). Constant memory.

use super::{RobustZ, Score, Seasonal, Why};

/// Numbers that are only learnt from.
const WARM: u32 = 50;
/// How fast the usual surprise is learnt, and over how many rows the present one is taken.
const LONG: f64 = 1.0 / 1000.0;
const SHORT: f64 = 1.0 / 4.0;
/// Beyond so many deviations a surprise says no more.
const MOST: f64 = 20.0;
/// Seconds of a slot, and slots of a week.
const SLOT_S: i64 = 3600;
const SLOTS: usize = 168;

/// Scores a series of numbers.
///
/// # Examples
/// ```
/// use dev_box_observe::anomaly::SeriesDetector;
/// let mut detector = SeriesDetector::new();
/// let (mut usual, mut odd) = (0.0_f64, 0.0_f64);
/// // Three weeks, a number every five minutes; the last hour is odd.
/// for row in 0..6048_i64 {
///     let quiet = 50.0 + (row % 3) as f64;
///     let last_hour = row >= 6048 - 12;
///     let score = detector.update(row * 300, Some(if last_hour { 500.0 } else { quiet }));
///     if last_hour {
///         odd = odd.max(score);
///     } else if row > 4000 {
///         usual = usual.max(score);
///     }
/// }
/// assert!(odd > 0.4 && odd > 5.0 * usual, "{odd} against {usual}");
/// ```
#[derive(Debug, Clone)]
pub struct SeriesDetector {
    seen: u32,
    seasonal: Seasonal,
    value: RobustZ,
    step: RobustZ,
    last: Option<f64>,
    /// What the last number was most surprising for, and whether that is its step.
    why: Option<(bool, Why)>,
    usual: f64,
    spread: f64,
    now: f64,
}

impl Default for SeriesDetector {
    fn default() -> Self {
        Self::new()
    }
}

impl SeriesDetector {
    /// Knows nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self {
            seen: 0,
            seasonal: Seasonal::new(SLOTS, 0.05, 4.0),
            value: RobustZ::new(288, 3.5),
            step: RobustZ::new(288, 3.5),
            last: None,
            why: None,
            usual: 0.0,
            spread: 0.0,
            now: 0.0,
        }
    }

    /// Takes the number of a moment (seconds, from any beginning) and says how odd it is, 0 to 1. What is missing, and what
    /// comes before enough was seen, is not odd.
    pub fn update(&mut self, at_s: i64, number: Option<f64>) -> f64 {
        self.why = None;
        let Some(number) = number.filter(|number| number.is_finite()) else { return 0.0 };
        // In 0..SLOTS, whatever the sign.
        let slot = usize::try_from(at_s.div_euclid(SLOT_S).rem_euclid(SLOTS as i64)).unwrap_or_default();
        let size = |score: Option<Score>| score.map_or(0.0, |score| score.deviation.abs().min(MOST));
        let season = self.seasonal.update(slot, Some(number));
        let value = self.value.update(Some(number));
        let step = self.step.update(self.last.map(|last| number - last));
        let (of_season, of_value, of_step) = (size(season), size(value), size(step));
        self.last = Some(number);
        let level = if of_season < of_value { season } else { value };
        let is_step = 0.5 * of_step > of_value.min(of_season);
        self.why = if is_step { step } else { level }.map(|score| (is_step, score.why));
        // What the season explains is no surprise; a jump is one even where the level is allowed.
        let surprise = of_value.min(of_season) + 0.5 * of_step;
        self.seen = self.seen.saturating_add(1);

        let (long, short) = (LONG.max(1.0 / f64::from(self.seen)), SHORT.max(1.0 / f64::from(self.seen)));
        self.now += short * (surprise - self.now);
        let deviation = (self.now - self.usual) / self.spread.sqrt().max(0.25);
        // Odd ones teach little: an attack is not to become the usual.
        let taken = surprise.min(self.usual + 6.0 * self.spread.sqrt().max(0.25));
        let off = taken - self.usual;
        self.usual += long * off;
        self.spread = (1.0 - long) * (self.spread + long * off * off);
        if self.seen <= WARM { 0.0 } else { unlikely(deviation) }
    }

    /// What was most surprising of the last number, in words; `None` where too little was seen. A score is of the last few.
    #[must_use]
    pub fn why(&self) -> Option<String> {
        self.why.map(|(is_step, why)| if is_step { format!("a step: {why}") } else { why.to_string() })
    }
}

/// How unlikely so many deviations upwards are by chance, on a scale of powers of ten: 1 is one in ten thousand million.
fn unlikely(deviation: f64) -> f64 {
    if deviation <= 0.0 {
        return 0.0;
    }
    // The tail of the normal distribution (Abramowitz and Stegun 26.2.17, and its asymptote far out), by its logarithm.
    let log10_tail = if deviation < 6.0 {
        let t = 1.0 / (1.0 + 0.231_641_9 * deviation);
        let series = t
            * (0.319_381_530
                + t * (-0.356_563_782 + t * (1.781_477_937 + t * (-1.821_255_978 + t * 1.330_274_429))));
        ((-deviation * deviation / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt() * series)
            .max(1e-300)
            .log10()
    } else {
        -(deviation * deviation / 2.0) / std::f64::consts::LN_10 - (deviation * 2.506_628).log10()
    };
    (-log10_tail / 10.0).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Noise that is the same each time.
    fn noise(step: i64) -> f64 {
        let mixed = (step as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 40) as f64 / f64::from(1_u32 << 24) - 0.5
    }

    proptest! {
        #[test]
        fn any_series_gives_bounded_scores(
            rows in proptest::collection::vec((any::<i64>(), proptest::option::of(any::<f64>())), 0..200),
        ) {
            let mut detector = SeriesDetector::new();
            for (at, number) in rows {
                prop_assert!((0.0..=1.0).contains(&detector.update(at, number)));
            }
        }
    }

    #[test]
    fn the_tail_is_the_normal_one() {
        for (deviation, tail) in [(1.0, 0.158_655), (3.0, 0.001_349_9), (5.0, 2.866_5e-7), (6.5, 4.016e-11)] {
            let expected = -f64::log10(tail) / 10.0;
            assert!(
                (unlikely(deviation) - expected.min(1.0)).abs() < 0.001,
                "{deviation}: {}",
                unlikely(deviation)
            );
        }
        assert_eq!(unlikely(-1.0), 0.0);
    }

    #[test]
    fn days_are_learnt_and_a_day_at_night_is_odd() {
        let mut detector = SeriesDetector::new();
        let by_day = |at: i64| if at / 3600 % 24 < 8 { 10.0 } else { 100.0 };
        let mut usual: f64 = 0.0;
        for step in 0..6000 {
            let at = step * 300;
            let score = detector.update(at, Some(by_day(at) + 4.0 * noise(step)));
            if step > 4000 {
                usual = usual.max(score);
            }
        }
        let mut odd: f64 = 0.0;
        // Three hours into a night.
        for step in 6084..6096 {
            odd = odd.max(detector.update(step * 300, Some(300.0)));
        }
        assert!(odd > 5.0 * usual && odd > 0.4, "{odd} against {usual}");
        let why = detector.why().unwrap();
        assert!(why.contains("300") && !why.starts_with("a step"), "{why}");
        assert_eq!(SeriesDetector::new().why(), None);
    }

    #[test]
    fn a_jump_within_what_is_usual_is_said_to_be_one() {
        let mut detector = SeriesDetector::new();
        for row in 0..2000_i64 {
            detector.update(row * 300, Some((row % 1000 - 500).abs() as f64));
        }
        detector.update(2000 * 300, Some(250.0));
        let why = detector.why().unwrap();
        assert!(why.starts_with("a step: -249"), "{why}");
        detector.update(2001 * 300, None);
        assert_eq!(detector.why(), None, "nothing is odd of what is missing");
    }
}
