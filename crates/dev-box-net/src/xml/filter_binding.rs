//! A filter bound to an interface of the host (<https://libvirt.org/formatnwfilter.html>).

use std::net::Ipv4Addr;

use dev_box_core::id::VmId;

use super::Xml;
use crate::identity::{mac_of, tap_of};

/// The XML of a binding of that filter to the tap of the VM with that address.
pub fn filter_binding(filter: &str, parameters: &[(String, String)], address: Ipv4Addr) -> String {
    let (tap, mac, ip) = (tap_of(address), mac_of(address).to_string(), address.to_string());
    Xml::document(|xml| {
        xml.element("filterbinding", &[], |xml| {
            // libvirt asks for an owner, which is a domain otherwise.
            xml.element("owner", &[], |xml| {
                xml.text("name", &tap)?;
                xml.text("uuid", &VmId::random().to_string())
            })?;
            xml.empty("portdev", &[("name", &tap)])?;
            xml.empty("mac", &[("address", &mac)])?;
            xml.element("filterref", &[("filter", filter)], |xml| {
                let own = [("IP", ip.as_str()), ("MAC", &mac)];
                let others = parameters.iter().map(|(name, value)| (name.as_str(), value.as_str()));
                own.into_iter()
                    .chain(others)
                    .try_for_each(|(name, value)| xml.empty("parameter", &[("name", name), ("value", value)]))
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_the_filter_asks_for_is_in_it() {
        let parameters = [("IP6".to_owned(), "fddb::ad5:2".to_owned())];
        let xml = filter_binding("some-filter", &parameters, Ipv4Addr::new(10, 213, 0, 2));
        for part in [
            "<portdev name=\"dbt0ad50002\"/>",
            "<mac address=\"02:db:0a:d5:00:02\"/>",
            "<filterref filter=\"some-filter\">",
            "<parameter name=\"IP\" value=\"10.213.0.2\"/>",
            "<parameter name=\"MAC\" value=\"02:db:0a:d5:00:02\"/>",
            "<parameter name=\"IP6\" value=\"fddb::ad5:2\"/>",
        ] {
            assert!(xml.contains(part), "{part} in {xml}");
        }
    }
}
