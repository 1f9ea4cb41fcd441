//! What `loden doctor` says of a WireGuard device that somebody has changed.

use loden_tests::{node::Node, process::wait_for};
use serde_json::Value;

use super::{DEVICE, LIMIT, REPAIR, new_key_file, peers, plan, public_key, start};

/// What is not well, each as `check: evidence`.
fn faults(node: &Node) -> Vec<String> {
    let output = node.loden_output(&["doctor", "--json", "--timeout-ms=300"]).unwrap();
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let text = |finding: &Value, field: &str| finding[field].as_str().unwrap().to_owned();
    let wrong = findings.iter().filter(|finding| finding["outcome"] != "ok");
    wrong.map(|finding| format!("{}: {}", text(finding, "check"), text(finding, "evidence"))).collect()
}

#[test]
#[ignore = "needs a kernel with WireGuard: cargo xtask test --kernels"]
fn what_somebody_changed_of_device_and_peers_is_found_by_name_and_mended() {
    let mut cluster = start(&plan(""), &[]);
    let file = cluster.directory().join("another.key");
    let node = &cluster.nodes[0];
    wait_for("a healthy node", LIMIT, || faults(node).is_empty().then_some(()))
        .unwrap_or_else(|error| panic!("{error}: {:?}", faults(node)));
    let peer = peers(node.netns()).into_keys().next().unwrap();
    let own = public_key(node.netns());
    let stranger = node.netns().exec("wg genkey").unwrap();
    let stranger = stranger.trim();
    new_key_file(node.netns(), &file);

    cluster.nodes[0].kill_agent();
    let node = &cluster.nodes[0];
    for (change, found) in [
        (
            format!("wg set {DEVICE} peer {stranger} allowed-ips 10.99.0.0/24"),
            format!("wireguard-peer: {DEVICE}: of no lease: {stranger}"),
        ),
        (format!("wg set {DEVICE} peer {peer} remove"), format!("missing: {peer}")),
        (
            format!("wg set {DEVICE} listen-port 51999"),
            format!("device: {DEVICE}: it listens on port 51999 and should on 51820"),
        ),
        (format!("wg set {DEVICE} private-key {}", file.display()), format!("the lease says {own}")),
        (format!("ip link set {DEVICE} mtu 1400"), "its MTU is 1400 and should be 1420".to_owned()),
        (format!("ip link set {DEVICE} down"), "it is down".to_owned()),
        (format!("ip link del {DEVICE}"), format!("device: there is no {DEVICE}")),
        (format!("ip link add {DEVICE} type dummy"), format!("device: {DEVICE} is no WireGuard device")),
    ] {
        node.netns().exec(&change).unwrap();
        let faults = faults(node);
        assert!(faults.iter().any(|fault| fault.contains(&found)), "{change}: {found}: {faults:#?}");
    }

    cluster.nodes[0].netns().ip(&format!("link del {DEVICE}")).unwrap();
    cluster.nodes[0].start_agent(&[]).unwrap();
    let node = &cluster.nodes[0];
    wait_for("all to be well again", REPAIR, || faults(node).is_empty().then_some(()))
        .unwrap_or_else(|error| panic!("{error}: {:?}", faults(node)));
    assert_eq!(public_key(node.netns()), own, "the key outlives its device");
}
