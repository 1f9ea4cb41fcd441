//! The start: who are we, what subnet have we, and what is wrong if there is none.

use loden_agent::kube::{Api, KubeError};

use crate::{
    server::{Fault, Server},
    source::{Source, cluster_of, network, options},
};

fn env<'a>(pairs: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> + 'a {
    move |name| pairs.iter().find(|(there, _)| *there == name).map(|(_, value)| (*value).to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_node_is_named_by_node_name_or_by_the_pod() {
    let server = cluster_of(1);
    server.store().add_pod("kube-system", "loden-x7", "n1");
    let api = Api::connect(options(&server.url())).await.unwrap();
    let name = |pairs: &'static [(&str, &str)]| {
        let api = api.clone();
        async move { api.node_name(&env(pairs)).await }
    };
    assert_eq!(
        name(&[("NODE_NAME", "other"), ("POD_NAME", "loden-x7"), ("POD_NAMESPACE", "kube-system")])
            .await
            .unwrap(),
        "other"
    );
    assert_eq!(
        name(&[("NODE_NAME", ""), ("POD_NAME", "loden-x7"), ("POD_NAMESPACE", "kube-system")]).await.unwrap(),
        "n1"
    );
    let error = name(&[("POD_NAME", "loden-x7")]).await.unwrap_err();
    assert!(error.to_string().contains("NODE_NAME must be set") && !error.may_pass(), "{error}");
    let error = name(&[("POD_NAME", "gone"), ("POD_NAMESPACE", "kube-system")]).await.unwrap_err();
    assert!(
        error.to_string().contains("cannot get this pod") && error.to_string().contains("404"),
        "{error}"
    );
    server.store().fault = Some(Fault::Of("GET /api/v1/namespaces", 403));
    let error = name(&[("POD_NAME", "loden-x7"), ("POD_NAMESPACE", "kube-system")]).await.unwrap_err();
    assert!(
        error.to_string().contains("set NODE_NAME to do without")
            && error.to_string().contains("get of pods"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_without_a_usable_subnet_says_what_is_missing() {
    let server = Server::on_loopback();
    let start = async || Source::try_start(options(&server.url()), network(), 1).await.err().unwrap();
    let error = start().await;
    assert!(matches!(error, KubeError::NoNode(_)) && error.may_pass(), "{error}");
    assert!(error.to_string().contains(r#"no node "n1": NODE_NAME"#), "{error}");

    server.store().add_node("n1", None);
    let error = start().await;
    assert!(
        error.may_pass() && error.to_string().contains("no podCIDR yet: kube-controller-manager"),
        "{error}"
    );

    server.store().change("n1", |node| node["spec"]["podCIDR"] = "10.9.1.0/24".into());
    let error = start().await;
    assert!(!error.may_pass(), "{error}");
    assert!(
        error.to_string().contains("podCIDR 10.9.1.0/24 is outside of the network 10.244.0.0/16"),
        "{error}"
    );

    server.store().fault = Some(Fault::Of("GET /api/v1/nodes/n1", 403));
    let error = start().await;
    assert!(error.may_pass() && error.to_string().contains("may not get a node"), "{error}");
    assert!(error.to_string().contains("patch of nodes/status"), "{error}");
    server.store().fault = Some(Fault::Of("PATCH ", 403));
    server.store().change("n1", |node| node["spec"]["podCIDR"] = "10.244.1.0/24".into());
    let error = start().await;
    assert!(error.to_string().contains("may not write the node's annotations"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_people_set_and_what_peers_know_is_read_at_the_start() {
    let server = cluster_of(2);
    server.store().annotate("n2", "node-public-ip", Some("10.0.0.9"));
    let api = Api::connect(options(&server.url())).await.unwrap();
    let own = api.own_node("n2", &network()).await.unwrap();
    assert_eq!(own.public_ip, Some([10, 0, 0, 9].into()));
    assert_eq!(own.vtep_mac, Some([2, 0, 0, 0, 0, 2]));
    let fresh = api.own_node("n1", &network()).await.unwrap();
    assert_eq!((fresh.public_ip, fresh.vtep_mac), (None, None));
}
