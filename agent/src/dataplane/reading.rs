//! The pinned maps as they are now, to read: with or without a running agent.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, Map, MapData, MapInfo, MapType};
use loden_ebpf::abi::{Endpoint, Flow, FlowKey, Peer, map};

use super::{FamilySettings, Mapped, Pins, batch::Batches, tables::slots_of};

/// One family's maps that say where a packet goes.
pub struct PinnedMaps<F: Mapped> {
    peers: Array<MapData, Peer<F::Octets>>,
    endpoints: F::Endpoints,
    flows: Batches<FlowKey<F::Octets>, Flow>,
    epoch: Array<MapData, u32>,
}

impl<F: Mapped> PinnedMaps<F> {
    /// Opens the maps below a directory.
    ///
    /// # Errors
    ///
    /// Where one is missing, or of another shape than this program's.
    pub fn open(bpffs_dir: &Path) -> Result<Self> {
        let pins = Pins::below(bpffs_dir);
        let word = size_of::<u32>();
        let (names, (kind, key)) = (F::NAMES, F::ENDPOINTS);
        let endpoints = data(&pins, names.endpoints, key as usize, size_of::<Endpoint<F::Octets>>())?;
        let endpoints = if kind == MapType::Array { Map::Array(endpoints) } else { Map::HashMap(endpoints) };
        let peers = data(&pins, names.peers, word, size_of::<Peer<F::Octets>>())?;
        let flows = data(&pins, names.flows, size_of::<FlowKey<F::Octets>>(), size_of::<Flow>())?;
        Ok(Self {
            peers: Array::try_from(Map::Array(peers))?,
            endpoints: F::open_endpoints(endpoints)?,
            flows: Batches::of(&Map::LruHashMap(flows))?,
            epoch: Array::try_from(Map::Array(data(&pins, map::EPOCH, word, word)?))?,
        })
    }

    /// The slot of an address among the peers, and the peer; `None` outside the grid or where no lease covers it.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn peer(
        &self,
        settings: &FamilySettings<F>,
        address: F::Addr,
    ) -> Result<Option<(u32, Peer<F::Octets>)>> {
        let grid = F::grid(settings)?;
        let subnet = F::net(address, settings.subnet_len).map(F::trunc).unwrap_or_default();
        let slots = slots_of::<F>(subnet, grid, settings.subnet_len);
        if slots.is_empty() {
            return Ok(None);
        }
        let peer = self.peers.get(&slots.start, 0).context(F::NAMES.peers)?;
        Ok((!peer.is_empty()).then_some((slots.start, peer)))
    }

    /// The endpoint at an address of the own subnet, if any.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn endpoint(
        &self,
        settings: &FamilySettings<F>,
        address: F::Addr,
    ) -> Result<Option<Endpoint<F::Octets>>> {
        if !F::contains(settings.subnet, address) {
            return Ok(None);
        }
        F::endpoint(&self.endpoints, settings.subnet, address).context(F::NAMES.endpoints)
    }

    /// The flows that `wanted` picks.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn flows(
        &self,
        wanted: impl Fn(&FlowKey<F::Octets>) -> bool,
    ) -> Result<Vec<(FlowKey<F::Octets>, Flow)>> {
        self.flows.filter_map(|key, flow| wanted(&key).then_some((key, flow))).context(F::NAMES.flows)
    }

    /// The epoch of flows that are fast.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn epoch(&self) -> Result<u32> {
        self.epoch.get(&0, 0).context(map::EPOCH)
    }
}

/// aya adopts whatever is pinned there, so its shape is looked at first.
pub(super) fn data(pins: &Pins, name: &str, key: usize, value: usize) -> Result<MapData> {
    let path = pins.map(name);
    let info = MapInfo::from_pin(&path).with_context(|| format!("there is no map {}", path.display()))?;
    let found = (info.key_size() as usize, info.value_size() as usize);
    ensure!(
        found == (key, value),
        "{} has keys and values of {found:?} bytes: it belongs to another version",
        path.display()
    );
    Ok(MapData::from_pin(&path)?)
}
