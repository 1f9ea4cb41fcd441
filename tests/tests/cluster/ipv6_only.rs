//! IPv6 alone: nodes, underlay, etcd and containers without a single IPv4 address, which flannel cannot be with etcd.

use ipnet::Ipv6Net;
use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    node::Node,
    traffic::{
        ping,
        stream::{self, Until},
        wait_for_answer,
    },
};
use serde_json::Value;

/// Nodes with agents, and a container on each. Who forwards nothing unless told to, as with Docker, forwards these.
fn start() -> (Cluster, Vec<Container>) {
    let mut cluster = Cluster::create(&Plan { nodes: 2, ..Plan::ipv6_only() }).unwrap();
    for node in &mut cluster.nodes {
        node.netns().exec("ip6tables -P FORWARD DROP").unwrap();
        node.start_agent(&["--ip-masq"]).unwrap();
        node.make_bridge().unwrap();
    }
    cluster.wait_for_routes().unwrap();
    let containers = cluster.run_containers(1).unwrap();
    wait_for_answer(&containers[0], &containers[1]).unwrap();
    (cluster, containers)
}

/// `FLANNEL_IPV6_SUBNET`: the bridge's address.
fn bridge(node: &Node) -> Ipv6Net {
    node.subnet_env().unwrap().subnet6.unwrap()
}

/// Bulk TCP, every byte compared, and the sender's own address seen.
fn transfer(from: &Container, to: &Container) {
    let (from, to) = (from.host6().unwrap(), to.host6().unwrap());
    let stream = stream::run(from, to, None, Until::Bytes(50_000_000)).unwrap();
    assert_eq!((stream.bytes, stream.source), (50_000_000, from.address));
}

fn lease(cluster: &Cluster, node: &Node) -> (String, Value) {
    let subnet = bridge(node).trunc();
    let segment = format!("0.0.0.0-0&{}-{}", subnet.network(), subnet.prefix_len());
    let leases = cluster.leases().unwrap();
    let (_, value) = leases
        .iter()
        .find(|(key, _)| key.ends_with(&format!("/{segment}")))
        .unwrap_or_else(|| panic!("no {segment} among {leases:?}"));
    (value.clone(), serde_json::from_str(value).unwrap())
}

#[test]
fn containers_reach_each_other_where_nobody_has_an_ipv4_address() {
    let (cluster, containers) = start();
    let (a, b) = (&containers[0], &containers[1]);
    // The whole of the MTU, and no byte more: 1430 less 40 of IPv6 and 8 of ICMPv6.
    let whole = format!("ping -6 -n -q -M do -c 2 -i 0.05 -W 2 -s 1382 {}", b.address6().unwrap());
    a.netns().exec(&whole).unwrap();
    transfer(a, b);
    transfer(b, a);
    // The router knows no way to a container, so that this is masqueraded.
    ping(a.netns(), cluster.underlay().address6(1).unwrap(), 2).unwrap();

    for (n, node) in cluster.nodes.iter().enumerate() {
        let subnet = bridge(node);
        assert_eq!(
            node.subnet_env().unwrap().text,
            format!(
                "FLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET={subnet}\nFLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n"
            )
        );
        let (text, value) = lease(&cluster, node);
        let mac = value["BackendV6Data"]["VtepMAC"].as_str().unwrap();
        let public = cluster.underlay().address6(11 + n as u32).unwrap();
        assert_eq!(
            text,
            format!(
                r#"{{"PublicIP":"0.0.0.0","PublicIPv6":"{public}","BackendType":"vxlan","BackendV6Data":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
            ),
            "as flannel's own code would write it"
        );
        assert_no_trace_of_ipv4(node);
        let status = node.status().unwrap();
        assert_eq!(status["lease"]["subnet"], subnet.trunc().to_string());
        assert_eq!((status["network"].as_str(), status["pod_mtu"].as_u64()), (Some("fc00::/48"), Some(1430)));
        assert_eq!(status["uplink"]["public_ip"], public.to_string());
        assert_eq!(status["peers"].as_array().unwrap().len(), 1);
        let report = node.loden_output(&["doctor", "--json"]).unwrap();
        let findings: Vec<Value> = serde_json::from_slice(&report.stdout).unwrap();
        let wrong: Vec<_> = findings.iter().filter(|finding| finding["outcome"] != "ok").collect();
        assert!(report.status.success() && wrong.is_empty(), "{wrong:#?}");
        let probed = |check: &str| {
            findings
                .iter()
                .any(|it| it["check"] == check && it["subject"].as_str().unwrap_or("").contains("fd77::"))
        };
        assert!(probed("underlay") && probed("overlay") && probed("offload"), "{findings:#?}");
    }
}

/// Neither devices nor addresses, routes, rules or sysctls.
fn assert_no_trace_of_ipv4(node: &Node) {
    let run = |line: &str| node.netns().exec(line).unwrap();
    assert_eq!(run("ip -4 -o address show scope global").trim(), "");
    assert_eq!(run("ip -4 route").trim(), "");
    let links = run("ip -o link");
    assert!(links.contains("flannel-v6.1") && !links.contains("flannel.1"), "{links}");
    let tables = run("nft list tables");
    assert!(tables.contains("table ip6 loden") && !tables.contains("table ip loden"), "{tables}");
    assert!(!run("iptables -S").contains("LODEN"));
    assert_eq!(run("sysctl -n net.ipv4.ip_forward").trim(), "0");
    assert_eq!(run("sysctl -n net.ipv6.conf.all.forwarding").trim(), "1");
}
