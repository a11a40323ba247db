//! The hello that starts every connection: who speaks, which generations, which nonce.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::message::GuestText;

/// The generation this crate speaks, and the oldest it still understands. See `VERSIONING.md`.
pub const GENERATIONS: Generations = Generations { min: 1, max: 1 };

/// First bytes of every hello's payload, for ever. It holds bytes that text and line-ending conversions would break.
pub const MAGIC: [u8; 12] = *b"\xDBdev-box\r\n\x1A\0";

/// Capability of an agent that sets an IPv6 address
/// ([`NetworkConfig::ipv6`](crate::message::NetworkConfig::ipv6)). Another would leave its guest without IPv6 and say nothing.
pub const IPV6: &str = "ipv6";

/// The version of this crate, sent as the side's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Generations of the protocol that a side understands, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Generations {
    /// Oldest.
    pub min: u16,
    /// Newest.
    pub max: u16,
}

impl Generations {
    /// The newest generation both understand.
    pub fn common(self, other: Self) -> Option<u16> {
        let newest = self.max.min(other.max);
        (newest >= self.min && newest >= other.min).then_some(newest)
    }
}

impl fmt::Display for Generations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.min == self.max {
            write!(f, "{}", self.min)
        } else {
            write!(f, "{} to {}", self.min, self.max)
        }
    }
}

/// Sixteen random bytes the host makes for every activation; the guest's hello must echo them. On the wire 32
/// hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Nonce([u8; 16]);

impl Nonce {
    /// A fresh one from the kernel.
    ///
    /// # Errors
    /// [`HandshakeError::Random`] where the kernel has no randomness to give.
    pub fn fresh() -> Result<Self, HandshakeError> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes).map_err(|e| HandshakeError::Random(e.to_string()))?;
        Ok(Self(bytes))
    }

    /// One of known bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nonce({self})")
    }
}

/// Not 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a nonce is 32 hexadecimal digits")]
pub struct BadNonce;

impl FromStr for Nonce {
    type Err = BadNonce;

    fn from_str(text: &str) -> Result<Self, BadNonce> {
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(BadNonce);
        }
        u128::from_str_radix(text, 16).map(|n| Self(n.to_be_bytes())).map_err(|_| BadNonce)
    }
}

impl Serialize for Nonce {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Nonce {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What a side lets the other have in flight; each side obeys what the other said. Absent fields mean the defaults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct WireLimits {
    /// Streams open at once (only the host opens them).
    pub streams: u32,
    /// First credit of each lane, in bytes.
    pub lane_window: u32,
    /// First credit of each stream's messages, in bytes; a message costs its length and
    /// [`MESSAGE_COST`](crate::mux::MESSAGE_COST).
    pub message_window: u32,
}

impl Default for WireLimits {
    fn default() -> Self {
        Self { streams: 256, lane_window: 64 * 1024, message_window: 256 * 1024 }
    }
}

/// The host's hello.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostHello {
    /// dev-box's version on the host.
    pub version: String,
    /// Generations it speaks.
    pub generations: Generations,
    /// Fresh for every activation.
    pub nonce: Nonce,
    /// What it grants.
    #[serde(default)]
    pub limits: WireLimits,
    /// What it can do beyond its generation.
    #[serde(default)]
    pub capabilities: Vec<String>,
}

impl HostHello {
    /// This crate's version and generations, and a fresh nonce.
    ///
    /// # Errors
    /// [`HandshakeError::Random`].
    pub fn fresh() -> Result<Self, HandshakeError> {
        Ok(Self::with_nonce(Nonce::fresh()?))
    }

    /// As [`HostHello::fresh`] with a nonce made elsewhere.
    pub fn with_nonce(nonce: Nonce) -> Self {
        Self {
            version: VERSION.to_owned(),
            generations: GENERATIONS,
            nonce,
            limits: WireLimits::default(),
            capabilities: Vec::new(),
        }
    }
}

/// The guest's hello. Its nonce is the host's, put in by the session. All of it is the guest's claim: print its strings
/// through [`GuestText`] only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestHello {
    /// The agent's version.
    pub version: String,
    /// Generations it speaks.
    pub generations: Generations,
    /// `/proc/sys/kernel/random/boot_id`: a changed one says the guest rebooted.
    #[serde(default)]
    pub boot_id: String,
    /// What it grants.
    #[serde(default)]
    pub limits: WireLimits,
    /// What it can do beyond its generation.
    #[serde(default)]
    pub capabilities: Vec<String>,
}

impl GuestHello {
    /// This crate's version and generations.
    pub fn new(boot_id: impl Into<String>) -> Self {
        Self {
            version: VERSION.to_owned(),
            generations: GENERATIONS,
            boot_id: boot_id.into(),
            limits: WireLimits::default(),
            capabilities: Vec::new(),
        }
    }

    /// Whether the guest says that it can do this.
    pub fn can(&self, capability: &str) -> bool {
        self.capabilities.iter().any(|word| word == capability)
    }
}

/// The guest's hello as it goes over the wire: with the host's nonce.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestAnswer {
    /// The host's.
    pub nonce: Nonce,
    /// The guest's own.
    #[serde(flatten)]
    pub hello: GuestHello,
}

/// Why no session came to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// No generation in common.
    #[error(
        "the guest's agent is version {} and speaks protocol generation {guest_generations}, this dev-box is version \
         {host_version} and speaks {host_generations}: {}",
        guest_version, advice(*.guest_generations, *.host_generations)
    )]
    Version {
        /// dev-box on the host.
        host_version: String,
        /// What it speaks.
        host_generations: Generations,
        /// The agent in the guest, as it says.
        guest_version: GuestText,
        /// What it speaks.
        guest_generations: Generations,
    },
    /// Nobody answered the hello.
    #[error("no hello from the guest within {0:?}; {1}")]
    Deadline(std::time::Duration, &'static str),
    /// Hellos came, but none with our nonce: something replays an older conversation.
    #[error("{seen} hellos came within {within:?}, none with the nonce of this connection")]
    WrongNonce {
        /// How many.
        seen: u32,
        /// How long we waited.
        within: std::time::Duration,
    },
    /// Too many bytes that are no hello.
    #[error("no hello within the first {0} bytes")]
    NoHello(u64),
    /// A hello that cannot be read.
    #[error("a hello that cannot be read: {0}")]
    Malformed(String),
    /// The connection ended first.
    #[error("the connection ended before the hello")]
    Eof,
    /// Reading or writing failed.
    #[error("the connection failed before the hello: {1}")]
    Io(std::io::ErrorKind, String),
    /// No randomness for a nonce.
    #[error("the kernel gave no random bytes: {0}")]
    Random(String),
}

fn advice(guest: Generations, host: Generations) -> &'static str {
    if guest.max < host.min {
        "the image was built by an older dev-box: rebuild it with `dev-box image build`"
    } else {
        "the image was built by a newer dev-box: update dev-box on this host, or rebuild the image with `dev-box image build`"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generations_in_common() {
        let of = |min, max| Generations { min, max };
        assert_eq!(of(1, 1).common(of(1, 3)), Some(1));
        assert_eq!(of(2, 5).common(of(1, 3)), Some(3));
        assert_eq!(of(4, 5).common(of(1, 3)), None);
        assert_eq!(of(1, 3).common(of(4, 5)), None);
        // Nonsense from a guest is no generation.
        assert_eq!(of(1, 1).common(of(3, 1)), None);
        assert_eq!((of(2, 2).to_string(), of(1, 2).to_string()), ("2".to_owned(), "1 to 2".to_owned()));
    }

    #[test]
    fn nonces() {
        let (one, other) = (Nonce::fresh().unwrap(), HostHello::fresh().unwrap().nonce);
        assert_ne!(one, other);
        assert_eq!(one.to_string().parse(), Ok(one));
        assert_eq!(Nonce::from_bytes([0xAB; 16]).to_string(), "ab".repeat(16));
        for bad in ["", "xy", &"g".repeat(32), &"+".repeat(32), &"0".repeat(33)] {
            assert_eq!(bad.parse::<Nonce>(), Err(BadNonce), "{bad}");
        }
        assert!(serde_json::from_str::<Nonce>("3").is_err());
        assert_eq!(format!("{one:?}"), format!("Nonce({one})"));
    }
}
