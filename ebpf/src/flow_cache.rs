//! What each CPU remembers of the flows that it has just found fast, so that it need not look them up for every packet.
//!
//! The flow table is the truth, and a look-up in it is the dearest step of the gate. So a CPU that has found a direction
//! of a flow fast notes that in a slot of its own, and goes by the note for at most [`TICKS`] ticks of the timer. A note
//! holds for the state in which it was taken: another epoch, or any flow from which its qualification was taken away
//! since (`withdrawn`), ends all of them. So what a note can outlive is the expiry of its flow, by less than
//! [`TICKS`] ticks.
//!
//! A look-up every few ticks also keeps a busy flow among the recently used ones of the table.

use crate::{abi::FlowKey, flow::Direction};

/// Slots of each CPU, a power of two. Flows that share one take turns in the table.
pub const SLOTS: u32 = 4096;
/// For how many timer ticks a note holds: 8 to 80 ms.
pub const TICKS: u64 = 8;

/// The state in which a note is taken or read. To be read before the flow is looked up: then a note that is too late
/// is of an older state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// The kernel's `jiffies`.
    pub tick: u64,
    /// See [`crate::abi::map::EPOCH`].
    pub epoch: u32,
    /// See [`crate::abi::map::WITHDRAWN`]: its lower half, which is another one for as long as a note could hold.
    pub withdrawn: u32,
}

/// A note: this direction of this flow is fast. The direction is told by the slot. Written by the programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Note {
    flow: [u64; 2],
    tick: u64,
    epoch: u32,
    withdrawn: u32,
}

impl Note {
    /// A note of a flow that was found fast.
    #[inline(always)]
    #[must_use]
    pub fn new(key: &FlowKey, state: State) -> Self {
        Self { flow: words(key), tick: state.tick, epoch: state.epoch, withdrawn: state.withdrawn }
    }

    /// Whether it is of this flow, and still holds.
    #[inline(always)]
    #[must_use]
    pub fn holds(&self, key: &FlowKey, now: State) -> bool {
        let [first, second] = words(key);
        self.flow[0] == first
            && self.flow[1] == second
            && self.epoch == now.epoch
            && self.withdrawn == now.withdrawn
            && now.tick.wrapping_sub(self.tick) < TICKS
    }
}

/// The slot of a direction of a flow. Even ones are for outbound flows, odd ones for inbound flows.
#[inline(always)]
#[must_use]
pub fn slot(key: &FlowKey, direction: Direction) -> u32 {
    let [addresses, rest] = words(key);
    // Multiplication carries every bit upwards (Knuth's multiplicative hash), so the top bits depend on all.
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let hash = (addresses.wrapping_mul(GOLDEN) ^ rest).wrapping_mul(GOLDEN);
    let pair = (hash >> (u64::BITS - (SLOTS / 2).ilog2())) as u32;
    pair * 2 + u32::from(direction == Direction::Inbound)
}

/// The key as two words.
#[inline(always)]
fn words(key: &FlowKey) -> [u64; 2] {
    let [a, b, c, d] = key.local;
    let [e, f, g, h] = key.remote;
    let ([i, j], [k, l]) = (key.local_port, key.remote_port);
    let [m, n, o, p] = key.protocol.to_ne_bytes();
    [u64::from_ne_bytes([a, b, c, d, e, f, g, h]), u64::from_ne_bytes([i, j, k, l, m, n, o, p])]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const NOW: State = State { tick: 4_294_937_296, epoch: 3, withdrawn: 7 };

    fn key(port: u16) -> FlowKey {
        FlowKey::new(6, (0x0a05_0102, port), (0x0a05_0203, 80))
    }

    #[test]
    fn a_note_holds_for_its_flow_in_its_state_and_for_some_ticks() {
        let note = Note::new(&key(1), NOW);
        assert!(note.holds(&key(1), NOW));
        assert!(note.holds(&key(1), State { tick: NOW.tick + TICKS - 1, ..NOW }));
        assert!(!note.holds(&key(1), State { tick: NOW.tick + TICKS, ..NOW }));
        assert!(!note.holds(&key(1), State { epoch: 4, ..NOW }));
        assert!(!note.holds(&key(1), State { withdrawn: 8, ..NOW }));
    }

    #[test]
    fn a_note_is_of_no_other_flow() {
        let flow = FlowKey::new(6, (0x0a05_0102, 1), (0x0a05_0203, 80));
        let note = Note::new(&flow, NOW);
        let others = [
            FlowKey { local: [10, 5, 1, 3], ..flow },
            FlowKey { remote: [10, 5, 2, 4], ..flow },
            FlowKey { local_port: [0, 2], ..flow },
            FlowKey { remote_port: [0, 81], ..flow },
            FlowKey { protocol: 17, ..flow },
            flow.reversed(),
        ];
        for other in others {
            assert!(!note.holds(&other, NOW), "{other:?}");
        }
        assert!(!Note::default().holds(&flow, State { tick: 0, epoch: 0, withdrawn: 0 }), "an empty slot");
    }

    #[test]
    fn flows_spread_over_the_slots_and_their_directions_stand_apart() {
        let flow = |local, local_port, remote, remote_port| {
            FlowKey::new(6, (0x0a05_0100 + local, local_port), (0x0a05_0200 + remote, remote_port))
        };
        let kinds: [(&str, &dyn Fn(u16) -> FlowKey); 4] = [
            ("a client's", &|n| flow(2, 32_768 + n, 3, 80)),
            ("a server's", &|n| flow(2, 80, 3, 32_768 + n)),
            ("one peer's pods'", &|n| flow(2 + u32::from(n % 50), 40_000, u32::from(n / 50), 80)),
            ("many pods'", &|n| flow(2, 40_000, u32::from(n) * 19, 80)),
        ];
        for (what, flow) in kinds {
            let slots: BTreeSet<u32> = (0..2000).map(|n| slot(&flow(n), Direction::Outbound)).collect();
            // A random function gives 1277 of 2000 flows a slot, out of 2048.
            assert!(slots.len() > 1200, "{} of {what} 2000 flows have a slot of their own", slots.len());
            assert!(slots.iter().all(|slot| slot % 2 == 0 && *slot < SLOTS));
        }
        assert_eq!(slot(&key(5), Direction::Inbound), slot(&key(5), Direction::Outbound) + 1);
    }
}
