//! What this node ought to be, for those who compare it with what is.

use tokio::time::Instant;

use super::{FACTS_SETTLE, FACTS_SHARE, Path, Reconciler, TICK, Wireguard, half::Side};
use crate::{
    facts::{self, Facts},
    registry::Own,
};

impl Reconciler {
    /// What this node ought to be now.
    pub(super) fn facts(&self) -> Facts {
        let node = &self.node;
        let etcd = &node.config.etcd;
        Facts {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            v4: self.half_facts(),
            v6: self.half_facts(),
            lost: match &self.cluster().own {
                Own::Held(_) => None,
                Own::Lost { reason, .. } => Some(reason.clone()),
            },
            backend: node.network.backend.lease_type().to_owned(),
            uplink: node.uplink.clone(),
            wireguard: node.wireguard.as_ref().map(Wireguard::facts).unwrap_or_default(),
            pod_mtu: node.pod_mtu(),
            programs: match &self.path {
                Path::Ebpf(dataplane) => Some(dataplane.settings().clone()),
                Path::Kernel(_) => None,
            },
            kernel_alone: match &self.path {
                Path::Ebpf(_) => None,
                Path::Kernel(reason) => Some(reason.clone()),
            },
            refused: self.v4.refused.union(&self.v6.refused).cloned().collect(),
            etcd: facts::Etcd {
                // With leases of the Kubernetes API there is no etcd of ours.
                endpoints: if node.config.kube.is_some() { Vec::new() } else { etcd.endpoints.clone() },
                prefix: etcd.prefix.clone(),
                ca_file: etcd.ca_file.clone(),
                cert_file: etcd.cert_file.clone(),
                key_file: etcd.key_file.clone(),
                username: etcd.username.clone(),
            },
        }
    }

    fn half_facts<F: Side>(&self) -> Option<facts::Half<F>> {
        let half = F::half(&self.node)?;
        Some(facts::Half {
            network: half.pool.network,
            subnet: half.subnet,
            device: half.overlay.as_ref().map(|overlay| facts::Device {
                name: overlay.spec.name.clone(),
                index: overlay.device.index,
                mac: overlay.device.mac,
                mtu: overlay.device.mtu,
                vni: overlay.vxlan.vni,
                port: overlay.vxlan.port,
            }),
            overlay: F::kept(self).expected.as_ref().map(|expected| expected.desired().clone()),
        })
    }

    /// Leaves the facts behind for when no agent runs; the file is written only where they are others than before.
    pub(super) fn leave_facts(&mut self) {
        self.facts_due = None;
        let start = Instant::now();
        let facts = self.facts();
        if self.facts_left.as_ref() == Some(&facts) {
            return;
        }
        match facts.write(&self.node.config.run_dir) {
            Ok(()) => self.facts_left = Some(facts),
            Err(error) => tracing::warn!("`loden doctor` will know less once this agent is gone: {error:#}"),
        }
        self.facts_take = start.elapsed();
    }

    /// After a change, leaves the facts when such changes have settled: the more work that is, the later.
    pub(super) fn leave_facts_later(&mut self) {
        let settle = (self.facts_take * FACTS_SHARE).clamp(FACTS_SETTLE, TICK);
        self.facts_due.get_or_insert_with(|| Instant::now() + settle);
    }
}
