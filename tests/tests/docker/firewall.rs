//! Docker's firewall: the policy of `FORWARD` is DROP, and its rules are written anew when it starts.

use std::time::Duration;

use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    docker::Engine,
    netns::Netns,
    node::Node,
    process::wait_for,
    traffic::hello,
};

use crate::{Fleet, by_subnet_env, words};

#[test]
fn dockers_policy_to_drop_does_not_stop_the_overlay() {
    let mut cluster = Cluster::create(&Plan { nodes: 2, ..Plan::default() }).unwrap();
    for node in &mut cluster.nodes {
        // dockerd sets the policy where it is the one that switches forwarding on: before the agent's first start.
        node.netns().exec("sysctl -qw net.ipv4.ip_forward=0").unwrap();
        drop(Engine::start(node, &[]).unwrap());
        // Without programs every packet passes the chain.
        node.start_agent(&["--datapath=kernel"]).unwrap();
    }
    cluster.wait_for_routes().unwrap();
    let mut fleet = Fleet { engines: Vec::new(), cluster };
    fleet.start_engines(with_live_restore);
    let [a, b] = fleet.pair();
    wait_for_the_overlay(&a, &b);
    let node = &fleet.cluster.nodes[1];
    assert_forward_is_right(node.netns());

    // Docker sees to its rules anew.
    fleet.engines[1].kill_daemon().unwrap();
    fleet.engines[1].start_daemon(&words(&with_live_restore(node))).unwrap();
    wait_for_the_overlay(&a, &b);
    assert_forward_is_right(node.netns());

    node.netns().exec("iptables -I DOCKER-USER -p tcp -j DROP").unwrap();
    hello(a.host(), b.host(), None).expect_err("what the operator denies stays denied");
}

fn with_live_restore(node: &Node) -> Vec<String> {
    [by_subnet_env(node).to_vec(), vec!["--live-restore".into()]].concat()
}

fn wait_for_the_overlay(a: &Container, b: &Container) {
    wait_for("the overlay through Docker's rules", Duration::from_secs(10), || {
        (hello(a.host(), b.host(), None).ok()? == a.address()).then_some(())
    })
    .unwrap();
}

fn forward(node: &Netns) -> String {
    node.exec("iptables -S FORWARD").unwrap()
}

fn assert_forward_is_right(node: &Netns) {
    let forward = forward(node);
    let at = |rule: &str| forward.lines().position(|line| line == rule);
    assert_eq!(at("-P FORWARD DROP"), Some(0), "{forward}");
    let (users, ours) = (at("-A FORWARD -j DOCKER-USER"), at("-A FORWARD -j LODEN-FWD"));
    assert!(users.is_some() && ours > users, "{forward}");
    assert!(ours > at("-A FORWARD -j DOCKER-ISOLATION-STAGE-1"), "{forward}");
}
