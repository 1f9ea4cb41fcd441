//! The cluster ring: nodes as network namespaces, a real etcd, real agents, containers on real bridges.
//!
//! The slow path behind the fast one answers a ping as well, so tests of the fast path count packets.

#![expect(
    clippy::unwrap_used,
    reason = "clippy.toml allows it in tests, which for clippy does not mean their modules"
)]

mod attachment;
mod churn;
mod direct;
mod dual;
mod families;
mod fast_path;
mod guard;
mod headroom;
mod healing;
mod index;
mod ipv6_fast;
mod ipv6_only;
mod leaving;
mod local;
mod mixed;
mod nat;
mod reachability;
mod restart;
mod upgrade;
mod wireguard;

use loden_tests::{cluster::Cluster, container::Container, traffic};

/// Lets every container say hello to every other over TCP and ping it, and wants source addresses unchanged.
fn assert_all_reach_all(containers: &[Container]) {
    for client in containers {
        for server in containers.iter().filter(|server| server.address() != client.address()) {
            let (from, to) = (client.address(), server.address());
            let seen = traffic::hello(client.host(), server.host(), None)
                .unwrap_or_else(|error| panic!("TCP from {from} to {to}: {error:#}"));
            assert_eq!(seen, from, "the source address that {to} saw");
            traffic::ping(client.netns(), to, 1)
                .unwrap_or_else(|error| panic!("ping from {from} to {to}: {error:#}"));
        }
    }
}

/// Shows what the agents said, for the report of a test that fails after this.
fn show_logs(cluster: &Cluster) {
    for node in &cluster.nodes {
        println!("--- {}\n{}", node.name(), node.log());
    }
}
