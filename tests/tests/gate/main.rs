//! Ring 4, the flow gate: what the host translates or filters never takes the shortcut, what it leaves alone does.
//!
//! Each claim that holds for both gates is tested under both. Counters of the node that translates are asserted,
//! because a reply that the client's kernel happens to accept proves little.

#![expect(
    clippy::unwrap_used,
    reason = "clippy.toml allows it in tests, which for clippy does not mean their modules"
)]

mod closing;
mod eviction;
mod forward_chain;
mod node_ports;
mod open;
mod policy;
mod requalification;
mod same_port;
mod services;

use std::{net::Ipv4Addr, time::Duration};

use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    counters::{Counters, Share},
    netns::Netns,
    node::{BRIDGE, Node},
    process::wait_for,
    traffic::{
        ping,
        stream::{self, Until},
    },
};

const STRICT: &str = "--gate=strict";
const OPEN: &str = "--gate=open";

/// Makes a test of a function for each of both gates.
macro_rules! under_both_gates {
    ($($test:ident)+) => {
        mod strict {
            $(#[test] fn $test() { super::$test(crate::STRICT); })+
        }
        mod open {
            $(#[test] fn $test() { super::$test(crate::OPEN); })+
        }
    };
}
use under_both_gates;

/// Nodes with agents and so many containers on each, known to all agents.
fn cluster(nodes: u32, each: u32, args: &[&str]) -> (Cluster, Vec<Container>) {
    cluster_of(&Plan { nodes, ..Plan::default() }, each, args)
}

/// The same, with a network config of its own.
fn cluster_of(plan: &Plan, each: u32, args: &[&str]) -> (Cluster, Vec<Container>) {
    let args: Vec<&str> = args.iter().copied().chain(["--datapath=ebpf"]).collect();
    let mut cluster = Cluster::start(plan, &args).unwrap();
    for node in &cluster.nodes {
        // As Docker's bridge: without a MAC of its own it would take a port's, and another with the next port.
        node.netns().ip(&format!("link set {BRIDGE} address 02:42:00:00:00:01")).unwrap();
    }
    let containers = cluster.run_containers(each).unwrap();
    let per_node = each as usize;
    let (first, rest) = containers.split_at(per_node);
    for (a, b) in rest.iter().map(|b| (&first[0], b)).chain(first.iter().map(|a| (a, &rest[0]))) {
        ping(a.netns(), b.address(), 1).unwrap();
    }
    for (node, own) in cluster.nodes.iter().zip(containers.chunks(per_node)) {
        for container in own {
            wait_for("the agent to know the container", Duration::from_secs(5), || {
                gated(node, container.address())
            })
            .unwrap();
        }
    }
    (cluster, containers)
}

/// Whether the node's agent says that flows of this container must qualify; `None` while it does not know it.
fn gated(node: &Node, address: Ipv4Addr) -> Option<bool> {
    let status = node.status().ok()?;
    let address = address.to_string();
    status["endpoints"].as_array()?.iter().find(|endpoint| endpoint["address"] == address)?["gated"].as_bool()
}

/// Packets that took the shortcut on a node.
fn fast(node: &Node) -> u64 {
    let counters = Counters::read(node).unwrap();
    counters.iter().filter(|(name, _)| name.starts_with("fast_")).map(|(_, packets)| packets).sum()
}

/// Bulk TCP between two containers, both ways after one another, is carried by the programs at both ends.
fn assert_direct_is_fast(nodes: &[Node], a: &Container, b: &Container) {
    for (from, to) in [(a, b), (b, a)] {
        let work = || stream::run(from.host(), to.host(), None, Until::Bytes(60_000_000));
        let (stream, share) = Share::during(nodes, &[a, b], work).unwrap();
        assert_eq!(stream.source, from.address(), "pods see one another's addresses");
        assert!(share.smaller() >= 0.95, "{} to {}: {share:?}", from.address(), to.address());
    }
}

/// A counter of a namespace's own protocol stack, as `/proc/net/snmp` has it.
fn snmp(netns: &Netns, protocol: &str, name: &str) -> u64 {
    let text = netns.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp")).unwrap();
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(protocol)?.strip_prefix(':'));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let at = names.split_whitespace().position(|word| word == name).unwrap();
    values.split_whitespace().nth(at).unwrap().parse().unwrap()
}
