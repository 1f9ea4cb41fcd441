//! VXLAN over UDP over IPv4 (RFC 7348): the 50 bytes in front of an inner IP packet.
//!
//! ```text
//! outer IPv4 20 | UDP 8 | VXLAN 8 | inner Ethernet 14 | inner IPv4 ...
//! ```
//! The outer Ethernet header is not part of it: `bpf_redirect_neigh` writes that one.

use crate::{checksum, ethernet, ipv4};

/// What encapsulation adds to an inner IP packet, in bytes.
pub const ENCAP_LEN: usize = 50;
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
pub struct Outer {
    /// Own VTEP address.
    pub source: [u8; 4],
    /// The peer's VTEP address.
    pub destination: [u8; 4],
    /// DSCP and ECN of the outer header.
    pub tos: u8,
    /// Hops that the outer packet may take.
    pub ttl: u8,
    /// IP identification.
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

impl Outer {
    /// Writes the headers. Don't-fragment is unset and the UDP checksum zero, as RFC 7348 allows over IPv4:
    /// the kernel's device leaves DF unset too, and a checksum would have to cover the whole packet.
    #[inline(always)]
    pub fn write(&self, out: &mut [u8; ENCAP_LEN]) {
        let udp_len = self.inner_len + (UDP_LEN + VXLAN_LEN + ethernet::LEN) as u16;
        let total_len = self.inner_len + ENCAP_LEN as u16;
        let version_and_tos = 0x4500 | u16::from(self.tos);
        let ttl_and_protocol = u16::from(self.ttl) << 8 | u16::from(ipv4::UDP);
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

        out[20..22].copy_from_slice(&self.source_port.to_be_bytes());
        out[22..24].copy_from_slice(&self.port.to_be_bytes());
        out[24..26].copy_from_slice(&udp_len.to_be_bytes());
        out[26..28].copy_from_slice(&[0, 0]);

        out[28..32].copy_from_slice(&FLAG_VNI.to_be_bytes());
        out[32..36].copy_from_slice(&(self.vni << 8).to_be_bytes());

        // Byte by byte, which the compiler merges; as slices the addresses would go through the stack.
        let [p0, p1, p2, p3, p4, p5] = self.peer_mac;
        let [o0, o1, o2, o3, o4, o5] = self.own_mac;
        [out[36], out[37], out[38], out[39], out[40], out[41]] = [p0, p1, p2, p3, p4, p5];
        [out[42], out[43], out[44], out[45], out[46], out[47]] = [o0, o1, o2, o3, o4, o5];
        out[48..50].copy_from_slice(&ethernet::IPV4.to_be_bytes());
    }
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
    u32::from_be_bytes([0, headers[12], headers[13], headers[14]])
}

/// The VNI where the header has the I flag and nothing else, `None` where it says more than we know.
#[inline(always)]
#[must_use]
pub fn vni(headers: &Headers) -> Option<u32> {
    let flags = u32::from_be_bytes([headers[8], headers[9], headers[10], headers[11]]);
    let vni = u32::from_be_bytes([headers[12], headers[13], headers[14], headers[15]]);
    if flags == FLAG_VNI && vni & 0xff == 0 { Some(vni >> 8) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTER: Outer = Outer {
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
