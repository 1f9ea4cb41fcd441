//! Loden and flannel nodes in one cluster.

use std::{fs, thread, time::Duration};

use ipnet::Ipv4Net;
use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    counters::{Counters, Share},
    flannel::{self, FlannelNode},
    netns::Netns,
    nic,
    node::{BRIDGE, Node},
    process::wait_for,
    traffic::{
        load, ping,
        stream::{self, Until},
    },
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

/// MAC of a Loden node's VTEP, as its lease says it.
fn vtep_mac(cluster: &Cluster, node: &Node) -> String {
    let public = node.address().to_string();
    let leases = cluster.leases().unwrap();
    let values = leases.iter().map(|(_, value)| serde_json::from_str::<Value>(value).unwrap());
    let value = values.into_iter().find(|value| value["PublicIP"] == *public).unwrap();
    value["BackendData"]["VtepMAC"].as_str().unwrap().to_owned()
}

#[test]
fn flannel_nodes_alone_reach_each_other() {
    // Proves the hand-made nodes themselves: what they say about a mixed cluster rests on this.
    for direct in [false, true] {
        let cluster = Cluster::create(&Plan { nodes: 0, ..Plan::default() }).unwrap();
        let (mut a, mut b) = (flannel_node(&cluster, 31, 231), flannel_node(&cluster, 32, 232));
        a.add_peer(b.subnet(), b.address(), b.mac(), direct).unwrap();
        b.add_peer(a.subnet(), a.address(), a.mac(), direct).unwrap();
        let containers = [a.run_container().unwrap(), b.run_container().unwrap()];
        assert_all_reach_all(&containers);
        assert_bulk_both_ways(&containers[0], &containers[1]);
    }
}

fn config(direct: bool) -> String {
    format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"vxlan","DirectRouting":{direct}}}}}"#)
}

/// Makes the flannel node and the cluster's nodes peers of each other.
fn introduce(cluster: &Cluster, flannel: &FlannelNode, direct: bool) {
    for node in &cluster.nodes {
        wait_for("the route to the flannel node", Duration::from_secs(10), || {
            node.has_route(flannel.subnet()).unwrap().then_some(())
        })
        .unwrap();
        let (subnet, mac) = (node.subnet_env().unwrap().subnet(), vtep_mac(cluster, node));
        flannel.add_peer(subnet, node.address(), &mac, direct).unwrap();
    }
}

/// Two nodes of each kind.
fn assert_mixed_cluster_is_whole(direct: bool) {
    let plan = Plan { nodes: 2, config: config(direct), ..Plan::default() };
    let mut cluster = Cluster::start(&plan, &[]).unwrap();
    let mut flannels = [flannel_node(&cluster, 31, 231), flannel_node(&cluster, 32, 232)];
    for flannel in &flannels {
        introduce(&cluster, flannel, direct);
        for other in flannels.iter().filter(|other| other.address() != flannel.address()) {
            flannel.add_peer(other.subnet(), other.address(), other.mac(), direct).unwrap();
        }
    }
    show_logs(&cluster);
    let mut containers = cluster.run_containers(1).unwrap();
    for flannel in &mut flannels {
        containers.push(flannel.run_container().unwrap());
    }
    assert_all_reach_all(&containers);
    assert_bulk_both_ways(&containers[0], &containers[2]);
    // The half of it that is ours is fast: what Loden sends to the flannel node, and what it gets from there.
    let (ours, theirs) = (&containers[0], &containers[2]);
    let work = || stream::run(ours.host(), theirs.host(), None, Until::Bytes(50_000_000));
    let (_, share) = Share::during(&cluster.nodes, &[ours], work).unwrap();
    assert!(share.encapsulated as f64 >= 0.98 * share.sent as f64, "{share:?}");
    let work = || stream::run(theirs.host(), ours.host(), None, Until::Bytes(50_000_000));
    let (_, share) = Share::during(&cluster.nodes, &[theirs], work).unwrap();
    assert!(share.delivered as f64 >= 0.9 * share.sent as f64, "{share:?}");
}

#[test]
fn loden_and_flannel_nodes_carry_each_others_traffic() {
    assert_mixed_cluster_is_whole(false);
}

#[test]
fn loden_and_flannel_nodes_carry_each_others_traffic_with_direct_routing() {
    assert_mixed_cluster_is_whole(true);
}

/// All that flannel made on a node, without the programs and sysctls, which a flannel node may have or not.
fn flannels_work(node: &Node) -> Vec<String> {
    let lines = [
        "ip -o link show flannel.1",
        "ip -o -4 address show flannel.1",
        "ip -4 route show table all",
        "ip neigh show dev flannel.1",
        "bridge fdb show dev flannel.1",
    ];
    lines.iter().map(|line| node.netns().exec(line).unwrap()).collect()
}

/// Before TCX (Linux 6.6) a program is a filter of a clsact qdisc. While the kernel adds one to an interface that is up it
/// drops what goes out there (`qdisc_graft` in net/sched/sch_api.c deactivates the device), by whomever it is told to: some
/// milliseconds, and on a busy machine more. Here it is told so before: what the agent does besides must lose nothing.
fn add_clsact_where_programs_are_filters(taken: &Node, other: &Node) {
    if other.netns().exec("tc filter show dev eth0 ingress").unwrap().is_empty() {
        return;
    }
    for interface in ["eth0", "flannel.1", BRIDGE, "veth1"] {
        taken.netns().exec(&format!("tc qdisc add dev {interface} clsact")).unwrap();
    }
}

/// A flannel node becomes one of Loden, and a flannel node again, under load all the while.
fn assert_taken_over_and_handed_back(direct: bool, gate: &str) {
    let plan = Plan { nodes: 2, config: config(direct), ..Plan::default() };
    let mut cluster = Cluster::create(&plan).unwrap();
    let taken = &cluster.nodes[0];
    let subnet: Ipv4Net = "10.5.231.0/24".parse().unwrap();
    let mac = flannel::set_up(taken.netns(), taken.address(), subnet, cluster.etcd()).unwrap();
    let env =
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.231.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n";
    fs::write(taken.subnet_file(), env).unwrap();
    cluster.nodes[1].start_agent(&[gate]).unwrap();
    cluster.nodes[1].make_bridge().unwrap();
    let peer = cluster.nodes[1].subnet_env().unwrap().subnet();
    let peer_mac = vtep_mac(&cluster, &cluster.nodes[1]);
    let address = cluster.nodes[1].address();
    flannel::add_peer(cluster.nodes[0].netns(), peer, address, &peer_mac, direct).unwrap();
    cluster.wait_for_routes().unwrap();
    let containers = cluster.run_containers(1).unwrap();
    let (a, b) = (&containers[0], &containers[1]);
    assert_all_reach_all(&containers);
    add_clsact_where_programs_are_filters(&cluster.nodes[0], &cluster.nodes[1]);
    let before = (flannels_work(&cluster.nodes[0]), cluster.leases().unwrap());
    let ((), there) = load::during(a.host(), b.host(), 10, || {
        let ((), back) = load::during(b.host(), a.host(), 10, || {
            cluster.nodes[0].start_agent(&[gate])?;
            thread::sleep(Duration::from_secs(1));
            Ok(())
        })?;
        assert_eq!((back.lost, back.repeated), (0, 0), "to the node that is taken over: {back:?}");
        Ok(())
    })
    .unwrap();
    assert_eq!((there.lost, there.repeated), (0, 0), "from the node that is taken over: {there:?}");
    assert_eq!(cluster.leases().unwrap(), before.1, "the same leases");
    assert_eq!(vtep_mac(&cluster, &cluster.nodes[0]), mac);
    let link = |work: &[String]| work[0].clone();
    assert_eq!(link(&flannels_work(&cluster.nodes[0])), link(&before.0), "the same device, MAC and index");
    assert_eq!(fs::read_to_string(cluster.nodes[0].subnet_file()).unwrap(), env);
    let work = || stream::run(a.host(), b.host(), None, Until::Bytes(50_000_000));
    let (_, share) = Share::during(&cluster.nodes, &[a, b], work).unwrap();
    assert!(share.smaller() >= 0.98, "{share:?}");
    let ((), report) = load::during(b.host(), a.host(), 10, || {
        let node = &mut cluster.nodes[0];
        assert!(node.stop_agent()?.success());
        let file = node.subnet_file().display().to_string();
        node.loden(&["cleanup", "--keep-kernel", "--subnet-file", &file])?;
        Ok(())
    })
    .unwrap();
    assert_eq!((report.lost, report.repeated), (0, 0), "{report:?}");
    assert_eq!(flannels_work(&cluster.nodes[0]), before.0, "as flannel had made it");
    assert_eq!(cluster.leases().unwrap(), before.1);
    assert_all_reach_all(&containers);
}

#[test]
fn a_flannel_node_is_taken_over_in_place_and_handed_back() {
    assert_taken_over_and_handed_back(false, "--gate=strict");
}

#[test]
fn a_flannel_node_with_direct_routing_is_taken_over_in_place_and_handed_back() {
    assert_taken_over_and_handed_back(true, "--gate=open");
}

#[test]
fn segments_of_a_flannel_node_are_decapsulated_by_the_programs_once_their_checksums_are_verified() {
    let mut cluster = Cluster::start(&Plan { nodes: 1, ..Plan::default() }, &["--gate=open"]).unwrap();
    let mut flannel = flannel_node(&cluster, 31, 231);
    introduce(&cluster, &flannel, false);
    nic::segment_underlay(&cluster).unwrap();
    nic::segment(flannel.netns(), "eth0").unwrap();
    // On a wire checksums are there; a veth would leave them out.
    flannel.netns().exec("ethtool -K eth0 tx off").unwrap();
    let containers = [cluster.run_containers(1).unwrap().remove(0), flannel.run_container().unwrap()];
    let node = &cluster.nodes[0];
    ping(containers[1].netns(), containers[0].address(), 20).unwrap();
    let before = Counters::read(node).unwrap();
    assert_bulk_both_ways(&containers[0], &containers[1]);
    let counted = Counters::read(node).unwrap().since(&before);
    // Linux sends VXLAN with a checksum. Without GRO nobody would have looked at it before the programs.
    assert!(counted.get("fast_decap") > 500, "{counted:?}");
    assert!(counted.get("pass_wire_checksum") < counted.get("fast_decap") / 10, "{counted:?}");
}
