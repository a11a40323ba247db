//! Networks and network filters through `virt`.

use virt::network::Network;
use virt::nwfilter::NWFilter;

use super::{VirtDriver, filter_bindings, of};
use crate::libvirt::{LibvirtError, NetworkSummary, Networks, NwFilters, Result};

impl VirtDriver {
    fn network(&self, name: &str) -> Result<Network> {
        self.connect.lookup_network_by_name(name).map_err(of)
    }

    fn filter(&self, name: &str) -> Result<NWFilter> {
        self.connect.lookup_nwfilter_by_name(name).map_err(of)
    }
}

impl Networks for VirtDriver {
    fn networks(&self) -> Result<Vec<NetworkSummary>> {
        let networks = self.connect.list_all_networks(0).map_err(of)?;
        let mut list = Vec::with_capacity(networks.len());
        for network in &networks {
            match summary(network) {
                Ok(summary) => list.push(summary),
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(list)
    }

    fn find_network(&self, name: &str) -> Result<Option<NetworkSummary>> {
        match self.network(name).and_then(|network| summary(&network)) {
            Ok(summary) => Ok(Some(summary)),
            Err(LibvirtError::NoSuchNetwork { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn define_network(&self, xml: &str) -> Result<NetworkSummary> {
        summary(&self.connect.define_network_xml(xml).map_err(of)?)
    }

    fn start_network(&self, name: &str) -> Result<()> {
        self.network(name)?.create().map_err(of)
    }

    fn stop_network(&self, name: &str) -> Result<()> {
        self.network(name)?.destroy().map_err(of)
    }

    fn undefine_network(&self, name: &str) -> Result<()> {
        self.network(name)?.undefine().map_err(of)
    }

    fn set_network_autostart(&self, name: &str, autostart: bool) -> Result<()> {
        self.network(name)?.set_autostart(autostart).map(drop).map_err(of)
    }

    fn network_xml(&self, name: &str) -> Result<String> {
        self.network(name)?.xml_desc(0).map_err(of)
    }
}

impl NwFilters for VirtDriver {
    fn filters(&self) -> Result<Vec<String>> {
        let filters = self.connect.list_all_nw_filters(0).map_err(of)?;
        filters.iter().map(|filter| filter.name().map_err(of)).collect()
    }

    fn define_filter(&self, xml: &str) -> Result<()> {
        self.connect.define_nwfilter_xml(xml).map(drop).map_err(of)
    }

    fn filter_xml(&self, name: &str) -> Result<String> {
        self.filter(name)?.xml_desc(0).map_err(of)
    }

    fn undefine_filter(&self, name: &str) -> Result<()> {
        self.filter(name)?.undefine().map_err(of)
    }

    fn bound_filters(&self) -> Result<Vec<String>> {
        filter_bindings::list(&self.connect)
    }

    fn bind_filter(&self, xml: &str) -> Result<()> {
        filter_bindings::create(&self.connect, xml)
    }

    fn unbind_filter(&self, interface: &str) -> Result<()> {
        filter_bindings::delete(&self.connect, interface)
    }
}

fn summary(network: &Network) -> Result<NetworkSummary> {
    Ok(NetworkSummary {
        id: network.uuid().map_err(of)?,
        name: network.name().map_err(of)?,
        active: network.is_active().map_err(of)?,
        persistent: network.is_persistent().map_err(of)?,
        autostart: network.autostart().unwrap_or(false),
        // A network may have none.
        bridge: network.bridge_name().ok(),
    })
}
