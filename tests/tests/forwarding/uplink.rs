//! The underlay changes under running traffic.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use loden_tests::{
    capture::Capture,
    counters::Share,
    each_family,
    family::Family,
    netns::{Netns, join},
    nic, packet,
    process::wait_for,
    traffic::stream::{self, Until},
};

use crate::stage::{PATIENCE, Stage};

each_family!(
    the_fast_path_follows_a_route_to_another_router_within_a_second,
    a_rule_that_leads_to_another_table_and_routes_there_are_followed_within_a_second,
    a_smaller_mtu_behind_a_router_is_found_out,
    the_first_packet_to_an_unresolved_neighbour_is_fast_and_not_lost,
    an_uplink_whose_mtu_changes_is_followed,
    a_peer_behind_a_second_uplink_is_reached_by_the_fast_path,
    of_two_next_hops_the_fast_path_takes_the_kernels_and_loses_nothing_when_that_is_withdrawn,
    of_two_uplinks_the_one_that_is_left_is_taken_when_the_other_fails,
    what_an_ipsec_policy_is_for_is_left_to_the_kernel,
);

/// How long it may take until what nobody tells of is noticed: the agent's tick, and the time of a pass.
const TICK: Duration = Duration::from_secs(33);

/// A router on the underlay, and a packet socket at its uplink.
struct Router<F: Family> {
    netns: Netns,
    address: F::Address,
    socket: Capture,
}

impl<F: Family> Router<F> {
    fn plug(stage: &Stage<F>, host: u32) -> Self {
        let netns = Netns::create("router").unwrap();
        stage.cluster.underlay().plug(&netns, host).unwrap();
        F::make_router(&netns);
        let socket = Capture::open(&netns, "eth0").unwrap();
        Self { netns, address: F::on_underlay(stage.cluster.underlay(), host), socket }
    }

    /// VXLAN packets that came to it since it was last asked.
    fn seen(&self) -> usize {
        let frames = self.socket.drain().unwrap();
        let port = packet::ETHERNET_LEN + F::HEADER_LEN + 2;
        let is_vxlan = |frame: &&Vec<u8>| {
            frame.len() > port + 2
                && frame[12..14] == F::ETHER_TYPE.to_be_bytes()
                && frame[port..port + 2] == 8472_u16.to_be_bytes()
        };
        frames.iter().filter(is_vxlan).count()
    }
}

/// Sends one datagram and says whether it arrived; waits at most 200 ms.
fn arrives<F: Family>(stage: &Stage<F>, packet: &F) -> bool {
    stage.at_destination.drain().unwrap();
    stage.at_sender.send(&stage.sent_by_sender(&packet.bytes())).unwrap();
    let is_it = |frame: &[u8]| frame.ends_with(packet.payload());
    stage.at_destination.until("the datagram", Duration::from_millis(200), is_it).is_ok()
}

/// Sends datagrams until one of them both is fast and passes the router; says how long that took.
fn until_fast_through<F: Family>(stage: &Stage<F>, router: &Router<F>) -> Duration {
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

fn the_fast_path_follows_a_route_to_another_router_within_a_second<F: Family>() {
    let stage = Stage::<F>::set(&["--gate=open"]);
    stage.warm_up();
    let routers = [Router::plug(&stage, 201), Router::plug(&stage, 202)];
    let node = stage.cluster.nodes[0].netns();
    let peer = stage.node(1);
    for router in [&routers[0], &routers[1], &routers[0]] {
        node.ip(&format!("route replace {} via {}", F::as_prefix(peer), router.address)).unwrap();
        let took = until_fast_through(&stage, router);
        assert!(took < Duration::from_secs(1), "{took:?}");
    }
    // The router that is left may go; nothing is lost that the other carries.
    routers[1].netns.ip("link set eth0 down").unwrap();
    assert!(arrives(&stage, &stage.datagram(b"by the first")));
    stream::run(stage.hosts()[0], stage.hosts()[1], None, Until::Bytes(20_000_000)).unwrap();
    node.ip(&format!("route del {}", F::as_prefix(peer))).unwrap();
    wait_for_the_direct_way(&stage, &routers[0]);
}

/// Within a second datagrams arrive and none goes by the router any more.
fn wait_for_the_direct_way<F: Family>(stage: &Stage<F>, router: &Router<F>) {
    wait_for("the direct way", Duration::from_secs(1), || {
        router.seen();
        (arrives(stage, &stage.datagram(b"directly")) && router.seen() == 0).then_some(())
    })
    .unwrap();
}

fn a_rule_that_leads_to_another_table_and_routes_there_are_followed_within_a_second<F: Family>() {
    let stage = Stage::<F>::set(&["--gate=open"]);
    stage.warm_up();
    let routers = [Router::plug(&stage, 201), Router::plug(&stage, 202)];
    let node = stage.cluster.nodes[0].netns();
    let peer = F::as_prefix(stage.node(1));
    // What one event has the agent do is done before the next.
    let change = |line: String| {
        thread::sleep(Duration::from_millis(500));
        node.ip(&format!("{} {line}", F::FLAG)).unwrap();
    };
    change(format!("route add {peer} via {} table 100", routers[0].address));
    change(format!("rule add to {peer} lookup 100"));
    let took = until_fast_through(&stage, &routers[0]);
    assert!(took < Duration::from_secs(1), "the rule: {took:?}");
    change(format!("route replace {peer} via {} table 100", routers[1].address));
    let took = until_fast_through(&stage, &routers[1]);
    assert!(took < Duration::from_secs(1), "the route: {took:?}");
    change(format!("rule del to {peer} lookup 100"));
    wait_for_the_direct_way(&stage, &routers[1]);
}

/// Of IPv4 the router cuts what is too large into fragments. Of IPv6 it says so, to the node, whose kernel then knows.
fn a_smaller_mtu_behind_a_router_is_found_out<F: Family>() {
    let stage = Stage::<F>::set(&["--gate=open"]);
    stage.warm_up();
    let router = Router::plug(&stage, 201);
    let node = stage.cluster.nodes[0].netns();
    node.ip(&format!("route add {} via {}", F::as_prefix(stage.node(1)), router.address)).unwrap();
    until_fast_through(&stage, &router);
    let onward = format!("route add {} dev eth0 mtu lock 1400", F::as_prefix(stage.node(1)));
    router.netns.ip(&onward).unwrap();
    let full = stage.datagram(&vec![b'm'; 1500 - F::ENCAP_LEN - F::HEADER_LEN - 8]);
    let begun = Instant::now();
    let is_kernels = || {
        let before = stage.counters()[0].clone();
        let there = arrives(&stage, &full);
        there || stage.counters()[0].since(&before).get("pass_pod_too_big") > 0
    };
    wait_for("the path's MTU to be known", TICK, || is_kernels().then_some(())).unwrap();
    println!("{:?} until full-sized packets were the kernel's", begun.elapsed());
    let fitting = stage.datagram(&vec![b'f'; 1400 - F::ENCAP_LEN - F::HEADER_LEN - 8]);
    let before = stage.counters()[0].clone();
    assert!(arrives(&stage, &fitting));
    assert_eq!(stage.counters()[0].since(&before).get("fast_encap"), 1);
    stream::run(stage.hosts()[0], stage.hosts()[1], None, Until::Bytes(20_000_000)).unwrap();
}

fn the_first_packet_to_an_unresolved_neighbour_is_fast_and_not_lost<F: Family>() {
    let stage = Stage::<F>::set(&["--gate=open"]);
    stage.warm_up();
    let node = stage.cluster.nodes[0].netns();
    let peer = stage.node(1);
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

fn an_uplink_whose_mtu_changes_is_followed<F: Family>() {
    let stage = Stage::<F>::set(&["--gate=open"]);
    stage.warm_up();
    let node = stage.cluster.nodes[0].netns();
    let headers = F::HEADER_LEN + 8;
    let full = stage.datagram(&vec![b'm'; 1500 - F::ENCAP_LEN - headers]);
    let fast = |packet: &F| {
        let before = stage.counters()[0].clone();
        let there = arrives(&stage, packet);
        (there, stage.counters()[0].since(&before).get("fast_encap") == 1)
    };
    assert_eq!(fast(&full), (true, true));
    node.ip("link set eth0 mtu 1400").unwrap();
    wait_for("the smaller MTU", Duration::from_secs(1), || (!fast(&full).1).then_some(())).unwrap();
    // What still fits is fast: 1400 bytes outside.
    let fitting = stage.datagram(&vec![b'f'; 1400 - F::ENCAP_LEN - headers]);
    wait_for("what fits", Duration::from_secs(1), || (fast(&fitting) == (true, true)).then_some(())).unwrap();
    let again = nic::retransmitted(&stage.sender).unwrap();
    stream::run(stage.hosts()[0], stage.hosts()[1], None, Until::Bytes(20_000_000)).unwrap();
    println!(
        "{} segments sent again while the path MTU was found",
        nic::retransmitted(&stage.sender).unwrap() - again
    );
    node.ip("link set eth0 mtu 1500").unwrap();
    wait_for("the larger MTU", Duration::from_secs(2), || (fast(&full) == (true, true)).then_some(()))
        .unwrap();
}

/// Gives both nodes one more uplink, `eth1`, `eth2` and so on, with the first two addresses of a segment, and a packet
/// socket at the second node's.
fn another_uplink<F: Family>(stage: &Stage<F>, n: u8) -> Capture {
    let [a, b] = [0, 1].map(|i: usize| stage.cluster.nodes[i].netns());
    let name = format!("eth{n}");
    join(a, &name, b, &name).unwrap();
    for (node, host) in [(a, 1), (b, 2)] {
        let (address, len) = F::on_segment(n, host);
        node.ip(&format!("address add {address}/{len} dev {name} nodad")).unwrap();
        for interface in ["all", &name, "eth0"] {
            // Answers come by the other interface than questions went, until both have changed.
            node.exec(&format!("sysctl -qw net.ipv4.conf.{interface}.rp_filter=2")).unwrap();
        }
    }
    Capture::open(b, &name).unwrap()
}

/// Sends datagrams until one is fast and comes over the second uplink.
fn until_fast_over<F: Family>(stage: &Stage<F>, second: &Capture) {
    wait_for("the fast way over the second uplink", Duration::from_secs(1), || {
        second.drain().unwrap();
        let before = stage.counters()[0].clone();
        let there = arrives(stage, &stage.datagram(b"second"));
        let carried = second.drain().unwrap().iter().any(|frame| frame.ends_with(b"second"));
        (there && carried && stage.counters()[0].since(&before).get("fast_encap") == 1).then_some(())
    })
    .unwrap();
}

fn a_peer_behind_a_second_uplink_is_reached_by_the_fast_path<F: Family>() {
    let stage = Stage::<F>::set(&["--gate=open"]);
    stage.warm_up();
    let second = another_uplink(&stage, 1);
    let a = &stage.cluster.nodes[0];
    for (from, to) in [(0, 1), (1, 0)] {
        let (peer, own, via) =
            (F::as_prefix(stage.node(to)), stage.node(from), F::on_segment(1, 1 + to as u8).0);
        stage.cluster.nodes[from].netns().ip(&format!("route add {peer} via {via} src {own}")).unwrap();
    }
    until_fast_over(&stage, &second);
    let pods = [&stage.sender, &stage.destination];
    for (to, (from, at)) in [(1, (pods[0], pods[1])), (0, (pods[1], pods[0]))] {
        let before = stage.counters()[to].clone();
        let work = || stream::run(F::host(from), F::host(at), None, Until::Bytes(20_000_000));
        let (_, share) = Share::during(&stage.cluster.nodes, &pods, work).unwrap();
        assert!(share.smaller() > 0.95, "{share:?}");
        let counted = stage.counters()[to].since(&before);
        assert!(counted.get("fast_decap") > 10 * counted.get("fast_overlay"), "{counted:?}");
    }
    // A smaller MTU of that link counts, too.
    a.netns().ip("link set eth1 mtu 1400").unwrap();
    let full = stage.datagram(&vec![b'm'; 1500 - F::ENCAP_LEN - F::HEADER_LEN - 8]);
    wait_for("the smaller MTU", Duration::from_secs(1), || {
        let before = stage.counters()[0].clone();
        arrives(&stage, &full);
        (stage.counters()[0].since(&before).get("pass_pod_too_big") > 0).then_some(())
    })
    .unwrap();
    // The kernel takes the route away with the link and tells nobody.
    a.netns().ip("link set eth1 down").unwrap();
    let back = |packet: &F| {
        let before = stage.counters()[0].clone();
        arrives(&stage, packet) && stage.counters()[0].since(&before).get("fast_encap") == 1
    };
    wait_for("the first uplink", Duration::from_secs(1), || back(&full).then_some(())).unwrap();
}

/// Sends a datagram every millisecond until told to stop, and returns how many were sent and how many arrived.
fn flow_during<F: Family>(stage: &Stage<F>, work: impl FnOnce()) -> (usize, usize) {
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

fn of_two_next_hops_the_fast_path_takes_the_kernels_and_loses_nothing_when_that_is_withdrawn<F: Family>() {
    let mut stage = Stage::<F>::set(&["--gate=open"]);
    stage.warm_up();
    let routers = [Router::plug(&stage, 201), Router::plug(&stage, 202)];
    let peer = stage.node(1);
    let hops = routers.each_ref().map(|router| format!("nexthop via {}", router.address)).join(" ");
    stage.cluster.nodes[0].netns().ip(&format!("route replace {} {hops}", F::as_prefix(peer))).unwrap();
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
        node.ip(&format!("route replace {} nexthop via {}", F::as_prefix(peer), other.address)).unwrap();
    });
    assert_eq!(arrived, sent, "the hop was withdrawn, and still there");
    let counted = stage.counters()[0].since(&before);
    assert!(counted.get("fast_encap") >= sent as u64, "{sent} sent: {counted:?}");
    assert!(other.seen() > 0);
    until_fast_through(&stage, other);

    // The kernel alone takes the same one of the two.
    stage.cluster.nodes[0].netns().ip(&format!("route replace {} {hops}", F::as_prefix(peer))).unwrap();
    stage.restart(&["--datapath=kernel"]);
    stage.ping();
    for router in &routers {
        router.seen();
    }
    assert!(arrives(&stage, &stage.datagram(b"by the kernel alone")));
    assert_eq!(routers.each_ref().map(|router| router.seen() > 0), [0, 1].map(|i| i == chosen));
}

fn of_two_uplinks_the_one_that_is_left_is_taken_when_the_other_fails<F: Family>() {
    let stage = Stage::<F>::set(&["--gate=open"]);
    stage.warm_up();
    let others = [1, 2].map(|n| another_uplink(&stage, n));
    let node = stage.cluster.nodes[0].netns();
    let hop = |n| format!("nexthop via {} dev eth{n}", F::on_segment(n, 2).0);
    let (peer, own) = (F::as_prefix(stage.node(1)), stage.node(0));
    node.ip(&format!("route replace {peer} src {own} {} {}", hop(1), hop(2))).unwrap();
    let chosen = wait_for("the fast way over one of both", Duration::from_secs(1), || {
        let before = stage.counters()[0].clone();
        let there = arrives(&stage, &stage.datagram(b"which?"));
        let fast = there && stage.counters()[0].since(&before).get("fast_encap") == 1;
        let carried =
            others.each_ref().map(|it| it.drain().unwrap().iter().any(|frame| frame.ends_with(b"which?")));
        fast.then(|| carried.iter().position(|carried| *carried)).flatten()
    })
    .unwrap();
    let left = &others[1 - chosen];
    let (sent, arrived) = flow_during(&stage, || {
        thread::sleep(Duration::from_millis(200));
        left.drain().unwrap();
        node.ip(&format!("link set eth{} down", 1 + chosen)).unwrap();
        left.until("the flow over the one that is left", PATIENCE, |frame| frame.ends_with(b"one of many"))
            .unwrap();
    });
    println!("{} of {sent} lost, one each millisecond until the agent had heard of it", sent - arrived);
    assert!(sent - arrived < 1000, "{arrived} of {sent} arrived");
    until_fast_over(&stage, left);
}

/// The kernel of most of these tests has policies and no ESP: what must be encrypted it does not send, and what may be it
/// sends as it is.
fn what_an_ipsec_policy_is_for_is_left_to_the_kernel<F: Family>() {
    let stage = Stage::<F>::set(&["--gate=open"]);
    stage.warm_up();
    let node = &stage.cluster.nodes[0];
    let [own, peer] = [0, 1].map(|n| stage.node(n));
    let way = || {
        let before = stage.counters()[0].clone();
        let there = arrives(&stage, &stage.datagram(b"in the clear?"));
        let counted = stage.counters()[0].since(&before);
        (there, counted.get("fast_encap") > 0, counted.get("pass_pod_no_uplink") > 0)
    };
    let settles = |what: &str, wanted: (bool, bool, bool)| {
        wait_for(what, Duration::from_secs(1), || (way() == wanted).then_some(()))
            .unwrap_or_else(|error| panic!("{error:#}: {:?}, not {wanted:?}\n{}", way(), node.log()));
    };
    let subnets = [0, 1].map(|n: usize| F::subnet(&stage.cluster.nodes[n]));
    let tunnel = format!("src {own} dst {peer} proto udp dport 8472 dir out");
    let pods = format!("src {} dst {} dir out", subnets[0], subnets[1]);
    for selector in [tunnel, pods] {
        let template =
            |level: &str| format!("tmpl src {own} dst {peer} proto esp mode transport level {level}");
        node.netns().ip(&format!("xfrm policy add {selector} {}", template("use"))).unwrap();
        settles("the kernel's way", (true, false, true));
        let advice = node.status().unwrap()["advice"].to_string();
        assert!(advice.contains(&format!("all packets to {}: an IPsec policy", subnets[1])), "{advice}");

        node.netns().ip(&format!("xfrm policy update {selector} {}", template("required"))).unwrap();
        settles("nothing to leave", (false, false, true));
        stage.at_wire[1].drain().unwrap();
        for _ in 0..20 {
            assert!(!arrives(&stage, &stage.datagram(b"in the clear?")));
        }
        let frames = stage.at_wire[1].drain().unwrap();
        assert!(!frames.iter().any(|frame| frame.ends_with(b"in the clear?")), "it was in the clear");

        node.netns().ip(&format!("xfrm policy delete {selector}")).unwrap();
        settles("the fast way again", (true, true, false));
        assert!(!node.status().unwrap()["advice"].to_string().contains("IPsec"));
    }
    // Of other packets.
    node.netns().ip(&format!("xfrm policy add src {own} dst {peer} proto tcp dir out action block")).unwrap();
    thread::sleep(Duration::from_millis(200));
    assert_eq!(way(), (true, true, false));
}
