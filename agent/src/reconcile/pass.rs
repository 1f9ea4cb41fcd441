//! One pass: read what is, change what differs, note what failed and go on.

use anyhow::Result;

use super::{Path, Reconciler, Work, settings};
use crate::{
    family::{V4, V6},
    host,
    kernel::sysctl,
    registry::{Cluster, Own},
    run,
    subnet_file::SubnetFile,
    uplink::{Families, Uplink},
};

impl Reconciler {
    /// Brings the node to what it should be, as far as `work` reaches. Failures are kept for the status and make
    /// the loop come back.
    pub(super) async fn pass(&mut self, work: Work) {
        let cluster = self.cluster();
        let start = std::time::Instant::now();
        let earlier = self.failures.clone();
        let mut changed = false;
        let another_subnet = self.follow_subnet::<V4>(&cluster) | self.follow_subnet::<V6>(&cluster);
        let work = if another_subnet { Work::Everything } else { work };
        if work == Work::Everything {
            self.read_policies();
            changed |= self.step(Work::Everything, "uplink", Self::follow_uplink).await;
            changed |= self.substep(Work::Everything, "WireGuard", Self::wireguard_devices).await;
            changed |= self.substep(Work::Everything, "IPv4", Self::bring_up::<V4>).await;
            changed |= self.substep(Work::Everything, "IPv6", Self::bring_up::<V6>).await;
            let programs = async |this: &mut Self| this.programs();
            changed |= self.substep(Work::Everything, "programs", programs).await;
            changed |= self.substep(Work::Everything, "withdrawal", Self::withdraw::<V4>).await;
            changed |= self.substep(Work::Everything, "withdrawal", Self::withdraw::<V6>).await;
            changed |= self.substep(Work::Everything, "node", Self::tell).await;
        }
        if work >= Work::Peers {
            changed |= self.all_peers(&cluster, work).await;
        }
        if work >= Work::Peers && cluster.is_listed() {
            // Last, so that the peers' routes lead elsewhere before.
            changed |= self.substep(Work::Everything, "withdrawal", Self::withdraw_devices).await;
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
                self.leave_facts_later();
            }
            Work::Containers => {}
        }
    }

    async fn all_peers(&mut self, cluster: &Cluster, work: Work) -> bool {
        if self.node.wireguard.is_some() {
            // They have both halves.
            let peers = async |this: &mut Self| this.wireguard_peers(cluster, work).await;
            return self.step(Work::Overlay, "peers", peers).await;
        }
        let peers = async |this: &mut Self| this.peers::<V4>(cluster, work).await;
        let changed = self.step(Work::Overlay, "peers", peers).await;
        let peers = async |this: &mut Self| this.peers::<V6>(cluster, work).await;
        self.substep(Work::Overlay, "IPv6 peers", peers).await | changed
    }

    fn say_what_is_ready(&self, cluster: &Cluster) {
        let lease = match &cluster.own {
            Own::Held(_) => Ok(()),
            Own::Lost { key, reason } => Err(format!("{} is lost: {reason}", key.subnets())),
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

    /// The programs, their maps and hooks, and tolerance of connections whose middle the host stack has not seen.
    fn programs(&mut self) -> Result<bool> {
        let mut changed = self.tolerate()? | self.reload()?;
        if let Some(dataplane) = self.dataplane() {
            dataplane.read_back()?;
            changed |= dataplane.check_hooks() > 0;
        }
        Ok(changed)
    }

    /// The uplink by the same rules as at the start: its address, MTU or the default route may have changed.
    async fn follow_uplink(&mut self) -> Result<bool> {
        let families = self.node.network.families();
        match host::choose_uplink(&self.kernel, &self.node.config, families).await {
            Ok(uplink) => self.take_uplink(uplink),
            // The default route may be gone for a while; what it led to is still our way to the peers.
            Err(_) if self.has_uplink().await? => Ok(false),
            Err(error) => {
                if let Some(uplink) = self.half_an_uplink(families).await {
                    self.take_uplink(uplink)?;
                }
                Err(error)
            }
        }
    }

    /// The uplink as far as one family can be followed, where the other has lost its address.
    async fn half_an_uplink(&self, families: Families) -> Option<Uplink> {
        let was = &self.node.uplink;
        for only in [Families { v6: false, ..families }, Families { v4: false, ..families }] {
            if only == families {
                continue;
            }
            let found = host::choose_uplink(&self.kernel, &self.node.config, only).await;
            if let Some(found) = found.ok().filter(|found| found.ifindex == was.ifindex) {
                return Some(Uplink {
                    mtu: found.mtu,
                    address: found.address.or(was.address),
                    public_ip: found.public_ip.or(was.public_ip),
                    address_v6: found.address_v6.or(was.address_v6),
                    public_ipv6: found.public_ipv6.or(was.public_ipv6),
                    ..was.clone()
                });
            }
        }
        None
    }

    fn take_uplink(&mut self, uplink: Uplink) -> Result<bool> {
        if uplink == self.node.uplink {
            return Ok(false);
        }
        tracing::warn!(
            was = %self.node.uplink, now = %uplink, "the uplink has changed and is followed"
        );
        self.follow_spec::<V4>(&uplink)?;
        self.follow_spec::<V6>(&uplink)?;
        if let Some(wireguard) = &mut self.node.wireguard {
            wireguard.follow(&uplink, self.node.network.families())?;
        }
        let addresses = |uplink: &Uplink| (uplink.public_ip, uplink.public_ipv6);
        let new_address = addresses(&uplink) != addresses(&self.node.uplink);
        self.node.uplink = uplink;
        self.v4.forget_ways();
        self.v6.forget_ways();
        if new_address {
            self.publish();
        }
        Ok(true)
    }

    /// Whether the uplink still is an interface that has its addresses.
    async fn has_uplink(&self) -> Result<bool> {
        let uplink = &self.node.uplink;
        let v4 = match uplink.address {
            Some(own) => {
                self.kernel.addresses().await?.iter().any(|a| a.ifindex == uplink.ifindex && a.address == own)
            }
            None => true,
        };
        let v6 = match uplink.address_v6 {
            Some(own) => {
                let addresses = self.kernel.addresses_of::<V6>().await?;
                addresses.iter().any(|a| a.ifindex == uplink.ifindex && a.address == own)
            }
            None => true,
        };
        Ok(v4 && v6)
    }

    /// What the node tells of itself when its halves are as they should be: subnet.env, and to the lease's keeper, what a
    /// new subnet, should one be needed, must keep away from.
    async fn tell(&mut self) -> Result<bool> {
        self.tell_of_prefixes().await?;
        self.write_subnet_file()?;
        Ok(false)
    }

    async fn tell_of_prefixes(&mut self) -> Result<()> {
        let links = self.kernel.links().await?;
        let v4 = match &self.node.v4 {
            Some(_) => host::prefixes(&self.kernel, &links).await?,
            None => host::Prefixes::default(),
        };
        let v6 = match &self.node.v6 {
            Some(_) => host::prefixes(&self.kernel, &links).await?,
            None => host::Prefixes::default(),
        };
        if v4 != self.v4.prefixes || v6 != self.v6.prefixes {
            let of_v6 = (v6.others.clone(), v6.bridges.clone());
            self.keeper.set_occupied(v4.others.clone(), v4.bridges.clone(), of_v6);
            (self.v4.prefixes, self.v6.prefixes) = (v4, v6);
        }
        Ok(())
    }

    /// Tells the other nodes where and what we are now.
    pub(super) fn publish(&self) {
        let node = &self.node;
        let backend = &node.network.backend;
        let attrs = run::attrs(backend, &node.uplink, node.overlay(), node.overlay_v6());
        self.keeper.set_attrs(match &node.wireguard {
            Some(wireguard) => wireguard.complete(attrs),
            None => attrs,
        });
    }

    /// Loads the programs anew where a constant of theirs has changed. They take over at once, or, where they need
    /// maps of another size, when this pass has filled those.
    fn reload(&mut self) -> Result<bool> {
        if matches!(self.path, Path::Kernel(_)) {
            return Ok(false);
        }
        let wanted = settings(&self.node)?;
        let maps_know_peers = self.maps_know_peers();
        let Path::Ebpf(dataplane) = &mut self.path else { return Ok(false) };
        if *dataplane.settings() == wanted {
            return Ok(false);
        }
        if maps_know_peers && wanted.fits_maps_of(dataplane.settings()) {
            let errors = dataplane.exchange(&wanted)?;
            self.fail(Work::Everything, errors.iter().map(|error| format!("hooks: {error}")));
        } else {
            self.path = Path::Ebpf(Box::new(super::load(&self.node, &wanted)?));
            self.v4.maps_know_peers = false;
            self.v6.maps_know_peers = false;
        }
        self.listen_to_programs()?;
        Ok(true)
    }

    fn write_subnet_file(&self) -> Result<()> {
        let file = SubnetFile {
            v4: self.node.v4.as_ref().map(|v4| (v4.pool.network, v4.subnet)),
            v6: self.node.v6.as_ref().map(|v6| (v6.pool.network, v6.subnet)),
            mtu: u16::try_from(self.node.pod_mtu()).unwrap_or(u16::MAX),
            ip_masq: self.node.config.ip_masq,
        };
        file.write(&self.node.config.subnet_file)?;
        Ok(())
    }

    /// Of connections whose middle the host stack has not seen.
    fn tolerate(&mut self) -> Result<bool> {
        let mut changed = false;
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
