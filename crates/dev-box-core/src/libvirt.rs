//! The seam to libvirt: small, blocking, object-safe traits.
//!
//! ```text
//!   Vm, SnapshotManager, GuestAgent        dev-box-net
//!              |  (async)                       | (blocking)
//!      LibvirtConnection --- crosses to tokio --+
//!              |
//!   trait Libvirt = Host + Domains + Snapshots + Networks + NwFilters
//!        |                   |                      |
//!   virt (real)        fake::FakeLibvirt      mock::MockLibvirt
//! ```
//!
//! A [`Connector`] opens a driver, which sends [`DriverEvent`]s as long as it lives. Domains are
//! addressed by UUID, so that a domain that someone removed and made anew under the same name is never mistaken for
//! the first. What implementations owe is written down once, as tests: the feature `testing` has a `contract` module
//! that the fake, libvirt's `test:///` driver and real QEMU all pass.

mod conflict;
mod error;
mod types;

#[cfg(any(test, feature = "testing"))]
pub mod contract;
#[cfg(any(test, feature = "testing"))]
pub mod fake;
#[cfg(feature = "testing")]
pub mod mock;
#[cfg(feature = "libvirt")]
pub mod virt;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::id::VmId;
use crate::size::ByteSize;

pub use conflict::past_conflicts;
pub use error::LibvirtError;
pub use types::{
    BlockStats, CloseReason, DeleteScope, DomainEvent, DomainEventKind, DomainStats, DomainSummary,
    DriverEvent, NetworkSummary, NicStats, PowerMethod, Revert, SnapshotRecord, SnapshotRequest, StartMode,
    StateReport, UndefineMode, Versions, XmlView,
};

/// What every call of the seam gives.
pub type Result<T> = std::result::Result<T, LibvirtError>;

/// Where events of a driver go. Called on libvirt's own event thread: must not block, nor call libvirt.
pub type EventSink = Arc<dyn Fn(DriverEvent) + Send + Sync>;

/// Whether a connection may change anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Access {
    /// Everything.
    #[default]
    ReadWrite,
    /// Looking only: what would change something fails with [`LibvirtError::ReadOnly`].
    ReadOnly,
}

/// Opens drivers.
pub trait Connector: fmt::Debug + Send + Sync {
    /// Opens `uri`. Blocks, for `qemu:///embed` for seconds.
    ///
    /// Events arrive at `events` until the driver is dropped.
    ///
    /// # Errors
    /// [`LibvirtError::DaemonNotRunning`], [`LibvirtError::PermissionDenied`], [`LibvirtError::BadUri`] and the like.
    fn connect(&self, uri: &str, access: Access, events: EventSink) -> Result<Arc<dyn Libvirt>>;
}

/// All of it: what a [`Connector`] opens.
pub trait Libvirt: Host + Domains + Snapshots + Networks + NwFilters {}

impl<T: Host + Domains + Snapshots + Networks + NwFilters> Libvirt for T {}

/// The daemon and its host.
pub trait Host: fmt::Debug + Send + Sync {
    /// Versions of the library, the daemon and the hypervisor.
    ///
    /// # Errors
    /// When the connection is lost.
    fn versions(&self) -> Result<Versions>;

    /// The host's capabilities, as XML.
    ///
    /// # Errors
    /// When the connection is lost.
    fn capabilities(&self) -> Result<String>;

    /// Whether the connection still stands. Asks the local library only.
    fn is_alive(&self) -> bool;
}

/// Virtual machines.
pub trait Domains: fmt::Debug + Send + Sync {
    /// All domains, running or not.
    ///
    /// # Errors
    /// When the connection is lost.
    fn list(&self) -> Result<Vec<DomainSummary>>;

    /// The domain of that name; `None` when there is none.
    ///
    /// # Errors
    /// When the connection is lost.
    fn find(&self, name: &str) -> Result<Option<DomainSummary>>;

    /// Makes and starts a transient domain: nothing of it is left when it stops.
    ///
    /// # Errors
    /// [`LibvirtError::NameTaken`] when a domain of that name or UUID exists, [`LibvirtError::InvalidXml`], and
    /// [`LibvirtError::OperationFailed`] or [`LibvirtError::Unsupported`] when QEMU does not start.
    fn create(&self, xml: &str, mode: StartMode) -> Result<DomainSummary>;

    /// Makes a persistent domain known, validated against libvirt's schema where the driver can; the same name and
    /// UUID again changes its definition.
    ///
    /// # Errors
    /// [`LibvirtError::NameTaken`] when the name or the UUID belongs to another, [`LibvirtError::InvalidXml`].
    fn define(&self, xml: &str) -> Result<DomainSummary>;

    /// Starts a defined domain.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchDomain`], [`LibvirtError::InvalidOperation`] when it runs already.
    fn start(&self, id: VmId, mode: StartMode) -> Result<()>;

    /// Asks the guest to power off; returns before it has.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchDomain`], [`LibvirtError::InvalidOperation`] when it does not run,
    /// [`LibvirtError::AgentUnresponsive`].
    fn shutdown(&self, id: VmId, method: PowerMethod) -> Result<()>;

    /// Asks the guest to reboot; returns before it has.
    ///
    /// # Errors
    /// As [`Domains::shutdown`].
    fn reboot(&self, id: VmId, method: PowerMethod) -> Result<()>;

    /// Stops the CPUs.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchDomain`], [`LibvirtError::InvalidOperation`] when it does not run.
    fn suspend(&self, id: VmId) -> Result<()>;

    /// Lets stopped CPUs run on.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchDomain`], [`LibvirtError::InvalidOperation`] when it is not paused.
    fn resume(&self, id: VmId) -> Result<()>;

    /// Ends it at once. Blocks until QEMU is gone: up to seconds.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchDomain`], [`LibvirtError::InvalidOperation`] when it does not run.
    fn destroy(&self, id: VmId) -> Result<()>;

    /// Makes libvirt forget a domain that does not run.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchDomain`], [`LibvirtError::InvalidOperation`] when it is transient, or when it has
    /// snapshots and `mode` does not include them.
    fn undefine(&self, id: VmId, mode: UndefineMode) -> Result<()>;

    /// What it is doing, and why.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchDomain`].
    fn state(&self, id: VmId) -> Result<StateReport>;

    /// Its definition as XML.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchDomain`].
    fn xml(&self, id: VmId, view: XmlView) -> Result<String>;

    /// Its counters; those a driver lacks are absent.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchDomain`].
    fn stats(&self, id: VmId) -> Result<DomainStats>;

    /// Lets a running domain's QEMU have so much memory and no more (`memory.limit_in_bytes`, `memory.max`), or, with
    /// `None`, as much as it likes. Gone when it stops.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchDomain`], [`LibvirtError::InvalidOperation`] when it does not run or the host has no memory
    /// cgroup, [`LibvirtError::Unsupported`].
    fn limit_memory(&self, id: VmId, limit: Option<ByteSize>) -> Result<()>;

    /// Changes a device of a running domain, found by what cannot be changed of it (an interface by its Ethernet address), to what
    /// this element says: an interface's filter and link. Blocks until a filter is in force. Gone when the domain stops.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchDomain`], [`LibvirtError::InvalidOperation`] when it does not run, [`LibvirtError::InvalidXml`],
    /// [`LibvirtError::NoSuchDevice`], [`LibvirtError::OperationFailed`] when the filter is not there,
    /// [`LibvirtError::Unsupported`] where devices cannot be changed.
    fn update_device(&self, id: VmId, xml: &str) -> Result<()>;

    /// Sends a JSON command (QMP) to QEMU's monitor and gives its JSON reply. Libvirt marks the domain as tainted.
    ///
    /// # Errors
    /// [`LibvirtError::InvalidOperation`] when it does not run, [`LibvirtError::Unsupported`] where there is no QEMU.
    fn monitor(&self, id: VmId, command: &str) -> Result<String>;

    /// Sends a JSON command to the guest's qemu-guest-agent and gives its reply, **which the guest wrote**.
    ///
    /// # Errors
    /// [`LibvirtError::AgentUnresponsive`] when there is no port, or no answer within `timeout` (whole seconds,
    /// rounded up); [`LibvirtError::InvalidOperation`]; [`LibvirtError::Unsupported`].
    fn agent(&self, id: VmId, command: &str, timeout: Duration) -> Result<String>;
}

/// Snapshots of domains.
pub trait Snapshots: fmt::Debug + Send + Sync {
    /// Takes a snapshot. Blocks while memory is written: seconds.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchDomain`], [`LibvirtError::NameTaken`], [`LibvirtError::SnapshotBlocked`] when a device
    /// cannot be saved (a mounted 9p share), [`LibvirtError::NoSpace`], [`LibvirtError::Unsupported`].
    fn create_snapshot(&self, id: VmId, request: &SnapshotRequest) -> Result<()>;

    /// All snapshots of a domain.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchDomain`].
    fn snapshots(&self, id: VmId) -> Result<Vec<SnapshotRecord>>;

    /// Goes back to a snapshot. On a QEMU driver this restarts QEMU.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchDomain`], [`LibvirtError::NoSuchSnapshot`].
    fn revert_snapshot(&self, id: VmId, name: &str, revert: Revert) -> Result<()>;

    /// Deletes a snapshot.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchDomain`], [`LibvirtError::NoSuchSnapshot`].
    fn delete_snapshot(&self, id: VmId, name: &str, scope: DeleteScope) -> Result<()>;
}

/// Virtual networks.
pub trait Networks: fmt::Debug + Send + Sync {
    /// All networks, active or not.
    ///
    /// # Errors
    /// When the connection is lost.
    fn networks(&self) -> Result<Vec<NetworkSummary>>;

    /// The network of that name; `None` when there is none.
    ///
    /// # Errors
    /// When the connection is lost.
    fn find_network(&self, name: &str) -> Result<Option<NetworkSummary>>;

    /// Makes a persistent network known, or changes its definition; does not start it.
    ///
    /// # Errors
    /// [`LibvirtError::InvalidXml`], [`LibvirtError::NameTaken`] when name and UUID do not belong together.
    fn define_network(&self, xml: &str) -> Result<NetworkSummary>;

    /// Starts it.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchNetwork`], [`LibvirtError::InvalidOperation`] when it is active already.
    fn start_network(&self, name: &str) -> Result<()>;

    /// Stops it; interfaces of running domains lose their bridge.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchNetwork`], [`LibvirtError::InvalidOperation`] when it is not active.
    fn stop_network(&self, name: &str) -> Result<()>;

    /// Makes libvirt forget it; a running network becomes transient.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchNetwork`].
    fn undefine_network(&self, name: &str) -> Result<()>;

    /// Whether it is to start with the daemon.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchNetwork`].
    fn set_network_autostart(&self, name: &str, autostart: bool) -> Result<()>;

    /// Its definition as XML (of the running network, when it runs).
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchNetwork`].
    fn network_xml(&self, name: &str) -> Result<String>;
}

/// Network filters. The driver `test:///` has none: [`LibvirtError::Unsupported`].
pub trait NwFilters: fmt::Debug + Send + Sync {
    /// The names of all filters.
    ///
    /// # Errors
    /// [`LibvirtError::Unsupported`].
    fn filters(&self) -> Result<Vec<String>>;

    /// Makes a filter known; the same name and UUID again replaces it, also under running domains.
    ///
    /// # Errors
    /// [`LibvirtError::InvalidXml`]; [`LibvirtError::OperationFailed`] or [`LibvirtError::NameTaken`] when the name
    /// has another UUID.
    fn define_filter(&self, xml: &str) -> Result<()>;

    /// Its definition as XML.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchFilter`].
    fn filter_xml(&self, name: &str) -> Result<String>;

    /// Makes libvirt forget it.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchFilter`], [`LibvirtError::InUse`] while a domain or a binding uses it.
    fn undefine_filter(&self, name: &str) -> Result<()>;

    /// The interfaces of the host (`vnet0`) that filters are bound to, by domains or by [`NwFilters::bind_filter`].
    ///
    /// # Errors
    /// [`LibvirtError::Unsupported`].
    fn bound_filters(&self) -> Result<Vec<String>>;

    /// Puts a filter in force at an interface of the host that is no domain's, by an element `filterbinding`
    /// (<https://libvirt.org/formatnwfilter.html>). It stays, whoever uses the interface, until it is unbound. Blocks until the
    /// filter is in force: a second or so.
    ///
    /// # Errors
    /// [`LibvirtError::InvalidXml`], [`LibvirtError::NameTaken`] when a filter is bound there already,
    /// [`LibvirtError::OperationFailed`] when the filter or the interface is not there.
    fn bind_filter(&self, xml: &str) -> Result<()>;

    /// Takes the filter off an interface of the host, whether that still exists or not.
    ///
    /// # Errors
    /// [`LibvirtError::NoSuchFilter`] when none is bound there.
    fn unbind_filter(&self, interface: &str) -> Result<()>;
}
