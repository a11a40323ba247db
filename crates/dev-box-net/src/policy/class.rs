//! Address ranges with a meaning, after the IANA special-purpose address registries (RFC 6890).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Why an address is not a public one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AddressClass {
    /// 0.0.0.0/8, RFC 1122.
    ThisNetwork,
    /// 10/8, 172.16/12, 192.168/16, RFC 1918; fc00::/7, RFC 4193.
    Private,
    /// 100.64/10, RFC 6598: the carrier's own network.
    Shared,
    /// 127/8, RFC 1122.
    Loopback,
    /// 169.254/16, RFC 3927; clouds serve credentials at 169.254.169.254. fe80::/10, RFC 4291.
    LinkLocal,
    /// 198.18/15, RFC 2544.
    Benchmark,
    /// 224/4, RFC 5771; ff00::/8, RFC 4291.
    Multicast,
    /// 240/4 with the limited broadcast, the protocol and documentation ranges, and 6to4's relays; of IPv6 what lies outside 2000::/3,
    /// and in it the protocol and documentation ranges and 6to4, whose addresses stand for IPv4 ones.
    Reserved,
}

/// Whether an administrator may open a class in a custom policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overridable {
    /// By naming the range in `allow`.
    ByName,
    /// By no policy.
    Never,
}

const fn net(a: u8, b: u8, c: u8, d: u8, prefix: u8) -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), prefix))
}

const fn net6(first: u16, second: u16, prefix: u8) -> IpNet {
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(first, second, 0, 0, 0, 0, 0, 0), prefix))
}

/// Every range that is not public, sorted and disjoint.
pub(crate) const SPECIAL: [(IpNet, AddressClass); 31] = [
    (net(0, 0, 0, 0, 8), AddressClass::ThisNetwork),
    (net(10, 0, 0, 0, 8), AddressClass::Private),
    (net(100, 64, 0, 0, 10), AddressClass::Shared),
    (net(127, 0, 0, 0, 8), AddressClass::Loopback),
    (net(169, 254, 0, 0, 16), AddressClass::LinkLocal),
    (net(172, 16, 0, 0, 12), AddressClass::Private),
    (net(192, 0, 0, 0, 24), AddressClass::Reserved),
    (net(192, 0, 2, 0, 24), AddressClass::Reserved),
    (net(192, 88, 99, 0, 24), AddressClass::Reserved),
    (net(192, 168, 0, 0, 16), AddressClass::Private),
    (net(198, 18, 0, 0, 15), AddressClass::Benchmark),
    (net(198, 51, 100, 0, 24), AddressClass::Reserved),
    (net(203, 0, 113, 0, 24), AddressClass::Reserved),
    (net(224, 0, 0, 0, 4), AddressClass::Multicast),
    (net(240, 0, 0, 0, 4), AddressClass::Reserved),
    // Loopback, IPv4 in IPv6 and NAT64 among them.
    (net6(0, 0, 3), AddressClass::Reserved),
    (net6(0x2001, 0, 23), AddressClass::Reserved),
    (net6(0x2001, 0xdb8, 32), AddressClass::Reserved),
    (net6(0x2002, 0, 16), AddressClass::Reserved),
    (net6(0x3fff, 0, 20), AddressClass::Reserved),
    (net6(0x4000, 0, 2), AddressClass::Reserved),
    (net6(0x8000, 0, 2), AddressClass::Reserved),
    (net6(0xc000, 0, 3), AddressClass::Reserved),
    (net6(0xe000, 0, 4), AddressClass::Reserved),
    (net6(0xf000, 0, 5), AddressClass::Reserved),
    (net6(0xf800, 0, 6), AddressClass::Reserved),
    (net6(0xfc00, 0, 7), AddressClass::Private),
    (net6(0xfe00, 0, 9), AddressClass::Reserved),
    (net6(0xfe80, 0, 10), AddressClass::LinkLocal),
    (net6(0xfec0, 0, 10), AddressClass::Reserved),
    (net6(0xff00, 0, 8), AddressClass::Multicast),
];

/// Where clouds keep a machine's credentials; those that the observer's rule `metadata-contact` knows (dev-box-observe, which this crate
/// cannot ask): AWS, Azure, GCP, OpenStack; AWS's containers; Alibaba; Oracle's old one; AWS by IPv6. All lie in special ranges.
pub(crate) const METADATA: [IpNet; 5] = [
    net(169, 254, 169, 254, 32),
    net(169, 254, 170, 2, 32),
    net(100, 100, 100, 200, 32),
    net(192, 0, 0, 192, 32),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254), 128)),
];

impl AddressClass {
    /// Whether a custom policy can open this class.
    pub fn overridable(self) -> Overridable {
        match self {
            Self::Private | Self::Shared | Self::Benchmark => Overridable::ByName,
            Self::ThisNetwork | Self::Loopback | Self::LinkLocal | Self::Multicast | Self::Reserved => {
                Overridable::Never
            }
        }
    }

    /// The class of the special range that contains `address`; `None` for a public address.
    pub fn of(address: IpAddr) -> Option<Self> {
        SPECIAL.iter().find(|(range, _)| range.contains(&address)).map(|(_, class)| *class)
    }
}

impl fmt::Display for AddressClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ThisNetwork => "\"this network\" (0.0.0.0/8)",
            Self::Private => "private (RFC 1918, RFC 4193)",
            Self::Shared => "shared by carriers (100.64.0.0/10)",
            Self::Loopback => "loopback (127.0.0.0/8)",
            Self::LinkLocal => "link-local (169.254.0.0/16, where clouds serve credentials, and fe80::/10)",
            Self::Benchmark => "for benchmarks (198.18.0.0/15)",
            Self::Multicast => "multicast",
            Self::Reserved => "reserved",
        })
    }
}

/// The ranges that nft and nwfilter drop.
pub(crate) fn special_ranges() -> impl Iterator<Item = IpNet> {
    SPECIAL.iter().map(|(range, _)| *range)
}
