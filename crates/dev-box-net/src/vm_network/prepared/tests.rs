use dev_box_core::libvirt::Libvirt;
use dev_box_core::spec::HostEnd;

use super::*;
use crate::guard::Firewall as _;
use crate::guard::fake::Call;
use crate::tap::Taps as _;
use crate::vm_network::tests::{World, fault, name};
use crate::xml::nwfilter::nwfilter;

impl World {
    fn prepare(&self) -> Result<PreparedTap, NetError> {
        let prepared = self.network.prepare(&self.libvirt, &EgressPolicy::NatFiltered)?;
        Ok(prepared.expect("not isolated"))
    }

    fn prepared_vm(&self, vm: &str) -> NetLease {
        let tap = self.prepare().unwrap();
        self.network.attach_prepared(&self.libvirt, &name(vm), tap).unwrap()
    }

    /// As libvirt would: the fake firewall shows the filter's rules at the tap.
    fn put_filter(&self, lease: &NetLease) {
        let rules = nwfilter(&lease.shape, lease.filter_policy()).in_force(lease.mac, lease.address);
        self.firewall.put_filter(lease.address, rules);
    }

    fn bound(&self) -> Vec<String> {
        self.libvirt.bound_filters().unwrap()
    }

    fn taps(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.network.settings.host.interfaces);
        let names = entries.into_iter().flatten().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).collect()
    }

    fn is_bare(&self) -> bool {
        self.is_clean() && self.bound().is_empty() && self.taps().is_empty()
    }
}

#[test]
fn a_tap_waits_with_its_filter_and_without_rules() {
    let world = World::new();
    let tap = world.prepare().unwrap();
    assert_eq!((world.taps(), world.bound()), (vec![tap.tap()], vec![tap.tap()]));
    assert!(world.firewall.list().unwrap().is_empty(), "nothing is let through");
    assert!(world.network.list(&world.libvirt).unwrap().is_empty(), "no VM has it");
    assert!(world.network.verify_all(&world.libvirt).unwrap().is_empty());
    let other = world.prepare().unwrap();
    assert_ne!(other.tap(), tap.tap());

    let name_of_it = tap.tap();
    let lease = world.network.attach_prepared(&world.libvirt, &name("a"), tap).unwrap();
    assert_eq!((&lease.tap, lease.is_prepared()), (&name_of_it, true));
    assert_eq!(world.firewall.rules_of(lease.address).unwrap().vm(), &name("a"));
    let interface = lease.interface();
    assert_eq!((interface.host_end, interface.filter), (HostEnd::Prepared, None));
    assert_eq!(world.network.list(&world.libvirt).unwrap().len(), 1);
    world.taps.plug(&lease.tap, true);
    world.put_filter(&lease);
    assert!(world.network.verify(&world.libvirt, &lease).unwrap().is_sound());
    world.firewall.flush_filters();
    assert_eq!(world.network.verify(&world.libvirt, &lease).unwrap().filter_in_force, Some(false));

    world.network.detach(&world.libvirt, lease).unwrap();
    world.network.discard(&world.libvirt, other).unwrap();
    assert!(world.is_bare());
}

#[test]
fn isolated_needs_none() {
    let world = World::new();
    assert!(world.network.prepare(&world.libvirt, &EgressPolicy::Isolated).unwrap().is_none());
    assert!(world.is_bare());
}

#[test]
fn a_tap_is_kept_for_the_next_vm() {
    let world = World::new();
    let mut lease = world.prepared_vm("a");
    let (tap, address) = (lease.tap.clone(), lease.address);
    world.put_filter(&lease);
    // Its filter stays the first policy's, so that is what the next VM gets.
    world.network.change_policy(&mut lease, &EgressPolicy::from_toml("mode='custom'").unwrap()).unwrap();
    let kept = world.network.keep(&world.libvirt, lease).unwrap().expect("it can serve another");
    assert_eq!((kept.tap(), kept.policy()), (tap.clone(), &EgressPolicy::NatFiltered));
    assert!(world.firewall.rules_of(address).is_none(), "the guard has forgotten the VM");
    assert!(world.network.list(&world.libvirt).unwrap().is_empty());
    let next = world.network.attach_prepared(&world.libvirt, &name("b"), kept).unwrap();
    assert_eq!((next.tap.as_str(), next.vm.as_str()), (tap.as_str(), "b"));
    assert_eq!(world.firewall.rules_of(address).unwrap().vm(), &name("b"));
    assert!(world.network.lease_of(&world.libvirt, &name("a")).unwrap().is_none());
}

#[test]
fn a_tap_that_is_open_or_unfiltered_or_libvirts_is_not_kept() {
    let world = World::new();
    let lease = world.prepared_vm("a");
    assert!(world.network.keep(&world.libvirt, lease).unwrap().is_none(), "its filter is not in force");
    assert!(world.is_bare());

    let lease = world.prepared_vm("a");
    world.put_filter(&lease);
    world.taps.plug(&lease.tap, true);
    assert!(world.network.keep(&world.libvirt, lease).unwrap().is_none(), "somebody has it open");
    assert!(world.is_bare());

    let lease = world.network.attach(&world.libvirt, &name("a"), &EgressPolicy::NatFiltered).unwrap();
    assert!(world.network.keep(&world.libvirt, lease.unwrap()).unwrap().is_none(), "libvirt made it");
    assert!(world.is_bare());
}

#[test]
fn whatever_fails_nothing_is_left() {
    for call in ["find_network", "define_network", "start_network", "filters", "define_filter", "bind_filter"]
    {
        let world = World::new();
        world.libvirt.fail_next(call, fault());
        let error = world.prepare().unwrap_err();
        assert!(error.to_string().starts_with("libvirt could not "), "{call}: {error}");
        assert!(world.is_bare(), "{call}");
    }
    let world = World::new();
    world.taps.refuse(true);
    assert!(matches!(world.prepare(), Err(NetError::Tap(_))));
    assert!(world.is_bare());
    world.taps.refuse(false);
    let tap = world.prepare().unwrap();
    world.firewall.fail_next(Call::Apply);
    assert!(world.network.attach_prepared(&world.libvirt, &name("a"), tap).is_err());
    assert!(world.is_bare());
}

#[test]
fn rules_of_others_in_between_are_no_failure() {
    let world = World::new();
    let message = "internal error: Failed to add: failed to add new filter rules".to_owned();
    for nth in 1..=5 {
        let message = message.clone();
        world.libvirt.fail_nth("bind_filter", nth, LibvirtError::OperationFailed { code: 1, message });
    }
    let tap = world.prepare().unwrap();
    world.network.discard(&world.libvirt, tap).unwrap();
    assert!(world.is_bare());
}

#[test]
fn the_taps_of_a_dead_owner_are_swept_when_nobody_has_them_open() {
    let world = World::new();
    let (waiting, lease) = (world.prepare().unwrap(), world.prepared_vm("a"));
    let open = lease.tap.clone();
    world.taps.plug(&open, true);
    world.network.sweep(&world.libvirt).unwrap();
    assert_eq!(world.taps().len(), 2, "their owner lives");
    drop((waiting, lease));
    world.network.sweep(&world.libvirt).unwrap();
    assert_eq!((world.taps(), world.bound()), (vec![open.clone()], vec![open.clone()]), "its VM runs");
    world.taps.plug(&open, false);
    world.network.sweep(&world.libvirt).unwrap();
    assert!(world.is_bare());
}

#[test]
fn a_filter_that_is_gone_is_bound_anew() {
    let world = World::new();
    let lease = world.prepared_vm("a");
    world.libvirt.unbind_filter(&lease.tap).unwrap();
    assert!(world.network.repair(&world.libvirt, &lease.vm).unwrap());
    assert_eq!(world.bound(), std::slice::from_ref(&lease.tap));
    assert!(world.network.repair(&world.libvirt, &lease.vm).unwrap(), "also where it is bound");
    assert_eq!(world.bound(), std::slice::from_ref(&lease.tap));
    let libvirt: &dyn Libvirt = &world.libvirt;
    world.network.detach(libvirt, lease).unwrap();
    assert!(world.is_bare());
}

#[test]
fn a_bridge_that_was_made_anew_has_its_taps_again() {
    let world = World::new();
    let tap = world.prepare().unwrap();
    let is_on = |tap: &str| world.network.settings.host.is_joined(tap, "devbox0") == Some(true);
    assert!(is_on(&tap.tap()));
    world.taps.unbridge(&tap.tap());
    let lease = world.network.attach_prepared(&world.libvirt, &name("a"), tap).unwrap();
    assert!(is_on(&lease.tap), "before a VM has it");
    let other =
        world.network.attach(&world.libvirt, &name("b"), &EgressPolicy::NatFiltered).unwrap().unwrap();
    world.taps.make(&other.tap, other.mac, "another").unwrap();
    world.taps.unbridge(&lease.tap);
    for lease in [&lease, &other] {
        assert!(!is_on(&lease.tap));
        assert!(world.network.repair(&world.libvirt, &lease.vm).unwrap());
        assert!(is_on(&lease.tap), "with the rest of it, whoever made it");
    }
    // By hand, of one VM alone.
    let disturb: [&dyn Fn(&str); 2] = [&|tap| world.taps.unbridge(tap), &|tap| world.taps.expose(tap)];
    for disturb in disturb {
        world.put_filter(&lease);
        assert!(world.network.verify(&world.libvirt, &lease).unwrap().is_sound());
        disturb(&lease.tap);
        let found = world.network.verify(&world.libvirt, &lease).unwrap();
        assert_eq!(
            (found.tap_joined, found.finding().as_deref()),
            (Some(false), Some("the VM's tap is not on its bridge, isolated"))
        );
        assert!(!found.is_sound());
        assert!(world.network.repair(&world.libvirt, &lease.vm).unwrap());
        assert!(world.network.verify(&world.libvirt, &lease).unwrap().is_sound());
    }
}
