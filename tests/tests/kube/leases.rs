//! What a node writes: flannel's annotations and condition, to the byte, and no more often than needed.

use std::time::Duration;

use loden_agent::{lease::LeaseAttrs, registry::Own};
use serde_json::{Value, json};

use crate::{
    server::Fault,
    source::{Source, attrs, cluster_of, lost, network, options, subnet},
};

const PATCH: &str = "PATCH /api/v1/nodes/n1/status";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn annotations_and_condition_are_flannels_to_the_byte_and_nothing_else_is_touched() {
    let server = cluster_of(1);
    let before = server.node("n1");
    let source = Source::start(&server).await;
    server.until("the condition", |store| {
        store.condition("n1", "NetworkUnavailable").unwrap()["status"] == "False"
    });
    let mut after = server.node("n1");

    let [annotations, condition] = &server.store().asked("PATCH ")[..] else { panic!() };
    assert!(
        annotations.uri.starts_with("/api/v1/nodes/n1/status")
            && condition.uri.starts_with("/api/v1/nodes/n1/status")
    );
    assert_eq!(annotations.content_type, "application/strategic-merge-patch+json");
    assert_eq!(
        annotations.body,
        concat!(
            r#"{"metadata":{"annotations":{"flannel.alpha.coreos.com/backend-data":"{\"VNI\":1,\"VtepMAC\":\"02:00:00:00:00:01\"}","#,
            r#""flannel.alpha.coreos.com/backend-type":"vxlan","flannel.alpha.coreos.com/kube-subnet-manager":"true","#,
            r#""flannel.alpha.coreos.com/public-ip":"192.168.64.1"}}}"#
        )
    );
    let set = server.store().condition("n1", "NetworkUnavailable").unwrap();
    let time = set["lastHeartbeatTime"].as_str().unwrap().to_owned();
    assert_eq!(
        set,
        json!({ "type": "NetworkUnavailable", "status": "False", "reason": "FlannelIsUp",
            "message": "Flannel is running on this node", "lastHeartbeatTime": time, "lastTransitionTime": time })
    );
    let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    assert_eq!(shape, "0000-00-00T00:00:00Z");

    // Put what was written back to what it was: nothing else may differ.
    after["metadata"]["annotations"] = before["metadata"]["annotations"].clone();
    after["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"].clone();
    after["status"]["conditions"][1] = before["status"]["conditions"][1].clone();
    assert_eq!(after, before);
    let Own::Held(lease) = &source.now().own else { panic!() };
    assert_eq!((lease.key.subnet, &lease.attrs), (Some(subnet(1)), &attrs(1)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_there_already_is_not_written_again() {
    let server = cluster_of(1);
    server.store().annotate_as_flannel("n1", "192.168.64.1", "02:00:00:00:00:01");
    let _source = Source::start(&server).await;
    server.until("the condition", |store| !store.asked("PATCH ").is_empty());
    let bodies: Vec<_> = server.store().asked("PATCH ").into_iter().map(|request| request.body).collect();
    assert!(bodies.len() == 1 && bodies[0].contains("NetworkUnavailable"), "{bodies:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_condition_is_left_alone_where_that_is_wanted() {
    let server = cluster_of(1);
    let mut quiet = options(&server.url());
    quiet.config.set_condition = false;
    let source = Source::try_start(quiet, network(), 1).await.unwrap();
    source.until("it follows", |cluster| cluster.connected).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(server.store().asked("PATCH ").len(), 1);
    assert_eq!(server.store().condition("n1", "NetworkUnavailable").unwrap()["status"], "True");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn host_gw_and_alloc_write_what_flannel_writes() {
    for (n, attrs, kind) in [
        (1, LeaseAttrs::host_gw([192, 168, 64, 1].into()), "host-gw"),
        (2, LeaseAttrs::alloc([192, 168, 64, 2].into()), ""),
    ] {
        let server = cluster_of(2);
        let api = loden_agent::kube::Api::connect(options(&server.url())).await.unwrap();
        let mut own = api.own_node(&format!("n{n}"), &network()).await.unwrap();
        api.publish(&mut own, &attrs).await.unwrap();
        let said = |end| server.annotation(&format!("n{n}"), end).unwrap();
        assert_eq!((said("backend-type").as_str(), said("backend-data").as_str()), (kind, "null"));
        assert_eq!(said("public-ip"), format!("192.168.64.{n}"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_somebody_changes_is_put_back() {
    let server = cluster_of(1);
    let _source = Source::start(&server).await;
    server.store().annotate("n1", "backend-data", Some(r#"{"VNI":1,"VtepMAC":"02:66:66:66:66:66"}"#));
    server.until("the MAC is ours", |store| {
        let node = store.node("n1").unwrap();
        node["metadata"]["annotations"]["flannel.alpha.coreos.com/backend-data"]
            == r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}"#
    });
    server.store().annotate("n1", "kube-subnet-manager", None);
    server.until("managed", |store| {
        store.node("n1").unwrap()["metadata"]["annotations"]["flannel.alpha.coreos.com/kube-subnet-manager"]
            == "true"
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_keeps_writing_otherwise_is_answered_ever_more_rarely() {
    let server = cluster_of(1);
    let _source = Source::start(&server).await;
    let start = std::time::Instant::now();
    while start.elapsed() < Duration::from_secs(4) {
        server.store().annotate("n1", "backend-type", Some("host-gw"));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let written =
        server.store().asked(PATCH).iter().filter(|request| request.body.contains("backend-type")).count();
    assert!((2..=5).contains(&written), "{written} writes in 4 s");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_overwrite_is_published_and_followed_while_it_runs() {
    let server = cluster_of(1);
    server.store().annotate("n1", "public-ip-overwrite", Some("203.0.113.7"));
    let source = Source::start(&server).await;
    assert_eq!(server.annotation("n1", "public-ip").unwrap(), "203.0.113.7");
    let public = |cluster: &loden_agent::registry::Cluster| match &cluster.own {
        Own::Held(lease) => lease.attrs.identity().map(|ip| ip.to_string()).unwrap_or_default(),
        Own::Lost { .. } => String::new(),
    };
    for (overwrite, published) in
        [(Some("203.0.113.8"), "203.0.113.8"), (Some("nonsense"), "192.168.64.1"), (None, "192.168.64.1")]
    {
        server.store().annotate("n1", "public-ip-overwrite", overwrite);
        source.until("it is followed", |cluster| public(cluster) == published).await;
        server.until("it is published", |store| {
            store.node("n1").unwrap()["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"]
                == published
        });
    }
    // The uplink gets another address.
    source.set_attrs(LeaseAttrs { public_ip: Some([192, 168, 64, 77].into()), ..attrs(1) });
    server.until("it is published", |store| {
        store.node("n1").unwrap()["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"]
            == "192.168.64.77"
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_registered_anew_gets_everything_again() {
    let server = cluster_of(2);
    let source = Source::start(&server).await;
    server.until("the condition", |store| {
        store.condition("n1", "NetworkUnavailable").unwrap()["status"] == "False"
    });
    server.store().delete_node("n1");
    let gone = source.until("the lease is lost", |cluster| lost(cluster).is_some()).await;
    assert!(lost(&gone).unwrap().contains("gone from the Kubernetes API"), "{:?}", lost(&gone));
    assert_eq!(gone.peers.len(), 1, "the peers stay");

    server.store().add_node("n1", None);
    let waits = source
        .until("it waits for a podCIDR", |cluster| {
            lost(cluster).is_some_and(|why| why.contains("no podCIDR"))
        })
        .await;
    assert_eq!(waits.peers.len(), 1);
    server.store().change("n1", |node| node["spec"]["podCIDR"] = json!("10.244.9.0/24"));
    source
        .until(
            "it has the new one",
            |cluster| matches!(&cluster.own, Own::Held(lease) if lease.key.subnet == Some(subnet(9))),
        )
        .await;
    server.until("annotations and condition", |store| {
        let node = store.node("n1").unwrap();
        node["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"] == "192.168.64.1"
            && store.condition("n1", "NetworkUnavailable").unwrap()["status"] == "False"
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_that_is_refused_is_tried_again_and_peers_are_followed_meanwhile() {
    let server = cluster_of(2);
    let source = Source::start(&server).await;
    server.until("the condition", |store| {
        store.condition("n1", "NetworkUnavailable").unwrap()["status"] == "False"
    });
    server.store().fault = Some(Fault::Of("PATCH ", 403));
    server.store().annotate("n1", "public-ip", Some("1.2.3.4"));
    server.store().annotate_as_flannel("n2", "192.168.64.2", "02:00:00:00:00:99");
    source.until("the peer's new MAC", |cluster| crate::source::vtep(cluster, 2) == Some(0x99)).await;
    server.store().fault = None;
    server.until("it is written after all", |store| {
        store.node("n1").unwrap()["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"]
            == "192.168.64.1"
    });
    assert!(source.now().connected);
}

/// The double's own rules, which the tests above rest on.
#[test]
fn the_doubles_conditions_are_merged_by_type() {
    let server = cluster_of(1);
    let types: Vec<Value> = server.node("n1")["status"]["conditions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["type"].clone())
        .collect();
    assert_eq!(types, ["Ready", "NetworkUnavailable"]);
}
