//! The VXLAN device, and routes, neighbours and FDB entries against the leases.

use std::net::IpAddr;

use super::few;
use crate::{
    doctor::{
        finding::Finding,
        snapshot::{Half, Snapshot},
    },
    family::Family,
    kernel::{Address, LinkKind, mac_text},
    overlay::{Op, plan},
};

pub(super) const REMEDY: &str =
    "a running agent puts it right within seconds: start it, or see its log for who changes it back";

pub(super) fn examine(snapshot: &Snapshot) -> Vec<Finding> {
    let mut findings = half(snapshot, snapshot.v4.as_ref());
    findings.extend(half(snapshot, snapshot.v6.as_ref()));
    let refused: Vec<&String> = snapshot.facts.refused.iter().collect();
    if !refused.is_empty() {
        findings.push(Finding::fault(
            "refused-peer",
            few(&refused),
            "correct that node's lease, or this host's addresses",
        ));
    }
    findings
}

fn half<F: Family>(snapshot: &Snapshot, half: Option<&Half<F>>) -> Vec<Finding> {
    let Some(half) = half else { return Vec::new() };
    let mut findings: Vec<Finding> = device(snapshot, half).into_iter().collect();
    findings.extend(entries(half));
    findings.into_iter().map(super::of_family::<F>).collect()
}

fn device<F: Family>(snapshot: &Snapshot, half: &Half<F>) -> Option<Finding> {
    const CHECK: &str = "device";
    let wanted = half.facts.device.as_ref()?;
    let Some(link) = snapshot.links.iter().find(|link| link.name == wanted.name) else {
        return Some(Finding::fault(CHECK, format_args!("there is no {}", wanted.name), REMEDY));
    };
    let mut wrong = Vec::new();
    // What kind of device it is first: of many faults only some are shown.
    match &link.kind {
        LinkKind::Vxlan(attrs) => {
            if (attrs.vni, attrs.port) != (wanted.vni, wanted.port) {
                wrong.push(format!(
                    "it has VNI {} on port {}, and should have {} on {}",
                    attrs.vni, attrs.port, wanted.vni, wanted.port
                ));
            }
            // 0.0.0.0 stands for whatever address the route has.
            let uplink = &snapshot.facts.uplink;
            let ours: [Option<IpAddr>; 2] =
                [uplink.public_of::<F>().map(Into::into), uplink.own_of::<F>().map(Into::into)];
            if attrs.local.is_some() && !ours.contains(&attrs.local) {
                wrong.push(format!(
                    "it sends from {}",
                    attrs.local.map_or_else(String::new, |local| local.to_string())
                ));
            }
        }
        other => wrong.push(format!("it is no VXLAN device ({other:?})")),
    }
    if !link.up {
        wrong.push("it is down".to_owned());
    }
    if link.mac != Some(wanted.mac) {
        let found = link.mac.map_or_else(|| "none".to_owned(), mac_text);
        wrong.push(format!("its MAC is {found}, the lease says {}", mac_text(wanted.mac)));
    }
    // The base of the subnet, with the length of the whole: peers are told of no other.
    let own = F::base(half.facts.subnet);
    let has = |it: &Address<F>| it.ifindex == link.index && it.address == own && it.prefix_len == F::BITS;
    if !half.addresses.iter().any(has) {
        wrong.push(format!("it has no {own}/{}", F::BITS));
    }
    if link.mtu != wanted.mtu {
        wrong.push(format!("its MTU is {} and should be {}", link.mtu, wanted.mtu));
    }
    Some(if wrong.is_empty() {
        Finding::ok(CHECK, format_args!("{}, MAC {}, MTU {}", wanted.name, mac_text(wanted.mac), wanted.mtu))
    } else {
        Finding::fault(CHECK, format_args!("{}: {}", wanted.name, few(&wrong)), REMEDY)
    })
}

/// What the agent's own plan would change.
fn entries<F: Family>(half: &Half<F>) -> Vec<Finding> {
    let Some(desired) = &half.facts.overlay else { return Vec::new() };
    let actual = match &half.overlay {
        Ok(actual) => actual,
        Err(why) => return vec![Finding::unknown("route", why)],
    };
    let plan = plan(desired, actual);
    let kind = |op: &Op<F>| match op {
        Op::SetRoute(_) | Op::DelRoute(_) => "route",
        Op::SetNeighbour { .. } | Op::DelNeighbour { .. } => "neighbour",
        Op::SetFdb { .. } | Op::DelFdb { .. } => "fdb",
    };
    let checks: &[(&str, &str)] = &[("route", "routes"), ("neighbour", "neighbours"), ("fdb", "FDB entries")];
    let about = |(check, what): &(&'static str, &str)| {
        let ops: Vec<String> = plan
            .ops
            .iter()
            .filter(|op| kind(op) == *check)
            .map(|op| {
                if op.is_removal() { format!("of no peer: {op}") } else { format!("missing or wrong: {op}") }
            })
            .collect();
        if ops.is_empty() {
            Finding::ok(
                check,
                format_args!("the {what} of {} peers are as their leases say", desired.peers.len()),
            )
        } else {
            Finding::fault(check, few(&ops), REMEDY)
        }
    };
    let vxlan = desired.device != 0 && !desired.whole;
    checks.iter().filter(|(check, _)| vxlan || *check == "route").map(about).collect()
}
