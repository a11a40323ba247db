//! Networks and filters.

use uuid::Uuid;

use super::{Rung, ok, refused};
use crate::libvirt::Access;
use crate::xml::Node;

pub(super) fn network(name: &str, id: Uuid, bridge: &str) -> String {
    // Without addresses, so that it starts wherever there is a bridge to be made.
    Node::new("network")
        .with(Node::text("name", name))
        .with(Node::text("uuid", id.to_string()))
        .with(Node::new("bridge").attr("name", bridge).attr("stp", "off"))
        .to_xml()
}

/// The life of a network.
pub fn networks(rung: &Rung) {
    let (libvirt, _) = rung.open(Access::ReadWrite);
    let (name, id) = (rung.name("net"), Uuid::new_v4());
    let bridge = format!("ct{}", id.simple().to_string().get(..8).unwrap_or("0"));
    assert_eq!(ok(libvirt.find_network(&name), "find"), None);
    refused(libvirt.start_network(&name), "NoSuchNetwork", "start of nothing");
    refused(libvirt.stop_network(&name), "NoSuchNetwork", "stop of nothing");
    refused(libvirt.network_xml(&name), "NoSuchNetwork", "xml of nothing");
    refused(libvirt.undefine_network(&name), "NoSuchNetwork", "undefine of nothing");
    refused(libvirt.set_network_autostart(&name, true), "NoSuchNetwork", "autostart of nothing");
    refused(libvirt.define_network("<network"), "InvalidXml", "define of no XML");
    refused(libvirt.define_network("<domain type='kvm'/>"), "InvalidXml", "define of another thing");

    let made = ok(libvirt.define_network(&network(&name, id, &bridge)), "define");
    assert_eq!((made.name.as_str(), made.id, made.active, made.persistent), (name.as_str(), id, false, true));
    assert_eq!(made.bridge.as_deref(), Some(bridge.as_str()));
    assert!(ok(libvirt.networks(), "networks").contains(&made));
    let other = network(&name, Uuid::new_v4(), &bridge);
    refused(libvirt.define_network(&other), "NameTaken", "a name with another UUID");
    if rung.is_qemu {
        refused(libvirt.stop_network(&name), "InvalidOperation", "stop of what does not run");
    }
    ok(libvirt.start_network(&name), "start");
    refused(libvirt.start_network(&name), "InvalidOperation", "start of what runs");
    assert!(ok(libvirt.find_network(&name), "find").is_some_and(|network| network.active));
    assert!(ok(libvirt.network_xml(&name), "xml").contains(&bridge));
    ok(libvirt.set_network_autostart(&name, true), "autostart");
    assert!(ok(libvirt.find_network(&name), "find").is_some_and(|network| network.autostart));
    ok(libvirt.set_network_autostart(&name, false), "no autostart");
    ok(libvirt.stop_network(&name), "stop");
    ok(libvirt.undefine_network(&name), "undefine");
    assert_eq!(ok(libvirt.find_network(&name), "find"), None);
}

pub(super) fn filter(name: &str, id: Uuid, port: u16) -> String {
    let tcp = Node::new("tcp").attr("dstportstart", port.to_string());
    Node::new("filter")
        .attr("name", name)
        .attr("chain", "root")
        .with(Node::text("uuid", id.to_string()))
        .with(Node::new("rule").attr("action", "drop").attr("direction", "inout").with(tcp))
        .to_xml()
}

/// The life of a filter; where there are none, that is said.
pub fn filters(rung: &Rung) {
    let (libvirt, _) = rung.open(Access::ReadWrite);
    if !rung.has_filters {
        refused(libvirt.filters(), "Unsupported", "filters where there are none");
        return;
    }
    let (name, id) = (rung.name("filter"), Uuid::new_v4());
    refused(libvirt.filter_xml(&name), "NoSuchFilter", "xml of nothing");
    refused(libvirt.undefine_filter(&name), "NoSuchFilter", "undefine of nothing");
    refused(libvirt.define_filter("<filter"), "InvalidXml", "define of no XML");
    ok(libvirt.define_filter(&filter(&name, id, 80)), "define");
    assert!(ok(libvirt.filters(), "filters").contains(&name));
    ok(libvirt.define_filter(&filter(&name, id, 81)), "define again");
    let xml = ok(libvirt.filter_xml(&name), "xml");
    assert!(xml.contains("81") && !xml.contains("dstportstart='80'"), "{xml}");
    refused(
        libvirt.define_filter(&filter(&name, Uuid::new_v4(), 80)),
        "NameTaken",
        "a name with another UUID",
    );
    ok(libvirt.undefine_filter(&name), "undefine");
    assert!(!ok(libvirt.filters(), "filters").contains(&name));
}
