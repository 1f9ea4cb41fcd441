//! IPv6 pods over an IPv6 underlay: the programs carry the packets, and the counters prove it.

use std::time::Duration;

use loden_tests::{
    cluster::{Cluster, PREFIX, Plan},
    container::Container,
    counters::{Counters, Share},
    netns::Netns,
    process::wait_for,
    traffic::{
        Host, ping,
        stream::{self, Until},
        transactions::{self, Kind},
    },
};

use crate::show_logs;

const LIMIT: Duration = Duration::from_secs(10);

/// Nodes of both families, and a container on each that the agent knows by both addresses.
fn start(nodes: u32, gate: &str) -> (Cluster, Vec<Container>) {
    let mut cluster = Cluster::start(&Plan { nodes, ..Plan::dual() }, &["--gate", gate]).unwrap();
    let containers = cluster.run_containers(1).unwrap();
    show_logs(&cluster);
    for (from, to) in containers.iter().flat_map(|from| containers.iter().map(move |to| (from, to))) {
        if from.address() != to.address() {
            ping(from.netns(), to.address6().unwrap(), 20).unwrap();
        }
    }
    (cluster, containers)
}

fn assert_bulk_is_fast(gate: &str) {
    let (cluster, containers) = start(2, gate);
    let (a, b) = (&containers[0], &containers[1]);
    for (from, to) in [(a, b), (b, a)] {
        let (from6, to6) = (from.host6().unwrap(), to.host6().unwrap());
        let work = || stream::run(from6, to6, None, Until::Bytes(200_000_000));
        let (stream, share) = Share::during(&cluster.nodes, &[a, b], work).unwrap();
        assert_eq!(stream.source, from6.address);
        let counters: Vec<_> = cluster.nodes.iter().map(|node| Counters::read(node).unwrap()).collect();
        assert!(share.smaller() >= 0.98, "{share:?} {counters:?}");
        // Aggregates by way of the VXLAN device, single packets (the acknowledgements at least) by hand.
        let all = |name: &str| counters.iter().map(|counters| counters.get(name)).sum::<u64>();
        assert!(all("fast_overlay_out") > 100 && all("fast_encap") > 100, "{counters:?}");
    }
    for (kind, least) in [(Kind::TcpRr, 0.98), (Kind::UdpRr, 0.98)] {
        let work = || transactions::run(kind, a.host6().unwrap(), b.host6().unwrap(), Duration::from_secs(1));
        let (rate, share) = Share::during(&cluster.nodes, &[a, b], work).unwrap();
        assert!(rate.transactions > 50, "{kind:?}: {rate:?}");
        assert!(share.smaller() >= least, "{kind:?}: {share:?}");
    }
    // The same by peer and by endpoint.
    for node in &cluster.nodes {
        let status = node.status().unwrap();
        let endpoints = status["endpoints"].as_array().unwrap();
        let of_ipv6 = |endpoint: &&serde_json::Value| endpoint["address"].as_str().unwrap().contains(':');
        let endpoint = endpoints.iter().find(of_ipv6).unwrap_or_else(|| panic!("{status}"));
        for what in [&status["peers"][0], endpoint] {
            assert!(what["fast_share"].as_f64().unwrap() >= 0.95, "{what}");
            for direction in ["sent", "received"] {
                let fast = what["traffic"][direction]["fast"]["bytes"].as_u64().unwrap();
                assert!(fast > 200_000_000, "{direction}: {what}");
            }
        }
    }
    let (from, to) = (a.address6().unwrap(), b.address6().unwrap());
    let explained = cluster.nodes[0].loden(&["explain", &from.to_string(), &to.to_string(), "80"]).unwrap();
    assert!(explained.contains("program") && explained.contains("from_pod"), "{explained}");
}

#[test]
fn ipv6_takes_the_fast_path_both_ways() {
    assert_bulk_is_fast("strict");
}

#[test]
fn ipv6_takes_the_fast_path_both_ways_with_the_gate_open() {
    assert_bulk_is_fast("open");
}

/// A node as flanneld sets one up for dual stack: what its kernel's own device accepts has right checksums.
#[test]
fn a_flannel_nodes_kernel_takes_what_the_fast_path_sends_and_the_other_way_round() {
    let (cluster, containers) = start(1, "open");
    let (node, ours) = (&cluster.nodes[0], &containers[0]);
    let peer = Netns::create("f6").unwrap();
    let address = cluster.underlay().plug(&peer, 31).unwrap();
    let mac = "0a:fe:00:00:06:1f";
    peer.ip("-6 address add fd77::ff31/64 dev eth0 nodad").unwrap();
    let device = "type vxlan id 1 dev eth0 local fd77::ff31 dstport 8472 nolearning";
    peer.ip(&format!("link add flannel-v6.1 address {mac} mtu 1430 {device}")).unwrap();
    peer.ip("-6 address add fc00:0:0:fffe::/128 dev flannel-v6.1 nodad").unwrap();
    peer.ip("link set flannel-v6.1 up").unwrap();
    let value = format!(
        r#"{{"PublicIP":"{address}","PublicIPv6":"fd77::ff31","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"0a:fe:00:00:04:1f"}},"BackendV6Data":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
    );
    let key = format!("{PREFIX}/subnets/10.5.254.0-24&fc00:0:0:fffe::-64");
    cluster.etcd().ctl(&["put", &key, &value]).unwrap();
    let subnet = ours.address6().unwrap().to_string().replace("::2", "::");
    let links: serde_json::Value =
        serde_json::from_str(&node.netns().ip("-j link show dev flannel-v6.1").unwrap()).unwrap();
    let device = links[0]["address"].as_str().unwrap();
    let leases = cluster.leases().unwrap();
    let own = leases.iter().map(|(_, value)| serde_json::from_str::<serde_json::Value>(value).unwrap());
    let own = own.into_iter().find(|value| value["PublicIP"] == *node.address().to_string()).unwrap();
    let vtep = own["PublicIPv6"].as_str().unwrap();
    peer.ip(&format!("-6 neigh replace {subnet} lladdr {device} dev flannel-v6.1 nud permanent")).unwrap();
    peer.exec(&format!("bridge fdb replace {device} dev flannel-v6.1 dst {vtep} self permanent")).unwrap();
    peer.ip(&format!("-6 route replace {subnet}/64 via {subnet} dev flannel-v6.1 onlink")).unwrap();
    let theirs = Host { netns: &peer, address: "fc00:0:0:fffe::".parse().unwrap() };
    // The kernel's way is there before the programs know the peer, and the gate is strict until the pod is known.
    wait_for("the fast path to the flannel node", LIMIT, || {
        let before = Counters::read(node).ok()?;
        ping(ours.netns(), theirs.address, 1).ok()?;
        (Counters::read(node).ok()?.since(&before).get("fast_encap") > 0).then_some(())
    })
    .unwrap();
    let ours6 = ours.host6().unwrap();
    let work = || stream::run(ours6, theirs, None, Until::Bytes(50_000_000));
    let (_, share) = Share::during(&cluster.nodes, &[ours], work).unwrap();
    assert!(share.encapsulated as f64 >= 0.98 * share.sent as f64, "{share:?}");
    let before = Counters::read(node).unwrap();
    stream::run(theirs, ours6, None, Until::Bytes(50_000_000)).unwrap();
    // Single packets: UDP both ways, each of which its receiver's kernel or our program has verified.
    let rate = transactions::run(Kind::UdpRr, ours6, theirs, Duration::from_secs(1)).unwrap();
    let counted = Counters::read(node).unwrap().since(&before);
    let delivered = counted.get("fast_decap") + counted.get("fast_overlay");
    assert!(counted.get("fast_encap") >= rate.transactions, "{rate:?} {counted:?}");
    assert!(counted.get("fast_decap") > 100 && delivered >= rate.transactions, "{rate:?} {counted:?}");
    assert_eq!(counted.get("drop_unknown_vtep") + counted.get("drop_redirect"), 0, "{counted:?}");
}
