//! The open gate's promise: who never uses NAT is never gated, whatever else happens.

use std::{
    thread,
    time::{Duration, Instant},
};

use loden_tests::{
    container::Container,
    counters::Counters,
    each_family,
    family::Family,
    netns::Netns,
    node::Node,
    service::at,
    traffic::{
        hello, ping, socket,
        stream::{self, Until},
        transactions::{self, Kind},
    },
};

use crate::{OPEN, assert_direct_is_fast, cluster};

each_family!(
    ordinary_traffic_gates_nobody,
    churn_of_containers_gates_nobody,
    crashes_of_agents_under_traffic_gate_nobody,
);

/// No endpoint of these nodes is gated, and no packet looked translated.
fn assert_nobody_is_gated(nodes: &[Node], after: &str) {
    for node in nodes {
        let status = node.status().unwrap();
        let endpoints = status["endpoints"].as_array().unwrap();
        assert!(!endpoints.is_empty(), "{} knows its containers", node.name());
        let counters: Vec<_> =
            Counters::read(node).unwrap().iter().map(|(n, v)| format!("{n}={v}")).collect();
        for endpoint in endpoints {
            assert_eq!(
                endpoint["gated"],
                false,
                "after {after}: {endpoint} on {}: {counters:?}",
                node.name()
            );
        }
        let translated = Counters::read(node).unwrap().get("note_translated");
        assert_eq!(translated, 0, "after {after}: {}", node.name());
    }
}

fn ordinary_traffic_gates_nobody<F: Family>() {
    let (cluster, containers) = cluster::<F>(1, &[OPEN]);
    let (a, b) = (&containers[0], &containers[1]);
    for kind in [Kind::TcpRr, Kind::TcpCrr, Kind::UdpRr] {
        transactions::run(kind, F::host(a), F::host(b), Duration::from_millis(500)).unwrap();
        assert_nobody_is_gated(&cluster.nodes, &format!("{kind:?}"));
    }
    assert_direct_is_fast::<F>(&cluster.nodes, a, b);
    ping(a.netns(), F::of(b), 20).unwrap();
    assert_nobody_is_gated(&cluster.nodes, "ping");
    for (from, to) in [(a, b), (b, a)] {
        let (sender, receiver) =
            (socket::udp(F::host(from), 0).unwrap(), socket::udp(F::host(to), 5300).unwrap());
        sender.connect(at(F::of(to), 5300)).unwrap();
        let datagram = vec![0x5a; 8192];
        for round in 0..200 {
            sender.send(&datagram).unwrap();
            let n = socket::uninterrupted(|| receiver.recv(&mut [0; 9000]))
                .unwrap_or_else(|error| panic!("round {round}: {error}"));
            assert_eq!(n, 8192);
        }
        assert_nobody_is_gated(&cluster.nodes, "fragmented UDP");
        let shell = |netns: &Netns, line: String| netns.exec(&line);
        shell(from.netns(), format!("ping -q -c 20 -i 0.02 -s 4000 {}", F::of(to))).unwrap();
        assert_nobody_is_gated(&cluster.nodes, "fragmented pings");
        let too_big = shell(from.netns(), format!("ping -q -c 3 -i 0.02 -W 1 -M do -s 1440 {}", F::of(to)));
        assert!(too_big.is_err(), "1440 bytes and headers do not fit");
        assert_nobody_is_gated(&cluster.nodes, "oversize pings");
        if F::IS_IPV4 {
            // One option, four bytes: a record of one hop. IPv6 has no such thing.
            shell(from.netns(), format!("ping -q -c 5 -i 0.02 -R {}", F::of(to))).unwrap();
            assert_nobody_is_gated(&cluster.nodes, "IP options");
        }
        shell(from.netns(), format!("ping -q -c 3 -i 0.02 -W 1 -t 1 {}", F::of(to))).unwrap_err();
        assert_nobody_is_gated(&cluster.nodes, "a TTL or hop limit of 1");
    }
}

fn churn_of_containers_gates_nobody<F: Family>() {
    let (mut cluster, containers) = cluster::<F>(1, &[OPEN]);
    let (a, b) = (&containers[0], &containers[1]);
    let (from, to) = (F::host(a), F::host(b));
    thread::scope(|scope| {
        let until = Until::Time(Duration::from_secs(12));
        let running = scope.spawn(move || stream::run(from, to, None, until).unwrap());
        let pinging = scope.spawn(move || {
            from.netns.exec(&format!("ping -q -i 0.01 -c 1000 {}", to.address)).unwrap();
        });
        let start = Instant::now();
        let mut round = 0;
        while start.elapsed() < Duration::from_secs(10) {
            // New ones at new and at old addresses; the bridge's MAC changes with its ports.
            let new: Vec<Container> =
                (0..2).map(|n| cluster.nodes[n].run_container(10 + round % 3).unwrap()).collect();
            hello(F::host(&new[0]), F::host(&new[1]), None)
                .unwrap_or_else(|e| panic!("round {round}: {e:#}"));
            hello(F::host(&new[1]), to, None).unwrap_or_else(|e| panic!("round {round}: {e:#}"));
            hello(from, F::host(&new[1]), None).unwrap_or_else(|e| panic!("round {round}: {e:#}"));
            hello(to, F::host(&new[0]), None).unwrap_or_else(|e| panic!("round {round}: {e:#}"));
            transactions::run(Kind::UdpRr, F::host(&new[1]), F::host(&new[0]), Duration::from_millis(50))
                .unwrap();
            assert_nobody_is_gated(&cluster.nodes, &format!("{round} rounds of churn"));
            round += 1;
        }
        pinging.join().unwrap();
        running.join().unwrap();
    });
    assert_nobody_is_gated(&cluster.nodes, "churn");
}

fn crashes_of_agents_under_traffic_gate_nobody<F: Family>() {
    let (mut cluster, containers) = cluster::<F>(1, &[OPEN]);
    let (a, b) = (&containers[0], &containers[1]);
    let (from, to) = (F::host(a), F::host(b));
    thread::scope(|scope| {
        let until = Until::Time(Duration::from_secs(10));
        let running = scope.spawn(move || stream::run(from, to, None, until).unwrap());
        let pinging = scope.spawn(move || {
            from.netns.exec(&format!("ping -q -s 3000 -i 0.01 -c 800 {}", to.address)).unwrap();
        });
        for round in 0..6 {
            let node = &mut cluster.nodes[round % 2];
            if round < 4 {
                node.kill_agent();
            } else {
                assert!(node.stop_agent().unwrap().success());
            }
            node.start_agent(&[OPEN, "--datapath=ebpf"]).unwrap();
            transactions::run(Kind::UdpRr, to, from, Duration::from_millis(100)).unwrap();
        }
        pinging.join().unwrap();
        running.join().unwrap();
    });
    assert_nobody_is_gated(&cluster.nodes, "crashes");
    assert_direct_is_fast::<F>(&cluster.nodes, a, b);
}
