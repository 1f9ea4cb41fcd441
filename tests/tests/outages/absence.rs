//! Etcd, the agent, a peer, or the network between them is away for longer than anybody expected.

use std::{net::IpAddr, thread, time::Duration};

use ipnet::IpNet;
use loden_tests::{
    cluster::{Cluster, PREFIX, Plan, lease_key},
    each_family,
    family::Family,
    node::Node,
    process::wait_for,
    traffic::{hello, load, ping, wait_for_answer},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{SHORT_TTL, assert_fast, assert_reach, wait_ready};

each_family!(
    etcd_gone_for_many_missed_keepalives_changes_nothing_on_the_nodes,
    an_etcd_that_comes_back_empty_costs_no_packet,
    an_agent_that_reads_the_config_and_gets_no_lease_waits_for_one,
    an_agent_that_was_gone_for_long_finds_its_lease_and_who_came_and_left_meanwhile,
    a_peer_whose_lease_expires_is_forgotten_and_comes_back_with_its_subnet,
    a_partition_heals_whether_shorter_or_longer_than_the_leases,
);

/// Whether a node's kernel and maps know a peer: route, neighbour, FDB entry, slot.
fn knows<F: Family>(node: &Node, peer: &Peer) -> [bool; 4] {
    let show = |line: &str| node.netns().exec(line).unwrap();
    // The last two bytes of the part that tells subnets of the network apart.
    let [high, low] = match peer.subnet.network() {
        IpAddr::V4(base) => [0, base.octets()[2]],
        IpAddr::V6(base) => base.segments()[3].to_be_bytes(),
    };
    let map = node.bpffs().join(format!("v1/{}PEERS", F::MAPS));
    let value = show(&format!("bpftool -j map lookup pinned {} key {low} {high} 0 0", map.display()));
    let value: serde_json::Value = serde_json::from_str(&value).unwrap();
    let filled = value["value"].as_array().unwrap().iter().any(|byte| byte != "0x00");
    [
        node.has_route(peer.subnet).unwrap(),
        show(&format!("ip neigh show dev {}", F::DEVICE)).contains(&peer.mac),
        show(&format!("bridge fdb show dev {}", F::DEVICE)).contains(&peer.mac),
        filled,
    ]
}

struct Peer {
    subnet: IpNet,
    mac: String,
}

impl Peer {
    fn of<F: Family>(node: &Node) -> Self {
        let status = node.status().unwrap();
        let mac = status[F::DEVICE_IN_STATUS]["mac"].as_str();
        Self { subnet: F::subnet(node), mac: mac.unwrap_or_else(|| panic!("{status:#}")).to_owned() }
    }
}

fn wait_until_forgotten<F: Family>(node: &Node, peer: &Peer, limit: u64) {
    wait_for("the peer to be forgotten", Duration::from_secs(limit), || {
        (knows::<F>(node, peer) == [false; 4]).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {:?}", knows::<F>(node, peer)));
}

fn etcd_gone_for_many_missed_keepalives_changes_nothing_on_the_nodes<F: Family>() {
    let (mut cluster, containers) = Cluster::start_with_containers(&F::alone(), &[SHORT_TTL]).unwrap();
    let (a, b) = (&containers[0], &containers[1]);
    ping(a.netns(), F::of(b), 10).unwrap();
    let subnets = |cluster: &Cluster| -> Vec<_> {
        cluster.nodes.iter().map(|node| node.subnet_env().unwrap()).collect()
    };
    let before = subnets(&cluster);
    let lines = cluster.nodes[0].log().lines().count();
    cluster.etcd_mut().kill();
    // Three times the TTL: some nine keepalives in a row that nobody answers.
    let ((), report) = load::during(F::host(a), F::host(b), 10, || {
        thread::sleep(Duration::from_secs(16));
        Ok(())
    })
    .unwrap();
    assert_eq!((report.lost, report.repeated), (0, 0), "{report:?}");
    assert_fast(&cluster.nodes, a, b);
    for node in &cluster.nodes {
        assert_eq!(node.status().unwrap()["etcd"]["connected"], false);
    }
    let said = cluster.nodes[0].log().lines().count() - lines;
    assert!((1..=20).contains(&said), "{said} lines for one outage:\n{}", cluster.nodes[0].log());
    cluster.etcd_mut().restart().unwrap();
    for node in &cluster.nodes {
        wait_for("etcd to be watched again", Duration::from_secs(15), || {
            (node.status().ok()?["etcd"]["connected"] == true).then_some(())
        })
        .unwrap();
        wait_ready(node, 10);
    }
    assert_eq!(subnets(&cluster), before);
    assert_eq!(cluster.leases().unwrap().len(), 2);
    assert_fast(&cluster.nodes, a, b);
}

fn an_etcd_that_comes_back_empty_costs_no_packet<F: Family>() {
    let plan = F::alone();
    let (mut cluster, containers) = Cluster::start_with_containers(&plan, &[]).unwrap();
    let (a, b) = (&containers[0], &containers[1]);
    ping(a.netns(), F::of(b), 10).unwrap();
    let late = Pid::from_raw(i32::try_from(cluster.nodes[1].agent_id().unwrap()).unwrap());
    let leases = |cluster: &Cluster, count: usize| {
        wait_for("the leases", Duration::from_secs(20), || {
            (cluster.leases().ok()?.len() == count).then_some(())
        })
    };
    let ((), report) = load::during(F::host(a), F::host(b), 10, || {
        // One of them hears of it much later than the other.
        kill(late, Signal::SIGSTOP)?;
        cluster.etcd_mut().restart_empty()?;
        cluster.etcd().ctl(&["put", &format!("{PREFIX}/config"), &plan.config])?;
        leases(&cluster, 1)?;
        thread::sleep(Duration::from_secs(10));
        kill(late, Signal::SIGCONT)?;
        leases(&cluster, 2)?;
        thread::sleep(Duration::from_secs(2));
        Ok(())
    })
    .unwrap();
    assert_eq!((report.lost, report.repeated), (0, 0), "{report:?}");
    for node in &cluster.nodes {
        wait_ready(node, 10);
    }
    assert_fast(&cluster.nodes, a, b);
}

fn an_agent_that_reads_the_config_and_gets_no_lease_waits_for_one<F: Family>() {
    let mut cluster = Cluster::create(&Plan { nodes: 1, ..F::alone() }).unwrap();
    for command in [
        &["user", "add", "root:rootword"][..],
        &["user", "grant-role", "root", "root"],
        &["role", "add", "loden"],
        &["role", "grant-permission", "loden", "--prefix=true", "read", PREFIX],
        &["user", "add", "loden:word"],
        &["user", "grant-role", "loden", "loden"],
        &["auth", "enable"],
    ] {
        cluster.etcd().ctl(command).unwrap();
    }
    let credentials = ["--etcd-username=loden", "--etcd-password=word"];
    cluster.nodes[0].launch_agent(&credentials).unwrap();
    wait_for("the agent to say what it lacks", Duration::from_secs(10), || {
        let log = cluster.nodes[0].log();
        (log.contains("no lease yet") && log.contains("permission denied")).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}\n{}", cluster.nodes[0].log()));
    thread::sleep(Duration::from_secs(3));
    // Killed while it waits, it has noted what there is to undo.
    let node = &mut cluster.nodes[0];
    let has_device = |node: &Node| node.netns().ip(&format!("link show {}", F::DEVICE)).is_ok();
    assert!(has_device(node));
    node.kill_agent();
    let file = node.subnet_file().display().to_string();
    node.loden(&["cleanup", "--subnet-file", &file]).unwrap();
    assert!(!has_device(node), "what a killed agent has made is not cleaned up");
    node.launch_agent(&credentials).unwrap();
    let root = ["--user", "root:rootword"];
    let permission = ["role", "grant-permission", "loden", "--prefix=true", "readwrite", PREFIX];
    cluster.etcd().ctl(&[&root[..], &permission].concat()).unwrap();
    wait_ready(&cluster.nodes[0], 10);
    assert!(cluster.nodes[0].stop_agent().unwrap().success());
}

fn an_agent_that_was_gone_for_long_finds_its_lease_and_who_came_and_left_meanwhile<F: Family>() {
    let plan = Plan { nodes: 3, ..F::alone() };
    let (mut cluster, containers) = Cluster::start_with_containers(&plan, &[]).unwrap();
    let (a, b) = (&containers[0], &containers[1]);
    ping(a.netns(), F::of(b), 10).unwrap();
    let leaver = Peer::of::<F>(&cluster.nodes[2]);
    let subnet = cluster.nodes[0].subnet_env().unwrap();
    assert_eq!(knows::<F>(&cluster.nodes[0], &leaver), [true; 4]);
    cluster.nodes[0].kill_agent();
    // An hour is the smallest part of what etcd goes on waiting for.
    let lease = cluster.etcd().ctl(&["get", "-w", "json", &lease_key(&cluster.nodes[0]).unwrap()]).unwrap();
    let lease: serde_json::Value = serde_json::from_str(&lease).unwrap();
    let id = format!("{:x}", lease["kvs"][0]["lease"].as_u64().unwrap());
    let left = cluster.etcd().ctl(&["lease", "timetolive", "-w", "json", &id]).unwrap();
    let left: serde_json::Value = serde_json::from_str(&left).unwrap();
    assert!(left["ttl"].as_i64().unwrap() > 23 * 3600, "{left}");
    // Meanwhile one leaves and one comes.
    cluster.nodes[2].stop_agent().unwrap();
    cluster.etcd().ctl(&["del", &lease_key(&cluster.nodes[2]).unwrap()]).unwrap();
    let newcomer = cluster.add_node().unwrap();
    newcomer.start_agent(&[]).unwrap();
    newcomer.make_bridge().unwrap();
    let newcomer = newcomer.run_container(2).unwrap();
    wait_for_answer(&newcomer, b).unwrap();
    let ((), report) =
        load::during(F::host(a), F::host(b), 10, || cluster.nodes[0].start_agent(&[])).unwrap();
    assert_eq!((report.lost, report.repeated), (0, 0), "{report:?}");
    assert_eq!(cluster.nodes[0].subnet_env().unwrap(), subnet);
    wait_until_forgotten::<F>(&cluster.nodes[0], &leaver, 2);
    assert_reach(a, &newcomer);
    assert_fast(&cluster.nodes[..2], a, b);
}

fn a_peer_whose_lease_expires_is_forgotten_and_comes_back_with_its_subnet<F: Family>() {
    let (mut cluster, containers) = Cluster::start_with_containers(&F::alone(), &[SHORT_TTL]).unwrap();
    let (a, b) = (&containers[0], &containers[1]);
    ping(a.netns(), F::of(b), 10).unwrap();
    let peer = Peer::of::<F>(&cluster.nodes[1]);
    cluster.nodes[1].kill_agent();
    // Alive by its TTL, it is still reached.
    assert_reach(a, b);
    wait_until_forgotten::<F>(&cluster.nodes[0], &peer, 12);
    assert_eq!(cluster.leases().unwrap().len(), 1);
    assert!(ping(a.netns(), F::of(b), 1).is_err(), "no way leads there any more");
    let status = cluster.nodes[0].status().unwrap();
    assert_eq!(status["ready"], true, "a lost peer is not this node's trouble: {status:#}");
    cluster.nodes[1].start_agent(&[SHORT_TTL]).unwrap();
    assert_eq!(F::subnet(&cluster.nodes[1]), peer.subnet);
    cluster.wait_for_routes().unwrap();
    assert_fast(&cluster.nodes, a, b);
}

fn a_partition_heals_whether_shorter_or_longer_than_the_leases<F: Family>() {
    let (cluster, containers) = Cluster::start_with_containers(&F::alone(), &[SHORT_TTL]).unwrap();
    let (a, b) = (&containers[0], &containers[1]);
    ping(a.netns(), F::of(b), 10).unwrap();
    // The switch's port of the first node.
    let port = |state: &str| cluster.underlay().netns().ip(&format!("link set port11 {state}")).map(drop);
    let ((), report) = load::during(F::host(a), F::host(b), 10, || {
        thread::sleep(Duration::from_secs(1));
        port("down")?;
        thread::sleep(Duration::from_secs(2));
        port("up")?;
        thread::sleep(Duration::from_secs(4));
        Ok(())
    })
    .expect("connections last through a short partition");
    assert!(report.lost > 0, "the partition was none: {report:?}");
    let peers = [Peer::of::<F>(&cluster.nodes[0]), Peer::of::<F>(&cluster.nodes[1])];
    port("down").unwrap();
    wait_until_forgotten::<F>(&cluster.nodes[1], &peers[0], 15);
    // Who is cut off cannot know who has left.
    assert_eq!(knows::<F>(&cluster.nodes[0], &peers[1]), [true; 4]);
    port("up").unwrap();
    wait_for("both to know each other again", Duration::from_secs(20), || {
        let both = knows::<F>(&cluster.nodes[0], &peers[1]) == [true; 4]
            && knows::<F>(&cluster.nodes[1], &peers[0]) == [true; 4];
        both.then_some(())
    })
    .unwrap();
    for (node, peer) in cluster.nodes.iter().zip(&peers) {
        wait_ready(node, 15);
        assert_eq!(F::subnet(node), peer.subnet, "the same subnet");
    }
    assert_fast(&cluster.nodes, a, b);
}

#[test]
fn devices_that_vanish_while_no_agent_runs_come_back_as_the_peers_know_them() {
    let plan = Plan { nodes: 2, ..Plan::dual() };
    let (mut cluster, containers) = Cluster::start_with_containers(&plan, &[]).unwrap();
    let (a, b) = (&containers[0], &containers[1]);
    assert_reach(a, b);
    let macs = |cluster: &Cluster| {
        let status = cluster.nodes[0].status().unwrap();
        ["device", "device_v6"].map(|device| status[device]["mac"].as_str().unwrap().to_owned())
    };
    let before = macs(&cluster);
    // The first by a crash, the second as an upgrade ends it.
    for crash in [true, false] {
        for node in &mut cluster.nodes {
            if crash { node.kill_agent() } else { assert!(node.stop_agent().unwrap().success()) }
        }
        for device in ["flannel.1", "flannel-v6.1"] {
            cluster.nodes[0].netns().ip(&format!("link del {device}")).unwrap();
        }
        assert!(hello(a.host(), b.host(), None).is_err(), "without its device the node is cut off");
        // The peer's kernel goes on sending to the MAC that it knows: nobody is there to tell it of another.
        cluster.nodes[0].start_agent(&[]).unwrap();
        assert_eq!(macs(&cluster), before);
        assert_reach(a, b);
        cluster.nodes[1].start_agent(&[]).unwrap();
        assert_reach(a, b);
        assert_fast(&cluster.nodes, a, b);
    }
}
