//! The shortcut between a pod's veth and the WireGuard device, both ways.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    counters::Counters,
    node::Node,
    policy::{Matching, deny},
    process::wait_for,
    service::Tool,
    traffic::{
        Host, ping, socket,
        stream::{self, Until},
    },
};
use serde_json::Value;

use super::{DEVICE, LIMIT, REPAIR, plan, start};

/// What goes into the device past the host, and what comes from it past the host.
const OUT: &str = "fast_overlay_out";
const IN: &str = "fast_overlay";

/// Two nodes with a container on each, which the agents know.
pub(super) fn pair(plan: &Plan, args: &[&str]) -> (Cluster, Vec<Container>) {
    let mut cluster = start(plan, args);
    let containers = cluster.run_containers(1).unwrap();
    let hosts: Vec<Host<'_>> =
        containers.iter().flat_map(|it| [Some(it.host()), it.host6()]).flatten().collect();
    for (from, to) in hosts.iter().flat_map(|from| hosts.iter().map(move |to| (from, to))) {
        if from.address != to.address && from.address.is_ipv4() == to.address.is_ipv4() {
            wait_for("the first packets", LIMIT, || ping(from.netns, to.address, 1).ok()).unwrap();
        }
    }
    let has_programs = !args.contains(&"--datapath=kernel");
    for node in cluster.nodes.iter().filter(|_| has_programs) {
        wait_for("the endpoints", LIMIT, || (node.endpoints().ok()?.len() == hosts.len() / 2).then_some(()))
            .unwrap();
    }
    (cluster, containers)
}

fn counters(cluster: &Cluster) -> Vec<Counters> {
    cluster.nodes.iter().map(|node| Counters::read(node).unwrap()).collect()
}

/// Packets to and from the only peer: fast ones, and all. The wire's, so that an aggregate counts as what it is made of.
fn traffic(node: &Node) -> [(u64, u64); 2] {
    let status = node.status().unwrap();
    let traffic = &status["peers"][0]["traffic"];
    ["sent", "received"].map(|direction| {
        let packets = |way: &str| traffic[direction][way]["packets"].as_u64().unwrap();
        (packets("fast"), packets("fast") + packets("slow"))
    })
}

/// Both ways in bulk, compared byte by byte: nearly all of it takes the shortcut at both ends.
pub(super) fn assert_bulk_is_fast(cluster: &Cluster, ends: [Host<'_>; 2], bytes: u64) {
    let [a, b] = ends;
    for (from, to) in [(a, b), (b, a)] {
        let before: Vec<_> = cluster.nodes.iter().map(traffic).collect();
        let stream = stream::run(from, to, None, Until::Bytes(bytes)).unwrap();
        assert_eq!(stream.source, from.address);
        for (node, before) in cluster.nodes.iter().zip(before) {
            for ((fast, all), (fast_before, all_before)) in traffic(node).into_iter().zip(before) {
                let (fast, all) = (fast - fast_before, all - all_before);
                // Exact below 2^53.
                let share = fast as f64 / all as f64;
                assert!(all > 20 && share >= 0.9, "{fast} of {all}: {:?}", counters(cluster));
            }
        }
    }
}

#[test]
#[ignore = "needs a kernel with WireGuard: cargo xtask test --kernels"]
fn bulk_tcp_takes_the_shortcut_both_ways_through_either_gate() {
    for gate in ["--gate=strict", "--gate=open"] {
        let (cluster, containers) = pair(&plan(""), &[gate]);
        let (a, b) = (&containers[0], &containers[1]);
        assert_bulk_is_fast(&cluster, [a.host(), b.host()], 20_000_000);
        for (node, counters) in cluster.nodes.iter().zip(counters(&cluster)) {
            assert!(counters.get(OUT) > 100 && counters.get(IN) > 100, "{counters:?}");
            assert_eq!(counters.get("note_translated"), 0, "nobody translates here: {counters:?}");
            assert!(
                node.loden_output(&["doctor"]).unwrap().status.success(),
                "{:?}",
                node.loden_output(&["doctor"])
            );
        }
        // What the device does not take, the kernel refuses, as it would without the programs.
        a.netns().ip("link set eth0 mtu 1500").unwrap();
        let echo = |payload: &str| {
            let args = ["-n", "-c", "1", "-W", "5", "-M", "do", "-s", payload, &b.address().to_string()];
            a.netns().command("ping").args(args).output().unwrap()
        };
        let refused = echo("1393");
        let said = String::from_utf8_lossy(&refused.stdout);
        assert!(!refused.status.success() && said.contains("mtu = 1420"), "{refused:?}");
        let answered = echo("1392");
        assert!(answered.status.success(), "{answered:?}");
    }
}

#[test]
#[ignore = "needs a kernel with WireGuard: cargo xtask test --kernels"]
fn ipv6_takes_the_shortcut_whether_it_has_a_device_of_its_own_or_not() {
    for settings in ["", r#","Mode":"ipv6""#] {
        let config = format!(
            r#"{{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{{"Type":"wireguard"{settings}}}}}"#
        );
        let (cluster, containers) = pair(&Plan { nodes: 2, config, ..Plan::dual() }, &[]);
        let (a, b) = (&containers[0], &containers[1]);
        assert_bulk_is_fast(&cluster, [a.host6().unwrap(), b.host6().unwrap()], 5_000_000);
        assert_bulk_is_fast(&cluster, [a.host(), b.host()], 5_000_000);
    }
}

#[test]
#[ignore = "needs a kernel with WireGuard: cargo xtask test --kernels"]
fn a_rule_added_in_the_middle_of_a_fast_flow_stops_it_at_either_node() {
    let (cluster, containers) = pair(&plan(""), &["--gate=strict"]);
    let (a, b) = (&containers[0], &containers[1]);
    for (at, port) in [(0, 9001), (1, 9002)] {
        let (sender, receiver) = (socket::udp(a.host(), 0).unwrap(), socket::udp(b.host(), port).unwrap());
        let to = SocketAddr::new(b.address().into(), port);
        let exchange = || {
            sender.send_to(b"x", to).unwrap();
            receiver.recv(&mut [0; 8])
        };
        receiver.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let before = counters(&cluster);
        wait_for("the flow to be fast at both ends", LIMIT, || {
            exchange().unwrap();
            let now = counters(&cluster);
            (now[0].get(OUT) > before[0].get(OUT) + 5 && now[1].get(IN) > before[1].get(IN) + 5).then_some(())
        })
        .unwrap();
        deny(cluster.nodes[at].netns(), Tool::Iptables, true, Matching::UdpTo(port)).unwrap();
        // What has qualified expires after 15 seconds at the latest, also where the rules' change is not told.
        wait_for("the flow to stop", Duration::from_secs(20), || exchange().is_err().then_some(())).unwrap();
        for _ in 0..3 {
            exchange().unwrap_err();
        }
    }
}

#[test]
#[ignore = "needs a kernel with WireGuard: cargo xtask test --kernels"]
fn a_forged_source_is_dropped_at_the_pod() {
    let mut cluster = start(&plan(""), &["--gate=open"]);
    let containers = cluster.run_containers(2).unwrap();
    let (forger, victim, far) = (&containers[0], &containers[1], &containers[2]);
    for container in [forger, victim] {
        ping(container.netns(), far.address(), 1).unwrap();
    }
    let dropped = || Counters::read(&cluster.nodes[0]).unwrap().get("drop_forged_pod_source");
    wait_for("the endpoints", LIMIT, || (cluster.nodes[0].endpoints().ok()?.len() == 2).then_some(()))
        .unwrap();
    assert_eq!(dropped(), 0);
    forger.netns().exec("sysctl -qw net.ipv4.conf.all.arp_ignore=1").unwrap();
    forger.netns().ip(&format!("address add {}/32 dev lo", victim.address())).unwrap();
    let forged = Host { netns: forger.netns(), address: IpAddr::V4(victim.address()) };
    let (sender, receiver) = (socket::udp(forged, 0).unwrap(), socket::udp(far.host(), 0).unwrap());
    sender.send_to(b"forged", (far.address(), receiver.local_addr().unwrap().port())).unwrap();
    wait_for("the drop to be counted", LIMIT, || (dropped() == 1).then_some(())).unwrap();
    receiver.set_nonblocking(true).unwrap();
    assert!(receiver.recv(&mut [0; 8]).is_err());
}

#[test]
#[ignore = "needs a kernel with WireGuard: cargo xtask test --kernels"]
fn the_programs_come_back_with_a_device_and_explain_foretells_what_they_do() {
    let (cluster, containers) = pair(&plan(""), &["--gate=open"]);
    let (a, b) = (&containers[0], &containers[1]);
    let node = &cluster.nodes[0];
    let explained = |node: &Node| -> Vec<String> {
        let ends = [a.address().to_string(), b.address().to_string()];
        let legs = node.loden(&["explain", &ends[0], &ends[1], "80", "--json"]).unwrap();
        let legs: Vec<Value> = serde_json::from_str(&legs).unwrap();
        legs.iter().map(|leg| leg["reason"].as_str().unwrap_or("none").to_owned()).collect()
    };
    let fast = || (explained(node) == [OUT, IN]).then_some(());
    wait_for("explain to call the flow fast", LIMIT, fast)
        .unwrap_or_else(|error| panic!("{error:#}: {:?}", explained(node)));
    node.netns().ip(&format!("link delete {DEVICE}")).unwrap();
    wait_for("the device, its peer and the programs", REPAIR, || {
        ping(a.netns(), b.address(), 1).ok()?;
        fast()
    })
    .unwrap();
    assert_bulk_is_fast(&cluster, [a.host(), b.host()], 5_000_000);
}
