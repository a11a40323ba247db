//! SHA-256 of what an image is made of.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// A SHA-256 digest; displays as `sha256:` and 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

/// The text is no digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a digest: expected `sha256:` and 64 hexadecimal digits")]
pub struct DigestError;

impl Digest {
    /// Of bytes in memory.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// Of a file's content, in constant memory.
    ///
    /// # Errors
    /// What opening or reading it said.
    pub fn of_file(path: &Path) -> io::Result<Self> {
        Self::of_reader(File::open(path)?)
    }

    /// Of everything a reader yields.
    ///
    /// # Errors
    /// What reading said.
    pub fn of_reader(mut reader: impl Read) -> io::Result<Self> {
        let mut state = Sha256::new();
        let mut buffer = vec![0; 1 << 18];
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return Ok(Self(state.finalize().into())),
                Ok(count) => state.update(buffer.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Of named parts. Names and lengths are hashed too, so that no two different lists of parts give the same bytes.
    #[must_use]
    pub fn of_parts<'a>(parts: impl IntoIterator<Item = (&'a str, &'a [u8])>) -> Self {
        let mut state = Sha256::new();
        for (name, value) in parts {
            for field in [name.as_bytes(), value] {
                state.update((field.len() as u64).to_le_bytes());
                state.update(field);
            }
        }
        Self(state.finalize().into())
    }

    /// The first 12 hexadecimal digits: enough to tell apart what lies on one disk.
    #[must_use]
    pub fn short(&self) -> String {
        hex::encode(self.0).chars().take(12).collect()
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "sha256:{}", hex::encode(self.0))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Digest({})", self.short())
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let digits = text.strip_prefix("sha256:").ok_or(DigestError)?;
        let mut bytes = [0; 32];
        hex::decode_to_slice(digits, &mut bytes).map_err(|_| DigestError)?;
        Ok(Self(bytes))
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;

    fn try_from(text: String) -> Result<Self, DigestError> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// A digest of bytes that come one after the other.
#[derive(Default)]
pub(crate) struct DigestBuilder(Sha256);

impl DigestBuilder {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn finish(self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn agrees_with_a_published_vector() {
        // FIPS 180-4, "abc".
        let digest = Digest::of(b"abc");
        assert_eq!(
            digest.to_string(),
            "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(digest.short(), "ba7816bf8f01");
        assert_eq!(digest.as_bytes()[0], 0xba);
        assert_eq!(format!("{digest:?}"), "Digest(ba7816bf8f01)");
    }

    #[test]
    fn a_file_is_its_bytes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let bytes = vec![7; (1 << 18) + 3];
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(Digest::of_file(&path).unwrap(), Digest::of(&bytes));
        assert!(Digest::of_file(&directory.path().join("none")).is_err());
        assert!(Digest::of_file(directory.path()).is_err());
    }

    #[test]
    fn parts_cannot_be_shifted_into_one_another() {
        let one = Digest::of_parts([("a", b"bc".as_slice())]);
        let other = Digest::of_parts([("ab", b"c".as_slice())]);
        assert_ne!(one, other);
    }

    #[test]
    fn texts_that_are_none_are_refused() {
        for bad in ["", "sha256:", "sha512:00", "sha256:zz", &format!("sha256:{}", "0".repeat(66))] {
            assert_eq!(bad.parse::<Digest>(), Err(DigestError));
        }
        assert!(serde_json::from_str::<Digest>("\"x\"").is_err());
    }

    proptest! {
        #[test]
        fn text_and_json_round_trip(bytes in proptest::array::uniform32(any::<u8>())) {
            let digest = Digest(bytes);
            prop_assert_eq!(digest.to_string().parse(), Ok(digest));
            let json = serde_json::to_string(&digest).unwrap();
            prop_assert_eq!(serde_json::from_str::<Digest>(&json).unwrap(), digest);
        }
    }
}
