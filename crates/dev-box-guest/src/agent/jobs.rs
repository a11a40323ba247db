//! The jobs the agent knows: those that run, and background ones that have ended.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use dev_box_comm::message::{Exited, GuestError, GuestErrorKind, JobEntry, WireBytes};
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, mpsc, watch};

use super::replay::Replay;
use crate::job::run::Command;

/// Jobs that may run at the same time.
pub const MAX_RUNNING: usize = 256;
/// Background jobs that are remembered after their end.
pub const MAX_REMEMBERED: usize = 64;
/// Bytes of a command line in a list of jobs: all of them together fit into one answer.
const MAX_LISTED_ARGV: usize = 1024;
/// Commands that may wait for one job.
pub const COMMANDS: usize = 16;

/// One job.
#[derive(Debug)]
pub struct Job {
    /// Its id: the host's, or one of ours.
    pub id: String,
    /// Its command line.
    pub argv: Vec<WireBytes>,
    /// Process number of its init in the guest's first namespace.
    pub pid: u32,
    /// Whether it outlives the stream that started it.
    pub background: bool,
    /// When it was started.
    pub started: Instant,
    /// What is to be done to it.
    pub commands: mpsc::Sender<Command>,
    /// How it ended, once it has.
    pub exited: watch::Receiver<Option<Exited>>,
    /// Its terminal, when it has one.
    pub terminal: Option<Arc<AsyncFd<OwnedFd>>>,
    /// The writing end of its standard input, until that is closed; background jobs only.
    pub stdin: Mutex<Option<Arc<AsyncFd<OwnedFd>>>>,
    /// The last of its output; background jobs only.
    pub output: Arc<Replay>,
    /// The last of its errors; background jobs only.
    pub errors: Arc<Replay>,
}

impl Job {
    /// Queues a command.
    ///
    /// # Errors
    /// `NotFound` when it has ended, `TooMany` when too many commands wait.
    pub fn command(&self, command: Command) -> Result<(), GuestError> {
        self.commands.try_send(command).map_err(|error| match error {
            mpsc::error::TrySendError::Closed(_) => {
                GuestError::new(GuestErrorKind::NotFound, format!("job {} has ended", self.id))
            }
            mpsc::error::TrySendError::Full(_) => GuestError::new(
                GuestErrorKind::TooMany,
                format!("too many commands wait for job {}", self.id),
            ),
        })
    }

    fn running(&self) -> bool {
        self.exited.borrow().is_none()
    }

    fn entry(&self) -> JobEntry {
        let exited = self.exited.borrow().clone();
        JobEntry {
            job: self.id.clone(),
            pid: exited.is_none().then_some(self.pid),
            argv: brief(&self.argv),
            background: self.background,
            exited,
            age_ms: u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX),
        }
    }
}

/// The beginning of a command line, which ends with `...` where more was left out.
fn brief(argv: &[WireBytes]) -> Vec<WireBytes> {
    let mut left = MAX_LISTED_ARGV;
    let mut kept = Vec::new();
    for word in argv {
        // Empty words count as well.
        if word.len() < left {
            left -= word.len() + 1;
            kept.push(word.clone());
            continue;
        }
        let text = String::from_utf8_lossy(word.as_bytes().get(..left).unwrap_or_default());
        kept.push(WireBytes::from(format!("{}...", text.trim_end_matches('\u{fffd}')).as_str()));
        break;
    }
    kept
}

/// All of them.
#[derive(Debug, Default)]
pub struct Jobs {
    table: Mutex<Table>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Table {
    jobs: BTreeMap<String, Arc<Job>>,
    next: u64,
}

impl Jobs {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A number no job has had, for ids and control groups.
    pub fn number(&self) -> u64 {
        let mut table = self.table();
        table.next += 1;
        table.next
    }

    /// Whether a job of this id may be started.
    ///
    /// # Errors
    /// `AlreadyExists` when one runs, `TooMany` when there are too many altogether.
    pub fn admit(&self, id: &str) -> Result<(), GuestError> {
        let table = self.table();
        if table.jobs.get(id).is_some_and(|job| job.running()) {
            return Err(GuestError::new(GuestErrorKind::AlreadyExists, format!("job {id} is running")));
        }
        if table.jobs.values().filter(|job| job.running()).count() >= MAX_RUNNING {
            return Err(GuestError::new(GuestErrorKind::TooMany, format!("{MAX_RUNNING} jobs are running")));
        }
        Ok(())
    }

    /// Adds a job that has started; one of the same id that has ended is forgotten.
    ///
    /// # Errors
    /// As [`admit`](Self::admit).
    pub fn add(&self, job: Arc<Job>) -> Result<(), GuestError> {
        self.admit(&job.id)?;
        self.table().jobs.insert(job.id.clone(), job);
        Ok(())
    }

    /// A job has ended: a foreground one is forgotten, a background one remembered, the oldest of them forgotten.
    pub fn ended(&self, job: &Job) {
        let mut table = self.table();
        if job.background {
            while table.jobs.values().filter(|job| !job.running()).count() > MAX_REMEMBERED {
                let oldest = table.jobs.values().filter(|job| !job.running()).min_by_key(|job| job.started);
                let Some(oldest) = oldest.map(|job| job.id.clone()) else { break };
                table.jobs.remove(&oldest);
            }
        } else {
            table.jobs.remove(&job.id);
        }
        drop(table);
        self.changed.notify_waiters();
    }

    /// The job of this id.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn find(&self, id: &str) -> Result<Arc<Job>, GuestError> {
        let missing = || GuestError::new(GuestErrorKind::NotFound, format!("there is no job {id}"));
        self.table().jobs.get(id).cloned().ok_or_else(missing)
    }

    /// All of them, by id.
    pub fn list(&self) -> Vec<JobEntry> {
        self.table().jobs.values().map(|job| job.entry()).collect()
    }

    /// How many run.
    pub fn running(&self) -> usize {
        self.table().jobs.values().filter(|job| job.running()).count()
    }

    /// Sends a command to every job that runs.
    pub fn command_all(&self, command: Command) {
        for job in self.table().jobs.values() {
            let _ = job.command(command);
        }
    }

    /// Waits until no foreground job is left.
    pub async fn no_foreground(&self) {
        self.until(|table| !table.jobs.values().any(|job| !job.background)).await;
    }

    /// Waits until nothing runs.
    pub async fn none_running(&self) {
        self.until(|table| !table.jobs.values().any(|job| job.running())).await;
    }

    async fn until(&self, satisfied: impl Fn(&Table) -> bool) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if satisfied(&self.table()) {
                return;
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use dev_box_comm::message::{ExitStatus, Usage};

    use super::*;

    fn job(id: &str, background: bool) -> (Arc<Job>, watch::Sender<Option<Exited>>, mpsc::Receiver<Command>) {
        let (commands, receiver) = mpsc::channel(COMMANDS);
        let (exit, exited) = watch::channel(None);
        let job = Job {
            id: id.into(),
            argv: vec![WireBytes::from("true")],
            pid: 7,
            background,
            started: Instant::now(),
            commands,
            exited,
            terminal: None,
            stdin: Mutex::default(),
            output: Arc::default(),
            errors: Arc::default(),
        };
        (Arc::new(job), exit, receiver)
    }

    fn exit() -> Option<Exited> {
        Some(Exited {
            status: ExitStatus::Code(0),
            usage: Usage::default(),
            timed_out: false,
            oom_killed: false,
        })
    }

    #[tokio::test]
    async fn foreground_jobs_are_forgotten_and_background_ones_remembered() {
        let jobs = Jobs::default();
        let (front, front_exit, _front_commands) = job("front", false);
        let (back, back_exit, _back_commands) = job("back", true);
        jobs.add(front.clone()).unwrap();
        jobs.add(back.clone()).unwrap();
        assert_eq!(jobs.running(), 2);
        assert_eq!(jobs.add(back.clone()).unwrap_err().kind, GuestErrorKind::AlreadyExists);
        front_exit.send(exit()).unwrap();
        jobs.ended(&front);
        jobs.no_foreground().await;
        assert_eq!(jobs.find("front").unwrap_err().kind, GuestErrorKind::NotFound);
        back_exit.send(exit()).unwrap();
        jobs.ended(&back);
        jobs.none_running().await;
        let entry = &jobs.list()[0];
        assert_eq!((entry.pid, entry.background, entry.exited.clone()), (None, true, exit()));
        let (again, _exit, _commands) = job("back", true);
        jobs.add(again).unwrap();
        assert_eq!(jobs.list()[0].pid, Some(7));
    }

    #[test]
    fn the_oldest_ended_ones_are_forgotten() {
        let jobs = Jobs::default();
        for index in 0..MAX_REMEMBERED + 5 {
            let (ended, exited, _commands) = job(&format!("{index:04}"), true);
            jobs.add(ended.clone()).unwrap();
            exited.send(exit()).unwrap();
            jobs.ended(&ended);
        }
        assert_eq!(jobs.list().len(), MAX_REMEMBERED);
        assert!(jobs.find("0004").is_err() && jobs.find("0005").is_ok());
    }

    #[test]
    fn jobs_and_commands_are_bounded() {
        let jobs = Jobs::default();
        let kept: Vec<_> = (0..MAX_RUNNING).map(|index| job(&index.to_string(), true)).collect();
        for (job, ..) in &kept {
            jobs.add(job.clone()).unwrap();
        }
        assert_eq!(jobs.admit("one more").unwrap_err().kind, GuestErrorKind::TooMany);
        for _ in 0..COMMANDS {
            kept[0].0.command(Command::Kill).unwrap();
        }
        assert_eq!(kept[0].0.command(Command::Kill).unwrap_err().kind, GuestErrorKind::TooMany);
        jobs.command_all(Command::Kill);
        let (ended, _exit, commands) = job("ended", true);
        drop(commands);
        assert_eq!(ended.command(Command::Kill).unwrap_err().kind, GuestErrorKind::NotFound);
        assert!(jobs.number() < jobs.number());
    }
}
