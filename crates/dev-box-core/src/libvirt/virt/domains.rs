//! Domains through `virt`.

use std::time::Duration;

use virt::domain::{Domain, DomainStateReason, MemoryParameters};
use virt::enumutil::Enum;
use virt_sys as sys;

use super::{VirtDriver, of};
use crate::id::VmId;
use crate::libvirt::{
    BlockStats, DomainStats, DomainSummary, Domains, LibvirtError, NicStats, PowerMethod, Result, StartMode,
    StateReport, UndefineMode, XmlView,
};
use crate::size::ByteSize;
use crate::state::{StateReason, VmState};
use crate::xml::Node;

/// `VIR_DOMAIN_MEMORY_STAT_RSS`.
const MEMORY_STAT_RSS: u32 = 7;

/// `VIR_DOMAIN_MEMORY_PARAM_UNLIMITED`.
const UNLIMITED_KIB: u64 = 9_007_199_254_740_991;

impl Domains for VirtDriver {
    fn list(&self) -> Result<Vec<DomainSummary>> {
        let domains = self.connect.list_all_domains(0).map_err(of)?;
        let mut list = Vec::with_capacity(domains.len());
        for domain in &domains {
            match summary(domain) {
                Ok(summary) => list.push(summary),
                // It vanished between the list and the look.
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(list)
    }

    fn find(&self, name: &str) -> Result<Option<DomainSummary>> {
        match self.connect.lookup_domain_by_name(name).map_err(of).and_then(|domain| summary(&domain)) {
            Ok(summary) => Ok(Some(summary)),
            Err(LibvirtError::NoSuchDomain { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn create(&self, xml: &str, mode: StartMode) -> Result<DomainSummary> {
        let domain = self.connect.create_domain_xml(xml, start_flags(mode)).map_err(of)?;
        // Not asked anew: it may be gone already, and was made all the same.
        Ok(DomainSummary {
            id: domain.uuid().map_err(of)?.into(),
            name: domain.name().map_err(of)?,
            active: true,
            persistent: false,
        })
    }

    fn define(&self, xml: &str) -> Result<DomainSummary> {
        let flags = sys::VIR_DOMAIN_DEFINE_VALIDATE;
        summary(&self.connect.define_domain_xml_flags(xml, flags).map_err(of)?)
    }

    fn start(&self, id: VmId, mode: StartMode) -> Result<()> {
        self.domain(id)?.create_with_flags(start_flags(mode)).map_err(of)
    }

    fn shutdown(&self, id: VmId, method: PowerMethod) -> Result<()> {
        let flags = match method {
            PowerMethod::Any => sys::VIR_DOMAIN_SHUTDOWN_DEFAULT,
            PowerMethod::Acpi => sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN,
            PowerMethod::Agent => sys::VIR_DOMAIN_SHUTDOWN_GUEST_AGENT,
        };
        let domain = self.domain(id)?;
        // The driver `test` knows only the call without flags.
        if flags == 0 { domain.shutdown() } else { domain.shutdown_flags(flags) }.map_err(of)
    }

    fn reboot(&self, id: VmId, method: PowerMethod) -> Result<()> {
        let flags = match method {
            PowerMethod::Any => sys::VIR_DOMAIN_REBOOT_DEFAULT,
            PowerMethod::Acpi => sys::VIR_DOMAIN_REBOOT_ACPI_POWER_BTN,
            PowerMethod::Agent => sys::VIR_DOMAIN_REBOOT_GUEST_AGENT,
        };
        self.domain(id)?.reboot(flags).map_err(of)
    }

    fn suspend(&self, id: VmId) -> Result<()> {
        self.domain(id)?.suspend().map_err(of)
    }

    fn resume(&self, id: VmId) -> Result<()> {
        self.domain(id)?.resume().map_err(of)
    }

    fn destroy(&self, id: VmId) -> Result<()> {
        self.domain(id)?.destroy().map_err(of)
    }

    fn undefine(&self, id: VmId, mode: UndefineMode) -> Result<()> {
        let flags = match mode {
            UndefineMode::Plain => 0,
            UndefineMode::WithSnapshots => {
                sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE | sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            }
        };
        self.domain(id)?.undefine_flags(flags).map_err(of)
    }

    fn state(&self, id: VmId) -> Result<StateReport> {
        let domain = self.domain(id)?;
        // `virt` does not pass on an error here; an unknown state is what it makes of one. `info` tells the error.
        let (state, reason) = domain.state().map_err(of)?;
        let raw = state.to_raw();
        if VmState::from_libvirt(raw) == VmState::Unknown {
            domain.info().map_err(of)?;
        }
        Ok(StateReport {
            state: VmState::from_libvirt(raw),
            reason: StateReason::from_libvirt(raw, reason_number(reason)),
            persistent: domain.is_persistent().map_err(of)?,
        })
    }

    fn xml(&self, id: VmId, view: XmlView) -> Result<String> {
        let flags = match view {
            XmlView::Current => 0,
            XmlView::Inactive => sys::VIR_DOMAIN_XML_INACTIVE,
        };
        self.domain(id)?.xml_desc(flags).map_err(of)
    }

    fn stats(&self, id: VmId) -> Result<DomainStats> {
        let domain = self.domain(id)?;
        let info = domain.info().map_err(of)?;
        let mut stats = DomainStats {
            vcpus: info.nr_virt_cpu,
            memory: ByteSize::kib(info.max_mem),
            ..DomainStats::default()
        };
        // What a driver or a host without cgroups does not count is left out, as is all of it when it does not run.
        if !domain.is_active().map_err(of)? {
            return Ok(stats);
        }
        stats.cpu_time_ns = Some(info.cpu_time);
        if let Some(cpu) = domain.cpu_stats(-1, 1, 0).ok().and_then(|all| all.into_iter().next()) {
            stats.cpu_time_ns = cpu.cpu_time.or(stats.cpu_time_ns);
            stats.cpu_user_ns = cpu.user_time;
            stats.cpu_system_ns = cpu.system_time;
        }
        let memory = domain.memory_stats(0).unwrap_or_default();
        stats.rss = memory.iter().find(|m| m.tag == MEMORY_STAT_RSS).map(|m| ByteSize::kib(m.val));
        if let Ok(xml) = domain.xml_desc(0)
            && let Ok(root) = Node::parse(&xml)
            && let Some(devices) = root.child("devices")
        {
            let target = |node: &Node| node.child("target").and_then(|t| t.get("dev")).map(str::to_owned);
            stats.blocks =
                devices.children("disk").filter_map(target).filter_map(|name| block(&domain, name)).collect();
            stats.nics = devices
                .children("interface")
                .filter_map(target)
                .filter_map(|name| nic(&domain, name))
                .collect();
        }
        Ok(stats)
    }

    fn limit_memory(&self, id: VmId, limit: Option<ByteSize>) -> Result<()> {
        let parameters = MemoryParameters {
            hard_limit: Some(limit.map_or(UNLIMITED_KIB, ByteSize::as_kib)),
            ..MemoryParameters::default()
        };
        // Live, and not in the definition: started with a hard limit, QEMU is allowed to lock as much memory, which it
        // needs not, and which fails where libvirtd may not raise resource limits.
        self.domain(id)?.set_memory_parameters(parameters, sys::VIR_DOMAIN_AFFECT_LIVE).map_err(of)
    }

    fn update_device(&self, id: VmId, xml: &str) -> Result<()> {
        self.domain(id)?.update_device_flags(xml, sys::VIR_DOMAIN_AFFECT_LIVE).map_err(of)
    }

    fn monitor(&self, id: VmId, command: &str) -> Result<String> {
        self.domain(id)?.qemu_monitor_command(command, 0).map_err(of)
    }

    fn agent(&self, id: VmId, command: &str, timeout: Duration) -> Result<String> {
        let seconds = timeout.as_millis().div_ceil(1000).clamp(1, 3600);
        self.domain(id)?.qemu_agent_command(command, i32::try_from(seconds).unwrap_or(3600), 0).map_err(of)
    }
}

fn start_flags(mode: StartMode) -> sys::virDomainCreateFlags {
    match mode {
        StartMode::Running => 0,
        StartMode::Paused => sys::VIR_DOMAIN_START_PAUSED,
    }
}

fn summary(domain: &Domain) -> Result<DomainSummary> {
    Ok(DomainSummary {
        id: domain.uuid().map_err(of)?.into(),
        name: domain.name().map_err(of)?,
        active: domain.is_active().map_err(of)?,
        persistent: domain.is_persistent().map_err(of)?,
    })
}

fn reason_number(reason: virt::domain::DomainStateReasonEnum) -> u32 {
    match reason {
        Enum::Known(DomainStateReason::NoState(r)) => r.to_raw(),
        Enum::Known(DomainStateReason::Running(r)) => r.to_raw(),
        Enum::Known(DomainStateReason::Blocked(r)) => r.to_raw(),
        Enum::Known(DomainStateReason::Paused(r)) => r.to_raw(),
        Enum::Known(DomainStateReason::Shutdown(r)) => r.to_raw(),
        Enum::Known(DomainStateReason::Shutoff(r)) => r.to_raw(),
        Enum::Known(DomainStateReason::Crashed(r)) => r.to_raw(),
        Enum::Known(DomainStateReason::PMSuspended(r)) => r.to_raw(),
        Enum::Unknown(_) => 0,
    }
}

/// Libvirt counts in signed numbers, of which -1 means "not known".
fn count(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

fn block(domain: &Domain, name: String) -> Option<BlockStats> {
    let stats = domain.block_stats(&name).ok()?;
    Some(BlockStats {
        read_requests: count(stats.rd_req),
        read_bytes: count(stats.rd_bytes),
        write_requests: count(stats.wr_req),
        write_bytes: count(stats.wr_bytes),
        allocation: domain.block_info(&name, 0).ok().map(|info| info.allocation),
        name,
    })
}

/// Libvirt turns a tap's counters round, so that `rx` is what the guest received.
fn nic(domain: &Domain, name: String) -> Option<NicStats> {
    let stats = domain.interface_stats(&name).ok()?;
    Some(NicStats {
        rx_bytes: count(stats.rx_bytes),
        rx_packets: count(stats.rx_packets),
        rx_dropped: count(stats.rx_drop),
        tx_bytes: count(stats.tx_bytes),
        tx_packets: count(stats.tx_packets),
        tx_dropped: count(stats.tx_drop),
        name,
    })
}
