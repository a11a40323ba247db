//! The keys of the chain: each record has its own, made from the one before, which is then forgotten.
//!
//! ```text
//!  first key = K1 --ratchet--> K2 --ratchet--> K3 ...      ratchet(K) = HMAC-SHA256(K, 0x02)
//!              |               |
//!              v               v
//!  prev=0 -> hash1 --prev-> hash2 --prev-> ...             hash       = HMAC-SHA256(K, 0x01 || line up to the hash)
//!                                                          head's mac = HMAC-SHA256(K of the next record, 0x03 || head)
//! ```
//!
//! Whoever takes the machine after record n finds K(n+1). HMAC does not run backwards, so no record up to n and no
//! head up to n can be made anew; the future is theirs, as with any log. (The construction is that of Bellare and
//! Yee, "Forward-Security in Private-Key Cryptography", 2003, and of Schneier and Kelsey's secure audit logs, 1999.)

use std::fmt;

use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

const RECORD: u8 = 1;
const RATCHET: u8 = 2;
const HEAD: u8 = 3;

/// 32 bytes that are public: a record's hash, the digest of a file. Shown and stored as 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hash([u8; 32]);

/// A text that is not 64 lower-case hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not 64 hex digits")]
pub struct NotHex;

impl Hash {
    /// What the first record follows.
    pub const ZERO: Self = Self([0; 32]);

    /// The SHA-256 of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// From raw bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl TryFrom<String> for Hash {
    type Error = NotHex;

    fn try_from(text: String) -> Result<Self, NotHex> {
        parse_hex(&text).map(Self)
    }
}

impl std::str::FromStr for Hash {
    type Err = NotHex;

    fn from_str(text: &str) -> Result<Self, NotHex> {
        parse_hex(text).map(Self)
    }
}

impl From<Hash> for String {
    fn from(hash: Hash) -> Self {
        hex::encode(hash.0)
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Upper case is refused: a hash has one spelling, or a changed byte could go unnoticed.
fn parse_hex(text: &str) -> Result<[u8; 32], NotHex> {
    let mut bytes = [0; 32];
    if text.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err(NotHex);
    }
    hex::decode_to_slice(text, &mut bytes).map_err(|_| NotHex)?;
    Ok(bytes)
}

/// The key of one record. Secret: no `Display`, and `Debug` shows nothing of it.
#[derive(Clone, PartialEq, Eq)]
pub struct Key([u8; 32]);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        self.0.fill(0);
        // Keeps the compiler from leaving out a write to memory that is about to go.
        std::hint::black_box(&self.0);
    }
}

impl Key {
    /// A key from 32 bytes of a good random source.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// A key from the hex digits of a key file.
    ///
    /// # Errors
    /// [`NotHex`].
    pub fn from_hex(text: &str) -> Result<Self, NotHex> {
        parse_hex(text).map(Self)
    }

    /// The hex digits for a key file. Nothing else should hold them.
    pub(crate) fn to_hex(&self) -> String {
        hex::encode(self.0)
    }

    fn tagged(&self, purpose: u8, bytes: &[u8]) -> [u8; 32] {
        // HMAC takes keys of any length, so the error cannot happen; the all-zero answer would fail every check.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.0) else { return [0; 32] };
        mac.update(&[purpose]);
        mac.update(bytes);
        mac.finalize().into_bytes().into()
    }

    /// The hash of a record, over the bytes of its line before the hash.
    #[must_use]
    pub fn record_hash(&self, body: &[u8]) -> Hash {
        Hash(self.tagged(RECORD, body))
    }

    /// The mac of a head, by the key of the record *after* it.
    #[must_use]
    pub(crate) fn head_mac(&self, body: &[u8]) -> Hash {
        Hash(self.tagged(HEAD, body))
    }

    /// The next record's key.
    #[must_use]
    pub fn next(&self) -> Self {
        Self(self.tagged(RATCHET, &[]))
    }

    /// The key `steps` records later.
    #[must_use]
    pub fn after(&self, steps: u64) -> Self {
        let mut key = self.clone();
        for _ in 0..steps {
            key = key.next();
        }
        key
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_has_one_spelling() {
        let hash = Hash::of(b"x");
        let text = hash.to_string();
        assert_eq!(text.parse(), Ok(hash));
        assert_eq!(text.to_uppercase().parse::<Hash>(), Err(NotHex));
        assert_eq!(text[1..].parse::<Hash>(), Err(NotHex));
        assert_eq!("zz".repeat(32).parse::<Hash>(), Err(NotHex));
        assert_eq!(serde_json::from_str::<Hash>(&serde_json::to_string(&hash).unwrap()).unwrap(), hash);
    }

    #[test]
    fn purposes_and_steps_give_different_keys() {
        let key = Key::from_bytes([7; 32]);
        assert_ne!(key.record_hash(b""), key.head_mac(b""));
        assert_ne!(key.next().to_hex(), key.record_hash(b"").to_string());
        assert_eq!(key.after(3), key.next().next().next());
        assert_ne!(key.record_hash(b"a"), key.record_hash(b"b"));
        assert_eq!(format!("{key:?}"), "Key(..)");
    }

    #[test]
    fn the_construction_does_not_drift() {
        // HMAC-SHA256(07 * 32, 01 || "abc"), worked out with Python's hmac module.
        let key = Key::from_bytes([7; 32]);
        assert_eq!(
            key.record_hash(b"abc").to_string(),
            "de72b1fbddfbaef2bfd9ad52f3a95ca5b3ee6d9cf248c1c50d9bc8af9f0474aa",
        );
        assert_eq!(key.next().to_hex(), "469e03123f1c9c6d5c3ffaa260c7fef9f863c0b6af93f7dcae5c13cbfdadfca5");
    }
}
