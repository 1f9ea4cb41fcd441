//! The containers: reads the bridges, finds the endpoints, keeps hooks and map in step with them.

use std::{collections::BTreeMap, net::Ipv4Addr};

use anyhow::Result;

use super::{Reconciler, Work};
use crate::{
    config::Xdp,
    dataplane::{Hook, Program},
    endpoints::{self, Bridge, Seen},
    kernel::{Address, FdbOf, Link, LinkKind},
};

impl Reconciler {
    /// One look at all containers; says whether anything changed.
    pub(super) async fn containers(&mut self) -> Result<bool> {
        let links = self.kernel.links().await?;
        let addresses = self.kernel.addresses().await?;
        self.bridges = self.read_bridges(&links, &addresses).await?;
        let hooks = self.hooks(&links);
        let subnet = self.node.subnet;
        let Some(dataplane) = self.dataplane() else { return Ok(false) };
        let seen: Vec<Seen> = dataplane
            .take_sightings()?
            .iter()
            .map(|(key, sighting)| Seen {
                port: key.ifindex,
                address: Ipv4Addr::from(key.address),
                mac: sighting.mac,
            })
            .collect();
        self.endpoints = endpoints::discover(subnet, &self.bridges, &seen, &self.endpoints);
        let wanted = self.endpoints.clone();
        let Some(dataplane) = self.dataplane() else { return Ok(false) };
        let changes = dataplane.set_endpoints(&wanted)?;
        if changes.invalidates() {
            dataplane.bump_epoch()?;
        }
        if !self.maps_know_peers {
            return Ok(!changes.is_empty());
        }
        // After the maps, so that programs with new maps go on where those before them are. What a new endpoint may
        // skip is found out when its hooks see what it does.
        let Some(dataplane) = self.dataplane() else { return Ok(false) };
        let errors = dataplane.set_hooks(&hooks);
        self.prove_endpoints()?;
        self.fail(Work::Containers, errors.iter().map(|error| format!("hooks: {error}")));
        Ok(!changes.is_empty())
    }

    async fn read_bridges(&self, links: &[Link], addresses: &[Address]) -> Result<Vec<Bridge>> {
        let mut bridges = Vec::new();
        for link in links.iter().filter(|link| link.kind == LinkKind::Bridge) {
            let own: Vec<Ipv4Addr> =
                addresses.iter().filter(|a| a.ifindex == link.index).map(|a| a.address).collect();
            if !own.iter().any(|address| self.node.subnet.contains(address)) {
                continue;
            }
            let Some(mac) = link.mac else { continue };
            let neighbours: BTreeMap<_, _> = self
                .kernel
                .neighbours(link.index)
                .await?
                .into_iter()
                .map(|n| (n.address, n.mac.filter(|_| n.state.is_valid())))
                .collect();
            let fdb = self.kernel.fdb(FdbOf::Bridge(link.index)).await?;
            bridges.push(Bridge {
                mac,
                addresses: own.into_iter().collect(),
                ports: ports(links, link.index).map(|port| port.index).collect(),
                neighbours,
                // Permanent entries are the ports' own MACs.
                fdb: fdb.into_iter().filter(|e| !e.permanent).map(|e| (e.mac, e.ifindex)).collect(),
            });
        }
        Ok(bridges)
    }

    /// Where our programs should run. Those that note what goes into the host stack come before those that look
    /// at what comes out, so that nothing seems to come from nowhere.
    fn hooks(&self, links: &[Link]) -> Vec<(Hook, String)> {
        let on = |program, link: &Link| (Hook { program, ifindex: link.index }, link.name.clone());
        let pods: Vec<&Link> = links
            .iter()
            .filter(|link| self.bridges.iter().any(|bridge| bridge.ports.contains(&link.index)))
            .collect();
        let find = |index: u32| links.iter().find(move |link| link.index == index);
        let uplink = find(self.node.uplink.ifindex);
        let device = find(self.node.device());
        let mut hooks = Vec::new();
        hooks.extend(device.map(|link| on(Program::FromOverlay, link)));
        hooks.extend(uplink.map(|link| on(Program::FromWire, link)));
        hooks.extend(pods.iter().map(|link| on(Program::FromPod, link)));
        hooks.extend(pods.iter().map(|link| on(Program::ToPod, link)));
        hooks.extend(device.map(|link| on(Program::ToOverlay, link)));
        // It sees every packet that leaves the node, so it runs only where it is needed.
        hooks.extend(uplink.filter(|link| self.wants_guard(link)).map(|link| on(Program::Guard, link)));
        hooks.extend(uplink.filter(|_| self.has_direct_peers).map(|link| on(Program::ToWire, link)));
        hooks
    }

    /// Whether the guard should run on this uplink. Never by itself on a veth: XDP there takes TSO from its peer.
    fn wants_guard(&self, uplink: &Link) -> bool {
        match self.node.config.xdp {
            Xdp::Off => false,
            Xdp::Auto => self.node.overlay.is_some() && uplink.kind != LinkKind::Veth,
            Xdp::Native | Xdp::Generic => self.node.overlay.is_some(),
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
