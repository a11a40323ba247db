//! What came of a job: one terminal state, whatever happened.
//!
//! ```text
//!   acquire -> inject -> start -> run ---------> collect -> reset
//!      |         |         |       |-- Exited ------^
//!      |         |         |       |-- TimedOut ----^
//!      |         |         |       |-- Cancelled ---^ (into a directory only)
//!      |         |         |       '-- GuestLost ---^ (into a directory only)
//!      '---------'---------'-- Failed{phase} (the first failure; of `collect` too)
//! ```

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use dev_box_core::clock::EasternTime;
use dev_box_core::id::{JobId, VmName};
use serde::{Serialize, Serializer};

use crate::provisioner::Made;
use crate::workspace::Collected;

/// A step of a job's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Getting a VM whose agent answers.
    Acquire,
    /// Staging the workspace and mounting it.
    Inject,
    /// Asking the agent to start the process, until it says so.
    Start,
    /// The process runs.
    Run,
    /// Unmounting, and bringing back what changed.
    Collect,
    /// Retiring the VM or making it clean.
    Reset,
}

impl fmt::Display for Phase {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Acquire => "acquire",
            Self::Inject => "inject",
            Self::Start => "start",
            Self::Run => "run",
            Self::Collect => "collect",
            Self::Reset => "reset",
        })
    }
}

/// The terminal state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum Outcome {
    /// The job ended by itself: by a code or by a signal nobody here sent.
    Exited,
    /// Its time was up.
    TimedOut,
    /// The caller cancelled it.
    Cancelled,
    /// The VM or the channel died under it, or the guest broke the protocol. Never use that VM again.
    GuestLost,
    /// dev-box failed, in this phase.
    Failed {
        /// Where.
        phase: Phase,
    },
}

/// The beginning of an output stream, as much as [`OutputCaps::kept`](crate::OutputCaps) allows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Captured {
    /// The first bytes.
    pub bytes: Bytes,
    /// How many bytes the guest sent; at most the limit of streaming has been passed on.
    pub total: u64,
    /// Whether some of the stream was not passed to the sink: a limit, or the stream did not come to its end.
    pub truncated: bool,
}

impl Captured {
    /// As text, with what is not UTF-8 replaced. Hostile to a terminal: see [`terminal`](crate::terminal).
    #[must_use]
    pub fn text(&self) -> Cow<'_, str> {
        String::from_utf8_lossy(&self.bytes)
    }

    /// Whether bytes lacks some of the stream.
    #[must_use]
    pub fn is_partial(&self) -> bool {
        self.truncated || self.total > self.bytes.len() as u64
    }
}

impl Serialize for Captured {
    /// As text (what is not UTF-8 replaced), for the JSON form of a result.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.text())
    }
}

/// Time spent in each phase, on the monotonic clock; a phase that was not reached is zero. JSON: milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Timings {
    /// See [`Phase::Acquire`].
    #[serde(rename = "acquire_ms", serialize_with = "millis")]
    pub acquire: Duration,
    /// See [`Phase::Inject`].
    #[serde(rename = "inject_ms", serialize_with = "millis")]
    pub inject: Duration,
    /// See [`Phase::Start`].
    #[serde(rename = "start_ms", serialize_with = "millis")]
    pub start: Duration,
    /// See [`Phase::Run`].
    #[serde(rename = "run_ms", serialize_with = "millis")]
    pub run: Duration,
    /// See [`Phase::Collect`].
    #[serde(rename = "collect_ms", serialize_with = "millis")]
    pub collect: Duration,
    /// See [`Phase::Reset`].
    #[serde(rename = "reset_ms", serialize_with = "millis")]
    pub reset: Duration,
}

impl Timings {
    /// The field of a phase.
    pub fn of_mut(&mut self, phase: Phase) -> &mut Duration {
        match phase {
            Phase::Acquire => &mut self.acquire,
            Phase::Inject => &mut self.inject,
            Phase::Start => &mut self.start,
            Phase::Run => &mut self.run,
            Phase::Collect => &mut self.collect,
            Phase::Reset => &mut self.reset,
        }
    }

    /// All of them together.
    #[must_use]
    pub fn total(&self) -> Duration {
        self.acquire + self.inject + self.start + self.run + self.collect + self.reset
    }
}

fn millis<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64((duration.as_secs_f64() * 1e6).round() / 1e3)
}

/// What the process used, as the guest claims.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// CPU time in user mode, microseconds.
    pub user_us: u64,
    /// CPU time in the kernel, microseconds.
    pub system_us: u64,
    /// Peak memory, KiB.
    pub max_rss_kib: u64,
}

/// The VM that a job ran in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RanIn {
    /// Its domain.
    pub name: VmName,
    /// How it came to be.
    pub made: Made,
}

/// What came of a job.
#[derive(Debug, Clone, Serialize)]
pub struct ExecutionResult {
    /// The job.
    pub job: JobId,
    /// The VM, once there was one.
    pub vm: Option<RanIn>,
    /// Whether the job ended by itself with code 0 and everything of dev-box's worked.
    pub success: bool,
    /// The terminal state.
    pub outcome: Outcome,
    /// The process's exit code, when it ended with one; 126 or 127 when the command could not be run.
    pub exit_code: Option<i32>,
    /// The signal that ended the process.
    pub signal: Option<i32>,
    /// What failed, in words, with the phase and the causes: for `Failed` and `GuestLost`. Harmless to a terminal.
    pub error: Option<String>,
    /// Standard output.
    pub stdout: Captured,
    /// Standard error.
    pub stderr: Captured,
    /// Whether either stream lost anything to a limit.
    pub truncated: bool,
    /// The job's result file (by default `result.json` of the workspace), parsed, when it wrote one.
    pub output: Option<serde_json::Value>,
    /// Why the result file could not be used, when it could not.
    pub output_error: Option<String>,
    /// What changed in the workspace, and what was not taken; `None` when nothing was to be collected.
    pub files: Option<Collected>,
    /// What went wrong without making a difference to the job: the VM could not be taken down completely, files of the
    /// workspace that cannot be copied were left out. Bounded; may hold names the guest chose, made harmless.
    pub warnings: Vec<String>,
    /// Time per phase.
    pub timings: Timings,
    /// What the process used; guest-claimed.
    pub usage: Option<Usage>,
    /// When the job was taken on, US Eastern.
    pub started_at: EasternTime,
    /// When everything was done, US Eastern.
    pub finished_at: EasternTime,
}

impl ExecutionResult {
    /// The exit code of `dev-box run`: the job's own when it ran; 124 timed out; 125 dev-box failed; 126/127 as a
    /// shell; 128+n killed by signal n; 130 cancelled.
    #[must_use]
    pub fn process_exit_code(&self) -> u8 {
        exit_code(self.outcome, self.exit_code, self.signal)
    }

    /// Whether the job exited, and everything that belongs to it went as it should: its VM may be used again.
    #[must_use]
    pub fn is_in_order(&self) -> bool {
        is_in_order(Some(self.outcome), self.exit_code, self.signal)
    }
}

/// The rule behind [`ExecutionResult::is_in_order`].
pub(crate) fn is_in_order(outcome: Option<Outcome>, code: Option<i32>, signal: Option<i32>) -> bool {
    outcome == Some(Outcome::Exited) && (code.is_some() || signal.is_some())
}

/// The mapping behind [`ExecutionResult::process_exit_code`].
#[must_use]
pub fn exit_code(outcome: Outcome, code: Option<i32>, signal: Option<i32>) -> u8 {
    const TIMED_OUT: u8 = 124;
    const FAILED: u8 = 125;
    const CANCELLED: u8 = 130;
    match outcome {
        Outcome::TimedOut => TIMED_OUT,
        Outcome::Cancelled => CANCELLED,
        Outcome::GuestLost => FAILED,
        // Only a command that could not be run has a code here.
        Outcome::Failed { phase: Phase::Start } => match code {
            Some(126) => 126,
            Some(127) => 127,
            _ => FAILED,
        },
        Outcome::Failed { .. } => FAILED,
        Outcome::Exited => match (code, signal) {
            // A wait status has eight bits; what a guest claims beyond them cannot be true.
            (Some(code), _) => u8::try_from(code).unwrap_or(FAILED),
            (None, Some(signal)) => {
                signal.checked_add(128).and_then(|code| u8::try_from(code).ok()).unwrap_or(FAILED)
            }
            (None, None) => FAILED,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes() {
        let failed = |phase| Outcome::Failed { phase };
        let table = [
            (Outcome::Exited, Some(0), None, 0),
            (Outcome::Exited, Some(7), None, 7),
            (Outcome::Exited, Some(255), None, 255),
            (Outcome::Exited, Some(256), None, 125),
            (Outcome::Exited, Some(-1), None, 125),
            (Outcome::Exited, None, Some(9), 137),
            (Outcome::Exited, None, Some(15), 143),
            (Outcome::Exited, None, Some(i32::MAX), 125),
            (Outcome::Exited, None, Some(-3), 125),
            (Outcome::Exited, None, None, 125),
            (Outcome::TimedOut, None, Some(9), 124),
            (Outcome::TimedOut, Some(0), None, 124),
            (Outcome::Cancelled, None, Some(15), 130),
            (Outcome::GuestLost, None, None, 125),
            (failed(Phase::Start), Some(127), None, 127),
            (failed(Phase::Start), Some(126), None, 126),
            (failed(Phase::Start), None, None, 125),
            (failed(Phase::Collect), Some(0), None, 125),
        ];
        for (outcome, code, signal, expected) in table {
            // A signal of -3 makes 125 by arithmetic, too: what matters is that nothing wraps.
            assert_eq!(exit_code(outcome, code, signal), expected, "{outcome:?} {code:?} {signal:?}");
        }
    }

    #[test]
    fn timings_are_written_in_milliseconds() {
        let mut timings = Timings::default();
        let phases = [Phase::Acquire, Phase::Inject, Phase::Start, Phase::Run, Phase::Collect, Phase::Reset];
        for (at, phase) in phases.into_iter().enumerate() {
            *timings.of_mut(phase) = Duration::from_micros(1500 * (at as u64 + 1));
        }
        assert_eq!(timings.total(), Duration::from_micros(1500 * 21));
        let json = serde_json::to_value(timings).unwrap();
        for (at, phase) in phases.into_iter().enumerate() {
            assert_eq!(json[format!("{phase}_ms")], 1.5 * (at as f64 + 1.0));
        }
    }

    #[test]
    fn captured_output_knows_when_it_is_partial() {
        let all = Captured { bytes: "ab\u{fffd}".into(), total: 5, truncated: false };
        assert!(!all.is_partial());
        assert!(Captured { total: 6, ..all.clone() }.is_partial());
        assert!(Captured { truncated: true, ..all.clone() }.is_partial());
        assert_eq!(serde_json::to_value(&all).unwrap(), "ab\u{fffd}");
    }
}
