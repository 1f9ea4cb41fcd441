//! The operator's filter rules under the strict gate: none of them is passed by.

use std::{net::UdpSocket, thread, time::Duration};

use loden_tests::{
    counters::{Counters, FAST_ENCAP},
    each_family,
    family::Family,
    netns::Netns,
    policy::{Matching, deny},
    service::{Tool, at},
    traffic::{
        Host, ping,
        socket::{self, say},
    },
};

use crate::{STRICT, assert_direct_is_fast, cluster, snmp};

each_family!(
    what_was_always_denied_never_arrives,
    a_rule_against_one_direction_leaves_the_other_fast,
    allowed_echo_replies_let_no_denied_request_pass,
    a_pod_that_was_denied_may_be_reached_once_the_rule_is_gone,
);

fn what_was_always_denied_never_arrives<F: Family>() {
    let (cluster, containers) = cluster::<F>(1, &[STRICT]);
    let (a, b) = (F::host(&containers[0]), F::host(&containers[1]));
    let [near, far] = [0, 1].map(|n| cluster.nodes[n].netns());
    let rules = [
        (near, Tool::Iptables, 9001),
        (far, Tool::Iptables, 9002),
        (near, Tool::Nft, 9003),
        (far, Tool::Nft, 9004),
    ];
    for (node, tool, port) in rules {
        deny(node, tool, F::IS_IPV4, Matching::UdpTo(port)).unwrap();
        deny(node, tool, F::IS_IPV4, Matching::TcpTo(port)).unwrap();
    }
    assert_direct_is_fast::<F>(&cluster.nodes, &containers[0], &containers[1]);
    let allowed = socket::udp(b, 9000).unwrap();
    let sender = socket::udp(a, 6000).unwrap();
    let denied: Vec<UdpSocket> = rules
        .map(|(.., port)| {
            let socket = socket::udp(b, port).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket
        })
        .into();
    let listeners = rules.map(|(.., port)| socket::listen(b, port).unwrap());
    let before = Counters::read(&cluster.nodes[0]).unwrap().get(FAST_ENCAP);
    // From one socket to all ports, in turn with a flow that is allowed.
    for round in 0..3000_u32 {
        sender.send_to(b"allowed", at(b.address, 9000)).unwrap();
        socket::uninterrupted(|| allowed.recv(&mut [0; 64]))
            .unwrap_or_else(|error| panic!("round {round}: {error}"));
        for (.., port) in rules {
            sender.send_to(b"denied", at(b.address, port)).unwrap();
        }
    }
    let encapsulated = Counters::read(&cluster.nodes[0]).unwrap().get(FAST_ENCAP) - before;
    assert!(encapsulated > 2800, "the allowed flow of that socket is fast: {encapsulated}");
    for ((node, tool, port), (socket, listener)) in rules.iter().zip(denied.iter().zip(&listeners)) {
        let arrived = socket.recv(&mut [0; 64]);
        assert!(arrived.is_err(), "{tool:?} on {}: a datagram arrived at {port}", node.name());
        let connecting = a.netns.run(|| {
            let to = at(b.address, *port);
            std::net::TcpStream::connect_timeout(&to, Duration::from_millis(500))
        });
        assert!(connecting.is_err(), "{tool:?} on {}: a connection to {port}", node.name());
        listener.set_nonblocking(true).unwrap();
        assert!(listener.accept().is_err(), "{tool:?} on {}: a connection to {port}", node.name());
    }
}

fn a_rule_against_one_direction_leaves_the_other_fast<F: Family>() {
    let (cluster, containers) = cluster::<F>(1, &[STRICT]);
    let (a, b) = (F::host(&containers[0]), F::host(&containers[1]));
    for (n, tool, port) in [(0, Tool::Iptables, 7000), (1, Tool::Nft, 7001)] {
        deny(cluster.nodes[n].netns(), tool, F::IS_IPV4, Matching::UdpFrom(port)).unwrap();
        let (one, other) = (socket::udp(a, 6000 + port).unwrap(), socket::udp(b, port).unwrap());
        one.set_nonblocking(true).unwrap();
        one.connect(at(b.address, port)).unwrap();
        let before = Counters::read(&cluster.nodes[0]).unwrap().get(FAST_ENCAP);
        for round in 0..2000 {
            one.send(b"there").unwrap();
            let (_, peer) = other
                .recv_from(&mut [0; 64])
                .unwrap_or_else(|error| panic!("{tool:?}, round {round}: {error}"));
            other.send_to(b"back", peer).unwrap();
        }
        let encapsulated = Counters::read(&cluster.nodes[0]).unwrap().get(FAST_ENCAP) - before;
        assert!(encapsulated >= 1900, "one-way UDP qualifies by its own direction: {encapsulated} of 2000");
        assert!(one.recv(&mut [0; 64]).is_err(), "{tool:?} on node {n}: a denied datagram came back");
    }
}

fn allowed_echo_replies_let_no_denied_request_pass<F: Family>() {
    let (cluster, containers) = cluster::<F>(1, &[STRICT]);
    let (a, b) = (F::host(&containers[0]), F::host(&containers[1]));
    deny(cluster.nodes[1].netns(), Tool::Nft, F::IS_IPV4, Matching::EchoRequestsIn).unwrap();
    let before = echo_requests::<F>(b);
    thread::scope(|scope| {
        // Both with one identifier: the replies to one have the addresses and the identifier of the other.
        let allowed =
            scope.spawn(|| b.netns.exec(&format!("ping -q -e 77 -i 0.01 -c 300 {}", a.address)).unwrap());
        let denied =
            scope.spawn(|| a.netns.exec(&format!("ping -q -e 77 -i 0.01 -c 300 -W 1 {}", b.address)));
        let summary = allowed.join().unwrap();
        assert!(summary.contains(" 0% packet loss"), "{summary}");
        assert!(denied.join().unwrap().is_err(), "a denied ping was answered");
    });
    assert_eq!(echo_requests::<F>(b) - before, 0, "echo requests that arrived");
    ping(b.netns, a.address, 3).unwrap();
}

fn a_pod_that_was_denied_may_be_reached_once_the_rule_is_gone<F: Family>() {
    let (cluster, containers) = cluster::<F>(1, &[STRICT]);
    let (a, b) = (F::host(&containers[0]), F::host(&containers[1]));
    let node: &Netns = cluster.nodes[0].netns();
    deny(node, Tool::Nft, F::IS_IPV4, Matching::TcpTo(8080)).unwrap();
    let listener = socket::listen(b, 8080).unwrap();
    let to = at(b.address, 8080);
    let refused = a.netns.run(|| std::net::TcpStream::connect_timeout(&to, Duration::from_millis(500)));
    assert!(refused.is_err(), "the rule denies it");
    let ip = if F::IS_IPV4 { "ip" } else { "ip6" };
    node.exec(&format!("nft delete table {ip} operator")).unwrap();
    let (near, far) = socket::open(a.netns, None, to, &listener).unwrap();
    say(&near, &far, "hello").unwrap();
    assert_direct_is_fast::<F>(&cluster.nodes, &containers[0], &containers[1]);
}

/// Echo requests that a host's own protocol stack has got.
fn echo_requests<F: Family>(host: Host<'_>) -> u64 {
    if F::IS_IPV4 {
        return snmp(host.netns, "Icmp", "InEchos");
    }
    let text = host.netns.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp6")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Icmp6InEchos ")).unwrap();
    line.trim().parse().unwrap()
}
