//! Packets between hosts that carry the overlay by these calls alone.

use std::process::Stdio;

use loden_agent::{
    firewall::{Firewall, FirewallSpec},
    kernel::mac_text,
};
use loden_tests::netns::Netns;

use crate::{inside, json, node};

/// A host set up wholly by the agent's code; returns its VTEP MAC address.
fn by_loden(host: &Netns, public: &str, own: &str) -> [u8; 6] {
    let spec = node::spec(host, public);
    inside(host, async |kernel| node::set_up(&kernel, &spec, own).await.mac)
}

/// A host set up as flannel does, by the tools; peers are subnet base, public address and VTEP MAC address.
/// Returns its own.
fn by_hand(host: &Netns, public: &str, base: &str, peers: &[(&str, &str, [u8; 6])]) -> [u8; 6] {
    let mac = [2, 0x0b, 0, 0, 0, public.as_bytes()[public.len() - 1]];
    let text = mac_text(mac);
    let device = format!("type vxlan id 1 dev eth0 local {public} dstport 8472 nolearning");
    host.ip(&format!("link add flannel.1 address {text} mtu 1450 {device}")).unwrap();
    host.ip(&format!("addr add {base}/32 dev flannel.1")).unwrap();
    host.ip("link set flannel.1 up").unwrap();
    for (peer, vtep, mac) in peers {
        let mac = mac_text(*mac);
        host.ip(&format!("neigh replace {peer} lladdr {mac} dev flannel.1 nud permanent")).unwrap();
        host.exec(&format!("bridge fdb replace {mac} dev flannel.1 dst {vtep} self permanent")).unwrap();
        host.ip(&format!("route replace {peer}/24 via {peer} dev flannel.1 onlink")).unwrap();
    }
    mac
}

fn add_peer(host: &Netns, own: &str, peer: loden_agent::overlay::OverlayPeer) {
    let (device, uplink) = (node::index(host, "flannel.1"), node::index(host, "eth0"));
    inside(host, async |kernel| node::reconcile(&kernel, &node::desired(own, device, uplink, &[peer])).await);
}

/// Pods of both hosts reach each other, with their own addresses.
fn assert_reach(a: &Netns, b: &Netns) {
    let (pod_a, pod_b) = (node::pod(a, "10.5.1.0/24"), node::pod(b, "10.5.2.0/24"));
    node::ping(a, "10.5.2.0").unwrap();
    node::ping(b, "10.5.1.0").unwrap();
    node::ping(&pod_a, "10.5.2.2").unwrap();
    node::ping(&pod_b, "10.5.1.2").unwrap();
    let sent = json(a, "ip -j -s link show dev flannel.1")[0]["stats64"]["tx"]["packets"].as_u64().unwrap();
    assert!(sent >= 4, "the packets went through the VXLAN device: {sent}");
}

#[test]
fn two_hosts_that_loden_set_up_reach_each_other() {
    let (a, b) = node::pair();
    let mac_a = by_loden(&a, "192.168.77.11", "10.5.1.0/24");
    let mac_b = by_loden(&b, "192.168.77.12", "10.5.2.0/24");
    add_peer(&a, "10.5.1.0/24", node::peer("10.5.2.0/24", "192.168.77.12", mac_b));
    add_peer(&b, "10.5.2.0/24", node::peer("10.5.1.0/24", "192.168.77.11", mac_a));
    assert_reach(&a, &b);
}

#[test]
fn a_host_set_up_as_flannel_does_and_one_by_loden_reach_each_other() {
    let (a, b) = node::pair();
    let mac_a = by_loden(&a, "192.168.77.11", "10.5.1.0/24");
    let mac_b = by_hand(&b, "192.168.77.12", "10.5.2.0", &[("10.5.1.0", "192.168.77.11", mac_a)]);
    add_peer(&a, "10.5.1.0/24", node::peer("10.5.2.0/24", "192.168.77.12", mac_b));
    assert_reach(&a, &b);
}

#[test]
fn direct_peers_reach_each_other_without_encapsulation() {
    let (a, b) = node::pair();
    by_loden(&a, "192.168.77.11", "10.5.1.0/24");
    by_loden(&b, "192.168.77.12", "10.5.2.0/24");
    let direct =
        |subnet, vtep| loden_agent::overlay::OverlayPeer { direct: true, ..node::peer(subnet, vtep, [0; 6]) };
    add_peer(&a, "10.5.1.0/24", direct("10.5.2.0/24", "192.168.77.12"));
    add_peer(&b, "10.5.2.0/24", direct("10.5.1.0/24", "192.168.77.11"));
    let (pod_a, _pod_b) = (node::pod(&a, "10.5.1.0/24"), node::pod(&b, "10.5.2.0/24"));
    node::ping(&pod_a, "10.5.2.2").unwrap();
    let sent = &json(&a, "ip -j -s link show dev flannel.1")[0]["stats64"]["tx"]["packets"];
    assert_eq!(sent.as_u64(), Some(0));
}

#[test]
fn taking_a_flannel_host_over_and_handing_it_back_loses_no_packet() {
    let (a, b) = node::pair();
    let (mac_a, mac_b) = ([2, 0x0b, 0, 0, 0, b'1'], [2, 0x0b, 0, 0, 0, b'2']);
    assert_eq!(by_hand(&a, "192.168.77.11", "10.5.1.0", &[("10.5.2.0", "192.168.77.12", mac_b)]), mac_a);
    assert_eq!(by_hand(&b, "192.168.77.12", "10.5.2.0", &[("10.5.1.0", "192.168.77.11", mac_a)]), mac_b);
    let (pod_a, _pod_b) = (node::pod(&a, "10.5.1.0/24"), node::pod(&b, "10.5.2.0/24"));
    let spec = node::spec(&a, "192.168.77.11");
    let rules = FirewallSpec {
        network: node::NETWORK.parse().unwrap(),
        subnet: "10.5.1.0/24".parse().unwrap(),
        masquerade: true,
        fully_random: true,
        forward: true,
        notrack: None,
    };
    let mut pings = ["10.5.2.2", "192.168.77.11"].map(|to| {
        let mut command = pod_a.command("ping");
        command.args(["-n", "-q", "-i", "0.002", "-c", "1500", "-W", "1", to]);
        command.stdout(Stdio::piped()).spawn().unwrap()
    });
    inside(&a, async |kernel| {
        let peer = node::peer("10.5.2.0/24", "192.168.77.12", mac_b);
        let mut rounds = 0;
        while pings.iter_mut().all(|ping| ping.try_wait().unwrap().is_none()) {
            rounds += 1;
            let device = node::set_up(&kernel, &spec, "10.5.1.0/24").await;
            assert!(device.adopted && device.mac == mac_a && device.corrected.is_empty());
            let desired = node::desired("10.5.1.0/24", device.index, spec.uplink, &[peer]);
            assert_eq!(node::reconcile(&kernel, &desired).await, 1);
            Firewall::new(rules).ensure().await.unwrap();
            assert_eq!(Firewall::hand_back(rules.network, rules.subnet).await.len(), 0);
            assert_eq!(kernel.hand_back_routes(&node::networks()).await.unwrap(), 1);
        }
        assert!(rounds > 1, "the host changed hands while the pings ran");
    });
    for ping in pings {
        let output = ping.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("1500 packets transmitted, 1500 received, 0% packet loss"), "{text}");
    }
}
