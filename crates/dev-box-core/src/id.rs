//! Names and identities: of VMs, jobs and leases.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize};
use uuid::Uuid;

/// Why a name or identity was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Nothing was given.
    #[error("a VM's name must not be empty")]
    Empty,
    /// More than [`VmName::MAX_LEN`] bytes.
    #[error("a VM's name has at most {max} characters, this one has {length}", max = VmName::MAX_LEN)]
    TooLong {
        /// Bytes given.
        length: usize,
    },
    /// A character that is not a letter, a digit, `.`, `_` or `-`, or a first one that is neither letter nor digit.
    #[error(
        "{found:?} at position {at} is not allowed in a VM's name: use letters, digits, '.', '_', '-', and begin with a letter or digit"
    )]
    Character {
        /// The character.
        found: char,
        /// Its byte offset.
        at: usize,
    },
    /// Not a UUID.
    #[error("{text:?} is not a UUID")]
    NotUuid {
        /// What was given, cut to 64 characters.
        text: String,
    },
}

/// A VM's name, which is its libvirt domain's name and a directory's: 1 to 63 ASCII letters, digits, `.`, `_`, `-`,
/// of which the first is a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct VmName(String);

impl VmName {
    /// The longest name, in bytes: what a host name's label may have.
    pub const MAX_LEN: usize = 63;
    /// What the names of disposable VMs begin with.
    pub const PREFIX: &'static str = "dev-box";

    /// Checks a name.
    ///
    /// # Errors
    /// [`IdError`], which says what is wrong and where.
    pub fn new(name: impl Into<String>) -> Result<Self, IdError> {
        let name = name.into();
        if name.is_empty() {
            return Err(IdError::Empty);
        }
        if name.len() > Self::MAX_LEN {
            return Err(IdError::TooLong { length: name.len() });
        }
        let bad = name
            .char_indices()
            .find(|&(at, c)| !(c.is_ascii_alphanumeric() || (at > 0 && matches!(c, '.' | '_' | '-'))));
        match bad {
            Some((at, found)) => Err(IdError::Character { found, at }),
            None => Ok(Self(name)),
        }
    }

    /// A fresh name `PREFIX-XXXXXXXX` with eight random hexadecimal digits.
    ///
    /// # Errors
    /// [`IdError`] when `prefix` cannot begin a name.
    pub fn generate(prefix: &str) -> Result<Self, IdError> {
        let random = Uuid::new_v4().simple().to_string();
        Self::new(format!("{prefix}-{}", random.get(..8).unwrap_or_default()))
    }

    /// A fresh name of a disposable VM: `dev-box-XXXXXXXX`.
    #[must_use]
    pub fn disposable() -> Self {
        let random = Uuid::new_v4().simple().to_string();
        Self(format!("{}-{}", Self::PREFIX, random.get(..8).unwrap_or_default()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VmName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for VmName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmName {
    type Err = IdError;

    fn from_str(name: &str) -> Result<Self, IdError> {
        Self::new(name)
    }
}

impl<'de> Deserialize<'de> for VmName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::new(String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// A fresh random identity (UUID version 4).
            #[must_use]
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }

            /// The UUID.
            #[must_use]
            pub fn as_uuid(&self) -> Uuid {
                self.0
            }
        }

        impl From<Uuid> for $name {
            fn from(id: Uuid) -> Self {
                Self(id)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), self.0)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let id = Uuid::try_parse(text)
                    .map_err(|_| IdError::NotUuid { text: text.chars().take(64).collect() })?;
                Ok(Self(id))
            }
        }
    };
}

uuid_id! {
    /// A VM's identity: the UUID of its libvirt domain.
    VmId
}
uuid_id! {
    /// A job's identity.
    JobId
}
uuid_id! {
    /// The identity of one lease of a VM to one job.
    LeaseId
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn refusals_say_what_and_where() {
        assert_eq!(VmName::new(""), Err(IdError::Empty));
        assert_eq!(VmName::new("a".repeat(64)), Err(IdError::TooLong { length: 64 }));
        assert_eq!(VmName::new("a/b"), Err(IdError::Character { found: '/', at: 1 }));
        assert_eq!(VmName::new("-a"), Err(IdError::Character { found: '-', at: 0 }));
        assert!(VmName::new("..").unwrap_err().to_string().contains("position 0"));
        assert!(VmName::new("é").is_err());
        assert!(VmName::generate(&"p".repeat(60)).is_err());
        assert!(serde_json::from_str::<VmName>("\"a b\"").is_err());
        assert!("not-a-uuid".parse::<VmId>().unwrap_err().to_string().contains("not-a-uuid"));
    }

    #[test]
    fn fresh_names_differ_and_are_valid() {
        let (a, b) = (VmName::disposable(), VmName::generate("dev-box").unwrap());
        assert_ne!(a, b);
        for name in [a, b] {
            assert_eq!(name.as_str().len(), "dev-box-".len() + 8);
            assert_eq!(name.to_string().parse::<VmName>().unwrap(), name);
        }
        assert_ne!(JobId::random(), JobId::random());
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_is_a_safe_file_name(text in any::<String>()) {
            if let Ok(name) = VmName::new(text.clone()) {
                prop_assert_eq!(name.as_str(), &text);
                prop_assert!(!text.contains('/') && text != "." && text != ".." && text.len() <= VmName::MAX_LEN);
            }
        }

        #[test]
        fn ids_round_trip(bits in any::<u128>()) {
            let id = LeaseId::from(Uuid::from_u128(bits));
            prop_assert_eq!(id.to_string().parse::<LeaseId>().unwrap(), id);
            let json = serde_json::to_string(&id).unwrap();
            prop_assert_eq!(serde_json::from_str::<LeaseId>(&json).unwrap(), id);
        }
    }
}
