//! IPv4 headers (RFC 791) of 20 bytes, and what the fast path reads of the next header.

use crate::checksum;

/// Length of a header without options, in bytes.
pub const LEN: usize = 20;
/// Protocol numbers (IANA).
pub const ICMP: u8 = 1;
/// See [`ICMP`].
pub const TCP: u8 = 6;
/// See [`ICMP`].
pub const UDP: u8 = 17;
/// ECN codepoints (RFC 3168): the transport knows ECN.
pub const ECT_0: u8 = 2;
/// See [`ECT_0`].
pub const ECT_1: u8 = 1;
/// ECN codepoint: congestion experienced (RFC 3168).
pub const CE: u8 = 3;

const MORE_FRAGMENTS_AND_OFFSET: u16 = 0x3fff;
const OFFSET: u16 = 0x1fff;

/// A header as it stands in the packet.
pub type Header = [u8; LEN];

/// Version 4 and no options.
#[inline(always)]
#[must_use]
pub fn is_plain(header: &Header) -> bool {
    header[0] == 0x45
}

/// Length of the header with its options, in bytes; a hostile header may say 0 to 60.
#[inline(always)]
#[must_use]
pub fn header_len(header: &Header) -> usize {
    usize::from(header[0] & 0xf) * 4
}

/// DSCP and ECN.
#[inline(always)]
#[must_use]
pub fn tos(header: &Header) -> u8 {
    header[1]
}

/// Length of the packet, in bytes.
#[inline(always)]
#[must_use]
pub fn total_len(header: &Header) -> u16 {
    u16::from_be_bytes([header[2], header[3]])
}

/// A fragment, first, last or between.
#[inline(always)]
#[must_use]
pub fn is_fragment(header: &Header) -> bool {
    u16::from_be_bytes([header[6], header[7]]) & MORE_FRAGMENTS_AND_OFFSET != 0
}

/// A fragment that does not hold the next header.
#[inline(always)]
#[must_use]
pub fn is_later_fragment(header: &Header) -> bool {
    u16::from_be_bytes([header[6], header[7]]) & OFFSET != 0
}

/// Hops that are left.
#[inline(always)]
#[must_use]
pub fn ttl(header: &Header) -> u8 {
    header[8]
}

/// Number of the next header.
#[inline(always)]
#[must_use]
pub fn protocol(header: &Header) -> u8 {
    header[9]
}

/// Source address, host order.
#[inline(always)]
#[must_use]
pub fn source(header: &Header) -> u32 {
    u32::from_be_bytes([header[12], header[13], header[14], header[15]])
}

/// Whether hosts take packets to an address (host order) without having it: a group's (224.0.0.0/4, RFC 5771), everybody's
/// (255.255.255.255), or none, which stands for everybody, too.
#[inline(always)]
#[must_use]
pub fn is_for_many(address: u32) -> bool {
    address >> 28 == 0xe || address == u32::MAX || address == 0
}

/// Destination address, host order.
#[inline(always)]
#[must_use]
pub fn destination(header: &Header) -> u32 {
    u32::from_be_bytes([header[16], header[17], header[18], header[19]])
}

/// Whether the checksum covers the header as it stands (RFC 1071).
#[inline(always)]
#[must_use]
pub fn has_right_checksum(header: &Header) -> bool {
    checksum::covers(header)
}

/// Takes one hop off, as a router does, and keeps the checksum right. The TTL must be above 1.
#[inline(always)]
pub fn decrement_ttl(header: &mut Header) {
    let old = u16::from_be_bytes([header[8], header[9]]);
    replace_word(header, 8, old, old.wrapping_sub(0x0100));
}

/// Sets the ECN field (0 to 3) and keeps the checksum right.
#[inline(always)]
pub fn set_ecn(header: &mut Header, ecn: u8) {
    let old = u16::from_be_bytes([header[0], header[1]]);
    replace_word(header, 0, old, old & !u16::from(CE) | u16::from(ecn));
}

#[inline(always)]
fn replace_word(header: &mut Header, at: usize, old: u16, new: u16) {
    let sum = checksum::update(u16::from_be_bytes([header[10], header[11]]), old, new);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header[at..at + 2].copy_from_slice(&new.to_be_bytes());
}

/// What became of the inner packet's ECN field when the outer header came off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ecn {
    /// Stays as it is.
    Keep,
    /// Becomes this.
    Set(u8),
    /// The packet does not know ECN and met congestion: it must be dropped.
    Drop,
}

/// Merges the ECN fields on decapsulation, as Linux does (`INET_ECN_decapsulate`, after RFC 6040, section 4.2; that
/// ECT(1) outside turns ECT(0) inside into ECT(1) since 5.11).
#[inline(always)]
#[must_use]
pub fn decapsulate_ecn(outer_tos: u8, inner_tos: u8) -> Ecn {
    match (outer_tos & CE, inner_tos & CE) {
        (CE, 0) => Ecn::Drop,
        (CE, _) => Ecn::Set(CE),
        (ECT_1, ECT_0) => Ecn::Set(ECT_1),
        _ => Ecn::Keep,
    }
}

/// The outer ECN field for an inner one, as Linux does (`INET_ECN_encapsulate`: CE becomes ECT(0)).
#[inline(always)]
#[must_use]
pub fn encapsulate_ecn(inner_tos: u8) -> u8 {
    match inner_tos & CE {
        CE => ECT_0,
        other => other,
    }
}

/// The first eight bytes of a TCP, UDP or ICMP header.
pub type NextHeader = [u8; 8];

/// Source and destination port, host order; of an ICMP echo, identifier and type.
///
/// `None` where the flow gate has nothing to go by: other protocols, and ICMP that is not echo.
#[inline(always)]
#[must_use]
pub fn ports(protocol: u8, next: &NextHeader) -> Option<(u16, u16)> {
    let word = |at: usize| u16::from_be_bytes([next[at], next[at + 1]]);
    match protocol {
        TCP | UDP => Some((word(0), word(2))),
        // Type 8 is a request, 0 its reply (RFC 792).
        ICMP if next[0] == 8 || next[0] == 0 => Some((word(4), u16::from(next[0]))),
        _ => None,
    }
}

/// Whether [`ports`] finds any.
#[inline(always)]
#[must_use]
pub fn has_ports(protocol: u8, next: &NextHeader) -> bool {
    protocol == TCP || protocol == UDP || (protocol == ICMP && (next[0] == 8 || next[0] == 0))
}

/// FIN, SYN or RST among the TCP flags (byte 13 of the header).
#[inline(always)]
#[must_use]
pub fn is_tcp_control(flags: u8) -> bool {
    flags & 0b0000_0111 != 0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(tos: u8, ttl: u8) -> Header {
        let mut h = [0x45, tos, 0, 84, 0x12, 0x34, 0x40, 0, ttl, TCP, 0, 0, 10, 5, 1, 2, 10, 5, 2, 3];
        let sum = verify(&h);
        h[10..12].copy_from_slice(&(!sum).to_be_bytes());
        h
    }

    /// The folded sum, 0xffff for a header whose checksum is right.
    fn verify(h: &Header) -> u16 {
        !checksum::finish(h.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum())
    }

    proptest! {
        #[test]
        fn the_checksum_stays_right_when_a_hop_is_taken_off(tos in any::<u8>(), ttl in 2u8..) {
            let mut h = header(tos, ttl);
            decrement_ttl(&mut h);
            prop_assert_eq!(h[8], ttl - 1);
            prop_assert_eq!(verify(&h), 0xffff);
        }

        #[test]
        fn one_changed_byte_is_noticed(tos in any::<u8>(), ttl in any::<u8>(), at in 0..LEN, bits in 1u8..) {
            let mut h = header(tos, ttl);
            prop_assert!(has_right_checksum(&h));
            h[at] ^= bits;
            prop_assert!(!has_right_checksum(&h));
        }

        #[test]
        fn the_checksum_stays_right_when_ecn_is_set(tos in any::<u8>(), ttl in any::<u8>(), ecn in 0u8..4) {
            let mut h = header(tos, ttl);
            set_ecn(&mut h, ecn);
            prop_assert_eq!(h[1], tos & 0xfc | ecn);
            prop_assert_eq!(verify(&h), 0xffff);
        }
    }

    #[test]
    fn fragments_are_told_apart() {
        let mut h = header(0, 64);
        assert!(!is_fragment(&h), "DF alone is no fragment");
        h[6..8].copy_from_slice(&0x2000u16.to_be_bytes());
        assert!(is_fragment(&h) && !is_later_fragment(&h), "more to come, offset 0: the first");
        h[6..8].copy_from_slice(&0x0001u16.to_be_bytes());
        assert!(is_fragment(&h) && is_later_fragment(&h), "an offset: a later one");
    }

    #[test]
    fn ecn_of_the_outer_header_follows_rfc_6040() {
        assert_eq!([0, 1, 2, 3].map(encapsulate_ecn), [0, 1, 2, 2]);
        assert_eq!(encapsulate_ecn(0xb8), 0, "DSCP does not reach the outer header");
    }

    #[test]
    fn ecn_is_merged_when_the_outer_header_comes_off() {
        use Ecn::{Drop, Keep, Set};
        let merged = |outer| [0, ECT_1, ECT_0, CE].map(|inner| decapsulate_ecn(outer, inner));
        assert_eq!(merged(0), [Keep; 4]);
        assert_eq!(merged(ECT_1), [Keep, Keep, Set(ECT_1), Keep]);
        assert_eq!(merged(ECT_0), [Keep; 4]);
        assert_eq!(merged(CE), [Drop, Set(CE), Set(CE), Set(CE)]);
    }

    #[test]
    fn an_echo_has_its_identifier_and_type_for_ports_and_other_icmp_has_none() {
        for protocol in 0..=255 {
            for kind in 0..=255 {
                let next = [kind, 0, 1, 2, 7, 9, 0, 1];
                assert_eq!(has_ports(protocol, &next), ports(protocol, &next).is_some());
            }
        }
        assert_eq!(ports(ICMP, &[8, 0, 1, 2, 7, 9, 0, 1]), Some((0x0709, 8)));
        assert_eq!(
            ports(ICMP, &[0, 0, 1, 2, 7, 9, 0, 1]),
            Some((0x0709, 0)),
            "another flow than the request's"
        );
        assert_eq!(ports(ICMP, &[3, 4, 1, 2, 7, 9, 0, 1]), None);
        assert_eq!(ports(132, &[0, 1, 0, 2, 0, 0, 0, 0]), None, "SCTP");
        assert_eq!(ports(UDP, &[0, 53, 1, 2, 0, 0, 0, 0]), Some((53, 0x0102)));
    }
}
