//! The choice of the uplink: the interface and address that carry the overlay's outer packets.
//!
//! Pure: the caller lists interfaces and looks routes up. The order is flannel's (`pkg/ipmatch`): each `--iface`,
//! each `--iface-regex` (addresses first, then names), `--iface-can-reach`; if none of these is given, the owner of
//! `--public-ip`, and without that the interface of the default route.

use std::cmp::Reverse;
use std::fmt::Write as _;
use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
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

/// The interface and addresses that carry the overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uplink {
    pub ifindex: u32,
    pub name: String,
    /// Bytes, not 0.
    pub mtu: u32,
    /// The VTEP address: outer source of what this node sends.
    pub address: Ipv4Addr,
    /// The address that other nodes send to; this node's identity among the leases.
    pub public_ip: Ipv4Addr,
    /// The IPv6 address that other nodes send to, and the VTEP's own; only in a dual-stack network.
    pub public_ipv6: Option<Ipv6Addr>,
}

impl fmt::Display for Uplink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {} (public {}", self.name, self.address, self.public_ip)?;
        if let Some(public_ipv6) = self.public_ipv6 {
            write!(f, " and {public_ipv6}")?;
        }
        write!(f, "), MTU {}", self.mtu)
    }
}

/// No interface can be the uplink.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UplinkError {
    /// None of the interfaces that were asked for is there.
    #[error("no interface matches {asked}; there are {available}")]
    NoMatch { asked: String, available: String },
    /// Nothing was asked for and there is no default route.
    #[error("there is no IPv4 default route to find the uplink by; give --iface; there are {available}")]
    NoDefaultRoute { available: String },
    /// The interface of the default route cannot be used.
    #[error("the interface of the default route, {name}, {reason}; give --iface; there are {available}")]
    DefaultRoute { name: String, reason: &'static str, available: String },
}

const NO_ADDRESS: &str = "has no usable IPv4 address";
const NO_MTU: &str = "has an MTU of 0";

/// Chooses the uplink. `default_route_ifindex` is the interface of the IPv4 default route, `can_reach` the interface and
/// source address of the route to `choice.can_reach`.
///
/// # Errors
///
/// [`UplinkError`] says what was asked for and which interfaces there are.
pub fn choose(
    choice: &UplinkChoice,
    candidates: &[Candidate],
    default_route_ifindex: Option<u32>,
    can_reach: Option<(u32, Ipv4Addr)>,
) -> Result<Uplink, UplinkError> {
    let found = |(candidate, address): (&Candidate, Ipv4Addr)| Uplink {
        ifindex: candidate.ifindex,
        name: candidate.name.clone(),
        mtu: candidate.mtu,
        address,
        public_ip: choice.public_ip.unwrap_or(address),
        public_ipv6: public_ipv6(choice, candidate),
    };
    let by_index = |ifindex| candidates.iter().find(|candidate| candidate.ifindex == ifindex);

    if let Some(asked) = asked_for(choice) {
        let by_name = || choice.ifaces.iter().find_map(|iface| by_name_or_address(iface, candidates));
        let by_regex = || choice.iface_regex.iter().find_map(|regex| by_regex(regex, candidates));
        let by_reach = || {
            let (ifindex, source) = can_reach.filter(|_| choice.can_reach.is_some())?;
            Some((by_index(ifindex)?, source)).filter(usable)
        };
        let by_public_ip = || {
            let public_ip = choice.public_ip.filter(|_| !choice.names_interfaces())?;
            by_address(public_ip, candidates)
        };
        return by_name()
            .or_else(by_regex)
            .or_else(by_reach)
            .or_else(by_public_ip)
            .map(found)
            .ok_or_else(|| UplinkError::NoMatch { asked, available: available(candidates) });
    }

    let candidate = default_route_ifindex
        .and_then(by_index)
        .ok_or_else(|| UplinkError::NoDefaultRoute { available: available(candidates) })?;
    let refused = |reason| UplinkError::DefaultRoute {
        name: candidate.name.clone(),
        reason,
        available: available(candidates),
    };
    let address = best_address(candidate).ok_or_else(|| refused(NO_ADDRESS))?;
    Some((candidate, address)).filter(usable).map(found).ok_or_else(|| refused(NO_MTU))
}

impl UplinkChoice {
    /// Whether interfaces are asked for by more than the public address.
    fn names_interfaces(&self) -> bool {
        !self.ifaces.is_empty() || !self.iface_regex.is_empty() || self.can_reach.is_some()
    }
}

/// The flags that say which interface to take; `None` if no flag does.
fn asked_for(choice: &UplinkChoice) -> Option<String> {
    let mut asked: Vec<String> = Vec::new();
    asked.extend(choice.ifaces.iter().map(|iface| format!("--iface={iface}")));
    asked.extend(choice.iface_regex.iter().map(|regex| format!("--iface-regex={regex}")));
    asked.extend(choice.can_reach.map(|address| format!("--iface-can-reach={address}")));
    if asked.is_empty() {
        asked.extend(choice.public_ip.map(|address| format!("--public-ip={address}")));
    }
    (!asked.is_empty()).then(|| asked.join(" or "))
}

fn usable(&(candidate, _): &(&Candidate, Ipv4Addr)) -> bool {
    candidate.mtu != 0
}

fn by_name_or_address<'a>(iface: &str, candidates: &'a [Candidate]) -> Option<(&'a Candidate, Ipv4Addr)> {
    if let Ok(address) = iface.parse() {
        return by_address(address, candidates);
    }
    let candidate = candidates.iter().find(|candidate| candidate.name == iface)?;
    Some((candidate, best_address(candidate)?)).filter(usable)
}

fn by_address(address: Ipv4Addr, candidates: &[Candidate]) -> Option<(&Candidate, Ipv4Addr)> {
    let owns = |candidate: &&Candidate| candidate.addresses.iter().any(|entry| entry.address == address);
    Some((candidates.iter().find(owns)?, address)).filter(usable)
}

fn by_regex<'a>(regex: &Regex, candidates: &'a [Candidate]) -> Option<(&'a Candidate, Ipv4Addr)> {
    let by_address = candidates.iter().find_map(|candidate| {
        let matching = |address: &Ipv4Addr| regex.is_match(&address.to_string());
        Some((candidate, addresses_by_preference(candidate).into_iter().find(matching)?)).filter(usable)
    });
    by_address.or_else(|| {
        let named = candidates.iter().filter(|candidate| regex.is_match(&candidate.name));
        named.filter_map(|candidate| Some((candidate, best_address(candidate)?))).find(usable)
    })
}

/// The address that flannel would take: global before link-local, permanent before dynamic, lasting before temporary.
fn best_address(candidate: &Candidate) -> Option<Ipv4Addr> {
    addresses_by_preference(candidate).into_iter().next()
}

fn addresses_by_preference(candidate: &Candidate) -> Vec<Ipv4Addr> {
    by_preference(&candidate.addresses)
}

/// The IPv6 address of the chosen interface that others can reach.
fn public_ipv6(choice: &UplinkChoice, candidate: &Candidate) -> Option<Ipv6Addr> {
    let global: Vec<_> = candidate.addresses_v6.iter().filter(|entry| !entry.link_local).copied().collect();
    let first = by_preference(&global).into_iter().next()?;
    Some(choice.public_ipv6.unwrap_or(first))
}

fn by_preference<F: Family>(entries: &[CandidateAddress<F>]) -> Vec<F::Addr> {
    let mut entries: Vec<&CandidateAddress<F>> =
        entries.iter().filter(|entry| !entry.deprecated && F::is_host(entry.address)).collect();
    entries.sort_by_key(|entry| (entry.link_local, Reverse(entry.permanent), entry.temporary));
    entries.into_iter().map(|entry| entry.address).collect()
}

fn available(candidates: &[Candidate]) -> String {
    let mut text = String::new();
    for candidate in candidates {
        let separator = if text.is_empty() { "" } else { ", " };
        let addresses: Vec<String> =
            candidate.addresses.iter().map(|entry| entry.address.to_string()).collect();
        // Writing to a String cannot fail.
        let _ = write!(text, "{separator}{} ({})", candidate.name, addresses.join(" "));
    }
    if text.is_empty() { "none".into() } else { text }
}

#[cfg(test)]
mod tests;
