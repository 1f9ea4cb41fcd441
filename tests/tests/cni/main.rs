//! The CNI plugin, run as a kubelet's runtime runs it: with Debian's standard plugins around it, on nodes with agents.

#![expect(
    clippy::unwrap_used,
    reason = "clippy.toml allows it in tests, which for clippy does not mean their modules"
)]

mod absence;
mod chain;
mod containerd;
mod cri;
mod dual;
mod flannel;
mod many;
mod routed;
mod verbs;

use std::{net::IpAddr, time::Duration};

use anyhow::{Result, ensure};
use loden_tests::{
    cluster::{Cluster, Plan},
    cni::{Pod, Runtime, routed},
    counters::{Counters, FAST_DELIVERED, FAST_SENT},
    node::Node,
    process::wait_for,
    traffic::{hello, ping},
};

/// Two nodes with agents and without bridges, and a runtime with a routed network on each.
fn routed_cluster(nodes: u32, args: &[&str]) -> (Cluster, Vec<Runtime>) {
    routed_cluster_of(Plan { nodes, ..Plan::default() }, args)
}

/// The same in another network.
fn routed_cluster_of(plan: Plan, args: &[&str]) -> (Cluster, Vec<Runtime>) {
    let mut cluster = Cluster::create(&plan).unwrap();
    for node in &mut cluster.nodes {
        node.start_agent(args).unwrap();
    }
    cluster.wait_for_routes().unwrap();
    let runtimes =
        cluster.nodes.iter().map(|node| Runtime::new(node, routed(node, "pods", &[])).unwrap()).collect();
    (cluster, runtimes)
}

/// Every pod says hello to every other and pings it, and source addresses stay.
fn assert_all_reach_all(pods: &[&Pod]) {
    for client in pods {
        for server in pods.iter().filter(|server| server.address != client.address) {
            let (from, to) = (client.address, server.address);
            let seen = hello(client.host(), server.host(), None)
                .unwrap_or_else(|error| panic!("TCP from {from} to {to}: {error:#}"));
            assert_eq!(seen, from, "the source address that {to} saw");
            ping(&client.netns, to, 1).unwrap_or_else(|error| panic!("ping from {from} to {to}: {error:#}"));
        }
    }
}

/// What the programs counted on all nodes.
fn counted(nodes: &[Node], names: &[&str]) -> u64 {
    let count = |node: &Node| {
        let counters = Counters::read(node).unwrap();
        names.iter().map(|name| counters.get(name)).sum::<u64>()
    };
    nodes.iter().map(count).sum()
}

/// The smaller part, of what left the pods and of what arrived, that took the fast path while `work` ran.
fn fast_share<T>(nodes: &[Node], pods: &[&Pod], work: impl FnOnce() -> Result<T>) -> (T, f64) {
    let sent = || pods.iter().map(|pod| pod.packets_sent().unwrap()).sum::<u64>();
    let reading = || [sent(), counted(nodes, &FAST_SENT), counted(nodes, &FAST_DELIVERED)];
    let before = reading();
    let result = work().unwrap();
    let after = reading();
    let grown: Vec<u64> = after.iter().zip(before).map(|(after, before)| after - before).collect();
    (result, grown[1].min(grown[2]) as f64 / grown[0].max(1) as f64)
}

/// Whether the agent knows an endpoint at this address.
fn knows(node: &Node, address: impl Into<IpAddr>) -> bool {
    let address = address.into();
    let status = node.status().unwrap();
    let endpoints = status["endpoints"].as_array().cloned().unwrap_or_default();
    endpoints.iter().any(|endpoint| endpoint["address"] == address.to_string())
}

/// The agent follows the kernel's events: a pod is adopted a moment after it was made.
fn assert_known(node: &Node, address: impl Into<IpAddr>) {
    let address = address.into();
    let what = format!("{} to know {address}", node.name());
    wait_for(&what, Duration::from_secs(3), || knows(node, address).then_some(())).unwrap();
}

/// The names of the pinned links; none where the agent has loaded no programs.
fn pins(node: &Node) -> Result<Vec<String>> {
    match std::fs::read_dir(node.bpffs().join("v1/links")) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => Ok(entries?.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()),
    }
}

/// Nothing of any pod is left on the node: links, routes, programs, endpoints, addresses.
fn assert_nothing_is_left(node: &Node, runtime: &Runtime) {
    let nothing = || -> Result<()> {
        let netns = node.netns();
        let links = netns.ip("-o link show type veth")?;
        ensure!(!links.contains("pod"), "links: {links}");
        for family in ["-4", "-6"] {
            let routes = netns.ip(&format!("{family} route show proto 77"))?;
            ensure!(routes.is_empty(), "routes: {routes}");
        }
        let pins: Vec<_> = pins(node)?.into_iter().filter(|name| name.contains("_pod-")).collect();
        ensure!(pins.is_empty(), "pins: {pins:?}");
        let endpoints = node.status()?["endpoints"].clone();
        ensure!(endpoints.as_array().is_some_and(Vec::is_empty), "endpoints: {endpoints}");
        let addresses = runtime.given_out();
        ensure!(addresses.is_empty(), "addresses: {addresses:?}");
        Ok(())
    };
    // The agent's own list follows the kernel's events.
    let gone = wait_for("the node to be empty", Duration::from_secs(3), || nothing().ok());
    gone.unwrap_or_else(|_| panic!("{}: {:#}", node.name(), nothing().unwrap_err()));
}
