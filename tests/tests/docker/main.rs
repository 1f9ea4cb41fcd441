//! The real ring, Docker: two real engines, each on a node whose agent has written the `subnet.env` that it starts by.
//!
//! Containers are Docker's own, wired by Docker; the traffic in them is the harness's, so that every byte is compared.

#![expect(
    clippy::unwrap_used,
    reason = "clippy.toml allows it in tests, which for clippy does not mean their modules"
)]

mod churn;
mod dual;
mod firewall;
mod image;
mod misplaced;
mod networks;
mod options;
mod overlay;
mod ports;
mod restarts;
mod units;

use std::{net::IpAddr, time::Duration};

use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    counters::{Counters, Share},
    docker::{DockerContainer, Engine},
    node::Node,
    process::wait_for,
    traffic::{
        ping,
        stream::{self, Until},
    },
};

/// A cluster with an engine on each node, in order.
struct Fleet {
    // Dropped before the nodes that they are on.
    engines: Vec<Engine>,
    cluster: Cluster,
}

impl Fleet {
    /// Two nodes, agents with these arguments, engines with nothing but bridge address and MTU of `subnet.env`.
    fn start(args: &[&str]) -> Self {
        let mut fleet = Self::without_engines(args);
        fleet.start_engines(|node| by_subnet_env(node).to_vec());
        fleet
    }

    /// The same without engines.
    fn without_engines(args: &[&str]) -> Self {
        Self::of(Plan::default(), args)
    }

    /// The same in another network.
    fn of(plan: Plan, args: &[&str]) -> Self {
        let mut cluster = Cluster::create(&Plan { nodes: 2, ..plan }).unwrap();
        for node in &mut cluster.nodes {
            node.start_agent(args).unwrap();
        }
        cluster.wait_for_routes().unwrap();
        Self { engines: Vec::new(), cluster }
    }

    /// Starts an engine on each node with the options that are meant for that node.
    fn start_engines(&mut self, options: impl Fn(&Node) -> Vec<String>) {
        let start = |node: &Node| Engine::start(node, &words(&options(node))).unwrap();
        self.engines = self.cluster.nodes.iter().map(start).collect();
    }

    /// A container on each node, known to the agents.
    fn pair(&self) -> [DockerContainer; 2] {
        let pair = [0, 1].map(|n| self.engines[n].run("").unwrap());
        ping(pair[0].netns(), pair[1].address(), 20).unwrap();
        pair
    }
}

/// What the README tells an operator to start dockerd with.
fn by_subnet_env(node: &Node) -> [String; 2] {
    let env = node.subnet_env().unwrap();
    [format!("--bip={}", env.subnet()), format!("--mtu={}", env.mtu)]
}

fn words(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

/// Bulk TCP between two containers, both ways after one another, keeps its source address and is carried by the
/// programs at both ends; of each family of which both have an address.
fn assert_fast(nodes: &[Node], a: &Container, b: &Container) {
    let v4 = [(a.host(), b.host()), (b.host(), a.host())];
    let v6 = a.host6().zip(b.host6()).map(|(a, b)| [(a, b), (b, a)]);
    for (from, to) in v4.into_iter().chain(v6.into_iter().flatten()) {
        let work = || stream::run(from, to, None, Until::Bytes(60_000_000));
        let (stream, share) = Share::during(nodes, &[a, b], work).unwrap();
        assert_eq!(stream.source, from.address, "containers see one another's addresses");
        let counters: Vec<_> = nodes.iter().map(|node| Counters::read(node).unwrap()).collect();
        assert!(share.smaller() >= 0.95, "{} to {}: {share:?} {counters:?}", from.address, to.address);
    }
}

/// Waits until a node's agent knows just these.
fn wait_for_endpoints<A: Copy + Into<IpAddr>>(node: &Node, wanted: &[A]) {
    let wanted: Vec<IpAddr> = wanted.iter().map(|address| (*address).into()).collect();
    let what = format!("{} to know {wanted:?} only", node.name());
    wait_for(&what, Duration::from_secs(10), || (node.endpoints().unwrap() == wanted).then_some(()))
        .unwrap_or_else(|error| panic!("{error:#}: it knows {:?}", node.endpoints()));
}
