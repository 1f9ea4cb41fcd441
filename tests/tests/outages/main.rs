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
    counters::{Counters, Share},
    node::Node,
    process::wait_for,
    traffic::{
        hello,
        stream::{self, Until},
    },
};

/// The shortest TTL that an agent takes.
const SHORT_TTL: &str = "--subnet-lease-ttl=5s";

/// Wants the containers of these nodes to reach each other in each family, bulk TCP by the programs.
fn assert_fast(nodes: &[Node], a: &Container, b: &Container) {
    assert_reach(a, b);
    for (from, to) in a.hosts().zip(b.hosts()) {
        let read = || nodes.iter().map(|node| Counters::read(node).unwrap()).collect::<Vec<_>>();
        let before = read();
        let work = || stream::run(from, to, None, Until::Bytes(50_000_000));
        let (_, share) = Share::during(nodes, &[a, b], work).unwrap();
        let counted: Vec<_> = read().iter().zip(&before).map(|(now, before)| now.since(before)).collect();
        assert!(share.smaller() >= 0.98, "{} to {}: {share:?} {counted:?}", from.address, to.address);
    }
}

fn assert_reach(a: &Container, b: &Container) {
    for (a, b) in a.hosts().zip(b.hosts()) {
        assert_eq!(hello(a, b, None).unwrap(), a.address);
        assert_eq!(hello(b, a, None).unwrap(), b.address);
    }
}

fn wait_ready(node: &Node, limit: u64) {
    wait_for("readiness", Duration::from_secs(limit), || {
        (node.status().ok()?["ready"] == true).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {:#?}\n{}", node.status(), node.log()));
}
