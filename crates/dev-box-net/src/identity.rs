//! A VM's Ethernet address, tap name and IPv6 address, all derived from its IPv4 address: distinct as long as addresses are, and
//! the same when an address is used again, so that no neighbour table goes stale.

use std::net::{Ipv4Addr, Ipv6Addr};

use dev_box_core::spec::MacAddress;

/// What every tap's name begins with. libvirt keeps `vnet`, `vif`, `macvtap` and `macvlan` for names it makes up.
pub const TAP_PREFIX: &str = "dbt";

/// The Ethernet address of the interface with that IPv4 address: locally administered, unicast.
pub fn mac_of(address: Ipv4Addr) -> MacAddress {
    let [a, b, c, d] = address.octets();
    MacAddress::new([0x02, 0xdb, a, b, c, d])
}

/// What the VMs' IPv6 addresses begin with, `fddb::/96`: unique local (RFC 4193), seen on the bridge only.
const IPV6_PREFIX: u128 = 0xfddb << 112;

/// The IPv6 address that goes with that IPv4 address, which is its last 32 bits.
pub fn ipv6_of(address: Ipv4Addr) -> Ipv6Addr {
    Ipv6Addr::from(IPV6_PREFIX | u128::from(u32::from(address)))
}

/// The IPv4 address that an IPv6 address goes with; `None` for addresses that are not ours.
pub fn ipv4_of(address: Ipv6Addr) -> Option<Ipv4Addr> {
    u32::try_from(u128::from(address) ^ IPV6_PREFIX).ok().map(Ipv4Addr::from)
}

/// The tap's name: 11 characters (an interface's name has at most 15).
pub fn tap_of(address: Ipv4Addr) -> String {
    format!("{TAP_PREFIX}{:08x}", u32::from(address))
}

/// The address that a tap's name stands for; `None` for names that are not ours.
pub fn address_of_tap(name: &str) -> Option<Ipv4Addr> {
    let digits = name.strip_prefix(TAP_PREFIX).filter(|digits| digits.len() == 8)?;
    let address = Ipv4Addr::from(u32::from_str_radix(digits, 16).ok()?);
    (tap_of(address) == name).then_some(address)
}

/// The port of the gateway on which the resolver of that VM's own listens, where its policy has names. The guest asks
/// port 53 all the same.
pub fn resolver_port_of(address: Ipv4Addr) -> u16 {
    // Below the range that the kernel gives to others' sockets (32768 and up).
    20_000 + low_bits(address, 13)
}

/// The NFLOG group in which the guard reports a VM's packets. One process a group may listen; other programs' groups
/// are small numbers.
pub fn log_group_of(address: Ipv4Addr) -> u16 {
    0x8000 | low_bits(address, 15)
}

fn low_bits(address: Ipv4Addr, count: u32) -> u16 {
    let [.., high, low] = address.octets();
    u16::from_be_bytes([high, low]) & (u16::MAX >> (u16::BITS - count))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_have_their_form() {
        let address = Ipv4Addr::new(10, 213, 0, 2);
        assert_eq!(tap_of(address), "dbt0ad50002");
        assert_eq!(mac_of(address).to_string(), "02:db:0a:d5:00:02");
        assert_eq!(ipv6_of(address).to_string(), "fddb::ad5:2");
        for other in ["::ad5:2", "fddb::1:ad5:2", "fddc::ad5:2", "2606:4700::1111"] {
            assert_eq!(ipv4_of(other.parse().unwrap()), None, "{other}");
        }
        for other in ["vnet0", "dbt", "dbt0ad5000", "dbt0AD50002", "dbt+ad50002", "dbt0ad500020"] {
            assert_eq!(address_of_tap(other), None, "{other}");
        }
    }

    #[test]
    fn numbers_of_neighbours_differ() {
        let of = |address: Ipv4Addr| (resolver_port_of(address), log_group_of(address));
        assert_eq!(of(Ipv4Addr::new(10, 213, 0, 2)), (20_002, 0x8002));
        assert_eq!(of(Ipv4Addr::new(10, 213, 31, 255)), (28_191, 0x9fff));
        assert_eq!(of(Ipv4Addr::new(10, 213, 255, 255)), (28_191, 0xffff));
    }

    proptest! {
        #[test]
        fn tap_and_mac_are_valid_and_unique(one in any::<u32>(), other in any::<u32>()) {
            let (one, other) = (Ipv4Addr::from(one), Ipv4Addr::from(other));
            let tap = tap_of(one);
            prop_assert!(tap.len() <= 15 && tap.is_ascii());
            prop_assert!(!["vnet", "vif", "macvtap", "macvlan"].iter().any(|prefix| tap.starts_with(prefix)));
            prop_assert_eq!(address_of_tap(&tap), Some(one));
            let mac = mac_of(one).bytes();
            prop_assert_eq!(mac[0] & 0b11, 0b10, "locally administered and unicast");
            prop_assert_eq!(ipv4_of(ipv6_of(one)), Some(one));
            prop_assert_eq!(one == other, tap == tap_of(other));
            prop_assert_eq!(one == other, mac_of(one) == mac_of(other));
        }
    }
}
