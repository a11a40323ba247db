//! Values that cross the seam.

use serde::Serialize;

use crate::id::VmId;
use crate::size::ByteSize;
use crate::state::{StateReason, VmState};

/// A domain in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainSummary {
    /// Its UUID.
    pub id: VmId,
    /// Its name: not necessarily one that [`VmName`](crate::id::VmName) allows, since others make domains too.
    pub name: String,
    /// Whether it runs (or is paused).
    pub active: bool,
    /// Whether it stays defined when it stops.
    pub persistent: bool,
}

/// A domain's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateReport {
    /// What it does.
    pub state: VmState,
    /// Why.
    pub reason: StateReason,
    /// Whether it stays defined when it stops.
    pub persistent: bool,
}

/// How to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StartMode {
    /// CPUs run at once.
    #[default]
    Running,
    /// CPUs stand until they are resumed.
    Paused,
}

/// How to ask a guest to power off or reboot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PowerMethod {
    /// The guest agent when it answers, else ACPI.
    #[default]
    Any,
    /// The ACPI power button.
    Acpi,
    /// The guest agent.
    Agent,
}

/// What goes with an undefined domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum UndefineMode {
    /// Refuse when there are snapshots or a saved state.
    #[default]
    Plain,
    /// Forget snapshots' metadata and delete a saved state too. (Snapshots inside a disk image stay in the image.)
    WithSnapshots,
}

/// Which definition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum XmlView {
    /// As it runs now.
    #[default]
    Current,
    /// As it will be started next.
    Inactive,
}

/// Versions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Versions {
    /// The daemon's libvirt: major, minor, release.
    pub libvirt: (u32, u32, u32),
    /// The hypervisor's (QEMU's), where the driver knows it.
    pub hypervisor: Option<(u32, u32, u32)>,
    /// The driver: `QEMU`, `Test`...
    pub driver: String,
    /// The host's name.
    pub hostname: String,
}

/// Counters of a domain, all as the host sees them. What the driver does not tell is `None` or empty.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct DomainStats {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// CPU time used, in nanoseconds, by all of QEMU.
    pub cpu_time_ns: Option<u64>,
    /// The part spent in the host's user mode, in nanoseconds.
    pub cpu_user_ns: Option<u64>,
    /// The part spent in the host's kernel, in nanoseconds.
    pub cpu_system_ns: Option<u64>,
    /// The guest's memory.
    pub memory: ByteSize,
    /// Resident memory of QEMU.
    pub rss: Option<ByteSize>,
    /// Disks.
    pub blocks: Vec<BlockStats>,
    /// Interfaces.
    pub nics: Vec<NicStats>,
}

/// Counters of a disk, since the VM's start.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct BlockStats {
    /// `vda`...
    pub name: String,
    /// Requests to read.
    pub read_requests: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Requests to write.
    pub write_requests: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// The highest byte of the image file that is in use, where known.
    pub allocation: Option<u64>,
}

/// Counters of a network interface as the host's end counts them: `rx` is what the guest received.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct NicStats {
    /// The host's device.
    pub name: String,
    /// Bytes to the guest.
    pub rx_bytes: u64,
    /// Packets to the guest.
    pub rx_packets: u64,
    /// Packets to the guest that were dropped.
    pub rx_dropped: u64,
    /// Bytes from the guest.
    pub tx_bytes: u64,
    /// Packets from the guest.
    pub tx_packets: u64,
    /// Packets from the guest that were dropped.
    pub tx_dropped: u64,
}

/// A snapshot to take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotRequest {
    /// `<domainsnapshot>` XML.
    pub xml: String,
    /// Leave the memory out of it: a running domain's disks as a crash would leave them, inside their files, all or none.
    pub disk_only: bool,
    /// Only (re)create libvirt's record of a snapshot that the disks hold already, and make it the current one.
    pub redefine: bool,
    /// Have libvirt check the XML against its schema.
    pub validate: bool,
}

/// A snapshot as libvirt keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotRecord {
    /// Its name.
    pub name: String,
    /// Its XML, which has parent, time, state and description.
    pub xml: String,
    /// Whether the domain's state descends from it directly.
    pub current: bool,
}

/// How a revert leaves the domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Revert {
    /// As it was when the snapshot was taken.
    #[default]
    AsTaken,
    /// Running.
    Running,
    /// Paused.
    Paused,
}

/// What is deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeleteScope {
    /// This one; its children move to its parent.
    #[default]
    One,
    /// This one and all that descend from it.
    WithChildren,
    /// Libvirt's record only; the disks keep theirs.
    MetadataOnly,
}

/// A network in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkSummary {
    /// Its UUID.
    pub id: uuid::Uuid,
    /// Its name.
    pub name: String,
    /// Whether it runs.
    pub active: bool,
    /// Whether it stays defined when it stops.
    pub persistent: bool,
    /// Whether it starts with the daemon.
    pub autostart: bool,
    /// Its bridge on the host, where it has one.
    pub bridge: Option<String>,
}

/// What a driver reports by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DriverEvent {
    /// A domain changed.
    Domain(DomainEvent),
    /// The connection is gone; no event follows.
    Closed(CloseReason),
}

/// A change of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainEvent {
    /// The domain's UUID.
    pub id: VmId,
    /// Its name.
    pub name: String,
    /// What happened.
    pub kind: DomainEventKind,
    /// Libvirt's number for the circumstances (`virDomainEventStoppedDetailType` and its like).
    pub detail: i32,
}

/// What happened to a domain: libvirt's lifecycle events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DomainEventKind {
    /// Made known, or changed.
    Defined,
    /// Forgotten.
    Undefined,
    /// Started.
    Started,
    /// Paused.
    Paused,
    /// Running on.
    Resumed,
    /// Gone: powered off, destroyed or failed.
    Stopped,
    /// The guest finished its power-off; `Stopped` follows.
    Shutdown,
    /// The guest suspended itself.
    Suspended,
    /// Crashed.
    Crashed,
}

impl DomainEventKind {
    /// From libvirt's `virDomainEventType`; `None` for one this library does not know.
    #[must_use]
    pub const fn from_libvirt(raw: i32) -> Option<Self> {
        Some(match raw {
            0 => Self::Defined,
            1 => Self::Undefined,
            2 => Self::Started,
            3 => Self::Paused,
            4 => Self::Resumed,
            5 => Self::Stopped,
            6 => Self::Shutdown,
            7 => Self::Suspended,
            8 => Self::Crashed,
            _ => return None,
        })
    }
}

/// Why a connection is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CloseReason {
    /// An error of input or output.
    Error,
    /// The daemon closed it: stopped, restarted or crashed.
    EndOfFile,
    /// The daemon stopped answering keep-alive messages.
    Keepalive,
    /// This side closed it.
    Client,
}

impl CloseReason {
    /// From libvirt's `virConnectCloseReason`.
    #[must_use]
    pub const fn from_libvirt(raw: i32) -> Self {
        match raw {
            1 => Self::EndOfFile,
            2 => Self::Keepalive,
            3 => Self::Client,
            _ => Self::Error,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_libvirt() {
        assert_eq!(DomainEventKind::from_libvirt(2), Some(DomainEventKind::Started));
        let known: std::collections::HashSet<_> = (0..9).filter_map(DomainEventKind::from_libvirt).collect();
        assert_eq!(known.len(), 9);
        assert_eq!(DomainEventKind::from_libvirt(9), None);
        assert_eq!(CloseReason::from_libvirt(1), CloseReason::EndOfFile);
        assert_eq!(CloseReason::from_libvirt(2), CloseReason::Keepalive);
        assert_eq!(CloseReason::from_libvirt(3), CloseReason::Client);
        assert_eq!(CloseReason::from_libvirt(77), CloseReason::Error);
    }
}
