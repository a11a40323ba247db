//! From a VM and its policy to an interface that is safe to start with: [`VmNetwork`].
//!
//! ```text
//!   attach: network -> address -> filter -> rules, names -> NetLease    (VM starts, runs, is destroyed)   detach: back
//!              |          |          |           |
//!              +----------+----------+-----------+--> on failure: what was made is undone, in reverse
//! ```
//!
//! The calls block (libvirt, nft, file locks): from async code, make them where blocking is allowed, such as
//! `tokio::task::spawn_blocking`.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use dev_box_core::id::VmName;
use dev_box_core::libvirt::{LibvirtError, Networks, NwFilters};
use dev_box_core::spec::{FilterRef, HostEnd, Interface, LinkState, MacAddress};

use crate::events::RecordFile;
use crate::guard::{Fingerprint, Firewall, Traffic, VmGuard};
use crate::host::HostPaths;
use crate::identity::{mac_of, tap_of};
use crate::lease::{AddressLease, AddressLeases, LeaseError, LeaseRecord, Owner, TapUse};
use crate::network::NetworkShape;
use crate::policy::{EgressPolicy, PolicyDigest, PolicyStore};
use crate::resolver::{DnsmasqResolver, NameService, Resolver};
use crate::subnet::Subnet;
use crate::tap::{IpTaps, Taps};
use crate::xml::nwfilter::{FilterDefinition, name_prefix, nwfilter};

mod definition;
mod error;
mod prepared;
mod upkeep;
mod verification;

pub use error::NetError;
pub use prepared::PreparedTap;
pub use verification::{GuardState, Verification};

/// What a host's network of VMs is called and where its leases lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetSettings {
    /// Directory for leases, `net/` of the state root; made when it is not there.
    pub dir: PathBuf,
    /// libvirt's name for the network.
    pub name: String,
    /// The bridge's interface name.
    pub bridge: String,
    /// The subnet; `None` finds one that no route of the host overlaps.
    pub subnet: Option<Subnet>,
    /// Where the host's state is read.
    pub host: HostPaths,
    /// Directory of the administrator's policies, `NAME.toml` each.
    pub policies: PathBuf,
    /// Whether the network has IPv6, for the VMs whose policy says so. libvirt then lets the host forward IPv6.
    pub ipv6: bool,
}

impl NetSettings {
    /// The network `dev-box` on bridge `devbox0`, subnet found, leases in `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            name: "dev-box".to_owned(),
            bridge: "devbox0".to_owned(),
            subnet: None,
            host: HostPaths::default(),
            policies: "/etc/dev-box/policies".into(),
            ipv6: false,
        }
    }
}

/// The network of a host's VMs: hands out interfaces whose rules stand before a VM uses them.
#[derive(Debug, Clone)]
pub struct VmNetwork {
    settings: NetSettings,
    firewall: Arc<dyn Firewall>,
    resolver: Arc<dyn Resolver>,
    taps: Arc<dyn Taps>,
    policies: PolicyStore,
}

/// A VM's interface. Held by the process that owns the VM: when it dies, or drops this, the address is free again
/// once the VM's tap is gone.
#[derive(Debug)]
pub struct NetLease {
    /// The VM.
    pub vm: VmName,
    /// The interface's Ethernet address.
    pub mac: MacAddress,
    /// The VM's address; the agent sets it.
    pub address: Ipv4Addr,
    /// Prefix length of the subnet.
    pub prefix: u8,
    /// The gateway.
    pub gateway: Ipv4Addr,
    /// Its IPv6 address too, under a policy with IPv6.
    pub ipv6: Option<Ipv6Lease>,
    /// Resolvers: the gateway's.
    pub dns: Vec<Ipv4Addr>,
    /// The name the tap must have on the host, since the rules go by it.
    pub tap: String,
    /// libvirt's network.
    pub network: String,
    /// The network's bridge.
    pub bridge: String,
    /// The nwfilter the interface must refer to.
    pub filter: String,
    /// The policy that holds.
    pub policy: EgressPolicy,
    filter_policy: EgressPolicy,
    shape: NetworkShape,
    lock: AddressLease,
    host_end: HostEnd,
}

/// A VM's IPv6 address, which follows from its IPv4 address; the agent sets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv6Lease {
    /// The address, a unique local one (RFC 4193).
    pub address: Ipv6Addr,
    /// Prefix length of the network.
    pub prefix: u8,
    /// The gateway.
    pub gateway: Ipv6Addr,
}

impl NetLease {
    fn new(shape: NetworkShape, record: LeaseRecord, lock: AddressLease) -> Self {
        let address = lock.address();
        let filter_policy = record.filter_policy().clone();
        Self {
            vm: record.vm,
            mac: mac_of(address),
            address,
            prefix: shape.subnet().prefix(),
            gateway: shape.gateway(),
            ipv6: shape.ipv6_of(address).filter(|_| filter_policy.ipv6()),
            dns: vec![shape.gateway()],
            tap: tap_of(address),
            network: shape.name().to_owned(),
            bridge: shape.bridge().to_owned(),
            filter: record.filter,
            policy: record.policy,
            filter_policy,
            shape,
            lock,
            host_end: match record.tap {
                TapUse::Libvirt => HostEnd::Libvirt,
                TapUse::Prepared | TapUse::Waiting => HostEnd::Prepared,
            },
        }
    }

    /// Whether its tap was prepared, and can be kept for another VM ([`VmNetwork::keep`]).
    pub fn is_prepared(&self) -> bool {
        self.host_end == HostEnd::Prepared
    }

    /// The policy that its filter was made for.
    pub fn filter_policy(&self) -> &EgressPolicy {
        &self.filter_policy
    }

    fn tap_use(&self) -> TapUse {
        match self.host_end {
            HostEnd::Libvirt => TapUse::Libvirt,
            HostEnd::Prepared => TapUse::Prepared,
        }
    }

    /// What is on record: another process may have changed the policy ([`VmNetwork::change_policy_of`]). Read while
    /// changes are locked out.
    fn record(&self) -> LeaseRecord {
        self.lock.record().unwrap_or_else(|| LeaseRecord {
            vm: self.vm.clone(),
            policy: self.policy.clone(),
            filter: self.filter.clone(),
            filter_policy: (self.filter_policy != self.policy).then(|| self.filter_policy.clone()),
            fingerprint: None,
            tap: self.tap_use(),
        })
    }

    /// The network that it is in.
    pub fn shape(&self) -> &NetworkShape {
        &self.shape
    }

    /// The policy's digest, for the audit.
    pub fn policy_digest(&self) -> PolicyDigest {
        self.policy.digest()
    }

    /// The interface as the VM's specification has it.
    pub fn interface(&self) -> Interface {
        Interface {
            network: self.network.clone(),
            mac: self.mac,
            ip: Some(self.address),
            target_dev: Some(self.tap.clone()),
            filter: (self.host_end == HostEnd::Libvirt).then(|| FilterRef {
                name: self.filter.clone(),
                parameters: FilterDefinition::parameters(&self.filter_policy, self.address),
            }),
            link: LinkState::Up,
            port_isolated: true,
            host_end: self.host_end,
        }
    }
}

/// What [`VmNetwork::sweep`] removed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Swept {
    /// VMs whose owner died without giving its lease back.
    pub leases: Vec<(Ipv4Addr, Option<VmName>)>,
    /// Addresses that had rules and no lease.
    pub rules: Vec<Ipv4Addr>,
    /// Filters nobody referred to.
    pub filters: Vec<String>,
}

/// A lease on record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseSummary {
    /// The VM's address.
    pub address: Ipv4Addr,
    /// Its IPv6 address, where the policy that it started with has IPv6.
    pub ipv6: Option<Ipv6Lease>,
    /// Whether the owning process lives.
    pub owner: Owner,
    /// The record; `None` when it cannot be read.
    pub record: Option<LeaseRecord>,
    /// Traffic, where there are rules.
    pub traffic: Option<Traffic>,
}

impl VmNetwork {
    /// Nothing is made yet; [`VmNetwork::ensure`] and [`VmNetwork::attach`] do that. Names of policies are served by
    /// dnsmasq.
    pub fn new(settings: NetSettings, firewall: Arc<dyn Firewall>) -> Self {
        let dir = settings.dir.join(&settings.name).join("resolvers");
        let resolver = Arc::new(DnsmasqResolver::new(dir, &settings.host.resolv_conf));
        let policies = PolicyStore::new(&settings.policies);
        Self { settings, firewall, resolver, taps: Arc::new(IpTaps), policies }
    }

    /// What networks a VM can be asked for by name.
    pub fn policies(&self) -> &PolicyStore {
        &self.policies
    }

    /// The same, with another resolver.
    #[must_use]
    pub fn with_resolver(self, resolver: Arc<dyn Resolver>) -> Self {
        Self { resolver, ..self }
    }

    /// The same, with other taps.
    #[must_use]
    pub fn with_taps(self, taps: Arc<dyn Taps>) -> Self {
        Self { taps, ..self }
    }

    /// Has libvirt's network defined and running. Idempotent; safe from several processes at once.
    ///
    /// # Errors
    /// [`NetError`]: foreign network of that name, no free subnet, libvirt refuses.
    pub fn ensure<L: Networks + ?Sized>(&self, libvirt: &L) -> Result<NetworkShape, NetError> {
        let _lock = self.lock()?;
        self.ensure_locked(libvirt)
    }

    /// Gives a VM an interface under `policy`, its rules and filter in place. `None` under `isolated`: the VM is to
    /// have no interface.
    ///
    /// # Errors
    /// [`NetError`]; nothing of this VM is left then.
    pub fn attach<L: Networks + NwFilters + ?Sized>(
        &self,
        libvirt: &L,
        vm: &VmName,
        policy: &EgressPolicy,
    ) -> Result<Option<NetLease>, NetError> {
        self.attach_preferring(libvirt, vm, policy, None)
    }

    /// As [`VmNetwork::attach`], with this address if nobody has it: what a VM had when it ran last.
    ///
    /// # Errors
    /// As [`VmNetwork::attach`].
    pub fn attach_preferring<L: Networks + NwFilters + ?Sized>(
        &self,
        libvirt: &L,
        vm: &VmName,
        policy: &EgressPolicy,
        preferred: Option<Ipv4Addr>,
    ) -> Result<Option<NetLease>, NetError> {
        if policy.is_isolated() {
            return Ok(None);
        }
        let (shape, record, lease) = self.claim(libvirt, vm, policy, preferred, TapUse::Libvirt)?;
        self.open(libvirt, shape, record, lease).map(Some)
    }

    /// An address on record, and the definition of the filter that it is to have.
    fn claim<L: Networks + NwFilters + ?Sized>(
        &self,
        libvirt: &L,
        vm: &VmName,
        policy: &EgressPolicy,
        preferred: Option<Ipv4Addr>,
        tap: TapUse,
    ) -> Result<(NetworkShape, LeaseRecord, AddressLease), NetError> {
        let lock = self.lock()?;
        let shape = self.ensure_locked(libvirt)?;
        self.check_ipv6(&shape, policy)?;
        let filter = nwfilter(&shape, policy);
        let record = LeaseRecord {
            vm: vm.clone(),
            policy: policy.clone(),
            filter: filter.name.clone(),
            filter_policy: None,
            fingerprint: None,
            tap,
        };
        let leases = self.leases(&shape)?;
        // An address without a lease here may still be someone's: of a VM whose owner died, or of VMs whose leases
        // lie in another directory.
        let guarded = self.firewall.list()?;
        if guarded.is_empty() && leases.list()?.is_empty() {
            // The first VM starts from clean tables: base rules that another version left would judge it too.
            self.firewall.clear()?;
        }
        // Libvirt takes the filter off a tap by its name, after QEMU and the tap are gone: the next VM there would get none, or lose it.
        let bound = libvirt.bound_filters().map_err(libvirt_failed("ask which taps have filters"))?;
        let free = |address: Ipv4Addr| {
            let tap = tap_of(address);
            !self.settings.host.has_interface(&tap)
                && !bound.contains(&tap)
                && (!guarded.contains(&address) || leases.is_on_record(address))
        };
        let lease = match preferred.map(|wanted| leases.acquire(&record, |a| a == wanted && free(a))) {
            Some(Ok(lease)) => lease,
            None | Some(Err(LeaseError::Exhausted { .. })) => leases.acquire(&record, free)?,
            Some(Err(error)) => return Err(error.into()),
        };
        let made = ensure_filter(libvirt, &filter.name, &filter.xml);
        // The lease is on record and names the filter, so nobody collects it from here on.
        drop(lock);
        match made {
            Ok(()) => Ok((shape, record, lease)),
            Err(error) => Err(self.undo(libvirt, lease, &shape, &record, error)),
        }
    }

    /// Rules and names, of what has an address: what a VM may use.
    fn open<L: NwFilters + ?Sized>(
        &self,
        libvirt: &L,
        shape: NetworkShape,
        record: LeaseRecord,
        mut lease: AddressLease,
    ) -> Result<NetLease, NetError> {
        match self.apply(&shape, record.clone(), &mut lease) {
            Ok(()) => Ok(NetLease::new(shape, record, lease)),
            Err(error) => Err(self.undo(libvirt, lease, &shape, &record, error)),
        }
    }

    /// Takes away what there is of something that failed.
    fn undo<L: NwFilters + ?Sized>(
        &self,
        libvirt: &L,
        lease: AddressLease,
        shape: &NetworkShape,
        record: &LeaseRecord,
        error: NetError,
    ) -> NetError {
        let address = lease.address();
        if let Err(undo) = self.end(libvirt, lease, shape, &record.filter, record.tap) {
            tracing::warn!(vm = %record.vm, %address, error = %undo, "what a failed attach left is for the next sweep");
        }
        error
    }

    /// Whether every layer of a VM's network stands, by what is on record of its lease. A look at the firewall and two
    /// calls of libvirt: some 10 ms.
    ///
    /// # Errors
    /// [`NetError`] when that cannot be found out.
    pub fn verify<L: Networks + NwFilters + ?Sized>(
        &self,
        libvirt: &L,
        lease: &NetLease,
    ) -> Result<Verification, NetError> {
        let found = self.verify_by_name(libvirt, &lease.vm)?;
        found.ok_or_else(|| NetError::NoLease { vm: lease.vm.clone() })
    }

    /// As [`VmNetwork::verify`], for a VM that another process owns. `None` when there is no lease in its name.
    ///
    /// # Errors
    /// [`NetError`] when that cannot be found out.
    pub fn verify_by_name<L: Networks + NwFilters + ?Sized>(
        &self,
        libvirt: &L,
        vm: &VmName,
    ) -> Result<Option<Verification>, NetError> {
        Ok(self.verify_those(libvirt, |other| other == vm)?.remove(vm))
    }

    /// What the VM's packets did so far.
    ///
    /// # Errors
    /// [`NetError::Firewall`].
    pub fn traffic(&self, lease: &NetLease) -> Result<Traffic, NetError> {
        Ok(self.firewall.traffic()?.remove(&lease.address).unwrap_or_default())
    }

    /// What the packets of every guarded VM of this host did so far, by address.
    ///
    /// # Errors
    /// [`NetError::Firewall`].
    pub fn traffic_of_all(&self) -> Result<BTreeMap<Ipv4Addr, Traffic>, NetError> {
        Ok(self.firewall.traffic()?)
    }

    /// Takes everything of a VM's network away. To be called when the VM is gone: its filter cannot be removed
    /// before.
    ///
    /// # Errors
    /// [`NetError`]; what is left is found by [`VmNetwork::sweep`].
    pub fn detach<L: NwFilters + ?Sized>(&self, libvirt: &L, lease: NetLease) -> Result<(), NetError> {
        let tap = lease.tap_use();
        let NetLease { shape, filter, lock, .. } = lease;
        self.end(libvirt, lock, &shape, &filter, tap)
    }

    /// All leases on record, of this process and others.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn list<L: Networks + ?Sized>(&self, libvirt: &L) -> Result<Vec<LeaseSummary>, NetError> {
        // Whether an owner lives is found out by a try for its lease, which would look like an owner to somebody else's try.
        let _lock = self.lock()?;
        let Some(shape) = self.find(libvirt)? else { return Ok(Vec::new()) };
        let mut traffic = self.firewall.traffic()?;
        let summary = |(address, (owner, record)): (_, (_, Option<LeaseRecord>))| LeaseSummary {
            address,
            ipv6: shape
                .ipv6_of(address)
                .filter(|_| record.as_ref().is_some_and(|record| record.filter_policy().ipv6())),
            owner,
            record,
            traffic: traffic.remove(&address),
        };
        let mut leases = self.leases(&shape)?.list()?;
        // No VM has it.
        let waits = |record: &LeaseRecord| record.tap == TapUse::Waiting;
        leases.retain(|_, (_, record)| !record.as_ref().is_some_and(waits));
        Ok(leases.into_iter().map(summary).collect())
    }

    /// Removes what dead owners left. An address whose tap still exists is left alone, its rules standing: the VM
    /// runs, and must be ended first.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn sweep<L: Networks + NwFilters + ?Sized>(&self, libvirt: &L) -> Result<Swept, NetError> {
        let Some(shape) = self.find(libvirt)? else { return Ok(Swept::default()) };
        let _lock = self.lock()?;
        let leases = self.leases(&shape)?;
        let mut swept = Swept::default();
        for (address, (owner, record)) in leases.list()? {
            if owner == Owner::Dead
                && !self.settings.host.has_open_tap(&tap_of(address))
                && let Some(lease) = leases.adopt(address)?
            {
                self.close(address)?;
                // A record that cannot be read may be of a tap that stays.
                if record.as_ref().is_none_or(|record| record.tap != TapUse::Libvirt) {
                    self.remove_tap(libvirt, address)?;
                }
                lease.release()?;
                swept.leases.push((address, record.map(|record| record.vm)));
            }
        }
        let held = leases.list()?;
        for address in self.firewall.list()? {
            let ours = shape.subnet().is_guest(address) && !held.contains_key(&address);
            if ours && !self.settings.host.has_interface(&tap_of(address)) {
                self.firewall.remove(address)?;
                swept.rules.push(address);
            }
        }
        for address in self.resolver.serving()?.into_keys() {
            if !held.contains_key(&address) && !self.settings.host.has_interface(&tap_of(address)) {
                self.resolver.stop(address)?;
            }
        }
        swept.filters = collect_filters(libvirt, &shape, &leases)?;
        Ok(swept)
    }

    /// Removes the network, its filters, and all rules of ours on this host, but for those of another network's VMs.
    ///
    /// # Errors
    /// [`NetError::InUse`] while VMs have leases; other [`NetError`]s.
    pub fn remove<L: Networks + NwFilters + ?Sized>(&self, libvirt: &L) -> Result<(), NetError> {
        self.sweep(libvirt)?;
        let _lock = self.lock()?;
        if let Some(shape) = self.find(libvirt)? {
            let leases = self.leases(&shape)?;
            let held = leases.list()?.len();
            if held > 0 {
                return Err(NetError::InUse(held));
            }
            collect_filters(libvirt, &shape, &leases)?;
            let name = shape.name();
            let active =
                libvirt.find_network(name).is_ok_and(|network| network.is_some_and(|network| network.active));
            definition::forget(libvirt, name, active)?;
        }
        match self.firewall.list()?.is_empty() {
            true => Ok(self.firewall.clear()?),
            false => Ok(()),
        }
    }

    /// Has the guard hold a VM that has just got its address.
    fn apply(
        &self,
        shape: &NetworkShape,
        mut record: LeaseRecord,
        lease: &mut AddressLease,
    ) -> Result<(), NetError> {
        record.fingerprint = Some(self.enforce(shape, lease.address(), &record, VmGuard::for_a_new_vm)?);
        Ok(lease.write(&record)?)
    }

    /// Has the guard hold a record's policy, and its names served. `with` says what of the past goes with that.
    fn enforce(
        &self,
        shape: &NetworkShape,
        address: Ipv4Addr,
        record: &LeaseRecord,
        with: impl FnOnce(VmGuard) -> VmGuard,
    ) -> Result<Fingerprint, NetError> {
        let (vm, policy) = (&record.vm, &record.policy);
        let guard = VmGuard::new(vm.clone(), shape.clone(), address, policy.clone())?;
        let fingerprint = self.firewall.apply(&with(guard))?;
        // The set stands before anyone fills it.
        if let Some(names) = self.names_of(vm, shape, address, policy)
            && self.resolver.serving()?.get(&address) != Some(&names.digest())
        {
            self.resolver.serve(&names)?;
        }
        Ok(fingerprint)
    }

    fn names_of(
        &self,
        vm: &VmName,
        shape: &NetworkShape,
        address: Ipv4Addr,
        policy: &EgressPolicy,
    ) -> Option<NameService> {
        NameService::new(vm.clone(), shape.clone(), address, policy)
    }

    /// Names, rules, then the filter, then the address, so that nobody gets an address whose rules are going away. An
    /// address whose rules could not be removed stays on record.
    fn end<L: NwFilters + ?Sized>(
        &self,
        libvirt: &L,
        mut lease: AddressLease,
        shape: &NetworkShape,
        filter: &str,
        tap: TapUse,
    ) -> Result<(), NetError> {
        if let Some(record) = lease.record() {
            self.set_aside(&mut lease, &LeaseRecord { fingerprint: None, ..record })?;
        }
        self.close(lease.address())?;
        if tap != TapUse::Libvirt {
            self.remove_tap(libvirt, lease.address())?;
        }
        let _lock = self.lock()?;
        lease.release()?;
        let held = self.leases(shape)?.list()?;
        if !held.values().any(|(_, record)| record.as_ref().is_none_or(|record| record.filter == filter)) {
            forget_filter(libvirt, filter)?;
        }
        Ok(())
    }

    /// Has a record stand without rules: nobody changes its policy or repairs it from here on, while they are taken away.
    fn set_aside(&self, lease: &mut AddressLease, record: &LeaseRecord) -> Result<(), NetError> {
        let _lock = self.lock()?;
        Ok(lease.write(record)?)
    }

    /// What [`VmNetwork::open`] made, away.
    fn close(&self, address: Ipv4Addr) -> Result<(), NetError> {
        self.resolver.stop(address)?;
        self.firewall.remove(address)?;
        Ok(RecordFile::remove(&self.events_of(address))?)
    }

    fn leases(&self, shape: &NetworkShape) -> Result<AddressLeases, NetError> {
        Ok(AddressLeases::open(self.settings.dir.join(shape.name()), shape.subnet())?)
    }

    /// Held while network, leases and filters are changed together. Freed when dropped.
    fn lock(&self) -> Result<File, NetError> {
        let (file, path) = self.lock_file()?;
        file.lock().map_err(|source| NetError::Host { path, what: "locked", source })?;
        Ok(file)
    }

    fn lock_file(&self) -> Result<(File, PathBuf), NetError> {
        let failed = |path: &PathBuf, what| {
            let path = path.clone();
            move |source| NetError::Host { path, what, source }
        };
        let dir = &self.settings.dir;
        std::fs::create_dir_all(dir).map_err(failed(dir, "made"))?;
        let path = dir.join(format!("{}.lock", self.settings.name));
        let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        Ok((file.map_err(failed(&path, "opened"))?, path))
    }
}

fn libvirt_failed(what: impl Into<String>) -> impl FnOnce(LibvirtError) -> NetError {
    let what = what.into();
    move |source| NetError::Libvirt { what, source }
}

/// A filter's name says what is in it, so that one that is there is the right one.
fn ensure_filter<L: NwFilters + ?Sized>(libvirt: &L, name: &str, xml: &str) -> Result<(), NetError> {
    let filters = libvirt.filters().map_err(libvirt_failed("list its filters"))?;
    if filters.iter().any(|filter| filter == name) {
        return Ok(());
    }
    libvirt.define_filter(xml).map_err(libvirt_failed(format!("define the filter {name}")))
}

/// Forgets a filter; one that a VM still uses, or that is gone, stays as it is.
fn forget_filter<L: NwFilters + ?Sized>(libvirt: &L, name: &str) -> Result<bool, NetError> {
    match libvirt.undefine_filter(name) {
        Ok(()) => Ok(true),
        Err(LibvirtError::InUse { .. } | LibvirtError::NoSuchFilter { .. }) => Ok(false),
        Err(source) => Err(libvirt_failed(format!("undefine the filter {name}"))(source)),
    }
}

fn collect_filters<L: NwFilters + ?Sized>(
    libvirt: &L,
    shape: &NetworkShape,
    leases: &AddressLeases,
) -> Result<Vec<String>, NetError> {
    let held = leases.list()?;
    let mut gone = Vec::new();
    for name in libvirt.filters().map_err(libvirt_failed("list its filters"))? {
        let referred =
            held.values().any(|(_, record)| record.as_ref().is_none_or(|record| record.filter == name));
        if name.starts_with(&name_prefix(shape)) && !referred && forget_filter(libvirt, &name)? {
            gone.push(name);
        }
    }
    Ok(gone)
}

mod unattended;

#[cfg(test)]
mod tests;
