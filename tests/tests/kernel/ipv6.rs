//! The overlay over IPv6: the same code, in the other family, read back with the tools and used by packets.

use std::collections::BTreeMap;

use loden_agent::{
    family::V6,
    kernel::{Events, Ipv6Event, KernelEvent, VxlanDevice, VxlanSpec, mac_text},
    overlay::{Desired, Expected, OverlayPeer},
};
use loden_tests::netns::{self, Netns};

use crate::{inside, json, lines, node};

const NETWORK: &str = "fc00::/48";
const A: (&str, &str) = ("fd77::11", "fc00:0:0:1::/64");
const B: (&str, &str) = ("fd77::12", "fc00:0:0:2::/64");

fn pair() -> (Netns, Netns) {
    let (a, b) = (Netns::create("a").unwrap(), Netns::create("b").unwrap());
    netns::join(&a, "eth0", &b, "eth0").unwrap();
    for (host, (public, _)) in [(&a, A), (&b, B)] {
        host.ip(&format!("-6 addr add {public}/64 dev eth0 nodad")).unwrap();
        host.exec("sysctl -qw net.ipv6.conf.all.forwarding=1").unwrap();
    }
    (a, b)
}

fn spec(host: &Netns, public: &str) -> VxlanSpec {
    // What is asked for is what IPv4 would take; the device gets what fits.
    VxlanSpec { name: "flannel-v6.1".to_owned(), ..node::spec(host, public) }
}

fn set_up(host: &Netns, (public, own): (&str, &str)) -> VxlanDevice {
    let spec = spec(host, public);
    inside(host, async |kernel| {
        let device = kernel.ensure_vxlan(&spec).await.unwrap();
        let (own, networks) = (own.parse().unwrap(), [NETWORK.parse().unwrap()].into());
        kernel.set_overlay_address::<V6>(device.index, own, &networks).await.unwrap();
        assert!(kernel.has_overlay_address::<V6>(device.index, own, &networks).await.unwrap());
        device
    })
}

fn desired(host: &Netns, own: &str, peers: &[OverlayPeer<V6>]) -> Desired<V6> {
    Desired {
        network: NETWORK.parse().unwrap(),
        own: own.parse().unwrap(),
        device: node::index(host, "flannel-v6.1"),
        uplink: node::index(host, "eth0"),
        whole: false,
        peers: peers.iter().map(|peer| (peer.subnet, *peer)).collect::<BTreeMap<_, _>>(),
    }
}

fn peer((public, subnet): (&str, &str), vtep_mac: [u8; 6]) -> OverlayPeer<V6> {
    let (subnet, vtep) = (subnet.parse().unwrap(), public.parse().unwrap());
    OverlayPeer { subnet, vtep, vtep_mac, direct: false }
}

#[test]
fn two_hosts_reach_each_other_over_an_ipv6_underlay() {
    let (a, b) = pair();
    let (on_a, on_b) = (set_up(&a, A), set_up(&b, B));
    assert_eq!(on_a.mtu, 1430, "70 bytes of outer headers");
    for (host, own, peer) in [(&a, A.1, peer(B, on_b.mac)), (&b, B.1, peer(A, on_a.mac))] {
        let desired = desired(host, own, &[peer]);
        inside(host, async |kernel| {
            assert_eq!(node::reconcile(&kernel, &desired).await, 3);
            assert_eq!(node::reconcile(&kernel, &desired).await, 0, "a second look finds nothing to do");
        });
    }
    let mac = mac_text(on_b.mac);
    let route = "fc00:0:0:2::/64 via fc00:0:0:2:: dev flannel-v6.1 metric 1024 onlink pref medium";
    assert_eq!(lines(&a, "ip -6 route show proto 76"), [route]);
    assert_eq!(
        lines(&a, "ip -6 neigh show dev flannel-v6.1 nud permanent"),
        [format!("fc00:0:0:2:: lladdr {mac} PERMANENT")]
    );
    let fdb = lines(&a, "bridge fdb show dev flannel-v6.1");
    assert!(fdb.contains(&format!("{mac} dst fd77::12 self permanent")), "{fdb:?}");
    node::ping(&a, "fc00:0:0:2::").unwrap();
    let sent =
        json(&a, "ip -j -s link show dev flannel-v6.1")[0]["stats64"]["tx"]["packets"].as_u64().unwrap();
    assert!(sent >= 1, "the packets went through the VXLAN device: {sent}");
}

/// The kernel refuses the route to such a peer at first.
#[test]
fn a_peer_to_whose_next_hop_another_link_leads_gets_its_route_all_the_same() {
    let (a, _b) = pair();
    set_up(&a, A);
    let by_vxlan = peer(B, [2, 0, 0, 0, 0, 2]);
    let direct = OverlayPeer { direct: true, ..by_vxlan };
    a.ip("-6 route add fc00::/32 via fd77::99 dev eth0").unwrap();
    for peer in [by_vxlan, direct, by_vxlan] {
        let desired = desired(&a, A.1, &[peer]);
        inside(&a, async |kernel| {
            assert!(node::reconcile(&kernel, &desired).await > 0);
            assert_eq!(node::reconcile(&kernel, &desired).await, 0, "a second look finds nothing to do");
        });
        let way = if peer.direct { "fd77::12 dev eth0" } else { "fc00:0:0:2:: dev flannel-v6.1" };
        let routes = lines(&a, "ip -6 route show proto 76");
        assert!(routes.len() == 1 && routes[0].starts_with(&format!("{} via {way} ", B.1)), "{routes:?}");
    }
}

#[test]
fn damage_is_put_right_and_told_of() {
    let (a, _b) = pair();
    set_up(&a, A);
    let mac = [2, 0, 0, 0, 0, 2];
    let desired = desired(&a, A.1, &[peer(B, mac)]);
    inside(&a, async |kernel| {
        node::reconcile(&kernel, &desired).await;
        let expected = Expected::of(desired.clone());
        let mut events: Events = kernel.events().unwrap();
        for damage in [
            "ip -6 route del fc00:0:0:2::/64",
            "ip -6 neigh del fc00:0:0:2:: dev flannel-v6.1",
            "bridge fdb del 02:00:00:00:00:02 dev flannel-v6.1 dst fd77::12 self",
            "ip -6 route add fc00:0:0:9::/64 via fc00:0:0:9:: dev flannel-v6.1 onlink",
            "ip -6 neigh replace fc00:0:0:2:: lladdr 02:00:00:00:00:09 dev flannel-v6.1 nud permanent",
        ] {
            a.exec(damage).unwrap();
            loop {
                let event = events.next().await.unwrap();
                let of_ipv6 = matches!(
                    event,
                    KernelEvent::Ipv6(Ipv6Event::Route(..) | Ipv6Event::Neighbour(..) | Ipv6Event::Fdb(..))
                );
                if expected.is_contradicted_by(&event) {
                    assert!(of_ipv6, "{damage}: {event:?}");
                    break;
                }
            }
            assert!(node::reconcile(&kernel, &desired).await > 0, "{damage}");
            assert_eq!(node::reconcile(&kernel, &desired).await, 0, "{damage}");
        }
        let removed = kernel.remove_overlay(["flannel-v6.1"], &[NETWORK.parse().unwrap()].into()).await;
        assert!(removed.errors.is_empty(), "{removed:?}");
    });
    assert_eq!(lines(&a, "ip -6 route show proto 76"), [""; 0]);
}
