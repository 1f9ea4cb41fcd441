//! Two containers of one node: straight from veth to veth.

use loden_tests::{
    cluster::{Cluster, Plan},
    counters::Counters,
    each_plan,
    traffic::{
        hello, ping,
        stream::{self, Until},
        wait_for_answer,
    },
};

each_plan!(containers_of_one_node_are_joined_by_the_programs_through_either_gate);

fn assert_local_is_fast(plan: &Plan, gate: &str) {
    let mut cluster = Cluster::start(&Plan { nodes: 1, ..plan.clone() }, &[gate]).unwrap();
    let containers = cluster.run_containers(2).unwrap();
    let (a, b) = (&containers[0], &containers[1]);
    wait_for_answer(a, b).unwrap();
    for (from, to) in a.hosts().zip(b.hosts()) {
        ping(from.netns, to.address, 20).unwrap();
        assert_eq!(hello(from, to, None).unwrap(), from.address);
        let sent = || a.packets_sent().unwrap() + b.packets_sent().unwrap();
        let (before, sent_before) = (Counters::read(&cluster.nodes[0]).unwrap(), sent());
        let stream = stream::run(from, to, None, Until::Bytes(200_000_000)).unwrap();
        assert_eq!(stream.source, from.address);
        let counters = Counters::read(&cluster.nodes[0]).unwrap().since(&before);
        let share = counters.get("fast_local") as f64 / (sent() - sent_before) as f64;
        assert!(share >= 0.99, "{gate} to {}: {share} {counters:?}", to.address);
        // One segment: no hop is taken off on the way.
        let reply = from.netns.exec(&format!("ping -n -c 1 {}", to.address)).unwrap();
        assert!(reply.contains("ttl=64"), "{reply}");
    }
}

fn containers_of_one_node_are_joined_by_the_programs_through_either_gate(plan: &Plan) {
    assert_local_is_fast(plan, "--gate=strict");
    assert_local_is_fast(plan, "--gate=open");
}
