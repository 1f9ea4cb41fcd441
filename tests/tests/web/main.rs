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
    family::Family,
    packet::Ipv4,
    traffic::ping,
};

/// Three nodes of this family that serve everything, a container on each, and a few packets between two of them.
fn served_in<F: Family>() -> (Cluster, Vec<Container>) {
    let args = ["--metrics-addr=127.0.0.1:9101", "--web-addr=127.0.0.1:9102"];
    let plan = Plan { nodes: 3, ..F::alone() };
    let (cluster, containers) = Cluster::start_with_containers(&plan, &args).unwrap();
    ping(containers[0].netns(), F::of(&containers[1]), 20).unwrap();
    (cluster, containers)
}

fn served() -> (Cluster, Vec<Container>) {
    served_in::<Ipv4>()
}
