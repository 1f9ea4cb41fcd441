//! Loading: constants, map sizes, and the maps of an earlier agent.

use std::{collections::BTreeMap, net::Ipv4Addr, path::Path};

use anyhow::Context as _;
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, HashMap, MapInfo, MapType, PerCpuArray, RingBuf},
    programs::{SchedClassifier, Xdp},
};
use ipnet::Ipv4Net;
use loden_ebpf::{
    abi::{self, ENDPOINTS_MAX, PEERS_MAX, global, map},
    reason,
    trace::{RING_BYTES, TRACERS_MAX, Tally, Tracer},
};
use serde::{Deserialize, Serialize};

use super::{
    Dataplane, DataplaneError, Direction, GuardMode, Program, features,
    packet_log::PacketLog,
    pinned,
    pins::{PINNED_MAPS, Pins},
    traffic,
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/loden-programs"));

/// What is constant while the programs are loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// The cluster's network.
    pub network: Ipv4Net,
    /// Prefix length of the subnets.
    pub subnet_len: u8,
    /// This node's subnet.
    pub subnet: Ipv4Net,
    /// The address at which this node receives VXLAN.
    pub vtep: Ipv4Addr,
    /// The VXLAN device, where there is one.
    pub vxlan: Option<VxlanSettings>,
    /// Range of UDP source ports.
    pub source_ports: (u16, u16),
    /// TTL of outer packets.
    pub outer_ttl: u8,
    /// Every flow must qualify before it is fast.
    pub strict: bool,
    /// Drop packets with a forged source.
    pub drop_forged: bool,
    /// Tell of every packet in the agent's log.
    pub log_packets: bool,
}

/// What the programs know of the VXLAN device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VxlanSettings {
    /// Its MAC.
    pub mac: [u8; 6],
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port; no packet has port 0, so 0 turns VXLAN off.
    pub port: u16,
}

impl Settings {
    /// Whether programs with these settings can go on with the maps of programs with the others.
    #[must_use]
    pub fn fits_maps_of(&self, other: &Self) -> bool {
        let shape = |settings: &Self| (settings.network, settings.subnet_len, settings.subnet);
        shape(self) == shape(other)
    }

    /// Slots of the peer map.
    fn peer_slots(&self) -> Result<u32, DataplaneError> {
        slots("the network", self.subnet_len.saturating_sub(self.network.prefix_len()), PEERS_MAX)
    }

    /// Slots of the endpoint map.
    fn endpoint_slots(&self) -> Result<u32, DataplaneError> {
        slots("the own subnet", 32 - self.subnet.prefix_len(), ENDPOINTS_MAX)
    }

    /// Slots of the maps that count by peer and by endpoint.
    fn traffic_slots(&self) -> Result<(u32, u32), DataplaneError> {
        let cpus = traffic::cpus()?;
        Ok((
            traffic::slots(self.peer_slots()?, size_of::<abi::Traffic>(), cpus),
            traffic::slots(self.endpoint_slots()?, size_of::<abi::EndpointTraffic>(), cpus),
        ))
    }
}

fn slots(what: &'static str, bits: u8, max: u32) -> Result<u32, DataplaneError> {
    let size = 1u64 << bits;
    match u32::try_from(size) {
        Ok(slots) if slots <= max => Ok(slots),
        _ => Err(DataplaneError::TooLarge { what, size, max }),
    }
}

impl Dataplane {
    /// Loads the programs, with the maps that are pinned where they fit. Nothing is attached yet.
    ///
    /// # Errors
    ///
    /// Where the kernel lacks something (it is named), the network is too large for the maps, or pins are refused.
    pub fn load(settings: &Settings, bpffs_dir: &Path) -> Result<Self, DataplaneError> {
        let pins = Pins::below(bpffs_dir);
        pins.prepare(bpffs_dir)?;
        Self::with_pins(settings, pins)
    }

    /// As [`Self::load`], where the pins' directories are there.
    pub(super) fn with_pins(settings: &Settings, pins: Pins) -> Result<Self, DataplaneError> {
        remove_misfits(&pins, settings)?;
        let mut ebpf = load(settings, Some(&pins))?;
        pinned::pin_programs(&mut ebpf, &pins, settings.subnet)?;
        let packet_log = settings
            .log_packets
            .then(|| PacketLog::open(&mut ebpf))
            .transpose()
            .map_err(DataplaneError::Load)?;
        let mut take = |name: &'static str| {
            ebpf.take_map(name)
                .with_context(|| format!("the object has no map {name}"))
                .map_err(DataplaneError::Load)
        };
        let error = |map| move |source| DataplaneError::Map { map, source };
        let mut dataplane = Self {
            peers: Array::try_from(take(map::PEERS)?).map_err(error(map::PEERS))?,
            vteps: HashMap::try_from(take(map::VTEPS)?).map_err(error(map::VTEPS))?,
            endpoints: Array::try_from(take(map::ENDPOINTS)?).map_err(error(map::ENDPOINTS))?,
            flows: HashMap::try_from(take(map::FLOWS)?).map_err(error(map::FLOWS))?,
            epoch: Array::try_from(take(map::EPOCH)?).map_err(error(map::EPOCH))?,
            counters: PerCpuArray::try_from(take(map::COUNTERS)?).map_err(error(map::COUNTERS))?,
            peer_traffic: PerCpuArray::try_from(take(map::PEER_TRAFFIC)?)
                .map_err(error(map::PEER_TRAFFIC))?,
            endpoint_traffic: PerCpuArray::try_from(take(map::ENDPOINT_TRAFFIC)?)
                .map_err(error(map::ENDPOINT_TRAFFIC))?,
            sightings: HashMap::try_from(take(map::SIGHTINGS)?).map_err(error(map::SIGHTINGS))?,
            new_sightings: Some(
                RingBuf::try_from(take(map::NEW_SIGHTINGS)?).map_err(error(map::NEW_SIGHTINGS))?,
            ),
            ebpf,
            settings: settings.clone(),
            pins,
            hooks: BTreeMap::new(),
            guard_mode: GuardMode::default(),
            _packet_log: packet_log,
            peers_held: BTreeMap::new(),
            vteps_held: BTreeMap::new(),
            endpoints_held: BTreeMap::new(),
        };
        dataplane.read_back()?;
        Ok(dataplane)
    }
}

/// Loads with the maps that are pinned, or with maps of its own.
pub(super) fn load(settings: &Settings, pins: Option<&Pins>) -> Result<Ebpf, DataplaneError> {
    let network = u32::from(settings.network.network());
    let network_mask = u32::from(settings.network.netmask());
    let grid_shift = u32::from(32 - settings.subnet_len);
    let subnet = u32::from(settings.subnet.network());
    let subnet_mask = u32::from(settings.subnet.netmask());
    let vtep = u32::from(settings.vtep);
    let (strict, drop_forged) = (u8::from(settings.strict), u8::from(settings.drop_forged));
    let vxlan = settings.vxlan.unwrap_or_default();
    let coarse_clock = u8::from(features::has_coarse_clock());
    let (peer_traffic, endpoint_traffic) = settings.traffic_slots()?;
    // aya-log's levels: 3 is info; at 0 nothing is told, and the verifier removes the telling.
    let log_level: u8 = if settings.log_packets { 3 } else { 0 };
    let mut loader = EbpfLoader::new();
    loader
        .override_global(global::NETWORK, &network, true)
        .override_global(global::NETWORK_MASK, &network_mask, true)
        .override_global(global::GRID_SHIFT, &grid_shift, true)
        .override_global(global::SUBNET, &subnet, true)
        .override_global(global::SUBNET_MASK, &subnet_mask, true)
        .override_global(global::VTEP, &vtep, true)
        .override_global(global::VTEP_MAC, &vxlan.mac, true)
        .override_global(global::VNI, &vxlan.vni, true)
        .override_global(global::PORT, &vxlan.port, true)
        .override_global(global::SOURCE_PORT_MIN, &settings.source_ports.0, true)
        .override_global(global::SOURCE_PORT_MAX, &settings.source_ports.1, true)
        .override_global(global::OUTER_TTL, &settings.outer_ttl, true)
        .override_global(global::STRICT, &strict, true)
        .override_global(global::DROP_FORGED, &drop_forged, true)
        .override_global(global::COARSE_CLOCK, &coarse_clock, true)
        .override_global(aya_log::LEVEL, &log_level, true)
        .map_max_entries(map::PEERS, settings.peer_slots()?)
        .map_max_entries(map::ENDPOINTS, settings.endpoint_slots()?)
        .map_max_entries(map::PEER_TRAFFIC, peer_traffic)
        .map_max_entries(map::ENDPOINT_TRAFFIC, endpoint_traffic);
    match pins {
        Some(pins) => {
            for name in PINNED_MAPS {
                loader.map_pin_path(name, pins.map(name));
            }
        }
        // LRU takes its memory at once: little of it for what nobody keeps.
        None => {
            loader.map_max_entries(map::FLOWS, 64);
            for ring in map::VERDICTS {
                loader.map_max_entries(ring, 4096);
            }
        }
    }
    let mut ebpf = loader.load(OBJECT).map_err(|error| features::refused(error.into()))?;
    for program in Program::ALL {
        load_program(&mut ebpf, *program).map_err(features::refused)?;
    }
    Ok(ebpf)
}

fn load_program(ebpf: &mut Ebpf, program: Program) -> anyhow::Result<()> {
    let name = program.name();
    let loaded = ebpf.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
    let done = if program.direction() == Direction::Driver {
        <&mut Xdp>::try_from(loaded)?.load()
    } else {
        <&mut SchedClassifier>::try_from(loaded)?.load()
    };
    done.with_context(|| format!("the kernel refuses program {name}"))
}

/// Removes the pins of maps that this agent would misread or that have another size: the programs that still
/// run keep their maps until they are swapped, and the new ones start with maps of their own.
fn remove_misfits(pins: &Pins, settings: &Settings) -> Result<(), DataplaneError> {
    let word = size_of::<u32>() as u32;
    let (peer_traffic, endpoint_traffic) = settings.traffic_slots()?;
    let size_of_flows = (size_of::<abi::FlowKey>() as u32, size_of::<abi::Flow>() as u32);
    let size_of_sightings = (size_of::<abi::SightingKey>() as u32, size_of::<abi::Sighting>() as u32);
    let array = |value: usize| (word, value as u32);
    let mut expected = vec![
        (map::PEERS, MapType::Array, array(size_of::<abi::Peer>()), settings.peer_slots()?),
        (map::VTEPS, MapType::Hash, (word, word), abi::VTEPS_MAX as u32),
        (map::ENDPOINTS, MapType::Array, array(size_of::<abi::Endpoint>()), settings.endpoint_slots()?),
        (map::FLOWS, MapType::LruHash, size_of_flows, abi::FLOWS_MAX as u32),
        (map::EPOCH, MapType::Array, (word, word), 1),
        (map::COUNTERS, MapType::PerCpuArray, array(size_of::<abi::Counter>()), reason::COUNT as u32),
        (map::PEER_TRAFFIC, MapType::PerCpuArray, array(size_of::<abi::Traffic>()), peer_traffic),
        (
            map::ENDPOINT_TRAFFIC,
            MapType::PerCpuArray,
            array(size_of::<abi::EndpointTraffic>()),
            endpoint_traffic,
        ),
        (map::SIGHTINGS, MapType::LruHash, size_of_sightings, abi::SIGHTINGS_MAX as u32),
        (map::TRACING, MapType::Array, (word, word), 1),
        (map::TRACERS, MapType::Array, array(size_of::<Tracer>()), TRACERS_MAX as u32),
        (map::TRACE_TALLY, MapType::PerCpuArray, array(size_of::<Tally>()), TRACERS_MAX as u32),
    ];
    expected.extend(map::VERDICTS.map(|ring| (ring, MapType::RingBuf, (0, 0), RING_BYTES as u32)));
    for (name, kind, (key, value), entries) in expected {
        let path = pins.map(name);
        let Ok(info) = MapInfo::from_pin(&path) else { continue };
        let is_kind = info.map_type().is_ok_and(|found| found == kind);
        if !is_kind || (info.key_size(), info.value_size(), info.max_entries()) != (key, value, entries) {
            tracing::info!(map = name, "the pinned map is of another shape and is replaced");
            Pins::remove(&path)?;
        }
    }
    Ok(())
}
