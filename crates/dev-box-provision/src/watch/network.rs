//! What the guard reports of VMs' packets: to the observer and the metrics. (The audit has it from the provisioner.)

use std::net::IpAddr;
use std::sync::Arc;

use dev_box_net::events::{NetEvent, NetEventKind};
use dev_box_net::guard::DropReason;
use dev_box_observe::anomaly::Observation;
use dev_box_observe::metrics::{NET_GUARD_LOST, OBSERVATIONS_LOST};
use tokio::sync::broadcast;

use super::{Shared, whole};

/// The response code of a name that does not exist (RFC 1035, 4.1.1).
const NXDOMAIN: u16 = 3;

pub(super) async fn listen(shared: Arc<Shared>, mut events: broadcast::Receiver<NetEvent>) {
    loop {
        match events.recv().await {
            Ok(event) => take(&shared, &event),
            Err(broadcast::error::RecvError::Lagged(missed)) => OBSERVATIONS_LOST.add(missed, &[]),
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

fn take(shared: &Shared, event: &NetEvent) {
    let own = whole(&shared.vms).get(&event.vm).and_then(|vm| vm.address).map(IpAddr::V4);
    if let Some(observation) = observed(&event.what, own) {
        shared.parts.observer.see(event.vm.as_str(), observation);
    }
    match &event.what {
        NetEventKind::Tampered { .. } => NET_GUARD_LOST.add(1, &[]),
        NetEventKind::Lost { reports } => OBSERVATIONS_LOST.add(*reports, &[]),
        _ => {}
    }
}

/// What there is to judge: what the VM with this address did, not what was done to it.
fn observed(what: &NetEventKind, own: Option<IpAddr>) -> Option<Observation> {
    match what {
        // That an answer of the gateway's resolver came when nobody waited for it any more: kernels say so by themselves.
        NetEventKind::Dropped { reason: DropReason::Gateway, packet } if packet.protocol == "icmp" => None,
        NetEventKind::Dropped { packet, .. } => {
            let address = packet.destination.filter(|destination| Some(*destination) != own)?;
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
    use dev_box_net::events::{DnsQuestion, PacketSummary};

    use super::*;

    fn packet(destination: [u8; 4], port: u16) -> PacketSummary {
        PacketSummary {
            protocol: "tcp".to_owned(),
            destination: Some(IpAddr::from(destination)),
            destination_port: Some(port),
            ..PacketSummary::default()
        }
    }

    #[test]
    fn what_is_done_to_a_vm_is_not_held_against_it() {
        let own = Some(IpAddr::from([10, 0, 0, 2]));
        let to = |destination| NetEventKind::Dropped {
            reason: DropReason::Special,
            packet: packet(destination, 80),
        };
        let metadata = to([169, 254, 169, 254]);
        let expected = Observation::Dropped { address: IpAddr::from([169, 254, 169, 254]), port: Some(80) };
        assert_eq!(observed(&metadata, own), Some(expected));
        assert_eq!(observed(&to([10, 0, 0, 2]), own), None);
    }

    #[test]
    fn asking_the_resolver_is_no_private_contact() {
        let reached = |port| NetEventKind::NewDestination { packet: packet([10, 213, 0, 1], port) };
        assert_eq!(observed(&reached(53), None), None);
        assert!(observed(&reached(443), None).is_some());
        let dropped = |protocol: &str| NetEventKind::Dropped {
            reason: DropReason::Gateway,
            packet: PacketSummary { protocol: protocol.to_owned(), ..packet([10, 213, 0, 1], 22) },
        };
        assert_eq!(observed(&dropped("icmp"), None), None, "it did not wait for the answer");
        assert!(observed(&dropped("tcp"), None).is_some());
    }

    #[test]
    fn names_are_judged_when_they_are_answered() {
        let question = DnsQuestion { name: "a.example".to_owned(), kind: "A".to_owned() };
        let query = NetEventKind::DnsQuery { question: question.clone() };
        let answer =
            |code| NetEventKind::DnsAnswer { question: question.clone(), code, addresses: Vec::new() };
        assert_eq!(observed(&query, None), None);
        for (code, missing) in [(0, false), (3, true)] {
            let expected = Observation::Query { name: "a.example".to_owned(), nxdomain: missing };
            assert_eq!(observed(&answer(code), None), Some(expected));
        }
        assert_eq!(observed(&NetEventKind::Restored, None), None);
    }
}
