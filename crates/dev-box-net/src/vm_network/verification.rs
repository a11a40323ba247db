//! What is found when every layer of a VM's network is looked at: [`Verification`].

use crate::guard::NetworkRules;

/// What verification found. See [`Verification::is_sound`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verification {
    /// The guard's rules.
    pub guard: GuardState,
    /// Whether libvirt's network runs.
    pub network_active: bool,
    /// Whether libvirt still has the VM's filter.
    pub filter_defined: bool,
    /// Whether the filter's rules are in force at the VM's tap; `None` while it has none.
    pub filter_in_force: Option<bool>,
    /// Whether the VM's tap is a port of the network's bridge, isolated from the other ones; `None` while it has none.
    pub tap_joined: Option<bool>,
    /// Whether the names of the policy are served; `None` when it has none.
    pub names_served: Option<bool>,
    /// Whether the host forwards IPv4: without, nothing gets out.
    pub forwarding: bool,
    /// Whether it forwards IPv6; `None` for a VM without.
    pub forwarding6: Option<bool>,
    /// What stands of libvirt's own rules for the network.
    pub network_rules: NetworkRules,
    /// `bridge-nf-call-iptables`; `None` while br_netfilter is not loaded. For information: neither the guard nor the
    /// filter needs it.
    pub bridge_nf_call_iptables: Option<bool>,
}

impl Verification {
    /// Whether every layer stands and packets can flow.
    pub fn is_sound(&self) -> bool {
        self.guard == GuardState::Intact
            && self.network_active
            && self.filter_defined
            && self.filter_in_force != Some(false)
            && self.tap_joined != Some(false)
            && self.names_served != Some(false)
            && self.hindrance().is_none()
    }

    /// Whether what the VM may send can get out.
    pub fn carries(&self) -> bool {
        self.forwarding && self.forwarding6 != Some(false) && self.network_rules.carries()
    }

    /// What of the layers that keep the VM in is missing, in words; `None` when they stand.
    pub fn finding(&self) -> Option<String> {
        let mut wrong = Vec::new();
        match self.guard {
            GuardState::Intact => {}
            GuardState::Changed => wrong.push("the guard's rules were changed"),
            GuardState::Missing => wrong.push("the guard's rules are gone"),
        }
        if !self.network_active {
            wrong.push("libvirt's network does not run");
        }
        if !self.filter_defined {
            wrong.push("libvirt has lost the VM's filter");
        }
        if self.filter_in_force == Some(false) {
            wrong.push("the rules of libvirt's filter are not in force");
        }
        if self.tap_joined == Some(false) {
            wrong.push("the VM's tap is not on its bridge, isolated");
        }
        if self.names_served == Some(false) {
            wrong.push("the VM's resolver does not run");
        }
        (!wrong.is_empty()).then(|| wrong.join("; "))
    }

    /// Why what the VM sends may not get out, in words, with what to do about it; `None` when nothing hinders it. It is as safe as
    /// without that.
    pub fn hindrance(&self) -> Option<String> {
        let mut wrong = Vec::new();
        if !self.forwarding {
            wrong.push(
                "the host does not forward IPv4: sysctl net.ipv4.ip_forward=1, and the same in /etc/sysctl.d"
                    .to_owned(),
            );
        }
        if self.forwarding6 == Some(false) {
            wrong.push(
                "the host does not forward IPv6: sysctl net.ipv6.conf.all.forwarding=1, and the same in /etc/sysctl.d"
                    .to_owned(),
            );
        }
        let rules = self.network_rules;
        if !rules.is_whole() {
            let gone = match (rules.nat, rules.forward) {
                (false, false) => "NAT and forwarding",
                (false, true) => "NAT",
                (true, _) => "forwarding",
            };
            let meanwhile = if rules.carries() {
                "the guard translates addresses meanwhile"
            } else {
                "the host's chain FORWARD drops what no rule accepts, so nothing gets out"
            };
            wrong.push(format!(
                "libvirt's rules of the network for {gone} are gone ({meanwhile}): libvirt makes them when its daemon \
                 starts, so `systemctl restart libvirtd` (or virtnetworkd); VMs run on"
            ));
        }
        (!wrong.is_empty()).then(|| wrong.join("; "))
    }
}

/// The state of a VM's rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuardState {
    /// As applied.
    Intact,
    /// Someone changed them, or the base rules.
    Changed,
    /// Someone removed them.
    Missing,
}
