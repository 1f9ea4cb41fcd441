//! The way to each VTEP: which neighbour on which uplink, and how large a packet may be.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result};
use futures::{StreamExt as _, stream};
use ipnet::Ipv4Net;

use super::Reconciler;
use crate::{
    dataplane::{PeerPath, Underlay},
    kernel::RouteTo,
    lease::Lease,
    overlay::OverlayPeer,
};

/// How many questions are under way at once.
const UNDER_WAY: usize = 256;

impl Reconciler {
    /// The IPv4 half of a lease as the kernel's overlay needs it and as the fast path needs it, by the ways that are
    /// known.
    pub(super) fn paths(&self, lease: &Lease, subnet: Ipv4Net) -> Result<(OverlayPeer, PeerPath)> {
        let public_ip = lease.attrs.public_ip.context("its lease has no PublicIP")?;
        let vtep_mac = match self.node.overlay() {
            Some(_) => lease.attrs.vtep()?.vtep_mac,
            None => [0; 6],
        };
        let underlay = self.ways.get(&public_ip).copied().flatten();
        // On the same link as we are, and it may be used without encapsulation. Only the uplink has the program that
        // sees what the host has translated.
        let wants_direct = self.node.overlay().is_none_or(|overlay| overlay.vxlan.direct_routing);
        let on_link = |way: Underlay| way.next_hop == public_ip && way.uplink == self.node.uplink.ifindex;
        let direct = wants_direct && underlay.is_some_and(on_link);
        let peer = OverlayPeer { subnet, vtep: public_ip, vtep_mac, direct };
        let path = PeerPath { subnet, vtep: public_ip, vtep_mac, direct, underlay };
        Ok((peer, path))
    }

    /// Finds the ways to these VTEPs that are not known yet, many at once.
    pub(super) async fn find_ways(&mut self, vteps: impl Iterator<Item = Ipv4Addr>) {
        let unknown: Vec<Ipv4Addr> = vteps.filter(|vtep| !self.ways.contains_key(vtep)).collect();
        let ways = stream::iter(unknown).map(async |vtep| (vtep, self.resolve(vtep).await));
        let found: Vec<_> = ways.buffered(UNDER_WAY).collect().await;
        self.ways.extend(found);
    }

    /// Asks the kernel. `None` where the fast path must leave the peer to it: no route, or one by a link that is no
    /// Ethernet.
    ///
    /// Of several next hops a peer has one, the kernel's own choice: its VXLAN device, too, keeps the one that it has
    /// looked up until the routes change. (Linux 4.6, `dst_cache`)
    async fn resolve(&self, vtep: Ipv4Addr) -> Option<Underlay> {
        let own = &self.node.uplink;
        let mut route = self.kernel.route_get(vtep).await.ok()?;
        if route.multipath {
            route = self.kernel.route_from(own.public_ip, vtep).await.ok()?;
        }
        // A next hop with an IPv6 address (RFC 5549) is one that the peers' map cannot say.
        if route.local || route.gateway6.is_some() {
            return None;
        }
        let link_mtu = if route.ifindex == own.ifindex { own.mtu } else { self.other_uplink(&route).await? };
        let configured = self.node.overlay().and_then(|overlay| overlay.vxlan.mtu);
        let device_mtu = configured.map_or(own.mtu, u32::from);
        let mtu = route.mtu.unwrap_or(u32::MAX).min(device_mtu).min(link_mtu);
        Some(Underlay {
            uplink: route.ifindex,
            next_hop: route.gateway.unwrap_or(vtep),
            source: own.public_ip?,
            mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
        })
    }

    /// The MTU of a link besides the uplink that may carry encapsulated packets.
    async fn other_uplink(&self, route: &RouteTo) -> Option<u32> {
        let link = self.kernel.link_by_index(route.ifindex).await.ok()??;
        let ethernet = link.mac.is_some() && !link.no_arp && !link.point_to_point && !link.loopback;
        (link.up && ethernet && link.index != self.node.device()).then_some(link.mtu)
    }
}
