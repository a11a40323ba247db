use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

fn settings(min: usize, max: usize) -> PoolSettings {
    rewinding(min, max, ResetPolicy::Replace)
}

fn rewinding(min: usize, max: usize, reset: ResetPolicy) -> PoolSettings {
    PoolSettings {
        reset,
        parallel: 2,
        max_waiting: 6,
        max_age: ms(1000),
        idle: ms(300),
        backoff: ms(10),
        backoff_max: ms(80),
        breaker: 3,
        ..PoolSettings::new(min, max)
    }
}

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// What happens in a run; numbers pick among what is there.
#[derive(Debug, Clone)]
enum Step {
    Acquire(u64),
    Abandon(usize),
    Made(usize),
    Failed(usize),
    Returned(usize, bool),
    Reset(usize),
    Lost(usize),
    Unclaimed(usize),
    Silent(usize),
    Answered(usize),
    Unhealthy(usize),
    Gone(usize),
    Stray(u64),
    Fill(usize),
    Drain,
    Shutdown,
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let pick = || 0..8_usize;
    prop_oneof![
        6 => (0..200_u64).prop_map(Step::Acquire),
        2 => pick().prop_map(Step::Abandon),
        8 => pick().prop_map(Step::Made),
        2 => pick().prop_map(Step::Failed),
        5 => (pick(), any::<bool>()).prop_map(|(at, in_order)| Step::Returned(at, in_order)),
        5 => pick().prop_map(Step::Reset),
        1 => pick().prop_map(Step::Lost),
        2 => pick().prop_map(Step::Unclaimed),
        2 => pick().prop_map(Step::Silent),
        2 => pick().prop_map(Step::Answered),
        2 => pick().prop_map(Step::Unhealthy),
        6 => pick().prop_map(Step::Gone),
        1 => (0..40_u64).prop_map(Step::Stray),
        1 => pick().prop_map(Step::Fill),
        1 => Just(Step::Drain),
        1 => prop::bool::weighted(0.1).prop_map(|end| if end { Step::Shutdown } else { Step::Drain }),
        6 => (1..400_u64).prop_map(Step::Wait),
    ]
}

fn policy() -> impl Strategy<Value = ResetPolicy> {
    prop_oneof![Just(ResetPolicy::Replace), Just(ResetPolicy::Rewind)]
}

/// What the outside knows of the pool: where each VM is, and who waits.
#[derive(Debug, Default)]
struct Model {
    max: usize,
    now: Duration,
    making: BTreeSet<VmNumber>,
    ready: BTreeSet<VmNumber>,
    silent: BTreeSet<VmNumber>,
    leased: BTreeSet<VmNumber>,
    resetting: BTreeSet<VmNumber>,
    /// Those whose lease ended in order, and which may therefore be reset.
    in_order: BTreeSet<VmNumber>,
    rewinds: bool,
    retiring: BTreeSet<VmNumber>,
    /// In order of arrival, with deadlines.
    waiting: Vec<(Ticket, Duration)>,
    ever: BTreeSet<VmNumber>,
    granted: BTreeMap<VmNumber, usize>,
    closing: bool,
}

impl Model {
    fn all(&self) -> usize {
        self.making.len() + self.ready.len() + self.leased.len() + self.resetting.len() + self.retiring.len()
    }

    fn apply(&mut self, actions: &[Action]) -> Result<(), TestCaseError> {
        for action in actions {
            match action {
                Action::Make(vm) => {
                    prop_assert!(!self.closing, "made after the end");
                    prop_assert!(self.ever.insert(*vm), "a number is used once");
                    self.making.insert(*vm);
                }
                Action::Cancel(vm) => prop_assert!(self.making.contains(vm)),
                Action::Grant(ticket, vm) => {
                    prop_assert!(!self.waiting.is_empty(), "granted to nobody");
                    let (first, deadline) = self.waiting.remove(0);
                    prop_assert_eq!(first, *ticket, "in order of arrival");
                    prop_assert!(self.now <= deadline, "granted too late");
                    prop_assert!(self.ready.remove(vm), "not ready");
                    prop_assert!(!self.silent.contains(vm), "it does not answer");
                    self.leased.insert(*vm);
                    self.in_order.remove(vm);
                    *self.granted.entry(*vm).or_default() += 1;
                }
                Action::Refuse(ticket, error) => {
                    let at = self.waiting.iter().position(|(waiting, _)| waiting == ticket);
                    let (_, deadline) = self.waiting.remove(at.expect("refused who does not wait"));
                    match error {
                        PoolError::Timeout { .. } => prop_assert!(deadline <= self.now),
                        PoolError::ShuttingDown => prop_assert!(self.closing),
                        PoolError::Exhausted { .. } | PoolError::Unhealthy { .. } => {}
                    }
                }
                Action::Reset(vm) => {
                    prop_assert!(self.rewinds && !self.closing, "reset against the policy");
                    prop_assert!(self.in_order.remove(vm), "reset after an abnormal end");
                    prop_assert!(self.leased.remove(vm), "reset what nobody had");
                    self.resetting.insert(*vm);
                }
                Action::Retire(vm) => {
                    let was = self.ready.remove(vm) || self.leased.remove(vm);
                    self.silent.remove(vm);
                    prop_assert!(was, "retired what nobody had");
                    self.retiring.insert(*vm);
                }
            }
            prop_assert!(self.all() <= self.max, "{} VMs of {}", self.all(), self.max);
        }
        Ok(())
    }
}

fn nth<T: Copy + Ord>(set: &BTreeSet<T>, at: usize) -> Option<T> {
    set.iter().nth(at % set.len().max(1)).copied()
}

/// One run: after every step machine and model agree, and nobody waits beside a ready VM.
fn run(
    min: usize,
    max: usize,
    reset: ResetPolicy,
    steps: &[Step],
) -> Result<(Machine, Model), TestCaseError> {
    let mut machine = Machine::new(rewinding(min, max, reset));
    let mut model = Model { max, rewinds: reset == ResetPolicy::Rewind, ..Model::default() };
    let mut tickets = 0;
    let actions = machine.on(model.now, Event::Tick);
    model.apply(&actions)?;
    for step in steps {
        let event = match *step {
            Step::Acquire(within) => {
                tickets += 1;
                model.waiting.push((tickets, model.now + ms(within)));
                Some(Event::Acquire(tickets, model.now + ms(within)))
            }
            Step::Abandon(at) if !model.waiting.is_empty() => {
                let (ticket, _) = model.waiting.remove(at % model.waiting.len());
                Some(Event::Abandon(ticket))
            }
            Step::Abandon(_) => None,
            Step::Made(at) => nth(&model.making, at).map(|vm| {
                model.making.remove(&vm);
                model.ready.insert(vm);
                Event::Made(vm)
            }),
            Step::Failed(at) => nth(&model.making, at).map(|vm| {
                model.making.remove(&vm);
                Event::Failed(vm, "no".into())
            }),
            Step::Returned(at, true) => nth(&model.leased, at).map(|vm| {
                model.in_order.insert(vm);
                Event::Returned(vm, Ending::InOrder)
            }),
            Step::Returned(at, false) => {
                nth(&model.leased, at).map(|vm| Event::Returned(vm, Ending::Abnormal))
            }
            Step::Reset(at) => nth(&model.resetting, at).map(|vm| {
                model.resetting.remove(&vm);
                model.ready.insert(vm);
                Event::Reset(vm)
            }),
            Step::Lost(at) => nth(&model.resetting, at).map(|vm| {
                model.resetting.remove(&vm);
                Event::Lost(vm)
            }),
            Step::Unclaimed(at) => nth(&model.leased, at).map(|vm| {
                if !model.closing {
                    model.leased.remove(&vm);
                    model.ready.insert(vm);
                }
                Event::Unclaimed(vm)
            }),
            Step::Silent(at) => nth(&model.ready, at).map(|vm| {
                model.silent.insert(vm);
                Event::Silent(vm)
            }),
            Step::Answered(at) => nth(&model.silent, at).map(|vm| {
                model.silent.remove(&vm);
                Event::Answered(vm)
            }),
            Step::Unhealthy(at) => nth(&model.ready, at).map(Event::Unhealthy),
            Step::Gone(at) => nth(&model.retiring, at).map(|vm| {
                model.retiring.remove(&vm);
                Event::Gone(vm)
            }),
            // News of VMs that are elsewhere, or nowhere, change nothing.
            Step::Stray(vm) if !model.making.contains(&vm) && !model.leased.contains(&vm) => {
                model.apply(&machine.on(model.now, Event::Made(vm)))?;
                if !model.ready.contains(&vm) {
                    model.apply(&machine.on(model.now, Event::Silent(vm)))?;
                }
                model.apply(&machine.on(model.now, Event::Failed(vm, "stray".into())))?;
                model.apply(&machine.on(model.now, Event::Returned(vm, Ending::InOrder)))?;
                if model.resetting.contains(&vm) {
                    continue;
                }
                model.apply(&machine.on(model.now, Event::Lost(vm)))?;
                Some(Event::Reset(vm))
            }
            Step::Stray(_) => None,
            Step::Fill(ready) => Some(Event::Fill(ready)),
            Step::Drain => Some(Event::Drain),
            Step::Shutdown => {
                model.closing = true;
                Some(Event::Shutdown)
            }
            Step::Wait(by) => {
                model.now += ms(by);
                Some(Event::Tick)
            }
        };
        let Some(event) = event else { continue };
        let actions = machine.on(model.now, event);
        model.apply(&actions)?;
        let status = machine.status();
        prop_assert_eq!(
            (status.making, status.ready, status.leased, status.resetting, status.retiring, status.waiting),
            (
                model.making.len(),
                model.ready.len(),
                model.leased.len(),
                model.resetting.len(),
                model.retiring.len(),
                model.waiting.len()
            )
        );
        let fit = model.ready.len() - model.silent.len();
        prop_assert!(fit == 0 || status.waiting == 0, "someone waits beside a ready VM");
    }
    Ok((machine, model))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn no_interleaving_loses_a_vm_or_makes_one_too_many(
        min in 0..4_usize, more in 1..4_usize, reset in policy(), steps in prop::collection::vec(step(), 0..120)
    ) {
        run(min, min + more, reset, &steps)?;
    }

    #[test]
    fn whatever_came_before_the_end_is_the_end(
        min in 0..4_usize, more in 1..4_usize, reset in policy(), steps in prop::collection::vec(step(), 0..80)
    ) {
        let (mut machine, mut model) = run(min, min + more, reset, &steps)?;
        model.closing = true;
        let actions = machine.on(model.now, Event::Shutdown);
        model.apply(&actions)?;
        prop_assert!(model.waiting.is_empty(), "nobody is left waiting");
        for vm in std::mem::take(&mut model.making) {
            model.ready.insert(vm);
            let actions = machine.on(model.now, Event::Made(vm));
            model.apply(&actions)?;
        }
        for vm in model.leased.clone() {
            prop_assert!(!machine.is_over());
            model.in_order.insert(vm);
            let actions = machine.on(model.now, Event::Returned(vm, Ending::InOrder));
            model.apply(&actions)?;
        }
        for vm in std::mem::take(&mut model.resetting) {
            prop_assert!(!machine.is_over());
            model.ready.insert(vm);
            let actions = machine.on(model.now, Event::Reset(vm));
            model.apply(&actions)?;
        }
        for vm in std::mem::take(&mut model.retiring) {
            prop_assert!(!machine.is_over());
            let actions = machine.on(model.now, Event::Gone(vm));
            model.apply(&actions)?;
        }
        prop_assert!(machine.is_over());
        prop_assert_eq!(model.all(), 0);
    }

    #[test]
    fn left_alone_it_comes_to_min_and_to_rest(
        min in 0..4_usize, more in 1..4_usize, reset in policy(), steps in prop::collection::vec(step(), 0..80)
    ) {
        let steps: Vec<Step> =
            steps.into_iter().filter(|step| !matches!(step, Step::Shutdown | Step::Drain | Step::Fill(_))).collect();
        let (mut machine, mut model) = run(min, min + more, reset, &steps)?;
        for _ in 0..200 {
            let event = if let Some(vm) = model.silent.pop_first() {
                Event::Answered(vm)
            } else if let Some(&vm) = model.making.iter().next() {
                model.making.remove(&vm);
                model.ready.insert(vm);
                Event::Made(vm)
            } else if let Some(&vm) = model.leased.iter().next() {
                model.in_order.insert(vm);
                Event::Returned(vm, Ending::InOrder)
            } else if let Some(vm) = model.resetting.pop_first() {
                model.ready.insert(vm);
                Event::Reset(vm)
            } else if let Some(vm) = model.retiring.pop_first() {
                Event::Gone(vm)
            } else if model.waiting.is_empty()
                && (model.ready.len() == min || (model.ready.len() > min && machine.next_wake().is_none()))
            {
                break;
            } else {
                let wake = machine.next_wake();
                prop_assert!(wake.is_some(), "it sleeps for ever: {:?}", machine.status());
                model.now = model.now.max(wake.unwrap_or_default());
                Event::Tick
            };
            let actions = machine.on(model.now, event);
            model.apply(&actions)?;
        }
        prop_assert_eq!((model.ready.len(), model.all(), model.waiting.len()), (min, min, 0));
    }
}

#[test]
fn failures_are_retried_ever_more_slowly_and_told_to_who_waits() {
    let mut machine = Machine::new(settings(1, 2));
    let mut now = Duration::ZERO;
    let mut pauses = Vec::new();
    let mut vm = 0;
    assert_eq!(machine.on(now, Event::Tick), [Action::Make(0)]);
    for _ in 0..5 {
        assert_eq!(machine.on(now, Event::Failed(vm, "no disk".into())), []);
        let retry = machine.next_wake().unwrap();
        pauses.push((retry - now).as_millis());
        assert_eq!(machine.on(retry - ms(1), Event::Tick), [], "not before its time");
        now = retry;
        vm += 1;
        assert_eq!(machine.on(now, Event::Tick), [Action::Make(vm)]);
    }
    assert_eq!(pauses, [10, 20, 40, 80, 80]);
    // While it is being tried, callers wait; when it fails again, all are told why.
    assert_eq!(machine.on(now, Event::Acquire(1, now + ms(500))), []);
    let unhealthy = |ticket| Action::Refuse(ticket, PoolError::Unhealthy { why: "no disk".into() });
    assert_eq!(machine.on(now, Event::Failed(vm, "no disk".into())), [unhealthy(1)]);
    assert_eq!(machine.on(now, Event::Acquire(2, now + ms(500))), [unhealthy(2)]);
    // A person who asks for it is not told to wait.
    assert_eq!(machine.on(now, Event::Fill(1)), [Action::Make(vm + 1)]);
    assert_eq!(machine.on(now, Event::Made(vm + 1)), []);
    assert_eq!(machine.status().trouble, None);
    assert_eq!(machine.status().failed, 6);
}

#[test]
fn who_comes_while_a_vm_ends_waits_for_what_that_gives_back() {
    let mut machine = Machine::new(settings(0, 2));
    let unhealthy = |ticket| Action::Refuse(ticket, PoolError::Unhealthy { why: "no memory".into() });
    machine.on(ms(0), Event::Acquire(1, ms(900)));
    assert_eq!(machine.on(ms(0), Event::Made(0)), [Action::Grant(1, 0)]);
    // As many failures as open the breaker, while the first is in use.
    let mut now = ms(0);
    let mut actions = machine.on(now, Event::Acquire(2, ms(900)));
    for vm in 1..=3 {
        assert_eq!(actions, [Action::Make(vm)]);
        actions = machine.on(now, Event::Failed(vm, "no memory".into()));
        now = machine.next_wake().unwrap();
        if vm < 3 {
            actions = machine.on(now, Event::Tick);
        }
    }
    assert_eq!(actions, [unhealthy(2)]);
    let now = now - ms(1);
    assert_eq!(machine.on(now, Event::Acquire(3, ms(900))), [unhealthy(3)]);
    assert_eq!(machine.on(now, Event::Returned(0, Ending::InOrder)), [Action::Retire(0)]);
    assert_eq!(machine.on(now, Event::Acquire(4, ms(900))), [], "it is not told what is about to change");
    assert_eq!(machine.on(now, Event::Gone(0)), [Action::Make(4)]);
    assert_eq!(machine.on(now, Event::Made(4)), [Action::Grant(4, 4)]);
}

#[test]
fn idle_ones_above_min_go_and_old_ones_are_replaced() {
    let mut machine = Machine::new(settings(1, 3));
    machine.on(ms(0), Event::Fill(3));
    for vm in 0..3 {
        machine.on(ms(0), Event::Made(vm));
    }
    assert_eq!(machine.status().ready, 3);
    machine.on(ms(0), Event::Fill(1));
    assert_eq!(machine.next_wake(), Some(ms(300)));
    assert_eq!(machine.on(ms(300), Event::Tick), [Action::Retire(0), Action::Retire(1)]);
    machine.on(ms(301), Event::Gone(0));
    machine.on(ms(302), Event::Gone(1));
    assert_eq!(machine.next_wake(), Some(ms(1000)));
    let actions = machine.on(ms(1000), Event::Tick);
    assert!(matches!(actions[..], [Action::Retire(2), Action::Make(_)]), "{actions:?}");
}

#[test]
fn too_many_who_wait_are_turned_away() {
    let mut machine = Machine::new(settings(0, 1));
    for ticket in 0..6 {
        machine.on(ms(0), Event::Acquire(ticket, ms(100)));
    }
    let refused = machine.on(ms(0), Event::Acquire(6, ms(100)));
    assert_eq!(refused, [Action::Refuse(6, PoolError::Exhausted { waiting: 6 })]);
}

#[test]
fn what_ended_in_order_is_reset_and_only_where_that_was_asked_for() {
    let ready = |reset| {
        let mut machine = Machine::new(rewinding(1, 2, reset));
        machine.on(ms(0), Event::Tick);
        machine.on(ms(0), Event::Made(0));
        assert_eq!(machine.on(ms(0), Event::Acquire(1, ms(100)))[0], Action::Grant(1, 0));
        machine
    };
    let mut replaces = ready(ResetPolicy::Replace);
    assert_eq!(replaces.on(ms(1), Event::Returned(0, Ending::InOrder))[0], Action::Retire(0));
    let mut abnormal = ready(ResetPolicy::Rewind);
    assert_eq!(abnormal.on(ms(1), Event::Returned(0, Ending::Abnormal))[0], Action::Retire(0));
    let mut old = ready(ResetPolicy::Rewind);
    assert_eq!(old.on(ms(1000), Event::Returned(0, Ending::InOrder))[0], Action::Retire(0));

    let mut rewinds = ready(ResetPolicy::Rewind);
    // Another was begun when the first was handed over; it comes on top, and goes when nobody wants it.
    assert_eq!(rewinds.on(ms(1), Event::Returned(0, Ending::InOrder)), [Action::Reset(0)]);
    assert_eq!(rewinds.status().resetting, 1);
    rewinds.on(ms(1), Event::Made(1));
    assert_eq!(rewinds.on(ms(2), Event::Reset(0)), []);
    assert_eq!((rewinds.status().ready, rewinds.status().reset), (2, 1));
    // Handed over again, it is lost in its second reset: another is made.
    assert_eq!(rewinds.on(ms(3), Event::Acquire(2, ms(100)))[0], Action::Grant(2, 1));
    assert_eq!(rewinds.on(ms(3), Event::Acquire(3, ms(100)))[0], Action::Grant(3, 0));
    assert_eq!(rewinds.on(ms(4), Event::Returned(0, Ending::InOrder)), [Action::Reset(0)]);
    assert_eq!(rewinds.on(ms(4), Event::Lost(0)), [Action::Make(2)]);
    assert_eq!(rewinds.status().lost, 1);
    // What is drained meanwhile goes when it comes.
    assert_eq!(rewinds.on(ms(5), Event::Returned(1, Ending::InOrder)), [Action::Reset(1)]);
    assert_eq!(rewinds.on(ms(5), Event::Drain), [Action::Cancel(2)]);
    assert_eq!(rewinds.on(ms(6), Event::Reset(1)), [Action::Retire(1)]);
}
