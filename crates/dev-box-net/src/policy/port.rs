//! Ports of a policy: `tcp/443`, `udp/8000-8100`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A transport whose ports a policy can open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// An inclusive range of ports of one protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortRule {
    protocol: Protocol,
    first: u16,
    last: u16,
}

/// A port rule that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a port: write \"tcp/443\" or \"udp/8000-8100\", with ports from 1 to 65535")]
pub struct InvalidPort;

impl PortRule {
    /// One port.
    ///
    /// # Errors
    /// [`InvalidPort`] for port 0.
    pub fn single(protocol: Protocol, port: u16) -> Result<Self, InvalidPort> {
        Self::range(protocol, port, port)
    }

    /// All ports from `first` to `last`, both included.
    ///
    /// # Errors
    /// [`InvalidPort`] for port 0 and for a range that ends before it starts.
    pub fn range(protocol: Protocol, first: u16, last: u16) -> Result<Self, InvalidPort> {
        if first == 0 || last < first { Err(InvalidPort) } else { Ok(Self { protocol, first, last }) }
    }

    const fn tcp(port: u16) -> Self {
        Self { protocol: Protocol::Tcp, first: port, last: port }
    }

    /// The protocol.
    pub fn protocol(self) -> Protocol {
        self.protocol
    }

    /// The first port.
    pub fn first(self) -> u16 {
        self.first
    }

    /// The last port, included.
    pub fn last(self) -> u16 {
        self.last
    }

    /// Whether some port is in both.
    pub fn overlaps(self, other: Self) -> bool {
        self.protocol == other.protocol && self.first <= other.last && other.first <= self.last
    }

    /// `443` or `8000-8100`, as nft writes it.
    pub(crate) fn ports(self) -> String {
        if self.first == self.last { self.first.to_string() } else { format!("{}-{}", self.first, self.last) }
    }
}

/// What `nat-filtered` opens, sorted: ssh, http, https, git.
pub(super) const NAT_FILTERED: [PortRule; 4] =
    [PortRule::tcp(22), PortRule::tcp(80), PortRule::tcp(443), PortRule::tcp(9418)];

impl fmt::Display for PortRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.protocol, self.ports())
    }
}

impl FromStr for PortRule {
    type Err = InvalidPort;

    fn from_str(text: &str) -> Result<Self, InvalidPort> {
        let (protocol, ports) = text.split_once('/').ok_or(InvalidPort)?;
        let protocol = match protocol {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            _ => return Err(InvalidPort),
        };
        let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
        Self::range(protocol, number(first)?, number(last)?)
    }
}

/// `u16::from_str` takes `+80` and `0080`; a policy has one spelling for each port.
fn number(text: &str) -> Result<u16, InvalidPort> {
    if text.starts_with('0') || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(InvalidPort);
    }
    text.parse().map_err(|_| InvalidPort)
}
