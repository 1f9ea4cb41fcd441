//! Ports of nodes: hostPort, NodePort with and without masquerade, and what pods look like to the outside.

use std::net::{IpAddr, SocketAddr};

use loden_tests::{
    cluster::Cluster,
    family::Family,
    netns::Netns,
    service::{self, Front, Tool, at},
    traffic::{
        Host,
        socket::{self, ask, open, pour, say},
    },
};

use crate::{assert_direct_is_fast, both_gates::under_both_gates, cluster, fast};

const PORT: u16 = 8080;
/// NodePort of a service anywhere (externalTrafficPolicy Cluster): clients are masqueraded.
const ANYWHERE: u16 = 30_080;
/// NodePort of a service with a local backend only (externalTrafficPolicy Local), and a hostPort: they are not.
const HERE: u16 = 30_081;
/// Host number of somebody on the underlay who is no node.
const OUTSIDE: u32 = 200;

under_both_gates!(ports_of_nodes_lead_to_pods_by_iptables, ports_of_nodes_lead_to_pods_by_nft,);

fn ports_of_nodes_lead_to_pods_by_iptables<F: Family>(gate: &str) {
    ports_of_nodes_lead_to_pods::<F>(&[gate], Tool::Iptables);
}

fn ports_of_nodes_lead_to_pods_by_nft<F: Family>(gate: &str) {
    ports_of_nodes_lead_to_pods::<F>(&[gate, "--ip-masq"], Tool::Nft);
}

fn ports_of_nodes_lead_to_pods<F: Family>(args: &[&str], tool: Tool) {
    let (cluster, containers) = cluster::<F>(1, args);
    let (a, b) = (F::host(&containers[0]), F::host(&containers[1]));
    let [node_a, node_b]: [IpAddr; 2] = [0, 1].map(|n| F::of_node(&cluster, n).into());
    let outside = Netns::create("outside").unwrap();
    let underlay = cluster.underlay();
    let address = IpAddr::from(underlay.plug(&outside, OUTSIDE).unwrap());
    let address = if F::IS_IPV4 { address } else { underlay.address6(OUTSIDE).unwrap().into() };
    let outside = Host { netns: &outside, address };
    // The nodes' pods are reached straight from the underlay too where nothing masquerades them.
    for (n, node, own, backend) in [(0, node_a, a, b), (1, node_b, b, a)] {
        let fronts = [
            Front::new(at(node, ANYWHERE), &[at(backend.address, PORT)]).masqueraded(),
            Front::new(at(node, HERE), &[at(own.address, PORT)]),
        ];
        service::publish(cluster.nodes[n].netns(), tool, &fronts).unwrap();
    }
    route_replies::<F>(&cluster);
    let masquerade = args.contains(&"--ip-masq");

    // NodePort from outside: by way of the other node, and of the pod's own.
    let seen = answers(outside, at(node_a, ANYWHERE), b);
    assert_ne!(seen, address, "masqueraded, so that replies come back the same way");
    assert_eq!(answers(outside, at(node_b, HERE), b), address, "externalTrafficPolicy Local keeps it");

    // hostPort from a pod: with masquerade its node's address arrives, without its own.
    let before = fast(&cluster.nodes[1]);
    let seen = answers(a, at(node_b, HERE), b);
    assert_eq!(seen, if masquerade { node_a } else { a.address });
    assert_eq!(fast(&cluster.nodes[1]), before, "the node of the hostPort translates every packet of it");
    // A pod by way of another node's NodePort to a pod on its own node.
    answers(a, at(node_b, ANYWHERE), a);

    // Pods and the outside.
    let listener = socket::listen(outside, PORT).unwrap();
    let (near, far) = open(a.netns, None, at(address, PORT), &listener).unwrap();
    say(&near, &far, "hello outside").unwrap();
    say(&far, &near, "hello inside").unwrap();
    let expected = if masquerade { node_a } else { a.address };
    assert_eq!(far.peer_addr().unwrap().ip(), expected, "the pod as the outside sees it");
    assert_direct_is_fast::<F>(&cluster.nodes, &containers[0], &containers[1]);
}

/// Everybody on the underlay knows the way to every pod, as hosts do whose router knows the nodes.
fn route_replies<F: Family>(cluster: &Cluster) {
    let router = cluster.underlay().netns();
    for (n, node) in cluster.nodes.iter().enumerate() {
        let route = format!("route add {} via {}", F::subnet(node), F::of_node(cluster, n));
        router.ip(&route).unwrap();
    }
    router.exec("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1").unwrap();
}

/// Short connections, a long one, datagrams; returns the client's address as the backend saw it.
fn answers(client: Host<'_>, front: SocketAddr, backend: Host<'_>) -> IpAddr {
    let listener = socket::listen(backend, PORT).unwrap();
    for round in 0..10 {
        let (near, far) = open(client.netns, None, front, &listener)
            .unwrap_or_else(|error| panic!("{front}, round {round}: {error:#}"));
        say(&near, &far, "request").unwrap();
        say(&far, &near, "response").unwrap();
    }
    let (near, far) = open(client.netns, None, front, &listener).unwrap();
    pour(&near, &far, 20_000_000).unwrap();
    pour(&far, &near, 20_000_000).unwrap();
    let (asker, answerer) = (socket::udp(client, 0).unwrap(), socket::udp(backend, PORT).unwrap());
    asker.connect(front).unwrap();
    for round in 0..20 {
        ask(&asker, &answerer, &format!("datagram {round} to {front}")).unwrap();
    }
    far.peer_addr().unwrap().ip()
}
