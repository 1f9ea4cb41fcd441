//! CHECK: what is missing or changed of a routed pod, each by its name.

use std::path::Path;

use ipnet::IpNet;

use super::{
    error::Result,
    record::Record,
    request::Attachment,
    result::{Attached, GATEWAY, GATEWAY_V6},
    sandbox::Sandbox,
    wiring,
};
use crate::{
    dataplane::{Mapped, OF_A_POD, PinnedDataplane},
    family::{Family, V4, V6},
    kernel::{Kernel, Link, Neighbour, NeighbourState, Route, default_route, mac_text, pod_route},
};

/// Compares everything with what ADD made.
///
/// # Errors
///
/// Where the kernel or the namespace cannot be read.
pub async fn damages(
    kernel: &Kernel,
    bpffs_dir: &Path,
    sandbox: &Sandbox,
    attached: &Attached,
    attachment: &Attachment,
    is_limited: bool,
) -> Result<Vec<String>> {
    let Attached { host, addresses, mac, host_mac, .. } = attached;
    let Some(link) = kernel.link_by_name(host).await? else {
        return Ok(vec![format!("the veth {host} on the host is gone")]);
    };
    let mut damages = of_link(&link, host, *host_mac);
    let record = link.alias.as_deref().and_then(Record::parse);
    if record.is_none_or(|it| (it.addresses, it.mac, &it.attachment) != (*addresses, *mac, attachment)) {
        damages.push(format!("the alias of {host} does not tell of this container any more"));
    }
    damages.extend(on_host::<V4>(kernel, attached, link.index).await?);
    damages.extend(on_host::<V6>(kernel, attached, link.index).await?);
    let (wanted, interface) = (attached.clone(), attachment.interface.clone());
    damages.extend(sandbox.inside(async move |kernel| in_pod(kernel, &wanted, &interface).await)?);
    let is_shaped = is_limited || kernel.queueing_links().await?.contains(&link.index);
    damages.extend(of_fast_path(bpffs_dir, attached, link.index, is_shaped)?);
    Ok(damages)
}

/// What is missing on the host of one of the pod's addresses.
async fn on_host<F: Family>(kernel: &Kernel, attached: &Attached, index: u32) -> Result<Vec<String>> {
    let Some(address) = attached.addresses.get::<F>() else { return Ok(Vec::new()) };
    let host = &attached.host;
    let routes = of_routes(&kernel.routes_of::<F>().await?, &pod_route(address, index), host);
    let neighbours = of_neighbours(&kernel.neighbours_of::<F>(index).await?, address, attached.mac, host);
    Ok(routes.into_iter().chain(neighbours).collect())
}

async fn in_pod(kernel: &Kernel, attached: &Attached, interface: &str) -> Result<Vec<String>> {
    let Some(link) = kernel.link_by_name(interface).await? else {
        return Ok(vec![format!("the interface {interface} is gone from the container")]);
    };
    let mut damages = of_link(&link, interface, attached.mac);
    damages.extend(of_family::<V4>(kernel, attached, &link, GATEWAY).await?);
    damages.extend(of_family::<V6>(kernel, attached, &link, GATEWAY_V6).await?);
    Ok(damages)
}

/// What is missing in the pod of one of its addresses.
async fn of_family<F: Family>(
    kernel: &Kernel,
    attached: &Attached,
    link: &Link,
    gateway: F::Addr,
) -> Result<Vec<String>> {
    let Some(address) = attached.addresses.get::<F>() else { return Ok(Vec::new()) };
    let (interface, length) = (&link.name, F::BITS);
    let mut addresses = kernel.addresses_of::<F>().await?.into_iter();
    let has = addresses.any(|it| (it.ifindex, it.address, it.prefix_len) == (link.index, address, length));
    let gone = (!has).then(|| format!("the address {address}/{length} is gone from {interface}"));
    let route = of_routes(&kernel.routes_of::<F>().await?, &default_route(gateway, link.index), interface);
    let neighbours = kernel.neighbours_of::<F>(link.index).await?;
    let neighbour = of_neighbours(&neighbours, gateway, attached.host_mac, interface);
    Ok(gone.into_iter().chain(route).chain(neighbour).collect())
}

fn of_link(link: &Link, name: &str, mac: [u8; 6]) -> Vec<String> {
    let mut damages = Vec::new();
    if !link.up {
        damages.push(format!("{name} is down"));
    }
    if link.mac != Some(mac) {
        let found = link.mac.map_or_else(|| "none".to_owned(), mac_text);
        damages.push(format!("the MAC of {name} is {found}, not {}", mac_text(mac)));
    }
    damages
}

fn of_routes<F: Family>(routes: &[Route<F>], wanted: &Route<F>, by: &str) -> Option<String> {
    let has = routes.iter().any(|it| {
        (it.dst, it.gateway, it.ifindex, it.kind) == (wanted.dst, wanted.gateway, wanted.ifindex, wanted.kind)
    });
    (!has).then(|| format!("the route to {} by {by} is gone", wanted.dst))
}

fn of_neighbours<F: Family>(
    found: &[Neighbour<F>],
    address: F::Addr,
    mac: [u8; 6],
    on: &str,
) -> Option<String> {
    let right = |it: &&Neighbour<F>| it.address == address && it.state == NeighbourState::Permanent;
    match found.iter().find(right).and_then(|it| it.mac) {
        Some(there) if there == mac => None,
        Some(there) => {
            Some(format!("the neighbour {address} on {on} is {}, not {}", mac_text(there), mac_text(mac)))
        }
        None => Some(format!("the permanent neighbour {address} on {on} is gone")),
    }
}

/// Nothing is wanted where no agent has left programs for the pod's subnet.
fn of_fast_path(bpffs_dir: &Path, attached: &Attached, ifindex: u32, is_shaped: bool) -> Result<Vec<String>> {
    let opened = PinnedDataplane::open(bpffs_dir)?;
    let is_of = |subnet: IpNet| attached.addresses.iter().any(|address| subnet.contains(&address));
    let Some(dataplane) = opened.filter(|it| is_of(it.subnet())) else { return Ok(Vec::new()) };
    let host = &attached.host;
    let missing = OF_A_POD.iter().filter(|program| !dataplane.is_attached(**program, ifindex));
    let mut damages: Vec<String> =
        missing.map(|program| format!("the program {} is gone from {host}", program.name())).collect();
    damages.extend(of_endpoint::<V4>(&dataplane, attached, ifindex, is_shaped)?);
    damages.extend(of_endpoint::<V6>(&dataplane, attached, ifindex, is_shaped)?);
    Ok(damages)
}

/// What is wrong with the endpoint of one of the pod's addresses.
fn of_endpoint<F: Mapped>(
    dataplane: &PinnedDataplane,
    attached: &Attached,
    ifindex: u32,
    is_shaped: bool,
) -> Result<Option<String>> {
    let Some(address) = attached.addresses.get::<F>().filter(|_| dataplane.has::<F>()) else {
        return Ok(None);
    };
    let wanted = wiring::endpoint::<F>(attached, address, ifindex);
    let name = F::endpoints_name();
    Ok(match dataplane.endpoint::<F>(address)? {
        Some(there)
            if (there.ifindex, there.mac, there.gateway_mac)
                == (wanted.ifindex, wanted.mac, wanted.gateway_mac) =>
        {
            None
        }
        None if is_shaped => None,
        Some(_) => Some(format!("the map {name} has another pod at {address}")),
        None => Some(format!("the map {name} has nothing at {address}")),
    })
}
