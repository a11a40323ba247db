//! What the guard reports, as whoever listens to a VM's log group hears it.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::process::{Command, Stdio};
use std::time::Duration;

use dev_box_net::EgressPolicy;
use dev_box_net::events::{EventSource, NetEventKind};
use dev_box_net::guard::{DropReason, Firewall as _, NftFirewall};
use dev_box_net::identity::tap_of;
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

use crate::lab::{Lab, METADATA, PUBLIC, PUBLIC_TOO, Place, SPECIAL, VM_A};
use crate::probe::Probe;

/// For a report that is to come.
const PATIENCE: Duration = Duration::from_secs(60);
/// As many destinations as are remembered.
const SET_SIZE: u32 = 8192;

/// Who listens to VM A's log group.
pub(crate) struct Listener {
    // First, to be dropped before what it is registered with.
    source: EventSource,
    runtime: Runtime,
}

impl Listener {
    pub(crate) fn new(lab: &Lab) -> Self {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let source = lab.within(Place::Host, || {
            let _entered = runtime.enter();
            EventSource::open(VM_A).unwrap()
        });
        Self { source, runtime }
    }

    /// All that is reported until `is_it` has said so of something, or for so long.
    pub(crate) fn until(
        &mut self,
        within: Duration,
        is_it: impl Fn(&NetEventKind) -> bool,
    ) -> Vec<NetEventKind> {
        let mut heard: Vec<NetEventKind> = Vec::new();
        let source = &mut self.source;
        let hears = async {
            while !heard.iter().any(&is_it) {
                heard.extend(source.next().await.unwrap());
            }
        };
        let _ = self.runtime.block_on(async { timeout(within, hears).await });
        heard
    }

    /// The addresses that were reported as new by the time that this one is, which is waited for.
    fn new_until(&mut self, last: Ipv4Addr) -> BTreeSet<IpAddr> {
        let heard = self.until(PATIENCE, |event| new_address(event) == Some(last.into()));
        heard.iter().filter_map(new_address).collect()
    }
}

fn new_address(event: &NetEventKind) -> Option<IpAddr> {
    match event {
        NetEventKind::NewDestination { packet } => packet.destination,
        _ => None,
    }
}

#[test]
fn who_floods_what_is_special_does_not_hide_a_contact_with_metadata() {
    let Some(lab) = Lab::new() else { return };
    lab.guard(&EgressPolicy::NatFiltered);
    let mut listener = Listener::new(&lab);
    lab.within(Place::VmA, || {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        for _ in 0..200 {
            socket.send_to(b"flood", (SPECIAL[1], 53)).unwrap();
        }
        socket.send_to(b"credentials", (METADATA, 80)).unwrap();
    });
    let asked = |event: &NetEventKind| {
        matches!(event, NetEventKind::Dropped { reason: DropReason::Special, packet }
            if packet.destination == Some(METADATA.into()))
    };
    let heard = listener.until(PATIENCE, asked);
    assert!(heard.iter().any(asked), "{heard:?}");
    assert!(heard.len() < 100, "the flood was not reported in full: {}", heard.len());
    let dropped = lab.firewall.traffic().unwrap().remove(&VM_A).unwrap().dropped;
    assert!(dropped[&DropReason::Special].packets > 100, "and is counted in full: {dropped:?}");
}

#[test]
fn a_destination_is_news_once_and_again_when_it_was_forgotten() {
    let Some(lab) = Lab::new() else { return };
    lab.guard(&EgressPolicy::NatFiltered);
    let mut listener = Listener::new(&lab);
    let reaches = |address| assert!(Probe::connect(Place::VmA, address, 443).arrives(&lab), "{address}");
    reaches(PUBLIC);
    assert_eq!(listener.new_until(PUBLIC), BTreeSet::from([PUBLIC.into()]));
    reaches(PUBLIC);
    reaches(PUBLIC_TOO);
    assert_eq!(listener.new_until(PUBLIC_TOO), BTreeSet::from([PUBLIC_TOO.into()]));

    let sound = lab.firewall.inspect(&[VM_A]).unwrap();
    lab.firewall.forget_reached(VM_A, false).unwrap();
    reaches(PUBLIC);
    assert_eq!(listener.new_until(PUBLIC), BTreeSet::from([PUBLIC.into()]));
    // By one that does not wait until nft has ended.
    lab.within(Place::Host, || NftFirewall::default().forget_reached(VM_A, false).unwrap());
    reaches(PUBLIC);
    assert_eq!(listener.new_until(PUBLIC), BTreeSet::from([PUBLIC.into()]));
    assert_eq!(lab.firewall.inspect(&[VM_A]).unwrap(), sound, "its rules are as they were");
    assert!(lab.firewall.forget_reached(VM_A, true).is_err(), "its policy has no IPv6");

    let next = crate::lab::guard("dev-box-b", VM_A, &EgressPolicy::NatFiltered).for_a_new_vm();
    lab.firewall.apply(&next).unwrap();
    reaches(PUBLIC);
    assert_eq!(listener.new_until(PUBLIC), BTreeSet::from([PUBLIC.into()]), "another VM's");
}

#[test]
fn what_finds_no_place_among_the_destinations_is_reported_all_the_same() {
    let Some(lab) = Lab::new() else { return };
    lab.guard(&EgressPolicy::NatFiltered);
    let mut listener = Listener::new(&lab);
    let many: Vec<_> = (0..SET_SIZE).map(|n| format!("11.{}.{}.1 . 80", n / 256, n % 256)).collect();
    let script = format!("add element inet dev_box {}.seen {{ {} }}\n", tap_of(VM_A), many.join(", "));
    let mut nft = Command::new("ip")
        .args(["netns", "exec", &lab.name(Place::Host), "nft", "-f", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    nft.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(nft.wait().unwrap().success());
    for _ in 0..2 {
        assert!(Probe::connect(Place::VmA, PUBLIC, 443).arrives(&lab));
        assert_eq!(listener.new_until(PUBLIC), BTreeSet::from([PUBLIC.into()]));
    }
}
