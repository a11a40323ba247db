//! The host guard: nftables rules of our own that hold a VM's policy by themselves.
//!
//! Two tables, `bridge dev_box` and `inet dev_box`, with chains by VM (and a third, `arp dev_box`, with one rule):
//!
//! ```text
//!  VM's tap --> bridge prerouting: spoofing, protocols, static classes, ports     --+
//!               bridge input:      only frames addressed to the gateway             |
//!                                                                                   v
//!  the host <-- inet input: DNS to the gateway only       inet prerouting: none of the host's addresses
//!  internet <-- inet forward: connection tracking, the classes and ports again, limits
//!               inet postrouting:  leaves in the host's name
//!
//!  internet --> inet forward: replies only --> bridge postrouting (to the tap): from the gateway's MAC,
//!  the host --> inet output: DNS replies only                                   to this VM, same classes and ports
//! ```
//!
//! The bridge half sees a frame's tap, so it ties tap, Ethernet and IP address together; the inet half can then go by
//! IP address, and knows connections. Neither needs `bridge-nf-call-iptables`. Every packet is judged, established
//! or not, so that a changed policy cuts what it no longer allows. Under a policy with names the VM's DNS goes to a
//! resolver of its own ([`crate::resolver`]), which puts the answers' addresses into a set that the classes look at last.
//! Frames from a tap (`dbt*`) that no VM's rules claim are dropped: a VM whose rules are missing has no network rather
//! than an open one, as long as the tables stand; that they stand is what [`Firewall::inspect`] is for.
//!
//! Addresses are translated here as libvirt does it, and after libvirt, whose own rules for that nobody puts back when
//! they are flushed ([`NetworkRules`]).

#[cfg(any(test, feature = "testing"))]
pub mod fake;
mod filters;
mod generation;
mod listing;
mod memory;
mod network_rules;
mod nft;
mod render;

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;

use dev_box_core::id::VmName;
use dev_box_core::spec::MacAddress;
use serde::{Deserialize, Serialize};

use crate::identity::{mac_of, tap_of};
use crate::network::NetworkShape;
use crate::policy::EgressPolicy;

pub use filters::{FilterRule, FilterRules};
pub use network_rules::NetworkRules;
pub use nft::NftFirewall;
pub use render::{render_apply, render_clear, render_remove};

/// The rules of one VM: which packets its tap may carry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmGuard {
    vm: VmName,
    network: NetworkShape,
    address: Ipv4Addr,
    policy: EgressPolicy,
    forgets_names: bool,
    is_for_a_new_vm: bool,
}

/// Why rules cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GuardError {
    /// an isolated VM has no tap to guard
    #[error("an isolated VM has no interface to guard")]
    Isolated,
    /// the address is not one of the network's
    #[error("{address} is no VM's address on {network}")]
    ForeignAddress {
        /// The address.
        address: Ipv4Addr,
        /// The network.
        network: String,
    },
}

impl VmGuard {
    /// The rules for a VM with that address under that policy.
    ///
    /// # Errors
    /// [`GuardError`]: the policy is `isolated`, or the address is not one of the network's.
    pub fn new(
        vm: VmName,
        network: NetworkShape,
        address: Ipv4Addr,
        policy: EgressPolicy,
    ) -> Result<Self, GuardError> {
        if policy.is_isolated() {
            return Err(GuardError::Isolated);
        }
        if !network.subnet().is_guest(address) {
            return Err(GuardError::ForeignAddress { address, network: network.to_string() });
        }
        Ok(Self { vm, network, address, policy, forgets_names: false, is_for_a_new_vm: false })
    }

    /// The same, closing the addresses that names have opened so far: for a policy with other names.
    #[must_use]
    pub fn forgetting_names(self) -> Self {
        Self { forgets_names: true, ..self }
    }

    /// Whether addresses that names have opened so far are closed.
    pub fn forgets_names(&self) -> bool {
        self.forgets_names
    }

    /// The same, for a VM that gets the address now: nothing of what whoever had it before did counts any more. Names have opened
    /// nothing, nothing was reached, and nobody [slows it down](crate::throttle).
    #[must_use]
    pub fn for_a_new_vm(self) -> Self {
        Self { is_for_a_new_vm: true, ..self.forgetting_names() }
    }

    /// Whether a VM gets the address with these rules.
    pub fn is_for_a_new_vm(&self) -> bool {
        self.is_for_a_new_vm
    }

    /// The VM.
    pub fn vm(&self) -> &VmName {
        &self.vm
    }

    /// Its network.
    pub fn network(&self) -> &NetworkShape {
        &self.network
    }

    /// Its address, which names the rules.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Its tap.
    pub fn tap(&self) -> String {
        tap_of(self.address)
    }

    /// Its Ethernet address.
    pub fn mac(&self) -> MacAddress {
        mac_of(self.address)
    }

    /// What it may do.
    pub fn policy(&self) -> &EgressPolicy {
        &self.policy
    }
}

/// Enforces and reports rules. Blocking; one call is one transaction: it takes effect wholly or not at all.
pub trait Firewall: fmt::Debug + Send + Sync {
    /// Puts a VM's rules in place, replacing what its address had. Counters go on.
    ///
    /// # Errors
    /// [`FirewallError`].
    fn apply(&self, guard: &VmGuard) -> Result<Fingerprint, FirewallError>;

    /// Removes the rules of an address; no error when there are none.
    ///
    /// # Errors
    /// [`FirewallError`].
    fn remove(&self, address: Ipv4Addr) -> Result<(), FirewallError>;

    /// The addresses that have rules, ascending.
    ///
    /// # Errors
    /// [`FirewallError`].
    fn list(&self) -> Result<Vec<Ipv4Addr>, FirewallError>;

    /// What stands now for each of these addresses; no entry for an address that has no rules.
    ///
    /// # Errors
    /// [`FirewallError`].
    fn inspect(&self, addresses: &[Ipv4Addr]) -> Result<BTreeMap<Ipv4Addr, Fingerprint>, FirewallError>;

    /// What was carried and dropped for each guarded address since its rules were first applied.
    ///
    /// # Errors
    /// [`FirewallError`].
    fn traffic(&self) -> Result<BTreeMap<Ipv4Addr, Traffic>, FirewallError>;

    /// The rules that libvirt's filters have in force, of each VM that has all its chains; no entry for one that lacks any.
    ///
    /// # Errors
    /// [`FirewallError`].
    fn filters(&self) -> Result<BTreeMap<Ipv4Addr, FilterRules>, FirewallError>;

    /// A number that is another one when anything of libvirt's filters is, of whatever VM, whole or in pieces: whether somebody is at them.
    /// `None` where that cannot be told.
    ///
    /// # Errors
    /// [`FirewallError`].
    fn filters_mark(&self) -> Result<Option<u64>, FirewallError> {
        Ok(None)
    }

    /// What stands of libvirt's own rules for the network: NAT, and that it is forwarded.
    ///
    /// # Errors
    /// [`FirewallError`].
    fn network_rules(&self, shape: &NetworkShape) -> Result<NetworkRules, FirewallError>;

    /// Has all that the VM with this address reaches from now on reported as new, of IPv6 too where its policy has that. Its rules
    /// stay as they are.
    ///
    /// # Errors
    /// [`FirewallError`]; the address has no rules, among them.
    fn forget_reached(&self, address: Ipv4Addr, ipv6: bool) -> Result<(), FirewallError>;

    /// Gives up what is remembered of earlier looks, where something is: the next look is at everything.
    fn forget(&self) {}

    /// Removes everything of ours and nothing else.
    ///
    /// # Errors
    /// [`FirewallError`].
    fn clear(&self) -> Result<(), FirewallError>;
}

/// Why the firewall did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum FirewallError {
    /// the program is missing
    #[error("{program} cannot be run: install the packages nftables and ebtables")]
    NotInstalled {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// not root
    #[error("nft may not change the firewall ({message}): run as root")]
    NotPermitted {
        /// nft's text.
        message: String,
    },
    /// nft refused the rules
    #[error("nft refused {what}: {message}")]
    Refused {
        /// What was asked.
        what: String,
        /// nft's text, cut.
        message: String,
    },
    /// talking to nft failed
    #[error("talking to nft failed")]
    Io(#[from] std::io::Error),
    /// nft's listing is not what it is documented to be
    #[error("nft's listing cannot be read: {0}")]
    Listing(String),
}

/// A digest of the rules that hold for a VM, as the kernel lists them: any change by anyone changes it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(pub(crate) String);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a packet was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DropReason {
    /// An Ethernet, ARP or IP source that is not the VM's, or ARP for others than the gateway.
    Spoofed,
    /// Neither IPv4 nor ARP (IPv6, VLAN tags...), or IPv4 with fragments or options.
    Protocol,
    /// The gateway, except its resolver.
    Gateway,
    /// Another address of the host.
    Host,
    /// Another VM.
    Neighbour,
    /// A range the policy denies.
    Denied,
    /// A range that is not public.
    Special,
    /// An address that is not on the policy's list.
    Destination,
    /// A port or protocol that is not on the policy's list.
    Port,
    /// More new connections or DNS queries, or more bytes, in a second than the policy's limit.
    Rate,
    /// More open connections than the policy's limit.
    Connections,
    /// Not a reply to anything the VM sent.
    Unsolicited,
}

impl DropReason {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Spoofed,
        Self::Protocol,
        Self::Gateway,
        Self::Host,
        Self::Neighbour,
        Self::Denied,
        Self::Special,
        Self::Destination,
        Self::Port,
        Self::Rate,
        Self::Connections,
        Self::Unsolicited,
    ];

    /// The name in rules, logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Spoofed => "spoofed",
            Self::Protocol => "protocol",
            Self::Gateway => "gateway",
            Self::Host => "host",
            Self::Neighbour => "neighbour",
            Self::Denied => "denied",
            Self::Special => "special",
            Self::Destination => "destination",
            Self::Port => "port",
            Self::Rate => "rate",
            Self::Connections => "connections",
            Self::Unsolicited => "unsolicited",
        }
    }
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Packets and bytes (of IP packets with their Ethernet header where the bridge counts).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

impl Count {
    fn add(&mut self, other: Self) {
        self.packets = self.packets.saturating_add(other.packets);
        self.bytes = self.bytes.saturating_add(other.bytes);
    }
}

/// A VM's traffic.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Traffic {
    /// What the VM sent, before anything was dropped.
    pub sent: Count,
    /// What reached the last rule before the VM's tap, before anything was dropped there.
    pub received: Count,
    /// Connections the VM opened.
    pub connections: u64,
    /// What was dropped, by reason; reasons that never occurred are absent.
    pub dropped: BTreeMap<DropReason, Count>,
}

impl Traffic {
    /// Packets dropped for any reason.
    pub fn dropped_packets(&self) -> u64 {
        self.dropped.values().fold(0, |sum, count| sum.saturating_add(count.packets))
    }
}
