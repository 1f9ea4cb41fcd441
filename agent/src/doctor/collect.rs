//! Gathers the snapshot. Decides nothing: what cannot be read is noted as such.

mod etcd;

use std::{collections::BTreeMap, path::Path, time::Duration};

use anyhow::Result;

use super::{
    DoctorArgs,
    check::{
        host::{BRIDGE_RULES, BRIDGE_RULES_V6, FORWARD, FORWARD_V6, LIBERAL, rp_filter},
        ipv6,
    },
    probe::{self, Target},
    snapshot::{Half, Programs, Snapshot},
};
use crate::{
    control::{self, Request},
    dataplane::{Hook, Pins, Program, Settings, Trial},
    facts::{self, Facts, Source, Tunnel},
    family::{Family, V4, V6},
    firewall,
    kernel::{Kernel, Link, LinkKind, WireguardSocket, offload, sysctl},
    overlay::OverlayPeer,
};

/// Looks at everything.
///
/// # Errors
///
/// Where nothing is known of an agent here, or the kernel grants no netlink socket.
pub(super) async fn collect(args: &DoctorArgs) -> Result<Snapshot> {
    let (facts, source) = Facts::find(&args.run_dir).await?;
    let not_ready = match source {
        Source::Agent => not_ready(&args.run_dir).await,
        Source::File(_) => BTreeMap::new(),
    };
    let kernel = Kernel::connect()?;
    let links = kernel.links().await?;
    let tunnel = |tunnel: &Tunnel| {
        let device = WireguardSocket::open().and_then(|socket| socket.device(tunnel.index));
        device.map_err(|error| format!("{}: {error}", tunnel.name))
    };
    let wireguard = facts.wireguard.iter().map(tunnel).collect();
    let v4 = half(&kernel, facts.v4.as_ref()).await?;
    let v6 = half(&kernel, facts.v6.as_ref()).await?;
    let probes = if args.no_probes {
        Vec::new()
    } else {
        let mut targets = targets(&facts, v4.as_ref());
        targets.extend(self::targets(&facts, v6.as_ref()));
        let patience = Duration::from_millis(args.timeout_ms.into());
        // This runtime has nothing else to do.
        probe::probe_all(&targets, patience)
    };
    let programs = facts
        .programs
        .as_ref()
        .map(|settings| programs(&facts, (v4.as_ref(), v6.as_ref()), settings, &args.bpffs_dir, &links));
    Ok(Snapshot {
        source,
        not_ready,
        sysctls: sysctls(&facts, &links),
        gro: offload::gro(&facts.uplink.name).map_err(|error| error.to_string()),
        rules: firewall::rules().await.map_err(|error| error.to_string()),
        etcd: etcd::ask(&facts.etcd, args.etcd_password.as_ref()).await,
        programs,
        probes,
        links,
        v4,
        v6,
        wireguard,
        facts,
    })
}

/// What the kernel has of a family that the network has.
async fn half<F: Family>(kernel: &Kernel, facts: Option<&facts::Half<F>>) -> Result<Option<Half<F>>> {
    let Some(facts) = facts else { return Ok(None) };
    let overlay = match &facts.overlay {
        Some(desired) => kernel.overlay_actual(desired.device).await.map_err(|error| error.to_string()),
        None => Err("the peers are not known yet".to_owned()),
    };
    let mut ways = BTreeMap::new();
    for peer in facts.overlay.iter().flat_map(|desired| desired.peers.values()) {
        let way = kernel.route_to::<F>(peer.vtep).await;
        ways.insert(peer.vtep, way.map_err(|error| error.to_string()));
    }
    Ok(Some(Half {
        facts: facts.clone(),
        addresses: kernel.addresses_of().await?,
        routes: kernel.routes_of().await?,
        overlay,
        ways,
    }))
}

async fn not_ready(run_dir: &Path) -> BTreeMap<String, String> {
    match control::ask(run_dir, Request::Status).await {
        Ok(status) => {
            let missing = status["not_ready"].as_object().into_iter().flatten();
            missing
                .map(|(name, reason)| (name.clone(), reason.as_str().unwrap_or_default().to_owned()))
                .collect()
        }
        Err(error) => BTreeMap::from([("status".to_owned(), format!("{error:#}"))]),
    }
}

fn sysctls(facts: &Facts, links: &[Link]) -> BTreeMap<String, Option<String>> {
    let mut names: Vec<String> =
        [FORWARD, FORWARD_V6, LIBERAL, BRIDGE_RULES, BRIDGE_RULES_V6].map(str::to_owned).to_vec();
    names.extend(["all", &facts.uplink.name].map(rp_filter));
    let device = facts.v4.as_ref().and_then(|half| half.device.as_ref());
    names.extend(device.map(|device| rp_filter(&device.name)));
    names.extend(facts.wireguard.iter().map(|tunnel| rp_filter(&tunnel.name)));
    if let Some(half) = &facts.v6 {
        let bridges = links.iter().filter(|link| link.kind == LinkKind::Bridge).map(|link| &link.name);
        let device = half.device.iter().map(|device| &device.name);
        let interfaces = bridges.chain(device).chain([&facts.uplink.name]);
        names.extend(interfaces.flat_map(|it| ipv6::PARAMETERS.map(|name| ipv6::sysctl(it, name))));
    }
    names.into_iter().map(|name| (name.clone(), sysctl::get(&name).ok())).collect()
}

/// The peers, with the sizes that their ways promise.
fn targets<F: Family>(facts: &Facts, half: Option<&Half<F>>) -> Vec<Target> {
    let Some((half, desired)) = half.and_then(|half| Some((half, half.facts.overlay.as_ref()?))) else {
        return Vec::new();
    };
    let target = |peer: &OverlayPeer<F>| {
        let path = half.ways.get(&peer.vtep).and_then(|way| way.as_ref().ok()).and_then(|way| way.mtu);
        let underlay = path.unwrap_or(u32::MAX).min(facts.uplink.mtu);
        let size = |bytes: u32| u16::try_from(bytes).unwrap_or(u16::MAX);
        let tunnel = facts.wireguard.first().map(|tunnel| tunnel.mtu);
        let mtu = half.facts.device.as_ref().map(|device| device.mtu).or(tunnel);
        Target {
            subnet: peer.subnet.into(),
            vtep: peer.vtep.into(),
            underlay_mtu: size(underlay),
            // The base of the subnet is the address of the peer's device.
            overlay: mtu.map(|mtu| (F::base(peer.subnet).into(), size(mtu))),
        }
    };
    desired.peers.values().map(target).collect()
}

fn programs(
    facts: &Facts,
    halves: (Option<&Half<V4>>, Option<&Half<V6>>),
    settings: &Settings,
    bpffs_dir: &Path,
    links: &[Link],
) -> Programs {
    let pins = Pins::below(bpffs_dir);
    let trial = Trial::load(settings).map_err(anyhow::Error::from);
    let hooks = expected_hooks(facts, halves, &pins, links);
    Programs {
        loadable: trial.and_then(|trial| trial.tags()).map_err(|error| format!("{error:#}")),
        btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
        hooks: hooks
            .into_iter()
            .map(|(hook, name)| (hook, name.clone(), pins.attached(hook, &name)))
            .collect(),
        unpinned: pins.unpinned(),
    }
}

/// The hooks that any agent would fill, and those that have a pin: what else it attaches, only it knows.
fn expected_hooks(
    facts: &Facts,
    (v4, v6): (Option<&Half<V4>>, Option<&Half<V6>>),
    pins: &Pins,
    links: &[Link],
) -> Vec<(Hook, String)> {
    let in_subnet = |index: u32| has_pods_address(v4, index) || has_pods_address(v6, index);
    let bridges = links.iter().filter(|link| link.kind == LinkKind::Bridge && in_subnet(link.index));
    let bridges: Vec<u32> = bridges.map(|link| link.index).collect();
    let is_pod = |link: &&Link| {
        link.kind == LinkKind::Veth
            && link.peer_in_other_netns.is_some()
            && link.master.is_some_and(|master| bridges.contains(&master))
    };
    let mut hooks: BTreeMap<Hook, String> = BTreeMap::new();
    let mut add = |program, index: u32| {
        if let Some(link) = links.iter().find(|link| link.index == index) {
            hooks.insert(Hook { program, ifindex: index }, link.name.clone());
        }
    };
    for link in links.iter().filter(is_pod) {
        add(Program::FromPod, link.index);
        add(Program::ToPod, link.index);
    }
    if facts.wireguard.is_empty() {
        add(Program::FromWire, facts.uplink.ifindex);
    }
    let devices =
        [v4.and_then(|half| half.facts.device.as_ref()), v6.and_then(|half| half.facts.device.as_ref())];
    let devices = devices.into_iter().flatten().map(|device| device.index);
    for device in devices.chain(facts.wireguard.iter().map(|tunnel| tunnel.index)) {
        add(Program::FromOverlay, device);
        add(Program::ToOverlay, device);
    }
    if has_direct_peers(v4) || has_direct_peers(v6) {
        add(Program::ToWire, facts.uplink.ifindex);
    }
    for hook in pins.pinned_hooks() {
        add(hook.program, hook.ifindex);
    }
    hooks.into_iter().collect()
}

/// Whether a link has an address in the subnet.
fn has_pods_address<F: Family>(half: Option<&Half<F>>, index: u32) -> bool {
    half.is_some_and(|half| {
        let mut of_link = half.addresses.iter().filter(|address| address.ifindex == index);
        of_link.any(|address| F::contains(half.facts.subnet, address.address))
    })
}

fn has_direct_peers<F: Family>(half: Option<&Half<F>>) -> bool {
    let overlay = half.and_then(|half| half.facts.overlay.as_ref());
    overlay.iter().flat_map(|overlay| overlay.peers.values()).any(|peer| peer.direct)
}
