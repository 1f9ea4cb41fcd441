//! The firewall's rules, and what they do to packets.

use std::{net::SocketAddr, path::Path};

use loden_agent::firewall::{Firewall, FirewallSpec, forward_drops};
use loden_tests::netns::{self, Netns};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use crate::{inside, lines, node};

fn spec() -> FirewallSpec {
    FirewallSpec {
        network: node::NETWORK.parse().unwrap(),
        subnet: "10.5.1.0/24".parse().unwrap(),
        masquerade: true,
        fully_random: true,
        forward: true,
        notrack: None,
    }
}

/// Brings the rules into being and says whether there was anything to do; they must be current then.
fn ensure(netns: &Netns, firewall: &mut Firewall) -> bool {
    inside(netns, async |_| {
        let done = firewall.ensure().await.unwrap();
        assert!(firewall.is_current().await.unwrap());
        done
    })
}

fn is_current(netns: &Netns, firewall: &Firewall) -> bool {
    inside(netns, async |_| firewall.is_current().await.unwrap())
}

/// All chains of the iptables filter table.
fn filter(netns: &Netns) -> Vec<String> {
    lines(netns, "iptables -S")
}

const LODEN: [&str; 2] = ["-A LODEN-FWD -s 10.5.0.0/16 -j ACCEPT", "-A LODEN-FWD -d 10.5.0.0/16 -j ACCEPT"];

#[test]
fn the_kernel_has_the_rules_that_were_meant() {
    let netns = Netns::create("fw").unwrap();
    let mut firewall = Firewall::new(spec());
    assert!(!is_current(&netns, &firewall));
    assert!(ensure(&netns, &mut firewall));
    assert!(!ensure(&netns, &mut firewall), "nothing to do the second time");
    assert_eq!(
        lines(&netns, "nft list table ip loden"),
        [
            "table ip loden {",
            "chain postrouting {",
            "type nat hook postrouting priority srcnat; policy accept;",
            "meta mark & 0x00004000 == 0x00004000 return comment \"marked by kube-proxy, which masquerades itself\"",
            "ip saddr 10.5.1.0/24 ip daddr 10.5.0.0/16 return comment \"pod to pod\"",
            "ip saddr 10.5.0.0/16 ip daddr 10.5.1.0/24 return comment \"pod to pod, received\"",
            "ip saddr != 10.5.0.0/16 ip daddr 10.5.1.0/24 return comment \"outside to pod: the client's address is kept\"",
            "ip saddr 10.5.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random comment \"pod to outside\"",
            "ip saddr != 10.5.0.0/16 ip daddr 10.5.0.0/16 masquerade fully-random comment \"host to remote pod\"",
            "}",
            "}",
        ]
    );
    let expected = [
        "-P INPUT ACCEPT",
        "-P FORWARD ACCEPT",
        "-P OUTPUT ACCEPT",
        "-N LODEN-FWD",
        "-A FORWARD -j LODEN-FWD",
    ];
    assert_eq!(filter(&netns), [&expected[..], &LODEN[..]].concat());
}

#[test]
fn a_new_agent_finds_the_old_ones_rules_and_a_new_subnet_replaces_them() {
    let netns = Netns::create("fw").unwrap();
    ensure(&netns, &mut Firewall::new(spec()));
    let mut firewall = Firewall::new(FirewallSpec { subnet: "10.5.9.0/24".parse().unwrap(), ..spec() });
    assert!(ensure(&netns, &mut firewall));
    let nft = netns.exec("nft list ruleset").unwrap();
    assert_eq!(nft.matches("pod to outside").count(), 1);
    assert!(nft.contains("10.5.9.0/24") && !nft.contains("10.5.1.0/24"), "{nft}");
    assert_eq!(filter(&netns).iter().filter(|line| line.contains("-j LODEN-FWD")).count(), 1);
}

#[test]
fn whatever_is_flushed_or_changed_is_noticed_and_put_right() {
    let netns = Netns::create("fw").unwrap();
    let mut firewall = Firewall::new(spec());
    ensure(&netns, &mut firewall);
    let right = (lines(&netns, "nft --stateless list table ip loden"), filter(&netns));
    for damage in [
        "nft flush ruleset",
        "nft flush table ip loden",
        "nft delete table ip loden",
        "nft add rule ip loden postrouting accept",
        "nft insert rule ip loden postrouting counter",
        "iptables -F FORWARD",
        "iptables -F LODEN-FWD",
        "iptables -D LODEN-FWD 1",
        "iptables -I LODEN-FWD -j DROP",
        "iptables -A FORWARD -j LODEN-FWD",
        "iptables -F",
    ] {
        netns.exec(damage).unwrap();
        assert!(!is_current(&netns, &firewall), "{damage} is noticed");
        assert!(ensure(&netns, &mut firewall), "{damage}");
        assert_eq!(lines(&netns, "nft --stateless list table ip loden"), right.0, "after {damage}");
        assert_eq!(filter(&netns), right.1, "after {damage}");
    }
}

#[test]
fn what_is_switched_off_is_removed() {
    let netns = Netns::create("fw").unwrap();
    let mut firewall = Firewall::new(spec());
    ensure(&netns, &mut firewall);
    firewall.set_spec(FirewallSpec { masquerade: false, ..spec() });
    assert!(ensure(&netns, &mut firewall));
    assert_eq!(lines(&netns, "nft list tables"), ["table ip filter"]);
    firewall.set_spec(FirewallSpec { masquerade: false, forward: false, ..spec() });
    assert!(ensure(&netns, &mut firewall));
    assert_eq!(filter(&netns), ["-P INPUT ACCEPT", "-P FORWARD ACCEPT", "-P OUTPUT ACCEPT"]);
    assert!(!ensure(&netns, &mut firewall));
}

#[test]
fn vxlan_is_left_untracked_at_its_own_address_and_port_alone() {
    for (ip, network, subnet, vtep) in [
        ("ip", node::NETWORK, "10.5.1.0/24", "192.168.77.11:8472"),
        ("ip6", "fc00::/48", "fc00:0:0:1::/64", "[fd77::b]:4789"),
    ] {
        let netns = Netns::create("fw").unwrap();
        let vtep: SocketAddr = vtep.parse().unwrap();
        let (network, subnet) = (network.parse().unwrap(), subnet.parse().unwrap());
        let spec = FirewallSpec {
            network,
            subnet,
            masquerade: false,
            forward: false,
            notrack: Some(vtep),
            ..spec()
        };
        let mut firewall = Firewall::new(spec);
        assert!(ensure(&netns, &mut firewall));
        assert!(!ensure(&netns, &mut firewall), "nothing to do the second time");
        let (address, port) = (vtep.ip(), vtep.port());
        let table = format!("nft --stateless list table {ip} loden");
        let right = lines(&netns, &table);
        assert_eq!(
            right,
            [
                &format!("table {ip} loden {{"),
                "chain underlay-in {",
                "type filter hook prerouting priority raw; policy accept;",
                &format!("{ip} daddr {address} udp dport {port} notrack comment \"VXLAN from peers\""),
                "}",
                "chain underlay-out {",
                "type filter hook output priority raw; policy accept;",
                &format!("{ip} saddr {address} udp dport {port} notrack comment \"VXLAN to peers\""),
                "}",
                "}",
            ]
        );
        netns.exec(&format!("nft flush chain {ip} loden underlay-out")).unwrap();
        assert!(!is_current(&netns, &firewall));
        assert!(ensure(&netns, &mut firewall));
        assert_eq!(lines(&netns, &table), right);
        firewall.set_spec(FirewallSpec { notrack: None, ..spec });
        assert!(ensure(&netns, &mut firewall));
        assert!(!ensure(&netns, &mut firewall));
        assert_eq!(netns.exec("nft list tables").unwrap(), "");
    }
}

#[test]
fn removal_takes_ours_and_leaves_the_rest() {
    let netns = Netns::create("fw").unwrap();
    netns.exec("nft add table ip operator").unwrap();
    netns.exec("iptables -N DOCKER-USER").unwrap();
    netns.exec("iptables -A FORWARD -j DOCKER-USER").unwrap();
    netns.exec("iptables -P FORWARD DROP").unwrap();
    let before = netns.exec("nft --stateless list ruleset").unwrap();
    ensure(&netns, &mut Firewall::new(spec()));
    assert_ne!(netns.exec("nft --stateless list ruleset").unwrap(), before);
    for _ in 0..2 {
        let errors = inside(&netns, async |_| Firewall::remove().await);
        assert!(errors.is_empty(), "{errors:?}");
        assert_eq!(netns.exec("nft --stateless list ruleset").unwrap(), before);
    }
}

#[test]
fn flannels_masquerade_rules_are_taken_over_once_and_those_of_another_network_stay() {
    let netns = Netns::create("fw").unwrap();
    let flannel = |network: &str| {
        for line in [
            "iptables -t nat -N FLANNEL-POSTRTG",
            &format!(
                "iptables -t nat -A FLANNEL-POSTRTG -s {network} ! -d 224.0.0.0/4 -j MASQUERADE --random-fully"
            ),
            "nft add table ip flannel-ipv4",
            "nft add chain ip flannel-ipv4 postrtg { type nat hook postrouting priority srcnat ; }",
            &format!(
                "nft add rule ip flannel-ipv4 postrtg ip saddr {network} ip daddr != 224.0.0.0/4 masquerade"
            ),
        ] {
            netns.exec(line).unwrap();
        }
        // With the blank in the comment, as flannel has it.
        let mut jump = netns.command("iptables");
        jump.args(["-t", "nat", "-A", "POSTROUTING", "-m", "comment", "--comment", "flanneld masq"]);
        netns::output(jump.args(["-j", "FLANNEL-POSTRTG"])).unwrap();
    };
    let theirs = || {
        let rules = netns.exec("nft list ruleset").unwrap();
        (rules.contains("FLANNEL-POSTRTG"), rules.contains("flannel-ipv4"))
    };
    flannel(node::NETWORK);
    let mut firewall = Firewall::new(spec());
    ensure(&netns, &mut firewall);
    assert_eq!(theirs(), (false, false));
    flannel(node::NETWORK);
    ensure(&netns, &mut firewall);
    assert_eq!(theirs(), (true, true), "a flanneld that still runs is not fought");

    netns.exec("nft flush ruleset").unwrap();
    flannel("10.77.0.0/16");
    ensure(&netns, &mut Firewall::new(spec()));
    assert_eq!(theirs(), (true, true), "another network's");
}

/// What flannel v0.28 makes for the network and the subnet of [`spec`], as `iptables -S` prints it.
const FLANNELS: [&str; 6] = [
    "-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment \"flanneld masq\" -j RETURN",
    "-A FLANNEL-POSTRTG -s 10.5.1.0/24 -d 10.5.0.0/16 -m comment --comment \"flanneld masq\" -j RETURN",
    "-A FLANNEL-POSTRTG -s 10.5.0.0/16 -d 10.5.1.0/24 -m comment --comment \"flanneld masq\" -j RETURN",
    "-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.1.0/24 -m comment --comment \"flanneld masq\" -j RETURN",
    "-A FLANNEL-POSTRTG -s 10.5.0.0/16 ! -d 224.0.0.0/4 -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully",
    "-A FLANNEL-POSTRTG ! -s 10.5.0.0/16 -d 10.5.0.0/16 -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully",
];

#[test]
fn what_is_handed_back_is_flannels_rules_in_the_place_of_ours_and_is_taken_over_again() {
    let netns = Netns::create("fw").unwrap();
    for line in ["-P FORWARD DROP", "-N DOCKER-USER", "-N DOCKER-FORWARD", "-A FORWARD -j DOCKER-USER"] {
        netns.exec(&format!("iptables {line}")).unwrap();
    }
    netns.exec("iptables -A FORWARD -j DOCKER-FORWARD").unwrap();
    ensure(&netns, &mut Firewall::new(spec()));
    let ours = filter(&netns);
    for _ in 0..2 {
        let FirewallSpec { network, subnet, .. } = spec();
        let errors = inside(&netns, async |_| Firewall::hand_back(network, subnet).await);
        assert!(errors.is_empty(), "{errors:?}");
        let nat = lines(&netns, "iptables -t nat -S");
        let [head @ .., last] = &nat[..nat.len() - FLANNELS.len()] else { panic!("{nat:?}") };
        assert_eq!(last, "-A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG");
        assert!(!head.iter().any(|line| line.starts_with("-A")), "{nat:?}");
        assert_eq!(nat[nat.len() - FLANNELS.len()..], FLANNELS);
        assert_eq!(
            filter(&netns)[3..],
            [
                "-N DOCKER-FORWARD",
                "-N DOCKER-USER",
                "-N FLANNEL-FWD",
                "-A FORWARD -j DOCKER-USER",
                "-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD",
                "-A FORWARD -j DOCKER-FORWARD",
                "-A FLANNEL-FWD -s 10.5.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT",
                "-A FLANNEL-FWD -d 10.5.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT",
            ]
        );
        assert_eq!(lines(&netns, "nft list tables"), ["table ip filter", "table ip nat"]);
    }
    ensure(&netns, &mut Firewall::new(spec()));
    let both = filter(&netns);
    assert!(ours.iter().all(|line| both.contains(line)), "{both:?}");
    assert!(!netns.exec("iptables -t nat -S").unwrap().contains("FLANNEL"));
}

#[test]
fn a_node_that_does_not_masquerade_is_handed_back_without_masquerade_rules() {
    let netns = Netns::create("fw").unwrap();
    netns.exec("iptables -t nat -A POSTROUTING -s 10.5.1.0/24 ! -o docker0 -j MASQUERADE").unwrap();
    ensure(&netns, &mut Firewall::new(FirewallSpec { masquerade: false, ..spec() }));
    assert!(netns.exec("nft list tables").unwrap().contains("loden"), "containers keep their addresses");
    let FirewallSpec { network, subnet, .. } = spec();
    let errors = inside(&netns, async |_| Firewall::hand_back(network, subnet).await);
    assert!(errors.is_empty(), "{errors:?}");
    assert!(!netns.exec("iptables -t nat -S").unwrap().contains("FLANNEL"));
    assert!(!netns.exec("nft list tables").unwrap().contains("loden"));
}

/// A host between a pod and an outside: `a` with its pod, and `b`, which is not in the overlay.
struct Site {
    host: Netns,
    outside: Netns,
    pod: Netns,
}

impl Site {
    fn new() -> Self {
        let (host, outside) = node::pair();
        let pod = node::pod(&host, "10.5.1.0/24");
        Self { host, outside, pod }
    }
}

#[test]
fn a_pod_reaches_the_outside_with_the_hosts_address() {
    let site = Site::new();
    node::ping(&site.pod, "192.168.77.12").unwrap_err();
    ensure(&site.host, &mut Firewall::new(spec()));
    node::ping(&site.pod, "192.168.77.12").unwrap();
}

#[test]
fn a_client_from_outside_keeps_its_address() {
    let site = Site::new();
    site.outside.ip("route add 10.5.0.0/16 via 192.168.77.11").unwrap();
    ensure(&site.host, &mut Firewall::new(spec()));
    site.pod.exec("iptables -A INPUT -s 192.168.77.12 -p icmp").unwrap();
    node::ping(&site.outside, "10.5.1.2").unwrap();
    assert_eq!(counted(&site.pod), 1);
}

/// How often the first INPUT rule of a pod has matched.
fn counted(pod: &Netns) -> u64 {
    let rule = lines(pod, "iptables -t filter -L INPUT 1 -v -n -x");
    rule[0].split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn pods_see_each_others_own_addresses_and_hosts_come_with_their_overlay_address() {
    let (a, b) = node::pair();
    let (pod_a, pod_b) = (node::pod(&a, "10.5.1.0/24"), node::pod(&b, "10.5.2.0/24"));
    for (host, public, own, other) in [
        (&a, "192.168.77.11", "10.5.1.0/24", "10.5.2.0/24"),
        (&b, "192.168.77.12", "10.5.2.0/24", "10.5.1.0/24"),
    ] {
        let spec = node::spec(host, public);
        let mac = if own == "10.5.1.0/24" { [2, 0, 0, 0, 0, 1] } else { [2, 0, 0, 0, 0, 2] };
        let (vtep, vtep_mac) = if own == "10.5.1.0/24" {
            ("192.168.77.12", [2, 0, 0, 0, 0, 2])
        } else {
            ("192.168.77.11", [2, 0, 0, 0, 0, 1])
        };
        inside(host, async |kernel| {
            let spec = loden_agent::kernel::VxlanSpec { mac: Some(mac), ..spec };
            let device = node::set_up(&kernel, &spec, own).await.index;
            let desired = node::desired(own, device, spec.uplink, &[node::peer(other, vtep, vtep_mac)]);
            node::reconcile(&kernel, &desired).await;
        });
        let spec = FirewallSpec { subnet: own.parse().unwrap(), ..self::spec() };
        ensure(host, &mut Firewall::new(spec));
    }
    pod_b.exec("iptables -A INPUT -s 10.5.1.2 -p icmp").unwrap();
    node::ping(&pod_a, "10.5.2.2").unwrap();
    assert_eq!(counted(&pod_b), 1, "the pod's own address");

    // A host whose packet would leave with its public address is masqueraded to that of its VXLAN device:
    // the answer must come back through the overlay (flannel's sixth rule).
    pod_b.exec("iptables -I INPUT -s 10.5.1.0 -p icmp").unwrap();
    a.exec("ping -n -c 1 -W 2 -I 192.168.77.11 10.5.2.2").unwrap();
    assert_eq!(counted(&pod_b), 1, "the host's overlay address");
}

/// What dockerd 20.10 makes of the filter table, and 28 (which drops what is not published).
fn docker(host: &Netns) {
    for line in [
        "-P FORWARD DROP",
        "-N DOCKER",
        "-N DOCKER-USER",
        "-N DOCKER-FORWARD",
        "-A DOCKER-USER -j RETURN",
        "-A DOCKER ! -i docker0 -o docker0 -j DROP",
        "-A DOCKER ! -i cni0 -o cni0 -j DROP",
        "-A DOCKER-FORWARD -o cni0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "-A DOCKER-FORWARD -j DOCKER",
        "-A DOCKER-FORWARD -i cni0 -j ACCEPT",
        "-A FORWARD -j DOCKER-USER",
        "-A FORWARD -j DOCKER-FORWARD",
    ] {
        host.exec(&format!("iptables {line}")).unwrap();
    }
}

#[test]
fn dockers_forward_policy_and_drops_do_not_stop_the_overlay() {
    let site = Site::new();
    site.outside.ip("route add 10.5.0.0/16 via 192.168.77.11").unwrap();
    has_a_remote_pod(&site);
    docker(&site.host);
    ping_from_the_remote_pod(&site).unwrap_err();
    let mut firewall = Firewall::new(spec());
    ensure(&site.host, &mut firewall);
    ping_from_the_remote_pod(&site).unwrap();
    node::ping(&site.pod, "10.5.2.2").unwrap();
    node::ping(&site.pod, "192.168.77.12").unwrap();
    let forward = lines(&site.host, "iptables -S FORWARD");
    assert_eq!(
        forward[1..],
        [
            "-A FORWARD -j DOCKER-USER",
            "-A FORWARD -s 10.5.0.0/16 -d 10.5.0.0/16 -j LODEN-FWD",
            "-A FORWARD -j DOCKER-FORWARD",
            "-A FORWARD -j LODEN-FWD"
        ]
    );
    // What Docker denies to whoever is no pod stays denied, its other networks' containers among them.
    node::ping(&site.outside, "10.5.1.2").unwrap_err();
    let other = other_network(&site.host);
    node::ping(&other, "10.5.1.2").unwrap_err();
    node::ping(&site.pod, "172.30.0.2").unwrap_err();
    // And with Docker 20.10 there is no such denial.
    site.host.exec("iptables -D FORWARD -j DOCKER-FORWARD").unwrap();
    assert!(ensure(&site.host, &mut firewall));
    node::ping(&site.outside, "10.5.1.2").unwrap();
    let forward = lines(&site.host, "iptables -S FORWARD");
    assert_eq!(forward[1..], ["-A FORWARD -j DOCKER-USER", "-A FORWARD -j LODEN-FWD"]);
}

/// A container of another network of Docker's.
fn other_network(host: &Netns) -> Netns {
    let container = Netns::create("other").unwrap();
    host.ip("link add br-other type bridge").unwrap();
    host.ip("address add 172.30.0.1/24 dev br-other").unwrap();
    host.ip("link set br-other up").unwrap();
    netns::join(host, "other", &container, "eth0").unwrap();
    host.ip("link set other master br-other up").unwrap();
    container.ip("address add 172.30.0.2/24 dev eth0").unwrap();
    container.ip("link set eth0 up").unwrap();
    container.ip("route add default via 172.30.0.1").unwrap();
    node::ping(&container, "172.30.0.1").unwrap();
    // Before the rule that lets all pass that the pods' bridge sends, as Docker's own chain for that.
    host.exec("iptables -I DOCKER ! -i br-other -o br-other -j DROP").unwrap();
    container
}

/// A pod of another node, which is the outside.
fn has_a_remote_pod(site: &Site) {
    site.outside.ip("address add 10.5.2.2/32 dev lo").unwrap();
    site.host.ip("route add 10.5.2.0/24 via 192.168.77.12").unwrap();
}

fn ping_from_the_remote_pod(site: &Site) -> anyhow::Result<String> {
    site.outside.exec("ping -n -c 1 -W 2 -I 10.5.2.2 10.5.1.2")
}

#[test]
fn a_forward_policy_in_the_legacy_ruleset_is_seen_to_as_well() {
    let site = Site::new();
    site.outside.ip("route add 10.5.0.0/16 via 192.168.77.11").unwrap();
    let mut firewall = Firewall::new(spec());
    ensure(&site.host, &mut firewall);
    assert!(!has_legacy(&site.host), "the legacy ruleset is not brought into being");
    site.host.exec("iptables-legacy -P FORWARD DROP").unwrap();
    node::ping(&site.outside, "10.5.1.2").unwrap_err();
    assert!(!is_current(&site.host, &firewall));
    assert!(ensure(&site.host, &mut firewall));
    node::ping(&site.outside, "10.5.1.2").unwrap();
    let errors = inside(&site.host, async |_| Firewall::remove().await);
    assert!(errors.is_empty(), "{errors:?}");
    let left = lines(&site.host, "iptables-legacy -S");
    assert_eq!(left, ["-P INPUT ACCEPT", "-P FORWARD DROP", "-P OUTPUT ACCEPT"]);
}

fn has_legacy(netns: &Netns) -> bool {
    !netns.exec("cat /proc/thread-self/net/ip_tables_names").unwrap().is_empty()
}

#[test]
fn a_native_chain_that_drops_is_told_because_it_cannot_be_overruled() {
    let site = Site::new();
    site.outside.ip("route add 10.5.0.0/16 via 192.168.77.11").unwrap();
    has_a_remote_pod(&site);
    docker(&site.host);
    let mut firewall = Firewall::new(spec());
    ensure(&site.host, &mut firewall);
    let drops = || inside(&site.host, async |_| forward_drops().await.unwrap());
    assert!(drops().is_empty(), "Docker's policy is seen to");
    site.host.exec("nft add table inet site").unwrap();
    site.host
        .exec("nft add chain inet site only { type filter hook forward priority filter ; policy drop ; }")
        .unwrap();
    ping_from_the_remote_pod(&site).unwrap_err();
    assert_eq!(drops(), ["inet site only"]);
    site.host.exec("nft add rule inet site only ip daddr 10.5.0.0/16 accept").unwrap();
    site.host.exec("nft add rule inet site only ip saddr 10.5.0.0/16 accept").unwrap();
    ping_from_the_remote_pod(&site).unwrap();
}

#[test]
fn a_docker_that_starts_later_puts_itself_first_and_is_put_second_again() {
    let site = Site::new();
    site.outside.ip("route add 10.5.0.0/16 via 192.168.77.11").unwrap();
    has_a_remote_pod(&site);
    let mut firewall = Firewall::new(spec());
    ensure(&site.host, &mut firewall);
    docker(&site.host);
    // As dockerd does: its own before all others.
    for line in [
        "-D FORWARD -j DOCKER-FORWARD",
        "-I FORWARD -j DOCKER-FORWARD",
        "-D FORWARD -j DOCKER-USER",
        "-I FORWARD -j DOCKER-USER",
    ] {
        site.host.exec(&format!("iptables {line}")).unwrap();
    }
    ping_from_the_remote_pod(&site).unwrap_err();
    assert!(!is_current(&site.host, &firewall));
    assert!(ensure(&site.host, &mut firewall));
    ping_from_the_remote_pod(&site).unwrap();
}

#[test]
fn what_an_operator_forbids_in_docker_user_stays_forbidden() {
    let site = Site::new();
    site.outside.ip("route add 10.5.0.0/16 via 192.168.77.11").unwrap();
    docker(&site.host);
    site.host.exec("iptables -I DOCKER-USER -s 192.168.77.12 -j DROP").unwrap();
    ensure(&site.host, &mut Firewall::new(spec()));
    node::ping(&site.outside, "10.5.1.2").unwrap_err();
}

#[test]
fn without_iptables_only_the_table_is_made_and_without_nft_the_error_says_what_to_do() {
    let netns = Netns::create("fw").unwrap();
    let ensured = |tools: &[&str]| {
        netns.run(|| {
            let _tools = only(tools);
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(Firewall::new(spec()).ensure())
        })
    };
    assert!(ensured(&["nft"]).unwrap());
    assert_eq!(lines(&netns, "nft list tables"), ["table ip loden"]);
    let error = ensured(&[]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "nft is not installed or not in PATH: install nftables, or run without --ip-masq and --notrack-underlay"
    );
}

/// Leaves the calling thread, in a mount namespace of its own, only these of the programs in `/usr/sbin`.
fn only(tools: &[&str]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for tool in tools {
        std::fs::copy(Path::new("/usr/sbin").join(tool), dir.path().join(tool)).unwrap();
    }
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some(dir.path()), "/usr/sbin", none, MsFlags::MS_BIND, none).unwrap();
    dir
}
