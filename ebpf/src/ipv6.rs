//! IPv6 headers (RFC 8200), and the chain of extension headers as far as the fast path must look through it.

use crate::ecn::CE;

/// Length of the fixed header, in bytes.
pub const LEN: usize = 40;
/// Numbers of extension headers (IANA): hop-by-hop options, routing, destination options, fragment, authentication.
pub const HOP_BY_HOP: u8 = 0;
/// See [`HOP_BY_HOP`].
pub const ROUTING: u8 = 43;
/// See [`HOP_BY_HOP`].
pub const FRAGMENT: u8 = 44;
/// See [`HOP_BY_HOP`].
pub const AUTHENTICATION: u8 = 51;
/// See [`HOP_BY_HOP`].
pub const DESTINATION_OPTIONS: u8 = 60;
/// Mobility, host identity and shim6: walked like options.
const MOBILITY: u8 = 135;
const HOST_IDENTITY: u8 = 139;
const SHIM6: u8 = 140;

/// A header as it stands in the packet.
pub type Header = [u8; LEN];

/// An address as its 16 bytes stand in memory, in two words. Network order: only compared, masked and copied.
pub type Address = [u64; 2];

/// Version 6 and no extension header.
#[inline(always)]
#[must_use]
pub fn is_plain(header: &Header) -> bool {
    is_version(header) && !is_extension(next_header(header))
}

/// Version 6.
#[inline(always)]
#[must_use]
pub fn is_version(header: &Header) -> bool {
    header[0] >> 4 == 6
}

/// Whether a header of this number stands between the fixed header and the transport, and [`extension`] can read it.
#[inline(always)]
#[must_use]
pub fn is_extension(number: u8) -> bool {
    matches!(
        number,
        HOP_BY_HOP
            | ROUTING
            | FRAGMENT
            | AUTHENTICATION
            | DESTINATION_OPTIONS
            | MOBILITY
            | HOST_IDENTITY
            | SHIM6
    )
}

/// Traffic class: DSCP and ECN.
#[inline(always)]
#[must_use]
pub fn traffic_class(header: &Header) -> u8 {
    header[0] << 4 | header[1] >> 4
}

/// Flow label, 20 bits.
#[inline(always)]
#[must_use]
pub fn flow_label(header: &Header) -> u32 {
    u32::from_be_bytes([0, header[1] & 0xf, header[2], header[3]])
}

/// Bytes behind the fixed header; 0 also for a jumbogram.
#[inline(always)]
#[must_use]
pub fn payload_len(header: &Header) -> u16 {
    u16::from_be_bytes([header[4], header[5]])
}

/// Number of the next header.
#[inline(always)]
#[must_use]
pub fn next_header(header: &Header) -> u8 {
    header[6]
}

/// Hops that are left.
#[inline(always)]
#[must_use]
pub fn hop_limit(header: &Header) -> u8 {
    header[7]
}

/// Source address.
#[inline(always)]
#[must_use]
pub fn source(header: &Header) -> Address {
    address(header, 8)
}

/// Destination address.
#[inline(always)]
#[must_use]
pub fn destination(header: &Header) -> Address {
    address(header, 24)
}

#[inline(always)]
fn address(header: &Header, at: usize) -> Address {
    [word(header, at), word(header, at + 8)]
}

/// The eight bytes at an offset. Byte by byte, which the compiler merges; as a slice copy it would be a call.
#[inline(always)]
fn word<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    u64::from_ne_bytes([
        bytes[at],
        bytes[at + 1],
        bytes[at + 2],
        bytes[at + 3],
        bytes[at + 4],
        bytes[at + 5],
        bytes[at + 6],
        bytes[at + 7],
    ])
}

/// The address from its bytes.
#[inline(always)]
#[must_use]
pub fn words(octets: &[u8; 16]) -> Address {
    [word(octets, 0), word(octets, 8)]
}

/// The bytes of an address.
#[inline(always)]
#[must_use]
pub fn octets(address: Address) -> [u8; 16] {
    let [[a, b, c, d, e, f, g, h], [i, j, k, l, m, n, o, p]] = address.map(u64::to_ne_bytes);
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
}

/// An address in the four words that the kernel's helpers take; network order.
#[inline(always)]
#[must_use]
pub fn quarters([high, low]: Address) -> [u32; 4] {
    let halves = |word: u64| {
        let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
        [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])]
    };
    let ([a, b], [c, d]) = (halves(high), halves(low));
    [a, b, c, d]
}

/// Whether hosts take packets to an address without having it: a group's (ff00::/8, RFC 4291), or none.
#[inline(always)]
#[must_use]
pub fn is_for_many(address: Address) -> bool {
    address[0].to_ne_bytes()[0] == 0xff || address[0] | address[1] == 0
}

/// Takes one hop off, as a router does. The hop limit must be above 1. No checksum covers it.
#[inline(always)]
pub fn decrement_hop_limit(header: &mut Header) {
    header[7] = header[7].wrapping_sub(1);
}

/// Sets the ECN field (0 to 3).
#[inline(always)]
pub fn set_ecn(header: &mut Header, ecn: u8) {
    header[1] = header[1] & !(CE << 4) | ecn << 4;
}

/// What the first eight bytes of an extension header say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Number of the header behind it.
    pub next: u8,
    /// Its length, in bytes: 8 to 2048.
    pub len: usize,
    /// A fragment that does not hold what follows.
    pub is_later_fragment: bool,
}

/// Reads an extension header of this number; `None` for what is none.
#[inline(always)]
#[must_use]
pub fn extension(number: u8, header: &[u8; 8]) -> Option<Extension> {
    let units = usize::from(header[1]);
    let (len, is_later_fragment) = match number {
        FRAGMENT => (8, u16::from_be_bytes([header[2], header[3]]) & 0xfff8 != 0),
        // In words of four bytes, two of them not counted (RFC 4302).
        AUTHENTICATION => ((units + 2) * 4, false),
        _ if is_extension(number) => ((units + 1) * 8, false),
        _ => return None,
    };
    Some(Extension { next: header[0], len, is_later_fragment })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        let mut header = [0; LEN];
        header[..8].copy_from_slice(&[0x6b, 0x91, 0x23, 0x45, 0x05, 0x14, 6, 64]);
        header[8..24].copy_from_slice(&std::net::Ipv6Addr::new(0xfc00, 0, 0, 1, 0, 0, 0, 2).octets());
        header[24..].copy_from_slice(&std::net::Ipv6Addr::new(0xfc00, 0, 0, 2, 0, 0, 0, 9).octets());
        header
    }

    #[test]
    fn fields_stand_where_the_rfc_puts_them() {
        let header = header();
        assert!(is_plain(&header));
        assert_eq!((traffic_class(&header), flow_label(&header)), (0xb9, 0x12345));
        assert_eq!((payload_len(&header), next_header(&header), hop_limit(&header)), (0x514, 6, 64));
        let words = |address: std::net::Ipv6Addr| u128::from(address).to_be_bytes();
        for (found, expected) in [
            (source(&header), std::net::Ipv6Addr::new(0xfc00, 0, 0, 1, 0, 0, 0, 2)),
            (destination(&header), std::net::Ipv6Addr::new(0xfc00, 0, 0, 2, 0, 0, 0, 9)),
        ] {
            assert_eq!(found.map(u64::to_ne_bytes).concat(), words(expected));
        }
    }

    #[test]
    fn a_hop_and_ecn_change_nothing_beside_them() {
        let mut changed = header();
        decrement_hop_limit(&mut changed);
        set_ecn(&mut changed, 2);
        let mut expected = header();
        (expected[1], expected[7]) = (0xa1, 63);
        assert_eq!(changed, expected);
        assert_eq!(traffic_class(&changed), 0xba);
    }

    #[test]
    fn extension_headers_are_no_plain_packet() {
        for number in 0..=255 {
            let mut header = header();
            header[6] = number;
            let is_extension = [0, 43, 44, 51, 60, 135, 139, 140].contains(&number);
            assert_eq!(is_plain(&header), !is_extension, "{number}");
            assert_eq!(extension(number, &[17; 8]).is_some(), is_extension, "{number}");
        }
        let mut header = header();
        header[0] = 0x4b;
        assert!(!is_plain(&header), "another version");
    }

    #[test]
    fn lengths_of_extension_headers_are_counted_as_each_counts() {
        let len = |number, header: [u8; 8]| extension(number, &header).map(|found| (found.next, found.len));
        assert_eq!(len(HOP_BY_HOP, [17, 0, 5, 2, 0, 0, 1, 0]), Some((17, 8)));
        assert_eq!(len(DESTINATION_OPTIONS, [44, 255, 0, 0, 0, 0, 0, 0]), Some((44, 2048)));
        assert_eq!(len(AUTHENTICATION, [17, 4, 0, 0, 0, 0, 0, 1]), Some((17, 24)));
        assert_eq!(len(FRAGMENT, [17, 99, 0, 1, 0, 0, 0, 7]), Some((17, 8)), "reserved, not a length");
        assert!(!extension(FRAGMENT, &[17, 0, 0, 1, 0, 0, 0, 7]).unwrap().is_later_fragment, "the first");
        assert!(extension(FRAGMENT, &[17, 0, 0, 8, 0, 0, 0, 7]).unwrap().is_later_fragment);
    }
}
