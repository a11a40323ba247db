//! Ethernet frames made by hand: what a hostile guest sends.

use std::net::Ipv4Addr;

use dev_box_core::spec::MacAddress;
use dev_box_net::identity::mac_of;

use crate::lab::{GATEWAY, PUBLIC, VM_A};

pub(crate) const BROADCAST: MacAddress = MacAddress::new([0xff; 6]);

/// An IPv4 packet in a frame; by default what VM A may send: a SYN to port 443 of a public address.
#[derive(Debug, Clone)]
pub(crate) struct Packet {
    pub(crate) source_mac: MacAddress,
    pub(crate) target_mac: MacAddress,
    pub(crate) source: Ipv4Addr,
    pub(crate) target: Ipv4Addr,
    pub(crate) udp: bool,
    /// 0: one that no other packet has.
    pub(crate) source_port: u16,
    pub(crate) target_port: u16,
    /// TCP's flags: SYN 2, ACK 16.
    pub(crate) flags: u8,
    pub(crate) vlan: Option<u16>,
    /// The word with IP's flags and fragment offset.
    pub(crate) fragment: u16,
    /// Bytes of IP options, a multiple of 4.
    pub(crate) options: Vec<u8>,
}

impl Default for Packet {
    fn default() -> Self {
        Self {
            source_mac: mac_of(VM_A),
            target_mac: mac_of(GATEWAY),
            source: VM_A,
            target: PUBLIC,
            udp: false,
            source_port: 0,
            target_port: 443,
            flags: 2,
            vlan: None,
            fragment: 0,
            options: Vec::new(),
        }
    }
}

impl Packet {
    pub(crate) fn udp(target: Ipv4Addr, port: u16) -> Self {
        Self { udp: true, target, target_port: port, ..Self::default() }
    }

    /// The frame with `payload` behind the transport header.
    pub(crate) fn frame(&self, payload: &[u8]) -> Vec<u8> {
        let mut transport = Vec::new();
        transport.extend(self.source_port.to_be_bytes());
        transport.extend(self.target_port.to_be_bytes());
        if self.udp {
            transport.extend(u16::try_from(8 + payload.len()).unwrap().to_be_bytes());
            transport.extend([0, 0]); // no checksum, RFC 768
        } else {
            transport.extend(7_u32.to_be_bytes());
            transport.extend(if self.flags & 16 == 16 { 1_u32 } else { 0 }.to_be_bytes());
            transport.extend([0x50, self.flags, 0x40, 0, 0, 0, 0, 0]);
        }
        transport.extend(payload);
        if !self.udp {
            let mut pseudo = [self.source.octets(), self.target.octets()].concat();
            pseudo.extend([0, 6]);
            pseudo.extend(u16::try_from(transport.len()).unwrap().to_be_bytes());
            pseudo.extend(&transport);
            let sum = checksum(&pseudo);
            transport[16..18].copy_from_slice(&sum.to_be_bytes());
        }
        let header_words = 5 + self.options.len() / 4;
        let mut ip = vec![0x40 | u8::try_from(header_words).unwrap(), 0];
        ip.extend(u16::try_from(header_words * 4 + transport.len()).unwrap().to_be_bytes());
        ip.extend([0, 1]);
        ip.extend(self.fragment.to_be_bytes());
        ip.extend([64, if self.udp { 17 } else { 6 }, 0, 0]);
        ip.extend(self.source.octets());
        ip.extend(self.target.octets());
        ip.extend(&self.options);
        let sum = checksum(&ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        let mut frame = ethernet(self.target_mac, self.source_mac, self.vlan, 0x0800);
        frame.extend(ip);
        frame.extend(transport);
        frame
    }
}

/// An ARP packet with `payload` behind it, where Ethernet's padding is.
pub(crate) fn arp(
    operation: u8,
    to: MacAddress,
    sender: (MacAddress, Ipv4Addr),
    target: Ipv4Addr,
    payload: &[u8],
) -> Vec<u8> {
    let mut frame = ethernet(to, mac_of(VM_A), None, 0x0806);
    frame.extend([0, 1, 8, 0, 6, 4, 0, operation]);
    frame.extend(sender.0.bytes());
    frame.extend(sender.1.octets());
    frame.extend([0; 6]);
    frame.extend(target.octets());
    frame.extend(payload);
    frame
}

/// Any other protocol.
pub(crate) fn other(target: MacAddress, ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = ethernet(target, mac_of(VM_A), None, ethertype);
    frame.extend(payload);
    frame
}

pub(crate) fn ethernet(target: MacAddress, source: MacAddress, vlan: Option<u16>, ethertype: u16) -> Vec<u8> {
    let mut frame = [target.bytes(), source.bytes()].concat();
    if let Some(vlan) = vlan {
        frame.extend([0x81, 0]);
        frame.extend(vlan.to_be_bytes());
    }
    frame.extend(ethertype.to_be_bytes());
    frame
}

/// RFC 1071.
pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}
