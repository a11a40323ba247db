use std::collections::HashSet;
use std::sync::{Arc, Barrier, Mutex};
use std::thread;

use proptest::prelude::*;

use super::*;

fn record(vm: &str) -> LeaseRecord {
    LeaseRecord {
        vm: VmName::new(vm).unwrap(),
        policy: EgressPolicy::NatFiltered,
        filter: "f".to_owned(),
        filter_policy: None,
        fingerprint: None,
        tap: TapUse::Libvirt,
    }
}

#[test]
fn a_filter_stays_that_of_the_first_policy() {
    let narrow = |port| EgressPolicy::from_toml(&format!("mode='custom'\nports=['tcp/{port}']")).unwrap();
    let first = record("a");
    assert_eq!(first.filter_policy(), &EgressPolicy::NatFiltered);
    let other = first.clone().under(narrow(1)).under(narrow(2));
    assert_eq!((&other.policy, other.filter_policy()), (&narrow(2), &EgressPolicy::NatFiltered));
    assert_eq!(other.under(EgressPolicy::NatFiltered), first);
}

fn leases(dir: &Path, subnet: &str) -> AddressLeases {
    AddressLeases::open(dir.join("net"), subnet.parse().unwrap()).unwrap()
}

#[test]
fn leases_are_distinct_and_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let leases = leases(dir.path(), "10.213.0.0/29");
    let held: Vec<AddressLease> = (0..5).map(|_| leases.acquire(&record("a"), |_| true).unwrap()).collect();
    let addresses: HashSet<Ipv4Addr> = held.iter().map(AddressLease::address).collect();
    assert_eq!(addresses.len(), 5);
    let error = leases.acquire(&record("a"), |_| true).unwrap_err();
    assert_eq!(
        error.to_string(),
        "all 5 addresses of 10.213.0.0/29 are in use: wait for a VM to end, or configure a larger subnet"
    );
    for lease in held {
        lease.release().unwrap();
    }
    assert!(leases.list().unwrap().is_empty());
    assert_eq!(leases.acquire(&record("b"), |_| true).unwrap().address(), Ipv4Addr::new(10, 213, 0, 2));
    assert_eq!(leases.subnet().prefix(), 29);
}

#[test]
fn unusable_addresses_are_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let leases = leases(dir.path(), "10.213.0.0/24");
    let lease = leases.acquire(&record("a"), |address| address.octets()[3] > 9).unwrap();
    assert_eq!(lease.address(), Ipv4Addr::new(10, 213, 0, 10));
    assert_eq!(lease.record(), Some(record("a")));
}

#[test]
fn a_dead_owner_s_lease_is_reclaimed() {
    let dir = tempfile::tempdir().unwrap();
    let leases = leases(dir.path(), "10.213.0.0/24");
    let mut lease = leases.acquire(&record("a"), |_| true).unwrap();
    let address = lease.address();
    let mut newer = record("a");
    newer.fingerprint = Some(Fingerprint("sha256:x".to_owned()));
    lease.write(&newer).unwrap();
    assert_eq!(leases.list().unwrap()[&address], (Owner::Alive, Some(newer.clone())));
    assert!(leases.adopt(address).unwrap().is_none(), "not from the living");
    drop(lease); // as the kernel does when the owner dies
    assert_eq!(leases.list().unwrap()[&address], (Owner::Dead, Some(newer)));
    let again = leases.acquire(&record("b"), |_| true).unwrap();
    assert_eq!((again.address(), again.record().unwrap().vm.as_str()), (address, "b"));
    drop(again);
    leases.adopt(address).unwrap().unwrap().release().unwrap();
    assert!(leases.adopt(address).unwrap().is_none() && leases.list().unwrap().is_empty());
}

#[test]
fn strange_files_are_no_leases_and_garbage_is_no_record() {
    let dir = tempfile::tempdir().unwrap();
    let leases = leases(dir.path(), "10.213.0.0/24");
    for name in ["x", "x.lease", "10.99.0.2.lease", "10.213.0.1.lease"] {
        fs::write(dir.path().join("net").join(name), "x").unwrap();
    }
    fs::write(dir.path().join("net/10.213.0.9.lease"), "garbage").unwrap();
    let list = leases.list().unwrap();
    assert_eq!(list.into_iter().collect::<Vec<_>>(), [(Ipv4Addr::new(10, 213, 0, 9), (Owner::Dead, None))]);
}

#[test]
fn a_record_can_be_read_while_it_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let leases = leases(dir.path(), "10.213.0.0/24");
    let mut lease = leases.acquire(&record("a"), |_| true).unwrap();
    let address = lease.address();
    let written = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..1_000 {
                let of = record(if round % 2 == 0 { "a" } else { "longer" });
                if round % 3 == 0 { leases.rewrite(address, &of).unwrap() } else { lease.write(&of).unwrap() }
            }
            written.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        while !written.load(std::sync::atomic::Ordering::Relaxed) {
            assert!(leases.list().unwrap()[&address].1.is_some());
            assert!(leases.records().unwrap().contains_key(&address));
        }
    });
    assert!(lease.record().is_some());
}

#[test]
fn a_writer_that_dies_half_way_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let leases = leases(dir.path(), "10.213.0.0/24");
    let mut lease = leases.acquire(&record("a"), |_| true).unwrap();
    let address = lease.address();
    fs::write(dir.path().join(format!("net/{address}.new")), "{\"vm\":\"a").unwrap();
    assert_eq!(lease.record(), Some(record("a")));
    assert_eq!(leases.list().unwrap(), BTreeMap::from([(address, (Owner::Alive, Some(record("a"))))]));
    lease.write(&record("b")).unwrap();
    assert_eq!(leases.record(address), Some(record("b")));
    lease.release().unwrap();
    assert_eq!(fs::read_dir(dir.path().join("net")).unwrap().count(), 0);
}

#[test]
fn who_dies_between_lock_and_record_leaves_a_free_address() {
    let dir = tempfile::tempdir().unwrap();
    let leases = leases(dir.path(), "10.213.0.0/24");
    let address = Ipv4Addr::new(10, 213, 0, 2);
    drop(leases.try_lock(address).unwrap().unwrap());
    assert!(leases.list().unwrap().is_empty() && !leases.is_on_record(address));
    assert!(leases.adopt(address).unwrap().is_none(), "nothing is on record");
    assert_eq!(fs::read_dir(dir.path().join("net")).unwrap().count(), 0, "and nothing is left");
    assert_eq!(leases.acquire(&record("a"), |_| true).unwrap().address(), address);
}

#[test]
fn who_lists_is_no_owner() {
    let dir = tempfile::tempdir().unwrap();
    let leases = leases(dir.path(), "10.213.0.0/24");
    let address = leases.acquire(&record("a"), |_| true).unwrap().address();
    let (owner, listing) = leases.owner(address).unwrap();
    assert!(owner == Owner::Dead && listing.is_some());
    assert_eq!(leases.list().unwrap()[&address].0, Owner::Dead, "for two at once");
    assert_ne!(leases.acquire(&record("b"), |_| true).unwrap().address(), address, "the next one");
    drop(listing);
    assert_eq!(leases.acquire(&record("b"), |_| true).unwrap().address(), address);
}

#[test]
fn a_record_without_its_lock_is_a_dead_owner_s() {
    let dir = tempfile::tempdir().unwrap();
    let leases = leases(dir.path(), "10.213.0.0/24");
    let address = leases.acquire(&record("a"), |_| true).unwrap().address();
    fs::remove_file(dir.path().join(format!("net/{address}.lock"))).unwrap();
    assert_eq!(leases.list().unwrap()[&address], (Owner::Dead, Some(record("a"))));
    leases.adopt(address).unwrap().unwrap().release().unwrap();
    assert_eq!(fs::read_dir(dir.path().join("net")).unwrap().count(), 0);
    assert!(leases.rewrite(address, &record("b")).unwrap_err().to_string().contains("cannot be examined"));
}

#[test]
fn errors_name_the_path() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = AddressLeases::open(file.join("net"), "10.213.0.0/24".parse().unwrap()).unwrap_err();
    assert!(error.to_string().ends_with("file/net cannot be made"), "{error}");

    let leases = leases(dir.path(), "10.213.0.0/24");
    let lease = leases.acquire(&record("a"), |_| true).unwrap();
    fs::remove_dir_all(dir.path().join("net")).unwrap();
    assert!(lease.release().unwrap_err().to_string().contains("cannot be removed"));
    assert!(leases.list().unwrap_err().to_string().contains("cannot be listed"));
    assert!(leases.acquire(&record("a"), |_| true).unwrap_err().to_string().contains("cannot be opened"));
}

/// Threads stand for processes: flock(2) locks belong to open files, not to processes.
#[test]
fn two_owners_never_have_one_address() {
    const OWNERS: usize = 8;
    let dir = tempfile::tempdir().unwrap();
    let held: Arc<Mutex<HashSet<Ipv4Addr>>> = Arc::default();
    let start = Arc::new(Barrier::new(OWNERS));
    thread::scope(|scope| {
        for owner in 0..OWNERS {
            let (held, start) = (Arc::clone(&held), Arc::clone(&start));
            let leases = leases(dir.path(), "10.213.0.0/28");
            scope.spawn(move || {
                start.wait();
                for round in 0..60 {
                    let lease = leases.acquire(&record("a"), |_| true).unwrap();
                    assert!(held.lock().unwrap().insert(lease.address()), "held twice: {}", lease.address());
                    thread::yield_now();
                    assert!(held.lock().unwrap().remove(&lease.address()));
                    if (round + owner) % 3 == 0 { drop(lease) } else { lease.release().unwrap() }
                }
            });
        }
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Against a set: take, give back, and die, in any order.
    #[test]
    fn as_a_set_of_addresses(steps in prop::collection::vec((0_u8..3, any::<prop::sample::Index>()), 1..40)) {
        let dir = tempfile::tempdir().unwrap();
        let leases = leases(dir.path(), "10.213.0.0/28");
        let mut held: Vec<AddressLease> = Vec::new();
        let mut on_record: HashSet<Ipv4Addr> = HashSet::new();
        for (step, which) in steps {
            if step == 0 || held.is_empty() {
                match leases.acquire(&record("a"), |_| true) {
                    Ok(lease) => {
                        prop_assert!(held.iter().all(|other| other.address() != lease.address()));
                        on_record.insert(lease.address());
                        held.push(lease);
                    }
                    Err(error) => {
                        let exhausted = matches!(error, LeaseError::Exhausted { .. });
                        prop_assert!(exhausted && held.len() == 13);
                    }
                }
            } else {
                let lease = held.swap_remove(which.index(held.len()));
                if step == 1 {
                    on_record.remove(&lease.address());
                    lease.release().unwrap();
                } else {
                    drop(lease);
                }
            }
            let list = leases.list().unwrap();
            prop_assert_eq!(list.keys().copied().collect::<HashSet<_>>(), on_record.clone());
            for (address, (owner, _)) in list {
                let alive = held.iter().any(|lease| lease.address() == address);
                prop_assert_eq!(owner == Owner::Alive, alive);
            }
        }
    }
}
