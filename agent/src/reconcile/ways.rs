//! What is known of the ways to VTEPs, and what of it must be asked again.
//!
//! Links, addresses, routes and rules tell of their changes, and then nothing of it is sure any more. The path MTU that
//! IPv6 learns of a router is told by nobody: so each tick asks again for some, in turn.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound::{Excluded, Unbounded},
};

use crate::{dataplane::Underlay, family::Family};

/// How many ways a tick doubts: of so many all are asked for in each, and 65 000 cost no tick more than these.
const EACH_TICK: usize = 512;

/// Ways to VTEPs, as the kernel last told them.
pub(super) struct Ways<F: Family> {
    known: BTreeMap<F::Addr, Known<F>>,
    /// How often something has changed that may be another way.
    changes: u64,
    /// Those that are asked for again though nothing has told of a change.
    doubted: BTreeSet<F::Addr>,
    /// The last one of which the tick doubted.
    last: Option<F::Addr>,
}

struct Known<F: Family> {
    /// `None`: the fast path must leave the peer to the kernel.
    way: Option<Underlay<F>>,
    /// [`Ways::changes`] when it was asked for.
    asked: u64,
}

impl<F: Family> Default for Ways<F> {
    fn default() -> Self {
        Self { known: BTreeMap::new(), changes: 0, doubted: BTreeSet::new(), last: None }
    }
}

impl<F: Family> Ways<F> {
    /// The way to a VTEP, where the fast path may use it.
    pub(super) fn get(&self, vtep: F::Addr) -> Option<Underlay<F>> {
        self.known.get(&vtep)?.way
    }

    /// How many are known.
    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    /// Something has changed: none is sure any more.
    pub(super) fn doubt_all(&mut self) {
        self.changes += 1;
        self.doubted.clear();
    }

    /// A tick: some are not sure any more, the next ones in turn.
    pub(super) fn doubt_some(&mut self) {
        let after = self.known.range((self.last.map_or(Unbounded, Excluded), Unbounded));
        let before = self.last.into_iter().flat_map(|last| self.known.range(..=last));
        let next: Vec<F::Addr> = after.chain(before).map(|(vtep, _)| *vtep).take(EACH_TICK).collect();
        self.last = next.last().copied();
        self.doubted.extend(next);
    }

    /// Whether the way must be asked for.
    pub(super) fn is_unsure(&self, vtep: F::Addr) -> bool {
        self.has_changed(vtep) || self.doubted.contains(&vtep)
    }

    fn has_changed(&self, vtep: F::Addr) -> bool {
        self.known.get(&vtep).is_none_or(|known| known.asked != self.changes)
    }

    /// Notes what the kernel says now.
    ///
    /// A path MTU that it has learnt it forgets after ten minutes, and the next large packet has to find it again. A fast
    /// one would be lost, and those after it until a tick; so while nothing else changes, the MTU here does not grow, and
    /// the kernel is who tries.
    pub(super) fn learn(&mut self, vtep: F::Addr, now: Option<Underlay<F>>) {
        let before = if self.has_changed(vtep) { None } else { self.get(vtep) };
        let smaller = |now: Underlay<F>| {
            let before = before.filter(|before| Underlay { mtu: now.mtu, ..*before } == now);
            Underlay { mtu: before.map_or(now.mtu, |before| before.mtu.min(now.mtu)), ..now }
        };
        self.known.insert(vtep, Known { way: now.map(smaller), asked: self.changes });
        self.doubted.remove(&vtep);
    }

    /// Forgets all but these: a way to nobody leads nowhere.
    pub(super) fn retain(&mut self, vteps: &BTreeSet<F::Addr>) {
        self.known.retain(|vtep, _| vteps.contains(vtep));
        self.doubted.retain(|vtep| vteps.contains(vtep));
    }

    /// Interface indices of the links at which they begin.
    pub(super) fn begin(&self) -> impl Iterator<Item = u32> {
        self.known.values().filter_map(|known| Some(known.way?.uplink))
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::family::V4;

    fn vtep(number: u32) -> Ipv4Addr {
        Ipv4Addr::from(0x0a00_0000 + number)
    }

    fn way(uplink: u32, mtu: u16) -> Option<Underlay<V4>> {
        Some(Underlay { uplink, next_hop: vtep(0), source: vtep(1), mtu })
    }

    fn known(count: u32) -> Ways<V4> {
        let mut ways = Ways::default();
        (0..count).for_each(|number| ways.learn(vtep(number), way(7, 1500)));
        ways
    }

    fn unsure(ways: &Ways<V4>, count: u32) -> Vec<u32> {
        (0..count).filter(|number| ways.is_unsure(vtep(*number))).collect()
    }

    #[test]
    fn what_is_known_is_sure_until_something_changes() {
        let mut ways = known(3);
        assert_eq!(unsure(&ways, 4), [3], "nobody has asked for it");
        ways.doubt_all();
        assert_eq!(unsure(&ways, 4), [0, 1, 2, 3]);
        assert_eq!(ways.get(vtep(1)), way(7, 1500), "until the kernel has answered");
        ways.learn(vtep(1), None);
        assert_eq!((unsure(&ways, 4), ways.get(vtep(1))), (vec![0, 2, 3], None));
    }

    #[test]
    fn ticks_doubt_all_in_turn_and_each_only_some() {
        let count = 1200;
        let mut ways = known(count);
        let mut times = vec![0; count as usize];
        for _ in 0..3 {
            ways.doubt_some();
            let doubted = unsure(&ways, count);
            assert_eq!(doubted.len(), EACH_TICK);
            for number in doubted {
                times[number as usize] += 1;
                ways.learn(vtep(number), way(7, 1500));
            }
        }
        assert!(times.iter().all(|times| [1, 2].contains(times)), "{times:?}");
        let mut few = known(5);
        few.doubt_some();
        assert_eq!(unsure(&few, 5), [0, 1, 2, 3, 4]);
        few.doubt_some();
        assert_eq!(unsure(&few, 5), [0, 1, 2, 3, 4]);
        Ways::<V4>::default().doubt_some();
    }

    #[test]
    fn a_smaller_path_mtu_stays_until_something_else_changes() {
        let mut ways = known(1);
        let asked = |ways: &mut Ways<V4>, now| {
            ways.doubt_some();
            ways.learn(vtep(0), now);
            ways.get(vtep(0))
        };
        assert_eq!(asked(&mut ways, way(7, 1400)), way(7, 1400));
        assert_eq!(asked(&mut ways, way(7, 1500)), way(7, 1400), "it has only expired");
        assert_eq!(asked(&mut ways, way(8, 1500)), way(8, 1500), "another way");
        assert_eq!(asked(&mut ways, way(8, 1300)), way(8, 1300));
        ways.doubt_all();
        assert_eq!(asked(&mut ways, way(8, 1500)), way(8, 1500));
    }

    #[test]
    fn ways_to_nobody_are_forgotten() {
        let mut ways = known(3);
        ways.learn(vtep(1), way(8, 1500));
        assert_eq!(ways.begin().collect::<BTreeSet<_>>(), [7, 8].into());
        ways.retain(&[vtep(0), vtep(9)].into());
        assert_eq!((ways.len(), ways.begin().collect::<Vec<_>>()), (1, vec![7]));
    }
}
