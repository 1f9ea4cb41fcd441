//! Services by IPVS, which translates where netfilter's tables say nothing of it. The tests need a kernel with the module
//! ip_vs, and run by `cargo xtask test --kernels`.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use loden_tests::{
    cluster::Cluster,
    container::Container,
    counters::{Counters, Share},
    family::Family,
    ipvs,
    node::Node,
    packet::{Ipv4, Ipv6},
    process::wait_for,
    service::{Front, at},
    traffic::{
        Host, ping,
        socket::{self, ask, open, pour, say, wants_end},
        stream::{self, Until},
    },
};

const PORT: u16 = 8080;
const LIMIT: Duration = Duration::from_secs(20);

/// Two nodes, two containers on the first and one on the second, known to the agents.
fn start<F: Family>(gate: &str) -> (Cluster, Vec<Container>) {
    let mut cluster = Cluster::start(&F::plan(), &[gate, "--datapath=ebpf"]).unwrap();
    let [first, second] = &mut cluster.nodes[..] else { panic!("two nodes") };
    let containers = vec![
        first.run_container(2).unwrap(),
        first.run_container(3).unwrap(),
        second.run_container(2).unwrap(),
    ];
    for container in &containers[..2] {
        let (a, b) = (F::host(container), F::host(&containers[2]));
        wait_for("the first answer", LIMIT, || ping(a.netns, b.address, 1).ok()).unwrap();
    }
    for (n, container) in [(0, 0), (0, 1), (1, 2)] {
        let address = F::host(&containers[container]).address;
        wait_for("the agent to know the pod", LIMIT, || cluster.nodes[n].gated(address)).unwrap();
    }
    (cluster, containers)
}

/// The `n`-th service.
fn service<F: Family>(n: u8) -> SocketAddr {
    at(F::vip(n), 80)
}

/// Packets that took the shortcut on a node.
fn fast(node: &Node) -> u64 {
    let counters = Counters::read(node).unwrap();
    counters.iter().filter(|(name, _)| name.starts_with("fast_")).map(|(_, packets)| packets).sum()
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test --kernels"]
fn what_ipvs_translates_takes_no_shortcut_through_the_strict_gate_v4() {
    what_ipvs_translates_takes_no_shortcut::<Ipv4>("--gate=strict");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test --kernels"]
fn what_ipvs_translates_takes_no_shortcut_through_the_strict_gate_v6() {
    what_ipvs_translates_takes_no_shortcut::<Ipv6>("--gate=strict");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test --kernels"]
fn what_ipvs_translates_takes_no_shortcut_through_the_open_gate_v4() {
    what_ipvs_translates_takes_no_shortcut::<Ipv4>("--gate=open");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test --kernels"]
fn what_ipvs_translates_takes_no_shortcut_through_the_open_gate_v6() {
    what_ipvs_translates_takes_no_shortcut::<Ipv6>("--gate=open");
}

fn what_ipvs_translates_takes_no_shortcut<F: Family>(gate: &str) {
    let (cluster, containers) = start::<F>(gate);
    let [client, local, remote] = [0, 1, 2].map(|n| F::host(&containers[n]));
    let node = &cluster.nodes[0];
    let backends = [remote, local, client].map(|host| at(host.address, PORT));
    let fronts: Vec<Front> =
        (1..).zip(backends).map(|(n, backend)| Front::new(service::<F>(n), &[backend])).collect();
    ipvs::publish(node.netns(), &fronts).unwrap();

    for (front, backend) in [(service::<F>(1), remote), (service::<F>(2), local)] {
        let before = fast(node);
        let seen = a_backend_answers(client, front, backend);
        assert_eq!(seen, client.address, "IPVS leaves the client's address");
        assert_eq!(fast(node) - before, 0, "packets of translated flows that skipped the host");
    }
    if gate == "--gate=open" {
        assert_eq!(node.gated(client.address), Some(true), "its flows are translated on this node");
        assert_eq!(cluster.nodes[1].gated(remote.address), Some(false), "its node translates nothing");
    }
    // kube-proxy's hairpin needs the port to take back what it sent (kubelet's hairpinMode).
    node.netns().exec("bridge link set dev veth1 hairpin on").unwrap();
    let seen = a_backend_answers(client, service::<F>(3), client);
    assert_ne!(seen, client.address, "a pod that reaches itself is masqueraded");

    // What nobody translates is fast all the same.
    let all: Vec<&Container> = containers.iter().collect();
    let work = || stream::run(client, remote, None, Until::Bytes(20_000_000));
    let (_, share) = Share::during(&cluster.nodes, &all, work).unwrap();
    assert!(share.smaller() >= 0.95, "{share:?}");
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test --kernels"]
fn a_pod_whose_flow_ipvs_has_translated_before_it_was_known_is_gated_v4() {
    a_pod_whose_flow_ipvs_has_translated_before_it_was_known_is_gated::<Ipv4>();
}

#[test]
#[ignore = "needs a kernel with IPVS: cargo xtask test --kernels"]
fn a_pod_whose_flow_ipvs_has_translated_before_it_was_known_is_gated_v6() {
    a_pod_whose_flow_ipvs_has_translated_before_it_was_known_is_gated::<Ipv6>();
}

fn a_pod_whose_flow_ipvs_has_translated_before_it_was_known_is_gated<F: Family>() {
    let (mut cluster, containers) = start::<F>("--gate=open");
    let [client, remote] = [0, 2].map(|n| F::host(&containers[n]));
    ipvs::publish(cluster.nodes[0].netns(), &[Front::new(service::<F>(1), &[at(remote.address, PORT)])])
        .unwrap();
    let listener = socket::listen(remote, PORT).unwrap();
    let (near, far) = open(client.netns, None, service::<F>(1), &listener).unwrap();
    say(&near, &far, "the client speaks").unwrap();

    // Programs and maps that have seen nothing of it.
    let node = &mut cluster.nodes[0];
    node.stop_agent().unwrap();
    let version = node.bpffs().read_dir().unwrap().next().unwrap().unwrap().path();
    fs::remove_dir_all(version).unwrap();
    node.start_agent(&["--gate=open", "--datapath=ebpf"]).unwrap();
    let is_gated = wait_for("the agent to know the pod", LIMIT, || node.gated(client.address)).unwrap();
    assert!(is_gated, "IPVS translates a connection of it");
    say(&far, &near, "the server speaks first, from its own address").unwrap();
    say(&near, &far, "and the client answers").unwrap();
}

/// Short connections, a long one, datagrams; returns the client's address as the backend saw it.
fn a_backend_answers(client: Host<'_>, front: SocketAddr, backend: Host<'_>) -> IpAddr {
    let listener = socket::listen(backend, PORT).unwrap();
    for round in 0..5 {
        let (near, far) = open(client.netns, None, front, &listener)
            .unwrap_or_else(|error| panic!("{front}, round {round}: {error:#}"));
        say(&near, &far, "request").unwrap();
        say(&far, &near, "response").unwrap();
        drop(far);
        wants_end(&near).unwrap();
    }
    let (near, far) = open(client.netns, None, front, &listener).unwrap();
    pour(&near, &far, 10_000_000).unwrap();
    pour(&far, &near, 10_000_000).unwrap();
    let (asker, answerer) = (socket::udp(client, 0).unwrap(), socket::udp(backend, PORT).unwrap());
    asker.connect(front).unwrap();
    for round in 0..20 {
        ask(&asker, &answerer, &format!("datagram {round} to {front}")).unwrap();
    }
    far.peer_addr().unwrap().ip()
}
