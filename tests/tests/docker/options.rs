//! `loden docker-opts`: what it writes is what dockerd starts with, as the units of `deploy/systemd` do it.

use std::fs;

use loden_tests::{
    netns::run,
    node::{Node, binary},
    traffic::{Host, hello},
};

use crate::{Fleet, assert_fast, units};

#[test]
fn a_dockerd_starts_with_what_docker_opts_writes() {
    // With --ip-masq the agent masquerades what leaves the network, and dockerd is told to leave that alone.
    let mut fleet = Fleet::without_engines(&["--ip-masq"]);
    fleet.start_engines(|node| {
        let options = options_by_units(node);
        let env = node.subnet_env().unwrap();
        let expected =
            [format!("--bip={}", env.subnet()), "--ip-masq=false".into(), format!("--mtu={}", env.mtu)];
        assert_eq!(options, expected);
        options
    });
    let [a, b] = fleet.pair();
    assert_fast(&fleet.cluster.nodes, &a, &b);
    let router = fleet.cluster.underlay().address(1).unwrap();
    let outside = Host { netns: fleet.cluster.underlay().netns(), address: router.into() };
    assert_eq!(hello(a.host(), outside, None).unwrap(), fleet.cluster.nodes[0].address());
}

/// Runs the agent's `ExecStartPost=` with this node's files, and takes from what it writes the variable that dockerd's
/// `ExecStart=` uses: a shell reads the file, and the value is split at blanks, as systemd does.
pub(crate) fn options_by_units(node: &Node) -> Vec<String> {
    let file = node.directory().join("docker_opts.env").display().to_string();
    let post = units::values(&units::read("loden.service"), "ExecStartPost").remove(0);
    let drop_in = units::read("docker.service.d/loden.conf");
    let written = units::values(&drop_in, "EnvironmentFile").remove(0);
    assert!(post.ends_with(&format!(" -d {written}")), "one writes what the other reads: {post}");
    let line =
        post.replace("/usr/bin/loden", &binary().unwrap().display().to_string()).replace(&written, &file);
    node.netns().exec(&format!("{line} -f {}", node.subnet_file().display())).unwrap();
    let start = units::values(&drop_in, "ExecStart").pop().unwrap();
    let variable = start.rsplit(' ').next().unwrap();
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains("DOCKER_OPT_MTU="), "each option by itself as well: {text}");
    let words = run("sh", &["-c", &format!(". \"$0\" && printf '%s\\n' {variable}"), &file]).unwrap();
    words.lines().map(str::to_owned).collect()
}
