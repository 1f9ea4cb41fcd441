//! The IPv6 half of a dual-stack node: its VXLAN device, rules, peers. The kernel's path carries it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv6Addr,
};

use anyhow::{Context as _, Result};
use ipnet::Ipv6Net;

use super::{Overlay, Reconciler, Work};
use crate::{
    family::V6,
    firewall::{Firewall, FirewallSpec},
    host::Prefixes,
    kernel::{Ipv6Event, KernelEvent, ROUTE_PROTOCOL, VxlanSpec, sysctl},
    lease::Lease,
    network::{Backend, Pool},
    overlay::{self, Desired, Expected, OverlayPeer},
    registry::{Cluster, Own},
};

/// What a dual-stack node is besides.
pub struct NodeV6 {
    /// The IPv6 half of the network config.
    pub pool: Pool<V6>,
    /// The IPv6 subnet that this node holds.
    pub subnet: Ipv6Net,
    /// The VXLAN device with an IPv6 underlay, where the backend has one.
    pub overlay: Option<Overlay>,
}

/// What the loop keeps of the IPv6 half.
#[derive(Default)]
pub(super) struct HalfV6 {
    firewall: Option<Firewall>,
    /// What the last plan was for.
    expected: Option<Expected<V6>>,
    pub(super) prefixes: Prefixes<V6>,
    refused: BTreeSet<String>,
}

impl NodeV6 {
    fn device(&self) -> u32 {
        self.overlay.as_ref().map_or(0, |overlay| overlay.device.index)
    }
}

impl Reconciler {
    /// Takes the subnet from the lease; says whether it is another than before.
    pub(super) fn follow_ipv6_subnet(&mut self, cluster: &Cluster) -> bool {
        let (Some(v6), Own::Held(lease)) = (&mut self.node.v6, &cluster.own) else { return false };
        let Some(subnet) = lease.key.subnet_v6.filter(|subnet| *subnet != v6.subnet) else { return false };
        tracing::error!(
            from = %v6.subnet, to = %subnet,
            "this node has another IPv6 subnet now: its containers must be started anew to be reached"
        );
        v6.subnet = subnet;
        true
    }

    /// Sysctls, device, address and rules of the IPv6 half.
    pub(super) async fn node_v6(&mut self) -> Result<bool> {
        if self.node.v6.is_none() {
            return Ok(false);
        }
        let mut changed = self.set_ipv6_sysctls()?;
        changed |= self.device_v6().await.context("IPv6")?;
        changed |= self.rules_v6().await.context("firewall for IPv6")?;
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

    async fn device_v6(&mut self) -> Result<bool> {
        let Some(NodeV6 { pool, subnet, overlay: Some(overlay) }) = &mut self.node.v6 else {
            return Ok(false);
        };
        let spec = VxlanSpec { mac: Some(overlay.device.mac), ..overlay.spec.clone() };
        let device = self.kernel.ensure_vxlan(&spec).await?;
        let new_mac = device.mac != overlay.device.mac;
        let mut changed = !device.adopted || !device.corrected.is_empty();
        let (index, subnet, network) = (device.index, *subnet, pool.network);
        overlay.device = device;
        if new_mac {
            self.publish();
        }
        changed |= !self.kernel.has_overlay_address::<V6>(index, subnet, network).await?;
        self.kernel.set_overlay_address::<V6>(index, subnet, network).await?;
        Ok(changed)
    }

    async fn rules_v6(&mut self) -> Result<bool> {
        let Some(v6) = &self.node.v6 else { return Ok(false) };
        let spec = FirewallSpec {
            network: v6.pool.network.into(),
            subnet: v6.subnet.into(),
            ..super::firewall_spec(&self.node)
        };
        let firewall = self.v6.firewall.get_or_insert_with(|| Firewall::new(spec));
        firewall.set_spec(spec);
        Ok(firewall.ensure().await?)
    }

    /// The peers' IPv6 halves, in the kernel.
    pub(super) async fn peers_v6(&mut self, cluster: &Cluster) -> Result<bool> {
        let Some(v6) = &self.node.v6 else { return Ok(false) };
        if self.node.network.backend == Backend::Alloc || !cluster.is_listed() {
            return Ok(false);
        }
        let (network, own, device) = (v6.pool.network, v6.subnet, v6.device());
        let mut peers: BTreeMap<Ipv6Net, (i64, OverlayPeer<V6>)> = BTreeMap::new();
        let mut refused = BTreeSet::new();
        for lease in cluster.peers.values() {
            let Some(subnet) = lease.key.subnet_v6 else { continue };
            if let Some(address) = self.v6.prefixes.address_in(subnet) {
                refused.insert(format!("peer {subnet} is left out: this host has {address}"));
                continue;
            }
            match self.peer_v6(lease, subnet).await {
                Ok(peer) => {
                    // Two nodes with one IPv6 subnet, which flannel does not rule out: the one written last.
                    let before = peers.get(&subnet).map(|(revision, _)| *revision);
                    if before.is_none_or(|before| before < lease.mod_revision) {
                        peers.insert(subnet, (lease.mod_revision, peer));
                    }
                }
                Err(error) => drop(refused.insert(format!("peer {subnet} is left out: {error:#}"))),
            }
        }
        let peers = peers.into_iter().map(|(subnet, (_, peer))| (subnet, peer)).collect();
        let desired = Desired { network, own, device, uplink: self.node.uplink.ifindex, peers };
        let plan = overlay::plan(&desired, &self.kernel.overlay_actual(device).await?);
        refused.extend(
            plan.refused.iter().map(|(peer, why)| format!("peer {} is left out: {why}", peer.subnet)),
        );
        for reason in refused.difference(&self.v6.refused) {
            tracing::warn!("{reason}");
        }
        self.v6.refused = refused;
        let failed = self.kernel.apply(&plan).await;
        self.fail(Work::Overlay, failed.iter().map(ToString::to_string));
        self.v6.expected = Some(Expected::of(desired));
        Ok(!plan.is_empty())
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
            Ipv6Event::Address(..) => Some(Work::Everything),
            Ipv6Event::Route(_, route) => {
                let ours = route.protocol == ROUTE_PROTOCOL || route.ifindex == Some(v6.device());
                // Another route may lead to a VTEP now, or make it a neighbour.
                (!ours && route.table == crate::kernel::TABLE_MAIN).then_some(Work::Overlay)
            }
            Ipv6Event::Neighbour(..) | Ipv6Event::Fdb(..) => None,
        }
    }
}
