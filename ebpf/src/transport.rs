//! What the fast path reads of the header behind the IP header: TCP, UDP and the echoes of either ICMP.

/// Protocol numbers (IANA).
pub const ICMP: u8 = 1;
/// See [`ICMP`].
pub const TCP: u8 = 6;
/// See [`ICMP`].
pub const UDP: u8 = 17;
/// See [`ICMP`].
pub const ICMPV6: u8 = 58;

/// How a family's echo is told.
#[derive(Clone, Copy, Debug)]
pub struct Echo {
    /// Protocol number.
    pub protocol: u8,
    /// Type of a request.
    pub request: u8,
    /// Type of its reply.
    pub reply: u8,
}

/// ICMP's (RFC 792).
pub const ECHO_V4: Echo = Echo { protocol: ICMP, request: 8, reply: 0 };
/// ICMPv6's (RFC 4443).
pub const ECHO_V6: Echo = Echo { protocol: ICMPV6, request: 128, reply: 129 };

/// The first eight bytes of a TCP, UDP, ICMP or ICMPv6 header.
pub type NextHeader = [u8; 8];

/// Source and destination port, host order; of an echo, identifier and type.
///
/// `None` where the flow gate has nothing to go by: other protocols, and ICMP that is not echo.
#[inline(always)]
#[must_use]
pub fn ports(protocol: u8, echo: Echo, next: &NextHeader) -> Option<(u16, u16)> {
    let word = |at: usize| u16::from_be_bytes([next[at], next[at + 1]]);
    match protocol {
        TCP | UDP => Some((word(0), word(2))),
        _ if is_echo(protocol, echo, next) => Some((word(4), u16::from(next[0]))),
        _ => None,
    }
}

/// Whether [`ports`] finds any.
#[inline(always)]
#[must_use]
pub fn has_ports(protocol: u8, echo: Echo, next: &NextHeader) -> bool {
    protocol == TCP || protocol == UDP || is_echo(protocol, echo, next)
}

#[inline(always)]
fn is_echo(protocol: u8, echo: Echo, next: &NextHeader) -> bool {
    protocol == echo.protocol && (next[0] == echo.request || next[0] == echo.reply)
}

/// The checksum field of a UDP header as it stands.
#[inline(always)]
#[must_use]
pub fn udp_checksum(next: &NextHeader) -> u16 {
    u16::from_be_bytes([next[6], next[7]])
}

/// FIN, SYN or RST among the TCP flags (byte 13 of the header).
#[inline(always)]
#[must_use]
pub fn is_tcp_control(flags: u8) -> bool {
    flags & 0b0000_0111 != 0
}

/// SYN without ACK among the TCP flags: the first packet of a connection.
#[inline(always)]
#[must_use]
pub fn opens_tcp(flags: u8) -> bool {
    flags & 0b0001_0010 == 0b0000_0010
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_opened_by_syn_alone() {
        for flags in [0x02, 0x42, 0xc2] {
            assert!(opens_tcp(flags), "{flags:#x}");
        }
        for flags in [0x12, 0x10, 0x11, 0x04, 0x14, 0] {
            assert!(!opens_tcp(flags), "{flags:#x}");
        }
    }

    #[test]
    fn an_echo_has_its_identifier_and_type_for_ports_and_other_icmp_has_none() {
        for echo in [ECHO_V4, ECHO_V6] {
            for protocol in 0..=255 {
                for kind in 0..=255 {
                    let next = [kind, 0, 1, 2, 7, 9, 0, 1];
                    assert_eq!(has_ports(protocol, echo, &next), ports(protocol, echo, &next).is_some());
                }
            }
        }
        assert_eq!(ports(ICMP, ECHO_V4, &[8, 0, 1, 2, 7, 9, 0, 1]), Some((0x0709, 8)));
        let reply = ports(ICMP, ECHO_V4, &[0, 0, 1, 2, 7, 9, 0, 1]);
        assert_eq!(reply, Some((0x0709, 0)), "another flow than the request's");
        assert_eq!(ports(ICMP, ECHO_V4, &[3, 4, 1, 2, 7, 9, 0, 1]), None);
        assert_eq!(ports(ICMPV6, ECHO_V6, &[128, 0, 1, 2, 7, 9, 0, 1]), Some((0x0709, 128)));
        assert_eq!(ports(ICMPV6, ECHO_V6, &[129, 0, 1, 2, 7, 9, 0, 1]), Some((0x0709, 129)));
        for neighbour_discovery in 133..=137 {
            assert_eq!(ports(ICMPV6, ECHO_V6, &[neighbour_discovery, 0, 1, 2, 7, 9, 0, 1]), None);
        }
        assert_eq!(ports(ICMP, ECHO_V6, &[8, 0, 1, 2, 7, 9, 0, 1]), None, "the other family's");
        assert_eq!(ports(132, ECHO_V4, &[0, 1, 0, 2, 0, 0, 0, 0]), None, "SCTP");
        assert_eq!(ports(UDP, ECHO_V6, &[0, 53, 1, 2, 0, 0, 0, 0]), Some((53, 0x0102)));
    }
}
