//! What is said of a node with both families, and of one without IPv4: each is counted, and each once.

use std::{collections::BTreeMap, fs, time::Duration};

use ipnet::IpNet;
use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    node::Node,
    process::wait_for,
    traffic::ping,
};
use serde_json::Value;

use crate::http::get;

/// Echoes that are counted, of each family.
const ECHOES: u32 = 50;
const LIMIT: Duration = Duration::from_secs(30);

#[test]
fn a_node_of_both_families_counts_each_once() {
    assert_counted(&Plan::dual());
}

#[test]
fn a_node_without_ipv4_counts_ipv6_and_nothing_else() {
    assert_counted(&Plan::ipv6_only());
}

fn start(plan: &Plan) -> (Cluster, Vec<Container>) {
    let plan = Plan { nodes: 2, ..plan.clone() };
    let args = ["--metrics-addr=127.0.0.1:9101"];
    let (cluster, containers) = Cluster::start_with_containers(&plan, &args).unwrap();
    for (node, container) in cluster.nodes.iter().zip(&containers) {
        for (address, there) in container.addresses().zip(containers[1].addresses()) {
            let mut last = Vec::new();
            wait_for("the endpoint", LIMIT, || {
                let _ = ping(containers[0].netns(), there, 1);
                last = node.endpoints().ok()?;
                last.contains(&address).then_some(())
            })
            .unwrap_or_else(|error| panic!("{error:#}: {address} is not in {last:?}"));
        }
    }
    (cluster, containers)
}

/// Packets sent and received, fast and slow together.
fn packets(of: &Value) -> [u64; 2] {
    ["sent", "received"].map(|direction| {
        let ways = &of["traffic"][direction];
        ["fast", "slow"].iter().map(|way| ways[way]["packets"].as_u64().unwrap()).sum()
    })
}

/// What is counted of the only peer, and of each endpoint.
fn counted(status: &Value) -> ([u64; 2], BTreeMap<String, [u64; 2]>) {
    let peers = status["peers"].as_array().unwrap();
    assert_eq!(peers.len(), 1, "a node is one peer, whatever it has: {peers:?}");
    let endpoints = status["endpoints"].as_array().unwrap().iter();
    let each = endpoints.map(|it| (it["address"].as_str().unwrap().to_owned(), packets(it)));
    (packets(&peers[0]), each.collect())
}

fn assert_counted(plan: &Plan) {
    let (cluster, containers) = start(plan);
    let node = &cluster.nodes[0];
    let [own, far] = [0, 1].map(|n| containers[n].addresses().collect::<Vec<_>>());
    let (peer_before, before) = counted(&node.status().unwrap());
    for address in &far {
        ping(containers[0].netns(), *address, ECHOES).unwrap();
    }
    let status = node.status().unwrap();
    let (peer, after) = counted(&status);
    let echoes = u64::from(ECHOES);
    let grown = |before: [u64; 2], after: [u64; 2]| [after[0] - before[0], after[1] - before[1]];
    assert_eq!(
        grown(peer_before, peer),
        [echoes * own.len() as u64; 2],
        "the peer, in all families: {status}"
    );
    assert_eq!(after.len(), own.len(), "{after:?}");
    for address in &own {
        let address = address.to_string();
        assert_eq!(grown(before[&address], after[&address]), [echoes; 2], "{address}: {status}");
    }
    assert_maps_are(plan, &status);
    assert_names_are(plan, node, &status);
    assert_metrics_are(plan, node, &status);
}

/// The maps of each family are there and filled, and none of a family that there is not.
fn assert_maps_are(plan: &Plan, status: &Value) {
    let maps = status["maps"].as_array().unwrap();
    let entries: BTreeMap<&str, u64> =
        maps.iter().map(|map| (map["name"].as_str().unwrap(), map["entries"].as_u64().unwrap())).collect();
    assert_eq!(entries.len(), maps.len(), "each once: {maps:?}");
    let prefixes = if plan.ipv4 { &["", "V6_"][..] } else { &["V6_"] };
    for prefix in prefixes {
        let of = |name: &str| entries[format!("{prefix}{name}").as_str()];
        assert_eq!((of("PEERS"), of("VTEPS"), of("ENDPOINTS")), (1, 1, 1), "{prefix}: {entries:?}");
        assert!(of("FLOWS") >= 1, "{prefix}: {entries:?}");
    }
    let strange = entries.keys().filter(|name| !plan.ipv4 && !name.starts_with("V6_"));
    assert_eq!(strange.count(), 0, "{entries:?}");
}

/// The lease, the addresses and the devices.
fn assert_names_are(plan: &Plan, node: &Node, status: &Value) {
    let text = fs::read_to_string(node.subnet_file()).unwrap();
    let entry = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    let subnet = |key| entry(key).unwrap().parse::<IpNet>().unwrap().trunc().to_string();
    let subnet6 = subnet("FLANNEL_IPV6_SUBNET");
    let lease = &status["lease"];
    assert_eq!(lease["subnet_v6"], subnet6.as_str(), "{lease}");
    let first = if plan.ipv4 { subnet("FLANNEL_SUBNET") } else { subnet6.clone() };
    assert_eq!(lease["subnet"], first.as_str(), "{lease}");
    assert_eq!(status["device"].is_null(), !plan.ipv4, "{status}");
    assert_eq!(status["device_v6"]["name"], "flannel-v6.1", "{status}");
    let text = node.loden(&["status"]).unwrap();
    for part in [first.as_str(), &subnet6, "flannel-v6.1"] {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
    assert_eq!(text.contains("flannel.1"), plan.ipv4, "{text}");
}

fn assert_metrics_are(plan: &Plan, node: &Node, status: &Value) {
    let (_, _, text) = get(node, 9101, "/metrics", "localhost");
    let value = |sample: &str| -> Option<f64> {
        let line = text.lines().find_map(|line| line.strip_prefix(sample))?;
        line.trim().parse().ok()
    };
    assert_eq!(value("loden_peers{}"), Some(1.0), "{text}");
    assert_eq!(value(r#"loden_endpoints{family="IPv6"}"#), Some(1.0), "{text}");
    assert_eq!(value(r#"loden_endpoints{family="IPv4"}"#), plan.ipv4.then_some(1.0), "{text}");
    let flows = |map: &str| value(&format!(r#"loden_map_entries{{map="{map}"}}"#));
    assert!(flows("V6_FLOWS").unwrap() >= 1.0 && flows("FLOWS").is_some() == plan.ipv4, "{text}");
    // One series for the peer, by its first subnet, of what both families have sent.
    let subnet = status["peers"][0]["subnet"].as_str().unwrap();
    let own = text.lines().filter(|line| line.starts_with("loden_peer_packets_total{"));
    let own: Vec<_> = own.filter(|line| line.contains(r#"direction="sent",path="fast""#)).collect();
    let of_peer = own.iter().filter(|line| line.contains(&format!(r#"subnet="{subnet}""#)));
    assert_eq!((of_peer.count(), own.len()), (1, 2), "the peer, and all others: {own:?}");
}
