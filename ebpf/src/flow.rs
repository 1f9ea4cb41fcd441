//! The flow gate: may this packet skip the host's netfilter?
//!
//! A flow qualifies for one direction when the host stack was seen to hand on one of its packets unchanged: the
//! very packet that went into the stack (point 1) comes out of it (point 2). What netfilter dropped never reaches
//! point 2, and what it translated differs there. The tuple alone proves nothing: a pod that calls a service and
//! its backend from one port sends one flow into the stack with the tuple with which the other comes out.
//! Qualification ends after 5 to 15 seconds, so that the stack sees the flow again, and at once when the epoch
//! changes. The directions are independent: each proves itself.
//!
//! An endpoint is *gated* when its flows must qualify: always in strict mode, in open mode from the first
//! translated flow on. SYN, FIN and RST of gated endpoints always take the host stack, so conntrack knows every
//! such connection and keeps tuples apart. A connection is established for conntrack, and kept while it is idle, once
//! the host has seen the SYN, its answer and then a packet of the SYN's direction (`SYN_RECV` to `ESTABLISHED` in
//! net/netfilter/nf_conntrack_proto_tcp.c). So a SYN qualifies nothing, and ends what an earlier connection of its tuple
//! has left: the ACK of the answer takes the host stack too. The answer may qualify its own direction, of which conntrack
//! needs no more.

use crate::{
    abi::Flow,
    family::Family,
    transport::{self, NextHeader},
};

/// How long after point 1 a packet may reach point 2, in nanoseconds: longer than the three seconds for which
/// the kernel keeps packets to a neighbour that does not answer.
pub const TRANSIT: u64 = 4_000_000_000;
/// Shortest time that a flow stays qualified, in nanoseconds.
pub const QUALIFIED_MIN: u64 = 5_000_000_000;
/// What the jitter adds at most, in nanoseconds.
pub const QUALIFIED_JITTER: u64 = 10_000_000_000;

/// The way of a packet, seen from the local pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Sent by the pod.
    Outbound,
    /// Sent to the pod.
    Inbound,
}

/// Whether packets of this direction may skip the host stack at `now`.
#[inline(always)]
#[must_use]
pub fn is_fast(flow: &Flow, direction: Direction, now: u64, epoch: u32) -> bool {
    let until = match direction {
        Direction::Outbound => flow.outbound_until,
        Direction::Inbound => flow.inbound_until,
    };
    now < until && flow.epoch == epoch
}

/// What tells a packet from others of its tuple and does not change when a host forwards it: what the family has for
/// an id, of TCP the sequence and acknowledgement numbers, of UDP the length and the first bytes, of an echo the sequence
/// number. `beyond` is what follows the next header's first eight bytes, `further` what follows that, zeroes where nothing
/// does; IPv4 does not ask for the latter.
///
/// UDP's checksum is left out: it may be completed on the way.
#[inline(always)]
#[must_use]
pub fn mark<F: Family>(
    header: &F::Header,
    next: &NextHeader,
    beyond: [u8; 4],
    further: impl FnOnce() -> [u8; 12],
) -> u64 {
    let second = match F::protocol(header) {
        transport::UDP => [next[4], next[5], 0, 0],
        _ => [next[4], next[5], next[6], next[7]],
    };
    // 64 bits hold all of it but the identity; that is spread over them (Knuth's multiplicative hash).
    let fields = u64::from(u32::from_be_bytes(second)) << 32 | u64::from(u32::from_be_bytes(beyond));
    fields ^ F::identity(header, further).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

/// Notes that the host translates this flow. Whether it was qualified until now, in either direction.
#[inline(always)]
#[must_use]
pub fn translate(flow: &mut Flow) -> bool {
    let was_qualified = flow.outbound_until | flow.inbound_until != 0;
    *flow = Flow { translated: 1, ..Flow::default() };
    was_qualified
}

/// Notes that the flow is a pod's own connection, of which the host does not know: it stays out of the host's hands until
/// the agent has told it.
#[inline(always)]
#[must_use]
pub fn held(now: u64, epoch: u32) -> Flow {
    let until = now + QUALIFIED_MIN;
    Flow { outbound_until: until, inbound_until: until, epoch, ..Flow::default() }
}

/// What a packet at point 2 says of its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// It went in as it came out: the flow has qualified, unless the packet opens a connection or went in by an older epoch.
    Unchanged,
    /// Another packet of this tuple went in after it, or instead of it: nothing is proven.
    Another,
    /// Nothing of this tuple went in: the host has translated it.
    Translated,
}

/// Notes point 1: a packet of this direction, told by its [`mark`], goes into the host stack. One that `opens` a TCP
/// connection ends what the tuple was qualified for: whether that was anything, in either direction.
#[inline(always)]
#[must_use]
pub fn enter(flow: &mut Flow, direction: Direction, mark: u64, now: u64, epoch: u32, opens: bool) -> bool {
    if flow.epoch != epoch {
        // What an older epoch allowed, in either direction, must be proven anew, and not by a packet that went in before
        // and waits in the host, for a neighbour say: it has become another one.
        (flow.outbound_until, flow.inbound_until) = (0, 0);
        (flow.outbound_mark, flow.inbound_mark) = (!flow.outbound_mark, !flow.inbound_mark);
        flow.epoch = epoch;
    }
    match direction {
        Direction::Outbound => (flow.outbound_seen, flow.outbound_mark) = (now, mark),
        Direction::Inbound => (flow.inbound_seen, flow.inbound_mark) = (now, mark),
    }
    let ends = opens && flow.outbound_until | flow.inbound_until != 0;
    if ends {
        (flow.outbound_until, flow.inbound_until) = (0, 0);
    }
    ends
}

/// Notes point 2: a packet of this direction came out of the host stack. One that `opens` a TCP connection is compared and
/// qualifies nothing, and so is one that went in before the rules changed.
#[inline(always)]
pub fn leave(
    flow: &mut Flow,
    direction: Direction,
    mark: u64,
    now: u64,
    epoch: u32,
    random: u32,
    opens: bool,
) -> Left {
    let (seen, seen_mark) = match direction {
        Direction::Outbound => (flow.outbound_seen, flow.outbound_mark),
        Direction::Inbound => (flow.inbound_seen, flow.inbound_mark),
    };
    if seen == 0 || now.saturating_sub(seen) > TRANSIT {
        return Left::Translated;
    }
    if mark != seen_mark {
        return Left::Another;
    }
    if opens || flow.epoch != epoch {
        return Left::Unchanged;
    }
    // Scales the random number to the jitter without a division, which would cost more than the rest.
    let until = now + QUALIFIED_MIN + ((QUALIFIED_JITTER >> 16) * (random as u64 & 0xffff));
    match direction {
        Direction::Outbound => flow.outbound_until = until,
        Direction::Inbound => flow.inbound_until = until,
    }
    Left::Unchanged
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Direction::*, *};
    use crate::{
        family::{V4, V6},
        ipv4, ipv6,
    };

    const NOW: u64 = 1_000_000_000_000;

    fn goes_in(flow: &mut Flow, direction: Direction, mark: u64, now: u64) {
        let epoch = flow.epoch;
        let ended = enter(flow, direction, mark, now, epoch, false);
        assert!(!ended, "only what opens a connection ends anything");
    }

    #[test]
    fn a_flow_is_fast_only_after_it_came_out_as_it_went_in() {
        let mut flow = Flow::default();
        assert!(!is_fast(&flow, Outbound, NOW, 0));
        let out = leave(&mut flow, Outbound, 7, NOW, 0, 0, false);
        assert_eq!(out, Left::Translated, "it came out without having gone in");
        goes_in(&mut flow, Outbound, 7, NOW);
        assert!(!is_fast(&flow, Outbound, NOW, 0), "going in proves nothing");
        assert_eq!(leave(&mut flow, Outbound, 7, NOW + 1000, 0, 0, false), Left::Unchanged);
        assert!(is_fast(&flow, Outbound, NOW + 2000, 0));
    }

    #[test]
    fn another_packet_of_the_same_tuple_proves_nothing() {
        let mut flow = Flow::default();
        goes_in(&mut flow, Outbound, 7, NOW);
        assert_eq!(leave(&mut flow, Outbound, 8, NOW + 1000, 0, 0, false), Left::Another);
        assert!(!is_fast(&flow, Outbound, NOW + 2000, 0));
        assert_eq!(
            leave(&mut flow, Outbound, 7, NOW + 3000, 0, 0, false),
            Left::Unchanged,
            "the last of a batch"
        );
    }

    #[test]
    fn one_direction_does_not_qualify_the_other() {
        let mut flow = Flow::default();
        goes_in(&mut flow, Outbound, 7, NOW);
        assert_eq!(leave(&mut flow, Outbound, 7, NOW, 0, 0, false), Left::Unchanged);
        assert!(!is_fast(&flow, Inbound, NOW, 0));
        assert_eq!(leave(&mut flow, Inbound, 7, NOW, 0, 0, false), Left::Translated);
    }

    #[test]
    fn a_new_epoch_ends_what_was_qualified_in_both_directions() {
        let mut flow = Flow::default();
        for direction in [Outbound, Inbound] {
            goes_in(&mut flow, direction, 7, NOW);
            leave(&mut flow, direction, 7, NOW, 0, 0, false);
        }
        assert!(!is_fast(&flow, Outbound, NOW, 1) && !is_fast(&flow, Inbound, NOW, 1));
        assert!(!enter(&mut flow, Outbound, 7, NOW, 1, false), "the epoch ends what the CPUs remember");
        assert_eq!(leave(&mut flow, Outbound, 7, NOW, 1, 0, false), Left::Unchanged);
        assert!(is_fast(&flow, Outbound, NOW, 1));
        assert!(!is_fast(&flow, Inbound, NOW, 1), "the other direction has proven nothing in this epoch");
    }

    #[test]
    fn a_packet_that_went_in_before_the_epoch_proves_nothing_in_it() {
        let mut flow = Flow::default();
        for direction in [Outbound, Inbound] {
            goes_in(&mut flow, direction, 7, NOW);
        }
        assert_eq!(leave(&mut flow, Outbound, 7, NOW, 1, 0, false), Left::Unchanged);
        assert!(!is_fast(&flow, Outbound, NOW, 1));
        let _ = enter(&mut flow, Outbound, 8, NOW, 1, false);
        assert_eq!(
            leave(&mut flow, Inbound, 7, NOW, 1, 0, false),
            Left::Another,
            "the other direction's neither"
        );
        assert_eq!(leave(&mut flow, Outbound, 8, NOW, 1, 0, false), Left::Unchanged);
        assert!(is_fast(&flow, Outbound, NOW, 1) && !is_fast(&flow, Inbound, NOW, 1));
    }

    #[test]
    fn a_packet_that_left_long_after_one_entered_is_another() {
        let mut flow = Flow::default();
        goes_in(&mut flow, Inbound, 7, NOW);
        assert_eq!(leave(&mut flow, Inbound, 7, NOW + TRANSIT + 1, 0, 0, false), Left::Translated);
    }

    #[test]
    fn a_translated_flow_loses_what_it_had() {
        let mut flow = Flow::default();
        goes_in(&mut flow, Outbound, 7, NOW);
        assert!(!translate(&mut flow), "it had not qualified");
        goes_in(&mut flow, Outbound, 7, NOW);
        assert_eq!(leave(&mut flow, Outbound, 7, NOW, 0, 0, false), Left::Unchanged);
        assert!(translate(&mut flow));
        assert_eq!(flow, Flow { translated: 1, ..Flow::default() });
    }

    #[test]
    fn a_syn_qualifies_nothing_but_its_answer_and_the_ack_of_that_do() {
        let mut flow = Flow::default();
        assert!(!enter(&mut flow, Outbound, 7, NOW, 0, true), "nothing was qualified");
        assert_eq!(leave(&mut flow, Outbound, 7, NOW, 0, 0, true), Left::Unchanged);
        assert!(!is_fast(&flow, Outbound, NOW, 0), "conntrack must see the ACK");
        goes_in(&mut flow, Inbound, 8, NOW);
        assert_eq!(leave(&mut flow, Inbound, 8, NOW, 0, 0, false), Left::Unchanged);
        assert!(is_fast(&flow, Inbound, NOW, 0) && !is_fast(&flow, Outbound, NOW, 0));
        goes_in(&mut flow, Outbound, 9, NOW);
        assert_eq!(leave(&mut flow, Outbound, 9, NOW, 0, 0, false), Left::Unchanged);
        assert!(is_fast(&flow, Outbound, NOW, 0));
    }

    #[test]
    fn a_syn_is_compared_like_every_packet() {
        let mut flow = Flow::default();
        assert_eq!(leave(&mut flow, Outbound, 7, NOW, 0, 0, true), Left::Translated);
        let _ = enter(&mut flow, Outbound, 7, NOW, 0, true);
        assert_eq!(leave(&mut flow, Outbound, 8, NOW, 0, 0, true), Left::Another);
    }

    #[test]
    fn a_syn_of_either_direction_ends_what_an_earlier_connection_of_its_tuple_had() {
        for direction in [Outbound, Inbound] {
            let mut flow = held(NOW, 3);
            assert!(enter(&mut flow, direction, 7, NOW, 3, true));
            assert!(!is_fast(&flow, Outbound, NOW, 3) && !is_fast(&flow, Inbound, NOW, 3));
            assert!(!enter(&mut flow, direction, 7, NOW, 3, true), "that was all");
        }
        let mut flow = Flow { inbound_until: NOW + 1, ..Flow::default() };
        assert!(enter(&mut flow, Outbound, 7, NOW, 0, true), "the other direction alone was qualified");
    }

    #[test]
    fn a_held_flow_is_fast_both_ways_and_a_translated_packet_of_its_tuple_is_still_told_from_it() {
        let mut flow = held(NOW, 3);
        for direction in [Outbound, Inbound] {
            assert!(is_fast(&flow, direction, NOW + QUALIFIED_MIN - 1, 3));
            assert!(!is_fast(&flow, direction, NOW + QUALIFIED_MIN, 3));
            assert_eq!(leave(&mut flow, direction, 7, NOW + 1, 3, 0, false), Left::Translated);
        }
    }

    #[test]
    fn the_mark_follows_what_differs_between_packets_and_nothing_that_forwarding_changes() {
        let mark = |header: &ipv4::Header, next: &NextHeader, beyond| {
            mark::<V4>(header, next, beyond, || unreachable!("IPv4 has an id"))
        };
        let mut header = [0x45, 0, 0, 60, 0x12, 0x34, 0x40, 0, 64, 0, 0, 0, 10, 5, 1, 2, 10, 5, 2, 2];
        let next = [0x13, 0x88, 0x1f, 0x90, 0, 1, 2, 3];
        for (protocol, last_counts) in
            [(transport::TCP, true), (transport::UDP, false), (transport::ICMP, true)]
        {
            header[9] = protocol;
            let first = mark(&header, &next, [4, 5, 6, 7]);
            assert_eq!(
                mark(&header, &[0x13, 0x88, 0x1f, 0x90, 0, 1, 2, 9], [4, 5, 6, 7]) != first,
                last_counts
            );
            assert_ne!(mark(&header, &[0x13, 0x88, 0x1f, 0x90, 0, 9, 2, 3], [4, 5, 6, 7]), first);
            assert_ne!(mark(&header, &next, [4, 5, 6, 8]), first);
            let mut later = header;
            (later[1], later[8], later[10]) = (3, 63, 1);
            assert_eq!(mark(&later, &next, [4, 5, 6, 7]), first, "ECN, TTL and checksum are no part of it");
            later[5] += 1;
            assert_ne!(mark(&later, &next, [4, 5, 6, 7]), first);
        }
    }

    #[test]
    fn the_mark_of_ipv6_follows_the_flow_label_and_more_of_the_payload() {
        let mut header = [0; ipv6::LEN];
        (header[0], header[6], header[7]) = (0x60, transport::UDP, 64);
        let next = [0x13, 0x88, 0x1f, 0x90, 0, 20, 2, 3];
        let mark = |header: &ipv6::Header, further| mark::<V6>(header, &next, [4; 4], || further);
        let first = mark(&header, [7; 12]);
        for at in 0..12 {
            let mut further = [7; 12];
            further[at] = 8;
            assert_ne!(mark(&header, further), first, "byte {at}");
        }
        let mut later = header;
        (later[1], later[7]) = (0x30, 63);
        assert_eq!(mark(&later, [7; 12]), first, "ECN and hop limit are no part of it");
        later[3] = 1;
        assert_ne!(mark(&later, [7; 12]), first);
    }

    proptest! {
        #[test]
        fn qualification_lasts_five_to_fifteen_seconds(random in any::<u32>()) {
            let mut flow = Flow::default();
            goes_in(&mut flow, Inbound, 7, NOW);
            leave(&mut flow, Inbound, 7, NOW, 0, random, false);
            prop_assert!(is_fast(&flow, Inbound, NOW + QUALIFIED_MIN - 1, 0));
            prop_assert!(!is_fast(&flow, Inbound, NOW + QUALIFIED_MIN + QUALIFIED_JITTER, 0));
        }
    }
}
