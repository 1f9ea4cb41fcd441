//! Frames by hand, byte for byte: what no socket would send, and what a test must know exactly.

use std::net::Ipv4Addr;

/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ARP: u16 = 0x0806;
/// IP protocol numbers (IANA).
pub const ICMP: u8 = 1;
/// See [`ICMP`].
pub const TCP: u8 = 6;
/// See [`ICMP`].
pub const UDP: u8 = 17;
/// The flag don't-fragment, in the word of flags and fragment offset.
pub const DONT_FRAGMENT: u16 = 0x4000;
/// The flag more-fragments, there too.
pub const MORE_FRAGMENTS: u16 = 0x2000;
/// Length of an Ethernet header, in bytes.
pub const ETHERNET_LEN: usize = 14;
/// Length of the headers from the outer IP header to the inner frame, in bytes.
const VXLAN_LEN: u16 = 20 + 8 + 8;

/// A MAC.
pub type Mac = [u8; 6];

/// The Internet checksum (RFC 1071); an odd last byte counts as the upper half of a word.
#[must_use]
pub fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// An Ethernet II frame.
#[must_use]
pub fn ethernet(destination: Mac, source: Mac, ether_type: u16, payload: &[u8]) -> Vec<u8> {
    [&destination[..], &source, &ether_type.to_be_bytes(), payload].concat()
}

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

impl Ipv4 {
    /// A plain packet: no options, TTL 64, identification 0x4c44, may be fragmented.
    #[must_use]
    pub fn new(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, payload: Vec<u8>) -> Self {
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

    /// A UDP datagram from and to these ports, its checksum right.
    #[must_use]
    pub fn udp(source: Ipv4Addr, destination: Ipv4Addr, ports: (u16, u16), data: &[u8]) -> Self {
        let len = 8 + data.len() as u16;
        let mut udp: Vec<u8> =
            [ports.0, ports.1, len, 0].iter().flat_map(|word| word.to_be_bytes()).collect();
        udp.extend(data);
        let sum = transport_checksum(source, destination, UDP, &udp);
        // Zero would say that there is none (RFC 768).
        udp[6..8].copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
        Self::new(source, destination, UDP, udp)
    }

    /// A TCP segment, its checksum right.
    #[must_use]
    pub fn tcp(source: Ipv4Addr, destination: Ipv4Addr, ports: (u16, u16), flags: u8, data: &[u8]) -> Self {
        let mut tcp: Vec<u8> = [ports.0, ports.1].iter().flat_map(|port| port.to_be_bytes()).collect();
        tcp.extend(0x0102_0304_u32.to_be_bytes());
        tcp.extend(0x0506_0708_u32.to_be_bytes());
        tcp.extend([5 << 4, flags, 0x20, 0, 0, 0, 0, 0]);
        tcp.extend(data);
        let sum = transport_checksum(source, destination, TCP, &tcp);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        Self::new(source, destination, TCP, tcp)
    }

    /// An ICMP message, its checksum right. `rest` is the word after type, code and checksum.
    #[must_use]
    pub fn icmp(source: Ipv4Addr, destination: Ipv4Addr, kind: (u8, u8), rest: u32, data: &[u8]) -> Self {
        let mut icmp = vec![kind.0, kind.1, 0, 0];
        icmp.extend(rest.to_be_bytes());
        icmp.extend(data);
        let sum = checksum(&icmp);
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());
        Self::new(source, destination, ICMP, icmp)
    }

    /// The packet.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
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

    /// The packet in pieces of at most `size` payload bytes (a multiple of eight).
    #[must_use]
    pub fn fragments(&self, size: usize) -> Vec<Self> {
        let last = self.payload.len().div_ceil(size) - 1;
        let piece = |(i, payload): (usize, &[u8])| Self {
            fragment: (i * size / 8) as u16 | if i == last { 0 } else { MORE_FRAGMENTS },
            payload: payload.to_vec(),
            ..self.clone()
        };
        self.payload.chunks(size).enumerate().map(piece).collect()
    }
}

/// The checksum of a TCP segment or UDP datagram whose own field is zero, with the pseudo header (RFC 768, 9293).
fn transport_checksum(source: Ipv4Addr, destination: Ipv4Addr, protocol: u8, segment: &[u8]) -> u16 {
    let len = (segment.len() as u16).to_be_bytes();
    checksum(&[&source.octets()[..], &destination.octets(), &[0, protocol], &len, segment].concat())
}

/// A VXLAN packet (RFC 7348) around a frame, without the outer Ethernet header.
#[derive(Clone, Debug)]
pub struct Vxlan {
    /// The sender's VTEP.
    pub source: Ipv4Addr,
    /// The receiver's VTEP.
    pub destination: Ipv4Addr,
    /// UDP ports.
    pub ports: (u16, u16),
    /// The first four bytes of the VXLAN header; `0x0800_0000` says that there is a VNI.
    pub flags: u32,
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// The inner frame.
    pub frame: Vec<u8>,
}

impl Vxlan {
    /// The outer packet, UDP checksum zero.
    #[must_use]
    pub fn packet(&self) -> Ipv4 {
        let len = VXLAN_LEN - 20 + self.frame.len() as u16;
        let mut udp: Vec<u8> =
            [self.ports.0, self.ports.1, len, 0].iter().flat_map(|word| word.to_be_bytes()).collect();
        udp.extend(self.flags.to_be_bytes());
        udp.extend((self.vni << 8).to_be_bytes());
        udp.extend(&self.frame);
        Ipv4::new(self.source, self.destination, UDP, udp)
    }

    /// The outer packet with a UDP checksum.
    #[must_use]
    pub fn packet_with_checksum(&self) -> Ipv4 {
        let mut packet = self.packet();
        let sum = transport_checksum(self.source, self.destination, UDP, &packet.payload);
        packet.payload[6..8].copy_from_slice(&sum.to_be_bytes());
        packet
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Ipv4Addr = Ipv4Addr::new(192, 168, 0, 1);
    const B: Ipv4Addr = Ipv4Addr::new(192, 168, 0, 199);

    #[test]
    fn checksums_verify() {
        let packet = Ipv4::udp(A, B, (1000, 2000), b"odd");
        let bytes = packet.bytes();
        assert_eq!(checksum(&bytes[..20]), 0);
        assert_eq!(transport_checksum(A, B, UDP, &packet.payload), 0);
        let segment = Ipv4::tcp(A, B, (1, 2), 2, b"data");
        assert_eq!(transport_checksum(A, B, TCP, &segment.payload), 0);
        assert_eq!(checksum(&Ipv4::icmp(A, B, (8, 0), 7, b"ping").payload), 0);
    }

    #[test]
    fn fragments_are_the_packet_in_order() {
        let packet = Ipv4::new(A, B, UDP, (0..100).collect());
        let pieces = packet.fragments(48);
        let shown: Vec<_> = pieces.iter().map(|p| (p.fragment, p.payload.len())).collect();
        assert_eq!(shown, [(MORE_FRAGMENTS, 48), (MORE_FRAGMENTS | 6, 48), (12, 4)]);
        assert_eq!(pieces.concat_payload(), packet.payload);
    }

    trait Concat {
        fn concat_payload(&self) -> Vec<u8>;
    }

    impl Concat for Vec<Ipv4> {
        fn concat_payload(&self) -> Vec<u8> {
            self.iter().flat_map(|piece| piece.payload.clone()).collect()
        }
    }
}
