//! TLS and etcd's own authentication.

use std::{sync::Arc, time::Duration};

use loden_agent::registry::{EtcdOptions, Registry, RegistryError};
use loden_tests::etcd::{Authority, Etcd};

use crate::node::*;

fn configured(etcd: Etcd) -> Etcd {
    etcd.ctl(&["put", &format!("{PREFIX}/config"), CONFIG]).unwrap();
    etcd
}

async fn error(options: EtcdOptions) -> String {
    let error = match Registry::connect(options).await {
        Ok(registry) => registry.network_config().await.map(|_| ()).unwrap_err(),
        Err(error) => error,
    };
    let text = error.to_string();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

async fn works(options: EtcdOptions) {
    let registry = Registry::connect(options).await.unwrap();
    let node = Node::join(&registry, claim(1)).await.unwrap();
    node.until("it follows etcd", |cluster| cluster.connected).await;
    node.keeper.release().await.unwrap();
}

#[tokio::test]
async fn tls_works_with_the_authority_alone_and_not_without() {
    let authority = Arc::new(Authority::new("loden").unwrap());
    let etcd = configured(Etcd::with_tls(Arc::clone(&authority), false).unwrap());
    let with = |ca_file| EtcdOptions { ca_file, ..options(&[etcd.endpoint()]) };
    works(with(Some(authority.certificate()))).await;
    let stranger = Authority::new("loden").unwrap();
    for ca_file in [None, Some(stranger.certificate())] {
        let error = error(with(ca_file)).await;
        assert!(error.contains("invalid peer certificate"), "{error}");
    }
}

#[tokio::test]
async fn mutual_tls_works_and_a_missing_certificate_does_not() {
    let authority = Arc::new(Authority::new("loden").unwrap());
    let etcd = configured(Etcd::with_tls(Arc::clone(&authority), true).unwrap());
    let client = authority.client().clone();
    let alone = EtcdOptions { ca_file: Some(authority.certificate()), ..options(&[etcd.endpoint()]) };
    works(EtcdOptions {
        cert_file: Some(client.cert.clone()),
        key_file: Some(client.key.clone()),
        ..alone.clone()
    })
    .await;
    let without = error(alone.clone()).await;
    assert!(without.contains("does it want a client certificate? None is given"), "{without}");
    let half = error(EtcdOptions { cert_file: Some(client.cert.clone()), ..alone.clone() }).await;
    assert!(half.contains("a certificate file is given without its key file"), "{half}");
    let wrong = EtcdOptions {
        cert_file: Some(client.cert.clone()),
        key_file: Some(client.cert.clone()),
        ..alone.clone()
    };
    let wrong = error(wrong).await;
    assert!(wrong.contains("client.pem holds no PEM block of a private key"), "{wrong}");
    let missing = error(EtcdOptions { ca_file: Some("/nonexistent/ca.pem".into()), ..alone }).await;
    assert!(missing.contains("cannot read /nonexistent/ca.pem"), "{missing}");
}

/// Turns authentication on, with a user who may do what flannel's documentation grants.
fn authenticated(flags: &[&str]) -> Etcd {
    let etcd = configured(Etcd::with_flags(flags).unwrap());
    for args in [
        &["user", "add", "root:rootword"][..],
        &["user", "add", "loden:secretword"],
        &["user", "add", "nobody:secretword"],
        &["role", "add", "network"],
        &["role", "grant-permission", "network", "readwrite", "--prefix", "/coreos.com/network/subnets"],
        &["role", "grant-permission", "network", "read", "/coreos.com/network/config"],
        &["user", "grant-role", "loden", "network"],
        &["auth", "enable"],
    ] {
        etcd.ctl(args).unwrap();
    }
    etcd
}

fn user(etcd: &Etcd, username: &str, password: &str) -> EtcdOptions {
    let (username, password) = (Some(username.to_owned()), Some(password.to_owned()));
    EtcdOptions { username, password, ..options(&[etcd.endpoint()]) }
}

fn as_root(etcd: &Etcd, args: &[&str]) {
    etcd.ctl(&[&["--user", "root:rootword"], args].concat()).unwrap();
}

#[tokio::test]
async fn a_user_with_just_the_prefix_can_do_everything_and_others_are_told_why_not() {
    let etcd = authenticated(&[]);
    works(user(&etcd, "loden", "secretword")).await;
    let wrong = error(user(&etcd, "loden", "otherword")).await;
    assert!(wrong.contains("authentication failed") && !wrong.contains("otherword"), "{wrong}");
    let nobody = error(user(&etcd, "nobody", "secretword")).await;
    assert!(nobody.contains("permission denied"), "{nobody}");
    let anonymous = error(options(&[etcd.endpoint()])).await;
    assert!(anonymous.contains("user name is empty"), "{anonymous}");
    let half = EtcdOptions { username: Some("loden".into()), ..options(&[etcd.endpoint()]) };
    assert!(matches!(Registry::connect(half).await, Err(RegistryError::Options(_))));
}

#[tokio::test]
async fn a_token_that_ran_out_is_renewed() {
    let etcd = authenticated(&["--auth-token-ttl", "1"]);
    let registry = Registry::connect(user(&etcd, "loden", "secretword")).await.unwrap();
    let short = loden_agent::registry::Claim { ttl: Duration::from_secs(9), ..claim(1) };
    let node = Node::join(&registry, short).await.unwrap();
    node.until("it follows etcd", |cluster| cluster.connected).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(
        node.now().renewed.unwrap().elapsed() < Duration::from_secs(4),
        "renewed by a token that ran out"
    );
    assert_eq!(held(&node.now()), Some(&node.lease));
    as_root(&etcd, &["put", &key(net("10.5.240.0/24")), &attrs(2).to_json()]);
    node.until("the watch goes on", |cluster| peers_are(cluster, &[2])).await;
    node.keeper.release().await.unwrap();
}

#[tokio::test]
async fn a_change_of_users_and_roles_does_not_stop_a_node_whose_token_it_makes_old() {
    let authority = Authority::new("loden").unwrap();
    let flags = authority.jwt_flags().unwrap();
    let mut etcd = authenticated(&flags.each_ref().map(String::as_str));
    let registry = Registry::connect(user(&etcd, "loden", "secretword")).await.unwrap();
    let node = Node::join(&registry, claim(1)).await.unwrap();
    node.until("it follows etcd", |cluster| cluster.connected).await;
    as_root(&etcd, &["role", "add", "another"]);
    registry.network_config().await.unwrap();
    as_root(&etcd, &["role", "add", "and-another"]);
    etcd.kill();
    node.until("it notices", |cluster| !cluster.connected).await;
    etcd.restart().unwrap();
    as_root(&etcd, &["put", &key(net("10.5.240.0/24")), &attrs(2).to_json()]);
    node.until("it follows again", |cluster| cluster.connected && peers_are(cluster, &[2])).await;
}

#[tokio::test]
async fn the_certificates_name_is_the_user() {
    let authority = Arc::new(Authority::new("loden").unwrap());
    let etcd = configured(Etcd::with_tls(Arc::clone(&authority), true).unwrap());
    for args in [
        &["user", "add", "root:rootword"][..],
        &["user", "add", "loden", "--no-password"],
        &["role", "add", "network"],
        &["role", "grant-permission", "network", "readwrite", "--prefix", "/coreos.com/network/"],
        &["user", "grant-role", "loden", "network"],
        &["auth", "enable"],
    ] {
        etcd.ctl(args).unwrap();
    }
    let client = authority.client().clone();
    let (cert_file, key_file) = (Some(client.cert), Some(client.key));
    works(EtcdOptions {
        ca_file: Some(authority.certificate()),
        cert_file,
        key_file,
        ..options(&[etcd.endpoint()])
    })
    .await;
}
