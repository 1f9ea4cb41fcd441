//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).

/// Folds a sum of 16-bit words to 16 bits and complements it.
#[inline(always)]
#[must_use]
pub const fn finish(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// The checksum after one 16-bit word under it changed from `old` to `new` (RFC 1624, equation 3). All in host order.
#[inline(always)]
#[must_use]
pub const fn update(checksum: u16, old: u16, new: u16) -> u16 {
    finish((!checksum) as u32 + (!old) as u32 + new as u32)
}

/// The sum of the two 16-bit words of a big-endian 32-bit field.
#[inline(always)]
#[must_use]
pub const fn words(value: u32) -> u32 {
    (value >> 16) + (value & 0xffff)
}

/// Whether the checksum among these 20 bytes covers them all. Words are summed in the order in which their bytes stand
/// in memory, four bytes at once: but for its byte order the sum is the same (RFC 1071, section 2), and a right one is
/// all ones in either.
#[inline(always)]
#[must_use]
pub const fn covers(bytes: &[u8; 20]) -> bool {
    let (chunks, _) = bytes.as_chunks();
    let (mut sum, mut n) = (0, 0);
    while n < chunks.len() {
        sum += u32::from_ne_bytes(chunks[n]) as u64;
        n += 1;
    }
    // Five words: what is above 32 bits is at most 4.
    finish((sum >> 32) as u32 + words(sum as u32)) == 0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn full(bytes: &[u8]) -> u16 {
        finish(bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum())
    }

    /// The header that RFC 1071's readers know best: checksum field b861 over 45 00 00 73 ...
    #[test]
    fn a_known_header_has_its_known_checksum() {
        let header =
            [0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7];
        assert_eq!(full(&header), 0xb861);
    }

    proptest! {
        #[test]
        fn a_header_is_covered_exactly_if_its_full_sum_is_zero(
            mut bytes in prop::array::uniform20(any::<u8>()),
            right in any::<bool>(),
        ) {
            if right {
                bytes[10..12].fill(0);
                let sum = full(&bytes);
                bytes[10..12].copy_from_slice(&sum.to_be_bytes());
            }
            prop_assert_eq!(covers(&bytes), full(&bytes) == 0);
            prop_assert!(covers(&bytes) || !right);
        }

        #[test]
        fn an_incremental_update_equals_a_full_sum(mut bytes in prop::array::uniform20(any::<u8>()), new in any::<u16>()) {
            // An IPv4 header starts with 0x45: the all-zero sum, where RFC 1624 and a full sum differ in the
            // sign of zero, cannot occur.
            bytes[0] = 0x45;
            let before = full(&bytes);
            let old = u16::from_be_bytes([bytes[8], bytes[9]]);
            bytes[8..10].copy_from_slice(&new.to_be_bytes());
            prop_assert_eq!(update(before, old, new), full(&bytes));
        }
    }
}
