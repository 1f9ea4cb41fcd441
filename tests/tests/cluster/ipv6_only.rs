//! IPv6 alone: nodes, underlay, etcd and containers without a single IPv4 address, which flannel cannot be with etcd.

use std::{net::Ipv6Addr, time::Duration};

use ipnet::Ipv6Net;
use loden_tests::{
    cluster::{Cluster, Plan},
    netns::Netns,
    node::{BRIDGE, Node},
    process::wait_for,
    traffic::{
        Host, ping,
        stream::{self, Until},
    },
};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(10);

/// A container on a node's bridge.
struct Container {
    netns: Netns,
    address: Ipv6Addr,
}

impl Container {
    fn host(&self) -> Host<'_> {
        Host { netns: &self.netns, address: self.address.into() }
    }
}

/// Nodes with agents, and a container on each. Who forwards nothing unless told to, as with Docker, forwards these.
fn start(nodes: u32, backend: &str) -> (Cluster, Vec<Container>) {
    let plan = Plan::ipv6_only();
    let config = plan.config.replace(r#""Type":"vxlan""#, backend);
    let mut cluster = Cluster::create(&Plan { nodes, config, ..plan }).unwrap();
    let mut containers = Vec::new();
    for node in &mut cluster.nodes {
        node.netns().exec("ip6tables -P FORWARD DROP").unwrap();
        node.start_agent(&["--ip-masq"]).unwrap();
        containers.push(run_container(node));
    }
    for node in &cluster.nodes {
        for other in cluster.nodes.iter().filter(|other| other.name() != node.name()) {
            let subnet = bridge(other).trunc();
            wait_for("the peer's route", LIMIT, || node.has_route(subnet).unwrap().then_some(())).unwrap();
        }
    }
    // Nobody asks for a neighbour before its own link-local address is known to be its own alone: a second.
    for (from, to) in containers.iter().zip(containers.iter().skip(1)) {
        wait_for("the first answer", LIMIT, || reaches(from, to).then_some(())).unwrap();
    }
    (cluster, containers)
}

fn env(node: &Node) -> String {
    std::fs::read_to_string(node.subnet_file()).unwrap()
}

/// `FLANNEL_IPV6_SUBNET`: the bridge's address.
fn bridge(node: &Node) -> Ipv6Net {
    let env = env(node);
    let line = env.lines().find_map(|line| line.strip_prefix("FLANNEL_IPV6_SUBNET="));
    line.unwrap_or_else(|| panic!("no IPv6 subnet: {env}")).parse().unwrap()
}

fn run_container(node: &Node) -> Container {
    let gateway = bridge(node);
    let address = Ipv6Addr::from(u128::from(gateway.addr()) + 1);
    let netns = Netns::create(&format!("c-{}", node.name())).unwrap();
    let host = |line: &str| node.netns().ip(line).unwrap();
    host(&format!("link add {BRIDGE} mtu 1430 type bridge"));
    host(&format!("-6 address add {gateway} dev {BRIDGE} nodad"));
    host(&format!("link set {BRIDGE} up"));
    host(&format!("link add veth1 mtu 1430 type veth peer name eth0 mtu 1430 netns {}", netns.name()));
    host(&format!("link set veth1 master {BRIDGE} up"));
    netns.ip("link set eth0 up").unwrap();
    netns.ip(&format!("-6 address add {address}/64 dev eth0 nodad")).unwrap();
    netns.ip(&format!("-6 route add default via {}", gateway.addr())).unwrap();
    Container { netns, address }
}

fn reaches(from: &Container, to: &Container) -> bool {
    from.netns.exec(&format!("ping -6 -n -q -c 1 -W 1 {}", to.address)).is_ok()
}

/// Bulk TCP, every byte compared, and the sender's own address seen.
fn transfer(from: &Container, to: &Container) {
    let stream = stream::run(from.host(), to.host(), None, Until::Bytes(50_000_000)).unwrap();
    assert_eq!((stream.bytes, stream.source), (50_000_000, from.address.into()));
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
    let (cluster, containers) = start(2, r#""Type":"vxlan""#);
    let (a, b) = (&containers[0], &containers[1]);
    // The whole of the MTU, and no byte more: 1430 less 40 of IPv6 and 8 of ICMPv6.
    a.netns.exec(&format!("ping -6 -n -q -M do -c 2 -i 0.05 -W 2 -s 1382 {}", b.address)).unwrap();
    transfer(a, b);
    transfer(b, a);
    // The router knows no way to a container, so that this is masqueraded.
    ping(&a.netns, cluster.underlay().address6(1).unwrap(), 2).unwrap();

    for (n, node) in cluster.nodes.iter().enumerate() {
        let subnet = bridge(node);
        assert_eq!(
            env(node),
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

#[test]
fn what_changes_or_is_damaged_is_followed_and_put_back_and_cleanup_leaves_nothing() {
    let (mut cluster, containers) = start(2, r#""Type":"vxlan""#);
    let (a, b) = (&containers[0], &containers[1]);
    // The node gets another address: its subnet stays, and the others send there.
    let uplink = |line: &str| cluster.nodes[0].netns().ip(line).unwrap();
    uplink("-6 address add fd77::aa/64 dev eth0 nodad");
    uplink("-6 address delete fd77::b/64 dev eth0");
    wait_for("the other's FDB to have the new address", LIMIT, || {
        let fdb = cluster.nodes[1].netns().exec("bridge fdb show dev flannel-v6.1").unwrap();
        (fdb.contains("fd77::aa") && !fdb.contains("fd77::b ")).then_some(())
    })
    .unwrap();
    wait_for("packets by the new address", LIMIT, || reaches(b, a).then_some(())).unwrap();
    assert_eq!(lease(&cluster, &cluster.nodes[0]).1["PublicIPv6"], "fd77::aa");

    for damage in [
        "ip -6 route flush dev flannel-v6.1 proto 76",
        "bridge fdb flush dev flannel-v6.1",
        "ip link delete flannel-v6.1",
        "ip6tables -F FORWARD",
    ] {
        cluster.nodes[0].netns().exec(damage).unwrap();
        wait_for(&format!("the repair of: {damage}"), LIMIT, || reaches(a, b).then_some(())).unwrap();
    }

    let before = (env(&cluster.nodes[0]), lease(&cluster, &cluster.nodes[0]).0);
    let node = &mut cluster.nodes[0];
    node.stop_agent().unwrap();
    assert!(reaches(a, b), "nothing ends with the agent");
    node.start_agent(&["--ip-masq"]).unwrap();
    let node = &cluster.nodes[0];
    assert_eq!((env(node), lease(&cluster, node).0), before, "subnet, address and MAC outlive a restart");

    let node = &mut cluster.nodes[0];
    node.stop_agent().unwrap();
    node.loden(&["cleanup", "--subnet-file", &node.subnet_file().display().to_string()]).unwrap();
    let run = |line: &str| node.netns().exec(line).unwrap();
    assert!(!run("ip link").contains("flannel"));
    assert_eq!(run("ip -6 route show proto 76").trim(), "");
    assert!(!run("nft list tables").contains("loden") && !run("ip6tables -S").contains("LODEN"));
    assert_eq!(run("sysctl -n net.ipv6.conf.all.forwarding").trim(), "0", "put back");
}

#[test]
fn host_gw_needs_no_ipv4_either() {
    let (cluster, containers) = start(2, r#""Type":"host-gw""#);
    transfer(&containers[0], &containers[1]);
    let routes = cluster.nodes[0].netns().ip("-6 route show proto 76").unwrap();
    assert!(routes.contains("via fd77::c dev eth0"), "{routes}");
    let (text, _) = lease(&cluster, &cluster.nodes[0]);
    assert_eq!(text, r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd77::b","BackendType":"host-gw"}"#);
    assert!(env(&cluster.nodes[0]).contains("FLANNEL_MTU=1500\n"), "nothing is encapsulated");
}
