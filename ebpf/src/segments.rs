//! How many packets of the wire an aggregate stands for.

/// The packets that a packet of the stack is or becomes on the wire.
///
/// `gso_segs` and `gso_size` are the kernel's; both are 0 for a packet that is no aggregate. The first is 0 too where
/// somebody cannot be believed or room was made in an aggregate: then it follows from `payload`, the bytes behind the
/// transport header.
#[inline(always)]
#[must_use]
pub const fn segments(gso_segs: u32, gso_size: u32, payload: u32) -> u32 {
    if gso_size == 0 {
        return 1;
    }
    if gso_segs != 0 {
        return gso_segs;
    }
    if payload == 0 { 1 } else { payload.div_ceil(gso_size) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_aggregate_counts_as_its_segments() {
        assert_eq!(segments(0, 0, 1400), 1, "no aggregate");
        assert_eq!(segments(0, 0, 0), 1);
        assert_eq!(segments(44, 1398, 60_000), 44, "the kernel knows");
        assert_eq!(segments(0, 1000, 3000), 3);
        assert_eq!(segments(0, 1000, 3001), 4);
        assert_eq!(segments(0, 1000, 1), 1);
        assert_eq!(segments(0, 1000, 0), 1, "nothing but headers is a packet all the same");
    }
}
