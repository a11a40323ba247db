//! Taking samples: warm up, find out how often to repeat, measure.

use std::time::{Duration, Instant};

use crate::figure::{Figure, Unit};

/// How many samples a micro-benchmark takes.
const SAMPLES: usize = 200;
/// How long one sample lasts at least, so that the clock's own cost does not count.
const SAMPLE: Duration = Duration::from_micros(500);
/// How long the operation runs before it is measured.
const WARM_UP: Duration = Duration::from_millis(100);

/// The time of one call in nanoseconds, as a distribution over samples of many calls each.
pub(crate) fn nanoseconds(name: &str, operation: impl FnMut()) -> Figure {
    Figure::of(name, Unit::Nanoseconds, samples(operation))
}

/// The throughput of an operation on `bytes` bytes a call.
pub(crate) fn throughput(name: &str, bytes: usize, operation: impl FnMut()) -> Figure {
    let mebibytes = f64::from(u32::try_from(bytes).unwrap_or(u32::MAX)) / f64::from(1 << 20);
    let rates = samples(operation).into_iter().map(|nanos| mebibytes / (nanos / 1e9)).collect();
    Figure::of(name, Unit::MebibytesPerSecond, rates)
}

fn samples(mut operation: impl FnMut()) -> Vec<f64> {
    let began = Instant::now();
    let mut calls = 0_u32;
    while began.elapsed() < WARM_UP {
        operation();
        calls += 1;
    }
    let one = began.elapsed().as_secs_f64() / f64::from(calls.max(1));
    let repeat = repeats(one);
    (0..SAMPLES)
        .map(|_| {
            let began = Instant::now();
            for _ in 0..repeat {
                operation();
            }
            began.elapsed().as_secs_f64() * 1e9 / f64::from(repeat)
        })
        .collect()
}

/// How often an operation of `one` second(s) is repeated to fill a sample.
fn repeats(one: f64) -> u32 {
    let mut repeat = 1_u32;
    while repeat < 1 << 24 && one * f64::from(repeat) < SAMPLE.as_secs_f64() {
        repeat *= 2;
    }
    repeat
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_short_is_repeated_until_it_fills_a_sample() {
        assert_eq!(repeats(1.0), 1);
        assert!(repeats(1e-6) >= 500);
        assert_eq!(repeats(0.0), 1 << 24);
    }
}
