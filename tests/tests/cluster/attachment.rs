//! Where the programs are, on any kernel: each hook has its own exactly once, and none where none is wanted.
//!
//! Before TCX (Linux 6.6) they are filters of a clsact qdisc, which outlive whoever made them.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    time::Duration,
};

use aya::programs::{SchedClassifier, TcAttachType, loaded_programs};
use loden_tests::{
    cluster::{Cluster, Plan},
    node::{BRIDGE, Node, binary},
    process::wait_for,
    remains,
    traffic::ping,
};

use crate::{assert_all_reach_all, show_logs};

/// Interface, side, and the program there, on nodes of both families.
const HOOKS: [(&str, TcAttachType, &str); 8] = [
    ("eth0", TcAttachType::Ingress, "from_wire"),
    (BRIDGE, TcAttachType::Ingress, "from_other"),
    ("flannel.1", TcAttachType::Ingress, "from_overlay"),
    ("flannel.1", TcAttachType::Egress, "to_overlay"),
    ("flannel-v6.1", TcAttachType::Ingress, "from_overlay"),
    ("flannel-v6.1", TcAttachType::Egress, "to_overlay"),
    ("veth1", TcAttachType::Ingress, "from_pod"),
    ("veth1", TcAttachType::Egress, "to_pod"),
];

/// The programs at a hook: the names of TCX's, where the kernel has that, and of filters.
fn programs_at(node: &Node, interface: &str, side: TcAttachType) -> (Vec<String>, Vec<String>) {
    let tcx = node.netns().run(|| SchedClassifier::query_tcx(interface, side));
    let tcx = tcx.map_or_else(
        |_| Vec::new(),
        |(_, programs)| programs.iter().map(|p| p.name_as_str().unwrap().to_owned()).collect(),
    );
    let side = if side == TcAttachType::Ingress { "ingress" } else { "egress" };
    let filters = node.netns().exec(&format!("tc filter show dev {interface} {side}")).unwrap_or_default();
    // The second is from_other's.
    let handles = ["handle 0x10de ", "handle 0x10df "];
    let name = |line: &str| {
        handles
            .iter()
            .find_map(|handle| line.split(handle).nth(1))?
            .split_whitespace()
            .next()
            .map(str::to_owned)
    };
    (tcx, filters.lines().filter_map(name).collect())
}

fn assert_each_once(node: &Node, when: &str) {
    for (interface, side, program) in HOOKS {
        let (tcx, filters) = programs_at(node, interface, side);
        assert_eq!([&*tcx, &*filters].concat(), [program], "{when}: {side:?} of {interface}: {}", node.log());
    }
}

fn assert_none(node: &Node, when: &str) {
    for (interface, side, _) in HOOKS {
        let (tcx, filters) = programs_at(node, interface, side);
        assert!(tcx.is_empty() && filters.is_empty(), "{when}: {interface} {side:?}: {tcx:?} {filters:?}");
    }
}

/// Says what `cargo xtask test --kernels` puts into its table.
fn say_what_this_kernel_does(node: &Node) {
    let (tcx, _) = programs_at(node, "eth0", TcAttachType::Ingress);
    println!("guest: attached by = {}", if tcx.is_empty() { "clsact" } else { "TCX" });
    let mut sizes: Vec<String> = loaded_programs()
        .flatten()
        .filter(|info| {
            info.name_as_str().is_some_and(|name| HOOKS.iter().any(|(.., program)| *program == name))
        })
        .map(|info| {
            let name = info.name_as_str().unwrap();
            // Kernels before 5.16 do not say what the verifier went through.
            match info.verified_instruction_count() {
                Some(verified) if verified > 0 => format!("{name} {verified}"),
                _ => name.to_owned(),
            }
        })
        .collect();
    sizes.sort();
    sizes.dedup();
    println!("guest: programs = {}", sizes.join(", "));
}

#[test]
fn each_hook_has_its_program_once_through_restart_and_crash_and_none_after_the_end() {
    let plan = Plan { nodes: 2, ..Plan::dual() };
    let (mut cluster, containers) = Cluster::start_with_containers(&plan, &[]).unwrap();
    ping(containers[0].netns(), containers[1].address(), 20).unwrap();
    show_logs(&cluster);
    let node = &mut cluster.nodes[0];
    assert_each_once(node, "at first");
    say_what_this_kernel_does(node);
    node.stop_agent().unwrap();
    assert_each_once(node, "without an agent");
    node.start_agent(&["--gate=open"]).unwrap();
    assert_each_once(node, "after a restart with another gate");
    node.kill_agent();
    node.start_agent(&[]).unwrap();
    assert_each_once(node, "after a crash");
    node.stop_agent().unwrap();
    node.start_agent(&["--datapath=kernel"]).unwrap();
    assert_none(node, "with the kernel's path");
    node.stop_agent().unwrap();
    node.start_agent(&[]).unwrap();
    assert_each_once(node, "after the kernel's path");
    node.kill_agent();
    let file = node.subnet_file().display().to_string();
    node.loden(&["cleanup", "--keep-kernel", "--subnet-file", &file]).unwrap();
    assert_none(node, "after cleanup");
    assert_all_reach_all(&containers);
}

#[test]
fn a_program_that_somebody_detaches_is_attached_again_at_the_tick() {
    let plan = Plan { nodes: 2, ..Plan::dual() };
    let (cluster, containers) = Cluster::start_with_containers(&plan, &[]).unwrap();
    ping(containers[0].netns(), containers[1].address(), 20).unwrap();
    let node = &cluster.nodes[0];
    let (tcx, filters) = programs_at(node, "eth0", TcAttachType::Ingress);
    let links = node.bpffs().read_dir().unwrap().next().unwrap().unwrap().path().join("links");
    let pinned = || links.read_dir().map_or(0, Iterator::count);
    let all = pinned();
    if filters.is_empty() {
        for link in links.read_dir().unwrap() {
            fs::remove_file(link.unwrap().path()).unwrap();
        }
        assert!(!tcx.is_empty());
    } else {
        node.netns().exec("tc qdisc del dev eth0 clsact").unwrap();
        node.netns().exec("tc filter del dev veth1 ingress").unwrap();
    }
    assert!(programs_at(node, "eth0", TcAttachType::Ingress).1.is_empty());
    let limit = Duration::from_secs(40);
    // The kernel takes an unpinned link off a little later, so the pins tell that these are others; and the agent attaches
    // one after the other.
    wait_for("the programs to be back", limit, || {
        let is_back = |(interface, side, _): &(&str, TcAttachType, &str)| {
            let (tcx, filters) = programs_at(node, interface, *side);
            tcx.len() + filters.len() == 1
        };
        (pinned() == all && HOOKS.iter().all(is_back)).then_some(())
    })
    .unwrap();
    assert_each_once(node, "after the tick");
    assert_all_reach_all(&containers);
}

#[test]
fn an_agent_that_cannot_load_programs_names_what_is_missing_and_runs_on_the_kernel_alone() {
    let directory = remains::directory("caps").unwrap();
    let wrapper = directory.path().join("loden");
    // All that routes and rules take, but nothing that lets a process load programs.
    let script = format!(
        "#!/bin/sh\nexec /usr/bin/setpriv --bounding-set=-sys_admin,-bpf,-perfmon {} \"$@\"\n",
        binary().unwrap().display()
    );
    fs::write(&wrapper, script).unwrap();
    fs::set_permissions(&wrapper, Permissions::from_mode(0o755)).unwrap();
    let plan = Plan { nodes: 2, binary: Some(wrapper), ..Plan::dual() };
    let (cluster, containers) = Cluster::start_with_containers(&plan, &[]).unwrap();
    for node in &cluster.nodes {
        let status = node.status().unwrap();
        assert_eq!(status["datapath"], "kernel", "{status:#}");
        let reason = status["datapath_reason"].as_str().unwrap();
        assert!(reason.contains("no permission to load programs (CAP_BPF"), "{reason}");
        assert!(!reason.contains('\n'), "one line: {reason}");
        assert!(node.log().contains(reason), "the log says it too: {}", node.log());
        assert_none(node, "without the permission");
    }
    assert_all_reach_all(&containers);
}
