//! Whatever an agent prints, writes or answers, at whatever verbosity: no password and no key is in it.

use std::{fs, sync::Arc, time::Duration};

use loden_tests::{
    cluster::{Cluster, PREFIX, Plan},
    etcd::{Authority, Etcd},
    netns::Netns,
    node::{Node, binary},
    process::wait_for,
    said::{self, Said},
};

const PASSWORD: &str = "pass-the-wool-7d1f";

#[test]
fn no_password_and_no_key_is_in_anything_that_an_agent_says() {
    let cluster = Cluster::create(&Plan { nodes: 0, ..Plan::default() }).unwrap();
    let netns = Netns::create("secretive").unwrap();
    let address = cluster.underlay().plug(&netns, 40).unwrap();
    netns.ip("link set lo up").unwrap();
    let authority = Arc::new(Authority::new("loden").unwrap());
    let mut etcd = netns.run(|| Etcd::with_tls(Arc::clone(&authority), true).unwrap());
    netns.run(|| {
        let config = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;
        for args in [
            &["put", &format!("{PREFIX}/config"), config][..],
            &["user", "add", "root:rootword"],
            &["user", "add", &format!("loden:{PASSWORD}")],
            &["role", "add", "network"],
            &["role", "grant-permission", "network", "readwrite", "--prefix", PREFIX],
            &["user", "grant-role", "root", "root"],
            &["user", "grant-role", "loden", "network"],
            &["auth", "enable"],
        ] {
            etcd.ctl(args).unwrap();
        }
    });
    let directory = cluster.directory().join("secretive");
    let bpffs = cluster.bpffs().join("secretive");
    let mut node =
        Node::new("secretive", netns, address, etcd.endpoint(), directory, bpffs, binary().unwrap()).unwrap();
    let client = authority.client();
    let files = [
        format!("--etcd-cafile={}", authority.certificate().display()),
        format!("--etcd-certfile={}", client.cert.display()),
        format!("--etcd-keyfile={}", client.key.display()),
        "--etcd-username=loden".to_owned(),
        format!("--etcd-password={PASSWORD}"),
    ];
    let mut args: Vec<&str> = files.iter().map(String::as_str).collect();
    args.extend(said::FLAGS);
    // Whatever is logged at another level is logged at this one.
    args.push("--log=trace");
    node.start_agent(&args).unwrap();
    // Failures are told of as well.
    node.netns().run(|| etcd.kill());
    wait_for("the outage in the log", Duration::from_secs(20), || {
        node.log().contains("not following etcd").then_some(())
    })
    .unwrap();
    let password = format!("--etcd-password={PASSWORD}");
    let mut all = Said::by(&node, &[&password]).unwrap();
    node.netns().run(|| etcd.restart().unwrap());
    all.append(Said::by(&node, &[&password]).unwrap());
    assert!(node.log().contains("TRACE"), "the log held what it could hold");
    node.stop_agent().unwrap();
    let wrong = format!("--etcd-endpoints=http://loden:{PASSWORD}@192.168.64.5:2379");
    assert!(
        !node.loden_output(&["agent", &wrong]).unwrap().status.success(),
        "a URL with a password is refused"
    );
    all.add_output("a refused URL", &node, &["agent", &wrong]).unwrap();
    all.add_output("a misspelt flag", &node, &["agent", &format!("--etcd-pasword={PASSWORD}")]).unwrap();

    let key = fs::read_to_string(&client.key).unwrap();
    let secrets: Vec<&str> =
        key.lines().filter(|line| !line.starts_with("-----")).chain([PASSWORD]).collect();
    assert_eq!(all.find(&secrets).unwrap(), None);
}
