//! The choice of the uplink: the interface and address that carry the overlay's outer packets.
//!
//! Pure: the caller lists interfaces and looks routes up. The order is flannel's (`pkg/ipmatch`): each `--iface`,
//! each `--iface-regex` (addresses first, then names), `--iface-can-reach`; if none of these is given, the owner of
//! `--public-ip`, and without that the interface of the default route. A network of IPv6 alone goes by IPv6 addresses
//! and routes in all of that, and no IPv4 address is needed.

use std::cmp::Reverse;
use std::fmt::Write as _;
use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::{
    config::UplinkChoice,
    family::{Family, V4, V6},
};

/// An interface of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    pub ifindex: u32,
    pub name: String,
    /// Bytes of a packet without its Ethernet header.
    pub mtu: u32,
    /// In the kernel's order.
    pub addresses: Vec<CandidateAddress>,
    /// The same of IPv6; empty where the network has no IPv6 half.
    pub addresses_v6: Vec<CandidateAddress<V6>>,
}

/// An address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CandidateAddress<F: Family = V4> {
    pub address: F::Addr,
    /// 169.254.0.0/16, fe80::/10.
    pub link_local: bool,
    /// `IFA_F_PERMANENT`: without a lifetime.
    pub permanent: bool,
    /// `IFA_F_TEMPORARY`, which for IPv4 is `IFA_F_SECONDARY`.
    pub temporary: bool,
    /// `IFA_F_DEPRECATED`: not to be used for anything new.
    pub deprecated: bool,
}

/// Which families the network has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Families {
    pub v4: bool,
    pub v6: bool,
}

/// What the kernel says of the ways out.
#[derive(Debug, Clone, Copy, Default)]
pub struct Ways {
    /// Interface of the IPv4 default route.
    pub default_route: Option<u32>,
    /// Interface of the IPv6 default route.
    pub default_route_v6: Option<u32>,
    /// Interface and source address of the route to `--iface-can-reach`.
    pub can_reach: Option<(u32, IpAddr)>,
}

/// The interface and addresses that carry the overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uplink {
    pub ifindex: u32,
    pub name: String,
    /// Bytes, not 0.
    pub mtu: u32,
    /// The IPv4 address of the interface, in a network that has IPv4.
    pub address: Option<Ipv4Addr>,
    /// The IPv4 address that other nodes send to, and the VTEP's own; there it is this node's identity among the leases.
    pub public_ip: Option<Ipv4Addr>,
    /// The IPv6 address of the interface, in a network that has IPv6.
    pub address_v6: Option<Ipv6Addr>,
    /// The IPv6 address that other nodes send to, and the VTEP's own; the identity of a node without IPv4.
    pub public_ipv6: Option<Ipv6Addr>,
}

impl Uplink {
    /// The address of a family that other nodes send to.
    #[must_use]
    pub fn public_of<F: Family>(&self) -> Option<F::Addr> {
        [self.public_ip.map(IpAddr::V4), self.public_ipv6.map(IpAddr::V6)]
            .into_iter()
            .flatten()
            .find_map(F::addr)
    }

    /// The interface's own address of a family.
    #[must_use]
    pub fn own_of<F: Family>(&self) -> Option<F::Addr> {
        [self.address.map(IpAddr::V4), self.address_v6.map(IpAddr::V6)]
            .into_iter()
            .flatten()
            .find_map(F::addr)
    }

    /// The addresses that other nodes send to, for people.
    #[must_use]
    pub fn public(&self) -> String {
        listed(self.public_ip, self.public_ipv6)
    }

    /// The interface's own addresses, for people.
    #[must_use]
    pub fn own(&self) -> String {
        listed(self.address, self.address_v6)
    }
}

fn listed(v4: Option<Ipv4Addr>, v6: Option<Ipv6Addr>) -> String {
    let v6 = v6.map(|address| address.to_string());
    v4.map(|address| address.to_string()).into_iter().chain(v6).collect::<Vec<_>>().join(" and ")
}

impl fmt::Display for Uplink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {} (public {}), MTU {}", self.name, self.own(), self.public(), self.mtu)
    }
}

/// No interface can be the uplink.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UplinkError {
    /// None of the interfaces that were asked for is there.
    #[error("no interface matches {asked}; there are {available}")]
    NoMatch { asked: String, available: String },
    /// Nothing was asked for and there is no default route.
    #[error("there is no {family} default route to find the uplink by; give --iface; there are {available}")]
    NoDefaultRoute { family: &'static str, available: String },
    /// The interface of the default route cannot be used.
    #[error("the interface of the default route, {name}, {reason}; give --iface; there are {available}")]
    DefaultRoute { name: String, reason: String, available: String },
    /// The interface that was found has no IPv6 address, and the network has IPv6.
    #[error(
        "the network config says EnableIPv6, but {name} has no IPv6 address that other nodes reach: give it one, or choose another interface with --iface"
    )]
    NoIpv6 { name: String },
}

const NO_MTU: &str = "has an MTU of 0";

/// The part of a choice that depends on the family by which the interface is found.
trait Side: Family {
    /// In the kernel's order.
    fn addresses(candidate: &Candidate) -> Vec<CandidateAddress<Self>>;
    /// The flag of the public address, and its value.
    fn public(choice: &UplinkChoice) -> (&'static str, Option<Self::Addr>);
    fn default_route(ways: &Ways) -> Option<u32>;
}

impl Side for V4 {
    fn addresses(candidate: &Candidate) -> Vec<CandidateAddress> {
        candidate.addresses.clone()
    }

    fn public(choice: &UplinkChoice) -> (&'static str, Option<Ipv4Addr>) {
        ("public-ip", choice.public_ip)
    }

    fn default_route(ways: &Ways) -> Option<u32> {
        ways.default_route
    }
}

impl Side for V6 {
    /// Link-local ones are of no use to nodes elsewhere.
    fn addresses(candidate: &Candidate) -> Vec<CandidateAddress<Self>> {
        candidate.addresses_v6.iter().filter(|entry| !entry.link_local).copied().collect()
    }

    fn public(choice: &UplinkChoice) -> (&'static str, Option<Ipv6Addr>) {
        ("public-ipv6", choice.public_ipv6)
    }

    fn default_route(ways: &Ways) -> Option<u32> {
        ways.default_route_v6
    }
}

/// Chooses the uplink: by its IPv4 address where the network has IPv4, else by its IPv6 address.
///
/// # Errors
///
/// [`UplinkError`] says what was asked for and which interfaces there are.
pub fn choose(
    choice: &UplinkChoice,
    candidates: &[Candidate],
    families: Families,
    ways: &Ways,
) -> Result<Uplink, UplinkError> {
    let uplink = |candidate: &Candidate, v4: Option<Ipv4Addr>, v6: Option<Ipv6Addr>| Uplink {
        ifindex: candidate.ifindex,
        name: candidate.name.clone(),
        mtu: candidate.mtu,
        address: v4,
        public_ip: v4.map(|address| choice.public_ip.unwrap_or(address)),
        address_v6: v6,
        public_ipv6: v6.map(|address| choice.public_ipv6.unwrap_or(address)),
    };
    if !families.v4 {
        let (candidate, address) = find::<V6>(choice, candidates, ways)?;
        return Ok(uplink(candidate, None, Some(address)));
    }
    let (candidate, address) = find::<V4>(choice, candidates, ways)?;
    let v6 = if families.v6 {
        let asked = choice.ifaces.iter().filter_map(|iface| iface.parse().ok());
        let found = asked
            .filter(|address| owns::<V6>(candidate, *address))
            .chain(best_address::<V6>(candidate))
            .next();
        Some(found.ok_or_else(|| UplinkError::NoIpv6 { name: candidate.name.clone() })?)
    } else {
        None
    };
    Ok(uplink(candidate, Some(address), v6))
}

/// The interface, and its address of a family.
fn find<'a, F: Side>(
    choice: &UplinkChoice,
    candidates: &'a [Candidate],
    ways: &Ways,
) -> Result<(&'a Candidate, F::Addr), UplinkError> {
    let by_index = |ifindex| candidates.iter().find(|candidate| candidate.ifindex == ifindex);
    if let Some(asked) = asked_for::<F>(choice) {
        let by_name = || choice.ifaces.iter().find_map(|iface| by_name_or_address::<F>(iface, candidates));
        let by_regex = || choice.iface_regex.iter().find_map(|regex| by_regex::<F>(regex, candidates));
        let by_reach = || {
            let (ifindex, source) = ways.can_reach.filter(|_| choice.can_reach.is_some())?;
            let candidate = by_index(ifindex)?;
            Some((candidate, F::addr(source).or_else(|| best_address::<F>(candidate))?)).filter(usable)
        };
        let by_public_ip = || {
            let public_ip = F::public(choice).1.filter(|_| !choice.names_interfaces())?;
            by_address::<F>(public_ip, candidates)
        };
        return by_name()
            .or_else(by_regex)
            .or_else(by_reach)
            .or_else(by_public_ip)
            .ok_or_else(|| UplinkError::NoMatch { asked, available: available(candidates) });
    }

    let candidate = F::default_route(ways)
        .and_then(by_index)
        .ok_or_else(|| UplinkError::NoDefaultRoute { family: F::NAME, available: available(candidates) })?;
    let refused = |reason: String| UplinkError::DefaultRoute {
        name: candidate.name.clone(),
        reason,
        available: available(candidates),
    };
    let address =
        best_address::<F>(candidate).ok_or_else(|| refused(format!("has no usable {} address", F::NAME)))?;
    Some((candidate, address)).filter(usable).ok_or_else(|| refused(NO_MTU.to_owned()))
}

impl UplinkChoice {
    /// Whether interfaces are asked for by more than the public address.
    fn names_interfaces(&self) -> bool {
        !self.ifaces.is_empty() || !self.iface_regex.is_empty() || self.can_reach.is_some()
    }
}

/// The flags that say which interface to take; `None` if no flag does.
fn asked_for<F: Side>(choice: &UplinkChoice) -> Option<String> {
    let mut asked: Vec<String> = Vec::new();
    asked.extend(choice.ifaces.iter().map(|iface| format!("--iface={iface}")));
    asked.extend(choice.iface_regex.iter().map(|regex| format!("--iface-regex={regex}")));
    asked.extend(choice.can_reach.map(|address| format!("--iface-can-reach={address}")));
    if asked.is_empty() {
        let (flag, address) = F::public(choice);
        asked.extend(address.map(|address| format!("--{flag}={address}")));
    }
    (!asked.is_empty()).then(|| asked.join(" or "))
}

fn usable<A>((candidate, _): &(&Candidate, A)) -> bool {
    candidate.mtu != 0
}

/// An address of the other family names the interface as well.
fn by_name_or_address<'a, F: Side>(
    iface: &str,
    candidates: &'a [Candidate],
) -> Option<(&'a Candidate, F::Addr)> {
    let candidate = match iface.parse::<IpAddr>() {
        Ok(address) => {
            if let Some(address) = F::addr(address) {
                return by_address::<F>(address, candidates);
            }
            candidates.iter().find(|candidate| match address {
                IpAddr::V4(address) => owns::<V4>(candidate, address),
                IpAddr::V6(address) => owns::<V6>(candidate, address),
            })?
        }
        Err(_) => candidates.iter().find(|candidate| candidate.name == iface)?,
    };
    Some((candidate, best_address::<F>(candidate)?)).filter(usable)
}

fn owns<F: Side>(candidate: &Candidate, address: F::Addr) -> bool {
    F::addresses(candidate).iter().any(|entry| entry.address == address)
}

fn by_address<F: Side>(address: F::Addr, candidates: &[Candidate]) -> Option<(&Candidate, F::Addr)> {
    Some((candidates.iter().find(|candidate| owns::<F>(candidate, address))?, address)).filter(usable)
}

fn by_regex<'a, F: Side>(regex: &Regex, candidates: &'a [Candidate]) -> Option<(&'a Candidate, F::Addr)> {
    let by_address = candidates.iter().find_map(|candidate| {
        let matching = |address: &F::Addr| regex.is_match(&address.to_string());
        Some((candidate, by_preference::<F>(candidate).into_iter().find(matching)?)).filter(usable)
    });
    by_address.or_else(|| {
        let named = candidates.iter().filter(|candidate| regex.is_match(&candidate.name));
        named.filter_map(|candidate| Some((candidate, best_address::<F>(candidate)?))).find(usable)
    })
}

/// The address that flannel would take: global before link-local, permanent before dynamic, lasting before temporary.
fn best_address<F: Side>(candidate: &Candidate) -> Option<F::Addr> {
    by_preference::<F>(candidate).into_iter().next()
}

fn by_preference<F: Side>(candidate: &Candidate) -> Vec<F::Addr> {
    let mut entries = F::addresses(candidate);
    entries.retain(|entry| !entry.deprecated && F::is_host(entry.address));
    entries.sort_by_key(|entry| (entry.link_local, Reverse(entry.permanent), entry.temporary));
    entries.into_iter().map(|entry| entry.address).collect()
}

fn available(candidates: &[Candidate]) -> String {
    let mut text = String::new();
    for candidate in candidates {
        let separator = if text.is_empty() { "" } else { ", " };
        let v4 = candidate.addresses.iter().map(|entry| entry.address.to_string());
        let v6 = candidate.addresses_v6.iter().map(|entry| entry.address.to_string());
        let addresses: Vec<String> = v4.chain(v6).collect();
        // Writing to a String cannot fail.
        let _ = write!(text, "{separator}{} ({})", candidate.name, addresses.join(" "));
    }
    if text.is_empty() { "none".into() } else { text }
}

#[cfg(test)]
mod tests;
