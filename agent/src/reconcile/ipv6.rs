//! What is IPv6's alone: its sysctls, its peers, which the kernel's path carries, and its events.

use std::{collections::BTreeSet, net::Ipv6Addr};

use anyhow::{Context as _, Result};
use ipnet::Ipv6Net;

use super::{Reconciler, Work};
use crate::{
    family::V6,
    kernel::{Ipv6Event, KernelEvent, ROUTE_PROTOCOL, sysctl},
    lease::Lease,
    overlay::OverlayPeer,
    registry::Cluster,
};

impl Reconciler {
    /// Sysctls, device, address and rules of the IPv6 half.
    pub(super) async fn node_v6(&mut self) -> Result<bool> {
        if self.node.v6.is_none() {
            return Ok(false);
        }
        let mut changed = self.set_ipv6_sysctls()?;
        changed |= self.device::<V6>().await?;
        // Last, because pods reach one another without rules of ours on most hosts.
        changed |= self.rules::<V6>().await?;
        Ok(changed)
    }

    /// Forwarding; a host that forwards no longer takes its default route from router advertisements unless it is
    /// told to (`accept_ra=2`, ip-sysctl of the kernel), and must not lose it because of us.
    fn set_ipv6_sysctls(&mut self) -> Result<bool> {
        let accept_ra = format!("net/ipv6/conf/{}/accept_ra", self.node.uplink.name);
        let mut changed = false;
        if sysctl::get(&accept_ra).is_ok_and(|value| value.trim() == "1") {
            changed |= self.set_sysctl(&accept_ra, "2")?;
        }
        changed |= self.set_sysctl("net.ipv6.conf.all.forwarding", "1")?;
        Ok(changed)
    }

    /// The peers' IPv6 halves, in the kernel.
    pub(super) async fn peers_v6(&mut self, cluster: &Cluster, work: Work) -> Result<bool> {
        if self.node.wireguard.is_some() {
            // Its peers have both halves.
            return Ok(false);
        }
        let mut refused = BTreeSet::new();
        let peer = async |this: &mut Self, lease: &Lease, subnet| this.peer_v6(lease, subnet).await;
        let Some(desired) = self.desired(cluster, peer, &mut refused).await else { return Ok(false) };
        self.program(desired, work, refused).await
    }

    async fn peer_v6(&self, lease: &Lease, subnet: Ipv6Net) -> Result<OverlayPeer<V6>> {
        let vtep = lease.attrs.public_ipv6.context("its lease has no PublicIPv6")?;
        let overlay = self.node.v6.as_ref().and_then(|v6| v6.overlay.as_ref());
        let vtep_mac = match overlay {
            Some(_) => lease.attrs.vtep_v6()?.vtep_mac,
            None => [0; 6],
        };
        let direct = match overlay {
            None => true,
            Some(overlay) => overlay.vxlan.direct_routing && self.is_on_link(vtep).await,
        };
        Ok(OverlayPeer { subnet, vtep, vtep_mac, direct })
    }

    async fn is_on_link(&self, vtep: Ipv6Addr) -> bool {
        let way = self.kernel.route_to::<V6>(vtep).await;
        way.is_ok_and(|way| {
            let through = way.gateway.is_some() || way.multipath || way.local;
            !through && way.ifindex == self.node.uplink.ifindex
        })
    }

    /// What an event of IPv6 asks for.
    pub(super) fn work_of_ipv6(&self, event: &KernelEvent) -> Option<Work> {
        let v6 = self.node.v6.as_ref()?;
        let KernelEvent::Ipv6(of_ipv6) = event else { return None };
        if self.v6.expected.as_ref().is_some_and(|expected| expected.is_contradicted_by(event)) {
            return Some(Work::Overlay);
        }
        match of_ipv6 {
            Ipv6Event::Address(_, address) => {
                let is_ours = [v6.device(), self.node.uplink.ifindex].contains(&address.ifindex);
                // Every link gives itself one, each container's too, and no subnet or way has to do with it.
                (is_ours || !address.address.is_unicast_link_local()).then_some(Work::Everything)
            }
            // Another default route may mean another uplink.
            Ipv6Event::Route(_, route) if route.dst.prefix_len() == 0 => Some(Work::Everything),
            Ipv6Event::Route(_, route) => {
                let ours = route.protocol == ROUTE_PROTOCOL || route.ifindex == Some(v6.device());
                // Another route may lead to a VTEP now, or make it a neighbour.
                (!ours && route.table == crate::kernel::TABLE_MAIN).then_some(Work::Overlay)
            }
            Ipv6Event::Neighbour(..) | Ipv6Event::Fdb(..) => None,
        }
    }
}
