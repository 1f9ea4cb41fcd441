//! Loading: constants, map sizes, and the maps of an earlier agent.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::Path,
};

use anyhow::Context as _;
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, MapInfo, MapType, PerCpuArray, RingBuf},
    programs::{ProgramError, SchedClassifier, Xdp},
};
use ipnet::IpNet;
use loden_ebpf::{
    abi::{self, map},
    reason,
    trace::{RING_BYTES, TRACERS_MAX, Tally, Tracer},
};
use serde::{Deserialize, Serialize};

use super::{
    Dataplane, DataplaneError, Direction, GuardMode, Mapped, Program, constants::Constants, features,
    packet_log::PacketLog, pinned, pins::Pins, tables::Tables, traffic,
};
use crate::family::{Family, V4, V6};

pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/loden-programs"));

/// What is constant while the programs are loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// The IPv4 half, where the network has one.
    pub v4: Option<FamilySettings<V4>>,
    /// The IPv6 half.
    pub v6: Option<FamilySettings<V6>>,
    /// Range of UDP source ports.
    pub source_ports: (u16, u16),
    /// Every flow must qualify before it is fast.
    pub strict: bool,
    /// Drop packets with a forged source.
    pub drop_forged: bool,
    /// The packets of the overlay's devices have no Ethernet header (WireGuard).
    #[serde(default)]
    pub bare_device: bool,
    /// Tell of every packet in the agent's log.
    pub log_packets: bool,
}

/// One family's part of [`Settings`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(bound = "")]
pub struct FamilySettings<F: Family> {
    /// The cluster's network.
    pub network: F::Net,
    /// Prefix length of the subnets.
    pub subnet_len: u8,
    /// This node's subnet.
    pub subnet: F::Net,
    /// The address at which this node receives VXLAN.
    pub vtep: F::Addr,
    /// The VXLAN device, where there is one.
    pub vxlan: Option<VxlanSettings>,
    /// TTL or hop limit of outer packets.
    pub outer_ttl: u8,
}

/// What the programs know of a VXLAN device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VxlanSettings {
    /// Its interface index.
    pub ifindex: u32,
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
        fn shape<F: Family>(half: &FamilySettings<F>) -> (F::Net, u8, F::Net) {
            (half.network, half.subnet_len, half.subnet)
        }
        self.v4.as_ref().map(shape) == other.v4.as_ref().map(shape)
            && self.v6.as_ref().map(shape) == other.v6.as_ref().map(shape)
    }

    /// The subnet after which what is pinned for pods is named.
    pub(super) fn subnet(&self) -> IpNet {
        let v4 = self.v4.as_ref().map(|half| half.subnet.into());
        v4.or(self.v6.as_ref().map(|half| half.subnet.into())).unwrap_or_default()
    }
}

/// Entries of a family's maps.
#[derive(Clone, Copy)]
struct Sizes {
    peers: u32,
    endpoints: u32,
    peer_traffic: u32,
    endpoint_traffic: u32,
    /// Of each that has a fixed size, whether it has that or the smallest.
    is_there: bool,
}

impl Sizes {
    fn of<F: Mapped>(settings: &Settings) -> Result<Self, DataplaneError> {
        let Some(half) = F::of(settings) else {
            return Ok(Self {
                peers: 1,
                endpoints: 1,
                peer_traffic: 1,
                endpoint_traffic: 1,
                is_there: false,
            });
        };
        let grid = F::grid(half)?;
        let peers = 1u32 << half.subnet_len.saturating_sub(F::prefix_len(grid)).min(31);
        let (endpoints, counted) = F::endpoint_slots(half)?;
        let cpus = traffic::cpus()?;
        Ok(Self {
            peers,
            endpoints,
            peer_traffic: traffic::slots(peers, size_of::<abi::Traffic>(), cpus),
            endpoint_traffic: traffic::slots(counted, size_of::<abi::EndpointTraffic>(), cpus),
            is_there: true,
        })
    }

    fn fixed(&self, max: usize) -> u32 {
        if self.is_there { max as u32 } else { 1 }
    }

    /// Each map's shape.
    fn shapes<F: Mapped>(&self) -> [Shape; 7] {
        let word = size_of::<u32>() as u32;
        let array = |value: usize| (word, value as u32);
        let (names, (endpoints, endpoint_key)) = (F::NAMES, F::ENDPOINTS);
        [
            (names.peers, MapType::Array, array(size_of::<abi::Peer<F::Octets>>()), self.peers),
            (
                names.vteps,
                MapType::Hash,
                (size_of::<F::AddressKey>() as u32, word),
                self.fixed(abi::VTEPS_MAX),
            ),
            (
                names.endpoints,
                endpoints,
                (endpoint_key, size_of::<abi::Endpoint<F::Octets>>() as u32),
                self.endpoints,
            ),
            (
                names.flows,
                MapType::LruHash,
                (size_of::<abi::FlowKey<F::Octets>>() as u32, size_of::<abi::Flow>() as u32),
                self.fixed(abi::FLOWS_MAX),
            ),
            (names.peer_traffic, MapType::PerCpuArray, array(size_of::<abi::Traffic>()), self.peer_traffic),
            (
                names.endpoint_traffic,
                MapType::PerCpuArray,
                array(size_of::<abi::EndpointTraffic>()),
                self.endpoint_traffic,
            ),
            (
                names.sightings,
                MapType::LruHash,
                (size_of::<F::SightingKey>() as u32, size_of::<abi::Sighting>() as u32),
                self.fixed(abi::SIGHTINGS_MAX),
            ),
        ]
    }
}

/// A map's name, kind, sizes of key and value in bytes, and entries.
type Shape = (&'static str, MapType, (u32, u32), u32);

/// Every map that outlives the agent.
fn shapes(settings: &Settings) -> Result<Vec<Shape>, DataplaneError> {
    let word = size_of::<u32>() as u32;
    let counters = (word, size_of::<abi::Counter>() as u32);
    let mut shapes = vec![
        (map::EPOCH, MapType::Array, (word, word), 1),
        (map::COUNTERS, MapType::PerCpuArray, counters, reason::COUNT as u32),
        (map::TRACING, MapType::Array, (word, word), 1),
        (map::TRACERS, MapType::Array, (word, size_of::<Tracer>() as u32), TRACERS_MAX as u32),
        (map::TRACE_TALLY, MapType::PerCpuArray, (word, size_of::<Tally>() as u32), TRACERS_MAX as u32),
    ];
    shapes.extend(map::VERDICTS.map(|ring| (ring, MapType::RingBuf, (0, 0), RING_BYTES as u32)));
    shapes.extend(Sizes::of::<V4>(settings)?.shapes::<V4>());
    shapes.extend(Sizes::of::<V6>(settings)?.shapes::<V6>());
    Ok(shapes)
}

pub(super) fn slots(what: &'static str, bits: u8, max: u32) -> Result<u32, DataplaneError> {
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
        pinned::pin_programs(&mut ebpf, &pins, settings.subnet())?;
        let packet_log = settings
            .log_packets
            .then(|| PacketLog::open(&mut ebpf))
            .transpose()
            .map_err(DataplaneError::Load)?;
        let (v4, v6) = (Tables::take(&mut ebpf, settings)?, Tables::take(&mut ebpf, settings)?);
        let mut take = |name: &'static str| {
            ebpf.take_map(name)
                .with_context(|| format!("the object has no map {name}"))
                .map_err(DataplaneError::Load)
        };
        let error = |map| move |source| DataplaneError::Map { map, source };
        let mut dataplane = Self {
            epoch: Array::try_from(take(map::EPOCH)?).map_err(error(map::EPOCH))?,
            counters: PerCpuArray::try_from(take(map::COUNTERS)?).map_err(error(map::COUNTERS))?,
            rings: Some((
                RingBuf::try_from(take(map::NEW_SIGHTINGS)?).map_err(error(map::NEW_SIGHTINGS))?,
                RingBuf::try_from(take(map::TAKEN_TUPLES)?).map_err(error(map::TAKEN_TUPLES))?,
            )),
            v4,
            v6,
            ebpf,
            settings: settings.clone(),
            pins,
            hooks: BTreeMap::new(),
            renewed: BTreeSet::new(),
            guard_mode: GuardMode::default(),
            _packet_log: packet_log,
        };
        dataplane.read_back()?;
        Ok(dataplane)
    }
}

/// Loads with the maps that are pinned, or with maps of its own.
pub(super) fn load(settings: &Settings, pins: Option<&Pins>) -> Result<Ebpf, DataplaneError> {
    let constants = Constants::of(settings)?;
    let mut loader = EbpfLoader::new();
    constants.put_into(&mut loader);
    for (name, _, _, entries) in shapes(settings)? {
        loader.map_max_entries(name, entries);
        if let Some(pins) = pins {
            loader.map_pin_path(name, pins.map(name));
        }
    }
    if settings.v6.is_none() {
        loader.map_max_entries(map::V6_FLOW_CACHE, 1);
    }
    if pins.is_none() {
        // LRU takes its memory at once: little of it for what nobody keeps.
        loader.map_max_entries(map::FLOWS, 64).map_max_entries(map::V6_FLOWS, 64);
        for ring in map::VERDICTS {
            loader.map_max_entries(ring, 4096);
        }
    }
    let mut ebpf = loader.load(OBJECT).map_err(|error| features::refused(error.into()))?;
    for program in Program::ALL {
        load_program(&mut ebpf, *program).map_err(features::refused)?;
    }
    Ok(ebpf)
}

/// How often a program is offered to the kernel while signals interrupt its verifier.
const ATTEMPTS: u32 = 20;

fn load_program(ebpf: &mut Ebpf, program: Program) -> anyhow::Result<()> {
    let name = program.name();
    let loaded = ebpf.program_mut(name).with_context(|| format!("the object has no program {name}"))?;
    let mut load = || match program.direction() {
        Direction::Driver => <&mut Xdp>::try_from(&mut *loaded)?.load(),
        _ => <&mut SchedClassifier>::try_from(&mut *loaded)?.load(),
    };
    let mut attempts = 1..ATTEMPTS;
    loop {
        match load() {
            Err(error) if is_interrupted(&error) && attempts.next().is_some() => {}
            done => return done.with_context(|| format!("the kernel refuses program {name}")),
        }
    }
}

/// The verifier gives up when a signal comes (`do_check` in kernel/bpf/verifier.c, since Linux 5.0), which says nothing
/// about the program.
fn is_interrupted(error: &ProgramError) -> bool {
    matches!(error, ProgramError::LoadError { io_error, .. } if io_error.kind() == io::ErrorKind::WouldBlock)
}

/// Removes the pins of maps that this agent would misread or that have another size: the programs that still
/// run keep their maps until they are swapped, and the new ones start with maps of their own.
fn remove_misfits(pins: &Pins, settings: &Settings) -> Result<(), DataplaneError> {
    for (name, kind, (key, value), entries) in shapes(settings)? {
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
