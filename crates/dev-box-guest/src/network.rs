//! The guest's one network interface, set up from what the host says (no DHCP).
//!
//! The classic ioctls of netdevice(7) and ipv6(7) do: one interface, one address, one default route, and the same of IPv6 where
//! the host says so. Everything that was set before (a clone wakes with its template's address) is taken away first.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;

/// What the interface is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addressing {
    /// Hardware address.
    pub mac: [u8; 6],
    /// IPv4 address.
    pub address: Ipv4Addr,
    /// Length of the network's prefix, 0 to 32.
    pub prefix: u8,
    /// Default router, none in an isolated network.
    pub gateway: Option<Ipv4Addr>,
    /// IPv6, turned off where there is none.
    pub ipv6: Option<Ipv6Addressing>,
}

/// What the interface's IPv6 is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv6Addressing {
    /// Its one address.
    pub address: Ipv6Addr,
    /// Length of the network's prefix, 0 to 128.
    pub prefix: u8,
    /// Default router.
    pub gateway: Ipv6Addr,
}

/// A network interface that is not loopback.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name, such as `eth0`.
    pub name: String,
    /// Its hardware address now.
    pub mac: [u8; 6],
}

/// Why the network could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// There is no interface, or there are several and none has the address.
    #[error("no network interface has the address {mac}, and there are {count} to choose from")]
    NoInterface {
        /// The wanted hardware address.
        mac: String,
        /// Interfaces there are.
        count: usize,
    },
    /// The prefix is longer than an address.
    #[error("{0} is not the length of an IPv4 prefix")]
    Prefix(u8),
    /// The kernel refused a step.
    #[error("cannot {step} on {interface}: {error}")]
    Step {
        /// What was being done.
        step: &'static str,
        /// To which interface.
        interface: String,
        /// What the kernel said.
        error: io::Error,
    },
}

/// What is needed of the kernel.
pub trait Links {
    /// Interfaces but loopback, by name.
    fn interfaces(&self) -> Vec<Interface>;
    /// Takes the interface up or down; going down takes its routes away.
    ///
    /// # Errors
    /// What the kernel said, here and below.
    fn set_up(&self, interface: &str, up: bool) -> io::Result<()>;
    /// Changes the hardware address. An interface that is up forgets its neighbours then.
    ///
    /// # Errors
    /// What the kernel said: a driver may want the interface to be down (`EBUSY`).
    fn set_mac(&self, interface: &str, mac: [u8; 6]) -> io::Result<()>;
    /// Takes the address away, and with it every route of the interface and what it knew of neighbours.
    ///
    /// # Errors
    /// What the kernel said.
    fn remove_address(&self, interface: &str) -> io::Result<()>;
    /// Sets the one address and its mask.
    ///
    /// # Errors
    /// What the kernel said.
    fn set_address(&self, interface: &str, address: Ipv4Addr, mask: Ipv4Addr) -> io::Result<()>;
    /// Adds the default route.
    ///
    /// # Errors
    /// What the kernel said.
    fn set_default_route(&self, interface: &str, gateway: Ipv4Addr) -> io::Result<()>;
    /// Turns IPv6 off where the kernel has it, which takes every IPv6 address and route of the interface away.
    fn disable_ipv6(&self, interface: &str);
    /// Turns IPv6 on, of which nothing comes by itself: no link-local address, nothing of what a router says, and no asking
    /// whether somebody has the address already, since the host knows.
    ///
    /// # Errors
    /// What the kernel said; it may have no IPv6.
    fn enable_ipv6(&self, interface: &str) -> io::Result<()>;
    /// Adds an IPv6 address.
    ///
    /// # Errors
    /// What the kernel said.
    fn set_address6(&self, interface: &str, address: Ipv6Addr, prefix: u8) -> io::Result<()>;
    /// Adds the default route of IPv6.
    ///
    /// # Errors
    /// What the kernel said.
    fn set_default_route6(&self, interface: &str, gateway: Ipv6Addr) -> io::Result<()>;
}

/// Sets the interface up: the one that has the wanted hardware address, or else the only one.
///
/// # Errors
/// [`NetworkError`]; the interface is left down or half set then, never with an address that is not ours.
pub fn apply(links: &dyn Links, wanted: &Addressing) -> Result<String, NetworkError> {
    let mask = mask(wanted.prefix)?;
    let interface = choose(&links.interfaces(), wanted.mac)?;
    let name = interface.name.as_str();
    let failed = |step| move |error| NetworkError::Step { step, interface: name.to_owned(), error };
    // A clone wakes with its interface up. To take that down and up again costs more than all else here.
    links.disable_ipv6(name);
    links.remove_address(name).map_err(failed("take the address away"))?;
    if interface.mac != wanted.mac {
        set_mac(links, name, wanted.mac)?;
    }
    links.set_address(name, wanted.address, mask).map_err(failed("set the address"))?;
    links.set_up(name, true).map_err(failed("bring the link up"))?;
    if let Some(gateway) = wanted.gateway {
        links.set_default_route(name, gateway).map_err(failed("set the default route"))?;
    }
    if let Some(Ipv6Addressing { address, prefix, gateway }) = wanted.ipv6 {
        links.enable_ipv6(name).map_err(failed("turn IPv6 on"))?;
        links.set_address6(name, address, prefix).map_err(failed("set the IPv6 address"))?;
        links.set_default_route6(name, gateway).map_err(failed("set the default route of IPv6"))?;
    }
    Ok(interface.name)
}

/// While it has no address: nothing is said of the old one by the new one's name.
fn set_mac(links: &dyn Links, name: &str, mac: [u8; 6]) -> Result<(), NetworkError> {
    let failed = |step| move |error| NetworkError::Step { step, interface: name.to_owned(), error };
    match links.set_mac(name, mac) {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            links.set_up(name, false).map_err(failed("take the link down"))?;
            links.set_mac(name, mac)
        }
        outcome => outcome,
    }
    .map_err(failed("set the hardware address"))
}

fn choose(interfaces: &[Interface], mac: [u8; 6]) -> Result<Interface, NetworkError> {
    let found = interfaces.iter().find(|interface| interface.mac == mac);
    match (found, interfaces) {
        (Some(found), _) => Ok(found.clone()),
        (None, [only]) => Ok(only.clone()),
        _ => Err(NetworkError::NoInterface { mac: write_mac(mac), count: interfaces.len() }),
    }
}

fn mask(prefix: u8) -> Result<Ipv4Addr, NetworkError> {
    match prefix {
        0 => Ok(Ipv4Addr::UNSPECIFIED),
        1..=32 => Ok(Ipv4Addr::from(u32::MAX << (32 - prefix))),
        _ => Err(NetworkError::Prefix(prefix)),
    }
}

/// Reads `aa:bb:cc:dd:ee:ff`.
#[must_use]
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.trim().split(':');
    for byte in &mut mac {
        let part =
            parts.next().filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

fn write_mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// The text of `/etc/resolv.conf` for these servers: short timeouts, since the only server is the host's own.
#[must_use]
pub fn resolv_conf(servers: &[std::net::IpAddr]) -> String {
    let mut text = String::from("# written by dev-box\n");
    for server in servers.iter().take(3) {
        text.push_str(&format!("nameserver {server}\n"));
    }
    text.push_str("options timeout:2 attempts:2\n");
    text
}

/// Brings loopback up.
///
/// # Errors
/// What the kernel said.
pub fn loopback_up() -> io::Result<()> {
    Linux.set_up("lo", true)
}

/// `struct in6_rtmsg` of `linux/ipv6_route.h`, whose fields the crate libc keeps to itself.
#[repr(C)]
struct Route6 {
    destination: libc::in6_addr,
    source: libc::in6_addr,
    gateway: libc::in6_addr,
    kind: u32,
    destination_length: u16,
    source_length: u16,
    /// 0 is the kernel's default.
    metric: u32,
    info: libc::c_ulong,
    flags: u32,
    index: libc::c_int,
}

const _: () = assert!(size_of::<Route6>() == size_of::<libc::in6_rtmsg>());

/// The kernel itself.
#[derive(Debug, Clone, Copy, Default)]
pub struct Linux;

#[expect(unsafe_code, reason = "interface ioctls have no safe wrapper")]
impl Linux {
    fn socket(family: libc::c_int) -> io::Result<OwnedFd> {
        // SAFETY: socket(2) takes numbers only.
        let number = unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        Ok(unsafe { OwnedFd::from_raw_fd(number) })
    }

    fn request(interface: &str) -> io::Result<libc::ifreq> {
        // SAFETY: ifreq is plain data for which zeroes are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        if interface.is_empty() || interface.len() >= request.ifr_name.len() {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        for (target, byte) in request.ifr_name.iter_mut().zip(interface.bytes()) {
            *target = libc::c_char::from_ne_bytes([byte]);
        }
        Ok(request)
    }

    fn call<T>(code: libc::c_ulong, argument: &mut T) -> io::Result<()> {
        Self::call_of(libc::AF_INET, code, argument)
    }

    /// IPv6 has the same numbers as IPv4, with other structures: which is meant, the socket's family says.
    fn call_of<T>(family: libc::c_int, code: libc::c_ulong, argument: &mut T) -> io::Result<()> {
        let socket = Self::socket(family)?;
        // SAFETY: every caller passes the structure that its ioctl is documented to take, and it outlives the call.
        let outcome = unsafe { libc::ioctl(socket.as_raw_fd(), code as _, std::ptr::from_mut(argument)) };
        if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Its number, which the structures of IPv6 have in place of its name.
    fn index(interface: &str) -> io::Result<libc::c_int> {
        let mut request = Self::request(interface)?;
        Self::call(libc::SIOCGIFINDEX, &mut request)?;
        // SAFETY: SIOCGIFINDEX has filled the index.
        Ok(unsafe { request.ifr_ifru.ifru_ifindex })
    }

    fn inet6(address: Ipv6Addr) -> libc::in6_addr {
        libc::in6_addr { s6_addr: address.octets() }
    }

    fn inet(address: Ipv4Addr) -> libc::sockaddr {
        let inet = libc::sockaddr_in {
            sin_family: libc::AF_INET as libc::sa_family_t,
            sin_port: 0,
            sin_addr: libc::in_addr { s_addr: u32::from(address).to_be() },
            sin_zero: [0; 8],
        };
        // SAFETY: both are 16 bytes of plain data; the family says which one it is.
        unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(inet) }
    }
}

#[expect(unsafe_code, reason = "interface ioctls work on a union")]
impl Links for Linux {
    fn interfaces(&self) -> Vec<Interface> {
        list_interfaces(Path::new("/sys/class/net"))
    }

    fn set_up(&self, interface: &str, up: bool) -> io::Result<()> {
        let mut request = Self::request(interface)?;
        Self::call(libc::SIOCGIFFLAGS, &mut request)?;
        let flag = libc::IFF_UP as libc::c_short;
        // SAFETY: SIOCGIFFLAGS has filled the flags.
        unsafe {
            if up {
                request.ifr_ifru.ifru_flags |= flag;
            } else {
                request.ifr_ifru.ifru_flags &= !flag;
            }
        }
        Self::call(libc::SIOCSIFFLAGS, &mut request)
    }

    fn set_mac(&self, interface: &str, mac: [u8; 6]) -> io::Result<()> {
        let mut request = Self::request(interface)?;
        let mut address = libc::sockaddr { sa_family: libc::ARPHRD_ETHER, sa_data: [0; 14] };
        for (target, byte) in address.sa_data.iter_mut().zip(mac) {
            *target = libc::c_char::from_ne_bytes([byte]);
        }
        request.ifr_ifru.ifru_hwaddr = address;
        Self::call(libc::SIOCSIFHWADDR, &mut request)
    }

    fn remove_address(&self, interface: &str) -> io::Result<()> {
        let mut request = Self::request(interface)?;
        request.ifr_ifru.ifru_addr = Self::inet(Ipv4Addr::UNSPECIFIED);
        Self::call(libc::SIOCSIFADDR, &mut request)
    }

    fn set_address(&self, interface: &str, address: Ipv4Addr, mask: Ipv4Addr) -> io::Result<()> {
        let mut request = Self::request(interface)?;
        request.ifr_ifru.ifru_addr = Self::inet(address);
        Self::call(libc::SIOCSIFADDR, &mut request)?;
        request.ifr_ifru.ifru_netmask = Self::inet(mask);
        Self::call(libc::SIOCSIFNETMASK, &mut request)
    }

    fn set_default_route(&self, interface: &str, gateway: Ipv4Addr) -> io::Result<()> {
        let mut name: Vec<u8> = interface.bytes().chain([0]).collect();
        // SAFETY: rtentry is plain data for which zeroes are valid.
        let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
        route.rt_dst = Self::inet(Ipv4Addr::UNSPECIFIED);
        route.rt_genmask = Self::inet(Ipv4Addr::UNSPECIFIED);
        route.rt_gateway = Self::inet(gateway);
        route.rt_flags = (libc::RTF_UP | libc::RTF_GATEWAY) as libc::c_ushort;
        route.rt_dev = name.as_mut_ptr().cast();
        match Self::call(libc::SIOCADDRT, &mut route) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            outcome => outcome,
        }
    }

    fn disable_ipv6(&self, interface: &str) {
        let _ = std::fs::write(knob(interface, "disable_ipv6"), "1");
    }

    fn enable_ipv6(&self, interface: &str) -> io::Result<()> {
        for (name, value) in QUIET {
            // Older kernels lack some.
            let _ = std::fs::write(knob(interface, name), value);
        }
        std::fs::write(knob(interface, "disable_ipv6"), "0")
    }

    fn set_address6(&self, interface: &str, address: Ipv6Addr, prefix: u8) -> io::Result<()> {
        let mut request = libc::in6_ifreq {
            ifr6_addr: Self::inet6(address),
            ifr6_prefixlen: prefix.into(),
            ifr6_ifindex: Self::index(interface)?,
        };
        Self::call_of(libc::AF_INET6, libc::SIOCSIFADDR, &mut request)
    }

    fn set_default_route6(&self, interface: &str, gateway: Ipv6Addr) -> io::Result<()> {
        let everywhere = Self::inet6(Ipv6Addr::UNSPECIFIED);
        let mut route = Route6 {
            destination: everywhere,
            source: everywhere,
            gateway: Self::inet6(gateway),
            kind: 0,
            destination_length: 0,
            source_length: 0,
            metric: 0,
            info: 0,
            flags: u32::from(libc::RTF_UP | libc::RTF_GATEWAY),
            index: Self::index(interface)?,
        };
        match Self::call_of(libc::AF_INET6, libc::SIOCADDRT, &mut route) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            outcome => outcome,
        }
    }
}

/// What keeps an interface's IPv6 to what is set: router advertisements are not for it, it makes no address of its own (1 is `none`),
/// and the address it is given is used at once.
const QUIET: [(&str, &str); 4] =
    [("accept_ra", "0"), ("autoconf", "0"), ("accept_dad", "0"), ("addr_gen_mode", "1")];

/// A setting of the interface's IPv6.
fn knob(interface: &str, name: &str) -> String {
    format!("/proc/sys/net/ipv6/conf/{interface}/{name}")
}

/// Ethernet interfaces beneath a class directory, sorted by name.
fn list_interfaces(class: &Path) -> Vec<Interface> {
    let Ok(entries) = std::fs::read_dir(class) else { return Vec::new() };
    let mut found: Vec<Interface> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok().filter(|name| name != "lo")?;
            // 1 is ARPHRD_ETHER: tunnels and the like are none of ours.
            let kind = std::fs::read_to_string(entry.path().join("type")).ok()?;
            let mac = std::fs::read_to_string(entry.path().join("address")).ok()?;
            (kind.trim() == "1").then_some(Interface { name, mac: parse_mac(&mac)? })
        })
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// The double: a machine with interfaces, which notes what was done to them.
#[cfg(test)]
pub(crate) mod fake {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Keeps what IPv6 it was given, as a kernel does over a reconfiguration.
    #[derive(Debug, Clone, Default)]
    pub(crate) struct FakeLinks {
        pub(crate) interfaces: Vec<Interface>,
        pub(crate) refuse: Option<&'static str>,
        /// The driver changes no hardware address while the interface is up.
        pub(crate) stiff: bool,
        pub(crate) done: Arc<Mutex<Vec<String>>>,
        /// Of IPv6: whether it is on, and what is set. Off, nothing can be set and nothing is.
        pub(crate) ipv6: Arc<Mutex<Option<Vec<String>>>>,
    }

    impl FakeLinks {
        pub(crate) fn with(names: &[(&str, [u8; 6])]) -> Self {
            let interfaces =
                names.iter().map(|(name, mac)| Interface { name: (*name).into(), mac: *mac }).collect();
            Self { interfaces, ..Self::default() }
        }

        pub(crate) fn done(&self) -> Vec<String> {
            self.done.lock().unwrap().clone()
        }

        fn note(&self, what: &'static str, words: String) -> io::Result<()> {
            if self.refuse == Some(what) {
                return Err(io::Error::from_raw_os_error(libc::EPERM));
            }
            self.done.lock().unwrap().push(words);
            Ok(())
        }

        fn note6(&self, what: &'static str, words: String) -> io::Result<()> {
            self.note(what, words.clone())?;
            match self.ipv6.lock().unwrap().as_mut() {
                Some(set) if !set.contains(&words) => set.push(words),
                Some(_) => return Err(io::Error::from_raw_os_error(libc::EEXIST)),
                None => return Err(io::Error::from_raw_os_error(libc::EACCES)),
            }
            Ok(())
        }
    }

    impl Links for FakeLinks {
        fn interfaces(&self) -> Vec<Interface> {
            self.interfaces.clone()
        }

        fn set_up(&self, interface: &str, up: bool) -> io::Result<()> {
            let what = if up { "up" } else { "down" };
            self.note(what, format!("{interface} {what}"))
        }

        fn set_mac(&self, interface: &str, mac: [u8; 6]) -> io::Result<()> {
            if self.stiff && !self.done().contains(&format!("{interface} down")) {
                return Err(io::Error::from_raw_os_error(libc::EBUSY));
            }
            self.note("mac", format!("{interface} mac {}", write_mac(mac)))
        }

        fn remove_address(&self, interface: &str) -> io::Result<()> {
            self.note("no address", format!("{interface} no address"))
        }

        fn set_address(&self, interface: &str, address: Ipv4Addr, mask: Ipv4Addr) -> io::Result<()> {
            self.note("address", format!("{interface} {address} {mask}"))
        }

        fn set_default_route(&self, interface: &str, gateway: Ipv4Addr) -> io::Result<()> {
            self.note("route", format!("{interface} default {gateway}"))
        }

        fn disable_ipv6(&self, _interface: &str) {
            *self.ipv6.lock().unwrap() = None;
        }

        fn enable_ipv6(&self, interface: &str) -> io::Result<()> {
            self.note("ipv6", format!("{interface} IPv6"))?;
            self.ipv6.lock().unwrap().get_or_insert_default();
            Ok(())
        }

        fn set_address6(&self, interface: &str, address: Ipv6Addr, prefix: u8) -> io::Result<()> {
            self.note6("address6", format!("{interface} {address}/{prefix}"))
        }

        fn set_default_route6(&self, interface: &str, gateway: Ipv6Addr) -> io::Result<()> {
            self.note6("route6", format!("{interface} default {gateway}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::fake::FakeLinks;
    use super::*;

    const OLD: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const NEW: [u8; 6] = [2, 0, 0, 0, 0, 2];

    fn wanted() -> Addressing {
        Addressing {
            mac: NEW,
            address: Ipv4Addr::new(10, 1, 2, 3),
            prefix: 24,
            gateway: Some(Ipv4Addr::new(10, 1, 2, 1)),
            ipv6: None,
        }
    }

    fn ipv6(last: u16) -> Ipv6Addressing {
        let of = |last| Ipv6Addr::new(0xfddb, 1, 0, 0, 0, 0, 0, last);
        Ipv6Addressing { address: of(last), prefix: 64, gateway: of(1) }
    }

    #[test]
    fn a_clone_loses_one_address_before_it_gets_the_other() {
        let links = FakeLinks::with(&[("eth0", OLD)]);
        assert_eq!(apply(&links, &wanted()).unwrap(), "eth0");
        let stiff = FakeLinks { stiff: true, ..FakeLinks::with(&[("eth0", OLD)]) };
        apply(&stiff, &wanted()).unwrap();
        let mut expected = vec![
            "eth0 no address",
            "eth0 mac 02:00:00:00:00:02",
            "eth0 10.1.2.3 255.255.255.0",
            "eth0 up",
            "eth0 default 10.1.2.1",
        ];
        assert_eq!(links.done(), expected);
        expected.insert(1, "eth0 down");
        assert_eq!(stiff.done(), expected, "a driver that has to");
    }

    #[test]
    fn the_interface_with_the_address_is_chosen_among_several() {
        let links = FakeLinks::with(&[("eth0", OLD), ("eth1", NEW)]);
        assert_eq!(apply(&links, &Addressing { gateway: None, ..wanted() }).unwrap(), "eth1");
        assert_eq!(links.done(), ["eth1 no address", "eth1 10.1.2.3 255.255.255.0", "eth1 up"]);
    }

    #[test]
    fn ipv6_is_set_once_the_link_is_up() {
        let links = FakeLinks::with(&[("eth0", NEW)]);
        apply(&links, &Addressing { ipv6: Some(ipv6(3)), ..wanted() }).unwrap();
        let done = links.done();
        let up = done.iter().position(|step| step == "eth0 up").unwrap();
        assert_eq!(
            done[up + 1..],
            ["eth0 default 10.1.2.1", "eth0 IPv6", "eth0 fddb:1::3/64", "eth0 default fddb:1::1"]
        );
    }

    #[test]
    fn a_network_that_cannot_be_set_up_says_at_which_step() {
        let none = apply(&FakeLinks::default(), &wanted()).unwrap_err();
        assert!(none.to_string().contains("there are 0"), "{none}");
        let several = FakeLinks::with(&[("a", OLD), ("b", [2, 0, 0, 0, 0, 9])]);
        assert!(matches!(apply(&several, &wanted()), Err(NetworkError::NoInterface { count: 2, .. })));
        assert!(matches!(
            apply(&several, &Addressing { prefix: 33, ..wanted() }),
            Err(NetworkError::Prefix(33))
        ));
        for what in ["no address", "mac", "address", "up", "route", "ipv6", "address6", "route6"] {
            let links = FakeLinks { refuse: Some(what), ..FakeLinks::with(&[("eth0", OLD)]) };
            let refused = apply(&links, &Addressing { ipv6: Some(ipv6(3)), ..wanted() }).unwrap_err();
            assert!(refused.to_string().contains("eth0"), "{refused}");
        }
        let links = FakeLinks { refuse: Some("down"), stiff: true, ..FakeLinks::with(&[("eth0", OLD)]) };
        assert!(apply(&links, &wanted()).unwrap_err().to_string().contains("take the link down"));
    }

    #[test]
    fn interfaces_are_read_from_the_class_directory() {
        let class = tempfile::tempdir().unwrap();
        for (name, kind, mac) in [
            ("lo", "772", "00:00:00:00:00:00"),
            ("eth1", "1", "02:00:00:00:00:02"),
            ("eth0", "1", "02:00:00:00:00:01"),
            ("tun0", "65534", ""),
            ("bad", "1", "nonsense"),
        ] {
            let path = class.path().join(name);
            std::fs::create_dir(&path).unwrap();
            std::fs::write(path.join("type"), format!("{kind}\n")).unwrap();
            std::fs::write(path.join("address"), format!("{mac}\n")).unwrap();
        }
        let names: Vec<String> = list_interfaces(class.path()).into_iter().map(|found| found.name).collect();
        assert_eq!(names, ["eth0", "eth1"]);
        assert!(list_interfaces(Path::new("/nowhere")).is_empty());
    }

    #[test]
    fn the_kernel_refuses_interfaces_that_are_not_there() {
        for name in ["", "no-such-if0", "a-name-that-is-too-long"] {
            assert!(Linux.set_up(name, true).is_err());
            assert!(Linux.set_mac(name, NEW).is_err());
            assert!(Linux.remove_address(name).is_err());
            assert!(Linux.set_address(name, Ipv4Addr::LOCALHOST, Ipv4Addr::BROADCAST).is_err());
            assert!(Linux.enable_ipv6(name).is_err());
            assert!(Linux.set_address6(name, Ipv6Addr::LOCALHOST, 128).is_err());
            assert!(Linux.set_default_route6(name, Ipv6Addr::LOCALHOST).is_err());
        }
        assert!(Linux.set_default_route("no-such-if0", Ipv4Addr::LOCALHOST).is_err());
        Linux.disable_ipv6("no-such-if0");
        let _ = Linux.interfaces();
    }

    #[test]
    fn masks_and_servers_are_written_out() {
        assert_eq!(mask(0).unwrap(), Ipv4Addr::UNSPECIFIED);
        assert_eq!(mask(32).unwrap(), Ipv4Addr::BROADCAST);
        assert_eq!(mask(20).unwrap(), Ipv4Addr::new(255, 255, 240, 0));
        let servers = [Ipv4Addr::new(10, 0, 0, 1).into(); 5];
        assert_eq!(resolv_conf(&servers).matches("nameserver 10.0.0.1\n").count(), 3);
    }

    proptest! {
        /// Whatever it was before: a clone wakes with its template's.
        #[test]
        fn only_the_last_ipv6_is_left(had in proptest::collection::vec(proptest::option::of(2_u16..9), 1..6)) {
            let links = FakeLinks::with(&[("eth0", OLD)]);
            for last in &had {
                apply(&links, &Addressing { ipv6: last.map(ipv6), ..wanted() }).unwrap();
            }
            let left = links.ipv6.lock().unwrap().clone();
            let last = had.last().copied().flatten();
            let of = |last| vec![format!("eth0 fddb:1::{last:x}/64"), "eth0 default fddb:1::1".to_owned()];
            prop_assert_eq!(left, last.map(of));
        }

        #[test]
        fn hardware_addresses_round_trip(mac in any::<[u8; 6]>()) {
            prop_assert_eq!(parse_mac(&write_mac(mac)), Some(mac));
        }

        #[test]
        fn nonsense_is_no_hardware_address(text in "\\PC{0,24}") {
            if let Some(mac) = parse_mac(&text) {
                prop_assert_eq!(write_mac(mac), text.trim().to_ascii_lowercase());
            }
        }
    }
}
