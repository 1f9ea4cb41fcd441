//! The host around the overlay: parameters, bridges, routes of others, rules, GRO.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::few;
use crate::{
    doctor::{finding::Finding, snapshot::Snapshot},
    kernel::{LinkKind, ROUTE_PROTOCOL, TABLE_MAIN},
};

/// Names of the parameters that are looked at besides those of interfaces.
pub(in crate::doctor) const FORWARD: &str = "net.ipv4.ip_forward";
pub(in crate::doctor) const LIBERAL: &str = "net.netfilter.nf_conntrack_tcp_be_liberal";
pub(in crate::doctor) const BRIDGE_RULES: &str = "net.bridge.bridge-nf-call-iptables";

/// The reverse-path filter of an interface, or of `all`.
pub(in crate::doctor) fn rp_filter(interface: &str) -> String {
    // With slashes, because an interface's name may hold a dot.
    format!("net/ipv4/conf/{interface}/rp_filter")
}

pub(super) fn examine(snapshot: &Snapshot) -> Vec<Finding> {
    let mut findings = vec![forward(snapshot), reverse_path(snapshot), bridges(snapshot), routes(snapshot)];
    findings.extend(liberal(snapshot));
    findings.push(bridge_rules(snapshot));
    findings.push(gro(snapshot));
    findings
}

fn value<'a>(snapshot: &'a Snapshot, name: &str) -> Option<&'a str> {
    snapshot.sysctls.get(name)?.as_deref()
}

fn forward(snapshot: &Snapshot) -> Finding {
    match value(snapshot, FORWARD) {
        Some("1") => Finding::ok("ip-forward", "on"),
        _ => Finding::fault("ip-forward", "the host forwards nothing", format_args!("sysctl -w {FORWARD}=1")),
    }
}

fn liberal(snapshot: &Snapshot) -> Option<Finding> {
    const CHECK: &str = "be-liberal";
    snapshot.facts.programs.as_ref()?;
    Some(match value(snapshot, LIBERAL) {
        Some("1") => Finding::ok(CHECK, "on"),
        None => Finding::ok(CHECK, "the host tracks no connections"),
        Some(_) => Finding::fault(
            CHECK,
            "the host calls connections invalid whose packets went past it: their ends are dropped where rules say so",
            format_args!("sysctl -w {LIBERAL}=1 (and find out who sets it to 0)"),
        ),
    })
}

/// The larger of `all` and the interface's own counts (ip-sysctl.rst); 1 is strict.
fn reverse_path(snapshot: &Snapshot) -> Finding {
    const CHECK: &str = "rp-filter";
    let number = |interface: &str| {
        value(snapshot, &rp_filter(interface)).and_then(|text| text.parse().ok()).unwrap_or(0)
    };
    let strict = |interface: &str| number("all").max(number(interface)) == 1;
    let facts = &snapshot.facts;
    let mut wrong = Vec::new();
    if let Some(device) = facts.device.as_ref().filter(|device| strict(&device.name)) {
        wrong.push(format!(
            "strict on {}: what peers forward for addresses outside the network is dropped",
            device.name
        ));
    }
    if strict(&facts.uplink.name) {
        let astray = snapshot.ways.iter().filter_map(|(vtep, way)| {
            let way = way.as_ref().ok()?;
            (way.ifindex != facts.uplink.ifindex).then_some(*vtep)
        });
        let astray: Vec<Ipv4Addr> = astray.collect();
        if !astray.is_empty() {
            wrong.push(format!(
                "strict on {}, and the way back to {} is another interface: what comes from there is dropped",
                facts.uplink.name,
                few(&astray)
            ));
        }
    }
    if wrong.is_empty() {
        return Finding::ok(CHECK, "not strict where it would harm");
    }
    Finding::warning(
        CHECK,
        few(&wrong),
        "set it to 2 (loose) or 0: sysctl -w net.ipv4.conf.all.rp_filter=2; the larger of `all` and the interface's counts",
    )
}

/// Containers must get their addresses from our subnet.
fn bridges(snapshot: &Snapshot) -> Finding {
    const CHECK: &str = "bridge";
    let facts = &snapshot.facts;
    let mut fine = Vec::new();
    for link in snapshot.links.iter().filter(|link| link.kind == LinkKind::Bridge) {
        let of_link = snapshot.addresses.iter().filter(|address| address.ifindex == link.index);
        let addresses: Vec<Ipv4Addr> = of_link.map(|address| address.address).collect();
        let inside = addresses.iter().any(|address| facts.subnet.contains(address));
        if !inside && (link.name == "docker0" || link.name == "cni0") && !addresses.is_empty() {
            return Finding::fault(
                CHECK,
                format_args!("{} has {}, outside of this node's subnet {}", link.name, few(&addresses), facts.subnet),
                "start dockerd with --bip=$FLANNEL_SUBNET --mtu=$FLANNEL_MTU of subnet.env, or delete the bridge and let \
                 the CNI plugin make it anew; then start the containers anew",
            )
            .of(&link.name);
        }
        if inside && link.mtu > facts.pod_mtu {
            return Finding::warning(
                CHECK,
                format_args!("{} has an MTU of {}, the overlay carries {}", link.name, link.mtu, facts.pod_mtu),
                "start dockerd with --mtu=$FLANNEL_MTU: larger packets need an ICMP message each to find their size",
            )
            .of(&link.name);
        }
        if inside {
            fine.push(link.name.clone());
        }
    }
    if fine.is_empty() {
        return Finding::ok(CHECK, format_args!("none with an address of {} yet", facts.subnet));
    }
    Finding::ok(CHECK, format_args!("{} in {}", few(&fine), facts.subnet))
}

/// Routes of others that take packets of the network.
fn routes(snapshot: &Snapshot) -> Finding {
    const CHECK: &str = "overlapping-route";
    let facts = &snapshot.facts;
    let is_bridge =
        |index: u32| snapshot.links.iter().any(|link| link.index == index && link.kind == LinkKind::Bridge);
    let device = facts.device.as_ref().map(|device| device.index);
    let name = |index: Option<u32>| {
        let link = index.and_then(|index| snapshot.links.iter().find(|link| link.index == index));
        link.map_or_else(|| "nowhere".to_owned(), |link| link.name.clone())
    };
    let inside = |dst: Ipv4Net| facts.network.contains(&dst) && dst != facts.network;
    let others = snapshot.routes.iter().filter(|route| {
        let ours = route.protocol == ROUTE_PROTOCOL || (device.is_some() && route.ifindex == device);
        // The bridge's own: containers of ours.
        let pods = facts.subnet.trunc().contains(&route.dst) && route.ifindex.is_some_and(is_bridge);
        // A routed container's own.
        let pod = facts.subnet.trunc().contains(&route.dst) && route.dst.prefix_len() == 32;
        route.table == TABLE_MAIN && inside(route.dst) && !ours && !pods && !pod
    });
    let others: Vec<String> =
        others.map(|route| format!("{} goes to {}", route.dst, name(route.ifindex))).collect();
    if others.is_empty() {
        return Finding::ok(CHECK, format_args!("none within {}", facts.network));
    }
    Finding::fault(
        CHECK,
        few(&others),
        format_args!(
            "remove them, or move one of both networks: all of {} belongs to the overlay",
            facts.network
        ),
    )
}

/// Where services are translated, packets between two pods of one bridge must pass the rules as well.
fn bridge_rules(snapshot: &Snapshot) -> Finding {
    const CHECK: &str = "br-netfilter";
    let Ok(rules) = &snapshot.rules else {
        return Finding::unknown(
            CHECK,
            format_args!(
                "the host's rules cannot be read: {}",
                snapshot.rules.as_ref().err().map_or("", String::as_str)
            ),
        );
    };
    let services = rules.contains("KUBE-SERVICES");
    match value(snapshot, BRIDGE_RULES) {
        Some("1") => Finding::ok(CHECK, "bridged packets pass the host's rules"),
        _ if services => Finding::fault(
            CHECK,
            "kube-proxy translates services here, and packets between two pods of one bridge do not pass its rules: a \
             service does not answer pods beside its backend",
            format_args!("modprobe br_netfilter; sysctl -w {BRIDGE_RULES}=1"),
        ),
        _ => Finding::ok(CHECK, "bridged packets pass no rules, and no service needs it"),
    }
}

fn gro(snapshot: &Snapshot) -> Finding {
    const CHECK: &str = "gro";
    let uplink = &snapshot.facts.uplink;
    let is_veth =
        snapshot.links.iter().any(|link| link.index == uplink.ifindex && link.kind == LinkKind::Veth);
    match &snapshot.gro {
        Ok(true) => Finding::ok(CHECK, format_args!("on for {}", uplink.name)),
        Ok(false) if is_veth => Finding::ok(
            CHECK,
            format_args!("off for {}, a veth, which passes aggregates as they are", uplink.name),
        ),
        Ok(false) => Finding::warning(
            CHECK,
            format_args!("off for {}: bulk TCP costs several times the CPU", uplink.name),
            format_args!("ethtool -K {} gro on", uplink.name),
        ),
        Err(why) => Finding::unknown(CHECK, why),
    }
}
