//! The way to each VTEP: which neighbour on which uplink, and how large a packet may be.

use std::net::Ipv4Addr;

use super::Reconciler;
use crate::{
    dataplane::{PeerPath, Underlay},
    lease::Lease,
    overlay::OverlayPeer,
};

impl Reconciler {
    /// A lease as the kernel's overlay needs it and as the fast path needs it. `None` for a lease without VTEP.
    pub(super) async fn paths(&mut self, lease: &Lease) -> Option<(OverlayPeer, PeerPath)> {
        let public_ip = lease.attrs.public_ip;
        let vtep_mac = match &self.node.overlay {
            Some(_) => lease.attrs.vtep().ok()?.vtep_mac,
            None => [0; 6],
        };
        let underlay = self.way(public_ip).await;
        // On the same link as we are, and it may be used without encapsulation.
        let wants_direct = self.node.overlay.as_ref().is_none_or(|overlay| overlay.vxlan.direct_routing);
        let direct = wants_direct && underlay.is_some_and(|underlay| underlay.next_hop == public_ip);
        let peer = OverlayPeer { subnet: lease.subnet, vtep: public_ip, vtep_mac, direct };
        let path = PeerPath { subnet: lease.subnet, vtep: public_ip, vtep_mac, direct, underlay };
        Some((peer, path))
    }

    async fn way(&mut self, vtep: Ipv4Addr) -> Option<Underlay> {
        if let Some(way) = self.ways.get(&vtep) {
            return *way;
        }
        let way = self.resolve(vtep).await;
        self.ways.insert(vtep, way);
        way
    }

    /// Asks the kernel. `None` where the fast path must leave the peer to it: no route, several next hops, or
    /// another interface than the uplink.
    async fn resolve(&self, vtep: Ipv4Addr) -> Option<Underlay> {
        let route = self.kernel.route_get(vtep).await.ok()?;
        if route.local || route.multipath || route.ifindex != self.node.uplink.ifindex {
            return None;
        }
        let configured = self.node.overlay.as_ref().and_then(|overlay| overlay.vxlan.mtu);
        let device_mtu = configured.map_or(self.node.uplink.mtu, u32::from);
        let mtu = route.mtu.unwrap_or(u32::MAX).min(device_mtu).min(self.node.uplink.mtu);
        Some(Underlay {
            uplink: route.ifindex,
            next_hop: route.gateway.unwrap_or(vtep),
            source: self.node.uplink.public_ip,
            mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
        })
    }
}
