//! When a service is started, killed, started again or given up: no clock, no processes, only decisions.
//!
//! ```text
//!            due + spawned                exited
//!  Waiting ----------------> Running ---------------> Waiting (later each time)
//!     ^                        | stopped (SIGSTOP)        |
//!     |                        v                          | too many in the window
//!     +---- exited ------- Killing                        v
//!                                                      GivenUp
//! ```
//! A service that has run for a whole window without ending starts again with a clean record.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How patient a service's supervision is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Delay before the first restart; doubled for each further one within the window.
    pub first_delay: Duration,
    /// The delay never grows past this.
    pub longest_delay: Duration,
    /// Failures older than this are forgotten.
    pub window: Duration,
    /// Failures within the window after which the service is given up.
    pub most_failures: usize,
}

impl Policy {
    /// The agent's: quick to come back (a host waits for it), given up after ten failures in half a minute.
    pub const AGENT: Self = Self {
        first_delay: Duration::from_millis(10),
        longest_delay: Duration::from_secs(2),
        window: Duration::from_secs(30),
        most_failures: 10,
    };

    /// qemu-guest-agent's: of use, but nothing waits for it.
    pub const QEMU_GA: Self = Self {
        first_delay: Duration::from_millis(500),
        longest_delay: Duration::from_secs(30),
        window: Duration::from_secs(300),
        most_failures: 6,
    };
}

/// Where a service is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// To be started at this time.
    Waiting(Instant),
    /// Running as this process.
    Running(i32),
    /// Told to die (SIGKILL), not reaped yet.
    Killing(i32),
    /// Failed too often.
    GivenUp,
}

/// What the driver must do after an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The event was about another process.
    NotMine,
    /// Send SIGKILL to the process.
    Kill,
    /// Nothing now: it will be due again later.
    Restart,
    /// It has failed too often.
    GiveUp,
}

/// One supervised service.
#[derive(Debug, Clone)]
pub struct Service {
    policy: Policy,
    phase: Phase,
    failures: VecDeque<Instant>,
}

impl Service {
    /// To be started at `first_start`.
    #[must_use]
    pub fn new(policy: Policy, first_start: Instant) -> Self {
        Self { policy, phase: Phase::Waiting(first_start), failures: VecDeque::new() }
    }

    /// Where it is.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Whether it is to be started now.
    #[must_use]
    pub fn due(&self, now: Instant) -> bool {
        matches!(self.phase, Phase::Waiting(at) if at <= now)
    }

    /// When the driver must look again without any event.
    #[must_use]
    pub fn next_wake(&self) -> Option<Instant> {
        match self.phase {
            Phase::Waiting(at) => Some(at),
            _ => None,
        }
    }

    /// It was spawned as `pid`.
    pub fn started(&mut self, pid: i32) {
        self.phase = Phase::Running(pid);
    }

    /// It is not wanted for now (its port is not there yet): look again at `at`, without counting a failure.
    pub fn postponed(&mut self, at: Instant) {
        self.phase = Phase::Waiting(at);
    }

    /// It could not be spawned.
    pub fn start_failed(&mut self, now: Instant) -> Verdict {
        self.failed(now)
    }

    /// A child was stopped by a signal: ours must not be, since nobody would continue it.
    pub fn stopped(&mut self, pid: i32) -> Verdict {
        match self.phase {
            Phase::Running(own) | Phase::Killing(own) if own == pid => {
                self.phase = Phase::Killing(pid);
                Verdict::Kill
            }
            _ => Verdict::NotMine,
        }
    }

    /// A child ended and was reaped.
    pub fn exited(&mut self, pid: i32, now: Instant) -> Verdict {
        match self.phase {
            Phase::Running(own) | Phase::Killing(own) if own == pid => self.failed(now),
            _ => Verdict::NotMine,
        }
    }

    fn failed(&mut self, now: Instant) -> Verdict {
        while self.failures.front().is_some_and(|first| now.duration_since(*first) > self.policy.window) {
            self.failures.pop_front();
        }
        self.failures.push_back(now);
        if self.failures.len() >= self.policy.most_failures {
            self.phase = Phase::GivenUp;
            return Verdict::GiveUp;
        }
        let doublings = u32::try_from(self.failures.len() - 1).unwrap_or(u32::MAX).min(16);
        let delay = self.policy.first_delay.saturating_mul(1 << doublings).min(self.policy.longest_delay);
        self.phase = Phase::Waiting(now + delay);
        Verdict::Restart
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POLICY: Policy = Policy {
        first_delay: Duration::from_millis(10),
        longest_delay: Duration::from_millis(50),
        window: Duration::from_secs(10),
        most_failures: 4,
    };

    #[test]
    fn it_backs_off_and_gives_up() {
        let start = Instant::now();
        let mut service = Service::new(POLICY, start);
        assert!(service.due(start));
        let mut delays = Vec::new();
        for pid in 1..4 {
            service.started(pid);
            assert!(!service.due(start));
            assert_eq!(service.exited(pid, start), Verdict::Restart);
            delays.push(service.next_wake().unwrap() - start);
        }
        assert_eq!(delays, [10, 20, 40].map(Duration::from_millis));
        service.started(9);
        assert_eq!(service.exited(9, start), Verdict::GiveUp);
        assert_eq!((service.phase(), service.next_wake()), (Phase::GivenUp, None));
    }

    #[test]
    fn old_failures_are_forgotten() {
        let start = Instant::now();
        let mut service = Service::new(POLICY, start);
        for round in 0..20 {
            let now = start + POLICY.window * 2 * round;
            service.started(5);
            assert_eq!(service.exited(5, now), Verdict::Restart);
            assert_eq!(service.next_wake(), Some(now + POLICY.first_delay));
        }
    }

    #[test]
    fn a_stopped_one_is_killed_and_others_are_not_ours() {
        let start = Instant::now();
        let mut service = Service::new(POLICY, start);
        service.started(7);
        assert_eq!(service.stopped(8), Verdict::NotMine);
        assert_eq!(service.exited(8, start), Verdict::NotMine);
        assert_eq!(service.stopped(7), Verdict::Kill);
        assert_eq!(service.phase(), Phase::Killing(7));
        assert_eq!(service.exited(7, start), Verdict::Restart);
        assert_eq!(service.start_failed(start), Verdict::Restart);
    }

    #[test]
    fn postponing_costs_no_failure() {
        let start = Instant::now();
        let mut service = Service::new(POLICY, start);
        for step in 0..100 {
            service.postponed(start + Duration::from_millis(step));
        }
        service.started(1);
        assert_eq!(service.exited(1, start), Verdict::Restart);
    }

    proptest! {
        /// However events fall, a delay is never longer than allowed, and giving up is final.
        #[test]
        fn delays_are_bounded(gaps in proptest::collection::vec(0_u64..20_000, 1..60)) {
            let mut now = Instant::now();
            let mut service = Service::new(POLICY, now);
            for (index, gap) in gaps.into_iter().enumerate() {
                now += Duration::from_millis(gap);
                let pid = i32::try_from(index).unwrap() + 1;
                if service.phase() == Phase::GivenUp {
                    prop_assert_eq!(service.exited(pid, now), Verdict::NotMine);
                    continue;
                }
                service.started(pid);
                match service.exited(pid, now) {
                    Verdict::Restart => {
                        let delay = service.next_wake().unwrap() - now;
                        prop_assert!(delay >= POLICY.first_delay && delay <= POLICY.longest_delay);
                    }
                    verdict => prop_assert_eq!(verdict, Verdict::GiveUp),
                }
            }
        }
    }
}
