//! What the maps hold: compared with what they should, and read for people.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::Ipv4Addr,
};

use aya::maps::{MapData, MapError, RingBuf};
use ipnet::Ipv4Net;
use loden_ebpf::{
    abi::{Counter, Endpoint, Peer, Sighting, SightingKey, TRANSLATED, UNPROVEN, map},
    reason::Reason,
};
use tokio::io::unix::AsyncFd;

use super::{Changes, Counters, Dataplane, DataplaneError, PeerPath};

impl Dataplane {
    /// Reads the maps back: at start what an earlier agent left, later what somebody may have changed.
    ///
    /// # Errors
    ///
    /// Where a map cannot be read.
    pub fn read_back(&mut self) -> Result<(), DataplaneError> {
        self.peers_held = BTreeMap::new();
        for (slot, peer) in self.peers.iter().enumerate() {
            let peer = peer.map_err(at(map::PEERS))?;
            if peer != Peer::default() {
                self.peers_held.insert(slot as u32, peer);
            }
        }
        self.vteps_held = self.vteps.iter().collect::<Result<_, MapError>>().map_err(at(map::VTEPS))?;
        self.endpoints_held = BTreeMap::new();
        let first = u32::from(self.settings.subnet.network());
        for (offset, endpoint) in self.endpoints.iter().enumerate() {
            let endpoint = endpoint.map_err(at(map::ENDPOINTS))?;
            if endpoint != Endpoint::default() {
                self.endpoints_held.insert(Ipv4Addr::from(first + offset as u32), ungated(endpoint));
            }
        }
        Ok(())
    }

    /// Removes the slots that none of these peers covers; the others stay as they are. Returns how many went.
    ///
    /// # Errors
    ///
    /// Where the map cannot be written; what was written stays.
    pub fn retain_peers(&mut self, paths: &[PeerPath]) -> Result<usize, DataplaneError> {
        let (network, subnet_len) = (self.settings.network, self.settings.subnet_len);
        let wanted: BTreeSet<u32> =
            paths.iter().flat_map(|path| slots_of(path.subnet, network, subnet_len)).collect();
        let gone: Vec<u32> = self.peers_held.keys().filter(|slot| !wanted.contains(slot)).copied().collect();
        for slot in &gone {
            self.peers.set(*slot, Peer::default(), 0).map_err(at(map::PEERS))?;
            self.peers_held.remove(slot);
        }
        Ok(gone.len())
    }

    /// Makes these the peers. Subnets that the grid cannot hold are left to the kernel.
    ///
    /// # Errors
    ///
    /// Where a map cannot be written; what was written stays.
    pub fn set_peers(&mut self, paths: &[PeerPath]) -> Result<Changes, DataplaneError> {
        let mut wanted = BTreeMap::new();
        let mut vteps: BTreeMap<[u8; 4], u32> = BTreeMap::new();
        let mut free = self.free_peer_slots();
        for path in paths {
            *vteps.entry(path.vtep.octets()).or_default() += 1;
            let mut peer = peer(path);
            let slots = slots_of(path.subnet, self.settings.network, self.settings.subnet_len);
            let held = self.peers_held.get(&slots.start).filter(|held| is_same_node(held, &peer));
            peer.traffic = match held.map_or(0, |held| held.traffic) {
                0 if slots.is_empty() => 0,
                0 => self.new_peer_slot(&mut free)?,
                slot => slot,
            };
            wanted.extend(slots.map(|slot| (slot, peer)));
        }
        // A VTEP may send before its subnets are known to be its own, never after.
        self.set_vteps(&vteps, false)?;
        let mut changes = Changes::default();
        let gone: Vec<u32> =
            self.peers_held.keys().filter(|slot| !wanted.contains_key(slot)).copied().collect();
        for slot in gone {
            self.peers.set(slot, Peer::default(), 0).map_err(at(map::PEERS))?;
            self.peers_held.remove(&slot);
            changes.removed += 1;
        }
        for (slot, peer) in wanted {
            match self.peers_held.get(&slot) {
                Some(held) if *held == peer => continue,
                Some(_) => changes.changed += 1,
                None => changes.added += 1,
            }
            self.peers.set(slot, peer, 0).map_err(at(map::PEERS))?;
            self.peers_held.insert(slot, peer);
        }
        self.set_vteps(&vteps, true)?;
        Ok(changes)
    }

    fn set_vteps(&mut self, wanted: &BTreeMap<[u8; 4], u32>, remove: bool) -> Result<(), DataplaneError> {
        for (vtep, subnets) in wanted {
            if self.vteps_held.get(vtep) != Some(subnets) {
                self.vteps.insert(vtep, subnets, 0).map_err(at(map::VTEPS))?;
                self.vteps_held.insert(*vtep, *subnets);
            }
        }
        let stale = self.vteps_held.keys().filter(|vtep| remove && !wanted.contains_key(*vtep));
        for vtep in stale.copied().collect::<Vec<_>>() {
            match self.vteps.remove(&vtep) {
                // Somebody was quicker.
                Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {}
                removed => removed.map_err(at(map::VTEPS))?,
            }
            self.vteps_held.remove(&vtep);
        }
        Ok(())
    }

    /// Makes these the endpoints; addresses outside the own subnet are left to the kernel. What the programs
    /// found out about an endpoint stays as long as it is the same pod (interface and MAC).
    ///
    /// # Errors
    ///
    /// Where the map cannot be written; what was written stays.
    pub fn set_endpoints(
        &mut self,
        wanted: &BTreeMap<Ipv4Addr, Endpoint>,
    ) -> Result<Changes, DataplaneError> {
        let mut changes = Changes::default();
        let mut free = self.free_endpoint_slots();
        let gone: Vec<Ipv4Addr> =
            self.endpoints_held.keys().filter(|address| !wanted.contains_key(address)).copied().collect();
        for address in gone {
            self.write_endpoint(address, Endpoint::default())?;
            self.endpoints_held.remove(&address);
            changes.removed += 1;
        }
        for (address, endpoint) in wanted {
            if !self.settings.subnet.contains(address) {
                continue;
            }
            let held = self.endpoints_held.get(address).copied();
            let same_pod = held.filter(|held| (held.ifindex, held.mac) == (endpoint.ifindex, endpoint.mac));
            let mut endpoint = ungated(*endpoint);
            endpoint.traffic = match same_pod.map_or(0, |held| held.traffic) {
                0 => self.new_endpoint_slot(&mut free)?,
                slot => slot,
            };
            match held {
                Some(held) if held == endpoint => continue,
                Some(_) => changes.changed += 1,
                None => changes.added += 1,
            }
            endpoint.gated = if same_pod.is_some() { self.gated(*address)? } else { UNPROVEN };
            self.write_endpoint(*address, endpoint)?;
            self.endpoints_held.insert(*address, ungated(endpoint));
        }
        Ok(changes)
    }

    fn write_endpoint(&mut self, address: Ipv4Addr, endpoint: Endpoint) -> Result<(), DataplaneError> {
        self.endpoints.set(self.offset(address), endpoint, 0).map_err(at(map::ENDPOINTS))
    }

    fn gated(&self, address: Ipv4Addr) -> Result<u16, DataplaneError> {
        Ok(self.endpoints.get(&self.offset(address), 0).map_err(at(map::ENDPOINTS))?.gated)
    }

    /// The endpoints of which it is not known yet whether the host translates flows of them.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn unproven_endpoints(&self) -> Result<Vec<Ipv4Addr>, DataplaneError> {
        let mut unproven = Vec::new();
        for address in self.endpoints_held.keys() {
            if self.gated(*address)? == UNPROVEN {
                unproven.push(*address);
            }
        }
        Ok(unproven)
    }

    /// Notes what was found out about an endpoint.
    ///
    /// # Errors
    ///
    /// Where the map cannot be written.
    pub fn prove_endpoint(&mut self, address: Ipv4Addr, translated: bool) -> Result<(), DataplaneError> {
        let Some(held) = self.endpoints_held.get(&address) else { return Ok(()) };
        let gated = if translated { TRANSLATED } else { 0 };
        // What the programs have noted since stands: only what is not known is decided here.
        let now = self.gated(address)?;
        if now == UNPROVEN || (now == 0 && translated) {
            self.write_endpoint(address, Endpoint { gated, ..*held })?;
        }
        Ok(())
    }

    fn offset(&self, address: Ipv4Addr) -> u32 {
        u32::from(address) - u32::from(self.settings.subnet.network())
    }

    /// The endpoints as the programs see them now.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn endpoints(&self) -> Result<Vec<Endpoint>, DataplaneError> {
        let offsets = self.endpoints_held.keys().map(|address| self.offset(*address));
        offsets.map(|offset| self.endpoints.get(&offset, 0).map_err(at(map::ENDPOINTS))).collect()
    }

    /// What the endpoint map held when it was last read, without what the programs found out.
    #[must_use]
    pub fn endpoints_held(&self) -> &BTreeMap<Ipv4Addr, Endpoint> {
        &self.endpoints_held
    }

    /// Starts a new epoch: no flow is fast until it has qualified again.
    ///
    /// # Errors
    ///
    /// Where the map cannot be written.
    pub fn bump_epoch(&mut self) -> Result<(), DataplaneError> {
        let epoch = self.epoch.get(&0, 0).map_err(at(map::EPOCH))?;
        self.epoch.set(0, epoch.wrapping_add(1), 0).map_err(at(map::EPOCH))
    }

    /// Packets and bytes by reason.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn counters(&self) -> Result<Counters, DataplaneError> {
        let mut counters = Counters::new();
        for reason in Reason::ALL {
            let per_cpu = self.counters.get(&(*reason as u32), 0).map_err(at(map::COUNTERS))?;
            let sum = per_cpu.iter().fold(Counter::default(), |sum, c| Counter {
                packets: sum.packets + c.packets,
                bytes: sum.bytes + c.bytes,
            });
            counters.insert(*reason, sum);
        }
        Ok(counters)
    }

    /// What pods were seen to send from without being endpoints. Read ones are forgotten, so that the programs
    /// tell of them again if they go on.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn take_sightings(&mut self) -> Result<Vec<(SightingKey, Sighting)>, DataplaneError> {
        let seen: Vec<_> = self.sightings.iter().collect::<Result<_, _>>().map_err(at(map::SIGHTINGS))?;
        for (key, _) in &seen {
            // The program may have evicted it meanwhile.
            let _ = self.sightings.remove(key);
        }
        Ok(seen)
    }

    /// The ring buffer that tells of new sightings; once. Must be called inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// Where the kernel cannot wait for it.
    pub fn take_new_sightings(&mut self) -> io::Result<Option<AsyncFd<RingBuf<MapData>>>> {
        let Some(ring) = self.new_sightings.take() else { return Ok(None) };
        // SAFETY: the ring buffer owns its descriptor and never closes or exchanges it while it lives, and
        // AsyncFd owns the ring buffer.
        Ok(Some(unsafe { AsyncFd::register(ring) }?))
    }
}

pub(super) fn at(map: &'static str) -> impl FnOnce(MapError) -> DataplaneError {
    move |source| DataplaneError::Map { map, source }
}

fn ungated(endpoint: Endpoint) -> Endpoint {
    Endpoint { gated: 0, ..endpoint }
}

fn peer(path: &PeerPath) -> Peer {
    let mut peer = Peer {
        vtep: path.vtep.octets(),
        vtep_mac: path.vtep_mac,
        subnet: path.subnet.network().octets(),
        prefix_len: path.subnet.prefix_len(),
        direct: u8::from(path.direct),
        ..Peer::default()
    };
    if let Some(underlay) = path.underlay {
        peer.source = underlay.source.octets();
        peer.next_hop = underlay.next_hop.octets();
        peer.uplink = underlay.uplink;
        peer.mtu = underlay.mtu;
    }
    peer
}

/// Whether the same node has the same subnet as before, so that its counters go on.
fn is_same_node(held: &Peer, peer: &Peer) -> bool {
    (held.subnet, held.prefix_len, held.vtep) == (peer.subnet, peer.prefix_len, peer.vtep)
}

/// The slots of the grid that a subnet covers: one, several for a larger subnet, none for a smaller one or one
/// outside the network.
fn slots_of(subnet: Ipv4Net, network: Ipv4Net, subnet_len: u8) -> std::ops::Range<u32> {
    if subnet.prefix_len() > subnet_len || !network.contains(&subnet) {
        return 0..0;
    }
    let shift = 32 - subnet_len;
    let first = (u32::from(subnet.network()) - u32::from(network.network())) >> shift;
    first..first + (1u32 << (subnet_len - subnet.prefix_len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subnet_covers_the_slots_of_its_size() {
        let slots = |subnet: &str| slots_of(subnet.parse().unwrap(), "10.5.0.0/16".parse().unwrap(), 24);
        assert_eq!(slots("10.5.34.0/24"), 34..35);
        assert_eq!(slots("10.5.32.0/22"), 32..36);
        assert_eq!(slots("10.5.34.0/26"), 0..0, "smaller than a slot");
        assert_eq!(slots("10.6.34.0/24"), 0..0, "outside");
        assert_eq!(slots("10.5.0.0/16"), 0..256);
    }
}
