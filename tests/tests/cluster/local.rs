//! Two containers of one node: straight from veth to veth.

use loden_tests::{
    cluster::{Cluster, Plan},
    counters::Counters,
    traffic::{
        hello, ping,
        stream::{self, Until},
    },
};

fn assert_local_is_fast(gate: &str) {
    let mut cluster = Cluster::start(&Plan { nodes: 1, ..Plan::default() }, &[gate]).unwrap();
    let containers = cluster.run_containers(2).unwrap();
    let (a, b) = (&containers[0], &containers[1]);
    ping(a.netns(), b.address(), 20).unwrap();
    assert_eq!(hello(a.host(), b.host(), None).unwrap(), a.address());
    let sent = || a.packets_sent().unwrap() + b.packets_sent().unwrap();
    let (before, sent_before) = (Counters::read(&cluster.nodes[0]).unwrap(), sent());
    let stream = stream::run(a.host(), b.host(), None, Until::Bytes(200_000_000)).unwrap();
    assert_eq!(stream.source, a.address());
    let counters = Counters::read(&cluster.nodes[0]).unwrap().since(&before);
    let share = counters.get("fast_local") as f64 / (sent() - sent_before) as f64;
    assert!(share >= 0.99, "{gate}: {share} {counters:?}");
    // One segment: no hop is taken off on the way.
    let reply = a.netns().exec(&format!("ping -n -c 1 {}", b.address())).unwrap();
    assert!(reply.contains("ttl=64"), "{reply}");
}

#[test]
fn containers_of_one_node_are_joined_by_the_programs_through_either_gate() {
    assert_local_is_fast("--gate=strict");
    assert_local_is_fast("--gate=open");
}
