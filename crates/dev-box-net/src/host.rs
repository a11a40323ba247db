//! What is read from the host: routes, interfaces, and the sysctls that matter.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use ipnet::Ipv4Net;

use crate::subnet::{parse_routes, parse_routes6};

/// Of a tap: it stays when nobody has it open (linux/if_tun.h).
const IFF_PERSIST: u32 = 0x0800;

/// Where the kernel tells these things; other paths in tests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPaths {
    /// `/proc/net/route`
    pub routes: PathBuf,
    /// `/proc/net/ipv6_route`
    pub routes6: PathBuf,
    /// `/sys/class/net`
    pub interfaces: PathBuf,
    /// `/proc/sys/net/ipv4/ip_forward`
    pub ip_forward: PathBuf,
    /// `/proc/sys/net/ipv6/conf/all/forwarding`
    pub ipv6_forward: PathBuf,
    /// `/proc/sys/net/bridge/bridge-nf-call-iptables`
    pub bridge_nf_call_iptables: PathBuf,
    /// `/etc/resolv.conf`
    pub resolv_conf: PathBuf,
}

impl Default for HostPaths {
    fn default() -> Self {
        Self {
            routes: "/proc/net/route".into(),
            routes6: "/proc/net/ipv6_route".into(),
            interfaces: "/sys/class/net".into(),
            ip_forward: "/proc/sys/net/ipv4/ip_forward".into(),
            ipv6_forward: "/proc/sys/net/ipv6/conf/all/forwarding".into(),
            bridge_nf_call_iptables: "/proc/sys/net/bridge/bridge-nf-call-iptables".into(),
            resolv_conf: "/etc/resolv.conf".into(),
        }
    }
}

impl HostPaths {
    /// Ranges that the host has routes to, those by `bridge` left out.
    pub(crate) fn routes(&self, bridge: &str) -> io::Result<Vec<Ipv4Net>> {
        Ok(parse_routes(&fs::read_to_string(&self.routes)?, Some(bridge)))
    }

    /// Subnets whose IPv6 ranges the host has routes to, those by `bridge` left out; none where it has no IPv6.
    pub(crate) fn routes6(&self, bridge: &str) -> Vec<Ipv4Net> {
        parse_routes6(&fs::read_to_string(&self.routes6).unwrap_or_default(), Some(bridge))
    }

    /// Whether there is an interface of that name.
    pub(crate) fn has_interface(&self, name: &str) -> bool {
        self.interfaces.join(name).exists()
    }

    /// Whether the interface of that name is a port of that bridge, isolated from others that are; `None` when there is none of
    /// that name.
    pub(crate) fn is_joined(&self, name: &str, bridge: &str) -> Option<bool> {
        let interface = self.interfaces.join(name);
        let master = fs::read_link(interface.join("master"));
        let on_bridge = master.is_ok_and(|master| master.file_name() == Some(bridge.as_ref()));
        let joined = on_bridge && switch(&interface.join("brport/isolated")) == Some(true);
        // Whether it is there last: it goes while it is looked at when its VM ends.
        interface.exists().then_some(joined)
    }

    /// Whether a VM may have the tap of that name: one that libvirt made is there as long as its VM, and a persistent one is
    /// open then.
    pub(crate) fn has_open_tap(&self, name: &str) -> bool {
        let tap = self.interfaces.join(name);
        let flags = fs::read_to_string(tap.join("tun_flags")).ok();
        let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim().strip_prefix("0x")?, 16).ok());
        let persistent = flags.is_some_and(|flags| flags & IFF_PERSIST != 0);
        // Of one that was set down nobody can say.
        let closed = || fs::read_to_string(tap.join("carrier")).is_ok_and(|carrier| carrier.trim() == "0");
        tap.exists() && !(persistent && closed())
    }

    /// Whether the host forwards IPv4.
    pub(crate) fn forwards(&self) -> bool {
        switch(&self.ip_forward) == Some(true)
    }

    /// Whether the host forwards IPv6.
    pub(crate) fn forwards_ipv6(&self) -> bool {
        switch(&self.ipv6_forward) == Some(true)
    }

    /// Whether bridged frames pass iptables too; `None` while the module `br_netfilter` is not loaded.
    pub(crate) fn bridge_nf(&self) -> Option<bool> {
        switch(&self.bridge_nf_call_iptables)
    }
}

fn switch(path: &Path) -> Option<bool> {
    fs::read_to_string(path).ok().map(|text| text.trim() != "0")
}
