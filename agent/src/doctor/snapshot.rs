//! All that is looked at, gathered before anything is judged.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use ipnet::IpNet;

use crate::{
    dataplane::{Attached, Hook, Program},
    facts::{self, Facts, Source},
    family::{Family, V4, V6},
    kernel::{Address, Link, Route, RouteTo},
    lease::Lease,
    overlay::Actual,
    wireguard,
};

/// A node at one moment. What could not be read holds the reason.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// What the node ought to be.
    pub facts: Facts,
    /// Who said so.
    pub source: Source,
    /// What the agent says is not ready, and why.
    pub not_ready: BTreeMap<String, String>,
    pub links: Vec<Link>,
    /// What there is of IPv4, in a network that has IPv4.
    pub v4: Option<Half<V4>>,
    /// What there is of IPv6, in a network that has IPv6.
    pub v6: Option<Half<V6>>,
    /// What the WireGuard devices have, in the order of the facts.
    pub wireguard: Vec<Result<wireguard::Actual, String>>,
    /// Kernel parameters by name; `None` where the kernel does not have one.
    pub sysctls: BTreeMap<String, Option<String>>,
    /// Whether the uplink's driver aggregates what it receives (GRO).
    pub gro: Result<bool, String>,
    /// The host's rules, as `nft list ruleset` prints them.
    pub rules: Result<String, String>,
    pub etcd: Etcd,
    /// `None` where no programs are wanted.
    pub programs: Option<Programs>,
    /// Of both families.
    pub probes: Vec<Probe>,
}

/// The node in one family.
#[derive(Clone, Debug)]
pub struct Half<F: Family = V4> {
    /// What it ought to be.
    pub facts: facts::Half<F>,
    pub addresses: Vec<Address<F>>,
    pub routes: Vec<Route<F>>,
    /// Routes, neighbours and FDB entries of the overlay.
    pub overlay: Result<Actual<F>, String>,
    /// The way to each VTEP.
    pub ways: BTreeMap<F::Addr, Result<RouteTo<F>, String>>,
}

/// What etcd answers.
#[derive(Clone, Debug, Default)]
pub struct Etcd {
    /// Each endpoint's health.
    pub endpoints: Vec<(String, Result<Health, String>)>,
    /// Every lease; `None` where none was asked for.
    pub leases: Option<Result<Vec<Lease>, String>>,
}

/// An endpoint that answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    /// Whether it calls itself healthy; `None` where only the connection was tried (TLS).
    pub healthy: Option<bool>,
    /// How long it took.
    pub took: Duration,
    /// How far its clock is ahead of ours, in seconds, true to a second; `None` where it did not say.
    pub ahead: Option<i64>,
}

/// What is loaded, attached and pinned.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The tag of each program of this version, as the kernel computes it; or why it does not load them.
    pub loadable: Result<BTreeMap<Program, u64>, String>,
    /// Whether the kernel has BTF of itself.
    pub btf: bool,
    /// The hooks that should have a program, with the interface's name and the tag of what is there.
    pub hooks: Vec<(Hook, String, Attached)>,
    /// Maps that should be pinned and are not.
    pub unpinned: Vec<String>,
}

/// What became of the packets that were sent to one peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Its subnet.
    pub subnet: IpNet,
    /// Its public address, of the same family.
    pub vtep: IpAddr,
    /// Echoes to the public address, don't-fragment, up to the underlay's MTU.
    pub underlay: Reach,
    /// Echoes to the peer's own overlay address, up to the overlay's MTU; `None` where it has none.
    pub overlay: Option<Overlay>,
}

/// What the overlay carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlay {
    pub echo: Reach,
    /// `None` where the echoes did not come back in full size.
    pub offload: Option<Offload>,
}

/// How large an echo may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// The largest came back.
    Full {
        /// Length of the IP packet, in bytes.
        size: u16,
        /// There and back.
        took: Duration,
    },
    /// Only smaller ones do.
    Smaller {
        /// The largest that came back, in bytes.
        size: u16,
        /// What should.
        wanted: u16,
    },
    /// None did; what was heard instead, if anything.
    Nothing(Option<String>),
    /// They could not be sent.
    Unsent(String),
}

impl Reach {
    pub(super) fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. })
    }
}

/// What became of datagrams whose checksum and segmentation are left to the devices on the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// Both arrive.
    Fine,
    /// Checksummed ones are lost and those without a checksum arrive.
    BadChecksum,
    /// Single ones arrive, those that were handed over as one and segmented on the way do not.
    BadSegments,
    /// The peer answers at no closed port, however it is asked.
    Silent,
}
