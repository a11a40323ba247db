//! The ends of jobs that go on without their client: nobody waits for them, so the guest is asked now and then.

use std::sync::Arc;
use std::time::Duration;

use dev_box_comm::message::{Exited, JobEntry, Message};
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

/// A job that was left alone, perhaps before whoever looks after it now was there.
#[derive(Debug, Clone)]
pub struct LeftJob {
    /// Its id.
    pub job: String,
    /// Who asked for it.
    pub actor: Actor,
    /// How long ago.
    pub age: Duration,
    /// Whether it is known to have begun in the background. Of another one something is recorded only if the guest knows it as such.
    pub begun: bool,
}

/// Jobs of one VM that were left alone.
pub(super) struct Left {
    pub(super) session: Session,
    pub(super) audit: Arc<dyn AuditSink>,
    pub(super) vm: VmName,
    pub(super) jobs: Vec<LeftJob>,
}

/// What a look says of a job.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    GoesOn,
    /// How, and how long it ran where the guest says that.
    Ended(ExitStatus, Option<Duration>),
    /// It had a client, with whom it ended.
    NotLeft,
}

impl Left {
    /// Waits for their ends, and has each on record as the guest's word.
    pub(super) async fn record(mut self) {
        let (began, session) = (Instant::now(), self.session.clone());
        let mut pause = FIRST;
        let lost = loop {
            let known = tokio::select! {
                known = look(&session, pause) => known,
                reason = session.closed() => break reason,
            };
            pause = (pause * 2).min(LONGEST);
            let Some(known) = known else { continue };
            for mut job in std::mem::take(&mut self.jobs) {
                match fate(&job, &known) {
                    Fate::GoesOn => {
                        job.begun = true;
                        self.jobs.push(job);
                    }
                    Fate::Ended(exit, ran) => {
                        // It cannot have run for longer than since it was asked for.
                        let most = job.age.saturating_add(began.elapsed());
                        self.end(job, exit, Evidence::Guest, ran.map_or(most, |ran| ran.min(most)));
                    }
                    Fate::NotLeft => {}
                }
            }
            if self.jobs.is_empty() {
                return;
            }
        };
        drop(session);
        let exit = if lost == CloseReason::Local { ExitStatus::Cancelled } else { ExitStatus::Lost };
        for job in std::mem::take(&mut self.jobs).into_iter().filter(|job| job.begun) {
            let took = job.age.saturating_add(began.elapsed());
            self.end(job, exit, Evidence::Host, took);
        }
    }

    fn end(&self, job: LeftJob, exit: ExitStatus, evidence: Evidence, took: Duration) {
        measure::left(&exit, took);
        // What it wrote was kept in the guest: none of it was received.
        let event = AuditEvent::ExecEnd {
            exit,
            stdout_bytes: 0,
            stderr_bytes: 0,
            truncated: false,
            took_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        };
        let mut entry = Entry::result(event, Outcome::Ok).by(job.actor).vm(&self.vm).job(job.job);
        entry.evidence = evidence;
        self.audit.note(entry);
    }
}

/// The jobs that the guest knows. A guest that stands still answers later.
async fn look(session: &Session, pause: Duration) -> Option<Vec<JobEntry>> {
    sleep(pause).await;
    timeout(LONGEST, background::list(session)).await.ok()?.ok()
}

fn fate(job: &LeftJob, known: &[JobEntry]) -> Fate {
    match known.iter().find(|known| known.job == job.job) {
        Some(known) if !known.background && !job.begun => Fate::NotLeft,
        Some(JobEntry { exited: Some(exited), .. }) => ended(exited),
        Some(_) => Fate::GoesOn,
        // One that the guest does not know any more ended, and so many others did since.
        None if job.begun => Fate::Ended(ExitStatus::Lost, None),
        None => Fate::NotLeft,
    }
}

fn ended(exited: &Exited) -> Fate {
    let ran = Duration::from_micros(exited.usage.wall_us);
    Fate::Ended(exit(Some(&Message::Exited(exited.clone())), false), Some(ran))
}
