//! VXLAN over UDP (RFC 7348): the 50 or 70 bytes in front of an inner IP packet.
//!
//! ```text
//! outer IPv4 20 | UDP 8 | VXLAN 8 | inner Ethernet 14 | inner IPv4 ...
//! outer IPv6 40 | UDP 8 | VXLAN 8 | inner Ethernet 14 | inner IPv6 ...
//! ```
//! The outer Ethernet header is not part of it: `bpf_redirect_neigh` writes that one.

use crate::{checksum, ethernet, ipv4, ipv6, transport};

/// What encapsulation adds to an inner IPv4 packet, in bytes.
pub const ENCAP_LEN: usize = 50;
/// What encapsulation adds to an inner IPv6 packet, in bytes.
pub const ENCAP_LEN_V6: usize = 70;
/// UDP port that Linux uses unless told otherwise, and flannel with it (IANA's is 4789).
pub const DEFAULT_PORT: u16 = 8472;
/// Length of a UDP header, in bytes.
const UDP_LEN: usize = 8;
/// Length of a VXLAN header, in bytes.
const VXLAN_LEN: usize = 8;
/// The I flag alone: a VNI, and no extension (GBP, GPE) that would need the kernel.
const FLAG_VNI: u32 = 0x0800_0000;

/// Outer headers of one packet.
#[derive(Clone, Copy, Debug)]
pub struct Outer<A = [u8; 4]> {
    /// Own VTEP address.
    pub source: A,
    /// The peer's VTEP address.
    pub destination: A,
    /// DSCP and ECN of the outer header.
    pub tos: u8,
    /// Hops that the outer packet may take.
    pub ttl: u8,
    /// IP identification; IPv6 has none.
    pub id: u16,
    /// UDP source port: see [`source_port`].
    pub source_port: u16,
    /// UDP destination port.
    pub port: u16,
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// MAC of the peer's VXLAN device.
    pub peer_mac: [u8; 6],
    /// MAC of the own VXLAN device.
    pub own_mac: [u8; 6],
    /// Length of the inner IP packet; for a GSO packet that of the whole (segmentation corrects each piece).
    pub inner_len: u16,
}

impl Outer<[u8; 4]> {
    /// Writes the headers. Don't-fragment is unset and the UDP checksum zero, as RFC 7348 allows over IPv4:
    /// the kernel's device leaves DF unset too, and a checksum would have to cover the whole packet.
    #[inline(always)]
    pub fn write(&self, out: &mut [u8; ENCAP_LEN]) {
        let total_len = self.inner_len + ENCAP_LEN as u16;
        let version_and_tos = 0x4500 | u16::from(self.tos);
        let ttl_and_protocol = u16::from(self.ttl) << 8 | u16::from(transport::UDP);
        let sum = u32::from(version_and_tos)
            + u32::from(total_len)
            + u32::from(self.id)
            + u32::from(ttl_and_protocol)
            + checksum::words(u32::from_be_bytes(self.source))
            + checksum::words(u32::from_be_bytes(self.destination));

        out[0..2].copy_from_slice(&version_and_tos.to_be_bytes());
        out[2..4].copy_from_slice(&total_len.to_be_bytes());
        out[4..6].copy_from_slice(&self.id.to_be_bytes());
        out[6..8].copy_from_slice(&[0, 0]);
        out[8..10].copy_from_slice(&ttl_and_protocol.to_be_bytes());
        out[10..12].copy_from_slice(&checksum::finish(sum).to_be_bytes());
        out[12..16].copy_from_slice(&self.source);
        out[16..20].copy_from_slice(&self.destination);
        self.write_behind_ip::<20, ENCAP_LEN>(out, ethernet::IPV4);
    }
}

impl Outer<ipv6::Address> {
    /// Writes the headers: no flow label, as the kernel's device sends none unless told to, and a UDP checksum, without
    /// which the peer's kernel would drop the packet: see [`checksum_v6`] for what must be true of the inner packet.
    #[inline(always)]
    pub fn write(&self, out: &mut [u8; ENCAP_LEN_V6], inner: &ipv6::Header) {
        let payload_len = self.inner_len + (ENCAP_LEN_V6 - ipv6::LEN) as u16;
        let version_and_class = 0x6000_0000 | u32::from(self.tos) << 20;
        out[0..4].copy_from_slice(&version_and_class.to_be_bytes());
        out[4..6].copy_from_slice(&payload_len.to_be_bytes());
        out[6..8].copy_from_slice(&[transport::UDP, self.ttl]);
        // In words, since what lies on the programs' stack must be aligned.
        let [a, b, c, d] = [self.source[0], self.source[1], self.destination[0], self.destination[1]];
        out[8..16].copy_from_slice(&a.to_ne_bytes());
        out[16..24].copy_from_slice(&b.to_ne_bytes());
        out[24..32].copy_from_slice(&c.to_ne_bytes());
        out[32..40].copy_from_slice(&d.to_ne_bytes());
        self.write_behind_ip::<{ ipv6::LEN }, ENCAP_LEN_V6>(out, ethernet::IPV6);
        let sum = match checksum_v6(out, inner) {
            // Zero would say that there is none.
            0 => 0xffff,
            sum => sum,
        };
        out[46..48].copy_from_slice(&sum.to_ne_bytes());
    }
}

impl<A> Outer<A> {
    /// UDP without a checksum, VXLAN and Ethernet, from offset `AT` on.
    #[inline(always)]
    fn write_behind_ip<const AT: usize, const LEN: usize>(&self, out: &mut [u8; LEN], ether_type: u16) {
        let udp_len = self.inner_len + (UDP_LEN + VXLAN_LEN + ethernet::LEN) as u16;
        out[AT..AT + 2].copy_from_slice(&self.source_port.to_be_bytes());
        out[AT + 2..AT + 4].copy_from_slice(&self.port.to_be_bytes());
        out[AT + 4..AT + 6].copy_from_slice(&udp_len.to_be_bytes());
        out[AT + 6..AT + 8].copy_from_slice(&[0, 0]);

        out[AT + 8..AT + 12].copy_from_slice(&FLAG_VNI.to_be_bytes());
        out[AT + 12..AT + 16].copy_from_slice(&(self.vni << 8).to_be_bytes());

        let ((peer, peers_rest), (own, owns_rest)) =
            (ethernet::parts(&self.peer_mac), ethernet::parts(&self.own_mac));
        out[AT + 16..AT + 20].copy_from_slice(&peer.to_ne_bytes());
        out[AT + 20..AT + 22].copy_from_slice(&peers_rest.to_ne_bytes());
        out[AT + 22..AT + 26].copy_from_slice(&own.to_ne_bytes());
        out[AT + 26..AT + 28].copy_from_slice(&owns_rest.to_ne_bytes());
        out[AT + 28..AT + 30].copy_from_slice(&ether_type.to_be_bytes());
    }
}

/// Sum of the 32-bit words from `FROM` up to `TO`, in memory order.
#[inline(always)]
fn sum_of_words<const FROM: usize, const TO: usize, const LEN: usize>(headers: &[u8; LEN]) -> u64 {
    let (mut sum, mut at) = (0, FROM);
    while at < TO {
        sum +=
            u64::from(u32::from_ne_bytes([headers[at], headers[at + 1], headers[at + 2], headers[at + 3]]));
        at += 4;
    }
    sum
}

/// The checksum of what has this sum.
#[inline(always)]
fn finish(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    checksum::finish((sum >> 32) as u32 + checksum::words(sum as u32))
}

/// The outer UDP checksum of an encapsulated IPv6 packet, as its two bytes stand in memory: what belongs into the field
/// where that is zero, and zero where the field is right.
///
/// The payload is not looked at. If the checksum of the inner TCP, UDP or ICMPv6 header is right, or is going to be when
/// it is filled in, that header and all behind it sum to the complement of the inner pseudo header, whose addresses and
/// length stand in the inner IP header as well: what is left of both is the first four bytes, and the hop limit. (Local
/// checksum offload, Documentation/networking/checksum-offloads.rst.) Where an inner checksum is wrong, so is this one,
/// and a peer's kernel drops the packet a layer earlier.
#[inline(always)]
#[must_use]
pub fn checksum_v6(headers: &[u8; ENCAP_LEN_V6], inner: &ipv6::Header) -> u16 {
    // Sums of words in memory order: but for their byte order they are right (RFC 1071, section 2).
    let mut sum = u64::from(u16::from_ne_bytes([headers[68], headers[69]]));
    sum += sum_of_words::<8, 68, _>(headers);
    // The outer pseudo header's length and protocol.
    sum += u64::from(u16::from_ne_bytes([headers[44], headers[45]]));
    sum += u64::from(u16::from(transport::UDP).to_be());
    // The inner header less its pseudo header: the length cancels, the protocol leaves the hop limit.
    sum += u64::from(u32::from_ne_bytes([inner[0], inner[1], inner[2], inner[3]]));
    sum += u64::from(u16::from_ne_bytes([inner[6], inner[7]]));
    sum += u64::from(!u16::from(inner[6]).to_be());
    finish(sum)
}

/// Whether the outer UDP checksum of an encapsulated IPv4 packet follows from the headers: as in [`checksum_v6`], it then is
/// right if the checksum of the inner transport header is. `headers` are all in front of the inner packet, which has no
/// options, a right header checksum and all of its payload.
#[inline(always)]
#[must_use]
pub fn has_right_checksum(headers: &[u8; ENCAP_LEN], inner: &ipv4::Header) -> bool {
    // In memory order, as there: the outer addresses, UDP, VXLAN and Ethernet.
    let mut sum = u64::from(u16::from_ne_bytes([headers[48], headers[49]]));
    sum += sum_of_words::<12, 48, _>(headers);
    // The outer pseudo header's length and protocol.
    sum += u64::from(u16::from_ne_bytes([headers[24], headers[25]]));
    sum += u64::from(u16::from(transport::UDP).to_be());
    // The inner header sums to zero; what is behind it, to zero, or with a pseudo header to the complement of that one.
    if ipv4::protocol(inner) != transport::ICMP {
        let word = |at: usize| u32::from_ne_bytes([inner[at], inner[at + 1], inner[at + 2], inner[at + 3]]);
        sum += u64::from(!word(12)) + u64::from(!word(16));
        sum += u64::from(!u16::from(ipv4::protocol(inner)).to_be());
        sum += u64::from(!(ipv4::total_len(inner).wrapping_sub(ipv4::LEN as u16)).to_be());
    }
    finish(sum) == 0
}

/// The UDP source port that Linux picks for a flow hash (`udp_flow_src_port`, with the range of
/// `net.ipv4.ip_local_port_range`), so that ECMP and RSS see a flow alike on the fast and the slow path.
#[inline(always)]
#[must_use]
pub fn source_port(hash: u32, min: u16, max: u16) -> u16 {
    let hash = hash ^ (hash << 16);
    let span = u64::from(max - min);
    ((u64::from(hash) * span) >> 32) as u16 + min
}

/// UDP and VXLAN headers as they stand in a received packet.
pub type Headers = [u8; UDP_LEN + VXLAN_LEN];

/// The `n`-th four bytes of UDP and VXLAN headers.
#[inline(always)]
const fn word(headers: &Headers, n: usize) -> u32 {
    u32::from_be_bytes(headers.as_chunks().0[n])
}

/// UDP destination port, host order.
#[inline(always)]
#[must_use]
pub fn port(udp: &[u8; UDP_LEN]) -> u16 {
    u16::from_be_bytes([udp[2], udp[3]])
}

/// UDP checksum field as it stands; zero says that there is none.
#[inline(always)]
#[must_use]
pub fn udp_checksum(headers: &Headers) -> u16 {
    u16::from_be_bytes([headers[6], headers[7]])
}

/// UDP length, header included, in bytes.
#[inline(always)]
#[must_use]
pub fn udp_len(headers: &Headers) -> u16 {
    u16::from_be_bytes([headers[4], headers[5]])
}

/// The VNI's 24 bits, whatever the flags say of them: whose the packet is, before what we make of it.
#[inline(always)]
#[must_use]
pub fn vni_field(headers: &Headers) -> u32 {
    word(headers, 3) >> 8
}

/// The VNI where the header has the I flag and nothing else, `None` where it says more than we know.
#[inline(always)]
#[must_use]
pub fn vni(headers: &Headers) -> Option<u32> {
    let (flags, vni) = (word(headers, 2), word(headers, 3));
    if flags == FLAG_VNI && vni & 0xff == 0 { Some(vni >> 8) } else { None }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OUTER: Outer<[u8; 4]> = Outer {
        source: [192, 168, 77, 11],
        destination: [192, 168, 77, 12],
        tos: 2,
        ttl: 64,
        id: 0xbeef,
        source_port: 40000,
        port: DEFAULT_PORT,
        vni: 1,
        peer_mac: [2, 0, 0, 0, 0, 0x12],
        own_mac: [2, 0, 0, 0, 0, 0x11],
        inner_len: 84,
    };

    #[test]
    fn headers_are_the_bytes_of_the_rfcs() {
        let mut out = [0xaa; ENCAP_LEN];
        OUTER.write(&mut out);
        #[rustfmt::skip]
        let expected = [
            0x45, 0x02, 0x00, 0x86, 0xbe, 0xef, 0x00, 0x00, 0x40, 0x11, 0xa0, 0x0d,
            192, 168, 77, 11, 192, 168, 77, 12,
            0x9c, 0x40, 0x21, 0x18, 0x00, 0x72, 0x00, 0x00,
            0x08, 0, 0, 0, 0, 0, 1, 0,
            2, 0, 0, 0, 0, 0x12, 2, 0, 0, 0, 0, 0x11, 0x08, 0x00,
        ];
        assert_eq!(out, expected);
        let sum: u32 = out[..20].chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum();
        assert_eq!(checksum::finish(sum), 0, "the checksum covers the header");
    }

    #[test]
    fn what_is_written_is_understood() {
        let mut out = [0; ENCAP_LEN];
        Outer { vni: 0x00ab_cdef, ..OUTER }.write(&mut out);
        let headers = out[20..36].try_into().unwrap();
        assert_eq!(vni(&headers), Some(0x00ab_cdef));
        assert_eq!(port(out[20..28].try_into().unwrap()), DEFAULT_PORT);
        assert_eq!(vni_field(&headers), 0x00ab_cdef);
        assert_eq!(udp_checksum(&headers), 0);
        assert_eq!(usize::from(udp_len(&headers)), usize::from(OUTER.inner_len) + ENCAP_LEN - 20);
    }

    #[test]
    fn extensions_and_reserved_bits_are_left_to_the_kernel() {
        let mut out = [0; ENCAP_LEN];
        OUTER.write(&mut out);
        let headers: Headers = out[20..36].try_into().unwrap();
        for (byte, value) in [(8, 0x88), (8, 0x00), (9, 1), (11, 4), (15, 1)] {
            let mut other = headers;
            other[byte] = value;
            assert_eq!(vni(&other), None, "byte {byte} = {value:#x}");
            assert_eq!(vni_field(&other), OUTER.vni);
        }
    }

    const OUTER_V6: Outer<ipv6::Address> = Outer {
        source: [0xfd_u64.to_le(), 0x11_u64.to_be()],
        destination: [0xfd_u64.to_le(), 0x12_u64.to_be()],
        tos: OUTER.tos,
        ttl: OUTER.ttl,
        id: OUTER.id,
        source_port: OUTER.source_port,
        port: OUTER.port,
        vni: OUTER.vni,
        peer_mac: OUTER.peer_mac,
        own_mac: OUTER.own_mac,
        inner_len: OUTER.inner_len,
    };

    /// The sum of everything, the long way.
    fn full(words: &[u8]) -> u16 {
        let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        let sum: u64 = words.chunks(2).map(|pair| u64::from(word(pair))).sum();
        checksum::finish((sum >> 32) as u32 + checksum::words(sum as u32))
    }

    fn pseudo_header(addresses: &[u8], len: usize, protocol: u8) -> Vec<u8> {
        [addresses, &(len as u32).to_be_bytes(), &[0, 0, 0, protocol]].concat()
    }

    /// An IPv6 packet with a payload of these bytes behind a UDP header, its checksum right.
    fn packet_v6(payload: &[u8], class_and_label: u32, hops: u8) -> Vec<u8> {
        let len = 8 + payload.len();
        let mut packet = (0x6000_0000u32 | class_and_label).to_be_bytes().to_vec();
        packet.extend((len as u16).to_be_bytes());
        packet.extend([transport::UDP, hops]);
        packet.extend((0..32).map(|i| 0xf0 ^ (i * 7)));
        packet.extend([0x13, 0x88, 0, 53]);
        packet.extend((len as u16).to_be_bytes());
        packet.extend([0, 0]);
        packet.extend(payload);
        let sum = full(&[&pseudo_header(&packet[8..40], len, transport::UDP), &packet[40..]].concat());
        packet[46..48].copy_from_slice(&sum.to_be_bytes());
        packet
    }

    proptest! {
        #[test]
        fn the_outer_checksum_of_ipv6_covers_what_it_never_looked_at(
            payload in prop::collection::vec(any::<u8>(), 0..200),
            class_and_label in 0u32..1 << 28,
            hops in any::<u8>(),
            source_port in any::<u16>(),
        ) {
            let inner = packet_v6(&payload, class_and_label, hops);
            let header = inner[..ipv6::LEN].try_into().unwrap();
            let mut out = [0; ENCAP_LEN_V6];
            Outer { inner_len: inner.len() as u16, source_port, ..OUTER_V6 }.write(&mut out, header);
            prop_assert_ne!(&out[46..48], &[0, 0]);
            let udp = [&out[ipv6::LEN..], &inner].concat();
            let whole = [&pseudo_header(&out[8..40], udp.len(), transport::UDP)[..], &udp].concat();
            prop_assert_eq!(full(&whole), 0);
            prop_assert_eq!(checksum_v6(&out, header), 0, "the receiver comes to the same");
        }

        #[test]
        fn one_changed_byte_of_the_headers_is_noticed(at in 8..ENCAP_LEN_V6 + 8, bits in 1u8..) {
            let inner = packet_v6(b"payload", 0, 64);
            let mut header: ipv6::Header = inner[..ipv6::LEN].try_into().unwrap();
            let mut out = [0; ENCAP_LEN_V6];
            Outer { inner_len: inner.len() as u16, ..OUTER_V6 }.write(&mut out, &header);
            match at.checked_sub(ENCAP_LEN_V6) {
                None => out[at] ^= bits,
                // The inner length is compared with the outer ones, the protocol cancels itself.
                Some(4..=6) => return Ok(()),
                Some(at) => header[at] ^= bits,
            }
            prop_assert_ne!(checksum_v6(&out, &header), 0);
        }
    }

    /// An IPv4 packet with a payload of these bytes behind a UDP or an ICMP header, its checksums right.
    fn packet_v4(payload: &[u8], is_icmp: bool) -> Vec<u8> {
        let (protocol, len) = (if is_icmp { transport::ICMP } else { transport::UDP }, 8 + payload.len());
        let mut packet = vec![0x45, 0x20];
        packet.extend((20 + len as u16).to_be_bytes());
        packet.extend([7, 9, 0x40, 0, 61, protocol, 0, 0, 10, 5, 1, 2, 10, 5, 2, 3]);
        let sum = full(&packet);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet.extend(if is_icmp { [8, 0, 0, 0] } else { [0x13, 0x88, 0, 53] });
        packet.extend((len as u16).to_be_bytes());
        packet.extend([0, 0]);
        packet.extend(payload);
        if is_icmp {
            let sum = full(&packet[20..]);
            packet[22..24].copy_from_slice(&sum.to_be_bytes());
        } else {
            let pseudo = pseudo_header(&packet[12..20], len, protocol);
            let sum = full(&[&pseudo, &packet[20..]].concat());
            packet[26..28].copy_from_slice(&sum.to_be_bytes());
        }
        packet
    }

    /// Headers in front of an IPv4 packet, with the UDP checksum that covers it all.
    fn summed(inner: &[u8]) -> [u8; ENCAP_LEN] {
        let mut out = [0; ENCAP_LEN];
        Outer { inner_len: inner.len() as u16, ..OUTER }.write(&mut out);
        let udp = [&out[20..], inner].concat();
        let sum = full(&[&pseudo_header(&out[12..20], udp.len(), transport::UDP)[..], &udp].concat());
        out[26..28].copy_from_slice(&sum.to_be_bytes());
        out
    }

    proptest! {
        #[test]
        fn a_right_outer_checksum_of_ipv4_is_known_by_the_headers(
            payload in prop::collection::vec(any::<u8>(), 0..200),
            is_icmp in any::<bool>(),
        ) {
            let inner = packet_v4(&payload, is_icmp);
            prop_assert!(has_right_checksum(&summed(&inner), inner[..20].try_into().unwrap()));
        }

        #[test]
        fn one_changed_byte_of_ipv4_headers_is_noticed(at in 12..ENCAP_LEN, bits in 1u8.., is_icmp in any::<bool>()) {
            let inner = packet_v4(b"payload", is_icmp);
            let mut out = summed(&inner);
            out[at] ^= bits;
            prop_assert!(!has_right_checksum(&out, inner[..20].try_into().unwrap()));
        }
    }

    #[test]
    fn the_headers_of_ipv6_are_the_bytes_of_the_rfcs() {
        let inner = packet_v6(b"", 0, 64);
        let mut out = [0xaa; ENCAP_LEN_V6];
        OUTER_V6.write(&mut out, inner[..ipv6::LEN].try_into().unwrap());
        assert_eq!(out[..8], [0x60, 0x20, 0, 0, 0, 114, 17, 64]);
        assert_eq!((out[8], out[23], out[24], out[39]), (0xfd, 0x11, 0xfd, 0x12));
        let mut expected = [0; ENCAP_LEN];
        OUTER.write(&mut expected);
        assert_eq!(out[40..46], expected[20..26], "UDP but for the checksum");
        assert_eq!(out[48..68], expected[28..48], "VXLAN and MACs");
        assert_eq!(out[68..], [0x86, 0xdd]);
    }

    #[test]
    fn source_ports_stay_in_the_range_and_spread_over_it() {
        let (min, max) = (32768, 60999);
        let ports: std::collections::BTreeSet<u16> =
            (0..10_000u32).map(|i| source_port(i.wrapping_mul(0x9e37_79b9), min, max)).collect();
        assert!(ports.iter().all(|p| (min..max).contains(p)));
        assert!(ports.len() > 8_000, "{} of 10000 differ", ports.len());
        assert_eq!(source_port(0, min, max), min);
        assert_eq!(source_port(7, 5000, 5000), 5000, "a range of one port");
    }
}
