//! Nodes that join late, agents that leave, and what is left then.

use std::collections::BTreeSet;

use loden_tests::{
    cluster::{Cluster, Plan},
    each_family, each_plan,
    family::Family,
    node::Node,
    traffic::stream,
};

use crate::{assert_all_reach_all, wait_for_all_to_answer};

/// Everything on a node that an agent could have changed, without counters and times.
fn state(node: &Node) -> BTreeSet<String> {
    let commands = [
        "ip -brief link show",
        "ip -4 -brief address show",
        "ip -6 -brief address show",
        "ip -4 route show table all",
        "ip -6 route show table all",
        "ip neigh show nud permanent",
        "iptables -S",
        "iptables -t nat -S",
        "ip6tables -S",
        "ip6tables -t nat -S",
        "nft list tables",
        "sysctl net.ipv4.ip_forward net.netfilter.nf_conntrack_tcp_be_liberal net.ipv4.conf.all.rp_filter",
        "sysctl net.ipv4.conf.eth0.rp_filter net.ipv4.conf.all.forwarding net.ipv4.conf.default.forwarding",
        "sysctl net.ipv6.conf.eth0.forwarding net.ipv6.conf.all.forwarding net.ipv6.conf.default.forwarding",
    ];
    let lines = |command: &&str| -> Vec<String> {
        let output = node.netns().exec(command).unwrap();
        output.lines().map(|line| format!("{command}: {}", line.trim())).collect()
    };
    commands.iter().flat_map(lines).collect()
}

fn clean_up(node: &Node, args: &[&str]) -> String {
    let file = node.subnet_file().display().to_string();
    node.loden(&[&["cleanup", "--subnet-file", &file], args].concat()).unwrap()
}

each_plan!(cleanup_leaves_a_node_as_it_was_before_the_agent, a_node_that_joins_later_is_reached_and_reaches,);
each_family!(
    a_lease_is_given_back_when_asked_and_kept_otherwise,
    cleanup_that_keeps_the_kernel_leaves_a_flannel_node_and_its_connections,
    cleanup_takes_the_routes_of_host_gw_and_none_of_another_agent,
);

fn a_lease_is_given_back_when_asked_and_kept_otherwise<F: Family>() {
    let mut cluster = Cluster::create(&F::alone()).unwrap();
    cluster.nodes[0].start_agent(&["--subnet-lease-release"]).unwrap();
    cluster.nodes[1].start_agent(&[]).unwrap();
    let kept = F::subnet(&cluster.nodes[1]).network().to_string();
    assert_eq!(cluster.leases().unwrap().len(), 2);
    for node in &mut cluster.nodes {
        assert!(node.stop_agent().unwrap().success());
    }
    let leases = cluster.leases().unwrap();
    assert!(leases.len() == 1 && leases[0].0.contains(&kept), "{leases:?}");
}

fn cleanup_leaves_a_node_as_it_was_before_the_agent(plan: &Plan) {
    let mut cluster = Cluster::create(plan).unwrap();
    let node = &mut cluster.nodes[0];
    // What others have set up, and what the tables are that iptables makes when it is first asked.
    node.docker_firewall().unwrap();
    node.netns().exec("iptables -t nat -A POSTROUTING -s 172.30.0.0/16 -j MASQUERADE").unwrap();
    node.netns().exec("ip6tables -t nat -A POSTROUTING -s fd99::/64 -j MASQUERADE").unwrap();
    node.netns().exec("nft add table inet operator").unwrap();
    node.netns().ip("route add blackhole 198.51.100.0/24").unwrap();
    let before = state(node);
    for node in &mut cluster.nodes {
        node.start_agent(&["--ip-masq"]).unwrap();
    }
    cluster.wait_for_routes().unwrap();
    let node = &mut cluster.nodes[0];
    assert!(state(node).len() > before.len(), "an agent that runs shows");
    assert!(node.stop_agent().unwrap().success());
    let said = clean_up(node, &[]);
    let after = state(node);
    let differences: Vec<_> = before.symmetric_difference(&after).collect();
    assert!(differences.is_empty(), "{differences:#?}\ncleanup said: {said}");
    assert!(!node.subnet_file().exists());
    assert_eq!(
        node.bpffs().read_dir().map_or(0, Iterator::count),
        0,
        "pins are left below {:?}",
        node.bpffs()
    );
}

fn cleanup_that_keeps_the_kernel_leaves_a_flannel_node_and_its_connections<F: Family>() {
    let (mut cluster, containers) = Cluster::start_with_containers(&F::alone(), &["--ip-masq"]).unwrap();
    for node in &cluster.nodes {
        node.docker_firewall().unwrap();
    }
    let (a, b) = (&containers[0], &containers[1]);
    let work = || {
        cluster.nodes[0].stop_agent().unwrap();
        clean_up(&cluster.nodes[0], &["--keep-kernel"]);
    };
    let ((), stream) = stream::during(F::host(a), F::host(b), work).unwrap();
    assert_eq!(stream.source, F::of(a).into());
    assert_all_reach_all(&containers);
    let node = cluster.nodes[0].netns();
    let (device, file) = (format!("link show {}", F::DEVICE), cluster.nodes[0].subnet_file());
    // What is flannel's now, another cleanup finds nothing to take of.
    let before = (node.ip(&device).unwrap(), std::fs::read(&file).unwrap());
    clean_up(&cluster.nodes[0], &[]);
    assert_eq!((node.ip(&device).unwrap(), std::fs::read(&file).unwrap()), before);
    let peer = F::subnet(&cluster.nodes[1]);
    let routes = node.ip(&format!("{} route show {peer} dev {}", F::FLAG, F::DEVICE)).unwrap();
    assert!(routes.contains("onlink") && !routes.contains("proto"), "as flannel's: {routes}");
    let rules = node.exec(&format!("{}-save", F::IPTABLES)).unwrap() + &node.exec("nft list tables").unwrap();
    assert!(rules.contains("-j FLANNEL-FWD") && rules.contains("-j FLANNEL-POSTRTG"), "{rules}");
    assert!(!rules.to_lowercase().contains("loden"), "{rules}");
}

fn cleanup_takes_the_routes_of_host_gw_and_none_of_another_agent<F: Family>() {
    let plan = F::plan();
    let plan = Plan { config: plan.config.replace("vxlan", "host-gw"), ..plan };
    let mut cluster = Cluster::start(&plan, &[]).unwrap();
    let via = F::of_node(&cluster, 1);
    let ours = F::subnet(&cluster.nodes[1]).to_string();
    let node = &mut cluster.nodes[0];
    let anothers = if F::IS_IPV4 { "10.6.7.0/24" } else { "fc01:0:0:7::/64" };
    let anothers = format!("{anothers} via {via} dev eth0");
    node.netns().ip(&format!("route add {anothers} proto 76")).unwrap();
    let routes = format!("{} route show proto 76", F::FLAG);
    assert!(node.netns().ip(&routes).unwrap().contains(&ours));
    node.stop_agent().unwrap();
    let said = clean_up(node, &[]);
    let left = node.netns().ip(&routes).unwrap();
    assert!(left.lines().count() == 1 && left.starts_with(&anothers), "{left}\ncleanup said: {said}");
}

#[test]
fn a_second_agent_on_a_node_ends_and_the_first_goes_on() {
    let mut cluster = Cluster::start(&Plan { nodes: 2, ..Plan::default() }, &[]).unwrap();
    let node = &cluster.nodes[0];
    let (etcd, file) = (cluster.etcd().endpoint(), node.subnet_file().display().to_string());
    let before = (state(node), cluster.leases().unwrap());
    let error = node.loden(&["agent", "--etcd-endpoints", &etcd, "--subnet-file", &file]).unwrap_err();
    assert!(format!("{error:#}").contains("agent"), "it says why: {error:#}");
    assert_eq!((state(node), cluster.leases().unwrap()), before);
    let containers = cluster.run_containers(1).unwrap();
    assert_all_reach_all(&containers);
}

fn a_node_that_joins_later_is_reached_and_reaches(plan: &Plan) {
    let mut cluster = Cluster::start(plan, &[]).unwrap();
    let node = cluster.add_node().unwrap();
    node.start_agent(&[]).unwrap();
    node.make_bridge().unwrap();
    cluster.wait_for_routes().unwrap();
    let containers = cluster.run_containers(1).unwrap();
    assert_eq!(containers.len(), 3);
    wait_for_all_to_answer(&containers);
    assert_all_reach_all(&containers);
}
