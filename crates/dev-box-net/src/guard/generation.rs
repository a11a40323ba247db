//! How often the kernel's nftables have changed: as long as that is the same number, so are all rules, whoever made them. And
//! when a change of a program's takes effect.
//!
//! Closing a netlink socket of netfilter's waits until all that was replaced lately is freed: those here are kept while there
//! is something to do meanwhile.

use std::io;
use std::process::Child;

use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::nftables::{GenAttribute, GenMessage, NfTablesMessage};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::Socket;
use netlink_sys::constants::NETLINK_NETFILTER;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// Buffer for one datagram: an answer is some 60 bytes; of the others the beginning will do.
const BUFFER: usize = 4096;
/// The group that hears of changes (`NFNLGRP_NFTABLES`).
const CHANGES_GROUP: u32 = 7;

fn socket() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    Ok(socket)
}

/// The kernel's count of changes in the network namespace of the thread that opens it. What packets do (counters, and the sets
/// that they fill) is no change.
pub(super) struct Counter(Socket);

impl Counter {
    pub(super) fn open() -> io::Result<Self> {
        socket().map(Self)
    }

    pub(super) fn current(&self) -> io::Result<u32> {
        let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0);
        let question = NfTablesMessage::GetGen(GenMessage { attributes: Vec::new() });
        let payload = NetlinkPayload::from(NetfilterMessage::new(header, question));
        let mut request = NetlinkMessage::new(NetlinkHeader::default(), payload);
        request.header.flags = NLM_F_REQUEST;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.0.send(&bytes, 0)?;
        let mut buffer = vec![0; BUFFER];
        let length = self.0.recv(&mut &mut buffer[..], 0)?;
        count(buffer.get(..length).unwrap_or_default())
    }
}

fn count(answer: &[u8]) -> io::Result<u32> {
    number(&attributes(answer)?).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

fn number(attributes: &[GenAttribute]) -> Option<u32> {
    attributes.iter().find_map(|attribute| match attribute {
        GenAttribute::Id(id) => Some(*id),
        _ => None,
    })
}

/// Hears of changes, in the network namespace of the thread that listens.
pub(super) struct Changes(Socket);

impl Changes {
    pub(super) fn listen() -> io::Result<Self> {
        let socket = socket()?;
        // What is lost is waited for in vain, until the process ends.
        socket.set_no_enobufs(true)?;
        socket.set_non_blocking(true)?;
        socket.add_membership(CHANGES_GROUP)?;
        Ok(Self(socket))
    }

    /// What the kernel's count is with a change of the process's, once that took effect; `None` when it ended or complained before
    /// that was heard. In another PID namespace than the kernel's first it is never heard.
    pub(super) fn wait_for(&self, process: &Child) -> Option<u32> {
        let complaints = process.stderr.as_ref()?;
        let mut buffer = vec![0; BUFFER];
        loop {
            let mut ready = [PollFd::new(&self.0, PollFlags::IN), PollFd::new(complaints, PollFlags::IN)];
            match poll(&mut ready, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return None,
            }
            let [heard, ended] = ready.map(|handle| !handle.revents().is_empty());
            if heard {
                match self.0.recv(&mut &mut buffer[..], 0) {
                    Ok(length) => match change_by(buffer.get(..length).unwrap_or_default(), process.id()) {
                        None => continue,
                        count => return count,
                    },
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) => return None,
                }
            }
            if ended {
                return None;
            }
        }
    }
}

/// The kernel's count with a change of that process's, where this tells that it is in force: the kernel says so in a datagram of its
/// own, after all that was changed.
fn change_by(bytes: &[u8], process: u32) -> Option<u32> {
    let attributes = attributes(bytes).ok()?;
    attributes.contains(&GenAttribute::ProcPid(process)).then(|| number(&attributes))?
}

/// What a `NFT_MSG_NEWGEN` says.
fn attributes(bytes: &[u8]) -> io::Result<Vec<GenAttribute>> {
    let message = NetlinkMessage::<NetfilterMessage>::deserialize(bytes).map_err(io::Error::other)?;
    match message.payload {
        NetlinkPayload::InnerMessage(NetfilterMessage {
            inner: NetfilterMessageInner::NfTables(NfTablesMessage::NewGen(message)),
            ..
        }) => Ok(message.attributes),
        NetlinkPayload::Error(error) => Err(error.to_io()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
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
        assert_eq!(count(&whole).unwrap(), 1785);
        assert!(count(&message(0x0a0f, &attribute(2, 99))).is_err(), "no number");
        assert!(count(&message(0x0a00, &attribute(1, 1785))).is_err(), "another message");
        assert!(count(&[]).is_err());
    }

    #[test]
    fn a_change_is_told_by_whose_it_is() {
        let of_99 = [attribute(1, 1785), attribute(2, 99)].concat();
        assert_eq!(change_by(&message(0x0a0f, &of_99), 99), Some(1785));
        assert_eq!(change_by(&message(0x0a0f, &of_99), 98), None);
        assert_eq!(change_by(&message(0x0a0f, &attribute(1, 99)), 99), None, "a number");
        assert_eq!(change_by(&message(0x0a06, &of_99), 99), None, "a rule that comes before");
    }

    proptest! {
        #[test]
        fn any_answer_is_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = (count(&bytes), change_by(&bytes, 1));
        }
    }
}
