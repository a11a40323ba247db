//! The end of a job that goes on without its client: nobody waits for it, so the guest is asked now and then.

use std::sync::Arc;
use std::time::Duration;

use dev_box_comm::message::Message;
use dev_box_comm::session::{CloseReason, Session};
use dev_box_core::id::VmName;
use dev_box_observe::audit::ExitStatus;
use dev_box_observe::{Actor, AuditEvent, AuditSink, Entry, Evidence, Outcome};
use tokio::time::{Instant, sleep, timeout};

use super::exit;
use crate::background;
use crate::executor::measure;

/// Between two looks: soon after the start, then less and less often.
const FIRST: Duration = Duration::from_millis(250);
const LONGEST: Duration = Duration::from_secs(5);

/// A job that was left alone.
pub(super) struct Left {
    pub(super) session: Session,
    pub(super) audit: Arc<dyn AuditSink>,
    /// Who asked for it.
    pub(super) actor: Actor,
    pub(super) vm: VmName,
    pub(super) job: String,
}

impl Left {
    /// Waits for its end, and has that on record as the guest's word.
    pub(super) async fn record(self) {
        let Self { session, audit, actor, vm, job } = self;
        let began = Instant::now();
        let (exit, evidence) = tokio::select! {
            exit = ended(&session, &job) => (exit, Evidence::Guest),
            reason = session.closed() => match reason {
                CloseReason::Local => (ExitStatus::Cancelled, Evidence::Host),
                _ => (ExitStatus::Lost, Evidence::Host),
            },
        };
        drop(session);
        let took = began.elapsed();
        measure::left(&exit, took);
        // What it wrote was kept in the guest: none of it was received.
        let event = AuditEvent::ExecEnd {
            exit,
            stdout_bytes: 0,
            stderr_bytes: 0,
            truncated: false,
            took_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        };
        let mut entry = Entry::result(event, Outcome::Ok).by(actor).vm(vm).job(job);
        entry.evidence = evidence;
        audit.note(entry);
    }
}

async fn ended(session: &Session, job: &str) -> ExitStatus {
    let mut pause = FIRST;
    loop {
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST);
        // A guest that stands still answers later.
        let Ok(Ok(jobs)) = timeout(LONGEST, background::list(session)).await else { continue };
        // One that the guest does not know any more ended, and so many others did since.
        let Some(known) = jobs.into_iter().find(|known| known.job == job) else { return ExitStatus::Lost };
        if let Some(exited) = known.exited {
            return exit(Some(&Message::Exited(exited)), false);
        }
    }
}
