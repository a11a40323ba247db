//! Data in names: many, long or random labels below one domain, or many names that do not exist.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use super::{Hits, Rule, RuleConfig, limit};
use crate::anomaly::window::Distinct;

const MINUTE: u64 = 60_000;
/// Domains watched at once.
const DOMAINS: usize = 32;
/// How many times the threshold of one domain is odd of all domains, and of names that do not exist beside others
/// that do.
const MANY: usize = 4;
/// The longest name there is (RFC 1035, section 2.3.4); what is longer is cut before it costs anything.
const MAX_NAME: usize = 255;

/// Names are known by their hashes: asked for again and again, one counts once. Of a domain only those that may carry
/// data are remembered: short ones beside them, which cost nothing, hide none. With the default thresholds this is
/// less than half a MiB, whatever is asked for.
#[derive(Debug, Clone)]
pub(super) struct DnsRules {
    /// The latest used last.
    domains: Vec<(String, Distinct<u64>)>,
    /// Those names of all domains: whoever owns many spreads them.
    suspects: Distinct<u64>,
    /// Names that do not exist, and that do, of all domains: generated names share none.
    missing: Distinct<u64>,
    present: Distinct<u64>,
}

impl DnsRules {
    pub(super) fn new(config: &RuleConfig) -> Self {
        let distinct = || Distinct::new(MINUTE, limit(config.dns_names.saturating_mul(MANY)));
        Self { domains: Vec::new(), suspects: distinct(), missing: distinct(), present: distinct() }
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
        let of_all = threshold * MANY as f64;

        if nxdomain {
            let (names, present) = (self.missing.see(now, hash) as f64, self.present.count(now) as f64);
            // Names that exist are as easy to make up: so many that do not are a search whatever is beside them.
            let mostly = names / (names + present) >= config.dns_nxdomain;
            hits.over(Rule::DnsTunnel, names, if mostly { threshold } else { of_all }, || {
                format!("{names} different names that do not exist were asked for within a minute, lately {name:?}")
            });
        } else {
            self.present.see(now, hash);
        }
        let text = below.replace('.', "");
        let (length, entropy) = (text.len() as f64, entropy_of(&text));
        // Random text of few characters cannot have much entropy, hence two ways to be suspect.
        let random = entropy >= config.dns_entropy && length >= config.dns_length / 2.0;
        if length < config.dns_length && !random {
            return;
        }
        let all = self.suspects.see(now, hash) as f64;
        hits.over(Rule::DnsTunnel, all, of_all, || {
            format!(
                "{all} different long or random names were asked for within a minute, lately below {domain:?}"
            )
        });
        let Some(names) = self.seen_below(domain, config, now, hash) else { return };
        hits.over(Rule::DnsTunnel, names as f64, threshold, || {
            format!(
                "{names} different long or random names below {domain:?} within a minute, lately of {length} characters and {entropy:.1} bits a character"
            )
        });
    }

    /// Notes a name of a domain and returns how many there are of it. Where there are too many domains, the one goes
    /// that has the fewest; of several, the least recently used: other domains cost a name each and reset no tunnel.
    fn seen_below(&mut self, domain: &str, config: &RuleConfig, now: u64, hash: u64) -> Option<usize> {
        let known = self.domains.iter().position(|(known, _)| known == domain);
        let used = match known {
            Some(at) => self.domains.remove(at),
            None => {
                if self.domains.len() >= DOMAINS {
                    let counts = self.domains.iter_mut().map(|(_, names)| names.count(now)).enumerate();
                    if let Some((fewest, _)) = counts.min_by_key(|(_, count)| *count) {
                        self.domains.remove(fewest);
                    }
                }
                (domain.to_owned(), Distinct::new(MINUTE, limit(config.dns_names)))
            }
        };
        self.domains.push(used);
        self.domains.last_mut().map(|(_, names)| names.see(now, hash))
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
