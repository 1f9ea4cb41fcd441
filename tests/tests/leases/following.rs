//! What a node sees of the others, and what becomes of its own lease while etcd is there.

use ipnet::Ipv4Net;
use loden_agent::{
    lease::{LeaseAttrs, VtepData},
    registry::Own,
};

use crate::node::*;

#[tokio::test]
async fn nodes_see_each_other_come_change_and_go() {
    let etcd = etcd_with(CONFIG);
    let one = Node::start(&etcd, 1).await;
    let two = Node::start(&etcd, 2).await;
    let three = Node::start(&etcd, 3).await;
    one.until("one sees two and three", |cluster| peers_are(cluster, &[2, 3])).await;
    two.until("two sees one and three", |cluster| peers_are(cluster, &[1, 3])).await;
    three.until("three sees one and two", |cluster| peers_are(cluster, &[1, 2])).await;
    assert_eq!(one.now().peers[&LeaseKey::v4(two.lease.subnet())].attrs, attrs(2));

    two.set_attrs(vxlan(2, 99));
    one.until("one sees two's new MAC", |cluster| {
        cluster.peers[&LeaseKey::v4(two.lease.subnet())].attrs == vxlan(2, 99)
    })
    .await;
    two.until("two knows its own", |cluster| held(cluster).is_some_and(|lease| lease.attrs == vxlan(2, 99)))
        .await;

    let freed = three.lease.subnet();
    three.keeper.release().await.unwrap();
    one.until("one sees three go", |cluster| peers_are(cluster, &[2])).await;
    assert_eq!(etcd.ctl(&["get", &key(freed)]).unwrap(), "");
}

#[tokio::test]
async fn a_changed_public_ip_is_published_on_the_same_subnet() {
    let etcd = etcd_with(CONFIG);
    let one = Node::start(&etcd, 1).await;
    let two = Node::start(&etcd, 2).await;
    two.set_attrs(vxlan(20, 2));
    one.until("one sees two at its new address", |cluster| peers_are(cluster, &[20])).await;
    assert!(one.now().peers.contains_key(&LeaseKey::v4(two.lease.subnet())));
}

#[tokio::test]
async fn only_what_can_be_a_peer_is_one() {
    let etcd = etcd_with(CONFIG);
    let one = Node::start(&etcd, 1).await;
    let two = Node::start(&etcd, 2).await;
    let put = |key: &str, value: &str| etcd.ctl(&["put", &format!("{PREFIX}/subnets/{key}"), value]).unwrap();
    for (key, value) in [
        ("10.5.240.0-24", r#"{"PublicIP":"10.0.0.40","PublicIPv6":null,"BackendType":"host-gw"}"#),
        ("10.5.241.0-24", r#"{"PublicIP":"10.0.0.41","PublicIPv6":null,"BackendType":"vxlan"}"#),
        ("10.5.242.0-24", "garbage"),
        ("garbage", r#"{"PublicIP":"10.0.0.42"}"#),
        ("0.0.0.0-0", &attrs(43).to_json()),
        ("10.9.0.0-24", &attrs(44).to_json()),
        ("10.5.243.0-24", &attrs(1).to_json()),
        (&format!("{}-30", one.lease.subnet().network()), &attrs(45).to_json()),
    ] {
        put(key, value);
    }
    put("10.5.244.0-24", &attrs(46).to_json());
    one.until("one sees what came last", |cluster| peers_are(cluster, &[2, 46])).await;
    put("10.5.242.0-24", &attrs(42).to_json());
    one.until("what is mended counts", |cluster| peers_are(cluster, &[2, 42, 46])).await;
    assert_eq!(held(&two.now()).unwrap().subnet(), two.lease.subnet());
}

#[tokio::test]
async fn a_deleted_record_is_put_back() {
    let etcd = etcd_with(CONFIG);
    let (one, two) = (Node::start(&etcd, 1).await, Node::start(&etcd, 2).await);
    one.until("one sees two", |cluster| peers_are(cluster, &[2])).await;
    etcd.ctl(&["del", &key(two.lease.subnet())]).unwrap();
    let is_new = |cluster: &_| held(cluster).is_some_and(|lease| lease.mod_revision > two.lease.mod_revision);
    let cluster = two.until("two has its lease again", is_new).await;
    assert_eq!(held(&cluster).unwrap().subnet(), two.lease.subnet());
    one.until("one sees two again", |cluster| peers_are(cluster, &[2])).await;
}

#[tokio::test]
async fn a_revoked_etcd_lease_is_replaced() {
    let etcd = etcd_with(CONFIG);
    let node = Node::start(&etcd, 1).await;
    etcd.ctl(&["lease", "revoke", &format!("{:x}", node.lease.etcd_lease.unwrap())]).unwrap();
    let is_new = |cluster: &_| held(cluster).is_some_and(|lease| lease.etcd_lease != node.lease.etcd_lease);
    let cluster = node.until("it has another etcd lease", is_new).await;
    assert_eq!(held(&cluster).unwrap().subnet(), node.lease.subnet());
}

#[tokio::test]
async fn an_edited_record_is_put_right() {
    let etcd = etcd_with(CONFIG);
    let node = Node::start(&etcd, 1).await;
    let path = key(node.lease.subnet());
    for value in [vxlan(1, 99).to_json(), vxlan(9, 9).to_json(), "garbage".to_owned()] {
        etcd.ctl(&["put", &path, &value, "--ignore-lease"]).unwrap();
        eventually("the record is right again", || {
            etcd.ctl(&["get", &path]).unwrap().contains(&attrs(1).to_json())
        })
        .await;
    }
    assert_eq!(held(&node.now()).map(|lease| lease.subnet()), Some(node.lease.subnet()));
}

#[tokio::test]
async fn a_plain_put_with_our_public_ip_makes_it_a_reservation() {
    let etcd = etcd_with(CONFIG);
    let node = Node::start(&etcd, 1).await;
    etcd.ctl(&["put", &key(node.lease.subnet()), r#"{"PublicIP":"10.0.0.1"}"#]).unwrap();
    let reserved = |cluster: &_| held(cluster).is_some_and(|lease| lease.etcd_lease.is_none());
    node.until("it is a reservation", reserved).await;
    let path = key(node.lease.subnet());
    assert!(etcd.ctl(&["get", &path]).unwrap().contains(&attrs(1).to_json()));
    assert!(etcd.ctl(&["get", &path, "--write-out", "fields"]).unwrap().contains("\"Lease\" : 0"));
    assert!(etcd.ctl(&["lease", "list"]).unwrap().contains("found 0 leases"));
}

#[tokio::test]
async fn a_subnet_that_another_node_has_written_over_is_left_to_it() {
    let etcd = etcd_with(CONFIG);
    let node = Node::start(&etcd, 1).await;
    etcd.ctl(&["put", &key(node.lease.subnet()), &attrs(2).to_json()]).unwrap();
    let moved = |cluster: &_| held(cluster).is_some_and(|lease| lease.subnet() != node.lease.subnet());
    let cluster = node.until("it has another subnet", moved).await;
    assert!(etcd.ctl(&["get", &key(node.lease.subnet())]).unwrap().contains(&attrs(2).to_json()));
    assert!(
        etcd.ctl(&["get", &key(held(&cluster).unwrap().subnet())]).unwrap().contains(&attrs(1).to_json())
    );
    node.until("the other is a peer on it", |cluster| {
        cluster.peers.contains_key(&LeaseKey::v4(node.lease.subnet()))
    })
    .await;
}

#[tokio::test]
async fn a_node_without_any_subnet_left_keeps_trying() {
    // Three subnets.
    let etcd = etcd_with(r#"{"Network":"10.5.0.0/28"}"#);
    let node = Node::start(&etcd, 1).await;
    for (number, subnet) in [(2, "10.5.0.4/30"), (3, "10.5.0.8/30"), (4, "10.5.0.12/30")] {
        etcd.ctl(&["put", &key(net(subnet)), &attrs(number).to_json()]).unwrap();
    }
    let cluster = node.until("it is lost", |cluster| matches!(&cluster.own, Own::Lost { reason, .. } if reason.starts_with("out of subnets"))).await;
    assert!(matches!(&cluster.own, Own::Lost { key, .. } if *key == node.lease.key));
    assert!(!cluster.peers.contains_key(&LeaseKey::v4(node.lease.subnet())), "its containers still use it");
    etcd.ctl(&["del", &key(net("10.5.0.8/30"))]).unwrap();
    let cluster = node.until("it has what became free", |cluster| held(cluster).is_some()).await;
    assert_eq!(held(&cluster).unwrap().subnet(), net("10.5.0.8/30"));
}

#[tokio::test]
async fn two_agents_with_one_public_ip_do_not_fight() {
    let etcd = etcd_with(CONFIG);
    let first = Node::start(&etcd, 1).await;
    let second = Node::start(&etcd, 1).await;
    assert_eq!(second.lease.subnet(), first.lease.subnet());
    first.until("the first gives way", |cluster| matches!(&cluster.own, Own::Lost { reason, .. } if reason.contains("another agent with this node's public IP 10.0.0.1"))).await;
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    assert_eq!(held(&second.now()), Some(&second.lease), "untouched");
    second.keeper.release().await.unwrap();
    first.until("the first has it again", |cluster| held(cluster).is_some()).await;
}

#[tokio::test]
async fn a_very_large_cluster_is_listed_in_one_answer() {
    // More than the 4 MiB that a gRPC client takes by default.
    const LEASES: u32 = 25_000;
    let etcd = etcd_with(r#"{"Network":"10.0.0.0/8"}"#);
    let mut client = etcd_client::Client::connect([etcd.endpoint()], None).await.unwrap();
    let subnet = |n: u32| Ipv4Net::new((0x0a80_0000 + (n << 8)).into(), 24).unwrap();
    for chunk in (0..LEASES).collect::<Vec<_>>().chunks(120) {
        let puts: Vec<_> = chunk
            .iter()
            .map(|n| {
                let vtep = VtepData { vni: 1, vtep_mac: [2, 0, 0, 0, 0, 2] };
                let value = LeaseAttrs::vxlan((0xac10_0000 + n).into(), vtep).to_json();
                etcd_client::TxnOp::put(key(subnet(*n)), value, None)
            })
            .collect();
        client.txn(etcd_client::Txn::new().and_then(puts)).await.unwrap();
    }
    let node = Node::start(&etcd, 1).await;
    let cluster = node.until("it sees them all", |cluster| cluster.peers.len() == LEASES as usize).await;
    assert!(cluster.peers.contains_key(&LeaseKey::v4(subnet(LEASES - 1))));
}
