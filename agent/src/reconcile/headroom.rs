//! Keeps a port that asks for headroom on the bridges of the pods: see [`crate::kernel`]'s `headroom`.

use std::collections::BTreeSet;

use super::{Path, Reconciler};
use crate::kernel::{KernelError, Link, room_for};

impl Reconciler {
    /// Says whether anything changed. That it cannot be had costs speed and nothing else: it is told of once, and not tried
    /// again.
    pub(super) async fn headroom(&mut self, links: &[Link]) -> bool {
        if self.no_headroom {
            return false;
        }
        self.ask_for_room(links).await.unwrap_or_else(|error| {
            tracing::warn!("datagrams of containers are copied when they are encapsulated: {error}");
            self.no_headroom = true;
            true
        })
    }

    async fn ask_for_room(&self, links: &[Link]) -> Result<bool, KernelError> {
        let encapsulates = self.node.overlay().or(self.node.overlay_v6()).is_some();
        let wanted = self.node.config.pod_headroom && encapsulates && matches!(self.path, Path::Ebpf(_));
        let local = room_for(self.node.overlay_v6().is_some());
        let v4 = self.v4.bridges.iter().map(|bridge| (bridge.index, bridge.ports.is_empty()));
        let v6 = self.v6.bridges.iter().map(|bridge| (bridge.index, bridge.ports.is_empty()));
        let bridges: Vec<(u32, bool)> = if wanted { v4.chain(v6).collect() } else { Vec::new() };
        let mut changed = false;
        let mut have = BTreeSet::new();
        for link in links {
            let Some(of) = link.asks_for_room() else { continue };
            match link.master.filter(|master| bridges.iter().any(|(bridge, _)| bridge == master)) {
                Some(bridge) if of == local => {
                    have.insert(bridge);
                }
                _ => {
                    self.kernel.delete_link(link.index).await?;
                    changed = true;
                }
            }
        }
        // A bridge without pods is left as it is until it has some.
        let wanting: BTreeSet<u32> =
            bridges.iter().filter(|(_, is_empty)| !is_empty).map(|(bridge, _)| *bridge).collect();
        for bridge in wanting.difference(&have) {
            self.kernel.ask_for_room(*bridge, local).await?;
            changed = true;
        }
        Ok(changed)
    }
}
