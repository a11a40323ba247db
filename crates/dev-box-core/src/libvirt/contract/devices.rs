//! Devices of running domains.

use uuid::Uuid;

use super::virtual_networks::{filter, network};
use super::{Rung, ok, refused};
use crate::id::VmId;
use crate::libvirt::{Access, Libvirt, StartMode, XmlView};
use crate::xml::Node;

const MAC: &str = "52:54:00:00:c0:de";

fn interface(network: &str, filter: Option<&str>, link: &str) -> Node {
    Node::new("interface")
        .attr("type", "network")
        .with(Node::new("mac").attr("address", MAC))
        .with(Node::new("source").attr("network", network))
        .with(Node::new("model").attr("type", "virtio"))
        .with_all(filter.map(|name| Node::new("filterref").attr("filter", name)))
        .with(Node::new("link").attr("state", link))
}

fn with_interface(domain: &str, interface: &Node) -> String {
    let interface = interface.to_xml();
    if domain.contains("</devices>") {
        domain.replacen("</devices>", &format!("{interface}</devices>"), 1)
    } else {
        domain.replacen("</domain>", &format!("<devices>{interface}</devices></domain>"), 1)
    }
}

/// An interface is plugged in and given its filter while the domain runs.
pub fn devices(rung: &Rung) {
    let (libvirt, _) = rung.open(Access::ReadWrite);
    let (domain, id) = (rung.name("devices"), VmId::random());
    if !rung.is_qemu {
        ok(libvirt.create(&rung.xml(&domain, id), StartMode::Running), "create");
        refused(libvirt.update_device(id, &interface("x", None, "up").to_xml()), "Unsupported", "update");
        ok(libvirt.destroy(id), "destroy");
        return;
    }
    let unique = Uuid::new_v4();
    let bridge = format!("cd{}", unique.simple().to_string().get(..8).unwrap_or("0"));
    let (net, rules) = (rung.name("devices-net"), rung.name("devices-filter"));
    let plugged = interface(&net, Some(&rules), "up").to_xml();
    refused(libvirt.update_device(id, &plugged), "NoSuchDomain", "update of nothing");
    ok(libvirt.define_network(&network(&net, unique, &bridge)), "define the network");
    ok(libvirt.start_network(&net), "start the network");

    let xml = with_interface(&rung.xml(&domain, id), &interface(&net, None, "down"));
    ok(libvirt.define(&xml), "define");
    refused(libvirt.update_device(id, &plugged), "InvalidOperation", "update of what does not run");
    ok(libvirt.start(id, StartMode::Paused), "start");
    refused(libvirt.update_device(id, "<interface"), "InvalidXml", "update with no XML");
    let other = plugged.replace("c0:de", "c0:d0");
    refused(libvirt.update_device(id, &other), "NoSuchDevice", "update of a device that is not there");
    assert!(libvirt.update_device(id, &plugged).is_err(), "a filter that is not there");
    let current = || ok(libvirt.xml(id, XmlView::Current), "xml");
    assert!(!current().contains("filterref") && current().contains("<link state="), "{}", current());

    ok(libvirt.define_filter(&filter(&rules, Uuid::new_v4(), 80)), "define the filter");
    ok(libvirt.update_device(id, &interface(&net, Some(&rules), "down").to_xml()), "the filter");
    assert!(current().contains(&rules), "{}", current());
    refused(libvirt.undefine_filter(&rules), "InUse", "undefine of a filter in use");
    ok(libvirt.update_device(id, &plugged), "the link");
    let quoted = current().replace('\'', "\"");
    assert!(quoted.contains(&rules) && !quoted.contains("<link state=\"down\""), "{quoted}");

    bindings(&*libvirt, &bridge, &rules);
    ok(libvirt.destroy(id), "destroy");
    let xml = ok(libvirt.xml(id, XmlView::Current), "xml");
    assert!(!xml.contains("filterref"), "what was changed live is gone: {xml}");
    ok(libvirt.undefine(id, crate::libvirt::UndefineMode::Plain), "undefine");
    ok(libvirt.undefine_filter(&rules), "undefine the filter");
    ok(libvirt.stop_network(&net), "stop the network");
    ok(libvirt.undefine_network(&net), "undefine the network");
}

/// A filter is bound to an interface that is no domain's: the bridge, since it is there.
fn bindings(libvirt: &dyn Libvirt, interface: &str, filter: &str) {
    let binding = |filter: &str| {
        let owner = Node::new("owner").with(Node::text("name", "contract"));
        Node::new("filterbinding")
            .with(owner.with(Node::text("uuid", Uuid::new_v4().to_string())))
            .with(Node::new("portdev").attr("name", interface))
            .with(Node::new("mac").attr("address", MAC))
            .with(Node::new("filterref").attr("filter", filter))
            .to_xml()
    };
    let bound = || ok(libvirt.bound_filters(), "bindings").iter().any(|bound| bound == interface);
    refused(libvirt.unbind_filter(interface), "NoSuchFilter", "unbind where nothing is bound");
    refused(libvirt.bind_filter("<filterbinding"), "InvalidXml", "binding without XML");
    assert!(libvirt.bind_filter(&binding("no-such-filter")).is_err(), "a filter that is not there");
    assert!(!bound());
    ok(libvirt.bind_filter(&binding(filter)), "bind");
    assert!(bound());
    refused(libvirt.bind_filter(&binding(filter)), "NameTaken", "a second binding of one interface");
    ok(libvirt.unbind_filter(interface), "unbind");
    assert!(!bound());
}
