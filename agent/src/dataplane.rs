//! The eBPF side of the data path: loading, pinning, attaching, and the maps. The only user of aya.
//!
//! Links and maps are pinned below `<bpffs-dir>/v<ABI_VERSION>/`, so they outlive the agent: a restart adopts the
//! maps and swaps the programs in place, and no packet finds a hook without a program. What the
//! maps should hold is compared with what they hold; nothing is replayed.
//!
//! It never decides which peer or endpoint belongs in a map: it is told.

mod batch;
mod clsact;
mod constants;
mod delta;
mod features;
mod hooks;
mod inspect;
mod listener;
mod load;
mod mapped;
mod packet_log;
mod pinned;
mod pinned_link;
mod pins;
mod reading;
mod report;
#[cfg(test)]
mod stack;
mod tables;
mod traffic;
mod trial;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
};

use self::packet_log::PacketLog;
use aya::{
    Ebpf,
    maps::{Array, MapData, MapError, PerCpuArray, RingBuf},
};
use loden_ebpf::{abi::Counter, reason::Reason};
use nix::errno::Errno;

use crate::family::{Family, V4, V6};

pub use self::{
    hooks::{Direction, GuardMode, Hook, Program},
    inspect::Attached,
    listener::{Listener, RENEWAL, monotonic},
    load::{FamilySettings, Settings, VxlanSettings},
    mapped::Mapped,
    pinned::{OF_A_POD, PinnedDataplane, forget_pod},
    pins::{Pins, detach_all},
    reading::PinnedMaps,
    report::Loaded,
    tables::{Calls, Tables},
    traffic::{Counted, slow_reasons},
    trial::Trial,
};

/// What can go wrong between the agent and the kernel's BPF side.
#[derive(Debug, thiserror::Error)]
pub enum DataplaneError {
    /// The pin directory is not in a BPF file system and none could be mounted there.
    #[error(
        "{path}: no BPF file system there, and mounting one failed: {source}; mount it: mount -t bpf bpf {path}"
    )]
    Bpffs {
        /// Where the pins would be.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A file operation on a pin.
    #[error("pin {path}: {source}")]
    Pin {
        /// The pin.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The network does not fit the maps.
    #[error(
        "{what} has {size} slots and the fast path can hold {max}: run with --datapath=kernel or a larger SubnetLen unit"
    )]
    TooLarge {
        /// The network or the own subnet.
        what: &'static str,
        /// What it would need.
        size: u64,
        /// What there is.
        max: u32,
    },
    /// The kernel is too old, was built without something, or does not let us.
    #[error("no eBPF: there is no {}", .0.join(", no "))]
    Lacks(Vec<String>),
    /// The kernel refused the object, a map or a program.
    #[error("loading the programs: {0:#}")]
    Load(#[source] anyhow::Error),
    /// A program could not be attached.
    #[error("attaching {program} to {interface}: {source:#}")]
    Attach {
        /// The program.
        program: &'static str,
        /// The interface.
        interface: String,
        /// What the kernel said.
        source: anyhow::Error,
    },
    /// A filter could not be deleted.
    #[error("detaching {program} from {interface}: {source:#}")]
    Detach {
        /// The program.
        program: &'static str,
        /// The interface.
        interface: String,
        /// What the kernel said.
        source: anyhow::Error,
    },
    /// A map could not be read or written.
    #[error("map {map}: {source}")]
    Map {
        /// The map's name.
        map: &'static str,
        /// What the kernel said.
        source: MapError,
    },
}

impl DataplaneError {
    /// Whether a map has no room for another entry (`E2BIG` of a hash).
    fn is_full(&self) -> bool {
        let Self::Map { source: MapError::SyscallError(error), .. } = self else { return false };
        error.io_error.raw_os_error() == Some(Errno::E2BIG as i32)
    }
}

/// The loaded programs and their maps.
pub struct Dataplane {
    ebpf: Ebpf,
    settings: Settings,
    pins: Pins,
    hooks: BTreeMap<Hook, hooks::Attached>,
    /// See [`Self::take_renewed`].
    renewed: BTreeSet<u32>,
    guard_mode: GuardMode,
    /// Reads what the programs tell of packets, where that was asked for.
    _packet_log: Option<PacketLog>,
    epoch: Array<MapData, u32>,
    counters: PerCpuArray<MapData, Counter>,
    /// New sightings and taken tuples.
    rings: Option<(RingBuf<MapData>, RingBuf<MapData>)>,
    v4: Tables<V4>,
    v6: Tables<V6>,
}

/// What changed in a map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Entries that are new.
    pub added: usize,
    /// Entries that have another value.
    pub changed: usize,
    /// Entries that are gone.
    pub removed: usize,
}

impl Changes {
    /// Whether nothing had to be done.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }

    /// Whether something that packets may have relied on is no longer so.
    #[must_use]
    pub fn invalidates(self) -> bool {
        self.changed + self.removed > 0
    }
}

/// What is done to packets on their way to a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// They are encapsulated in VXLAN by the programs.
    Encapsulated,
    /// Nothing: the peer is the next hop.
    Direct,
    /// They are put into a device that encapsulates them.
    Device,
}

/// A peer as the fast path needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerPath<F: Family = V4> {
    /// The peer's subnet.
    pub subnet: F::Net,
    /// The peer's VTEP address.
    pub vtep: F::Addr,
    /// MAC of its VXLAN device.
    pub vtep_mac: [u8; 6],
    /// What is done to packets on the way there.
    pub way: Way,
    /// The way there, where the fast path may use it.
    pub underlay: Option<Underlay<F>>,
}

/// The way to a VTEP over the underlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Underlay<F: Family = V4> {
    /// Interface index of the uplink, or of the device that encapsulates.
    pub uplink: u32,
    /// The neighbour that gets the packets; of a device that encapsulates, nobody's business.
    pub next_hop: F::Addr,
    /// Source of the outer packets.
    pub source: F::Addr,
    /// Largest outer IP packet, or the largest that the device takes, in bytes.
    pub mtu: u16,
}

/// Packets and bytes by reason, summed over the CPUs.
pub type Counters = BTreeMap<Reason, Counter>;

impl Dataplane {
    /// What the programs were loaded with.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The maps of one family.
    #[must_use]
    pub fn half<F: Mapped>(&self) -> &Tables<F> {
        F::tables(self)
    }

    /// The maps of one family, to write.
    #[must_use]
    pub fn half_mut<F: Mapped>(&mut self) -> &mut Tables<F> {
        F::tables_mut(self)
    }

    /// Reads the maps back: at start what an earlier agent left, later what somebody may have changed.
    ///
    /// # Errors
    ///
    /// Where a map cannot be read.
    pub fn read_back(&mut self) -> Result<(), DataplaneError> {
        self.v4.read_back()?;
        self.v6.read_back()
    }
}
