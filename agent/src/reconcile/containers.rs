//! The containers: reads the bridges, finds the endpoints, keeps hooks and map in step with them.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;
use ipnet::IpNet;
use loden_ebpf::abi::Sighting;

use super::{Reconciler, Work, half::Side, wireguard::Wireguard};
use crate::{
    bridges::{self, AddressedBridge, Half, Lease},
    config::Xdp,
    dataplane::{Hook, Program},
    endpoints::{self, Bridge, Routed, Seen, UNRESOLVED_OF_A_PORT},
    family::{Family, V4, V6},
    kernel::{Address, AddressScope, FdbOf, Link, LinkKind, pod_route},
};

impl Reconciler {
    /// One look at all containers; says whether anything changed.
    pub(super) async fn containers(&mut self) -> Result<bool> {
        let links = self.kernel.links().await?;
        let v4 = self.kernel.addresses().await?;
        let v6: Vec<Address<V6>> = match &self.node.v6 {
            Some(_) => self.kernel.addresses_of().await?,
            None => Vec::new(),
        };
        self.v4.bridges = self.read_bridges(&links, &v4).await?;
        self.v6.bridges = self.read_bridges(&links, &v6).await?;
        self.advise(&links, &v4, &v6);
        let changed = self.headroom(&links).await;
        Ok(self.endpoints_and_hooks(&links).await? | changed)
    }

    async fn endpoints_and_hooks(&mut self, links: &[Link]) -> Result<bool> {
        let queueing = self.kernel.queueing_links().await?;
        // What is shaped on its veth must come by there.
        let is_free = |port: u32| !queueing.contains(&port);
        let mut routed: Vec<Routed> = links.iter().filter_map(Routed::of).collect();
        let hooks = self.hooks(links, &routed);
        self.answer_arp_for_routed(links, &routed);
        self.answer_nd_for_routed(links, &routed).await?;
        self.mend_routes::<V4>(links, &routed).await?;
        self.mend_routes::<V6>(links, &routed).await?;
        routed.retain(|pod| is_free(pod.port));
        // A map that cannot be written keeps no container from its hooks: what it lacks is the kernel's.
        let mut changed = self.try_endpoints::<V4>(links, &routed, &is_free);
        changed |= self.try_endpoints::<V6>(links, &routed, &is_free);
        if !self.maps_know_peers() {
            return Ok(changed);
        }
        // After the maps, so that programs with new maps go on where those before them are. What a new endpoint may
        // skip is found out when its hooks see what it does.
        let Some(dataplane) = self.dataplane() else { return Ok(false) };
        let errors = dataplane.set_hooks(&hooks);
        let renewed = dataplane.take_renewed();
        if !renewed.is_empty() {
            // Nothing speaks against what was known of the veths that had these numbers, except that they are others.
            renewed.iter().for_each(|ifindex| self.forget_endpoints(*ifindex));
            changed |= self.try_endpoints::<V4>(links, &routed, &is_free);
            changed |= self.try_endpoints::<V6>(links, &routed, &is_free);
        }
        self.fail(Work::Containers, errors.iter().map(|error| format!("hooks: {error}")));
        self.prove_endpoints::<V4>()?;
        self.prove_endpoints::<V6>()?;
        Ok(changed)
    }

    /// As [`Self::endpoints`]; what failed is noted.
    fn try_endpoints<F: Side>(
        &mut self,
        links: &[Link],
        routed: &[Routed],
        is_free: &impl Fn(u32) -> bool,
    ) -> bool {
        let found = self.endpoints::<F>(links, routed, is_free);
        found.unwrap_or_else(|error| {
            self.fail(Work::Containers, [format!("{} endpoints: {error:#}", F::NAME)]);
            true
        })
    }

    /// A veth is gone: whoever was behind it is not behind another one that gets its index.
    pub(super) fn forget_veth(&mut self, ifindex: u32) {
        self.forget_endpoints(ifindex);
        if let Some(dataplane) = self.dataplane() {
            dataplane.forget_interface(ifindex);
        }
    }

    fn forget_endpoints(&mut self, ifindex: u32) {
        self.v4.endpoints.retain(|_, endpoint| endpoint.ifindex != ifindex);
        self.v6.endpoints.retain(|_, endpoint| endpoint.ifindex != ifindex);
    }

    /// Finds the endpoints of a family and puts them into its map; says whether that changed anything.
    fn endpoints<F: Side>(
        &mut self,
        links: &[Link],
        routed: &[Routed],
        is_free: &impl Fn(u32) -> bool,
    ) -> Result<bool> {
        let Some(subnet) = F::half(&self.node).map(|half| half.subnet) else { return Ok(false) };
        let Some(dataplane) = self.dataplane() else { return Ok(false) };
        let sightings = dataplane.half_mut::<F>().take_sightings()?;
        let seen = |(key, sighting): &(F::SightingKey, Sighting)| {
            let (port, address) = F::sighted(key);
            Seen { port, address, mac: sighting.mac }
        };
        let seen: Vec<Seen<F>> = sightings.iter().map(seen).collect();
        let kept = F::kept_mut(self);
        kept.endpoints = endpoints::discover(subnet, &kept.bridges, routed, &seen, &kept.endpoints);
        kept.endpoints.retain(|_, endpoint| is_free(endpoint.ifindex));
        let crowded: BTreeSet<u32> =
            kept.bridges.iter().flat_map(|bridge| bridge.crowded(&kept.endpoints)).collect();
        for port in crowded.difference(&kept.crowded) {
            let name = links.iter().find(|link| link.index == *port).map_or("?", |link| link.name.as_str());
            tracing::warn!(
                "the container behind {name} sends from {UNRESOLVED_OF_A_PORT} {} addresses that this host's neighbour \
                 table does not have: further ones are left to the kernel",
                F::NAME
            );
        }
        kept.crowded = crowded;
        let netns: BTreeMap<u32, i32> =
            links.iter().filter_map(|link| Some((link.index, link.peer_in_other_netns?))).collect();
        for endpoint in kept.endpoints.values_mut() {
            endpoint.netns = netns.get(&endpoint.ifindex).copied().unwrap_or_default();
        }
        let wanted = kept.endpoints.clone();
        let Some(dataplane) = self.dataplane() else { return Ok(false) };
        let changes = dataplane.half_mut::<F>().set_endpoints(&wanted)?;
        if changes.invalidates() {
            dataplane.bump_epoch()?;
        }
        Ok(!changes.is_empty())
    }

    /// Tells, once each, what is wrong with the bridges.
    fn advise(&mut self, links: &[Link], v4: &[Address], v6: &[Address<V6>]) {
        let v4 = v4.iter().map(|a| (a.ifindex, IpNet::new(a.address.into(), a.prefix_len)));
        let global = v6.iter().filter(|a| a.scope == AddressScope::Universe);
        let v6 = global.map(|a| (a.ifindex, IpNet::new(a.address.into(), a.prefix_len)));
        let addresses: Vec<(u32, IpNet)> =
            v4.chain(v6).filter_map(|(ifindex, net)| Some((ifindex, net.ok()?))).collect();
        let addressed = |link: &Link| AddressedBridge {
            name: link.name.clone(),
            addresses: addresses
                .iter()
                .filter(|(ifindex, _)| *ifindex == link.index)
                .map(|it| it.1)
                .collect(),
            containers_mtu: ports(links, link.index).map(|port| port.mtu).max(),
        };
        let bridges: Vec<_> =
            links.iter().filter(|link| link.kind == LinkKind::Bridge).map(addressed).collect();
        let half = |network: IpNet, subnet: IpNet| Half { network, subnet };
        let v4 = self.node.v4.as_ref().map(|v4| half(v4.pool.network.into(), v4.subnet.into()));
        let v6 = self.node.v6.as_ref().map(|v6| half(v6.pool.network.into(), v6.subnet.into()));
        let lease = Lease {
            halves: v4.into_iter().chain(v6).collect(),
            mtu: self.node.pod_mtu(),
            routed_pods: links.iter().any(|link| Routed::of(link).is_some()),
        };
        let advice = bridges::advice(&lease, &bridges);
        for line in advice.iter().filter(|line| !self.advice.contains(line)) {
            tracing::warn!("{line}");
        }
        self.advice = advice;
    }

    async fn read_bridges<F: Side>(
        &self,
        links: &[Link],
        addresses: &[Address<F>],
    ) -> Result<Vec<Bridge<F>>> {
        let Some(subnet) = F::half(&self.node).map(|half| half.subnet) else { return Ok(Vec::new()) };
        let mut bridges = Vec::new();
        for link in links.iter().filter(|link| link.kind == LinkKind::Bridge) {
            let own: BTreeSet<F::Addr> =
                addresses.iter().filter(|a| a.ifindex == link.index).map(|a| a.address).collect();
            if !own.iter().any(|address| F::contains(subnet, *address)) {
                continue;
            }
            let Some(mac) = link.mac else { continue };
            let neighbours: BTreeMap<_, _> = self
                .kernel
                .neighbours_of::<F>(link.index)
                .await?
                .into_iter()
                .map(|n| (n.address, n.mac.filter(|_| n.state.is_valid())))
                .collect();
            let fdb = self.kernel.fdb(FdbOf::Bridge(link.index)).await?;
            bridges.push(Bridge {
                index: link.index,
                mac,
                addresses: own,
                ports: ports(links, link.index).map(|port| port.index).collect(),
                neighbours,
                // Permanent entries are the ports' own MACs.
                fdb: fdb.into_iter().filter(|e| !e.permanent).map(|e| (e.mac, e.ifindex)).collect(),
            });
        }
        Ok(bridges)
    }

    /// The routes to routed pods' addresses of a family, should somebody have flushed them: the veths still tell what they
    /// were.
    async fn mend_routes<F: Family>(&self, links: &[Link], routed: &[Routed]) -> Result<()> {
        let is_up = |pod: &&Routed| links.iter().any(|link| link.index == pod.port && link.up);
        let pods = routed.iter().filter(is_up);
        let mut pods = pods.filter_map(|pod| Some((pod.port, pod.addresses.get::<F>()?))).peekable();
        if pods.peek().is_none() {
            return Ok(());
        }
        let there = self.kernel.pod_routes::<F>().await?;
        for (port, address) in pods {
            let route = pod_route::<F>(address, port);
            if there.contains(&route) {
                continue;
            }
            match self.kernel.create_route(&route).await {
                Ok(()) => tracing::info!(%address, "route to a pod put back"),
                // Another veth has the address, or this one is just being made or goes: its event comes.
                Err(error) => tracing::debug!(%address, "no route to a pod: {error}"),
            }
        }
        Ok(())
    }

    /// Where our programs should run. Those that note what goes into the host stack come before those that look
    /// at what comes out, so that nothing seems to come from nowhere.
    fn hooks(&self, links: &[Link], routed: &[Routed]) -> Vec<(Hook, String)> {
        let on = |program, link: &Link| (Hook { program, ifindex: link.index }, link.name.clone());
        let pods: Vec<&Link> = links
            .iter()
            .filter(|link| {
                self.v4.has_port(link.index)
                    || self.v6.has_port(link.index)
                    || routed.iter().any(|pod| pod.port == link.index)
            })
            .collect();
        let find = |index: u32| links.iter().find(move |link| link.index == index);
        let uplink = find(self.node.uplink.ifindex);
        let overlays = [self.node.overlay(), self.node.overlay_v6()];
        let overlays = overlays.into_iter().flatten().map(|overlay| overlay.device.index);
        let tunnels = self.node.wireguard.iter().flat_map(Wireguard::tunnels).map(|it| it.device.index);
        let devices: Vec<&Link> = overlays.chain(tunnels).filter_map(find).collect();
        // What comes back from a peer may come where its way begins. Of WireGuard the uplink has what is encrypted: nothing
        // that the programs could tell.
        let ways: BTreeSet<u32> = self.v4.ways.begin().chain(self.v6.ways.begin()).collect();
        let is_wire = |link: &&Link| {
            self.node.wireguard.is_none()
                && (link.index == self.node.uplink.ifindex || ways.contains(&link.index))
        };
        let wires = links.iter().filter(is_wire);
        let others = links
            .iter()
            .filter(|link| self.may_receive(links, link) && !is_wire(link) && !pods.contains(link));
        let mut hooks = Vec::new();
        hooks.extend(devices.iter().map(|link| on(Program::FromOverlay, link)));
        hooks.extend(wires.map(|link| on(Program::FromWire, link)));
        hooks.extend(others.map(|link| on(Program::FromOther, link)));
        hooks.extend(pods.iter().map(|link| on(Program::FromPod, link)));
        hooks.extend(pods.iter().map(|link| on(Program::ToPod, link)));
        hooks.extend(devices.iter().map(|link| on(Program::ToOverlay, link)));
        // It sees every packet that leaves the node, so it runs only where it is needed.
        hooks.extend(uplink.filter(|link| self.wants_guard(link)).map(|link| on(Program::Guard, link)));
        let has_direct_peers = self.v4.has_direct_peers || self.v6.has_direct_peers;
        hooks.extend(uplink.filter(|_| has_direct_peers).map(|link| on(Program::ToWire, link)));
        hooks
    }

    /// Whether VXLAN for this node may come by this interface, besides the host's own. Ports of a bridge and the like
    /// hand all that is for the host to that.
    fn may_receive(&self, links: &[Link], link: &Link) -> bool {
        let overlays = [self.node.overlay(), self.node.overlay_v6()];
        let mut devices = overlays.iter().flatten().map(|overlay| overlay.device.index).peekable();
        let has_overlay = devices.peek().is_some();
        let is_ours = devices.any(|index| index == link.index);
        let is_bond = |kind: &str| ["bond", "team"].contains(&kind);
        let hands_over = |master: &Link| match &master.kind {
            LinkKind::Bridge => true,
            LinkKind::Other(kind) => is_bond(kind),
            LinkKind::Veth | LinkKind::Vxlan(_) | LinkKind::Physical => false,
        };
        let is_port = links.iter().any(|master| link.master == Some(master.index) && hands_over(master));
        has_overlay && !link.loopback && !is_ours && !is_port
    }

    /// Whether the guard should run on this uplink. Never by itself on a veth: XDP there takes TSO from its peer.
    fn wants_guard(&self, uplink: &Link) -> bool {
        let has_overlay = self.node.overlay().or(self.node.overlay_v6()).is_some();
        match self.node.config.xdp {
            Xdp::Off => false,
            Xdp::Auto => has_overlay && uplink.kind != LinkKind::Veth,
            Xdp::Native | Xdp::Generic => has_overlay,
        }
    }
}

/// The veths that are ports of a bridge and whose other end is in another namespace: only there can a packet be
/// delivered past the host.
fn ports(links: &[Link], bridge: u32) -> impl Iterator<Item = &Link> {
    links.iter().filter(move |link| {
        link.master == Some(bridge) && link.kind == LinkKind::Veth && link.peer_in_other_netns.is_some()
    })
}
