//! One pass: read what is, change what differs, note what failed and go on.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result};
use tokio::time::Instant;

use super::{FACTS_SETTLE, NodeV6, Path, Reconciler, Work, firewall_spec, settings};
use crate::{
    dataplane::PeerPath,
    family::V4,
    host,
    kernel::{VxlanSpec, sysctl},
    network::Backend,
    overlay::{self, Desired, Expected, OverlayPeer, Plan, Refusal},
    registry::{Cluster, Own},
    run,
    subnet_file::SubnetFile,
    uplink::Uplink,
};

impl Reconciler {
    /// Brings the node to what it should be, as far as `work` reaches. Failures are kept for the status and make
    /// the loop come back.
    pub(super) async fn pass(&mut self, work: Work) {
        let cluster = self.cluster();
        let start = std::time::Instant::now();
        let earlier = self.failures.clone();
        let mut changed = false;
        let another_subnet = self.follow_subnet(&cluster) | self.follow_ipv6_subnet(&cluster);
        let work = if another_subnet { Work::Everything } else { work };
        if work == Work::Everything {
            changed |= self.step(Work::Everything, "node", Self::node).await;
            changed |= self.substep(Work::Everything, "IPv6", Self::node_v6).await;
        }
        if work >= Work::Peers {
            let peers = async |this: &mut Self| this.peers(&cluster, work).await;
            changed |= self.step(Work::Overlay, "peers", peers).await;
            let peers = async |this: &mut Self| this.peers_v6(&cluster).await;
            changed |= self.substep(Work::Overlay, "IPv6 peers", peers).await;
        }
        changed |= self.step(Work::Containers, "containers", Self::containers).await;
        self.tally.ran(start.elapsed(), !self.failures.is_empty());
        self.repairs += u64::from(changed);
        for (part, failures) in &self.failures {
            let known = earlier.get(part);
            for failure in
                failures.iter().filter(|failure| !known.is_some_and(|known| known.contains(failure)))
            {
                tracing::warn!("{failure}");
            }
        }
        self.say_what_is_ready(&cluster);
        match work {
            Work::Everything => self.leave_facts(),
            Work::Peers | Work::Overlay => {
                self.facts_due.get_or_insert_with(|| Instant::now() + FACTS_SETTLE);
            }
            Work::Containers => {}
        }
    }

    fn say_what_is_ready(&self, cluster: &Cluster) {
        let lease = match &cluster.own {
            Own::Held(_) => Ok(()),
            Own::Lost { subnet, reason } => Err(format!("{subnet} is lost: {reason}")),
        };
        self.readiness.set(run::LEASE, lease);
        let peers = if cluster.is_listed() { Ok(()) } else { Err("not listed yet".to_owned()) };
        self.readiness.set(run::PEERS, peers);
        let failures: Vec<&str> = self.failures.values().flatten().map(String::as_str).collect();
        let clean = if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) };
        self.readiness.set(run::DATAPATH, clean);
    }

    /// Runs one part; says whether it changed anything. Its failures take the place of those that it had last time;
    /// those of parts that this pass leaves out stay, as nobody has looked again.
    async fn step(
        &mut self,
        part: Work,
        what: &str,
        run: impl AsyncFnOnce(&mut Self) -> Result<bool>,
    ) -> bool {
        self.failures.remove(&part);
        self.substep(part, what, run).await
    }

    /// Runs a further piece of a part.
    async fn substep(
        &mut self,
        part: Work,
        what: &str,
        run: impl AsyncFnOnce(&mut Self) -> Result<bool>,
    ) -> bool {
        match run(self).await {
            Ok(changed) => {
                if changed {
                    *self.tally.repairs.entry(what.to_owned()).or_default() += 1;
                }
                changed
            }
            Err(error) => {
                self.fail(part, [format!("{what}: {error:#}")]);
                true
            }
        }
    }

    /// Notes what a part of the pass could not do.
    pub(super) fn fail(&mut self, part: Work, failures: impl IntoIterator<Item = String>) {
        let mut failures = failures.into_iter().peekable();
        if failures.peek().is_some() {
            self.failures.entry(part).or_default().extend(failures);
        }
    }

    /// Takes the subnet from the lease; says whether it is another than before.
    fn follow_subnet(&mut self, cluster: &Cluster) -> bool {
        match &cluster.own {
            Own::Held(lease) if lease.subnet != self.node.subnet => {
                tracing::error!(
                    from = %self.node.subnet, to = %lease.subnet,
                    "this node has another subnet now: its containers must be started anew to be reached"
                );
                self.node.subnet = lease.subnet;
                true
            }
            Own::Held(_) | Own::Lost { .. } => false,
        }
    }

    /// The node itself: sysctls, device, address, rules, programs, subnet.env.
    async fn node(&mut self) -> Result<bool> {
        let mut changed = self.set_sysctls()?;
        changed |= self.follow_uplink().await?;
        changed |= self.device().await?;
        self.tell_of_prefixes().await?;
        self.firewall.set_spec(firewall_spec(&self.node));
        let rules = self.firewall.ensure().await;
        changed |= self.reload()?;
        if let Some(dataplane) = self.dataplane() {
            dataplane.read_back()?;
            changed |= dataplane.check_hooks() > 0;
        }
        self.write_subnet_file()?;
        // Last, because pods reach one another without rules of ours on most hosts.
        changed |= rules.context("firewall")?;
        Ok(changed)
    }

    /// The uplink by the same rules as at the start: its address, MTU or the default route may have changed.
    async fn follow_uplink(&mut self) -> Result<bool> {
        let uplink = match host::choose_uplink(&self.kernel, &self.node.config, self.node.v6.is_some()).await
        {
            Ok(uplink) => uplink,
            // The default route may be gone for a while; what it led to is still our way to the peers.
            Err(_) if self.has_uplink().await? => return Ok(false),
            Err(error) => return Err(error.context("uplink")),
        };
        if uplink == self.node.uplink {
            return Ok(false);
        }
        tracing::warn!(
            was = %self.node.uplink, now = %uplink, "the uplink has changed and is followed"
        );
        if let Some(overlay) = &mut self.node.overlay {
            overlay.spec = run::vxlan_spec(&overlay.vxlan, &uplink)?;
        }
        if let Some(NodeV6 { overlay: Some(overlay), .. }) = &mut self.node.v6 {
            overlay.spec = run::vxlan_spec_v6(&overlay.vxlan, &uplink)?;
        }
        let addresses = |uplink: &Uplink| (uplink.public_ip, uplink.public_ipv6);
        let new_address = addresses(&uplink) != addresses(&self.node.uplink);
        self.node.uplink = uplink;
        self.ways.clear();
        if new_address {
            self.publish();
        }
        Ok(true)
    }

    /// Whether the uplink still is an interface that has the address.
    async fn has_uplink(&self) -> Result<bool> {
        let uplink = &self.node.uplink;
        let addresses = self.kernel.addresses().await?;
        Ok(addresses.iter().any(|a| a.ifindex == uplink.ifindex && a.address == uplink.address))
    }

    /// Keeps the lease's keeper informed of what a new subnet, should one be needed, must keep away from.
    async fn tell_of_prefixes(&mut self) -> Result<()> {
        let prefixes = host::prefixes(&self.kernel, self.node.overlay.as_ref()).await?;
        let v6 = match &self.node.v6 {
            Some(v6) => host::prefixes(&self.kernel, v6.overlay.as_ref()).await?,
            None => host::Prefixes::default(),
        };
        if prefixes != self.prefixes || v6 != self.v6.prefixes {
            let of_v6 = (v6.others.clone(), v6.bridges.clone());
            self.keeper.set_occupied(prefixes.others.clone(), prefixes.bridges.clone(), of_v6);
            (self.prefixes, self.v6.prefixes) = (prefixes, v6);
        }
        Ok(())
    }

    /// Tells the other nodes where and what we are now.
    pub(super) fn publish(&self) {
        let node = &self.node;
        let overlay_v6 = node.v6.as_ref().and_then(|v6| v6.overlay.as_ref());
        let backend = &node.network.backend;
        self.keeper.set_attrs(run::attrs(backend, &node.uplink, node.overlay.as_ref(), overlay_v6));
    }

    /// The VXLAN device and its address, where the backend has one.
    async fn device(&mut self) -> Result<bool> {
        let Some(overlay) = &mut self.node.overlay else { return Ok(false) };
        let spec = VxlanSpec { mac: Some(overlay.device.mac), ..overlay.spec.clone() };
        let device = self.kernel.ensure_vxlan(&spec).await?;
        let new_mac = device.mac != overlay.device.mac;
        let mut changed = !device.adopted || !device.corrected.is_empty();
        overlay.device = device;
        if new_mac {
            self.publish();
        }
        let (index, subnet, network) = (self.node.device(), self.node.subnet, self.node.network.network);
        changed |= !self.kernel.has_overlay_address::<V4>(index, subnet, network).await?;
        self.kernel.set_overlay_address::<V4>(index, subnet, network).await?;
        Ok(changed)
    }

    /// Loads the programs anew where a constant of theirs has changed. They take over at once, or, where they need
    /// maps of another size, when this pass has filled those.
    fn reload(&mut self) -> Result<bool> {
        let wanted = settings(&self.node)?;
        let Path::Ebpf(dataplane) = &mut self.path else { return Ok(false) };
        if *dataplane.settings() == wanted {
            return Ok(false);
        }
        if self.maps_know_peers && wanted.fits_maps_of(dataplane.settings()) {
            let errors = dataplane.exchange(&wanted)?;
            self.fail(Work::Everything, errors.iter().map(|error| format!("hooks: {error}")));
        } else {
            self.path = Path::Ebpf(Box::new(super::load(&self.node, &wanted)?));
            self.maps_know_peers = false;
        }
        self.listen_for_sightings()?;
        Ok(true)
    }

    fn write_subnet_file(&self) -> Result<()> {
        let file = SubnetFile {
            network: self.node.network.network,
            subnet: self.node.subnet,
            v6: self.node.v6.as_ref().map(|v6| (v6.pool.network, v6.subnet)),
            mtu: u16::try_from(self.node.pod_mtu()).unwrap_or(u16::MAX),
            ip_masq: self.node.config.ip_masq,
        };
        file.write(&self.node.config.subnet_file)?;
        Ok(())
    }

    /// The peers: first off the fast path, then in the kernel, then on the fast path, so that the fast path never
    /// knows a peer that the kernel does not.
    async fn peers(&mut self, cluster: &Cluster, work: Work) -> Result<bool> {
        if self.node.network.backend == Backend::Alloc {
            // It leaves the routes to somebody else, and nothing comes from a peer.
            self.maps_know_peers = true;
            return Ok(false);
        }
        if !cluster.is_listed() {
            // Not known yet is not none: what is programmed stays.
            return Ok(false);
        }
        let mut peers = BTreeMap::new();
        let mut paths: Vec<PeerPath> = Vec::new();
        let mut refused = BTreeSet::new();
        self.find_ways(cluster.peers.values().map(|lease| lease.attrs.public_ip)).await;
        for lease in cluster.peers.values() {
            if let Some(address) = self.prefixes.address_in(lease.subnet) {
                // Its route would cut this host off from its own network, or from its own containers.
                refused.insert(format!("peer {} is left out: this host has {address}", lease.subnet));
                continue;
            }
            if let Some((peer, path)) = self.paths(lease) {
                peers.insert(lease.subnet, peer);
                paths.push(path);
            }
        }
        self.has_direct_peers = paths.iter().any(|path| path.direct);
        let gone = match self.dataplane() {
            Some(dataplane) => dataplane.retain_peers(&paths)?,
            None => 0,
        };
        let mut changed = gone > 0;
        let desired = Desired {
            network: self.node.network.network,
            own: self.node.subnet,
            device: self.node.device(),
            uplink: self.node.uplink.ifindex,
            peers,
        };
        let actual = match &self.expected {
            // Whatever contradicts it, the kernel tells, and asks for more than this.
            Some(expected) if self.programmed && work == Work::Peers => expected.actual(),
            _ => self.kernel.overlay_actual(desired.device).await?,
        };
        let plan = overlay::plan(&desired, &actual);
        changed |= !plan.is_empty();
        self.tell_of_refused(&plan, refused);
        let errors = self.kernel.apply(&plan).await;
        self.programmed = errors.is_empty();
        self.fail(Work::Overlay, errors.iter().map(ToString::to_string));
        self.expected = Some(Expected::of(desired));
        if let Some(dataplane) = self.dataplane() {
            let changes = dataplane.set_peers(&paths)?;
            if gone > 0 || changes.invalidates() {
                dataplane.bump_epoch()?;
            }
            changed |= !changes.is_empty();
            self.maps_know_peers = true;
        }
        Ok(changed)
    }

    /// One wrong lease is one peer's trouble: told once, and no reason for this node to be unready.
    fn tell_of_refused(&mut self, plan: &Plan, mut refused: BTreeSet<String>) {
        let by_plan = |(peer, refusal): &(OverlayPeer, Refusal)| {
            format!("peer {} at {} is left out: {refusal}", peer.subnet, peer.vtep)
        };
        refused.extend(plan.refused.iter().map(by_plan));
        for reason in refused.difference(&self.refused) {
            tracing::warn!("{reason}");
        }
        self.refused = refused;
    }

    /// Forwarding for pods at all, and tolerance of connections whose middle the host stack has not seen.
    fn set_sysctls(&mut self) -> Result<bool> {
        let mut changed = self.set_sysctl("net.ipv4.ip_forward", "1")?;
        // Missing where no connection is tracked: then nothing can be out of window either. The second (Linux 5.14)
        // is about a RST more than 2^31 bytes behind what the host stack saw last, which liberal does not forgive.
        for tolerance in ["nf_conntrack_tcp_be_liberal", "nf_conntrack_tcp_ignore_invalid_rst"] {
            let name = format!("net.netfilter.{tolerance}");
            if matches!(self.path, Path::Ebpf(_)) && sysctl::get(&name).is_ok() {
                changed |= self.set_sysctl(&name, "1")?;
            }
        }
        Ok(changed)
    }

    pub(super) fn set_sysctl(&mut self, name: &str, value: &str) -> Result<bool> {
        let before = sysctl::get(name)?;
        if before.trim() == value {
            return Ok(false);
        }
        // Noted before it is changed: a crash in between loses nothing.
        self.state.note_sysctl(name, before.trim());
        self.state.write(&self.node.config.run_dir)?;
        sysctl::set(name, value)?;
        tracing::info!("{name} set to {value}, was {}", before.trim());
        Ok(true)
    }
}
