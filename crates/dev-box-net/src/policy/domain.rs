//! Names of a policy: `github.com`, `*.crates.io`.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// A name, or a name and everything below it (`*.crates.io` covers `static.crates.io`, not `crates.io`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DomainPattern {
    below: bool,
    name: String,
}

/// Why a name cannot stand in a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidDomain {
    /// an IP address is not a domain: put it in `allow`, as "192.0.2.7/32"
    #[error("an IP address is not a domain: put it in `allow`, as a CIDR")]
    IsAddress,
    /// `*` in a place other than the first label
    #[error("`*` may only stand as the whole first label, as in \"*.crates.io\"")]
    Wildcard,
    /// a name with one label only
    #[error("a name needs at least two labels, as in \"github.com\"")]
    SingleLabel,
    /// longer than 253 octets, or a label longer than 63 (RFC 1035)
    #[error("a name has at most 253 characters and a label at most 63")]
    TooLong,
    /// a character a host name does not have
    #[error("only letters, digits, `-` and `.` make a name; write international names in their xn-- form")]
    Character,
}

impl DomainPattern {
    /// The name without `*.`, in lower case, without a final dot.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether this is a `*.` pattern.
    pub fn is_wildcard(&self) -> bool {
        self.below
    }

    /// Whether a queried name (lower case, no final dot) is covered.
    pub fn matches(&self, queried: &str) -> bool {
        if self.below {
            queried.strip_suffix(&self.name).is_some_and(|head| head.len() > 1 && head.ends_with('.'))
        } else {
            queried == self.name
        }
    }

    /// Whether some name is covered by both.
    pub fn overlaps(&self, other: &Self) -> bool {
        match (self.below, other.below) {
            (false, _) => other.matches(&self.name),
            (true, false) => self.matches(&other.name),
            (true, true) => self.name == other.name || self.matches(&other.name) || other.matches(&self.name),
        }
    }
}

impl FromStr for DomainPattern {
    type Err = InvalidDomain;

    fn from_str(text: &str) -> Result<Self, InvalidDomain> {
        if text.parse::<IpAddr>().is_ok() || looks_like_ipv4(text) {
            return Err(InvalidDomain::IsAddress);
        }
        let (below, name) = match text.strip_prefix("*.") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
        if name.contains('*') {
            return Err(InvalidDomain::Wildcard);
        }
        if looks_like_ipv4(&name) {
            return Err(InvalidDomain::IsAddress);
        }
        if name.len() > 253 || name.split('.').any(|label| label.len() > 63) {
            return Err(InvalidDomain::TooLong);
        }
        if !name.split('.').all(is_label) {
            return Err(InvalidDomain::Character);
        }
        if !name.contains('.') {
            return Err(InvalidDomain::SingleLabel);
        }
        Ok(Self { below, name })
    }
}

/// `1.2.3.4`, but also `1.2.3`, `10.0.0.0/8` and `256.1.1.1`: no top-level domain is a number (RFC 3696).
fn looks_like_ipv4(text: &str) -> bool {
    text.split(['.', '/']).all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()))
}

fn is_label(label: &str) -> bool {
    !label.is_empty()
        && !label.starts_with('-')
        && !label.ends_with('-')
        && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

impl fmt::Display for DomainPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.below { "*." } else { "" }, self.name)
    }
}
