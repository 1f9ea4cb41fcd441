//! What a host may have against IPv6 alone: interfaces without it, router advertisements, its form of a reverse-path filter.

use super::{few, host};
use crate::{
    doctor::{
        finding::Finding,
        snapshot::{Half, Snapshot},
    },
    family::V6,
    kernel::{Link, LinkKind},
};

/// `RTPROT_RA` of linux/rtnetlink.h: a route that a router has advertised.
const ADVERTISED: u8 = 9;

/// A parameter of an interface (ip-sysctl.rst, `conf/interface`).
pub(in crate::doctor) fn sysctl(interface: &str, name: &str) -> String {
    // With slashes, because an interface's name may hold a dot.
    format!("net/ipv6/conf/{interface}/{name}")
}

/// The parameters that are looked at, of these interfaces.
pub(in crate::doctor) const PARAMETERS: [&str; 2] = ["disable_ipv6", "accept_ra"];

pub(super) fn examine(snapshot: &Snapshot, half: &Half<V6>) -> Vec<Finding> {
    vec![disabled(snapshot, half), advertisements(snapshot, half), reverse_path(snapshot)]
}

fn is_set(snapshot: &Snapshot, interface: &str, name: &str, to: &str) -> bool {
    host::value(snapshot, &sysctl(interface, name)) == Some(to)
}

/// Interfaces that carry the overlay, and bridges of pods, which have none of it.
fn disabled(snapshot: &Snapshot, half: &Half<V6>) -> Finding {
    const CHECK: &str = "disable-ipv6";
    let has_pods = |link: &Link| {
        let mut of_v4 = snapshot.v4.iter().flat_map(|half| {
            half.addresses
                .iter()
                .filter(|it| it.ifindex == link.index)
                .map(|it| (half.facts.subnet, it.address))
        });
        link.kind == LinkKind::Bridge
            && (link.name == "docker0"
                || link.name == "cni0"
                || of_v4.any(|(subnet, it)| subnet.contains(&it)))
    };
    let carries = |link: &Link| {
        link.name == snapshot.facts.uplink.name
            || half.facts.device.as_ref().is_some_and(|device| device.name == link.name)
    };
    let links = snapshot.links.iter().filter(|link| carries(link) || has_pods(link));
    let wrong: Vec<&Link> = links.filter(|link| is_set(snapshot, &link.name, "disable_ipv6", "1")).collect();
    let Some(first) = wrong.first() else {
        return Finding::ok(CHECK, "on wherever the overlay needs it");
    };
    let names: Vec<&str> = wrong.iter().map(|link| link.name.as_str()).collect();
    let evidence = format!("IPv6 is off at {}: no address, neighbour or route of it is there", few(&names));
    let remedy = format!(
        "sysctl -w {}=0; addresses do not come back with it: who made them has to make them again",
        sysctl(&first.name, "disable_ipv6")
    );
    // Pods that want nothing but IPv4 are somebody's decision.
    if wrong.iter().any(|link| carries(link)) {
        Finding::fault(CHECK, evidence, remedy)
    } else {
        Finding::warning(CHECK, evidence, remedy)
    }
}

/// A host that forwards listens to routers only where it is told twice (`accept_ra=2`): the uplink needs it where its way
/// out was advertised, and from pods and peers no router may come.
fn advertisements(snapshot: &Snapshot, half: &Half<V6>) -> Finding {
    const CHECK: &str = "accept-ra";
    let uplink = &snapshot.facts.uplink;
    let advertised = half.routes.iter().any(|route| {
        route.dst.prefix_len() == 0 && route.protocol == ADVERTISED && route.ifindex == Some(uplink.ifindex)
    });
    if advertised && is_set(snapshot, &uplink.name, "accept_ra", "1") {
        return Finding::fault(
            CHECK,
            format_args!(
                "the default route was advertised at {}, which no longer listens since the host forwards: the route ends \
                 with its lifetime",
                uplink.name
            ),
            format_args!("sysctl -w {}=2 (a running agent does)", sysctl(&uplink.name, "accept_ra")),
        );
    }
    let device = half.facts.device.iter().find(|device| is_set(snapshot, &device.name, "accept_ra", "2"));
    if let Some(device) = device {
        return Finding::warning(
            CHECK,
            format_args!("{} takes routes from any pod of a peer that calls itself a router", device.name),
            format_args!("sysctl -w {}=0", sysctl(&device.name, "accept_ra")),
        );
    }
    Finding::ok(CHECK, "routers are listened to where they may be")
}

/// What IPv6 has instead of `rp_filter` is a rule, such as firewalld's `IPv6_rpfilter`.
fn reverse_path(snapshot: &Snapshot) -> Finding {
    const CHECK: &str = "rp-filter";
    let Ok(rules) = &snapshot.rules else {
        return Finding::unknown(CHECK, "the host's rules cannot be read");
    };
    let strict: Vec<&str> = host::rules_of(rules, &["ip6", "inet"]).filter(|line| is_strict(line)).collect();
    if strict.is_empty() {
        return Finding::ok(CHECK, "no rule wants the way back to be the way that a packet came");
    }
    Finding::warning(
        CHECK,
        format_args!(
            "strict: {}: what peers forward for addresses outside the network is dropped, and so is what comes by another \
             uplink than the way back",
            few(&strict)
        ),
        "make it loose, or except the overlay's device: firewalld has IPv6_rpfilter=loose",
    )
}

/// Drops what has no way back by the very interface that it came in by (nft(8), FIB EXPRESSIONS).
fn is_strict(rule: &str) -> bool {
    let by_interface = rule.contains("fib saddr") && rule.contains(". iif");
    let fails = ["oif missing", "check missing", "oif 0"].iter().any(|way| rule.contains(way));
    rule.contains("drop") && by_interface && fails
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_strict_that_asks_for_the_interface_and_drops() {
        assert!(is_strict("meta nfproto ipv6 fib saddr . mark . iif oif missing drop"));
        assert!(is_strict("fib saddr . iif oif 0 counter packets 0 bytes 0 drop"));
        assert!(is_strict("fib saddr . iif check missing drop"));
        assert!(!is_strict("fib saddr . mark oif missing drop"), "loose");
        assert!(!is_strict("fib saddr . iif oif missing log prefix \"odd\""));
        assert!(!is_strict("fib daddr . iif type != local drop"));
    }
}
