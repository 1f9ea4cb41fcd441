//! `loden agent` from its start to its end: takes everything in the order in which it is needed, then hands over
//! to [`crate::reconcile`].
//!
//! Ending leaves device, routes, rules, links and maps in place: no packet notices.

mod source;

use std::{fs, net::SocketAddr, path::Path, time::Duration};

use anyhow::{Context as _, Result, bail};
use axum::Router;
use nix::fcntl::{Flock, FlockArg};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;

use self::source::Source;
use crate::{
    config::Config,
    control::{self, Asker},
    family::{V4, V6},
    health::{self, Readiness},
    host,
    kernel::{Kernel, VxlanSpec, overhead},
    lease::{LeaseAttrs, VtepData},
    metrics,
    network::{Backend, NetworkConfig, Vxlan},
    reconcile::{Node, NodeV6, Overlay, Reconciler},
    registry::{Claim, ClaimV6},
    service::{Heartbeat, ServiceManager},
    subnet_file,
    uplink::Uplink,
    web,
};

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
    let (control, asker) = control::listen(&config.run_dir)?;
    let readiness = Readiness::new(&CONDITIONS);
    for (address, flags, routes) in pages(&config, &readiness, &asker) {
        serve(address, flags, routes, stop.clone()).await?;
    }
    let manager = ServiceManager::find(&|name| std::env::var(name).ok(), std::process::id());
    let heartbeat = Heartbeat::default();
    tokio::spawn(report(manager, readiness.clone(), heartbeat.clone(), stop.clone()));
    // The start may be left at any point: the next one finds what it made.
    let reconciler = tokio::select! {
        reconciler = start(config, control, readiness, heartbeat) => reconciler?,
        () = stop.cancelled() => return Ok(()),
    };
    // The loop itself watches for the end, between two passes and never within one.
    reconciler.run(stop).await
}

async fn start(
    mut config: Config,
    control: control::Requests,
    readiness: Readiness,
    heartbeat: Heartbeat,
) -> Result<Reconciler> {
    let kernel = Kernel::connect()?;
    let (source, network) = Source::open(&mut config).await?;
    let uplink = host::choose_uplink(&kernel, &config, network.v6.is_some()).await?;
    tracing::info!(interface = uplink.name, address = %uplink.address, public_ip = %uplink.public_ip, "uplink chosen");
    let overlay = open_overlay(&kernel, &network.backend, &uplink, source.vtep_mac()).await?;
    let overlay_v6 = open_overlay_v6(&kernel, &network, &uplink).await?;

    let prefixes = host::prefixes::<V4>(&kernel, overlay.as_ref()).await?;
    let claim = Claim {
        attrs: attrs(&network.backend, &uplink, overlay.as_ref(), overlay_v6.as_ref()),
        previous: subnet_file::previous_subnet(&config.subnet_file).unwrap_or_else(|error| {
            tracing::warn!("{error}; going on without it");
            None
        }),
        occupied: prefixes.others,
        bridges: prefixes.bridges,
        v6: claim_v6(&kernel, &config, &network, overlay_v6.as_ref()).await?,
        ttl: config.lease_ttl,
        renew_margin: config.renew_margin,
    };
    let (lease, keeper) = source.take(&network, claim, &readiness).await?;
    let subnet = lease.subnet;
    let v6 = network.v6.zip(lease.key.subnet_v6);
    let v6 = v6.map(|(pool, subnet)| NodeV6 { pool, subnet, overlay: overlay_v6 });
    let node = Node { config, network, uplink, overlay, subnet, v6 };
    Reconciler::new(node, kernel, keeper, control, readiness, heartbeat)
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

/// What is served where. Metrics come with the health endpoints, and may share their address.
fn pages(config: &Config, readiness: &Readiness, asker: &Asker) -> Vec<(SocketAddr, &'static str, Router)> {
    let mut pages = Vec::new();
    let metrics = || metrics::routes(asker.clone(), config.metrics_max_each);
    if let Some(address) = config.metrics_addr {
        pages.push((address, "--metrics-addr", health::routes(readiness.clone()).merge(metrics())));
    }
    if let Some(address) = config.healthz.filter(|address| config.metrics_addr != Some(*address)) {
        pages.push((address, "--healthz-ip, --healthz-port", health::routes(readiness.clone())));
    }
    if let Some(address) = config.web_addr {
        pages.push((address, "--web-addr", web::routes(asker.clone())));
    }
    pages
}

/// Binds before anything else happens, so that a taken port is told of at once.
async fn serve(
    address: SocketAddr,
    flags: &'static str,
    routes: Router,
    stop: CancellationToken,
) -> Result<()> {
    let listener =
        TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address} ({flags})"))?;
    tokio::spawn(async move {
        if let Err(error) = health::serve_routes(listener, routes, stop).await {
            tracing::error!("{address} ({flags}) is no longer served: {error:#}");
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
        local: uplink.public_ip.into(),
        uplink: uplink.ifindex,
        mtu,
        gbp: vxlan.gbp,
        learning: vxlan.learning,
        mac: None,
    })
}

/// The same for the IPv6 half.
///
/// # Errors
///
/// Where the underlay's MTU is less than IPv6 itself asks for.
pub(crate) fn vxlan_spec_v6(vxlan: &Vxlan, uplink: &Uplink) -> Result<VxlanSpec> {
    let local = uplink.public_ipv6.context("the uplink has no IPv6 address")?.into();
    let outer = vxlan.mtu.map_or(uplink.mtu, u32::from);
    let mtu = outer.saturating_sub(overhead(local));
    if mtu < 1280 {
        // RFC 8200, section 5: no link may carry less.
        bail!("an MTU of {outer} on the underlay leaves {mtu} bytes for IPv6 pods; at least 1280 are needed");
    }
    Ok(VxlanSpec { name: format!("flannel-v6.{}", vxlan.vni), local, mtu, ..vxlan_spec(vxlan, uplink)? })
}

/// The VXLAN device, where the backend has one; with the MAC address that peers know of it already, if they do.
async fn open_overlay(
    kernel: &Kernel,
    backend: &Backend,
    uplink: &Uplink,
    mac: Option<[u8; 6]>,
) -> Result<Option<Overlay>> {
    match backend {
        Backend::Vxlan(vxlan) => {
            let spec = vxlan_spec(vxlan, uplink)?;
            let device = kernel.ensure_vxlan(&VxlanSpec { mac, ..spec.clone() }).await?;
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
pub(crate) fn attrs(
    backend: &Backend,
    uplink: &Uplink,
    overlay: Option<&Overlay>,
    overlay_v6: Option<&Overlay>,
) -> LeaseAttrs {
    let vtep = |overlay: &Overlay| VtepData { vni: overlay.vxlan.vni, vtep_mac: overlay.device.mac };
    let attrs = match (backend, overlay) {
        (_, Some(overlay)) => LeaseAttrs::vxlan(uplink.public_ip, vtep(overlay)),
        (Backend::Alloc, None) => LeaseAttrs::alloc(uplink.public_ip),
        (_, None) => LeaseAttrs::host_gw(uplink.public_ip),
    };
    match uplink.public_ipv6 {
        Some(public_ipv6) => attrs.with_v6(public_ipv6, overlay_v6.map(vtep)),
        None => attrs,
    }
}

/// The VXLAN device with an IPv6 underlay, in a dual-stack network whose backend has one.
async fn open_overlay_v6(
    kernel: &Kernel,
    network: &NetworkConfig,
    uplink: &Uplink,
) -> Result<Option<Overlay>> {
    let (Backend::Vxlan(vxlan), Some(_)) = (&network.backend, network.v6) else { return Ok(None) };
    let spec = vxlan_spec_v6(vxlan, uplink)?;
    let device = kernel.ensure_vxlan(&spec).await?;
    tracing::info!(device = spec.name, adopted = device.adopted, mtu = device.mtu, "VXLAN device ready");
    Ok(Some(Overlay { vxlan: vxlan.clone(), spec, device }))
}

/// What this node asks for of a dual-stack network besides.
async fn claim_v6(
    kernel: &Kernel,
    config: &Config,
    network: &NetworkConfig,
    overlay: Option<&Overlay>,
) -> Result<ClaimV6> {
    if network.v6.is_none() {
        return Ok(ClaimV6::default());
    }
    let prefixes = host::prefixes::<V6>(kernel, overlay).await?;
    let previous = subnet_file::previous_ipv6_subnet(&config.subnet_file).unwrap_or_else(|error| {
        tracing::warn!("{error}; going on without it");
        None
    });
    Ok(ClaimV6 { previous, occupied: prefixes.others, bridges: prefixes.bridges })
}
