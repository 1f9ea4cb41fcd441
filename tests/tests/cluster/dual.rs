//! Dual stack: both families between the containers of two nodes, IPv4 by the programs and IPv6 by the kernel.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv6Addr, TcpListener, TcpStream},
    time::Duration,
};

use loden_tests::{
    cluster::{Cluster, PREFIX, Plan},
    container::Container,
    counters::Counters,
    netns::Netns,
    node::Node,
    process::wait_for,
    traffic::stream::{self, Until},
};

const LIMIT: Duration = Duration::from_secs(10);

fn plan(backend: &str, nodes: u32) -> Plan {
    let config = format!(
        r#"{{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{{{backend}}}}}"#
    );
    Plan { nodes, config, ..Plan::default() }
}

fn underlay_address(node: &Node) -> String {
    format!("fd77::{}", node.address().octets()[3])
}

fn give_underlay_address(node: &Node) {
    node.netns().ip(&format!("-6 address add {}/64 dev eth0 nodad", underlay_address(node))).unwrap();
}

/// Nodes with agents, and a container on each that has an address of either family.
fn start(plan: &Plan) -> (Cluster, Vec<(Container, Ipv6Addr)>) {
    let mut cluster = Cluster::create(plan).unwrap();
    for node in &mut cluster.nodes {
        give_underlay_address(node);
        node.start_agent(&["--ip-masq"]).unwrap();
    }
    let containers: Vec<_> = cluster.nodes.iter_mut().map(run_container).collect();
    for node in &cluster.nodes {
        for other in cluster.nodes.iter().filter(|other| other.name() != node.name()) {
            wait_for("the peer's routes", LIMIT, || has_route(node, &bridge(other)).then_some(())).unwrap();
        }
    }
    cluster.wait_for_routes().unwrap();
    // Nobody asks for a neighbour before its own link-local address is known to be its own alone: a second.
    for (from, to) in containers.iter().zip(containers.iter().skip(1)) {
        let ping = format!("ping -6 -n -q -c 1 -W 1 {}", to.1);
        wait_for("the first answer", LIMIT, || from.0.netns().exec(&ping).ok()).unwrap();
    }
    (cluster, containers)
}

/// `FLANNEL_IPV6_SUBNET`: the bridge's address.
fn bridge(node: &Node) -> String {
    let env = node.subnet_env().unwrap().text;
    let line = env.lines().find_map(|line| line.strip_prefix("FLANNEL_IPV6_SUBNET="));
    line.unwrap_or_else(|| panic!("no IPv6 subnet: {env}")).to_owned()
}

fn has_route(node: &Node, bridge: &str) -> bool {
    let subnet = bridge.strip_suffix("1/64").unwrap();
    !node.netns().ip(&format!("-6 route show {subnet}/64 proto 76")).unwrap().trim().is_empty()
}

fn run_container(node: &mut Node) -> (Container, Ipv6Addr) {
    node.make_bridge().unwrap();
    let container = node.run_container(2).unwrap();
    let address = container.address6().unwrap();
    (container, address)
}

fn ping6(from: &Netns, to: Ipv6Addr, options: &str) {
    from.exec(&format!("ping -6 -n -q -c 3 -i 0.05 -W 2 {options} {to}")).unwrap();
}

/// Bulk TCP over IPv6, every byte compared; the receiver sees the sender's own address.
fn transfer(from: &(Container, Ipv6Addr), to: &(Container, Ipv6Addr)) {
    let data: Vec<u8> = (0..20_000_000_u32).map(|n| (n % 65_521) as u8).collect();
    let listener = to.0.netns().run(|| TcpListener::bind((to.1, 0))).unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::scope(|scope| {
        let received = scope.spawn(|| {
            let (mut stream, peer) = listener.accept().unwrap();
            stream.set_read_timeout(Some(LIMIT)).unwrap();
            let mut received = Vec::with_capacity(data.len());
            stream.read_to_end(&mut received).unwrap();
            (received, peer)
        });
        let mut stream = from.0.netns().run(|| TcpStream::connect((to.1, port))).unwrap();
        stream.set_write_timeout(Some(LIMIT)).unwrap();
        stream.write_all(&data).unwrap();
        drop(stream);
        let (received, peer) = received.join().unwrap();
        assert!(received == data, "{} of {} bytes, or others than were sent", received.len(), data.len());
        assert_eq!(peer.ip(), from.1);
    });
}

#[test]
fn containers_reach_each_other_in_both_families() {
    let (cluster, containers) = start(&plan(r#""Type":"vxlan""#, 2));
    let (a, b) = (&containers[0], &containers[1]);
    for (key, value) in cluster.leases().unwrap() {
        let segment = key.rsplit('/').next().unwrap();
        let (v4, v6) = segment.split_once('&').expect("a dual-stack key");
        assert!(v4.starts_with("10.5.") && v4.ends_with(".0-24"), "{key}");
        assert!(v6.starts_with("fc00:0:0:") && v6.ends_with("::-64"), "{key}");
        let value: serde_json::Value = serde_json::from_str(&value).unwrap();
        assert!(value["PublicIPv6"].as_str().unwrap().starts_with("fd77::"), "{value}");
        assert!(value["BackendV6Data"]["VtepMAC"].is_string(), "{value}");
        assert_ne!(value["BackendV6Data"]["VtepMAC"], value["BackendData"]["VtepMAC"]);
    }
    let env = cluster.nodes[0].subnet_env().unwrap();
    assert!(env.text.contains("FLANNEL_IPV6_NETWORK=fc00::/48\n"), "{}", env.text);
    assert_eq!(env.mtu, 1430, "IPv6 takes 70 bytes of the underlay's 1500");

    // The whole of the MTU, and no byte more: 1430 less 40 of IPv6 and 8 of ICMPv6.
    ping6(a.0.netns(), b.1, "-M do -s 1382");
    ping6(cluster.nodes[0].netns(), b.1, "");
    transfer(a, b);
    transfer(b, a);
    let before = Counters::read(&cluster.nodes[0]).unwrap();
    stream::run(a.0.host(), b.0.host(), None, Until::Bytes(200_000_000)).unwrap();
    let counters = Counters::read(&cluster.nodes[0]).unwrap().since(&before);
    assert!(counters.get("fast_encap") > 100, "IPv4 stays on the fast path: {counters:?}");
}

#[test]
fn a_config_that_becomes_dual_stack_keeps_the_ipv4_subnet_and_back_again() {
    let mut cluster = Cluster::create(&Plan { nodes: 1, ..Plan::default() }).unwrap();
    give_underlay_address(&cluster.nodes[0]);
    let config = |cluster: &Cluster, json: &str| {
        cluster.etcd().ctl(&["put", &format!("{PREFIX}/config"), json]).unwrap();
    };
    let keys = |cluster: &Cluster| -> Vec<String> {
        cluster
            .leases()
            .unwrap()
            .into_iter()
            .map(|(key, _)| key.rsplit('/').next().unwrap().to_owned())
            .collect()
    };
    let restart = |cluster: &mut Cluster| {
        cluster.nodes[0].stop_agent().unwrap();
        cluster.nodes[0].start_agent(&[]).unwrap();
    };
    cluster.nodes[0].start_agent(&[]).unwrap();
    let v4 = keys(&cluster).remove(0);
    config(&cluster, &plan(r#""Type":"vxlan""#, 1).config);
    restart(&mut cluster);
    let dual = keys(&cluster);
    assert!(dual.len() == 1 && dual[0].starts_with(&format!("{v4}&fc00:0:0:")), "{v4} became {dual:?}");
    restart(&mut cluster);
    assert_eq!(keys(&cluster), dual, "both subnets are kept over a restart");
    config(&cluster, &Plan::default().config);
    restart(&mut cluster);
    assert_eq!(keys(&cluster), [v4]);
}
