//! The programs carry the packets, and the counters prove it.

use std::time::Duration;

use loden_tests::{
    cluster::Cluster,
    container::Container,
    counters::{Counters, Share},
    each_family,
    family::Family,
    process::wait_for,
    traffic::{
        ping,
        stream::{self, Until},
        transactions::{self, Kind},
    },
};

use crate::show_logs;

each_family!(
    bulk_tcp_takes_the_fast_path_both_ways,
    bulk_tcp_takes_the_fast_path_both_ways_with_the_gate_open,
    every_kind_of_transaction_takes_the_fast_path,
    without_the_programs_bulk_tcp_arrives_and_nothing_is_counted,
    the_programs_tell_of_packets_when_asked_and_only_then,
);

const BULK: Until = Until::Bytes(200_000_000);

/// Two nodes with agents, and a container on each that has answered the other.
fn start<F: Family>(args: &[&str]) -> (Cluster, Vec<Container>) {
    let (cluster, containers) = Cluster::start_with_containers(&F::plan(), args).unwrap();
    show_logs(&cluster);
    // The first packets resolve neighbours and make the agents know both containers.
    ping(containers[0].netns(), F::of(&containers[1]), 20).unwrap();
    (cluster, containers)
}

fn bulk_tcp_takes_the_fast_path_both_ways<F: Family>() {
    assert_bulk_is_fast::<F>("strict");
}

fn bulk_tcp_takes_the_fast_path_both_ways_with_the_gate_open<F: Family>() {
    assert_bulk_is_fast::<F>("open");
}

fn assert_bulk_is_fast<F: Family>(gate: &str) {
    let (cluster, containers) = start::<F>(&["--gate", gate]);
    let (a, b) = (&containers[0], &containers[1]);
    for (from, to) in [(a, b), (b, a)] {
        let work = || stream::run(F::host(from), F::host(to), None, BULK);
        let (stream, share) = Share::during(&cluster.nodes, &[a, b], work).unwrap();
        assert_eq!(stream.source, F::of(from).into());
        let counters: Vec<_> = cluster.nodes.iter().map(|node| Counters::read(node).unwrap()).collect();
        assert!(share.smaller() >= 0.99, "{share:?} {counters:?}");
        // Of IPv6 aggregates go by the VXLAN device, single packets (the acknowledgements at least) by hand.
        let all = |name: &str| counters.iter().map(|counters| counters.get(name)).sum::<u64>();
        assert!(all("fast_encap") > 100, "{counters:?}");
        assert_eq!(all("fast_overlay_out") > 100, !F::IS_IPV4, "{counters:?}");
    }
    // The same by peer and by endpoint: at each end of the one link, and of the one container behind it.
    for (node, pod) in cluster.nodes.iter().zip(&containers) {
        let status = node.status().unwrap();
        let mtu = u64::from(node.subnet_env().unwrap().mtu);
        let address = F::of(pod).to_string();
        let endpoint = status["endpoints"].as_array().unwrap().iter().find(|it| it["address"] == *address);
        for what in [&status["peers"][0], endpoint.unwrap_or_else(|| panic!("{status}"))] {
            assert!(what["fast_share"].as_f64().unwrap() >= 0.95, "{what}");
            for direction in ["sent", "received"] {
                let number = |way: &str, unit: &str| what["traffic"][direction][way][unit].as_u64().unwrap();
                let (fast, slow) = (number("fast", "packets"), number("slow", "packets"));
                assert!(fast as f64 / (fast + slow) as f64 >= 0.99, "{direction}: {what}");
                let bytes = number("fast", "bytes") + number("slow", "bytes");
                assert!(bytes > 200_000_000, "{direction}: {what}");
                // Segments and not aggregates: none is larger than the pods' MTU, headers of an aggregate apart.
                assert!(bytes / (fast + slow) <= mtu, "{direction}: {what}");
            }
        }
    }
    let (from, to) = (F::of(a).to_string(), F::of(b).to_string());
    let explained = cluster.nodes[0].loden(&["explain", &from, &to, "80"]).unwrap();
    assert!(explained.contains("program") && explained.contains("from_pod"), "{explained}");
}

fn every_kind_of_transaction_takes_the_fast_path<F: Family>() {
    let (cluster, containers) = start::<F>(&[]);
    let (a, b) = (&containers[0], &containers[1]);
    // Two seconds, so that an emulated machine has a hundred of each to show as well.
    // With the handshake, FIN and RST on the slow path, more than half of the packets of a short connection are slow ones.
    for (kind, least) in [(Kind::TcpRr, 0.99), (Kind::UdpRr, 0.99), (Kind::TcpCrr, 0.3)] {
        let work = || transactions::run(kind, F::host(a), F::host(b), Duration::from_secs(2));
        let (rate, share) = Share::during(&cluster.nodes, &[a, b], work).unwrap();
        assert!(rate.transactions > 100, "{kind:?}: {rate:?}");
        assert!(share.smaller() >= least, "{kind:?}: {share:?}");
    }
}

fn without_the_programs_bulk_tcp_arrives_and_nothing_is_counted<F: Family>() {
    let (cluster, containers) = start::<F>(&["--datapath=kernel"]);
    let (a, b) = (&containers[0], &containers[1]);
    let work = || stream::run(F::host(a), F::host(b), None, BULK);
    let (stream, share) = Share::during(&cluster.nodes, &[a, b], work).unwrap();
    assert_eq!(stream.bytes, 200_000_000);
    assert!(share.sent > 1000, "{share:?}");
    assert_eq!((share.encapsulated, share.delivered), (0, 0));
}

fn the_programs_tell_of_packets_when_asked_and_only_then<F: Family>() {
    for (args, told) in [(&["--bpf-log", "--gate=open"][..], true), (&["--gate=open"][..], false)] {
        let (cluster, containers) = start::<F>(args);
        let (a, b) = (F::of(&containers[0]), F::of(&containers[1]));
        // ICMP or ICMPv6: its header and 56 bytes of data behind those of IP and Ethernet.
        let (protocol, bytes) = if F::IS_IPV4 { (1, 98) } else { (58, 118) };
        let line = format!("{a} > {b} proto {protocol} {bytes} bytes");
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
