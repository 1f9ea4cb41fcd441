//! The other nodes: what is asked for, and what becomes of what comes.

use std::time::Duration;

use loden_agent::{
    lease::LeaseKey,
    network::{Backend, NetworkConfig},
    registry::Own,
};
use serde_json::json;

use crate::{
    server::{Cut, Fault},
    source::{Source, cluster_of, lost, mac, options, peers, subnet, vtep},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_flannel_has_annotated_are_peers_and_come_go_and_change() {
    let server = cluster_of(3);
    let source = Source::start(&server).await;
    let cluster = source.until_peers(&[2, 3]).await;
    assert_eq!(cluster.peers[&LeaseKey::v4(subnet(2))].attrs.public_ip, Some([192, 168, 64, 2].into()));
    assert!(matches!(&cluster.own, Own::Held(lease) if lease.key.subnet == Some(subnet(1))));

    server.store().add_node("n4", Some("10.244.4.0/24"));
    server.store().annotate_as_flannel("n4", "192.168.64.4", &mac(4));
    source.until_peers(&[2, 3, 4]).await;
    server.store().annotate_as_flannel("n2", "192.168.64.2", &mac(0x22));
    source.until("the new MAC", |cluster| vtep(cluster, 2) == Some(0x22)).await;
    server.store().annotate("n3", "kube-subnet-manager", None);
    source.until_peers(&[2, 4]).await;
    server.store().delete_node("n2");
    source.until_peers(&[4]).await;
    // The same name again is another node, with another subnet.
    server.store().add_node("n2", Some("10.244.22.0/24"));
    server.store().annotate_as_flannel("n2", "192.168.64.2", &mac(2));
    source.until_peers(&[4, 22]).await;
    assert_eq!(server.store().listings(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_are_listed_in_pages_watched_as_metadata_and_fetched_once_when_new() {
    let server = cluster_of(8);
    let source = Source::start(&server).await;
    source.until_peers(&[2, 3, 4, 5, 6, 7, 8]).await;
    let pages: Vec<_> = server
        .store()
        .asked("GET /api/v1/nodes?")
        .into_iter()
        .filter(|r| !r.uri.contains("watch=true"))
        .collect();
    assert_eq!(pages.len(), 3, "8 nodes in pages of 3: {pages:#?}");
    assert!(pages.iter().all(|page| page.uri.contains("limit=3")));
    let [watch] = &server.store().watches()[..] else { panic!() };
    assert_eq!(watch.accept, "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1");
    assert!(watch.uri.contains("allowWatchBookmarks=true"), "{}", watch.uri);
    assert_eq!(server.store().asked("GET /api/v1/nodes/").len(), 1, "our own, at the start");

    server.store().add_node("n9", Some("10.244.9.0/24"));
    server.store().annotate_as_flannel("n9", "192.168.64.9", &mac(9));
    source.until_peers(&[2, 3, 4, 5, 6, 7, 8, 9]).await;
    let snapshot = source.now();
    for _ in 0..50 {
        server.store().change("n9", |node| node["metadata"]["annotations"]["heartbeat"] = json!("x"));
        server.store().change("n2", |node| node["status"]["conditions"][0]["reason"] = json!("x"));
    }
    // An event that does matter comes after all of them.
    server.store().annotate_as_flannel("n2", "192.168.64.2", &mac(0x22));
    let after = source.until("it has come", |cluster| vtep(cluster, 2) == Some(0x22)).await;
    assert!(after.revision > snapshot.revision);
    assert_eq!(server.store().asked("GET /api/v1/nodes/n9").len(), 1);
    assert_eq!(server.store().asked("GET /api/v1/nodes/n2").len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heartbeats_of_other_nodes_are_no_news() {
    let server = cluster_of(3);
    let source = Source::start(&server).await;
    source.until_peers(&[2, 3]).await;
    server.until("the condition", |store| {
        store.condition("n1", "NetworkUnavailable").unwrap()["status"] == "False"
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut snapshots = source.cluster.clone();
    snapshots.mark_unchanged();
    for _ in 0..20 {
        server.store().change("n2", |node| node["status"]["conditions"][0]["reason"] = json!("x"));
    }
    let next = tokio::time::timeout(Duration::from_millis(500), snapshots.changed()).await;
    assert!(next.is_err(), "published {:?}", source.now());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_without_a_pod_cidr_waits_for_it() {
    let server = cluster_of(2);
    server.store().add_node("n5", None);
    server.store().annotate_as_flannel("n5", "192.168.64.5", &mac(5));
    let source = Source::start(&server).await;
    source.until_peers(&[2]).await;
    server.store().change("n5", |node| node["spec"]["podCIDR"] = json!("10.244.5.0/24"));
    source.until_peers(&[2, 5]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_say_nonsense_are_left_out_and_do_no_harm() {
    let server = cluster_of(3);
    for (name, cidr, ip, data) in [
        ("w1", "10.9.1.0/24", "192.168.64.101", r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:65"}"#),
        ("w2", "10.244.102.0/24", "localhost", "null"),
        ("w3", "10.244.103.0/24", "192.168.64.103", "}{"),
        ("w4", "10.244.1.128/25", "192.168.64.104", r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:68"}"#),
        ("w5", "fd00::/64", "192.168.64.105", r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:69"}"#),
    ] {
        server.store().add_node(name, Some(cidr));
        server.store().annotate_as_flannel(name, ip, "02:00:00:00:00:01");
        server.store().annotate(name, "backend-data", Some(data));
    }
    let source = Source::start(&server).await;
    let cluster = source.until_peers(&[2, 3]).await;
    assert_eq!(lost(&cluster), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_that_comes_in_small_pieces_is_put_together() {
    let server = cluster_of(2);
    server.store().fault = Some(Fault::Slow);
    let source = Source::start(&server).await;
    server.store().add_node("n3", Some("10.244.3.0/24"));
    server.store().annotate_as_flannel("n3", "192.168.64.3", &mac(3));
    source.until_peers(&[2, 3]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_alloc_only_our_own_node_is_followed() {
    let server = cluster_of(3);
    let config = NetworkConfig::parse(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"alloc"}}"#).unwrap();
    assert_eq!(config.backend, Backend::Alloc);
    let source = Source::try_start(options(&server.url()), config, 1).await.unwrap();
    let cluster = source.until("it follows the API", |cluster| cluster.connected).await;
    assert_eq!(peers(&cluster), Vec::<u8>::new());
    let asked = server.store().asked("GET /api/v1/nodes?");
    assert!(
        asked.len() >= 2 && asked.iter().all(|r| r.uri.contains("fieldSelector=metadata.name%3Dn1")),
        "{asked:#?}"
    );
    server.store().cut(Cut::Clean);
    server.store().change("n1", |node| {
        node["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"] = json!("1.2.3.4")
    });
    server.until("it is put back", |store| {
        store.node("n1").unwrap()["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"]
            == "192.168.64.1"
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_nodes_are_listed_and_a_hundred_join_at_once() {
    let server = cluster_of(1);
    for n in 0..1000_u32 {
        let name = format!("p{n}");
        let cidr = format!("10.{}.{}.0/24", 100 + n / 256, n % 256);
        server.store().add_node(&name, Some(&cidr));
        server.store().annotate_as_flannel(&name, &format!("172.16.{}.{}", n / 256, n % 256), &mac(2));
    }
    let config = NetworkConfig::parse(r#"{"Network":"10.0.0.0/8"}"#).unwrap();
    let mut many = options(&server.url());
    many.page = 100;
    let source = Source::try_start(many, config, 1).await.unwrap();
    // 172.16.0.0 is the address of a host all the same.
    source.until("all are peers", |cluster| cluster.peers.len() == 1000).await;
    for n in 1000..1100_u32 {
        let name = format!("p{n}");
        server.store().add_node(&name, Some(&format!("10.{}.{}.0/24", 100 + n / 256, n % 256)));
        server.store().annotate_as_flannel(&name, &format!("172.16.{}.{}", n / 256, n % 256), &mac(2));
    }
    source.until("all are peers", |cluster| cluster.peers.len() == 1100).await;
    assert_eq!(server.store().listings(), 1);
}
