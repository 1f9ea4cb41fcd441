//! IPv4 headers (RFC 791) of 20 bytes.

use crate::{checksum, ecn::CE};

/// Length of a header without options, in bytes.
pub const LEN: usize = 20;

const MORE_FRAGMENTS_AND_OFFSET: u16 = 0x3fff;
const OFFSET: u16 = 0x1fff;

/// A header as it stands in the packet.
pub type Header = [u8; LEN];

/// The `n`-th four bytes. Fields are cut out of such words: of one that others cut theirs out of as well the compiler makes
/// one load, and of single bytes one for each.
#[inline(always)]
const fn word(header: &Header, n: usize) -> u32 {
    u32::from_be_bytes(header.as_chunks().0[n])
}

/// Version 4 and no options.
#[inline(always)]
#[must_use]
pub fn is_plain(header: &Header) -> bool {
    word(header, 0) >> 24 == 0x45
}

/// Length of the header with its options, in bytes; a hostile header may say 0 to 60.
#[inline(always)]
#[must_use]
pub fn header_len(header: &Header) -> usize {
    (word(header, 0) >> 24 & 0xf) as usize * 4
}

/// DSCP and ECN.
#[inline(always)]
#[must_use]
pub fn tos(header: &Header) -> u8 {
    (word(header, 0) >> 16) as u8
}

/// Length of the packet, in bytes.
#[inline(always)]
#[must_use]
pub fn total_len(header: &Header) -> u16 {
    word(header, 0) as u16
}

/// A fragment, first, last or between.
#[inline(always)]
#[must_use]
pub fn is_fragment(header: &Header) -> bool {
    word(header, 1) as u16 & MORE_FRAGMENTS_AND_OFFSET != 0
}

/// A fragment that does not hold the next header.
#[inline(always)]
#[must_use]
pub fn is_later_fragment(header: &Header) -> bool {
    word(header, 1) as u16 & OFFSET != 0
}

/// Hops that are left.
#[inline(always)]
#[must_use]
pub fn ttl(header: &Header) -> u8 {
    (word(header, 2) >> 24) as u8
}

/// Number of the next header.
#[inline(always)]
#[must_use]
pub fn protocol(header: &Header) -> u8 {
    (word(header, 2) >> 16) as u8
}

/// Source address, host order.
#[inline(always)]
#[must_use]
pub fn source(header: &Header) -> u32 {
    word(header, 3)
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
    word(header, 4)
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::transport::TCP;

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
}
