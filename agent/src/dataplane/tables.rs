//! What the maps hold: compared with what they should, and read for people.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    ops::Range,
};

use anyhow::Context as _;
use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData, MapError, PerCpuArray, RingBuf},
};
use loden_ebpf::{
    abi::{
        Counter, Endpoint, EndpointTraffic, Flow, FlowKey, Peer, Sighting, TRANSLATED, Traffic, UNPROVEN,
        map, way,
    },
    reason::Reason,
};
use tokio::io::unix::AsyncFd;

use super::{
    Changes, Counters, Dataplane, DataplaneError, FamilySettings, Mapped, PeerPath, Settings, Way,
    batch::Batches, traffic::Free,
};

/// One family's maps, and what they hold.
pub struct Tables<F: Mapped> {
    pub(super) settings: Option<FamilySettings<F>>,
    pub(super) peers: Array<MapData, Peer<F::Octets>>,
    pub(super) vteps: HashMap<MapData, F::AddressKey, u32>,
    pub(super) endpoints: F::Endpoints,
    pub(super) flows: HashMap<MapData, FlowKey<F::Octets>, Flow>,
    pub(super) peer_traffic: PerCpuArray<MapData, Traffic>,
    pub(super) endpoint_traffic: PerCpuArray<MapData, EndpointTraffic>,
    sightings: HashMap<MapData, F::SightingKey, Sighting>,
    pub(super) peer_traffic_at_once: Batches<u32, Traffic>,
    pub(super) endpoint_traffic_at_once: Batches<u32, EndpointTraffic>,
    peers_at_once: Batches<u32, Peer<F::Octets>>,
    endpoints_at_once: Batches<F::EndpointKey, Endpoint<F::Octets>>,
    pub(super) flows_at_once: Batches<FlowKey<F::Octets>, Flow>,
    /// What the peers' map holds, by slot; read back from the map at start and on each tick.
    pub(super) peers_held: BTreeMap<u32, Peer<F::Octets>>,
    /// What the VTEPs' map holds.
    pub(super) vteps_held: BTreeMap<F::AddressKey, u32>,
    /// What the endpoints' map holds, by address, without the programs' own field.
    pub(super) endpoints_held: BTreeMap<F::Addr, Endpoint<F::Octets>>,
}

impl<F: Mapped> Tables<F> {
    /// Takes the maps out of a loaded object.
    pub(super) fn take(ebpf: &mut Ebpf, settings: &Settings) -> Result<Self, DataplaneError> {
        let mut take = |name: &'static str| {
            ebpf.take_map(name)
                .with_context(|| format!("the object has no map {name}"))
                .map_err(DataplaneError::Load)
        };
        let names = F::NAMES;
        let (peers, endpoints, flows) = (take(names.peers)?, take(names.endpoints)?, take(names.flows)?);
        let (of_peers, of_endpoints) = (take(names.peer_traffic)?, take(names.endpoint_traffic)?);
        Ok(Self {
            settings: F::of(settings).cloned(),
            peer_traffic_at_once: Batches::of(&of_peers).map_err(at(names.peer_traffic))?,
            endpoint_traffic_at_once: Batches::of(&of_endpoints).map_err(at(names.endpoint_traffic))?,
            peers_at_once: Batches::of(&peers).map_err(at(names.peers))?,
            endpoints_at_once: Batches::of(&endpoints).map_err(at(names.endpoints))?,
            flows_at_once: Batches::of(&flows).map_err(at(names.flows))?,
            peers: Array::try_from(peers).map_err(at(names.peers))?,
            vteps: HashMap::try_from(take(names.vteps)?).map_err(at(names.vteps))?,
            endpoints: F::open_endpoints(endpoints).map_err(at(names.endpoints))?,
            flows: HashMap::try_from(flows).map_err(at(names.flows))?,
            peer_traffic: PerCpuArray::try_from(of_peers).map_err(at(names.peer_traffic))?,
            endpoint_traffic: PerCpuArray::try_from(of_endpoints).map_err(at(names.endpoint_traffic))?,
            sightings: HashMap::try_from(take(names.sightings)?).map_err(at(names.sightings))?,
            peers_held: BTreeMap::new(),
            vteps_held: BTreeMap::new(),
            endpoints_held: BTreeMap::new(),
        })
    }

    /// Reads the maps back: at start what an earlier agent left, later what somebody may have changed.
    pub(super) fn read_back(&mut self) -> Result<(), DataplaneError> {
        let peers =
            self.peers_at_once.filter_map(|slot, peer| (peer != Peer::default()).then_some((slot, peer)));
        self.peers_held = peers.map_err(at(F::NAMES.peers))?.into_iter().collect();
        self.vteps_held = self.vteps.iter().collect::<Result<_, MapError>>().map_err(at(F::NAMES.vteps))?;
        let endpoints = self
            .endpoints_at_once
            .filter_map(|_, e| (e != Endpoint::default()).then(|| (F::of_octets(e.address), ungated(e))));
        self.endpoints_held = endpoints.map_err(at(F::NAMES.endpoints))?.into_iter().collect();
        Ok(())
    }

    /// Removes the slots that none of these peers covers; the others stay as they are. Returns how many went.
    ///
    /// # Errors
    ///
    /// Where the map cannot be written; what was written stays.
    pub fn retain_peers(&mut self, paths: &[PeerPath<F>]) -> Result<usize, DataplaneError> {
        let wanted: BTreeSet<u32> = paths.iter().flat_map(|path| self.slots_of(path.subnet)).collect();
        let gone: Vec<u32> = self.peers_held.keys().filter(|slot| !wanted.contains(slot)).copied().collect();
        for slot in &gone {
            self.clear_peer(*slot)?;
        }
        Ok(gone.len())
    }

    /// Makes these the peers. Subnets that the grid cannot hold are left to the kernel.
    ///
    /// # Errors
    ///
    /// Where a map cannot be written; what was written stays.
    pub fn set_peers(&mut self, paths: &[PeerPath<F>]) -> Result<Changes, DataplaneError> {
        let mut wanted = BTreeMap::new();
        let mut vteps: BTreeMap<F::AddressKey, u32> = BTreeMap::new();
        let mut free = None;
        for path in paths {
            *vteps.entry(F::key(path.vtep)).or_default() += 1;
            let (slots, peer) = self.counted_peer(path, &mut free)?;
            wanted.extend(slots.map(|slot| (slot, peer)));
        }
        // A VTEP may send before its subnets are known to be its own, never after.
        self.set_vteps(&vteps, false)?;
        let mut changes = Changes::default();
        let gone: Vec<u32> =
            self.peers_held.keys().filter(|slot| !wanted.contains_key(slot)).copied().collect();
        for slot in gone {
            self.clear_peer(slot)?;
            changes.removed += 1;
        }
        for (slot, peer) in wanted {
            self.set_peer(slot, peer, &mut changes)?;
        }
        self.set_vteps(&vteps, true)?;
        Ok(changes)
    }

    /// A peer's slots and what belongs there, counted where the same node was before; `free` is found when first needed.
    pub(super) fn counted_peer(
        &mut self,
        path: &PeerPath<F>,
        free: &mut Option<Free>,
    ) -> Result<(Range<u32>, Peer<F::Octets>), DataplaneError> {
        let (slots, mut peer) = (self.slots_of(path.subnet), peer(path));
        let held = self.peers_held.get(&slots.start).filter(|held| is_same_node(held, &peer));
        peer.traffic = match held.map_or(0, |held| held.traffic) {
            0 if slots.is_empty() => 0,
            0 => self.new_peer_slot(free.get_or_insert_with(|| self.free_peer_slots()))?,
            slot => slot,
        };
        Ok((slots, peer))
    }

    /// Empties a slot.
    pub(super) fn clear_peer(&mut self, slot: u32) -> Result<(), DataplaneError> {
        self.peers.set(slot, Peer::default(), 0).map_err(at(F::NAMES.peers))?;
        self.peers_held.remove(&slot);
        Ok(())
    }

    /// Writes a slot where it holds something else.
    pub(super) fn set_peer(
        &mut self,
        slot: u32,
        peer: Peer<F::Octets>,
        changes: &mut Changes,
    ) -> Result<(), DataplaneError> {
        match self.peers_held.get(&slot) {
            Some(held) if *held == peer => return Ok(()),
            Some(_) => changes.changed += 1,
            None => changes.added += 1,
        }
        self.peers.set(slot, peer, 0).map_err(at(F::NAMES.peers))?;
        self.peers_held.insert(slot, peer);
        Ok(())
    }

    /// Notes how many subnets a VTEP has.
    pub(super) fn set_vtep(&mut self, vtep: F::AddressKey, subnets: u32) -> Result<(), DataplaneError> {
        if self.vteps_held.get(&vtep) != Some(&subnets) {
            self.vteps.insert(vtep, subnets, 0).map_err(at(F::NAMES.vteps))?;
            self.vteps_held.insert(vtep, subnets);
        }
        Ok(())
    }

    fn set_vteps(
        &mut self,
        wanted: &BTreeMap<F::AddressKey, u32>,
        remove: bool,
    ) -> Result<(), DataplaneError> {
        for (vtep, subnets) in wanted {
            self.set_vtep(*vtep, *subnets)?;
        }
        let stale = self.vteps_held.keys().filter(|vtep| remove && !wanted.contains_key(*vtep));
        for vtep in stale.copied().collect::<Vec<_>>() {
            gone_is_fine(self.vteps.remove(&vtep)).map_err(at(F::NAMES.vteps))?;
            self.vteps_held.remove(&vtep);
        }
        Ok(())
    }

    /// Makes these the endpoints; addresses outside the own subnet are left to the kernel, and so are those for which the
    /// map has no room. What the programs found out about an endpoint stays as long as it is the same pod (interface and
    /// MAC).
    ///
    /// # Errors
    ///
    /// Where the map cannot be written; what was written stays.
    pub fn set_endpoints(
        &mut self,
        wanted: &BTreeMap<F::Addr, Endpoint<F::Octets>>,
    ) -> Result<Changes, DataplaneError> {
        let mut changes = Changes::default();
        let mut free = self.free_endpoint_slots();
        let gone: Vec<F::Addr> =
            self.endpoints_held.keys().filter(|address| !wanted.contains_key(address)).copied().collect();
        for address in gone {
            self.write_endpoint(address, None)?;
            self.endpoints_held.remove(&address);
            changes.removed += 1;
        }
        for (address, endpoint) in wanted {
            if !self.subnet().is_some_and(|subnet| F::contains(subnet, *address)) {
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
                // Of a pod that a CNI plugin has put there only the agent knows it: no flow may more or less for that.
                Some(held) if (Endpoint { netns: endpoint.netns, ..held }) == endpoint => {}
                Some(_) => changes.changed += 1,
                None => changes.added += 1,
            }
            endpoint.gated = if same_pod.is_some() { self.gated(*address)? } else { UNPROVEN };
            match self.write_endpoint(*address, Some(endpoint)) {
                Err(error) if held.is_none() && error.is_full() => changes.added -= 1,
                written => {
                    written?;
                    self.endpoints_held.insert(*address, ungated(endpoint));
                }
            }
        }
        Ok(changes)
    }

    fn write_endpoint(
        &mut self,
        address: F::Addr,
        endpoint: Option<Endpoint<F::Octets>>,
    ) -> Result<(), DataplaneError> {
        let Some(subnet) = self.subnet() else { return Ok(()) };
        F::set_endpoint(&mut self.endpoints, subnet, address, endpoint).map_err(at(F::NAMES.endpoints))
    }

    fn read_endpoint(&self, address: F::Addr) -> Result<Option<Endpoint<F::Octets>>, DataplaneError> {
        let Some(subnet) = self.subnet() else { return Ok(None) };
        F::endpoint(&self.endpoints, subnet, address).map_err(at(F::NAMES.endpoints))
    }

    fn gated(&self, address: F::Addr) -> Result<u16, DataplaneError> {
        Ok(self.read_endpoint(address)?.map_or(0, |endpoint| endpoint.gated))
    }

    fn subnet(&self) -> Option<F::Net> {
        self.settings.as_ref().map(|settings| settings.subnet)
    }

    /// The slots that a subnet covers; none where the network has no such half.
    pub(super) fn slots_of(&self, subnet: F::Net) -> Range<u32> {
        let Some(settings) = &self.settings else { return 0..0 };
        F::grid(settings).map_or(0..0, |grid| slots_of::<F>(subnet, grid, settings.subnet_len))
    }

    /// The endpoints of which it is not known yet whether the host translates flows of them.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn unproven_endpoints(&self) -> Result<Vec<F::Addr>, DataplaneError> {
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
    pub fn prove_endpoint(&mut self, address: F::Addr, translated: bool) -> Result<(), DataplaneError> {
        let Some(held) = self.endpoints_held.get(&address) else { return Ok(()) };
        let gated = if translated { TRANSLATED } else { 0 };
        // What the programs have noted since stands: only what is not known is decided here.
        let now = self.gated(address)?;
        if now == UNPROVEN || (now == 0 && translated) {
            self.write_endpoint(address, Some(Endpoint { gated, ..*held }))?;
        }
        Ok(())
    }

    /// Makes an endpoint of which a translated flow was seen one of which that is not known, until it is looked up; says
    /// whether it was one. Its flows must qualify all the while.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read or written.
    pub fn doubt_endpoint(&mut self, address: F::Addr) -> Result<bool, DataplaneError> {
        let Some(held) = self.endpoints_held.get(&address) else { return Ok(false) };
        let was_translated = self.gated(address)? == TRANSLATED;
        if was_translated {
            self.write_endpoint(address, Some(Endpoint { gated: UNPROVEN, ..*held }))?;
        }
        Ok(was_translated)
    }

    /// Notes that the host translates a flow, seen from the local pod, as the programs do that see it.
    ///
    /// # Errors
    ///
    /// Where the map cannot be written.
    pub fn note_translated(&mut self, flow: &FlowKey<F::Octets>) -> Result<(), DataplaneError> {
        let noted = Flow { translated: 1, ..Flow::default() };
        self.flows.insert(flow, noted, 0).map_err(at(F::NAMES.flows))
    }

    /// The endpoints as the programs see them now.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn endpoints(&self) -> Result<Vec<Endpoint<F::Octets>>, DataplaneError> {
        let found = self.endpoints_held.keys().map(|address| self.read_endpoint(*address));
        found.filter_map(Result::transpose).collect()
    }

    /// What the endpoint map held when it was last read, without what the programs found out.
    #[must_use]
    pub fn endpoints_held(&self) -> &BTreeMap<F::Addr, Endpoint<F::Octets>> {
        &self.endpoints_held
    }

    /// What pods were seen to send from without being endpoints. Read ones are forgotten, so that the programs
    /// tell of them again if they go on.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn take_sightings(&mut self) -> Result<Vec<(F::SightingKey, Sighting)>, DataplaneError> {
        let seen: Vec<_> = self.sightings.iter().collect::<Result<_, _>>().map_err(at(F::NAMES.sightings))?;
        for (key, _) in &seen {
            // The program may have evicted it meanwhile.
            let _ = self.sightings.remove(key);
        }
        Ok(seen)
    }
}

impl Dataplane {
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

    /// The ring buffers by which the programs call; once. Must be called inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// Where the kernel cannot wait for them.
    pub fn take_calls(&mut self) -> io::Result<Option<Calls>> {
        let Some((new_sightings, taken_tuples)) = self.rings.take() else { return Ok(None) };
        // SAFETY: a ring buffer owns its descriptor and never closes or exchanges it while it lives, and AsyncFd owns
        // the ring buffer.
        let (new_sightings, taken_tuples) =
            unsafe { (AsyncFd::register(new_sightings)?, AsyncFd::register(taken_tuples)?) };
        Ok(Some(Calls { new_sightings, taken_tuples }))
    }
}

/// How the programs call the agent.
pub struct Calls {
    /// Says that there are new sightings: see [`Tables::take_sightings`].
    pub new_sightings: AsyncFd<RingBuf<MapData>>,
    /// Flows that got the tuple of another: each a [`FlowKey`] of one of both families, sender first.
    pub taken_tuples: AsyncFd<RingBuf<MapData>>,
}

pub(super) fn at(map: &'static str) -> impl FnOnce(MapError) -> DataplaneError {
    move |source| DataplaneError::Map { map, source }
}

/// That somebody was quicker is no failure.
pub(super) fn gone_is_fine(removed: Result<(), MapError>) -> Result<(), MapError> {
    match removed {
        Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(MapError::KeyNotFound) => Ok(()),
        removed => removed,
    }
}

fn ungated<A>(endpoint: Endpoint<A>) -> Endpoint<A> {
    Endpoint { gated: 0, ..endpoint }
}

fn peer<F: Mapped>(path: &PeerPath<F>) -> Peer<F::Octets> {
    let mut peer = Peer {
        vtep: F::octets(path.vtep),
        vtep_mac: path.vtep_mac,
        subnet: F::octets(F::base(path.subnet)),
        prefix_len: F::prefix_len(path.subnet),
        way: match path.way {
            Way::Encapsulated => way::ENCAPSULATED,
            Way::Direct => way::DIRECT,
            Way::Device => way::DEVICE,
        },
        ..Peer::default()
    };
    if let Some(underlay) = path.underlay {
        peer.source = F::octets(underlay.source);
        peer.next_hop = F::octets(underlay.next_hop);
        peer.uplink = underlay.uplink;
        peer.mtu = underlay.mtu;
    }
    peer
}

/// Whether the same node has the same subnet as before, so that its counters go on.
fn is_same_node<A: PartialEq>(held: &Peer<A>, peer: &Peer<A>) -> bool {
    (&held.subnet, held.prefix_len, &held.vtep) == (&peer.subnet, peer.prefix_len, &peer.vtep)
}

/// The slots of the grid that a subnet covers: one, several for a larger subnet, none for a smaller one or one
/// outside the grid.
pub(super) fn slots_of<F: Mapped>(subnet: F::Net, grid: F::Net, subnet_len: u8) -> Range<u32> {
    let len = F::prefix_len(subnet);
    if len > subnet_len || !F::covers(grid, subnet) {
        return 0..0;
    }
    let offset = F::number(F::base(subnet)) - F::number(F::base(grid));
    // The grid is no longer than the slots' numbers.
    let first = (offset >> (F::BITS - subnet_len)) as u32;
    first..first + (1u32 << (subnet_len - len))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::{V4, V6};

    #[test]
    fn a_subnet_covers_the_slots_of_its_size() {
        let slots =
            |subnet: &str| slots_of::<V4>(subnet.parse().unwrap(), "10.5.0.0/16".parse().unwrap(), 24);
        assert_eq!(slots("10.5.34.0/24"), 34..35);
        assert_eq!(slots("10.5.32.0/22"), 32..36);
        assert_eq!(slots("10.5.34.0/26"), 0..0, "smaller than a slot");
        assert_eq!(slots("10.6.34.0/24"), 0..0, "outside");
        assert_eq!(slots("10.5.0.0/16"), 0..256);
        let slots =
            |subnet: &str| slots_of::<V6>(subnet.parse().unwrap(), "fc00:0:0:100::/56".parse().unwrap(), 64);
        assert_eq!(slots("fc00:0:0:122::/64"), 0x22..0x23);
        assert_eq!(slots("fc00:0:0:120::/62"), 0x20..0x24);
        assert_eq!(slots("fc00:0:0:122::/65"), 0..0, "smaller than a slot");
        assert_eq!(slots("fc00:0:0:222::/64"), 0..0, "outside");
    }
}
