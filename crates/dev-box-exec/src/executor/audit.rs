//! What the executor writes to the audit: intents before, results after.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dev_box_comm::message;
use dev_box_core::id::{JobId, VmName};
use dev_box_observe::audit::{Argv, EnvNames, ExitStatus, Text};
use dev_box_observe::{Act, Actor, AuditEvent, AuditSink, Entry, Outcome};

use super::failure::Cause;
use super::process::{End, Why};
use crate::job::Job;

/// Who acts, on what, and where that is written down.
pub(super) struct Who<'a> {
    pub(super) sink: &'a Arc<dyn AuditSink>,
    pub(super) actor: &'a Actor,
    pub(super) vm: &'a VmName,
    pub(super) job: JobId,
}

impl Who<'_> {
    pub(super) fn entry(&self, entry: Entry) -> Entry {
        entry.by(self.actor.clone()).vm(self.vm).job(self.job)
    }

    /// The intent to run the job's command.
    pub(super) async fn begin(&self, job: &Job, cwd: Option<&Path>) -> Result<Act, Cause> {
        let event = AuditEvent::Exec {
            argv: Argv::of(job.argv.iter().map(|arg| arg.as_bytes())),
            env: EnvNames::names(job.env.iter().map(|(name, _)| name.as_bytes())),
            cwd: cwd.map(|cwd| path(Some(cwd))),
            user: job.user.as_deref().map(Text::new),
            pty: job.terminal.is_some(),
            timeout_ms: job.timeout.map(millis),
        };
        Act::begin(self.sink, self.entry(Entry::intent(event))).await.map_err(Cause::Audit)
    }
}

/// The end of a command that had started.
pub(super) async fn ended(mut act: Act, end: &End, took: Duration) -> Result<(), Cause> {
    let exit = match (&end.why, &end.exited) {
        (Some(Why::TimedOut), _) => ExitStatus::TimedOut,
        (Some(Why::Cancelled), _) => ExitStatus::Cancelled,
        (_, Some(exited)) => match exited.status {
            message::ExitStatus::Code(code) => ExitStatus::Code(code),
            message::ExitStatus::Signal(signal) => ExitStatus::Signal(signal),
        },
        (_, None) => ExitStatus::Lost,
    };
    act.set_event(AuditEvent::ExecEnd {
        exit,
        stdout_bytes: end.stdout.total,
        stderr_bytes: end.stderr.total,
        truncated: end.stdout.truncated || end.stderr.truncated,
        took_ms: millis(took),
    });
    let outcome = match &end.why {
        Some(Why::Failed(cause)) => Outcome::failed(cause),
        _ => Outcome::Ok,
    };
    act.settle(outcome).await.map_err(Cause::Audit)
}

/// An act that failed. That this cannot be written down either is logged: the failure is already on its way up.
pub(super) async fn failed(act: Option<Act>, cause: &Cause) {
    if let Some(act) = act
        && let Err(error) = act.finish(Outcome::failed(cause)).await
    {
        tracing::error!(%error, "the failure of an act could not be audited");
    }
}

pub(super) fn path(path: Option<&Path>) -> Text {
    path.map(|path| Text::lossy(path.as_os_str().as_bytes())).unwrap_or_default()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
