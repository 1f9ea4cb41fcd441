use std::collections::BTreeMap;

use proptest::{collection::vec, prelude::*};

use super::{plan::target, *};
use crate::kernel::{NeighbourState, PROTOCOL_BOOT, ROUTE_PROTOCOL, RouteKind, TABLE_MAIN};

const DEVICE: u32 = 7;
const UPLINK: u32 = 2;

/// A kernel as far as plans see it: routes by destination and metric, neighbours by address, FDB by MAC.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Model {
    routes: BTreeMap<(Ipv4Net, u32, u32), Route>,
    neighbours: BTreeMap<(u32, Ipv4Addr), Neighbour>,
    fdb: BTreeMap<(u32, [u8; 6]), FdbEntry>,
}

impl Model {
    /// As `NLM_F_CREATE | NLM_F_REPLACE` does, and as a deletion of exactly this object does.
    fn apply(&mut self, plan: &Plan) {
        for op in &plan.ops {
            match op {
                Op::SetFdb { device, mac, dst } => {
                    self.fdb.insert((*device, *mac), fdb_entry(*mac, *dst));
                }
                Op::SetNeighbour { device, address, mac } => {
                    self.neighbours.insert((*device, *address), neighbour(*address, *mac));
                }
                Op::SetRoute(route) => self.add(route.clone()),
                Op::DelRoute(route) => {
                    let removed = self.routes.remove(&key(route));
                    assert_eq!(removed.as_ref(), Some(route), "only what is there is deleted");
                }
                Op::DelNeighbour { device, address } => {
                    assert!(self.neighbours.remove(&(*device, *address)).is_some());
                }
                Op::DelFdb { device, mac, dst } => {
                    let removed = self.fdb.remove(&(*device, *mac)).unwrap();
                    assert_eq!(removed.dst, Some(*dst));
                }
            }
        }
    }

    fn add(&mut self, route: Route) {
        self.routes.insert(key(&route), route);
    }

    /// What [`crate::kernel::Kernel::overlay_actual`] reads.
    fn actual(&self) -> Actual {
        let seen = |route: &&Route| route.ifindex == Some(DEVICE) || route.protocol == ROUTE_PROTOCOL;
        Actual {
            routes: self.routes.values().filter(seen).cloned().collect(),
            neighbours: self.neighbours.values().copied().collect(),
            fdb: self.fdb.values().copied().collect(),
        }
    }
}

fn key(route: &Route) -> (Ipv4Net, u32, u32) {
    (route.dst, route.metric, route.table)
}

fn neighbour(address: Ipv4Addr, mac: [u8; 6]) -> Neighbour {
    Neighbour { ifindex: DEVICE, address, mac: Some(mac), state: NeighbourState::Permanent }
}

fn fdb_entry(mac: [u8; 6], dst: Ipv4Addr) -> FdbEntry {
    FdbEntry {
        ifindex: DEVICE,
        mac,
        dst: Some(dst),
        master: None,
        own: true,
        permanent: true,
        fixed: false,
        ext_learned: false,
        vlan: None,
    }
}

fn net(text: &str) -> Ipv4Net {
    text.parse().unwrap()
}

fn vxlan_peer(n: u8) -> OverlayPeer {
    OverlayPeer {
        subnet: Ipv4Net::new(Ipv4Addr::new(10, 5, n, 0), 24).unwrap(),
        vtep: Ipv4Addr::new(192, 168, 77, n),
        vtep_mac: [2, 0, 0, 0, 0, n],
        direct: false,
    }
}

fn desired(peers: impl IntoIterator<Item = OverlayPeer>) -> Desired {
    Desired {
        network: net("10.5.0.0/16"),
        own: net("10.5.1.0/24"),
        device: DEVICE,
        uplink: UPLINK,
        peers: peers.into_iter().map(|peer| (peer.subnet, peer)).collect(),
    }
}

/// Peers out of few, so that they meet: wrong ones as well as right ones.
fn peers() -> impl Strategy<Value = Vec<OverlayPeer>> {
    let peer =
        (0u8..12, 22u8..=26, 0u8..6, 0u8..6, any::<bool>()).prop_map(|(third, len, vtep, mac, direct)| {
            OverlayPeer {
                subnet: Ipv4Net::new(Ipv4Addr::new(10, if third == 11 { 6 } else { 5 }, third, 0), len)
                    .unwrap()
                    .trunc(),
                vtep: Ipv4Addr::new(if vtep == 5 { 224 } else { 192 }, 168, 77, vtep),
                vtep_mac: [if mac == 5 { 1 } else { 2 }, 0, 0, 0, 0, mac],
                direct,
            }
        });
    vec(peer, 0..10)
}

/// Foreign and own, right and wrong routes in one kernel.
fn route() -> impl Strategy<Value = Route> {
    let protocols = prop_oneof![Just(ROUTE_PROTOCOL), Just(PROTOCOL_BOOT), Just(2u8)];
    let links = prop_oneof![Just(DEVICE), Just(UPLINK), Just(9u32)];
    let shape = (any::<bool>(), any::<bool>(), prop_oneof![Just(0u32), Just(50)], any::<bool>());
    (0u8..12, 22u8..=26, protocols, links, shape).prop_map(|(third, len, protocol, link, shape)| {
        let (onlink, base, metric, main) = shape;
        let dst =
            Ipv4Net::new(Ipv4Addr::new(10, if third == 11 { 6 } else { 5 }, third, 0), len).unwrap().trunc();
        Route {
            dst,
            gateway: Some(if base { dst.network() } else { Ipv4Addr::new(192, 168, 77, third) }),
            ifindex: Some(link),
            onlink,
            protocol,
            table: if main { TABLE_MAIN } else { 100 },
            metric,
            source: None,
            multipath: false,
            kind: RouteKind::Unicast,
            tos: 0,
        }
    })
}

prop_compose! {
    fn model()(
        routes in vec(route(), 0..20),
        neighbours in vec((0u8..12, 0u8..6, any::<bool>()), 0..10),
        fdb in vec((0u8..6, 0u8..6, any::<bool>()), 0..10),
    ) -> Model {
        let mut model = Model::default();
        for route in routes {
            model.add(route);
        }
        for (third, mac, permanent) in neighbours {
            let mut it = neighbour(Ipv4Addr::new(10, if third == 11 { 6 } else { 5 }, third, 0), [2, 0, 0, 0, 0, mac]);
            if !permanent {
                it.state = NeighbourState::Stale;
            }
            model.neighbours.insert((DEVICE, it.address), it);
        }
        for (mac, vtep, permanent) in fdb {
            let mut it = fdb_entry([2, 0, 0, 0, 0, mac], Ipv4Addr::new(192, 168, 77, vtep));
            it.permanent = permanent;
            model.fdb.insert((DEVICE, it.mac), it);
        }
        model
    }
}

proptest! {
    /// Whatever there was before: afterwards there is what is desired, and a second look finds nothing to do.
    #[test]
    fn one_pass_makes_the_actual_state_the_desired_one(peers in peers(), mut model in model()) {
        let desired = desired(peers);
        model.apply(&plan(&desired, &model.actual()));
        prop_assert_eq!(plan(&desired, &model.actual()).ops, vec![]);
        let target = target(&desired);
        for (dst, route) in &target.routes {
            prop_assert_eq!(model.routes.get(&(*dst, 0, TABLE_MAIN)), Some(route));
        }
        for (address, mac) in &target.neighbours {
            prop_assert_eq!(model.neighbours[&(DEVICE, *address)].mac, Some(*mac));
        }
        for (mac, vtep) in &target.fdb {
            prop_assert_eq!(model.fdb[&(DEVICE, *mac)].dst, Some(*vtep));
        }
    }

    /// Nothing is touched that is not ours, unless a peer's own route, neighbour or FDB entry takes its key.
    #[test]
    fn foreign_objects_stay(peers in peers(), before in model()) {
        let desired = desired(peers);
        let mut after = before.clone();
        after.apply(&plan(&desired, &before.actual()));
        for (key, route) in &before.routes {
            let flannels = route.protocol == PROTOCOL_BOOT && route.onlink && route.gateway == Some(route.dst.network());
            let ours = route.table == TABLE_MAIN && match route.ifindex {
                Some(DEVICE) => flannels || route.protocol == ROUTE_PROTOCOL,
                _ => route.protocol == ROUTE_PROTOCOL && desired.network.contains(&route.dst),
            };
            let taken = target(&desired).routes.contains_key(&route.dst) && route.metric == 0 && route.table == TABLE_MAIN;
            prop_assert!(ours || taken || after.routes.get(key) == Some(route), "{:?}", route);
        }
        for (key, it) in &before.neighbours {
            let ours = it.state == NeighbourState::Permanent && desired.network.contains(&it.address);
            let taken = target(&desired).neighbours.contains_key(&it.address);
            prop_assert!(ours || taken || after.neighbours.get(key) == Some(it));
        }
        for (key, it) in &before.fdb {
            let taken = target(&desired).fdb.contains_key(&it.mac);
            prop_assert!(it.permanent || taken || after.fdb.get(key) == Some(it));
        }
    }

    /// At no step does a route lead to a next hop that has no neighbour or FDB entry, if none did before.
    #[test]
    fn no_step_leaves_a_route_that_leads_nowhere(first in peers(), second in peers()) {
        let (first, second) = (desired(first), desired(second));
        let mut model = Model::default();
        model.apply(&plan(&first, &Actual::default()));
        for op in plan(&second, &model.actual()).ops {
            model.apply(&Plan { ops: vec![op], refused: vec![] });
            for route in model.routes.values().filter(|route| route.ifindex == Some(DEVICE)) {
                let hop = model.neighbours.get(&(DEVICE, route.gateway.unwrap())).and_then(|it| it.mac);
                prop_assert!(hop.is_some_and(|mac| model.fdb.contains_key(&(DEVICE, mac))), "{:?}", route);
            }
        }
    }

    /// A peer whose lease is wrong harms nobody: the others get what they would get without it.
    #[test]
    fn every_peer_is_served_or_refused(peers in peers()) {
        let desired = desired(peers);
        let target = target(&desired);
        prop_assert_eq!(target.routes.len() + target.refused.len(), desired.peers.len());
        for dst in target.routes.keys() {
            prop_assert!(!dst.contains(&desired.own) && !desired.own.contains(dst));
        }
    }
}

#[test]
fn the_steps_are_in_the_order_in_which_packets_need_them() {
    let ops = plan(&desired([vxlan_peer(2)]), &Actual::default()).ops;
    let texts: Vec<_> = ops.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [
            "FDB 02:00:00:00:00:02 to 192.168.77.2",
            "neighbour 10.5.2.0 at 02:00:00:00:00:02",
            "route 10.5.2.0/24 via 10.5.2.0 on link 7"
        ]
    );
    let mut model = Model::default();
    model.apply(&Plan { ops, refused: vec![] });
    let texts: Vec<_> = plan(&desired([]), &model.actual()).ops.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [
            "no more route 10.5.2.0/24 via 10.5.2.0 on link 7",
            "no more neighbour 10.5.2.0",
            "no more FDB 02:00:00:00:00:02 to 192.168.77.2"
        ]
    );
}

#[test]
fn one_node_with_two_subnets_keeps_its_fdb_entry_when_one_goes() {
    let second = OverlayPeer { subnet: net("10.5.9.0/24"), ..vxlan_peer(2) };
    let mut model = Model::default();
    model.apply(&plan(&desired([vxlan_peer(2), second]), &Actual::default()));
    let ops = plan(&desired([second]), &model.actual()).ops;
    assert!(ops.iter().all(|op| !matches!(op, Op::DelFdb { .. })), "{ops:?}");
    assert_eq!(ops.len(), 2);
}

#[test]
fn a_lease_that_is_wrong_is_refused_with_the_reason() {
    let right = vxlan_peer(2);
    let wrong = [
        (OverlayPeer { subnet: net("10.6.0.0/24"), ..vxlan_peer(3) }, "its subnet is outside the network"),
        (OverlayPeer { subnet: net("10.5.0.0/16"), ..vxlan_peer(3) }, "its subnet overlaps this node's own"),
        (
            OverlayPeer { subnet: net("10.5.1.128/25"), ..vxlan_peer(3) },
            "its subnet overlaps this node's own",
        ),
        (OverlayPeer { vtep_mac: [0; 6], ..vxlan_peer(3) }, "its VtepMAC is not a unicast address"),
        (OverlayPeer { vtep_mac: [0xff; 6], ..vxlan_peer(3) }, "its VtepMAC is not a unicast address"),
        (
            OverlayPeer { vtep: Ipv4Addr::UNSPECIFIED, ..vxlan_peer(3) },
            "its public address is not a unicast address",
        ),
        (
            OverlayPeer { vtep_mac: right.vtep_mac, ..vxlan_peer(3) },
            "its VtepMAC is that of 10.5.2.0/24 too, at another public address",
        ),
        (
            OverlayPeer { subnet: net("10.5.2.0/25"), ..vxlan_peer(3) },
            "its subnet has the same base as 10.5.2.0/24",
        ),
    ];
    for (peer, reason) in wrong {
        let plan = plan(&desired([right, peer]), &Actual::default());
        assert_eq!(plan.ops.len(), 3, "{reason}");
        assert_eq!(plan.refused.len(), 1, "{reason}");
        assert_eq!(plan.refused[0].0, peer);
        assert_eq!(plan.refused[0].1.to_string(), reason);
    }
}
