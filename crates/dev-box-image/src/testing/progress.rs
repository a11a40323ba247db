//! A progress that remembers.

use std::sync::{Mutex, PoisonError};

use crate::progress::{Progress, Step};

/// Remembers the steps and details it was told.
#[derive(Debug, Default)]
pub struct RecordingProgress {
    told: Mutex<(Vec<Step>, Vec<String>)>,
}

impl RecordingProgress {
    /// The steps so far, in order.
    #[must_use]
    pub fn steps(&self) -> Vec<Step> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// The details so far.
    #[must_use]
    pub fn details(&self) -> Vec<String> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).1.clone()
    }
}

impl Progress for RecordingProgress {
    fn step(&self, step: Step) {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).0.push(step);
    }

    fn detail(&self, text: &str) {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).1.push(text.to_owned());
    }
}
