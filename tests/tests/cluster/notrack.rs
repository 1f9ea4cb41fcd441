//! The packets between the nodes without conntrack (`--notrack-underlay`), in both families.

use std::time::Duration;

use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    node::Node,
    process::wait_for,
    traffic::{Host, hello},
};

const LIMIT: Duration = Duration::from_secs(60);
/// Each with nft's name of it.
const FAMILIES: [(&str, &str); 2] = [("ipv4", "ip"), ("ipv6", "ip6")];

/// What conntrack has of a protocol in a family, a line each.
fn tracked(node: &Node, family: &str, what: &str) -> Vec<String> {
    let list = node.netns().exec(&format!("conntrack -L -f {family} {what}")).unwrap();
    list.lines().map(str::to_owned).collect()
}

/// The VXLAN packets that conntrack has seen.
fn outer(node: &Node, family: &str) -> Vec<String> {
    tracked(node, family, "-p udp --orig-port-dst 8472")
}

/// A connection in each family: with the strict gate its beginning and its end go through the hosts' stacks.
fn say_hello(containers: &[Container]) {
    let (from, to) = (&containers[0], &containers[1]);
    for (client, server) in from.addresses().zip(to.addresses()) {
        let host = |container, address| Host { netns: Container::netns(container), address };
        wait_for(&format!("a hello from {client} to {server}"), LIMIT, || {
            hello(host(from, client), host(to, server), None).ok()
        })
        .unwrap();
    }
}

fn table(node: &Node, ip: &str) -> String {
    node.netns().exec(&format!("nft --stateless list table {ip} loden")).unwrap_or_default()
}

/// The kernel's number of the table: a table that was made anew has another.
fn number(node: &Node, ip: &str) -> String {
    let listing = node.netns().exec(&format!("nft --handle list table {ip} loden")).unwrap_or_default();
    listing.lines().next().unwrap_or_default().to_owned()
}

#[test]
fn what_carries_the_overlay_is_tracked_without_the_flag_and_not_with_it() {
    let plan = Plan { nodes: 2, ..Plan::dual() };
    let mut cluster = Cluster::start(&plan, &["--ip-masq", "--notrack-underlay"]).unwrap();
    let containers = cluster.run_containers(1).unwrap();
    say_hello(&containers);
    for node in &cluster.nodes {
        for (family, _) in FAMILIES {
            assert_eq!(outer(node, family), [""; 0], "{} {family}", node.name());
            assert_ne!(tracked(node, family, "-p tcp"), [""; 0], "the pods' own connections are tracked");
        }
    }

    let (node, other) = (&cluster.nodes[0], &cluster.nodes[1]);
    for (_, ip) in FAMILIES {
        let right = table(node, ip);
        assert_eq!(right.matches(" notrack ").count(), 2, "{right}");
        for damage in ["flush chain {} loden underlay-in", "delete chain {} loden underlay-out"] {
            let before = number(node, ip);
            node.netns().exec(&format!("nft {}", damage.replace("{}", ip))).unwrap();
            let restored = || (table(node, ip) == right && number(node, ip) != before).then_some(());
            wait_for(&format!("the {ip} rules after {damage:?}"), LIMIT, restored)
                .unwrap_or_else(|error| panic!("{error:#}: {}\n{}", table(node, ip), node.log()));
        }
    }
    say_hello(&containers);
    for (family, _) in FAMILIES {
        assert_eq!(outer(other, family), [""; 0], "{family} at the node that nobody touched");
    }

    for node in &mut cluster.nodes {
        node.stop_agent().unwrap();
        node.start_agent(&["--ip-masq"]).unwrap();
        for (_, ip) in FAMILIES {
            let table = table(node, ip);
            assert!(table.contains("masquerade") && !table.contains("notrack"), "{table}");
        }
    }
    say_hello(&containers);
    for node in &cluster.nodes {
        for (family, _) in FAMILIES {
            wait_for(&format!("outer {family} packets to be tracked"), LIMIT, || {
                (!outer(node, family).is_empty()).then_some(())
            })
            .unwrap();
        }
    }
}

#[test]
fn the_flag_alone_makes_a_table_that_goes_with_it_and_with_cleanup() {
    let mut cluster = Cluster::start(&Plan { nodes: 1, ..Plan::dual() }, &["--notrack-underlay"]).unwrap();
    let node = &mut cluster.nodes[0];
    let ours = |node: &Node| FAMILIES.map(|(_, ip)| table(node, ip).matches(" notrack ").count());
    assert_eq!(ours(node), [2; 2]);
    node.stop_agent().unwrap();
    node.start_agent(&[]).unwrap();
    assert_eq!(FAMILIES.map(|(_, ip)| table(node, ip)), [""; 2]);
    node.stop_agent().unwrap();
    node.start_agent(&["--notrack-underlay"]).unwrap();
    assert_eq!(ours(node), [2; 2]);
    node.stop_agent().unwrap();
    let file = node.subnet_file().display().to_string();
    node.loden(&["cleanup", "--subnet-file", &file]).unwrap();
    assert_eq!(FAMILIES.map(|(_, ip)| table(node, ip)), [""; 2]);
}
