//! Snapshots of the fake.

use serde_json::{Value, json};

use super::domains::{FakeDomain, refuse};
use super::{FakeLibvirt, State};
use crate::id::VmId;
use crate::libvirt::{
    DeleteScope, DomainEvent, DomainEventKind, LibvirtError, Result, Revert, SnapshotRecord, SnapshotRequest,
    Snapshots,
};
use crate::state::{StateReason, VmState};
use crate::xml::Node;

#[derive(Debug, Clone)]
pub(super) struct FakeSnapshot {
    name: String,
    parent: Option<String>,
    description: Option<String>,
    state: VmState,
    disk_only: bool,
    created: i64,
    contents: u64,
    /// The definition it was taken of.
    machine: String,
}

impl FakeSnapshot {
    fn xml(&self) -> String {
        let (state, memory) = match (self.disk_only, self.state) {
            (true, VmState::Running | VmState::Paused) => ("disk-snapshot", "no"),
            (_, VmState::Running) => ("running", "internal"),
            (_, VmState::Paused) => ("paused", "internal"),
            _ => ("shutoff", "no"),
        };
        Node::new("domainsnapshot")
            .with(Node::text("name", &self.name))
            .with_all(self.description.as_ref().map(|text| Node::text("description", text)))
            .with(Node::text("state", state))
            .with_all(self.parent.as_ref().map(|parent| Node::new("parent").with(Node::text("name", parent))))
            .with(Node::text("creationTime", self.created.to_string()))
            .with(Node::new("memory").attr("snapshot", memory))
            .with_all(Node::parse(&self.machine).ok())
            .to_xml()
    }
}

impl FakeDomain {
    fn snapshot(&self, name: &str) -> Result<&FakeSnapshot> {
        match self.snapshots.iter().find(|snapshot| snapshot.name == name) {
            Some(snapshot) => Ok(snapshot),
            None => refuse(
                72,
                format!("Domain snapshot not found: no domain snapshot with matching name '{name}'"),
            ),
        }
    }
}

/// The commands that stand in for QEMU's. `None`: not known here.
pub(super) fn monitor(state: &mut State, id: VmId, command: &str) -> Result<Option<String>> {
    let invalid = |error: serde_json::Error| LibvirtError::from_libvirt(1, &format!("not JSON: {error}"));
    let command: Value = serde_json::from_str(command).map_err(invalid)?;
    let domain = state.domain(id)?;
    let done = |value: Value| Some(json!({"return": value, "id": "fake-1"}).to_string());
    Ok(match command.get("execute").and_then(Value::as_str) {
        Some("query-status") => {
            done(json!({"status": domain.state.as_str(), "running": domain.state == VmState::Running}))
        }
        Some("human-monitor-command") => {
            let line = command.pointer("/arguments/command-line").and_then(Value::as_str).unwrap_or_default();
            let Some(name) = line.strip_prefix("loadvm ") else { return Ok(None) };
            match domain.snapshot(name) {
                Ok(snapshot) => {
                    domain.contents = snapshot.contents;
                    done(json!(""))
                }
                Err(_) => {
                    done(json!(format!("Error: Snapshot '{name}' does not exist in one or more devices\r\n")))
                }
            }
        }
        _ => None,
    })
}

impl FakeLibvirt {
    /// A number that changes with what a domain does, and that snapshots keep and give back; `None` when there is no
    /// such domain.
    #[must_use]
    pub fn contents(&self, name: &str) -> Option<u64> {
        self.lock().domains.iter().find(|domain| domain.name == name).map(|domain| domain.contents)
    }

    /// The guest does something that a restored snapshot takes back.
    pub fn guest_works(&self, name: &str) {
        for domain in self.lock().domains.iter_mut().filter(|domain| domain.name == name) {
            domain.contents += 1;
        }
    }
}

impl Snapshots for FakeLibvirt {
    fn create_snapshot(&self, id: VmId, request: &SnapshotRequest) -> Result<()> {
        let mut state = self.enter("create_snapshot", true)?;
        let invalid = |what: String| LibvirtError::from_libvirt(27, &format!("XML error: {what}"));
        let root = Node::parse(&request.xml).map_err(|error| invalid(error.to_string()))?;
        let name = root.text_at("name").unwrap_or_default().to_owned();
        if root.name() != "domainsnapshot" || name.is_empty() {
            return Err(invalid("not a snapshot with a name".into()));
        }
        let created = self.world.clock.now().unix_seconds();
        let (full, mounted) = (state.disk_full, state.mounted.clone());
        let domain = state.domain(id)?;
        if request.redefine {
            domain.snapshot(&name)?;
            domain.current_snapshot = Some(name);
            return Ok(());
        }
        if domain.snapshot(&name).is_ok() {
            return refuse(55, format!("operation failed: domain snapshot {name} already exists"));
        }
        if full {
            return refuse(1, "internal error: unable to save snapshot: No space left on device");
        }
        if domain.is_active() && !request.disk_only && mounted.contains(&domain.name) {
            let message = "Migration is disabled when VirtFS export path '/x' is mounted in the guest";
            return refuse(9, format!("operation failed: {message}"));
        }
        domain.snapshots.push(FakeSnapshot {
            parent: domain.current_snapshot.replace(name.clone()),
            description: root.text_at("description").map(str::to_owned),
            state: domain.state,
            disk_only: request.disk_only,
            created,
            contents: domain.contents,
            machine: domain.xml().to_owned(),
            name,
        });
        Ok(())
    }

    fn snapshots(&self, id: VmId) -> Result<Vec<SnapshotRecord>> {
        let mut state = self.enter("snapshots", false)?;
        let domain = state.domain(id)?;
        let record = |snapshot: &FakeSnapshot| SnapshotRecord {
            name: snapshot.name.clone(),
            xml: snapshot.xml(),
            current: domain.current_snapshot.as_deref() == Some(&snapshot.name),
        };
        Ok(domain.snapshots.iter().map(record).collect())
    }

    fn revert_snapshot(&self, id: VmId, name: &str, revert: Revert) -> Result<()> {
        let mut state = self.enter("revert_snapshot", true)?;
        let domain = state.domain(id)?;
        let snapshot = domain.snapshot(name)?.clone();
        let target = match (revert, snapshot.disk_only) {
            (Revert::Running, _) => VmState::Running,
            (Revert::Paused, _) => VmState::Paused,
            (Revert::AsTaken, true) => VmState::Shutoff,
            (Revert::AsTaken, false) => snapshot.state,
        };
        let was_active = domain.is_active();
        domain.limit = None;
        domain.contents = snapshot.contents;
        domain.current_snapshot = Some(snapshot.name);
        (domain.state, domain.reason) = (target, StateReason::Snapshot);
        domain.active = if target == VmState::Shutoff { None } else { Some(snapshot.machine) };
        let name = domain.name.clone();
        drop(state);
        // As the QEMU driver does: the old QEMU goes, a new one comes.
        let mut kinds = Vec::new();
        if was_active {
            kinds.push(DomainEventKind::Stopped);
        }
        match target {
            VmState::Running => kinds.extend([DomainEventKind::Started, DomainEventKind::Resumed]),
            VmState::Paused => kinds.extend([DomainEventKind::Started, DomainEventKind::Paused]),
            _ => {}
        }
        for kind in kinds {
            self.tell(&DomainEvent { id, name: name.clone(), kind, detail: 0 });
        }
        Ok(())
    }

    fn delete_snapshot(&self, id: VmId, name: &str, scope: DeleteScope) -> Result<()> {
        let mut state = self.enter("delete_snapshot", true)?;
        let domain = state.domain(id)?;
        let parent = domain.snapshot(name)?.parent.clone();
        let mut doomed = vec![name.to_owned()];
        if scope == DeleteScope::WithChildren {
            let mut next = 0;
            while let Some(above) = doomed.get(next).cloned() {
                let children = domain.snapshots.iter().filter(|s| s.parent.as_ref() == Some(&above));
                doomed.extend(children.map(|child| child.name.clone()));
                next += 1;
            }
        }
        domain.snapshots.retain(|snapshot| !doomed.contains(&snapshot.name));
        for child in domain.snapshots.iter_mut().filter(|s| s.parent.as_deref() == Some(name)) {
            child.parent.clone_from(&parent);
        }
        if domain.current_snapshot.as_ref().is_some_and(|current| doomed.contains(current)) {
            domain.current_snapshot = parent;
        }
        Ok(())
    }
}
