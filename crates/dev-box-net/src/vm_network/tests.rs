use std::fs;
use std::path::Path;

use dev_box_core::libvirt::fake::FakeLibvirt;
use dev_box_core::libvirt::{Libvirt, NetworkSummary};

use super::*;
use crate::guard::fake::{Call, FakeFirewall};
use crate::guard::{FilterRules, GuardError, NetworkRules};
use crate::resolver::fake::FakeResolver;
use crate::subnet::SubnetError;
use crate::tap::fake::FakeTaps;
use crate::xml::filter_binding::filter_binding;
use crate::xml::network::network_xml;

const ROUTES: &str = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n\
    eth0\t0000D50A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n";

pub(super) struct World {
    pub(super) dir: tempfile::TempDir,
    pub(super) libvirt: FakeLibvirt,
    pub(super) firewall: Arc<FakeFirewall>,
    pub(super) resolver: Arc<FakeResolver>,
    pub(super) network: VmNetwork,
    pub(super) taps: Arc<FakeTaps>,
}

impl World {
    pub(super) fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut NetSettings)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = settings(dir.path());
        change(&mut settings);
        let firewall = Arc::new(FakeFirewall::new());
        let resolver = Arc::new(FakeResolver::new());
        let taps = Arc::new(FakeTaps::new(&settings.host.interfaces));
        let network = VmNetwork::new(settings, firewall.clone())
            .with_resolver(resolver.clone())
            .with_taps(taps.clone());
        Self { dir, libvirt: FakeLibvirt::new(), firewall, resolver, network, taps }
    }

    fn attach(&self, vm: &str) -> Result<NetLease, NetError> {
        let lease = self.network.attach(&self.libvirt, &name(vm), &EgressPolicy::NatFiltered)?;
        Ok(lease.expect("not isolated"))
    }

    fn make_tap(&self, address: Ipv4Addr) {
        fs::create_dir_all(self.dir.path().join("interfaces").join(tap_of(address))).unwrap();
        self.taps.rejoin(&tap_of(address), "devbox0").unwrap();
    }

    fn network(&self) -> Option<NetworkSummary> {
        self.libvirt.find_network("dev-box").unwrap()
    }

    /// No lease, no rule, no filter.
    pub(super) fn is_clean(&self) -> bool {
        self.network.list(&self.libvirt).unwrap().is_empty()
            && self.firewall.list().unwrap().is_empty()
            && self.resolver.serving().unwrap().is_empty()
            && self.libvirt.filters().unwrap().iter().all(|filter| !filter.starts_with("dev-box"))
    }
}

fn settings(dir: &Path) -> NetSettings {
    let host = HostPaths {
        routes: dir.join("route"),
        routes6: dir.join("route6"),
        interfaces: dir.join("interfaces"),
        ip_forward: dir.join("ip_forward"),
        ipv6_forward: dir.join("ipv6_forward"),
        bridge_nf_call_iptables: dir.join("bridge_nf"),
        resolv_conf: dir.join("resolv.conf"),
    };
    fs::write(&host.routes, ROUTES).unwrap();
    fs::write(&host.ip_forward, "1\n").unwrap();
    NetSettings { host, ..NetSettings::new(dir.join("net")) }
}

pub(super) fn name(vm: &str) -> VmName {
    VmName::new(vm).unwrap()
}

pub(super) fn fault() -> LibvirtError {
    LibvirtError::Unsupported { message: "scripted".to_owned() }
}

#[test]
fn a_vm_gets_an_interface_whose_rules_stand() {
    let world = World::new();
    let lease = world.attach("a").unwrap();
    // 10.213.0.0/24 is routed.
    assert_eq!(lease.address, Ipv4Addr::new(10, 213, 1, 2));
    assert_eq!((lease.gateway, lease.prefix), (Ipv4Addr::new(10, 213, 1, 1), 24));
    assert_eq!(lease.dns, [lease.gateway]);
    assert_eq!((lease.tap.as_str(), lease.mac.to_string().as_str()), ("dbt0ad50102", "02:db:0a:d5:01:02"));
    assert_eq!(lease.policy_digest(), EgressPolicy::NatFiltered.digest());
    assert!(world.network().unwrap().active);
    assert_eq!(world.network().unwrap().bridge.as_deref(), Some("devbox0"));
    assert!(world.libvirt.filters().unwrap().contains(&lease.filter));
    assert_eq!(world.firewall.rules_of(lease.address).unwrap().vm(), &name("a"));

    let interface = lease.interface();
    assert_eq!((interface.network.as_str(), interface.ip), ("dev-box", Some(lease.address)));
    assert_eq!((interface.mac, interface.target_dev.as_ref()), (lease.mac, Some(&lease.tap)));
    assert_eq!(interface.filter.unwrap().name, lease.filter);
    assert!(interface.port_isolated);

    let other = world.attach("b").unwrap();
    assert_ne!(other.address, lease.address);
    assert_eq!(other.filter, lease.filter);
    let list = world.network.list(&world.libvirt).unwrap();
    assert_eq!(list.len(), 2);
    assert_eq!((list[0].owner, list[0].address), (Owner::Alive, lease.address));
    assert_eq!(list[0].record.as_ref().unwrap().vm, name("a"));
    assert_eq!(list[0].traffic, Some(Traffic::default()));

    world.network.detach(&world.libvirt, lease).unwrap();
    assert!(world.libvirt.filters().unwrap().contains(&other.filter), "the other VM's too");
    world.network.detach(&world.libvirt, other).unwrap();
    assert!(world.is_clean());
}

fn with_ipv6() -> EgressPolicy {
    EgressPolicy::from_toml("mode = 'custom'\nipv6 = true").unwrap()
}

#[test]
fn ipv6_is_for_those_whose_policy_says_so() {
    let world = World::with(|settings| {
        settings.ipv6 = true;
        // fddb::ad5:100/120, which is 10.213.1.0/24's.
        let route = "fddb000000000000000000000ad50100 78 0 00 0 0 0 0 0 eth0\n";
        fs::write(&settings.host.routes6, route).unwrap();
    });
    let plain = world.attach("a").unwrap();
    assert_eq!((plain.address, plain.ipv6), (Ipv4Addr::new(10, 213, 2, 2), None));
    assert!(plain.interface().filter.unwrap().parameters.is_empty());
    let lease = world.network.attach(&world.libvirt, &name("b"), &with_ipv6()).unwrap().unwrap();
    let ipv6 = lease.ipv6.unwrap();
    assert_eq!((ipv6.address.to_string().as_str(), ipv6.prefix), ("fddb::ad5:203", 120));
    assert_eq!(ipv6.gateway.to_string(), "fddb::ad5:201");
    let parameters = lease.interface().filter.unwrap().parameters;
    assert_eq!(parameters, [("IP6".to_owned(), "fddb::ad5:203".to_owned())]);

    let found = world.network.verify_all(&world.libvirt).unwrap();
    assert_eq!((found[&name("a")].forwarding6, found[&name("b")].forwarding6), (None, Some(false)));
    assert!(found[&name("a")].carries() && !found[&name("b")].carries());
    assert!(found[&name("b")].hindrance().unwrap().contains("net.ipv6.conf.all.forwarding=1"));
    fs::write(&world.network.settings.host.ipv6_forward, "1\n").unwrap();
    assert!(world.network.verify(&world.libvirt, &lease).unwrap().is_sound());

    let (vm, settings) = (lease.vm.clone(), world.network.settings.clone());
    drop(lease);
    let adopted = VmNetwork::new(settings, world.firewall.clone()).adopt(&world.libvirt, &vm).unwrap();
    assert_eq!(adopted.unwrap().ipv6, Some(ipv6));
}

#[test]
fn a_network_gets_ipv6_when_nobody_uses_it() {
    let mut world = World::new();
    let refusal = |world: &World| {
        let refused = world.network.attach(&world.libvirt, &name("b"), &with_ipv6());
        refused.unwrap_err().to_string()
    };
    let one = world.attach("a").unwrap();
    assert!(refusal(&world).contains("`ipv6 = true` under [host]"));
    world.network.settings.ipv6 = true;
    assert!(refusal(&world).contains("end them first"), "{}", refusal(&world));
    world.attach("c").expect("others start as before");
    world.network.detach(&world.libvirt, one).unwrap();
    assert!(refusal(&world).contains("end them first"));
    world.network.sweep(&world.libvirt).unwrap();
    let lease = world.network.attach(&world.libvirt, &name("b"), &with_ipv6()).unwrap().unwrap();
    assert!(lease.ipv6.is_some() && world.network().unwrap().active);
    // It keeps it, for those who have it.
    world.network.settings.ipv6 = false;
    assert!(refusal(&world).contains("`ipv6 = true` under [host]"));
    assert!(world.attach("d").unwrap().shape().gateway6().is_some());
}

#[test]
fn isolated_is_no_interface_and_touches_nothing() {
    let world = World::new();
    let none = world.network.attach(&world.libvirt, &name("a"), &EgressPolicy::Isolated).unwrap();
    assert!(none.is_none() && world.network().is_none());
    assert!(world.network.list(&world.libvirt).unwrap().is_empty());
}

#[test]
fn works_behind_the_seam_s_object() {
    let world = World::new();
    let libvirt: &dyn Libvirt = &world.libvirt;
    let lease = world.network.attach(libvirt, &name("a"), &EgressPolicy::NatFiltered).unwrap().unwrap();
    world.network.detach(libvirt, lease).unwrap();
}

fn with_names(domains: &str) -> EgressPolicy {
    EgressPolicy::from_toml(&format!("mode='custom'\ndomains=[{domains}]")).unwrap()
}

#[test]
fn names_are_served_with_the_rules_and_go_with_them() {
    let world = World::new();
    let policy = with_names("'github.com', '*.crates.io'");
    let lease = world.network.attach(&world.libvirt, &name("a"), &policy).unwrap().unwrap();
    let served = world.resolver.served(lease.address).unwrap();
    assert_eq!(served.domains(), policy.domains());
    assert_eq!(served.listens_on().0, lease.gateway);
    fs::write(world.dir.path().join("ip_forward"), "1").unwrap();
    let verified = world.network.verify(&world.libvirt, &lease).unwrap();
    assert!(verified.is_sound() && verified.names_served == Some(true), "{verified:?}");
    world.resolver.crash(lease.address);
    let verified = world.network.verify(&world.libvirt, &lease).unwrap();
    assert!(!verified.is_sound() && verified.names_served == Some(false), "{verified:?}");
    let mut lease = lease;
    world.network.restore(&mut lease).unwrap();
    assert!(world.network.verify(&world.libvirt, &lease).unwrap().is_sound());
    world.network.detach(&world.libvirt, lease).unwrap();
    assert!(world.is_clean());
}

#[test]
fn other_names_close_what_the_old_ones_opened() {
    let world = World::new();
    let (first, public) = (with_names("'github.com'"), Ipv4Addr::new(1, 1, 1, 1));
    let mut lease = world.network.attach(&world.libvirt, &name("a"), &first).unwrap().unwrap();
    assert!(world.firewall.open_name(lease.address, public));
    let limited = format!("{}\n[limits]\nconnections = 5", "mode='custom'\ndomains=['github.com']");
    world.network.change_policy(&mut lease, &EgressPolicy::from_toml(&limited).unwrap()).unwrap();
    assert_eq!(world.firewall.names_of(lease.address).len(), 1, "the same names: they stay open");
    world.network.change_policy(&mut lease, &with_names("'crates.io'")).unwrap();
    assert!(world.firewall.names_of(lease.address).is_empty());
    assert_eq!(world.resolver.served(lease.address).unwrap().domains()[0].name(), "crates.io");
    world.network.change_policy(&mut lease, &EgressPolicy::NatFiltered).unwrap();
    assert!(world.resolver.served(lease.address).is_none());
}

#[test]
fn a_resolver_that_does_not_start_leaves_nothing() {
    let world = World::new();
    world.resolver.refuse_next();
    let error = world.network.attach(&world.libvirt, &name("a"), &with_names("'github.com'")).unwrap_err();
    assert!(matches!(error, NetError::Resolver(_)), "{error:?}");
    assert!(world.is_clean());
}

#[test]
fn the_resolver_of_a_dead_owner_is_swept() {
    let world = World::new();
    let lease =
        world.network.attach(&world.libvirt, &name("a"), &with_names("'github.com'")).unwrap().unwrap();
    let address = lease.address;
    world.make_tap(address);
    drop(lease);
    world.network.sweep(&world.libvirt).unwrap();
    assert!(world.resolver.served(address).is_some(), "its VM still runs");
    fs::remove_dir_all(world.dir.path().join("interfaces").join(tap_of(address))).unwrap();
    world.network.sweep(&world.libvirt).unwrap();
    assert!(world.is_clean());
}

#[test]
fn ensuring_twice_changes_nothing_and_starts_what_stands_still() {
    let world = World::new();
    let shape = world.network.ensure(&world.libvirt).unwrap();
    let first = world.network().unwrap();
    assert_eq!(world.network.ensure(&world.libvirt).unwrap(), shape);
    assert_eq!(world.network().unwrap(), first);
    world.libvirt.stop_network("dev-box").unwrap();
    world.network.ensure(&world.libvirt).unwrap();
    assert!(world.network().unwrap().active);
}

#[test]
fn a_configured_subnet_is_used_and_must_stay() {
    let world = World::with(|settings| settings.subnet = Some("192.168.200.0/28".parse().unwrap()));
    assert_eq!(world.attach("a").unwrap().address, Ipv4Addr::new(192, 168, 200, 2));
    let settings =
        NetSettings { subnet: Some("192.168.201.0/28".parse().unwrap()), ..settings(world.dir.path()) };
    let error = VmNetwork::new(settings, world.firewall.clone()).ensure(&world.libvirt).unwrap_err();
    assert!(
        error.to_string().contains("its subnet is 192.168.200.0/28, and 192.168.201.0/28 is configured"),
        "{error}"
    );
}

#[test]
fn foreign_networks_are_refused() {
    for (xml, part) in [
        (
            "<network><name>dev-box</name><bridge name='virbr7'/></network>".to_owned(),
            "does not forward by NAT",
        ),
        (
            network_xml(&NetworkShape::new("dev-box", "other0", "10.9.0.0/24".parse().unwrap()).unwrap()),
            "its bridge is other0",
        ),
    ] {
        let world = World::new();
        world.libvirt.define_network(&xml).unwrap();
        let error = world.attach("a").unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("virsh net-undefine dev-box"), "{error}");
    }
}

#[test]
fn bad_names_and_missing_routes_are_said() {
    let world = World::with(|settings| settings.bridge = "Bridge!".to_owned());
    assert!(matches!(world.attach("a"), Err(NetError::Name(_))));
    let world = World::with(|settings| settings.host.routes = "/nonexistent/route".into());
    assert_eq!(world.attach("a").unwrap_err().to_string(), "/nonexistent/route cannot be read");
    let world = World::with(|settings| {
        fs::write(
            &settings.host.routes,
            "h\ne\t00000000\t0\t1\t0\t0\t0\t00000080\ne\t00000080\t0\t1\t0\t0\t0\t00000080",
        )
        .unwrap();
    });
    assert!(matches!(world.attach("a"), Err(NetError::Subnet(SubnetError::NoneFree { .. }))));
    let world = World::with(|settings| settings.dir = "/dev/null/net".into());
    assert!(world.attach("a").unwrap_err().to_string().starts_with("/dev/null/net cannot be made"));
}

#[test]
fn whatever_fails_nothing_is_left() {
    for call in ["find_network", "define_network", "start_network", "filters", "define_filter"] {
        let world = World::new();
        world.libvirt.fail_next(call, fault());
        let error = world.attach("a").unwrap_err();
        assert!(matches!(&error, NetError::Libvirt { .. }), "{call}: {error:?}");
        assert!(error.to_string().starts_with("libvirt could not "), "{error}");
        assert!(world.is_clean(), "{call}");
    }
    for call in [Call::List, Call::Clear, Call::Apply] {
        let world = World::new();
        world.firewall.fail_next(call);
        assert!(matches!(world.attach("a"), Err(NetError::Firewall(_))));
        assert!(world.is_clean());
    }
}

#[test]
fn only_the_first_vm_clears_the_tables() {
    let world = World::new();
    let first = world.attach("a").unwrap();
    world.firewall.fail_next(Call::Clear);
    let second = world.attach("b").expect("the tables are in use: they are not cleared");
    for lease in [first, second] {
        world.network.detach(&world.libvirt, lease).unwrap();
    }
    assert!(matches!(world.attach("c"), Err(NetError::Firewall(_))), "nobody uses them any more");
}

#[test]
fn what_cannot_be_undone_is_left_for_the_sweep() {
    let world = World::new();
    world.firewall.fail_next(Call::Apply);
    world.firewall.fail_next(Call::Remove);
    assert!(matches!(world.attach("a"), Err(NetError::Firewall(_))));
    assert_eq!(world.network.list(&world.libvirt).unwrap().len(), 1);
    assert_eq!(world.network.sweep(&world.libvirt).unwrap().leases.len(), 1);
    assert!(world.is_clean());
}

#[test]
fn an_address_whose_tap_exists_is_not_given_out() {
    let world = World::new();
    world.make_tap(Ipv4Addr::new(10, 213, 1, 2));
    assert_eq!(world.attach("a").unwrap().address, Ipv4Addr::new(10, 213, 1, 3));
}

#[test]
fn an_address_guarded_for_someone_else_is_not_given_out() {
    let world = World::new();
    let shape = world.network.ensure(&world.libvirt).unwrap();
    let taken = Ipv4Addr::new(10, 213, 1, 2);
    world.firewall.apply(&VmGuard::new(name("x"), shape, taken, EgressPolicy::NatFiltered).unwrap()).unwrap();
    let lease = world.attach("a").unwrap();
    assert_eq!(lease.address, Ipv4Addr::new(10, 213, 1, 3));
    let address = lease.address;
    drop(lease);
    assert_eq!(
        world.attach("b").unwrap().address,
        address,
        "a dead owner's is taken over, its rules replaced"
    );
    world.firewall.fail_next(Call::List);
    assert!(matches!(world.attach("c"), Err(NetError::Firewall(_))));
}

#[test]
fn verification_finds_what_is_gone() {
    let world = World::new();
    let mut lease = world.attach("a").unwrap();
    let verify = |lease: &NetLease| world.network.verify(&world.libvirt, lease).unwrap();
    let found = verify(&lease);
    assert!(found.is_sound() && found.bridge_nf_call_iptables.is_none(), "{found:?}");

    fs::write(world.dir.path().join("bridge_nf"), "0\n").unwrap();
    assert_eq!(verify(&lease).bridge_nf_call_iptables, Some(false));
    assert!(verify(&lease).is_sound(), "the sysctl is the administrator's");

    world.firewall.flush();
    assert_eq!(verify(&lease).guard, GuardState::Missing);
    assert!(!verify(&lease).is_sound());
    world.network.restore(&mut lease).unwrap();
    assert!(verify(&lease).is_sound());

    let other = EgressPolicy::from_toml("mode='custom'\nports=['tcp/1']").unwrap();
    let stranger =
        VmGuard::new(name("x"), world.network.ensure(&world.libvirt).unwrap(), lease.address, other).unwrap();
    world.firewall.apply(&stranger).unwrap();
    assert_eq!(verify(&lease).guard, GuardState::Changed);
    world.network.restore(&mut lease).unwrap();

    assert_eq!(verify(&lease).filter_in_force, None, "no tap yet");
    world.make_tap(lease.address);
    assert_eq!(verify(&lease).filter_in_force, Some(false));
    let shape = world.network.ensure(&world.libvirt).unwrap();
    let rules = nwfilter(&shape, &lease.policy).in_force(lease.mac, lease.address);
    world.firewall.put_filter(lease.address, rules.clone());
    assert!(verify(&lease).is_sound());
    let exchanged = FilterRules { out: rules.out.iter().rev().cloned().collect(), ..rules.clone() };
    world.firewall.put_filter(lease.address, exchanged);
    assert!(!verify(&lease).is_sound());
    let finding = verify(&lease).finding();
    assert_eq!(finding.as_deref(), Some("the rules of libvirt's filter are not in force"));
    world.firewall.put_filter(lease.address, rules.clone());
    let narrower = EgressPolicy::from_toml("mode='custom'\nports=['tcp/443']").unwrap();
    world.network.change_policy(&mut lease, &narrower).unwrap();
    assert!(verify(&lease).is_sound(), "the filter stays that of the policy before");
    let now = nwfilter(&shape, &narrower).in_force(lease.mac, lease.address);
    world.firewall.put_filter(lease.address, now);
    assert!(!verify(&lease).is_sound(), "and no other");
    world.firewall.flush_filters();
    assert!(!verify(&lease).is_sound());
    world.network.change_policy(&mut lease, &EgressPolicy::NatFiltered).unwrap();
    world.firewall.put_filter(lease.address, rules);

    fs::write(world.dir.path().join("ip_forward"), "0\n").unwrap();
    assert!(!verify(&lease).forwarding && !verify(&lease).is_sound() && !verify(&lease).carries());
    assert_eq!(verify(&lease).finding(), None, "it is kept in");
    fs::write(world.dir.path().join("ip_forward"), "1\n").unwrap();
    for (rules, carries, words) in [
        (NetworkRules::GONE, true, "for NAT and forwarding are gone (the guard translates"),
        (NetworkRules { nat: false, ..NetworkRules::WHOLE }, true, "for NAT are gone"),
        (NetworkRules { forward: false, ..NetworkRules::WHOLE }, true, "for forwarding are gone"),
        (NetworkRules { forwards_the_rest: false, ..NetworkRules::GONE }, false, "nothing gets out"),
    ] {
        world.firewall.set_network_rules(rules);
        let found = verify(&lease);
        assert!(!found.is_sound() && found.carries() == carries && found.finding().is_none(), "{found:?}");
        let hindrance = found.hindrance().unwrap();
        assert!(hindrance.contains(words) && hindrance.contains("systemctl restart libvirtd"), "{hindrance}");
    }
    let accepting = NetworkRules { forwards_the_rest: false, ..NetworkRules::WHOLE };
    world.firewall.set_network_rules(accepting);
    assert!(verify(&lease).carries() && verify(&lease).hindrance().is_none());
    world.libvirt.stop_network("dev-box").unwrap();
    assert!(!verify(&lease).network_active);
    world.libvirt.undefine_filter(&lease.filter).unwrap();
    assert!(!verify(&lease).filter_defined);
    for call in ["find_network", "filters"] {
        world.libvirt.fail_next(call, fault());
        assert!(matches!(world.network.verify(&world.libvirt, &lease), Err(NetError::Libvirt { .. })));
    }
    world.firewall.fail_next(Call::List);
    assert!(matches!(world.network.verify(&world.libvirt, &lease), Err(NetError::Firewall(_))));
}

#[test]
fn guards_are_put_back_without_libvirt() {
    let world = World::new();
    let (runs, starts) = (world.attach("a").unwrap(), world.attach("b").unwrap());
    world.make_tap(runs.address);
    let restore = || world.network.restore_guards(runs.shape()).unwrap();
    let calls = world.libvirt.calls().len();
    assert_eq!(restore(), []);
    world.firewall.flush();
    assert_eq!(restore(), [name("a")]);
    assert!(world.firewall.rules_of(runs.address).is_some());
    assert!(world.firewall.rules_of(starts.address).is_none(), "it does not run yet");
    assert_eq!(restore(), []);
    assert_eq!(world.libvirt.calls().len(), calls, "libvirt was asked");
    let found = world.network.verify(&world.libvirt, &runs).unwrap();
    assert_eq!(found.guard, GuardState::Intact, "on record as it was put back");
    world.firewall.flush();
    world.firewall.fail_next(Call::List);
    assert!(matches!(world.network.restore_guards(runs.shape()), Err(NetError::Firewall(_))));
}

#[test]
fn a_policy_is_changed_at_once_and_put_on_record() {
    let world = World::new();
    let mut lease = world.attach("a").unwrap();
    let narrow = EgressPolicy::from_toml("mode='custom'\nports=['tcp/443']").unwrap();
    world.network.change_policy(&mut lease, &narrow).unwrap();
    assert_eq!(world.firewall.rules_of(lease.address).unwrap().policy(), &narrow);
    assert_eq!(world.network.list(&world.libvirt).unwrap()[0].record.as_ref().unwrap().policy, narrow);
    assert!(world.network.verify(&world.libvirt, &lease).unwrap().is_sound());

    world.firewall.fail_next(Call::Apply);
    assert!(world.network.change_policy(&mut lease, &EgressPolicy::NatFiltered).is_err());
    assert_eq!(lease.policy, narrow);
    assert!(matches!(
        world.network.change_policy(&mut lease, &EgressPolicy::Isolated),
        Err(NetError::Guard(GuardError::Isolated))
    ));
    assert!(world.network.verify(&world.libvirt, &lease).unwrap().is_sound());
}

#[test]
fn traffic_is_the_vm_s_own() {
    let world = World::new();
    let lease = world.attach("a").unwrap();
    world.firewall.set_traffic(lease.address, Traffic { connections: 3, ..Traffic::default() });
    assert_eq!(world.network.traffic(&lease).unwrap().connections, 3);
    world.firewall.flush();
    assert_eq!(world.network.traffic(&lease).unwrap(), Traffic::default());
}

#[test]
fn a_failed_detach_is_swept_later() {
    let world = World::new();
    let lease = world.attach("a").unwrap();
    let address = lease.address;
    world.firewall.fail_next(Call::Remove);
    assert!(world.network.detach(&world.libvirt, lease).is_err());
    world.make_tap(address);
    assert_eq!(world.network.sweep(&world.libvirt).unwrap(), Swept::default(), "its VM runs");
    assert!(world.firewall.rules_of(address).is_some(), "and stays guarded");
    fs::remove_dir_all(world.dir.path().join("interfaces").join(tap_of(address))).unwrap();
    let swept = world.network.sweep(&world.libvirt).unwrap();
    assert_eq!(swept.leases, [(address, Some(name("a")))]);
    assert_eq!(swept.filters.len(), 1);
    assert!(world.is_clean());
}

#[test]
fn an_address_is_free_once_libvirt_has_taken_its_filter_off() {
    let world = World::new();
    let lease = world.attach("a").unwrap();
    let address = lease.address;
    // Its owner is killed, its QEMU ended by another, and libvirt is at it still.
    world.libvirt.bind_filter(&filter_binding(&lease.filter, &[], address)).unwrap();
    drop(lease);
    let next = world.attach("b").unwrap();
    assert_ne!(next.address, address);
    world.libvirt.unbind_filter(&tap_of(address)).unwrap();
    assert_eq!(world.attach("c").unwrap().address, address);
}

#[test]
fn the_sweep_spares_the_living() {
    let world = World::new();
    assert_eq!(world.network.sweep(&world.libvirt).unwrap(), Swept::default(), "no network yet");
    let lease = world.attach("a").unwrap();
    drop(world.attach("b").unwrap());
    let shape = world.network.ensure(&world.libvirt).unwrap();
    let stray = Ipv4Addr::new(10, 213, 1, 77);
    let rules = VmGuard::new(name("c"), shape, stray, EgressPolicy::NatFiltered).unwrap();
    world.firewall.apply(&rules).unwrap();
    let swept = world.network.sweep(&world.libvirt).unwrap();
    assert_eq!(swept.leases, [(Ipv4Addr::new(10, 213, 1, 3), Some(name("b")))]);
    assert_eq!((swept.rules, swept.filters), (vec![stray], vec![]));
    assert!(world.network.verify(&world.libvirt, &lease).unwrap().is_sound());
}

#[test]
fn all_of_ours_is_removed_once_nobody_uses_it() {
    let world = World::new();
    let lease = world.attach("a").unwrap();
    world.libvirt.define_filter("<filter name='stranger'/>").unwrap();
    let error = world.network.remove(&world.libvirt).unwrap_err();
    assert_eq!(error.to_string(), "1 VM(s) still have a network: end them first");
    world.network.detach(&world.libvirt, lease).unwrap();
    world.network.remove(&world.libvirt).unwrap();
    assert!(world.network().is_none() && world.is_clean());
    assert!(world.libvirt.filters().unwrap().contains(&"stranger".to_owned()));
    world.network.remove(&world.libvirt).unwrap();
}

#[test]
fn what_holds_another_networks_vms_stays() {
    let world = World::new();
    let theirs = Ipv4Addr::new(10, 99, 0, 2);
    let shape = NetworkShape::new("other", "other0", "10.99.0.0/24".parse().unwrap()).unwrap();
    world
        .firewall
        .apply(&VmGuard::new(name("b"), shape, theirs, EgressPolicy::NatFiltered).unwrap())
        .unwrap();
    world.network.ensure(&world.libvirt).unwrap();
    world.network.remove(&world.libvirt).unwrap();
    assert!(world.network().is_none());
    assert!(world.firewall.list().unwrap().contains(&theirs));
}

#[test]
fn a_filter_in_use_stays() {
    let world = World::new();
    let lease = world.attach("a").unwrap();
    let filter = lease.filter.clone();
    world.libvirt.fail_next("undefine_filter", LibvirtError::InUse { message: String::new() });
    world.network.detach(&world.libvirt, lease).unwrap();
    assert!(world.libvirt.filters().unwrap().contains(&filter));
    let lease = world.attach("a").unwrap();
    world.libvirt.fail_next("undefine_filter", fault());
    let error = world.network.detach(&world.libvirt, lease).unwrap_err().to_string();
    assert_eq!(error, format!("libvirt could not undefine the filter {filter}"));
    assert_eq!(world.network.sweep(&world.libvirt).unwrap().filters, [filter]);
}

#[test]
fn the_fake_s_faults_reach_every_call() {
    let firewall = FakeFirewall::new();
    for call in [Call::List, Call::List, Call::List, Call::Clear] {
        firewall.fail_next(call);
    }
    assert!(firewall.list().is_err() && firewall.traffic().is_err() && firewall.inspect(&[]).is_err());
    assert!(firewall.clear().is_err() && firewall.clear().is_ok());
}

#[test]
fn a_vm_that_runs_on_without_its_process_is_taken_over() {
    let world = World::new();
    let lease = world.attach("a").unwrap();
    let address = lease.address;
    assert!(world.network.adopt(&world.libvirt, &name("a")).unwrap().is_none(), "its owner lives");
    let (policy, tap) = (lease.policy.clone(), lease.tap.clone());
    world.make_tap(address);
    drop(lease);
    assert_eq!(world.network.sweep(&world.libvirt).unwrap(), Swept::default(), "it runs");
    assert!(world.network.adopt(&world.libvirt, &name("b")).unwrap().is_none());

    let adopted = world.network.adopt(&world.libvirt, &name("a")).unwrap().unwrap();
    assert_eq!((adopted.address, &adopted.tap, &adopted.policy), (address, &tap, &policy));
    assert!(world.network.adopt(&world.libvirt, &name("a")).unwrap().is_none(), "by one at a time");
    assert_eq!(world.network.verify(&world.libvirt, &adopted).unwrap().guard, GuardState::Intact);
    world.network.detach(&world.libvirt, adopted).unwrap();
    assert!(world.is_clean());
}

#[test]
fn an_address_is_had_again_unless_somebody_has_it() {
    let world = World::new();
    let attach = |vm: &str, wanted| {
        let policy = EgressPolicy::NatFiltered;
        let lease = world.network.attach_preferring(&world.libvirt, &name(vm), &policy, Some(wanted));
        lease.unwrap().expect("not isolated")
    };
    let wanted = Ipv4Addr::new(10, 213, 1, 77);
    let first = attach("a", wanted);
    assert_eq!(first.address, wanted);
    let second = attach("b", wanted);
    assert_eq!(second.address, Ipv4Addr::new(10, 213, 1, 2), "the lowest");
    let elsewhere = attach("c", Ipv4Addr::new(192, 168, 1, 1));
    assert_eq!(elsewhere.address, Ipv4Addr::new(10, 213, 1, 3));
}
