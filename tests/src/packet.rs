//! Frames by hand, byte for byte: what no socket would send, and what a test must know exactly. What both families have is
//! a [`Packet`]'s; the rest is [`Ipv4`]'s and [`Ipv6`]'s own.

mod ipv4;
mod ipv6;
mod vxlan;

use std::{
    fmt::{Debug, Display},
    net::IpAddr,
};

pub use ipv4::Ipv4;
pub use ipv6::Ipv6;
pub use vxlan::Vxlan;

/// EtherType of IPv4.
pub const IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ARP: u16 = 0x0806;
/// EtherType of IPv6.
pub const IPV6: u16 = 0x86dd;
/// IP protocol numbers (IANA).
pub const ICMP: u8 = 1;
/// See [`ICMP`].
pub const TCP: u8 = 6;
/// See [`ICMP`].
pub const UDP: u8 = 17;
/// See [`ICMP`].
pub const ICMPV6: u8 = 58;
/// Extension headers of IPv6 (RFC 8200), numbers of the same kind.
pub const HOP_BY_HOP: u8 = 0;
/// See [`HOP_BY_HOP`].
pub const ROUTING: u8 = 43;
/// See [`HOP_BY_HOP`].
pub const FRAGMENT: u8 = 44;
/// See [`HOP_BY_HOP`].
pub const DESTINATION_OPTIONS: u8 = 60;
/// The flag don't-fragment, in the word of flags and fragment offset of IPv4.
pub const DONT_FRAGMENT: u16 = 0x4000;
/// The flag more-fragments, there too.
pub const MORE_FRAGMENTS: u16 = 0x2000;
/// Length of an Ethernet header, in bytes.
pub const ETHERNET_LEN: usize = 14;

/// A MAC.
pub type Mac = [u8; 6];

/// An IP packet in the making.
pub trait Packet: Clone + Debug {
    /// The family's address.
    type Address: Copy + Debug + Display + PartialEq + Into<IpAddr> + Send + Sync;

    /// EtherType.
    const ETHER_TYPE: u16;
    /// Length of the header without options or extension headers, in bytes.
    const HEADER_LEN: usize;
    /// Number of the family's ICMP.
    const ICMP: u8;
    /// Type of the family's echo request.
    const ECHO: u8;
    /// Whether UDP without a checksum says nothing (RFC 768) or is an error (RFC 8200, section 8.1).
    const NEEDS_CHECKSUM: bool;

    /// A plain packet: no options, 64 hops.
    fn new(source: Self::Address, destination: Self::Address, protocol: u8, payload: Vec<u8>) -> Self;
    /// The bytes of an address.
    fn octets(address: Self::Address) -> Vec<u8>;
    /// What checksums cover besides the segment.
    fn pseudo_header(source: Self::Address, destination: Self::Address, protocol: u8, len: usize) -> Vec<u8>;
    /// What the family's ICMP has of that.
    fn icmp_pseudo_header(source: Self::Address, destination: Self::Address, len: usize) -> Vec<u8>;
    /// The packet.
    fn bytes(&self) -> Vec<u8>;
    /// The packet in pieces of at most `size` payload bytes (a multiple of eight).
    fn fragments(&self, size: usize) -> Vec<Self>;

    /// With this source instead; checksums stay.
    fn from(self, source: Self::Address) -> Self;
    /// With this destination instead; checksums stay.
    fn to(self, destination: Self::Address) -> Self;
    /// With so many hops.
    fn hops(self, hops: u8) -> Self;
    /// With this DSCP and ECN.
    fn class(self, class: u8) -> Self;
    /// With options that mean nothing and make it another header than the usual.
    fn padded(self) -> Self;
    /// What follows the header.
    fn payload(&self) -> &[u8];
    /// The same, to change it.
    fn payload_mut(&mut self) -> &mut Vec<u8>;

    /// With another payload.
    #[must_use]
    fn with(mut self, payload: Vec<u8>) -> Self {
        *self.payload_mut() = payload;
        self
    }

    /// A UDP datagram from and to these ports, its checksum right.
    #[must_use]
    fn udp(source: Self::Address, destination: Self::Address, ports: (u16, u16), data: &[u8]) -> Self {
        let len = 8 + data.len() as u16;
        let mut udp: Vec<u8> =
            [ports.0, ports.1, len, 0].iter().flat_map(|word| word.to_be_bytes()).collect();
        udp.extend(data);
        let sum = checksum(&[Self::pseudo_header(source, destination, UDP, udp.len()), udp.clone()].concat());
        // Zero would say that there is none (RFC 768).
        udp[6..8].copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
        Self::new(source, destination, UDP, udp)
    }

    /// A TCP segment, its checksum right.
    #[must_use]
    fn tcp(
        source: Self::Address,
        destination: Self::Address,
        ports: (u16, u16),
        flags: u8,
        data: &[u8],
    ) -> Self {
        let mut tcp: Vec<u8> = [ports.0, ports.1].iter().flat_map(|port| port.to_be_bytes()).collect();
        tcp.extend(0x0102_0304_u32.to_be_bytes());
        tcp.extend(0x0506_0708_u32.to_be_bytes());
        tcp.extend([5 << 4, flags, 0x20, 0, 0, 0, 0, 0]);
        tcp.extend(data);
        let sum = checksum(&[Self::pseudo_header(source, destination, TCP, tcp.len()), tcp.clone()].concat());
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        Self::new(source, destination, TCP, tcp)
    }

    /// A message of the family's ICMP, its checksum right. `rest` is the word after type, code and checksum.
    #[must_use]
    fn icmp(
        source: Self::Address,
        destination: Self::Address,
        kind: (u8, u8),
        rest: u32,
        data: &[u8],
    ) -> Self {
        let mut icmp = vec![kind.0, kind.1, 0, 0];
        icmp.extend(rest.to_be_bytes());
        icmp.extend(data);
        let sum =
            checksum(&[Self::icmp_pseudo_header(source, destination, icmp.len()), icmp.clone()].concat());
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());
        Self::new(source, destination, Self::ICMP, icmp)
    }
}

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

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    const A: Ipv4Addr = Ipv4Addr::new(192, 168, 0, 1);
    const B: Ipv4Addr = Ipv4Addr::new(192, 168, 0, 199);
    const A6: Ipv6Addr = Ipv6Addr::new(0xfc00, 0, 0, 1, 0, 0, 0, 2);
    const B6: Ipv6Addr = Ipv6Addr::new(0xfc00, 0, 0, 2, 0, 0, 0, 0x1299);

    fn checksums_verify<P: Packet>(a: P::Address, b: P::Address) {
        let sum = |packet: &P, protocol| {
            let len = packet.payload().len();
            checksum(&[&P::pseudo_header(a, b, protocol, len), packet.payload()].concat())
        };
        assert_eq!(sum(&P::udp(a, b, (1000, 2000), b"odd"), UDP), 0);
        assert_eq!(sum(&P::tcp(a, b, (1, 2), 2, b"data"), TCP), 0);
        let echo = P::icmp(a, b, (P::ECHO, 0), 7, b"ping");
        let len = echo.payload().len();
        assert_eq!(checksum(&[&P::icmp_pseudo_header(a, b, len), echo.payload()].concat()), 0);
    }

    #[test]
    fn checksums_verify_in_both_families() {
        checksums_verify::<Ipv4>(A, B);
        checksums_verify::<Ipv6>(A6, B6);
        assert_eq!(checksum(&Ipv4::udp(A, B, (1, 2), b"").bytes()[..20]), 0);
    }

    #[test]
    fn fragments_are_the_packet_in_order() {
        let packet = Ipv4::new(A, B, UDP, (0..100).collect());
        let pieces = packet.fragments(48);
        let shown: Vec<_> = pieces.iter().map(|p| (p.fragment, p.payload.len())).collect();
        assert_eq!(shown, [(MORE_FRAGMENTS, 48), (MORE_FRAGMENTS | 6, 48), (12, 4)]);
        assert_eq!(pieces.iter().flat_map(|piece| piece.payload.clone()).collect::<Vec<_>>(), packet.payload);

        let packet = Ipv6::new(A6, B6, UDP, (0..100).collect());
        let pieces = packet.fragments(48);
        // Next header, and the word of offset and flag (RFC 8200, section 4.5).
        let shown: Vec<_> = pieces.iter().map(|p| p.bytes()[40..44].to_vec()).collect();
        assert_eq!(shown, [vec![17, 0, 0, 1], vec![17, 0, 0, 49], vec![17, 0, 0, 96]]);
        assert_eq!(
            pieces.iter().flat_map(|piece| piece.bytes()[48..].to_vec()).collect::<Vec<_>>(),
            packet.payload
        );
    }

    #[test]
    fn extension_headers_name_each_the_next() {
        let options = vec![
            (HOP_BY_HOP, vec![1, 4, 0, 0, 0, 0]),
            (DESTINATION_OPTIONS, vec![1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ];
        let packet = Ipv6 { extensions: options, ..Ipv6::udp(A6, B6, (1, 2), b"x") }.bytes();
        assert_eq!((packet[6], packet[5]), (HOP_BY_HOP, 8 + 16 + 9));
        assert_eq!(packet[40..42], [DESTINATION_OPTIONS, 0]);
        assert_eq!(packet[48..50], [UDP, 1]);
    }
}
