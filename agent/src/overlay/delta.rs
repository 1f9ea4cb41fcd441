//! What a few changed peers ask for, when all else is as it was: the steps that [`plan`](super::plan::plan) would find by
//! comparing everything.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound::{Excluded, Unbounded},
};

use super::{Desired, Expected, Op, OverlayPeer, Plan, plan::unusable};
use crate::{family::Family, kernel::Route};

/// Peers by the subnets where something has changed; `None` where there is none any more.
pub type PeerChanges<F> = BTreeMap<<F as Family>::Net, Option<OverlayPeer<F>>>;

/// The keys at which the target may have changed.
struct Touched<F: Family> {
    macs: BTreeSet<[u8; 6]>,
    bases: BTreeSet<F::Addr>,
    subnets: BTreeSet<F::Net>,
}

impl<F: Family> Expected<F> {
    /// The plan for these changes, where all that was expected is there; from then on, what is expected has them.
    ///
    /// `None`, and nothing is changed: the changes are not these peers' alone. Where subnets overlap or a MAC address is
    /// another peer's as well, who is served is a matter of all of them.
    #[must_use]
    pub fn change(&mut self, changes: &PeerChanges<F>) -> Option<Plan<F>> {
        if !self.concern_nobody_else(changes) {
            return None;
        }
        let mut touched =
            Touched::<F> { macs: BTreeSet::new(), bases: BTreeSet::new(), subnets: BTreeSet::new() };
        let (mut fdb, mut neighbours, mut routes) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        // All that goes before all that comes: a MAC address may move from one subnet to another.
        for subnet in changes.keys() {
            let (base, net) = (F::base(*subnet), F::trunc(*subnet));
            if let Some(mac) = self.desired.peers.remove(subnet).and_then(mac) {
                self.macs.remove(&mac);
                fdb.extend(self.target.fdb.remove(&mac).map(|dst| (mac, dst)));
                touched.macs.insert(mac);
            }
            neighbours.extend(self.target.neighbours.remove(&base).map(|mac| (base, mac)));
            routes.extend(self.target.routes.remove(&net).map(|route| (net, route)));
            self.target.refused.remove(subnet);
            touched.bases.insert(base);
            touched.subnets.insert(net);
        }
        for (subnet, peer) in changes {
            let Some(peer) = peer else { continue };
            self.desired.peers.insert(*subnet, *peer);
            if let Some(mac) = mac(*peer) {
                self.macs.insert(mac, 1);
                touched.macs.insert(mac);
            }
            let refusal = unusable(&self.desired, peer);
            self.target.take(&self.desired, peer, refusal);
        }
        Some(self.steps(&touched, &fdb, &neighbours, &routes))
    }

    /// In the order of [`plan`](super::plan::plan).
    fn steps(
        &self,
        touched: &Touched<F>,
        fdb: &BTreeMap<[u8; 6], F::Addr>,
        neighbours: &BTreeMap<F::Addr, [u8; 6]>,
        routes: &BTreeMap<F::Net, Route<F>>,
    ) -> Plan<F> {
        let (target, device) = (&self.target, self.desired.device);
        let mut ops = Vec::new();
        let set = touched.macs.iter().filter_map(|mac| target.fdb.get_key_value(mac));
        let set = set.filter(|(mac, dst)| fdb.get(*mac) != Some(*dst));
        ops.extend(set.map(|(&mac, &dst)| Op::SetFdb { device, mac, dst }));
        let set = touched.bases.iter().filter_map(|base| target.neighbours.get_key_value(base));
        let set = set.filter(|(base, mac)| neighbours.get(*base) != Some(*mac));
        ops.extend(set.map(|(&address, &mac)| Op::SetNeighbour { device, address, mac }));
        let set = touched.subnets.iter().filter_map(|subnet| target.routes.get_key_value(subnet));
        let set = set.filter(|(subnet, route)| routes.get(*subnet) != Some(*route));
        ops.extend(set.map(|(_, route)| Op::SetRoute(route.clone())));
        let gone = routes.iter().filter(|(subnet, _)| !target.routes.contains_key(*subnet));
        ops.extend(gone.map(|(_, route)| Op::DelRoute(route.clone())));
        let gone = neighbours.keys().filter(|base| !target.neighbours.contains_key(*base));
        ops.extend(gone.map(|&address| Op::DelNeighbour { device, address }));
        let gone = fdb.iter().filter(|(mac, _)| !target.fdb.contains_key(*mac));
        ops.extend(gone.map(|(&mac, &dst)| Op::DelFdb { device, mac, dst }));
        Plan { ops, refused: target.refused.values().copied().collect() }
    }

    /// Whether no peer that has not changed, and no two that have, share a subnet or a MAC address.
    fn concern_nobody_else(&self, changes: &PeerChanges<F>) -> bool {
        let Desired { peers, whole, .. } = &self.desired;
        let mut now: BTreeMap<[u8; 6], u32> = BTreeMap::new();
        let mut leave: BTreeMap<[u8; 6], u32> = BTreeMap::new();
        for (subnet, peer) in changes {
            if overlaps::<F, _>(peers, *subnet) || overlaps::<F, _>(changes, *subnet) {
                return false;
            }
            if let Some(mac) = peers.get(subnet).copied().and_then(mac) {
                *leave.entry(mac).or_default() += 1;
            }
            if let Some(mac) = peer.and_then(mac) {
                *now.entry(mac).or_default() += 1;
            }
        }
        let of_all = |mac: &[u8; 6]| self.macs.get(mac).copied().unwrap_or_default();
        let come = |(mac, come): (&[u8; 6], &u32)| of_all(mac) + come - leave.get(mac).unwrap_or(&0) == 1;
        !*whole && leave.keys().all(|mac| of_all(mac) == 1) && now.iter().all(come)
    }
}

/// The MAC address that must be a peer's own; a direct one has no use for its.
pub(super) fn mac<F: Family>(peer: OverlayPeer<F>) -> Option<[u8; 6]> {
    (!peer.direct).then_some(peer.vtep_mac)
}

/// Whether another subnet has a part in this one, or this one in it.
fn overlaps<F: Family, T>(subnets: &BTreeMap<F::Net, T>, subnet: F::Net) -> bool {
    let base = F::base(subnet);
    let around = |len: u8| F::net(base, len).map(F::trunc);
    let within = subnets.range((Excluded(subnet), Unbounded)).next();
    within.is_some_and(|(next, _)| F::covers(subnet, *next))
        || (0..F::prefix_len(subnet)).filter_map(around).any(|around| subnets.contains_key(&around))
}
