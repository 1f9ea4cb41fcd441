//! The flow gate: may this packet skip the host's netfilter?
//!
//! A flow qualifies for one direction when the host stack was seen to hand on one of its packets unchanged: the
//! tuple that went into the stack (point 1) comes out of it (point 2). What netfilter dropped never reaches
//! point 2, and what it translated differs there. Qualification ends after 5 to 15 seconds, so that the stack
//! sees the flow again, and at once when the epoch changes. The directions are independent: each proves itself.
//!
//! An endpoint is *gated* when its flows must qualify: always in strict mode, in open mode from the first
//! translated flow on. SYN, FIN and RST of gated endpoints always take the host stack, so conntrack knows every
//! such connection and keeps tuples apart.

use crate::abi::Flow;

/// How long after point 1 a packet may reach point 2 and still count as the same, in nanoseconds.
pub const TRANSIT: u64 = 2_000_000_000;
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

/// Notes point 1: a packet of this direction goes into the host stack.
#[inline(always)]
pub fn enter(flow: &mut Flow, direction: Direction, now: u64) {
    match direction {
        Direction::Outbound => flow.outbound_seen = now,
        Direction::Inbound => flow.inbound_seen = now,
    }
}

/// Notes point 2: a packet of this direction came out of the host stack. Says whether it went in as it came out.
#[inline(always)]
pub fn leave(flow: &mut Flow, direction: Direction, now: u64, epoch: u32, random: u32) -> bool {
    let seen = match direction {
        Direction::Outbound => flow.outbound_seen,
        Direction::Inbound => flow.inbound_seen,
    };
    if seen == 0 || now.saturating_sub(seen) > TRANSIT {
        return false;
    }
    if flow.epoch != epoch {
        // What an older epoch allowed, in either direction, must be proven anew.
        flow.outbound_until = 0;
        flow.inbound_until = 0;
        flow.epoch = epoch;
    }
    // Scales the random number to the jitter without a division, which would cost more than the rest.
    let until = now + QUALIFIED_MIN + ((QUALIFIED_JITTER >> 16) * (random as u64 & 0xffff));
    match direction {
        Direction::Outbound => flow.outbound_until = until,
        Direction::Inbound => flow.inbound_until = until,
    }
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Direction::*, *};

    const NOW: u64 = 1_000_000_000_000;

    #[test]
    fn a_flow_is_fast_only_after_it_came_out_as_it_went_in() {
        let mut flow = Flow::default();
        assert!(!is_fast(&flow, Outbound, NOW, 0));
        assert!(!leave(&mut flow, Outbound, NOW, 0, 0), "it came out without having gone in: translated");
        enter(&mut flow, Outbound, NOW);
        assert!(!is_fast(&flow, Outbound, NOW, 0), "going in proves nothing");
        assert!(leave(&mut flow, Outbound, NOW + 1000, 0, 0));
        assert!(is_fast(&flow, Outbound, NOW + 2000, 0));
    }

    #[test]
    fn one_direction_does_not_qualify_the_other() {
        let mut flow = Flow::default();
        enter(&mut flow, Outbound, NOW);
        assert!(leave(&mut flow, Outbound, NOW, 0, 0));
        assert!(!is_fast(&flow, Inbound, NOW, 0));
        assert!(!leave(&mut flow, Inbound, NOW, 0, 0));
    }

    #[test]
    fn a_new_epoch_ends_what_was_qualified_in_both_directions() {
        let mut flow = Flow::default();
        for direction in [Outbound, Inbound] {
            enter(&mut flow, direction, NOW);
            leave(&mut flow, direction, NOW, 0, 0);
        }
        assert!(!is_fast(&flow, Outbound, NOW, 1) && !is_fast(&flow, Inbound, NOW, 1));
        enter(&mut flow, Outbound, NOW);
        assert!(leave(&mut flow, Outbound, NOW, 1, 0));
        assert!(is_fast(&flow, Outbound, NOW, 1));
        assert!(!is_fast(&flow, Inbound, NOW, 1), "the other direction has proven nothing in this epoch");
    }

    #[test]
    fn a_packet_that_left_long_after_one_entered_is_another() {
        let mut flow = Flow::default();
        enter(&mut flow, Inbound, NOW);
        assert!(!leave(&mut flow, Inbound, NOW + TRANSIT + 1, 0, 0));
    }

    proptest! {
        #[test]
        fn qualification_lasts_five_to_fifteen_seconds(random in any::<u32>()) {
            let mut flow = Flow::default();
            enter(&mut flow, Inbound, NOW);
            leave(&mut flow, Inbound, NOW, 0, random);
            prop_assert!(is_fast(&flow, Inbound, NOW + QUALIFIED_MIN - 1, 0));
            prop_assert!(!is_fast(&flow, Inbound, NOW + QUALIFIED_MIN + QUALIFIED_JITTER, 0));
        }
    }
}
