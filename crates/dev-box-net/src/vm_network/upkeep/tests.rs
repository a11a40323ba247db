use std::fs;
use std::sync::mpsc;
use std::thread;

use super::super::tests::{World, name};
use super::*;
use crate::guard::FilterRules;
use crate::guard::fake::Call;
use crate::lease::AddressLeases;
use crate::resolver::Resolver as _;
use crate::tap::Taps as _;

/// Time enough for a thread that does not wait to have come to its end.
const A_WHILE: Duration = Duration::from_millis(200);

fn names(domain: &str) -> EgressPolicy {
    EgressPolicy::from_toml(&format!("mode='custom'\ndomains=['{domain}']")).unwrap()
}

fn world() -> (World, NetLease) {
    let world = World::new();
    fs::write(world.dir.path().join("ip_forward"), "1").unwrap();
    let lease = world.network.attach(&world.libvirt, &name("a"), &names("old.example")).unwrap().unwrap();
    (world, lease)
}

/// Does `meanwhile` while changes are locked out and `call` runs beside it; what `call` says, and whether it waited.
fn beside<T: Send>(world: &World, call: impl FnOnce() -> T + Send, meanwhile: impl FnOnce()) -> (T, bool) {
    let lock = world.network.lock().unwrap();
    let (done, ended) = mpsc::sync_channel(1);
    thread::scope(|scope| {
        let called = scope.spawn(move || {
            let result = call();
            done.send(()).unwrap();
            result
        });
        let waited = ended.recv_timeout(A_WHILE).is_err();
        meanwhile();
        drop(lock);
        (called.join().unwrap(), waited)
    })
}

fn policy_of(world: &World) -> EgressPolicy {
    world.network.lease_of(&world.libvirt, &name("a")).unwrap().unwrap().record.unwrap().policy
}

/// As [`VmNetwork::change_policy_of`] does once it has the lock.
fn change(world: &World, lease: &NetLease, policy: &EgressPolicy) {
    world.network.put_under(lease.shape(), lease.address, lease.record(), policy).unwrap();
}

#[test]
fn a_repair_leaves_the_policy_that_came_meanwhile() {
    let (world, lease) = world();
    let new = names("new.example");
    let (repaired, waited) = beside(
        &world,
        || world.network.repair(&world.libvirt, &name("a")).unwrap(),
        || change(&world, &lease, &new),
    );
    assert!(repaired && waited);
    assert_eq!(policy_of(&world), new);
    assert_eq!(world.firewall.rules_of(lease.address).unwrap().policy(), &new);
    assert_eq!(world.resolver.served(lease.address).unwrap().domains(), new.domains());
}

#[test]
fn of_two_changes_at_once_one_holds_as_a_whole() {
    let (world, lease) = world();
    let (first, second) = (names("first.example"), names("second.example"));
    let (changed, waited) = beside(
        &world,
        || world.network.change_policy_of(&world.libvirt, &name("a"), &second).unwrap(),
        || change(&world, &lease, &first),
    );
    assert!(changed && waited);
    assert_eq!(policy_of(&world), second);
    assert_eq!(world.resolver.served(lease.address).unwrap().domains(), second.domains());
}

#[test]
fn an_owner_restores_what_another_process_has_changed() {
    let (world, mut lease) = world();
    let new = names("new.example");
    assert!(world.network.change_policy_of(&world.libvirt, &name("a"), &new).unwrap());
    world.firewall.flush();
    world.network.restore(&mut lease).unwrap();
    assert_eq!((&lease.policy, &policy_of(&world)), (&new, &new));
    assert_eq!(world.firewall.rules_of(lease.address).unwrap().policy(), &new);
    // What cannot be read is as the owner knows it.
    let leases = AddressLeases::open(world.dir.path().join("net/dev-box"), lease.shape().subnet()).unwrap();
    fs::write(world.dir.path().join(format!("net/dev-box/{}.lease", lease.address)), "{").unwrap();
    assert!(leases.records().unwrap().is_empty(), "the control");
    world.network.restore(&mut lease).unwrap();
    assert_eq!(policy_of(&world), new);
}

#[test]
fn what_is_just_being_changed_is_not_found_gone() {
    let (world, lease) = world();
    let verify = || world.network.verify_all(&world.libvirt).unwrap().remove(&name("a")).unwrap();
    assert!(verify().is_sound());
    world.network.resolver.stop(lease.address).unwrap();
    let (found, waited) = beside(&world, verify, || change(&world, &lease, &names("new.example")));
    assert!(found.is_sound() && waited, "{found:?}");

    world.resolver.crash(lease.address);
    assert_eq!(verify().names_served, Some(false), "nobody changes anything");
    let lock = world.network.lock().unwrap();
    let found = world.network.verify_within(A_WHILE, &world.libvirt, |_| true).unwrap();
    assert_eq!(found[&name("a")].names_served, Some(false), "nobody hides it for ever");

    // No change takes rules away, so none has that long for it.
    world.firewall.flush();
    let found = world.network.verify_within(Duration::from_secs(3600), &world.libvirt, |_| true).unwrap();
    assert_eq!(found[&name("a")].guard, GuardState::Missing);
    drop(lock);
}

/// A VM that runs, and the rules of its filter.
fn plugged() -> (World, NetLease, FilterRules) {
    let (world, lease) = world();
    fs::create_dir_all(world.network.settings.host.interfaces.join(tap_of(lease.address))).unwrap();
    world.taps.rejoin(&tap_of(lease.address), lease.shape().bridge()).unwrap();
    let rules = nwfilter(lease.shape(), lease.record().filter_policy()).in_force(lease.mac, lease.address);
    world.firewall.put_filter(lease.address, rules.clone());
    (world, lease, rules)
}

#[test]
fn a_filter_that_libvirt_is_just_making_is_not_found_gone() {
    let (world, lease, rules) = plugged();
    let verify = |limit| world.network.verify_within(limit, &world.libvirt, |_| true).unwrap();
    let ever = Duration::from_secs(3600);
    assert!(verify(ever)[&name("a")].is_sound());
    world.firewall.flush_filters();
    world.firewall.make_filter(lease.address, rules.clone(), 3 * LOOKS);
    assert!(verify(ever)[&name("a")].is_sound(), "longer than one turn's looks");

    world.firewall.flush_filters();
    assert_eq!(verify(ever)[&name("a")].filter_in_force, Some(false), "at once where nothing moves");
    world.firewall.make_filter(lease.address, rules, u32::MAX);
    let began = Instant::now();
    let found = verify(Duration::from_secs(2)).remove(&name("a")).unwrap();
    assert_eq!(found.filter_in_force, Some(false), "nobody hides it for ever");
    assert!(began.elapsed() >= Duration::from_secs(2));

    // Whatever libvirt makes, nobody else's layer waits for it.
    world.firewall.flush();
    assert_eq!(verify(ever)[&name("a")].guard, GuardState::Missing);
}

#[test]
fn whoever_changes_something_does_not_wait_until_libvirt_is_done() {
    let (world, lease, rules) = plugged();
    world.firewall.flush_filters();
    world.firewall.make_filter(lease.address, rules.clone(), u32::MAX);
    thread::scope(|scope| {
        let verifying = scope.spawn(|| world.network.verify_all(&world.libvirt).unwrap().remove(&name("a")));
        let new = names("new.example");
        assert!(world.network.change_policy_of(&world.libvirt, &name("a"), &new).unwrap());
        world.firewall.make_filter(lease.address, rules.clone(), 0);
        assert!(verifying.join().unwrap().unwrap().is_sound());
    });
}

#[test]
fn a_vm_whose_first_rules_are_being_made_keeps_them() {
    let (world, lease) = world();
    let shape = world.network.ensure(&world.libvirt).unwrap();
    let made = LeaseRecord { fingerprint: None, ..lease.record() };
    world.network.leases(&shape).unwrap().rewrite(lease.address, &made).unwrap();
    let error =
        world.network.change_policy_of(&world.libvirt, &name("a"), &names("new.example")).unwrap_err();
    assert!(matches!(error, NetError::Starting { .. }), "{error:?}");
    assert!(!world.network.repair(&world.libvirt, &name("a")).unwrap());
    assert_eq!(world.resolver.serving().unwrap().len(), 1, "nothing was touched");
}

#[test]
fn what_is_put_back_while_a_vm_is_removed_goes_with_it() {
    let (world, lease) = world();
    let (shape, address, record) = (lease.shape().clone(), lease.address, lease.record());
    let (removed, waited) = beside(
        &world,
        || world.network.detach(&world.libvirt, lease),
        || world.network.put(&shape, address, record, false).unwrap(),
    );
    removed.unwrap();
    assert!(waited && world.is_clean());
}

#[test]
fn whether_a_policy_was_changed_is_known() {
    let (world, mut lease) = world();
    let record = |lease: &NetLease| world.network.record_of(lease.shape(), lease.address).unwrap().unwrap();
    assert!(!record(&lease).is_changed());
    let (old, new) = (lease.policy.clone(), names("new.example"));
    world.network.change_policy(&mut lease, &new).unwrap();
    assert!(record(&lease).is_changed() && record(&lease).policy == new);
    world.network.change_policy(&mut lease, &old).unwrap();
    assert!(!record(&lease).is_changed(), "and back");
    let nobody = Ipv4Addr::new(10, 213, 1, 99);
    assert_eq!(world.network.record_of(lease.shape(), nobody).unwrap(), None);
}

#[test]
fn only_who_is_asked_for_is_looked_at() {
    let (world, _lease) = world();
    let found = |wanted| world.network.verify_those(&world.libvirt, |vm| *vm == name(wanted)).unwrap();
    assert!(found("a")[&name("a")].is_sound() && found("b").is_empty());
}

#[test]
fn another_use_of_a_vm_is_told_anew_what_it_reaches() {
    let (world, lease) = world();
    let reached = |address: &str| world.firewall.reach(lease.address, address.parse().unwrap());
    assert!(reached("1.1.1.1") && !reached("1.1.1.1"));
    world.network.forget_reached(lease.address, false).unwrap();
    assert!(reached("1.1.1.1"));
    world.network.repair(&world.libvirt, &name("a")).unwrap();
    assert!(!reached("1.1.1.1"), "rules that are put back are the same VM's");

    let without = world.network.forget_reached(lease.address, true);
    assert!(matches!(without, Err(NetError::Firewall(_))), "its policy has no IPv6");
    world.firewall.fail_next(Call::Forget);
    assert!(world.network.forget_reached(lease.address, false).is_err());
    world.firewall.flush();
    assert!(world.network.forget_reached(lease.address, false).is_err(), "it has no rules");
}

#[test]
fn whoever_gets_an_address_gets_nothing_of_its_past() {
    let (world, lease) = world();
    let address = lease.address;
    assert!(world.firewall.rules_of(address).unwrap().is_for_a_new_vm());
    world.network.repair(&world.libvirt, &name("a")).unwrap();
    assert!(!world.firewall.rules_of(address).unwrap().is_for_a_new_vm());
    assert!(world.network.change_policy_of(&world.libvirt, &name("a"), &names("new.example")).unwrap());
    let rules = world.firewall.rules_of(address).unwrap();
    assert!(rules.forgets_names() && !rules.is_for_a_new_vm(), "it is slowed down as before");
    // Its owner dies, and nobody takes its rules away.
    assert!(world.firewall.reach(address, [1, 1, 1, 1].into()));
    drop(lease);
    let next = world.network.attach(&world.libvirt, &name("b"), &names("old.example")).unwrap().unwrap();
    assert_eq!(next.address, address);
    assert!(world.firewall.rules_of(address).unwrap().is_for_a_new_vm());
    assert!(world.firewall.reach(address, [1, 1, 1, 1].into()));
}
