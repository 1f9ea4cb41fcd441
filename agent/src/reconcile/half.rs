//! One family's half of the node: its VXLAN device, rules and peers in the kernel. Both halves are one source; each is
//! there only where the network has the family, and nothing of a half touches the other.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
};

use anyhow::{Context as _, Result};

use super::{Node, Overlay, Path, Reconciler, Work, ways::Ways};
use crate::{
    dataplane::{Mapped, PeerPath, Way},
    endpoints::{Bridge, Endpoints},
    family::{Family, V4, V6},
    firewall::{Firewall, FirewallSpec},
    host::Prefixes,
    kernel::VxlanSpec,
    lease::Lease,
    network::{Backend, Pool},
    overlay::{Desired, Expected, OverlayPeer, Plan, Refusal},
    registry::{Cluster, Own, Peers},
    run,
    uplink::Uplink,
};

/// What a node is in one family.
pub struct Half<F: Family> {
    /// The family's part of the network config.
    pub pool: Pool<F>,
    /// The subnet that this node holds.
    pub subnet: F::Net,
    /// The VXLAN device whose underlay is of this family, where the backend has one.
    pub overlay: Option<Overlay>,
    /// Interface index of the WireGuard device that carries this family, where the backend has one.
    pub tunnel: Option<u32>,
}

impl<F: Family> Half<F> {
    /// Interface index of the device that carries the family; 0 where there is none.
    pub(super) fn device(&self) -> u32 {
        self.overlay.as_ref().map(|overlay| overlay.device.index).or(self.tunnel).unwrap_or(0)
    }
}

/// What the loop keeps of a half.
pub(super) struct Kept<F: Mapped> {
    firewall: Option<Firewall>,
    /// What the last plan was for: the echo of its own changes is no work.
    pub(super) expected: Option<Expected<F>>,
    /// Whether all of that was done.
    pub(super) programmed: bool,
    /// The leases for which kernel and maps were last made so, all of them; `None` where that is in doubt.
    pub(super) followed: Option<Peers>,
    /// Peers that no plan is made for, and why.
    pub(super) left_out: BTreeMap<F::Net, String>,
    /// Addresses and routes of this host.
    pub(super) prefixes: Prefixes<F>,
    /// Peers that the kernel cannot be given, and why.
    pub(super) refused: BTreeSet<String>,
    pub(super) ways: Ways<F>,
    pub(super) has_direct_peers: bool,
    /// Whether the programs' maps hold the peers: without, they would take every peer for a stranger.
    pub(super) maps_know_peers: bool,
    pub(super) bridges: Vec<Bridge<F>>,
    pub(super) endpoints: Endpoints<F>,
    /// Ports of bridges that have more of them than are found: each is told of once.
    pub(super) crowded: BTreeSet<u32>,
}

impl<F: Mapped> Kept<F> {
    /// Begins with the endpoints that an earlier agent found; the bridge may have forgotten those that had nothing to say
    /// since.
    pub(super) fn of(path: &Path) -> Self {
        let mut kept = Self::default();
        if let Path::Ebpf(dataplane) = path {
            kept.endpoints = dataplane.half::<F>().endpoints_held().clone();
        }
        kept
    }

    /// Whether a link is a port of a bridge that carries the subnet.
    pub(super) fn has_port(&self, link: u32) -> bool {
        self.bridges.iter().any(|bridge| bridge.ports.contains(&link))
    }

    /// The ways to VTEPs are looked up again, by the next pass that looks at all peers.
    pub(super) fn forget_ways(&mut self) {
        self.ways.doubt_all();
        self.followed = None;
    }

    /// Whether the way to a VTEP leads over a link.
    pub(super) fn leads_over(&self, link: u32) -> bool {
        self.ways.begin().any(|uplink| uplink == link)
    }
}

impl<F: Mapped> Default for Kept<F> {
    fn default() -> Self {
        Self {
            firewall: None,
            expected: None,
            programmed: false,
            followed: None,
            left_out: BTreeMap::new(),
            prefixes: Prefixes::default(),
            refused: BTreeSet::new(),
            ways: Ways::default(),
            has_direct_peers: false,
            maps_know_peers: false,
            bridges: Vec::new(),
            endpoints: Endpoints::<F>::new(),
            crowded: BTreeSet::new(),
        }
    }
}

/// Where the loop has the half of a family.
pub(super) trait Side: Mapped {
    fn half(node: &Node) -> Option<&Half<Self>>;
    fn half_mut(node: &mut Node) -> Option<&mut Half<Self>>;
    fn kept(of: &Reconciler) -> &Kept<Self>;
    fn kept_mut(of: &mut Reconciler) -> &mut Kept<Self>;
    /// Makes this host forward; says whether it did not.
    fn forward(of: &mut Reconciler) -> Result<bool>;
    /// The address at which an uplink receives VXLAN.
    fn address(uplink: &Uplink) -> Option<Self::Addr>;
    /// A lease's VTEP address.
    fn vtep(lease: &Lease) -> Option<Self::Addr>;
    /// MAC of the VXLAN device behind it.
    fn vtep_mac(lease: &Lease) -> Result<[u8; 6]>;
}

impl Side for V4 {
    fn half(node: &Node) -> Option<&Half<Self>> {
        node.v4.as_ref()
    }

    fn half_mut(node: &mut Node) -> Option<&mut Half<Self>> {
        node.v4.as_mut()
    }

    fn kept(of: &Reconciler) -> &Kept<Self> {
        &of.v4
    }

    fn kept_mut(of: &mut Reconciler) -> &mut Kept<Self> {
        &mut of.v4
    }

    fn forward(of: &mut Reconciler) -> Result<bool> {
        of.set_sysctl("net.ipv4.ip_forward", "1")
    }

    fn address(uplink: &Uplink) -> Option<Ipv4Addr> {
        uplink.public_ip
    }

    fn vtep(lease: &Lease) -> Option<Ipv4Addr> {
        lease.attrs.public_ip
    }

    fn vtep_mac(lease: &Lease) -> Result<[u8; 6]> {
        Ok(lease.attrs.vtep()?.vtep_mac)
    }
}

impl Side for V6 {
    fn half(node: &Node) -> Option<&Half<Self>> {
        node.v6.as_ref()
    }

    fn half_mut(node: &mut Node) -> Option<&mut Half<Self>> {
        node.v6.as_mut()
    }

    fn kept(of: &Reconciler) -> &Kept<Self> {
        &of.v6
    }

    fn kept_mut(of: &mut Reconciler) -> &mut Kept<Self> {
        &mut of.v6
    }

    fn forward(of: &mut Reconciler) -> Result<bool> {
        of.set_ipv6_sysctls()
    }

    fn address(uplink: &Uplink) -> Option<Ipv6Addr> {
        uplink.public_ipv6
    }

    fn vtep(lease: &Lease) -> Option<Ipv6Addr> {
        lease.attrs.public_ipv6
    }

    fn vtep_mac(lease: &Lease) -> Result<[u8; 6]> {
        Ok(lease.attrs.vtep_v6()?.vtep_mac)
    }
}

impl Reconciler {
    /// Takes the subnet from the lease; says whether it is another than before.
    pub(super) fn follow_subnet<F: Side>(&mut self, cluster: &Cluster) -> bool {
        let (Some(half), Own::Held(lease)) = (F::half_mut(&mut self.node), &cluster.own) else {
            return false;
        };
        let Some(subnet) = lease.key.half::<F>().filter(|subnet| *subnet != half.subnet) else {
            return false;
        };
        tracing::error!(
            from = %half.subnet, to = %subnet,
            "this node has another {} subnet now: its containers must be started anew to be reached", F::NAME
        );
        half.subnet = subnet;
        true
    }

    /// What the half's device should be on this uplink.
    pub(super) fn follow_spec<F: Side>(&mut self, uplink: &Uplink) -> Result<()> {
        if let Some(Half { overlay: Some(overlay), .. }) = F::half_mut(&mut self.node) {
            overlay.spec = run::vxlan_spec::<F>(&overlay.vxlan, uplink)?;
        }
        Ok(())
    }

    /// Sysctls, device, address and rules of a half.
    pub(super) async fn bring_up<F: Side>(&mut self) -> Result<bool> {
        if F::half(&self.node).is_none() {
            return Ok(false);
        }
        let mut changed = F::forward(self)?;
        changed |= self.device::<F>().await?;
        // Last, because pods reach one another without rules of ours on most hosts.
        changed |= self.rules::<F>().await?;
        Ok(changed)
    }

    /// The VXLAN device and its address, where the backend has one.
    pub(super) async fn device<F: Side>(&mut self) -> Result<bool> {
        let Some(Half { subnet, overlay: Some(overlay), .. }) = F::half_mut(&mut self.node) else {
            return Ok(false);
        };
        let spec = VxlanSpec { mac: Some(overlay.device.mac), ..overlay.spec.clone() };
        let device = self.kernel.ensure_vxlan(&spec).await?;
        let new_mac = device.mac != overlay.device.mac;
        let mut changed = !device.adopted || !device.corrected.is_empty();
        let (index, subnet) = (device.index, *subnet);
        overlay.device = device;
        if new_mac {
            self.publish();
        }
        let networks = &self.state.networks;
        changed |= !self.kernel.has_overlay_address::<F>(index, subnet, networks).await?;
        self.kernel.set_overlay_address::<F>(index, subnet, networks).await?;
        Ok(changed)
    }

    /// The family's firewall rules.
    pub(super) async fn rules<F: Side>(&mut self) -> Result<bool> {
        let Some(half) = F::half(&self.node) else { return Ok(false) };
        let config = &self.node.config;
        let spec = FirewallSpec {
            network: half.pool.network.into(),
            subnet: half.subnet.into(),
            masquerade: config.ip_masq,
            fully_random: config.ip_masq_fully_random,
            forward: config.forward_rules,
            notrack: half
                .overlay
                .as_ref()
                .filter(|_| config.notrack_underlay)
                .map(|overlay| SocketAddr::new(overlay.spec.local, overlay.spec.port)),
        };
        let firewall = F::kept_mut(self).firewall.get_or_insert_with(|| Firewall::new(spec));
        firewall.set_spec(spec);
        firewall.ensure().await.with_context(|| format!("firewall for {}", F::NAME))
    }

    /// The peers that the kernel should know, of those for which `peer` finds a way; the others are left out.
    /// `None` where there is nothing to follow: it is not known yet (which is not none), or somebody else routes.
    pub(super) fn desired<F: Side>(
        &self,
        cluster: &Cluster,
        mut peer: impl FnMut(&Self, &Lease, F::Net) -> Result<OverlayPeer<F>, String>,
        left_out: &mut BTreeMap<F::Net, String>,
    ) -> Option<Desired<F>> {
        let half = F::half(&self.node)?;
        if self.node.network.backend == Backend::Alloc || !cluster.is_listed() {
            return None;
        }
        let (network, own, device) = (half.pool.network, half.subnet, half.device());
        let mut peers = BTreeMap::new();
        for lease in cluster.peers.values() {
            let Some(subnet) = lease.key.half::<F>() else { continue };
            match peer(self, lease, subnet) {
                Ok(peer) => drop(peers.insert(subnet, peer)),
                Err(reason) => drop(left_out.insert(subnet, reason)),
            }
        }
        let (uplink, whole) = (self.node.uplink.ifindex, self.node.wireguard.is_some());
        Some(Desired { network, own, device, uplink, whole, peers })
    }

    /// A peer, by its lease and what looks for a way; or why it is left out.
    pub(super) fn wanted<F: Side, T>(
        &self,
        subnet: F::Net,
        find: impl FnOnce() -> Result<T>,
    ) -> Result<T, String> {
        if let Some(address) = F::kept(self).prefixes.address_in(subnet) {
            // Its route would cut this host off from its own network, or from its own containers.
            return Err(format!("peer {subnet} is left out: this host has {address}"));
        }
        find().map_err(|error| format!("peer {subnet} is left out: {error:#}"))
    }

    /// A peer and the fast path's way there; or why it is left out.
    pub(super) fn wanted_path<F: Side>(
        &self,
        lease: &Lease,
        subnet: F::Net,
    ) -> Result<(OverlayPeer<F>, PeerPath<F>), String> {
        let (peer, path) = self.wanted::<F, _>(subnet, || self.paths::<F>(lease, subnet))?;
        Ok((peer, self.respect_policies(path)))
    }

    /// The peers: first off the fast path, then in the kernel, then on the fast path, so that the fast path never knows a
    /// peer that the kernel does not.
    pub(super) async fn peers<F: Side>(&mut self, cluster: &Cluster, work: Work) -> Result<bool> {
        if self.node.network.backend == Backend::Alloc {
            // It leaves the routes to somebody else, and nothing comes from a peer.
            F::kept_mut(self).maps_know_peers = true;
            return Ok(false);
        }
        if let Some(changed) = self.follow::<F>(cluster, work).await? {
            return Ok(changed);
        }
        F::kept_mut(self).followed = None;
        let of_family = cluster.peers.values().filter(|lease| lease.key.half::<F>().is_some());
        let vteps: BTreeSet<F::Addr> = of_family.filter_map(F::vtep).collect();
        if cluster.is_listed() {
            F::kept_mut(self).ways.retain(&vteps);
        }
        self.find_ways::<F>(vteps.into_iter()).await;
        let mut paths: Vec<PeerPath<F>> = Vec::new();
        let mut left_out = BTreeMap::new();
        let peer = |this: &Self, lease: &Lease, subnet| {
            let (peer, path) = this.wanted_path::<F>(lease, subnet)?;
            paths.push(path);
            Ok(peer)
        };
        let Some(desired) = self.desired::<F>(cluster, peer, &mut left_out) else { return Ok(false) };
        let expected = Expected::of(desired);
        paths.retain(|path| !expected.refuses(path.subnet));
        F::kept_mut(self).has_direct_peers = paths.iter().any(|path| path.way == Way::Direct);
        let gone = self.retain_in_maps(&paths)?;
        let refused = left_out.values().cloned().collect();
        let changed = self.program(expected, work, refused).await?;
        let changed = self.put_into_maps(&paths, gone)? || changed;
        let kept = F::kept_mut(self);
        (kept.followed, kept.left_out) = (Some(cluster.peers.clone()), left_out);
        Ok(changed)
    }

    /// Takes all but these peers off the fast path; returns how many were there.
    pub(super) fn retain_in_maps<F: Side>(&mut self, paths: &[PeerPath<F>]) -> Result<usize> {
        let Some(dataplane) = self.dataplane() else { return Ok(0) };
        Ok(dataplane.half_mut::<F>().retain_peers(paths)?)
    }

    /// Makes these the peers of the fast path, of which `gone` have been taken off; says whether anything changed.
    pub(super) fn put_into_maps<F: Side>(&mut self, paths: &[PeerPath<F>], gone: usize) -> Result<bool> {
        let Some(dataplane) = self.dataplane() else { return Ok(false) };
        let changes = dataplane.half_mut::<F>().set_peers(paths)?;
        if gone > 0 || changes.invalidates() {
            dataplane.bump_epoch()?;
        }
        F::kept_mut(self).maps_know_peers = true;
        Ok(gone > 0 || !changes.is_empty())
    }

    /// Whether the programs' maps hold the peers of every family that the network has.
    pub(super) fn maps_know_peers(&self) -> bool {
        (self.node.v4.is_none() || self.v4.maps_know_peers)
            && (self.node.v6.is_none() || self.v6.maps_know_peers)
    }

    /// Makes the kernel's part of the overlay so; says whether anything had to be done.
    pub(super) async fn program<F: Side>(
        &mut self,
        expected: Expected<F>,
        work: Work,
        refused: BTreeSet<String>,
    ) -> Result<bool> {
        let kept = F::kept(self);
        let actual = match &kept.expected {
            // Whatever contradicts it, the kernel tells, and asks for more than this.
            Some(before) if kept.programmed && work == Work::Peers => before.actual(),
            _ => self.kernel.overlay_actual(expected.desired().device).await?,
        };
        let plan = expected.plan(&actual);
        self.tell_of_refused(&plan, refused);
        self.apply(&plan).await;
        F::kept_mut(self).expected = Some(expected);
        Ok(!plan.is_empty())
    }

    /// Carries out a plan.
    pub(super) async fn apply<F: Side>(&mut self, plan: &Plan<F>) {
        let errors = self.kernel.apply(plan).await;
        self.fail(Work::Overlay, errors.iter().map(ToString::to_string));
        F::kept_mut(self).programmed = errors.is_empty();
    }

    /// One wrong lease is one peer's trouble: told once, and no reason for this node to be unready.
    pub(super) fn tell_of_refused<F: Side>(&mut self, plan: &Plan<F>, mut refused: BTreeSet<String>) {
        let by_plan = |(peer, refusal): &(OverlayPeer<F>, Refusal<F>)| {
            format!("peer {} at {} is left out: {refusal}", peer.subnet, peer.vtep)
        };
        refused.extend(plan.refused.iter().map(by_plan));
        let kept = F::kept_mut(self);
        for reason in refused.difference(&kept.refused) {
            tracing::warn!("{reason}");
        }
        kept.refused = refused;
    }
}
