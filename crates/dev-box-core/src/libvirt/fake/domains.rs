//! Domains of the fake.

use std::time::Duration;

use uuid::Uuid;

use super::snapshots::FakeSnapshot;
use super::{FakeLibvirt, State};
use crate::id::VmId;
use crate::libvirt::{
    BlockStats, DomainEvent, DomainEventKind, DomainStats, DomainSummary, Domains, LibvirtError, NicStats,
    PowerMethod, Result, StartMode, StateReport, UndefineMode, XmlView,
};
use crate::size::ByteSize;
use crate::state::{StateReason, VmState};
use crate::xml::Node;

#[derive(Debug, Clone)]
pub(super) struct FakeDomain {
    pub(super) id: VmId,
    pub(super) name: String,
    /// The next definition, of a persistent one.
    pub(super) inactive: Option<String>,
    /// The definition it runs with.
    pub(super) active: Option<String>,
    pub(super) state: VmState,
    pub(super) reason: StateReason,
    pub(super) snapshots: Vec<FakeSnapshot>,
    pub(super) current_snapshot: Option<String>,
    /// Stands for what is in memory and on disk: snapshots keep and give back this number.
    pub(super) contents: u64,
    /// The memory limit in force.
    pub(super) limit: Option<ByteSize>,
}

impl FakeDomain {
    pub(super) fn is_active(&self) -> bool {
        self.active.is_some()
    }

    pub(super) fn xml(&self) -> &str {
        self.active.as_deref().or(self.inactive.as_deref()).unwrap_or_default()
    }

    fn summary(&self) -> DomainSummary {
        DomainSummary {
            id: self.id,
            name: self.name.clone(),
            active: self.is_active(),
            persistent: self.inactive.is_some(),
        }
    }
}

/// An error with libvirt's number for it.
pub(super) fn refuse<T>(number: u32, message: impl AsRef<str>) -> Result<T> {
    Err(LibvirtError::from_libvirt(number, message.as_ref()))
}

impl State {
    pub(super) fn domain(&mut self, id: VmId) -> Result<&mut FakeDomain> {
        match self.domains.iter_mut().find(|domain| domain.id == id) {
            Some(domain) => Ok(domain),
            None => refuse(42, format!("Domain not found: no domain with matching uuid '{id}'")),
        }
    }

    fn running(&mut self, id: VmId) -> Result<&mut FakeDomain> {
        let domain = self.domain(id)?;
        if domain.is_active() {
            Ok(domain)
        } else {
            refuse(55, "Requested operation is not valid: domain is not running")
        }
    }

    /// The domain stops: a transient one is gone.
    pub(super) fn halt(&mut self, id: VmId, reason: StateReason) {
        if let Ok(domain) = self.domain(id) {
            domain.active = None;
            domain.limit = None;
            domain.state = VmState::Shutoff;
            domain.reason = reason;
            domain.contents += 1;
        }
        self.domains.retain(|domain| domain.is_active() || domain.inactive.is_some());
    }

    /// Checks a definition and gives name and UUID.
    fn read(&self, xml: &str) -> Result<(String, VmId)> {
        let invalid = |what: String| LibvirtError::from_libvirt(27, &format!("XML error: {what}"));
        let root = Node::parse(xml).map_err(|error| invalid(error.to_string()))?;
        if root.name() != "domain" {
            return Err(invalid(format!("unexpected root element <{}>", root.name())));
        }
        if !matches!(root.get("type"), Some("kvm" | "qemu" | "test")) {
            return Err(invalid("domain type is missing or unknown".into()));
        }
        let name = root.text_at("name").unwrap_or_default();
        if name.is_empty() || name.contains('/') {
            return Err(invalid(format!("name {name:?} is missing or cannot be used")));
        }
        if root.text_at("memory").is_none() || root.at("os/type").is_none() {
            return Err(invalid("memory and os type must be there".into()));
        }
        let id = match root.text_at("uuid") {
            Some(text) => text.parse().map_err(|_| invalid("malformed uuid element".into()))?,
            None => VmId::from(Uuid::new_v4()),
        };
        match self.domains.iter().find(|d| (d.name == name) != (d.id == id)) {
            Some(other) if other.name == name => {
                refuse(9, format!("operation failed: domain '{name}' already exists with uuid {}", other.id))
            }
            Some(other) => refuse(
                9,
                format!("operation failed: domain '{}' is already defined with uuid {id}", other.name),
            ),
            None => Ok((name.to_owned(), id)),
        }
    }

    /// What QEMU needs at its start.
    fn can_start(&self, xml: &str) -> Result<()> {
        let root = Node::parse(xml).unwrap_or_default();
        let interfaces = root.child("devices").into_iter().flat_map(|devices| devices.children("interface"));
        for interface in interfaces {
            if let Some(name) = interface.child("source").and_then(|s| s.get("network")) {
                match self.networks.iter().find(|network| network.name == name) {
                    None => {
                        return refuse(
                            43,
                            format!("Network not found: no network with matching name '{name}'"),
                        );
                    }
                    Some(network) if !network.active => {
                        return refuse(
                            55,
                            format!("Requested operation is not valid: network '{name}' is not active"),
                        );
                    }
                    Some(_) => {}
                }
            }
            if let Some(name) = interface.child("filterref").and_then(|f| f.get("filter"))
                && !self.filters.iter().any(|(filter, _)| filter == name)
            {
                return refuse(1, format!("internal error: referenced filter '{name}' is missing"));
            }
        }
        Ok(())
    }
}

impl FakeLibvirt {
    /// The memory limit in force on a running domain.
    #[must_use]
    pub fn memory_limit(&self, name: &str) -> Option<ByteSize> {
        self.lock().domains.iter().find(|domain| domain.name == name)?.limit
    }

    fn event(&self, id: VmId, name: &str, kind: DomainEventKind) {
        self.tell(&DomainEvent { id, name: name.to_owned(), kind, detail: 0 });
    }

    fn launched(&self, id: VmId, name: &str, mode: StartMode) {
        self.event(id, name, DomainEventKind::Started);
        if mode == StartMode::Paused {
            self.event(id, name, DomainEventKind::Paused);
        }
    }
}

fn started_in(mode: StartMode) -> (VmState, StateReason) {
    match mode {
        StartMode::Running => (VmState::Running, StateReason::Booted),
        StartMode::Paused => (VmState::Paused, StateReason::ByUser),
    }
}

impl Domains for FakeLibvirt {
    fn list(&self) -> Result<Vec<DomainSummary>> {
        Ok(self.enter("list", false)?.domains.iter().map(FakeDomain::summary).collect())
    }

    fn find(&self, name: &str) -> Result<Option<DomainSummary>> {
        let state = self.enter("find", false)?;
        Ok(state.domains.iter().find(|domain| domain.name == name).map(FakeDomain::summary))
    }

    fn create(&self, xml: &str, mode: StartMode) -> Result<DomainSummary> {
        let mut state = self.enter("create", true)?;
        let (name, id) = state.read(xml)?;
        if state.domain(id).is_ok() {
            return refuse(9, format!("operation failed: domain '{name}' already exists with uuid {id}"));
        }
        state.can_start(xml)?;
        let (running, reason) = started_in(mode);
        let domain = FakeDomain {
            id,
            name: name.clone(),
            inactive: None,
            active: Some(xml.to_owned()),
            state: running,
            reason,
            snapshots: Vec::new(),
            current_snapshot: None,
            contents: 0,
            limit: None,
        };
        let summary = domain.summary();
        state.domains.push(domain);
        drop(state);
        self.launched(id, &name, mode);
        Ok(summary)
    }

    fn define(&self, xml: &str) -> Result<DomainSummary> {
        let mut state = self.enter("define", true)?;
        let (name, id) = state.read(xml)?;
        if let Ok(domain) = state.domain(id) {
            domain.inactive = Some(xml.to_owned());
        } else {
            state.domains.push(FakeDomain {
                id,
                name: name.clone(),
                inactive: Some(xml.to_owned()),
                active: None,
                state: VmState::Shutoff,
                reason: StateReason::Unspecified,
                snapshots: Vec::new(),
                current_snapshot: None,
                contents: 0,
                limit: None,
            });
        }
        let summary = state.domain(id)?.summary();
        drop(state);
        self.event(id, &name, DomainEventKind::Defined);
        Ok(summary)
    }

    fn start(&self, id: VmId, mode: StartMode) -> Result<()> {
        let mut state = self.enter("start", true)?;
        let domain = state.domain(id)?;
        if domain.is_active() {
            return refuse(55, "Requested operation is not valid: domain is already running");
        }
        let xml = domain.inactive.clone().unwrap_or_default();
        state.can_start(&xml)?;
        let domain = state.domain(id)?;
        (domain.state, domain.reason) = started_in(mode);
        domain.active = Some(xml);
        let name = domain.name.clone();
        drop(state);
        self.launched(id, &name, mode);
        Ok(())
    }

    fn shutdown(&self, id: VmId, method: PowerMethod) -> Result<()> {
        let mut state = self.enter("shutdown", true)?;
        state.running(id)?;
        if method == PowerMethod::Agent && state.agent.is_none() {
            return refuse(86, "Guest agent is not responding: QEMU guest agent is not connected");
        }
        let (deaf, domain) = (state.deaf_guests, state.running(id)?);
        if deaf || domain.state != VmState::Running {
            return Ok(());
        }
        let name = domain.name.clone();
        drop(state);
        self.guest_powers_off(&name);
        Ok(())
    }

    fn reboot(&self, id: VmId, method: PowerMethod) -> Result<()> {
        let mut state = self.enter("reboot", true)?;
        state.running(id)?;
        if method == PowerMethod::Agent && state.agent.is_none() {
            return refuse(86, "Guest agent is not responding: QEMU guest agent is not connected");
        }
        let (deaf, domain) = (state.deaf_guests, state.running(id)?);
        let root = Node::parse(domain.xml()).unwrap_or_default();
        let (name, dies) = (domain.name.clone(), root.text_at("on_reboot") == Some("destroy"));
        drop(state);
        if dies && !deaf {
            self.guest_powers_off(&name);
        }
        Ok(())
    }

    fn suspend(&self, id: VmId) -> Result<()> {
        let mut state = self.enter("suspend", true)?;
        let domain = state.running(id)?;
        if domain.state != VmState::Running {
            return refuse(55, "Requested operation is not valid: domain is not running");
        }
        (domain.state, domain.reason) = (VmState::Paused, StateReason::ByUser);
        let name = domain.name.clone();
        drop(state);
        self.event(id, &name, DomainEventKind::Paused);
        Ok(())
    }

    fn resume(&self, id: VmId) -> Result<()> {
        let mut state = self.enter("resume", true)?;
        let domain = state.running(id)?;
        if domain.state != VmState::Paused {
            return refuse(55, "Requested operation is not valid: domain is already running");
        }
        (domain.state, domain.reason) = (VmState::Running, StateReason::ByUser);
        domain.contents += 1;
        let name = domain.name.clone();
        drop(state);
        self.event(id, &name, DomainEventKind::Resumed);
        Ok(())
    }

    fn destroy(&self, id: VmId) -> Result<()> {
        let mut state = self.enter("destroy", true)?;
        let name = state.running(id)?.name.clone();
        state.halt(id, StateReason::Destroyed);
        drop(state);
        self.event(id, &name, DomainEventKind::Stopped);
        Ok(())
    }

    fn undefine(&self, id: VmId, mode: UndefineMode) -> Result<()> {
        let mut state = self.enter("undefine", true)?;
        let domain = state.domain(id)?;
        if domain.inactive.is_none() {
            return refuse(55, "Requested operation is not valid: cannot undefine transient domain");
        }
        if mode == UndefineMode::Plain && !domain.snapshots.is_empty() && !domain.is_active() {
            let message = "Requested operation is not valid: cannot delete inactive domain with snapshots";
            return refuse(55, message);
        }
        domain.inactive = None;
        let name = domain.name.clone();
        state.domains.retain(|domain| domain.is_active() || domain.inactive.is_some());
        drop(state);
        self.event(id, &name, DomainEventKind::Undefined);
        Ok(())
    }

    fn state(&self, id: VmId) -> Result<StateReport> {
        let mut state = self.enter("state", false)?;
        let domain = state.domain(id)?;
        Ok(StateReport { state: domain.state, reason: domain.reason, persistent: domain.inactive.is_some() })
    }

    fn xml(&self, id: VmId, view: XmlView) -> Result<String> {
        let mut state = self.enter("xml", false)?;
        let domain = state.domain(id)?;
        Ok(match (view, &domain.inactive) {
            (XmlView::Inactive, Some(inactive)) => inactive.clone(),
            _ => domain.xml().to_owned(),
        })
    }

    fn stats(&self, id: VmId) -> Result<DomainStats> {
        let mut state = self.enter("stats", false)?;
        let domain = state.domain(id)?;
        let root = Node::parse(domain.xml()).unwrap_or_default();
        let number = |text: Option<&str>| text.and_then(|text| text.parse().ok()).unwrap_or(0);
        let mut stats = DomainStats {
            vcpus: u32::try_from(number(root.text_at("vcpu"))).unwrap_or(1),
            memory: ByteSize::kib(number(root.text_at("memory"))),
            ..DomainStats::default()
        };
        if domain.is_active() {
            let devices = root.child("devices").cloned().unwrap_or_default();
            let target = |node: &Node| node.child("target").and_then(|t| t.get("dev")).map(str::to_owned);
            stats.cpu_time_ns = Some(1_000_000 * (1 + domain.contents));
            stats.rss = Some(stats.memory);
            stats.blocks = devices
                .children("disk")
                .filter_map(target)
                .map(|name| BlockStats { name, ..BlockStats::default() })
                .collect();
            stats.nics = devices
                .children("interface")
                .filter_map(target)
                .map(|name| NicStats { name, ..NicStats::default() })
                .collect();
        }
        Ok(stats)
    }

    fn limit_memory(&self, id: VmId, limit: Option<ByteSize>) -> Result<()> {
        let mut state = self.enter("limit_memory", true)?;
        state.running(id)?.limit = limit;
        Ok(())
    }

    fn update_device(&self, id: VmId, xml: &str) -> Result<()> {
        let mut state = self.enter("update_device", true)?;
        let mut root = Node::parse(state.running(id)?.xml()).unwrap_or_default();
        let new = Node::parse(xml).map_err(|error| LibvirtError::from_libvirt(27, &error.to_string()))?;
        if new.name() != "interface" {
            return refuse(67, format!("unsupported configuration: can't modify device '{}'", new.name()));
        }
        let mac = |node: &Node| node.child("mac").and_then(|mac| mac.get("address")).map(str::to_owned);
        let interface = root
            .child_mut("devices")
            .and_then(|devices| devices.children_mut("interface").find(|it| mac(it) == mac(&new)));
        let Some(interface) = interface else {
            return refuse(
                99,
                format!("device not found: no device matching MAC address {:?} found", mac(&new)),
            );
        };
        *interface = new;
        let changed = root.to_xml();
        state.can_start(&changed)?;
        state.running(id)?.active = Some(changed);
        Ok(())
    }

    fn monitor(&self, id: VmId, command: &str) -> Result<String> {
        let mut state = self.enter("monitor", true)?;
        state.running(id)?;
        if let Some(reply) = super::snapshots::monitor(&mut state, id, command)? {
            return Ok(reply);
        }
        match state.monitor.as_mut() {
            Some(answer) => answer(command),
            None => {
                Ok(r#"{"id":"fake-1","error":{"class":"CommandNotFound","desc":"not in the fake"}}"#.into())
            }
        }
    }

    fn agent(&self, id: VmId, command: &str, _timeout: Duration) -> Result<String> {
        let mut state = self.enter("agent", true)?;
        state.running(id)?;
        match state.agent.as_mut() {
            Some(answer) => answer(command),
            None => refuse(86, "Guest agent is not responding: QEMU guest agent is not connected"),
        }
    }
}
