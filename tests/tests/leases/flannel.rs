//! Side by side with flannel: what it writes is put with `etcdctl`, what we write is compared to the byte.

use crate::node::*;

/// Verbatim from flannel's Documentation/reservations.md.
const FLANNEL: &str = r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#;
const DUAL: &str = r#"{"PublicIP":"192.168.64.4","PublicIPv6":"fd00::4","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:45"},"BackendV6Data":{"VNI":1,"VtepMAC":"0a:d2:32:6f:8f:45"}}"#;

#[tokio::test]
async fn our_record_is_byte_equal_to_flannels() {
    let etcd = etcd_with(r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.34.0","SubnetMax":"10.5.34.0"}"#);
    let _node = Node::start(&etcd, 7).await;
    assert_eq!(
        etcd.ctl(&["get", "--prefix", "/coreos.com/network/subnets"]).unwrap(),
        "/coreos.com/network/subnets/10.5.34.0-24\n{\"PublicIP\":\"10.0.0.7\",\"PublicIPv6\":null,\"BackendType\":\"vxlan\",\"BackendData\":{\"VNI\":1,\"VtepMAC\":\"02:00:00:00:00:07\"}}\n"
    );
}

#[tokio::test]
async fn records_of_flannel_are_peers_also_dual_stack_ones() {
    let etcd = etcd_with(CONFIG);
    etcd.ctl(&["put", "/coreos.com/network/subnets/10.5.34.0-24", FLANNEL]).unwrap();
    let node = Node::start(&etcd, 1).await;
    etcd.ctl(&["put", "/coreos.com/network/subnets/10.5.235.0-24&fc00:0:0:23::-64", DUAL]).unwrap();
    let cluster = node.until("it sees both", |cluster| peers_are(cluster, &[3, 4])).await;
    let single = &cluster.peers[&LeaseKey::v4(net("10.5.34.0/24"))];
    assert_eq!(single.attrs.to_json(), FLANNEL);
    assert_eq!(single.attrs.vtep().unwrap().vtep_mac, [0xc6, 0xd2, 0x32, 0x6f, 0x8f, 0x44]);
    let dual = &cluster.peers[&LeaseKey::v4(net("10.5.235.0/24"))];
    assert_eq!(dual.attrs.vtep().unwrap().vtep_mac, [0xc6, 0xd2, 0x32, 0x6f, 0x8f, 0x45]);
    assert_eq!(dual.key.to_string(), "10.5.235.0-24", "the half that this network has");
    assert_eq!(dual.attrs.to_json(), DUAL);
    etcd.ctl(&["del", "/coreos.com/network/subnets/10.5.235.0-24&fc00:0:0:23::-64"]).unwrap();
    node.until("it sees the dual-stack one go", |cluster| peers_are(cluster, &[3])).await;
}

#[tokio::test]
async fn a_daily_renewal_by_flannel_changes_nothing_but_the_revision() {
    let etcd = etcd_with(CONFIG);
    let path = "/coreos.com/network/subnets/10.5.34.0-24";
    etcd.ctl(&["put", path, FLANNEL]).unwrap();
    let node = Node::start(&etcd, 1).await;
    let before = node.until("it is a peer", |cluster| peers_are(cluster, &[3])).await;
    let id = etcd.ctl(&["lease", "grant", "86400"]).unwrap();
    etcd.ctl(&["put", path, FLANNEL, "--lease", id.split_whitespace().nth(1).unwrap()]).unwrap();
    let after = node.until("the renewal is seen", |cluster| cluster.revision > before.revision).await;
    let subnet = net("10.5.34.0/24");
    assert_eq!(after.peers[&LeaseKey::v4(subnet)].attrs, before.peers[&LeaseKey::v4(subnet)].attrs);
    assert!(
        after.peers[&LeaseKey::v4(subnet)].mod_revision > before.peers[&LeaseKey::v4(subnet)].mod_revision
    );
}

#[tokio::test]
async fn a_node_that_ran_flannel_takes_its_lease_over() {
    let etcd = etcd_with(CONFIG);
    let id = etcd.ctl(&["lease", "grant", "86400"]).unwrap();
    let flannels = attrs(1).to_json().replace("00:01\"", "00:fe\"");
    etcd.ctl(&[
        "put",
        &key(net("10.5.34.0/24")),
        &flannels,
        "--lease",
        id.split_whitespace().nth(1).unwrap(),
    ])
    .unwrap();
    let node = Node::start(&etcd, 1).await;
    assert_eq!(node.lease.subnet(), net("10.5.34.0/24"));
}

#[tokio::test]
async fn a_dual_stack_lease_of_this_node_becomes_an_ipv4_one_on_the_same_subnet() {
    let etcd = etcd_with(CONFIG);
    let path = "/coreos.com/network/subnets/10.5.34.0-24&fc00:0:0:22::-64";
    let id = etcd.ctl(&["lease", "grant", "60"]).unwrap();
    let value = DUAL.replace("192.168.64.4", "10.0.0.1");
    etcd.ctl(&["put", path, &value, "--lease", id.split_whitespace().nth(1).unwrap()]).unwrap();
    // After the record, which it could otherwise take the subnet of.
    let other = Node::start(&etcd, 2).await;
    other.until("the dual-stack lease is a peer", |cluster| peers_are(cluster, &[1])).await;
    let node = Node::start(&etcd, 1).await;
    assert_eq!(node.lease.subnet(), net("10.5.34.0/24"));
    let keys = etcd.ctl(&["get", "--prefix", "--keys-only", "/coreos.com/network/subnets/10.5.34."]).unwrap();
    assert_eq!(keys.trim(), "/coreos.com/network/subnets/10.5.34.0-24");
    let is_new = |cluster: &loden_agent::registry::Cluster| {
        cluster.peers.get(&LeaseKey::v4(net("10.5.34.0/24"))).is_some_and(|lease| lease.attrs == attrs(1))
    };
    other.until("the peer is the IPv4 one", is_new).await;
}

#[tokio::test]
async fn an_ipv6_only_lease_is_in_nobodys_way() {
    let etcd = etcd_with(CONFIG);
    etcd.ctl(&["put", "/coreos.com/network/subnets/0.0.0.0-0&fc00:0:0:22::-64", DUAL]).unwrap();
    let node = Node::start(&etcd, 1).await;
    assert!(node.now().peers.is_empty());
}

#[tokio::test]
async fn a_dual_stack_lease_takes_its_ipv4_subnet() {
    let etcd = etcd_with(r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.34.0","SubnetMax":"10.5.35.0"}"#);
    etcd.ctl(&["put", "/coreos.com/network/subnets/10.5.34.0-24&fc00:0:0:22::-64", DUAL]).unwrap();
    assert_eq!(Node::start(&etcd, 1).await.lease.subnet(), net("10.5.35.0/24"));
}
