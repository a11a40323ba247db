//! IPv6 in Ethernet frames made by hand.

use std::net::Ipv6Addr;

use dev_box_core::spec::MacAddress;
use dev_box_net::identity::{ipv6_of, mac_of};

use crate::frame::{checksum, ethernet};
use crate::lab::{GATEWAY, VM_A};

/// What is in a packet.
#[derive(Debug, Clone)]
pub(crate) enum Body {
    /// A datagram to that port.
    Udp(u16),
    /// A message of neighbour discovery (RFC 4861) of that type about that address.
    Discovery(u8, Ipv6Addr),
}

/// An IPv6 packet in a frame; from VM A to its gateway unless told otherwise.
#[derive(Debug, Clone)]
pub(crate) struct Packet6 {
    pub(crate) source_mac: MacAddress,
    pub(crate) target_mac: MacAddress,
    pub(crate) source: Ipv6Addr,
    pub(crate) target: Ipv6Addr,
    /// With a header of destination options in front of the body.
    pub(crate) extension: bool,
    pub(crate) body: Body,
}

impl Packet6 {
    pub(crate) fn new(target: Ipv6Addr, body: Body) -> Self {
        let (source_mac, target_mac) = (mac_of(VM_A), mac_of(GATEWAY));
        Self { source_mac, target_mac, source: ipv6_of(VM_A), target, extension: false, body }
    }

    /// To a group (RFC 2464).
    pub(crate) fn into_group(self) -> Self {
        let [.., a, b, c, d] = self.target.octets();
        Self { target_mac: MacAddress::new([0x33, 0x33, a, b, c, d]), ..self }
    }

    /// The frame with `payload` at its end, from a port that no other packet has.
    pub(crate) fn frame(&self, source_port: u16, payload: &[u8]) -> Vec<u8> {
        let (number, hop_limit, place, mut body) = match self.body {
            Body::Udp(port) => {
                let length = u16::try_from(8 + payload.len()).unwrap();
                let words = [source_port, port, length, 0];
                (17, 64, 6, words.map(u16::to_be_bytes).concat())
            }
            Body::Discovery(kind, about) => {
                (58, 255, 2, [&[kind, 0, 0, 0, 0x20, 0, 0, 0][..], &about.octets()].concat())
            }
        };
        body.extend(payload);
        let mut pseudo = [self.source.octets(), self.target.octets()].concat();
        pseudo.extend(u32::try_from(body.len()).unwrap().to_be_bytes());
        pseudo.extend([0, 0, 0, number]);
        pseudo.extend(&body);
        let sum = checksum(&pseudo);
        body[place..place + 2].copy_from_slice(&sum.to_be_bytes());
        let mut first = number;
        if self.extension {
            // Eight bytes: the next header, no more than these, and padding (RFC 8200, 4.6).
            body = [&[number, 0, 1, 4, 0, 0, 0, 0][..], &body].concat();
            first = 60;
        }
        let mut frame = ethernet(self.target_mac, self.source_mac, None, 0x86dd);
        frame.extend([0x60, 0, 0, 0]);
        frame.extend(u16::try_from(body.len()).unwrap().to_be_bytes());
        frame.extend([first, hop_limit]);
        frame.extend(self.source.octets());
        frame.extend(self.target.octets());
        frame.extend(body);
        frame
    }
}
