//! Egress policy and its enforcement outside the guest: libvirt network, nwfilter, nftables guard.
//!
//! | module | what is in it |
//! |---|---|
//! | [`policy`] | [`EgressPolicy`]: what a VM may reach, read from TOML, with a digest |
//! | [`subnet`], [`identity`], [`lease`] | subnets, addresses and what is derived from them; leases across processes |
//! | [`xml`] | libvirt's network and its filters |
//! | [`guard`] | the host guard: nftables rules that hold a policy by themselves |
//! | [`resolver`] | names: a resolver for each VM whose policy has domains |
//! | [`events`] | what packets did: drops, new destinations, DNS, as a stream and on record |
//! | [`watch`] | verification while VMs run: pause, restore, resume |
//! | [`throttle`] | slowing down what a VM sends |
//! | [`vm_network`] | [`VmNetwork`]: all of that for one VM, in the right order, undone on failure |
//!
//! A VM's packets are judged twice: by libvirt's filter at its tap, and by the guard. Both are in place before the
//! VM starts, because [`VmNetwork::attach`] gives the lease that its interface needs.
//!
//! ```no_run
//! use std::sync::Arc;
//! use dev_box_core::{id::VmName, libvirt::Libvirt};
//! use dev_box_net::{EgressPolicy, NetSettings, NftFirewall, VmNetwork};
//!
//! fn start(libvirt: &dyn Libvirt, vm: &VmName) -> Result<(), dev_box_net::NetError> {
//!     let network = VmNetwork::new(NetSettings::new("/var/lib/dev-box/net"), Arc::new(NftFirewall::default()));
//!     if let Some(lease) = network.attach(libvirt, vm, &EgressPolicy::default())? {
//!         let _interface = lease.interface(); // goes into the VM's specification; then the VM runs
//!         network.detach(libvirt, lease)?; // when it is gone
//!     }
//!     Ok(())
//! }
//! ```

pub mod events;
pub mod guard;
pub mod host;
pub mod identity;
pub mod lease;
pub mod network;
pub mod policy;
mod program;
pub mod resolver;
pub mod subnet;
pub mod tap;
pub mod throttle;
pub mod vm_network;
pub mod watch;
pub mod xml;

pub use events::{EventSource, NetEvent, NetEventKind};
pub use guard::{Firewall, FirewallError, NftFirewall, Traffic};
pub use policy::{EgressPolicy, PolicyDigest, PolicyError};
pub use resolver::{DnsmasqResolver, Resolver, ResolverError};
pub use subnet::Subnet;
pub use throttle::{NftThrottle, ThrottleError};
pub use vm_network::{
    GuardState, Ipv6Lease, NetError, NetLease, NetSettings, PreparedTap, Verification, VmNetwork,
};
