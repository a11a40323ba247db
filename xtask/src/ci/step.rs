//! One step of the gate, and what it may use while it runs.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use crate::coverage::CoverageError;
use crate::fuzz::FuzzError;
use crate::layers::LayersError;
use crate::process::{self, Deadline, ProcessError};
use crate::tidy::TidyError;
use crate::workspace::Workspace;

/// A program may run this many times its step's budget before it is ended: long enough to see where time goes, short
/// enough that nothing hangs for ever.
const PATIENCE: u32 = 2;
/// How often a step that runs without a terminal says that it is still running.
const HEARTBEAT: Duration = Duration::from_secs(60);

/// A step: its name, what it is for, what it may take, and what it does.
#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) name: &'static str,
    pub(crate) about: &'static str,
    pub(crate) budget: Duration,
    pub(crate) run: fn(&mut Scope<'_>) -> Result<Outcome, StepError>,
}

/// How a step ended that did not fail.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// It did all that it is for.
    Passed,
    /// It could not run here, for this reason.
    Skipped(String),
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StepError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Layers(#[from] LayersError),
    #[error(transparent)]
    Tidy(#[from] TidyError),
    #[error(transparent)]
    Coverage(#[from] CoverageError),
    #[error(transparent)]
    Fuzz(#[from] FuzzError),
    #[error("cannot use {path}")]
    File {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{}", .0.join("\n"))]
    Several(Vec<String>),
}

/// What the whole run was asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    /// Also what takes long.
    pub(crate) full: bool,
    /// Programs print on the terminal instead of into the step's log.
    pub(crate) verbose: bool,
    /// How long each fuzz target runs.
    pub(crate) fuzz: Duration,
}

/// What a running step uses: the workspace, its log, its time.
#[derive(Debug)]
pub(crate) struct Scope<'a> {
    pub(crate) workspace: &'a Workspace,
    pub(crate) options: Options,
    log: PathBuf,
    deadline: Deadline,
    budget: Duration,
    progress: &'a ProgressBar,
    name: &'static str,
    last_heartbeat: Instant,
    failures: Vec<String>,
    notes: Vec<String>,
}

impl<'a> Scope<'a> {
    pub(super) fn new(
        workspace: &'a Workspace,
        options: Options,
        step: &Step,
        budget: Duration,
        progress: &'a ProgressBar,
    ) -> Self {
        let began = Instant::now();
        Self {
            workspace,
            options,
            log: workspace.reports().join(format!("{}.log", step.name)),
            deadline: Deadline { began, limit: budget * PATIENCE },
            budget,
            progress,
            name: step.name,
            last_heartbeat: began,
            failures: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// Runs the program; a failure ends the step.
    pub(crate) fn run(&mut self, command: &mut Command) -> Result<(), ProcessError> {
        let log = (!self.options.verbose).then(|| self.log.clone());
        if log.is_some() {
            command.env("CARGO_TERM_COLOR", "never").env("CARGO_TERM_PROGRESS_WHEN", "never");
        }
        let (deadline, budget, name, progress) = (self.deadline, self.budget, self.name, self.progress);
        let last = &mut self.last_heartbeat;
        process::run_logged(command, log.as_deref(), deadline, &mut || {
            progress.tick();
            if progress.is_hidden() && last.elapsed() >= HEARTBEAT {
                *last = Instant::now();
                let (took, budget) =
                    (crate::report::duration(deadline.began.elapsed()), crate::report::duration(budget));
                println!("          {name} is running: {took} of {budget}");
            }
        })
    }

    /// Runs the program; a failure is kept for [`Scope::finish`], so that what comes after it runs too.
    pub(crate) fn attempt(&mut self, command: &mut Command) {
        if let Err(error) = self.run(command) {
            self.fail(crate::report::chain(&error));
        }
    }

    /// Keeps a failure for [`Scope::finish`].
    pub(crate) fn fail(&mut self, what: String) {
        self.failures.push(what);
    }

    /// Says something under the step's line.
    pub(crate) fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// The outcome, once everything was attempted.
    pub(crate) fn finish(&mut self) -> Result<Outcome, StepError> {
        let failures = std::mem::take(&mut self.failures);
        if failures.is_empty() { Ok(Outcome::Passed) } else { Err(StepError::Several(failures)) }
    }

    /// What the step's programs printed so far.
    pub(crate) fn printed(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    pub(crate) fn log(&self) -> &Path {
        &self.log
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.deadline.began.elapsed()
    }

    pub(super) fn notes(&self) -> &[String] {
        &self.notes
    }
}
