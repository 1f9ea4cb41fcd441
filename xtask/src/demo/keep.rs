//! A cluster that stays up: how to look around in it, and how to remove it later.

use std::path::Path;

use anyhow::Result;
use loden_tests::{cluster::Cluster, container::Container, remains};

use crate::progress::Step;

/// Says how to look around.
pub(super) fn explain(binary: &Path, cluster: &Cluster, containers: &[Container]) {
    let node = &cluster.nodes[0];
    let in_node = format!("nsenter --net={}", node.netns().path().display());
    let etcdctl = format!(
        "nsenter --net={} env ETCDCTL_API=3 etcdctl --endpoints {}",
        cluster.underlay().netns().path().display(),
        cluster.etcd().endpoint()
    );
    let (client, server) = (&containers[0], &containers[containers.len() - 1]);
    eprintln!("\nthe cluster stays up; look around:");
    eprintln!("  ip netns list | grep {}", own_prefix());
    eprintln!("  ip netns exec {} ping {}", client.netns().name(), server.address());
    eprintln!("  {etcdctl} get --prefix /coreos.com/network");
    eprintln!("  {in_node} ip -d link show type vxlan");
    eprintln!("  {in_node} ip route");
    eprintln!("  cat {}", node.subnet_file().display());
    eprintln!("  {} status --run-dir {}", binary.display(), node.run_directory().display());
    eprintln!("  bpftool map dump pinned {}/v*/FLOWS", node.bpffs().display());
    eprintln!("  ls {}/v*/links", node.bpffs().display());
    eprintln!("  tail -f {}/n*/agent.log", cluster.directory().display());
    eprintln!("  cargo xtask demo --clean");
}

fn own_prefix() -> String {
    format!("ld-{}-", std::process::id())
}

/// Removes what runs that have ended left behind.
pub(super) fn clean() -> Result<()> {
    let owners = remains::owners()?;
    if owners.is_empty() {
        eprintln!("nothing is left of earlier runs");
    }
    for owner in owners {
        let step = Step::start(format!("removing what run {owner} left"));
        let count = remains::of(owner)?.len();
        remains::remove(owner)?;
        step.done(format!("{count} things removed"));
    }
    Ok(())
}
