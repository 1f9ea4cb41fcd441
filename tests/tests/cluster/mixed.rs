//! Loden and flannel nodes in one cluster, of IPv4 and of both families.

use std::{fs, net::IpAddr, thread, time::Duration};

use loden_tests::{
    cluster::{Cluster, Plan, lease_key},
    container::Container,
    counters::{Counters, Share},
    each_family,
    family::Family,
    flannel::{self, FlannelNode, Half},
    netns::Netns,
    nic,
    node::{BRIDGE, Node},
    process::wait_for,
    traffic::{
        load, ping,
        stream::{self, Until},
        transactions::{self, Kind},
    },
};

use crate::{assert_all_reach_all, show_logs, wait_for_all_to_answer};

each_family!(
    flannel_nodes_alone_reach_each_other,
    loden_and_flannel_nodes_carry_each_others_traffic,
    loden_and_flannel_nodes_carry_each_others_traffic_with_direct_routing,
    a_flannel_node_is_taken_over_in_place_and_handed_back,
    a_flannel_node_with_direct_routing_is_taken_over_in_place_and_handed_back,
    segments_of_a_flannel_node_are_decapsulated_by_the_programs_once_their_checksums_are_verified,
);

/// What a flannel node has at this place of the underlay: the subnet of this number in each family. Above 200, where no
/// agent picks: it writes its record as it is, without looking.
fn halves(cluster: &Cluster, host: u32, third: u8) -> Vec<Half> {
    let underlay = cluster.underlay();
    let v4: IpAddr = underlay.address(host).unwrap().into();
    let v4 = Half::new(v4, format!("10.5.{third}.0/24").parse().unwrap());
    let v6 = underlay
        .address6(host)
        .map(|address| Half::new(address.into(), format!("fc00:0:0:{third:x}::/64").parse().unwrap()));
    [v4].into_iter().chain(v6).collect()
}

/// Plugs a flannel node in.
fn flannel_node(cluster: &Cluster, host: u32, third: u8) -> FlannelNode {
    let netns = Netns::create("flannel").unwrap();
    cluster.underlay().plug(&netns, host).unwrap();
    FlannelNode::create(netns, halves(cluster, host, third), cluster.etcd()).unwrap()
}

fn assert_bulk_both_ways(a: &Container, b: &Container) {
    for (from, to) in a.hosts().zip(b.hosts()).flat_map(|(a, b)| [(a, b), (b, a)]) {
        let stream = stream::run(from, to, None, Until::Bytes(50_000_000)).unwrap();
        assert_eq!((stream.bytes, stream.source), (50_000_000, from.address));
    }
}

/// What a node's lease says of it.
fn published(cluster: &Cluster, node: &Node) -> Vec<Half> {
    let own = lease_key(node).unwrap();
    let leases = cluster.leases().unwrap();
    let (key, value) = leases.iter().find(|(key, _)| *key == own).unwrap_or_else(|| panic!("{leases:?}"));
    Half::of_record(key, value).unwrap()
}

fn flannel_nodes_alone_reach_each_other<F: Family>() {
    // Proves the hand-made nodes themselves: what they say about a mixed cluster rests on this.
    for direct in [false, true] {
        let cluster = Cluster::create(&Plan { nodes: 0, ..F::plan() }).unwrap();
        let (mut a, mut b) = (flannel_node(&cluster, 31, 231), flannel_node(&cluster, 32, 232));
        a.add_peer(b.halves(), direct).unwrap();
        b.add_peer(a.halves(), direct).unwrap();
        let containers = [a.run_container().unwrap(), b.run_container().unwrap()];
        wait_for_all_to_answer(&containers);
        assert_all_reach_all(&containers);
        assert_bulk_both_ways(&containers[0], &containers[1]);
    }
}

/// Two nodes of the family, or of both, whose config says whether to route directly.
fn plan<F: Family>(direct: bool) -> Plan {
    let plan = F::plan();
    let backend = format!(r#""vxlan","DirectRouting":{direct}"#);
    Plan { config: plan.config.replace(r#""vxlan""#, &backend), ..plan }
}

/// Makes the flannel node and the cluster's nodes peers of each other.
fn introduce(cluster: &Cluster, flannel: &FlannelNode, direct: bool) {
    for node in &cluster.nodes {
        for half in flannel.halves() {
            wait_for("the route to the flannel node", Duration::from_secs(10), || {
                node.has_route(half.subnet).unwrap().then_some(())
            })
            .unwrap();
        }
        flannel.add_peer(&published(cluster, node), direct).unwrap();
    }
}

/// Two nodes of each kind.
fn assert_mixed_cluster_is_whole<F: Family>(direct: bool) {
    let mut cluster = Cluster::start(&plan::<F>(direct), &[]).unwrap();
    let mut flannels = [flannel_node(&cluster, 31, 231), flannel_node(&cluster, 32, 232)];
    for flannel in &flannels {
        introduce(&cluster, flannel, direct);
    }
    for (flannel, other) in [(0, 1), (1, 0)] {
        flannels[flannel].add_peer(flannels[other].halves(), direct).unwrap();
    }
    show_logs(&cluster);
    let mut containers = cluster.run_containers(1).unwrap();
    for flannel in &mut flannels {
        containers.push(flannel.run_container().unwrap());
    }
    wait_for_all_to_answer(&containers);
    assert_all_reach_all(&containers);
    assert_bulk_both_ways(&containers[0], &containers[2]);
    // The half of it that is ours is fast: what Loden sends to the flannel node, and what it gets from there.
    for (ours, theirs) in containers[0].hosts().zip(containers[2].hosts()) {
        let work = || stream::run(ours, theirs, None, Until::Bytes(50_000_000));
        let (_, share) = Share::during(&cluster.nodes, &[&containers[0]], work).unwrap();
        assert!(share.encapsulated as f64 >= 0.98 * share.sent as f64, "to {}: {share:?}", theirs.address);
        let work = || stream::run(theirs, ours, None, Until::Bytes(50_000_000));
        let (_, share) = Share::during(&cluster.nodes, &[&containers[2]], work).unwrap();
        assert!(share.delivered as f64 >= 0.9 * share.sent as f64, "from {}: {share:?}", theirs.address);
        // Single packets, each of which its receiver, their kernel or our program, has verified.
        let node = &cluster.nodes[0];
        let before = Counters::read(node).unwrap();
        let rate = transactions::run(Kind::UdpRr, ours, theirs, Duration::from_secs(1)).unwrap();
        let counted = Counters::read(node).unwrap().since(&before);
        let (out, back) =
            if direct { ("fast_direct_out", "fast_direct_in") } else { ("fast_encap", "fast_decap") };
        let least = rate.transactions * 95 / 100;
        assert!(counted.get(out) >= least && counted.get(back) >= least, "{rate:?} {counted:?}");
        assert_eq!(counted.get("drop_unknown_vtep") + counted.get("drop_redirect"), 0, "{counted:?}");
    }
}

fn loden_and_flannel_nodes_carry_each_others_traffic<F: Family>() {
    assert_mixed_cluster_is_whole::<F>(false);
}

fn loden_and_flannel_nodes_carry_each_others_traffic_with_direct_routing<F: Family>() {
    assert_mixed_cluster_is_whole::<F>(true);
}

/// All that flannel made on a node, without the programs and sysctls, which a flannel node may have or not; the devices
/// come first.
fn flannels_work(node: &Node, halves: &[Half]) -> Vec<String> {
    let run = |line: String| node.netns().exec(&line).unwrap();
    let devices = halves.iter().map(|half| run(format!("ip -o link show {}", half.device())));
    let rest = halves.iter().flat_map(|half| {
        let (device, family) = (half.device(), if half.address.is_ipv4() { "-4" } else { "-6" });
        [
            format!("ip -o {family} address show {device} scope global"),
            format!("ip {family} route show table all proto boot"),
            format!("ip {family} neigh show dev {device} nud permanent"),
            format!("bridge fdb show dev {device}"),
        ]
        .map(run)
    });
    devices.chain(rest).collect()
}

/// Before TCX (Linux 6.6) a program is a filter of a clsact qdisc. While the kernel adds one to an interface that is up it
/// drops what goes out there (`qdisc_graft` in net/sched/sch_api.c deactivates the device), by whomever it is told to: some
/// milliseconds, and on a busy machine more. Here it is told so before: what the agent does besides must lose nothing.
fn add_clsact_where_programs_are_filters(taken: &Node, other: &Node, halves: &[Half]) {
    if other.netns().exec("tc filter show dev eth0 ingress").unwrap().is_empty() {
        return;
    }
    for interface in halves.iter().map(Half::device).chain(["eth0", BRIDGE, "veth1"]) {
        taken.netns().exec(&format!("tc qdisc add dev {interface} clsact")).unwrap();
    }
}

/// What flanneld writes for the containers of a node.
fn subnet_env(halves: &[Half], mtu: u32) -> String {
    let v4 = "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.231.1/24\n";
    let v6 = "FLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00:0:0:e7::1/64\n";
    let v6 = if halves.len() > 1 { v6 } else { "" };
    format!("{v4}{v6}FLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=false\n")
}

/// A flannel node becomes one of Loden, and a flannel node again, under load all the while.
fn assert_taken_over_and_handed_back<F: Family>(direct: bool, gate: &str) {
    let mut cluster = Cluster::create(&plan::<F>(direct)).unwrap();
    let taken = &cluster.nodes[0];
    let own = halves(&cluster, cluster.host_of_node(0), 231);
    flannel::set_up(taken.netns(), &own, cluster.etcd()).unwrap();
    fs::write(taken.subnet_file(), subnet_env(&own, 1450)).unwrap();
    cluster.nodes[1].start_agent(&[gate]).unwrap();
    cluster.nodes[1].make_bridge().unwrap();
    let peer = published(&cluster, &cluster.nodes[1]);
    flannel::add_peer(cluster.nodes[0].netns(), &peer, direct).unwrap();
    cluster.wait_for_routes().unwrap();
    let containers = cluster.run_containers(1).unwrap();
    let (a, b) = (&containers[0], &containers[1]);
    wait_for_all_to_answer(&containers);
    assert_all_reach_all(&containers);
    add_clsact_where_programs_are_filters(&cluster.nodes[0], &cluster.nodes[1], &own);
    let before = (flannels_work(&cluster.nodes[0], &own), cluster.leases().unwrap());
    let pairs: Vec<_> = a.hosts().zip(b.hosts()).flat_map(|(a, b)| [(a, b), (b, a)]).collect();
    let node = &mut cluster.nodes[0];
    let take_over = Box::new(|| {
        node.start_agent(&[gate])?;
        thread::sleep(Duration::from_secs(1));
        Ok(())
    });
    let ((), reports) = load::during_all(&pairs, 10, take_over).unwrap();
    for (report, (from, to)) in reports.iter().zip(&pairs) {
        assert_eq!((report.lost, report.repeated), (0, 0), "{} to {}: {report:?}", from.address, to.address);
    }
    assert_eq!(cluster.leases().unwrap(), before.1, "the same leases");
    let devices = |work: &[String]| work[..own.len()].to_vec();
    let now = flannels_work(&cluster.nodes[0], &own);
    assert_eq!(devices(&now), devices(&before.0), "the same devices, MACs and indices");
    // Pods of both families are given what fits behind IPv6's headers, which are longer than flannel counts.
    let mtu = if own.len() > 1 { 1430 } else { 1450 };
    assert_eq!(fs::read_to_string(cluster.nodes[0].subnet_file()).unwrap(), subnet_env(&own, mtu));
    for (from, to) in a.hosts().zip(b.hosts()) {
        let work = || stream::run(from, to, None, Until::Bytes(50_000_000));
        let (_, share) = Share::during(&cluster.nodes, &[a, b], work).unwrap();
        assert!(share.smaller() >= 0.98, "to {}: {share:?}", to.address);
    }
    let node = &mut cluster.nodes[0];
    let hand_back = Box::new(|| {
        assert!(node.stop_agent()?.success());
        let file = node.subnet_file().display().to_string();
        node.loden(&["cleanup", "--keep-kernel", "--subnet-file", &file])?;
        Ok(())
    });
    let ((), reports) = load::during_all(&pairs, 10, hand_back).unwrap();
    for (report, (from, to)) in reports.iter().zip(&pairs) {
        assert_eq!((report.lost, report.repeated), (0, 0), "{} to {}: {report:?}", from.address, to.address);
    }
    assert_eq!(flannels_work(&cluster.nodes[0], &own), before.0, "as flannel had made it");
    assert_eq!(cluster.leases().unwrap(), before.1);
    assert_all_reach_all(&containers);
}

fn a_flannel_node_is_taken_over_in_place_and_handed_back<F: Family>() {
    assert_taken_over_and_handed_back::<F>(false, "--gate=strict");
}

fn a_flannel_node_with_direct_routing_is_taken_over_in_place_and_handed_back<F: Family>() {
    assert_taken_over_and_handed_back::<F>(true, "--gate=open");
}

fn segments_of_a_flannel_node_are_decapsulated_by_the_programs_once_their_checksums_are_verified<
    F: Family,
>() {
    let mut cluster = Cluster::start(&Plan { nodes: 1, ..F::plan() }, &["--gate=open"]).unwrap();
    let mut flannel = flannel_node(&cluster, 31, 231);
    introduce(&cluster, &flannel, false);
    nic::segment_underlay(&cluster).unwrap();
    nic::segment(flannel.netns(), "eth0").unwrap();
    // On a wire checksums are there; a veth would leave them out.
    flannel.netns().exec("ethtool -K eth0 tx off").unwrap();
    let containers = [cluster.run_containers(1).unwrap().remove(0), flannel.run_container().unwrap()];
    let node = &cluster.nodes[0];
    wait_for_all_to_answer(&containers);
    let (ours, theirs) = (F::host(&containers[0]), F::host(&containers[1]));
    ping(theirs.netns, ours.address, 20).unwrap();
    let before = Counters::read(node).unwrap();
    for (from, to) in [(ours, theirs), (theirs, ours)] {
        let stream = stream::run(from, to, None, Until::Bytes(50_000_000)).unwrap();
        assert_eq!((stream.bytes, stream.source), (50_000_000, from.address));
    }
    let counted = Counters::read(node).unwrap().since(&before);
    // Linux sends VXLAN with a checksum. Without GRO nobody would have looked at it before the programs.
    assert!(counted.get("fast_decap") > 500, "{counted:?}");
    assert!(counted.get("pass_wire_checksum") < counted.get("fast_decap") / 10, "{counted:?}");
}
