//! What every implementation of the seam owes, as tests. Run against the fake, libvirt's `test:///` driver and real
//! QEMU, they keep the fake from drifting away from what it stands for.
//!
//! Each function panics at the first broken promise, and leaves nothing behind when it passes.

mod devices;
mod domains;
mod snapshots;
mod virtual_networks;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Access, Connector, DomainEventKind, DriverEvent, EventSink, Libvirt, LibvirtError};
use crate::id::VmId;

pub use devices::devices;
pub use domains::{domains, events, names, read_only, transient};
pub use snapshots::snapshots;
pub use virtual_networks::{filters, networks};

/// What a contract runs on.
#[derive(Debug)]
pub struct Rung {
    connector: Arc<dyn Connector>,
    uri: String,
    prefix: String,
    domain: fn(&str, VmId, &str) -> String,
    disk: String,
    /// Whether it has network filters.
    pub has_filters: bool,
    /// Whether it has QEMU's monitor, and `virDomainCreateXML` that starts paused.
    pub is_qemu: bool,
}

impl Rung {
    /// A rung on `uri`, whose objects have names that begin with `prefix` (and nobody else's do).
    ///
    /// `domain` makes the XML of a domain from its name, its UUID and `disk`, the path of a writable qcow2 image that
    /// the rung's QEMU may use (the others do not look at it).
    #[must_use]
    pub fn new(
        connector: Arc<dyn Connector>,
        uri: &str,
        prefix: &str,
        domain: fn(&str, VmId, &str) -> String,
        disk: &str,
    ) -> Self {
        Self {
            connector,
            uri: uri.to_owned(),
            prefix: prefix.to_owned(),
            domain,
            disk: disk.to_owned(),
            has_filters: true,
            is_qemu: true,
        }
    }

    fn open(&self, access: Access) -> (Arc<dyn Libvirt>, Heard) {
        let heard = Heard::default();
        let driver = self.connector.connect(&self.uri, access, heard.sink());
        (driver.unwrap_or_else(|error| panic!("{}: {error}", self.uri)), heard)
    }

    fn name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn xml(&self, name: &str, id: VmId) -> String {
        (self.domain)(name, id, &self.disk)
    }
}

/// Events as they came.
#[derive(Debug, Clone, Default)]
struct Heard(Arc<Mutex<Vec<DriverEvent>>>);

impl Heard {
    fn sink(&self) -> EventSink {
        let heard = self.clone();
        Arc::new(move |event| heard.lock().push(event))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<DriverEvent>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kinds(&self, id: VmId) -> Vec<DomainEventKind> {
        let of = |event: &DriverEvent| match event {
            DriverEvent::Domain(event) if event.id == id => Some(event.kind),
            _ => None,
        };
        self.lock().iter().filter_map(of).collect()
    }

    /// Waits until these have come, in this order, whatever else came in between.
    fn expect(&self, id: VmId, expected: &[DomainEventKind]) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let kinds = self.kinds(id);
            let mut rest = kinds.iter();
            if expected.iter().all(|wanted| rest.any(|kind| kind == wanted)) {
                return;
            }
            assert!(Instant::now() < deadline, "heard {kinds:?}, expected {expected:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Whether an error is of the kind that the promise names.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, LibvirtError>, kind: &str, what: &str) {
    match result {
        Err(error) if format!("{error:?}").starts_with(kind) => {}
        other => panic!("{what}: {kind} is owed, and this came: {other:?}"),
    }
}

#[track_caller]
fn ok<T>(result: Result<T, LibvirtError>, what: &str) -> T {
    result.unwrap_or_else(|error| panic!("{what}: {error} ({error:?})"))
}
