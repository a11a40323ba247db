//! The pool's state machine: pure, without time of its own, without IO.
//!
//! ```text
//!            fill                made                 grant
//!  (nothing) ----> being made ---------> ready ----------------> leased
//!                      |  failed         ^ |  idle, old,          | |  returned
//!                      v           reset | v  unhealthy, drain    | v
//!                   back-off        +----+ retiring <-------------|-+
//!                                   |        |  gone              | in order, and VMs are rewound
//!                                   |        v                    v
//!                                   |     (nothing) <--------- resetting --+
//!                                   |                 lost                 |
//!                                   +--------------------------------------+
//! ```
//! Being made, ready, leased, resetting and retiring VMs all count against `max`: a host that is full stays full until a VM is
//! really gone. The driver feeds [`Event`]s with the time they happened at, and carries out the [`Action`]s; it owns the
//! VMs, this only knows their numbers.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::{Ending, PoolError, PoolSettings, PoolStatus, ResetPolicy};

/// One VM, from the decision to make it until it is gone. Never used twice.
pub(super) type VmNumber = u64;
/// One caller of `acquire`. Never used twice.
pub(super) type Ticket = u64;

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Event {
    /// Someone wants a VM, and waits until then.
    Acquire(Ticket, Duration),
    /// They no longer do.
    Abandon(Ticket),
    /// A VM is ready.
    Made(VmNumber),
    /// It could not be made; the text is for those who wait.
    Failed(VmNumber, String),
    /// A lease ended, in this way.
    Returned(VmNumber, Ending),
    /// It was handed to someone who had gone: nobody has used it.
    Unclaimed(VmNumber),
    /// A VM is as good as new.
    Reset(VmNumber),
    /// It could not be reset, and is gone.
    Lost(VmNumber),
    /// A ready VM leaves a check unanswered: nobody is to get it until it answers.
    Silent(VmNumber),
    /// It answers again.
    Answered(VmNumber),
    /// A ready VM died, or was silent for too long.
    Unhealthy(VmNumber),
    /// A VM is gone.
    Gone(VmNumber),
    /// Make so many ready now.
    Fill(usize),
    /// Take all ready ones away, and make none until asked for.
    Drain,
    /// No further VMs; all that are not leased go.
    Shutdown,
    /// Time has passed.
    Tick,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// Begin to make a VM.
    Make(VmNumber),
    /// Give up making it: it will be `Made` or `Failed` nevertheless.
    Cancel(VmNumber),
    /// Hand it over.
    Grant(Ticket, VmNumber),
    /// Tell them no.
    Refuse(Ticket, PoolError),
    /// Make it as good as new in place: it will be `Reset` or `Lost`.
    Reset(VmNumber),
    /// Take it down.
    Retire(VmNumber),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Making {
        unwanted: bool,
    },
    /// Since when, and made when.
    Ready {
        idle: Duration,
        made: Duration,
    },
    Leased {
        made: Duration,
    },
    Resetting {
        made: Duration,
        /// Somebody asked for the pool to be emptied meanwhile.
        unwanted: bool,
    },
    Retiring,
}

#[derive(Debug)]
struct Waiting {
    ticket: Ticket,
    since: Duration,
    deadline: Duration,
}

/// Making VMs has failed lately.
#[derive(Debug)]
struct Trouble {
    failures: u32,
    /// Not before this.
    retry: Duration,
    why: String,
}

/// The pool of one kind of VM.
#[derive(Debug)]
pub(super) struct Machine {
    settings: PoolSettings,
    now: Duration,
    next: VmNumber,
    vms: BTreeMap<VmNumber, Stage>,
    /// Oldest first: what was ready longest is handed out first, so that none grows old.
    ready: VecDeque<VmNumber>,
    /// Those of them that are not handed out, since they do not answer.
    silent: BTreeSet<VmNumber>,
    waiting: VecDeque<Waiting>,
    trouble: Option<Trouble>,
    /// How many are to be ready though nobody asked: `min`, more after a fill, none after a drain.
    target: usize,
    closing: bool,
    counts: PoolStatus,
}

impl Machine {
    pub(super) fn new(settings: PoolSettings) -> Self {
        let target = settings.min;
        Self {
            settings,
            now: Duration::ZERO,
            next: 0,
            vms: BTreeMap::new(),
            ready: VecDeque::new(),
            silent: BTreeSet::new(),
            waiting: VecDeque::new(),
            trouble: None,
            target,
            closing: false,
            counts: PoolStatus::default(),
        }
    }

    /// Takes an event that happened at `now` (since the pool's beginning) and says what is to be done, in order.
    pub(super) fn on(&mut self, now: Duration, event: Event) -> Vec<Action> {
        self.now = self.now.max(now);
        let mut actions = Vec::new();
        self.take(event, &mut actions);
        self.expire(&mut actions);
        self.grant(&mut actions);
        self.shrink(&mut actions);
        self.fill(&mut actions);
        actions
    }

    fn take(&mut self, event: Event, actions: &mut Vec<Action>) {
        match event {
            Event::Acquire(ticket, deadline) => self.enqueue(ticket, deadline, actions),
            Event::Abandon(ticket) => self.waiting.retain(|waiting| waiting.ticket != ticket),
            Event::Made(vm) => self.made(vm, actions),
            Event::Failed(vm, why) => self.failed(vm, why),
            Event::Returned(vm, ending) => self.returned(vm, ending, actions),
            Event::Unclaimed(vm) => {
                if let Some(&Stage::Leased { made }) = self.vms.get(&vm) {
                    self.counts.granted = self.counts.granted.saturating_sub(1);
                    if self.closing {
                        self.retire(vm, actions);
                    } else {
                        self.vms.insert(vm, Stage::Ready { idle: self.now, made });
                        self.ready.push_front(vm);
                    }
                }
            }
            Event::Silent(vm) => {
                if matches!(self.vms.get(&vm), Some(Stage::Ready { .. })) {
                    self.silent.insert(vm);
                }
            }
            Event::Answered(vm) => {
                self.silent.remove(&vm);
            }
            Event::Unhealthy(vm) => {
                if matches!(self.vms.get(&vm), Some(Stage::Ready { .. })) {
                    self.counts.unhealthy += 1;
                    self.retire(vm, actions);
                }
            }
            Event::Reset(vm) => {
                if let Some(&Stage::Resetting { made, unwanted }) = self.vms.get(&vm) {
                    self.counts.reset += 1;
                    if unwanted || self.closing {
                        self.retire(vm, actions);
                    } else {
                        self.vms.insert(vm, Stage::Ready { idle: self.now, made });
                        self.ready.push_back(vm);
                    }
                }
            }
            Event::Lost(vm) => {
                if matches!(self.vms.get(&vm), Some(Stage::Resetting { .. })) {
                    self.counts.lost += 1;
                    self.vms.remove(&vm);
                }
            }
            Event::Gone(vm) => {
                if self.vms.get(&vm) == Some(&Stage::Retiring) {
                    self.vms.remove(&vm);
                    // What it had is free: that may be what was in the way.
                    self.trouble = None;
                }
            }
            Event::Fill(target) => {
                self.target = target.min(self.settings.max);
                // A person asks: what was in the way may be gone.
                self.trouble = None;
            }
            Event::Drain => {
                self.target = 0;
                self.empty(actions);
            }
            Event::Shutdown => {
                self.closing = true;
                self.target = 0;
                self.empty(actions);
                for waiting in std::mem::take(&mut self.waiting) {
                    actions.push(Action::Refuse(waiting.ticket, PoolError::ShuttingDown));
                }
            }
            Event::Tick => {}
        }
    }

    fn enqueue(&mut self, ticket: Ticket, deadline: Duration, actions: &mut Vec<Action>) {
        let refusal = if self.closing {
            Some(PoolError::ShuttingDown)
        } else if self.waiting.len() >= self.settings.max_waiting {
            Some(PoolError::Exhausted { waiting: self.waiting.len() })
        } else if self.fit() == 0 && self.is_broken() {
            self.trouble.as_ref().map(|trouble| PoolError::Unhealthy { why: trouble.why.clone() })
        } else {
            None
        };
        match refusal {
            Some(error) => {
                self.counts.refused += 1;
                actions.push(Action::Refuse(ticket, error));
            }
            None => self.waiting.push_back(Waiting { ticket, since: self.now, deadline }),
        }
    }

    /// The breaker is open: making VMs failed too often in a row, it is not time to try again, and no VM is about to give back what it had.
    fn is_broken(&self) -> bool {
        self.trouble.as_ref().is_some_and(|it| it.failures >= self.settings.breaker && self.now < it.retry)
            && !self.vms.values().any(|stage| *stage == Stage::Retiring)
    }

    fn made(&mut self, vm: VmNumber, actions: &mut Vec<Action>) {
        let Some(Stage::Making { unwanted }) = self.vms.get(&vm).copied() else { return };
        self.trouble = None;
        self.counts.made += 1;
        if unwanted || self.closing {
            self.retire(vm, actions);
        } else {
            self.vms.insert(vm, Stage::Ready { idle: self.now, made: self.now });
            self.ready.push_back(vm);
        }
    }

    /// Only what ended in order, and is not too old, is used again.
    fn returned(&mut self, vm: VmNumber, ending: Ending, actions: &mut Vec<Action>) {
        let Some(&Stage::Leased { made }) = self.vms.get(&vm) else { return };
        let again = self.settings.reset == ResetPolicy::Rewind
            && ending == Ending::InOrder
            && !self.closing
            && !self.is_old(vm);
        if again {
            self.vms.insert(vm, Stage::Resetting { made, unwanted: false });
            actions.push(Action::Reset(vm));
        } else {
            self.retire(vm, actions);
        }
    }

    fn failed(&mut self, vm: VmNumber, why: String) {
        let Some(Stage::Making { unwanted }) = self.vms.get(&vm).copied() else { return };
        self.vms.remove(&vm);
        if unwanted {
            return;
        }
        self.counts.failed += 1;
        let failures = self.trouble.as_ref().map_or(0, |it| it.failures).saturating_add(1);
        let doubled = 1_u32.checked_shl(failures - 1).unwrap_or(u32::MAX);
        let pause = self.settings.backoff.saturating_mul(doubled).min(self.settings.backoff_max);
        self.trouble = Some(Trouble { failures, retry: self.now + pause, why });
    }

    fn retire(&mut self, vm: VmNumber, actions: &mut Vec<Action>) {
        self.ready.retain(|&ready| ready != vm);
        self.silent.remove(&vm);
        self.vms.insert(vm, Stage::Retiring);
        actions.push(Action::Retire(vm));
    }

    fn empty(&mut self, actions: &mut Vec<Action>) {
        for vm in self.ready.clone() {
            self.retire(vm, actions);
        }
        for (&vm, stage) in &mut self.vms {
            if let Stage::Making { unwanted: unwanted @ false } = stage {
                *unwanted = true;
                actions.push(Action::Cancel(vm));
            }
            if let Stage::Resetting { unwanted, .. } = stage {
                *unwanted = true;
            }
        }
    }

    /// Those whose time is up, and all who wait when the breaker has opened.
    fn expire(&mut self, actions: &mut Vec<Action>) {
        let (now, broken) = (self.now, self.is_broken());
        let why = self.trouble.as_ref().map(|it| it.why.clone()).unwrap_or_default();
        // Nobody who can be served is turned away.
        let served = self.fit();
        let mut place = 0;
        let counts = &mut self.counts;
        self.waiting.retain(|waiting| {
            let late = waiting.deadline < now || (waiting.deadline == now && served <= place);
            let error = match () {
                () if late => PoolError::Timeout { waited: now.saturating_sub(waiting.since) },
                () if broken && served <= place => PoolError::Unhealthy { why: why.clone() },
                () => {
                    place += 1;
                    return true;
                }
            };
            counts.refused += 1;
            actions.push(Action::Refuse(waiting.ticket, error));
            false
        });
    }

    fn grant(&mut self, actions: &mut Vec<Action>) {
        while !self.waiting.is_empty()
            && let Some(at) = self.ready.iter().position(|vm| !self.silent.contains(vm))
            && let Some(vm) = self.ready.remove(at)
        {
            // Too old to be handed out, though nobody has looked since.
            if self.is_old(vm) {
                self.retire(vm, actions);
                continue;
            }
            if let Some(waiting) = self.waiting.pop_front() {
                self.vms.insert(vm, Stage::Leased { made: self.made_at(vm) });
                self.counts.granted += 1;
                self.counts.longest_wait =
                    self.counts.longest_wait.max(self.now.saturating_sub(waiting.since));
                actions.push(Action::Grant(waiting.ticket, vm));
            }
        }
    }

    /// How many can be handed out.
    fn fit(&self) -> usize {
        self.ready.len() - self.silent.len()
    }

    fn made_at(&self, vm: VmNumber) -> Duration {
        match self.vms.get(&vm) {
            Some(Stage::Ready { made, .. } | Stage::Leased { made } | Stage::Resetting { made, .. }) => *made,
            _ => self.now,
        }
    }

    fn is_old(&self, vm: VmNumber) -> bool {
        self.now.saturating_sub(self.made_at(vm)) >= self.settings.max_age
    }

    /// Old ones go whatever their number; idle ones down to the target.
    fn shrink(&mut self, actions: &mut Vec<Action>) {
        for vm in self.ready.clone() {
            let idle = match self.vms.get(&vm) {
                Some(Stage::Ready { idle, .. }) => self.now.saturating_sub(*idle) >= self.settings.idle,
                _ => false,
            };
            if self.is_old(vm) || (idle && self.ready.len() > self.target) {
                self.retire(vm, actions);
            }
        }
    }

    fn fill(&mut self, actions: &mut Vec<Action>) {
        if self.closing || self.trouble.as_ref().is_some_and(|it| self.now < it.retry) {
            return;
        }
        let making = self.count(|stage| matches!(stage, Stage::Making { unwanted: false }));
        let all_making = self.count(|stage| matches!(stage, Stage::Making { .. }));
        // After a failure one is tried first.
        let parallel = if self.trouble.is_some() { 1 } else { self.settings.parallel };
        // What is being reset is ready in a moment.
        let coming = making + self.count(|stage| matches!(stage, Stage::Resetting { unwanted: false, .. }));
        // What is silent will mostly answer: it is not replaced, but who waits gets another where there is room.
        let kept = (self.target + self.waiting.len()).saturating_sub(self.ready.len() + coming);
        let wanted = kept.max(self.waiting.len().saturating_sub(self.fit() + coming));
        let room = self.settings.max.saturating_sub(self.vms.len());
        for _ in 0..wanted.min(room).min(parallel.saturating_sub(all_making)) {
            let vm = self.next;
            self.next += 1;
            self.vms.insert(vm, Stage::Making { unwanted: false });
            actions.push(Action::Make(vm));
        }
    }

    fn count(&self, what: impl Fn(&Stage) -> bool) -> usize {
        self.vms.values().filter(|stage| what(stage)).count()
    }

    /// When something happens by itself: a deadline, a retry, an age.
    pub(super) fn next_wake(&self) -> Option<Duration> {
        let deadlines = self.waiting.iter().map(|waiting| waiting.deadline);
        let ages = self.vms.values().filter_map(|stage| match stage {
            Stage::Ready { made, idle } => Some((*made, *idle)),
            _ => None,
        });
        let surplus = self.ready.len() > self.target;
        let ages = ages.map(|(made, idle)| {
            let old = made.saturating_add(self.settings.max_age);
            if surplus { old.min(idle.saturating_add(self.settings.idle)) } else { old }
        });
        let retry = self.trouble.as_ref().map(|it| it.retry).filter(|&retry| retry > self.now);
        deadlines.chain(ages).chain(retry).min()
    }

    pub(super) fn status(&self) -> PoolStatus {
        PoolStatus {
            min: self.settings.min,
            max: self.settings.max,
            ready: self.ready.len(),
            leased: self.count(|stage| matches!(stage, Stage::Leased { .. })),
            making: self.count(|stage| matches!(stage, Stage::Making { .. })),
            resetting: self.count(|stage| matches!(stage, Stage::Resetting { .. })),
            retiring: self.count(|stage| *stage == Stage::Retiring),
            waiting: self.waiting.len(),
            trouble: self.trouble.as_ref().map(|it| it.why.clone()),
            ..self.counts.clone()
        }
    }

    /// Nothing of it is left: no VM in any stage, nobody waits.
    pub(super) fn is_over(&self) -> bool {
        self.closing && self.vms.is_empty() && self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests;
