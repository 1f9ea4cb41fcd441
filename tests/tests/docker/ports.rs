//! Published ports: Docker translates, and what it translates never takes the shortcut.

use std::net::IpAddr;

use loden_tests::{
    docker::DockerContainer,
    netns::Netns,
    traffic::{
        self, Host, Service,
        stream::{self, Until},
    },
};

use crate::{Fleet, assert_fast};

const PUBLISHED: u16 = 8080;
const INSIDE: u16 = 80;

#[test]
fn a_published_port_is_reached_from_everywhere() {
    let fleet = Fleet::start(&[]);
    let [client, _] = fleet.pair();
    let server = fleet.engines[1].run(&format!("--publish {PUBLISHED}:{INSIDE}")).unwrap();
    let nodes = &fleet.cluster.nodes;
    let service = Service { front: (nodes[1].address(), PUBLISHED).into(), backend: INSIDE };
    let ask = |client: Host<'_>| {
        let stream = stream::run(client, server.host(), Some(service), Until::Bytes(20_000_000));
        stream.unwrap_or_else(|error| panic!("from {}: {error:#}", client.address)).source
    };

    let outside = Netns::create("outside").unwrap();
    let address = fleet.cluster.underlay().plug(&outside, 200).unwrap();
    assert_eq!(
        ask(Host { netns: &outside, address: address.into() }),
        IpAddr::V4(address),
        "a client outside keeps its address"
    );
    let node = Host { netns: nodes[0].netns(), address: nodes[0].address().into() };
    assert_eq!(ask(node), IpAddr::V4(nodes[0].address()), "so does another node");
    // Docker masquerades what leaves its bridge for outside of the overlay.
    assert_eq!(ask(client.host()), IpAddr::V4(nodes[0].address()), "a container on another node");
    own_node(&server, Host { netns: nodes[1].netns(), address: nodes[1].address().into() }, service);
    // Docker's proxy answers these two, so that the source is the bridge: as everywhere.
    let neighbour = fleet.engines[1].run("").unwrap();
    for own in [&neighbour, &server] {
        assert_ne!(ask(own.host()), IpAddr::V4(own.address()), "a container of the node itself");
    }

    // The same container by its own address: nothing is translated.
    assert_fast(nodes, &client, &server);
}

/// From the node itself it is Docker's proxy or its rules for local packets that answer.
fn own_node(server: &DockerContainer, node: Host<'_>, service: Service) {
    traffic::hello(node, server.host(), Some(service)).unwrap();
}
