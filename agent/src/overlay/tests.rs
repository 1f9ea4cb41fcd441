use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, Ipv6Addr},
};

use proptest::{collection::vec, prelude::*};

use super::{plan::target, *};
use crate::{
    family::V6,
    kernel::{NeighbourState, PROTOCOL_BOOT, ROUTE_PROTOCOL, RouteKind, TABLE_MAIN, default_metric},
};

const DEVICE: u32 = 7;
const UPLINK: u32 = 2;

/// The same small world in both families, told in IPv4's words.
trait World: Family {
    /// `10.<second>.<third>.0/<len>`, and what stands for it.
    fn subnet(second: u8, third: u8, len: u8) -> Self::Net;
    /// `<first>.168.77.<n>`, and what stands for it.
    fn vtep(first: u8, n: u8) -> Self::Addr;
}

impl World for V4 {
    fn subnet(second: u8, third: u8, len: u8) -> Self::Net {
        Self::trunc(Self::net(Ipv4Addr::new(10, second, third, 0), len).unwrap())
    }

    fn vtep(first: u8, n: u8) -> Ipv4Addr {
        Ipv4Addr::new(first, 168, 77, n)
    }
}

impl World for V6 {
    /// `fd00:0:10.5:<third>00::/(32 + len)`.
    fn subnet(second: u8, third: u8, len: u8) -> Self::Net {
        let base = Ipv6Addr::new(0xfd00, 0, 0x0a00 | u16::from(second), u16::from(third) << 8, 0, 0, 0, 0);
        Self::trunc(Self::net(base, 32 + len).unwrap())
    }

    fn vtep(first: u8, n: u8) -> Ipv6Addr {
        let first = if first == 224 { 0xff02 } else { 0xfd01 };
        Ipv6Addr::new(first, 0, 0, 0, 0, 0, 0x77, n.into())
    }
}

/// A kernel as far as plans see it: routes by destination and metric, neighbours by address, FDB by MAC.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Model<F: Family> {
    routes: BTreeMap<(F::Net, u32, u32), Route<F>>,
    neighbours: BTreeMap<(u32, F::Addr), Neighbour<F>>,
    fdb: BTreeMap<(u32, [u8; 6]), FdbEntry<F>>,
}

impl<F: World> Model<F> {
    fn empty() -> Self {
        Self { routes: BTreeMap::new(), neighbours: BTreeMap::new(), fdb: BTreeMap::new() }
    }

    /// As `NLM_F_CREATE | NLM_F_REPLACE` does, and as a deletion of exactly this object does.
    fn apply(&mut self, plan: &Plan<F>) {
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

    fn add(&mut self, route: Route<F>) {
        self.routes.insert(key(&route), route);
    }

    /// What [`crate::kernel::Kernel::overlay_actual`] reads.
    fn actual(&self) -> Actual<F> {
        let seen = |route: &&Route<F>| route.ifindex == Some(DEVICE) || route.protocol == ROUTE_PROTOCOL;
        Actual {
            routes: self.routes.values().filter(seen).cloned().collect(),
            neighbours: self.neighbours.values().copied().collect(),
            fdb: self.fdb.values().copied().collect(),
        }
    }
}

fn key<F: Family>(route: &Route<F>) -> (F::Net, u32, u32) {
    (route.dst, route.metric, route.table)
}

fn neighbour<F: Family>(address: F::Addr, mac: [u8; 6]) -> Neighbour<F> {
    Neighbour { ifindex: DEVICE, address, mac: Some(mac), state: NeighbourState::Permanent }
}

fn fdb_entry<F: Family>(mac: [u8; 6], dst: F::Addr) -> FdbEntry<F> {
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

fn net(text: &str) -> <V4 as Family>::Net {
    text.parse().unwrap()
}

fn vxlan_peer<F: World>(n: u8) -> OverlayPeer<F> {
    OverlayPeer {
        subnet: F::subnet(5, n, 24),
        vtep: F::vtep(192, n),
        vtep_mac: [2, 0, 0, 0, 0, n],
        direct: false,
    }
}

fn desired<F: World>(peers: impl IntoIterator<Item = OverlayPeer<F>>) -> Desired<F> {
    Desired {
        network: F::subnet(5, 0, 16),
        own: F::subnet(5, 1, 24),
        device: DEVICE,
        uplink: UPLINK,
        whole: false,
        peers: peers.into_iter().map(|peer| (peer.subnet, peer)).collect(),
    }
}

/// Peers out of few, so that they meet: wrong ones as well as right ones.
fn peers<F: World>() -> impl Strategy<Value = Vec<OverlayPeer<F>>> {
    let peer =
        (0u8..12, 22u8..=26, 0u8..6, 0u8..6, any::<bool>()).prop_map(|(third, len, vtep, mac, direct)| {
            OverlayPeer {
                subnet: F::subnet(if third == 11 { 6 } else { 5 }, third, len),
                vtep: F::vtep(if vtep == 5 { 224 } else { 192 }, vtep),
                vtep_mac: [if mac == 5 { 1 } else { 2 }, 0, 0, 0, 0, mac],
                direct,
            }
        });
    vec(peer, 0..10)
}

/// Foreign and own, right and wrong routes in one kernel.
fn route<F: World>() -> impl Strategy<Value = Route<F>> {
    let protocols = prop_oneof![Just(ROUTE_PROTOCOL), Just(PROTOCOL_BOOT), Just(2u8)];
    let links = prop_oneof![Just(DEVICE), Just(UPLINK), Just(9u32)];
    let shape =
        (any::<bool>(), any::<bool>(), prop_oneof![Just(default_metric::<F>()), Just(50)], any::<bool>());
    (0u8..12, 22u8..=26, protocols, links, shape).prop_map(|(third, len, protocol, link, shape)| {
        let (onlink, base, metric, main) = shape;
        let dst = F::subnet(if third == 11 { 6 } else { 5 }, third, len);
        Route {
            dst,
            gateway: Some(if base { F::base(dst) } else { F::vtep(192, third) }),
            ifindex: Some(link),
            onlink,
            protocol,
            table: if main { TABLE_MAIN } else { 100 },
            metric,
            source: None,
            multipath: false,
            kind: RouteKind::Unicast,
            tos: 0,
            scope: 0,
        }
    })
}

fn model<F: World>() -> impl Strategy<Value = Model<F>> {
    let neighbours = vec((0u8..12, 0u8..6, any::<bool>()), 0..10);
    let fdb = vec((0u8..6, 0u8..6, any::<bool>()), 0..10);
    (vec(route::<F>(), 0..20), neighbours, fdb).prop_map(|(routes, neighbours, fdb)| {
        let mut model = Model::empty();
        for route in routes {
            model.add(route);
        }
        for (third, mac, permanent) in neighbours {
            let base = F::base(F::subnet(if third == 11 { 6 } else { 5 }, third, 24));
            let mut it = neighbour::<F>(base, [2, 0, 0, 0, 0, mac]);
            if !permanent {
                it.state = NeighbourState::Stale;
            }
            model.neighbours.insert((DEVICE, it.address), it);
        }
        for (mac, vtep, permanent) in fdb {
            let mut it = fdb_entry::<F>([2, 0, 0, 0, 0, mac], F::vtep(192, vtep));
            it.permanent = permanent;
            model.fdb.insert((DEVICE, it.mac), it);
        }
        model
    })
}

/// Whatever there was before: afterwards there is what is desired, and a second look finds nothing to do.
fn one_pass_is_enough<F: World>(desired: &Desired<F>, mut model: Model<F>) -> Result<(), TestCaseError> {
    model.apply(&plan(desired, &model.actual()));
    prop_assert_eq!(plan(desired, &model.actual()).ops, vec![]);
    let target = target(desired);
    for (dst, route) in &target.routes {
        prop_assert_eq!(model.routes.get(&(*dst, default_metric::<F>(), TABLE_MAIN)), Some(route));
    }
    for (address, mac) in &target.neighbours {
        prop_assert_eq!(model.neighbours[&(DEVICE, *address)].mac, Some(*mac));
    }
    for (mac, vtep) in &target.fdb {
        prop_assert_eq!(model.fdb[&(DEVICE, *mac)].dst, Some(*vtep));
    }
    Ok(())
}

/// Nothing is touched that is not ours, unless a peer's own route, neighbour or FDB entry takes its key.
fn what_is_foreign_stays<F: World>(desired: &Desired<F>, before: &Model<F>) -> Result<(), TestCaseError> {
    let mut after = before.clone();
    after.apply(&plan(desired, &before.actual()));
    let target = target(desired);
    for (key, route) in &before.routes {
        let flannels =
            route.protocol == PROTOCOL_BOOT && route.onlink && route.gateway == Some(F::base(route.dst));
        let ours = route.table == TABLE_MAIN
            && match route.ifindex {
                Some(DEVICE) => flannels || route.protocol == ROUTE_PROTOCOL,
                _ => route.protocol == ROUTE_PROTOCOL && F::covers(desired.network, route.dst),
            };
        let wanted = target.routes.get(&route.dst);
        let taken = wanted.is_some_and(|it| it.metric == route.metric) && route.table == TABLE_MAIN;
        prop_assert!(ours || taken || after.routes.get(key) == Some(route), "{:?}", route);
    }
    for (key, it) in &before.neighbours {
        let ours = it.state == NeighbourState::Permanent && F::contains(desired.network, it.address);
        let taken = target.neighbours.contains_key(&it.address);
        prop_assert!(ours || taken || after.neighbours.get(key) == Some(it));
    }
    for (key, it) in &before.fdb {
        let taken = target.fdb.contains_key(&it.mac);
        prop_assert!(it.permanent || taken || after.fdb.get(key) == Some(it));
    }
    Ok(())
}

/// At no step does a route lead to a next hop that has no neighbour or FDB entry, if none did before.
fn no_step_misleads<F: World>(first: &Desired<F>, second: &Desired<F>) -> Result<(), TestCaseError> {
    let mut model = Model::empty();
    model.apply(&plan(first, &model.actual()));
    for op in plan(second, &model.actual()).ops {
        model.apply(&Plan { ops: vec![op], refused: vec![] });
        for route in model.routes.values().filter(|route| route.ifindex == Some(DEVICE)) {
            let hop = model.neighbours.get(&(DEVICE, route.gateway.unwrap())).and_then(|it| it.mac);
            prop_assert!(hop.is_some_and(|mac| model.fdb.contains_key(&(DEVICE, mac))), "{:?}", route);
        }
    }
    Ok(())
}

/// Where nobody else has a hand in it, what was programmed tells as much as what the kernel says.
fn memory_serves_as_well<F: World>(first: &Desired<F>, second: &Desired<F>) -> Result<(), TestCaseError> {
    let mut model = Model::empty();
    model.apply(&plan(first, &model.actual()));
    let remembered = Expected::of(first.clone()).actual();
    prop_assert_eq!(plan(second, &remembered).ops, plan(second, &model.actual()).ops);
    prop_assert_eq!(plan(first, &remembered).ops, vec![]);
    Ok(())
}

/// A few peers that come, change or go at once, most with a MAC address of their own.
fn steps<F: World>() -> impl Strategy<Value = Vec<Vec<(OverlayPeer<F>, bool, bool)>>> {
    let some = peers::<F>().prop_flat_map(|peers| {
        let flags = vec((prop::bool::weighted(0.7), prop::bool::weighted(0.8)), peers.len());
        flags.prop_map(move |flags| {
            let some = peers.iter().zip(flags).take(3);
            some.map(|(peer, (there, own_mac))| (*peer, there, own_mac)).collect::<Vec<_>>()
        })
    });
    vec(some, 0..12)
}

/// Peers that come, change, collide, move and go, each time with the steps that a comparison of everything would take.
fn changes_end_where_a_whole_plan_does<F: World>(
    steps: Vec<Vec<(OverlayPeer<F>, bool, bool)>>,
    whole: bool,
) -> Result<(), TestCaseError> {
    let mut now = Desired { whole, ..desired([]) };
    let mut expected = Expected::of(now.clone());
    let mut model = Model::empty();
    model.apply(&plan(&now, &model.actual()));
    for step in steps {
        let mut changes = PeerChanges::<F>::new();
        for (mut peer, there, own_mac) in step {
            if own_mac {
                peer.vtep_mac[4] = (F::number(F::base(peer.subnet)) >> (F::BITS - 24)) as u8;
            }
            changes.insert(peer.subnet, there.then_some(peer));
        }
        let before = expected.actual();
        for (subnet, peer) in &changes {
            match peer {
                Some(peer) => drop(now.peers.insert(*subnet, *peer)),
                None => drop(now.peers.remove(subnet)),
            }
        }
        let all = plan(&now, &before);
        match expected.change(&changes) {
            Some(few) => prop_assert_eq!(&few, &all),
            None => expected = Expected::of(now.clone()),
        }
        prop_assert_eq!(&expected, &Expected::of(now.clone()));
        model.apply(&all);
        prop_assert_eq!(plan(&now, &model.actual()).ops, vec![]);
    }
    Ok(())
}

/// A peer whose lease is wrong harms nobody: the others get what they would get without it.
fn all_are_served_or_refused<F: World>(desired: &Desired<F>) -> Result<(), TestCaseError> {
    let target = target(desired);
    prop_assert_eq!(target.routes.len() + target.refused.len(), desired.peers.len());
    for dst in target.routes.keys() {
        prop_assert!(!F::overlap(*dst, desired.own));
    }
    Ok(())
}

proptest! {
    #[test]
    fn one_pass_makes_the_actual_state_the_desired_one(
        v4 in (peers::<V4>(), model()), v6 in (peers::<V6>(), model()),
    ) {
        one_pass_is_enough(&desired(v4.0), v4.1)?;
        one_pass_is_enough(&desired(v6.0), v6.1)?;
    }

    #[test]
    fn foreign_objects_stay(v4 in (peers::<V4>(), model()), v6 in (peers::<V6>(), model())) {
        what_is_foreign_stays(&desired(v4.0), &v4.1)?;
        what_is_foreign_stays(&desired(v6.0), &v6.1)?;
    }

    #[test]
    fn no_step_leaves_a_route_that_leads_nowhere(
        v4 in (peers::<V4>(), peers()), v6 in (peers::<V6>(), peers()),
    ) {
        no_step_misleads(&desired(v4.0), &desired(v4.1))?;
        no_step_misleads(&desired(v6.0), &desired(v6.1))?;
    }

    #[test]
    fn a_plan_from_memory_is_the_plan_from_the_kernel(
        v4 in (peers::<V4>(), peers()), v6 in (peers::<V6>(), peers()),
    ) {
        memory_serves_as_well(&desired(v4.0), &desired(v4.1))?;
        memory_serves_as_well(&desired(v6.0), &desired(v6.1))?;
    }

    #[test]
    fn following_the_changes_takes_the_same_steps_as_comparing_everything(
        v4 in steps::<V4>(), v6 in steps::<V6>(), whole in prop::bool::weighted(0.1),
    ) {
        changes_end_where_a_whole_plan_does(v4, whole)?;
        changes_end_where_a_whole_plan_does(v6, whole)?;
    }

    #[test]
    fn every_peer_is_served_or_refused(v4 in peers::<V4>(), v6 in peers::<V6>()) {
        all_are_served_or_refused(&desired(v4))?;
        all_are_served_or_refused(&desired(v6))?;
    }
}

#[test]
fn what_concerns_nobody_else_is_planned_by_itself() {
    let (two, three) = (vxlan_peer::<V4>(2), vxlan_peer(3));
    let mut expected = Expected::of(desired([two, three]));
    let mut change = |peers: &[(u8, Option<OverlayPeer>)]| {
        let changes = peers.iter().map(|(n, peer)| (vxlan_peer::<V4>(*n).subnet, *peer)).collect();
        expected.change(&changes).map(|plan| plan.ops.len())
    };
    assert_eq!(change(&[(4, Some(vxlan_peer(4)))]), Some(3), "one comes");
    let other_mac = OverlayPeer { vtep_mac: [2, 0, 0, 0, 0, 40], ..vxlan_peer(4) };
    assert_eq!(
        change(&[(4, Some(other_mac))]),
        Some(3),
        "its FDB entry, its neighbour, and no more the old entry"
    );
    let moved = OverlayPeer { subnet: vxlan_peer::<V4>(5).subnet, ..other_mac };
    assert_eq!(change(&[(4, None), (5, Some(moved))]), Some(4), "it has another subnet");
    assert_eq!(
        change(&[(5, Some(OverlayPeer { vtep_mac: three.vtep_mac, ..moved }))]),
        None,
        "another's MAC"
    );
    let around = OverlayPeer { subnet: net("10.5.2.0/23"), ..vxlan_peer(6) };
    assert_eq!(expected.change(&[(around.subnet, Some(around))].into()), None, "around another's subnet");
    let within = OverlayPeer { subnet: net("10.5.2.0/26"), ..vxlan_peer(6) };
    assert_eq!(expected.change(&[(within.subnet, Some(within))].into()), None, "within another's subnet");
}

#[test]
fn the_steps_are_in_the_order_in_which_packets_need_them() {
    let ops = plan::<V4>(&desired([vxlan_peer(2)]), &Actual::default()).ops;
    let texts: Vec<_> = ops.iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [
            "FDB 02:00:00:00:00:02 to 192.168.77.2",
            "neighbour 10.5.2.0 at 02:00:00:00:00:02",
            "route 10.5.2.0/24 via 10.5.2.0 on link 7"
        ]
    );
    let mut model = Model::<V4>::empty();
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
    let mut model = Model::<V4>::empty();
    model.apply(&plan(&desired([vxlan_peer(2), second]), &Actual::default()));
    let ops = plan(&desired([second]), &model.actual()).ops;
    assert!(ops.iter().all(|op| !matches!(op, Op::DelFdb { .. })), "{ops:?}");
    assert_eq!(ops.len(), 2);
}

#[test]
fn a_lease_that_is_wrong_is_refused_with_the_reason() {
    let right: OverlayPeer = vxlan_peer(2);
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

#[test]
fn routes_of_many_peers_have_many_scopes_and_those_of_few_have_flannels() {
    let scopes = |network: &str, subnets: u32| -> BTreeMap<u8, usize> {
        let network: ipnet::Ipv4Net = network.parse().unwrap();
        let peers = (1..subnets).map(|n| {
            let subnet = V4::net((u32::from(network.network()) + n * 256).into(), 24).unwrap();
            let [_, a, b, c] = n.to_be_bytes();
            let vtep = Ipv4Addr::from(0xc612_0000 + n);
            (subnet, OverlayPeer::<V4> { subnet, vtep, vtep_mac: [2, 0, 0, a, b, c], direct: false })
        });
        let own = V4::trunc(V4::net(network.network(), 24).unwrap());
        let peers = peers.collect();
        let desired = Desired::<V4> { network, own, device: DEVICE, uplink: UPLINK, whole: false, peers };
        target(&desired).routes.values().fold(BTreeMap::new(), |mut scopes, route| {
            *scopes.entry(route.scope).or_default() += 1;
            scopes
        })
    };
    assert_eq!(scopes("10.5.0.0/16", 256), BTreeMap::from([(0, 255)]));
    let many = scopes("10.0.0.0/8", 65_536);
    assert_eq!((many.len(), many.values().max()), (128, Some(&512)));
    assert!(many.keys().all(|scope| *scope < 200), "a site's is 200");
}
