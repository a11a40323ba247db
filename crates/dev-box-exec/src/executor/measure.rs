//! The executor's numbers, and what it tells the audit of a guest that broke the rules.

use std::time::Duration;

use dev_box_comm::Relayed;
use dev_box_comm::message::{ExitStatus, Message};
use dev_box_comm::session::CloseReason;
use dev_box_observe::audit::ExitStatus as AuditExit;
use dev_box_observe::metrics::{
    ERRORS, EXEC_OUTPUT_BYTES, EXEC_SECONDS, EXECS, GUEST_VIOLATIONS, OTHER, WORKSPACE_BYTES, WORKSPACE_FILES,
};
use dev_box_observe::{AuditEvent, AuditSink as _, Entry};

use super::audit::Who;
use super::failure::Cause;
use super::process::{End, Why};

/// A command that was not started.
pub(super) fn refused() {
    EXECS.add(1, &["refused"]);
}

/// A job that failed, by where it did. That a VM could not be had was counted where it was to be made; that the caller
/// wanted no more is no error.
pub(super) fn failed(cause: &Cause) {
    let layer = match cause {
        Cause::Cancelled | Cause::Provision(_) => return,
        Cause::Lost(_) | Cause::Gone(_) => "channel",
        Cause::Violation(_) | Cause::Guest { .. } | Cause::Silent(_) => "guest",
        Cause::Stage(_) | Cause::Collect(_) | Cause::NoShare => "workspace",
        Cause::Audit(_) => "audit",
        Cause::Request(_) | Cause::Sink { .. } | Cause::Worker(_) => OTHER,
    };
    ERRORS.add(1, &[layer]);
}

/// A command that ended.
pub(super) fn ended(end: &End, took: Duration) {
    let outcome = match (&end.why, end.exited.as_ref()) {
        (Some(Why::TimedOut), _) => "timeout",
        (Some(Why::Cancelled), _) => "cancelled",
        (_, Some(exited)) => by_itself(exited.status),
        (_, None) => "lost",
    };
    count(outcome, took, end.stdout.total, end.stderr.total);
}

/// A command of a client of ours, whose output went through our hands.
pub(crate) fn relayed(relayed: &Relayed, took: Duration) {
    let outcome = match &relayed.last {
        Some(Message::Exited(exited)) if exited.timed_out => "timeout",
        Some(Message::Exited(exited)) => by_itself(exited.status),
        Some(Message::Failed(_)) => return refused(),
        _ if relayed.abandoned => "cancelled",
        _ => "lost",
    };
    count(outcome, took, relayed.output, relayed.errors);
}

/// A command that went on without its client: its output went through nobody's hands.
pub(crate) fn left(exit: &AuditExit, took: Duration) {
    let outcome = match exit {
        AuditExit::Code(0) => "ok",
        AuditExit::Code(_) => "nonzero",
        AuditExit::Signal(_) => "signal",
        AuditExit::TimedOut => "timeout",
        AuditExit::Cancelled => "cancelled",
        AuditExit::Lost => "lost",
    };
    count(outcome, took, 0, 0);
}

fn by_itself(status: ExitStatus) -> &'static str {
    match status {
        ExitStatus::Code(0) => "ok",
        ExitStatus::Code(_) => "nonzero",
        ExitStatus::Signal(_) => "signal",
    }
}

fn count(outcome: &'static str, took: Duration, stdout: u64, stderr: u64) {
    EXECS.add(1, &[outcome]);
    EXEC_SECONDS.record(took, &[outcome]);
    EXEC_OUTPUT_BYTES.add(stdout, &["stdout"]);
    EXEC_OUTPUT_BYTES.add(stderr, &["stderr"]);
}

/// Files that went into a VM.
pub(super) fn brought_in(files: u64, bytes: u64) {
    WORKSPACE_FILES.add(files, &["in"]);
    WORKSPACE_BYTES.add(bytes, &["in"]);
}

/// Files that came out of a VM.
pub(super) fn brought_out(files: u64, bytes: u64, refused: u64) {
    WORKSPACE_FILES.add(files, &["out"]);
    WORKSPACE_FILES.add(refused, &["refused"]);
    WORKSPACE_BYTES.add(bytes, &["out"]);
}

/// Counts and audits a breach of the protocol, if that is what it was: the VM is not to be used again.
pub(super) fn violation(cause: &Cause, who: &Who<'_>) {
    let what = match cause {
        Cause::Violation(what) => (*what).into(),
        Cause::Lost(CloseReason::Violation(violation)) => violation.to_string().into(),
        Cause::Lost(CloseReason::Deadline(deadline)) => deadline.to_string().into(),
        _ => return,
    };
    GUEST_VIOLATIONS.add(1, &[]);
    who.sink.note(who.entry(Entry::fact(AuditEvent::GuestViolation { what })));
}
