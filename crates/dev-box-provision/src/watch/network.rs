//! What the guard reports of VMs' packets: to the observer and the metrics. (The audit has it from the provisioner.)

use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dev_box_core::id::VmName;
use dev_box_net::events::{NetEvent, NetEventKind};
use dev_box_net::guard::DropReason;
use dev_box_observe::anomaly::Observation;
use dev_box_observe::metrics::{NET_GUARD_LOST, NET_HOST_CHANGED, OBSERVATIONS_LOST};
use tokio::sync::broadcast;

use super::{Shared, Watched, whole};

/// The response code of a name that does not exist (RFC 1035, 4.1.1).
const NXDOMAIN: u16 = 3;

/// For how long a kernel tries to open a connection that nobody answers: six times, each twice as long after the last.
const TRIES: Duration = Duration::from_secs(130);
/// How many connections are remembered.
const CONNECTIONS: usize = 1024;

pub(super) async fn listen(shared: Arc<Shared>, mut events: broadcast::Receiver<NetEvent>) {
    let mut tries = Tries::default();
    loop {
        match events.recv().await {
            Ok(event) if tries.again(&event, Instant::now()) => {}
            Ok(event) => take(&shared, &event),
            Err(broadcast::error::RecvError::Lagged(missed)) => OBSERVATIONS_LOST.add(missed, &[]),
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

/// Tells a dropped connection's first packet from those by which the guest's kernel tries again: they would make one contact
/// many, and a regular beacon irregular. Counted from the first, so that a guest that always comes from one port is still heard.
#[derive(Debug, Default)]
struct Tries(VecDeque<(Instant, VmName, [Option<u16>; 2], IpAddr)>);

impl Tries {
    fn again(&mut self, event: &NetEvent, now: Instant) -> bool {
        let NetEventKind::Dropped { packet, .. } = &event.what else { return false };
        let Some(destination) = packet.destination.filter(|_| packet.protocol == "tcp") else { return false };
        let ports = [packet.source_port, packet.destination_port];
        while self.0.front().is_some_and(|(first, ..)| now.saturating_duration_since(*first) >= TRIES) {
            self.0.pop_front();
        }
        let known = |(_, vm, of, to): &(_, VmName, [Option<u16>; 2], IpAddr)| {
            *vm == event.vm && *of == ports && *to == destination
        };
        if self.0.iter().any(known) {
            return true;
        }
        if self.0.len() == CONNECTIONS {
            self.0.pop_front();
        }
        self.0.push_back((now, event.vm.clone(), ports, destination));
        false
    }
}

fn take(shared: &Shared, event: &NetEvent) {
    let own = whole(&shared.vms).get(&event.vm).map(Watched::addresses).unwrap_or_default();
    if let Some(observation) = observed(&event.what, &own) {
        shared.parts.observer.see(event.vm.as_str(), observation);
    }
    match &event.what {
        NetEventKind::Tampered { .. } => NET_GUARD_LOST.add(1, &[]),
        NetEventKind::HostChanged { .. } => NET_HOST_CHANGED.add(1, &[]),
        NetEventKind::Lost { reports } => OBSERVATIONS_LOST.add(*reports, &[]),
        _ => {}
    }
}

/// What there is to judge: what the VM with these addresses did, not what was done to it.
fn observed(what: &NetEventKind, own: &[IpAddr]) -> Option<Observation> {
    match what {
        // That an answer of the gateway's resolver came when nobody waited for it any more: kernels say so by themselves.
        NetEventKind::Dropped { reason: DropReason::Gateway, packet } if packet.protocol == "icmp" => None,
        NetEventKind::Dropped { packet, .. } => {
            let address = packet.destination.filter(|destination| !own.contains(destination))?;
            Some(Observation::Dropped { address, port: packet.destination_port })
        }
        // The gateway's resolver: the one private address that the guard lets a VM reach.
        NetEventKind::NewDestination { packet } if packet.destination_port == Some(53) => None,
        NetEventKind::NewDestination { packet } => {
            Some(Observation::Connected { address: packet.destination?, port: packet.destination_port })
        }
        // Each question once, when its answer says whether there is such a name.
        NetEventKind::DnsAnswer { question, code, .. } => {
            Some(Observation::Query { name: question.name.clone(), nxdomain: *code == NXDOMAIN })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use dev_box_core::clock::EasternTime;
    use dev_box_net::events::{DnsQuestion, PacketSummary};

    use super::*;

    fn packet(destination: impl Into<IpAddr>, port: u16) -> PacketSummary {
        PacketSummary {
            protocol: "tcp".to_owned(),
            destination: Some(destination.into()),
            destination_port: Some(port),
            ..PacketSummary::default()
        }
    }

    #[test]
    fn a_connection_that_is_tried_again_is_one_contact() {
        let event = |source_port, protocol: &str| NetEvent {
            at: EasternTime::from_unix_nanos(0),
            vm: "dev-box-1".parse().unwrap(),
            what: NetEventKind::Dropped {
                reason: DropReason::Port,
                packet: PacketSummary {
                    protocol: protocol.to_owned(),
                    source_port: Some(source_port),
                    ..packet([45, 33, 130, 20], 8443)
                },
            },
        };
        let (mut tries, start) = (Tries::default(), Instant::now());
        let mut again =
            |port, protocol, after| tries.again(&event(port, protocol), start + Duration::from_secs(after));
        assert!(!again(40_000, "tcp", 0));
        for after in [1, 3, 7, 15, 31, 63] {
            assert!(again(40_000, "tcp", after), "{after}");
        }
        assert!(!again(40_001, "tcp", 64), "another connection");
        assert!(!again(5_353, "udp", 65) && !again(5_353, "udp", 66), "a datagram is sent once");
        // From one port for ever: heard, though not each time.
        assert!(!again(40_000, "tcp", 131));
        for port in 0..2_000 {
            assert!(!again(port, "tcp", 140));
        }
        assert_eq!(tries.0.len(), CONNECTIONS);
    }

    #[test]
    fn what_is_done_to_a_vm_is_not_held_against_it() {
        let own = [IpAddr::from([10, 0, 0, 2]), "fddb::2".parse().unwrap()];
        let to = |destination: IpAddr| NetEventKind::Dropped {
            reason: DropReason::Special,
            packet: packet(destination, 80),
        };
        let metadata = to(IpAddr::from([169, 254, 169, 254]));
        let expected = Observation::Dropped { address: IpAddr::from([169, 254, 169, 254]), port: Some(80) };
        assert_eq!(observed(&metadata, &own), Some(expected));
        assert_eq!(observed(&to(IpAddr::from([10, 0, 0, 2])), &own), None);
        assert_eq!(observed(&to(own[1]), &own), None);
    }

    #[test]
    fn asking_the_resolver_is_no_private_contact() {
        let reached = |port| NetEventKind::NewDestination { packet: packet([10, 213, 0, 1], port) };
        assert_eq!(observed(&reached(53), &[]), None);
        assert!(observed(&reached(443), &[]).is_some());
        let dropped = |protocol: &str| NetEventKind::Dropped {
            reason: DropReason::Gateway,
            packet: PacketSummary { protocol: protocol.to_owned(), ..packet([10, 213, 0, 1], 22) },
        };
        assert_eq!(observed(&dropped("icmp"), &[]), None, "it did not wait for the answer");
        assert!(observed(&dropped("tcp"), &[]).is_some());
    }

    #[test]
    fn names_are_judged_when_they_are_answered() {
        let question = DnsQuestion { name: "a.example".to_owned(), kind: "A".to_owned() };
        let query = NetEventKind::DnsQuery { question: question.clone() };
        let answer =
            |code| NetEventKind::DnsAnswer { question: question.clone(), code, addresses: Vec::new() };
        assert_eq!(observed(&query, &[]), None);
        for (code, missing) in [(0, false), (3, true)] {
            let expected = Observation::Query { name: "a.example".to_owned(), nxdomain: missing };
            assert_eq!(observed(&answer(code), &[]), Some(expected));
        }
        assert_eq!(observed(&NetEventKind::Restored, &[]), None);
    }
}
