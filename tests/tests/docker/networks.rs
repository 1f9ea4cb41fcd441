//! Another network of Docker's beside the leased one: it works as with plain Docker, and is none of the agent's.

use aya::programs::{SchedClassifier, tc::TcAttachType};
use loden_tests::{
    counters::Counters,
    node::Node,
    traffic::{
        hello, ping,
        stream::{self, Until},
    },
};

use crate::{Fleet, assert_fast, wait_for_endpoints};

#[test]
fn a_user_defined_network_works_beside_the_leased_one_and_is_left_to_the_kernel() {
    let fleet = Fleet::start(&[]);
    let [a, b] = fleet.pair();
    let (engine, node) = (&fleet.engines[0], &fleet.cluster.nodes[0]);
    let options = "--subnet 172.30.0.0/24 --opt com.docker.network.bridge.name=other";
    engine.docker(&format!("network create {options} other")).unwrap();
    let (c, d) = (engine.run("--network other").unwrap(), engine.run("--network other").unwrap());
    let before = Counters::read(node).unwrap();
    let stream = stream::run(c.host(), d.host(), None, Until::Bytes(20_000_000)).unwrap();
    assert_eq!(stream.source, c.address());
    ping(c.netns(), fleet.cluster.underlay().address(1).unwrap(), 2).unwrap();
    let counted = Counters::read(node).unwrap().since(&before);
    // Replies from the outside come in through the uplink, where the programs do look.
    let beyond: Vec<_> =
        counted.iter().filter(|(name, packets)| !name.starts_with("pass_") || *packets > 100).collect();
    assert!(beyond.is_empty(), "{beyond:?}");
    wait_for_endpoints(node, &[a.address()]);
    for (bridge, ours) in [("other", false), ("docker0", true)] {
        // The port that only asks for headroom carries nothing.
        for port in ports(node, bridge).iter().filter(|port| !port.starts_with("loden-hr")) {
            assert_eq!(programs_at(node, port) > 0, ours, "programs at {port} of {bridge}");
        }
    }

    // Docker keeps its networks apart, and so do they stay.
    for (from, to) in [(&c, &a), (&a, &c)] {
        hello(from.host(), to.host(), None).expect_err("Docker's networks are apart");
    }
    // To a container of another node it is a stranger; Docker masquerades it to the overlay address of its node.
    let masqueraded = node.subnet_env().unwrap().subnet().network();
    assert_eq!(hello(c.host(), b.host(), None).unwrap(), masqueraded);
    assert_fast(&fleet.cluster.nodes, &a, &b);
}

#[test]
fn the_leased_subnet_may_be_a_network_of_its_own() {
    let mut fleet = Fleet::without_engines(&[]);
    fleet.start_engines(|_| Vec::new());
    let pair = [0, 1].map(|n| {
        let env = fleet.cluster.nodes[n].subnet_env().unwrap();
        let mtu = format!("com.docker.network.driver.mtu={}", env.mtu);
        // Docker 28 wants to be told that other hosts may come; 20.10 passes over it.
        let open = "com.docker.network.bridge.gateway_mode_ipv4=nat-unprotected";
        let create =
            format!("network create --subnet {} --opt {mtu} --opt {open} leased", env.subnet().trunc());
        fleet.engines[n].docker(&create).unwrap();
        fleet.engines[n].run("--network leased").unwrap()
    });
    ping(pair[0].netns(), pair[1].address(), 20).unwrap();
    assert_fast(&fleet.cluster.nodes, &pair[0], &pair[1]);
}

/// The ports of a bridge.
fn ports(node: &Node, bridge: &str) -> Vec<String> {
    let text = node.netns().ip(&format!("-oneline link show master {bridge}")).unwrap();
    let ports: Vec<String> =
        text.lines().map(|line| line.split([' ', '@']).nth(1).unwrap().to_owned()).collect();
    assert!(!ports.is_empty(), "{bridge} has no port");
    ports
}

/// How many programs run on what comes in at an interface.
fn programs_at(node: &Node, interface: &str) -> usize {
    let (_, programs) =
        node.netns().run(|| SchedClassifier::query_tcx(interface, TcAttachType::Ingress)).unwrap();
    programs.len()
}
