//! `loden agent` from its start to its end: takes everything in the order in which it is needed, then hands over
//! to [`crate::reconcile`].
//!
//! Ending leaves device, routes, rules, links and maps in place: no packet notices.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use ipnet::Ipv4Net;
use nix::fcntl::{Flock, FlockArg};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{Config, EtcdConfig},
    control,
    health::{self, Readiness},
    kernel::{AddressScope, Kernel, Link, LinkKind, ROUTE_PROTOCOL, Route, VxlanSpec},
    lease::{LeaseAttrs, VtepData},
    network::{Backend, NetworkConfig, Vxlan},
    reconcile::{Node, Overlay, Reconciler},
    registry::{Claim, EtcdOptions, Registry},
    service::{Heartbeat, ServiceManager},
    subnet_file,
    uplink::{self, Candidate, CandidateAddress, Uplink},
};

/// How often the network config is asked for while there is none, as flannel does.
const CONFIG_RETRY: Duration = Duration::from_secs(1);
/// The loop comes by at least every 30 s; after this long without it, it hangs.
const STUCK: Duration = Duration::from_secs(120);
/// What must hold before the node is ready.
pub(crate) const CONDITIONS: [&str; 3] = [LEASE, PEERS, DATAPATH];
/// This node holds a lease.
pub(crate) const LEASE: &str = "lease";
/// The other nodes are known.
pub(crate) const PEERS: &str = "peers";
/// The last pass left nothing undone.
pub(crate) const DATAPATH: &str = "datapath";
/// How often the absence is told of: the first time, then every so many tries.
const CONFIG_REMIND: u32 = 30;

/// Runs the agent until SIGTERM or SIGINT.
///
/// # Errors
///
/// Where it cannot start: what is missing, and what would be right.
pub async fn run(config: Config) -> Result<()> {
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let stop = stop_on_signals()?;
    let _lock = lock(&config.run_dir)?;
    let control = control::listen(&config.run_dir)?;
    let readiness = Readiness::new(&CONDITIONS);
    if let Some(address) = config.healthz {
        serve_health(address, readiness.clone(), stop.clone()).await?;
    }
    if config.metrics_addr.is_some() {
        tracing::warn!("--metrics-addr is accepted and without effect: there are no metrics yet");
    }
    let manager = ServiceManager::find(&|name| std::env::var(name).ok(), std::process::id());
    let heartbeat = Heartbeat::default();
    tokio::spawn(report(manager, readiness.clone(), heartbeat.clone(), stop.clone()));
    tokio::select! {
        done = start_and_reconcile(config, control, readiness, heartbeat, stop.clone()) => done,
        // Before the lease is held there is nothing to hand over.
        () = stop.cancelled() => Ok(()),
    }
}

async fn start_and_reconcile(
    config: Config,
    control: control::Requests,
    readiness: Readiness,
    heartbeat: Heartbeat,
    stop: CancellationToken,
) -> Result<()> {
    let kernel = Kernel::connect()?;
    let registry = Registry::connect(etcd_options(&config.etcd)).await?;
    let network = wait_for_network_config(&registry).await;
    let uplink = choose_uplink(&kernel, &config).await?;
    tracing::info!(interface = uplink.name, address = %uplink.address, public_ip = %uplink.public_ip, "uplink chosen");
    let overlay = open_overlay(&kernel, &network.backend, &uplink).await?;

    let prefixes = prefixes(&kernel, overlay.as_ref()).await?;
    let claim = Claim {
        attrs: attrs(&network.backend, &uplink, overlay.as_ref()),
        previous: subnet_file::previous_subnet(&config.subnet_file).unwrap_or_else(|error| {
            tracing::warn!("{error}; going on without it");
            None
        }),
        occupied: prefixes.others,
        bridges: prefixes.bridges,
        ttl: config.lease_ttl,
        renew_margin: config.renew_margin,
    };
    let lease = registry.claim(&network, &claim).await?;
    let subnet = lease.subnet;
    let keeper = registry.keep(network.clone(), claim, lease);
    let node = Node { config, network, uplink, overlay, subnet };
    // From here on the loop itself watches for the end, between two passes and never within one.
    Reconciler::new(node, kernel, keeper, control, readiness, heartbeat)?.run(stop).await
}

fn stop_on_signals() -> Result<CancellationToken> {
    let stop = CancellationToken::new();
    let token = stop.clone();
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::spawn(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        tracing::info!("stopping; the data path stays in place");
        token.cancel();
    });
    Ok(stop)
}

/// Tells the service manager what it wants to know. Until the loop runs there is nothing to be stuck in: every
/// wait of the start has a limit of its own or is for the network config.
async fn report(
    manager: ServiceManager,
    readiness: Readiness,
    heartbeat: Heartbeat,
    stop: CancellationToken,
) {
    let alive = || !readiness.missing().is_empty() || heartbeat.age() < STUCK;
    let ready = async {
        readiness.wait().await;
        manager.ready();
    };
    tokio::join!(stop.run_until_cancelled(ready), manager.feed_watchdog(alive, stop.clone()));
    stop.cancelled().await;
    manager.stopping();
}

/// Binds before anything else happens, so that a taken port is told of at once.
async fn serve_health(address: SocketAddr, readiness: Readiness, stop: CancellationToken) -> Result<()> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot serve /healthz on {address} (--healthz-ip, --healthz-port)"))?;
    tokio::spawn(async move {
        if let Err(error) = health::serve(listener, readiness, stop).await {
            tracing::error!("/healthz and /readyz are no longer served: {error:#}");
        }
    });
    Ok(())
}

/// Makes sure that nobody else works with this run directory.
///
/// # Errors
///
/// Where an agent runs with it.
pub(crate) fn lock(run_dir: &Path) -> Result<Flock<fs::File>> {
    fs::create_dir_all(run_dir).with_context(|| format!("--run-dir={} cannot be made", run_dir.display()))?;
    let path = run_dir.join("agent.lock");
    let file = fs::File::create(&path).with_context(|| format!("{} cannot be written", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        anyhow::anyhow!(
            "another agent runs with --run-dir={} ({errno}); stop it, or give this one a --run-dir, --bpffs-dir and \
             --subnet-file of its own",
            run_dir.display()
        )
    })
}

fn etcd_options(etcd: &EtcdConfig) -> EtcdOptions {
    EtcdOptions {
        endpoints: etcd.endpoints.clone(),
        prefix: etcd.prefix.clone(),
        ca_file: etcd.ca_file.clone(),
        cert_file: etcd.cert_file.clone(),
        key_file: etcd.key_file.clone(),
        username: etcd.username.clone(),
        password: etcd.password.as_ref().map(|password| password.expose().to_owned()),
    }
}

async fn wait_for_network_config(registry: &Registry) -> NetworkConfig {
    let mut tries = 0;
    loop {
        match registry.network_config().await {
            Ok(config) => return config,
            Err(error) if tries % CONFIG_REMIND == 0 => {
                tracing::warn!("no network config yet, trying every second: {error}");
            }
            Err(error) => tracing::debug!("no network config yet: {error}"),
        }
        tries += 1;
        tokio::time::sleep(CONFIG_RETRY).await;
    }
}

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
    const MAIN_TABLE: u32 = 254;
    routes
        .iter()
        .filter(|route| route.dst.prefix_len() == 0 && route.table == MAIN_TABLE)
        .min_by_key(|route| route.metric)?
        .ifindex
}

/// What the VXLAN device on this uplink should be.
///
/// # Errors
///
/// Where the underlay's MTU leaves pods too little.
pub(crate) fn vxlan_spec(vxlan: &Vxlan, uplink: &Uplink) -> Result<VxlanSpec> {
    let outer = vxlan.mtu.map_or(uplink.mtu, u32::from);
    let mtu = outer.saturating_sub(loden_ebpf::vxlan::ENCAP_LEN as u32);
    if mtu < 68 {
        // RFC 791: every host forwards 68 bytes; the kernel refuses less.
        bail!("an MTU of {outer} on the underlay leaves {mtu} bytes for pods; at least 68 are needed");
    }
    Ok(VxlanSpec {
        name: format!("flannel.{}", vxlan.vni),
        vni: vxlan.vni,
        port: vxlan.port,
        local: uplink.public_ip,
        uplink: uplink.ifindex,
        mtu,
        gbp: vxlan.gbp,
        learning: vxlan.learning,
        mac: None,
    })
}

/// The VXLAN device, where the backend has one.
async fn open_overlay(kernel: &Kernel, backend: &Backend, uplink: &Uplink) -> Result<Option<Overlay>> {
    match backend {
        Backend::Vxlan(vxlan) => {
            let spec = vxlan_spec(vxlan, uplink)?;
            let device = kernel.ensure_vxlan(&spec).await?;
            tracing::info!(
                device = spec.name,
                adopted = device.adopted,
                mtu = device.mtu,
                "VXLAN device ready"
            );
            Ok(Some(Overlay { vxlan: vxlan.clone(), spec, device }))
        }
        Backend::HostGw if uplink.public_ip != uplink.address => bail!(
            "Backend.Type=host-gw routes to the public IP itself: --public-ip={} must be an address of {}, which has {}",
            uplink.public_ip,
            uplink.name,
            uplink.address
        ),
        Backend::HostGw | Backend::Alloc => Ok(None),
    }
}

/// The value of this node's lease.
pub(crate) fn attrs(backend: &Backend, uplink: &Uplink, overlay: Option<&Overlay>) -> LeaseAttrs {
    match (backend, overlay) {
        (_, Some(Overlay { vxlan, device, .. })) => {
            LeaseAttrs::vxlan(uplink.public_ip, VtepData { vni: vxlan.vni, vtep_mac: device.mac })
        }
        (Backend::Alloc, None) => LeaseAttrs::alloc(uplink.public_ip),
        (_, None) => LeaseAttrs::host_gw(uplink.public_ip),
    }
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
        .filter(|route| route.protocol != ROUTE_PROTOCOL && !is_special(route))
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
