//! How packets travel: by the programs in front of the kernel, or by the kernel alone.

use anyhow::{Context as _, Result};

use super::{Node, half::Side};
use crate::{
    config::{Datapath, Gate, SourceCheck, Xdp},
    dataplane::{self, Dataplane, FamilySettings, GuardMode, Settings, VxlanSettings},
    family::{V4, V6},
    kernel::sysctl,
};

/// How packets travel now.
pub(super) enum Path {
    /// The programs, in front of the kernel.
    Ebpf(Box<Dataplane>),
    /// The kernel alone, for this reason.
    Kernel(String),
}

impl Path {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Ebpf(_) => "ebpf",
            Self::Kernel(_) => "kernel",
        }
    }
}

pub(super) fn load(node: &Node, settings: &Settings) -> Result<Dataplane, dataplane::DataplaneError> {
    let mut dataplane = Dataplane::load(settings, &node.config.bpffs_dir)?;
    dataplane.set_guard_mode(guard_mode(node.config.xdp));
    Ok(dataplane)
}

pub(super) fn guard_mode(xdp: Xdp) -> GuardMode {
    match xdp {
        Xdp::Auto | Xdp::Off => GuardMode::WhereNative,
        Xdp::Native => GuardMode::Native,
        Xdp::Generic => GuardMode::Generic,
    }
}

pub(super) fn open_path(node: &Node) -> Result<Path> {
    if node.config.datapath == Datapath::Kernel {
        return Ok(kernel_alone(node, "--datapath=kernel".into()));
    }
    match load(node, &settings(node)?) {
        Ok(dataplane) => Ok(Path::Ebpf(Box::new(dataplane))),
        Err(error) if node.config.datapath == Datapath::Auto => {
            let error = anyhow::Error::from(error);
            tracing::warn!("the kernel alone carries the packets: {error:#}");
            Ok(kernel_alone(node, format!("{error:#}")))
        }
        Err(error) => Err(error.into()),
    }
}

/// Takes off what an earlier agent attached: nobody would keep its maps true.
fn kernel_alone(node: &Node, reason: String) -> Path {
    for error in dataplane::detach_all(&node.config.bpffs_dir) {
        tracing::warn!("{error}");
    }
    Path::Kernel(reason)
}

pub(super) fn settings(node: &Node) -> Result<Settings> {
    let range = sysctl::get("net.ipv4.ip_local_port_range")?;
    let mut ports = range.split_whitespace().filter_map(|word| word.parse().ok());
    let source_ports = ports.next().zip(ports.next()).filter(|(min, max)| min <= max);
    let ttl = || Ok(sysctl::get("net.ipv4.ip_default_ttl")?.trim().parse().unwrap_or(64));
    let hops = || {
        let name = format!("net/ipv6/conf/{}/hop_limit", node.uplink.name);
        Ok(sysctl::get(&name)?.trim().parse().unwrap_or(64))
    };
    Ok(Settings {
        v4: half::<V4>(node, ttl)?,
        v6: half::<V6>(node, hops)?,
        // Linux's own default, should the sysctl ever read otherwise than two ports.
        source_ports: source_ports.unwrap_or((32768, 60999)),
        strict: node.config.gate == Gate::Strict,
        drop_forged: node.config.source_check == SourceCheck::Drop,
        bare_device: node.wireguard.is_some(),
        log_packets: node.config.bpf_log,
    })
}

fn half<F: Side>(node: &Node, hops: impl FnOnce() -> Result<u8>) -> Result<Option<FamilySettings<F>>> {
    let Some(half) = F::half(node) else { return Ok(None) };
    let vtep = F::address(&node.uplink);
    Ok(Some(FamilySettings {
        network: half.pool.network,
        subnet_len: half.pool.subnet_len,
        subnet: half.subnet,
        vtep: vtep.with_context(|| format!("the uplink has no {} address", F::NAME))?,
        vxlan: half.overlay.as_ref().map(|overlay| VxlanSettings {
            ifindex: overlay.device.index,
            mac: overlay.device.mac,
            vni: overlay.vxlan.vni,
            port: overlay.vxlan.port,
        }),
        outer_ttl: hops()?,
    }))
}
