//! The programs carry the packets, and the counters prove it.

use std::time::Duration;

use loden_tests::{
    cluster::{Cluster, Plan},
    counters::{Counters, Share},
    process::wait_for,
    traffic::{
        ping,
        stream::{self, Until},
        transactions::{self, Kind},
    },
};

use crate::show_logs;

const BULK: Until = Until::Bytes(200_000_000);

#[test]
fn bulk_tcp_takes_the_fast_path_both_ways() {
    assert_bulk_is_fast("strict");
}

#[test]
fn bulk_tcp_takes_the_fast_path_both_ways_with_the_gate_open() {
    assert_bulk_is_fast("open");
}

fn assert_bulk_is_fast(gate: &str) {
    let mut cluster = Cluster::start(&Plan { nodes: 2, ..Plan::default() }, &["--gate", gate]).unwrap();
    let containers = cluster.run_containers(1).unwrap();
    show_logs(&cluster);
    let (a, b) = (&containers[0], &containers[1]);
    // The first packets resolve neighbours and make the agents know both containers.
    ping(a.netns(), b.address(), 20).unwrap();
    for (from, to) in [(a, b), (b, a)] {
        let work = || stream::run(from.host(), to.host(), None, BULK);
        let (stream, share) = Share::during(&cluster.nodes, &[a, b], work).unwrap();
        assert_eq!(stream.source, from.address());
        let counters: Vec<_> = cluster.nodes.iter().map(|node| Counters::read(node).unwrap()).collect();
        assert!(share.smaller() >= 0.99, "{share:?} {counters:?}");
    }
    // The same by peer and by endpoint: at each end of the one link, and of the one container behind it.
    for node in &cluster.nodes {
        let status = node.status().unwrap();
        for what in [&status["peers"][0], &status["endpoints"][0]] {
            for direction in ["sent", "received"] {
                let number = |way: &str, unit: &str| what["traffic"][direction][way][unit].as_u64().unwrap();
                let (fast, slow) = (number("fast", "packets"), number("slow", "packets"));
                assert!(fast as f64 / (fast + slow) as f64 >= 0.99, "{direction}: {what}");
                let bytes = number("fast", "bytes") + number("slow", "bytes");
                assert!(bytes > 200_000_000, "{direction}: {what}");
                // Segments and not aggregates: none is larger than the pods' MTU, headers of an aggregate apart.
                assert!(bytes / (fast + slow) <= 1450, "{direction}: {what}");
            }
        }
    }
}

#[test]
fn every_kind_of_transaction_takes_the_fast_path() {
    let mut cluster = Cluster::start(&Plan { nodes: 2, ..Plan::default() }, &[]).unwrap();
    let containers = cluster.run_containers(1).unwrap();
    let (a, b) = (&containers[0], &containers[1]);
    ping(a.netns(), b.address(), 20).unwrap();
    // Two seconds, so that an emulated machine has a hundred of each to show as well.
    // With SYN, FIN and RST on the slow path, half of the packets of a short connection are slow ones.
    for (kind, least) in [(Kind::TcpRr, 0.99), (Kind::UdpRr, 0.99), (Kind::TcpCrr, 0.3)] {
        let work = || transactions::run(kind, a.host(), b.host(), Duration::from_secs(2));
        let (rate, share) = Share::during(&cluster.nodes, &[a, b], work).unwrap();
        assert!(rate.transactions > 100, "{kind:?}: {rate:?}");
        assert!(share.smaller() >= least, "{kind:?}: {share:?}");
    }
}

#[test]
fn without_the_programs_bulk_tcp_arrives_and_nothing_is_counted() {
    let mut cluster = Cluster::start(&Plan { nodes: 2, ..Plan::default() }, &["--datapath=kernel"]).unwrap();
    let containers = cluster.run_containers(1).unwrap();
    let (a, b) = (&containers[0], &containers[1]);
    let work = || stream::run(a.host(), b.host(), None, BULK);
    let (stream, share) = Share::during(&cluster.nodes, &[a, b], work).unwrap();
    assert_eq!(stream.bytes, 200_000_000);
    assert!(share.sent > 1000, "{share:?}");
    assert_eq!((share.encapsulated, share.delivered), (0, 0));
}

#[test]
fn the_programs_tell_of_packets_when_asked_and_only_then() {
    for (args, told) in [(&["--bpf-log", "--gate=open"][..], true), (&["--gate=open"][..], false)] {
        let mut cluster = Cluster::start(&Plan { nodes: 2, ..Plan::default() }, args).unwrap();
        let containers = cluster.run_containers(1).unwrap();
        let (a, b) = (&containers[0], &containers[1]);
        ping(a.netns(), b.address(), 20).unwrap();
        let line = format!("{} > {} proto 1 98 bytes", a.address(), b.address());
        let tells = |log: &str| log.lines().any(|l| l.contains("fast_encap if ") && l.contains(&line));
        if told {
            wait_for("the packets in the log", Duration::from_secs(5), || {
                tells(&cluster.nodes[0].log()).then_some(())
            })
            .unwrap_or_else(|error| panic!("{error:#}: {}", cluster.nodes[0].log()));
        } else {
            assert!(!tells(&cluster.nodes[0].log()));
        }
    }
}
