//! IPv4.

use std::net::Ipv4Addr;

use super::{ICMP, IPV4, MORE_FRAGMENTS, Packet, checksum};

/// An IPv4 packet (RFC 791), its checksum right.
#[derive(Clone, Debug)]
pub struct Ipv4 {
    /// Source address.
    pub source: Ipv4Addr,
    /// Destination address.
    pub destination: Ipv4Addr,
    /// DSCP and ECN.
    pub tos: u8,
    /// Identification.
    pub id: u16,
    /// Flags and fragment offset.
    pub fragment: u16,
    /// Hops.
    pub ttl: u8,
    /// Number of the next header.
    pub protocol: u8,
    /// Options, a multiple of four bytes.
    pub options: Vec<u8>,
    /// What follows.
    pub payload: Vec<u8>,
}

impl Packet for Ipv4 {
    type Address = Ipv4Addr;

    const ETHER_TYPE: u16 = IPV4;
    const HEADER_LEN: usize = 20;
    const ICMP: u8 = ICMP;
    const ECHO: u8 = 8;
    const NEEDS_CHECKSUM: bool = false;

    /// Identification 0x4c44; may be fragmented.
    fn new(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, payload: Vec<u8>) -> Self {
        Self {
            source,
            destination,
            tos: 0,
            id: 0x4c44,
            fragment: 0,
            ttl: 64,
            protocol,
            options: Vec::new(),
            payload,
        }
    }

    fn octets(address: Ipv4Addr) -> Vec<u8> {
        address.octets().to_vec()
    }

    fn pseudo_header(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, len: usize) -> Vec<u8> {
        let len = (len as u16).to_be_bytes();
        [&source.octets()[..], &destination.octets(), &[0, protocol], &len].concat()
    }

    fn icmp_pseudo_header(_: Ipv4Addr, _: Ipv4Addr, _: usize) -> Vec<u8> {
        Vec::new()
    }

    fn bytes(&self) -> Vec<u8> {
        let header_len = 20 + self.options.len();
        let mut header = vec![0x40 | (header_len / 4) as u8, self.tos];
        header.extend(((header_len + self.payload.len()) as u16).to_be_bytes());
        header.extend(self.id.to_be_bytes());
        header.extend(self.fragment.to_be_bytes());
        header.extend([self.ttl, self.protocol, 0, 0]);
        header.extend(self.source.octets());
        header.extend(self.destination.octets());
        header.extend(&self.options);
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header.extend(&self.payload);
        header
    }

    fn fragments(&self, size: usize) -> Vec<Self> {
        let last = self.payload.len().div_ceil(size) - 1;
        let piece = |(i, payload): (usize, &[u8])| Self {
            fragment: (i * size / 8) as u16 | if i == last { 0 } else { MORE_FRAGMENTS },
            payload: payload.to_vec(),
            ..self.clone()
        };
        self.payload.chunks(size).enumerate().map(piece).collect()
    }

    fn from(self, source: Ipv4Addr) -> Self {
        Self { source, ..self }
    }

    fn to(self, destination: Ipv4Addr) -> Self {
        Self { destination, ..self }
    }

    fn hops(self, ttl: u8) -> Self {
        Self { ttl, ..self }
    }

    fn class(self, tos: u8) -> Self {
        Self { tos, ..self }
    }

    /// No operation, four times.
    fn padded(self) -> Self {
        Self { options: vec![1; 4], ..self }
    }

    fn payload(&self) -> &[u8] {
        &self.payload
    }

    fn payload_mut(&mut self) -> &mut Vec<u8> {
        &mut self.payload
    }
}
