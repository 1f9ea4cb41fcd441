//! Plans carried out on the real kernel, read back with `ip` and `bridge`.

use std::{collections::BTreeMap, time::Duration};

use loden_agent::{
    family::V4,
    kernel::{Change, Events, KernelEvent, ROUTE_PROTOCOL},
    overlay::{Expected, OverlayPeer, plan},
};
use loden_tests::netns::Netns;

use crate::{inside, lines, node};

const MAC_2: [u8; 6] = [2, 0, 0, 0, 0, 2];
const MAC_3: [u8; 6] = [2, 0, 0, 0, 0, 3];

fn peers() -> [OverlayPeer; 2] {
    [node::peer("10.5.2.0/24", "192.168.77.12", MAC_2), node::peer("10.5.3.0/24", "192.168.77.13", MAC_3)]
}

/// Routes, neighbours and FDB entries of `flannel.1`, as the tools print them, in order.
fn shown(netns: &Netns) -> BTreeMap<&'static str, Vec<String>> {
    let sorted = |line| {
        let mut lines = lines(netns, line);
        lines.sort();
        lines
    };
    BTreeMap::from([
        ("routes", sorted("ip -4 route show table all")),
        ("neighbours", sorted("ip neigh show dev flannel.1 nud permanent")),
        ("fdb", sorted("bridge fdb show dev flannel.1")),
    ])
}

#[test]
fn peers_are_programmed_as_flannel_does_and_a_second_look_finds_nothing_to_do() {
    let (a, _b) = node::pair();
    let (spec, eth0) = (node::spec(&a, "192.168.77.11"), node::index(&a, "eth0"));
    inside(&a, async |kernel| {
        let device = node::set_up(&kernel, &spec, "10.5.1.0/24").await.index;
        let desired = node::desired("10.5.1.0/24", device, eth0, &peers());
        assert_eq!(node::reconcile(&kernel, &desired).await, 6);
        assert_eq!(node::reconcile(&kernel, &desired).await, 0);
    });
    assert_eq!(
        lines(&a, "ip route show dev flannel.1"),
        ["10.5.2.0/24 via 10.5.2.0 proto 76 onlink", "10.5.3.0/24 via 10.5.3.0 proto 76 onlink"]
    );
    let shown = shown(&a);
    assert_eq!(
        shown["neighbours"],
        ["10.5.2.0 lladdr 02:00:00:00:00:02 PERMANENT", "10.5.3.0 lladdr 02:00:00:00:00:03 PERMANENT"]
    );
    assert_eq!(
        shown["fdb"],
        [
            "02:00:00:00:00:02 dst 192.168.77.12 self permanent",
            "02:00:00:00:00:03 dst 192.168.77.13 self permanent"
        ]
    );
}

#[test]
fn a_peer_that_moves_is_followed_in_place() {
    let (a, _b) = node::pair();
    let (spec, eth0) = (node::spec(&a, "192.168.77.11"), node::index(&a, "eth0"));
    inside(&a, async |kernel| {
        let device = node::set_up(&kernel, &spec, "10.5.1.0/24").await.index;
        node::reconcile(&kernel, &node::desired("10.5.1.0/24", device, eth0, &peers())).await;
        let moved = [
            node::peer("10.5.2.0/24", "192.168.77.22", MAC_2),
            node::peer("10.5.3.0/24", "192.168.77.13", [2; 6]),
        ];
        let desired = node::desired("10.5.1.0/24", device, eth0, &moved);
        node::reconcile(&kernel, &desired).await;
        assert_eq!(node::reconcile(&kernel, &desired).await, 0);
    });
    let shown = shown(&a);
    assert_eq!(
        shown["fdb"],
        [
            "02:00:00:00:00:02 dst 192.168.77.22 self permanent",
            "02:02:02:02:02:02 dst 192.168.77.13 self permanent"
        ]
    );
    assert_eq!(shown["neighbours"][1], "10.5.3.0 lladdr 02:02:02:02:02:02 PERMANENT");
}

#[test]
fn a_direct_peer_is_a_plain_route_and_may_change_its_way() {
    let (a, _b) = node::pair();
    let (spec, eth0) = (node::spec(&a, "192.168.77.11"), node::index(&a, "eth0"));
    let direct = peers().map(|peer| OverlayPeer { direct: true, ..peer });
    inside(&a, async |kernel| {
        let device = node::set_up(&kernel, &spec, "10.5.1.0/24").await.index;
        for peers in [direct, peers(), direct] {
            let desired = node::desired("10.5.1.0/24", device, eth0, &peers);
            assert!(node::reconcile(&kernel, &desired).await > 0);
            assert_eq!(node::reconcile(&kernel, &desired).await, 0);
        }
    });
    let routes = lines(&a, "ip route show proto 76");
    assert_eq!(routes, ["10.5.2.0/24 via 192.168.77.12 dev eth0", "10.5.3.0/24 via 192.168.77.13 dev eth0"]);
    let shown = shown(&a);
    assert!(shown["neighbours"].is_empty() && shown["fdb"].is_empty(), "{shown:?}");
}

#[test]
fn what_flannel_left_is_adopted_without_a_moment_without_a_route() {
    let (a, _b) = node::pair();
    let (spec, eth0) = (node::spec(&a, "192.168.77.11"), node::index(&a, "eth0"));
    inside(&a, async |kernel| {
        let device = node::set_up(&kernel, &spec, "10.5.1.0/24").await.index;
        a.ip("neigh replace 10.5.2.0 lladdr 02:00:00:00:00:02 dev flannel.1 nud permanent").unwrap();
        a.exec("bridge fdb replace 02:00:00:00:00:02 dev flannel.1 dst 192.168.77.12 self permanent")
            .unwrap();
        a.ip("route replace 10.5.2.0/24 via 10.5.2.0 dev flannel.1 onlink").unwrap();
        let mut events = kernel.events().unwrap();

        let desired = node::desired("10.5.1.0/24", device, eth0, &peers()[..1]);
        assert_eq!(node::reconcile(&kernel, &desired).await, 1, "only the route's protocol differs");

        let event = events.next().await.unwrap();
        let KernelEvent::Route(Change::New, route) = event else { panic!("{event:?}") };
        assert_eq!((route.protocol, route.dst), (ROUTE_PROTOCOL, "10.5.2.0/24".parse().unwrap()));
        a.ip("link set lo mtu 1500").unwrap();
        let event = events.next().await.unwrap();
        assert!(matches!(event, KernelEvent::Link(..)), "no other change of routes: {event:?}");
        assert_eq!(kernel.hand_back_routes(&node::networks()).await.unwrap(), 1);
    });
    assert_eq!(
        lines(&a, "ip route show dev flannel.1"),
        ["10.5.2.0/24 via 10.5.2.0 onlink"],
        "as flannel's again"
    );
}

#[test]
fn peers_that_left_while_nobody_looked_are_purged_and_foreign_entries_stay() {
    let (a, _b) = node::pair();
    let (spec, eth0) = (node::spec(&a, "192.168.77.11"), node::index(&a, "eth0"));
    let device = inside(&a, async |kernel| node::set_up(&kernel, &spec, "10.5.1.0/24").await.index);
    // Foreign: on the device outside the network, by another form, on another link, in another table.
    for foreign in [
        "ip route add 172.30.0.0/16 via 10.5.9.0 dev flannel.1 onlink",
        "ip route add 10.5.77.0/24 via 10.5.9.0 dev flannel.1 onlink",
        "ip route add 10.5.88.0/24 via 192.168.77.12 dev eth0",
        "ip route add 10.99.0.0/24 via 192.168.77.12 dev eth0 proto 76",
        "ip route add 10.5.66.0/24 via 192.168.77.12 dev eth0 proto 76 table 900",
        "ip route add 10.5.2.0/24 via 192.168.77.12 dev eth0 metric 50",
        "ip neigh add 172.30.0.1 lladdr 02:00:00:00:00:aa dev flannel.1 nud permanent",
        "ip neigh add 10.5.50.1 lladdr 02:00:00:00:00:ab dev flannel.1 nud stale",
        "ip neigh add 192.168.77.50 lladdr 02:00:00:00:00:ac dev eth0 nud permanent",
        "bridge fdb append 00:00:00:00:00:00 dev flannel.1 dst 192.168.77.60 self permanent",
    ] {
        a.exec(foreign).unwrap();
    }
    let (before, neighbours) = (shown(&a), lines(&a, "ip neigh show nud permanent nud stale"));
    // Stale: flannel's, our own, direct.
    for stale in [
        "ip neigh add 10.5.9.0 lladdr 02:00:00:00:00:09 dev flannel.1 nud permanent",
        "bridge fdb add 02:00:00:00:00:09 dev flannel.1 dst 192.168.77.19 self permanent",
        "ip route add 10.5.9.0/24 via 10.5.9.0 dev flannel.1 onlink",
        "ip route add 10.5.10.0/24 via 10.5.10.0 dev flannel.1 onlink proto 76",
        "ip route add 10.5.11.0/24 via 192.168.77.21 dev eth0 proto 76",
    ] {
        a.exec(stale).unwrap();
    }
    inside(&a, async |kernel| {
        let desired = node::desired("10.5.1.0/24", device, eth0, &[]);
        assert_eq!(node::reconcile(&kernel, &desired).await, 5);
        assert_eq!(node::reconcile(&kernel, &desired).await, 0);
    });
    assert_eq!(shown(&a), before);
    assert_eq!(lines(&a, "ip neigh show nud permanent nud stale"), neighbours);
}

/// The events of the next 100 ms that contradict what is expected.
async fn contradictions(events: &mut Events, expected: &Expected) -> Vec<KernelEvent> {
    let mut found = Vec::new();
    while let Ok(event) = tokio::time::timeout(Duration::from_millis(100), events.next()).await {
        found.extend(event.filter(|event| expected.is_contradicted_by(event)));
    }
    found
}

#[test]
fn the_echo_of_a_plan_contradicts_nothing_and_a_change_by_somebody_else_does() {
    let (a, _b) = node::pair();
    let (spec, eth0) = (node::spec(&a, "192.168.77.11"), node::index(&a, "eth0"));
    inside(&a, async |kernel| {
        let device = node::set_up(&kernel, &spec, "10.5.1.0/24").await.index;
        let mut events = kernel.events().unwrap();
        let [first, second] = peers();
        let moved = OverlayPeer { vtep: [192, 168, 77, 99].into(), vtep_mac: [2; 6], ..first };
        let direct = OverlayPeer { direct: true, ..second };
        for peers in [vec![first, second], vec![moved], vec![first, direct], vec![], vec![first, second]] {
            let desired = node::desired("10.5.1.0/24", device, eth0, &peers);
            node::reconcile(&kernel, &desired).await;
            let found = contradictions(&mut events, &Expected::of(desired)).await;
            assert!(found.is_empty(), "{peers:?}: {found:?}");
        }
        let desired = node::desired("10.5.1.0/24", device, eth0, &peers());
        let expected = Expected::of(desired.clone());
        for damage in DAMAGE {
            a.exec(damage).unwrap();
            assert!(!contradictions(&mut events, &expected).await.is_empty(), "{damage} is told");
            node::reconcile(&kernel, &desired).await;
            assert!(contradictions(&mut events, &expected).await.is_empty(), "the repair of {damage}");
        }
        for foreign in [
            "ip route add 172.30.0.0/16 via 10.5.9.0 dev flannel.1 onlink",
            "ip route add 10.5.2.0/24 via 192.168.77.12 dev eth0 metric 50",
            "ip route add 10.5.88.0/24 via 192.168.77.12 dev eth0",
            "ip neigh add 10.5.50.1 lladdr 02:00:00:00:00:ab dev flannel.1 nud stale",
            "ip neigh add 10.5.2.0 lladdr 02:00:00:00:00:ab dev eth0 nud permanent",
        ] {
            a.exec(foreign).unwrap();
            assert!(contradictions(&mut events, &expected).await.is_empty(), "{foreign}");
        }
    });
}

/// What somebody may do to entries of the overlay, and what the kernel tells.
const DAMAGE: [&str; 9] = [
    "ip route flush dev flannel.1",
    "ip route flush proto 76",
    "ip neigh flush dev flannel.1 nud permanent",
    "ip route replace 10.5.2.0/24 via 192.168.77.12 dev eth0",
    "ip route change 10.5.2.0/24 via 10.5.3.0 dev flannel.1 onlink proto 76",
    "ip neigh replace 10.5.2.0 lladdr 02:00:00:00:00:99 dev flannel.1 nud permanent",
    "ip neigh change 10.5.2.0 lladdr 02:00:00:00:00:02 dev flannel.1 nud stale",
    "bridge fdb del 02:00:00:00:00:02 dev flannel.1 self",
    "bridge fdb replace 02:00:00:00:00:02 dev flannel.1 dst 192.168.77.99 self permanent",
];

#[test]
fn whatever_is_flushed_or_changed_comes_back() {
    let (a, _b) = node::pair();
    let (spec, eth0) = (node::spec(&a, "192.168.77.11"), node::index(&a, "eth0"));
    inside(&a, async |kernel| {
        let device = node::set_up(&kernel, &spec, "10.5.1.0/24").await.index;
        let desired = node::desired("10.5.1.0/24", device, eth0, &peers());
        node::reconcile(&kernel, &desired).await;
        let right = shown(&a);
        for damage in DAMAGE.iter().chain(&["ip link set flannel.1 down", "ip -4 addr flush dev flannel.1"]) {
            a.exec(damage).unwrap();
            let (own, networks) = ("10.5.1.0/24".parse().unwrap(), [node::NETWORK.parse().unwrap()].into());
            kernel.set_overlay_address::<V4>(device, own, &networks).await.unwrap();
            node::reconcile(&kernel, &desired).await;
            assert_eq!(shown(&a), right, "after {damage}");
        }
    });
}

#[test]
fn a_step_that_fails_is_told_and_the_others_are_done() {
    let (a, _b) = node::pair();
    let spec = node::spec(&a, "192.168.77.11");
    // No route to the direct peer's address: the kernel refuses it as a gateway.
    let unreachable = OverlayPeer { direct: true, ..node::peer("10.5.4.0/24", "172.20.0.1", [0; 6]) };
    inside(&a, async |kernel| {
        let device = node::set_up(&kernel, &spec, "10.5.1.0/24").await.index;
        let [first, second] = peers();
        let desired = node::desired("10.5.1.0/24", device, spec.uplink, &[first, unreachable, second]);
        let actual = kernel.overlay_actual(device).await.unwrap();
        let errors = kernel.apply(&plan(&desired, &actual)).await;
        let texts: Vec<_> = errors.iter().map(ToString::to_string).collect();
        let route = format!("route 10.5.4.0/24 via 172.20.0.1 on link {}", spec.uplink);
        assert_eq!(texts, [format!("{route}: Network is unreachable (os error 101)")]);
    });
    assert_eq!(lines(&a, "ip route show dev flannel.1").len(), 2);
}

#[test]
fn cleanup_removes_what_is_ours_and_nothing_else() {
    let (a, _b) = node::pair();
    let eth0 = node::index(&a, "eth0");
    a.ip("route add 10.88.0.0/24 via 192.168.77.12").unwrap();
    // Another agent's, for a network of its own.
    a.ip("route add 10.6.2.0/24 via 192.168.77.12 proto 76").unwrap();
    let before = (
        lines(&a, "ip route show table all"),
        lines(&a, "ip -o link show"),
        lines(&a, "ip neigh show nud permanent nud stale"),
    );
    let spec = node::spec(&a, "192.168.77.11");
    let direct = OverlayPeer { direct: true, ..node::peer("10.5.4.0/24", "192.168.77.14", [0; 6]) };
    inside(&a, async |kernel| {
        let device = node::set_up(&kernel, &spec, "10.5.1.0/24").await.index;
        let [first, second] = peers();
        node::reconcile(&kernel, &node::desired("10.5.1.0/24", device, eth0, &[first, second, direct])).await;
        let removed = kernel.remove_overlay(["flannel.1"], &node::networks()).await;
        assert!(removed.errors.is_empty(), "{removed:?}");
        assert_eq!(
            removed.done,
            ["route 10.5.2.0/24", "route 10.5.3.0/24", "route 10.5.4.0/24", "link flannel.1"]
        );
        let again = kernel.remove_overlay(["flannel.1"], &node::networks()).await;
        assert!(again.errors.is_empty() && again.done.is_empty(), "{again:?}");
    });
    let after = (
        lines(&a, "ip route show table all"),
        lines(&a, "ip -o link show"),
        lines(&a, "ip neigh show nud permanent nud stale"),
    );
    assert_eq!(after, before);
}
