//! Packets of IPv6 with right lengths and checksums, written from the RFCs and without any code of the programs.

use std::net::Ipv6Addr;

use loden_tests::packet::{Ipv6, Packet as _};

/// An IPv6 header in the making.
#[derive(Clone, Copy)]
pub(crate) struct Ip {
    source: Ipv6Addr,
    destination: Ipv6Addr,
    class: u8,
    label: u32,
    hops: u8,
}

impl Ip {
    pub(crate) fn new(source: Ipv6Addr, destination: Ipv6Addr) -> Self {
        Self { source, destination, class: 0, label: 0, hops: 64 }
    }

    pub(crate) fn class(self, class: u8) -> Self {
        Self { class, ..self }
    }

    pub(crate) fn label(self, label: u32) -> Self {
        Self { label, ..self }
    }

    pub(crate) fn hops(self, hops: u8) -> Self {
        Self { hops, ..self }
    }

    /// The packet with a payload of this protocol.
    pub(crate) fn next(self, protocol: u8, payload: &[u8]) -> Vec<u8> {
        let Self { source, destination, class, label, hops } = self;
        let packet = Ipv6::new(source, destination, protocol, payload.to_vec());
        Ipv6 { class, label, hops, ..packet }.bytes()
    }

    pub(crate) fn udp(self, source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
        let mut segment = [source.to_be_bytes(), destination.to_be_bytes()].concat();
        segment.extend((payload.len() as u16 + 8).to_be_bytes());
        segment.extend([0, 0]);
        segment.extend(payload);
        self.summed(17, segment, 6)
    }

    pub(crate) fn tcp(self, source: u16, destination: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut segment = [source.to_be_bytes(), destination.to_be_bytes()].concat();
        segment.extend([0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x50, flags, 0xff, 0, 0, 0, 0, 0]);
        segment.extend(payload);
        self.summed(6, segment, 16)
    }

    pub(crate) fn icmp(self, kind: u8, id: u16, payload: &[u8]) -> Vec<u8> {
        let mut segment = vec![kind, 0, 0, 0];
        segment.extend(id.to_be_bytes());
        segment.extend([0, 1]);
        segment.extend(payload);
        self.summed(58, segment, 2)
    }

    /// Puts the checksum in its place: over the pseudo header of RFC 8200, section 8.1, and the segment.
    fn summed(self, protocol: u8, mut segment: Vec<u8>, at: usize) -> Vec<u8> {
        let mut all = [self.source.octets(), self.destination.octets()].concat();
        all.extend((segment.len() as u32).to_be_bytes());
        all.extend([0, 0, 0, protocol]);
        all.extend(&segment);
        let mut sum: u32 = all
            .chunks(2)
            .map(|word| u32::from(word[0]) << 8 | u32::from(word.get(1).copied().unwrap_or(0)))
            .sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        let sum = match !(sum as u16) {
            0 => 0xffff,
            sum => sum,
        };
        segment[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        self.next(protocol, &segment)
    }
}

pub(crate) fn ethernet(destination: [u8; 6], source: [u8; 6], packet: &[u8]) -> Vec<u8> {
    [&destination[..], &source, &[0x86, 0xdd], packet].concat()
}
