//! Verification while VMs run: [`Watch`] decides, [`run`] does.
//!
//! ```text
//!   unseen --sound--> sound --unsound--> (pause, restore) --> held --sound--> (resume) --> sound
//!     |                                                      ^    |
//!     +--unsound---------------------------------------------+    +--unsound--> (pause, restore again) --> held
//!
//!   unseen or sound --the host is another--> (pause, forget) --> doubted --sound--> (resume) --> sound
//!                                                                   +--unsound--> (pause, restore) --> held
//! ```
//!
//! A VM whose rules are not as they should be is paused before anything else, so that what it does meanwhile is nothing; and all such VMs
//! before the first is restored.
//! It runs again once a verification finds every layer in place. What cannot be verified is neither sound nor unsound: it
//! stays as it is, and counts as unverified ([`Watch::verified_within`]). What only hinders a VM's packets is no reason to hold
//! the VM: it is told when it begins, and when it is over.
//!
//! A change of `bridge-nf-call-iptables` is a change of the way that all packets take. No layer needs either value, but what was found
//! was found under the other one: every VM stands still until all layers were looked at anew, once for each change.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dev_box_core::id::VmName;
use futures::StreamExt as _;
use futures::future::join_all;
use futures::stream::FuturesUnordered;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::events::NetEventKind;

/// From one round to the next: a flushed firewall is noticed within two seconds even when a round takes one.
pub const PERIOD: Duration = Duration::from_secs(1);

/// How old a verification may be that is good enough to hand a VM out.
pub const FRESH: Duration = Duration::from_secs(2);

/// A future with its type hidden.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What verification found of a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finding {
    /// Every layer stands.
    Sound,
    /// Every layer stands, but what the VM may send may not get out; in words.
    Hindered(String),
    /// Something does not stand; in words.
    Unsound(String),
    /// It could not be found out; in words.
    Unknown(String),
}

/// What is told when a hindrance is over.
const UNHINDERED: &str = "nothing hinders the VM's packets any more";

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Stop the VM's CPUs.
    Pause(VmName),
    /// Put its rules back.
    Restore(VmName),
    /// Let it run again, and say so once it does.
    Resume(VmName),
    /// Tell whoever keeps records.
    Report(VmName, NetEventKind),
    /// Tell them what concerns all VMs, once.
    Announce(NetEventKind),
    /// Take nothing that was found before for granted.
    Forget,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Unseen,
    Sound,
    /// Stands still until it was looked at: whether something is wrong is not known.
    Doubted,
    Held,
}

#[derive(Debug, Clone)]
struct Seen {
    state: State,
    verified: Option<Instant>,
    hindrance: Option<String>,
}

impl Seen {
    const NOT_YET: Self = Self { state: State::Unseen, verified: None, hindrance: None };
}

/// The state of all VMs that are watched. Pure: time and findings come in, actions go out.
#[derive(Debug, Clone, Default)]
pub struct Watch {
    vms: BTreeMap<VmName, Seen>,
    /// `bridge-nf-call-iptables`, once it was looked at.
    bridged: Option<Option<bool>>,
}

impl Watch {
    /// Nobody is watched yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes a round's findings, begun at `now`, and says what to do, in order. A VM that is not among them is gone.
    pub fn round(&mut self, now: Instant, findings: BTreeMap<VmName, Finding>) -> Vec<Action> {
        let mut actions = Vec::new();
        self.vms.retain(|vm, _| findings.contains_key(vm));
        for (vm, finding) in findings {
            let seen = self.vms.entry(vm.clone()).or_insert(Seen::NOT_YET);
            match (finding, seen.state) {
                (finding @ (Finding::Sound | Finding::Hindered(_)), state) => {
                    let hindrance = match finding {
                        Finding::Hindered(hindrance) => Some(hindrance),
                        _ => None,
                    };
                    // Whoever gets a VM that is hindered looks for himself how much.
                    seen.verified = hindrance.is_none().then_some(now);
                    seen.state = State::Sound;
                    if matches!(state, State::Held | State::Doubted) {
                        actions.push(Action::Resume(vm.clone()));
                    }
                    if seen.hindrance != hindrance {
                        let finding = hindrance.clone().unwrap_or_else(|| UNHINDERED.to_owned());
                        actions.push(Action::Report(vm, NetEventKind::HostChanged { finding }));
                        seen.hindrance = hindrance;
                    }
                }
                (Finding::Unsound(_), State::Held) => {
                    // Somebody else may have let it run.
                    actions.push(Action::Pause(vm.clone()));
                    actions.push(Action::Restore(vm));
                }
                (Finding::Unsound(finding), State::Unseen | State::Sound | State::Doubted) => {
                    seen.verified = None;
                    seen.state = State::Held;
                    actions.push(Action::Pause(vm.clone()));
                    actions
                        .push(Action::Report(vm.clone(), NetEventKind::Tampered { finding, paused: true }));
                    actions.push(Action::Restore(vm));
                }
                // It may not have been possible to stop it when it was to be.
                (Finding::Unknown(_), State::Doubted) => actions.push(Action::Pause(vm)),
                (Finding::Unknown(_), _) => {}
            }
        }
        actions
    }

    /// Takes what `bridge-nf-call-iptables` is. Where it is another than before every VM stands still until the next finding, which has
    /// to come of a look at everything.
    pub fn bridged(&mut self, now: Option<bool>) -> Vec<Action> {
        let Some(before) = self.bridged.replace(now).filter(|before| *before != now) else {
            return Vec::new();
        };
        let mut actions = Vec::new();
        for (vm, seen) in &mut self.vms {
            seen.verified = None;
            if seen.state != State::Held {
                seen.state = State::Doubted;
                actions.push(Action::Pause(vm.clone()));
                actions.push(Action::Report(vm.clone(), NetEventKind::Doubted));
            }
        }
        actions.push(Action::Forget);
        if !self.vms.is_empty() {
            let word = |value| match value {
                Some(true) => "1",
                Some(false) => "0",
                None => "absent (br_netfilter is not loaded)",
            };
            let (before, now, vms) = (word(before), word(now), self.vms.len());
            let finding = format!(
                "net.bridge.bridge-nf-call-iptables was {before} and is {now}: no layer needs it; VMs that stand still until all \
                 layers were verified under it: {vms}"
            );
            actions.push(Action::Announce(NetEventKind::HostChanged { finding }));
        }
        actions
    }

    /// Takes that a VM could not be let run again: it is tried with the next finding.
    pub fn not_resumed(&mut self, vm: &VmName) {
        if let Some(seen) = self.vms.get_mut(vm) {
            seen.state = State::Doubted;
            seen.verified = None;
        }
    }

    /// Whether the VM was found sound by a verification that began at most `limit` before `now`.
    pub fn verified_within(&self, vm: &VmName, now: Instant, limit: Duration) -> bool {
        let verified = self.vms.get(vm).and_then(|seen| seen.verified);
        verified.is_some_and(|verified| now.saturating_duration_since(verified) <= limit)
    }

    /// Whether the VM is held until its rules are back, or were looked at.
    pub fn is_held(&self, vm: &VmName) -> bool {
        self.vms.get(vm).is_some_and(|seen| matches!(seen.state, State::Held | State::Doubted))
    }
}

/// Who has the VMs: looks at their network, stops them and lets them run.
pub trait Custody: Send + Sync {
    /// What holds of each VM right now. Those that are `passed_over` are not waited for: they are just being put back.
    fn verify<'a>(&'a self, passed_over: &'a BTreeSet<VmName>) -> BoxFuture<'a, BTreeMap<VmName, Finding>>;

    /// `bridge-nf-call-iptables` of the host; `None` while it has none.
    fn bridge_netfilter(&self) -> Option<bool>;

    /// Stops the VM's CPUs. A VM that is gone, or stands still already, is no failure.
    fn pause<'a>(&'a self, vm: &'a VmName) -> BoxFuture<'a, Result<(), String>>;

    /// Puts every layer of its network back.
    fn restore<'a>(&'a self, vm: &'a VmName) -> BoxFuture<'a, Result<(), String>>;

    /// Lets a VM run again that [`Custody::pause`] stopped; one that stands still by somebody else's will is left so.
    fn resume<'a>(&'a self, vm: &'a VmName) -> BoxFuture<'a, Result<(), String>>;

    /// Takes note of an event.
    fn report(&self, vm: &VmName, event: NetEventKind);

    /// Takes note of what concerns all of them.
    fn announce(&self, event: NetEventKind);

    /// Gives up what it knows of any rules: the next verification looks at all of them.
    fn forget(&self);
}

/// A [`Watch`] that a driver feeds; clones see the same one.
#[derive(Debug, Clone, Default)]
pub struct WatchHandle(Arc<Mutex<Watch>>);

impl WatchHandle {
    fn watch(&self) -> MutexGuard<'_, Watch> {
        // Whole after every round, whatever panicked beside it.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the VM's network was verified recently enough to hand it out; see [`FRESH`].
    pub fn is_fresh(&self, vm: &VmName) -> bool {
        self.watch().verified_within(vm, Instant::now(), FRESH)
    }

    /// See [`Watch::is_held`].
    pub fn is_held(&self, vm: &VmName) -> bool {
        self.watch().is_held(vm)
    }
}

/// Verifies all VMs every [`PERIOD`], for as long as it is polled.
pub async fn run(custody: &dyn Custody, handle: &WatchHandle) {
    let mut ticks = interval(PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        round(custody, handle).await;
    }
}

/// One round: a look, and another one as soon as what had to be restored is. That takes seconds, in which the other VMs are looked at
/// as ever.
pub async fn round(custody: &dyn Custody, handle: &WatchHandle) {
    let (mut restoring, mut restores, mut tried) =
        (BTreeSet::new(), FuturesUnordered::new(), BTreeSet::new());
    loop {
        let begun = Instant::now();
        let (wanted, restored) = {
            let passed_over = restoring.clone();
            let (mut restored, mut looking) = (Vec::new(), pin!(look(custody, handle, &passed_over)));
            loop {
                tokio::select! {
                    wanted = &mut looking => break (wanted, restored),
                    Some(vm) = restores.next() => restored.push(vm),
                }
            }
        };
        restoring.retain(|vm| !restored.contains(vm));
        // Once a round: what cannot be restored is no reason to look again at once.
        for vm in wanted.into_iter().filter(|vm| tried.insert(vm.clone())) {
            restoring.insert(vm.clone());
            restores.push(async move {
                perform(custody, Action::Restore(vm.clone())).await;
                vm
            });
        }
        if !restored.is_empty() {
            // They were passed over.
            continue;
        }
        if restores.is_empty() {
            return;
        }
        tokio::select! {
            Some(vm) = restores.next() => { restoring.remove(&vm); }
            () = sleep_until(begun + PERIOD) => {}
        }
    }
}

/// Looks at all VMs but these, whose rules are just being put back, and does what can be done at once. Whose rules are to be put back is
/// returned: they stand still.
async fn look(custody: &dyn Custody, handle: &WatchHandle, passed_over: &BTreeSet<VmName>) -> Vec<VmName> {
    let bridged = custody.bridge_netfilter();
    let changed = handle.watch().bridged(bridged);
    carry_out(custody, handle, changed).await;
    let begun = Instant::now();
    let mut findings = custody.verify(passed_over).await;
    for (vm, finding) in &mut findings {
        if passed_over.contains(vm) {
            *finding = Finding::Unknown("its rules are just being put back".to_owned());
        } else if let Finding::Unknown(why) = finding {
            tracing::warn!(%vm, why, "the VM's network could not be verified");
        }
    }
    let actions = handle.watch().round(begun, findings);
    carry_out(custody, handle, actions).await
}

/// Everybody who is to stand still does so before anything else is done, which may take long.
async fn carry_out(custody: &dyn Custody, handle: &WatchHandle, actions: Vec<Action>) -> Vec<VmName> {
    let is_pause = |action: &Action| matches!(action, Action::Pause(_));
    let (pauses, others): (Vec<Action>, Vec<Action>) = actions.into_iter().partition(is_pause);
    join_all(pauses.into_iter().map(|pause| perform(custody, pause))).await;
    let mut to_be_restored = Vec::new();
    for action in others {
        match action {
            Action::Restore(vm) => to_be_restored.push(vm),
            Action::Resume(vm) => match perform(custody, Action::Resume(vm.clone())).await {
                true => custody.report(&vm, NetEventKind::Restored),
                false => handle.watch().not_resumed(&vm),
            },
            other => {
                perform(custody, other).await;
            }
        }
    }
    to_be_restored
}

/// Whether it could be done.
async fn perform(custody: &dyn Custody, action: Action) -> bool {
    let (vm, what, done) = match &action {
        Action::Pause(vm) => (vm, "pause", custody.pause(vm).await),
        Action::Restore(vm) => (vm, "restore the network of", custody.restore(vm).await),
        Action::Resume(vm) => (vm, "resume", custody.resume(vm).await),
        Action::Report(vm, event) => {
            custody.report(vm, event.clone());
            return true;
        }
        Action::Announce(event) => {
            custody.announce(event.clone());
            return true;
        }
        Action::Forget => {
            custody.forget();
            return true;
        }
    };
    if let Err(error) = &done {
        // The next round finds it as it is, and tries again.
        tracing::error!(%vm, error, "could not {what} the VM");
    }
    done.is_ok()
}

#[cfg(test)]
mod tests;
