//! Peers on the same link, reached without encapsulation: host-gw, and VXLAN with DirectRouting.

use std::time::Duration;

use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    counters::Counters,
    node::Node,
    process::wait_for,
    traffic::{
        hello, ping,
        stream::{self, Until},
    },
};

const HOST_GW: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}"#;
const DIRECT_ROUTING: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","DirectRouting":true}}"#;

fn start(config: &str, args: &[&str]) -> (Cluster, Vec<Container>) {
    let plan = Plan { nodes: 2, config: config.into(), ..Plan::default() };
    let mut cluster = Cluster::start(&plan, args).unwrap();
    let containers = cluster.run_containers(1).unwrap();
    (cluster, containers)
}

/// Sends in bulk, and returns what the nodes' programs counted meanwhile beside what the containers sent.
fn bulk(cluster: &Cluster, a: &Container, b: &Container) -> (Counters, Counters, u64) {
    ping(a.netns(), b.address(), 20).unwrap();
    let read = || cluster.nodes.iter().map(|node| Counters::read(node).unwrap()).collect::<Vec<_>>();
    let sent = || a.packets_sent().unwrap() + b.packets_sent().unwrap();
    let (before, sent_before) = (read(), sent());
    let stream = stream::run(a.host(), b.host(), None, Until::Bytes(200_000_000)).unwrap();
    assert_eq!(stream.source, a.address());
    let after = read();
    (after[0].since(&before[0]), after[1].since(&before[1]), sent() - sent_before)
}

fn assert_direct(config: &str, args: &[&str]) {
    let (cluster, containers) = start(config, args);
    let (a, b, sent) = bulk(&cluster, &containers[0], &containers[1]);
    for name in ["fast_direct_out", "fast_direct_in"] {
        let share = (a.get(name) + b.get(name)) as f64 / sent as f64;
        assert!(share >= 0.99, "{name}: {share} of {sent}: {a:?} {b:?}");
    }
    for node in &cluster.nodes {
        let counters = Counters::read(node).unwrap();
        assert_eq!(counters.get("note_translated"), 0, "nobody translates here: {counters:?}");
    }
    for name in ["fast_encap", "fast_decap"] {
        assert_eq!((a.get(name), b.get(name)), (0, 0), "{name}");
    }
}

#[test]
fn host_gw_takes_the_fast_path_without_encapsulation_through_either_gate() {
    assert_direct(HOST_GW, &["--gate=strict"]);
    assert_direct(HOST_GW, &["--gate=open"]);
}

#[test]
fn direct_routing_takes_the_fast_path_without_encapsulation() {
    assert_direct(DIRECT_ROUTING, &[]);
}

#[test]
fn host_gw_makes_no_device_and_leaves_pods_the_whole_mtu() {
    let (cluster, containers) = start(HOST_GW, &["--datapath=kernel"]);
    let seen = hello(containers[0].host(), containers[1].host(), None).unwrap();
    assert_eq!(seen, containers[0].address());
    let node = &cluster.nodes[0];
    assert_eq!(node.subnet_env().unwrap().mtu, 1500);
    assert!(!node.netns().ip("-o link show").unwrap().contains("flannel"));
    let (subnet, via) = (cluster.nodes[1].subnet_env().unwrap().subnet().trunc(), cluster.nodes[1].address());
    let route = node.netns().ip(&format!("route show {subnet}")).unwrap();
    assert!(route.contains(&format!("{subnet} via {via} dev")), "{route}");
}

#[test]
fn a_peer_that_is_no_longer_on_the_link_is_reached_by_vxlan_within_a_second() {
    let (cluster, containers) = start(DIRECT_ROUTING, &[]);
    let (here, there) = (&cluster.nodes[0], &cluster.nodes[1]);
    let subnet = there.subnet_env().unwrap().subnet().trunc();
    let route = || here.netns().ip(&format!("route show {subnet}")).unwrap();
    assert!(route().contains(&format!("via {}", there.address())), "{}", route());
    // Now the way there leads through a router; this one happens to be the peer's own address on the link.
    here.netns().ip("route add 192.168.64.99/32 dev eth0").unwrap();
    here.netns().ip(&format!("neigh add 192.168.64.99 lladdr {} dev eth0", mac_of(there))).unwrap();
    here.netns().ip(&format!("route add {}/32 via 192.168.64.99", there.address())).unwrap();
    wait_for("the route over VXLAN", Duration::from_secs(1), || {
        route().contains("dev flannel.1").then_some(())
    })
    .unwrap();
    hello(containers[0].host(), containers[1].host(), None).unwrap();
    let (a, _, _) = bulk(&cluster, &containers[0], &containers[1]);
    assert!(a.get("fast_encap") > 1000 && a.get("fast_direct_out") == 0, "{a:?}");
}

fn mac_of(node: &Node) -> String {
    let links: serde_json::Value =
        serde_json::from_str(&node.netns().ip("-j link show eth0").unwrap()).unwrap();
    links[0]["address"].as_str().unwrap().to_owned()
}

#[test]
fn alloc_takes_a_lease_and_programs_no_route() {
    let config = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"alloc"}}"#;
    let plan = Plan { nodes: 2, config: config.into(), ..Plan::default() };
    let mut cluster = Cluster::create(&plan).unwrap();
    for node in &mut cluster.nodes {
        node.start_agent(&[]).unwrap();
    }
    let leases = cluster.leases().unwrap();
    assert_eq!(leases.len(), 2);
    for (node, (key, value)) in cluster.nodes.iter().zip(&leases) {
        assert!(!value.contains("BackendType"), "{key}: {value}");
        assert_eq!(node.subnet_env().unwrap().mtu, 1500);
        let routes = node.netns().ip("route show").unwrap();
        assert!(!routes.contains("10.5."), "{routes}");
    }
}
