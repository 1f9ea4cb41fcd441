//! Who gets in by a kubeconfig, and what becomes of credentials that are renewed in it.

use std::{path::Path, time::Duration};

use loden_agent::kube::{Api, KubeError, KubeOptions};
use loden_tests::etcd::Authority;

use crate::{
    server::{Cut, Server},
    source::{Source, mac, network, options},
};

/// Writes a kubeconfig with this authority and token, and returns the options that name it.
fn by_kubeconfig(file: &Path, server: &Server, ca: &Path, token: &str) -> KubeOptions {
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters:\n- name: k\n  cluster:\n    server: {}\n    \
         certificate-authority: {}\nusers:\n- name: u\n  user:\n    token: {token}\ncontexts:\n- name: c\n  context:\n    \
         cluster: k\n    user: u\n",
        server.url(),
        ca.display()
    );
    std::fs::write(file, text).unwrap();
    let mut options = options("");
    options.config.api_url = None;
    options.config.kubeconfig = Some(file.to_owned());
    options
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewed_kubeconfig_is_read_again_when_the_old_one_no_longer_lets_in() {
    let authority = Authority::new("node").unwrap();
    let server = Server::with_tls(&authority, "first");
    for n in 1..=2 {
        server.store().add_node(&format!("n{n}"), Some(&format!("10.244.{n}.0/24")));
    }
    let directory = tempfile::tempdir().unwrap();
    let (file, ca) = (directory.path().join("kubeconfig"), authority.certificate());
    let write = |token: &str| by_kubeconfig(&file, &server, &ca, token);
    let deny_old = |token: &str| {
        let mut store = server.store();
        store.token = Some(token.to_owned());
        store.cut(Cut::Clean);
    };

    // While it starts.
    let api = Api::connect(write("nonsense")).await.unwrap();
    let denied = |error| matches!(error, KubeError::Denied { .. });
    assert!(api.own_node("n1", &network()).await.is_err_and(denied));
    write("first");
    api.own_node("n1", &network()).await.unwrap();

    let source = Source::try_start(write("first"), network(), 1).await.unwrap();
    source.until("it follows the API", |cluster| cluster.connected).await;
    write("second");
    deny_old("second");
    server.store().annotate_as_flannel("n2", "192.168.64.2", &mac(2));
    source.until_peers(&[2]).await;

    // Half written, it leaves the old one in use, and is read again.
    std::fs::write(&file, "apiVersion: v1\nkind: Con").unwrap();
    deny_old("third");
    source.until("it is denied", |cluster| !cluster.connected).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    deny_old("second");
    source.until("the old one lets in", |cluster| cluster.connected).await;
    deny_old("third");
    write("third");
    server.store().delete_node("n2");
    source.until_peers(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_renewed_authority_is_read_again_after_some_silence() {
    let (first, second) = (Authority::new("node").unwrap(), Authority::new("node").unwrap());
    let server = Server::with_tls(&first, "let-me-in");
    server.store().add_node("n1", Some("10.244.1.0/24"));
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("kubeconfig");
    let api = Api::connect(by_kubeconfig(&file, &server, &second.certificate(), "let-me-in")).await.unwrap();
    by_kubeconfig(&file, &server, &first.certificate(), "let-me-in");
    for _ in 0..3 {
        let error = api.own_node("n1", &network()).await.map(drop).unwrap_err();
        assert!(matches!(error, KubeError::Unreachable { .. }), "{error}");
    }
    api.own_node("n1", &network()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kubeconfig_with_tls_and_a_token_lets_in_and_others_stay_out() {
    let authority = Authority::new("node").unwrap();
    let server = Server::with_tls(&authority, "let-me-in");
    server.store().add_node("n1", Some("10.244.1.0/24"));
    let directory = tempfile::tempdir().unwrap();
    let with =
        |name: &str, ca: &Path, token: &str| by_kubeconfig(&directory.path().join(name), &server, ca, token);
    let start = |options| Source::try_start(options, network(), 1);
    start(with("right", &authority.certificate(), "let-me-in")).await.unwrap();

    let other = Authority::new("node").unwrap();
    let error = start(with("ca", &other.certificate(), "let-me-in")).await.err().unwrap().to_string();
    assert!(error.contains("cannot get a node") && error.contains("certificate"), "{error}");
    let error = start(with("token", &authority.certificate(), "nonsense")).await.err().unwrap().to_string();
    assert!(error.contains("may not get a node: Unauthorized"), "{error}");
    let missing = directory.path().join("none.yaml");
    let mut options = options("");
    options.config.kubeconfig = Some(missing.clone());
    let error = start(options).await.err().unwrap().to_string();
    assert!(error.contains(&format!("--kubeconfig-file={}", missing.display())), "{error}");
}
