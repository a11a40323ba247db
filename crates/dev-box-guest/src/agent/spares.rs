//! Inits of jobs nobody has asked for yet: made while the agent has nothing to do, so that a command waits only for its own program.
//!
//! ```text
//!            idle for a moment           a command          the job ended
//!  (none) ---------------------> waiting ----------> in use ---------------> as it was made?
//!                                  | ^                                        | |
//!          a mount of the agent's  | '----------------- yes ------------------' | no: limits, mounts or groups of its own,
//!          changes: it has the old v                                            v     killed, or older than a mount
//!                               killed                                        killed; its group waits, if that is as it was
//! ```
//! A spare has its namespaces, `/proc` and control group already: making and taking down those costs more than most commands. When none
//! waits, a command makes its own.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dev_box_comm::message::{GuestError, GuestErrorKind};
use tokio::sync::Notify;

use super::{Agent, Containment};
use crate::cgroup::{GroupLimits, JobGroup};
use crate::job::spawn::{Isolation, Process};
use crate::memory;

/// Spares kept.
const SPARES: usize = 2;
/// Spares, and control groups without one, that are kept when jobs give them back.
const KEPT: usize = 4;
/// Without a command for this long the agent has time to make one.
const IDLE: Duration = Duration::from_millis(10);
/// After one could not be made.
const PAUSE: Duration = Duration::from_secs(1);

/// A job's init that waits to be told what to execute.
#[derive(Debug)]
pub struct Spare {
    /// The init.
    pub process: Process,
    /// Its control group, where there are any.
    pub group: Option<JobGroup>,
    /// Which of the agent's mounts it has a copy of.
    generation: u64,
}

impl Spare {
    /// Makes it as a new one; false when it cannot be. Without a control group nothing says that the init is alone.
    async fn renew(&mut self) -> bool {
        let init = Some(self.process.pid());
        self.group.as_mut().is_some_and(|group| group.renew(init)) && self.process.renew().await
    }
}

/// Those that wait.
#[derive(Debug, Default)]
pub struct Spares {
    waiting: Mutex<Waiting>,
    suspended: AtomicUsize,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    spares: Vec<Spare>,
    groups: Vec<JobGroup>,
    last_used: Option<Instant>,
    /// Counts suspensions.
    generation: u64,
}

/// While it lives no spare is made.
#[derive(Debug)]
pub struct Suspension<'a> {
    spares: &'a Spares,
}

impl Drop for Suspension<'_> {
    fn drop(&mut self) {
        self.spares.suspended.fetch_sub(1, Ordering::SeqCst);
        self.spares.changed.notify_one();
    }
}

impl Spares {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many wait.
    pub fn count(&self) -> usize {
        self.waiting().spares.len()
    }

    fn take(&self) -> Option<Spare> {
        let mut waiting = self.waiting();
        waiting.last_used = Some(Instant::now());
        let taken = waiting.spares.pop();
        drop(waiting);
        self.changed.notify_one();
        taken
    }

    /// Keeps the init and the group of a job that has ended for another, or gives them back when they are not as they were or enough are kept.
    pub async fn keep(&self, mut spare: Spare) -> Option<Spare> {
        if !spare.renew().await {
            return Some(spare);
        }
        let mut waiting = self.waiting();
        waiting.last_used = Some(Instant::now());
        if spare.generation != waiting.generation || waiting.spares.len() >= KEPT {
            return Some(spare);
        }
        waiting.spares.push(spare);
        None
    }

    /// Keeps a group for another job, or gives it back when it is not as it was or enough are kept.
    pub fn keep_group(&self, mut group: JobGroup) -> Option<JobGroup> {
        if !group.renew(None) {
            return Some(group);
        }
        let mut waiting = self.waiting();
        waiting.last_used = Some(Instant::now());
        if waiting.groups.len() >= KEPT {
            return Some(group);
        }
        waiting.groups.push(group);
        None
    }

    /// Kills those that wait, and has none made until the guard is dropped: for whoever changes what they have a copy of.
    pub async fn suspend(&self) -> Suspension<'_> {
        self.suspended.fetch_add(1, Ordering::SeqCst);
        let guard = Suspension { spares: self };
        let spares = {
            let mut waiting = self.waiting();
            waiting.generation += 1;
            std::mem::take(&mut waiting.spares)
        };
        for Spare { process, group, .. } in spares {
            // Its mounts are gone when it is.
            process.reap().await;
            if let Some(group) = group.and_then(|group| self.keep_group(group)) {
                group.remove(PAUSE);
            }
        }
        guard
    }

    fn wanted(&self) -> bool {
        self.suspended.load(Ordering::SeqCst) == 0 && self.count() < SPARES
    }

    fn idle(&self) -> bool {
        self.waiting().last_used.is_none_or(|last| last.elapsed() >= IDLE)
    }
}

impl Agent {
    /// One that waits, or one made for the occasion.
    ///
    /// # Errors
    /// What the kernel refused, as an answer.
    pub(super) fn take_spare(&self) -> Result<Spare, GuestError> {
        match self.spares.take() {
            Some(spare) => Ok(spare),
            None => self.make_spare(),
        }
    }

    fn make_spare(&self) -> Result<Spare, GuestError> {
        let generation = self.spares.waiting().generation;
        let failed = |text: String| GuestError::new(GuestErrorKind::Other, text);
        let group = match &self.surroundings.containment {
            Containment::Full(cgroups) => Some(match self.spares.waiting().groups.pop() {
                Some(group) => group,
                None => cgroups
                    .create(&self.jobs.number().to_string(), &GroupLimits::default())
                    .map_err(|error| failed(error.to_string()))?,
            }),
            _ => None,
        };
        let isolation = match self.surroundings.containment {
            Containment::None => Isolation::ProcessGroup,
            _ => Isolation::Namespaces(group.as_ref().map(JobGroup::directory)),
        };
        match Process::prepare(isolation) {
            Ok(process) => Ok(Spare { process, group, generation }),
            Err(error) => {
                if let Some(group) = group {
                    group.remove(Duration::ZERO);
                }
                Err(failed(error.to_string()))
            }
        }
    }

    /// Makes spares whenever there is time; never returns.
    pub(super) async fn keep_spares(self) {
        loop {
            if !self.spares.wanted() {
                self.spares.changed.notified().await;
            } else if !self.spares.idle() {
                tokio::time::sleep(IDLE).await;
            } else if let Ok(spare) = self.make_spare() {
                self.spares.waiting().spares.push(spare);
                if self.spares.count() >= SPARES {
                    memory::take_back_pages();
                }
                tokio::task::yield_now().await;
            } else {
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::tests::surroundings;

    async fn filled(agent: &Agent) {
        for _ in 0..6_000 {
            if agent.spares.count() == SPARES {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("no spares were made");
    }

    #[tokio::test]
    async fn spares_are_made_when_idle_and_replaced_when_used() {
        let agent = Agent::new(surroundings().surroundings);
        let keeping = tokio::spawn(agent.clone().keep_spares());
        filled(&agent).await;
        let spare = agent.take_spare().unwrap();
        assert_eq!(agent.spares.count(), SPARES - 1);
        filled(&agent).await;
        assert!(spare.group.is_none());
        keeping.abort();
    }

    #[tokio::test]
    async fn none_is_left_and_none_made_while_suspended() {
        let agent = Agent::new(surroundings().surroundings);
        let keeping = tokio::spawn(agent.clone().keep_spares());
        filled(&agent).await;
        let guard = agent.spares.suspend().await;
        tokio::time::sleep(IDLE * 3).await;
        assert_eq!(agent.spares.count(), 0);
        // A command still gets one.
        drop(agent.take_spare().unwrap());
        drop(guard);
        filled(&agent).await;
        keeping.abort();
    }
}
