//! Whatever an agent prints, writes or answers, at whatever verbosity: no password and no key is in it.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    sync::Arc,
    time::Duration,
};

use loden_tests::{
    cluster::{Cluster, PREFIX, Plan},
    etcd::{Authority, Etcd},
    netns::Netns,
    node::{Node, binary},
    process::wait_for,
};

const PASSWORD: &str = "pass-the-wool-7d1f";

/// Everything that can be read of a node.
fn all_that_is_said(node: &Node) -> Vec<(&'static str, String)> {
    let printed = |args: &[&str]| {
        let output = node.loden_output(args).unwrap();
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    };
    let served = |path: &str| {
        let mut stream = node.netns().run(|| TcpStream::connect("127.0.0.1:9101").unwrap());
        write!(stream, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let password = format!("--etcd-password={PASSWORD}");
    vec![
        ("log", node.log()),
        ("status", printed(&["status"])),
        ("status --json", printed(&["status", "--json"])),
        ("doctor", printed(&["doctor", "--timeout-ms=100", &password])),
        ("doctor --json", printed(&["doctor", "--json", "--timeout-ms=100", &password])),
        ("metrics", served("/metrics")),
        ("readyz", served("/readyz")),
        ("facts.json", fs::read_to_string(node.run_directory().join("facts.json")).unwrap()),
        ("state", files_of(node)),
    ]
}

/// The run directory's files, together.
fn files_of(node: &Node) -> String {
    let entries = fs::read_dir(node.run_directory()).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.is_file()).map(|path| fs::read_to_string(path).unwrap()).collect()
}

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
        "--metrics-addr=127.0.0.1:9101".to_owned(),
        "--log=trace".to_owned(),
    ];
    let args: Vec<&str> = files.iter().map(String::as_str).collect();
    node.start_agent(&args).unwrap();
    // Failures are told of as well.
    node.netns().run(|| etcd.kill());
    wait_for("the outage in the log", Duration::from_secs(20), || {
        node.log().contains("not following etcd").then_some(())
    })
    .unwrap();
    let mut said = all_that_is_said(&node);
    node.netns().run(|| etcd.restart().unwrap());
    said.extend(all_that_is_said(&node));
    node.stop_agent().unwrap();
    let wrong = "--etcd-endpoints=http://loden:pass-the-wool-7d1f@192.168.64.5:2379";
    let output = node.loden_output(&["agent", wrong]).unwrap();
    assert!(!output.status.success(), "a URL with a password is refused");
    said.push(("a refused URL", String::from_utf8_lossy(&output.stderr).into_owned()));
    let output = node.loden_output(&["agent", &format!("--etcd-pasword={PASSWORD}")]).unwrap();
    said.push(("a misspelt flag", String::from_utf8_lossy(&output.stderr).into_owned()));

    let key = fs::read_to_string(&client.key).unwrap();
    let secrets = key.lines().filter(|line| !line.starts_with("-----")).chain([PASSWORD]);
    for secret in secrets {
        for (what, text) in &said {
            assert!(!text.is_empty(), "{what} says something");
            let line = text.lines().find(|line| line.contains(secret));
            assert_eq!(line, None, "{what} has a secret in it");
        }
    }
    // The log held what it could hold.
    assert!(said[0].1.contains("TRACE"), "the log is at trace level");
}
