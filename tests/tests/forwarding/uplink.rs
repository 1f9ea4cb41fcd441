//! The underlay changes under running traffic.

use std::{
    net::Ipv4Addr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use loden_tests::{
    capture::Capture,
    counters::Share,
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

/// Gives both nodes one more uplink, `eth1` with `192.168.65.1` and `.2`, or `eth2` with `192.168.66.1` and so on, and
/// a packet socket at the second node's.
fn another_uplink(stage: &Stage, n: u8) -> Capture {
    let [a, b] = [0, 1].map(|i: usize| stage.cluster.nodes[i].netns());
    let name = format!("eth{n}");
    join(a, &name, b, &name).unwrap();
    for (node, host) in [(a, 1), (b, 2)] {
        node.ip(&format!("address add 192.168.{}.{host}/24 dev {name}", 64 + n)).unwrap();
        for interface in ["all", &name, "eth0"] {
            // Answers come by the other interface than questions went, until both have changed.
            node.exec(&format!("sysctl -qw net.ipv4.conf.{interface}.rp_filter=2")).unwrap();
        }
    }
    Capture::open(b, &name).unwrap()
}

/// Sends datagrams until one is fast and comes over the second uplink.
fn until_fast_over(stage: &Stage, second: &Capture) {
    wait_for("the fast way over the second uplink", Duration::from_secs(1), || {
        second.drain().unwrap();
        let before = stage.counters()[0].clone();
        let there = arrives(stage, &stage.datagram(b"second"));
        let carried = second.drain().unwrap().iter().any(|frame| frame.ends_with(b"second"));
        (there && carried && stage.counters()[0].since(&before).get("fast_encap") == 1).then_some(())
    })
    .unwrap();
}

#[test]
fn a_peer_behind_a_second_uplink_is_reached_by_the_fast_path() {
    let stage = Stage::set(&["--gate=open"]);
    stage.warm_up();
    let second = another_uplink(&stage, 1);
    let [a, b] = [0, 1].map(|i: usize| &stage.cluster.nodes[i]);
    a.netns().ip(&format!("route add {}/32 via 192.168.65.2 src {}", b.address(), a.address())).unwrap();
    b.netns().ip(&format!("route add {}/32 via 192.168.65.1 src {}", a.address(), b.address())).unwrap();
    until_fast_over(&stage, &second);
    let pods = [&stage.sender, &stage.destination];
    for (to, (from, at)) in [(1, (pods[0], pods[1])), (0, (pods[1], pods[0]))] {
        let before = stage.counters()[to].clone();
        let work = || stream::run(from.host(), at.host(), None, Until::Bytes(20_000_000));
        let (_, share) = Share::during(&stage.cluster.nodes, &pods, work).unwrap();
        assert!(share.smaller() > 0.95, "{share:?}");
        let counted = stage.counters()[to].since(&before);
        assert!(counted.get("fast_decap") > 10 * counted.get("fast_overlay"), "{counted:?}");
    }
    // A smaller MTU of that link counts, too.
    a.netns().ip("link set eth1 mtu 1400").unwrap();
    let full = stage.datagram(&[b'm'; 1422]);
    wait_for("the smaller MTU", Duration::from_secs(1), || {
        let before = stage.counters()[0].clone();
        arrives(&stage, &full);
        (stage.counters()[0].since(&before).get("pass_pod_too_big") > 0).then_some(())
    })
    .unwrap();
    // The kernel takes the route away with the link and tells nobody.
    a.netns().ip("link set eth1 down").unwrap();
    let back = |packet: &Ipv4| {
        let before = stage.counters()[0].clone();
        arrives(&stage, packet) && stage.counters()[0].since(&before).get("fast_encap") == 1
    };
    wait_for("the first uplink", Duration::from_secs(1), || back(&full).then_some(())).unwrap();
}

/// Sends a datagram every millisecond until told to stop, and returns how many were sent and how many arrived.
fn flow_during(stage: &Stage, work: impl FnOnce()) -> (usize, usize) {
    let stop = AtomicBool::new(false);
    stage.at_destination.drain().unwrap();
    let frame = stage.sent_by_sender(&stage.datagram(b"one of many").bytes());
    let sent = thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let mut sent = 0;
            while !stop.load(Ordering::Relaxed) {
                stage.at_sender.send(&frame).unwrap();
                sent += 1;
                thread::sleep(Duration::from_millis(1));
            }
            sent
        });
        work();
        thread::sleep(Duration::from_millis(200));
        stop.store(true, Ordering::Relaxed);
        sending.join().unwrap()
    });
    thread::sleep(Duration::from_millis(100));
    let is_one = |frame: &Vec<u8>| frame.ends_with(b"one of many");
    (sent, stage.at_destination.drain().unwrap().iter().filter(|frame| is_one(frame)).count())
}

#[test]
fn of_two_next_hops_the_fast_path_takes_the_kernels_and_loses_nothing_when_that_is_withdrawn() {
    let mut stage = Stage::set(&["--gate=open"]);
    stage.warm_up();
    let routers = [Router::plug(&stage, 201), Router::plug(&stage, 202)];
    let peer = stage.cluster.nodes[1].address();
    let hops = routers.each_ref().map(|router| format!("nexthop via {}", router.address)).join(" ");
    stage.cluster.nodes[0].netns().ip(&format!("route replace {peer}/32 {hops}")).unwrap();
    let chosen = wait_for("the fast path through a router", Duration::from_secs(1), || {
        for router in &routers {
            router.seen();
        }
        let before = stage.counters()[0].clone();
        let there = arrives(&stage, &stage.datagram(b"which?"));
        let fast = there && stage.counters()[0].since(&before).get("fast_encap") == 1;
        let by = routers.iter().position(|router| router.seen() == 1)?;
        fast.then_some(by)
    })
    .unwrap();
    let other = &routers[1 - chosen];
    let before = stage.counters()[0].clone();
    let (sent, arrived) = flow_during(&stage, || {
        thread::sleep(Duration::from_millis(200));
        let node = stage.cluster.nodes[0].netns();
        node.ip(&format!("route replace {peer}/32 nexthop via {}", other.address)).unwrap();
    });
    assert_eq!(arrived, sent, "the hop was withdrawn, and still there");
    let counted = stage.counters()[0].since(&before);
    assert!(counted.get("fast_encap") >= sent as u64, "{sent} sent: {counted:?}");
    assert!(other.seen() > 0);
    until_fast_through(&stage, other);

    // The kernel alone takes the same one of the two.
    stage.cluster.nodes[0].netns().ip(&format!("route replace {peer}/32 {hops}")).unwrap();
    stage.restart(&["--datapath=kernel"]);
    stage.ping();
    for router in &routers {
        router.seen();
    }
    assert!(arrives(&stage, &stage.datagram(b"by the kernel alone")));
    assert_eq!(routers.each_ref().map(|router| router.seen() > 0), [0, 1].map(|i| i == chosen));
}

#[test]
fn of_two_uplinks_the_one_that_is_left_is_taken_when_the_other_fails() {
    let stage = Stage::set(&["--gate=open"]);
    stage.warm_up();
    let others = [1, 2].map(|n| another_uplink(&stage, n));
    let [a, b] = [0, 1].map(|i: usize| &stage.cluster.nodes[i]);
    let hops = "nexthop via 192.168.65.2 dev eth1 nexthop via 192.168.66.2 dev eth2";
    a.netns().ip(&format!("route replace {}/32 src {} {hops}", b.address(), a.address())).unwrap();
    let chosen = wait_for("the fast way over one of both", Duration::from_secs(1), || {
        let before = stage.counters()[0].clone();
        let there = arrives(&stage, &stage.datagram(b"which?"));
        let fast = there && stage.counters()[0].since(&before).get("fast_encap") == 1;
        let carried =
            others.each_ref().map(|it| it.drain().unwrap().iter().any(|frame| frame.ends_with(b"which?")));
        fast.then(|| carried.iter().position(|carried| *carried)).flatten()
    })
    .unwrap();
    let before = stage.counters()[0].clone();
    let (sent, arrived) = flow_during(&stage, || {
        thread::sleep(Duration::from_millis(200));
        a.netns().ip(&format!("link set eth{} down", 1 + chosen)).unwrap();
    });
    let lost = sent - arrived;
    let counted = stage.counters()[0].since(&before);
    println!("{lost} of {sent} lost, one each millisecond: {counted:?}");
    // Until the agent has heard of it.
    assert!(lost < 100, "{lost} of {sent}");
    assert!(counted.get("fast_encap") as usize + 100 > sent, "{counted:?}");
    until_fast_over(&stage, &others[1 - chosen]);
}
