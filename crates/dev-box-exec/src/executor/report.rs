//! A result in the making.

use std::time::Duration;

use dev_box_comm::message;
use dev_box_core::clock::{Clock, EasternTime};
use dev_box_core::id::JobId;
use tokio::time::Instant;

use super::failure::Cause;
use super::files::Results;
use super::process::{End, Why};
use crate::outcome::{Captured, ExecutionResult, Outcome, Phase, RanIn, Timings, Usage, is_in_order};
use crate::provisioner::ReadyVm;

/// What is known so far. Phases are entered in order; the time of each ends where the next begins.
pub(super) struct Report {
    job: JobId,
    vm: Option<RanIn>,
    started_at: EasternTime,
    phase: Phase,
    since: Instant,
    timings: Timings,
    outcome: Option<Outcome>,
    error: Option<String>,
    exit_code: Option<i32>,
    signal: Option<i32>,
    stdout: Captured,
    stderr: Captured,
    usage: Option<Usage>,
    results: Results,
    pub(super) warnings: Vec<String>,
}

impl Report {
    pub(super) fn begin(clock: &dyn Clock, job: JobId) -> Self {
        Self {
            job,
            vm: None,
            started_at: clock.now(),
            phase: Phase::Acquire,
            since: Instant::now(),
            timings: Timings::default(),
            outcome: None,
            error: None,
            exit_code: None,
            signal: None,
            stdout: Captured::default(),
            stderr: Captured::default(),
            usage: None,
            results: Results::default(),
            warnings: Vec::new(),
        }
    }

    pub(super) fn job(&self) -> JobId {
        self.job
    }

    pub(super) fn enter(&mut self, phase: Phase) {
        let now = Instant::now();
        *self.timings.of_mut(self.phase) += now - self.since;
        (self.phase, self.since) = (phase, now);
    }

    /// Time in this phase so far.
    pub(super) fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }

    /// Takes the end of the process; gives the state the job is in by that.
    pub(super) fn ended(&mut self, end: End) -> Outcome {
        let End { why, exited, stdout, stderr } = end;
        (self.stdout, self.stderr) = (stdout, stderr);
        if let Some(exited) = &exited {
            match exited.status {
                message::ExitStatus::Code(code) => self.exit_code = Some(code),
                message::ExitStatus::Signal(signal) => self.signal = Some(signal),
            }
            self.usage = Some(Usage {
                user_us: exited.usage.user_us,
                system_us: exited.usage.system_us,
                max_rss_kib: exited.usage.max_rss_bytes / 1024,
            });
            self.warnings.extend(exited.limit().map(str::to_owned));
        }
        let outcome = why.as_ref().map_or(Outcome::Exited, Why::outcome);
        if let Some(Why::Failed(cause)) = &why {
            self.error = Some(cause.describe(Phase::Run));
        } else if exited.is_none() && outcome != Outcome::Cancelled {
            self.warnings.push("the guest did not report the end of a job that was killed".to_owned());
        }
        self.outcome = Some(outcome);
        outcome
    }

    pub(super) fn results(&mut self, results: Results) {
        self.results = results;
    }

    /// See [`ExecutionResult::is_in_order`].
    pub(super) fn is_in_order(&self) -> bool {
        is_in_order(self.outcome, self.exit_code, self.signal)
    }

    pub(super) fn runs_in(&mut self, vm: &ReadyVm) {
        self.vm = Some(RanIn { name: vm.name.clone(), made: vm.facts.made() });
    }

    /// Takes a failure of the phase it is in. The first terminal state stays, but for a job that had exited.
    pub(super) fn fail(&mut self, cause: &Cause) {
        let failed = cause.outcome(self.phase);
        match self.outcome {
            None => {
                self.outcome = Some(failed);
                if self.phase == Phase::Start {
                    self.exit_code = cause.exit_code();
                }
            }
            Some(Outcome::Exited) => self.outcome = Some(failed),
            Some(_) => {
                self.warnings.push(cause.describe(self.phase));
                return;
            }
        }
        if failed != Outcome::Cancelled {
            self.error = Some(cause.describe(self.phase));
        }
    }

    pub(super) fn finish(mut self, clock: &dyn Clock) -> ExecutionResult {
        self.enter(Phase::Reset);
        let outcome = self.outcome.unwrap_or(Outcome::Failed { phase: self.phase });
        ExecutionResult {
            job: self.job,
            vm: self.vm,
            success: outcome == Outcome::Exited && self.exit_code == Some(0),
            outcome,
            exit_code: self.exit_code,
            signal: self.signal,
            error: self.error,
            truncated: self.stdout.truncated || self.stderr.truncated,
            stdout: self.stdout,
            stderr: self.stderr,
            output: self.results.output,
            output_error: self.results.output_error,
            files: self.results.files,
            warnings: self.warnings,
            timings: self.timings,
            usage: self.usage,
            started_at: self.started_at,
            finished_at: clock.now(),
        }
    }
}
