//! The way to each VTEP: which neighbour on which uplink, and how large a packet may be.

use anyhow::{Context as _, Result, ensure};
use futures::{StreamExt as _, stream};

use super::{Reconciler, Work, half::Side};
use crate::{
    dataplane::{PeerPath, Underlay, Way},
    kernel,
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
        let underlay = F::kept(self).ways.get(vtep);
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

    /// Finds the ways to these VTEPs of which it is not sure, many at once. Where the kernel could not be asked, what was
    /// known stays, and a later pass asks again.
    pub(super) async fn find_ways<F: Side>(&mut self, vteps: impl Iterator<Item = F::Addr>) {
        let unsure: Vec<F::Addr> = vteps.filter(|vtep| F::kept(self).ways.is_unsure(*vtep)).collect();
        let this = &*self;
        let ways = stream::iter(unsure).map(async |vtep| (vtep, this.resolve::<F>(vtep).await));
        let found: Vec<_> = ways.buffered(UNDER_WAY).collect().await;
        let mut failure = None;
        for (vtep, way) in found {
            match way {
                Ok(way) => F::kept_mut(self).ways.learn(vtep, way),
                Err(error) => failure = Some(error.to_string()),
            }
        }
        self.fail(Work::Overlay, failure);
    }

    /// Asks the kernel. `None` where the fast path must leave the peer to it: no route, or one by a link that is no
    /// Ethernet.
    ///
    /// # Errors
    ///
    /// Where the kernel did not answer, which says nothing of the way.
    ///
    /// Of several next hops a peer has one, the kernel's own choice: its VXLAN device, too, keeps the one that it has
    /// looked up until the routes change. (Linux 4.6, `dst_cache`)
    async fn resolve<F: Side>(&self, vtep: F::Addr) -> kernel::Result<Option<Underlay<F>>> {
        let uplink = &self.node.uplink;
        let Some(own) = F::address(uplink) else { return Ok(None) };
        let mut route = answered(self.kernel.route_to::<F>(vtep).await)?;
        if route.is_some_and(|route| route.multipath) {
            route = answered(self.kernel.route_from::<F>(Some(own), vtep).await)?;
        }
        // A next hop of the other family (RFC 5549) is one that the peers' map cannot say.
        let Some(route) = route.filter(|route| !route.local && route.gateway6.is_none()) else {
            return Ok(None);
        };
        let link_mtu = if route.ifindex == uplink.ifindex {
            Some(uplink.mtu)
        } else {
            self.other_uplink(route.ifindex).await?
        };
        let Some(link_mtu) = link_mtu else { return Ok(None) };
        let overlay = F::half(&self.node).and_then(|half| half.overlay.as_ref());
        let configured = overlay.and_then(|overlay| overlay.vxlan.mtu);
        let device_mtu = configured.map_or(uplink.mtu, u32::from);
        let mtu = route.mtu.unwrap_or(u32::MAX).min(device_mtu).min(link_mtu);
        Ok(Some(Underlay {
            uplink: route.ifindex,
            next_hop: route.gateway.unwrap_or(vtep),
            source: own,
            mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
        }))
    }

    /// The MTU of a link besides the uplink that may carry encapsulated packets.
    async fn other_uplink(&self, index: u32) -> kernel::Result<Option<u32>> {
        let Some(link) = self.kernel.link_by_index(index).await? else { return Ok(None) };
        let ethernet = link.mac.is_some() && !link.no_arp && !link.point_to_point && !link.loopback;
        let overlays = [self.node.overlay(), self.node.overlay_v6()];
        let is_overlay = overlays.iter().flatten().any(|overlay| overlay.device.index == link.index);
        Ok((link.up && ethernet && !is_overlay).then_some(link.mtu))
    }
}

/// What the kernel says of a route; `None` where it says that there is none.
fn answered<T>(asked: kernel::Result<T>) -> kernel::Result<Option<T>> {
    match asked {
        Err(error) if error.is_an_answer() => Ok(None),
        asked => asked.map(Some),
    }
}
