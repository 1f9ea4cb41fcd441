//! Takes away what an earlier agent made for a family that the network no longer has: nobody would keep it true. Sysctls
//! stay until `loden cleanup`, since others may have come to rely on them.

use anyhow::{Result, bail};
use ipnet::IpNet;

use super::{Reconciler, half::Side};
use crate::firewall::Firewall;

impl Reconciler {
    /// Devices, routes and rules of a family that is not this network's; says whether there were any.
    pub(super) async fn withdraw<F: Side>(&mut self) -> Result<bool> {
        let (mine, others): (Vec<IpNet>, Vec<IpNet>) =
            self.state.networks.iter().partition(|network| F::prefix(**network).is_some());
        if F::half(&self.node).is_some() || mine.is_empty() {
            return Ok(false);
        }
        let device = if F::BITS == 32 { &mut self.state.device } else { &mut self.state.device_v6 };
        let removed = self
            .kernel
            .remove_overlay(device.iter().map(String::as_str), &mine.iter().copied().collect())
            .await;
        let rules = Firewall::withdraw(mine[0]).await;
        let mut errors =
            removed.errors.iter().map(ToString::to_string).chain(rules.iter().map(ToString::to_string));
        if let Some(error) = errors.next() {
            bail!("what is left of {}, which this network no longer has, stays: {error}", F::NAME);
        }
        *device = None;
        self.state.networks = others.into_iter().collect();
        self.state.write(&self.node.config.run_dir)?;
        tracing::info!(
            removed = removed.done.join(", "),
            "{} is withdrawn: this network no longer has it",
            F::NAME
        );
        Ok(true)
    }
}
