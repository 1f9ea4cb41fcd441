//! The host refuses what the agent asks for: pins, memory, files, capabilities.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use loden_tests::{
    bpffs::Bpffs,
    cluster::{Cluster, Plan},
    each_family,
    family::Family,
    netns::run,
    node::{Node, binary},
    process::wait_for,
    remains,
    traffic::{ping, wait_for_answer},
};
use tempfile::TempDir;

use crate::{assert_fast, assert_reach, wait_ready};

/// A script that starts the agent in a way of its own: `prefix` is what comes before the command.
fn wrapped(prefix: &str) -> (TempDir, PathBuf) {
    let directory = remains::directory("wrapper").unwrap();
    let wrapper = directory.path().join("loden");
    fs::write(&wrapper, format!("#!/bin/sh\n{prefix} {} \"$@\"\n", binary().unwrap().display())).unwrap();
    fs::set_permissions(&wrapper, Permissions::from_mode(0o755)).unwrap();
    (directory, wrapper)
}

/// Whether the agent of a node has left the packets to the kernel, for a reason that contains this.
fn assert_on_the_kernel_alone(node: &Node, reason: &str) {
    let status = node.status().unwrap();
    assert_eq!(status["datapath"], "kernel", "{status:#}");
    let told = status["datapath_reason"].as_str().unwrap();
    assert!(told.contains(reason), "{told}");
    assert!(!told.contains('\n'), "one line: {told}");
    assert!(node.log().contains(told), "the log says it too: {}", node.log());
}

fn remount(path: &Path, how: &str) {
    run("mount", &["-o", &format!("remount,{how}"), &path.display().to_string()]).unwrap();
}

each_family!(
    where_nothing_can_be_pinned_the_kernel_alone_carries_the_packets,
    where_there_is_no_memory_for_the_maps_the_kernel_alone_carries_the_packets,
    a_run_directory_that_becomes_read_only_stops_nothing,
);

fn where_nothing_can_be_pinned_the_kernel_alone_carries_the_packets<F: Family>() {
    let mut cluster = Cluster::create(&F::alone()).unwrap();
    let pins = Bpffs::mount(cluster.nodes[0].bpffs()).unwrap();
    remount(pins.path(), "ro");
    cluster.nodes[0].launch_agent(&["--datapath=ebpf"]).unwrap();
    let status = cluster.nodes[0].wait_until_ended(Duration::from_secs(10)).unwrap();
    assert!(!status.success(), "--datapath=ebpf means it");
    assert!(cluster.nodes[0].log().contains("Read-only file system"), "{}", cluster.nodes[0].log());
    for node in &mut cluster.nodes {
        node.start_agent(&[]).unwrap();
        node.make_bridge().unwrap();
    }
    cluster.wait_for_routes().unwrap();
    assert_on_the_kernel_alone(&cluster.nodes[0], "Read-only file system");
    let containers = cluster.run_containers(1).unwrap();
    wait_for_answer(&containers[0], &containers[1]).unwrap();
    assert_reach(&containers[0], &containers[1]);
    cluster.nodes[0].stop_agent().unwrap();
    drop(pins);
}

#[test]
fn a_pod_whose_link_cannot_be_pinned_is_reached_by_the_kernel_until_it_can() {
    let mut cluster = Cluster::create(&Plan { nodes: 2, ..Plan::dual() }).unwrap();
    let pins = Bpffs::mount(cluster.nodes[0].bpffs()).unwrap();
    for node in &mut cluster.nodes {
        node.start_agent(&[]).unwrap();
        node.make_bridge().unwrap();
    }
    cluster.wait_for_routes().unwrap();
    let early = cluster.run_containers(1).unwrap();
    wait_for_answer(&early[0], &early[1]).unwrap();
    ping(early[0].netns(), early[1].address(), 10).unwrap();
    remount(pins.path(), "ro");
    let late = cluster.nodes[0].run_container(3).unwrap();
    wait_for_answer(&late, &early[1]).unwrap();
    assert_reach(&late, &early[1]);
    let node = &cluster.nodes[0];
    let told = wait_for("the agent to say so", Duration::from_secs(5), || {
        let status = node.status().ok()?;
        status["not_ready"]["datapath"].as_str().map(str::to_owned)
    })
    .unwrap();
    assert!(told.contains("links/") && told.contains("Read-only file system"), "{told}");
    assert_fast(&cluster.nodes, &early[0], &early[1]);
    remount(pins.path(), "rw");
    wait_ready(node, 35);
    assert_fast(&cluster.nodes, &late, &early[1]);
    cluster.nodes[0].stop_agent().unwrap();
    drop((late, early, pins));
}

/// A memory cgroup of version 1 or 2; what processes in it get is limited. Dropping it removes it.
struct MemoryLimit(PathBuf);

impl MemoryLimit {
    fn new(bytes: u64) -> Self {
        let root = Path::new("/sys/fs/cgroup");
        let (parent, file) = if root.join("memory").is_dir() {
            (root.join("memory"), "memory.limit_in_bytes")
        } else {
            (root.to_owned(), "memory.max")
        };
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let group = parent.join(format!("loden-{}-{number}", std::process::id()));
        fs::create_dir(&group).expect("a memory cgroup is needed");
        let limit = Self(group);
        fs::write(limit.0.join(file), bytes.to_string()).expect("the cgroup must have the memory controller");
        limit
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        // What ended is taken off its group a moment later.
        let gone =
            wait_for("the cgroup to be empty", Duration::from_secs(5), || fs::remove_dir(&self.0).ok());
        if let Err(error) = gone {
            eprintln!("{} is left behind: {error:#}", self.0.display());
        }
    }
}

fn where_there_is_no_memory_for_the_maps_the_kernel_alone_carries_the_packets<F: Family>() {
    // 2^20 slots of 32 bytes are 32 MiB, and the flows need some 16 more.
    let limit = MemoryLimit::new(36 << 20);
    let (_directory, wrapper) = wrapped(&format!("echo $$ > {}/cgroup.procs; exec", limit.0.display()));
    let config = if F::IS_IPV4 {
        r#"{"Network":"10.0.0.0/8","SubnetLen":28,"Backend":{"Type":"vxlan"}}"#
    } else {
        r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/44","Backend":{"Type":"vxlan"}}"#
    };
    let mut cluster = Cluster::create(&Plan { config: config.to_owned(), ..F::alone() }).unwrap();
    cluster.nodes[0].set_binary(wrapper);
    for node in &mut cluster.nodes {
        node.start_agent(&[]).unwrap();
        node.make_bridge().unwrap();
    }
    cluster.wait_for_routes().unwrap();
    assert_on_the_kernel_alone(&cluster.nodes[0], "Cannot allocate memory");
    assert_eq!(cluster.nodes[1].status().unwrap()["datapath"], "ebpf", "the other has memory");
    let containers = cluster.run_containers(1).unwrap();
    wait_for_answer(&containers[0], &containers[1]).unwrap();
    assert_reach(&containers[0], &containers[1]);
    drop(cluster);
}

/// A directory that cannot be written: it is mounted over itself, read-only. Dropping it unmounts it.
struct ReadOnly(PathBuf);

impl ReadOnly {
    fn make(path: PathBuf) -> Self {
        let name = path.display().to_string();
        run("mount", &["--bind", &name, &name]).unwrap();
        let read_only = Self(path);
        remount(&read_only.0, "bind,ro");
        read_only
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        if let Err(error) = run("umount", &[&self.0.display().to_string()]) {
            eprintln!("{} is left behind: {error:#}", self.0.display());
        }
    }
}

#[test]
fn a_run_directory_that_cannot_be_written_is_named_and_nothing_is_begun() {
    let mut cluster = Cluster::create(&Plan { nodes: 1, ..Plan::default() }).unwrap();
    let node = &mut cluster.nodes[0];
    let run = ReadOnly::make(node.run_directory());
    node.launch_agent(&[]).unwrap();
    assert!(!node.wait_until_ended(Duration::from_secs(10)).unwrap().success());
    let log = node.log();
    assert!(log.contains(&node.run_directory().display().to_string()), "{log}");
    assert!(log.contains("Read-only file system"), "{log}");
    assert!(node.netns().ip("link show flannel.1").is_err(), "nothing was made");
    assert!(cluster.leases().unwrap().is_empty());
    drop(run);
}

fn a_run_directory_that_becomes_read_only_stops_nothing<F: Family>() {
    let mut cluster = Cluster::create(&F::alone()).unwrap();
    for node in &mut cluster.nodes {
        node.start_agent(&[]).unwrap();
        node.make_bridge().unwrap();
    }
    cluster.wait_for_routes().unwrap();
    let run = ReadOnly::make(cluster.nodes[0].run_directory());
    let containers = cluster.run_containers(1).unwrap();
    let node = &cluster.nodes[0];
    node.netns().ip(&format!("{} route flush dev {} proto 76", F::FLAG, F::DEVICE)).unwrap();
    cluster.wait_for_routes().unwrap();
    wait_ready(node, 5);
    wait_for_answer(&containers[0], &containers[1]).unwrap();
    assert_fast(&cluster.nodes, &containers[0], &containers[1]);
    cluster.nodes[0].stop_agent().unwrap();
    drop((containers, run));
}

#[test]
fn a_directory_of_subnet_env_that_cannot_be_written_is_told_and_tried_again() {
    let mut cluster = Cluster::create(&Plan { nodes: 1, ..Plan::default() }).unwrap();
    let node = &mut cluster.nodes[0];
    let directory = node.run_directory().join("env");
    fs::create_dir(&directory).unwrap();
    let mounted = ReadOnly::make(directory.clone());
    let file = directory.join("subnet.env");
    node.launch_agent(&["--subnet-file", &file.display().to_string()]).unwrap();
    let told = wait_for("the agent to say so", Duration::from_secs(15), || {
        node.status().ok()?["not_ready"]["datapath"].as_str().map(str::to_owned)
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", node.log()));
    assert!(told.contains("subnet.env") && told.contains("Read-only file system"), "{told}");
    assert!(node.netns().ip("link show flannel.1").is_ok(), "the rest is done");
    drop(mounted);
    wait_ready(node, 35);
    assert!(file.exists());
}

#[test]
fn without_the_capability_to_change_the_network_the_agent_ends_and_names_it() {
    let (_directory, wrapper) = wrapped("exec /usr/bin/setpriv --bounding-set=-net_admin");
    let mut cluster = Cluster::create(&Plan { nodes: 1, binary: Some(wrapper), ..Plan::default() }).unwrap();
    let node = &mut cluster.nodes[0];
    node.launch_agent(&[]).unwrap();
    assert!(!node.wait_until_ended(Duration::from_secs(10)).unwrap().success());
    assert!(node.log().contains("CAP_NET_ADMIN"), "{}", node.log());
    assert!(cluster.leases().unwrap().is_empty(), "no subnet is taken for a node that cannot use it");
}

#[test]
fn wireguard_is_used_where_the_kernel_has_it_and_a_kernel_without_is_told_of_by_name() {
    let config = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"wireguard"}}"#.to_owned();
    let mut cluster = Cluster::create(&Plan { nodes: 1, config, ..Plan::default() }).unwrap();
    let node = &mut cluster.nodes[0];
    if node.netns().ip("link add probe type wireguard").is_ok() {
        // What it does then, the tests of `cargo xtask test --kernels` prove.
        println!("this kernel has WireGuard, so nothing is shown of one without");
        node.start_agent(&[]).unwrap();
        assert_eq!(node.status().unwrap()["backend"], "wireguard");
        assert!(node.wireguard_key_file().exists());
        return;
    }
    node.launch_agent(&[]).unwrap();
    assert!(!node.wait_until_ended(Duration::from_secs(10)).unwrap().success());
    let log = node.log();
    assert!(log.contains("this kernel has no WireGuard") && log.contains("modprobe wireguard"), "{log}");
    assert!(!node.wireguard_key_file().exists(), "no key is made that nobody uses");
    assert_eq!(cluster.leases().unwrap(), [], "and no lease is taken");
}
