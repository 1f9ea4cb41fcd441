//! Who reaches whom.

use loden_tests::{
    cluster::{Cluster, Plan},
    each_plan,
    node::Node,
};
use serde_json::Value;

use crate::{assert_all_reach_all, show_logs, wait_for_all_to_answer};

each_plan!(
    every_container_reaches_every_other_with_its_own_address,
    without_the_programs_the_same_containers_are_reached,
    containers_reach_each_other_where_docker_drops_what_is_forwarded,
);

fn assert_reachable(plan: &Plan, args: &[&str]) -> Cluster {
    let mut cluster = Cluster::start(plan, args).unwrap();
    show_logs(&cluster);
    let containers = cluster.run_containers(2).unwrap();
    wait_for_all_to_answer(&containers);
    assert_all_reach_all(&containers);
    cluster
}

fn three(plan: &Plan) -> Plan {
    Plan { nodes: 3, ..plan.clone() }
}

fn every_container_reaches_every_other_with_its_own_address(plan: &Plan) {
    assert_reachable(&three(plan), &[]);
}

fn without_the_programs_the_same_containers_are_reached(plan: &Plan) {
    assert_reachable(&three(plan), &["--datapath=kernel"]);
}

#[test]
fn the_leases_in_etcd_are_those_of_the_subnet_files() {
    let cluster = Cluster::start(&Plan::default(), &[]).unwrap();
    let mut promised: Vec<String> = cluster
        .nodes
        .iter()
        .map(|node| {
            let env = node.subnet_env().unwrap();
            assert_eq!(env.network().to_string(), "10.5.0.0/16");
            assert_eq!(env.mtu, 1450);
            let base = env.subnet().network();
            assert_eq!(
                u32::from(env.subnet().addr()),
                u32::from(base) + 1,
                "the bridge has the first address"
            );
            format!("/coreos.com/network/subnets/{base}-{}", env.subnet().prefix_len())
        })
        .collect();
    promised.sort();
    let leases = cluster.leases().unwrap();
    let keys: Vec<String> = leases.iter().map(|(key, _)| key.clone()).collect();
    assert_eq!(keys, promised);
    for node in &cluster.nodes {
        let public = format!(r#""PublicIP":"{}""#, node.address());
        assert_eq!(leases.iter().filter(|(_, value)| value.contains(&public)).count(), 1, "{leases:?}");
    }
}

#[test]
fn a_config_of_one_line_works_on_hosts_inside_the_network_itself() {
    let plan = Plan {
        config: r#"{"Network":"192.168.0.0/16"}"#.to_owned(),
        underlay: "192.168.163.0/24".parse().unwrap(),
        ..Plan::default()
    };
    let cluster = assert_reachable(&plan, &[]);
    for node in &cluster.nodes {
        let subnet = node.subnet_env().unwrap().subnet();
        assert!(
            !plan.underlay.contains(&subnet.addr()),
            "{} has the hosts' own subnet {subnet}",
            node.name()
        );
    }
}

/// Scopes of the routes to the peers, as iproute2 shows them; it leaves out that of flannel's.
fn scopes(node: &Node) -> Vec<String> {
    let routes = node.netns().ip("-json route show dev flannel.1 proto 76").unwrap();
    let routes: Vec<Value> = serde_json::from_str(&routes).unwrap();
    routes.iter().map(|route| route["scope"].as_str().unwrap_or("global").to_owned()).collect()
}

#[test]
fn subnets_far_apart_in_a_large_network_are_reached_by_routes_of_other_scopes() {
    let config = r#"{"Network":"10.0.0.0/8","SubnetMin":"10.130.0.0","SubnetMax":"10.131.255.0"}"#;
    for datapath in ["auto", "kernel"] {
        let plan = Plan { config: config.to_owned(), ..Plan::default() };
        let mut cluster = assert_reachable(&plan, &[&format!("--datapath={datapath}")]);
        let node = &mut cluster.nodes[0];
        assert_eq!(scopes(node), ["65"; 2], "subnets 33 280 to 33 791 of the network");
        node.stop_agent().unwrap();
        let file = node.subnet_file().display().to_string();
        node.loden(&["cleanup", "--keep-kernel", "--subnet-file", &file]).unwrap();
        let handed_back = node.netns().ip("route show dev flannel.1").unwrap();
        assert_eq!(handed_back.matches(" onlink").count(), 2, "{handed_back}");
        assert!(!handed_back.contains("scope"), "as flannel's: {handed_back}");
    }
}

fn containers_reach_each_other_where_docker_drops_what_is_forwarded(plan: &Plan) {
    let mut cluster = Cluster::start(&three(plan), &[]).unwrap();
    for node in &cluster.nodes {
        node.docker_firewall().unwrap();
    }
    let containers = cluster.run_containers(1).unwrap();
    wait_for_all_to_answer(&containers);
    assert_all_reach_all(&containers);
}
