//! A ClusterIP as kube-proxy makes it: the node of the client translates, and every reply must pass it again.

use std::{collections::BTreeSet, net::Ipv4Addr, thread, time::Duration};

use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    service::{self, Front, Tool, at},
    traffic::socket::{self, ask, open, pour, say, wants_end},
};

use crate::{OPEN, assert_direct_is_fast, cluster_of, fast, gated, under_both_gates};

const PORT: u16 = 8080;

under_both_gates! {
    replies_come_from_the_cluster_ip_by_iptables
    replies_come_from_the_cluster_ip_by_nft
    replies_come_from_the_cluster_ip_without_encapsulation
}

fn replies_come_from_the_cluster_ip_by_iptables(gate: &str) {
    replies_come_from_the_cluster_ip(gate, Tool::Iptables, &Plan { nodes: 2, ..Plan::default() });
}

fn replies_come_from_the_cluster_ip_by_nft(gate: &str) {
    replies_come_from_the_cluster_ip(gate, Tool::Nft, &Plan { nodes: 2, ..Plan::default() });
}

fn replies_come_from_the_cluster_ip_without_encapsulation(gate: &str) {
    let config = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}"#.to_owned();
    let plan = Plan { nodes: 2, config, ..Plan::default() };
    replies_come_from_the_cluster_ip(gate, Tool::Iptables, &plan);
}

/// The n-th ClusterIP, outside of the cluster's network.
fn vip(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 96, 0, n)
}

fn replies_come_from_the_cluster_ip(gate: &str, tool: Tool, plan: &Plan) {
    let (cluster, containers) = cluster_of(plan, 2, &[gate]);
    let (client, local, remote) = (&containers[0], &containers[1], &containers[2]);
    let backend = |container: &Container| at(container.address(), PORT);
    let fronts = [
        Front::new(at(vip(1), 80), &[backend(local)]),
        Front::new(at(vip(2), 80), &[backend(remote)]),
        Front::new(at(vip(3), 80), &[backend(local), backend(remote)]),
        Front::new(at(vip(4), 80), &[backend(client)]),
    ];
    service::publish(cluster.nodes[0].netns(), tool, &fronts).unwrap();
    assert_direct_is_fast(&cluster.nodes, client, remote);
    if gate == OPEN {
        assert_eq!(gated(&cluster.nodes[0], client.address()), Some(false), "nothing was translated yet");
    }

    nothing_translated_is_fast(&cluster, client, vip(1), local);
    if gate == OPEN {
        assert_eq!(gated(&cluster.nodes[0], remote.address()), None, "another node's");
    }
    nothing_translated_is_fast(&cluster, client, vip(2), remote);
    if gate == OPEN {
        assert_eq!(gated(&cluster.nodes[0], client.address()), Some(true), "translated flows since");
        assert_eq!(
            gated(&cluster.nodes[0], local.address()),
            Some(true),
            "at the other end of one, on this node"
        );
        assert_eq!(gated(&cluster.nodes[1], remote.address()), Some(false), "its node translates nothing");
    }
    one_of_both_backends_answers(client, [local, remote]);
    // kube-proxy's hairpin needs the port to take back what it sent (kubelet's hairpinMode).
    cluster.nodes[0].netns().exec("bridge link set dev veth1 hairpin on").unwrap();
    let seen = a_backend_answers(client, vip(4), client);
    assert_ne!(seen, client.address(), "a pod that reaches itself is masqueraded");
    both_at_once(client, vip(2), remote);
    assert_direct_is_fast(&cluster.nodes, client, remote);
}

/// Many short connections, a long one, datagrams; returns the client's address as the backend saw it.
fn a_backend_answers(client: &Container, front: Ipv4Addr, backend: &Container) -> Ipv4Addr {
    let listener = socket::listen(backend.host(), PORT).unwrap();
    for round in 0..20 {
        let (near, far) = open(client.netns(), None, at(front, 80), &listener)
            .unwrap_or_else(|error| panic!("{front}, round {round}: {error:#}"));
        assert_eq!(near.peer_addr().unwrap(), at(front, 80).into());
        say(&near, &far, "request").unwrap();
        say(&far, &near, "response").unwrap();
        drop(far);
        wants_end(&near).unwrap();
    }
    let (near, far) = open(client.netns(), None, at(front, 80), &listener).unwrap();
    pour(&near, &far, 30_000_000).unwrap();
    pour(&far, &near, 30_000_000).unwrap();
    let (asker, answerer) =
        (socket::udp(client.host(), 0).unwrap(), socket::udp(backend.host(), PORT).unwrap());
    asker.connect(at(front, 80)).unwrap();
    for round in 0..20 {
        ask(&asker, &answerer, &format!("datagram {round} to {front}")).unwrap();
    }
    match far.peer_addr().unwrap().ip() {
        std::net::IpAddr::V4(seen) => seen,
        other => panic!("{other} is not IPv4"),
    }
}

/// While only translated flows run, no packet takes the shortcut on the node that translates.
fn nothing_translated_is_fast(cluster: &Cluster, client: &Container, front: Ipv4Addr, backend: &Container) {
    let before = fast(&cluster.nodes[0]);
    let seen = a_backend_answers(client, front, backend);
    let after = fast(&cluster.nodes[0]);
    assert_eq!(seen, client.address(), "DNAT alone leaves the client's address");
    assert_eq!(after - before, 0, "packets of translated flows that skipped the host");
}

fn one_of_both_backends_answers(client: &Container, backends: [&Container; 2]) {
    let listeners = backends.map(|backend| socket::listen(backend.host(), PORT).unwrap());
    for listener in &listeners {
        listener.set_nonblocking(true).unwrap();
    }
    let mut answered = BTreeSet::new();
    for round in 0..40 {
        let near = socket::dial(client.netns(), None, at(vip(3), 80)).unwrap();
        // The handshake is over, so one of them has it.
        let (index, far) = listeners
            .iter()
            .enumerate()
            .find_map(|(index, listener)| Some((index, listener.accept().ok()?.0)))
            .unwrap_or_else(|| panic!("round {round}: nobody has the connection"));
        far.set_nonblocking(false).unwrap();
        say(&near, &far, "which one").unwrap();
        say(&far, &near, "me").unwrap();
        answered.insert(index);
    }
    assert_eq!(answered.len(), 2, "40 connections went to one backend only");
}

/// Connections through the service and straight to its backend run at the same time.
fn both_at_once(client: &Container, front: Ipv4Addr, backend: &Container) {
    let listener = socket::listen(backend.host(), PORT).unwrap();
    let through = open(client.netns(), None, at(front, 80), &listener).unwrap();
    let straight = open(client.netns(), None, at(backend.address(), PORT), &listener).unwrap();
    thread::scope(|scope| {
        for (near, far) in [&through, &straight] {
            scope.spawn(move || {
                for _ in 0..5 {
                    pour(near, far, 10_000_000).unwrap();
                    pour(far, near, 10_000_000).unwrap();
                    thread::sleep(Duration::from_millis(50));
                }
            });
        }
    });
}
