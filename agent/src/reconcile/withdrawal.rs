//! Takes away what an earlier agent made for a family, a backend or a VNI that the network no longer has: nobody would
//! keep it true. Sysctls stay until `loden cleanup`, since others may have come to rely on them.

use anyhow::{Context as _, Result, bail};
use ipnet::IpNet;

use super::{Reconciler, half::Side};
use crate::firewall::Firewall;

impl Reconciler {
    /// Routes and rules of a family that is not this network's; says whether there were any.
    pub(super) async fn withdraw<F: Side>(&mut self) -> Result<bool> {
        let (mine, others): (Vec<IpNet>, Vec<IpNet>) =
            self.state.networks.iter().partition(|network| F::prefix(**network).is_some());
        if F::half(&self.node).is_some() || mine.is_empty() {
            return Ok(false);
        }
        let removed = self.kernel.remove_overlay([], &mine.iter().copied().collect()).await;
        let rules = Firewall::withdraw(mine[0]).await;
        let mut errors =
            removed.errors.iter().map(ToString::to_string).chain(rules.iter().map(ToString::to_string));
        if let Some(error) = errors.next() {
            bail!("what is left of {}, which this network no longer has, stays: {error}", F::NAME);
        }
        self.state.networks = others.into_iter().collect();
        self.state.write(&self.node.config.run_dir)?;
        tracing::info!(
            removed = removed.done.join(", "),
            "{} is withdrawn: this network no longer has it",
            F::NAME
        );
        Ok(true)
    }

    /// Devices that an agent here once made and this one has no use for; says whether there were any. One that no agent
    /// has noted may be somebody else's, whatever its name.
    pub(super) async fn withdraw_devices(&mut self) -> Result<bool> {
        let mut removed = false;
        while let Some(device) = self.state.stale_devices.first().cloned() {
            let gone = self.kernel.delete_overlay_device(&device).await;
            if gone.with_context(|| format!("{device}, which this network no longer has, stays"))? {
                tracing::info!(device, "it is removed: this network no longer has it");
                removed = true;
            }
            self.state.stale_devices.remove(&device);
            self.state.write(&self.node.config.run_dir)?;
        }
        Ok(removed)
    }
}
