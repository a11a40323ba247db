//! Which subnet the VMs live in, and which addresses it has. Pure: what the host uses comes in as an argument.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};

use crate::identity::{ipv4_of, ipv6_of};

/// A subnet of VMs: the first host address is the gateway's, the rest are the VMs'.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Subnet(Ipv4Net);

/// Why a range cannot be a subnet of VMs, or none could be found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubnetError {
    /// not `a.b.c.d/n`, or bits beyond the prefix
    #[error("\"{0}\" is not a subnet: write it as \"10.213.0.0/24\"")]
    Malformed(String),
    /// too small or too large
    #[error("a subnet of VMs has a prefix length from 16 to 29; {0} has not")]
    Size(Ipv4Net),
    /// not private
    #[error("{0} is not a private range (10/8, 172.16/12 or 192.168/16)")]
    NotPrivate(Ipv4Net),
    /// every candidate is in use
    #[error(
        "each of the {candidates} candidate subnets overlaps a route of this host; name a free one in the configuration"
    )]
    NoneFree {
        /// How many were tried.
        candidates: usize,
    },
}

impl Subnet {
    /// Checks a range.
    ///
    /// # Errors
    /// [`SubnetError::Size`] and [`SubnetError::NotPrivate`], and `Malformed` for bits beyond the prefix.
    pub fn new(range: Ipv4Net) -> Result<Self, SubnetError> {
        if range.trunc() != range {
            return Err(SubnetError::Malformed(range.to_string()));
        }
        if !(16..=29).contains(&range.prefix_len()) {
            return Err(SubnetError::Size(range));
        }
        if !range.network().is_private() || !range.broadcast().is_private() {
            return Err(SubnetError::NotPrivate(range));
        }
        Ok(Self(range))
    }

    /// The range.
    pub fn range(self) -> Ipv4Net {
        self.0
    }

    /// The gateway's address: the bridge, and the resolver on it.
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.0.network()).saturating_add(1))
    }

    /// The prefix length, 16 to 29.
    pub fn prefix(self) -> u8 {
        self.0.prefix_len()
    }

    /// Addresses that VMs may have, ascending: all but the network's, the gateway's and the broadcast.
    pub fn guests(self) -> impl Iterator<Item = Ipv4Addr> {
        let first = u32::from(self.gateway()).saturating_add(1);
        (first..u32::from(self.0.broadcast())).map(Ipv4Addr::from)
    }

    /// The gateway's IPv6 address, with the length of [`Self::range6`]'s prefix.
    pub fn gateway6(self) -> Ipv6Net {
        Ipv6Net::new_assert(ipv6_of(self.gateway()), self.range6().prefix_len())
    }

    /// The IPv6 range that goes with it: the [addresses](ipv6_of) of all of its addresses.
    pub fn range6(self) -> Ipv6Net {
        Ipv6Net::new_assert(ipv6_of(self.0.network()), 96 + self.prefix())
    }

    /// How many VMs have room.
    pub fn capacity(self) -> usize {
        (1_usize << (32 - u32::from(self.prefix()))).saturating_sub(3)
    }

    /// Whether `address` is one of [`Self::guests`].
    pub fn is_guest(self, address: Ipv4Addr) -> bool {
        self.0.contains(&address)
            && address != self.0.network()
            && address != self.0.broadcast()
            && address != self.gateway()
    }

    /// The first candidate that overlaps none of the ranges in use.
    ///
    /// # Errors
    /// [`SubnetError::NoneFree`].
    pub fn choose(
        candidates: impl IntoIterator<Item = Self>,
        in_use: &[Ipv4Net],
    ) -> Result<Self, SubnetError> {
        let mut tried = 0;
        for candidate in candidates {
            tried += 1;
            if !in_use.iter().any(|used| overlap(*used, candidate.0)) {
                return Ok(candidate);
            }
        }
        Err(SubnetError::NoneFree { candidates: tried })
    }

    /// Where a subnet is looked for unless the configuration names one: the /24s of 10.213/16, 172.29/16 and
    /// 192.168.192/18, away from what hypervisors, container engines and home routers choose by default.
    pub fn candidates() -> impl Iterator<Item = Self> {
        let pools = [(10, 213, 0, 256_u16), (172, 29, 0, 256), (192, 168, 192, 64)];
        pools.into_iter().flat_map(|(a, b, start, count)| {
            (0..count).filter_map(move |index| {
                let third = u8::try_from(start + index).ok()?;
                Self::new(Ipv4Net::new(Ipv4Addr::new(a, b, third, 0), 24).ok()?).ok()
            })
        })
    }
}

impl FromStr for Subnet {
    type Err = SubnetError;

    fn from_str(text: &str) -> Result<Self, SubnetError> {
        Self::new(text.parse().map_err(|_| SubnetError::Malformed(text.chars().take(64).collect()))?)
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Two CIDRs overlap exactly when one contains the other.
fn overlap(one: Ipv4Net, other: Ipv4Net) -> bool {
    one.contains(&other) || other.contains(&one)
}

/// The destinations in the text of `/proc/net/route`, default routes left out. `except` names an interface whose
/// routes do not count (our own bridge). Lines that cannot be read are skipped: a kernel with a longer table is
/// no reason to stop.
pub fn parse_routes(text: &str, except: Option<&str>) -> Vec<Ipv4Net> {
    text.lines().skip(1).filter_map(|line| route(line, except)).collect()
}

fn route(line: &str, except: Option<&str>) -> Option<Ipv4Net> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let (interface, destination, mask) = (fields.first()?, fields.get(1)?, fields.get(7)?);
    if except == Some(*interface) {
        return None;
    }
    // The kernel prints the big-endian words as numbers of this machine (proc(5)).
    let word = |text: &str| u32::from_str_radix(text, 16).ok().map(|raw| Ipv4Addr::from(raw.to_ne_bytes()));
    let range = Ipv4Net::with_netmask(word(destination)?, word(mask)?).ok()?.trunc();
    (range.prefix_len() > 0).then_some(range)
}

/// As [`parse_routes`], of the text of `/proc/net/ipv6_route`: the subnets whose [IPv6 ranges](Subnet::range6) they take.
/// Wider routes than the range of all VMs leave these be, since a network's own route is the narrower one.
pub fn parse_routes6(text: &str, except: Option<&str>) -> Vec<Ipv4Net> {
    text.lines().filter_map(|line| route6(line, except)).collect()
}

fn route6(line: &str, except: Option<&str>) -> Option<Ipv4Net> {
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let (destination, length, interface) = (fields.first()?, fields.get(1)?, fields.last()?);
    if except == Some(*interface) {
        return None;
    }
    let address = ipv4_of(u128::from_str_radix(destination, 16).ok()?.into())?;
    let length = u8::from_str_radix(length, 16).ok()?.checked_sub(96)?;
    Some(Ipv4Net::new(address, length).ok()?.trunc())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ROUTES: &str = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
        eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
        eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
        virbr0\t007AA8C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
        short\t00\nbad\tzz\t0\t0\t0\t0\t0\t00FFFFFF\n";

    #[test]
    fn routes_are_read_and_the_default_route_left_out() {
        let nets: Vec<String> = parse_routes(ROUTES, None).iter().map(ToString::to_string).collect();
        assert_eq!(nets, ["192.0.2.0/24", "192.168.122.0/24"]);
        assert_eq!(parse_routes(ROUTES, Some("virbr0")).len(), 1);
        assert!(parse_routes("", None).is_empty());
    }

    #[test]
    fn ipv6_routes_among_ours_take_their_subnets() {
        let line = |destination: &str, length: &str, interface: &str| {
            let none = "0".repeat(32);
            format!(
                "{destination} {length} {none} 00 {none} 00000100 00000001 00000000 00000001 {interface:>8}\n"
            )
        };
        let ours = "fddb00000000000000000000\
                    0ad50100";
        let text = line(ours, "78", "eth0")
            + &line(ours, "80", "devbox0")
            + &line(&"0".repeat(32), "00", "eth0")
            + &line("fddb0000000000000000000000000000", "40", "eth0")
            + &line("fe800000000000000000000000000000", "40", "eth0")
            + "short\nzz 78 x eth0\n";
        let nets = |except| parse_routes6(&text, except).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(nets(Some("devbox0")), ["10.213.1.0/24"]);
        assert_eq!(nets(None), ["10.213.1.0/24", "10.213.1.0/32"]);
    }

    #[test]
    fn a_subnet_knows_its_addresses() {
        let subnet: Subnet = "10.213.7.0/29".parse().unwrap();
        assert_eq!(subnet.gateway().to_string(), "10.213.7.1");
        let guests: Vec<String> = subnet.guests().map(|address| address.to_string()).collect();
        assert_eq!(guests, ["10.213.7.2", "10.213.7.3", "10.213.7.4", "10.213.7.5", "10.213.7.6"]);
        assert_eq!((subnet.prefix(), subnet.capacity()), (29, 5));
        assert_eq!(subnet.to_string(), "10.213.7.0/29");
        assert_eq!(subnet.range6().to_string(), "fddb::ad5:700/125");
        assert_eq!(subnet.gateway6().to_string(), "fddb::ad5:701/125");
    }

    #[test]
    fn refusals_say_why() {
        for (text, part) in [
            ("10.0.0.0", "is not a subnet"),
            ("10.0.0.7/24", "is not a subnet"),
            ("10.0.0.0/30", "16 to 29"),
            ("10.0.0.0/15", "16 to 29"),
            ("8.8.8.0/24", "not a private range"),
            ("fd00::/64", "is not a subnet"),
        ] {
            let error = text.parse::<Subnet>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn the_first_free_candidate_is_chosen() {
        let free = Subnet::choose(Subnet::candidates(), &[]).unwrap();
        assert_eq!(free.to_string(), "10.213.0.0/24");
        let used = ["10.213.0.0/25".parse().unwrap(), "10.213.1.7/32".parse().unwrap()];
        assert_eq!(Subnet::choose(Subnet::candidates(), &used).unwrap().to_string(), "10.213.2.0/24");
        let whole = ["10.0.0.0/8".parse().unwrap()];
        assert_eq!(Subnet::choose(Subnet::candidates(), &whole).unwrap().to_string(), "172.29.0.0/24");
        let all = ["0.0.0.0/1".parse().unwrap(), "128.0.0.0/1".parse().unwrap()];
        assert_eq!(
            Subnet::choose(Subnet::candidates(), &all),
            Err(SubnetError::NoneFree { candidates: 256 + 256 + 64 })
        );
    }

    proptest! {
        #[test]
        fn a_chosen_subnet_overlaps_no_route(routes in prop::collection::vec((any::<u32>(), 8_u8..=32), 0..40)) {
            let used: Vec<Ipv4Net> =
                routes.iter().map(|(raw, len)| Ipv4Net::new(Ipv4Addr::from(*raw), *len).unwrap().trunc()).collect();
            if let Ok(subnet) = Subnet::choose(Subnet::candidates(), &used) {
                for address in subnet.guests().chain([subnet.gateway()]) {
                    prop_assert!(used.iter().all(|net| !net.contains(&address)));
                }
            }
        }

        #[test]
        fn guests_are_distinct_and_inside(raw in any::<u32>(), len in 16_u8..=29) {
            let range = Ipv4Net::new(Ipv4Addr::from(raw % (1 << 24) + (10 << 24)), len).unwrap().trunc();
            let subnet = Subnet::new(range).unwrap();
            let guests: Vec<Ipv4Addr> = subnet.guests().collect();
            prop_assert_eq!(guests.len(), subnet.capacity());
            prop_assert!(guests.windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert!(guests.iter().all(|address| subnet.is_guest(*address)));
            for other in [subnet.gateway(), range.network(), range.broadcast(), Ipv4Addr::LOCALHOST] {
                prop_assert!(!subnet.is_guest(other));
                prop_assert!(!guests.contains(&other));
            }
        }

        #[test]
        fn any_text_is_read_without_panic(text in ".{0,200}") {
            let _ = parse_routes(&text, None);
            let _ = parse_routes6(&text, None);
            let _ = text.parse::<Subnet>();
        }

        #[test]
        fn routes_round_trip(raw in any::<u32>(), len in 1_u8..=32) {
            let net = Ipv4Net::new(Ipv4Addr::from(raw), len).unwrap().trunc();
            let word = |address: Ipv4Addr| format!("{:08X}", u32::from_ne_bytes(address.octets()));
            let line = format!("h\neth0\t{}\t0\t1\t0\t0\t0\t{}\t0\t0\t0", word(net.network()), word(net.netmask()));
            prop_assert_eq!(parse_routes(&line, None), vec![net]);
        }
    }
}
