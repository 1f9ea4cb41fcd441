//! The underlay changes under running traffic.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use loden_tests::{
    capture::Capture,
    netns::{Netns, join},
    nic,
    packet::{self, Ipv4},
    process::wait_for,
    traffic::stream::{self, Until},
};

use crate::stage::{PATIENCE, Stage};

/// A router on the underlay, and a packet socket at its uplink.
struct Router {
    netns: Netns,
    address: Ipv4Addr,
    socket: Capture,
}

impl Router {
    fn plug(stage: &Stage, host: u32) -> Self {
        let netns = Netns::create("router").unwrap();
        let address = stage.cluster.underlay().plug(&netns, host).unwrap();
        netns.exec("sysctl -qw net.ipv4.ip_forward=1").unwrap();
        for interface in ["all", "default", "eth0"] {
            // It leads back into the segment where the packets came from, and must not say so.
            netns.exec(&format!("sysctl -qw net.ipv4.conf.{interface}.send_redirects=0")).unwrap();
        }
        let socket = Capture::open(&netns, "eth0").unwrap();
        Self { netns, address, socket }
    }

    /// VXLAN packets that came to it since it was last asked.
    fn seen(&self) -> usize {
        let frames = self.socket.drain().unwrap();
        frames
            .iter()
            .filter(|frame| {
                frame.len() > 38 && frame[23] == packet::UDP && frame[36..38] == 8472_u16.to_be_bytes()
            })
            .count()
    }
}

/// Sends one datagram and says whether it arrived; waits at most 200 ms.
fn arrives(stage: &Stage, packet: &Ipv4) -> bool {
    stage.at_destination.drain().unwrap();
    stage.at_sender.send(&stage.sent_by_sender(&packet.bytes())).unwrap();
    let is_it = |frame: &[u8]| frame.ends_with(&packet.payload);
    stage.at_destination.until("the datagram", Duration::from_millis(200), is_it).is_ok()
}

/// Sends datagrams until one of them both is fast and passes the router; says how long that took.
fn until_fast_through(stage: &Stage, router: &Router) -> Duration {
    let start = Instant::now();
    wait_for("the fast path through the new router", PATIENCE, || {
        router.seen();
        let before = stage.counters()[0].clone();
        let there = arrives(stage, &stage.datagram(b"where to?"));
        (there && router.seen() == 1 && stage.counters()[0].since(&before).get("fast_encap") == 1)
            .then_some(())
    })
    .unwrap();
    start.elapsed()
}

#[test]
fn the_fast_path_follows_a_route_to_another_router_within_a_second() {
    let stage = Stage::set(&["--gate=open"]);
    stage.warm_up();
    let routers = [Router::plug(&stage, 201), Router::plug(&stage, 202)];
    let node = stage.cluster.nodes[0].netns();
    let peer = stage.cluster.nodes[1].address();
    for router in [&routers[0], &routers[1], &routers[0]] {
        node.ip(&format!("route replace {peer}/32 via {}", router.address)).unwrap();
        let took = until_fast_through(&stage, router);
        assert!(took < Duration::from_secs(1), "{took:?}");
    }
    // The router that is left may go; nothing is lost that the other carries.
    routers[1].netns.ip("link set eth0 down").unwrap();
    assert!(arrives(&stage, &stage.datagram(b"by the first")));
    stream::run(stage.sender.host(), stage.destination.host(), None, Until::Bytes(20_000_000)).unwrap();
    node.ip(&format!("route del {peer}/32")).unwrap();
    wait_for("the direct way", Duration::from_secs(1), || {
        routers[0].seen();
        (arrives(&stage, &stage.datagram(b"directly")) && routers[0].seen() == 0).then_some(())
    })
    .unwrap();
}

#[test]
fn the_first_packet_to_an_unresolved_neighbour_is_fast_and_not_lost() {
    let stage = Stage::set(&["--gate=open"]);
    stage.warm_up();
    let node = stage.cluster.nodes[0].netns();
    let peer = stage.cluster.nodes[1].address();
    for n in 0..10_u8 {
        node.ip("neigh flush dev eth0").unwrap();
        let known = node.ip(&format!("neigh show {peer} dev eth0")).unwrap();
        assert!(!known.contains("lladdr"), "the neighbour is known still: {known}");
        let before = stage.counters()[0].clone();
        assert!(arrives(&stage, &stage.datagram(&[b'n', n])), "packet {n} is lost");
        let counted = stage.counters()[0].since(&before);
        assert_eq!(counted.get("fast_encap"), 1, "{counted:?}");
    }
}

#[test]
fn an_uplink_whose_mtu_changes_is_followed() {
    let stage = Stage::set(&["--gate=open"]);
    stage.warm_up();
    let node = stage.cluster.nodes[0].netns();
    let full = Ipv4 { fragment: 0, ..stage.datagram(&[b'm'; 1422]) };
    let fast = |packet: &Ipv4| {
        let before = stage.counters()[0].clone();
        let there = arrives(&stage, packet);
        (there, stage.counters()[0].since(&before).get("fast_encap") == 1)
    };
    assert_eq!(fast(&full), (true, true));
    node.ip("link set eth0 mtu 1400").unwrap();
    wait_for("the smaller MTU", Duration::from_secs(1), || (!fast(&full).1).then_some(())).unwrap();
    // What still fits is fast: 1350 bytes inside, 1400 outside.
    let fitting = stage.datagram(&[b'f'; 1322]);
    wait_for("what fits", Duration::from_secs(1), || (fast(&fitting) == (true, true)).then_some(())).unwrap();
    let (there, again) = (stage.sender.host(), nic::retransmitted(&stage.sender).unwrap());
    stream::run(there, stage.destination.host(), None, Until::Bytes(20_000_000)).unwrap();
    println!(
        "{} segments sent again while the path MTU was found",
        nic::retransmitted(&stage.sender).unwrap() - again
    );
    node.ip("link set eth0 mtu 1500").unwrap();
    wait_for("the larger MTU", Duration::from_secs(2), || (fast(&full) == (true, true)).then_some(()))
        .unwrap();
}

#[test]
fn a_peer_behind_a_second_uplink_is_reached_through_the_kernel() {
    let stage = Stage::set(&["--gate=open"]);
    stage.warm_up();
    let [a, b] = [0, 1].map(|i: usize| &stage.cluster.nodes[i]);
    join(a.netns(), "eth1", b.netns(), "eth1").unwrap();
    a.netns().ip("address add 192.168.65.1/24 dev eth1").unwrap();
    b.netns().ip("address add 192.168.65.2/24 dev eth1").unwrap();
    for node in [a, b] {
        for interface in ["all", "eth1", "eth0"] {
            // Answers come by the other interface than questions went, until both have changed.
            node.netns().exec(&format!("sysctl -qw net.ipv4.conf.{interface}.rp_filter=2")).unwrap();
        }
    }
    let second = Capture::open(b.netns(), "eth1").unwrap();
    a.netns().ip(&format!("route add {}/32 via 192.168.65.2 src {}", b.address(), a.address())).unwrap();
    b.netns().ip(&format!("route add {}/32 via 192.168.65.1 src {}", a.address(), b.address())).unwrap();
    wait_for("the way over the second uplink", PATIENCE, || {
        second.drain().unwrap();
        let there = arrives(&stage, &stage.datagram(b"second"));
        let carried = second.drain().unwrap().iter().any(|frame| frame.ends_with(b"second"));
        (there && carried).then_some(())
    })
    .unwrap();
    let before = stage.counters();
    for (from, to) in [(&stage.sender, &stage.destination), (&stage.destination, &stage.sender)] {
        stream::run(from.host(), to.host(), None, Until::Bytes(20_000_000)).unwrap();
    }
    let after = stage.counters();
    println!("{:?} {:?}", after[0].since(&before[0]), after[1].since(&before[1]));
    assert!(after[0].since(&before[0]).get("pass_pod_no_uplink") > 0);
}
