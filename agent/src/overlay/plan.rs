//! Desired minus actual.

use std::collections::BTreeMap;

use super::{Actual, Desired, Op, OverlayPeer, Plan, Refusal};
use crate::{
    family::{Family, V4},
    kernel::{
        FdbEntry, Neighbour, NeighbourState, PROTOCOL_BOOT, ROUTE_PROTOCOL, Route, RouteKind, TABLE_MAIN,
        default_metric, default_scope,
    },
};

/// How many subnets side by side have routes of one scope: a network of 256 has flannel's own.
const SUBNETS_OF_A_SCOPE: u128 = 512;
/// Those that a route through a next hop can have and that have no other name: 0 is `RT_SCOPE_UNIVERSE`, 200
/// `RT_SCOPE_SITE` (`rtnetlink.h`).
const SCOPES: u128 = 200;

/// What the kernel must have for all peers, by the keys by which the kernel knows it.
#[derive(Debug, PartialEq)]
pub(super) struct Target<F: Family = V4> {
    pub(super) fdb: BTreeMap<[u8; 6], F::Addr>,
    pub(super) neighbours: BTreeMap<F::Addr, [u8; 6]>,
    pub(super) routes: BTreeMap<F::Net, Route<F>>,
    pub(super) refused: BTreeMap<F::Net, (OverlayPeer<F>, Refusal<F>)>,
}

impl<F: Family> Target<F> {
    /// Serves a peer, or notes why it is refused: one whose lease is wrong harms nobody else.
    pub(super) fn take(&mut self, desired: &Desired<F>, peer: &OverlayPeer<F>, refusal: Option<Refusal<F>>) {
        if let Some(refusal) = refusal {
            self.refused.insert(peer.subnet, (*peer, refusal));
            return;
        }
        if desired.whole {
            return;
        }
        self.routes.insert(F::trunc(peer.subnet), route(desired, peer));
        if !peer.direct {
            self.fdb.insert(peer.vtep_mac, peer.vtep);
            self.neighbours.insert(F::base(peer.subnet), peer.vtep_mac);
        }
    }
}

/// The steps from the actual state to the desired one; none where they are the same.
#[must_use]
pub fn plan<F: Family>(desired: &Desired<F>, actual: &Actual<F>) -> Plan<F> {
    plan_to(desired, &target(desired), actual)
}

/// The steps to a target that is known already.
pub(super) fn plan_to<F: Family>(desired: &Desired<F>, target: &Target<F>, actual: &Actual<F>) -> Plan<F> {
    let device = desired.device;
    let mut ops = Vec::new();

    // A unicast MAC address has one VTEP: the kernel appends only to group addresses and zero.
    let fdb: BTreeMap<_, _> = actual.fdb.iter().filter_map(|entry| own_fdb(desired, entry)).collect();
    let set = target.fdb.iter().filter(|(mac, dst)| fdb.get(*mac) != Some(*dst));
    ops.extend(set.map(|(&mac, &dst)| Op::SetFdb { device, mac, dst }));

    let neighbours: BTreeMap<_, _> =
        actual.neighbours.iter().filter_map(|neighbour| own_neighbour(desired, neighbour)).collect();
    let set = target.neighbours.iter().filter(|(address, mac)| neighbours.get(*address) != Some(*mac));
    ops.extend(set.map(|(&address, &mac)| Op::SetNeighbour { device, address, mac }));

    let (set, delete) = route_ops(desired, target, actual);
    ops.extend(set.into_iter().map(Op::SetRoute));
    ops.extend(delete.into_iter().map(Op::DelRoute));

    let stale = neighbours.keys().filter(|address| !target.neighbours.contains_key(*address));
    ops.extend(stale.map(|&address| Op::DelNeighbour { device, address }));
    let stale = fdb.iter().filter(|(mac, _)| !target.fdb.contains_key(*mac));
    ops.extend(stale.map(|(&mac, &dst)| Op::DelFdb { device, mac, dst }));

    Plan { ops, refused: target.refused.values().copied().collect() }
}

/// Who is served and who is refused, by all peers.
pub(super) fn target<F: Family>(desired: &Desired<F>) -> Target<F> {
    let (fdb, neighbours, routes, refused) = Default::default();
    let mut target = Target { fdb, neighbours, routes, refused };
    let mut mac_of: BTreeMap<[u8; 6], &OverlayPeer<F>> = BTreeMap::new();
    let mut base_of: BTreeMap<F::Addr, F::Net> = BTreeMap::new();
    if desired.whole {
        target.routes.insert(F::trunc(desired.network), network_route(desired));
    }
    for peer in desired.peers.values() {
        let base = F::base(peer.subnet);
        let refusal = unusable(desired, peer).or_else(|| {
            if peer.direct || desired.whole {
                return None;
            }
            if let Some(other) = mac_of.get(&peer.vtep_mac).filter(|other| other.vtep != peer.vtep) {
                return Some(Refusal::MacOf(other.subnet));
            }
            base_of.get(&base).map(|other| Refusal::BaseOf(*other))
        });
        if refusal.is_none() && !peer.direct && !desired.whole {
            mac_of.entry(peer.vtep_mac).or_insert(peer);
            base_of.insert(base, peer.subnet);
        }
        target.take(desired, peer, refusal);
    }
    target
}

pub(super) fn unusable<F: Family>(desired: &Desired<F>, peer: &OverlayPeer<F>) -> Option<Refusal<F>> {
    let OverlayPeer { subnet, vtep, vtep_mac, direct } = peer;
    if !F::covers(desired.network, *subnet) {
        Some(Refusal::OutsideNetwork)
    } else if F::overlap(*subnet, desired.own) {
        Some(Refusal::OverlapsOwn)
    } else if !F::is_host(*vtep) {
        Some(Refusal::BadVtep)
    } else if !direct && !desired.whole && (vtep_mac[0] & 1 == 1 || *vtep_mac == [0; 6]) {
        Some(Refusal::BadMac)
    } else {
        None
    }
}

fn route<F: Family>(desired: &Desired<F>, peer: &OverlayPeer<F>) -> Route<F> {
    let base = F::base(peer.subnet);
    Route {
        gateway: Some(if peer.direct { peer.vtep } else { base }),
        onlink: !peer.direct,
        scope: scope(desired, peer.subnet),
        ..link_route::<F>(peer.subnet, if peer.direct { desired.uplink } else { desired.device })
    }
}

/// The scope of a peer's route: flannel's in the first [`SUBNETS_OF_A_SCOPE`] subnets of the network, and another for each
/// as many more. A route through a next hop is as good with any of them.
///
/// For each new route the kernel looks through all that it has of the same protocol, scope, metric and link
/// (`fib_find_info`, 6.18: the gateway is not in that hash), so that many routes of one scope cost their number squared.
fn scope<F: Family>(desired: &Desired<F>, subnet: F::Net) -> u8 {
    if F::BITS != 32 {
        return default_scope::<F>(Some(F::base(subnet)));
    }
    let offset = F::number(F::base(subnet)).saturating_sub(F::number(F::base(desired.network)));
    let number = offset >> (F::BITS - F::prefix_len(subnet));
    // Less than SCOPES.
    (number / SUBNETS_OF_A_SCOPE % SCOPES) as u8
}

/// As flannel's: the device has no next hops.
fn network_route<F: Family>(desired: &Desired<F>) -> Route<F> {
    link_route::<F>(desired.network, desired.device)
}

/// A route of ours by an interface, without a next hop.
fn link_route<F: Family>(dst: F::Net, ifindex: u32) -> Route<F> {
    Route {
        dst: F::trunc(dst),
        gateway: None,
        ifindex: Some(ifindex),
        onlink: false,
        protocol: ROUTE_PROTOCOL,
        table: TABLE_MAIN,
        metric: default_metric::<F>(),
        source: None,
        multipath: false,
        kind: RouteKind::Unicast,
        tos: 0,
        scope: default_scope::<F>(None),
    }
}

/// The routes to set and those to delete. A set route takes the place of the first one that is there with
/// the same destination, metric and TOS (`NLM_F_REPLACE`), so that one need not be deleted.
fn route_ops<F: Family>(
    desired: &Desired<F>,
    target: &Target<F>,
    actual: &Actual<F>,
) -> (Vec<Route<F>>, Vec<Route<F>>) {
    let mut there: BTreeMap<F::Net, Vec<&Route<F>>> = BTreeMap::new();
    for route in actual.routes.iter().filter(|route| route.table == TABLE_MAIN) {
        there.entry(route.dst).or_default().push(route);
    }
    let mut set = Vec::new();
    let mut delete = Vec::new();
    for (dst, wanted) in &target.routes {
        let there = there.remove(dst).unwrap_or_default();
        let right = there.iter().position(|route| *route == wanted);
        let goes =
            right.or_else(|| there.iter().position(|route| route.metric == wanted.metric && route.tos == 0));
        if right.is_none() {
            set.push(wanted.clone());
        }
        let others = there.into_iter().enumerate().filter(|(at, _)| Some(*at) != goes);
        delete.extend(others.map(|(_, route)| route).filter(|route| own_route(desired, route)).cloned());
    }
    let stale = there.into_values().flatten().filter(|route| own_route(desired, route));
    delete.extend(stale.cloned());
    (set, delete)
}

pub(super) fn own_route<F: Family>(desired: &Desired<F>, route: &Route<F>) -> bool {
    if route.table != TABLE_MAIN || route.kind != RouteKind::Unicast {
        return false;
    }
    if route.ifindex != Some(desired.device) {
        return route.protocol == ROUTE_PROTOCOL && F::covers(desired.network, route.dst);
    }
    let flannels = if desired.whole {
        route.gateway.is_none() && route.dst == F::trunc(desired.network)
    } else {
        route.onlink && route.gateway == Some(F::base(route.dst))
    };
    route.protocol == ROUTE_PROTOCOL || route.protocol == PROTOCOL_BOOT && flannels
}

pub(super) fn own_neighbour<F: Family>(
    desired: &Desired<F>,
    neighbour: &Neighbour<F>,
) -> Option<(F::Addr, [u8; 6])> {
    let own = neighbour.ifindex == desired.device
        && neighbour.state == NeighbourState::Permanent
        && F::contains(desired.network, neighbour.address);
    own.then(|| (neighbour.address, neighbour.mac.unwrap_or_default()))
}

pub(super) fn own_fdb<F: Family>(desired: &Desired<F>, entry: &FdbEntry<F>) -> Option<([u8; 6], F::Addr)> {
    let own = entry.ifindex == desired.device && entry.own && entry.permanent && entry.mac != [0; 6];
    entry.dst.filter(|_| own && entry.mac[0] & 1 == 0).map(|dst| (entry.mac, dst))
}
