//! Two families, and IPv6 alone, with leases from the Kubernetes API.

use loden_agent::{
    lease::{LeaseAttrs, LeaseKey, VtepData},
    network::NetworkConfig,
    registry::{Cluster, Own},
};

use crate::{
    server::Server,
    source::{Source, attrs, lost, mac, options},
};

const DUAL: &str = r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/48","Backend":{"Type":"vxlan"}}"#;
const V6_ONLY: &str =
    r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:244::/48","Backend":{"Type":"vxlan"}}"#;

fn v6(attrs: LeaseAttrs, n: u8) -> LeaseAttrs {
    let vtep = VtepData { vni: 1, vtep_mac: [2, 0, 0, 0, 6, n] };
    attrs.with_v6(format!("fd77::{n}").parse().unwrap(), Some(vtep))
}

fn key(text: &str) -> LeaseKey {
    text.parse().unwrap()
}

/// `n1` as the kubelet registers it, `n2` and `n3` as flannel leaves them.
fn cluster_of_both() -> Server {
    let server = Server::on_loopback();
    for n in 1..=3_u8 {
        let name = format!("n{n}");
        server.store().add_node(&name, Some(&format!("10.244.{n}.0/24,fd00:244:0:{n}::/64")));
        if n > 1 {
            server.store().annotate_as_flannel(&name, &format!("192.168.64.{n}"), &mac(n));
            server.store().annotate_ipv6_as_flannel(
                &name,
                &format!("fd77::{n}"),
                &format!("02:00:00:00:06:{n:02x}"),
            );
        }
    }
    server
}

async fn start(server: &Server, config: &str, attrs: LeaseAttrs) -> Source {
    let network = NetworkConfig::parse_for_given_subnets(config).unwrap();
    let source = Source::try_start_as(options(&server.url()), network, 1, attrs).await.unwrap();
    source.until("it follows the API", |cluster| cluster.connected).await;
    source
}

fn keys(cluster: &Cluster) -> Vec<String> {
    cluster.peers.keys().map(LeaseKey::to_string).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn annotations_of_both_families_are_flannels_to_the_byte_and_peers_have_both_halves() {
    let server = cluster_of_both();
    let source = start(&server, DUAL, v6(attrs(1), 1)).await;
    let written = server.store().asked("PATCH /api/v1/nodes/n1/status").remove(0).body;
    assert_eq!(
        written,
        concat!(
            r#"{"metadata":{"annotations":{"flannel.alpha.coreos.com/backend-data":"{\"VNI\":1,\"VtepMAC\":\"02:00:00:00:00:01\"}","#,
            r#""flannel.alpha.coreos.com/backend-type":"vxlan","#,
            r#""flannel.alpha.coreos.com/backend-v6-data":"{\"VNI\":1,\"VtepMAC\":\"02:00:00:00:06:01\"}","#,
            r#""flannel.alpha.coreos.com/kube-subnet-manager":"true","flannel.alpha.coreos.com/public-ip":"192.168.64.1","#,
            r#""flannel.alpha.coreos.com/public-ipv6":"fd77::1"}}}"#
        )
    );
    let Own::Held(lease) = &source.now().own else { panic!() };
    assert_eq!(lease.key, key("10.244.1.0-24&fd00:244:0:1::-64"));
    let both = ["10.244.2.0-24&fd00:244:0:2::-64", "10.244.3.0-24&fd00:244:0:3::-64"];
    source.until("both peers", |cluster| keys(cluster) == both).await;
    assert_eq!(source.now().peers[&key(both[0])].attrs, v6(attrs(2), 2));
}

/// flannel takes "the second family has not changed" for "nothing has changed".
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_in_one_family_is_followed_and_what_is_wrong_in_one_leaves_the_other() {
    let server = cluster_of_both();
    let source = start(&server, DUAL, v6(attrs(1), 1)).await;
    let two = key("10.244.2.0-24&fd00:244:0:2::-64");
    source.until("the peers", |cluster| cluster.peers.len() == 2).await;
    server.store().annotate("n2", "public-ip", Some("192.168.64.99"));
    let is = |cluster: &Cluster, is: &dyn Fn(&LeaseAttrs) -> bool| {
        cluster.peers.get(&two).is_some_and(|it| is(&it.attrs))
    };
    source
        .until("its IPv4 address", |cluster| {
            is(cluster, &|it| it.public_ip == Some([192, 168, 64, 99].into()))
        })
        .await;
    server.store().annotate_ipv6_as_flannel("n2", "fd77::99", "02:00:00:00:06:63");
    let moved = |it: &LeaseAttrs| {
        it.public_ipv6 == Some("fd77::99".parse().unwrap()) && it.vtep_v6().unwrap().vtep_mac[5] == 0x63
    };
    let cluster = source.until("its IPv6 address and MAC", |cluster| is(cluster, &moved)).await;
    assert_eq!(cluster.peers[&two].attrs.public_ip, Some([192, 168, 64, 99].into()));

    server.store().annotate("n2", "public-ipv6", Some("fe80::1"));
    let without = ["10.244.2.0-24", "10.244.3.0-24&fd00:244:0:3::-64"];
    source.until("the IPv6 half is left out", |cluster| keys(cluster) == without).await;
    server.store().annotate("n2", "public-ipv6", Some("fd77::2"));
    server.store().annotate("n2", "public-ip", Some("nonsense"));
    let without = ["0.0.0.0-0&fd00:244:0:2::-64", "10.244.3.0-24&fd00:244:0:3::-64"];
    source.until("the IPv4 half is left out", |cluster| keys(cluster) == without).await;

    // What people want published instead, in one family.
    server.store().annotate("n1", "public-ipv6-overwrite", Some("2001:db8::7"));
    server.until("it is published", |store| {
        let annotations = &store.node("n1").unwrap()["metadata"]["annotations"];
        annotations["flannel.alpha.coreos.com/public-ipv6"] == "2001:db8::7"
            && annotations["flannel.alpha.coreos.com/public-ip"] == "192.168.64.1"
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ipv6_alone_writes_and_follows_nothing_of_ipv4() {
    let server = cluster_of_both();
    server.store().add_node("n4", Some("fd00:244:0:4::/64"));
    server.store().annotate("n4", "backend-type", Some("vxlan"));
    server.store().annotate("n4", "kube-subnet-manager", Some("true"));
    server.store().annotate_ipv6_as_flannel("n4", "fd77::4", "02:00:00:00:06:04");
    let own = v6(LeaseAttrs::of_type("vxlan"), 1);
    let source = start(&server, V6_ONLY, own.clone()).await;
    let written = server.store().asked("PATCH /api/v1/nodes/n1/status").remove(0).body;
    assert_eq!(
        written,
        concat!(
            r#"{"metadata":{"annotations":{"flannel.alpha.coreos.com/backend-type":"vxlan","#,
            r#""flannel.alpha.coreos.com/backend-v6-data":"{\"VNI\":1,\"VtepMAC\":\"02:00:00:00:06:01\"}","#,
            r#""flannel.alpha.coreos.com/kube-subnet-manager":"true","flannel.alpha.coreos.com/public-ipv6":"fd77::1"}}}"#
        )
    );
    let halves = ["2", "3", "4"].map(|n| format!("0.0.0.0-0&fd00:244:0:{n}::-64"));
    source.until("the IPv6 halves of all", |cluster| keys(cluster) == halves).await;
    drop(source);

    // The network becomes IPv4's alone: others must not go on sending to what is gone.
    let _source = start(&server, crate::source::CONFIG, attrs(1)).await;
    server.until("what is of IPv6 is taken back", |store| {
        let annotations = &store.node("n1").unwrap()["metadata"]["annotations"];
        annotations["flannel.alpha.coreos.com/public-ip"] == "192.168.64.1"
            && annotations["flannel.alpha.coreos.com/public-ipv6"].is_null()
            && annotations["flannel.alpha.coreos.com/backend-v6-data"].is_null()
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_carries_the_families_of_which_it_has_a_subnet() {
    let server = Server::on_loopback();
    server.store().add_node("n1", Some("10.244.1.0/24"));
    let source = start(&server, DUAL, attrs(1)).await;
    let Own::Held(lease) = &source.now().own else { panic!() };
    assert_eq!(lease.key, key("10.244.1.0-24"));
    drop(source);
    let network = NetworkConfig::parse_for_given_subnets(V6_ONLY).unwrap();
    let error = Source::try_start(options(&server.url()), network, 1).await.err().unwrap().to_string();
    assert!(
        error.contains("its podCIDR 10.244.1.0/24 is of another family than the network fd00:244::/48"),
        "{error}"
    );

    // Registered anew with other families: what runs was not made for these.
    let source = start(&server, DUAL, attrs(1)).await;
    server.store().delete_node("n1");
    server.store().add_node("n1", Some("10.244.1.0/24,fd00:244:0:1::/64"));
    source.until("both are there again", |cluster| matches!(cluster.own, Own::Held(_))).await;
    server.store().delete_node("n1");
    server.store().add_node("n1", Some("fd00:244:0:1::/64"));
    source
        .until("the lease is lost", |cluster| {
            lost(cluster).is_some_and(|why| why.contains("of another family"))
        })
        .await;
}
