//! The progress of a build: a moving line for a person, a line a step for a log.

use std::time::Instant;

use dev_box::image::{Progress, Step};
use indicatif::{ProgressBar, ProgressStyle};

use crate::output;

/// Shown on stderr.
#[derive(Debug)]
pub(crate) struct BuildProgress {
    bar: Option<ProgressBar>,
    started: Instant,
}

impl BuildProgress {
    pub(crate) fn new() -> Self {
        let bar = output::watched().then(|| {
            let bar = ProgressBar::new(Step::ALL.len() as u64);
            // A template that does not parse would only cost the looks.
            if let Ok(style) =
                ProgressStyle::with_template("{spinner} [{elapsed}] {pos}/{len} {msg:.bold} {prefix:.dim}")
            {
                bar.set_style(style);
            }
            bar.enable_steady_tick(std::time::Duration::from_millis(120));
            bar
        });
        Self { bar, started: Instant::now() }
    }

    pub(crate) fn done(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Progress for BuildProgress {
    fn step(&self, step: Step) {
        match &self.bar {
            Some(bar) => {
                bar.set_position(step.number() as u64);
                bar.set_message(step.to_string());
                bar.set_prefix("");
            }
            None => {
                let seconds = self.started.elapsed().as_secs();
                output::note(format_args!("[{seconds:>3} s] {}/{} {step}", step.number(), Step::ALL.len()));
            }
        }
    }

    fn detail(&self, text: &str) {
        if let Some(bar) = &self.bar {
            // A package's own words: one line, and nothing a terminal would obey.
            bar.set_prefix(text.chars().filter(|c| !c.is_control()).take(60).collect::<String>());
        }
    }
}
