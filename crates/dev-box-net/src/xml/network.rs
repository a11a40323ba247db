//! The libvirt network: NAT, a bridge of our own, a resolver, no DHCP, ports isolated from each other; IPv6 where it is wanted.

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use quick_xml::Reader;
use quick_xml::events::Event;

use super::Xml;
use crate::network::NetworkShape;
use crate::subnet::Subnet;

/// Deepest nesting that is read.
const MAX_DEPTH: usize = 32;

/// The network's definition.
///
/// <https://libvirt.org/formatnetwork.html>
pub fn network_xml(shape: &NetworkShape) -> String {
    let (gateway, prefix) = (shape.gateway().to_string(), shape.subnet().prefix().to_string());
    let ipv6 = shape.gateway6();
    let nat = if ipv6.is_some() { &[("ipv6", "yes")][..] } else { &[] };
    Xml::document(|xml| {
        xml.element("network", &[], |xml| {
            xml.text("name", shape.name())?;
            xml.element("forward", &[("mode", "nat")], |xml| {
                xml.element("nat", nat, |xml| xml.empty("port", &[("start", "1024"), ("end", "65535")]))
            })?;
            xml.empty("bridge", &[("name", shape.bridge()), ("stp", "off"), ("delay", "0")])?;
            xml.empty("mac", &[("address", &shape.gateway_mac().to_string())])?;
            xml.empty("dns", &[("enable", "yes"), ("forwardPlainNames", "no")])?;
            xml.empty("ip", &[("address", &gateway), ("prefix", &prefix)])?;
            if let Some(ipv6) = ipv6 {
                let (address, prefix) = (ipv6.addr().to_string(), ipv6.prefix_len().to_string());
                xml.empty("ip", &[("family", "ipv6"), ("address", &address), ("prefix", &prefix)])?;
            }
            xml.empty("port", &[("isolated", "yes")])
        })
    })
}

/// What a libvirt network is, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FoundNetwork {
    /// `nat`, `route`...; `None` for a network without `<forward>`.
    pub forward: Option<String>,
    /// The bridge's name.
    pub bridge: Option<String>,
    /// The bridge's Ethernet address.
    pub mac: Option<String>,
    /// IPv4 addresses of the bridge.
    pub addresses: Vec<Ipv4Net>,
    /// Whether it hands out addresses.
    pub dhcp: bool,
    /// IPv6 addresses of the bridge.
    pub addresses6: Vec<Ipv6Net>,
    /// Whether it has an address that cannot be read.
    pub unreadable: bool,
    /// Whether ports are isolated.
    pub isolated: bool,
}

/// XML that is no network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("libvirt's description of the network cannot be read: {0}")]
pub struct UnreadableNetwork(String);

impl FoundNetwork {
    /// Reads libvirt's XML.
    ///
    /// # Errors
    /// [`UnreadableNetwork`] for what is not well-formed or nested too deeply.
    pub fn read(xml: &str) -> Result<Self, UnreadableNetwork> {
        let unreadable = |what: String| UnreadableNetwork(what);
        let mut reader = Reader::from_str(xml);
        let mut found = Self::default();
        let mut path: Vec<String> = Vec::new();
        loop {
            let event = reader.read_event().map_err(|error| unreadable(error.to_string()))?;
            match &event {
                Event::Start(element) | Event::Empty(element) => {
                    path.push(element.name().as_ref().to_owned());
                    let mut attributes = Vec::new();
                    for attribute in element.attributes() {
                        let attribute = attribute.map_err(|error| unreadable(error.to_string()))?;
                        let value = attribute
                            .normalized_value(quick_xml::XmlVersion::Implicit1_0)
                            .map_err(|error| unreadable(error.to_string()))?;
                        attributes.push((attribute.key.as_ref().to_owned(), value.into_owned()));
                    }
                    found.element(&path, &attributes);
                    if matches!(event, Event::Empty(_)) {
                        path.pop();
                    }
                    if path.len() > MAX_DEPTH {
                        return Err(unreadable("nested too deeply".to_owned()));
                    }
                }
                Event::End(_) => {
                    path.pop();
                }
                Event::Eof if path.is_empty() => return Ok(found),
                Event::Eof => return Err(unreadable("it ends too early".to_owned())),
                _ => {}
            }
        }
    }

    fn element(&mut self, path: &[String], attributes: &[(String, String)]) {
        let get = |name: &str| attributes.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        let path: Vec<&str> = path.iter().map(String::as_str).collect();
        match path.as_slice() {
            ["network", "forward"] => self.forward = Some(get("mode").unwrap_or_else(|| "nat".to_owned())),
            ["network", "bridge"] => self.bridge = get("name"),
            ["network", "mac"] => self.mac = get("address"),
            ["network", "port"] => self.isolated = get("isolated").as_deref() == Some("yes"),
            ["network", "ip"] => {
                let ipv6 = get("family").as_deref() == Some("ipv6");
                match address(&get) {
                    Some(IpNet::V4(net)) if !ipv6 => self.addresses.push(net),
                    Some(IpNet::V6(net)) if ipv6 => self.addresses6.push(net),
                    _ => self.unreadable = true,
                }
            }
            ["network", "ip", "dhcp"] => self.dhcp = true,
            _ => {}
        }
    }

    /// The subnet, when this is a network such as [`network_xml`] makes.
    ///
    /// # Errors
    /// What is different, for a person.
    pub fn subnet(&self) -> Result<Subnet, String> {
        if self.forward.as_deref() != Some("nat") {
            return Err("it does not forward by NAT".to_owned());
        }
        if self.dhcp {
            return Err("it hands out addresses by DHCP".to_owned());
        }
        if self.unreadable {
            return Err("it has an address that cannot be read".to_owned());
        }
        if !self.isolated {
            return Err("its ports are not isolated".to_owned());
        }
        let [net] = self.addresses.as_slice() else {
            return Err(format!("it has {} IPv4 addresses rather than one", self.addresses.len()));
        };
        let subnet = Subnet::new(net.trunc()).map_err(|error| error.to_string())?;
        if subnet.gateway() != net.addr() {
            return Err(format!("its gateway is {} rather than {}", net.addr(), subnet.gateway()));
        }
        let gateway6 = subnet.gateway6();
        match self.addresses6.as_slice() {
            [] => Ok(subnet),
            [net] if *net == gateway6 => Ok(subnet),
            [net] => Err(format!("its IPv6 gateway is {net} rather than {gateway6}")),
            several => Err(format!("it has {} IPv6 addresses rather than one", several.len())),
        }
    }
}

fn address(get: &impl Fn(&str) -> Option<String>) -> Option<IpNet> {
    match get("address")?.parse().ok()? {
        IpAddr::V4(address) => Some(Ipv4Net::new(address, prefix(get)?).ok()?.into()),
        IpAddr::V6(address) => Some(Ipv6Net::new(address, get("prefix")?.parse().ok()?).ok()?.into()),
    }
}

fn prefix(get: &impl Fn(&str) -> Option<String>) -> Option<u8> {
    if let Some(prefix) = get("prefix") {
        return prefix.parse().ok();
    }
    ipnet::ipv4_mask_to_prefix(get("netmask")?.parse().ok()?).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shape() -> NetworkShape {
        NetworkShape::new("dev-box", "devbox0", "10.213.0.0/24".parse().unwrap()).unwrap()
    }

    #[test]
    fn golden() {
        insta::assert_snapshot!(network_xml(&shape()));
        insta::assert_snapshot!("with_ipv6", network_xml(&shape().with_ipv6()));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let found = FoundNetwork::read(&network_xml(&shape())).unwrap();
        assert_eq!(found.subnet().unwrap(), shape().subnet());
        assert_eq!(found.bridge.as_deref(), Some("devbox0"));
        assert_eq!(found.mac, Some(shape().gateway_mac().to_string()));
        assert!(found.addresses6.is_empty());
        let found = FoundNetwork::read(&network_xml(&shape().with_ipv6())).unwrap();
        assert_eq!(found.subnet().unwrap(), shape().subnet());
        assert_eq!(found.addresses6, ["fddb::ad5:1/120".parse().unwrap()]);
    }

    #[test]
    fn a_netmask_is_as_good_as_a_prefix() {
        let xml = network_xml(&shape()).replace("prefix=\"24\"", "netmask='255.255.255.0'");
        assert_eq!(FoundNetwork::read(&xml).unwrap().subnet().unwrap(), shape().subnet());
    }

    #[test]
    fn foreign_networks_are_told_apart() {
        let xml = network_xml(&shape());
        let inside = |extra: &str| xml.replace("</network>", &format!("{extra}</network>"));
        for (xml, part) in [
            (xml.replace("mode=\"nat\"", "mode='route'"), "NAT"),
            ("<network/>".to_owned(), "NAT"),
            (inside("<ip><dhcp/></ip>"), "DHCP"),
            (
                inside("<ip family='ipv6' address='fd00::1' prefix='64'/>"),
                "IPv6 gateway is fd00::1/64 rather",
            ),
            (inside("<ip family='ipv6' address='fd00::1'/>"), "cannot be read"),
            (inside("<ip family='ipv6' address='10.9.0.1' prefix='24'/>"), "cannot be read"),
            (inside(&"<ip family='ipv6' address='fddb::ad5:1' prefix='120'/>".repeat(2)), "2 IPv6 addresses"),
            (xml.replace("isolated=\"yes\"", "isolated='no'"), "isolated"),
            (inside("<ip address='10.9.0.1' prefix='24'/>"), "2 IPv4 addresses"),
            (xml.replace("10.213.0.1", "10.213.0.9"), "gateway is 10.213.0.9"),
            (xml.replace("10.213.0.1", "8.8.8.1"), "not a private range"),
        ] {
            let reason = FoundNetwork::read(&xml).unwrap().subnet().unwrap_err();
            assert!(reason.contains(part), "{reason}");
        }
    }

    #[test]
    fn what_is_no_xml_is_refused() {
        let deep = "<a>".repeat(100);
        for text in
            ["<network>", "<network></other>", "<network a=1/>", "<network a='&nope;'/>", deep.as_str()]
        {
            assert!(FoundNetwork::read(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_panic(text in ".{0,300}") {
            let _ = FoundNetwork::read(&text).map(|found| found.subnet());
        }
    }
}
