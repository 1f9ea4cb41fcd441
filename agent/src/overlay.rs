//! Which routes, neighbours and FDB entries carry the overlay, and what must change for them to be there:
//! desired minus actual. Pure: it reads and writes nothing.
//!
//! As flannel does, a peer's subnet is routed to the base of the subnet on the VXLAN device (`onlink`), the
//! base is a permanent neighbour with the peer's VTEP MAC address, and the FDB knows behind which VTEP that
//! MAC address is. A direct peer is a plain route by its public address. Every route carries Loden's own
//! protocol number; a route in flannel's form on the VXLAN device is adopted: replaced in place.
//!
//! What is ours, and so may be removed: on the VXLAN device, routes with our protocol number or in flannel's
//! form, permanent neighbours inside the network, and permanent unicast FDB entries; on other links, routes
//! into the network with our protocol number. Everything else is foreign and stays.

mod delta;
mod expected;
mod plan;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

pub use self::{delta::PeerChanges, expected::Expected, plan::plan};
use crate::{
    family::{Family, V4},
    kernel::{FdbEntry, Neighbour, Route, mac_text},
};

/// Another node, as its lease describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(bound = "")]
pub struct OverlayPeer<F: Family = V4> {
    /// Its subnet.
    pub subnet: F::Net,
    /// Its public address, where its VXLAN device listens.
    pub vtep: F::Addr,
    /// The MAC address of its VXLAN device. Not used for a direct peer.
    pub vtep_mac: [u8; 6],
    /// It is on the same link and packets go to it as they are, without encapsulation.
    pub direct: bool,
}

/// The overlay as it ought to be on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(bound = "")]
pub struct Desired<F: Family = V4> {
    /// The whole network, of which every subnet is a part.
    pub network: F::Net,
    /// The subnet of this node.
    pub own: F::Net,
    /// The index of the VXLAN device; 0 where the backend has none, and every peer is direct.
    pub device: u32,
    /// The index of the uplink, by which direct peers are reached.
    pub uplink: u32,
    /// The device takes the whole network by one route, and knows itself which peer a packet is for: WireGuard. Packets
    /// to a subnet of nobody end there, and never leave in the clear by another route.
    pub whole: bool,
    /// The peers by their subnets.
    pub peers: BTreeMap<F::Net, OverlayPeer<F>>,
}

/// What the kernel has, as it says; see [`crate::kernel::Kernel::overlay_actual`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Actual<F: Family = V4> {
    /// The routes on the VXLAN device, and those with our protocol number anywhere.
    pub routes: Vec<Route<F>>,
    /// The neighbours on the VXLAN device.
    pub neighbours: Vec<Neighbour<F>>,
    /// The FDB of the VXLAN device.
    pub fdb: Vec<FdbEntry<F>>,
}

/// One step of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op<F: Family = V4> {
    /// Frames to this MAC address go to this VTEP.
    SetFdb {
        /// The VXLAN device.
        device: u32,
        /// The peer's VTEP MAC address.
        mac: [u8; 6],
        /// The peer's public address.
        dst: F::Addr,
    },
    /// Packets to this next hop go to this MAC address.
    SetNeighbour {
        /// The VXLAN device.
        device: u32,
        /// The base of the peer's subnet.
        address: F::Addr,
        /// The peer's VTEP MAC address.
        mac: [u8; 6],
    },
    /// The route to a peer's subnet, made or put in the place of another.
    SetRoute(Route<F>),
    /// A route that leads to nobody any more.
    DelRoute(Route<F>),
    /// A neighbour of no peer.
    DelNeighbour {
        /// The VXLAN device.
        device: u32,
        /// Its address.
        address: F::Addr,
    },
    /// An FDB entry of no peer.
    DelFdb {
        /// The VXLAN device.
        device: u32,
        /// The MAC address.
        mac: [u8; 6],
        /// The VTEP behind which it was.
        dst: F::Addr,
    },
}

impl<F: Family> Op<F> {
    /// Whether it takes something away.
    #[must_use]
    pub fn is_removal(&self) -> bool {
        matches!(self, Self::DelRoute(_) | Self::DelNeighbour { .. } | Self::DelFdb { .. })
    }
}

impl<F: Family> fmt::Display for Op<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetFdb { mac, dst, .. } => write!(f, "FDB {} to {dst}", mac_text(*mac)),
            Self::SetNeighbour { address, mac, .. } => write!(f, "neighbour {address} at {}", mac_text(*mac)),
            Self::SetRoute(route) => write!(f, "route {}", Way(route)),
            Self::DelRoute(route) => write!(f, "no more route {}", Way(route)),
            Self::DelNeighbour { address, .. } => write!(f, "no more neighbour {address}"),
            Self::DelFdb { mac, dst, .. } => write!(f, "no more FDB {} to {dst}", mac_text(*mac)),
        }
    }
}

struct Way<'a, F: Family>(&'a Route<F>);

impl<F: Family> fmt::Display for Way<'_, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Route { dst, gateway, ifindex, .. } = self.0;
        write!(f, "{dst}")?;
        if let Some(gateway) = gateway {
            write!(f, " via {gateway}")?;
        }
        match ifindex {
            Some(ifindex) => write!(f, " on link {ifindex}"),
            None => Ok(()),
        }
    }
}

/// The steps that make the actual state the desired one.
///
/// Whatever is set comes before whatever is removed, in the order FDB, neighbour, route (flannel sets the
/// neighbour first; this way round a peer's new MAC address is known to the FDB before a packet carries it),
/// and removals come in the reverse order: no packet finds a route that leads nowhere.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan<F: Family = V4> {
    /// The steps, in order.
    pub ops: Vec<Op<F>>,
    /// The peers that cannot be served, and why.
    pub refused: Vec<(OverlayPeer<F>, Refusal<F>)>,
}

impl<F: Family> Plan<F> {
    /// Whether everything is as it ought to be.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }
}

/// Why a peer gets no route: its lease is wrong, or contradicts another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal<F: Family = V4> {
    /// The subnet is not a part of the network.
    #[error("its subnet is outside the network")]
    OutsideNetwork,
    /// It would take packets that are for this node.
    #[error("its subnet overlaps this node's own")]
    OverlapsOwn,
    /// The MAC address is zero or a group's.
    #[error("its VtepMAC is not a unicast address")]
    BadMac,
    /// The public address is none of a host.
    #[error("its public address is not a unicast address")]
    BadVtep,
    /// Two peers with one MAC address behind different VTEPs: the one with the lower subnet is served.
    #[error("its VtepMAC is that of {0} too, at another public address")]
    MacOf(F::Net),
    /// Two subnets with the same base: the shorter prefix is served.
    #[error("its subnet has the same base as {0}")]
    BaseOf(F::Net),
}
