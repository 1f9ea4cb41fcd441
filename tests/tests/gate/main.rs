//! Ring 4, the flow gate: what the host translates or filters never takes the shortcut, what it leaves alone does.
//!
//! Each claim that holds for both gates is tested under both. Counters of the node that translates are asserted,
//! because a reply that the client's kernel happens to accept proves little.

#![expect(
    clippy::unwrap_used,
    reason = "clippy.toml allows it in tests, which for clippy does not mean their modules"
)]

mod both_gates;
mod closing;
mod enforcement;
mod eviction;
mod forward_chain;
mod node_ports;
mod open;
mod policy;
mod requalification;
mod same_port;
mod services;
mod strays;

use std::time::Duration;

use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    counters::{Counters, Share},
    family::Family,
    netns::Netns,
    node::Node,
    process::wait_for,
    traffic::{
        ping,
        stream::{self, Until},
    },
};

const STRICT: &str = "--gate=strict";
const OPEN: &str = "--gate=open";

/// Two nodes with agents and so many containers on each, known to all agents.
fn cluster<F: Family>(each: u32, args: &[&str]) -> (Cluster, Vec<Container>) {
    cluster_of::<F>(&F::plan(), each, args)
}

/// The same nodes without encapsulation.
fn host_gw<F: Family>() -> Plan {
    let plan = F::plan();
    Plan { config: plan.config.replace("vxlan", "host-gw"), ..plan }
}

/// The same, with a plan of its own.
fn cluster_of<F: Family>(plan: &Plan, each: u32, args: &[&str]) -> (Cluster, Vec<Container>) {
    let args: Vec<&str> = args.iter().copied().chain(["--datapath=ebpf"]).collect();
    let mut cluster = Cluster::start(plan, &args).unwrap();
    let containers = cluster.run_containers(each).unwrap();
    let per_node = each as usize;
    let (first, rest) = containers.split_at(per_node);
    for (a, b) in rest.iter().map(|b| (&first[0], b)).chain(first.iter().map(|a| (a, &rest[0]))) {
        ping(a.netns(), F::host(b).address, 1).unwrap();
    }
    for (node, own) in cluster.nodes.iter().zip(containers.chunks(per_node)) {
        for container in own {
            wait_for("the agent to know the container", Duration::from_secs(5), || {
                node.gated(F::host(container).address)
            })
            .unwrap();
        }
    }
    (cluster, containers)
}

/// Packets that took the shortcut on a node.
fn fast(node: &Node) -> u64 {
    let counters = Counters::read(node).unwrap();
    counters.iter().filter(|(name, _)| name.starts_with("fast_")).map(|(_, packets)| packets).sum()
}

/// Bulk TCP between two containers, both ways after one another, is carried by the programs at both ends.
fn assert_direct_is_fast<F: Family>(nodes: &[Node], a: &Container, b: &Container) {
    for (from, to) in [(a, b), (b, a)] {
        let (source, destination) = (F::host(from), F::host(to));
        let work = || stream::run(source, destination, None, Until::Bytes(60_000_000));
        let (stream, share) = Share::during(nodes, &[a, b], work).unwrap();
        assert_eq!(stream.source, source.address, "pods see one another's addresses");
        assert!(share.smaller() >= 0.95, "{} to {}: {share:?}", source.address, destination.address);
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
