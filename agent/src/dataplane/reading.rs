//! The pinned maps as they are now, to read: with or without a running agent.

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, HashMap, Map, MapData, MapError, MapInfo};
use loden_ebpf::{
    abi::{Endpoint, Flow, FlowKey, Peer, map},
    grid,
};

use super::{Pins, Settings};

/// The maps that say where a packet goes.
pub struct PinnedMaps {
    peers: Array<MapData, Peer>,
    endpoints: Array<MapData, Endpoint>,
    flows: HashMap<MapData, FlowKey, Flow>,
    epoch: Array<MapData, u32>,
}

impl PinnedMaps {
    /// Opens the maps below a directory.
    ///
    /// # Errors
    ///
    /// Where one is missing, or of another shape than this program's.
    pub fn open(bpffs_dir: &Path) -> Result<Self> {
        let pins = Pins::below(bpffs_dir);
        Ok(Self {
            peers: Array::try_from(Map::Array(data::<u32, Peer>(&pins, map::PEERS)?))?,
            endpoints: Array::try_from(Map::Array(data::<u32, Endpoint>(&pins, map::ENDPOINTS)?))?,
            flows: HashMap::try_from(Map::LruHashMap(data::<FlowKey, Flow>(&pins, map::FLOWS)?))?,
            epoch: Array::try_from(Map::Array(data::<u32, u32>(&pins, map::EPOCH)?))?,
        })
    }

    /// The slot of an address among the peers, and the peer; `None` outside the network or where no lease covers it.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn peer(&self, settings: &Settings, address: u32) -> Result<Option<(u32, Peer)>> {
        let (network, mask) = (u32::from(settings.network.network()), u32::from(settings.network.netmask()));
        let Some(slot) = grid::slot(address, network, mask, u32::from(32 - settings.subnet_len)) else {
            return Ok(None);
        };
        let peer = self.peers.get(&slot, 0).context(map::PEERS)?;
        Ok((!peer.is_empty()).then_some((slot, peer)))
    }

    /// The offset of an address in the own subnet, and the endpoint there, if any.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn endpoint(&self, settings: &Settings, address: u32) -> Result<Option<(u32, Endpoint)>> {
        let (subnet, mask) = (u32::from(settings.subnet.network()), u32::from(settings.subnet.netmask()));
        let Some(offset) = grid::offset(address, subnet, mask) else { return Ok(None) };
        let endpoint = self.endpoints.get(&offset, 0).context(map::ENDPOINTS)?;
        Ok((endpoint.ifindex != 0).then_some((offset, endpoint)))
    }

    /// The flows that `wanted` picks.
    ///
    /// # Errors
    ///
    /// Where the map cannot be read.
    pub fn flows(&self, wanted: impl Fn(&FlowKey) -> bool) -> Result<Vec<(FlowKey, Flow)>> {
        let mut found = Vec::new();
        for key in self.flows.keys() {
            let key = match key {
                Ok(key) => key,
                // A full table makes room while it is read.
                Err(MapError::KeyNotFound) => continue,
                Err(error) => return Err(error).context(map::FLOWS),
            };
            if wanted(&key)
                && let Ok(flow) = self.flows.get(&key, 0)
            {
                found.push((key, flow));
            }
        }
        Ok(found)
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
pub(super) fn data<K, V>(pins: &Pins, name: &str) -> Result<MapData> {
    let path = pins.map(name);
    let info = MapInfo::from_pin(&path).with_context(|| format!("there is no map {}", path.display()))?;
    let found = (info.key_size() as usize, info.value_size() as usize);
    ensure!(
        found == (size_of::<K>(), size_of::<V>()),
        "{} has keys and values of {found:?} bytes: it belongs to another version",
        path.display()
    );
    Ok(MapData::from_pin(&path)?)
}
