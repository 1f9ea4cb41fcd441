//! Leases: etcd's health, our record in it, and who else has our address; clocks.

use std::{collections::BTreeMap, net::Ipv4Addr};

use super::few;
use crate::{
    doctor::{finding::Finding, snapshot::Snapshot},
    kernel::mac_text,
    lease::Lease,
};

/// How far clocks may be apart, in seconds: less than what matters to the lifetime of a certificate, more than what an
/// answer takes.
const CLOCK_TOLERANCE: i64 = 10;

pub(super) fn examine(snapshot: &Snapshot) -> Vec<Finding> {
    if snapshot.facts.etcd.endpoints.is_empty() {
        return Vec::new();
    }
    let mut findings = vec![health(snapshot)];
    findings.extend(clock(snapshot));
    if let Some(leases) = &snapshot.etcd.leases {
        match leases {
            Ok(leases) => findings.extend([lease(snapshot, leases), public_ip(snapshot, leases)]),
            Err(why) => {
                findings.push(Finding::unknown("lease", format_args!("the leases cannot be read: {why}")))
            }
        }
    }
    findings
}

fn health(snapshot: &Snapshot) -> Finding {
    const CHECK: &str = "etcd";
    let endpoints = &snapshot.etcd.endpoints;
    let sick: Vec<String> = endpoints
        .iter()
        .filter_map(|(url, answer)| match answer {
            Ok(health) if health.healthy == Some(false) => Some(format!("{url} is not healthy")),
            Ok(_) => None,
            Err(why) => Some(format!("{url}: {why}")),
        })
        .collect();
    let remedy = "nothing changes on this node until it answers; see etcd's log, and that port from here";
    if sick.len() == endpoints.len() {
        return Finding::fault(CHECK, format_args!("no endpoint is healthy: {}", few(&sick)), remedy);
    }
    if !sick.is_empty() {
        return Finding::warning(
            CHECK,
            few(&sick),
            "the others carry on; mend it, or take it out of --etcd-endpoints",
        );
    }
    let took = |(url, answer): &(String, Result<crate::doctor::snapshot::Health, String>)| {
        let took = answer.as_ref().map_or(0, |health| health.took.as_millis());
        format!("{url} in {took} ms")
    };
    Finding::ok(CHECK, few(&endpoints.iter().map(took).collect::<Vec<_>>()))
}

fn clock(snapshot: &Snapshot) -> Option<Finding> {
    const CHECK: &str = "clock";
    let ahead =
        snapshot.etcd.endpoints.iter().filter_map(|(url, answer)| Some((url, answer.as_ref().ok()?.ahead?)));
    let (url, ahead) = ahead.max_by_key(|(_, ahead)| ahead.abs())?;
    if ahead.abs() <= CLOCK_TOLERANCE {
        return Some(Finding::ok(CHECK, format_args!("within {CLOCK_TOLERANCE} s of etcd's")));
    }
    let which = if ahead > 0 { "behind" } else { "ahead of" };
    Some(Finding::warning(
        CHECK,
        format_args!("this host is {} s {which} {url}", ahead.abs()),
        "run a time service on both: certificates and logs go by these clocks",
    ))
}

/// Our record as etcd has it.
fn lease(snapshot: &Snapshot, leases: &[Lease]) -> Finding {
    const CHECK: &str = "lease";
    let facts = &snapshot.facts;
    let remedy = "a running agent puts it right or says why not: start it, or see its log";
    if let Some(reason) = &facts.lost {
        return Finding::fault(CHECK, format_args!("{} is lost: {reason}", facts.subnet), remedy);
    }
    let Some(record) = leases.iter().find(|lease| lease.subnet == facts.subnet.trunc()) else {
        return Finding::fault(CHECK, format_args!("etcd has no record of {}", facts.subnet), remedy);
    };
    let attrs = &record.attrs;
    if attrs.public_ip != facts.uplink.public_ip {
        return Finding::fault(
            CHECK,
            format_args!(
                "{} is the subnet of {} in etcd, and of {} here",
                facts.subnet, attrs.public_ip, facts.uplink.public_ip
            ),
            remedy,
        );
    }
    let recorded = attrs.vtep().ok().map(|vtep| vtep.vtep_mac);
    if let (Some(device), Some(recorded)) = (&facts.device, recorded)
        && recorded != device.mac
    {
        return Finding::fault(
            CHECK,
            format_args!(
                "etcd says that our VTEP has {}, {} has {}: peers send to the wrong one",
                mac_text(recorded),
                device.name,
                mac_text(device.mac)
            ),
            remedy,
        );
    }
    Finding::ok(CHECK, format_args!("{} at {}", facts.subnet, attrs.public_ip))
}

/// Two nodes with one address, or one MAC.
fn public_ip(snapshot: &Snapshot, leases: &[Lease]) -> Finding {
    const CHECK: &str = "public-ip";
    let facts = &snapshot.facts;
    let mut twice = Vec::new();
    let mut by_address: BTreeMap<Ipv4Addr, Vec<&Lease>> = BTreeMap::new();
    for lease in leases {
        by_address.entry(lease.attrs.public_ip).or_default().push(lease);
    }
    for (address, leases) in &by_address {
        if leases.len() > 1 {
            let subnets: Vec<String> = leases.iter().map(|lease| lease.subnet.to_string()).collect();
            twice.push(format!("{address} holds {}", subnets.join(" and ")));
        }
    }
    let ours = by_address.get(&facts.uplink.public_ip).into_iter().flatten();
    for lease in ours.filter(|lease| lease.subnet != facts.subnet.trunc()) {
        twice.push(format!(
            "{} has {} in etcd and {} here",
            facts.uplink.public_ip, lease.subnet, facts.subnet
        ));
    }
    let mut by_mac: BTreeMap<[u8; 6], Vec<Ipv4Addr>> = BTreeMap::new();
    for (lease, vtep) in leases.iter().filter_map(|lease| Some((lease, lease.attrs.vtep().ok()?))) {
        by_mac.entry(vtep.vtep_mac).or_default().push(lease.attrs.public_ip);
    }
    for (mac, addresses) in by_mac.iter().filter(|(_, addresses)| addresses.len() > 1) {
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        twice.push(format!("VTEP MAC {} is that of {}", mac_text(*mac), addresses.join(" and ")));
    }
    if twice.is_empty() {
        return Finding::ok(CHECK, format_args!("{} leases, each with an address of its own", leases.len()));
    }
    Finding::fault(
        CHECK,
        few(&twice),
        "give each node its own --public-ip (or --iface), and clones of one image their own machine id and MACs; then \
         delete the record that is wrong",
    )
}
