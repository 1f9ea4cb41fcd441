//! The neighbour tables (ARP, ND) and the forwarding databases of bridges and VXLAN devices.
//!
//! Both travel in the same netlink message: a neighbour has its address family, an FDB entry the bridge family.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{
        NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState as WireState,
    },
};

use super::{Kernel, Result, wire_family};
use crate::family::{Family, V4};

const NUD_NOARP: u16 = 0x40;
const NUD_PERMANENT: u16 = 0x80;

/// An entry of the neighbour table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neighbour<F: Family = V4> {
    /// The link on which it is.
    pub ifindex: u32,
    /// Its address.
    pub address: F::Addr,
    /// Its MAC address, where it is known.
    pub mac: Option<[u8; 6]>,
    /// What the kernel thinks of it.
    pub state: NeighbourState,
}

/// The state of a neighbour (`NUD_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NeighbourState {
    /// Set by hand, never checked.
    Permanent,
    /// Needs no ARP: broadcast, multicast.
    NoArp,
    /// Confirmed of late.
    Reachable,
    /// Known, not confirmed of late.
    Stale,
    /// Being confirmed.
    Probing,
    /// Being asked for, no answer yet.
    Incomplete,
    /// Did not answer.
    Failed,
    /// No state yet.
    None,
}

impl NeighbourState {
    /// Whether the MAC address may be believed: it was set, or it answered and is not known to be gone.
    #[must_use]
    pub fn is_valid(self) -> bool {
        matches!(self, Self::Permanent | Self::NoArp | Self::Reachable | Self::Stale | Self::Probing)
    }
}

/// An entry of a forwarding database: behind which port or remote VTEP a MAC address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FdbEntry<F: Family = V4> {
    /// The port of a bridge, or the VXLAN device.
    pub ifindex: u32,
    /// The MAC address.
    pub mac: [u8; 6],
    /// The remote VTEP, in the FDB of a VXLAN device.
    pub dst: Option<F::Addr>,
    /// The bridge in whose FDB it is, for a port.
    pub master: Option<u32>,
    /// In the FDB of the device itself (`self`), as VXLAN entries are.
    pub own: bool,
    /// Set by hand, never ages. In the FDB of a bridge: the address of the bridge or the port itself.
    pub permanent: bool,
    /// Set by hand to a port of a bridge (`static`).
    pub fixed: bool,
    /// Set by a control plane (`extern_learn`).
    pub ext_learned: bool,
    /// The VLAN, 1 to 4094, on a bridge that filters by it.
    pub vlan: Option<u16>,
}

/// Whose FDB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FdbOf {
    /// All there are.
    All,
    /// Of this device, such as a VXLAN device, or a port of a bridge.
    Device(u32),
    /// Of this bridge: all of its ports.
    Bridge(u32),
}

impl Kernel {
    /// The IPv4 neighbours on one link.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn neighbours(&self, ifindex: u32) -> Result<Vec<Neighbour>> {
        self.neighbours_of(ifindex).await
    }

    /// The neighbours of a family on one link.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn neighbours_of<F: Family>(&self, ifindex: u32) -> Result<Vec<Neighbour<F>>> {
        let mut message = NeighbourMessage::default();
        message.header.family = wire_family::<F>();
        message.attributes.push(NeighbourAttribute::IfIndex(ifindex));
        let parse = |message| match message {
            RouteNetlinkMessage::NewNeighbour(message) => {
                parse(&message).filter(|neighbour: &Neighbour<F>| neighbour.ifindex == ifindex)
            }
            _ => None,
        };
        self.dump_as("listing the neighbours", RouteNetlinkMessage::GetNeighbour(message), parse).await
    }

    /// The entries of forwarding databases.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn fdb(&self, of: FdbOf) -> Result<Vec<FdbEntry>> {
        self.fdb_of(of).await
    }

    /// As [`Self::fdb`], where the underlay of VXLAN devices is of this family.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn fdb_of<F: Family>(&self, of: FdbOf) -> Result<Vec<FdbEntry<F>>> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        match of {
            FdbOf::All => {}
            FdbOf::Device(ifindex) => message.header.ifindex = ifindex,
            FdbOf::Bridge(ifindex) => message.attributes.push(NeighbourAttribute::Controller(ifindex)),
        }
        let wanted = |entry: &FdbEntry<F>| match of {
            FdbOf::All => true,
            FdbOf::Device(ifindex) => entry.ifindex == ifindex,
            FdbOf::Bridge(ifindex) => entry.master == Some(ifindex),
        };
        let parse = |message| match message {
            RouteNetlinkMessage::NewNeighbour(message) => parse_fdb(&message).filter(wanted),
            _ => None,
        };
        self.dump_as("listing the FDB", RouteNetlinkMessage::GetNeighbour(message), parse).await
    }
}

/// The message for a permanent neighbour; without a MAC address, to delete it.
pub(super) fn neighbour_message<F: Family>(
    ifindex: u32,
    address: F::Addr,
    mac: Option<[u8; 6]>,
) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = wire_family::<F>();
    message.header.ifindex = ifindex;
    message.header.state = WireState::Permanent;
    message.attributes.push(NeighbourAttribute::Destination(wire_address::<F>(address)));
    message.attributes.extend(mac.map(|mac| NeighbourAttribute::LinkLayerAddress(mac.to_vec())));
    message
}

/// The message for an entry of a VXLAN device's FDB: `self`, `permanent`.
pub(super) fn fdb_message<F: Family>(ifindex: u32, mac: [u8; 6], dst: F::Addr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = ifindex;
    message.header.state = WireState::Permanent;
    message.header.flags = NeighbourFlags::Own;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    message.attributes.push(NeighbourAttribute::Destination(wire_address::<F>(dst)));
    message
}

fn wire_address<F: Family>(address: F::Addr) -> NeighbourAddress {
    match address.into() {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    }
}

/// `None` for what is not a neighbour of this family.
pub(super) fn parse<F: Family>(message: &NeighbourMessage) -> Option<Neighbour<F>> {
    if message.header.family != wire_family::<F>() || message.header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(address) => ip(address).and_then(F::addr),
        _ => None,
    })?;
    Some(Neighbour {
        ifindex: message.header.ifindex,
        address,
        mac: mac(&message.attributes),
        state: state(message.header.state),
    })
}

/// `None` for what is not an FDB entry with a MAC address, and for a remote VTEP of the other family.
pub(super) fn parse_fdb<F: Family>(message: &NeighbourMessage) -> Option<FdbEntry<F>> {
    if message.header.family != AddressFamily::Bridge {
        return None;
    }
    let bits = u16::from(message.header.state);
    let mut entry = FdbEntry {
        ifindex: message.header.ifindex,
        mac: mac(&message.attributes)?,
        dst: None,
        master: None,
        own: message.header.flags.contains(NeighbourFlags::Own),
        permanent: bits & NUD_PERMANENT != 0,
        fixed: bits & NUD_NOARP != 0,
        ext_learned: message.header.flags.contains(NeighbourFlags::ExtLearned),
        vlan: None,
    };
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(address) => entry.dst = Some(ip(address).and_then(F::addr)?),
            NeighbourAttribute::Controller(master) => entry.master = Some(*master),
            NeighbourAttribute::Vlan(vlan) => entry.vlan = (*vlan != 0).then_some(*vlan),
            _ => {}
        }
    }
    Some(entry)
}

/// In the bridge family the crate leaves the address as bytes.
fn ip(address: &NeighbourAddress) -> Option<IpAddr> {
    match address {
        NeighbourAddress::Inet(address) => Some((*address).into()),
        NeighbourAddress::Inet6(address) => Some((*address).into()),
        NeighbourAddress::Other(bytes) => {
            let v4 = <[u8; 4]>::try_from(bytes.as_slice()).map(|it| Ipv4Addr::from(it).into());
            v4.or_else(|_| <[u8; 16]>::try_from(bytes.as_slice()).map(|it| Ipv6Addr::from(it).into())).ok()
        }
        _ => None,
    }
}

fn mac(attributes: &[NeighbourAttribute]) -> Option<[u8; 6]> {
    attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(mac) => mac.as_slice().try_into().ok(),
        _ => None,
    })
}

fn state(state: WireState) -> NeighbourState {
    match state {
        WireState::Permanent => NeighbourState::Permanent,
        WireState::Noarp => NeighbourState::NoArp,
        WireState::Reachable => NeighbourState::Reachable,
        WireState::Stale => NeighbourState::Stale,
        WireState::Delay | WireState::Probe => NeighbourState::Probing,
        WireState::Incomplete => NeighbourState::Incomplete,
        WireState::Failed => NeighbourState::Failed,
        WireState::Other(bits) if bits & NUD_PERMANENT != 0 => NeighbourState::Permanent,
        WireState::Other(bits) if bits & NUD_NOARP != 0 => NeighbourState::NoArp,
        _ => NeighbourState::None,
    }
}
