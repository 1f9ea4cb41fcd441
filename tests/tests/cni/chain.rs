//! Behind other plugins: portmap and bandwidth.

use std::{net::SocketAddr, time::Duration};

use loden_tests::{
    cni::{Runtime, routed},
    process::wait_for,
    traffic::{
        Host, Service, hello, ping,
        stream::{self, Until},
    },
};
use serde_json::json;

use crate::{counted, routed_cluster};

#[test]
fn a_host_port_leads_to_a_routed_pod_from_another_node() {
    let (cluster, runtimes) = routed_cluster(2, &[]);
    let node = &cluster.nodes[1];
    let portmap = json!({ "type": "portmap", "capabilities": { "portMappings": true }, "snat": true });
    let mut runtime = Runtime::new(node, routed(node, "pods", &[portmap])).unwrap();
    let mapping = json!([{ "hostPort": 8000, "containerPort": 8080, "protocol": "tcp" }]);
    runtime.capabilities.insert("portMappings".into(), mapping);
    let server = runtime.add("server").unwrap();
    let client = runtimes[0].add("client").unwrap();
    let service = Some(Service { front: SocketAddr::from((node.address(), 8000)), backend: 8080 });
    let from_host = Host { netns: cluster.nodes[0].netns(), address: cluster.nodes[0].address().into() };
    assert_eq!(hello(from_host, server.host(), service).unwrap(), cluster.nodes[0].address());
    hello(client.host(), server.host(), service).unwrap();
    assert_eq!(hello(client.host(), server.host(), None).unwrap(), client.address);
    runtime.remove(server).unwrap();
    let rules = node.netns().exec("iptables -t nat -S").unwrap();
    assert!(!rules.contains("--dport 8000"), "{rules}");
}

/// The limits are on the host's end of the veth, past which the programs carry packets: so a pod with limits is the
/// kernel's.
#[test]
fn a_pod_with_a_limit_is_held_to_it_and_is_not_fast() {
    let (cluster, runtimes) = routed_cluster(2, &[]);
    let node = &cluster.nodes[0];
    let limit = 80_000_000_u64;
    let shaped = json!({ "type": "bandwidth", "ingressRate": limit, "ingressBurst": limit / 10 });
    let runtime = Runtime::new(node, routed(node, "pods", &[shaped])).unwrap();
    let slow = runtime.add("slow").unwrap();
    let (near, far) = (runtimes[0].add("near").unwrap(), runtimes[1].add("far").unwrap());
    wait_for("the agent to see the limit", Duration::from_secs(3), || {
        (!crate::knows(node, slow.address)).then_some(())
    })
    .unwrap();
    for from in [&near, &far] {
        ping(&from.netns, slow.address, 10).unwrap();
        let before = counted(&cluster.nodes[..1], &["fast_local", "fast_decap", "fast_overlay"]);
        let stream = stream::run(from.host(), slow.host(), None, Until::Bytes(10_000_000)).unwrap();
        // The burst comes on top.
        let rate = stream.megabytes_per_second() * 8e6;
        assert!(rate < 1.5 * limit as f64, "{rate} bits a second");
        let fast = counted(&cluster.nodes[..1], &["fast_local", "fast_decap", "fast_overlay"]) - before;
        assert_eq!(fast, 0, "packets to the pod went past its limit");
    }
    runtime.remove(slow).unwrap();
}

#[test]
fn a_limit_that_kubernetes_gives_keeps_a_pod_off_the_fast_path_without_an_agent() {
    let (mut cluster, runtimes) = routed_cluster(2, &[]);
    cluster.nodes[0].kill_agent();
    let node = &cluster.nodes[0];
    let shaper = json!({ "type": "bandwidth", "capabilities": { "bandwidth": true } });
    let mut runtime = Runtime::new(node, routed(node, "pods", &[shaper])).unwrap();
    let limit = json!({ "ingressRate": 80_000_000, "ingressBurst": 8_000_000 });
    runtime.capabilities.insert("bandwidth".into(), limit);
    let slow = runtime.add("slow").unwrap();
    let far = runtimes[1].add("far").unwrap();
    ping(&far.netns, slow.address, 10).unwrap();
    let stream = stream::run(far.host(), slow.host(), None, Until::Bytes(10_000_000)).unwrap();
    let rate = stream.megabytes_per_second() * 8e6;
    assert!(rate < 120e6, "{rate} bits a second");
    let answer = runtime.check(&slow).unwrap();
    assert!(answer.success, "{answer:?}");
}
