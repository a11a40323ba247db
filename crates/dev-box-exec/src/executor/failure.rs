//! Why a job did not simply exit.

use std::error::Error;
use std::fmt::Write as _;
use std::io;
use std::time::Duration;

use dev_box_comm::message::{GuestError, GuestErrorKind, GuestText};
use dev_box_comm::session::{CallError, CloseReason, StreamError};
use dev_box_observe::AuditError;

use crate::outcome::{Outcome, Phase};
use crate::provisioner::ProvisionError;
use crate::sink::OutputStream;
use crate::terminal;
use crate::workspace::{CollectError, StageError};

/// What went wrong in a phase.
#[derive(Debug, thiserror::Error)]
pub(super) enum Cause {
    #[error("cancelled")]
    Cancelled,
    #[error("the VM was lost: {}", .0.fate())]
    Lost(CloseReason),
    /// The word of a daemon between. A guest that says it of itself loses its VM as well.
    #[error("the VM was lost: {0}")]
    Gone(GuestText),
    #[error("the guest broke the protocol: {0}")]
    Violation(&'static str),
    #[error("no VM could be had")]
    Provision(#[source] ProvisionError),
    #[error("the workspace could not be brought in")]
    Stage(#[source] StageError),
    #[error("the results could not be brought back")]
    Collect(#[source] CollectError),
    #[error("{what}")]
    Guest {
        what: &'static str,
        #[source]
        source: GuestError,
    },
    #[error("the guest did not answer within {} s", .0.as_secs())]
    Silent(Duration),
    #[error("the request cannot be sent")]
    Request(#[source] StreamError),
    #[error("writing the job's {stream} failed")]
    Sink {
        stream: OutputStream,
        #[source]
        source: io::Error,
    },
    #[error("this VM has no share for a workspace: copy files with the channel instead")]
    NoShare,
    #[error("the act could not be audited, so it was not done")]
    Audit(#[source] AuditError),
    #[error("a worker thread failed")]
    Worker(#[source] tokio::task::JoinError),
}

impl From<StreamError> for Cause {
    fn from(error: StreamError) -> Self {
        match error {
            StreamError::Closed(reason) => Self::Lost(reason),
            StreamError::Reset => Self::Violation("it reset the stream of a request"),
            StreamError::Ended => Self::Violation("it ended a request's stream early"),
            error => Self::Request(error),
        }
    }
}

impl Cause {
    pub(super) fn call(what: &'static str) -> impl FnOnce(CallError) -> Self {
        move |error| match error {
            CallError::Guest(source) => Self::guest(what, source),
            CallError::Stream(error) => error.into(),
            _ => Self::Violation("it answered a request with something else"),
        }
    }

    pub(super) fn guest(what: &'static str, source: GuestError) -> Self {
        match source.kind {
            GuestErrorKind::VmLost => Self::Gone(source.text),
            _ => Self::Guest { what, source },
        }
    }

    /// The terminal state this makes.
    pub(super) fn outcome(&self, phase: Phase) -> Outcome {
        match self {
            Self::Cancelled => Outcome::Cancelled,
            Self::Lost(_) | Self::Gone(_) | Self::Violation(_) => Outcome::GuestLost,
            _ => Outcome::Failed { phase },
        }
    }

    /// A command that could not be run has a shell's exit code.
    pub(super) fn exit_code(&self) -> Option<i32> {
        match self {
            Self::Guest { source, .. } if source.kind == GuestErrorKind::NotFound => Some(127),
            Self::Guest { source, .. }
                if matches!(source.kind, GuestErrorKind::PermissionDenied | GuestErrorKind::IsADirectory) =>
            {
                Some(126)
            }
            _ => None,
        }
    }

    /// The phase, the error and its causes, on one line that is safe to print.
    pub(super) fn describe(&self, phase: Phase) -> String {
        format!("{phase}: {}", chain(self))
    }
}

/// An error and its causes, on lines that are safe to print.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let _ = write!(text, ": {cause}");
        source = cause.source();
    }
    terminal::neutralise(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(kind: GuestErrorKind) -> Cause {
        Cause::Guest { what: "it did not start", source: GuestError::new(kind, "x\x1b[31m") }
    }

    #[test]
    fn every_cause_has_its_state() {
        let failed = Outcome::Failed { phase: Phase::Inject };
        for (cause, outcome) in [
            (Cause::Cancelled, Outcome::Cancelled),
            (Cause::Lost(CloseReason::Eof), Outcome::GuestLost),
            (Cause::from(StreamError::Closed(CloseReason::Eof)), Outcome::GuestLost),
            (Cause::from(StreamError::Reset), Outcome::GuestLost),
            (Cause::from(StreamError::Ended), Outcome::GuestLost),
            (Cause::call("x")(CallError::TooMuch), Outcome::GuestLost),
            (Cause::call("x")(CallError::Stream(StreamError::Reset)), Outcome::GuestLost),
            (Cause::call("x")(CallError::Guest(GuestError::new(GuestErrorKind::Busy, ""))), failed),
            (Cause::guest("x", GuestError::lost(&CloseReason::Eof)), Outcome::GuestLost),
            (Cause::Silent(Duration::from_secs(3)), failed),
            (guest(GuestErrorKind::Other), failed),
        ] {
            assert_eq!(cause.outcome(Phase::Inject), outcome, "{cause:?}");
        }
    }

    #[test]
    fn commands_that_cannot_be_run() {
        assert_eq!(guest(GuestErrorKind::NotFound).exit_code(), Some(127));
        assert_eq!(guest(GuestErrorKind::PermissionDenied).exit_code(), Some(126));
        for other in [GuestErrorKind::NoSpace, GuestErrorKind::UnknownUser, GuestErrorKind::WorkingDirectory]
        {
            assert_eq!(guest(other).exit_code(), None, "{other:?}");
        }
        assert_eq!(Cause::Cancelled.exit_code(), None);
    }

    #[test]
    fn descriptions_name_the_phase_and_are_harmless() {
        let text = guest(GuestErrorKind::NotFound).describe(Phase::Start);
        assert!(text.starts_with("start: it did not start: ") && !text.contains('\x1b'), "{text}");
        assert!(Cause::Silent(Duration::from_secs(3)).describe(Phase::Run).contains("within 3 s"));
    }
}
