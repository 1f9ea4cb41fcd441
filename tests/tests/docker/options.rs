//! `loden docker-opts`: what it writes is what dockerd starts with.

use std::fs;

use loden_tests::{netns::run, node::Node, traffic::hello};

use crate::{Fleet, assert_fast};

#[test]
fn a_dockerd_starts_with_what_docker_opts_writes() {
    // With --ip-masq the agent masquerades what leaves the network, and dockerd is told to leave that alone.
    let mut fleet = Fleet::without_engines(&["--ip-masq"]);
    fleet.start_engines(|node| {
        let options = options_by_shell(node);
        let env = node.subnet_env().unwrap();
        let expected =
            [format!("--bip={}", env.subnet), "--ip-masq=false".into(), format!("--mtu={}", env.mtu)];
        assert_eq!(options, expected);
        options
    });
    let [a, b] = fleet.pair();
    assert_fast(&fleet.cluster.nodes, &a, &b);
    let router = fleet.cluster.underlay().address(1).unwrap();
    let outside = loden_tests::traffic::Host { netns: fleet.cluster.underlay().netns(), address: router };
    assert_eq!(hello(a.host(), outside, None).unwrap(), fleet.cluster.nodes[0].address());
}

/// Writes the file and takes `$DOCKER_OPTS` from it as a unit's `ExecStart=` does: a shell reads the file, and the
/// value is split at blanks.
fn options_by_shell(node: &Node) -> Vec<String> {
    let file = node.directory().join("docker_opts.env");
    let (subnet, docker) = (node.subnet_file().display().to_string(), file.display().to_string());
    node.netns().exec(&format!("{} docker-opts -f {subnet} -d {docker}", loden())).unwrap();
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains("DOCKER_OPT_MTU="), "each option by itself as well: {text}");
    let words = run("sh", &["-c", ". \"$0\" && printf '%s\\n' $DOCKER_OPTS", &docker]).unwrap();
    words.lines().map(str::to_owned).collect()
}

fn loden() -> String {
    loden_tests::node::binary().unwrap().display().to_string()
}
