//! The host around the overlay: parameters, bridges, routes of others, rules, GRO.

use std::net::Ipv4Addr;

use super::{direct_access, few};
use crate::{
    doctor::{
        finding::Finding,
        snapshot::{Half, Snapshot},
    },
    facts,
    family::{Family, V6},
    kernel::{AddressScope, LinkKind, ROUTE_PROTOCOL, TABLE_MAIN},
};

/// Names of the parameters that are looked at besides those of interfaces.
pub(in crate::doctor) const FORWARD: &str = "net.ipv4.ip_forward";
pub(in crate::doctor) const FORWARD_V6: &str = "net.ipv6.conf.all.forwarding";
pub(in crate::doctor) const LIBERAL: &str = "net.netfilter.nf_conntrack_tcp_be_liberal";
pub(in crate::doctor) const BRIDGE_RULES: &str = "net.bridge.bridge-nf-call-iptables";
pub(in crate::doctor) const BRIDGE_RULES_V6: &str = "net.bridge.bridge-nf-call-ip6tables";

/// The reverse-path filter of an interface, or of `all`.
pub(in crate::doctor) fn rp_filter(interface: &str) -> String {
    // With slashes, because an interface's name may hold a dot.
    format!("net/ipv4/conf/{interface}/rp_filter")
}

pub(super) fn examine(snapshot: &Snapshot) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Some(half) = &snapshot.v4 {
        findings.extend([forward(snapshot, FORWARD), reverse_path(snapshot, half)]);
        findings.extend([bridges(snapshot, half), routes(snapshot, half)]);
        findings.push(bridge_rules(snapshot, BRIDGE_RULES, &["ip", "inet"]));
        findings.extend(direct_access::examine(snapshot, half));
    }
    if let Some(half) = &snapshot.v6 {
        let of_v6 = [forward(snapshot, FORWARD_V6), bridges(snapshot, half), routes(snapshot, half)];
        let bridged = bridge_rules(snapshot, BRIDGE_RULES_V6, &["ip6", "inet"]);
        let of_v6 = of_v6.into_iter().chain([bridged]).chain(direct_access::examine(snapshot, half));
        let of_v6 = of_v6.chain(super::ipv6::examine(snapshot, half));
        findings.extend(of_v6.map(super::of_family::<V6>));
    }
    findings.extend(liberal(snapshot));
    findings.push(gro(snapshot));
    findings
}

pub(super) fn value<'a>(snapshot: &'a Snapshot, name: &str) -> Option<&'a str> {
    snapshot.sysctls.get(name)?.as_deref()
}

fn forward(snapshot: &Snapshot, name: &str) -> Finding {
    match value(snapshot, name) {
        Some("1") => Finding::ok("ip-forward", "on"),
        _ => Finding::fault("ip-forward", "the host forwards nothing", format_args!("sysctl -w {name}=1")),
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
fn reverse_path(snapshot: &Snapshot, half: &Half) -> Finding {
    const CHECK: &str = "rp-filter";
    let number = |interface: &str| {
        value(snapshot, &rp_filter(interface)).and_then(|text| text.parse().ok()).unwrap_or(0)
    };
    let strict = |interface: &str| number("all").max(number(interface)) == 1;
    let facts = &snapshot.facts;
    let mut wrong = Vec::new();
    let devices = half.facts.device.iter().map(|device| &device.name);
    let devices = devices.chain(facts.wireguard.iter().map(|tunnel| &tunnel.name));
    for device in devices.filter(|device| strict(device)) {
        wrong.push(format!(
            "strict on {device}: what peers forward for addresses outside the network is dropped"
        ));
    }
    if strict(&facts.uplink.name) {
        let astray = half.ways.iter().filter_map(|(vtep, way)| {
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
fn bridges<F: Family>(snapshot: &Snapshot, half: &Half<F>) -> Finding {
    const CHECK: &str = "bridge";
    let (facts, subnet) = (&snapshot.facts, half.facts.subnet);
    let mut fine = Vec::new();
    for link in snapshot.links.iter().filter(|link| link.kind == LinkKind::Bridge) {
        // Every bridge gives itself a link-local address of IPv6, which tells nothing.
        let of_link = half.addresses.iter().filter(|address| {
            address.ifindex == link.index && (F::BITS == 32 || address.scope != AddressScope::Link)
        });
        let addresses: Vec<F::Addr> = of_link.map(|address| address.address).collect();
        let inside = addresses.iter().any(|address| F::contains(subnet, *address));
        if !inside && (link.name == "docker0" || link.name == "cni0") && !addresses.is_empty() {
            return Finding::fault(
                CHECK,
                format_args!("{} has {}, outside of this node's subnet {}", link.name, few(&addresses), subnet),
                "start dockerd with the subnet and --mtu=$FLANNEL_MTU of subnet.env (see loden docker-opts), or delete the bridge and let \
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
        return Finding::ok(CHECK, format_args!("none with an address of {subnet} yet"));
    }
    Finding::ok(CHECK, format_args!("{} in {subnet}", few(&fine)))
}

/// Routes of others that take packets of the network.
fn routes<F: Family>(snapshot: &Snapshot, half: &Half<F>) -> Finding {
    const CHECK: &str = "overlapping-route";
    let facts::Half { network, subnet, device, .. } = &half.facts;
    let (network, subnet) = (*network, F::trunc(*subnet));
    let is_bridge =
        |index: u32| snapshot.links.iter().any(|link| link.index == index && link.kind == LinkKind::Bridge);
    let device = device.as_ref().map(|device| device.index);
    let name = |index: Option<u32>| {
        let link = index.and_then(|index| snapshot.links.iter().find(|link| link.index == index));
        link.map_or_else(|| "nowhere".to_owned(), |link| link.name.clone())
    };
    let inside = |dst: F::Net| F::covers(network, dst) && dst != network;
    let others = half.routes.iter().filter(|route| {
        let ours = route.protocol == ROUTE_PROTOCOL || (device.is_some() && route.ifindex == device);
        // The bridge's own: containers of ours.
        let pods = F::covers(subnet, route.dst) && route.ifindex.is_some_and(is_bridge);
        // A routed container's own.
        let pod = F::covers(subnet, route.dst) && F::prefix_len(route.dst) == F::BITS;
        route.table == TABLE_MAIN && inside(route.dst) && !ours && !pods && !pod
    });
    let others: Vec<String> =
        others.map(|route| format!("{} goes to {}", route.dst, name(route.ifindex))).collect();
    if others.is_empty() {
        return Finding::ok(CHECK, format_args!("none within {network}"));
    }
    Finding::fault(
        CHECK,
        few(&others),
        format_args!("remove them, or move one of both networks: all of {network} belongs to the overlay"),
    )
}

/// The lines of the tables of these families, as `nft list ruleset` prints them.
pub(super) fn rules_of<'a>(rules: &'a str, families: &[&str]) -> impl Iterator<Item = &'a str> {
    let mut inside = false;
    rules.lines().filter_map(move |line| {
        if let Some(table) = line.strip_prefix("table ") {
            inside = families.contains(&table.split(' ').next().unwrap_or_default());
        }
        inside.then_some(line.trim())
    })
}

/// Where services are translated, packets between two pods of one bridge must pass the rules as well.
fn bridge_rules(snapshot: &Snapshot, parameter: &str, tables: &[&str]) -> Finding {
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
    let services = rules_of(rules, tables).any(|line| line.contains("KUBE-SERVICES"));
    match value(snapshot, parameter) {
        Some("1") => Finding::ok(CHECK, "bridged packets pass the host's rules"),
        _ if services => Finding::fault(
            CHECK,
            "kube-proxy translates services here, and packets between two pods of one bridge do not pass its rules: a \
             service does not answer pods beside its backend",
            format_args!("modprobe br_netfilter; sysctl -w {parameter}=1"),
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
