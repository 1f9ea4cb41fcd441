//! `loden agent` from its start to its end: takes everything in the order in which it is needed, then hands over
//! to [`crate::reconcile`].
//!
//! Ending leaves device, routes, rules, links and maps in place: no packet notices.

mod source;

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, SocketAddr},
    path::Path,
};

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
    family::{Family, V4, V6},
    health::{self, Readiness},
    host::{self, Prefixes},
    kernel::{Kernel, Link, VxlanSpec, overhead},
    lease::{LeaseAttrs, VtepData},
    metrics,
    network::{Backend, NetworkConfig, Vxlan},
    reconcile::{Half, Node, Overlay, Reconciler, Wireguard},
    registry::{Claim, ClaimV6},
    service::{Heartbeat, ServiceManager},
    state::State,
    subnet_file, telemetry,
    uplink::Uplink,
    web,
};

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
    tokio::spawn(telemetry::tell_of_omissions());
    let stop = stop_on_signals()?;
    let _lock = lock(&config.run_dir)?;
    let (control, asker) = control::listen(&config.run_dir)?;
    let (readiness, heartbeat) = (Readiness::new(&CONDITIONS), Heartbeat::default());
    for (address, flags, routes) in pages(&config, &readiness, &heartbeat, &asker) {
        serve(address, flags, routes, stop.clone()).await?;
    }
    let manager = ServiceManager::find(&|name| std::env::var(name).ok(), std::process::id());
    tokio::spawn(report(manager, readiness.clone(), heartbeat.clone(), stop.clone()));
    // The start may be left at any point: the next one finds what it made.
    let reconciler = tokio::select! {
        reconciler = start(config, control, readiness, heartbeat) => reconciler?,
        () = stop.cancelled() => return Ok(()),
    };
    // The loop itself watches for the end, between two passes and never within one.
    let ended = reconciler.run(stop).await;
    telemetry::say_omissions();
    ended
}

async fn start(
    mut config: Config,
    control: control::Requests,
    readiness: Readiness,
    heartbeat: Heartbeat,
) -> Result<Reconciler> {
    let kernel = Kernel::connect()?;
    let (source, network) = Source::open(&mut config).await?;
    let uplink = host::choose_uplink(&kernel, &config, network.families()).await?;
    tracing::info!(
        interface = uplink.name,
        address = uplink.own(),
        public_ip = uplink.public(),
        "uplink chosen"
    );
    let mut state = State::read(&config.run_dir)?;
    let macs = &state.vtep_macs;
    let overlay = open_overlay::<V4>(&kernel, &network, &uplink, source.vtep_mac(), macs).await?;
    let overlay_v6 = open_overlay::<V6>(&kernel, &network, &uplink, source.vtep_mac_v6(), macs).await?;
    if config.notrack_underlay && overlay.is_none() && overlay_v6.is_none() {
        tracing::warn!("--notrack-underlay is without effect: the network's backend is not vxlan");
    }

    let wireguard = match &network.backend {
        Backend::Wireguard(settings) => {
            let key_file = &config.wireguard_key_file;
            Some(Wireguard::open(&kernel, settings, &uplink, key_file, network.families()).await?)
        }
        Backend::Vxlan(_) | Backend::HostGw | Backend::Alloc => None,
    };
    let tunnel = wireguard.as_ref().and_then(Wireguard::device::<V4>);
    let tunnel_v6 = wireguard.as_ref().and_then(Wireguard::device::<V6>);

    // Before the lease, which may be long in coming: whoever ends this agent until then finds what it has made.
    note_devices(&mut state, overlay.as_ref(), overlay_v6.as_ref(), wireguard.as_ref());
    state.write(&config.run_dir)?;

    let links = kernel.links().await?;
    let prefixes_v4 = prefixes::<V4>(&kernel, &links, network.v4.is_some()).await?;
    let prefixes_v6 = prefixes::<V6>(&kernel, &links, network.v6.is_some()).await?;
    let attrs = attrs(&network.backend, &uplink, overlay.as_ref(), overlay_v6.as_ref());
    let claim = Claim {
        attrs: match &wireguard {
            Some(wireguard) => wireguard.complete(attrs),
            None => attrs,
        },
        previous: previous(subnet_file::previous_subnet(&config.subnet_file)),
        occupied: prefixes_v4.others,
        bridges: prefixes_v4.bridges,
        v6: ClaimV6 {
            previous: previous(subnet_file::previous_ipv6_subnet(&config.subnet_file)),
            occupied: prefixes_v6.others,
            bridges: prefixes_v6.bridges,
        },
        ttl: config.lease_ttl,
        renew_margin: config.renew_margin,
    };
    let (lease, keeper) = source.take(&network, claim, &readiness).await?;
    let half_v4 = network.v4.zip(lease.key.subnet);
    let half_v6 = network.v6.zip(lease.key.subnet_v6);
    let node = Node {
        v4: half_v4.map(|(pool, subnet)| Half { pool, subnet, overlay, tunnel }),
        v6: half_v6.map(|(pool, subnet)| Half { pool, subnet, overlay: overlay_v6, tunnel: tunnel_v6 }),
        wireguard,
        config,
        network,
        uplink,
    };
    Reconciler::new(node, kernel, keeper, control, readiness, heartbeat, state)
}

fn note_devices(
    state: &mut State,
    overlay: Option<&Overlay>,
    overlay_v6: Option<&Overlay>,
    wireguard: Option<&Wireguard>,
) {
    let mut note = |overlay: &Overlay| {
        let name = overlay.spec.name.clone();
        state.vtep_macs.insert(name.clone(), overlay.device.mac);
        name
    };
    let (device, device_v6) = match wireguard {
        Some(wireguard) => wireguard.device_names(),
        None => (overlay.map(&mut note), overlay_v6.map(&mut note)),
    };
    state.note_devices(device, device_v6);
}

/// A subnet that the file gives; without one the start goes on.
fn previous<N>(found: Result<Option<N>, subnet_file::SubnetFileError>) -> Option<N> {
    found.unwrap_or_else(|error| {
        tracing::warn!("{error}; going on without it");
        None
    })
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

/// Tells the service manager what it wants to know: that the agent is ready, what is missing, and whether its loop is
/// alive.
async fn report(
    manager: ServiceManager,
    readiness: Readiness,
    heartbeat: Heartbeat,
    stop: CancellationToken,
) {
    let ready = async {
        readiness.wait().await;
        manager.ready();
    };
    let missing = async {
        let mut changes = readiness.changes();
        while changes.changed().await.is_ok() {
            manager.status(&status_line(&readiness.missing()));
        }
    };
    tokio::join!(
        stop.run_until_cancelled(ready),
        stop.run_until_cancelled(missing),
        manager.feed_watchdog(|| heartbeat.is_alive(), stop.clone()),
    );
    stop.cancelled().await;
    manager.stopping();
}

/// What `systemctl status` shows.
fn status_line(missing: &[(&'static str, String)]) -> String {
    if missing.is_empty() {
        return "ready".to_owned();
    }
    let each: Vec<String> = missing.iter().map(|(name, reason)| format!("{name}: {reason}")).collect();
    format!("not ready: {}", each.join("; "))
}

/// What is served where. Metrics come with the health endpoints, and may share their address.
fn pages(
    config: &Config,
    readiness: &Readiness,
    heartbeat: &Heartbeat,
    asker: &Asker,
) -> Vec<(SocketAddr, &'static str, Router)> {
    let mut pages = Vec::new();
    let health = || health::routes(readiness.clone(), heartbeat.clone());
    let metrics = || metrics::routes(asker.clone(), config.metrics_max_each);
    if let Some(address) = config.metrics_addr {
        pages.push((address, "--metrics-addr", health().merge(metrics())));
    }
    if let Some(address) = config.healthz.filter(|address| config.metrics_addr != Some(*address)) {
        pages.push((address, "--healthz-ip, --healthz-port", health()));
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

/// What the VXLAN device of a family on this uplink should be.
///
/// # Errors
///
/// Where the underlay's MTU leaves pods too little.
pub(crate) fn vxlan_spec<F: Family>(vxlan: &Vxlan, uplink: &Uplink) -> Result<VxlanSpec> {
    let local = uplink.public_of::<F>().with_context(|| format!("the uplink has no {} address", F::NAME))?;
    let local: IpAddr = local.into();
    let outer = vxlan.mtu.map_or(uplink.mtu, u32::from);
    let mtu = outer.saturating_sub(overhead(local));
    // RFC 791: every host forwards 68 bytes, and the kernel refuses less. RFC 8200, section 5: no link may carry less.
    let (name, least) = match local {
        IpAddr::V4(_) => (format!("flannel.{}", vxlan.vni), 68),
        IpAddr::V6(_) => (format!("flannel-v6.{}", vxlan.vni), 1280),
    };
    if mtu < least {
        bail!(
            "an MTU of {outer} on the underlay leaves {mtu} bytes for {} pods; at least {least} are needed",
            F::NAME
        );
    }
    Ok(VxlanSpec {
        name,
        vni: vxlan.vni,
        port: vxlan.port,
        local,
        uplink: uplink.ifindex,
        mtu,
        gbp: vxlan.gbp,
        learning: vxlan.learning,
        mac: None,
        noted: None,
    })
}

/// The VXLAN device of a family that the network has, where the backend has one; with the MAC address that peers know
/// of it already, if they do. One that has to be made gets the one that an earlier agent has noted, since the peers' own
/// agents may be away; whoever made one that fits (flannel, say) has told the peers of its own.
async fn open_overlay<F: Family>(
    kernel: &Kernel,
    network: &NetworkConfig,
    uplink: &Uplink,
    mac: Option<[u8; 6]>,
    noted: &BTreeMap<String, [u8; 6]>,
) -> Result<Option<Overlay>> {
    let (Some(own), Some(public)) = (uplink.own_of::<F>(), uplink.public_of::<F>()) else { return Ok(None) };
    match &network.backend {
        Backend::Vxlan(vxlan) => {
            let spec = vxlan_spec::<F>(vxlan, uplink)?;
            let noted = noted.get(&spec.name).copied();
            let device = kernel.ensure_vxlan(&VxlanSpec { mac, noted, ..spec.clone() }).await?;
            tracing::info!(
                device = spec.name,
                adopted = device.adopted,
                mtu = device.mtu,
                "VXLAN device ready"
            );
            Ok(Some(Overlay { vxlan: vxlan.clone(), spec, device }))
        }
        Backend::HostGw if public != own => bail!(
            "Backend.Type=host-gw routes to the public IP itself: --public-ip{}={public} must be an address of {}, which has {own}",
            if F::BITS == V6::BITS { "v6" } else { "" },
            uplink.name,
        ),
        Backend::HostGw | Backend::Alloc | Backend::Wireguard(_) => Ok(None),
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
    let mut attrs = LeaseAttrs::of_type(backend.lease_type());
    if let Some(public_ip) = uplink.public_ip {
        attrs = attrs.with_v4(public_ip, overlay.map(vtep));
    }
    if let Some(public_ipv6) = uplink.public_ipv6 {
        attrs = attrs.with_v6(public_ipv6, overlay_v6.map(vtep));
    }
    attrs
}

/// This host's own prefixes of a family, where the network has it.
async fn prefixes<F: Family>(kernel: &Kernel, links: &[Link], wanted: bool) -> Result<Prefixes<F>> {
    if wanted { host::prefixes(kernel, links).await } else { Ok(Prefixes::default()) }
}

#[cfg(test)]
mod tests;
