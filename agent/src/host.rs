//! This host as the kernel shows it: which interface is the uplink, and which prefixes are taken.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result};
use ipnet::Ipv4Net;

use crate::{
    config::Config,
    kernel::{AddressScope, Kernel, Link, LinkKind, POD_ROUTE_PROTOCOL, ROUTE_PROTOCOL, Route, TABLE_MAIN},
    reconcile::Overlay,
    uplink::{self, Candidate, CandidateAddress, Uplink},
};

/// Chooses the uplink from what the kernel has now.
///
/// # Errors
///
/// Where nothing matches; the error lists the interfaces.
pub(crate) async fn choose_uplink(kernel: &Kernel, config: &Config) -> Result<Uplink> {
    let links = kernel.links().await?;
    let addresses = kernel.addresses().await?;
    let candidates: Vec<Candidate> = links
        .iter()
        .filter(|link| !link.loopback)
        .map(|link| Candidate {
            ifindex: link.index,
            name: link.name.clone(),
            mtu: link.mtu,
            addresses: addresses
                .iter()
                .filter(|address| address.ifindex == link.index)
                .map(|address| CandidateAddress {
                    address: address.address,
                    link_local: address.scope == AddressScope::Link,
                    permanent: address.permanent,
                    temporary: address.secondary,
                    deprecated: address.deprecated,
                })
                .collect(),
        })
        .collect();
    let default_route = default_route(&kernel.routes().await?);
    let can_reach = match config.uplink.can_reach {
        None => None,
        Some(address) => {
            let route =
                kernel.route_get(address).await.with_context(|| format!("--iface-can-reach={address}"))?;
            Some((route.ifindex, route.source))
        }
    };
    Ok(uplink::choose(&config.uplink, &candidates, default_route, can_reach)?)
}

/// Interface of the default route that the kernel would take: the one with the lowest metric of the main table.
fn default_route(routes: &[Route]) -> Option<u32> {
    routes
        .iter()
        .filter(|route| route.dst.prefix_len() == 0 && route.table == TABLE_MAIN)
        .min_by_key(|route| route.metric)?
        .ifindex
}

/// Prefixes of this host, without the overlay's own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Prefixes {
    /// Addresses and routes that no subnet may overlap.
    pub(crate) others: Vec<Ipv4Net>,
    /// Those of bridges: the own subnet's bridge is among them.
    pub(crate) bridges: Vec<Ipv4Net>,
    /// Addresses on whatever interface.
    pub(crate) addresses: Vec<Ipv4Addr>,
}

impl Prefixes {
    /// An address of this host that lies in a subnet.
    pub(crate) fn address_in(&self, subnet: Ipv4Net) -> Option<Ipv4Addr> {
        self.addresses.iter().find(|address| subnet.contains(*address)).copied()
    }
}

/// Reads the prefixes of this host.
pub(crate) async fn prefixes(kernel: &Kernel, overlay: Option<&Overlay>) -> Result<Prefixes> {
    let links = kernel.links().await?;
    let is_bridge =
        |index: u32| links.iter().any(|link: &Link| link.index == index && link.kind == LinkKind::Bridge);
    let is_overlay = |index: u32| overlay.is_some_and(|overlay| overlay.device.index == index);
    let addresses = kernel.addresses().await?;
    let of_addresses = addresses
        .iter()
        .filter_map(|a| Some((a.ifindex, Ipv4Net::new(a.address, a.prefix_len).ok()?.trunc())));
    let routes = kernel.routes().await?;
    let of_routes = routes
        .iter()
        .filter(|route| ![ROUTE_PROTOCOL, POD_ROUTE_PROTOCOL].contains(&route.protocol) && !is_special(route))
        .map(|route| (route.ifindex.unwrap_or(0), route.dst));
    let own = addresses.iter().filter(|a| !is_overlay(a.ifindex)).map(|a| a.address).collect();
    let mut prefixes = Prefixes { addresses: own, ..Prefixes::default() };
    for (index, prefix) in of_addresses.chain(of_routes).filter(|(index, _)| !is_overlay(*index)) {
        let list = if is_bridge(index) { &mut prefixes.bridges } else { &mut prefixes.others };
        if !list.contains(&prefix) {
            list.push(prefix);
        }
    }
    prefixes.others.sort_unstable();
    prefixes.bridges.sort_unstable();
    Ok(prefixes)
}

/// Local, broadcast and multicast entries repeat what the addresses say.
fn is_special(route: &Route) -> bool {
    const LOCAL_TABLE: u32 = 255;
    route.table == LOCAL_TABLE || Ipv4Addr::from(u32::from(route.dst.network())).is_multicast()
}
