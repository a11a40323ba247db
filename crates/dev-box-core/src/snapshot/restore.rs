//! Going back, by a restart or in place.

use serde_json::{Value, json};

use super::{Contents, SnapshotError, SnapshotName, found, record};
use crate::id::VmId;
use crate::libvirt::{Libvirt, Revert, SnapshotRequest};
use crate::state::{Operation, VmState};
use crate::vm::enforce;

/// How.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RestoreMode {
    /// Libvirt restarts QEMU.
    #[default]
    Restart,
    /// The running QEMU loads the state itself.
    InPlace,
}

/// How to restore, and how to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RestoreOptions {
    /// How.
    pub mode: RestoreMode,
    /// Running, paused, or as the snapshot was taken.
    pub then: Revert,
}

impl RestoreOptions {
    /// By a restart; as taken.
    #[must_use]
    pub fn restart() -> Self {
        Self::default()
    }

    /// In place; as taken.
    #[must_use]
    pub fn in_place() -> Self {
        Self { mode: RestoreMode::InPlace, ..Self::default() }
    }

    /// Running afterwards, or paused.
    #[must_use]
    pub fn then(mut self, then: Revert) -> Self {
        self.then = then;
        self
    }
}

pub(super) fn restore(
    libvirt: &dyn Libvirt,
    id: VmId,
    vm: &str,
    name: &SnapshotName,
    options: RestoreOptions,
) -> Result<(), SnapshotError> {
    let report = libvirt.state(id)?;
    report.state.after(Operation::Restore, report.persistent)?;
    match options.mode {
        RestoreMode::Restart => {
            libvirt
                .revert_snapshot(id, name.as_str(), options.then)
                .map_err(|error| found(error, vm, name))?;
            // A new QEMU, or none.
            if libvirt.state(id)?.state.is_active() { Ok(enforce(libvirt, id)?) } else { Ok(()) }
        }
        RestoreMode::InPlace => in_place(libvirt, id, vm, name, report.state, options.then),
    }
}

fn in_place(
    libvirt: &dyn Libvirt,
    id: VmId,
    vm: &str,
    name: &SnapshotName,
    state: VmState,
    then: Revert,
) -> Result<(), SnapshotError> {
    let missing = || SnapshotError::NotFound { vm: vm.to_owned(), name: name.clone() };
    if !state.is_active() {
        return Err(SnapshotError::NotRunning { vm: vm.to_owned() });
    }
    let records = libvirt.snapshots(id)?;
    let kept = records.iter().find(|record| record.name == name.as_str()).ok_or_else(missing)?;
    let snapshot = record::read(kept)?.ok_or_else(missing)?;
    if snapshot.contents != Contents::MemoryAndDisk {
        return Err(SnapshotError::NoMemory { name: name.clone() });
    }
    // Paused through libvirt, which then knows; QEMU stays paused over the load, so that no moment of the old life
    // and none of the new one runs unasked.
    if state == VmState::Running {
        libvirt.suspend(id)?;
    }
    let command = json!({
        "execute": "human-monitor-command",
        "arguments": {"command-line": format!("loadvm {name}")},
    });
    let reply = libvirt.monitor(id, &command.to_string())?;
    load_succeeded(&reply).map_err(|text| SnapshotError::Load {
        vm: vm.to_owned(),
        name: name.clone(),
        text,
    })?;
    // Libvirt does not know what QEMU did. The VM is right without this; only "current" would not be.
    let current =
        SnapshotRequest { xml: kept.xml.clone(), disk_only: false, redefine: true, validate: false };
    if let Err(error) = libvirt.create_snapshot(id, &current) {
        tracing::warn!(vm, %name, %error, "libvirt's record of the current snapshot was not brought up to date");
    }
    let runs = match then {
        Revert::AsTaken => snapshot.state == VmState::Running,
        Revert::Running => true,
        Revert::Paused => false,
    };
    if runs {
        libvirt.resume(id)?;
    }
    Ok(())
}

/// `loadvm` says nothing when it succeeds.
fn load_succeeded(reply: &str) -> Result<(), String> {
    let cut = |text: &str| text.trim().chars().filter(|c| !c.is_control()).take(500).collect::<String>();
    match serde_json::from_str::<Value>(reply) {
        Ok(reply) => match (reply.get("return").and_then(Value::as_str), reply.get("error")) {
            (Some(""), None) => Ok(()),
            (Some(text), _) => Err(cut(text)),
            (None, Some(error)) => Err(cut(&error.to_string())),
            (None, None) => Err("no answer of QEMU's".into()),
        },
        Err(_) => Err("an answer that is not JSON".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_qemu_says() {
        assert_eq!(load_succeeded(r#"{"return": "", "id": "libvirt-1"}"#), Ok(()));
        let text = load_succeeded(r#"{"return": "Error: no\r\n"}"#).unwrap_err();
        assert_eq!(text, "Error: no");
        assert!(
            load_succeeded(r#"{"error": {"class": "CommandNotFound"}}"#)
                .unwrap_err()
                .contains("CommandNotFound")
        );
        assert!(load_succeeded("{}").is_err());
        assert!(load_succeeded("").is_err());
    }
}
