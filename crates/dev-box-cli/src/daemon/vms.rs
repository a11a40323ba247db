//! The VMs the daemon owns.
//!
//! ```text
//! reserve ──▶ starting ──filled──▶ ready ──its session closed──▶ lost ──┐
//!                │               ▲   │  │                              │ taken
//!                │               │   │  └──taken──▶ removing ──▶ () ◀──┘
//!                └──dropped──▶ ()└─paused (taken and lost like one that is ready)
//! ```
//! A name is taken from the moment it is asked for, so that two who want the same one do not both make a VM.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dev_box::comm::Session;
use dev_box::core::id::VmName;
use dev_box::exec::ReadyVm;
use dev_box::provision::holds::Holds;
use dev_box::provision::provisioner::{Original, Paused};
use tokio::sync::Notify;

use super::api::{VmInfo, VmState};
use crate::args::VmOptions;

/// How many lost VMs are remembered by their names.
const LOST: usize = 64;

/// Why a VM does not serve.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum VmsError {
    #[error("there is no VM {0} (`dev-box ps` lists those there are)")]
    NotFound(VmName),
    #[error("there is a VM {0} already: choose another name, or `dev-box rm {0}`")]
    Exists(VmName),
    #[error("VM {name} is {state}: try again in a moment")]
    NotReady { name: VmName, state: VmState },
    #[error("VM {0} is paused: `dev-box resume {0}` lets it run on")]
    Paused(VmName),
    #[error("VM {name} is lost: {reason}; `dev-box rm {name}` frees its name")]
    Lost { name: VmName, reason: String },
}

/// The registry. Clones are the same one.
#[derive(Debug, Clone, Default)]
pub(crate) struct Vms(Arc<Registry>);

#[derive(Debug, Default)]
struct Registry {
    /// Those that were paused in response to what they did, which nobody asked the daemon for.
    holds: Holds,
    entries: Mutex<BTreeMap<VmName, Entry>>,
    /// A name is free again.
    freed: Notify,
}

#[derive(Debug)]
struct Entry {
    info: VmInfo,
    machine: Option<ReadyVm>,
    /// While it is.
    paused: Option<Paused>,
}

/// A name that is taken for a VM which is being made; free again when this is dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    vms: Vms,
    info: VmInfo,
    filled: bool,
}

impl Vms {
    /// None yet, of a provisioner that holds some of its VMs so.
    pub(crate) fn held_by(holds: Holds) -> Self {
        Self(Arc::new(Registry { holds, ..Registry::default() }))
    }

    fn is_held(&self, entry: &Entry) -> bool {
        entry.info.domain.as_ref().is_some_and(|domain| self.0.holds.holds(domain))
    }

    /// As it is told to others.
    fn shown(&self, entry: &Entry) -> VmInfo {
        let mut info = entry.info.clone();
        if info.state == VmState::Ready && self.is_held(entry) {
            info.state = VmState::Paused;
        }
        info
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<VmName, Entry>> {
        // A map of owned values is whole whatever panicked beside it.
        self.0.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a name.
    pub(crate) fn reserve(&self, info: VmInfo) -> Result<Reservation, VmsError> {
        let mut entries = self.entries();
        let name = info.name.clone();
        if entries.contains_key(&name) {
            return Err(VmsError::Exists(name));
        }
        entries.insert(name, Entry { info: info.clone(), machine: None, paused: None });
        Ok(Reservation { vms: self.clone(), info, filled: false })
    }

    /// All of them, by name.
    pub(crate) fn list(&self) -> Vec<VmInfo> {
        self.entries().values().map(|entry| self.shown(entry)).collect()
    }

    pub(crate) fn get(&self, name: &VmName) -> Result<VmInfo, VmsError> {
        self.entries()
            .get(name)
            .map(|entry| self.shown(entry))
            .ok_or_else(|| VmsError::NotFound(name.clone()))
    }

    /// The domain and the channel of a VM that is ready.
    pub(crate) fn channel(&self, name: &VmName) -> Result<(VmName, Session), VmsError> {
        let entries = self.entries();
        let entry = entries.get(name).ok_or_else(|| VmsError::NotFound(name.clone()))?;
        match (&entry.info.state, &entry.machine) {
            (VmState::Ready, _) if self.is_held(entry) => Err(VmsError::Paused(name.clone())),
            (VmState::Ready, Some(machine)) => Ok((machine.name.clone(), machine.session.clone())),
            (VmState::Paused, _) => Err(VmsError::Paused(name.clone())),
            (VmState::Lost { reason }, _) => {
                Err(VmsError::Lost { name: name.clone(), reason: reason.clone() })
            }
            (state, _) => Err(VmsError::NotReady { name: name.clone(), state: state.clone() }),
        }
    }

    /// A VM that is ready, to be forked, and what it was asked to be like.
    pub(crate) fn original(&self, name: &VmName) -> Result<(Original, VmOptions), VmsError> {
        let (vm, session) = self.channel(name)?;
        let entries = self.entries();
        let entry = entries.get(name).ok_or_else(|| VmsError::NotFound(name.clone()))?;
        let machine = entry.machine.as_ref().filter(|machine| machine.name == vm);
        let facts = machine.ok_or_else(|| VmsError::NotFound(name.clone()))?.facts.clone();
        let options = entry.info.options.clone();
        Ok((Original { vm, session, facts, mounts: options.mount.mounts() }, options))
    }

    /// The domain and the channel of a VM that can be let run on: also of one that is listed as ready, and that an administrator paused.
    pub(crate) fn resumable(&self, name: &VmName) -> Result<(VmName, Session), VmsError> {
        match self.entries().get(name) {
            Some(Entry { info, machine: Some(machine), .. })
                if matches!(info.state, VmState::Ready | VmState::Paused) =>
            {
                return Ok((machine.name.clone(), machine.session.clone()));
            }
            _ => {}
        }
        self.channel(name)
    }

    /// Has it on record that a VM is paused, until that is dropped, or that it runs. One that went meanwhile is left alone.
    pub(crate) fn set_paused(&self, name: &VmName, domain: &VmName, paused: Option<Paused>) {
        if let Some(entry) = self.entries().get_mut(name)
            && entry.info.domain.as_ref() == Some(domain)
            && matches!(entry.info.state, VmState::Ready | VmState::Paused)
        {
            entry.info.state = if paused.is_some() { VmState::Paused } else { VmState::Ready };
            entry.paused = paused;
        }
    }

    /// Takes a VM to be removed; `None` inside where there is nothing left of it but its name. Call
    /// [`forget`](Self::forget) when it is gone.
    pub(crate) fn take(&self, name: &VmName) -> Result<Option<ReadyVm>, VmsError> {
        let mut entries = self.entries();
        let entry = entries.get_mut(name).ok_or_else(|| VmsError::NotFound(name.clone()))?;
        match &entry.info.state {
            VmState::Ready | VmState::Paused | VmState::Lost { .. } => {
                entry.info.state = VmState::Removing;
                Ok(entry.machine.take())
            }
            state => Err(VmsError::NotReady { name: name.clone(), state: state.clone() }),
        }
    }

    /// Marks a VM as lost; gives what is left of it to be taken down. `None` when it was being removed anyway.
    pub(crate) fn lose(&self, name: &VmName, domain: &VmName, reason: &str) -> Option<ReadyVm> {
        let mut entries = self.entries();
        let entry = entries.get_mut(name)?;
        // A VM that was reset in place has the same domain, under this name perhaps, and a session that lives.
        let closed = entry.machine.as_ref().is_some_and(|machine| machine.session.close_reason().is_some());
        let there = matches!(entry.info.state, VmState::Ready | VmState::Paused);
        if !closed || !there || entry.info.domain.as_ref() != Some(domain) {
            return None;
        }
        entry.info.state = VmState::Lost { reason: reason.to_owned() };
        let machine = entry.machine.take();
        let lost =
            |entry: &Entry| matches!(entry.info.state, VmState::Lost { .. }) && entry.machine.is_none();
        if entries.values().filter(|entry| lost(entry)).count() > LOST
            && let Some(oldest) = entries
                .values()
                .filter(|entry| lost(entry))
                .min_by_key(|entry| entry.info.created_at.unix_nanos())
                .map(|entry| entry.info.name.clone())
        {
            entries.remove(&oldest);
        }
        machine
    }

    /// Marks a VM as lost that its holder looks after, and takes down.
    pub(crate) fn lose_lent(&self, name: &VmName, reason: &str) {
        if let Some(entry) = self.entries().get_mut(name)
            && matches!(entry.info.state, VmState::Ready | VmState::Paused)
        {
            entry.info.state = VmState::Lost { reason: reason.to_owned() };
        }
    }

    /// A VM is gone, and its name free.
    pub(crate) fn forget(&self, name: &VmName) {
        self.entries().remove(name);
        self.0.freed.notify_waiters();
    }

    /// Waits until there is no VM of that name.
    pub(crate) async fn gone(&self, name: &VmName) {
        loop {
            let freed = self.0.freed.notified();
            if !self.entries().contains_key(name) {
                return;
            }
            freed.await;
        }
    }

    /// Takes all that can be taken, to be removed.
    pub(crate) fn take_all(&self) -> Vec<(VmName, ReadyVm)> {
        let names: Vec<VmName> = self.entries().keys().cloned().collect();
        names.into_iter().filter_map(|name| Some((name.clone(), self.take(&name).ok()??))).collect()
    }
}

impl Reservation {
    /// What the VM is to be like.
    pub(crate) fn options(&self) -> &VmOptions {
        &self.info.options
    }

    pub(crate) fn name(&self) -> &VmName {
        &self.info.name
    }

    /// What a successor of this daemon has to know of the VM, besides what whoever made it does.
    pub(crate) fn note(&self, domain: &VmName) -> serde_json::Value {
        let info = VmInfo { state: VmState::Ready, domain: Some(domain.clone()), ..self.info.clone() };
        serde_json::to_value(info).unwrap_or_default()
    }

    /// The VM is there.
    pub(crate) fn fill(mut self, machine: ReadyVm) -> VmInfo {
        let info = VmInfo { state: VmState::Ready, domain: Some(machine.name.clone()), ..self.info.clone() };
        let entry = Entry { info: info.clone(), machine: Some(machine), paused: None };
        self.vms.entries().insert(info.name.clone(), entry);
        self.filled = true;
        info
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.filled {
            self.vms.forget(&self.info.name);
        }
    }
}
