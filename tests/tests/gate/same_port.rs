//! One source port, two connections: to a service and straight to its backend. Only the host's connection table
//! can keep them apart, so neither may pass it by.

use std::{net::Ipv4Addr, thread, time::Duration};

use loden_tests::{
    container::Container,
    service::{self, Front, Tool, at},
    traffic::socket::{self, ask, open, say},
};

use crate::{cluster, under_both_gates};

const PORT: u16 = 8080;
const FRONT: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// Long enough for a flow to qualify and be used.
const ROUNDS: u32 = 150;

under_both_gates! {
    a_service_and_its_backend_are_reached_from_one_port
}

fn a_service_and_its_backend_are_reached_from_one_port(gate: &str) {
    let (cluster, containers) = cluster(2, 1, &[gate]);
    let (client, backend) = (&containers[0], &containers[1]);
    let front = at(FRONT, 80);
    let fronts = [Front::new(front, &[at(backend.address(), PORT)])];
    service::publish(cluster.nodes[0].netns(), Tool::Iptables, &fronts).unwrap();
    let straight = at(backend.address(), PORT);
    // The service first: its packets leave the node with the very tuple with which the others enter it. Then the
    // other way round; by then the open gate, too, knows of translated flows.
    for (port, first, second) in [(5000, front, straight), (5001, straight, front)] {
        tcp(client, backend, port, [first, second]);
        udp(client, backend, port, [first, second]);
    }
}

/// Through the open gate the host does not know the direct connection, and cannot keep the first flow that it ever
/// translates for this container off its tuple.
#[test]
fn a_first_service_flow_is_kept_apart_from_a_direct_one_by_the_strict_gate() {
    let (cluster, containers) = cluster(2, 1, &[crate::STRICT]);
    let (client, backend) = (&containers[0], &containers[1]);
    let (front, straight) = (at(FRONT, 80), at(backend.address(), PORT));
    let fronts = [Front::new(front, &[straight])];
    service::publish(cluster.nodes[0].netns(), Tool::Iptables, &fronts).unwrap();
    tcp(client, backend, 5000, [straight, front]);
    udp(client, backend, 5000, [straight, front]);
}

fn tcp(client: &Container, backend: &Container, port: u16, to: [std::net::SocketAddrV4; 2]) {
    let listener = socket::listen(backend.host(), PORT).unwrap();
    let from = Some(at(client.address(), port).into());
    let connections = to.map(|to| {
        open(client.netns(), from, to, &listener)
            .unwrap_or_else(|error| panic!("TCP from port {port} to {to}: {error:#}"))
    });
    for round in 0..ROUNDS {
        for (near, far) in &connections {
            let what = format!("round {round} on {:?}", near.peer_addr().unwrap());
            say(near, far, &what).unwrap_or_else(|error| panic!("{port}, {what}: {error:#}"));
            say(far, near, &what).unwrap_or_else(|error| panic!("{port}, {what}, back: {error:#}"));
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn udp(client: &Container, backend: &Container, port: u16, to: [std::net::SocketAddrV4; 2]) {
    let server = socket::udp(backend.host(), PORT).unwrap();
    let askers = to.map(|to| {
        let asker = socket::udp(client.host(), port).unwrap();
        asker.connect(to).unwrap();
        asker
    });
    for round in 0..ROUNDS {
        let mut seen = Vec::new();
        for asker in &askers {
            let what = format!("datagram {round} on {:?}", asker.peer_addr().unwrap());
            seen.push(ask(asker, &server, &what).unwrap_or_else(|error| panic!("{port}, {what}: {error:#}")));
        }
        assert_ne!(seen[0], seen[1], "the backend tells both apart");
        thread::sleep(Duration::from_millis(5));
    }
}
