//! Dual stack: Docker gives containers addresses of both subnets, and they are reached by both.

use std::time::Duration;

use loden_tests::{
    cluster::Plan,
    container::Container,
    docker::DockerContainer,
    node::Node,
    process::wait_for,
    traffic::{
        Host, hello, ping,
        stream::{self, Until},
    },
};

use crate::{
    Fleet, assert_fast, by_subnet_env, misplaced::wait_for_advice, options::options_by_units,
    wait_for_endpoints, words,
};

const BULK: u64 = 30_000_000;

#[test]
fn containers_of_two_engines_reach_each_other_in_both_families_with_their_own_addresses() {
    let mut fleet = Fleet::of(Plan::dual(), &["--ip-masq"]);
    // What systemd starts dockerd with. One of them sees to ip6tables as well, as Docker 27 and newer do by default.
    fleet.start_engines(|node| {
        let options = options_by_units(node);
        let env = node.subnet_env().unwrap();
        let expected = [
            format!("--bip={}", env.subnet()),
            format!("--fixed-cidr-v6={}", env.subnet6.unwrap()),
            "--ip-masq=false".into(),
            "--ipv6".into(),
            format!("--mtu={}", env.mtu),
        ];
        assert_eq!(options, expected);
        if node.name() == "n1" { options } else { [options, with_ip6tables()].concat() }
    });
    let [a, b] = fleet.pair();
    for (node, container) in fleet.cluster.nodes.iter().zip([&a, &b]) {
        let subnet = node.subnet_env().unwrap().subnet6.unwrap();
        assert!(
            subnet.contains(&host6(container).address.to_string().parse::<std::net::Ipv6Addr>().unwrap())
        );
        assert!(node.status().unwrap()["advice"].as_array().unwrap().is_empty());
    }
    assert_both_ways(&a, &b);
    assert_fast(&fleet.cluster.nodes, &a, &b);
    // A neighbour on the same bridge; and what leaves the network is the node's.
    let neighbour = fleet.engines[0].run("").unwrap();
    assert_eq!(hello(host6(&neighbour), host6(&a), None).unwrap(), host6(&neighbour).address);
    let router = fleet.cluster.underlay();
    let outside = Host { netns: router.netns(), address: router.address6(1).unwrap().into() };
    assert_eq!(hello(host6(&a), outside, None).unwrap(), underlay_address(&fleet.cluster.nodes[0]));
}

#[test]
fn what_docker_does_with_ip6tables_does_not_reach_the_overlay() {
    let mut fleet = Fleet::of(Plan::dual(), &[]);
    // It masquerades what leaves its bridge, and lets nothing in.
    fleet.start_engines(|node| [by_subnet_env6(node), with_ip6tables()].concat());
    let [a, b] = fleet.pair();
    for node in &fleet.cluster.nodes {
        let rules = node.netns().exec("ip6tables -t nat -S POSTROUTING").unwrap();
        assert!(rules.contains("-j MASQUERADE"), "the test would prove nothing: {rules}");
    }
    assert_both_ways(&a, &b);
    let node = &fleet.cluster.nodes[1];
    node.netns().exec("ip6tables -I FORWARD -p tcp -j DROP").unwrap();
    hello(host6(&a), host6(&b), None).expect_err("what the operator denies stays denied");
}

#[test]
fn a_docker0_without_the_leased_ipv6_subnet_is_explained_and_the_remedy_helps() {
    let mut fleet = Fleet::of(Plan::dual(), &[]);
    let elsewhere = |node: &Node| {
        let other = ["--ipv6".to_owned(), "--fixed-cidr-v6=fd00:dead::/64".to_owned()];
        [by_subnet_env(node).as_slice(), if node.name() == "n1" { &[] } else { &other }].concat()
    };
    fleet.start_engines(elsewhere);
    let containers = [0, 1].map(|n| fleet.engines[n].run("--restart always").unwrap());
    for (node, words) in
        fleet.cluster.nodes.iter().zip(["it has no address of this node's IPv6", "it has fd00:dead::1/64"])
    {
        let advice = wait_for_advice(node, &format!("docker0: {words}"));
        let subnet = node.subnet_env().unwrap().subnet6.unwrap();
        assert!(advice.contains(&format!("--ipv6 --fixed-cidr-v6={subnet} --mtu=1430")), "{advice}");
        assert_eq!(node.status().unwrap()["ready"], true, "dockerd may be waiting for this");
    }
    for n in 0..2 {
        let options = by_subnet_env6(&fleet.cluster.nodes[n]);
        fleet.engines[n].stop_daemon().unwrap();
        fleet.engines[n].start_daemon(&words(&options)).unwrap();
    }
    let find = |n: usize, id: &str| {
        wait_for("the container to run again", Duration::from_secs(10), || fleet.engines[n].find(id).ok())
            .unwrap()
    };
    let [a, b] = [find(0, containers[0].id()), find(1, containers[1].id())];
    assert_both_ways(&a, &b);
    for node in &fleet.cluster.nodes {
        wait_for("no advice", Duration::from_secs(5), || {
            (node.status().ok()?["advice"] == serde_json::json!([])).then_some(())
        })
        .unwrap();
    }
}

#[test]
fn a_container_that_restarts_is_reached_by_the_addresses_that_it_had_also_while_the_agent_is_away() {
    let mut fleet = Fleet::of(Plan::dual(), &[]);
    fleet.start_engines(by_subnet_env6);
    let [client, server] = fleet.pair();
    let (id, addresses) = (server.id().to_owned(), server.addresses().collect::<Vec<_>>());
    drop(server);
    let restart = |fleet: &Fleet| {
        fleet.engines[1].docker(&format!("restart --time 0 {id}")).unwrap();
        let server = fleet.engines[1].find(&id).unwrap();
        assert_eq!(server.addresses().collect::<Vec<_>>(), addresses, "nobody else wanted them");
        server
    };
    let server = restart(&fleet);
    assert_both_ways(&client, &server);
    assert_fast(&fleet.cluster.nodes, &client, &server);
    drop(server);
    // Another veth has the addresses when it comes back.
    fleet.cluster.nodes[1].kill_agent();
    let server = restart(&fleet);
    assert_both_ways(&client, &server);
    fleet.cluster.nodes[1].start_agent(&[]).unwrap();
    assert_both_ways(&client, &server);
    assert_fast(&fleet.cluster.nodes, &client, &server);
    drop(server);
    fleet.cluster.nodes[1].kill_agent();
    fleet.engines[1].docker(&format!("rm --force {id}")).unwrap();
    fleet.cluster.nodes[1].start_agent(&[]).unwrap();
    wait_for_endpoints::<std::net::IpAddr>(&fleet.cluster.nodes[1], &[]);
}

/// What `deploy/docker.md` tells an operator to start dockerd with.
fn by_subnet_env6(node: &Node) -> Vec<String> {
    let subnet = node.subnet_env().unwrap().subnet6.unwrap();
    [by_subnet_env(node).as_slice(), &["--ipv6".into(), format!("--fixed-cidr-v6={subnet}")]].concat()
}

fn with_ip6tables() -> Vec<String> {
    ["--experimental", "--ip6tables"].map(str::to_owned).to_vec()
}

fn host6(container: &Container) -> Host<'_> {
    container.host6().expect("Docker gave it an IPv6 address")
}

fn underlay_address(node: &Node) -> std::net::IpAddr {
    format!("fd77::{:x}", node.address().octets()[3]).parse().unwrap()
}

/// Bulk TCP of either family in either direction, every byte compared, with the sender's own address.
fn assert_both_ways(a: &DockerContainer, b: &DockerContainer) {
    for ends in [[a.host(), b.host()], [host6(a), host6(b)]] {
        // Docker's containers look whether somebody else has their IPv6 address before they use it.
        wait_for("the addresses to be usable", Duration::from_secs(10), || {
            ping(ends[0].netns, ends[1].address, 1).ok()
        })
        .unwrap();
        for [from, to] in [ends, [ends[1], ends[0]]] {
            let stream = stream::run(from, to, None, Until::Bytes(BULK)).unwrap();
            assert_eq!((stream.bytes, stream.source), (BULK, from.address));
        }
    }
}
