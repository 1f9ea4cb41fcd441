//! A routed pod in the kernel: a veth, a route and a neighbour at each end, and no bridge.
//!
//! The pod has its address as a /32 (of IPv6 a /128) and sends everything to [`GATEWAY`] ([`GATEWAY_V6`]), which a
//! permanent neighbour entry says to be the host's end. The host has a route to the address by the veth and a permanent
//! neighbour for it. So nobody asks anything by ARP or neighbour discovery, and a pod sees no frame that is not its own.

use std::{net::Ipv6Addr, time::Duration};

use ipnet::{Ipv4Net, Ipv6Net};
use loden_ebpf::abi::Endpoint;
use tokio::time::{Instant, sleep};

use super::{
    addresses::Addresses,
    error::{CniError, Result, code},
    lease::Lease,
    record::Record,
    result::{Attached, GATEWAY, GATEWAY_V6},
    sandbox::Sandbox,
};
use crate::{
    dataplane::{DataplaneError, Mapped, PinnedDataplane, forget_pod},
    family::{Family, V4, V6},
    kernel::{
        Kernel, KernelError, Link, LinkKind, VethSpec, default_route, pod_route,
        sysctl::{self, SysctlError},
    },
};

/// The smallest MTU of IPv6 (RFC 8200, 5), in bytes: the kernel gives an interface with less no address.
const SMALLEST_V6: u32 = 1280;
/// How long a veth may take until it carries packets; usually none.
const RUNNING: Duration = Duration::from_secs(5);

/// Makes the veth and everything on it. What fails leaves it half made: the caller takes it off.
///
/// # Errors
///
/// Code 103 where the interface's name or the address is taken, 100 for what else the kernel refuses.
pub async fn wire(kernel: &Kernel, sandbox: &Sandbox, attached: &Attached, record: &Record) -> Result<u32> {
    let Attached { host, host_mac, mac, addresses, mtu } = attached;
    let interface = &record.attachment.interface;
    let alias = record.alias().ok_or_else(|| {
        let lengths = format!("{} and {}", record.network.len(), record.attachment.container.len());
        CniError::new(
            code::BAD_ENVIRONMENT,
            format_args!(
                "\"name\" and CNI_CONTAINERID have {lengths} characters, which is too long together: with addresses of \
                 both families they must have at most {} in all",
                Record::LONGEST_NAMES
            ),
        )
    })?;
    let has_v6 = addresses.get::<V6>().is_some();
    if has_v6 && *mtu < SMALLEST_V6 {
        let error = format!(
            "\"mtu\": {mtu} must be at least {SMALLEST_V6}, without which IPv6 does not work (RFC 8200)"
        );
        return Err(CniError::new(code::BAD_CONFIG, error));
    }
    let spec = VethSpec {
        name: host.clone(),
        mac: *host_mac,
        peer_name: interface.clone(),
        peer_mac: *mac,
        mtu: *mtu,
    };
    kernel.create_veth(&spec, std::os::fd::AsFd::as_fd(sandbox)).await.map_err(|error| {
        if error.is_taken() {
            let path = sandbox.path().display();
            return CniError::new(code::TAKEN, format_args!("CNI_IFNAME={interface} is in {path} already"));
        }
        error.into()
    })?;
    let index = index_of(kernel, host).await?;
    // First of all, so that whoever finds the veth knows whose it is.
    kernel.set_alias(index, &alias).await?;
    harden(host)?;
    if has_v6 {
        enable_ipv6(host)?;
    }
    kernel.set_up(index).await?;
    let (pod, interface) = (attached.clone(), interface.clone());
    sandbox.inside(async move |kernel| configure_pod(kernel, &interface, &pod).await)?;
    until_running(kernel, index, host).await?;
    lead_to_pod::<V4>(kernel, index, attached).await?;
    lead_to_pod::<V6>(kernel, index, attached).await?;
    Ok(index)
}

/// Neighbour and route to one of the pod's addresses.
async fn lead_to_pod<F: Family>(kernel: &Kernel, index: u32, attached: &Attached) -> Result<()> {
    let Some(address) = attached.addresses.get::<F>() else { return Ok(()) };
    kernel.set_neighbour::<F>(index, address, attached.mac).await?;
    kernel.create_route::<F>(&pod_route(address, index)).await.map_err(|error| {
        if error.is_taken() {
            let error = format!("the address {address} is routed to another interface of this host already");
            return CniError::new(code::TAKEN, error).details(
                "networks that share a subnet must share their name, \
                by which host-local keeps its addresses apart",
            );
        }
        error.into()
    })
}

async fn index_of(kernel: &Kernel, name: &str) -> Result<u32, KernelError> {
    let link = kernel.link_by_name(name).await?;
    link.map(|link| link.index).ok_or_else(|| KernelError::NoLink(name.to_owned()))
}

/// A pod speaks only for itself also where the programs do not look, and is no router of the host's.
fn harden(host: &str) -> Result<()> {
    for (name, value) in [("ipv4/conf/IF/rp_filter", "1"), ("ipv6/conf/IF/accept_ra", "0")] {
        match sysctl::set(&format!("net/{}", name.replace("IF", host)), value) {
            // A kernel without IPv6.
            Err(SysctlError::Absent { .. }) if name.starts_with("ipv6") => {}
            done => done.map_err(KernelError::from)?,
        }
    }
    Ok(())
}

/// Runtimes and hosts that do without IPv6 turn it off for interfaces that are still to come.
fn enable_ipv6(interface: &str) -> Result<()> {
    let name = format!("net/ipv6/conf/{interface}/disable_ipv6");
    Ok(sysctl::set(&name, "0").map_err(KernelError::from)?)
}

async fn configure_pod(kernel: &Kernel, interface: &str, pod: &Attached) -> Result<()> {
    let index = index_of(kernel, interface).await?;
    if pod.addresses.get::<V6>().is_some() {
        enable_ipv6(interface)?;
        // Nobody on this link may tell it another way out.
        sysctl::set(&format!("net/ipv6/conf/{interface}/accept_ra"), "0").map_err(KernelError::from)?;
    }
    add_address::<V4>(kernel, index, pod).await?;
    add_address::<V6>(kernel, index, pod).await?;
    kernel.set_up(index).await?;
    lead_out::<V4>(kernel, index, pod, GATEWAY).await?;
    lead_out::<V6>(kernel, index, pod, GATEWAY_V6).await?;
    until_running(kernel, index, interface).await
}

async fn add_address<F: Family>(kernel: &Kernel, index: u32, pod: &Attached) -> Result<()> {
    match pod.addresses.get::<F>() {
        Some(address) => Ok(kernel.add_address::<F>(index, address, F::BITS).await?),
        None => Ok(()),
    }
}

/// The way out for a family of which the pod has an address.
async fn lead_out<F: Family>(kernel: &Kernel, index: u32, pod: &Attached, gateway: F::Addr) -> Result<()> {
    if pod.addresses.get::<F>().is_none() {
        return Ok(());
    }
    kernel.set_neighbour::<F>(index, gateway, pod.host_mac).await?;
    Ok(kernel.create_route::<F>(&default_route(gateway, index)).await?)
}

/// The kernel lets packets leave one end a moment after the other came up (its linkwatch); until then it drops them.
async fn until_running(kernel: &Kernel, index: u32, name: &str) -> Result<()> {
    let end = Instant::now() + RUNNING;
    while !kernel.link_by_index(index).await?.is_some_and(|link| link.running) {
        if Instant::now() >= end {
            let error = format!("{name} does not run {} s after it was set up", RUNNING.as_secs());
            return Err(CniError::new(code::KERNEL, error));
        }
        sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

/// Pods on a bridge believe the whole subnet to be on their link: the bridge answers for those that are not.
///
/// # Errors
///
/// As the kernel says.
pub async fn answer_on_bridges(kernel: &Kernel, lease: &Lease, pod: Addresses) -> Result<(), KernelError> {
    let links = kernel.links().await?;
    let mut bridges = links.iter().filter(|link| link.kind == LinkKind::Bridge).peekable();
    if bridges.peek().is_none() {
        return Ok(());
    }
    let v4 = kernel.addresses().await?;
    let v6 = kernel.addresses_of::<V6>().await?;
    for bridge in bridges {
        let carries =
            |subnet: &Ipv4Net| v4.iter().any(|a| a.ifindex == bridge.index && subnet.contains(&a.address));
        if pod.get::<V4>().is_some() && lease.subnet.as_ref().is_some_and(carries) {
            sysctl::set(&format!("net/ipv4/conf/{}/proxy_arp", bridge.name), "1")?;
        }
        let carries =
            |subnet: &Ipv6Net| v6.iter().any(|a| a.ifindex == bridge.index && subnet.contains(&a.address));
        if let Some(address) = pod.get::<V6>().filter(|_| lease.subnet6.as_ref().is_some_and(carries)) {
            sysctl::set(&format!("net/ipv6/conf/{}/proxy_ndp", bridge.name), "1")?;
            kernel.answer_for(bridge.index, address).await?;
        }
    }
    Ok(())
}

/// No bridge answers any longer for an address that somebody on it may have next.
async fn stop_answering_on_bridges(kernel: &Kernel, address: Ipv6Addr) -> Result<(), KernelError> {
    let links = kernel.links().await?;
    for bridge in links.iter().filter(|link| link.kind == LinkKind::Bridge) {
        kernel.stop_answering_for(bridge.index, address).await?;
    }
    Ok(())
}

/// What the programs know of one of such a pod's addresses.
#[must_use]
pub fn endpoint<F: Mapped>(attached: &Attached, address: F::Addr, ifindex: u32) -> Endpoint<F::Octets> {
    Endpoint {
        address: F::octets(address),
        ifindex,
        mac: attached.mac,
        gateway_mac: attached.host_mac,
        ..Endpoint::default()
    }
}

/// Takes a pod off: first off the fast path, then off the network; route and neighbours go with the veth. The
/// fast path's troubles are told and do not keep the pod: the agent puts right what is left of it.
///
/// # Errors
///
/// As the kernel says.
pub async fn take_off(
    kernel: &Kernel,
    bpffs_dir: &std::path::Path,
    link: &Link,
    record: Option<&Record>,
) -> Result<()> {
    let off = |error: DataplaneError| eprintln!("loden-cni: {error}");
    if let Some(record) = record {
        forget_endpoints(bpffs_dir, record.addresses, link.index).unwrap_or_else(off);
    }
    kernel.delete_link(link.index).await?;
    if let Some(address) = record.and_then(|record| record.addresses.get::<V6>()) {
        stop_answering_on_bridges(kernel, address).await?;
    }
    forget_pod(bpffs_dir, link.index).unwrap_or_else(off);
    Ok(())
}

/// Takes a pod's endpoints off the fast path.
///
/// # Errors
///
/// As the kernel says.
pub fn forget_endpoints(
    bpffs_dir: &std::path::Path,
    pod: Addresses,
    ifindex: u32,
) -> Result<(), DataplaneError> {
    let Some(mut dataplane) = PinnedDataplane::open(bpffs_dir)? else { return Ok(()) };
    if let Some(address) = pod.get::<V4>() {
        dataplane.remove_endpoint::<V4>(address, ifindex)?;
    }
    if let Some(address) = pod.get::<V6>() {
        dataplane.remove_endpoint::<V6>(address, ifindex)?;
    }
    Ok(())
}
