//! The network config: missing, wrong, and changed while nodes run.

use loden_agent::registry::{ConfigState, RegistryError};
use loden_tests::etcd::Etcd;

use crate::node::*;

#[tokio::test]
async fn a_missing_or_wrong_config_is_a_clear_error() {
    let etcd = Etcd::on_loopback().unwrap();
    let registry = connect(&etcd).await;
    let error = registry.network_config().await.unwrap_err();
    assert!(matches!(&error, RegistryError::NoConfig { key } if key == "/coreos.com/network/config"));
    assert_eq!(
        error.to_string(),
        "no network config in etcd at /coreos.com/network/config: create it (etcdctl put /coreos.com/network/config '{\"Network\": \"10.5.0.0/16\"}') or set --etcd-prefix to where it is"
    );
    etcd.ctl(&["put", "/coreos.com/network/config", r#"{"Network":"10.5.0.0/30"}"#]).unwrap();
    assert_eq!(
        registry.network_config().await.unwrap_err().to_string(),
        "network config: Network 10.5.0.0/30 is too small: the longest useful prefix is /28 (in etcd at /coreos.com/network/config)"
    );
    etcd.ctl(&["put", "/coreos.com/network/config", r#"{"Network":"192.168.0.0/16"}"#]).unwrap();
    assert_eq!(registry.network_config().await.unwrap().v4.unwrap().network, net("192.168.0.0/16"));
}

#[tokio::test]
async fn a_changed_config_is_reported_and_harmless_parts_are_taken_over() {
    let etcd = etcd_with(CONFIG);
    let node = Node::start(&etcd, 1).await;
    let put = |config: &str| etcd.ctl(&["put", &format!("{PREFIX}/config"), config]).unwrap();
    put(r#"{"Network":"10.4.0.0/15","Backend":{"Type":"vxlan","VNI":2}}"#);
    let restart = ConfigState::NeedsRestart(vec!["Network", "Backend"]);
    node.until("it names the keys", |cluster| cluster.config == restart).await;
    etcd.ctl(&["put", &format!("{PREFIX}/subnets/10.4.9.0-24"), &attrs(2).to_json()]).unwrap();
    node.until("a peer in the new network is one", |cluster| peers_are(cluster, &[2])).await;

    put("{");
    node.until("it says what is wrong", |cluster| matches!(&cluster.config, ConfigState::Invalid(_))).await;
    etcd.ctl(&["del", &format!("{PREFIX}/config")]).unwrap();
    node.until("it says that it is gone", |cluster| cluster.config == ConfigState::Missing).await;

    put(r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.199.0","SubnetMax":"10.5.199.0"}"#);
    node.until("bounds need no restart", |cluster| cluster.config == ConfigState::Current).await;
    assert_eq!(held(&node.now()), Some(&node.lease), "it keeps what it has");
    etcd.ctl(&["put", &key(node.lease.subnet()), &attrs(3).to_json()]).unwrap();
    let moved = |cluster: &_| held(cluster).is_some_and(|lease| lease.subnet() == net("10.5.199.0/24"));
    node.until("the next pick is by the new bounds", moved).await;
}
