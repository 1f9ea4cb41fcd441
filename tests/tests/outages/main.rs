//! What is around a node fails, and the node does what OPERATIONS.md says: for each row of its tables a test.

#![expect(
    clippy::unwrap_used,
    reason = "clippy.toml allows it in tests, which for clippy does not mean their modules"
)]

mod absence;
mod refusals;
mod scale;
mod secrets;
mod storms;

use std::time::Duration;

use loden_tests::{
    container::Container,
    counters::Share,
    node::Node,
    process::wait_for,
    traffic::{
        hello,
        stream::{self, Until},
    },
};

/// The shortest TTL that an agent takes.
const SHORT_TTL: &str = "--subnet-lease-ttl=5s";

/// Wants the containers of these nodes to reach each other, bulk TCP by the programs.
fn assert_fast(nodes: &[Node], a: &Container, b: &Container) {
    assert_reach(a, b);
    let work = || stream::run(a.host(), b.host(), None, Until::Bytes(50_000_000));
    let (_, share) = Share::during(nodes, &[a, b], work).unwrap();
    assert!(share.smaller() >= 0.98, "{share:?}");
}

fn assert_reach(a: &Container, b: &Container) {
    assert_eq!(hello(a.host(), b.host(), None).unwrap(), a.address());
    assert_eq!(hello(b.host(), a.host(), None).unwrap(), b.address());
}

fn wait_ready(node: &Node, limit: u64) {
    wait_for("readiness", Duration::from_secs(limit), || {
        (node.status().ok()?["ready"] == true).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {:#?}\n{}", node.status(), node.log()));
}

/// The key under which a node's lease is.
fn key(node: &Node) -> String {
    let subnet = node.subnet_env().unwrap().subnet;
    format!("{}/subnets/{}-{}", loden_tests::cluster::PREFIX, subnet.network(), subnet.prefix_len())
}
