//! What VMs' packets did, as it happens: [`NetEvent`].
//!
//! ```text
//!   guard's rules --log group (rate-limited there)--> NFLOG socket --> report (pure) --> NetEvent --> whoever asks
//!                                                                                          |
//!                                                                                          +--> RecordFile (bounded)
//! ```
//!
//! The rules report a dropped packet (5 a second by reason, and as many to addresses of clouds' metadata), the first packet to a
//! destination, and DNS queries and answers, over UDP and over TCP (20 a second each): a guest that floods is counted in full ([`crate::Traffic`]), and reported in samples.
//! What is in a packet is the guest's claim; that the host saw the packet is not.

mod dns;
mod nflog;
mod record;
mod report;

use std::net::IpAddr;

use dev_box_core::clock::EasternTime;
use dev_box_core::id::VmName;
use serde::{Deserialize, Serialize};

use crate::guard::DropReason;

pub use nflog::{EventSource, EventSourceError};
pub use record::{RecordError, RecordFile, read_records};
pub use report::{Report, Unreportable};

/// Something a VM's network saw.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetEvent {
    /// When the host read it, Eastern.
    pub at: EasternTime,
    /// The VM.
    pub vm: VmName,
    /// What.
    #[serde(flatten)]
    pub what: NetEventKind,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum NetEventKind {
    /// A packet from or to the VM was dropped.
    Dropped {
        /// Why.
        reason: DropReason,
        /// What it was.
        packet: PacketSummary,
    },
    /// The VM opened a connection to an address and port for the first time within an hour.
    NewDestination {
        /// The packet that opened it.
        packet: PacketSummary,
    },
    /// The VM asked for a name.
    DnsQuery {
        /// The question.
        question: DnsQuestion,
    },
    /// A name server's answer reached the VM.
    DnsAnswer {
        /// The question.
        question: DnsQuestion,
        /// The response code, 0 for success and 3 for a name that does not exist (RFC 1035, 4.1.1).
        code: u16,
        /// The addresses in it, at most [`MAX_ANSWERS`]; none where it was too long to be reported as a whole.
        addresses: Vec<IpAddr>,
    },
    /// The rules were not as they should be; see [`crate::watch`].
    Tampered {
        /// What was found.
        finding: String,
        /// Whether the VM was paused for it.
        paused: bool,
    },
    /// The VM stands still until its rules were looked at, which may have changed.
    Doubted,
    /// The rules are as they should be again, or were found so, and the VM goes on.
    Restored,
    /// What the host does for VMs' packets is not as it was. It keeps nobody in; see [`crate::Verification::hindrance`].
    HostChanged {
        /// What is different now.
        finding: String,
    },
    /// Reports that were lost, because nobody read them fast enough.
    Lost {
        /// How many, at least.
        reports: u64,
    },
}

/// Most addresses of a DNS answer that are kept.
pub const MAX_ANSWERS: usize = 16;

/// A packet's headers, as far as they could be read.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PacketSummary {
    /// `tcp`, `udp`, `icmp`, `icmpv6`, `arp`, or a number: `ip 47`, `ethernet 0x8100`.
    pub protocol: String,
    /// Sender.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<IpAddr>,
    /// Receiver.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<IpAddr>,
    /// Sender's port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_port: Option<u16>,
    /// Receiver's port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_port: Option<u16>,
}

/// What a DNS message asks (RFC 1035, 4.1.2).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DnsQuestion {
    /// The name, without a final dot; characters that a host name does not have are shown as `?`.
    pub name: String,
    /// `A`, `AAAA`, `TXT`...
    pub kind: String,
}
