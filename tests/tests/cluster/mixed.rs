//! Loden and flannel nodes in one cluster.

use std::time::Duration;

use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    flannel::FlannelNode,
    netns::Netns,
    process::wait_for,
    traffic::stream::{self, Until},
};
use serde_json::Value;

use crate::{assert_all_reach_all, show_logs};

/// Plugs a flannel node with the subnet 10.5.<third>.0/24 in. Above 100, where no agent picks: it writes its record as it
/// is, without looking.
fn flannel_node(cluster: &Cluster, host: u32, third: u8) -> FlannelNode {
    let netns = Netns::create("flannel").unwrap();
    let address = cluster.underlay().plug(&netns, host).unwrap();
    let subnet = format!("10.5.{third}.0/24").parse().unwrap();
    FlannelNode::create(netns, address, subnet, cluster.etcd()).unwrap()
}

fn assert_bulk_both_ways(a: &Container, b: &Container) {
    for (from, to) in [(a, b), (b, a)] {
        let stream = stream::run(from.host(), to.host(), None, Until::Bytes(50_000_000)).unwrap();
        assert_eq!((stream.bytes, stream.source), (50_000_000, from.address().into()));
    }
}

#[test]
fn flannel_nodes_alone_reach_each_other() {
    // Proves the hand-made nodes themselves: what they say about a mixed cluster rests on this.
    let cluster = Cluster::create(&Plan { nodes: 0, ..Plan::default() }).unwrap();
    let (mut a, mut b) = (flannel_node(&cluster, 31, 231), flannel_node(&cluster, 32, 232));
    a.add_peer(b.subnet(), b.address(), b.mac()).unwrap();
    b.add_peer(a.subnet(), a.address(), a.mac()).unwrap();
    let containers = [a.run_container().unwrap(), b.run_container().unwrap()];
    assert_all_reach_all(&containers);
    assert_bulk_both_ways(&containers[0], &containers[1]);
}

#[test]
fn loden_and_flannel_nodes_carry_each_others_traffic() {
    let mut cluster = Cluster::start(&Plan { nodes: 2, ..Plan::default() }, &[]).unwrap();
    let mut flannel = flannel_node(&cluster, 31, 231);
    for node in &cluster.nodes {
        wait_for("the route to the flannel node", Duration::from_secs(10), || {
            node.has_route(flannel.subnet()).unwrap().then_some(())
        })
        .unwrap();
        let public = node.address().to_string();
        let leases = cluster.leases().unwrap();
        let value: Value = leases
            .iter()
            .map(|(_, value)| serde_json::from_str::<Value>(value).unwrap())
            .find(|value| value["PublicIP"] == *public)
            .unwrap();
        let mac = value["BackendData"]["VtepMAC"].as_str().unwrap();
        flannel.add_peer(node.subnet_env().unwrap().subnet, node.address(), mac).unwrap();
    }
    show_logs(&cluster);
    let mut containers = cluster.run_containers(1).unwrap();
    containers.push(flannel.run_container().unwrap());
    assert_all_reach_all(&containers);
    assert_bulk_both_ways(&containers[0], &containers[2]);
}
