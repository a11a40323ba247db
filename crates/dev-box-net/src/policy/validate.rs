//! From a document to a policy, with errors that name the line and the field.

use std::fmt;
use std::str::FromStr;

use ipnet::IpNet;
use toml::de::{DeTable, DeValue};

use super::class::{AddressClass, Overridable, SPECIAL};
use super::document::{CUSTOM, ISOLATED, NAT_FILTERED, PolicyDocument};
use super::domain::{DomainPattern, InvalidDomain};
use super::port::{self, InvalidPort, PortRule};
use super::{CustomPolicy, Destinations, EgressPolicy};

/// Most ports of one policy.
pub const MAX_PORTS: usize = 64;
/// Most CIDRs in `allow`, and in `deny`.
pub const MAX_CIDRS: usize = 256;
/// Most domains of one policy.
pub const MAX_DOMAINS: usize = 256;
/// Largest TOML document that is read, in bytes.
pub const MAX_DOCUMENT_BYTES: usize = 1024 * 1024;

/// A list of a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ListName {
    /// `ports`
    Ports,
    /// `allow`
    Allow,
    /// `deny`
    Deny,
    /// `domains`
    Domains,
}

impl ListName {
    fn key(self) -> &'static str {
        match self {
            Self::Ports => "ports",
            Self::Allow => "allow",
            Self::Deny => "deny",
            Self::Domains => "domains",
        }
    }
}

impl fmt::Display for ListName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.key())
    }
}

/// What is wrong with a policy, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyError {
    /// Line of the TOML text, from 1; `None` for a policy that did not come from text.
    pub line: Option<usize>,
    /// The field, as `allow[3]`; empty where the whole document is meant.
    pub field: String,
    /// What is wrong.
    pub problem: PolicyProblem,
}

/// What can be wrong with a policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyProblem {
    /// not TOML, an unknown field, or a value of another type
    #[error("{0}")]
    Syntax(String),
    /// the document is larger than [`MAX_DOCUMENT_BYTES`]
    #[error("{size} bytes are more than the {MAX_DOCUMENT_BYTES} a policy may have")]
    DocumentTooLarge {
        /// Size in bytes.
        size: usize,
    },
    /// a mode that does not exist
    #[error("unknown mode \"{0}\": use \"nat-filtered\", \"isolated\" or \"custom\"")]
    UnknownMode(String),
    /// a field that another mode has
    #[error("only mode \"custom\" has this field; the mode is \"{0}\"")]
    NotCustom(String),
    /// more rules than a list may have
    #[error("{count} rules are more than the {max} this list may have")]
    TooMany {
        /// How many there are.
        count: usize,
        /// How many there may be.
        max: usize,
    },
    /// a port that cannot be read
    #[error("\"{text}\" is {reason}")]
    Port {
        /// As written.
        text: String,
        /// Why not.
        reason: InvalidPort,
    },
    /// a range that cannot be read
    #[error(
        "\"{0}\" is not a CIDR: write a network and its prefix length, as \"192.0.2.0/24\" or \"2606:4700::/32\""
    )]
    Cidr(String),
    /// an IPv6 range under a policy without IPv6
    #[error("\"{0}\": without `ipv6 = true` nothing can be reached by IPv6: add that, or remove the range")]
    Ipv6(String),
    /// an address with bits set beyond its prefix
    #[error("\"{text}\" has bits set beyond its prefix: did you mean \"{network}\"?")]
    HostBits {
        /// As written.
        text: String,
        /// The network it lies in.
        network: IpNet,
    },
    /// a range that no policy may open
    #[error("{range} reaches addresses that are {class}, which no policy can open")]
    Forbidden {
        /// As written.
        range: IpNet,
        /// What it reaches.
        class: AddressClass,
    },
    /// a range that takes in a special range without naming it
    #[error(
        "{range} takes in {special}, which is {class}: name {special} by itself if you mean it, and \
         `destinations = \"public\"` for the whole internet"
    )]
    Spans {
        /// As written.
        range: IpNet,
        /// What it takes in.
        special: IpNet,
        /// What that is.
        class: AddressClass,
    },
    /// two rules of a list overlap
    #[error("\"{this}\" overlaps \"{other}\" ({list}[{index}]): keep one of them")]
    Overlap {
        /// This rule.
        this: String,
        /// The earlier rule.
        other: String,
        /// The list of the earlier rule.
        list: ListName,
        /// Its place in the list, from 0.
        index: usize,
    },
    /// an allowed range inside a denied one
    #[error("{allow} can never be reached, because {deny} (deny[{index}]) covers it: remove one of them")]
    Shadowed {
        /// The allowed range.
        allow: IpNet,
        /// The denied range.
        deny: IpNet,
        /// Its place in `deny`, from 0.
        index: usize,
    },
    /// a domain that cannot be read
    #[error("\"{text}\": {reason}")]
    Domain {
        /// As written.
        text: String,
        /// Why not.
        reason: InvalidDomain,
    },
    /// a policy that opens nothing
    #[error("nothing could be reached: list a CIDR or a domain, or use mode \"isolated\"")]
    ReachesNothing,
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("egress policy")?;
        if let Some(line) = self.line {
            write!(f, ", line {line}")?;
        }
        if !self.field.is_empty() {
            write!(f, ", {}", self.field)?;
        }
        write!(f, ": {}", self.problem)
    }
}

impl std::error::Error for PolicyError {}

impl PolicyError {
    fn whole(problem: PolicyProblem) -> Self {
        Self { line: None, field: String::new(), problem }
    }

    fn at(field: impl Into<String>, problem: PolicyProblem) -> Self {
        Self { line: None, field: field.into(), problem }
    }

    fn rule(list: ListName, index: usize, problem: PolicyProblem) -> Self {
        Self::at(format!("{list}[{index}]"), problem)
    }
}

pub(super) fn from_toml(text: &str) -> Result<EgressPolicy, PolicyError> {
    if text.len() > MAX_DOCUMENT_BYTES {
        return Err(PolicyError::whole(PolicyProblem::DocumentTooLarge { size: text.len() }));
    }
    let document: PolicyDocument = toml::from_str(text).map_err(|error| PolicyError {
        line: error.span().map(|span| line_at(text, span.start)),
        field: String::new(),
        problem: PolicyProblem::Syntax(error.message().to_owned()),
    })?;
    EgressPolicy::try_from(document)
        .map_err(|error| PolicyError { line: line_of(text, &error.field), ..error })
}

fn line_at(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count()
}

/// The line on which a field such as `allow[3]` stands.
fn line_of(text: &str, field: &str) -> Option<usize> {
    let table = DeTable::parse(text).ok()?;
    let (key, index) = match field.split_once('[') {
        Some((key, index)) => (key, index.strip_suffix(']')?.parse::<usize>().ok()),
        None => (field, None),
    };
    let value = table.get_ref().get(key)?;
    let span = match (index, value.get_ref()) {
        (Some(index), DeValue::Array(items)) => items.get(index)?.span(),
        _ => value.span(),
    };
    Some(line_at(text, span.start))
}

impl TryFrom<PolicyDocument> for EgressPolicy {
    type Error = PolicyError;

    fn try_from(document: PolicyDocument) -> Result<Self, PolicyError> {
        let policy = match document.mode.as_str() {
            CUSTOM => return custom(&document).map(|custom| Self::Custom(Box::new(custom))),
            NAT_FILTERED => Self::NatFiltered,
            ISOLATED => Self::Isolated,
            other => {
                let problem = PolicyProblem::UnknownMode(other.chars().take(64).collect());
                return Err(PolicyError::at("mode", problem));
            }
        };
        let present = [
            ("destinations", document.destinations.is_some()),
            ("ipv6", document.ipv6),
            ("ports", document.ports.is_some()),
            ("allow", !document.allow.is_empty()),
            ("deny", !document.deny.is_empty()),
            ("domains", !document.domains.is_empty()),
            ("limits", document.limits.is_some()),
        ];
        match present.into_iter().find(|(_, present)| *present) {
            Some((field, _)) => Err(PolicyError::at(field, PolicyProblem::NotCustom(document.mode))),
            None => Ok(policy),
        }
    }
}

fn custom(document: &PolicyDocument) -> Result<CustomPolicy, PolicyError> {
    let ports = match &document.ports {
        None => port::NAT_FILTERED.to_vec(),
        Some(texts) => ports(texts)?,
    };
    let allow = cidrs(ListName::Allow, &document.allow, document.ipv6)?;
    let deny = cidrs(ListName::Deny, &document.deny, document.ipv6)?;
    let domains = domains(&document.domains)?;
    for (index, range) in allow.iter().enumerate() {
        openable(*range).map_err(|problem| PolicyError::rule(ListName::Allow, index, problem))?;
        if let Some((place, deny)) = deny.iter().enumerate().find(|(_, deny)| deny.contains(range)) {
            let problem = PolicyProblem::Shadowed { allow: *range, deny: *deny, index: place };
            return Err(PolicyError::rule(ListName::Allow, index, problem));
        }
    }
    let listed = !allow.is_empty() || !domains.is_empty();
    let destinations =
        document.destinations.unwrap_or(if listed { Destinations::Listed } else { Destinations::Public });
    if destinations == Destinations::Listed && !listed {
        return Err(PolicyError::at("destinations", PolicyProblem::ReachesNothing));
    }
    if ports.is_empty() {
        return Err(PolicyError::at("ports", PolicyProblem::ReachesNothing));
    }
    let limits = document.limits.unwrap_or_default().limits();
    Ok(CustomPolicy {
        destinations,
        ipv6: document.ipv6,
        ports: sorted(ports),
        allow: sorted(allow),
        deny: sorted(deny),
        domains: sorted(domains),
        limits,
    })
}

fn sorted<T: Ord>(mut rules: Vec<T>) -> Vec<T> {
    rules.sort_unstable();
    rules
}

fn bounded(list: ListName, texts: &[String], max: usize) -> Result<(), PolicyError> {
    if texts.len() <= max {
        return Ok(());
    }
    Err(PolicyError::at(list.key(), PolicyProblem::TooMany { count: texts.len(), max }))
}

fn ports(texts: &[String]) -> Result<Vec<PortRule>, PolicyError> {
    bounded(ListName::Ports, texts, MAX_PORTS)?;
    let mut rules: Vec<PortRule> = Vec::with_capacity(texts.len());
    for (index, text) in texts.iter().enumerate() {
        let rule = PortRule::from_str(text).map_err(|reason| {
            PolicyError::rule(ListName::Ports, index, PolicyProblem::Port { text: text.clone(), reason })
        })?;
        disjoint(ListName::Ports, index, rule, &rules, |one, other| one.overlaps(*other))?;
        rules.push(rule);
    }
    Ok(rules)
}

fn cidrs(list: ListName, texts: &[String], ipv6: bool) -> Result<Vec<IpNet>, PolicyError> {
    bounded(list, texts, MAX_CIDRS)?;
    let mut ranges: Vec<IpNet> = Vec::with_capacity(texts.len());
    for (index, text) in texts.iter().enumerate() {
        let range = cidr(text, ipv6).map_err(|problem| PolicyError::rule(list, index, problem))?;
        disjoint(list, index, range, &ranges, |one, other| one.contains(other) || other.contains(one))?;
        ranges.push(range);
    }
    Ok(ranges)
}

fn cidr(text: &str, ipv6: bool) -> Result<IpNet, PolicyProblem> {
    match text.parse::<IpNet>() {
        Ok(IpNet::V6(_)) if !ipv6 => Err(PolicyProblem::Ipv6(text.to_owned())),
        Ok(range) if range.trunc() == range => Ok(range),
        Ok(range) => Err(PolicyProblem::HostBits { text: text.to_owned(), network: range.trunc() }),
        Err(_) => Err(PolicyProblem::Cidr(text.to_owned())),
    }
}

fn openable(range: IpNet) -> Result<(), PolicyProblem> {
    for (special, class) in SPECIAL {
        if class.overridable() == Overridable::Never && (special.contains(&range) || range.contains(&special))
        {
            return Err(PolicyProblem::Forbidden { range, class });
        }
        if range.contains(&special) && range != special {
            return Err(PolicyProblem::Spans { range, special, class });
        }
    }
    Ok(())
}

fn domains(texts: &[String]) -> Result<Vec<DomainPattern>, PolicyError> {
    bounded(ListName::Domains, texts, MAX_DOMAINS)?;
    let mut patterns: Vec<DomainPattern> = Vec::with_capacity(texts.len());
    for (index, text) in texts.iter().enumerate() {
        let pattern = DomainPattern::from_str(text).map_err(|reason| {
            PolicyError::rule(ListName::Domains, index, PolicyProblem::Domain { text: text.clone(), reason })
        })?;
        disjoint(ListName::Domains, index, pattern.clone(), &patterns, DomainPattern::overlaps)?;
        patterns.push(pattern);
    }
    Ok(patterns)
}

fn disjoint<T: fmt::Display>(
    list: ListName,
    index: usize,
    rule: T,
    earlier: &[T],
    overlap: impl Fn(&T, &T) -> bool,
) -> Result<(), PolicyError> {
    match earlier.iter().enumerate().find(|(_, other)| overlap(&rule, other)) {
        None => Ok(()),
        Some((place, other)) => {
            let (this, other) = (rule.to_string(), other.to_string());
            Err(PolicyError::rule(list, index, PolicyProblem::Overlap { this, other, list, index: place }))
        }
    }
}
