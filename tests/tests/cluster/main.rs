//! The cluster ring: nodes as network namespaces, a real etcd, real agents, containers on real bridges.
//!
//! The slow path behind the fast one answers a ping as well, so tests of the fast path count packets.

#![expect(
    clippy::unwrap_used,
    reason = "clippy.toml allows it in tests, which for clippy does not mean their modules"
)]

mod attachment;
mod backend;
mod churn;
mod direct;
mod dual;
mod families;
mod fast_path;
mod guard;
mod headroom;
mod healing;
mod index;
mod ipv6_only;
mod ipvs;
mod leaving;
mod local;
mod mixed;
mod nat;
mod notrack;
mod reachability;
mod restart;
mod upgrade;
mod wireguard;

use loden_tests::{
    cluster::Cluster,
    container::Container,
    counters::Share,
    node::Node,
    traffic::{
        self,
        stream::{self, Until},
    },
};

/// Lets every container say hello to every other over TCP and ping it, in each family that they have, and wants source
/// addresses unchanged.
fn assert_all_reach_all(containers: &[Container]) {
    let pairs = containers.iter().flat_map(|client| containers.iter().map(move |server| (client, server)));
    for (client, server) in pairs.filter(|(client, server)| client.netns().name() != server.netns().name()) {
        for (client, server) in client.hosts().zip(server.hosts()) {
            let (from, to) = (client.address, server.address);
            let seen = traffic::hello(client, server, None)
                .unwrap_or_else(|error| panic!("TCP from {from} to {to}: {error:#}"));
            assert_eq!(seen, from, "the source address that {to} saw");
            traffic::ping(client.netns, to, 1)
                .unwrap_or_else(|error| panic!("ping from {from} to {to}: {error:#}"));
        }
    }
}

/// Waits until every container is answered by the next: a container of IPv6 says nothing for its first second or two.
fn wait_for_all_to_answer(containers: &[Container]) {
    for (n, from) in containers.iter().enumerate() {
        traffic::wait_for_answer(from, &containers[(n + 1) % containers.len()]).unwrap();
    }
}

/// Wants bulk TCP between these containers of two nodes to be the programs', in each family that they have.
fn assert_bulk_is_fast(nodes: &[Node], a: &Container, b: &Container) {
    for (from, to) in a.hosts().zip(b.hosts()) {
        let work = || stream::run(from, to, None, Until::Bytes(50_000_000));
        let (stream, share) = Share::during(nodes, &[a, b], work).unwrap();
        assert_eq!(stream.source, from.address);
        assert!(share.smaller() >= 0.98, "{} to {}: {share:?}", from.address, to.address);
    }
}

/// Shows what the agents said, for the report of a test that fails after this.
fn show_logs(cluster: &Cluster) {
    for node in &cluster.nodes {
        println!("--- {}\n{}", node.name(), node.log());
    }
}
