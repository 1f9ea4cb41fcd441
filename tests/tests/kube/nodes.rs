//! Agents in namespaces with leases from the Kubernetes API, and containers that talk to each other.

use std::{fs, time::Duration};

use ipnet::Ipv4Net;
use loden_tests::{
    cluster::{Cluster, Plan},
    counters::Share,
    flannel::{FlannelNode, Half},
    netns::Netns,
    process::wait_for,
    traffic::{
        self, ping,
        stream::{self, Until},
    },
};

use crate::server::Server;

/// Where the API is on the underlay.
const API: u32 = 6;
const LIMIT: Duration = Duration::from_secs(20);

/// Nodes, and the API that gives them their subnets.
struct Kube {
    server: Server,
    cluster: Cluster,
    // Only held: the server is inside.
    _netns: Netns,
    args: Vec<String>,
}

impl Kube {
    /// Starts no agent; the API knows no node.
    fn create(nodes: u32) -> Self {
        Self::create_as(&Plan { nodes, ..Plan::default() }, crate::source::CONFIG)
    }

    /// The same on this underlay and with this network config.
    fn create_as(plan: &Plan, config_text: &str) -> Self {
        let cluster = Cluster::create(plan).unwrap();
        let netns = Netns::create("api").unwrap();
        let address = cluster.underlay().plug(&netns, API).unwrap();
        let server = Server::inside(&netns, address);
        let config = cluster.directory().join("net-conf.json");
        fs::write(&config, config_text).unwrap();
        let args = vec![
            "--kube-subnet-mgr".to_owned(),
            format!("--kube-api-url={}", server.url()),
            format!("--net-config-path={}", config.display()),
        ];
        Self { server, cluster, _netns: netns, args }
    }

    /// Registers every node with a subnet and starts its agent.
    fn start(nodes: u32) -> Self {
        let mut kube = Self::create(nodes);
        for n in 0..nodes as usize {
            kube.register(n);
            kube.start_agent(n);
            kube.cluster.nodes[n].make_bridge().unwrap();
        }
        kube.cluster.wait_for_routes().unwrap();
        kube
    }

    fn register(&mut self, n: usize) {
        self.register_with(n, &format!("10.244.{}.0/24", n + 1));
    }

    fn register_with(&mut self, n: usize, pod_cidrs: &str) {
        let node = &mut self.cluster.nodes[n];
        node.set_env("NODE_NAME", node.name().to_owned().as_str());
        self.server.store().add_node(node.name(), Some(pod_cidrs));
    }

    fn start_agent(&mut self, n: usize) {
        let args: Vec<&str> = self.args.iter().map(String::as_str).collect();
        self.cluster.nodes[n].start_agent(&args).unwrap();
    }

    fn launch_agent(&mut self, n: usize) {
        let args: Vec<&str> = self.args.iter().map(String::as_str).collect();
        self.cluster.nodes[n].launch_agent(&args).unwrap();
    }

    fn show_logs(&self) {
        for node in &self.cluster.nodes {
            println!("--- {}\n{}", node.name(), node.log());
        }
    }

    /// Waits until a node's log says something.
    fn until_log(&self, n: usize, says: &str) {
        wait_for(says, LIMIT, || self.cluster.nodes[n].log().contains(says).then_some(()))
            .unwrap_or_else(|error| panic!("{error:#}: {}", self.cluster.nodes[n].log()));
    }
}

fn subnet(n: u8) -> Ipv4Net {
    Ipv4Net::new([10, 244, n, 0].into(), 24).unwrap()
}

fn until_route(kube: &Kube, n: usize, to: Ipv4Net, there: bool) {
    let node = &kube.cluster.nodes[n];
    wait_for(&format!("route to {to}: {there}"), LIMIT, || {
        (node.has_route(to).unwrap() == there).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", node.log()));
}

#[test]
fn containers_reach_each_other_in_both_families_with_pod_cidrs_of_both() {
    let config = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/48","Backend":{"Type":"vxlan"}}"#;
    let mut kube = Kube::create_as(&Plan { nodes: 2, ..Plan::dual() }, config);
    for n in 0..2 {
        kube.register_with(n, &format!("10.244.{0}.0/24,fd00:244:0:{0}::/64", n + 1));
        kube.start_agent(n);
        kube.cluster.nodes[n].make_bridge().unwrap();
    }
    kube.cluster.wait_for_routes().unwrap();
    let env = kube.cluster.nodes[0].subnet_env().unwrap();
    assert!(
        env.text.contains("FLANNEL_IPV6_NETWORK=fd00:244::/48\nFLANNEL_IPV6_SUBNET=fd00:244:0:1::1/64\n")
    );
    let containers = kube.cluster.run_containers(1).unwrap();
    let other = "fd00:244:0:2::/64".parse::<ipnet::Ipv6Net>().unwrap();
    wait_for("the peer's IPv6 route", LIMIT, || {
        kube.cluster.nodes[0].has_route(other).unwrap().then_some(())
    })
    .unwrap();
    kube.show_logs();
    for (from, to) in [(0, 1), (1, 0)] {
        let (from, to) = (&containers[from], &containers[to]);
        for (from, to) in [(from.host(), to.host()), (from.host6().unwrap(), to.host6().unwrap())] {
            let stream = stream::run(from, to, None, Until::Bytes(20_000_000)).unwrap();
            assert_eq!((stream.bytes, stream.source), (20_000_000, from.address));
        }
    }
    // A MAC of each family is known to the API, and outlives the device.
    let said = |end: &str| kube.server.annotation("n1", end).unwrap();
    assert_eq!(said("public-ipv6"), "fd77::b");
    let before = said("backend-v6-data");
    kube.cluster.nodes[0].stop_agent().unwrap();
    kube.cluster.nodes[0].netns().ip("link delete flannel-v6.1").unwrap();
    kube.start_agent(0);
    assert_eq!(kube.server.annotation("n1", "backend-v6-data").unwrap(), before);
}

#[test]
fn containers_reach_each_other_on_the_fast_path_and_nothing_is_asked_of_etcd() {
    let mut kube = Kube::start(2);
    for n in 1..=2_u8 {
        let env = kube.cluster.nodes[usize::from(n) - 1].subnet_env().unwrap();
        assert_eq!((env.network().to_string().as_str(), env.subnet().trunc()), ("10.244.0.0/16", subnet(n)));
        let name = format!("n{n}");
        kube.server.until("NetworkUnavailable=False", |store| {
            store.condition(&name, "NetworkUnavailable").unwrap()["status"] == "False"
        });
    }
    assert_eq!(kube.cluster.leases().unwrap(), []);
    let containers = kube.cluster.run_containers(1).unwrap();
    kube.show_logs();
    let (a, b) = (&containers[0], &containers[1]);
    ping(a.netns(), b.address(), 20).unwrap();
    for (from, to) in [(a, b), (b, a)] {
        let work = || stream::run(from.host(), to.host(), None, Until::Bytes(100_000_000));
        let (stream, share) = Share::during(&kube.cluster.nodes, &[a, b], work).unwrap();
        assert_eq!((stream.bytes, stream.source), (100_000_000, from.address().into()));
        assert!(share.smaller() >= 0.99, "{share:?}");
    }
    let status = kube.cluster.nodes[0].status().unwrap();
    assert_eq!(
        (status["etcd"]["source"].as_str(), status["etcd"]["connected"].as_bool()),
        (Some("kubernetes"), Some(true))
    );
}

#[test]
fn nodes_join_and_leave_and_a_flannel_node_stands_beside_ours() {
    let mut kube = Kube::start(2);
    let netns = Netns::create("flannel").unwrap();
    let address = kube.cluster.underlay().plug(&netns, 31).unwrap();
    let half = Half::new(address.into(), subnet(31).into());
    let mut flannel = FlannelNode::create(netns, vec![half], kube.cluster.etcd()).unwrap();
    kube.server.store().add_node("flannel", Some("10.244.31.0/24"));
    kube.server.store().annotate_as_flannel("flannel", &address.to_string(), &flannel.halves()[0].mac);
    for n in 0..2 {
        until_route(&kube, n, subnet(31), true);
        // flannel reads what we have written, and nothing else.
        let name = format!("n{}", n + 1);
        let public_ip = kube.server.annotation(&name, "public-ip").unwrap().parse().unwrap();
        let data: serde_json::Value =
            serde_json::from_str(&kube.server.annotation(&name, "backend-data").unwrap()).unwrap();
        let theirs = Ipv4Net::new([10, 244, n as u8 + 1, 0].into(), 24).unwrap();
        let mac = data["VtepMAC"].as_str().unwrap().to_owned();
        flannel.add_peer(&[Half { address: public_ip, subnet: theirs.into(), mac }], false).unwrap();
    }
    let mut containers = kube.cluster.run_containers(1).unwrap();
    containers.push(flannel.run_container().unwrap());
    kube.show_logs();
    for (from, to) in [(0, 2), (2, 1), (1, 0)] {
        let (from, to) = (&containers[from], &containers[to]);
        assert_eq!(traffic::hello(from.host(), to.host(), None).unwrap(), from.address());
    }
    // One leaves, and one comes.
    kube.server.store().delete_node("flannel");
    for n in 0..2 {
        until_route(&kube, n, subnet(31), false);
    }
    kube.cluster.add_node().unwrap();
    kube.register(2);
    kube.start_agent(2);
    kube.cluster.nodes[2].make_bridge().unwrap();
    kube.cluster.wait_for_routes().unwrap();
    let newcomer = kube.cluster.nodes[2].run_container(2).unwrap();
    assert_eq!(traffic::hello(containers[0].host(), newcomer.host(), None).unwrap(), containers[0].address());
}

#[test]
fn an_api_that_is_away_stops_no_packet_and_no_restart_loses_one() {
    let mut kube = Kube::start(2);
    let containers = kube.cluster.run_containers(1).unwrap();
    let (a, b) = (&containers[0], &containers[1]);
    ping(a.netns(), b.address(), 20).unwrap();
    kube.server.stop();
    wait_for("it notices", LIMIT, || {
        (kube.cluster.nodes[0].status().ok()?["etcd"]["connected"] == false).then_some(())
    })
    .unwrap();
    assert_eq!(kube.cluster.nodes[0].status().unwrap()["ready"], true);
    let work = || stream::run(a.host(), b.host(), None, Until::Bytes(50_000_000));
    let (_, share) = Share::during(&kube.cluster.nodes, &[a, b], work).unwrap();
    assert!(share.smaller() >= 0.99, "{share:?}");

    // An agent that starts meanwhile waits, and takes nothing down.
    kube.cluster.nodes[0].kill_agent();
    kube.launch_agent(0);
    kube.until_log(0, "no subnet for this node yet, trying every second: Kubernetes: cannot get a node");
    assert!(kube.cluster.nodes[0].has_route(subnet(2)).unwrap());
    assert_eq!(traffic::hello(a.host(), b.host(), None).unwrap(), a.address());
    kube.server.start();
    wait_for("it is ready", LIMIT, || (kube.cluster.nodes[0].status().ok()?["ready"] == true).then_some(()))
        .unwrap();
    assert_eq!(traffic::hello(b.host(), a.host(), None).unwrap(), b.address());
}

#[test]
fn overwrites_and_changed_macs_reach_the_kernel_and_our_mac_outlives_the_device() {
    let mut kube = Kube::start(2);
    let fdb = |kube: &Kube| kube.cluster.nodes[0].netns().exec("bridge fdb show dev flannel.1").unwrap();
    kube.server.store().annotate("n2", "public-ip-overwrite", Some("203.0.113.2"));
    wait_for("the overwrite", LIMIT, || fdb(&kube).contains("dst 203.0.113.2").then_some(())).unwrap();
    kube.server.store().annotate("n2", "public-ip-overwrite", None);
    let own = kube.cluster.nodes[1].address().to_string();
    wait_for("the own address", LIMIT, || fdb(&kube).contains(&format!("dst {own}")).then_some(())).unwrap();

    let mac = |kube: &Kube| kube.server.annotation("n2", "backend-data").unwrap();
    let before = mac(&kube);
    kube.cluster.nodes[1].kill_agent();
    kube.cluster.nodes[1].netns().ip("link del flannel.1").unwrap();
    let writes = kube.server.store().asked("PATCH /api/v1/nodes/n2").len();
    kube.start_agent(1);
    assert_eq!(mac(&kube), before);
    let link = kube.cluster.nodes[1].netns().ip("link show flannel.1").unwrap();
    let data: serde_json::Value = serde_json::from_str(&before).unwrap();
    assert!(link.contains(data["VtepMAC"].as_str().unwrap()), "{link}");
    kube.server
        .until("the condition once more", |store| store.asked("PATCH /api/v1/nodes/n2").len() > writes);
    let store = kube.server.store();
    let bodies = &store.asked("PATCH /api/v1/nodes/n2")[writes..];
    assert!(bodies.iter().all(|request| !request.body.contains("backend-data")), "{bodies:#?}");
}

#[test]
fn an_agent_waits_for_its_subnet_says_so_and_refuses_one_from_elsewhere() {
    let mut kube = Kube::create(1);
    kube.cluster.nodes[0].set_env("NODE_NAME", "n1");
    kube.launch_agent(0);
    kube.until_log(0, "Kubernetes has no node");
    kube.server.store().add_node("n1", None);
    kube.until_log(0, "it has no podCIDR yet: kube-controller-manager");
    kube.server.store().annotate("n1", "node-public-ip", Some("192.168.64.99"));
    kube.cluster.nodes[0].netns().ip("address add 192.168.64.99/24 dev eth0").unwrap();
    kube.server.store().change("n1", |node| node["spec"]["podCIDR"] = "10.244.7.0/24".into());
    wait_for("it is ready", LIMIT, || (kube.cluster.nodes[0].status().ok()?["ready"] == true).then_some(()))
        .unwrap();
    assert_eq!(kube.cluster.nodes[0].subnet_env().unwrap().subnet().trunc(), subnet(7));
    assert_eq!(kube.server.annotation("n1", "public-ip").unwrap(), "192.168.64.99");

    kube.cluster.nodes[0].stop_agent().unwrap();
    kube.server.store().change("n1", |node| node["spec"]["podCIDR"] = "10.9.7.0/24".into());
    kube.launch_agent(0);
    kube.until_log(0, "its podCIDR 10.9.7.0/24 is outside of the network 10.244.0.0/16");
}

#[test]
fn five_thousand_nodes_fit_into_an_agent() {
    let mut kube = Kube::create(1);
    fs::write(kube.cluster.directory().join("net-conf.json"), r#"{"Network":"10.128.0.0/9"}"#).unwrap();
    kube.cluster.nodes[0].set_env("NODE_NAME", "n1");
    kube.server.store().add_node("n1", Some("10.128.0.0/24"));
    kube.args.push("--datapath=kernel".into());
    kube.start_agent(0);
    let memory = |kube: &Kube| -> u64 {
        let pid = kube.cluster.nodes[0].agent_id().unwrap();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let kib = |key: &str| {
            status.lines().find_map(|line| line.strip_prefix(key)?.split_whitespace().next()?.parse().ok())
        };
        println!("VmRSS {:?} VmHWM {:?} kB", kib("VmRSS:"), kib("VmHWM:"));
        kib("VmHWM:").unwrap()
    };
    let alone = memory(&kube);
    kube.cluster.nodes[0].stop_agent().unwrap();
    for n in 1..=5000_u32 {
        let (name, [_, _, c, d]) = (format!("worker-{n}"), n.to_be_bytes());
        let mut store = kube.server.store();
        store.add_node(&name, Some(&format!("10.{}.{d}.0/24", 128 + c)));
        store.annotate_as_flannel(&name, &format!("172.16.{c}.{d}"), &format!("02:00:00:00:{c:02x}:{d:02x}"));
        store.fatten(&name);
    }
    let start = std::time::Instant::now();
    kube.start_agent(0);
    wait_for("all routes", Duration::from_secs(60), || {
        let routes = kube.cluster.nodes[0].netns().ip("route show dev flannel.1").ok()?;
        (routes.lines().count() == 5000).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", kube.cluster.nodes[0].log()));
    println!("5000 peers after {:?}", start.elapsed());
    let all = memory(&kube);
    assert!(
        all - alone < 64 << 10,
        "{} kB more than with one node: whole nodes would take 75 MB as text alone",
        all - alone
    );
}
