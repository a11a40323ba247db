//! A [`Firewall`] in memory, as strict as nft: what it holds is what was applied, until something flushes it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};

use sha2::{Digest, Sha256};

use super::{
    FilterRules, Fingerprint, Firewall, FirewallError, NetworkRules, Traffic, VmGuard, render_apply,
};
use crate::network::NetworkShape;

/// A call of the seam.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// [`Firewall::apply`]
    Apply,
    /// [`Firewall::remove`]
    Remove,
    /// [`Firewall::list`], [`Firewall::inspect`], [`Firewall::traffic`], [`Firewall::filters`],
    /// [`Firewall::filters_mark`] and [`Firewall::network_rules`]
    List,
    /// [`Firewall::forget_reached`]
    Forget,
    /// [`Firewall::clear`]
    Clear,
}

/// The fake.
#[derive(Debug, Default)]
pub struct FakeFirewall {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    rules: BTreeMap<Ipv4Addr, VmGuard>,
    traffic: BTreeMap<Ipv4Addr, Traffic>,
    names: BTreeMap<Ipv4Addr, BTreeSet<Ipv4Addr>>,
    reached: BTreeMap<Ipv4Addr, BTreeSet<IpAddr>>,
    filters: BTreeMap<Ipv4Addr, FilterRules>,
    /// What libvirt is making, and for how many looks yet.
    making: Option<(u32, Ipv4Addr, FilterRules)>,
    /// How often somebody was at the filters.
    filters_changed: u64,
    /// `None` for whole ones.
    network_rules: Option<NetworkRules>,
    faults: VecDeque<Call>,
}

impl FakeFirewall {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, call: Call) -> Result<MutexGuard<'_, State>, FirewallError> {
        let mut state = self.state();
        if let Some(place) = state.faults.iter().position(|fault| *fault == call) {
            state.faults.remove(place);
            return Err(FirewallError::Refused {
                what: format!("{call:?}"),
                message: "scripted fault".to_owned(),
            });
        }
        Ok(state)
    }

    /// Makes the next such call fail.
    pub fn fail_next(&self, call: Call) {
        self.state().faults.push_back(call);
    }

    /// What someone does who flushes the whole firewall.
    pub fn flush(&self) {
        let mut state = self.state();
        state.rules.clear();
        state.names.clear();
        state.reached.clear();
    }

    /// Opens an address as the resolver does for a name; `false` when the VM has no set for that.
    pub fn open_name(&self, vm: Ipv4Addr, address: Ipv4Addr) -> bool {
        let mut state = self.state();
        let has_set = state.rules.contains_key(&vm);
        has_set && state.names.entry(vm).or_default().insert(address)
    }

    /// The addresses that names have opened for a VM.
    pub fn names_of(&self, vm: Ipv4Addr) -> BTreeSet<Ipv4Addr> {
        self.state().names.get(&vm).cloned().unwrap_or_default()
    }

    /// What a VM's packet does that opens a connection; `true` when it is reported as news.
    pub fn reach(&self, vm: Ipv4Addr, address: IpAddr) -> bool {
        let mut state = self.state();
        state.rules.contains_key(&vm) && state.reached.entry(vm).or_default().insert(address)
    }

    /// The rules that hold for an address.
    pub fn rules_of(&self, address: Ipv4Addr) -> Option<VmGuard> {
        self.state().rules.get(&address).cloned()
    }

    /// What someone does who flushes ebtables: libvirt puts no filter back by itself.
    pub fn flush_filters(&self) {
        let mut state = self.state();
        state.filters.clear();
        state.filters_changed += 1;
    }

    /// What libvirt does when it puts a VM's filter in force.
    pub fn put_filter(&self, address: Ipv4Addr, rules: FilterRules) {
        let mut state = self.state();
        state.filters.insert(address, rules);
        state.filters_changed += 1;
    }

    /// What libvirt does when it takes its time for that: at each of so many looks other rules are there, and with the last one the
    /// filter is in force.
    pub fn make_filter(&self, address: Ipv4Addr, rules: FilterRules, looks: u32) {
        self.state().making = Some((looks, address, rules));
    }

    /// What becomes of libvirt's own rules for the network; whole until then.
    pub fn set_network_rules(&self, rules: NetworkRules) {
        self.state().network_rules = Some(rules);
    }

    /// Sets what [`Firewall::traffic`] reports for an address that has rules.
    pub fn set_traffic(&self, address: Ipv4Addr, traffic: Traffic) {
        self.state().traffic.insert(address, traffic);
    }
}

fn fingerprint(guard: &VmGuard) -> Fingerprint {
    // Of the rules, not of what the transaction does besides.
    let rules = VmGuard { forgets_names: false, is_for_a_new_vm: false, ..guard.clone() };
    Fingerprint(format!("sha256:{}", hex::encode(Sha256::digest(render_apply(&rules)))))
}

impl Firewall for FakeFirewall {
    fn apply(&self, guard: &VmGuard) -> Result<Fingerprint, FirewallError> {
        let mut state = self.enter(Call::Apply)?;
        if guard.forgets_names() {
            state.names.remove(&guard.address());
        }
        if guard.is_for_a_new_vm() {
            state.reached.remove(&guard.address());
        }
        state.rules.insert(guard.address(), guard.clone());
        state.traffic.entry(guard.address()).or_default();
        Ok(fingerprint(guard))
    }

    fn remove(&self, address: Ipv4Addr) -> Result<(), FirewallError> {
        let mut state = self.enter(Call::Remove)?;
        state.rules.remove(&address);
        state.traffic.remove(&address);
        state.names.remove(&address);
        state.reached.remove(&address);
        Ok(())
    }

    fn list(&self) -> Result<Vec<Ipv4Addr>, FirewallError> {
        Ok(self.enter(Call::List)?.rules.keys().copied().collect())
    }

    fn inspect(&self, addresses: &[Ipv4Addr]) -> Result<BTreeMap<Ipv4Addr, Fingerprint>, FirewallError> {
        let state = self.enter(Call::List)?;
        Ok(addresses
            .iter()
            .filter_map(|address| state.rules.get(address).map(|guard| (*address, fingerprint(guard))))
            .collect())
    }

    fn traffic(&self) -> Result<BTreeMap<Ipv4Addr, Traffic>, FirewallError> {
        let state = self.enter(Call::List)?;
        Ok(state
            .traffic
            .iter()
            .filter(|(address, _)| state.rules.contains_key(address))
            .map(|(a, t)| (*a, t.clone()))
            .collect())
    }

    fn filters(&self) -> Result<BTreeMap<Ipv4Addr, FilterRules>, FirewallError> {
        let mut state = self.enter(Call::List)?;
        if let Some((looks, address, rules)) = state.making.take() {
            state.filters_changed += 1;
            match looks.checked_sub(1) {
                Some(left) => state.making = Some((left, address, rules)),
                None => drop(state.filters.insert(address, rules)),
            }
        }
        Ok(state.filters.clone())
    }

    fn filters_mark(&self) -> Result<Option<u64>, FirewallError> {
        Ok(Some(self.enter(Call::List)?.filters_changed))
    }

    fn network_rules(&self, _: &NetworkShape) -> Result<NetworkRules, FirewallError> {
        Ok(self.enter(Call::List)?.network_rules.unwrap_or(NetworkRules::WHOLE))
    }

    fn forget_reached(&self, address: Ipv4Addr, ipv6: bool) -> Result<(), FirewallError> {
        let mut state = self.enter(Call::Forget)?;
        // A VM without IPv6 has no such set.
        if !state.rules.get(&address).is_some_and(|guard| guard.policy().ipv6() || !ipv6) {
            return Err(FirewallError::Refused {
                what: "to forget what a VM reached".to_owned(),
                message: "No such file or directory".to_owned(),
            });
        }
        if let Some(reached) = state.reached.get_mut(&address) {
            reached.retain(|address| address.is_ipv6() && !ipv6);
        }
        Ok(())
    }

    fn clear(&self) -> Result<(), FirewallError> {
        let mut state = self.enter(Call::Clear)?;
        state.rules.clear();
        state.traffic.clear();
        state.names.clear();
        state.reached.clear();
        Ok(())
    }
}
