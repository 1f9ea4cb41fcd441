//! Leases: etcd's health, our record in it, and who else has our address; clocks.

use std::{collections::BTreeMap, net::IpAddr};

use super::few;
use crate::{
    doctor::{finding::Finding, snapshot::Snapshot},
    family::{V4, V6},
    kernel::mac_text,
    lease::{Lease, LeaseAttrs},
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
    let key = facts.key();
    let subnets = key.subnets();
    if let Some(reason) = &facts.lost {
        return Finding::fault(CHECK, format_args!("{subnets} is lost: {reason}"), remedy);
    }
    let Some(record) = leases.iter().find(|lease| lease.key == key) else {
        return Finding::fault(CHECK, format_args!("etcd has no record of {subnets}"), remedy);
    };
    let attrs = &record.attrs;
    let (recorded, here) = (addresses(attrs), facts.uplink.public());
    if recorded != here {
        return Finding::fault(
            CHECK,
            format_args!("{subnets} is the subnet of {recorded} in etcd, and of {here} here"),
            remedy,
        );
    }
    let v4 = facts.v4.as_ref().and_then(|half| half.device.as_ref()).zip(attrs.vtep().ok());
    let v6 = facts.v6.as_ref().and_then(|half| half.device.as_ref()).zip(attrs.vtep_v6().ok());
    if let Some((device, vtep)) =
        [v4, v6].into_iter().flatten().find(|(device, vtep)| vtep.vtep_mac != device.mac)
    {
        return Finding::fault(
            CHECK,
            format_args!(
                "etcd says that our VTEP has {}, {} has {}: peers send to the wrong one",
                mac_text(vtep.vtep_mac),
                device.name,
                mac_text(device.mac)
            ),
            remedy,
        );
    }
    let recorded_key = attrs.wireguard::<V4>().or_else(|_| attrs.wireguard::<V6>()).ok();
    if let (Some(tunnel), Some(data)) = (facts.wireguard.first(), recorded_key)
        && data.public_key != tunnel.public_key
    {
        let (name, key, theirs) = (&tunnel.name, tunnel.public_key, data.public_key);
        return Finding::fault(
            CHECK,
            format_args!("etcd says that our public key is {theirs}, {name} has {key}: peers let nothing in"),
            remedy,
        );
    }
    Finding::ok(CHECK, format_args!("{subnets} at {recorded}"))
}

fn addresses(attrs: &LeaseAttrs) -> String {
    let v6 = attrs.public_ipv6.map(|address| address.to_string());
    attrs.public_ip.map(|address| address.to_string()).into_iter().chain(v6).collect::<Vec<_>>().join(" and ")
}

/// Two nodes with one address, or one MAC.
fn public_ip(snapshot: &Snapshot, leases: &[Lease]) -> Finding {
    const CHECK: &str = "public-ip";
    let facts = &snapshot.facts;
    let mut twice = Vec::new();
    let mut by_address: BTreeMap<IpAddr, Vec<&Lease>> = BTreeMap::new();
    let of = |attrs: &LeaseAttrs| {
        let v6 = attrs.public_ipv6.map(IpAddr::V6);
        attrs.public_ip.map(IpAddr::V4).into_iter().chain(v6).collect::<Vec<_>>()
    };
    for lease in leases {
        for address in of(&lease.attrs) {
            by_address.entry(address).or_default().push(lease);
        }
    }
    for (address, leases) in by_address.iter().filter(|(_, leases)| leases.len() > 1) {
        let subnets: Vec<String> = leases.iter().map(|lease| lease.key.subnets()).collect();
        twice.push(format!("{address} holds {}", subnets.join(" as well as ")));
    }
    let (uplink, key) = (&facts.uplink, facts.key());
    for address in uplink.public_ip.map(IpAddr::V4).into_iter().chain(uplink.public_ipv6.map(IpAddr::V6)) {
        let ours = by_address.get(&address).into_iter().flatten();
        for lease in ours.filter(|lease| lease.key != key) {
            twice.push(format!("{address} has {} in etcd and {} here", lease.key.subnets(), key.subnets()));
        }
    }
    let mut by_mac: BTreeMap<[u8; 6], Vec<String>> = BTreeMap::new();
    for lease in leases {
        let attrs = &lease.attrs;
        let mut macs: Vec<_> =
            [attrs.vtep(), attrs.vtep_v6()].into_iter().flatten().map(|vtep| vtep.vtep_mac).collect();
        macs.dedup();
        for mac in macs {
            by_mac.entry(mac).or_default().push(addresses(attrs));
        }
    }
    for (mac, addresses) in by_mac.iter().filter(|(_, addresses)| addresses.len() > 1) {
        twice.push(format!("VTEP MAC {} is that of {}", mac_text(*mac), addresses.join(" as well as ")));
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
