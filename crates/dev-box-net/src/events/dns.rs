//! Reading DNS messages for the record. A guest writes them: whatever does not parse is said to be unreadable.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use simple_dns::rdata::RData;
use simple_dns::{Packet, Question};

use super::{DnsQuestion, MAX_ANSWERS};

/// Longest name (RFC 1035, 2.3.4).
const MAX_NAME: usize = 255;

/// A message's question, its code, and the addresses it answers; `None` for what is no DNS message with a question.
pub(super) fn read(message: &[u8]) -> Option<(DnsQuestion, u16, Vec<IpAddr>)> {
    let packet = Packet::parse(message).ok()?;
    let question = question(packet.questions.first()?);
    let addresses = packet.answers.iter().filter_map(|answer| match &answer.rdata {
        RData::A(record) => Some(IpAddr::V4(Ipv4Addr::from(record.address))),
        RData::AAAA(record) => Some(IpAddr::V6(Ipv6Addr::from(record.address))),
        _ => None,
    });
    let addresses = addresses.take(MAX_ANSWERS).collect();
    // The low four bits of the second word (RFC 1035, 4.1.1); the library's type has no number for unknown ones.
    let code = u16::from(message.get(3)? & 0x0f);
    Some((question, code, addresses))
}

fn question(question: &Question<'_>) -> DnsQuestion {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let name = question.qname.to_string();
    let name = name.chars().take(MAX_NAME).map(|c| if plain(c) { c.to_ascii_lowercase() } else { '?' });
    let kind: String = format!("{:?}", question.qtype).chars().filter(char::is_ascii_alphanumeric).collect();
    // `TYPE(A)` of the library.
    let kind = kind.strip_prefix("TYPE").unwrap_or(&kind).to_owned();
    DnsQuestion { name: name.collect(), kind }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn query(name: &[&[u8]], kind: u16) -> Vec<u8> {
        let mut message = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name {
            message.push(u8::try_from(label.len()).unwrap());
            message.extend(*label);
        }
        message.push(0);
        message.extend(kind.to_be_bytes());
        message.extend([0, 1]);
        message
    }

    #[test]
    fn a_question_is_read() {
        let (question, code, addresses) = read(&query(&[b"GitHub", b"com"], 1)).unwrap();
        assert_eq!(question, DnsQuestion { name: "github.com".to_owned(), kind: "A".to_owned() });
        assert_eq!((code, addresses), (0, vec![]));
        assert_eq!(read(&query(&[b"a", b"b"], 28)).unwrap().0.kind, "AAAA");
        assert_eq!(read(&query(&[b"a", b"b"], 16)).unwrap().0.kind, "TXT");
    }

    #[test]
    fn what_a_terminal_would_obey_is_not_shown() {
        let (question, ..) = read(&query(&[b"\x1b[2J", b"com"], 1)).unwrap();
        assert!(question.name.bytes().all(|byte| byte.is_ascii_graphic()), "{question:?}");
    }

    #[test]
    fn an_answer_s_addresses_are_read() {
        let mut message = query(&[b"github", b"com"], 1);
        (message[2], message[7]) = (0x81, 2);
        for last in [1, 2] {
            message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 1, 1, 1, last]);
        }
        let (question, code, addresses) = read(&message).unwrap();
        assert_eq!((question.name.as_str(), code), ("github.com", 0));
        assert_eq!(addresses, [Ipv4Addr::new(1, 1, 1, 1), Ipv4Addr::new(1, 1, 1, 2)]);
        message[3] = 3;
        assert_eq!(read(&message).unwrap().1, 3);
    }

    proptest! {
        #[test]
        fn anything_is_read_without_panic(message in prop::collection::vec(any::<u8>(), 0..600)) {
            if let Some((question, ..)) = read(&message) {
                prop_assert!(question.name.len() <= MAX_NAME);
            }
        }

        #[test]
        fn a_spoiled_message_is_read_without_panic(place in 0_usize..40, byte in any::<u8>()) {
            let mut message = query(&[b"github", b"com"], 1);
            (message[2], message[7]) = (0x81, 1);
            message.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 1, 1, 1, 1]);
            if let Some(slot) = message.get_mut(place) {
                *slot = byte;
            }
            let _ = read(&message);
        }
    }
}
