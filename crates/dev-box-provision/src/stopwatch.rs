//! How long each step of making a VM took.

use std::time::{Duration, Instant};

/// Collects named steps in order.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    last: Instant,
    steps: Vec<(String, Duration)>,
}

impl Stopwatch {
    pub(crate) fn start() -> Self {
        Self { last: Instant::now(), steps: Vec::new() }
    }

    /// The time since the last step was this one's.
    pub(crate) fn step(&mut self, name: &str) {
        let now = Instant::now();
        self.steps.push((name.to_owned(), now - self.last));
        self.last = now;
    }

    /// The time since the last step was told elsewhere.
    pub(crate) fn skip(&mut self) {
        self.last = Instant::now();
    }

    pub(crate) fn steps(self) -> Vec<(String, Duration)> {
        self.steps
    }
}
