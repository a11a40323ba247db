//! Reading DNS messages for the record. A guest writes them: whatever does not parse is said to be unreadable.
//!
//! A report has a packet's first bytes only, and an answer may be as long as whoever gives it likes. Of one that was cut there is its
//! first question still: what is asked is what a tunnel carries out, and padding is not to hide it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use simple_dns::rdata::RData;
use simple_dns::{Packet, QTYPE, Question};

use super::{DnsQuestion, MAX_ANSWERS};

/// Longest name (RFC 1035, 2.3.4), and part of one.
const MAX_NAME: usize = 255;
const MAX_LABEL: u8 = 63;
/// A message's header; the least that a question takes, and a record: name, type, class, and of a record its lifetime and length.
const HEADER: usize = 12;
const LEAST_QUESTION: usize = 5;
const LEAST_RECORD: usize = 11;

/// A message's question, its code, and the addresses it answers.
pub(super) type Message = (DnsQuestion, u16, Vec<IpAddr>);

/// What a message says; `None` for what is no DNS message with a question. Of one that is cut, or not wholly understood, there are no
/// addresses.
pub(super) fn read(message: &[u8]) -> Option<Message> {
    if !has_room(message) {
        return beginning(message);
    }
    let Ok(packet) = Packet::parse(message) else { return beginning(message) };
    let question = question(packet.questions.first()?);
    let addresses = packet.answers.iter().filter_map(|answer| match &answer.rdata {
        RData::A(record) => Some(IpAddr::V4(Ipv4Addr::from(record.address))),
        RData::AAAA(record) => Some(IpAddr::V6(Ipv6Addr::from(record.address))),
        _ => None,
    });
    let addresses = addresses.take(MAX_ANSWERS).collect();
    Some((question, code(*message.get(3)?), addresses))
}

/// The messages in what a TCP segment carries, each after its length (RFC 1035, 4.2.2); the last may be cut.
pub(super) fn read_segment(segment: &[u8]) -> Vec<Message> {
    let (mut messages, mut rest) = (Vec::new(), segment);
    while let Some((length, after)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length));
        let (message, after) = after.split_at_checked(length).unwrap_or((after, &[]));
        messages.extend(read(message));
        rest = after;
    }
    if messages.is_empty() {
        // The length may have come in a segment of its own.
        messages.extend(read(segment));
    }
    messages
}

/// Whether as much can be in a message as it says: the library makes room for all of that before it looks.
fn has_room(message: &[u8]) -> bool {
    let Some((header, rest)) = message.split_first_chunk::<HEADER>() else { return false };
    let [_, _, _, _, counts @ ..] = header;
    let (counts, _) = counts.as_chunks::<2>();
    let mut counts = counts.iter().map(|count| usize::from(u16::from_be_bytes(*count)));
    let questions = counts.next().unwrap_or_default();
    let records = counts.fold(0, |sum: usize, count| sum.saturating_add(count));
    let least = questions.saturating_mul(LEAST_QUESTION).saturating_add(records.saturating_mul(LEAST_RECORD));
    least <= rest.len()
}

/// As [`read`], of the header and the first question alone.
fn beginning(message: &[u8]) -> Option<Message> {
    let (header, mut rest) = message.split_first_chunk::<HEADER>()?;
    let [_, _, _, flags, high, low, ..] = header;
    // What has another number of questions no server answers; and of what is no message at all, most has.
    if [*high, *low] != [0, 1] {
        return None;
    }
    let mut name = String::new();
    loop {
        let (length, after) = rest.split_first()?;
        // What is more leads to somewhere else in the message, for which a first name has no need.
        let (label, after) = after.split_at_checked(usize::from(*length)).filter(|_| *length <= MAX_LABEL)?;
        rest = after;
        if label.is_empty() {
            break;
        }
        if !name.is_empty() {
            name.push('.');
        }
        // A dot in it is none between two.
        name.extend(label.iter().map(|byte| if *byte == b'.' { '?' } else { shown(char::from(*byte)) }));
        if name.len() > MAX_NAME {
            return None;
        }
    }
    let kind = u16::from_be_bytes(*rest.first_chunk::<2>()?);
    // As RFC 3597 writes types without a name.
    let kind = QTYPE::try_from(kind).map_or_else(|_| format!("TYPE{kind}"), kind_of);
    Some((DnsQuestion { name, kind }, code(*flags), Vec::new()))
}

/// The low four bits of the second word (RFC 1035, 4.1.1); the library's type has no number for unknown ones.
fn code(flags: u8) -> u16 {
    u16::from(flags & 0x0f)
}

fn question(question: &Question<'_>) -> DnsQuestion {
    let name = question.qname.to_string();
    DnsQuestion { name: name.chars().take(MAX_NAME).map(shown).collect(), kind: kind_of(question.qtype) }
}

fn shown(c: char) -> char {
    let plain = c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if plain { c.to_ascii_lowercase() } else { '?' }
}

fn kind_of(kind: QTYPE) -> String {
    let kind: String = format!("{kind:?}").chars().filter(char::is_ascii_alphanumeric).collect();
    // `TYPE(A)` of the library.
    kind.strip_prefix("TYPE").unwrap_or(&kind).to_owned()
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

    /// A long name's answer, as a tunnel pads it: one record of text that is longer than what is reported.
    fn padded() -> Vec<u8> {
        let mut message = query(&[&[b'x'; 60], b"tunnel", b"example"], 16);
        (message[2], message[3], message[7]) = (0x81, 0x83, 1);
        message.extend([0xc0, 12, 0, 16, 0, 1, 0, 0, 0, 60]);
        message.extend(1024_u16.to_be_bytes());
        for _ in 0..4 {
            message.push(255);
            message.extend([b'y'; 255]);
        }
        message
    }

    #[test]
    fn of_a_cut_answer_the_question_and_the_code_are_read() {
        let (whole, name) = (padded(), format!("{}.tunnel.example", "x".repeat(60)));
        let asked = DnsQuestion { name, kind: "TXT".to_owned() };
        assert_eq!(read(&whole).unwrap(), (asked.clone(), 3, vec![]));
        let question = query(&[&[b'x'; 60], b"tunnel", b"example"], 16).len();
        for length in [question, 200, 512, whole.len() - 1] {
            assert_eq!(read(&whole[..length]).unwrap(), (asked.clone(), 3, vec![]), "{length}");
        }
        // The type is known before the class.
        for length in 0..question - 2 {
            assert_eq!(read(&whole[..length]), None, "{length}");
        }
    }

    #[test]
    fn a_type_without_a_name_has_its_number() {
        assert_eq!(read(&query(&[b"a", b"b"], 65_280)).unwrap().0.kind, "TYPE65280");
    }

    #[test]
    fn what_is_cut_is_shown_as_plainly_as_what_is_whole() {
        let name: [&[u8]; 3] = [b"\x1b[2J\xff", b"A.b", b"com"];
        let mut message = query(&name, 1);
        let whole = read(&message).unwrap().0.name;
        message[7] = 9;
        let cut = read(&message).unwrap().0.name;
        assert_eq!(cut, "??2j?.a?b.com");
        for name in [whole, cut] {
            assert!(name.bytes().all(|byte| byte.is_ascii_graphic()), "{name:?}");
        }
    }

    #[test]
    fn a_first_question_that_leads_elsewhere_or_never_ends_is_refused() {
        let mut message = vec![0, 7, 1, 0, 0, 1, 0, 9, 0, 0, 0, 0];
        for name in [&[0xc0, 12, 0, 1, 0, 1][..], &[0x40; 100], &[0xc0; 300], &[63; 600]] {
            let message = [&message[..], name].concat();
            assert_eq!(read(&message), None, "{name:?}");
        }
        message.extend([1, b'a', 0, 0, 1, 0, 1]);
        assert!(read(&message).is_some(), "the control");
        message[5] = 2;
        assert_eq!(read(&message), None, "which of them is answered?");
    }

    #[test]
    fn no_room_is_made_for_what_cannot_be_there() {
        let mut message = query(&[b"a"], 1);
        assert!(has_room(&message));
        for place in [4, 6, 8, 10] {
            let mut message = message.clone();
            message[place] = 0xff;
            assert!(!has_room(&message), "{place}");
        }
        message[7] = 1;
        message.resize(HEADER + LEAST_QUESTION + LEAST_RECORD - 1, 0);
        assert!(!has_room(&message));
        message.push(0);
        assert!(has_room(&message));
    }

    #[test]
    fn the_messages_of_a_segment_are_read_one_after_the_other() {
        let messages = [query(&[b"a"], 1), query(&[b"b"], 28), padded()];
        let framed = |message: &Vec<u8>| {
            let length = u16::try_from(message.len()).unwrap().to_be_bytes();
            [&length[..], message].concat()
        };
        let segment = messages.iter().map(framed).collect::<Vec<_>>().concat();
        let names = |segment: &[u8]| {
            read_segment(segment).into_iter().map(|(question, ..)| question.name).collect::<Vec<_>>()
        };
        let long = format!("{}.tunnel.example", "x".repeat(60));
        assert_eq!(names(&segment), ["a", "b", &long]);
        assert_eq!(names(&segment[..300]), ["a", "b", &long], "cut");
        assert_eq!(names(&segment[..24]), ["a"]);
        assert_eq!(names(&messages[0]), ["a"], "its length came before");
        assert!(names(&[0; 600]).is_empty() && names(&[0xff; 600]).is_empty() && names(&[]).is_empty());
    }

    proptest! {
        #[test]
        fn anything_is_read_without_panic(message in prop::collection::vec(any::<u8>(), 0..600)) {
            if let Some((question, ..)) = read(&message) {
                prop_assert!(question.name.len() <= MAX_NAME);
            }
            prop_assert!(read_segment(&message).len() <= message.len() / (HEADER + LEAST_QUESTION) + 1);
        }

        /// Random bytes have hardly ever one question.
        #[test]
        fn any_first_question_is_read_without_panic_and_plainly(
            rest in prop::collection::vec(prop_oneof![0_u8..8, any::<u8>()], 0..600),
            counts in prop::array::uniform6(any::<u8>()),
        ) {
            let message = [&[0, 7, 0x81, 0x83, 0, 1][..], &counts, &rest].concat();
            for found in [read(&message), beginning(&message)] {
                let Some((question, code, _)) = found else { continue };
                prop_assert!(question.name.len() <= MAX_NAME && question.kind.len() <= 16, "{:?}", question);
                prop_assert!(question.name.bytes().all(|byte| byte.is_ascii_graphic()), "{:?}", question);
                prop_assert_eq!(code, 3);
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
