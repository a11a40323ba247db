//! Mocks, for "the third call fails like this" and "never called". For everything else there is
//! [`FakeLibvirt`](super::fake::FakeLibvirt).

use std::time::Duration;

use super::{
    DeleteScope, DomainStats, DomainSummary, Domains, Host, NetworkSummary, Networks, NwFilters, PowerMethod,
    Result, Revert, SnapshotRecord, SnapshotRequest, Snapshots, StartMode, StateReport, UndefineMode,
    Versions, XmlView,
};
use crate::id::VmId;
use crate::size::ByteSize;

mockall::mock! {
    /// A driver whose every call is told beforehand.
    #[derive(Debug)]
    pub Libvirt {}

    impl Host for Libvirt {
        fn versions(&self) -> Result<Versions>;
        fn capabilities(&self) -> Result<String>;
        fn is_alive(&self) -> bool;
    }

    impl Domains for Libvirt {
        fn list(&self) -> Result<Vec<DomainSummary>>;
        fn find(&self, name: &str) -> Result<Option<DomainSummary>>;
        fn create(&self, xml: &str, mode: StartMode) -> Result<DomainSummary>;
        fn define(&self, xml: &str) -> Result<DomainSummary>;
        fn start(&self, id: VmId, mode: StartMode) -> Result<()>;
        fn shutdown(&self, id: VmId, method: PowerMethod) -> Result<()>;
        fn reboot(&self, id: VmId, method: PowerMethod) -> Result<()>;
        fn suspend(&self, id: VmId) -> Result<()>;
        fn resume(&self, id: VmId) -> Result<()>;
        fn destroy(&self, id: VmId) -> Result<()>;
        fn undefine(&self, id: VmId, mode: UndefineMode) -> Result<()>;
        fn state(&self, id: VmId) -> Result<StateReport>;
        fn xml(&self, id: VmId, view: XmlView) -> Result<String>;
        fn stats(&self, id: VmId) -> Result<DomainStats>;
        fn limit_memory(&self, id: VmId, limit: Option<ByteSize>) -> Result<()>;
        fn update_device(&self, id: VmId, xml: &str) -> Result<()>;
        fn monitor(&self, id: VmId, command: &str) -> Result<String>;
        fn agent(&self, id: VmId, command: &str, timeout: Duration) -> Result<String>;
    }

    impl Snapshots for Libvirt {
        fn create_snapshot(&self, id: VmId, request: &SnapshotRequest) -> Result<()>;
        fn snapshots(&self, id: VmId) -> Result<Vec<SnapshotRecord>>;
        fn revert_snapshot(&self, id: VmId, name: &str, revert: Revert) -> Result<()>;
        fn delete_snapshot(&self, id: VmId, name: &str, scope: DeleteScope) -> Result<()>;
    }

    impl Networks for Libvirt {
        fn networks(&self) -> Result<Vec<NetworkSummary>>;
        fn find_network(&self, name: &str) -> Result<Option<NetworkSummary>>;
        fn define_network(&self, xml: &str) -> Result<NetworkSummary>;
        fn start_network(&self, name: &str) -> Result<()>;
        fn stop_network(&self, name: &str) -> Result<()>;
        fn undefine_network(&self, name: &str) -> Result<()>;
        fn set_network_autostart(&self, name: &str, autostart: bool) -> Result<()>;
        fn network_xml(&self, name: &str) -> Result<String>;
    }

    impl NwFilters for Libvirt {
        fn filters(&self) -> Result<Vec<String>>;
        fn define_filter(&self, xml: &str) -> Result<()>;
        fn filter_xml(&self, name: &str) -> Result<String>;
        fn undefine_filter(&self, name: &str) -> Result<()>;
        fn bound_filters(&self) -> Result<Vec<String>>;
        fn bind_filter(&self, xml: &str) -> Result<()>;
        fn unbind_filter(&self, interface: &str) -> Result<()>;
    }
}
