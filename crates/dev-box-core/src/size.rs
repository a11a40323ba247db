//! Amounts of memory and disk.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

const UNITS: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// Why a text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not a whole number and a known unit.
    #[error("{text:?} is not a size: give a whole number and a unit, such as 512M, 2GiB or 4096 (bytes)")]
    Syntax {
        /// What was given, cut to 64 characters.
        text: String,
    },
    /// More than 2^64 - 1 bytes.
    #[error("{text:?} is more than a size can hold (16 EiB)")]
    TooLarge {
        /// What was given, cut to 64 characters.
        text: String,
    },
}

/// A number of bytes. `K`, `M`, `G`, `T` (also `KiB`...) are powers of 1024, `KB`, `MB`... powers of 1000.
///
/// ```
/// use dev_box_core::size::ByteSize;
/// assert_eq!("2GiB".parse::<ByteSize>()?, ByteSize::gib(2));
/// assert_eq!(ByteSize::mib(512).to_string(), "512MiB");
/// # Ok::<(), dev_box_core::size::SizeError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ByteSize(u64);

impl ByteSize {
    /// `bytes` bytes.
    #[must_use]
    pub const fn bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// `n` KiB (1024 bytes); saturates.
    #[must_use]
    pub const fn kib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 10))
    }

    /// `n` MiB (1024 KiB); saturates.
    #[must_use]
    pub const fn mib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 20))
    }

    /// `n` GiB (1024 MiB); saturates.
    #[must_use]
    pub const fn gib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 30))
    }

    /// In bytes.
    #[must_use]
    pub const fn as_bytes(self) -> u64 {
        self.0
    }

    /// In KiB, rounded up.
    #[must_use]
    pub const fn as_kib(self) -> u64 {
        self.0.div_ceil(1 << 10)
    }

    /// In MiB, rounded up.
    #[must_use]
    pub const fn as_mib(self) -> u64 {
        self.0.div_ceil(1 << 20)
    }

    /// The sum; saturates.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl fmt::Display for ByteSize {
    /// In the largest binary unit that divides it, so that nothing is lost.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS.iter().find(|(_, size)| self.0 != 0 && self.0.is_multiple_of(*size));
        let (name, size) = unit.copied().unwrap_or(("B", 1));
        write!(f, "{}{name}", self.0 / size)
    }
}

impl fmt::Debug for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let shown = || text.chars().take(64).collect::<String>();
        let trimmed = text.trim();
        let digits = trimmed.len() - trimmed.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = trimmed.split_at(digits);
        let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            "t" | "tib" => 1 << 40,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            "tb" => 1_000_000_000_000,
            _ => return Err(SizeError::Syntax { text: shown() }),
        };
        if number.is_empty() {
            return Err(SizeError::Syntax { text: shown() });
        }
        let bytes = number.parse::<u64>().ok().and_then(|n| n.checked_mul(factor));
        bytes.map(Self).ok_or_else(|| SizeError::TooLarge { text: shown() })
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    /// From a text (`"512M"`) or a number of bytes.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Number(u64),
            Text(String),
        }
        match Form::deserialize(deserializer)? {
            Form::Number(bytes) => Ok(Self(bytes)),
            Form::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn units() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("1 k", 1024),
            ("512M", 512 << 20),
            ("512mib", 512 << 20),
            ("2GiB", 2 << 30),
            ("1T", 1 << 40),
            ("1tib", 1 << 40),
            ("1KB", 1000),
            ("1MB", 1_000_000),
            ("3GB", 3_000_000_000),
            ("1TB", 1_000_000_000_000),
            (" 7B ", 7),
        ] {
            assert_eq!(text.parse::<ByteSize>().unwrap().as_bytes(), bytes, "{text}");
        }
        assert_eq!(ByteSize::kib(3), ByteSize::bytes(3072));
        assert_eq!(ByteSize::bytes(1025).as_kib(), 2);
        assert_eq!(ByteSize::bytes(1).as_mib(), 1);
        assert_eq!(ByteSize::gib(u64::MAX), ByteSize::bytes(u64::MAX));
        assert_eq!(ByteSize::mib(1).plus(ByteSize::bytes(u64::MAX)), ByteSize::bytes(u64::MAX));
        assert_eq!(format!("{:?} {}", ByteSize::gib(2), ByteSize::default()), "2GiB 0B");
    }

    #[test]
    fn refusals() {
        for text in ["", "M", "-1", "1.5G", "1 parsec", "½"] {
            assert!(matches!(text.parse::<ByteSize>(), Err(SizeError::Syntax { .. })), "{text}");
        }
        for text in ["18446744073709551616", "99999999T"] {
            assert!(matches!(text.parse::<ByteSize>(), Err(SizeError::TooLarge { .. })), "{text}");
        }
        assert!(serde_json::from_str::<ByteSize>("\"lots\"").is_err());
        assert_eq!(serde_json::from_str::<ByteSize>("4096").unwrap(), ByteSize::kib(4));
    }

    proptest! {
        #[test]
        fn display_loses_nothing(bytes in any::<u64>(), shift in 0u32..41) {
            let size = ByteSize::bytes(bytes >> shift << shift);
            prop_assert_eq!(size.to_string().parse::<ByteSize>().unwrap(), size);
            let json = serde_json::to_string(&size).unwrap();
            prop_assert_eq!(serde_json::from_str::<ByteSize>(&json).unwrap(), size);
        }

        #[test]
        fn no_text_panics(text in any::<String>()) {
            let _ = text.parse::<ByteSize>();
        }
    }
}
