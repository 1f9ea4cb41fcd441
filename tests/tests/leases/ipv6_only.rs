//! Leases of IPv6 alone, with the same promises as those of IPv4.

use std::{collections::BTreeSet, net::Ipv6Addr};

use futures::future::join_all;
use ipnet::Ipv6Net;
use loden_agent::{
    lease::{LeaseAttrs, VtepData},
    registry::{Claim, ClaimV6, Own},
};
use loden_tests::etcd::Etcd;

use crate::node::*;

const CONFIG: &str = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48"}"#;
/// Exactly twenty subnets.
const TWENTY: &str =
    r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","IPv6SubnetMax":"fc00:0:0:14::"}"#;

fn vxlan6(ip: u8, mac: u8) -> LeaseAttrs {
    let vtep = VtepData { vni: 1, vtep_mac: [2, 0, 0, 0, 6, mac] };
    LeaseAttrs::of_type("vxlan").with_v6(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, ip.into()), Some(vtep))
}

fn claim6(number: u8) -> Claim {
    Claim { attrs: vxlan6(number, number), ..claim(number) }
}

fn previous(number: u8, subnet: Ipv6Net) -> Claim {
    Claim { v6: ClaimV6 { previous: Some(subnet), ..ClaimV6::default() }, ..claim6(number) }
}

fn net6(text: &str) -> Ipv6Net {
    text.parse().unwrap()
}

fn key6(subnet: Ipv6Net) -> String {
    format!("{PREFIX}/subnets/{}", LeaseKey::v6(subnet))
}

fn keys(etcd: &Etcd) -> Vec<String> {
    let text = etcd.ctl(&["get", "--prefix", &format!("{PREFIX}/subnets/"), "--keys-only"]).unwrap();
    text.lines()
        .filter_map(|line| line.strip_prefix(&format!("{PREFIX}/subnets/")))
        .map(str::to_owned)
        .collect()
}

async fn join(etcd: &Etcd, claim: Claim) -> Node {
    let node = Node::join(&connect(etcd).await, claim).await.unwrap();
    node.until("it follows etcd", |cluster| cluster.connected).await;
    node
}

fn subnet(node: &Node) -> Ipv6Net {
    assert_eq!(node.lease.key.subnet, None);
    node.lease.key.subnet_v6.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_nodes_that_race_for_twenty_subnets_get_one_each() {
    let etcd = etcd_with(TWENTY);
    let nodes = join_all((1..=20).map(|number| {
        let etcd = &etcd;
        async move { Node::join(&connect(etcd).await, claim6(number)).await.unwrap() }
    }))
    .await;
    let subnets: BTreeSet<_> = nodes.iter().map(subnet).collect();
    assert_eq!((subnets.len(), keys(&etcd).len()), (20, 20));
    assert!(keys(&etcd).iter().all(|key| key.starts_with("0.0.0.0-0&fc00:0:0:") && key.ends_with("::-64")));
    let leases = etcd.ctl(&["lease", "list"]).unwrap();
    assert_eq!(leases.lines().filter(|line| !line.starts_with("found")).count(), 20, "none is left behind");

    let registry = connect(&etcd).await;
    let error = Node::join(&registry, claim6(21)).await.map(|_| ()).unwrap_err().to_string();
    assert!(
        error.starts_with("out of subnets: every /64 from fc00:0:0:1:: to fc00:0:0:14:: of fc00::/48"),
        "{error}"
    );
    let leaver = nodes.into_iter().nth(7).unwrap();
    let freed = subnet(&leaver);
    leaver.keeper.release().await.unwrap();
    assert_eq!(subnet(&Node::join(&registry, claim6(21)).await.unwrap()), freed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_that_starts_at_once_gets_its_subnets_with_few_requests() {
    const CROWD: u8 = 250;
    let etcd = etcd_with(CONFIG);
    let registries = join_all((1..=CROWD).map(|_| connect(&etcd))).await;
    let config = registries[0].network_config().await.unwrap();
    let transactions = || {
        let calls = etcd.calls().unwrap();
        calls.iter().find(|(name, _)| name == "KV/Txn").map_or(0, |(_, count)| *count)
    };
    let (before, start) = (transactions(), std::time::Instant::now());
    let claims = (1..=CROWD).zip(&registries).map(|(number, registry)| {
        let config = &config;
        async move { registry.claim(config, &claim6(number)).await.unwrap().key }
    });
    let keys: BTreeSet<_> = join_all(claims).await.into_iter().collect();
    assert_eq!(keys.len(), usize::from(CROWD));
    let each = (transactions() - before) as f64 / f64::from(CROWD);
    println!("{each:.1} transactions for each of {CROWD}, in {:?}", start.elapsed());
    // A listing and a write for each try; without a pause it is twice or three times as much, and grows with the crowd.
    assert!(each < 40.0, "{each} transactions for each node");
}

#[tokio::test]
async fn a_node_comes_back_to_its_subnet_by_its_address_by_subnet_env_and_by_its_mac() {
    let etcd = etcd_with(CONFIG);
    let first = join(&etcd, claim6(1)).await;
    let had = subnet(&first);
    drop(first);
    let again = join(&etcd, Claim { attrs: vxlan6(1, 99), ..claim6(1) }).await;
    assert_eq!(subnet(&again), had, "by its public address");
    assert!(
        etcd.ctl(&["get", &key6(had)]).unwrap().contains("02:00:00:00:06:63"),
        "its value is the new one"
    );
    drop(again);
    let moved = Claim { attrs: vxlan6(2, 99), ..previous(2, had) };
    assert_eq!(
        subnet(&join(&etcd, moved).await),
        had,
        "another address, and the VTEP's MAC proves whose it is"
    );
    let stranger = join(&etcd, previous(3, had)).await;
    assert_ne!(subnet(&stranger), had, "a subnet.env alone proves nothing");
    let free = net6("fc00:0:0:200::/64");
    assert_eq!(subnet(&join(&etcd, previous(4, free)).await), free, "a free one is taken by subnet.env");
}

#[tokio::test]
async fn a_reservation_is_used_and_stays_one() {
    let etcd = etcd_with(CONFIG);
    let reserved = net6("fc00:0:0:77::/64");
    etcd.ctl(&["put", &key6(reserved), r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd77::1"}"#]).unwrap();
    let stranger = join(&etcd, previous(2, reserved)).await;
    assert_ne!(subnet(&stranger), reserved);
    let node = join(&etcd, claim6(1)).await;
    assert_eq!((subnet(&node), node.lease.etcd_lease), (reserved, None));
    assert!(etcd.ctl(&["get", &key6(reserved)]).unwrap().contains(&vxlan6(1, 1).to_json()));
    node.keeper.release().await.unwrap();
    assert_ne!(etcd.ctl(&["get", &key6(reserved)]).unwrap(), "", "released, it is still reserved");
}

#[tokio::test]
async fn no_key_that_flannel_would_read_as_a_subnet_is_overlapped_however_it_is_written() {
    let etcd = etcd_with(
        r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","IPv6SubnetMin":"fc00:0:0:1::","IPv6SubnetMax":"fc00:0:0:6::"}"#,
    );
    let put = |key: &str, value: &str| etcd.ctl(&["put", &format!("{PREFIX}/subnets/{key}"), value]).unwrap();
    put("0.0.0.0-0&fc00:0:0:1::7-64", "broken");
    put("old/10.5.1.0-24&fc00:0:0:0002::-64", "broken");
    put("0.0.0.0-0&fc00:0:0:3::-64", "broken");
    put("10.5.4.0-24&fc00:0:0:4::-64", r#"{"PublicIP":"10.0.0.9","PublicIPv6":"fd77::9"}"#);
    put("0.0.0.0-0&fc00:0:0:5:8000::-65", r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd77::8"}"#);
    put("0.0.0.0-0", r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd77::7"}"#);
    let node = join(&etcd, claim6(1)).await;
    assert_eq!(subnet(&node), net6("fc00:0:0:6::/64"), "the only one that is left");
    let error = Node::join(&connect(&etcd).await, claim6(2)).await.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("out of subnets"), "{error}");
}

#[tokio::test]
async fn a_lost_subnet_is_taken_back_or_another_one_and_nobody_is_fought() {
    let etcd = etcd_with(CONFIG);
    let (node, other) = (join(&etcd, claim6(1)).await, join(&etcd, claim6(2)).await);
    let had = subnet(&node);
    let sees = |number: u8| move |cluster: &loden_agent::registry::Cluster| peers_are(cluster, &[number]);
    node.until("each sees the other", sees(2)).await;
    other.until("each sees the other", sees(1)).await;

    etcd.ctl(&["del", &key6(had)]).unwrap();
    node.until("it is lost and taken back", |cluster| {
        held(cluster)
            .is_some_and(|lease| lease.key == node.lease.key && lease.mod_revision > node.lease.mod_revision)
    })
    .await;
    assert!(etcd.ctl(&["get", &key6(had)]).unwrap().contains(&vxlan6(1, 1).to_json()));

    etcd.ctl(&["put", &key6(had), &vxlan6(3, 3).to_json()]).unwrap();
    let cluster = node
        .until("it has another", |cluster| held(cluster).is_some_and(|it| it.key != node.lease.key))
        .await;
    let new = held(&cluster).unwrap().key.subnet_v6.unwrap();
    assert_ne!(new, had);
    assert!(etcd.ctl(&["get", &key6(had)]).unwrap().contains("fd77::3"), "the other's record is as it was");
    node.until("who took it is a peer", |cluster| peers_are(cluster, &[2, 3])).await;
    other.until("the other sees both", |cluster| peers_are(cluster, &[1, 3])).await;
}

#[tokio::test]
async fn a_dual_stack_lease_that_loses_one_half_keeps_the_other() {
    let etcd = etcd_with(r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48"}"#);
    let dual = Claim { attrs: attrs(1).with_v6("fd77::1".parse().unwrap(), None), ..claim(1) };
    let node = join(&etcd, dual).await;
    let (v4, v6) = (node.lease.subnet(), node.lease.key.subnet_v6.unwrap());
    // While the record is away, another node takes its IPv6 subnet, in one step.
    let (ours, theirs) = (format!("{PREFIX}/subnets/{}", node.lease.key), key6(v6));
    let value = vxlan6(9, 9).to_json().replace('"', "\\\"");
    etcd.at_once(&[format!("del \"{ours}\""), format!("put \"{theirs}\" \"{value}\"")]).unwrap();
    let cluster = node
        .until("it has another IPv6 subnet", |cluster| {
            held(cluster).is_some_and(|it| it.key.subnet_v6 != Some(v6))
        })
        .await;
    assert_eq!(held(&cluster).unwrap().key.subnet, Some(v4), "the IPv4 subnet stays");
    assert!(matches!(cluster.own, Own::Held(_)));
}

#[tokio::test]
async fn a_network_that_changes_its_families_keeps_what_it_can() {
    let etcd = etcd_with(crate::node::CONFIG);
    let put = |config: &str| drop(etcd.ctl(&["put", &format!("{PREFIX}/config"), config]).unwrap());
    let dual = || {
        attrs(1).with_v6("fd77::1".parse().unwrap(), Some(VtepData { vni: 1, vtep_mac: [2, 0, 0, 0, 6, 1] }))
    };
    let v4 = join(&etcd, claim(1)).await.lease.key;
    put(r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48"}"#);
    let both = join(&etcd, Claim { attrs: dual(), ..claim(1) }).await.lease.key;
    assert_eq!(both.subnet, v4.subnet);
    assert_eq!(keys(&etcd), [both.to_string()]);
    put(CONFIG);
    let v6 = join(&etcd, claim6(1)).await.lease.key;
    assert_eq!(v6, LeaseKey::v6(both.subnet_v6.unwrap()));
    assert_eq!(keys(&etcd), [v6.to_string()], "the key of both is gone");
    put(r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48"}"#);
    let again = Claim { attrs: dual(), previous: both.subnet, ..claim(1) };
    let again = join(&etcd, again).await.lease.key;
    assert_eq!(again, both, "and comes back");
    assert_eq!(keys(&etcd), [both.to_string()]);
}
