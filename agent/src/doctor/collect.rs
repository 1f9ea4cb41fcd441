//! Gathers the snapshot. Decides nothing: what cannot be read is noted as such.

mod etcd;

use std::{collections::BTreeMap, net::Ipv4Addr, path::Path, time::Duration};

use anyhow::Result;

use super::{
    DoctorArgs,
    check::host::{BRIDGE_RULES, FORWARD, LIBERAL, rp_filter},
    probe::{self, Target},
    snapshot::{Programs, Snapshot},
};
use crate::{
    control::{self, Request},
    dataplane::{Hook, Pins, Program, Settings, Trial},
    facts::{Facts, Source},
    firewall,
    kernel::{Address, Kernel, Link, LinkKind, offload, sysctl},
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
    let addresses = kernel.addresses().await?;
    let desired = facts.overlay.as_ref();
    let overlay = match desired {
        Some(desired) => kernel.overlay_actual(desired.device).await.map_err(|error| error.to_string()),
        None => Err("the peers are not known yet".to_owned()),
    };
    let mut ways = BTreeMap::new();
    for peer in desired.iter().flat_map(|desired| desired.peers.values()) {
        ways.insert(peer.vtep, kernel.route_get(peer.vtep).await.map_err(|error| error.to_string()));
    }
    let probes = if args.no_probes {
        Vec::new()
    } else {
        let targets = targets(&facts, &ways);
        let patience = Duration::from_millis(args.timeout_ms.into());
        // This runtime has nothing else to do.
        probe::probe_all(&targets, patience)
    };
    let programs = facts
        .programs
        .as_ref()
        .map(|settings| programs(&facts, settings, &args.bpffs_dir, &links, &addresses));
    Ok(Snapshot {
        source,
        not_ready,
        routes: kernel.routes().await?,
        overlay,
        ways,
        sysctls: sysctls(&facts),
        gro: offload::gro(&facts.uplink.name).map_err(|error| error.to_string()),
        rules: firewall::rules().await.map_err(|error| error.to_string()),
        etcd: etcd::ask(&facts.etcd, args.etcd_password.as_ref()).await,
        programs,
        probes,
        links,
        addresses,
        facts,
    })
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

fn sysctls(facts: &Facts) -> BTreeMap<String, Option<String>> {
    let mut names: Vec<String> = [FORWARD, LIBERAL, BRIDGE_RULES].map(str::to_owned).to_vec();
    names.extend(["all", &facts.uplink.name].map(rp_filter));
    names.extend(facts.device.as_ref().map(|device| rp_filter(&device.name)));
    names.into_iter().map(|name| (name.clone(), sysctl::get(&name).ok())).collect()
}

/// The peers, with the sizes that their ways promise.
fn targets(facts: &Facts, ways: &BTreeMap<Ipv4Addr, Result<crate::kernel::RouteTo, String>>) -> Vec<Target> {
    let Some(desired) = &facts.overlay else { return Vec::new() };
    let target = |peer: &crate::overlay::OverlayPeer| {
        let path = ways.get(&peer.vtep).and_then(|way| way.as_ref().ok()).and_then(|way| way.mtu);
        let underlay = path.unwrap_or(u32::MAX).min(facts.uplink.mtu);
        let size = |bytes: u32| u16::try_from(bytes).unwrap_or(u16::MAX);
        Target {
            subnet: peer.subnet,
            vtep: peer.vtep,
            underlay_mtu: size(underlay),
            // The base of the subnet is the address of the peer's VXLAN device.
            overlay: facts.device.as_ref().map(|device| (peer.subnet.network(), size(device.mtu))),
        }
    };
    desired.peers.values().map(target).collect()
}

fn programs(
    facts: &Facts,
    settings: &Settings,
    bpffs_dir: &Path,
    links: &[Link],
    addresses: &[Address],
) -> Programs {
    let pins = Pins::below(bpffs_dir);
    let trial = Trial::load(settings).map_err(anyhow::Error::from);
    let hooks = expected_hooks(facts, &pins, links, addresses);
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
fn expected_hooks(facts: &Facts, pins: &Pins, links: &[Link], addresses: &[Address]) -> Vec<(Hook, String)> {
    let bridges = links.iter().filter(|link| {
        link.kind == LinkKind::Bridge
            && addresses.iter().any(|a| a.ifindex == link.index && facts.subnet.contains(&a.address))
    });
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
    add(Program::FromWire, facts.uplink.ifindex);
    if let Some(device) = &facts.device {
        add(Program::FromOverlay, device.index);
        add(Program::ToOverlay, device.index);
    }
    if facts.overlay.iter().flat_map(|overlay| overlay.peers.values()).any(|peer| peer.direct) {
        add(Program::ToWire, facts.uplink.ifindex);
    }
    for hook in pins.pinned_hooks() {
        add(hook.program, hook.ifindex);
    }
    hooks.into_iter().collect()
}
