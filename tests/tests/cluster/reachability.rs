//! Who reaches whom.

use loden_tests::cluster::{Cluster, Plan};

use crate::{assert_all_reach_all, show_logs};

fn assert_reachable(plan: &Plan, args: &[&str]) -> Cluster {
    let mut cluster = Cluster::start(plan, args).unwrap();
    show_logs(&cluster);
    let containers = cluster.run_containers(2).unwrap();
    assert_all_reach_all(&containers);
    cluster
}

#[test]
fn every_container_reaches_every_other_with_its_own_address() {
    assert_reachable(&Plan::default(), &[]);
}

#[test]
fn without_the_programs_the_same_containers_are_reached() {
    assert_reachable(&Plan::default(), &["--datapath=kernel"]);
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

#[test]
fn containers_reach_each_other_where_docker_drops_what_is_forwarded() {
    let mut cluster = Cluster::start(&Plan::default(), &[]).unwrap();
    for node in &cluster.nodes {
        node.docker_firewall().unwrap();
    }
    let containers = cluster.run_containers(1).unwrap();
    assert_all_reach_all(&containers);
}
