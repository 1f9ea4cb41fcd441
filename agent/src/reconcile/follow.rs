//! Peers whose leases have changed, where nothing else has: a change costs what it changes. Wherever that is in doubt, and
//! on each tick, all peers are planned from what is there ([`Reconciler::peers`]).

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;

use super::{Reconciler, Work, half::Side};
use crate::{
    dataplane::{PeerPath, Way},
    lease::Lease,
    overlay::{OverlayPeer, PeerChanges},
    registry::{Cluster, Peers},
};

impl Reconciler {
    /// Brings the peers that have changed to where their leases are; says whether anything had to be done. `None`, and
    /// nothing is done: all peers must be looked at.
    pub(super) async fn follow<F: Side>(&mut self, cluster: &Cluster, work: Work) -> Result<Option<bool>> {
        let kept = F::kept(self);
        let known = kept.followed.as_ref().filter(|_| work == Work::Peers && kept.programmed);
        let Some(leases) =
            known.filter(|_| cluster.is_listed()).map(|known| changed::<F>(known, &cluster.peers))
        else {
            return Ok(None);
        };
        self.find_ways::<F>(leases.values().flatten().filter_map(F::vtep)).await;
        let mut left_out = F::kept(self).left_out.clone();
        let (mut changes, mut paths) = (PeerChanges::<F>::new(), Vec::<PeerPath<F>>::new());
        // Those that were served, and so are in the maps.
        let mut before: Vec<OverlayPeer<F>> = Vec::new();
        for (subnet, lease) in leases {
            left_out.remove(&subnet);
            let wanted = lease.map(|lease| self.wanted_path::<F>(&lease, subnet));
            let wanted =
                wanted.and_then(|wanted| wanted.map_err(|reason| left_out.insert(subnet, reason)).ok());
            let expected = F::kept(self).expected.as_ref();
            let was = expected.and_then(|expected| expected.desired().peers.get(&subnet)).copied();
            let peer = wanted.map(|(peer, _)| peer);
            if was == peer {
                continue;
            }
            before.extend(was.filter(|_| !expected.is_some_and(|expected| expected.refuses(subnet))));
            paths.extend(wanted.map(|(_, path)| path));
            changes.insert(subnet, peer);
        }
        let kept = F::kept_mut(self);
        let Some(plan) = kept.expected.as_mut().and_then(|expected| expected.change(&changes)) else {
            return Ok(None);
        };
        let refused: BTreeSet<F::Net> = plan.refused.iter().map(|(peer, _)| peer.subnet).collect();
        paths.retain(|path| !refused.contains(&path.subnet));
        let stays: BTreeSet<F::Net> = paths.iter().map(|path| path.subnet).collect();
        let gone = before.iter().map(|peer| peer.subnet).filter(|subnet| !stays.contains(subnet));
        // Until all of it is done, what is there is not what is expected.
        (kept.followed, kept.programmed) = (None, false);
        let gone = match self.dataplane() {
            Some(dataplane) => dataplane.half_mut::<F>().remove_peers(gone)?,
            None => 0,
        };
        self.tell_of_refused(&plan, left_out.values().cloned().collect());
        self.apply(&plan).await;
        let mut changed = gone > 0 || !plan.is_empty();
        if let Some(dataplane) = self.dataplane() {
            let left: Vec<F::Addr> = before.iter().map(|peer| peer.vtep).collect();
            let changes = dataplane.half_mut::<F>().change_peers(&paths, &left)?;
            if gone > 0 || changes.invalidates() {
                dataplane.bump_epoch()?;
            }
            changed |= !changes.is_empty();
        }
        let kept = F::kept_mut(self);
        if paths.iter().any(|path| path.way == Way::Direct) {
            kept.has_direct_peers = true;
        } else if before.iter().any(|peer| peer.direct) {
            let mut peers = kept.expected.iter().flat_map(|expected| expected.desired().peers.values());
            kept.has_direct_peers = peers.any(|peer| peer.direct);
        }
        kept.left_out = left_out;
        kept.followed = Some(cluster.peers.clone());
        Ok(Some(changed))
    }
}

/// The subnets of a family at which leases have changed, and what is there now.
fn changed<F: Side>(before: &Peers, now: &Peers) -> BTreeMap<F::Net, Option<Lease>> {
    let leases = before.changes_to(now);
    let half = |lease: &Lease| lease.key.half::<F>();
    let mut changed: BTreeMap<_, _> =
        leases.iter().filter_map(|(_, old, _)| old.and_then(half)).map(|subnet| (subnet, None)).collect();
    // A subnet is in one lease at a time, and may have gone from one to another.
    changed.extend(leases.iter().filter_map(|(_, _, new)| {
        let lease = (*new)?;
        Some((half(lease)?, Some(lease.clone())))
    }));
    changed
}
