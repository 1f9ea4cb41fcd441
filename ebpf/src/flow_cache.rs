//! What each CPU remembers of the flows that it has just found fast, so that it need not look them up for every packet.
//!
//! The flow table is the truth, and a look-up in it is the dearest step of the gate. So a CPU that has found a direction
//! of a flow fast notes that in a slot of its own, and goes by the note for at most [`TICKS`] ticks of the timer. A note
//! holds for the state in which it was taken: another epoch, or any flow from which its qualification was taken away
//! since (`withdrawn`), ends all of them. So what a note can outlive is the expiry of its flow, by less than
//! [`TICKS`] ticks.
//!
//! A look-up every few ticks also keeps a busy flow among the recently used ones of the table.

use crate::{abi::FlowKey, flow::Direction, ipv6};

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

/// The addresses of a flow, by which notes are told apart.
pub trait Ends: Sized {
    /// A flow's key, all of it, in words.
    type Words: Copy;

    /// The words of a key whose ports and protocol are `rest`.
    fn words(local: &Self, remote: &Self, rest: u64) -> Self::Words;
    /// Whether both are the same key's.
    fn is_same(a: &Self::Words, b: &Self::Words) -> bool;
    /// A number that every bit of the key has part in.
    fn mix(words: Self::Words) -> u64;
}

/// A note: this direction of this flow is fast. The direction is told by the slot. Written by the programs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Note<W = [u64; 2]> {
    flow: W,
    tick: u64,
    epoch: u32,
    withdrawn: u32,
}

impl<W> Note<W> {
    /// A note of a flow that was found fast.
    #[inline(always)]
    #[must_use]
    pub fn new<A: Ends<Words = W>>(key: &FlowKey<A>, state: State) -> Self {
        Self { flow: words(key), tick: state.tick, epoch: state.epoch, withdrawn: state.withdrawn }
    }

    /// Whether it is of this flow, and still holds.
    #[inline(always)]
    #[must_use]
    pub fn holds<A: Ends<Words = W>>(&self, key: &FlowKey<A>, now: State) -> bool {
        A::is_same(&self.flow, &words(key))
            && self.epoch == now.epoch
            && self.withdrawn == now.withdrawn
            && now.tick.wrapping_sub(self.tick) < TICKS
    }
}

/// 2^64 divided by the golden ratio.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// The slot of a direction of a flow. Even ones are for outbound flows, odd ones for inbound flows.
#[inline(always)]
#[must_use]
pub fn slot<A: Ends>(key: &FlowKey<A>, direction: Direction) -> u32 {
    // Multiplication carries every bit upwards (Knuth's multiplicative hash), so the top bits depend on all.
    let hash = A::mix(words(key)).wrapping_mul(GOLDEN);
    let pair = (hash >> (u64::BITS - (SLOTS / 2).ilog2())) as u32;
    pair * 2 + u32::from(direction == Direction::Inbound)
}

impl Ends for [u8; 4] {
    type Words = [u64; 2];

    #[inline(always)]
    fn words([a, b, c, d]: &Self, [e, f, g, h]: &Self, rest: u64) -> [u64; 2] {
        [u64::from_ne_bytes([*a, *b, *c, *d, *e, *f, *g, *h]), rest]
    }

    #[inline(always)]
    fn is_same(a: &[u64; 2], b: &[u64; 2]) -> bool {
        a[0] == b[0] && a[1] == b[1]
    }

    #[inline(always)]
    fn mix([addresses, rest]: [u64; 2]) -> u64 {
        addresses.wrapping_mul(GOLDEN) ^ rest
    }
}

impl Ends for [u8; 16] {
    type Words = [u64; 5];

    #[inline(always)]
    fn words(local: &Self, remote: &Self, rest: u64) -> [u64; 5] {
        let ([a, b], [c, d]) = (ipv6::words(local), ipv6::words(remote));
        [a, b, c, d, rest]
    }

    #[inline(always)]
    fn is_same(a: &[u64; 5], b: &[u64; 5]) -> bool {
        (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | (a[4] ^ b[4]) == 0
    }

    /// Rotated in between, since what differs in an address stands at its end: the top of a word.
    #[inline(always)]
    fn mix([a, b, c, d, rest]: [u64; 5]) -> u64 {
        let step = |hash: u64, word: u64| hash.wrapping_mul(GOLDEN).rotate_left(32) ^ word;
        step(step(step(step(a, b), c), d), rest)
    }
}

#[inline(always)]
fn words<A: Ends>(key: &FlowKey<A>) -> A::Words {
    A::words(&key.local, &key.remote, rest(key))
}

/// Ports and protocol.
#[inline(always)]
fn rest<A>(key: &FlowKey<A>) -> u64 {
    let ([i, j], [k, l]) = (key.local_port, key.remote_port);
    let [m, n, o, p] = key.protocol.to_ne_bytes();
    u64::from_ne_bytes([i, j, k, l, m, n, o, p])
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

    #[test]
    fn every_bit_of_an_ipv6_key_counts_and_flows_spread() {
        let key = |local: u16, remote: u16| {
            let address = |subnet: u8, host: u16| {
                let mut octets = [0xfd; 16];
                octets[7] = subnet;
                octets[8..14].fill(0);
                octets[14..].copy_from_slice(&host.to_be_bytes());
                octets
            };
            FlowKey::of(6, (address(1, local), 40_000), (address(2, 9), remote))
        };
        let flow = key(1, 80);
        let note = Note::new(&flow, NOW);
        assert!(note.holds(&flow, NOW));
        for bit in 0..128 {
            let (mut local, mut remote) = (flow, flow);
            local.local[bit / 8] ^= 1 << (bit % 8);
            remote.remote[bit / 8] ^= 1 << (bit % 8);
            assert!(!note.holds(&local, NOW) && !note.holds(&remote, NOW), "bit {bit}");
        }
        assert!(!note.holds(&FlowKey { protocol: 17, ..flow }, NOW));
        assert!(!note.holds(&flow.reversed(), NOW));
        let by_port: BTreeSet<u32> = (0..2000).map(|port| slot(&key(1, port), Direction::Outbound)).collect();
        let by_pod: BTreeSet<u32> = (0..2000).map(|pod| slot(&key(pod, 80), Direction::Outbound)).collect();
        assert!(
            by_port.len() > 1100 && by_pod.len() > 1100,
            "{} and {} of 2000",
            by_port.len(),
            by_pod.len()
        );
    }
}
