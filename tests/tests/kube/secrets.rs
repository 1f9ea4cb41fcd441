//! Whatever an agent prints, writes or answers, and whatever goes wrong: the token by which the Kubernetes API knows it is
//! not in it.

use std::{fs, path::Path, time::Duration};

use loden_tests::{
    cluster::{Cluster, Plan},
    etcd::Authority,
    node::Node,
    process::wait_for,
    said::{self, Said},
};

use crate::server::{Cut, Fault, Server};

const TOKEN: &str = "sa-token-of-undyed-wool-5c0ffee";
const LIMIT: Duration = Duration::from_secs(20);

/// Writes a kubeconfig with this server and these credentials; returns the flag that names it.
fn kubeconfig(directory: &Path, cluster: &str, user: &str) -> String {
    let file = directory.join("kubeconfig");
    let text = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters:\n- name: k\n  cluster:\n    {cluster}\nusers:\n- name: u\n  \
         user: {user}\ncontexts:\n- name: c\n  context:\n    cluster: k\n    user: u\n"
    );
    fs::write(&file, text).unwrap();
    format!("--kubeconfig-file={}", file.display())
}

fn until_log(node: &Node, from: usize, says: &str) {
    wait_for(says, LIMIT, || node.log()[from..].contains(says).then_some(()))
        .unwrap_or_else(|error| panic!("{error:#}: {}", &node.log()[from..]));
}

#[test]
fn no_token_is_in_anything_that_an_agent_says() {
    let authority = Authority::new("node").unwrap();
    let mut cluster = Cluster::create(&Plan { nodes: 1, ..Plan::default() }).unwrap();
    let directory = cluster.directory();
    let node = &mut cluster.nodes[0];
    let server = Server::with_tls_inside(node.netns(), &authority, TOKEN);
    for n in 1..=2 {
        server.store().add_node(&format!("n{n}"), Some(&format!("10.244.{n}.0/24")));
    }
    server.store().annotate_as_flannel("n2", "192.168.64.99", "02:00:00:00:00:02");
    let (config, token_file) = (directory.join("net-conf.json"), directory.join("token"));
    fs::write(&config, crate::source::CONFIG).unwrap();
    fs::write(&token_file, TOKEN).unwrap();
    node.set_env("NODE_NAME", "n1");
    let ca = format!("certificate-authority: {}", authority.certificate().display());
    let right = format!("server: {}\n    {ca}", server.url());
    let from_file = format!("{{ tokenFile: {} }}", token_file.display());
    let net_config = format!("--net-config-path={}", config.display());
    let usual = ["--kube-subnet-mgr", &net_config, "--log=trace", said::FLAGS[0], said::FLAGS[1]];

    // A token as people have it, and one in a file as pods have it.
    let mut said = Said::default();
    for (user, format) in
        [(format!("{{ token: {TOKEN} }}"), "--log-format=human"), (from_file.clone(), "--log-format=json")]
    {
        let credentials = kubeconfig(&directory, &right, &user);
        let start = node.log().len();
        node.start_agent(&[&usual[..], &[&credentials, format]].concat()).unwrap();
        let from = node.log().len();
        server.store().fault = Some(Fault::Status(403));
        server.store().cut(Cut::MidLine);
        until_log(node, from, "not following the Kubernetes API");
        said.append(Said::by(node, &[]).unwrap());
        server.store().fault = None;
        until_log(node, from, "following the Kubernetes API again");
        said.append(Said::by(node, &[]).unwrap());
        node.stop_agent().unwrap();
        if format.ends_with("json") {
            for line in node.log()[start..].lines() {
                serde_json::from_str::<serde_json::Value>(line)
                    .unwrap_or_else(|error| panic!("{error}: {line}"));
            }
        }
    }

    // Whoever complains might repeat what is wrong.
    let exec = |script: &str| {
        format!(
            "{{ exec: {{ apiVersion: client.authentication.k8s.io/v1, interactiveMode: Never, command: sh, args: [-c, '{script}'] }} }}"
        )
    };
    let with_password = right.replace("https://", &format!("https://u:{TOKEN}@"));
    let by_proxy = format!("{right}\n    proxy-url: http://u:{TOKEN}@192.0.2.1:3128");
    let token = |text: &str| format!("{{ token: \"{text}\" }}");
    for (cluster, user, complaint) in [
        (&right, TOKEN.to_owned(), "it is not a kubeconfig at line "),
        (&right, format!("{{ token: [{TOKEN}] }}"), "it is not a kubeconfig at line "),
        (&right, format!("\"{TOKEN}"), "it is not a kubeconfig"),
        (&right, token(&format!("{TOKEN}\\n{TOKEN}")), "must be of printable ASCII characters"),
        (&right, token(&format!("not {TOKEN}")), "may not get a node: Unauthorized"),
        (&right, format!("{{ client-certificate-data: {TOKEN}, client-key-data: {TOKEN} }}"), "base64"),
        (&right, exec(&format!("echo {TOKEN}; exit 3")), "ended with exit status: 3"),
        (&right, exec(&format!("echo [{TOKEN}")), "is not an ExecCredential"),
        (&with_password, from_file.clone(), "must be without user and password"),
        (&by_proxy, from_file, "a proxy-url cannot be used"),
    ] {
        let credentials = kubeconfig(&directory, cluster, &user);
        let from = node.log().len();
        node.launch_agent(&[&usual[..], &[&credentials]].concat()).unwrap();
        until_log(node, from, complaint);
        node.kill_agent();
    }
    said.add("the log", node.log());
    let flag = format!("--kube-api-url=https://u:{TOKEN}@192.0.2.1:6443");
    said.add_output("a refused URL", node, &["agent", "--kube-subnet-mgr", &flag]).unwrap();
    let flag = format!("--kube-token={TOKEN}");
    said.add_output("a flag that there is not", node, &["agent", &flag]).unwrap();
    assert!(node.log().contains("TRACE"), "the log held what it could hold");
    assert_eq!(said.find(&[TOKEN]).unwrap(), None);
}
