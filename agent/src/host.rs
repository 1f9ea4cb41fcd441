//! This host as the kernel shows it: which interface is the uplink, and which prefixes are taken.

use std::net::IpAddr;

use anyhow::{Context as _, Result};

use crate::{
    config::Config,
    family::{Family, V4, V6},
    kernel::{
        Address, AddressScope, Kernel, Link, LinkKind, POD_ROUTE_PROTOCOL, ROUTE_PROTOCOL, Route, TABLE_MAIN,
        is_wireguard,
    },
    uplink::{self, Candidate, CandidateAddress, Families, Uplink, Ways},
    wireguard,
};

/// Chooses the uplink from what the kernel has now.
///
/// # Errors
///
/// Where nothing matches; the error lists the interfaces. In a dual-stack network also where the interface has no
/// IPv6 address that others reach.
pub(crate) async fn choose_uplink(kernel: &Kernel, config: &Config, families: Families) -> Result<Uplink> {
    let links = kernel.links().await?;
    let addresses = if families.v4 { kernel.addresses().await? } else { Vec::new() };
    let addresses_v6 = if families.v6 { kernel.addresses_of::<V6>().await? } else { Vec::new() };
    let candidates: Vec<Candidate> = links
        .iter()
        .filter(|link| !link.loopback)
        .map(|link| Candidate {
            ifindex: link.index,
            name: link.name.clone(),
            mtu: link.mtu,
            addresses: candidates_of(&addresses, link.index),
            addresses_v6: candidates_of(&addresses_v6, link.index),
        })
        .collect();
    let mut ways = Ways { can_reach: can_reach(kernel, config).await?, ..Ways::default() };
    if families.v4 {
        ways.default_route = default_route(&kernel.routes().await?);
    }
    if families.v6 {
        ways.default_route_v6 = default_route(&kernel.routes_of::<V6>().await?);
    }
    Ok(uplink::choose(&config.uplink, &candidates, families, &ways)?)
}

/// Interface and source address of the route to `--iface-can-reach`.
async fn can_reach(kernel: &Kernel, config: &Config) -> Result<Option<(u32, IpAddr)>> {
    let Some(address) = config.uplink.can_reach else { return Ok(None) };
    let route = match address {
        IpAddr::V4(address) => {
            kernel.route_to::<V4>(address).await.map(|route| (route.ifindex, route.source.into()))
        }
        IpAddr::V6(address) => {
            kernel.route_to::<V6>(address).await.map(|route| (route.ifindex, route.source.into()))
        }
    };
    route.map(Some).with_context(|| format!("--iface-can-reach={address}"))
}

fn candidates_of<F: Family>(addresses: &[Address<F>], ifindex: u32) -> Vec<CandidateAddress<F>> {
    let of_link = addresses.iter().filter(|address| address.ifindex == ifindex);
    of_link
        .map(|address| CandidateAddress {
            address: address.address,
            link_local: address.scope == AddressScope::Link,
            permanent: address.permanent,
            temporary: address.secondary,
            deprecated: address.deprecated,
        })
        .collect()
}

/// Interface of the default route that the kernel would take: the one with the lowest metric of the main table.
fn default_route<F: Family>(routes: &[Route<F>]) -> Option<u32> {
    routes
        .iter()
        .filter(|route| F::prefix_len(route.dst) == 0 && route.table == TABLE_MAIN)
        .min_by_key(|route| route.metric)?
        .ifindex
}

/// Prefixes of this host, without those of overlay devices, whichever network config these were made for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Prefixes<F: Family = V4> {
    /// Addresses and routes that no subnet may overlap.
    pub(crate) others: Vec<F::Net>,
    /// Those of bridges, and of single pods (as the CNI plugin `ptp` wires them): the own subnet's bridge and pods are
    /// among them.
    pub(crate) bridges: Vec<F::Net>,
    /// Addresses on whatever interface.
    pub(crate) addresses: Vec<F::Addr>,
}

impl<F: Family> Default for Prefixes<F> {
    fn default() -> Self {
        Self { others: Vec::new(), bridges: Vec::new(), addresses: Vec::new() }
    }
}

impl<F: Family> Prefixes<F> {
    /// Whether exactly this prefix is an address's or a route's.
    pub(crate) fn has(&self, prefix: F::Net) -> bool {
        self.others.contains(&prefix) || self.bridges.contains(&prefix)
    }

    /// An address of this host that lies in a subnet.
    pub(crate) fn address_in(&self, subnet: F::Net) -> Option<F::Addr> {
        self.addresses.iter().find(|address| F::contains(subnet, **address)).copied()
    }
}

/// Reads the prefixes of this host, which has these links.
pub(crate) async fn prefixes<F: Family>(kernel: &Kernel, links: &[Link]) -> Result<Prefixes<F>> {
    let link = |index: u32| links.iter().find(|link| link.index == index);
    let is_overlay = |index: u32| link(index).is_some_and(is_overlay_device);
    let is_of_pods = |index: u32, prefix: F::Net| match link(index).map(|link| &link.kind) {
        Some(LinkKind::Bridge) => true,
        Some(LinkKind::Veth) => F::prefix_len(prefix) == F::BITS,
        _ => false,
    };
    let addresses = kernel.addresses_of::<F>().await?;
    let of_addresses =
        addresses.iter().filter_map(|a| Some((a.ifindex, F::trunc(F::net(a.address, a.prefix_len)?))));
    let routes = kernel.routes_of::<F>().await?;
    let of_routes = routes
        .iter()
        .filter(|route| ![ROUTE_PROTOCOL, POD_ROUTE_PROTOCOL].contains(&route.protocol) && !is_special(route))
        .map(|route| (route.ifindex.unwrap_or(0), route.dst));
    let own = addresses.iter().filter(|a| !is_overlay(a.ifindex)).map(|a| a.address).collect();
    let mut prefixes = Prefixes::<F> { addresses: own, ..Prefixes::default() };
    for (index, prefix) in of_addresses.chain(of_routes).filter(|(index, _)| !is_overlay(*index)) {
        let list = if is_of_pods(index, prefix) { &mut prefixes.bridges } else { &mut prefixes.others };
        if !list.contains(&prefix) {
            list.push(prefix);
        }
    }
    prefixes.others.sort_unstable();
    prefixes.bridges.sort_unstable();
    Ok(prefixes)
}

/// Whether a link is a device of an overlay, by its kind and a name as flannel gives them. The one of an earlier network
/// config (another VNI, another backend) has addresses and routes of the own subnet until it is removed.
fn is_overlay_device(link: &Link) -> bool {
    let vni = |prefix| link.name.strip_prefix(prefix).is_some_and(|vni: &str| vni.parse::<u32>().is_ok());
    match link.kind {
        LinkKind::Vxlan(_) => vni("flannel.") || vni("flannel-v6."),
        _ => is_wireguard(link) && [wireguard::DEVICE, wireguard::DEVICE_V6].contains(&link.name.as_str()),
    }
}

/// Local, broadcast and multicast entries repeat what the addresses say.
fn is_special<F: Family>(route: &Route<F>) -> bool {
    const LOCAL_TABLE: u32 = 255;
    let base: IpAddr = F::base(route.dst).into();
    route.table == LOCAL_TABLE || base.is_multicast()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::VxlanAttrs;

    #[test]
    fn overlay_devices_are_told_by_kind_and_name() {
        let link = |name: &str, kind: LinkKind| Link { name: name.to_owned(), kind, ..Link::default() };
        let vxlan = || LinkKind::Vxlan(VxlanAttrs::default());
        let wireguard = || LinkKind::Other("wireguard".to_owned());
        for link in [
            link("flannel.1", vxlan()),
            link("flannel-v6.16777215", vxlan()),
            link("flannel-wg", wireguard()),
            link("flannel-wg-v6", wireguard()),
        ] {
            assert!(is_overlay_device(&link), "{link:?}");
        }
        for link in [
            link("flannel.one", vxlan()),
            link("vxlan.calico", vxlan()),
            link("flannel.1", LinkKind::Bridge),
            link("flannel.1", wireguard()),
            link("wg0", wireguard()),
            link("flannel-wg", LinkKind::Physical),
        ] {
            assert!(!is_overlay_device(&link), "{link:?}");
        }
    }
}
