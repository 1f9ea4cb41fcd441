//! What somebody deletes or changes comes back, and what changes under the node is followed.

use std::time::Duration;

use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    counters::Share,
    node::Node,
    process::wait_for,
    traffic::{
        hello, ping,
        stream::{self, Until},
    },
};

/// How long a repair may take where the kernel tells of the damage.
const TOLD: Duration = Duration::from_secs(2);
/// How long it may take where it does not: the tick, and the time of a pass.
const TICK: Duration = Duration::from_secs(33);

fn start() -> (Cluster, Vec<Container>) {
    let mut cluster = Cluster::start(&Plan { nodes: 2, ..Plan::default() }, &["--ip-masq"]).unwrap();
    let containers = cluster.run_containers(1).unwrap();
    ping(containers[0].netns(), containers[1].address(), 5).unwrap();
    (cluster, containers)
}

/// Whether containers reach each other by the kernel's path and by the programs'.
fn assert_whole(cluster: &Cluster, containers: &[Container]) {
    let (a, b) = (&containers[0], &containers[1]);
    assert_eq!(hello(a.host(), b.host(), None).unwrap(), a.address());
    let work = || stream::run(a.host(), b.host(), None, Until::Bytes(50_000_000));
    let (_, share) = Share::during(&cluster.nodes, &[a, b], work).unwrap();
    assert!(share.smaller() >= 0.98, "{share:?}");
}

/// What `ip` and friends show of the overlay, without what counts packets or ages.
fn overlay(node: &Node) -> String {
    let show = |line: &str| node.netns().exec(line).unwrap_or_default();
    [
        show("ip -o link show flannel.1"),
        show("ip -o -4 address show flannel.1"),
        show("ip route show dev flannel.1"),
        show("ip neigh show dev flannel.1"),
        show("bridge fdb show dev flannel.1"),
        show("nft list table ip loden"),
        show("iptables -S FORWARD"),
    ]
    .join("\n")
    .lines()
    // The index of a device that was made anew is another one.
    .map(|line| line.trim_start_matches(|c: char| c.is_ascii_digit() || c == ':').trim().to_owned() + "\n")
    .collect()
}

#[test]
fn damage_that_the_kernel_tells_of_is_repaired_within_two_seconds() {
    let (cluster, containers) = start();
    let node = &cluster.nodes[0];
    let peer = cluster.nodes[1].subnet_env().unwrap().subnet.trunc();
    let base = peer.network();
    let mac = cluster.nodes[1].status().unwrap()["device"]["mac"].as_str().unwrap().to_owned();
    let public = cluster.nodes[1].address();
    let whole = overlay(node);
    for damage in [
        "ip route flush dev flannel.1".to_owned(),
        format!("ip route replace {peer} via {base} dev flannel.1 onlink proto static metric 0 mtu 900"),
        format!("ip route del {peer}"),
        format!("ip neigh del {base} dev flannel.1"),
        format!("ip neigh replace {base} lladdr 02:00:00:00:00:99 dev flannel.1 nud permanent"),
        format!("bridge fdb del {mac} dev flannel.1 dst {public} self"),
        "ip address flush dev flannel.1".to_owned(),
        "ip link set flannel.1 down".to_owned(),
        "ip link set flannel.1 address 02:00:00:00:00:77".to_owned(),
        "ip link set flannel.1 mtu 1300".to_owned(),
        "ip link del flannel.1".to_owned(),
        "nft delete table ip loden".to_owned(),
        "iptables -F FORWARD".to_owned(),
    ] {
        node.netns().exec(&damage).unwrap_or_else(|error| panic!("{damage}: {error:#}"));
        wait_for("the repair", TOLD, || (overlay(node) == whole).then_some(()))
            .unwrap_or_else(|error| panic!("{damage}: {error:#}; whole:\n{whole}\nnow:\n{}", overlay(node)));
    }
    wait_for("readiness", TOLD, || (node.status().ok()?["ready"] == true).then_some(())).unwrap();
    assert_whole(&cluster, &containers);
}

#[test]
fn damage_that_nobody_tells_of_is_repaired_at_the_tick() {
    let (cluster, containers) = start();
    let node = &cluster.nodes[0];
    let pins = node.bpffs().join("v1");
    let links: Vec<_> =
        std::fs::read_dir(pins.join("links")).unwrap().map(|link| link.unwrap().path()).collect();
    assert!(links.len() >= 5, "{links:?}");
    for link in &links {
        std::fs::remove_file(link).unwrap();
    }
    let zero = vec!["0"; 32].join(" ");
    for slot in 0..=255 {
        let map = pins.join("PEERS").display().to_string();
        node.netns().exec(&format!("bpftool map update pinned {map} key {slot} 0 0 0 value {zero}")).unwrap();
    }
    node.netns().exec("sysctl -q -w net.ipv4.ip_forward=0").unwrap();
    let is_back = || {
        let forward = node.netns().exec("sysctl -n net.ipv4.ip_forward").unwrap();
        (links.iter().all(|link| link.exists()) && forward.trim() == "1").then_some(())
    };
    wait_for("links and sysctl", TICK, is_back).unwrap();
    assert_whole(&cluster, &containers);
}

#[test]
fn a_node_that_gets_another_address_keeps_its_subnet_and_is_reached_at_the_new_one() {
    let (cluster, containers) = start();
    let node = &cluster.nodes[0];
    let subnet = node.subnet_env().unwrap().subnet;
    node.netns().ip(&format!("address del {}/24 dev eth0", node.address())).unwrap();
    node.netns().ip("address add 192.168.64.99/24 dev eth0").unwrap();
    node.netns().ip("route replace default dev eth0").unwrap();
    wait_for("the lease at the new address", Duration::from_secs(10), || {
        let leases = cluster.leases().ok()?;
        leases
            .iter()
            .any(|(key, value)| {
                key.contains(&subnet.network().to_string()) && value.contains("192.168.64.99")
            })
            .then_some(())
    })
    .unwrap();
    wait_for("readiness", Duration::from_secs(10), || (node.status().ok()?["ready"] == true).then_some(()))
        .unwrap();
    assert_eq!(node.subnet_env().unwrap().subnet, subnet);
    wait_for("the peer to know", Duration::from_secs(5), || {
        let peers = cluster.nodes[1].status().ok()?["peers"].to_string();
        peers.contains("192.168.64.99").then_some(())
    })
    .unwrap();
    wait_for("the peer's kernel to know", Duration::from_secs(5), || {
        let fdb = cluster.nodes[1].netns().exec("bridge fdb show dev flannel.1").ok()?;
        fdb.contains("dst 192.168.64.99").then_some(())
    })
    .unwrap();
    assert_whole(&cluster, &containers);
}

#[test]
fn a_changed_mtu_of_the_uplink_is_followed() {
    let (cluster, containers) = start();
    let node = &cluster.nodes[0];
    node.netns().ip("link set eth0 mtu 1400").unwrap();
    wait_for("the pods' new MTU", TOLD, || (node.subnet_env().ok()?.mtu == 1350).then_some(())).unwrap();
    let link = node.netns().ip("link show flannel.1").unwrap();
    assert!(link.contains("mtu 1350"), "{link}");
    hello(containers[0].host(), containers[1].host(), None).unwrap();
}
