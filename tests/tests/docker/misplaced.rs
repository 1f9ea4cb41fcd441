//! A dockerd with another bridge address than the leased one: explained, with the remedy, and followed once that is done.

use std::time::Duration;

use loden_tests::{
    node::Node,
    process::wait_for,
    traffic::{hello, ping},
};

use crate::{Fleet, assert_fast, by_subnet_env, words};

#[test]
fn a_docker0_outside_of_the_leased_subnet_is_explained_and_the_remedy_helps() {
    let mut fleet = Fleet::without_engines(&[]);
    let [first, second] = [0, 1].map(|n| fleet.cluster.nodes[n].subnet_env().unwrap());
    // One has Docker's own default, the other what the first one's should be: a copied configuration.
    let copied = format!("--bip={}", first.subnet());
    fleet.start_engines(|node| if node.name() == "n1" { Vec::new() } else { vec![copied.clone()] });
    let [a, b] = [0, 1].map(|n| fleet.engines[n].run("--restart always").unwrap());
    let [advice, other] = [0, 1].map(|n| wait_for_advice(&fleet.cluster.nodes[n], "docker0: it has"));
    let remedy = format!("restart dockerd with --bip={} --mtu={}", first.subnet(), first.mtu);
    assert!(advice.contains("172.17.0.1/16, which is outside") && advice.contains(&remedy), "{advice}");
    let theirs = format!("{}, which is another node's part", first.subnet());
    assert!(other.contains(&theirs) && other.contains(&format!("--bip={}", second.subnet())), "{other}");
    for (node, advice) in fleet.cluster.nodes.iter().zip([&advice, &other]) {
        assert_eq!(node.log().matches(advice.as_str()).count(), 1, "told once: {}", node.log());
        assert!(node.loden(&["status"]).unwrap().contains(advice.as_str()));
        assert_eq!(node.status().unwrap()["ready"], true, "dockerd may be waiting for this");
    }
    hello(a.host(), b.host(), None).expect_err("the test would prove nothing");

    for n in 0..2 {
        let options = by_subnet_env(&fleet.cluster.nodes[n]);
        fleet.engines[n].stop_daemon().unwrap();
        fleet.engines[n].start_daemon(&words(&options)).unwrap();
    }
    let find = |n: usize, id: &str| {
        wait_for("the container to run again", Duration::from_secs(10), || fleet.engines[n].find(id).ok())
            .unwrap()
    };
    let (a, b) = (find(0, a.id()), find(1, b.id()));
    wait_for("the overlay", Duration::from_secs(10), || ping(a.netns(), b.address(), 5).ok()).unwrap();
    assert_fast(&fleet.cluster.nodes, &a, &b);
    for node in &fleet.cluster.nodes {
        assert_eq!(node.status().unwrap()["advice"], serde_json::json!([]));
    }
}

#[test]
fn containers_with_a_larger_mtu_than_the_overlay_are_told_of() {
    let mut fleet = Fleet::without_engines(&[]);
    fleet.start_engines(|node| vec![by_subnet_env(node)[0].clone()]);
    let _container = fleet.engines[0].run("").unwrap();
    let advice = wait_for_advice(&fleet.cluster.nodes[0], "docker0: its containers have an MTU of 1500");
    assert!(advice.contains("--mtu=1450"), "{advice}");
}

/// Waits for a line of the node's advice that begins so.
pub(crate) fn wait_for_advice(node: &Node, begin: &str) -> String {
    let lines = || {
        let status = node.status().ok()?;
        let lines = status["advice"].as_array()?.iter().filter_map(|line| line.as_str().map(str::to_owned));
        Some(lines.collect::<Vec<_>>())
    };
    wait_for("the advice", Duration::from_secs(5), || {
        lines()?.into_iter().find(|line| line.starts_with(begin))
    })
    .unwrap_or_else(|error| panic!("{error:#}: {:?}", lines()))
}
