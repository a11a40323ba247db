//! Slowed VMs: each has a trickle of its own, and whoever gets a tap next is not slowed.

use std::net::UdpSocket;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use dev_box_net::guard::Firewall as _;
use dev_box_net::identity::tap_of;
use dev_box_net::{EgressPolicy, NftThrottle};

use crate::lab::{Lab, PUBLIC, Place, VM_A, VM_B, guard};
use crate::probe::Probe;

const PORT: u16 = 4444;

/// The taps that are slowed down.
fn slowed(lab: &Lab) -> String {
    let list =
        ["netns", "exec", &lab.name(Place::Host), "nft", "list", "set", "bridge", "dev-box-throttle", "slow"];
    let output = Command::new("ip").args(list).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Bytes of large datagrams that arrived in the world.
fn flooded(lab: &Lab) -> usize {
    let arrived = lab.arrived.lock().unwrap();
    arrived.iter().filter(|(at, bytes)| *at == Place::World && bytes.len() == 1400).count() * 1400
}

/// Has VM A send much more than a trickle while `meanwhile` goes on.
fn while_a_floods<T>(lab: &Lab, meanwhile: impl FnOnce() -> T) -> T {
    let socket = lab.within(Place::VmA, || UdpSocket::bind("0.0.0.0:0").unwrap());
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                for _ in 0..40 {
                    let _ = socket.send_to(&[7; 1400], (PUBLIC, PORT));
                }
                thread::sleep(Duration::from_millis(10));
            }
        });
        // Its burst is over by then.
        thread::sleep(Duration::from_millis(300));
        let result = meanwhile();
        done.store(true, Ordering::Relaxed);
        result
    })
}

#[test]
fn a_slowed_vm_takes_nothing_from_another_slowed_one() {
    let Some(lab) = Lab::new() else { return };
    let throttle = NftThrottle::default();
    let slow = |address| lab.within(Place::Host, || throttle.slow(&tap_of(address)).unwrap());
    slow(VM_A);
    slow(VM_B);
    slow(VM_B);
    let arrive = || (0..5).filter(|_| Probe::datagram(Place::VmB, PUBLIC, PORT).arrives(&lab)).count();
    let begun = Instant::now();
    assert_eq!(while_a_floods(&lab, arrive), 5, "B has sent next to nothing");
    let slowed = flooded(&lab);
    // 64 KiB a second, and as much as of two for a start.
    let most = ((begun.elapsed().as_secs_f64() + 3.0) * 65_536.0) as usize;
    assert!((1400..most.max(1_000_000)).contains(&slowed), "{slowed} bytes of A's");

    // The control: A alone is let go, and sends as much as it likes.
    lab.within(Place::Host, || throttle.release(&tap_of(VM_A)).unwrap());
    let (mut free, begun) = (0, Instant::now());
    while_a_floods(&lab, || {
        while free <= 1_000_000 && begun.elapsed() < Duration::from_secs(60) {
            thread::sleep(Duration::from_millis(20));
            free = flooded(&lab) - slowed;
        }
    });
    assert!(free > 1_000_000, "{free} bytes of A's");
    // Of what it may have in such a time when it is slowed it is several times as much: 64 KiB a second, and as much as of two for a start.
    let trickle = (begun.elapsed().as_secs_f64() + 2.0) * 65_536.0;
    assert!(free as f64 > 2.0 * trickle, "{free} bytes of A's in {:?}", begun.elapsed());
}

#[test]
fn whoever_gets_a_tap_is_not_slowed_down_although_the_one_who_slowed_it_died() {
    let Some(lab) = Lab::new() else { return };
    let policy = EgressPolicy::NatFiltered;
    // There is no such table yet.
    lab.firewall.apply(&guard("dev-box-a", VM_A, &policy).for_a_new_vm()).unwrap();
    lab.within(Place::Host, || {
        let throttle = NftThrottle::default();
        throttle.slow(&tap_of(VM_A)).unwrap();
        throttle.slow(&tap_of(VM_B)).unwrap();
    });
    let is_slowed = |address| slowed(&lab).contains(&tap_of(address));
    lab.firewall.apply(&guard("dev-box-a", VM_A, &policy)).unwrap();
    assert!(is_slowed(VM_A), "rules that are put back are the same VM's");
    lab.firewall.apply(&guard("dev-box-c", VM_A, &policy).for_a_new_vm()).unwrap();
    assert!(!is_slowed(VM_A) && is_slowed(VM_B), "{}", slowed(&lab));
    lab.within(Place::Host, || {
        let throttle = NftThrottle::default();
        throttle.slow(&tap_of(VM_A)).unwrap();
        throttle.release(&tap_of(VM_A)).unwrap();
        throttle.release(&tap_of(VM_A)).unwrap();
    });
    assert!(!is_slowed(VM_A));
    lab.firewall.clear().unwrap();
    let host = lab.name(Place::Host);
    let left = Command::new("ip").args(["netns", "exec", &host, "nft", "list", "tables"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&left.stdout).contains("dev"), "nothing of ours");
}
