//! A ClusterIP as kube-proxy makes it: the node of the client translates, and every reply must pass it again.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    thread,
    time::Duration,
};

use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    family::Family,
    service::{self, Front, Tool, at},
    traffic::{
        Host,
        socket::{self, ask, open, pour, say, wants_end},
    },
};

use crate::{OPEN, assert_direct_is_fast, both_gates::under_both_gates, cluster_of, fast, host_gw};

const PORT: u16 = 8080;

under_both_gates!(
    replies_come_from_the_cluster_ip_by_iptables,
    replies_come_from_the_cluster_ip_by_nft,
    replies_come_from_the_cluster_ip_without_encapsulation,
);

fn replies_come_from_the_cluster_ip_by_iptables<F: Family>(gate: &str) {
    replies_come_from_the_cluster_ip::<F>(gate, Tool::Iptables, &F::plan());
}

fn replies_come_from_the_cluster_ip_by_nft<F: Family>(gate: &str) {
    replies_come_from_the_cluster_ip::<F>(gate, Tool::Nft, &F::plan());
}

fn replies_come_from_the_cluster_ip_without_encapsulation<F: Family>(gate: &str) {
    replies_come_from_the_cluster_ip::<F>(gate, Tool::Iptables, &host_gw::<F>());
}

fn replies_come_from_the_cluster_ip<F: Family>(gate: &str, tool: Tool, plan: &Plan) {
    let (cluster, containers) = cluster_of::<F>(plan, 2, &[gate]);
    let [client, local, remote] = [0, 1, 2].map(|n| &containers[n]);
    let backend = |container: &Container| at(F::host(container).address, PORT);
    let front = |n| at(F::vip(n), 80);
    let fronts = [
        Front::new(front(1), &[backend(local)]),
        Front::new(front(2), &[backend(remote)]),
        Front::new(front(3), &[backend(local), backend(remote)]),
        Front::new(front(4), &[backend(client)]),
    ];
    service::publish(cluster.nodes[0].netns(), tool, &fronts).unwrap();
    assert_direct_is_fast::<F>(&cluster.nodes, client, remote);
    let gated = |node: usize, container| cluster.nodes[node].gated(F::host(container).address);
    if gate == OPEN {
        assert_eq!(gated(0, client), Some(false), "nothing was translated yet");
    }
    let [client, local, remote] = [client, local, remote].map(|container| F::host(container));

    nothing_translated_is_fast(&cluster, client, front(1), local);
    if gate == OPEN {
        assert_eq!(gated(0, &containers[2]), None, "another node's");
    }
    nothing_translated_is_fast(&cluster, client, front(2), remote);
    if gate == OPEN {
        assert_eq!(gated(0, &containers[0]), Some(true), "translated flows since");
        assert_eq!(gated(0, &containers[1]), Some(true), "at the other end of one, on this node");
        assert_eq!(gated(1, &containers[2]), Some(false), "its node translates nothing");
    }
    one_of_both_backends_answers(client, front(3), [local, remote]);
    // kube-proxy's hairpin needs the port to take back what it sent (kubelet's hairpinMode).
    cluster.nodes[0].netns().exec("bridge link set dev veth1 hairpin on").unwrap();
    let seen = a_backend_answers(client, front(4), client);
    assert_ne!(seen, client.address, "a pod that reaches itself is masqueraded");
    both_at_once(client, front(2), remote);
    assert_direct_is_fast::<F>(&cluster.nodes, &containers[0], &containers[2]);
}

/// Many short connections, a long one, datagrams; returns the client's address as the backend saw it.
fn a_backend_answers(client: Host<'_>, front: SocketAddr, backend: Host<'_>) -> IpAddr {
    let listener = socket::listen(backend, PORT).unwrap();
    for round in 0..20 {
        let (near, far) = open(client.netns, None, front, &listener)
            .unwrap_or_else(|error| panic!("{front}, round {round}: {error:#}"));
        assert_eq!(near.peer_addr().unwrap(), front);
        say(&near, &far, "request").unwrap();
        say(&far, &near, "response").unwrap();
        drop(far);
        wants_end(&near).unwrap();
    }
    let (near, far) = open(client.netns, None, front, &listener).unwrap();
    pour(&near, &far, 30_000_000).unwrap();
    pour(&far, &near, 30_000_000).unwrap();
    let (asker, answerer) = (socket::udp(client, 0).unwrap(), socket::udp(backend, PORT).unwrap());
    asker.connect(front).unwrap();
    for round in 0..20 {
        ask(&asker, &answerer, &format!("datagram {round} to {front}")).unwrap();
    }
    far.peer_addr().unwrap().ip()
}

/// While only translated flows run, no packet takes the shortcut on the node that translates.
fn nothing_translated_is_fast(cluster: &Cluster, client: Host<'_>, front: SocketAddr, backend: Host<'_>) {
    let before = fast(&cluster.nodes[0]);
    let seen = a_backend_answers(client, front, backend);
    let after = fast(&cluster.nodes[0]);
    assert_eq!(seen, client.address, "DNAT alone leaves the client's address");
    assert_eq!(after - before, 0, "packets of translated flows that skipped the host");
}

fn one_of_both_backends_answers(client: Host<'_>, front: SocketAddr, backends: [Host<'_>; 2]) {
    let listeners = backends.map(|backend| socket::listen(backend, PORT).unwrap());
    for listener in &listeners {
        listener.set_nonblocking(true).unwrap();
    }
    let mut answered = BTreeSet::new();
    for round in 0..40 {
        let near = socket::dial(client.netns, None, front).unwrap();
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
fn both_at_once(client: Host<'_>, front: SocketAddr, backend: Host<'_>) {
    let listener = socket::listen(backend, PORT).unwrap();
    let through = open(client.netns, None, front, &listener).unwrap();
    let straight = open(client.netns, None, at(backend.address, PORT), &listener).unwrap();
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
