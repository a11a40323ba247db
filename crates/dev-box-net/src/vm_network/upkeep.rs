//! What is done to the network of a VM that runs, by whom it may be: verification, repair, another policy. All by what is
//! on record of its lease, so that the process that owns the VM need not be asked.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, TryLockError};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use dev_box_core::id::VmName;
use dev_box_core::libvirt::{Networks, NwFilters};

use super::{
    GuardState, LeaseSummary, NetError, NetLease, Verification, VmNetwork, ensure_filter, libvirt_failed,
};
use crate::guard::VmGuard;
use crate::identity::{mac_of, tap_of};
use crate::lease::{LeaseRecord, TapUse};
use crate::network::NetworkShape;
use crate::policy::EgressPolicy;
use crate::xml::nwfilter::nwfilter;

/// How often libvirt's filters are looked at before they count as gone: a libvirtd that starts makes them anew, chain by
/// chain.
pub(super) const LOOKS: u32 = 3;
/// From one look to the next.
const BETWEEN_LOOKS: Duration = Duration::from_millis(150);
/// How long whoever changes a VM's policy, or libvirt that makes filters, has for it before what is missing meanwhile counts as gone:
/// an end of dnsmasq and its start, programs that wait for a busy host's processors, a second and more a filter. Only root
/// can have it last.
const CHANGED_WITHIN: Duration = Duration::from_secs(15);
/// The same, where something is missing that no change of a policy takes away.
const LOCKED_WITHIN: Duration = Duration::from_secs(4);
/// From one try for the lock to the next.
const BETWEEN_TRIES: Duration = Duration::from_millis(10);

impl VmNetwork {
    /// Whether every layer stands, of every VM on record. See [`VmNetwork::verify_those`].
    ///
    /// # Errors
    /// [`NetError`] when that cannot be found out.
    pub fn verify_all<L: Networks + NwFilters + ?Sized>(
        &self,
        libvirt: &L,
    ) -> Result<BTreeMap<VmName, Verification>, NetError> {
        self.verify_those(libvirt, |_| true)
    }

    /// Whether every layer stands, of the VMs on record that are `wanted`: one look at the firewall and two questions to
    /// libvirt, however many there are. What is missing counts at once where nothing moves: when nobody is just changing a VM's
    /// network, nor libvirt's filters. Otherwise other looks follow, for fifteen seconds at most.
    ///
    /// # Errors
    /// [`NetError`] when that cannot be found out.
    pub fn verify_those<L: Networks + NwFilters + ?Sized>(
        &self,
        libvirt: &L,
        wanted: impl Fn(&VmName) -> bool,
    ) -> Result<BTreeMap<VmName, Verification>, NetError> {
        self.verify_within(CHANGED_WITHIN, libvirt, wanted)
    }

    fn verify_within<L: Networks + NwFilters + ?Sized>(
        &self,
        limit: Duration,
        libvirt: &L,
        wanted: impl Fn(&VmName) -> bool,
    ) -> Result<BTreeMap<VmName, Verification>, NetError> {
        let began = Instant::now();
        let mut without: Option<BTreeSet<VmName>> = None;
        loop {
            let mut mark = None;
            let found = self.look(libvirt, &wanted, LOOKS, &mut mark)?;
            if found.values().all(|found| found.finding().is_none()) {
                return Ok(found);
            }
            let patience = match found.values().all(may_be_changing) {
                true => limit,
                false => limit.min(LOCKED_WITHIN),
            };
            let settled = match self.lock_within(began, patience)? {
                // Libvirt had its time already. Let go after that: whoever changes something must not wait for libvirt as well.
                Some(_lock) => self.look(libvirt, &wanted, 1, &mut None)?,
                // Who takes longer hides nothing.
                None => found,
            };
            let others = |found: &Verification| {
                Verification { filter_in_force: None, ..found.clone() }.finding().is_some()
            };
            let no_filter = |found: &Verification| found.filter_in_force == Some(false);
            if settled.values().any(others) || !settled.values().any(no_filter) || began.elapsed() >= limit {
                return Ok(settled);
            }
            // Whose filter went since is not kept waiting by those whose comes.
            let now: BTreeSet<_> =
                settled.iter().filter(|(_, found)| no_filter(found)).map(|(vm, _)| vm.clone()).collect();
            if without.as_ref().is_some_and(|then| !now.is_subset(then)) {
                return Ok(settled);
            }
            without.get_or_insert(now);
            // A filter alone, and libvirt may just be making it, with those of other VMs before it.
            let now = self.firewall.filters_mark()?;
            if now.is_none() || now == mark {
                return Ok(settled);
            }
        }
    }

    /// The lock, where nobody has it for that long.
    fn lock_within(&self, began: Instant, patience: Duration) -> Result<Option<File>, NetError> {
        let (lock, path) = self.lock_file()?;
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(Some(lock)),
                Err(TryLockError::WouldBlock) if began.elapsed() < patience => thread::sleep(BETWEEN_TRIES),
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(source)) => {
                    return Err(NetError::Host { path, what: "locked", source });
                }
            }
        }
    }

    fn look<L: Networks + NwFilters + ?Sized>(
        &self,
        libvirt: &L,
        wanted: impl Fn(&VmName) -> bool,
        looks: u32,
        mark: &mut Option<u64>,
    ) -> Result<BTreeMap<VmName, Verification>, NetError> {
        let Some((shape, network_active)) = self.find_active(libvirt)? else { return Ok(BTreeMap::new()) };
        let mut records = self.leases(&shape)?.records()?;
        records.retain(|_, record| record.tap != TapUse::Waiting && wanted(&record.vm));
        if records.is_empty() {
            return Ok(BTreeMap::new());
        }
        let addresses: Vec<Ipv4Addr> = records.keys().copied().collect();
        let rules = self.firewall.inspect(&addresses)?;
        let filters = libvirt.filters().map_err(libvirt_failed("list its filters"))?;
        let serving = self.resolver.serving()?;
        let in_force = self.filters_in_force(&shape, &records, looks, mark)?;
        let network_rules = self.firewall.network_rules(&shape)?;
        let verification = |(address, record): (Ipv4Addr, LeaseRecord)| {
            let names = self.names_of(&record.vm, &shape, address, &record.policy);
            let guard = match (rules.get(&address), record.fingerprint.as_ref()) {
                (None, _) => GuardState::Missing,
                (Some(found), Some(expected)) if found == expected => GuardState::Intact,
                (Some(_), _) => GuardState::Changed,
            };
            let verification = Verification {
                guard,
                network_active,
                filter_defined: filters.contains(&record.filter),
                filter_in_force: in_force.get(&address).copied(),
                tap_joined: self.settings.host.is_joined(&tap_of(address), shape.bridge()),
                names_served: names.map(|names| serving.get(&address) == Some(&names.digest())),
                forwarding: self.settings.host.forwards(),
                forwarding6: record.policy.ipv6().then(|| self.settings.host.forwards_ipv6()),
                network_rules,
                bridge_nf_call_iptables: self.settings.host.bridge_nf(),
            };
            (record.vm, verification)
        };
        Ok(records.into_iter().map(verification).collect())
    }

    /// Whether libvirt's filter is in force, of each VM on record that has a tap. Where one is not, `mark` is that of the first
    /// look that found so.
    pub(super) fn filters_in_force(
        &self,
        shape: &NetworkShape,
        records: &BTreeMap<Ipv4Addr, LeaseRecord>,
        looks: u32,
        mark: &mut Option<u64>,
    ) -> Result<BTreeMap<Ipv4Addr, bool>, NetError> {
        let has_tap = |address: Ipv4Addr| self.settings.host.has_interface(&tap_of(address));
        let plugged: Vec<_> = records.iter().filter(|(address, _)| has_tap(**address)).collect();
        for look in 1.. {
            if plugged.is_empty() {
                break;
            }
            let found = self.firewall.filters()?;
            let in_force = |address: Ipv4Addr, record: &LeaseRecord| {
                let Some(rules) = found.get(&address) else { return false };
                let filter = nwfilter(shape, record.filter_policy());
                // Another name: another version of this program made it, and its rules cannot be told from here.
                let sound =
                    filter.name != record.filter || filter.in_force(mac_of(address), address) == *rules;
                if !sound {
                    let (vm, expected) = (&record.vm, filter.name);
                    tracing::debug!(%vm, ?rules, expected, "the rules of libvirt's filter are others");
                }
                sound
            };
            let states: BTreeMap<Ipv4Addr, bool> =
                plugged.iter().map(|(address, record)| (**address, in_force(**address, record))).collect();
            let sound = states.values().all(|in_force| *in_force);
            if !sound && mark.is_none() {
                *mark = self.firewall.filters_mark()?;
            }
            if sound || look >= looks {
                return Ok(states);
            }
            thread::sleep(BETWEEN_LOOKS);
        }
        Ok(BTreeMap::new())
    }

    /// Puts a VM's network back as its record has it: libvirt's network and the definition of the filter, the guard's
    /// rules, the resolver. `false` when there is no lease in its name, or its rules are just being made or taken away.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn repair<L: Networks + NwFilters + ?Sized>(
        &self,
        libvirt: &L,
        vm: &VmName,
    ) -> Result<bool, NetError> {
        // Before the record is read: it would be put back over whatever somebody else is just changing.
        let _lock = self.lock()?;
        let Some((shape, address, record)) = self.on_record(libvirt, vm)? else { return Ok(false) };
        if record.fingerprint.is_none() {
            return Ok(false);
        }
        self.ensure_locked(libvirt)?;
        let filter = nwfilter(&shape, record.filter_policy());
        if filter.name == record.filter {
            ensure_filter(libvirt, &filter.name, &filter.xml)?;
        }
        if record.tap == TapUse::Prepared {
            self.rebind(libvirt, &record, address)?;
        }
        let tap = tap_of(address);
        if self.settings.host.is_joined(&tap, shape.bridge()) == Some(false) {
            // It was taken off, when the bridge went or by hand; nobody else puts it back.
            self.taps.rejoin(&tap, shape.bridge())?;
        }
        self.put(&shape, address, record, false)?;
        Ok(true)
    }

    /// Puts the guard's rules back of every VM on record that runs without them, for while libvirt does not answer: nothing
    /// else can be seen to then. Whose they were is returned, to be reported: nobody else sees any more that they were gone.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn restore_guards(&self, shape: &NetworkShape) -> Result<Vec<VmName>, NetError> {
        let _lock = self.lock()?;
        let mut records = self.leases(shape)?.records()?;
        // Without a tap it does not run, or not any more, and somebody makes or removes its rules.
        records.retain(|address, _| self.settings.host.has_interface(&tap_of(*address)));
        let addresses: Vec<Ipv4Addr> = records.keys().copied().collect();
        let rules = self.firewall.inspect(&addresses)?;
        records.retain(|address, record| {
            record.fingerprint.is_some() && rules.get(address) != record.fingerprint.as_ref()
        });
        let mut restored = Vec::new();
        for (address, record) in records {
            restored.push(record.vm.clone());
            self.put(shape, address, record, false)?;
        }
        Ok(restored)
    }

    /// Changes what a VM may do, at once and for established connections too. The nwfilter of its interface stays as
    /// it was when the VM started, so that a policy can be narrowed by this, and widened only as far as that filter.
    ///
    /// # Errors
    /// [`NetError`]; the old rules hold then, and of the names none are served if they were to change.
    pub fn change_policy(&self, lease: &mut NetLease, policy: &EgressPolicy) -> Result<(), NetError> {
        let _lock = self.lock()?;
        self.put_under(&lease.shape, lease.address, lease.record(), policy)?;
        lease.policy = policy.clone();
        Ok(())
    }

    /// Puts a VM's rules back as they are on record, after [`VmNetwork::verify`] found them changed.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn restore(&self, lease: &mut NetLease) -> Result<(), NetError> {
        let _lock = self.lock()?;
        let record = lease.record();
        let policy = record.policy.clone();
        self.put(&lease.shape, lease.address, record, false)?;
        lease.policy = policy;
        Ok(())
    }

    /// As [`VmNetwork::change_policy`], for a VM that another process may own. `false` when there is no lease in its name.
    ///
    /// # Errors
    /// [`NetError`]; `isolated` among them, since the VM has an interface, and [`NetError::Starting`].
    pub fn change_policy_of<L: Networks + ?Sized>(
        &self,
        libvirt: &L,
        vm: &VmName,
        policy: &EgressPolicy,
    ) -> Result<bool, NetError> {
        let _lock = self.lock()?;
        let Some((shape, address, record)) = self.on_record(libvirt, vm)? else { return Ok(false) };
        if record.fingerprint.is_none() {
            // Whoever makes its first rules would put them, and its record, over these.
            return Err(NetError::Starting { vm: vm.clone() });
        }
        self.put_under(&shape, address, record, policy)?;
        Ok(true)
    }

    /// What is on record of an address, whoever owns it; `None` when nothing is, or it cannot be read.
    ///
    /// # Errors
    /// [`NetError::Lease`].
    pub fn record_of(
        &self,
        shape: &NetworkShape,
        address: Ipv4Addr,
    ) -> Result<Option<LeaseRecord>, NetError> {
        Ok(self.leases(shape)?.record(address))
    }

    /// The lease in a VM's name; `None` when it has none.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn lease_of<L: Networks + ?Sized>(
        &self,
        libvirt: &L,
        vm: &VmName,
    ) -> Result<Option<LeaseSummary>, NetError> {
        let is_it = |lease: &LeaseSummary| lease.record.as_ref().is_some_and(|record| record.vm == *vm);
        Ok(self.list(libvirt)?.into_iter().find(is_it))
    }

    /// `bridge-nf-call-iptables`, as [`Verification::bridge_nf_call_iptables`].
    pub fn bridge_netfilter(&self) -> Option<bool> {
        self.settings.host.bridge_nf()
    }

    /// Has the next verification look at all rules, whether or not the kernel says that they are as before.
    pub fn forget_rules(&self) {
        self.firewall.forget();
    }

    /// Has all that the VM with this address reaches from now on reported as new, whatever was reported before: for another use of the same
    /// VM, whose record is to be its own. `ipv6` as its policy has it. To be called while the VM stands still.
    ///
    /// # Errors
    /// [`NetError::Firewall`]; the VM has no rules, among them.
    pub fn forget_reached(&self, address: Ipv4Addr, ipv6: bool) -> Result<(), NetError> {
        Ok(self.firewall.forget_reached(address, ipv6)?)
    }

    /// Where the events of the VM with that address are kept ([`crate::events::RecordFile`]).
    pub fn events_of(&self, address: Ipv4Addr) -> PathBuf {
        self.settings.dir.join(&self.settings.name).join(format!("{address}.events"))
    }

    fn on_record<L: Networks + ?Sized>(
        &self,
        libvirt: &L,
        vm: &VmName,
    ) -> Result<Option<(NetworkShape, Ipv4Addr, LeaseRecord)>, NetError> {
        let Some(shape) = self.find(libvirt)? else { return Ok(None) };
        let records = self.leases(&shape)?.records()?;
        let found = records.into_iter().find(|(_, record)| record.vm == *vm);
        Ok(found.map(|(address, record)| (shape, address, record)))
    }

    /// Has a VM be under another policy than its record has it.
    pub(super) fn put_under(
        &self,
        shape: &NetworkShape,
        address: Ipv4Addr,
        record: LeaseRecord,
        policy: &EgressPolicy,
    ) -> Result<(), NetError> {
        let other_names = policy.names() != record.policy.names();
        if other_names {
            // Before the set is emptied: an answer in between would open an old name's address.
            self.resolver.stop(address)?;
        }
        self.put(shape, address, record.under(policy.clone()), other_names)
    }

    /// Has a record hold: rules, names, and the record itself.
    pub(super) fn put(
        &self,
        shape: &NetworkShape,
        address: Ipv4Addr,
        record: LeaseRecord,
        forget_names: bool,
    ) -> Result<(), NetError> {
        let with = |guard: VmGuard| if forget_names { guard.forgetting_names() } else { guard };
        let fingerprint = self.enforce(shape, address, &record, with)?;
        let record = LeaseRecord { fingerprint: Some(fingerprint), ..record };
        Ok(self.leases(shape)?.rewrite(address, &record)?)
    }
}

/// Whether nothing is missing of a VM but what is while its policy is being changed.
fn may_be_changing(found: &Verification) -> bool {
    let guard = match found.guard {
        GuardState::Changed => GuardState::Intact,
        other => other,
    };
    Verification { guard, names_served: None, ..found.clone() }.finding().is_none()
}

#[cfg(test)]
mod tests;
