//! flannel's configuration, as it is and with one line changed; bridge and routes side by side.

use loden_tests::{
    cni::{Pod, Runtime, flannel, routed},
    traffic::ping,
};
use serde_json::{Value, json};

use crate::{assert_all_reach_all, routed_cluster};

fn stock() -> Value {
    json!({ "hairpinMode": true, "isDefaultGateway": true })
}

#[test]
fn bridged_and_routed_pods_live_side_by_side() {
    // Otherwise the bridge plugin would, and more than one should.
    let (cluster, routed) = routed_cluster(2, &["--ip-masq"]);
    let behind = [json!({ "type": "portmap", "capabilities": { "portMappings": true } })];
    // One name, as one pool of addresses serves both.
    let bridged: Vec<Runtime> = cluster
        .nodes
        .iter()
        .map(|node| Runtime::new(node, flannel(node, "pods", stock(), &behind)).unwrap())
        .collect();
    let pods: Vec<Pod> = vec![
        bridged[0].add("bridged-1").unwrap(),
        routed[0].add("routed-1").unwrap(),
        bridged[1].add("bridged-2").unwrap(),
        routed[1].add("routed-2").unwrap(),
    ];
    let bridge = cluster.nodes[0].netns().ip("address show cni0").unwrap();
    let gateway = cluster.nodes[0].subnet_env().unwrap().subnet().to_string();
    assert!(bridge.contains(&gateway), "{bridge}");
    assert_eq!(pods[0].result["cniVersion"], "1.0.0");
    let all: Vec<&Pod> = pods.iter().collect();
    assert_all_reach_all(&all);
    // Both ways between bridge and route on one node, and it is fast too.
    let before = crate::counted(&cluster.nodes[..1], &["fast_local"]);
    ping(&pods[0].netns, pods[1].address, 40).unwrap();
    let fast = crate::counted(&cluster.nodes[..1], &["fast_local"]) - before;
    assert!(fast >= 60, "{fast} of 80 packets");
    let mut pods = pods.into_iter();
    for runtime in [&bridged[0], &routed[0], &bridged[1], &routed[1]] {
        runtime.remove(pods.next().unwrap()).unwrap();
    }
    for runtime in &routed {
        assert_eq!(runtime.given_out(), Vec::<String>::new());
    }
    let state = cluster.nodes[0].run_directory().join("cni/flannel");
    assert_eq!(std::fs::read_dir(state).unwrap().count(), 0);
}

#[test]
fn one_line_of_flannels_configuration_makes_pods_routed() {
    let (cluster, routes) = routed_cluster(1, &[]);
    let node = &cluster.nodes[0];
    // Either the type itself, with everything else as it was, or that of the delegate.
    let mut first = flannel(node, "pods", stock(), &[]);
    first["plugins"][0]["type"] = "loden-cni".into();
    first["plugins"][0]["bpffsDir"] = json!(node.bpffs());
    let mut second = flannel(node, "pods", stock(), &[]);
    second["plugins"][0]["delegate"]["type"] = "loden-cni".into();
    second["plugins"][0]["delegate"]["subnetFile"] = json!(node.subnet_file());
    second["plugins"][0]["delegate"]["bpffsDir"] = json!(node.bpffs());
    let runtimes = [first, second].map(|network| Runtime::new(node, network).unwrap());
    let pods = [runtimes[0].add("a").unwrap(), runtimes[1].add("b").unwrap()];
    assert_all_reach_all(&[&pods[0], &pods[1]]);
    for pod in &pods {
        assert_eq!(pod.result["ips"][0]["gateway"], "169.254.1.1", "{}", pod.result);
    }
    assert!(node.netns().ip("link show type bridge").unwrap().is_empty());
    for (runtime, pod) in runtimes.iter().zip(pods) {
        assert!(runtime.check(&pod).unwrap().well().unwrap().is_null());
        runtime.remove(pod).unwrap();
    }
    crate::assert_nothing_is_left(node, &routes[0]);
}

#[test]
fn a_pod_that_flannels_plugin_has_attached_is_detached() {
    let (cluster, _) = routed_cluster(1, &["--ip-masq"]);
    let node = &cluster.nodes[0];
    let runtime = Runtime::new(node, flannel(node, "cbr0", stock(), &[])).unwrap();
    // What flannel's plugin does: it renders the bridge's configuration, saves it under the container's ID and runs that.
    let subnet = node.subnet_env().unwrap();
    let rendered = json!({
        "cniVersion": "1.0.0", "name": "cbr0", "type": "bridge", "hairpinMode": true, "isDefaultGateway": true,
        "isGateway": true, "ipMasq": false, "mtu": subnet.mtu,
        "ipam": {
            "type": "host-local", "dataDir": node.run_directory().join("cni/addresses"),
            "ranges": [[{ "subnet": subnet.subnet().trunc().to_string() }]], "routes": [{ "dst": subnet.network().to_string() }],
        },
    });
    let netns = loden_tests::netns::Netns::create("p-theirs").unwrap();
    runtime.call("ADD", "theirs", Some(&netns), &rendered).unwrap().well().unwrap();
    let state = node.run_directory().join("cni/flannel");
    std::fs::create_dir_all(&state).unwrap();
    std::fs::write(state.join("theirs"), rendered.to_string()).unwrap();
    assert_eq!(runtime.given_out().len(), 1);
    runtime.del("theirs", Some(&netns), &Value::Null).unwrap();
    assert_eq!(runtime.given_out(), Vec::<String>::new());
    assert!(!state.join("theirs").exists());
    netns.ip("link show eth0").unwrap_err();
    // And once more, as a runtime may.
    runtime.del("theirs", Some(&netns), &Value::Null).unwrap();

    // What ours saves is what theirs would have saved: theirs can detach it.
    let ours = runtime.add("ours").unwrap();
    let saved: Value = serde_json::from_slice(&std::fs::read(state.join("ours")).unwrap()).unwrap();
    assert_eq!(saved, rendered);
    runtime.remove(ours).unwrap();
}

#[test]
fn without_a_delegate_flannels_configuration_still_makes_a_bridge() {
    let (cluster, _) = routed_cluster(1, &[]);
    let node = &cluster.nodes[0];
    let mut network = flannel(node, "pods", json!({}), &[]);
    network["cniVersion"] = "0.3.1".into();
    let runtime = Runtime::new(node, network).unwrap();
    let pods = ["a", "b"].map(|id| runtime.add(id).unwrap());
    assert_eq!(pods[0].result["cniVersion"], "0.3.1");
    let subnet = node.subnet_env().unwrap().network().to_string();
    assert_eq!(pods[0].result["routes"][0]["dst"], subnet.as_str(), "{}", pods[0].result);
    assert_all_reach_all(&[&pods[0], &pods[1]]);
    // For a node's own runtime this is another network than the routed ones: its pods do not count for them.
    let other = Runtime::new(node, routed(node, "other", &[])).unwrap();
    assert_eq!(other.given_out(), Vec::<String>::new());
}
