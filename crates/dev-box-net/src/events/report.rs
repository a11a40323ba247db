//! From what a rule reported to what it means. Pure; the packet is a guest's, its first bytes only.

use std::net::IpAddr;

use etherparse::{IpNumber, LaxNetSlice, LaxSlicedPacket, TransportSlice};

use super::{NetEventKind, PacketSummary, dns};
use crate::guard::DropReason;

/// One message of the NFLOG socket.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// The rule's prefix: `dbt0ad50002 drop special`.
    pub prefix: String,
    /// Number of the Ethernet protocol, where the packet had an Ethernet header.
    pub ethertype: Option<u16>,
    /// The packet's first bytes, from the network header.
    pub payload: Vec<u8>,
}

/// A report that is none of ours, or makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a report \"{0}\" of the firewall is not understood")]
pub struct Unreportable(String);

/// Ethernet protocols with a name (IEEE 802 numbers).
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;

impl Report {
    /// What it says of the VM with this tap.
    ///
    /// # Errors
    /// [`Unreportable`].
    pub fn event(&self, tap: &str) -> Result<NetEventKind, Unreportable> {
        let unreportable = || Unreportable(self.prefix.chars().take(64).collect());
        let what = self.prefix.strip_prefix(tap).and_then(|rest| rest.strip_prefix(' '));
        let mut words = what.ok_or_else(unreportable)?.split_whitespace();
        match (words.next(), words.next()) {
            (Some("drop"), Some(reason)) => {
                let reason = DropReason::ALL.into_iter().find(|known| known.as_str() == reason);
                let reason = reason.ok_or_else(unreportable)?;
                Ok(NetEventKind::Dropped { reason, packet: self.summary() })
            }
            (Some("new"), None) => Ok(NetEventKind::NewDestination { packet: self.summary() }),
            (Some("query"), None) => {
                let (question, ..) = self.dns().ok_or_else(unreportable)?;
                Ok(NetEventKind::DnsQuery { question })
            }
            (Some("answer"), None) => {
                let (question, code, addresses) = self.dns().ok_or_else(unreportable)?;
                Ok(NetEventKind::DnsAnswer { question, code, addresses })
            }
            _ => Err(unreportable()),
        }
    }

    fn dns(&self) -> Option<(super::DnsQuestion, u16, Vec<IpAddr>)> {
        let packet = LaxSlicedPacket::from_ip(&self.payload).ok()?;
        match packet.transport? {
            TransportSlice::Udp(udp) => dns::read(udp.payload()),
            _ => None,
        }
    }

    fn summary(&self) -> PacketSummary {
        match self.ethertype {
            None | Some(IPV4 | IPV6) => self.ip_summary(),
            Some(ARP) => PacketSummary { protocol: "arp".to_owned(), ..PacketSummary::default() },
            Some(other) => {
                PacketSummary { protocol: format!("ethernet {other:#06x}"), ..PacketSummary::default() }
            }
        }
    }

    fn ip_summary(&self) -> PacketSummary {
        let mut summary = PacketSummary { protocol: "unreadable".to_owned(), ..PacketSummary::default() };
        let Ok(packet) = LaxSlicedPacket::from_ip(&self.payload) else { return summary };
        match &packet.net {
            Some(LaxNetSlice::Ipv4(ip)) => {
                let header = ip.header();
                summary.source = Some(IpAddr::V4(header.source_addr()));
                summary.destination = Some(IpAddr::V4(header.destination_addr()));
                summary.protocol = protocol(header.protocol());
            }
            Some(LaxNetSlice::Ipv6(ip)) => {
                let header = ip.header();
                summary.source = Some(IpAddr::V6(header.source_addr()));
                summary.destination = Some(IpAddr::V6(header.destination_addr()));
                summary.protocol = protocol(header.next_header());
            }
            _ => {}
        }
        (summary.source_port, summary.destination_port) = match &packet.transport {
            Some(TransportSlice::Tcp(tcp)) => (Some(tcp.source_port()), Some(tcp.destination_port())),
            Some(TransportSlice::Udp(udp)) => (Some(udp.source_port()), Some(udp.destination_port())),
            _ => (None, None),
        };
        summary
    }
}

fn protocol(number: IpNumber) -> String {
    match number {
        IpNumber::ICMP => "icmp".to_owned(),
        IpNumber::TCP => "tcp".to_owned(),
        IpNumber::UDP => "udp".to_owned(),
        IpNumber::IPV6_ICMP => "icmpv6".to_owned(),
        IpNumber(number) => format!("ip {number}"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TAP: &str = "dbt0ad50002";

    fn report(what: &str, payload: Vec<u8>) -> Report {
        Report { prefix: format!("{TAP} {what}"), ethertype: Some(IPV4), payload }
    }

    fn tcp() -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0, 10, 213, 0, 2, 169, 254, 169, 254];
        packet.extend([0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 4, 0, 0, 0, 0, 0]);
        packet
    }

    #[test]
    fn a_drop_is_read() {
        let Ok(NetEventKind::Dropped { reason, packet }) = report("drop special", tcp()).event(TAP) else {
            panic!("not a drop")
        };
        assert_eq!((reason, packet.protocol.as_str()), (DropReason::Special, "tcp"));
        assert_eq!(packet.destination, Some("169.254.169.254".parse().unwrap()));
        assert_eq!((packet.source_port, packet.destination_port), (Some(40_000), Some(80)));
    }

    #[test]
    fn what_is_not_ip_is_named() {
        for (ethertype, expected) in [(ARP, "arp"), (0x8100, "ethernet 0x8100"), (IPV6, "unreadable")] {
            let report = Report { ethertype: Some(ethertype), ..report("drop protocol", vec![]) };
            let Ok(NetEventKind::Dropped { packet, .. }) = report.event(TAP) else { panic!("not a drop") };
            assert_eq!(packet.protocol, expected);
        }
    }

    #[test]
    fn a_query_is_read() {
        let question = [0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, b'a', 1, b'b', 0, 0, 1, 0, 1];
        let mut packet = vec![0x45, 0, 0, 49, 0, 1, 0, 0, 64, 17, 0, 0, 10, 213, 0, 2, 10, 213, 0, 1];
        packet.extend([0x9c, 0x40, 0, 53, 0, 29, 0, 0]);
        packet.extend(question);
        let Ok(NetEventKind::DnsQuery { question }) = report("query", packet).event(TAP) else {
            panic!("not a query")
        };
        assert_eq!(question.name, "a.b");
    }

    #[test]
    fn strangers_are_refused() {
        for what in ["drop", "drop nonsense", "query", "answer", "old", ""] {
            assert!(report(what, tcp()).event(TAP).is_err(), "{what}");
        }
        assert!(report("new", tcp()).event("dbt0ad50003").is_err());
    }

    proptest! {
        #[test]
        fn any_packet_is_read_without_panic(
            payload in prop::collection::vec(any::<u8>(), 0..200),
            what in prop::sample::select(vec!["drop spoofed", "new", "query", "answer"]),
            ethertype in prop::option::of(any::<u16>()),
        ) {
            let _ = Report { ethertype, ..report(what, payload) }.event(TAP);
        }

        #[test]
        fn a_cut_packet_is_read_without_panic(length in 0_usize..40) {
            let _ = report("new", tcp()[..length].to_vec()).event(TAP);
        }
    }
}
