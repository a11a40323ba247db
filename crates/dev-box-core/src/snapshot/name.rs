//! Names and tags.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

/// The longest name or tag, in bytes.
const MAX: usize = 64;

/// Why a snapshot's name or tag was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} cannot be a snapshot's {what}: use 1 to {MAX} letters, digits, '.', '_', '-', and begin with a letter or digit"
)]
pub struct NameError {
    /// `name` or `tag`.
    pub what: &'static str,
    /// What was given, cut to 80 characters.
    pub text: String,
}

macro_rules! word {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        ///
        /// 1 to 64 ASCII letters, digits, `.`, `_`, `-`, of which the first is a letter or digit: such a word needs no
        /// quoting anywhere, QEMU's monitor included.
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// The word.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                let first = text.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
                let rest = text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
                if first && rest && text.len() <= MAX {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(NameError { what: $what, text: text.chars().take(80).collect() })
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

word! {
    /// A snapshot's name.
    SnapshotName, "name"
}
word! {
    /// A word that a snapshot is marked with.
    Tag, "tag"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words() {
        for good in ["a", "1", "before-upgrade_2.0", &"x".repeat(64)] {
            assert_eq!(good.parse::<SnapshotName>().unwrap().to_string(), good);
            assert_eq!(good.parse::<Tag>().unwrap().as_str(), good);
        }
        for bad in ["", "-a", ".", "a b", "a;quit", "a\n", "é", "a/b", "\"a\"", &"x".repeat(65)] {
            assert!(bad.parse::<SnapshotName>().is_err(), "{bad}");
            assert!(bad.parse::<Tag>().unwrap_err().to_string().contains("tag"), "{bad}");
        }
    }
}
