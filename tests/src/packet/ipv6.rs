//! IPv6.

use std::net::Ipv6Addr;

use super::{DESTINATION_OPTIONS, FRAGMENT, ICMPV6, IPV6, Packet};

/// An IPv6 packet (RFC 8200).
#[derive(Clone, Debug)]
pub struct Ipv6 {
    /// Source address.
    pub source: Ipv6Addr,
    /// Destination address.
    pub destination: Ipv6Addr,
    /// DSCP and ECN.
    pub class: u8,
    /// Flow label, 20 bits.
    pub label: u32,
    /// Hops.
    pub hops: u8,
    /// Extension headers in order: the number of each, and what follows its first two bytes, from which its length comes:
    /// a multiple of eight bytes less two.
    pub extensions: Vec<(u8, Vec<u8>)>,
    /// Number of the header behind them.
    pub protocol: u8,
    /// What follows.
    pub payload: Vec<u8>,
}

impl Packet for Ipv6 {
    type Address = Ipv6Addr;

    const ETHER_TYPE: u16 = IPV6;
    const HEADER_LEN: usize = 40;
    const ICMP: u8 = ICMPV6;
    const ECHO: u8 = 128;
    const NEEDS_CHECKSUM: bool = true;

    fn new(source: Ipv6Addr, destination: Ipv6Addr, protocol: u8, payload: Vec<u8>) -> Self {
        Self { source, destination, class: 0, label: 0, hops: 64, extensions: Vec::new(), protocol, payload }
    }

    fn octets(address: Ipv6Addr) -> Vec<u8> {
        address.octets().to_vec()
    }

    fn pseudo_header(source: Ipv6Addr, destination: Ipv6Addr, protocol: u8, len: usize) -> Vec<u8> {
        let len = (len as u32).to_be_bytes();
        [&source.octets()[..], &destination.octets(), &len, &[0, 0, 0, protocol]].concat()
    }

    fn icmp_pseudo_header(source: Ipv6Addr, destination: Ipv6Addr, len: usize) -> Vec<u8> {
        Self::pseudo_header(source, destination, ICMPV6, len)
    }

    fn bytes(&self) -> Vec<u8> {
        let (mut next, mut behind) = (self.protocol, self.payload.clone());
        for (number, rest) in self.extensions.iter().rev() {
            // A fragment's second byte is reserved, and no length.
            let units = if *number == FRAGMENT { 0 } else { ((rest.len() + 2) / 8 - 1) as u8 };
            behind = [&[next, units][..], rest, &behind].concat();
            next = *number;
        }
        let first = 6 << 28 | u32::from(self.class) << 20 | self.label;
        let mut packet = first.to_be_bytes().to_vec();
        packet.extend((behind.len() as u16).to_be_bytes());
        packet.extend([next, self.hops]);
        packet.extend(self.source.octets());
        packet.extend(self.destination.octets());
        packet.extend(behind);
        packet
    }

    /// Identification 0x4c44; extension headers stay in front of the fragment's own.
    fn fragments(&self, size: usize) -> Vec<Self> {
        let last = self.payload.len().div_ceil(size) - 1;
        let piece = |(i, payload): (usize, &[u8])| {
            let word = (i * size) as u16 | u16::from(i != last);
            let fragment = [&word.to_be_bytes()[..], &0x4c44_u32.to_be_bytes()].concat();
            let extensions = [self.extensions.clone(), vec![(FRAGMENT, fragment)]].concat();
            Self { extensions, payload: payload.to_vec(), ..self.clone() }
        };
        self.payload.chunks(size).enumerate().map(piece).collect()
    }

    fn from(self, source: Ipv6Addr) -> Self {
        Self { source, ..self }
    }

    fn to(self, destination: Ipv6Addr) -> Self {
        Self { destination, ..self }
    }

    fn hops(self, hops: u8) -> Self {
        Self { hops, ..self }
    }

    fn class(self, class: u8) -> Self {
        Self { class, ..self }
    }

    /// Destination options that are padding alone.
    fn padded(mut self) -> Self {
        self.extensions.push((DESTINATION_OPTIONS, vec![1, 4, 0, 0, 0, 0]));
        self
    }

    fn payload(&self) -> &[u8] {
        &self.payload
    }

    fn payload_mut(&mut self) -> &mut Vec<u8> {
        &mut self.payload
    }
}
