//! Peers on the same link, reached without encapsulation: host-gw, and VXLAN with DirectRouting; and alloc, which reaches
//! nobody. The nodes have IPv4, IPv6, or both.

use std::{net::IpAddr, time::Duration};

use ipnet::IpNet;
use loden_tests::{
    cluster::{Cluster, Plan, lease_key},
    container::Container,
    counters::Counters,
    each_family, each_plan,
    family::Family,
    node::Node,
    process::wait_for,
    traffic::{
        Host, hello, ping,
        stream::{self, Until},
    },
};
use serde_json::{Value, json};

each_plan!(
    host_gw_takes_the_fast_path_without_encapsulation_through_either_gate,
    direct_routing_takes_the_fast_path_without_encapsulation,
    host_gw_makes_no_device_and_leaves_pods_the_whole_mtu,
    alloc_takes_a_lease_and_programs_no_route,
);
each_family!(
    a_peer_that_is_no_longer_on_the_link_is_reached_by_vxlan_within_a_second,
    with_host_gw_a_peer_that_is_no_longer_on_the_link_is_left_to_the_hosts_own_routes,
);

const HOST_GW: &str = r#""Type":"host-gw""#;
const DIRECT_ROUTING: &str = r#""Type":"vxlan","DirectRouting":true"#;
const ALLOC: &str = r#""Type":"alloc""#;

/// The same nodes with another backend.
fn with(plan: &Plan, backend: &str) -> Plan {
    Plan { config: plan.config.replace(r#""Type":"vxlan""#, backend), ..plan.clone() }
}

/// Sends in bulk, and returns what the nodes' programs counted meanwhile beside what the containers sent.
fn bulk(cluster: &Cluster, pods: &[Container], from: Host<'_>, to: Host<'_>) -> (Counters, Counters, u64) {
    ping(from.netns, to.address, 20).unwrap();
    let read = || cluster.nodes.iter().map(|node| Counters::read(node).unwrap()).collect::<Vec<_>>();
    let sent = || pods.iter().map(|pod| pod.packets_sent().unwrap()).sum::<u64>();
    let (before, sent_before) = (read(), sent());
    let stream = stream::run(from, to, None, Until::Bytes(200_000_000)).unwrap();
    assert_eq!(stream.source, from.address);
    let after = read();
    (after[0].since(&before[0]), after[1].since(&before[1]), sent() - sent_before)
}

fn assert_direct(plan: &Plan, args: &[&str]) {
    let (cluster, pods) = Cluster::start_with_containers(plan, args).unwrap();
    for (from, to) in pods[0].hosts().zip(pods[1].hosts()) {
        let (a, b, sent) = bulk(&cluster, &pods, from, to);
        for name in ["fast_direct_out", "fast_direct_in"] {
            let share = (a.get(name) + b.get(name)) as f64 / sent as f64;
            assert!(share >= 0.99, "{name} to {}: {share} of {sent}: {a:?} {b:?}", to.address);
        }
        for name in ["fast_encap", "fast_decap", "fast_overlay_out", "fast_overlay", "note_translated"] {
            assert_eq!((a.get(name), b.get(name)), (0, 0), "{name} to {}", to.address);
        }
    }
    for node in &cluster.nodes {
        let counters = Counters::read(node).unwrap();
        assert_eq!(counters.get("note_translated"), 0, "nobody translates here: {counters:?}");
    }
}

fn host_gw_takes_the_fast_path_without_encapsulation_through_either_gate(plan: &Plan) {
    assert_direct(&with(plan, HOST_GW), &["--gate=strict"]);
    assert_direct(&with(plan, HOST_GW), &["--gate=open"]);
}

fn direct_routing_takes_the_fast_path_without_encapsulation(plan: &Plan) {
    assert_direct(&with(plan, DIRECT_ROUTING), &[]);
}

/// The addresses of a node on the underlay, in the order of its subnets.
fn on_underlay(plan: &Plan, cluster: &Cluster, n: u32) -> Vec<IpAddr> {
    let v4 = plan.ipv4.then(|| cluster.nodes[n as usize].address().into());
    v4.into_iter().chain(cluster.node_address6(n).map(IpAddr::V6)).collect()
}

fn host_gw_makes_no_device_and_leaves_pods_the_whole_mtu(plan: &Plan) {
    let plan = with(plan, HOST_GW);
    let (cluster, pods) = Cluster::start_with_containers(&plan, &["--datapath=kernel"]).unwrap();
    for (from, to) in pods[0].hosts().zip(pods[1].hosts()) {
        assert_eq!(hello(from, to, None).unwrap(), from.address);
        // The whole of the MTU, and no byte more.
        let headers = if to.address.is_ipv4() { 20 + 8 } else { 40 + 8 };
        let ping = |bytes: u32| {
            let size = bytes - headers;
            from.netns.exec(&format!("ping -n -q -M do -c 2 -i 0.05 -W 2 -s {size} {}", to.address))
        };
        ping(1500).unwrap();
        ping(1501).unwrap_err();
    }
    let (node, peer) = (&cluster.nodes[0], &cluster.nodes[1]);
    assert_eq!(node.subnet_env().unwrap().mtu, 1500);
    assert!(!node.netns().ip("-o link show").unwrap().contains("flannel"));
    let ways = on_underlay(&plan, &cluster, 1);
    let subnets = peer.subnet_env().unwrap().subnets();
    assert_eq!(subnets.len(), ways.len());
    for (subnet, via) in subnets.iter().zip(ways) {
        let family = if subnet.addr().is_ipv4() { "-4" } else { "-6" };
        let route = node.netns().ip(&format!("{family} route show {subnet}")).unwrap();
        assert!(route.contains(&format!("{subnet} via {via} dev eth0")), "{route}");
    }
    assert_leases_are(&plan, &cluster, Some("host-gw"));
}

/// Wants the leases to be what flannel writes where a backend has nothing of its own to say.
fn assert_leases_are(plan: &Plan, cluster: &Cluster, backend: Option<&str>) {
    let leases = cluster.leases().unwrap();
    assert_eq!(leases.len(), cluster.nodes.len());
    for (n, node) in cluster.nodes.iter().enumerate() {
        let v4 = if plan.ipv4 { node.address().to_string() } else { "0.0.0.0".to_owned() };
        let v6 = cluster.node_address6(n as u32).map_or(Value::Null, |address| json!(address.to_string()));
        let kind = backend.map_or_else(String::new, |kind| format!(r#","BackendType":"{kind}""#));
        let value = format!(r#"{{"PublicIP":"{v4}","PublicIPv6":{v6}{kind}}}"#);
        let lease = (lease_key(node).unwrap(), value);
        assert!(leases.contains(&lease), "no {lease:?} among {leases:?}");
    }
}

fn a_peer_that_is_no_longer_on_the_link_is_reached_by_vxlan_within_a_second<F: Family>() {
    let (cluster, pods) = Cluster::start_with_containers(&with(&F::plan(), DIRECT_ROUTING), &[]).unwrap();
    let (here, there) = (&cluster.nodes[0], &cluster.nodes[1]);
    let subnet = F::subnet(there);
    let route = || here.netns().ip(&format!("{} route show {subnet}", F::FLAG)).unwrap();
    let peer = F::of_node(&cluster, 1);
    assert!(route().contains(&format!("via {peer}")), "{}", route());
    put_behind_a_router::<F>(&cluster);
    wait_for("the route over VXLAN", Duration::from_secs(1), || {
        route().contains(&format!("dev {}", F::DEVICE)).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}\n{}", route(), here.log()));
    let (from, to) = (F::host(&pods[0]), F::host(&pods[1]));
    hello(from, to, None).unwrap();
    let (a, _, _) = bulk(&cluster, &pods, from, to);
    let encapsulated = a.get("fast_encap") + a.get("fast_overlay_out");
    assert!(encapsulated > 1000 && a.get("fast_direct_out") == 0, "{a:?}");
}

/// From now on the first node's way to the second leads through a router, which is returned; it happens to be the second's
/// own address on the link.
fn put_behind_a_router<F: Family>(cluster: &Cluster) -> F::Address {
    let (here, there) = (cluster.nodes[0].netns(), &cluster.nodes[1]);
    let router = F::on_underlay(cluster.underlay(), 99);
    let [router_alone, peer_alone] = [router, F::of_node(cluster, 1)].map(F::as_prefix);
    here.ip(&format!("route add {router_alone} dev eth0")).unwrap();
    here.ip(&format!("neigh add {router} lladdr {} dev eth0", mac_of(there))).unwrap();
    here.ip(&format!("route add {peer_alone} via {router}")).unwrap();
    router
}

fn with_host_gw_a_peer_that_is_no_longer_on_the_link_is_left_to_the_hosts_own_routes<F: Family>() {
    let plan = with(&F::plan(), HOST_GW);
    let (cluster, pods) = Cluster::start_with_containers(&plan, &["--gate=open"]).unwrap();
    let (here, there) = (&cluster.nodes[0], &cluster.nodes[1]);
    let (from, to) = (F::host(&pods[0]), F::host(&pods[1]));
    let (subnet, peer) = (F::subnet(there), F::of_node(&cluster, 1));
    let route = || here.netns().ip(&format!("{} route show {subnet}", F::FLAG)).unwrap();
    let is_direct = || {
        let before = Counters::read(here).unwrap();
        ping(from.netns, to.address, 3).ok()?;
        (Counters::read(here).unwrap().since(&before).get("fast_direct_out") >= 3).then_some(())
    };
    wait_for("the direct way", Duration::from_secs(5), is_direct).unwrap();
    let router = put_behind_a_router::<F>(&cluster);
    wait_for("no route any more", Duration::from_secs(1), || route().is_empty().then_some(()))
        .unwrap_or_else(|error| panic!("{error:#}: {}\n{}", route(), here.log()));
    let name = format!("peer {subnet} is left out: {peer} is no neighbour on eth0");
    wait_for("the status to say so", Duration::from_secs(1), || {
        here.status().unwrap()["refused"].to_string().contains(&name).then_some(())
    })
    .unwrap_or_else(|error| panic!("{error:#}: {}", here.status().unwrap()["refused"]));
    let doctor = here.loden_output(&["doctor", "--no-probes"]).unwrap();
    let doctor = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(doctor.contains("refused-peer") && doctor.contains(&name), "{doctor}");

    // As on a flannel node it cannot be reached, and then by whatever route the host has.
    let before = Counters::read(here).unwrap();
    ping(from.netns, to.address, 3).unwrap_err();
    here.netns().ip(&format!("route add {subnet} via {router}")).unwrap();
    assert_eq!(hello(from, to, None).unwrap(), from.address);
    let counted = Counters::read(here).unwrap().since(&before);
    for name in ["fast_encap", "fast_overlay_out", "fast_direct_out"] {
        assert_eq!(counted.get(name), 0, "{name}: {counted:?}");
    }
    assert!(counted.get("pass_pod_no_peer") >= 3, "{counted:?}");

    here.netns().ip(&format!("route del {subnet} via {router}")).unwrap();
    here.netns().ip(&format!("route del {}", F::as_prefix(peer))).unwrap();
    wait_for("the direct way again", Duration::from_secs(2), is_direct).unwrap();
    let refused = here.status().unwrap()["refused"].clone();
    assert_eq!(refused, json!([]));
}

fn mac_of(node: &Node) -> String {
    let links: Value = serde_json::from_str(&node.netns().ip("-j link show eth0").unwrap()).unwrap();
    links[0]["address"].as_str().unwrap().to_owned()
}

fn alloc_takes_a_lease_and_programs_no_route(plan: &Plan) {
    let plan = with(plan, ALLOC);
    let mut cluster = Cluster::create(&plan).unwrap();
    for node in &mut cluster.nodes {
        node.start_agent(&[]).unwrap();
    }
    assert_leases_are(&plan, &cluster, None);
    let networks: Vec<IpNet> = ["10.5.0.0/16", "fc00::/48"].map(|net| net.parse().unwrap()).into();
    for node in &cluster.nodes {
        assert_eq!(node.subnet_env().unwrap().mtu, 1500);
        for network in &networks {
            let family = if network.addr().is_ipv4() { "-4" } else { "-6" };
            let routes = node.netns().ip(&format!("{family} route show root {network}")).unwrap();
            assert_eq!(routes.trim(), "", "{}", node.name());
        }
    }
}
