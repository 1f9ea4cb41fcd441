//! Packets between hosts that carry the overlay by these calls alone.

use loden_agent::kernel::mac_text;
use loden_tests::netns::Netns;

use crate::{inside, json, node};

/// A host set up wholly by the agent's code; returns its VTEP MAC address.
fn by_loden(host: &Netns, public: &str, own: &str) -> [u8; 6] {
    let spec = node::spec(host, public);
    inside(host, async |kernel| node::set_up(&kernel, &spec, own).await.mac)
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
    let mac_b = [2, 0x0b, 0, 0, 0, 2];
    for line in [
        &format!(
            "ip link add flannel.1 address {} mtu 1450 type vxlan id 1 dev eth0 local 192.168.77.12 dstport 8472 nolearning",
            mac_text(mac_b)
        ),
        "ip addr add 10.5.2.0/32 dev flannel.1",
        "ip link set flannel.1 up",
        &format!("ip neigh replace 10.5.1.0 lladdr {} dev flannel.1 nud permanent", mac_text(mac_a)),
        &format!("bridge fdb replace {} dev flannel.1 dst 192.168.77.11 self permanent", mac_text(mac_a)),
        "ip route replace 10.5.1.0/24 via 10.5.1.0 dev flannel.1 onlink",
    ] {
        b.exec(line).unwrap();
    }
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
