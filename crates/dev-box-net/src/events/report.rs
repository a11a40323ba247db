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
    /// What it says of the VM with this tap; several things, where a segment of TCP has several DNS messages.
    ///
    /// # Errors
    /// [`Unreportable`].
    pub fn events(&self, tap: &str) -> Result<Vec<NetEventKind>, Unreportable> {
        let unreportable = || Unreportable(self.prefix.chars().take(64).collect());
        let what = self.prefix.strip_prefix(tap).and_then(|rest| rest.strip_prefix(' '));
        let mut words = what.ok_or_else(unreportable)?.split_whitespace();
        match (words.next(), words.next()) {
            (Some("drop"), Some(reason)) => {
                let reason = DropReason::ALL.into_iter().find(|known| known.as_str() == reason);
                let reason = reason.ok_or_else(unreportable)?;
                Ok(vec![NetEventKind::Dropped { reason, packet: self.summary() }])
            }
            (Some("new"), None) => Ok(vec![NetEventKind::NewDestination { packet: self.summary() }]),
            (Some("query"), None) => {
                let queries = self.dns(|(question, ..)| NetEventKind::DnsQuery { question });
                queries.ok_or_else(unreportable)
            }
            (Some("answer"), None) => {
                let answers = self.dns(|(question, code, addresses)| NetEventKind::DnsAnswer {
                    question,
                    code,
                    addresses,
                });
                answers.ok_or_else(unreportable)
            }
            _ => Err(unreportable()),
        }
    }

    /// Of each DNS message in it; `None` where there is none.
    fn dns(&self, event: impl FnMut(dns::Message) -> NetEventKind) -> Option<Vec<NetEventKind>> {
        let packet = LaxSlicedPacket::from_ip(&self.payload).ok()?;
        let messages = match packet.transport? {
            TransportSlice::Udp(udp) => dns::read(udp.payload()).into_iter().collect(),
            TransportSlice::Tcp(tcp) => dns::read_segment(tcp.payload()),
            _ => Vec::new(),
        };
        (!messages.is_empty()).then(|| messages.into_iter().map(event).collect())
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
    use etherparse::{PacketBuilder, TcpOptionElement};
    use proptest::prelude::*;

    use super::*;

    const TAP: &str = "dbt0ad50002";

    fn report(what: &str, payload: Vec<u8>) -> Report {
        Report { prefix: format!("{TAP} {what}"), ethertype: Some(IPV4), payload }
    }

    fn only(report: &Report) -> NetEventKind {
        let [event] = <[NetEventKind; 1]>::try_from(report.events(TAP).unwrap()).unwrap();
        event
    }

    fn tcp() -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0, 10, 213, 0, 2, 169, 254, 169, 254];
        packet.extend([0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 2, 4, 0, 0, 0, 0, 0]);
        packet
    }

    #[test]
    fn a_drop_is_read() {
        let NetEventKind::Dropped { reason, packet } = only(&report("drop special", tcp())) else {
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
            let NetEventKind::Dropped { packet, .. } = only(&report) else { panic!("not a drop") };
            assert_eq!(packet.protocol, expected);
        }
    }

    /// A question of `a.b`, in 21 bytes.
    const QUESTION: [u8; 21] = [0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, b'a', 1, b'b', 0, 0, 1, 0, 1];

    #[test]
    fn a_query_is_read() {
        let mut packet = vec![0x45, 0, 0, 49, 0, 1, 0, 0, 64, 17, 0, 0, 10, 213, 0, 2, 10, 213, 0, 1];
        packet.extend([0x9c, 0x40, 0, 53, 0, 29, 0, 0]);
        packet.extend(QUESTION);
        let NetEventKind::DnsQuery { question } = only(&report("query", packet)) else {
            panic!("not a query")
        };
        assert_eq!(question.name, "a.b");
    }

    /// What the resolver sends over TCP, with the options that Linux sets.
    fn segment(payload: &[u8]) -> Vec<u8> {
        let options = [TcpOptionElement::Noop, TcpOptionElement::Noop, TcpOptionElement::Timestamp(1, 2)];
        let builder = PacketBuilder::ipv4([10, 213, 0, 1], [10, 213, 0, 2], 64)
            .tcp(53, 40_000, 7, 1024)
            .ack(9)
            .psh()
            .options(&options)
            .unwrap();
        let mut packet = Vec::with_capacity(builder.size(payload.len()));
        builder.write(&mut packet, payload).unwrap();
        packet
    }

    fn framed(message: &[u8]) -> Vec<u8> {
        [&u16::try_from(message.len()).unwrap().to_be_bytes()[..], message].concat()
    }

    #[test]
    fn dns_over_tcp_is_read() {
        let packet = segment(&framed(&QUESTION));
        // A bare acknowledgement has 52 bytes, 60 with all that a first segment says; the rules report what has more.
        assert_eq!((segment(&[]).len(), packet.len()), (52, 52 + 2 + QUESTION.len()));
        let NetEventKind::DnsQuery { question } = only(&report("query", packet.clone())) else {
            panic!("not a query")
        };
        assert_eq!(question.name, "a.b");
        let NetEventKind::DnsAnswer { question, code, .. } = only(&report("answer", packet)) else {
            panic!("not an answer")
        };
        assert_eq!((question.name.as_str(), code), ("a.b", 0));
        assert!(report("answer", segment(&[])).events(TAP).is_err());
        assert!(report("answer", segment(&[0xff; 300])).events(TAP).is_err());
    }

    #[test]
    fn messages_that_share_a_segment_are_all_read() {
        let packet = segment(&[framed(&QUESTION), framed(&QUESTION), framed(&QUESTION)].concat());
        assert_eq!(report("answer", packet.clone()).events(TAP).unwrap().len(), 3);
        let cut = packet[..packet.len() - 2].to_vec();
        assert_eq!(report("query", cut).events(TAP).unwrap().len(), 3, "a question's class may be cut off");
    }

    #[test]
    fn of_an_answer_that_was_cut_the_question_is_read() {
        let mut answer = QUESTION.to_vec();
        (answer[2], answer[7]) = (0x81, 1);
        answer.extend([0xc0, 12, 0, 16, 0, 1, 0, 0, 0, 60, 3, 0xe8]);
        answer.extend([0; 1000]);
        let mut by_tcp = segment(&framed(&answer));
        let builder = PacketBuilder::ipv4([10, 213, 0, 1], [10, 213, 0, 2], 64).udp(53, 40_000);
        let mut by_udp = Vec::with_capacity(builder.size(answer.len()));
        builder.write(&mut by_udp, &answer).unwrap();
        for packet in [&mut by_tcp, &mut by_udp] {
            packet.truncate(540);
            let NetEventKind::DnsAnswer { question, code, addresses } =
                only(&report("answer", packet.clone()))
            else {
                panic!("not an answer")
            };
            assert_eq!((question.name.as_str(), code, addresses.len()), ("a.b", 0, 0));
        }
    }

    #[test]
    fn strangers_are_refused() {
        for what in ["drop", "drop nonsense", "query", "answer", "old", ""] {
            assert!(report(what, tcp()).events(TAP).is_err(), "{what}");
        }
        assert!(report("new", tcp()).events("dbt0ad50003").is_err());
    }

    proptest! {
        #[test]
        fn any_packet_is_read_without_panic(
            payload in prop::collection::vec(any::<u8>(), 0..200),
            what in prop::sample::select(vec!["drop spoofed", "new", "query", "answer"]),
            ethertype in prop::option::of(any::<u16>()),
        ) {
            let _ = Report { ethertype, ..report(what, payload) }.events(TAP);
        }

        #[test]
        fn a_cut_packet_is_read_without_panic(length in 0_usize..40) {
            let _ = report("new", tcp()[..length].to_vec()).events(TAP);
        }

        #[test]
        fn any_segment_is_read_without_panic(
            payload in prop::collection::vec(any::<u8>(), 0..500),
            cut in 0_usize..600,
        ) {
            let mut packet = segment(&payload);
            packet.truncate(cut);
            for what in ["query", "answer"] {
                let _ = report(what, packet.clone()).events(TAP);
            }
        }
    }
}
