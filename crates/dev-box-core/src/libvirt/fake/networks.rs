//! Networks and filters of the fake.

use uuid::Uuid;

use super::domains::refuse;
use super::{FakeLibvirt, State};
use crate::libvirt::{LibvirtError, NetworkSummary, Networks, NwFilters, Result};
use crate::xml::Node;

#[derive(Debug, Clone)]
pub(super) struct FakeNetwork {
    pub(super) name: String,
    id: Uuid,
    xml: String,
    pub(super) active: bool,
    persistent: bool,
    autostart: bool,
}

impl FakeNetwork {
    fn summary(&self) -> NetworkSummary {
        let root = Node::parse(&self.xml).unwrap_or_default();
        NetworkSummary {
            id: self.id,
            name: self.name.clone(),
            active: self.active,
            persistent: self.persistent,
            autostart: self.autostart,
            bridge: root.child("bridge").and_then(|bridge| bridge.get("name")).map(str::to_owned),
        }
    }
}

impl State {
    fn network(&mut self, name: &str) -> Result<&mut FakeNetwork> {
        match self.networks.iter_mut().find(|network| network.name == name) {
            Some(network) => Ok(network),
            None => refuse(43, format!("Network not found: no network with matching name '{name}'")),
        }
    }

    fn filter(&self, name: &str) -> Result<&str> {
        match self.filters.iter().find(|(filter, _)| filter == name) {
            Some((_, xml)) => Ok(xml),
            None => refuse(62, format!("Network filter not found: no nwfilter with matching name '{name}'")),
        }
    }

    fn filter_in_use(&self, name: &str) -> bool {
        self.bound.iter().any(|(_, filter)| filter == name) || self.filter_in_use_by_domain(name)
    }

    fn filter_in_use_by_domain(&self, name: &str) -> bool {
        self.domains.iter().filter(|domain| domain.is_active()).any(|domain| {
            let root = Node::parse(domain.xml()).unwrap_or_default();
            root.child("devices").is_some_and(|devices| {
                devices
                    .children("interface")
                    .filter_map(|interface| interface.child("filterref")?.get("filter"))
                    .any(|filter| filter == name)
            })
        })
    }
}

/// The name, and the UUID if there is one, of a definition whose root is `<root>`.
fn read(xml: &str, root: &str) -> Result<(String, Option<Uuid>)> {
    let invalid = |what: String| LibvirtError::from_libvirt(27, &format!("XML error: {what}"));
    let node = Node::parse(xml).map_err(|error| invalid(error.to_string()))?;
    if node.name() != root {
        return Err(invalid(format!("unexpected root element <{}>, expecting <{root}>", node.name())));
    }
    let id = match node.text_at("uuid") {
        Some(text) => Some(Uuid::try_parse(text).map_err(|_| invalid("malformed uuid element".into()))?),
        None => None,
    };
    let name = node.text_at("name").or(node.get("name")).unwrap_or_default();
    if name.is_empty() { Err(invalid("name is missing".into())) } else { Ok((name.to_owned(), id)) }
}

impl Networks for FakeLibvirt {
    fn networks(&self) -> Result<Vec<NetworkSummary>> {
        Ok(self.enter("networks", false)?.networks.iter().map(FakeNetwork::summary).collect())
    }

    fn find_network(&self, name: &str) -> Result<Option<NetworkSummary>> {
        let state = self.enter("find_network", false)?;
        Ok(state.networks.iter().find(|network| network.name == name).map(FakeNetwork::summary))
    }

    fn define_network(&self, xml: &str) -> Result<NetworkSummary> {
        let mut state = self.enter("define_network", true)?;
        let (name, id) = read(xml, "network")?;
        if let Ok(network) = state.network(&name) {
            if id.is_some_and(|id| id != network.id) {
                let message =
                    format!("operation failed: network '{name}' already exists with uuid {}", network.id);
                return refuse(9, message);
            }
            network.xml = xml.to_owned();
            network.persistent = true;
            return Ok(network.summary());
        }
        let network = FakeNetwork {
            name,
            id: id.unwrap_or_else(Uuid::new_v4),
            xml: xml.to_owned(),
            active: false,
            persistent: true,
            autostart: false,
        };
        let summary = network.summary();
        state.networks.push(network);
        Ok(summary)
    }

    fn start_network(&self, name: &str) -> Result<()> {
        let mut state = self.enter("start_network", true)?;
        let network = state.network(name)?;
        if network.active {
            return refuse(55, "Requested operation is not valid: network is already active");
        }
        network.active = true;
        Ok(())
    }

    fn stop_network(&self, name: &str) -> Result<()> {
        let mut state = self.enter("stop_network", true)?;
        let network = state.network(name)?;
        if !network.active {
            return refuse(55, format!("Requested operation is not valid: network '{name}' is not active"));
        }
        network.active = false;
        state.networks.retain(|network| network.active || network.persistent);
        Ok(())
    }

    fn undefine_network(&self, name: &str) -> Result<()> {
        let mut state = self.enter("undefine_network", true)?;
        let network = state.network(name)?;
        if !network.persistent {
            return refuse(55, "Requested operation is not valid: cannot undefine transient network");
        }
        network.persistent = false;
        state.networks.retain(|network| network.active || network.persistent);
        Ok(())
    }

    fn set_network_autostart(&self, name: &str, autostart: bool) -> Result<()> {
        self.enter("set_network_autostart", true)?.network(name)?.autostart = autostart;
        Ok(())
    }

    fn network_xml(&self, name: &str) -> Result<String> {
        Ok(self.enter("network_xml", false)?.network(name)?.xml.clone())
    }
}

impl NwFilters for FakeLibvirt {
    fn filters(&self) -> Result<Vec<String>> {
        Ok(self.enter("filters", false)?.filters.iter().map(|(name, _)| name.clone()).collect())
    }

    fn define_filter(&self, xml: &str) -> Result<()> {
        let mut state = self.enter("define_filter", true)?;
        let (name, id) = read(xml, "filter")?;
        if let Some((_, present)) = state.filters.iter_mut().find(|(filter, _)| *filter == name) {
            let (_, old) = read(present, "filter")?;
            if old != id {
                let old = old.unwrap_or_default();
                let message = format!("operation failed: filter '{name}' already exists with uuid {old}");
                return refuse(9, message);
            }
            xml.clone_into(present);
        } else {
            state.filters.push((name, xml.to_owned()));
        }
        Ok(())
    }

    fn filter_xml(&self, name: &str) -> Result<String> {
        Ok(self.enter("filter_xml", false)?.filter(name)?.to_owned())
    }

    fn undefine_filter(&self, name: &str) -> Result<()> {
        let mut state = self.enter("undefine_filter", true)?;
        state.filter(name)?;
        if state.filter_in_use(name) {
            return refuse(55, "Requested operation is not valid: nwfilter is in use");
        }
        state.filters.retain(|(filter, _)| filter != name);
        Ok(())
    }

    fn bound_filters(&self) -> Result<Vec<String>> {
        Ok(self.enter("bound_filters", false)?.bound.iter().map(|(interface, _)| interface.clone()).collect())
    }

    fn bind_filter(&self, xml: &str) -> Result<()> {
        let mut state = self.enter("bind_filter", true)?;
        let invalid = |error: crate::xml::XmlError| LibvirtError::InvalidXml { message: error.to_string() };
        let binding = Node::parse(xml).map_err(invalid)?;
        let named = |path, attribute| binding.at(path).and_then(|node| node.get(attribute));
        let (Some(interface), Some(filter)) = (named("portdev", "name"), named("filterref", "filter")) else {
            return refuse(27, "XML error: a binding without portdev or filterref");
        };
        if state.bound.iter().any(|(bound, _)| bound == interface) {
            return refuse(9, format!("operation failed: binding '{interface}' already exists"));
        }
        if !state.filters.iter().any(|(known, _)| known == filter) {
            return refuse(1, format!("internal error: referenced filter '{filter}' is missing"));
        }
        state.bound.push((interface.to_owned(), filter.to_owned()));
        Ok(())
    }

    fn unbind_filter(&self, interface: &str) -> Result<()> {
        let mut state = self.enter("unbind_filter", true)?;
        let before = state.bound.len();
        state.bound.retain(|(bound, _)| bound != interface);
        if state.bound.len() == before {
            return refuse(101, format!("no nwfilter binding for port dev '{interface}'"));
        }
        Ok(())
    }
}
