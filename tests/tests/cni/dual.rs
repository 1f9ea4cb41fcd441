//! Pods with addresses of both families, and of IPv6 alone.

use std::{
    net::{Ipv6Addr, SocketAddr},
    time::Duration,
};

use loden_tests::{
    cluster::{Cluster, Plan},
    cni::{Pod, Runtime, flannel, routed},
    counters::Counters,
    netns::Netns,
    node::Node,
    process::wait_for,
    traffic::{
        Host, Service, hello, ping,
        stream::{self, Until},
    },
};
use serde_json::{Value, json};

use crate::{
    assert_all_reach_all, assert_known, assert_nothing_is_left, counted, fast_share, routed_cluster_of,
};

const BULK: u64 = 30_000_000;

fn dual_cluster(nodes: u32, args: &[&str]) -> (Cluster, Vec<Runtime>) {
    routed_cluster_of(Plan { nodes, ..Plan::dual() }, args)
}

fn host6(pod: &Pod) -> Host<'_> {
    pod.host6().unwrap_or_else(|| panic!("no IPv6 address: {}", pod.result))
}

fn address6(pod: &Pod) -> Ipv6Addr {
    pod.address6.unwrap_or_else(|| panic!("no IPv6 address: {}", pod.result))
}

/// As [`assert_all_reach_all`], over IPv6.
fn assert_all_reach_all_over_ipv6(pods: &[&Pod]) {
    for client in pods {
        for server in pods.iter().filter(|server| server.id != client.id) {
            let (from, to) = (host6(client), host6(server));
            let seen = hello(from, to, None).unwrap_or_else(|error| panic!("{from:?} to {to:?}: {error:#}"));
            assert_eq!(seen, from.address);
            ping(from.netns, to.address, 1).unwrap();
        }
    }
}

#[test]
fn routed_pods_have_addresses_of_both_families_and_are_reached_by_both_and_leave_nothing() {
    let (cluster, runtimes) = dual_cluster(2, &[]);
    // Sent the moment it is there: nobody waits for duplicate address detection.
    let pods = [runtimes[0].add("a").unwrap(), runtimes[0].add("b").unwrap(), runtimes[1].add("c").unwrap()];
    let [a, b, c] = &pods;
    ping(&c.netns, address6(a), 1).unwrap();
    assert_all_reach_all(&[a, b, c]);
    assert_all_reach_all_over_ipv6(&[a, b, c]);
    let env = cluster.nodes[0].subnet_env().unwrap();
    assert!(env.subnet6.unwrap().contains(&address6(a)), "{}", address6(a));
    let expected = json!([
        { "address": format!("{}/32", a.address), "gateway": "169.254.1.1", "interface": 1 },
        { "address": format!("{}/128", address6(a)), "gateway": "fe80::1", "interface": 1 },
    ]);
    assert_eq!(a.result["ips"], expected);
    let routes = json!([{ "dst": "0.0.0.0/0", "gw": "169.254.1.1" }, { "dst": "::/0", "gw": "fe80::1" }]);
    assert_eq!(a.result["routes"], routes);
    let shown = a.netns.ip("-6 address show dev eth0 scope global").unwrap();
    assert!(shown.contains(&format!("{}/128", address6(a))) && !shown.contains("tentative"), "{shown}");
    let alias = cluster.nodes[0].netns().ip(&format!("link show {}", a.veth())).unwrap();
    assert!(alias.contains(&format!("alias loden-cni {},{} ", a.address, address6(a))), "{alias}");

    // The whole of the lease's MTU, less 40 bytes of IPv6 and 8 of ICMPv6; and two routers on the way.
    let size = env.mtu - 48;
    let reply = a.netns.exec(&format!("ping -6 -n -c 1 -M do -s {size} {}", address6(c))).unwrap();
    assert!(reply.contains("ttl=62"), "{reply}");
    for (from, to) in [(host6(a), host6(c)), (host6(c), host6(a)), (host6(a), host6(b))] {
        let stream = stream::run(from, to, None, Until::Bytes(BULK)).unwrap();
        assert_eq!((stream.bytes, stream.source), (BULK, from.address));
    }
    for (from, to) in [(a.host(), c.host()), (host6(a), host6(c)), (host6(c), host6(a))] {
        let (_, share) =
            fast_share(&cluster.nodes, &[a, c], || stream::run(from, to, None, Until::Bytes(BULK)));
        assert!(share >= 0.95, "{} to {}: {share}", from.address, to.address);
    }
    let local = || counted(&cluster.nodes[..1], &["fast_local"]);
    let before = local();
    ping(&a.netns, address6(b), 40).unwrap();
    assert!(local() - before >= 70, "{} of 80 packets between pods of one node", local() - before);

    assert!(runtimes[0].check(a).unwrap().well().unwrap().is_null());
    assert_eq!(runtimes[0].add_to("a", &a.netns).unwrap(), a.result, "ADD twice is ADD once");
    let (id, netns, result) = (a.id.clone(), a.netns.path(), a.result.clone());
    assert!(netns.exists());
    let mut pods = pods.into_iter();
    for runtime in [&runtimes[0], &runtimes[0], &runtimes[1]] {
        runtime.remove(pods.next().unwrap()).unwrap();
    }
    runtimes[0].del(&id, None, &result).unwrap();
    for (node, runtime) in cluster.nodes.iter().zip(&runtimes) {
        assert_nothing_is_left(node, runtime);
    }
}

#[test]
fn check_finds_each_damage_of_ipv6_and_the_agent_puts_the_route_back() {
    let (mut cluster, runtimes) = dual_cluster(1, &[]);
    // It would put back some of what is damaged.
    cluster.nodes[0].kill_agent();
    let (node, runtime) = (&cluster.nodes[0], &runtimes[0]);
    type Damage<'a> = (&'a str, &'a dyn Fn(&Netns, &Pod));
    let damages: [Damage<'_>; 5] = [
        ("the route to ADDRESS/128 by VETH is gone", &|host, pod| {
            host.ip(&format!("-6 route del {}", address6(pod))).unwrap();
        }),
        ("the permanent neighbour ADDRESS on VETH is gone", &|host, pod| {
            host.ip(&format!("-6 neigh del {} dev {}", address6(pod), pod.veth())).unwrap();
        }),
        ("the address ADDRESS/128 is gone from eth0", &|_, pod| {
            pod.netns.ip(&format!("-6 address del {}/128 dev eth0", address6(pod))).unwrap();
        }),
        ("the route to ::/0 by eth0 is gone", &|_, pod| {
            pod.netns.ip("-6 route del default").unwrap();
        }),
        ("the neighbour fe80::1 on eth0 is 02:00:00:00:00:99", &|_, pod| {
            pod.netns.ip("-6 neigh replace fe80::1 lladdr 02:00:00:00:00:99 dev eth0 nud permanent").unwrap();
        }),
    ];
    for (n, (what, damage)) in damages.into_iter().enumerate() {
        let pod = runtime.add(&format!("p{n}")).unwrap();
        let healthy = runtime.check(&pod).unwrap();
        assert!(healthy.success, "{healthy:?}");
        damage(node.netns(), &pod);
        let answer = runtime.check(&pod).unwrap();
        assert_eq!(answer.error().unwrap().0, 102, "{answer:?}");
        let text = format!("{} {}", answer.output["msg"], answer.output["details"]);
        let text = text.replace(pod.veth(), "VETH").replace(&address6(&pod).to_string(), "ADDRESS");
        assert!(text.contains(what), "{what}: {text}");
        runtime.remove(pod).unwrap();
    }
    let pod = runtimes[0].add("kept").unwrap();
    cluster.nodes[0].start_agent(&[]).unwrap();
    let host = cluster.nodes[0].netns();
    let before = host.ip("-6 route show proto 77").unwrap();
    assert!(before.contains(&address6(&pod).to_string()), "{before}");
    host.ip("-6 route flush proto 77").unwrap();
    wait_for("the route", Duration::from_secs(5), || {
        (host.ip("-6 route show proto 77").unwrap() == before).then_some(())
    })
    .unwrap();
    ping(host, address6(&pod), 1).unwrap();
    runtimes[0].remove(pod).unwrap();
    assert_nothing_is_left(&cluster.nodes[0], &runtimes[0]);
}

#[test]
fn a_sandbox_and_a_host_that_have_ipv6_off_for_new_interfaces_get_it_all_the_same() {
    let (cluster, runtimes) = dual_cluster(1, &[]);
    let host = cluster.nodes[0].netns();
    host.exec("sysctl -qw net.ipv6.conf.default.disable_ipv6=1").unwrap();
    let netns = Netns::create("p-off").unwrap();
    netns.exec("sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1").unwrap();
    let result = runtimes[0].add_to("off", &netns).unwrap();
    let address = result["ips"][1]["address"].as_str().unwrap().trim_end_matches("/128").to_owned();
    ping(host, address.parse::<Ipv6Addr>().unwrap(), 1).unwrap();
    assert_eq!(netns.exec("sysctl -n net.ipv6.conf.eth0.accept_ra").unwrap().trim(), "0");
    runtimes[0].del("off", Some(&netns), &result).unwrap();
    assert_nothing_is_left(&cluster.nodes[0], &runtimes[0]);

    // What IPv6 cannot work with is refused, and nothing of it stays.
    let mut conf = runtimes[0].first();
    conf["mtu"] = json!(1200);
    let (code, message) = runtimes[0].call("ADD", "small", Some(&netns), &conf).unwrap().error().unwrap();
    assert_eq!((code, message.contains("\"mtu\": 1200 must be at least 1280")), (7, true), "{message}");
    host.exec("sysctl -qw net.ipv6.conf.all.forwarding=0").unwrap();
    conf["cniVersion"] = "1.1.0".into();
    let (code, message) = runtimes[0].call("STATUS", "", None, &conf).unwrap().error().unwrap();
    assert_eq!((code, message.contains("net.ipv6.conf.all.forwarding=0")), (51, true), "{message}");
    assert_nothing_is_left(&cluster.nodes[0], &runtimes[0]);
}

#[test]
fn pods_of_ipv6_alone_reach_each_other_by_routes_and_on_a_bridge() {
    let (cluster, routes) = routed_cluster_of(Plan { nodes: 2, ..Plan::ipv6_only() }, &["--ip-masq"]);
    let node = &cluster.nodes[0];
    assert_eq!(
        node.netns().ip("-4 address show dev eth0").unwrap().trim(),
        "",
        "the test would prove nothing"
    );
    let delegate = json!({ "hairpinMode": true, "isDefaultGateway": true });
    let bridge = Runtime::new(node, flannel(node, "pods", delegate, &[])).unwrap();
    let pods = [routes[0].add("a").unwrap(), routes[1].add("b").unwrap(), bridge.add("c").unwrap()];
    let [a, b, c] = &pods;
    assert_eq!(a.result["ips"].as_array().unwrap().len(), 1, "{}", a.result);
    assert_eq!(a.netns.ip("-4 address show dev eth0").unwrap().trim(), "");
    for from in [a, c] {
        let what = "the peers' routes, and who answers on the bridge";
        wait_for(what, Duration::from_secs(10), || ping(&from.netns, address6(b), 1).ok()).unwrap();
    }
    assert_all_reach_all_over_ipv6(&[a, b, c]);
    let stream = stream::run(host6(a), host6(b), None, Until::Bytes(BULK)).unwrap();
    assert_eq!((stream.bytes, stream.source), (BULK, host6(a).address));
    assert!(routes[0].check(a).unwrap().well().unwrap().is_null());
    let mut pods = pods.into_iter();
    for runtime in [&routes[0], &routes[1], &bridge] {
        runtime.remove(pods.next().unwrap()).unwrap();
    }
    for (node, runtime) in cluster.nodes.iter().zip(&routes) {
        assert_nothing_is_left(node, runtime);
    }
}

/// The same of IPv6 as of IPv4: the plugin needs no agent, and the agent finds what was done.
#[test]
fn pods_of_both_families_are_made_and_removed_while_the_agent_is_down_and_are_fast_at_once() {
    let (mut cluster, runtimes) = dual_cluster(2, &[]);
    let far = runtimes[1].add("far").unwrap();
    let old = runtimes[0].add("old").unwrap();
    ping(&old.netns, address6(&far), 5).unwrap();
    cluster.nodes[0].kill_agent();
    let before = Counters::read(&cluster.nodes[1]).unwrap();
    // The address of a pod that goes is the next one's, on another veth.
    let address = (old.address, address6(&old));
    runtimes[0].remove(old).unwrap();
    let mut conf = runtimes[0].network.clone();
    let addresses =
        json!([{ "address": format!("{}/24", address.0) }, { "address": format!("{}/64", address.1) }]);
    conf["plugins"][0]["ipam"] = json!({ "type": "static", "addresses": addresses });
    let given = Runtime::new(&cluster.nodes[0], conf).unwrap();
    let new = given.add("new").unwrap();
    assert_eq!((new.address, address6(&new)), address);
    assert!(given.check(&new).unwrap().well().unwrap().is_null());
    ping(&new.netns, address6(&far), 20).unwrap();
    let sent = far.packets_sent().unwrap();
    let stream = stream::run(host6(&far), host6(&new), None, Until::Bytes(BULK)).unwrap();
    assert_eq!((stream.bytes, stream.source), (BULK, host6(&far).address));
    let sent = far.packets_sent().unwrap() - sent;
    let counters = Counters::read(&cluster.nodes[1]).unwrap().since(&before);
    let fast = counters.get("fast_encap") + counters.get("fast_overlay_out");
    assert!(fast as f64 >= 0.95 * sent as f64, "{fast} of {sent}: {counters:?}");

    cluster.nodes[0].start_agent(&[]).unwrap();
    assert_known(&cluster.nodes[0], address.1);
    let work = || stream::run(host6(&new), host6(&far), None, Until::Bytes(BULK));
    let (_, share) = fast_share(&cluster.nodes, &[&new, &far], work);
    assert!(share >= 0.95, "{share}");
    cluster.nodes[0].kill_agent();
    given.remove(new).unwrap();
    cluster.nodes[0].start_agent(&[]).unwrap();
    assert_nothing_is_left(&cluster.nodes[0], &runtimes[0]);
}

#[test]
fn a_host_port_and_a_limit_hold_for_both_families() {
    let (cluster, runtimes) = dual_cluster(2, &[]);
    let node = &cluster.nodes[1];
    let limit = 80_000_000_u64;
    let behind = [
        json!({ "type": "portmap", "capabilities": { "portMappings": true }, "snat": true }),
        json!({ "type": "bandwidth", "ingressRate": limit, "ingressBurst": limit / 10 }),
    ];
    let mut runtime = Runtime::new(node, routed(node, "pods", &behind)).unwrap();
    let mapping = json!([{ "hostPort": 8000, "containerPort": 8080, "protocol": "tcp" }]);
    runtime.capabilities.insert("portMappings".into(), mapping);
    let server = runtime.add("server").unwrap();
    let client = runtimes[0].add("client").unwrap();
    let front6: Ipv6Addr = cluster.underlay().address6(12).unwrap();
    for (front, from, to) in [
        (SocketAddr::from((node.address(), 8000)), client.host(), server.host()),
        (SocketAddr::from((front6, 8000)), host6(&client), host6(&server)),
    ] {
        hello(from, to, Some(Service { front, backend: 8080 }))
            .unwrap_or_else(|error| panic!("{front}: {error:#}"));
        let stream = stream::run(from, to, None, Until::Bytes(10_000_000)).unwrap();
        // The burst comes on top.
        let rate = stream.megabytes_per_second() * 8e6;
        assert!(rate < 1.5 * limit as f64, "{front}: {rate} bits a second");
    }
    runtime.remove(server).unwrap();
    for iptables in ["iptables", "ip6tables"] {
        let rules = node.netns().exec(&format!("{iptables} -t nat -S")).unwrap();
        assert!(!rules.contains("--dport 8000"), "{rules}");
    }
}

#[test]
fn bridged_and_routed_pods_of_one_node_reach_each_other_in_both_families() {
    let (mut cluster, routes) = dual_cluster(1, &["--ip-masq"]);
    let node = &cluster.nodes[0];
    let delegate = json!({ "hairpinMode": true, "isDefaultGateway": true });
    // One name, as one pool of addresses serves both.
    let bridges = Runtime::new(node, flannel(node, "pods", delegate, &[])).unwrap();
    let first = routes[0].add("routed-1").unwrap();
    let bridged = bridges.add("bridged").unwrap();
    let proxies = |node: &Node| node.netns().ip("-6 neigh show proxy dev cni0").unwrap();
    let wait_for_proxies = |node: &Node, wanted: &[&Pod]| {
        let what = format!("{} proxies", wanted.len());
        let right = || {
            let there = proxies(node);
            let all = wanted.iter().all(|pod| there.contains(&address6(pod).to_string()));
            (all && there.lines().count() == wanted.len()).then_some(())
        };
        wait_for(&what, Duration::from_secs(5), right)
            .unwrap_or_else(|error| panic!("{error:#}: {}", proxies(node)));
    };
    // The bridge came after the pod: the agent sees to it. What comes after is the plugin's.
    wait_for_proxies(node, &[&first]);
    let theirs = "fc00:0:0:ffff::9";
    node.netns().ip(&format!("-6 neigh add proxy {theirs} dev cni0")).unwrap();
    cluster.nodes[0].kill_agent();
    let node = &cluster.nodes[0];
    let second = routes[0].add("routed-2").unwrap();
    assert!(proxies(node).contains(&address6(&second).to_string()), "{}", proxies(node));
    assert_all_reach_all(&[&first, &second, &bridged]);
    assert_all_reach_all_over_ipv6(&[&first, &second, &bridged]);
    let gone = address6(&second);
    routes[0].remove(second).unwrap();
    assert!(!proxies(node).contains(&gone.to_string()), "{}", proxies(node));
    // With the namespace the veth goes, and nobody asks the plugin.
    drop(first);
    cluster.nodes[0].start_agent(&["--ip-masq"]).unwrap();
    let node = &cluster.nodes[0];
    let only = || (proxies(node).trim() == format!("{theirs} proxy").as_str()).then_some(());
    wait_for("the operator's own alone to be left", Duration::from_secs(5), only)
        .unwrap_or_else(|error| panic!("{error:#}: {}", proxies(node)));
}

#[test]
fn flannels_configuration_gives_the_bridge_both_ranges_and_routes() {
    let (cluster, _) = dual_cluster(2, &["--ip-masq"]);
    let delegate = || json!({ "hairpinMode": true, "isDefaultGateway": true });
    let network = |node: &Node| {
        let mut network = flannel(node, "cbr0", delegate(), &[]);
        network["cniVersion"] = "0.3.1".into();
        network
    };
    let runtimes: Vec<Runtime> =
        cluster.nodes.iter().map(|node| Runtime::new(node, network(node)).unwrap()).collect();
    let pods = [runtimes[0].add("a").unwrap(), runtimes[0].add("b").unwrap(), runtimes[1].add("c").unwrap()];
    let [a, b, c] = &pods;
    let node = &cluster.nodes[0];
    let env = node.subnet_env().unwrap();
    let subnet6 = env.subnet6.unwrap();
    let saved: Value =
        serde_json::from_slice(&std::fs::read(node.run_directory().join("cni/flannel/a")).unwrap()).unwrap();
    // What flannel's plugin hands over: a range of each family, a route to each network.
    let expected = json!({
        "cniVersion": "0.3.1", "name": "cbr0", "type": "bridge", "hairpinMode": true, "isDefaultGateway": true,
        "isGateway": true, "ipMasq": false, "mtu": env.mtu,
        "ipam": {
            "type": "host-local", "dataDir": node.run_directory().join("cni/addresses"),
            "ranges": [[{ "subnet": env.subnet().trunc().to_string() }], [{ "subnet": subnet6.trunc().to_string() }]],
            "routes": [{ "dst": env.network().to_string() }, { "dst": env.network6.unwrap().to_string() }],
        },
    });
    assert_eq!(saved, expected);
    let bridge = node.netns().ip("address show cni0").unwrap();
    assert!(bridge.contains(&env.subnet().to_string()) && bridge.contains(&subnet6.to_string()), "{bridge}");
    wait_for("the bridge's own address to be usable", Duration::from_secs(5), || {
        ping(&a.netns, address6(c), 1).ok()
    })
    .unwrap();
    assert_all_reach_all(&[a, b, c]);
    assert_all_reach_all_over_ipv6(&[a, b, c]);
    assert_eq!(node.status().unwrap()["advice"], json!([]));
    let mut pods = pods.into_iter();
    for runtime in [&runtimes[0], &runtimes[0], &runtimes[1]] {
        runtime.remove(pods.next().unwrap()).unwrap();
    }
    assert_eq!(runtimes[0].given_out(), Vec::<String>::new());
}
