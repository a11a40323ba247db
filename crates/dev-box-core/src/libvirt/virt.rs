//! The one adapter to libvirt.
//!
//! Nothing outside this module uses the crates `virt` and `virt-sys`. Libvirt objects never leave a call: each call
//! looks its object up by UUID or name, since `virt`'s objects are tied to a thread and a handle says nothing about
//! whether the object still exists.

mod disk_snapshot;
mod domains;
mod events;
mod filter_bindings;
mod networks;
mod snapshots;

use std::sync::Arc;

use virt::connect::Connect;
use virt::domain::Domain;

use super::{Access, Connector, EventSink, Host, Libvirt, LibvirtError, Result, Versions};
use crate::id::VmId;

/// Keep-alive: a message after so many seconds of silence.
const KEEPALIVE_INTERVAL_S: i32 = 5;
/// So many unanswered messages mean that the connection is dead.
const KEEPALIVE_COUNT: u32 = 3;

/// Opens connections with libvirt's client library.
#[derive(Debug, Clone, Copy, Default)]
pub struct VirtConnector;

impl Connector for VirtConnector {
    fn connect(&self, uri: &str, access: Access, events: EventSink) -> Result<Arc<dyn Libvirt>> {
        // Before any connection opens, or none gets events or keep-alive.
        events::start_loop()?;
        let connect = match access {
            Access::ReadWrite => Connect::open(Some(uri)),
            Access::ReadOnly => Connect::open_read_only(Some(uri)),
        }
        .map_err(of)?;
        // Drivers inside this process (test, qemu:///embed) have no use for it and refuse.
        let _ = connect.set_keep_alive(KEEPALIVE_INTERVAL_S, KEEPALIVE_COUNT);
        let subscription = events::Subscription::new(&connect, events)?;
        Ok(Arc::new(VirtDriver { _subscription: subscription, connect }))
    }
}

/// An open connection. The subscription goes first, since it needs the connection to end itself.
#[derive(Debug)]
struct VirtDriver {
    _subscription: events::Subscription,
    connect: Connect,
}

impl VirtDriver {
    fn domain(&self, id: VmId) -> Result<Domain> {
        self.connect.lookup_domain_by_uuid(id.as_uuid()).map_err(of)
    }
}

impl Host for VirtDriver {
    fn versions(&self) -> Result<Versions> {
        let split = |number: u32| (number / 1_000_000, number / 1000 % 1000, number % 1000);
        Ok(Versions {
            libvirt: split(self.connect.lib_version().map_err(of)?),
            // A host may have no QEMU yet, and the driver answers all the same.
            hypervisor: self.connect.hyp_version().ok().filter(|&number| number != 0).map(split),
            driver: self.connect.driver_type().map_err(of)?,
            hostname: self.connect.hostname().map_err(of)?,
        })
    }

    fn capabilities(&self) -> Result<String> {
        self.connect.capabilities().map_err(of)
    }

    fn is_alive(&self) -> bool {
        self.connect.is_alive().unwrap_or(false)
    }
}

/// Libvirt's error as ours.
#[expect(clippy::needless_pass_by_value, reason = "so that it can be named in map_err")]
fn of(error: virt::error::Error) -> LibvirtError {
    LibvirtError::from_libvirt(error.code().to_raw(), error.message())
}
