//! Data in names: many, long or random labels below one domain, or many names that do not exist.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use super::{Hits, Rule, RuleConfig};
use crate::anomaly::window::{Distinct, Recent, Sums};

const MINUTE: u64 = 60_000;
/// Domains watched at once.
const DOMAINS: usize = 32;
/// The longest name there is (RFC 1035, section 2.3.4); what is longer is cut before it costs anything.
const MAX_NAME: usize = 255;

/// What a name below a domain is like, known by its hash: asked for again and again it counts once.
#[derive(Debug, Clone, Copy)]
struct Name {
    hash: u64,
    /// In characters, without the dots.
    length: f64,
    /// Bits a character.
    entropy: f64,
}

impl PartialEq for Name {
    fn eq(&self, other: &Self) -> bool {
        self.hash == other.hash
    }
}

#[derive(Debug, Clone)]
pub(super) struct DnsRules {
    domains: Recent<String, Distinct<Name>>,
    /// Over all domains: queries, and those for names that do not exist. Generated names share no domain.
    answers: Sums<2>,
    missing: Distinct<u64>,
}

impl DnsRules {
    pub(super) fn new(config: &RuleConfig) -> Self {
        let limit = config.dns_names.saturating_mul(2).min(2048);
        Self {
            domains: Recent::new(DOMAINS),
            answers: Sums::new(MINUTE),
            missing: Distinct::new(MINUTE, limit),
        }
    }

    pub(super) fn observe(
        &mut self,
        config: &RuleConfig,
        now: u64,
        name: &str,
        nxdomain: bool,
        hits: &mut Hits,
    ) {
        let end = name.floor_char_boundary(name.len().min(MAX_NAME));
        let name = name.get(..end).unwrap_or_default().trim_end_matches('.').to_ascii_lowercase();
        let (below, domain) = split(&name);
        // Reverse look-ups have one domain for the whole internet.
        if domain == "in-addr.arpa" || domain == "ip6.arpa" {
            return;
        }
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        let hash = hasher.finish();
        let threshold = config.dns_names as f64;

        let [queries, missed] = self.answers.add(now, [1.0, f64::from(u8::from(nxdomain))]);
        if nxdomain {
            let names = self.missing.see(now, hash) as f64;
            if missed / queries.max(1.0) >= config.dns_nxdomain {
                hits.over(Rule::DnsTunnel, names, threshold, || {
                    format!("{names} different names that do not exist were asked for within a minute, lately {name:?}")
                });
            }
        }
        if below.is_empty() {
            return;
        }
        let limit = config.dns_names.saturating_mul(2).min(2048);
        let Some(state) = self.domains.entry(domain.to_owned(), || Distinct::new(MINUTE, limit)) else {
            return;
        };
        let text = below.replace('.', "");
        let name = Name { hash, length: text.len() as f64, entropy: entropy_of(&text) };
        let names = state.see(now, name) as f64;
        let mean = |of: fn(&Name) -> f64| state.keys().map(of).sum::<f64>() / names.max(1.0);
        let (length, entropy) = (mean(|name| name.length), mean(|name| name.entropy));
        // Random text of few characters cannot have much entropy, hence two ways to be suspect.
        if length >= config.dns_length || (entropy >= config.dns_entropy && length >= config.dns_length / 2.0)
        {
            hits.over(Rule::DnsTunnel, names, threshold, || {
                format!(
                    "{names} different names below {domain:?} within a minute, {length:.0} characters and {entropy:.1} bits a character on average"
                )
            });
        }
    }
}

/// A name's part below its registered domain, and that domain. Without a list of public suffixes: two labels, or three when
/// the last two are as short as those of a country's (`co.uk`).
fn split(name: &str) -> (&str, &str) {
    let dots: Vec<usize> = name.rmatch_indices('.').map(|(at, _)| at).take(3).collect();
    let after = |dot: usize| name.get(dot + 1..).unwrap_or_default();
    let cut = match dots.as_slice() {
        [last, second, ..] => {
            let (country, kind) = (after(*last), name.get(second + 1..*last).unwrap_or_default());
            if country.len() == 2 && kind.len() <= 3 { dots.get(2) } else { Some(second) }
        }
        _ => None,
    };
    match cut {
        Some(&dot) => (name.get(..dot).unwrap_or_default(), after(dot)),
        None => ("", name),
    }
}

/// Bits a character.
fn entropy_of(text: &str) -> f64 {
    let mut counts = [0_u32; 256];
    for byte in text.bytes() {
        if let Some(count) = counts.get_mut(usize::from(byte)) {
            *count += 1;
        }
    }
    let total = text.len() as f64;
    counts
        .iter()
        .filter(|count| **count > 0)
        .map(|count| {
            let share = f64::from(*count) / total;
            -share * share.log2()
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn domains_are_split_where_they_are_registered() {
        assert_eq!(split("a.b.example.com"), ("a.b", "example.com"));
        assert_eq!(split("example.com"), ("", "example.com"));
        assert_eq!(split("www.example.co.uk"), ("www", "example.co.uk"));
        assert_eq!(split("example.co.uk"), ("", "example.co.uk"));
        assert_eq!(split("x.github.io"), ("x", "github.io"));
        assert_eq!(split("localhost"), ("", "localhost"));
        assert_eq!(split(""), ("", ""));
    }

    #[test]
    fn entropy_is_in_bits() {
        assert_eq!(entropy_of("aaaa"), 0.0);
        assert_eq!(entropy_of("abab"), 1.0);
        assert_eq!(entropy_of("abcdefgh"), 3.0);
        assert_eq!(entropy_of(""), 0.0);
    }

    proptest! {
        #[test]
        fn splitting_loses_nothing(name in "[a-zé.]{0,40}") {
            let (below, domain) = split(&name);
            if below.is_empty() {
                prop_assert!(name == domain || name.strip_prefix('.') == Some(domain));
            } else {
                prop_assert_eq!(format!("{below}.{domain}"), name);
            }
        }
    }
}
