//! The containers' bridge asks for room for the overlay's headers, by a port of ours that carries nothing.

use std::time::Duration;

use loden_tests::{
    cluster::{Cluster, Plan},
    counters::Share,
    node::{BRIDGE, Node},
    process::wait_for,
    traffic::{
        ping,
        transactions::{self, Kind},
    },
};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);

/// The bridge's ports that are VXLAN devices.
fn rooms(node: &Node) -> Vec<Value> {
    let text = node.netns().ip("-json -details link show type vxlan").unwrap();
    let links: Vec<Value> = serde_json::from_str(&text).unwrap();
    links.into_iter().filter(|link| link["master"] == BRIDGE).collect()
}

fn the_room(node: &Node) -> Value {
    wait_for("the port that asks for headroom", LIMIT, || rooms(node).pop()).unwrap()
}

fn no_room(node: &Node) {
    wait_for("no port that asks for headroom", LIMIT, || rooms(node).is_empty().then_some(())).unwrap();
}

fn bridge(node: &Node) -> Value {
    let text = node.netns().ip(&format!("-json link show {BRIDGE}")).unwrap();
    let mut links: Vec<Value> = serde_json::from_str(&text).unwrap();
    links.remove(0)
}

#[test]
fn a_bridge_with_containers_gets_a_port_that_asks_for_headroom_and_stays_as_it_is() {
    let mut cluster = Cluster::start(&Plan { nodes: 2, ..Plan::default() }, &["--gate=open"]).unwrap();
    let before = bridge(&cluster.nodes[0]);
    assert!(rooms(&cluster.nodes[0]).is_empty(), "there is nobody yet whose packets need it");
    let containers = cluster.run_containers(1).unwrap();
    let (a, b) = (&containers[0], &containers[1]);
    for node in &cluster.nodes {
        let room = the_room(node);
        assert!(!room["flags"].as_array().unwrap().contains(&"UP".into()), "{room}");
        // Never the lowest MAC or the smallest MTU of the bridge's ports, which it would take for its own.
        assert_eq!((&room["address"], &room["mtu"]), (&"fe:ff:ff:ff:ff:ff".into(), &65_535.into()), "{room}");
    }
    assert_eq!(bridge(&cluster.nodes[0])["mtu"], before["mtu"]);
    ping(a.netns(), b.address(), 20).unwrap();
    let work = || transactions::run(Kind::UdpRr, a.host(), b.host(), Duration::from_secs(1));
    let (rate, share) = Share::during(&cluster.nodes, &[a, b], work).unwrap();
    assert!(rate.transactions > 100 && share.smaller() >= 0.99, "{rate:?} {share:?}");
    // Somebody removes it; a restarted agent finds it.
    let node = &mut cluster.nodes[0];
    let first = the_room(node);
    node.netns().ip(&format!("link delete {}", first["ifname"].as_str().unwrap())).unwrap();
    let second = the_room(node);
    assert_ne!(first["ifindex"], second["ifindex"]);
    node.stop_agent().unwrap();
    node.start_agent(&["--gate=open"]).unwrap();
    wait_for("the programs", LIMIT, || (node.status().ok()?["endpoints"][0].is_object()).then_some(()))
        .unwrap();
    assert_eq!(the_room(node)["ifindex"], second["ifindex"], "nothing was made anew");
}

#[test]
fn the_port_goes_with_its_bridge_with_the_programs_and_with_cleanup() {
    let mut cluster = Cluster::start(&Plan { nodes: 1, ..Plan::default() }, &[]).unwrap();
    let container = cluster.run_containers(1).unwrap();
    let node = &mut cluster.nodes[0];
    the_room(node);
    node.netns().ip(&format!("link delete {BRIDGE}")).unwrap();
    drop(container);
    let gone = || {
        let text = node.netns().ip("-json -details link show type vxlan").ok()?;
        let links: Vec<Value> = serde_json::from_str(&text).ok()?;
        (links.len() == 1).then_some(())
    };
    wait_for("the port to go with its bridge", LIMIT, gone).unwrap();

    node.make_bridge().unwrap();
    let _container = node.run_container(2).unwrap();
    the_room(node);
    for args in [&["--datapath=kernel"][..], &["--pod-headroom=false"]] {
        node.stop_agent().unwrap();
        node.start_agent(args).unwrap();
        no_room(node);
        node.stop_agent().unwrap();
        node.start_agent(&[]).unwrap();
        the_room(node);
    }
    node.stop_agent().unwrap();
    node.loden(&["cleanup", "--subnet-file", &node.subnet_file().display().to_string()]).unwrap();
    assert!(rooms(node).is_empty());
}
