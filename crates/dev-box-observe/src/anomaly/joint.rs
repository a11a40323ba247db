//! Several numbers together: each may be usual while the combination is not (a busy processor without IO).
//!
//! Mahalanobis distance by an exponentially weighted mean and covariance, compared with what chance would give.

use std::array;

use super::{Score, Why, score_of};

/// A detector over `D` numbers at a time (at most eight make sense).
///
/// # Examples
/// ```
/// use dev_box_observe::anomaly::Joint;
/// let mut detector = Joint::new(["cpu", "io"], 0.02, 4.0);
/// for step in 0..400_u32 {
///     let load = f64::from(step * 7 % 100);
///     detector.update([Some(load), Some(load * 2.0 + f64::from(step % 3))]);
/// }
/// assert!(!detector.update([Some(50.0), Some(101.0)]).unwrap().is_odd());
/// assert!(detector.update([Some(90.0), Some(20.0)]).unwrap().is_odd(), "each is usual, together they are not");
/// ```
#[derive(Debug, Clone)]
pub struct Joint<const D: usize> {
    names: [&'static str; D],
    weight: f64,
    threshold: f64,
    seen: u32,
    mean: [f64; D],
    covariance: [[f64; D]; D],
}

impl<const D: usize> Joint<D> {
    /// A detector for numbers of these names, giving new ones this `weight` (0.001 to 0.5), with a threshold in normal
    /// deviations.
    #[must_use]
    pub fn new(names: [&'static str; D], weight: f64, threshold: f64) -> Self {
        let weight = if weight.is_finite() { weight.clamp(0.001, 0.5) } else { 0.02 };
        let threshold = threshold.max(0.1);
        Self { names, weight, threshold, seen: 0, mean: [0.0; D], covariance: [[0.0; D]; D] }
    }

    /// Scores the numbers, then takes them in. `None` while there were fewer than ten times as many as dimensions, and when
    /// one is missing.
    pub fn update(&mut self, numbers: [Option<f64>; D]) -> Option<Score> {
        let mut taken = [0.0; D];
        for (slot, number) in taken.iter_mut().zip(numbers) {
            *slot = number.filter(|number| number.is_finite())?.clamp(-1e60, 1e60);
        }
        let off: [f64; D] = array::from_fn(|i| at(&taken, i) - at(&self.mean, i));
        let warm = self.seen >= 10 * u32::try_from(D).unwrap_or(u32::MAX);
        let score = if warm { self.score(&off) } else { None };
        // Odd ones teach little, and as if they were just odd: else the first minutes of an attack would make the rest usual.
        let weight = self.weight.max(1.0 / f64::from(self.seen.saturating_add(1)));
        let odd = score.as_ref().filter(|score| score.is_odd());
        let weight = if odd.is_some() { weight * 0.1 } else { weight };
        let scale =
            odd.map_or(1.0, |score| (self.threshold / score.deviation.max(self.threshold)).clamp(0.0, 1.0));
        let off = off.map(|off| off * scale);
        self.seen = self.seen.saturating_add(1);
        for (mean, off) in self.mean.iter_mut().zip(off) {
            *mean += weight * off;
        }
        for (i, row) in self.covariance.iter_mut().enumerate() {
            for (j, value) in row.iter_mut().enumerate() {
                *value = (1.0 - weight) * (*value + weight * at(&off, i) * at(&off, j));
            }
        }
        score
    }

    fn score(&self, off: &[f64; D]) -> Option<Score> {
        // In units of each number's own deviation, so that a ridge means the same for all of them.
        let sigma: [f64; D] = array::from_fn(|i| {
            let variance = self.covariance.get(i).map_or(0.0, |row| at(row, i));
            variance.sqrt().max(at(&self.mean, i).abs() * 0.01).max(1e-9)
        });
        let scaled: [f64; D] = array::from_fn(|i| (at(off, i) / at(&sigma, i)).clamp(-1e6, 1e6));
        let correlation: [[f64; D]; D] = array::from_fn(|i| {
            array::from_fn(|j| {
                let value =
                    self.covariance.get(i).map_or(0.0, |row| at(row, j)) / (at(&sigma, i) * at(&sigma, j));
                if i == j { value.max(1.0) + 0.01 } else { value }
            })
        });
        let squared = squared_length(&correlation, &scaled)?;
        // Wilson and Hilferty: the cube root of a chi-square is nearly normal.
        let d = D as f64;
        let spread = 2.0 / (9.0 * d);
        let deviation = ((squared / d).cbrt() - (1.0 - spread)) / spread.sqrt();
        let most = (0..D).max_by(|a, b| at(&scaled, *a).abs().total_cmp(&at(&scaled, *b).abs()))?;
        let why = Why::Together { deviation, name: self.names.get(most)?, by: at(&scaled, most) };
        Some(Score { score: score_of(deviation, self.threshold), deviation, why })
    }
}

fn at(numbers: &[f64], index: usize) -> f64 {
    numbers.get(index).copied().unwrap_or_default()
}

/// `x' A^-1 x` for a positive definite `A`, by Cholesky: with `A = LL'` it is the squared length of `L^-1 x`.
fn squared_length<const D: usize>(a: &[[f64; D]; D], x: &[f64; D]) -> Option<f64> {
    let mut lower = [[0.0; D]; D];
    let mut solved = [0.0; D];
    for i in 0..D {
        for j in 0..=i {
            let (row_i, row_j) = (lower.get(i)?, lower.get(j)?);
            let dot: f64 = row_i.iter().zip(row_j).take(j).map(|(a, b)| a * b).sum();
            let rest = a.get(i)?.get(j)? - dot;
            let value = if i == j { rest.max(1e-9).sqrt() } else { rest / at(row_j, j) };
            *lower.get_mut(i)?.get_mut(j)? = value;
        }
        let row = lower.get(i)?;
        let dot: f64 = row.iter().zip(&solved).take(i).map(|(a, b)| a * b).sum();
        *solved.get_mut(i)? = (x.get(i)? - dot) / at(row, i);
    }
    let squared: f64 = solved.iter().map(|value| value * value).sum();
    squared.is_finite().then_some(squared)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_length_is_right_for_a_matrix_worked_out_by_hand() {
        // The inverse of [[4, 2], [2, 3]] is [[3, -2], [-2, 4]] / 8; for (1, 2): (3 - 8 + 16) / 8.
        let squared = squared_length(&[[4.0, 2.0], [2.0, 3.0]], &[1.0, 2.0]).unwrap();
        assert!((squared - 11.0 / 8.0).abs() < 1e-12, "{squared}");
    }

    #[test]
    fn the_reason_names_the_number() {
        let mut detector = Joint::new(["cpu", "io", "net"], 0.02, 4.0);
        for step in 0..300_u32 {
            let numbers = [step % 10, step * 3 % 7, step * 5 % 11].map(|number| Some(f64::from(number)));
            detector.update(numbers);
        }
        let score = detector.update([Some(5.0), Some(90.0), Some(5.0)]).unwrap();
        assert!(score.is_odd() && score.why.to_string().contains("io"), "{score:?}");
        assert!(detector.update([Some(5.0), None, Some(5.0)]).is_none());
    }

    proptest! {
        #[test]
        fn any_numbers_give_bounded_scores(
            numbers in proptest::collection::vec(proptest::array::uniform3(proptest::option::weighted(0.9, any::<f64>())), 0..120),
        ) {
            let mut detector = Joint::new(["a", "b", "c"], 0.1, 4.0);
            for three in numbers {
                if let Some(score) = detector.update(three) {
                    prop_assert!((0.0..=1.0).contains(&score.score), "{score:?}");
                }
            }
        }
    }
}
