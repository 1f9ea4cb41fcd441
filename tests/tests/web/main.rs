//! Ring 6: what the agent serves to others, read by those that it is made for: a real Prometheus, a real browser, a
//! terminal.

#![expect(
    clippy::unwrap_used,
    reason = "a test ends at the first surprise; clippy knows tests by their attribute, and not their helpers"
)]

mod families;
mod http;
mod metrics;
mod page;
mod status;

use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    traffic::ping,
};

/// Two nodes that serve everything, a container on each, and a few packets between them.
fn served() -> (Cluster, Vec<Container>) {
    let args = ["--metrics-addr=127.0.0.1:9101", "--web-addr=127.0.0.1:9102"];
    let mut cluster = Cluster::start(&Plan { nodes: 3, ..Plan::default() }, &args).unwrap();
    let containers = cluster.run_containers(1).unwrap();
    ping(containers[0].netns(), containers[1].address(), 20).unwrap();
    (cluster, containers)
}
