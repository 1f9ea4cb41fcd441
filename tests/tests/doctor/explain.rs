//! `loden explain` says beforehand which counter the next packet of a flow will move.

use std::{
    net::{Ipv4Addr, UdpSocket},
    time::Duration,
};

use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    counters::Counters,
    node::Node,
    process::wait_for,
};
use serde_json::Value;

const CLIENT_PORT: u16 = 5000;
const SERVER_PORT: u16 = 6000;

/// One datagram of `len` bytes there, and its like back.
fn exchange(client: &Container, server: &Container, len: usize) {
    let bind = |container: &Container, port| {
        let address = container.address();
        container.netns().run(|| UdpSocket::bind((address, port)).unwrap())
    };
    let (asking, answering) = (bind(client, CLIENT_PORT), bind(server, SERVER_PORT));
    let mut buffer = vec![7; len];
    for socket in [&asking, &answering] {
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    }
    asking.send_to(&buffer, (server.address(), SERVER_PORT)).unwrap();
    let (_, from) = answering.recv_from(&mut buffer).unwrap();
    answering.send_to(&buffer, from).unwrap();
    asking.recv_from(&mut buffer).unwrap();
}

/// Both ways of the flow, as the node explains them.
fn explain(node: &Node, client: Ipv4Addr, server: Ipv4Addr, more: &[&str]) -> Vec<Value> {
    let (client, server, port) = (client.to_string(), server.to_string(), SERVER_PORT.to_string());
    let args = [&["explain", &client, &server, &port, "--proto=udp", "--json"], more].concat();
    serde_json::from_str(&node.loden(&args).unwrap()).unwrap()
}

fn reasons(legs: &[Value]) -> Vec<&str> {
    legs.iter().map(|leg| leg["reason"].as_str().unwrap_or("none")).collect()
}

fn evidence(leg: &Value, name: &str) -> String {
    let lines = leg["evidence"].as_array().unwrap();
    lines.iter().find(|line| line[0] == name).map(|line| line[1].as_str().unwrap().to_owned()).unwrap()
}

/// What the node says of the flow, then one exchange: both reasons must be counted for it, once each at least.
fn assert_foretold(node: &Node, client: &Container, server: &Container) -> Vec<Value> {
    let legs = explain(node, client.address(), server.address(), &[]);
    let before = Counters::read(node).unwrap();
    exchange(client, server, 100);
    let counted = Counters::read(node).unwrap().since(&before);
    for reason in reasons(&legs) {
        assert!(counted.get(reason) >= 1, "{reason} was foretold, counted was {counted:?}: {legs:#?}");
    }
    legs
}

#[test]
fn what_it_says_of_a_flow_is_what_the_next_packet_meets() {
    for (gate, first) in
        [("strict", ["pass_pod_gate", "pass_wire_gate"]), ("open", ["fast_encap", "fast_decap"])]
    {
        let plan = Plan { nodes: 2, ..Plan::default() };
        let mut cluster = Cluster::start(&plan, &["--gate", gate]).unwrap();
        let containers = cluster.run_containers(2).unwrap();
        let (a, beside, b) = (&containers[0], &containers[1], &containers[2]);
        // Both are endpoints once they have been seen: other ports, so that the flow below is a new one.
        for server in [b, beside] {
            loden_tests::traffic::ping(a.netns(), server.address(), 5).unwrap();
        }
        let (node, far) = (&cluster.nodes[0], &cluster.nodes[1]);
        let gated = |node: &Node| node.status().unwrap()["endpoints"].as_array().unwrap().len();
        wait_for("the endpoints", Duration::from_secs(5), || {
            (gated(node) == 2 && gated(far) >= 1).then_some(())
        })
        .unwrap();

        let legs = assert_foretold(node, a, b);
        assert_eq!(reasons(&legs), first, "{gate}");
        assert!(evidence(&legs[0], "flow").contains("not in the table"));
        let legs = assert_foretold(node, a, b);
        assert_eq!(reasons(&legs), ["fast_encap", "fast_decap"], "{gate}: {legs:#?}");
        if gate == "strict" {
            assert_eq!(
                legs[0]["from"],
                format!("{}:{CLIENT_PORT}", a.address()),
                "the port is found in the table"
            );
            assert!(evidence(&legs[0], "flow").contains("qualified for another"), "{legs:#?}");
        }
        // Seen from the other node, the flow comes in and its answers go out.
        assert_eq!(reasons(&explain(far, a.address(), b.address(), &[])), ["fast_decap", "fast_encap"]);

        let too_big = explain(node, a.address(), b.address(), &["--size=1451"]);
        assert_eq!(too_big[0]["reason"], "pass_pod_too_big");
        assert!(evidence(&too_big[0], "size").contains("1451 + 50 = 1501 bytes of 1500: too big"));
        let external = explain(node, a.address(), Ipv4Addr::new(192, 0, 2, 1), &[]);
        assert_eq!(external[0]["reason"], "pass_pod_no_peer");
        let local = assert_foretold(node, a, beside);
        assert_eq!(local[0]["verdict"], if gate == "strict" { "pass" } else { "fast" }, "{local:#?}");
        let nobody = explain(node, Ipv4Addr::from(u32::from(a.address()) + 100), b.address(), &[]);
        assert_eq!(nobody[0]["reason"], "pass_pod_foreign_source");
    }
}

#[test]
fn it_says_what_ended_a_flows_qualification_and_outlives_the_agent() {
    let mut cluster = Cluster::start(&Plan { nodes: 3, ..Plan::default() }, &[]).unwrap();
    let containers = cluster.run_containers(1).unwrap();
    let (a, b, c) = (&containers[0], &containers[1], &containers[2]);
    loden_tests::traffic::ping(a.netns(), b.address(), 5).unwrap();
    wait_for("the flow to be fast", Duration::from_secs(10), || {
        exchange(a, b, 100);
        let legs = explain(&cluster.nodes[0], a.address(), b.address(), &[]);
        (reasons(&legs) == ["fast_encap", "fast_decap"]).then_some(())
    })
    .unwrap();

    cluster.nodes[0].netns().exec("nft add table ip operators-own").unwrap();
    wait_for("the new epoch", Duration::from_secs(4), || {
        let legs = explain(&cluster.nodes[0], a.address(), b.address(), &[]);
        (legs[0]["reason"] == "pass_pod_gate" && evidence(&legs[0], "flow").contains("epoch")).then_some(())
    })
    .unwrap();

    let elsewhere = cluster.nodes[0]
        .loden(&["explain", &b.address().to_string(), &c.address().to_string()])
        .unwrap_err()
        .to_string();
    let right = cluster.nodes[1].address().to_string();
    assert!(elsewhere.contains("ask on") && elsewhere.contains(&right), "{elsewhere}");

    cluster.nodes[0].kill_agent();
    exchange(a, b, 100);
    let legs = explain(&cluster.nodes[0], a.address(), b.address(), &[]);
    assert_eq!(reasons(&legs), ["fast_encap", "fast_decap"], "{legs:#?}");
}
