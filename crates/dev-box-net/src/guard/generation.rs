//! How often the kernel's nftables have changed: as long as that is the same number, so are all rules, whoever made them.

use std::io;

use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::nftables::{GenAttribute, GenMessage, NfTablesMessage};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::Socket;
use netlink_sys::constants::NETLINK_NETFILTER;

/// Buffer for one answer, which is some 60 bytes.
const BUFFER: usize = 4096;

/// The kernel's count of changes in the network namespace of this thread. What packets do (counters, and the sets that
/// they fill) is no change.
pub(super) fn current() -> io::Result<u32> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0);
    let question = NfTablesMessage::GetGen(GenMessage { attributes: Vec::new() });
    let payload = NetlinkPayload::from(NetfilterMessage::new(header, question));
    let mut request = NetlinkMessage::new(NetlinkHeader::default(), payload);
    request.header.flags = NLM_F_REQUEST;
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let mut buffer = vec![0; BUFFER];
    let length = socket.recv(&mut &mut buffer[..], 0)?;
    answer(buffer.get(..length).unwrap_or_default())
}

fn answer(bytes: &[u8]) -> io::Result<u32> {
    let message = NetlinkMessage::<NetfilterMessage>::deserialize(bytes).map_err(io::Error::other)?;
    let attributes = match message.payload {
        NetlinkPayload::InnerMessage(NetfilterMessage {
            inner: NetfilterMessageInner::NfTables(NfTablesMessage::NewGen(message)),
            ..
        }) => message.attributes,
        NetlinkPayload::Error(error) => return Err(error.to_io()),
        _ => return Err(io::ErrorKind::InvalidData.into()),
    };
    let id = attributes.into_iter().find_map(|attribute| match attribute {
        GenAttribute::Id(id) => Some(id),
        _ => None,
    });
    id.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(kind: u16, attributes: &[u8]) -> Vec<u8> {
        let length = u32::try_from(20 + attributes.len()).unwrap();
        let mut bytes = length.to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend([0; 4]);
        bytes.extend(attributes);
        bytes
    }

    fn attribute(kind: u16, value: u32) -> Vec<u8> {
        [&8_u16.to_ne_bytes()[..], &kind.to_ne_bytes(), &value.to_be_bytes()].concat()
    }

    #[test]
    fn the_number_is_found_among_the_attributes() {
        // NFT_MSG_NEWGEN of the nftables subsystem; NFTA_GEN_PROC_PID, NFTA_GEN_ID.
        let whole = message(0x0a0f, &[attribute(2, 99), attribute(1, 1785)].concat());
        assert_eq!(answer(&whole).unwrap(), 1785);
        assert!(answer(&message(0x0a0f, &attribute(2, 99))).is_err(), "no number");
        assert!(answer(&message(0x0a00, &attribute(1, 1785))).is_err(), "another message");
        assert!(answer(&[]).is_err());
    }

    proptest! {
        #[test]
        fn any_answer_is_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = answer(&bytes);
        }
    }
}
