//! The way to each VTEP: which neighbour on which uplink, and how large a packet may be.

use anyhow::{Context as _, Result, ensure};
use futures::{StreamExt as _, stream};

use super::{Reconciler, half::Side};
use crate::{
    dataplane::{PeerPath, Underlay, Way},
    lease::Lease,
    overlay::OverlayPeer,
};

/// How many questions are under way at once.
const UNDER_WAY: usize = 256;

impl Reconciler {
    /// A family's half of a lease as the kernel's overlay needs it and as the fast path needs it, by the ways that are
    /// known.
    pub(super) fn paths<F: Side>(
        &self,
        lease: &Lease,
        subnet: F::Net,
    ) -> Result<(OverlayPeer<F>, PeerPath<F>)> {
        let public_ip = if F::BITS == 32 { "PublicIP" } else { "PublicIPv6" };
        let vtep = F::vtep(lease).with_context(|| format!("its lease has no {public_ip}"))?;
        let overlay = F::half(&self.node).and_then(|half| half.overlay.as_ref());
        let vtep_mac = match overlay {
            Some(_) => F::vtep_mac(lease)?,
            None => [0; 6],
        };
        let underlay = F::kept(self).ways.get(&vtep).copied().flatten();
        // On the same link as we are, and it may be used without encapsulation. Only the uplink has the program that
        // sees what the host has translated.
        let wants_direct = overlay.is_none_or(|overlay| overlay.vxlan.direct_routing);
        let on_link = |way: Underlay<F>| way.next_hop == vtep && way.uplink == self.node.uplink.ifindex;
        let direct = wants_direct && underlay.is_some_and(on_link);
        ensure!(
            direct || overlay.is_some(),
            "{vtep} is no neighbour on {}, and without a tunnel there is no other way to its pods",
            self.node.uplink.name
        );
        let peer = OverlayPeer { subnet, vtep, vtep_mac, direct };
        let way = if direct { Way::Direct } else { Way::Encapsulated };
        let path = PeerPath { subnet, vtep, vtep_mac, way, underlay };
        Ok((peer, path))
    }

    /// Finds the ways to these VTEPs that are not known yet, many at once.
    pub(super) async fn find_ways<F: Side>(&mut self, vteps: impl Iterator<Item = F::Addr>) {
        let unknown: Vec<F::Addr> = vteps.filter(|vtep| !F::kept(self).ways.contains_key(vtep)).collect();
        let this = &*self;
        let ways = stream::iter(unknown).map(async |vtep| (vtep, this.resolve::<F>(vtep).await));
        let found: Vec<_> = ways.buffered(UNDER_WAY).collect().await;
        F::kept_mut(self).ways.extend(found);
    }

    /// Asks the kernel. `None` where the fast path must leave the peer to it: no route, or one by a link that is no
    /// Ethernet.
    ///
    /// Of several next hops a peer has one, the kernel's own choice: its VXLAN device, too, keeps the one that it has
    /// looked up until the routes change. (Linux 4.6, `dst_cache`)
    async fn resolve<F: Side>(&self, vtep: F::Addr) -> Option<Underlay<F>> {
        let uplink = &self.node.uplink;
        let own = F::address(uplink);
        let mut route = self.kernel.route_to::<F>(vtep).await.ok()?;
        if route.multipath {
            route = self.kernel.route_from::<F>(own, vtep).await.ok()?;
        }
        // A next hop of the other family (RFC 5549) is one that the peers' map cannot say.
        if route.local || route.gateway6.is_some() {
            return None;
        }
        let link_mtu = if route.ifindex == uplink.ifindex {
            uplink.mtu
        } else {
            self.other_uplink(route.ifindex).await?
        };
        let overlay = F::half(&self.node).and_then(|half| half.overlay.as_ref());
        let configured = overlay.and_then(|overlay| overlay.vxlan.mtu);
        let device_mtu = configured.map_or(uplink.mtu, u32::from);
        let mtu = route.mtu.unwrap_or(u32::MAX).min(device_mtu).min(link_mtu);
        Some(Underlay {
            uplink: route.ifindex,
            next_hop: route.gateway.unwrap_or(vtep),
            source: own?,
            mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
        })
    }

    /// The MTU of a link besides the uplink that may carry encapsulated packets.
    async fn other_uplink(&self, index: u32) -> Option<u32> {
        let link = self.kernel.link_by_index(index).await.ok()??;
        let ethernet = link.mac.is_some() && !link.no_arp && !link.point_to_point && !link.loopback;
        let overlays = [self.node.overlay(), self.node.overlay_v6()];
        let is_overlay = overlays.iter().flatten().any(|overlay| overlay.device.index == link.index);
        (link.up && ethernet && !is_overlay).then_some(link.mtu)
    }
}
