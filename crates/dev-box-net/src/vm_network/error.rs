//! Why a VM has no network: [`NetError`].

use std::io;
use std::path::PathBuf;

use dev_box_core::id::VmName;
use dev_box_core::libvirt::LibvirtError;

use crate::events::RecordError;
use crate::guard::{FirewallError, GuardError};
use crate::lease::LeaseError;
use crate::network::InvalidName;
use crate::resolver::ResolverError;
use crate::subnet::SubnetError;
use crate::tap::TapError;
use crate::xml::network::UnreadableNetwork;

/// Why a VM has no network.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// the configured names
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// no subnet
    #[error(transparent)]
    Subnet(#[from] SubnetError),
    /// a libvirt network has our name but is not as we make it
    #[error(
        "libvirt has a network \"{name}\" that is not as dev-box makes it ({difference}): remove it with \
         `virsh net-destroy {name}; virsh net-undefine {name}`, or configure another name"
    )]
    ForeignNetwork {
        /// Its name.
        name: String,
        /// What is different.
        difference: String,
    },
    /// libvirt's XML
    #[error(transparent)]
    Unreadable(#[from] UnreadableNetwork),
    /// libvirt refused
    #[error("libvirt could not {what}")]
    Libvirt {
        /// What was asked.
        what: String,
        /// Why not.
        #[source]
        source: LibvirtError,
    },
    /// no tap
    #[error(transparent)]
    Tap(#[from] TapError),
    /// no address
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// the rules
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// the firewall
    #[error("the firewall rules could not be changed")]
    Firewall(#[from] FirewallError),
    /// the policy's names
    #[error("the names of the policy cannot be served")]
    Resolver(#[from] ResolverError),
    /// the events on record
    #[error(transparent)]
    Record(#[from] RecordError),
    /// the lease is gone
    #[error("there is no lease on record for {vm}")]
    NoLease {
        /// The VM.
        vm: VmName,
    },
    /// its first rules are not there yet
    #[error("the network of {vm} is just being made: try again when the VM runs")]
    Starting {
        /// The VM.
        vm: VmName,
    },
    /// the host does not tell
    #[error("{path} cannot be {what}")]
    Host {
        /// What was read or written.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// no IPv6
    #[error(
        "the policy enables IPv6, and VMs of this host have none: `ipv6 = true` under [host] of the configuration \
         makes the network with it"
    )]
    NoIpv6,
    /// no IPv6 yet
    #[error(
        "the policy enables IPv6, and the network {network} has none yet: it is made anew when no VM uses it, so end \
         them first"
    )]
    Ipv6Later {
        /// The network as it is.
        network: String,
    },
    /// VMs are still there
    #[error("{0} VM(s) still have a network: end them first")]
    InUse(usize),
}
