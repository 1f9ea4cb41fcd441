//! What a listener wants to hear of verdicts, and what it is told: part of the maps' ABI, as [`crate::abi`] is.
//!
//! A listener holds one slot of [`map::TRACERS`](crate::abi::map::TRACERS) and reads the ring of the same number. It says
//! until when it listens and renews that: one that is killed is not told for ever.

use crate::{abi::program, ipv4, transport};

/// Listeners that there can be at once.
pub const TRACERS_MAX: usize = 4;
/// Size of each listener's ring, in bytes.
pub const RING_BYTES: usize = 1 << 18;
/// Stands for every protocol: no number of IANA's.
pub const ANY_PROTOCOL: u16 = 256;
/// Length of an IPv6 header without extensions, in bytes.
pub const IPV6_LEN: usize = 40;

/// The programs by number. Names: [`program`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    FromPod,
    ToPod,
    FromWire,
    ToWire,
    FromOverlay,
    ToOverlay,
    Guard,
    FromOther,
}

impl Program {
    /// Name of the program with this number.
    #[must_use]
    pub fn name(number: u32) -> Option<&'static str> {
        const NAMES: [&str; 8] = [
            program::FROM_POD,
            program::TO_POD,
            program::FROM_WIRE,
            program::TO_WIRE,
            program::FROM_OVERLAY,
            program::TO_OVERLAY,
            program::GUARD,
            program::FROM_OTHER,
        ];
        NAMES.get(number as usize).copied()
    }
}

/// A listener, and which verdicts it wants. All zeroes: nobody. Written by the listener.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tracer {
    /// Until when it listens: `CLOCK_MONOTONIC`, nanoseconds.
    pub until: u64,
    /// Who has the slot: a number that no other listener has.
    pub owner: u64,
    /// Bit *n* is set where verdicts of the reason with number *n* are wanted.
    pub reasons: u64,
    /// One end of the packet must be in the first, the other in the second.
    pub ends: [Prefix; 2],
    /// Of the verdicts that it wants, one in so many is told; 0 and 1 are every one.
    pub every: u32,
    /// Either port, host order; 0 is any, also none.
    pub port: u16,
    /// IP protocol number, or [`ANY_PROTOCOL`].
    pub protocol: u16,
}

/// Addresses that a listener wants. All zeroes: any, also none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prefix {
    /// As in [`Traced`], with no bit set that the mask has not.
    pub address: [u64; 2],
    /// The bits that count, in the address's own order.
    pub mask: [u64; 2],
}

/// What was told of one listener's verdicts on one CPU. Written by the programs; the listener sets it to zero first.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Verdicts that it wants, sampled or not.
    pub wanted: u64,
    /// Of those that were picked, the ones for which the ring had no room.
    pub lost: u64,
}

/// One verdict. Addresses are IPv6's, or IPv4's as `::ffff:a.b.c.d`, in network order; ports are in host order.
///
/// They are the pods' addresses, also of a packet that is encapsulated; where the underlay's packet itself is what the
/// verdict is about (a stranger's, say), they are the underlay's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traced {
    /// `CLOCK_MONOTONIC`, nanoseconds.
    pub time: u64,
    /// Source address; zeroes where [`Self::family`] is 0.
    pub source: [u64; 2],
    /// Destination address.
    pub destination: [u64; 2],
    /// The far VTEP, where the packet is encapsulated still or by now; otherwise zeroes.
    pub vtep: [u64; 2],
    /// Interface at which the program ran.
    pub ifindex: u32,
    /// Length of the frame as the program saw it first, in bytes.
    pub len: u32,
    /// Number of the reason.
    pub reason: u32,
    /// Number of the program: [`Program`].
    pub program: u32,
    /// 0 where there is none.
    pub source_port: u16,
    /// See `source_port`.
    pub destination_port: u16,
    /// IP protocol number.
    pub protocol: u16,
    /// 4, 6, or 0 where the packet is neither or could not be read.
    pub family: u16,
}

impl Prefix {
    #[inline(always)]
    fn holds(&self, address: &[u64; 2]) -> bool {
        address[0] & self.mask[0] == self.address[0] && address[1] & self.mask[1] == self.address[1]
    }
}

impl Tracer {
    /// Whether the listener wants this verdict, sampling aside.
    #[inline(always)]
    #[must_use]
    pub fn wants(&self, verdict: &Traced) -> bool {
        let [one, other] = &self.ends;
        let (source, destination) = (&verdict.source, &verdict.destination);
        self.reasons >> (verdict.reason & 63) & 1 == 1
            && (self.protocol == ANY_PROTOCOL || verdict.family != 0 && self.protocol == verdict.protocol)
            && (self.port == 0 || self.port == verdict.source_port || self.port == verdict.destination_port)
            && (one.holds(source) && other.holds(destination)
                || one.holds(destination) && other.holds(source))
    }
}

impl Traced {
    /// Takes addresses and protocol from an IPv4 header. Returns the length of the header, in bytes, where ports may
    /// follow it.
    #[inline(always)]
    pub fn set_ipv4(&mut self, header: &ipv4::Header) -> Option<u32> {
        self.family = 4;
        self.source = mapped([header[12], header[13], header[14], header[15]]);
        self.destination = mapped([header[16], header[17], header[18], header[19]]);
        self.protocol = u16::from(ipv4::protocol(header));
        (!ipv4::is_later_fragment(header) && self.has_ports()).then(|| ipv4::header_len(header) as u32)
    }

    /// The same of an IPv6 header. Extension headers are not followed: the first one's number is the protocol.
    #[inline(always)]
    pub fn set_ipv6(&mut self, header: &[u8; IPV6_LEN]) -> Option<u32> {
        self.family = 6;
        self.source = [word(header, 8), word(header, 16)];
        self.destination = [word(header, 24), word(header, 32)];
        self.protocol = u16::from(header[6]);
        self.has_ports().then_some(IPV6_LEN as u32)
    }

    /// Takes the ports from the four bytes behind the IP header.
    #[inline(always)]
    pub fn set_ports(&mut self, next: [u8; 4]) {
        self.source_port = u16::from_be_bytes([next[0], next[1]]);
        self.destination_port = u16::from_be_bytes([next[2], next[3]]);
    }

    #[inline(always)]
    fn has_ports(&self) -> bool {
        self.protocol == u16::from(transport::TCP) || self.protocol == u16::from(transport::UDP)
    }

    /// A verdict as it stands in the ring; `None` where the record has another length.
    #[must_use]
    pub fn from_record(record: &[u8]) -> Option<Self> {
        let record: &[u8; size_of::<Self>()] = record.try_into().ok()?;
        let long = |at| word(record, at);
        let int =
            |at: usize| u32::from_ne_bytes([record[at], record[at + 1], record[at + 2], record[at + 3]]);
        let short = |at: usize| u16::from_ne_bytes([record[at], record[at + 1]]);
        Some(Self {
            time: long(0),
            source: [long(8), long(16)],
            destination: [long(24), long(32)],
            vtep: [long(40), long(48)],
            ifindex: int(56),
            len: int(60),
            reason: int(64),
            program: int(68),
            source_port: short(72),
            destination_port: short(74),
            protocol: short(76),
            family: short(78),
        })
    }
}

/// An IPv4 address as an IPv6 one: `::ffff:a.b.c.d` (RFC 4291).
#[inline(always)]
#[must_use]
pub fn mapped([a, b, c, d]: [u8; 4]) -> [u64; 2] {
    [0, u64::from_ne_bytes([0, 0, 0xff, 0xff, a, b, c, d])]
}

/// Eight bytes as they stand.
#[inline(always)]
fn word<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    let b = |i: usize| bytes[at + i];
    u64::from_ne_bytes([b(0), b(1), b(2), b(3), b(4), b(5), b(6), b(7)])
}

const _: () = {
    assert!(size_of::<Tracer>() == 96);
    assert!(size_of::<Traced>() == 80);
    assert!(crate::reason::COUNT <= 64, "reasons are a set of 64");
};

/// The agent gives these types to aya as map values.
#[cfg(feature = "user")]
mod pod {
    use aya::Pod;

    // SAFETY: `repr(C)`, made of integers, without padding, valid for every bit pattern.
    unsafe impl Pod for super::Tracer {}
    // SAFETY: as above.
    unsafe impl Pod for super::Tally {}
}

#[cfg(test)]
mod tests {
    use super::*;

    const IPV4: ipv4::Header = [0x46, 0, 0, 84, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 5, 1, 2, 10, 5, 2, 9];

    fn verdict() -> Traced {
        let mut verdict = Traced { reason: 5, ..Traced::default() };
        assert_eq!(verdict.set_ipv4(&IPV4), Some(24), "options count");
        verdict.set_ports([0x9c, 0x40, 0, 80]);
        verdict
    }

    fn any() -> Tracer {
        Tracer { reasons: u64::MAX, protocol: ANY_PROTOCOL, ..Tracer::default() }
    }

    fn prefix(address: [u8; 4], len: u32) -> Prefix {
        let mask = mapped_mask(len);
        let address = mapped(address);
        Prefix { address: [0, address[1] & mask[1]], mask }
    }

    fn mapped_mask(len: u32) -> [u64; 2] {
        let bits = u128::MAX << (32 - len);
        let bytes = bits.to_be_bytes();
        [word(&bytes, 0), word(&bytes, 8)]
    }

    #[test]
    fn headers_say_who_and_what() {
        let verdict = verdict();
        assert_eq!((verdict.source, verdict.destination), (mapped([10, 5, 1, 2]), mapped([10, 5, 2, 9])));
        assert_eq!((verdict.source_port, verdict.destination_port), (40_000, 80));
        assert_eq!((verdict.protocol, verdict.family), (6, 4));

        let mut fragment = IPV4;
        fragment[7] = 1;
        assert_eq!(Traced::default().set_ipv4(&fragment), None, "a later fragment has no ports");
        let mut icmp = IPV4;
        icmp[9] = 1;
        assert_eq!(Traced::default().set_ipv4(&icmp), None);

        let mut ipv6 = [0; IPV6_LEN];
        ipv6[0] = 0x60;
        ipv6[6] = 17;
        (ipv6[8], ipv6[23], ipv6[24], ipv6[39]) = (0xfd, 2, 0xfd, 9);
        let mut verdict = Traced::default();
        assert_eq!(verdict.set_ipv6(&ipv6), Some(40));
        let bytes = |words: [u64; 2]| [words[0].to_ne_bytes(), words[1].to_ne_bytes()].concat();
        assert_eq!(bytes(verdict.source), ipv6[8..24]);
        assert_eq!(bytes(verdict.destination), ipv6[24..40]);
    }

    #[test]
    fn each_filter_alone_lets_through_what_it_names_and_nothing_else() {
        let verdict = verdict();
        assert!(any().wants(&verdict));
        assert!(any().wants(&Traced::default()), "what could not be read has a reason too");
        assert!(!Tracer::default().wants(&verdict), "nobody wants nothing");
        let cases = [
            (Tracer { reasons: 1 << 5, ..any() }, true),
            (Tracer { reasons: !(1 << 5), ..any() }, false),
            (Tracer { protocol: 6, ..any() }, true),
            (Tracer { protocol: 17, ..any() }, false),
            (Tracer { port: 80, ..any() }, true),
            (Tracer { port: 40_000, ..any() }, true),
            (Tracer { port: 81, ..any() }, false),
        ];
        for (tracer, expected) in cases {
            assert_eq!(tracer.wants(&verdict), expected, "{tracer:?}");
        }
        assert!(!Tracer { protocol: 0, ..any() }.wants(&Traced::default()), "no IP packet has protocol 0");
    }

    #[test]
    fn addresses_are_wanted_at_either_end_and_two_of_them_at_both() {
        let (a, b, c) = ([10, 5, 1, 2], [10, 5, 2, 9], [10, 5, 3, 1]);
        let cases = [
            (vec![(a, 32)], true),
            (vec![(b, 32)], true),
            (vec![(c, 32)], false),
            (vec![([10, 5, 2, 0], 24)], true),
            (vec![([10, 5, 2, 0], 29)], false),
            (vec![([0, 0, 0, 0], 0)], true),
            (vec![(a, 32), (b, 32)], true),
            (vec![(b, 32), (a, 32)], true),
            (vec![(a, 32), (c, 32)], false),
            (vec![(a, 32), (a, 32)], false),
            (vec![(a, 32), ([10, 5, 0, 0], 16)], true),
        ];
        for (ends, expected) in cases {
            let mut tracer = any();
            for (end, (address, len)) in tracer.ends.iter_mut().zip(&ends) {
                *end = prefix(*address, *len);
            }
            assert_eq!(tracer.wants(&verdict()), expected, "{ends:?}");
        }
        let ipv4_only = Tracer { ends: [prefix([0, 0, 0, 0], 0), Prefix::default()], ..any() };
        assert!(!ipv4_only.wants(&Traced { source: [1, 2], destination: [1, 3], family: 6, ..verdict() }));
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let verdict = Traced { time: 1, vtep: [3, 4], ifindex: 5, len: 6, program: 7, ..verdict() };
        // SAFETY: integers without padding.
        let record: [u8; size_of::<Traced>()] = unsafe { core::mem::transmute(verdict) };
        assert_eq!(Traced::from_record(&record), Some(verdict));
        assert_eq!(Traced::from_record(&record[1..]), None);
        assert_eq!(Traced::from_record(&[]), None);
    }

    #[test]
    fn every_program_has_a_name() {
        assert_eq!(Program::name(Program::FromPod as u32), Some("from_pod"));
        assert_eq!(Program::name(Program::Guard as u32), Some("guard"));
        assert_eq!(Program::name(Program::FromOther as u32), Some("from_other"));
        assert_eq!(Program::name(8), None);
    }
}
