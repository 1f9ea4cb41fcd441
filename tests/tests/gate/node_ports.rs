//! Ports of nodes: hostPort, NodePort with and without masquerade, and what pods look like to the outside.

use std::net::{IpAddr, Ipv4Addr};

use loden_tests::{
    cluster::Cluster,
    container::Container,
    netns::Netns,
    service::{self, Front, Tool, at},
    traffic::{
        Host,
        socket::{self, ask, open, pour, say},
    },
};

use crate::{assert_direct_is_fast, cluster, fast, under_both_gates};

const PORT: u16 = 8080;
/// NodePort of a service anywhere (externalTrafficPolicy Cluster): clients are masqueraded.
const ANYWHERE: u16 = 30_080;
/// NodePort of a service with a local backend only (externalTrafficPolicy Local), and a hostPort: they are not.
const HERE: u16 = 30_081;

under_both_gates! {
    ports_of_nodes_lead_to_pods_by_iptables
    ports_of_nodes_lead_to_pods_by_nft
}

fn ports_of_nodes_lead_to_pods_by_iptables(gate: &str) {
    ports_of_nodes_lead_to_pods(&[gate], Tool::Iptables);
}

fn ports_of_nodes_lead_to_pods_by_nft(gate: &str) {
    ports_of_nodes_lead_to_pods(&[gate, "--ip-masq"], Tool::Nft);
}

fn ports_of_nodes_lead_to_pods(args: &[&str], tool: Tool) {
    let (cluster, containers) = cluster(2, 1, args);
    let (a, b) = (&containers[0], &containers[1]);
    let (node_a, node_b) = (cluster.nodes[0].address(), cluster.nodes[1].address());
    let outside = Netns::create("outside").unwrap();
    let address = cluster.underlay().plug(&outside, 200).unwrap();
    let outside = Host { netns: &outside, address: address.into() };
    // The nodes' pods are reached straight from the underlay too where nothing masquerades them.
    for (node, own, backends) in [(node_a, a, [b]), (node_b, b, [a])] {
        let fronts = [
            Front::new(at(node, ANYWHERE), &backends.map(|c| at(c.address(), PORT))).masqueraded(),
            Front::new(at(node, HERE), &[at(own.address(), PORT)]),
        ];
        let node = cluster.nodes.iter().find(|n| n.address() == node).unwrap();
        service::publish(node.netns(), tool, &fronts).unwrap();
    }
    route_replies(&cluster);
    let masquerade = args.contains(&"--ip-masq");

    // NodePort from outside: by way of the other node, and of the pod's own.
    let seen = answers(outside, at(node_a, ANYWHERE), b);
    assert_ne!(seen, address, "masqueraded, so that replies come back the same way");
    assert_eq!(answers(outside, at(node_b, HERE), b), address, "externalTrafficPolicy Local keeps it");

    // hostPort from a pod: with masquerade its node's address arrives, without its own.
    let before = fast(&cluster.nodes[1]);
    let seen = answers(a.host(), at(node_b, HERE), b);
    assert_eq!(seen, if masquerade { node_a } else { a.address() });
    assert_eq!(fast(&cluster.nodes[1]), before, "the node of the hostPort translates every packet of it");
    // A pod by way of another node's NodePort to a pod on its own node.
    answers(a.host(), at(node_b, ANYWHERE), a);

    // Pods and the outside.
    let listener = socket::listen(outside, PORT).unwrap();
    let (near, far) = open(a.netns(), None, at(address, PORT), &listener).unwrap();
    say(&near, &far, "hello outside").unwrap();
    say(&far, &near, "hello inside").unwrap();
    let expected = if masquerade { node_a } else { a.address() };
    assert_eq!(far.peer_addr().unwrap().ip(), IpAddr::V4(expected), "the pod as the outside sees it");
    assert_direct_is_fast(&cluster.nodes, a, b);
}

/// Everybody on the underlay knows the way to every pod, as hosts do whose router knows the nodes.
fn route_replies(cluster: &Cluster) {
    let router = cluster.underlay().netns();
    for node in &cluster.nodes {
        let subnet = node.subnet_env().unwrap().subnet.trunc();
        router.ip(&format!("route add {subnet} via {}", node.address())).unwrap();
    }
    router.exec("sysctl -qw net.ipv4.ip_forward=1").unwrap();
}

/// Short connections, a long one, datagrams; returns the client's address as the backend saw it.
fn answers(client: Host<'_>, front: std::net::SocketAddrV4, backend: &Container) -> Ipv4Addr {
    let listener = socket::listen(backend.host(), PORT).unwrap();
    for round in 0..10 {
        let (near, far) = open(client.netns, None, front, &listener)
            .unwrap_or_else(|error| panic!("{front}, round {round}: {error:#}"));
        say(&near, &far, "request").unwrap();
        say(&far, &near, "response").unwrap();
    }
    let (near, far) = open(client.netns, None, front, &listener).unwrap();
    pour(&near, &far, 20_000_000).unwrap();
    pour(&far, &near, 20_000_000).unwrap();
    let (asker, answerer) = (socket::udp(client, 0).unwrap(), socket::udp(backend.host(), PORT).unwrap());
    asker.connect(front).unwrap();
    for round in 0..20 {
        ask(&asker, &answerer, &format!("datagram {round} to {front}")).unwrap();
    }
    match far.peer_addr().unwrap().ip() {
        IpAddr::V4(seen) => seen,
        other => panic!("{other} is not IPv4"),
    }
}
