//! libvirt's network of the VMs: found as it is, made where there is none, and anew where it is to have IPv6.

use dev_box_core::libvirt::{NetworkSummary, Networks};

use super::{NetError, VmNetwork, libvirt_failed};
use crate::network::NetworkShape;
use crate::policy::EgressPolicy;
use crate::subnet::Subnet;
use crate::xml::network::{FoundNetwork, network_xml};

impl VmNetwork {
    /// The network as it is, when there is one.
    pub(super) fn find<L: Networks + ?Sized>(&self, libvirt: &L) -> Result<Option<NetworkShape>, NetError> {
        Ok(self.find_active(libvirt)?.map(|(shape, _)| shape))
    }

    /// The same, and whether it runs.
    pub(super) fn find_active<L: Networks + ?Sized>(
        &self,
        libvirt: &L,
    ) -> Result<Option<(NetworkShape, bool)>, NetError> {
        let name = &self.settings.name;
        let found = libvirt.find_network(name).map_err(libvirt_failed("look for the network"))?;
        let Some(NetworkSummary { active, .. }) = found else { return Ok(None) };
        let xml =
            libvirt.network_xml(name).map_err(libvirt_failed(format!("describe the network {name}")))?;
        let found = FoundNetwork::read(&xml)?;
        let foreign = |difference| NetError::ForeignNetwork { name: name.clone(), difference };
        let subnet = found.subnet().map_err(foreign)?;
        let mut shape = NetworkShape::new(name, &self.settings.bridge, subnet)?;
        if !found.addresses6.is_empty() {
            shape = shape.with_ipv6();
        }
        let expected = [
            ("bridge", found.bridge.as_deref(), shape.bridge().to_owned()),
            ("Ethernet address", found.mac.as_deref(), shape.gateway_mac().to_string()),
        ];
        for (what, is, should) in expected {
            if is != Some(should.as_str()) {
                return Err(foreign(format!(
                    "its {what} is {} rather than {should}",
                    is.unwrap_or("absent")
                )));
            }
        }
        match self.settings.subnet {
            Some(wanted) if wanted != subnet => {
                Err(foreign(format!("its subnet is {subnet}, and {wanted} is configured")))
            }
            _ => Ok(Some((shape, active))),
        }
    }

    pub(super) fn ensure_locked<L: Networks + ?Sized>(&self, libvirt: &L) -> Result<NetworkShape, NetError> {
        let (shape, active) = match self.find_active(libvirt)? {
            Some((shape, active)) if self.lacks_ipv6(&shape)? => {
                forget(libvirt, shape.name(), active)?;
                (self.define(libvirt)?, false)
            }
            Some(found) => found,
            None => (self.define(libvirt)?, false),
        };
        if !active {
            let what = format!("start the network {shape}");
            libvirt.start_network(shape.name()).map_err(libvirt_failed(what))?;
        }
        Ok(shape)
    }

    /// Whether a network is to be made anew with IPv6, and can be: nobody uses it.
    fn lacks_ipv6(&self, shape: &NetworkShape) -> Result<bool, NetError> {
        if !self.settings.ipv6 || shape.gateway6().is_some() {
            return Ok(false);
        }
        let guarded = self.firewall.list()?.into_iter().any(|address| shape.subnet().is_guest(address));
        Ok(!guarded && self.leases(shape)?.list()?.is_empty())
    }

    pub(super) fn check_ipv6(&self, shape: &NetworkShape, policy: &EgressPolicy) -> Result<(), NetError> {
        match (self.settings.ipv6, shape.gateway6()) {
            _ if !policy.ipv6() => Ok(()),
            (true, Some(_)) => Ok(()),
            (true, None) => Err(NetError::Ipv6Later { network: shape.to_string() }),
            (false, _) => Err(NetError::NoIpv6),
        }
    }

    fn define<L: Networks + ?Sized>(&self, libvirt: &L) -> Result<NetworkShape, NetError> {
        let settings = &self.settings;
        let subnet =
            match settings.subnet {
                Some(subnet) => subnet,
                None => {
                    let mut routes = settings.host.routes(&settings.bridge).map_err(|source| {
                        NetError::Host { path: settings.host.routes.clone(), what: "read", source }
                    })?;
                    if settings.ipv6 {
                        routes.extend(settings.host.routes6(&settings.bridge));
                    }
                    Subnet::choose(Subnet::candidates(), &routes)?
                }
            };
        let mut shape = NetworkShape::new(&settings.name, &settings.bridge, subnet)?;
        if settings.ipv6 {
            shape = shape.with_ipv6();
        }
        let what = format!("define the network {shape}");
        libvirt.define_network(&network_xml(&shape)).map_err(libvirt_failed(what))?;
        Ok(shape)
    }
}

pub(super) fn forget<L: Networks + ?Sized>(libvirt: &L, name: &str, active: bool) -> Result<(), NetError> {
    if active {
        libvirt.stop_network(name).map_err(libvirt_failed(format!("stop the network {name}")))?;
    }
    libvirt.undefine_network(name).map_err(libvirt_failed(format!("undefine the network {name}")))
}
