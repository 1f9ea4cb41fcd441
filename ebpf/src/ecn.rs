//! Explicit congestion notification (RFC 3168), the lowest two bits of IPv4's TOS and of IPv6's traffic class alike, and
//! what tunnels make of it.

/// The transport knows ECN.
pub const ECT_0: u8 = 2;
/// See [`ECT_0`].
pub const ECT_1: u8 = 1;
/// Congestion experienced; the mask of the field, too.
pub const CE: u8 = 3;

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
pub fn decapsulate(outer_tos: u8, inner_tos: u8) -> Ecn {
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
pub fn encapsulate(inner_tos: u8) -> u8 {
    match inner_tos & CE {
        CE => ECT_0,
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ecn_of_the_outer_header_follows_rfc_6040() {
        assert_eq!([0, 1, 2, 3].map(encapsulate), [0, 1, 2, 2]);
        assert_eq!(encapsulate(0xb8), 0, "DSCP does not reach the outer header");
    }

    #[test]
    fn ecn_is_merged_when_the_outer_header_comes_off() {
        use Ecn::{Drop, Keep, Set};
        let merged = |outer| [0, ECT_1, ECT_0, CE].map(|inner| decapsulate(outer, inner));
        assert_eq!(merged(0), [Keep; 4]);
        assert_eq!(merged(ECT_1), [Keep, Keep, Set(ECT_1), Keep]);
        assert_eq!(merged(ECT_0), [Keep; 4]);
        assert_eq!(merged(CE), [Drop, Set(CE), Set(CE), Set(CE)]);
    }
}
