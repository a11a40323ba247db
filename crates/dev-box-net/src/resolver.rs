//! Names: a resolver for each VM whose policy has domains. It answers the listed names only, and opens the way to what
//! it answered.
//!
//! ```text
//!   guest --DNS to gateway:53--> guard: DNAT to gateway:PORT --> the VM's resolver --listed name?--> host's name servers
//!                                                                  |      |  no: NXDOMAIN               |
//!                                                    address into the VM's set of the guard <-- answer --+
//!                                                                  |
//!   guest <---------------------- answer, at most MAX_TTL long ----+   then guest --> address: in the set, so it passes
//! ```
//!
//! One VM's names never open another's way, since the set is the VM's own; and a change of one policy restarts nobody
//! else's resolver. What a name cannot do is tell servers at one address apart: see `docs/network.md`.

mod dnsmasq;
#[cfg(any(test, feature = "testing"))]
pub mod fake;

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use dev_box_core::id::VmName;
use sha2::{Digest, Sha256};

use crate::identity::{resolver_port_of, tap_of};
use crate::network::NetworkShape;
use crate::policy::{DomainPattern, EgressPolicy};

pub use dnsmasq::DnsmasqResolver;

/// How long a guest may keep an answer, in seconds; much less than the guard keeps its addresses open.
pub const MAX_TTL: u32 = 300;

/// Most name servers of the host that are asked.
const MAX_UPSTREAMS: usize = 3;

/// The names of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NameService {
    vm: VmName,
    network: NetworkShape,
    address: Ipv4Addr,
    domains: Vec<DomainPattern>,
    ipv6: bool,
}

/// A digest of what a resolver was told to serve.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamesDigest(String);

impl NamesDigest {
    pub(crate) fn from_text(text: &str) -> Option<Self> {
        let valid = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        valid.then(|| Self(text.to_owned()))
    }
}

impl fmt::Display for NamesDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl NameService {
    /// The names of a VM's policy; `None` when there are none, and it needs no resolver of its own.
    pub fn new(vm: VmName, network: NetworkShape, address: Ipv4Addr, policy: &EgressPolicy) -> Option<Self> {
        let domains = policy.domains().to_vec();
        (!domains.is_empty()).then(|| Self { vm, network, address, domains, ipv6: policy.ipv6() })
    }

    /// The VM.
    pub fn vm(&self) -> &VmName {
        &self.vm
    }

    /// Its address.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Where the resolver listens: the gateway, and a port of the VM's own.
    pub fn listens_on(&self) -> (Ipv4Addr, u16) {
        (self.network.gateway(), resolver_port_of(self.address))
    }

    /// The names.
    pub fn domains(&self) -> &[DomainPattern] {
        &self.domains
    }

    /// Tells two services apart.
    pub fn digest(&self) -> NamesDigest {
        let digest = Sha256::digest(self.config(&[]));
        NamesDigest(hex::encode(digest.get(..8).unwrap_or_default()))
    }

    /// dnsmasq's configuration (dnsmasq(8)), asking these name servers.
    pub fn config(&self, upstreams: &[IpAddr]) -> String {
        let (gateway, port) = self.listens_on();
        let tap = tap_of(self.address);
        let mut lines: Vec<String> = vec![
            format!("# {}", self.vm),
            format!("listen-address={gateway}"),
            format!("port={port}"),
            "bind-interfaces".to_owned(),
            // Nothing of the host's own: neither its name servers for everything, nor /etc/hosts.
            "no-resolv".to_owned(),
            "no-hosts".to_owned(),
            // An answer from a cache would open nothing.
            "cache-size=0".to_owned(),
            "no-negcache".to_owned(),
            format!("max-ttl={MAX_TTL}"),
            "stop-dns-rebind".to_owned(),
            "dns-forward-max=64".to_owned(),
            // A guest decides what would be in it.
            "log-facility=/dev/null".to_owned(),
            // Every other name does not exist.
            "address=/#/".to_owned(),
        ];
        if !self.ipv6 {
            lines.push("filter-AAAA".to_owned());
        }
        let set = |ip: char, suffix: &str| {
            ["inet", "bridge"].map(|family| format!("{ip}#{family}#dev_box#{tap}.names{suffix}"))
        };
        let mut sets: Vec<String> = set('4', "").into();
        if self.ipv6 {
            sets.extend(set('6', "6"));
        }
        let sets = sets.join(",");
        for domain in &self.domains {
            let name = domain.name();
            let asked = if domain.is_wildcard() { format!("*.{name}") } else { name.to_owned() };
            lines.extend(upstreams.iter().map(|upstream| format!("server=/{asked}/{upstream}")));
            let below_too = self.domains.iter().any(|other| other.is_wildcard() && other.name() == name);
            if !below_too {
                lines.push(format!("address=/*.{name}/"));
            }
            lines.push(format!("nftset=/{name}/{sets}"));
        }
        lines.push(String::new());
        lines.join("\n")
    }
}

/// Runs resolvers. Blocking. They outlive the process that started them, as the rules do: a VM may too.
pub trait Resolver: fmt::Debug + Send + Sync {
    /// Has the names of a VM served, in place of what its address had. The guard's rules for it stand before.
    ///
    /// # Errors
    /// [`ResolverError`]; nothing is served for the address then.
    fn serve(&self, names: &NameService) -> Result<(), ResolverError>;

    /// Ends the resolver of an address; no error when there is none.
    ///
    /// # Errors
    /// [`ResolverError`].
    fn stop(&self, address: Ipv4Addr) -> Result<(), ResolverError>;

    /// Which addresses have a resolver that runs, and what it serves.
    ///
    /// # Errors
    /// [`ResolverError`].
    fn serving(&self) -> Result<BTreeMap<Ipv4Addr, NamesDigest>, ResolverError>;
}

/// Why names are not served.
#[derive(Debug, thiserror::Error)]
pub enum ResolverError {
    /// the program is missing
    #[error("{program} cannot be run: install the package dnsmasq-base")]
    NotInstalled {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// dnsmasq ended at once
    #[error("dnsmasq did not start for {vm}: {message}")]
    Refused {
        /// The VM.
        vm: VmName,
        /// dnsmasq's text, cut.
        message: String,
    },
    /// it would not end
    #[error("the resolver of {address} (process {pid}) does not end")]
    Lingers {
        /// The VM's address.
        address: Ipv4Addr,
        /// Its process.
        pid: i32,
    },
    /// the host has no name server
    #[error("{path} names no name server, which the names of a policy are asked of")]
    NoUpstream {
        /// The file.
        path: PathBuf,
    },
    /// a file could not be used
    #[error("{path} cannot be {what}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// The name servers of a resolv.conf(5), at most three, as the libc has it.
pub fn upstreams(resolv_conf: &str) -> Vec<IpAddr> {
    let servers = resolv_conf.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == "nameserver").then(|| words.next()?.parse().ok())?
    });
    servers.take(MAX_UPSTREAMS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn service(domains: &[&str]) -> NameService {
        under(&format!("domains = {domains:?}"))
    }

    fn under(policy: &str) -> NameService {
        let policy = EgressPolicy::from_toml(&format!("mode = 'custom'\n{policy}")).unwrap();
        let shape = NetworkShape::new("dev-box", "devbox0", "10.213.0.0/24".parse().unwrap()).unwrap();
        let vm = VmName::new("dev-box-a").unwrap();
        NameService::new(vm, shape, Ipv4Addr::new(10, 213, 0, 2), &policy).unwrap()
    }

    #[test]
    fn golden_config() {
        let service = service(&["github.com", "*.crates.io", "crates.io"]);
        insta::assert_snapshot!(
            service.config(&["9.9.9.9".parse().unwrap(), "2620:fe::fe".parse().unwrap()])
        );
    }

    #[test]
    fn with_ipv6_both_kinds_of_addresses_are_answered_and_opened() {
        let text = under("ipv6 = true\ndomains = ['github.com']").config(&["9.9.9.9".parse().unwrap()]);
        assert!(!text.contains("filter-AAAA"));
        let sets = ["4#inet", "4#bridge", "6#inet", "6#bridge"].map(|what| {
            let suffix = if what.starts_with('6') { "6" } else { "" };
            format!("{what}#dev_box#dbt0ad50002.names{suffix}")
        });
        assert!(text.contains(&format!("\nnftset=/github.com/{}\n", sets.join(","))), "{text}");
    }

    #[test]
    fn a_digest_is_of_the_names() {
        let digest = service(&["github.com"]).digest();
        assert_eq!(digest, service(&["github.com"]).digest());
        assert_ne!(digest, service(&["*.github.com"]).digest());
        assert_eq!(NamesDigest::from_text(&digest.to_string()), Some(digest));
        assert_eq!(NamesDigest::from_text("../../etc/passwd"), None);
    }

    #[test]
    fn no_names_need_no_resolver() {
        let one = service(&["github.com"]);
        let none = EgressPolicy::NatFiltered;
        assert!(NameService::new(one.vm().clone(), one.network.clone(), one.address(), &none).is_none());
    }

    #[test]
    fn name_servers_are_read_as_the_libc_does() {
        let text = "# nameserver 1.1.1.1\nsearch example.org\nnameserver 9.9.9.9\nnameserver\n\
                    nameserver nonsense\nnameserver ::1\n nameserver 8.8.8.8\nnameserver 8.8.4.4\n";
        let expected: Vec<IpAddr> =
            ["9.9.9.9", "::1", "8.8.8.8"].iter().map(|text| text.parse().unwrap()).collect();
        assert_eq!(upstreams(text), expected);
        assert!(upstreams("").is_empty());
    }
}
