//! Who gets which subnet.

use std::{collections::BTreeSet, time::Duration};

use futures::future::join_all;
use ipnet::{Ipv4Net, Ipv6Net};
use loden_agent::{
    family::{Family as _, V4},
    network::NetworkConfig,
    registry::{Claim, ClaimError},
};
use loden_tests::etcd::Etcd;

use crate::node::*;

/// Exactly fifty subnets.
const FIFTY: &str = r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.1.0","SubnetMax":"10.5.50.0"}"#;

fn etcd_lease(etcd: &Etcd, subnet: Ipv4Net) -> i64 {
    let fields = etcd.ctl(&["get", &key(subnet), "--write-out", "fields"]).unwrap();
    let line = fields.lines().find(|line| line.starts_with("\"Lease\"")).expect("the key is there");
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

fn etcd_leases(etcd: &Etcd) -> usize {
    etcd.ctl(&["lease", "list"]).unwrap().lines().filter(|line| !line.starts_with("found")).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_nodes_that_race_for_fifty_subnets_get_one_each() {
    let etcd = etcd_with(FIFTY);
    let nodes = join_all((1..=50).map(|number| {
        let etcd = &etcd;
        async move { Node::join(&connect(etcd).await, claim(number)).await.unwrap() }
    }))
    .await;
    let subnets: BTreeSet<_> = nodes.iter().map(|node| node.lease.subnet()).collect();
    assert_eq!(subnets.len(), 50);
    assert_eq!(etcd_leases(&etcd), 50, "no etcd lease of a lost race is left behind");

    let registry = connect(&etcd).await;
    let error = Node::join(&registry, claim(51)).await.map(|_| ()).unwrap_err();
    assert!(matches!(error, ClaimError::OutOfSubnets { leases: 50, .. }), "{error}");
    assert_eq!(
        error.to_string(),
        "out of subnets: every /24 from 10.5.1.0 to 10.5.50.0 of 10.5.0.0/16 overlaps one of 50 leases; enlarge Network, raise SubnetLen, or delete leases of nodes that are gone"
    );

    let leaver = nodes.into_iter().nth(17).unwrap();
    let freed = leaver.lease.subnet();
    leaver.keeper.release().await.unwrap();
    assert_eq!(Node::join(&registry, claim(51)).await.unwrap().lease.subnet(), freed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_with_two_configs_of_different_length_never_overlap() {
    let etcd = etcd_with(CONFIG);
    let config = |text| NetworkConfig::parse(text).unwrap();
    // Room for five /22, or for twenty /24: they meet all the time.
    let long = config(r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.4.0","SubnetMax":"10.5.23.0"}"#);
    let short =
        config(r#"{"Network":"10.5.0.0/16","SubnetLen":22,"SubnetMin":"10.5.4.0","SubnetMax":"10.5.20.0"}"#);
    let claims = (1..=30_u8).map(|number| {
        let (etcd, config) = (&etcd, if number % 3 == 0 { &short } else { &long });
        async move { connect(etcd).await.claim(config, &claim(number)).await }
    });
    let mut subnets = Vec::new();
    for lease in join_all(claims).await {
        match lease {
            Ok(lease) => subnets.push(lease.subnet()),
            Err(ClaimError::OutOfSubnets { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    assert!(subnets.len() >= 5, "{subnets:?}");
    for (n, a) in subnets.iter().enumerate() {
        for b in &subnets[n + 1..] {
            assert!(!V4::overlap(*a, *b), "{a} and {b}");
        }
    }
}

#[tokio::test]
async fn a_node_comes_back_to_its_subnet_by_its_public_ip() {
    let etcd = etcd_with(CONFIG);
    let node = Node::start(&etcd, 1).await;
    let (subnet, first) = (node.lease.subnet(), node.lease.etcd_lease.unwrap());
    drop(node);
    let again = Claim { attrs: vxlan(1, 99), ..claim(1) };
    let node = Node::join(&connect(&etcd).await, again).await.unwrap();
    assert_eq!(node.lease.subnet(), subnet);
    assert!(
        etcd.ctl(&["get", &key(subnet)]).unwrap().contains("02:00:00:00:00:63"),
        "its value is the new one"
    );
    assert_ne!(node.lease.etcd_lease, Some(first));
    assert_eq!(etcd_leases(&etcd), 1, "the old etcd lease is given back");
}

#[tokio::test]
async fn an_old_etcd_lease_that_other_keys_live_by_is_left_alone() {
    let etcd = etcd_with(CONFIG);
    let granted = etcd.ctl(&["lease", "grant", "60"]).unwrap();
    let id = granted.split_whitespace().nth(1).unwrap();
    etcd.ctl(&["put", &key(net("10.5.9.0/24")), &attrs(1).to_json(), "--lease", id]).unwrap();
    etcd.ctl(&["put", "/other/key", "stays", "--lease", id]).unwrap();
    let node = Node::start(&etcd, 1).await;
    assert_eq!(node.lease.subnet(), net("10.5.9.0/24"));
    assert!(etcd.ctl(&["get", "/other/key"]).unwrap().contains("stays"));
}

#[tokio::test]
async fn the_previous_subnet_is_taken_where_it_is_free_and_allowed() {
    let etcd = etcd_with(CONFIG);
    let registry = connect(&etcd).await;
    let with = |number, previous| Claim { previous: Some(net(previous)), ..claim(number) };
    let first = Node::join(&registry, with(1, "10.5.200.1/24")).await.unwrap();
    assert_eq!(first.lease.subnet(), net("10.5.200.0/24"));
    for taken_or_wrong in ["10.5.200.0/24", "10.5.200.0/25", "10.6.1.0/24", "10.5.0.0/24"] {
        let other = Node::join(&registry, with(2, taken_or_wrong)).await.unwrap();
        assert!(
            other.lease.subnet() != net(taken_or_wrong)
                && !V4::overlap(other.lease.subnet(), first.lease.subnet())
        );
        other.keeper.release().await.unwrap();
    }
}

#[tokio::test]
async fn a_node_keeps_its_subnet_though_its_pods_have_addresses_and_routes_of_their_own() {
    let etcd = etcd_with(r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48"}"#);
    let dual = || Claim { attrs: attrs(1).with_v6("fd77::1".parse().unwrap(), None), ..claim(1) };
    let had = Node::join(&connect(&etcd).await, dual()).await.unwrap().lease.key;
    let (v4, v6) = (had.subnet.unwrap(), had.subnet_v6.unwrap());
    // Its bridge, and what the CNI plugin ptp makes for each pod.
    let pod = |n| Ipv4Net::new(v4.hosts().nth(n).unwrap(), 32).unwrap();
    let pod_v6 = |n| Ipv6Net::new(v6.hosts().nth(n).unwrap(), 128).unwrap();
    let mut again = Claim { bridges: vec![v4, pod(0), pod(7)], ..dual() };
    again.v6.bridges = vec![v6, pod_v6(0), pod_v6(7)];
    let node = Node::join(&connect(&etcd).await, again).await.unwrap();
    assert_eq!(node.lease.key, had);
}

#[tokio::test]
async fn a_changed_public_ip_keeps_the_subnet_where_the_vtep_mac_proves_whose_it_is() {
    let etcd = etcd_with(CONFIG);
    let registry = connect(&etcd).await;
    let old = Node::start(&etcd, 1).await.lease;
    let moved = Claim { attrs: vxlan(2, 1), previous: Some(old.subnet()), ..claim(2) };
    let lease = Node::join(&registry, moved).await.unwrap().lease;
    assert_eq!((lease.subnet(), number(&lease.attrs)), (old.subnet(), 2));
    assert_eq!(etcd_leases(&etcd), 1);

    let stranger = Claim { attrs: vxlan(3, 3), previous: Some(old.subnet()), ..claim(3) };
    let lease = Node::join(&registry, stranger).await.unwrap().lease;
    assert_ne!(lease.subnet(), old.subnet(), "a subnet.env alone proves nothing");
    let guesser = Claim { attrs: vxlan(4, 1), previous: None, ..claim(4) };
    let lease = Node::join(&registry, guesser).await.unwrap().lease;
    assert_ne!(lease.subnet(), old.subnet(), "nor does a MAC alone");
}

#[tokio::test]
async fn nodes_that_have_swapped_their_addresses_keep_their_subnets() {
    let etcd = etcd_with(CONFIG);
    let registry = connect(&etcd).await;
    let one = Node::join(&registry, claim(1)).await.unwrap().lease.subnet();
    let two = Node::join(&registry, claim(2)).await.unwrap().lease.subnet();
    for (ip, mac, subnet) in [(2, 1, one), (1, 2, two)] {
        let swapped = Claim { attrs: vxlan(ip, mac), previous: Some(subnet), ..claim(ip) };
        assert_eq!(Node::join(&registry, swapped).await.unwrap().lease.subnet(), subnet);
    }
    assert_eq!(etcd_leases(&etcd), 2);
}

#[tokio::test]
async fn a_reservation_is_used_and_stays_one() {
    let etcd = etcd_with(CONFIG);
    let reserved = net("10.5.77.0/24");
    // As in flannel's Documentation/reservations.md: a plain put.
    etcd.ctl(&["put", &key(reserved), r#"{"PublicIP":"10.0.0.1","PublicIPv6":null}"#]).unwrap();
    let stranger = Node::start(&etcd, 2).await;
    assert_ne!(stranger.lease.subnet(), reserved);
    let node = Node::start(&etcd, 1).await;
    assert_eq!((node.lease.subnet(), node.lease.etcd_lease), (reserved, None));
    assert_eq!(etcd_lease(&etcd, reserved), 0);
    assert!(etcd.ctl(&["get", &key(reserved)]).unwrap().contains(&attrs(1).to_json()));
    node.keeper.release().await.unwrap();
    assert_eq!(etcd_lease(&etcd, reserved), 0, "released, it is still reserved");
    assert_eq!(etcd_leases(&etcd), 1, "only the stranger's");
}

#[tokio::test]
async fn a_reservation_wins_over_a_lease_of_the_same_node() {
    let etcd = etcd_with(CONFIG);
    let first = Node::start(&etcd, 1).await.lease.subnet();
    let reserved = net("10.5.250.0/24");
    etcd.ctl(&["put", &key(reserved), r#"{"PublicIP":"10.0.0.1"}"#]).unwrap();
    let again = Claim { previous: Some(first), ..claim(1) };
    assert_eq!(Node::join(&connect(&etcd).await, again).await.unwrap().lease.subnet(), reserved);
}

#[tokio::test]
async fn a_lease_that_the_config_no_longer_allows_is_replaced_but_a_reservation_is_not_deleted() {
    let etcd = etcd_with(CONFIG);
    let id = etcd.ctl(&["lease", "grant", "60"]).unwrap();
    let id = id.split_whitespace().nth(1).unwrap();
    let (leased, reserved) = (net("10.5.16.0/20"), net("10.5.32.0/20"));
    etcd.ctl(&["put", &key(leased), &attrs(1).to_json(), "--lease", id]).unwrap();
    etcd.ctl(&["put", &key(reserved), &attrs(1).to_json()]).unwrap();
    let node = Node::start(&etcd, 1).await;
    assert_eq!(node.lease.subnet().prefix_len(), 24);
    assert!(!V4::overlap(node.lease.subnet(), reserved));
    assert_eq!(etcd.ctl(&["get", &key(leased)]).unwrap(), "");
    assert_ne!(etcd.ctl(&["get", &key(reserved)]).unwrap(), "");
}

#[tokio::test]
async fn no_subnet_overlaps_a_prefix_of_this_host_or_a_key_with_a_broken_value() {
    let etcd =
        etcd_with(r#"{"Network":"192.168.0.0/16","SubnetMin":"192.168.159.0","SubnetMax":"192.168.163.0"}"#);
    // flannel reads this as a lease of 192.168.159.0/24.
    etcd.ctl(&["put", &format!("{PREFIX}/subnets/old/192.168.159.7-24"), "broken"]).unwrap();
    etcd.ctl(&["put", &key(net("192.168.160.0/24")), "broken"]).unwrap();
    etcd.ctl(&["put", &format!("{PREFIX}/subnets/192.168.161.128-26"), r#"{"PublicIP":"10.0.0.9"}"#])
        .unwrap();
    let occupied = ["0.0.0.0/0", "192.168.0.0/16", "192.168.163.7/24"].map(net).to_vec();
    let registry = connect(&etcd).await;
    // Even where the record or subnet.env say so: the host's own prefix would be cut off.
    etcd.ctl(&["put", &key(net("192.168.163.0/24")), &attrs(1).to_json()]).unwrap();
    let here = Claim { occupied: occupied.clone(), previous: Some(net("192.168.163.0/24")), ..claim(1) };
    assert_eq!(Node::join(&registry, here).await.unwrap().lease.subnet(), net("192.168.162.0/24"));
    let full = Claim { occupied, ..claim(2) };
    let error = Node::join(&registry, full).await.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("overlaps one of 4 leases or this host's own 192.168.163.0/24"), "{error}");
}

#[tokio::test]
async fn a_start_costs_the_same_requests_in_a_small_and_in_a_large_cluster_and_events_cost_none() {
    let etcd = etcd_with(r#"{"Network":"10.5.0.0/16","SubnetMax":"10.5.230.0"}"#);
    let few = requests_of_a_start(&etcd, 1).await;
    let registry = connect(&etcd).await;
    let config = registry.network_config().await.unwrap();
    for number in 2..=200 {
        registry.claim(&config, &claim(number)).await.unwrap();
    }
    let many = requests_of_a_start(&etcd, 201).await;
    assert_eq!(few, many);
    assert!(many.iter().map(|(_, count)| count).sum::<u64>() <= 8, "{many:?}");

    let node = Node::start(&etcd, 202).await;
    node.until("it sees the others", |cluster| cluster.peers.len() == 201).await;
    let before = calls(&etcd);
    for number in 240..=249 {
        etcd.ctl(&["put", &key(net(&format!("10.5.{number}.0/24"))), &attrs(number).to_json()]).unwrap();
    }
    node.until("it sees ten more", |cluster| cluster.peers.len() == 211).await;
    let ours: Vec<_> =
        since(&before, &calls(&etcd)).into_iter().filter(|(name, _)| name != "KV/Put").collect();
    assert_eq!(ours, [], "puts are etcdctl's");
}

async fn requests_of_a_start(etcd: &Etcd, number: u8) -> Vec<(String, u64)> {
    let before = calls(etcd);
    let node = Node::start(etcd, number).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let calls = since(&before, &calls(etcd));
    drop(node);
    calls
}

fn calls(etcd: &Etcd) -> Vec<(String, u64)> {
    etcd.calls().unwrap()
}

fn since(before: &[(String, u64)], after: &[(String, u64)]) -> Vec<(String, u64)> {
    let count = |name: &str| before.iter().find(|(other, _)| other == name).map_or(0, |(_, count)| *count);
    let grown = after.iter().map(|(name, calls)| (name.clone(), calls - count(name)));
    grown.filter(|(_, calls)| *calls > 0).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dual_stack_nodes_that_race_get_a_subnet_of_each_family_of_their_own() {
    let etcd = etcd_with(
        r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48","IPv6SubnetMax":"fc00:0:0:14::"}"#,
    );
    let nodes = join_all((1..=20).map(|number| {
        let etcd = &etcd;
        async move { Node::join(&connect(etcd).await, claim(number)).await.unwrap() }
    }))
    .await;
    let v6: BTreeSet<_> = nodes.iter().map(|node| node.lease.key.subnet_v6.unwrap()).collect();
    assert_eq!(v6.len(), 20, "twenty nodes hold the twenty IPv6 subnets");
    assert_eq!(etcd_leases(&etcd), 20, "no etcd lease of a lost race is left behind");

    let registry = connect(&etcd).await;
    let error = Node::join(&registry, claim(21)).await.map(|_| ()).unwrap_err().to_string();
    assert!(
        error.starts_with("out of subnets: every /64 from fc00:0:0:1:: to fc00:0:0:14:: of fc00::/48"),
        "{error}"
    );

    // The one that had it before takes it again; nobody else's is touched.
    let leaver = nodes.into_iter().nth(7).unwrap();
    let freed = leaver.lease.key;
    leaver.keeper.release().await.unwrap();
    let mut again = claim(8);
    again.v6.previous = freed.subnet_v6;
    assert_eq!(Node::join(&registry, again).await.unwrap().lease.key.subnet_v6, freed.subnet_v6);
}
