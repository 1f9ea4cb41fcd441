//! Flows that the host translates: their replies must pass the host again.

use std::net::SocketAddr;

use loden_tests::{
    cluster::{Cluster, Plan},
    traffic::{
        Service, hello, ping,
        stream::{self, Until},
    },
};

/// A ClusterIP outside of the cluster's network, as kube-proxy's are.
const FRONT: &str = "10.96.0.10:80";
const BACKEND: u16 = 8080;

#[test]
fn replies_to_a_service_address_are_translated_back() {
    assert_translated_back("strict");
}

#[test]
fn replies_to_a_service_address_are_translated_back_with_the_gate_open() {
    assert_translated_back("open");
}

fn assert_translated_back(gate: &str) {
    let mut cluster = Cluster::start(&Plan { nodes: 2, ..Plan::default() }, &["--gate", gate]).unwrap();
    let containers = cluster.run_containers(1).unwrap();
    let (client, server) = (&containers[0], &containers[1]);
    let front: SocketAddr = FRONT.parse().unwrap();
    cluster.nodes[0]
        .netns()
        .exec(&format!(
            "iptables -t nat -A PREROUTING -d {} -p tcp --dport {} -j DNAT --to-destination {}:{BACKEND}",
            front.ip(),
            front.port(),
            server.address()
        ))
        .unwrap();
    // Both know each other before: the direct flow is fast, and the translated one must not be taken for it.
    ping(client.netns(), server.address(), 20).unwrap();
    stream::run(client.host(), server.host(), None, Until::Bytes(10_000_000)).unwrap();
    let service = Some(Service { front, backend: BACKEND });
    for round in 0..5 {
        let seen = hello(client.host(), server.host(), service)
            .unwrap_or_else(|error| panic!("round {round}: {error:#}"));
        assert_eq!(seen, client.address(), "DNAT alone leaves the source as it is");
    }
    let stream = stream::run(client.host(), server.host(), service, Until::Bytes(50_000_000)).unwrap();
    assert_eq!((stream.bytes, stream.source), (50_000_000, client.address().into()));
    let direct = stream::run(client.host(), server.host(), None, Until::Bytes(10_000_000)).unwrap();
    assert_eq!(direct.source, client.address());
}
