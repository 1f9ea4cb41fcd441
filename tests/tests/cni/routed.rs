//! Pods on veths of their own.

use loden_tests::{
    counters::Counters,
    service::{self, Front, Tool, at},
    traffic::{
        Service, hello, ping,
        stream::{self, Until},
    },
};

use crate::{assert_all_reach_all, assert_known, assert_nothing_is_left, fast_share, routed_cluster};

const BULK: Until = Until::Bytes(100_000_000);

#[test]
fn routed_pods_of_two_nodes_reach_each_other_fast_and_leave_nothing() {
    let (cluster, runtimes) = routed_cluster(2, &[]);
    let pods = [runtimes[0].add("a").unwrap(), runtimes[1].add("b").unwrap()];
    let (a, b) = (&pods[0], &pods[1]);
    let env = cluster.nodes[0].subnet_env().unwrap();
    assert!(env.subnet().contains(&a.address), "{}", a.address);
    assert_all_reach_all(&[a, b]);
    ping(&a.netns, b.address, 20).unwrap();
    for (from, to) in [(a, b), (b, a)] {
        let work = || stream::run(from.host(), to.host(), None, BULK);
        let (stream, share) = fast_share(&cluster.nodes, &[a, b], work);
        assert_eq!((stream.bytes, stream.source), (100_000_000, from.address.into()));
        assert!(share >= 0.99, "{share}");
    }
    // The lease's MTU, a whole address, and a way out that nobody has to ask for.
    assert!(a.netns.ip("link show eth0").unwrap().contains(&format!("mtu {}", env.mtu)));
    assert!(a.netns.ip("address show eth0").unwrap().contains(&format!("{}/32", a.address)));
    assert!(a.netns.ip("neigh show").unwrap().contains("169.254.1.1 dev eth0 lladdr"));
    // As many hops as by the kernel alone: two hosts.
    let reply = a.netns.exec(&format!("ping -n -c 1 {}", b.address)).unwrap();
    assert!(reply.contains("ttl=62"), "{reply}");
    for (runtime, pod) in runtimes.iter().zip(pods) {
        runtime.remove(pod).unwrap();
    }
    for (node, runtime) in cluster.nodes.iter().zip(&runtimes) {
        assert_nothing_is_left(node, runtime);
    }
}

fn assert_local_is_fast(gate: &str) {
    let (cluster, runtimes) = routed_cluster(1, &[gate]);
    let pods = ["a", "b"].map(|id| runtimes[0].add(id).unwrap());
    let (a, b) = (&pods[0], &pods[1]);
    for pod in [a, b] {
        assert_known(&cluster.nodes[0], pod.address);
    }
    assert_all_reach_all(&[a, b]);
    ping(&a.netns, b.address, 20).unwrap();
    let sent = || a.packets_sent().unwrap() + b.packets_sent().unwrap();
    let (before, sent_before) = (Counters::read(&cluster.nodes[0]).unwrap(), sent());
    let stream = stream::run(a.host(), b.host(), None, BULK).unwrap();
    assert_eq!(stream.source, a.address);
    let counters = Counters::read(&cluster.nodes[0]).unwrap().since(&before);
    let share = counters.get("fast_local") as f64 / (sent() - sent_before) as f64;
    assert!(share >= 0.99, "{gate}: {share} {counters:?}");
    // One router between them, with the programs as without.
    let reply = a.netns.exec(&format!("ping -n -c 1 {}", b.address)).unwrap();
    assert!(reply.contains("ttl=63"), "{reply}");
}

#[test]
fn routed_pods_of_one_node_are_joined_by_the_programs() {
    assert_local_is_fast("--gate=strict");
}

#[test]
fn routed_pods_of_one_node_are_joined_by_the_programs_with_the_gate_open() {
    assert_local_is_fast("--gate=open");
}

#[test]
fn a_service_in_front_of_routed_pods_is_reached_and_is_never_fast() {
    let (cluster, runtimes) = routed_cluster(2, &[]);
    let pods = [runtimes[0].add("client").unwrap(), runtimes[1].add("server").unwrap()];
    let (client, server) = (&pods[0], &pods[1]);
    let front = "10.96.0.10:80".parse().unwrap();
    let backend = at(server.address, 8080);
    service::publish(cluster.nodes[0].netns(), Tool::Iptables, &[Front::new(front, &[backend])]).unwrap();
    let service = Some(Service { front, backend: 8080 });
    assert_eq!(hello(client.host(), server.host(), service).unwrap(), client.address);
    let work = || stream::run(client.host(), server.host(), service, Until::Bytes(20_000_000));
    let before = Counters::read(&cluster.nodes[0]).unwrap();
    assert_eq!(work().unwrap().bytes, 20_000_000);
    let counters = Counters::read(&cluster.nodes[0]).unwrap().since(&before);
    // What the client's node translates, the client's node must see, both ways.
    assert_eq!((counters.get("fast_encap"), counters.get("fast_decap")), (0, 0), "{counters:?}");
}

#[test]
fn a_pod_cannot_speak_as_another() {
    let (cluster, runtimes) = routed_cluster(1, &[]);
    let pods = ["liar", "victim", "server"].map(|id| runtimes[0].add(id).unwrap());
    let [liar, victim, server] = &pods;
    liar.netns.ip(&format!("address add {}/32 dev eth0", victim.address)).unwrap();
    let before = Counters::read(&cluster.nodes[0]).unwrap();
    liar.netns
        .exec(&format!("ping -n -q -c 3 -i 0.05 -W 1 -I {} {}", victim.address, server.address))
        .unwrap_err();
    let counters = Counters::read(&cluster.nodes[0]).unwrap().since(&before);
    assert_eq!(counters.get("drop_forged_pod_source"), 3, "{counters:?}");
    // Where no program looks, the kernel does.
    let stranger = "203.0.113.9";
    liar.netns.ip(&format!("address add {stranger}/32 dev eth0")).unwrap();
    let heard = || {
        let snmp = server.netns.exec("cat /proc/net/snmp").unwrap();
        let icmp: Vec<&str> = snmp.lines().filter(|line| line.starts_with("Icmp:")).collect();
        icmp[1].split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
    };
    let before = heard();
    let line = format!("ping -n -q -c 3 -i 0.05 -W 1 -I {stranger} {}", server.address);
    liar.netns.exec(&line).unwrap_err();
    assert_eq!(heard(), before, "a forged packet has arrived");
}
