//! The neighbour table (ARP) and the forwarding databases of bridges and VXLAN devices.
//!
//! Both travel in the same netlink message: a neighbour has the IPv4 family, an FDB entry the bridge family.

use std::net::Ipv4Addr;

use rtnetlink::packet_route::{
    AddressFamily, RouteNetlinkMessage,
    neighbour::{
        NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState as WireState,
    },
};

use super::{Kernel, Result};

const NUD_NOARP: u16 = 0x40;
const NUD_PERMANENT: u16 = 0x80;

/// An entry of the neighbour table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neighbour {
    /// The link on which it is.
    pub ifindex: u32,
    /// Its IPv4 address.
    pub address: Ipv4Addr,
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
pub struct FdbEntry {
    /// The port of a bridge, or the VXLAN device.
    pub ifindex: u32,
    /// The MAC address.
    pub mac: [u8; 6],
    /// The remote VTEP, in the FDB of a VXLAN device.
    pub dst: Option<Ipv4Addr>,
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
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.attributes.push(NeighbourAttribute::IfIndex(ifindex));
        let found = self.dump("listing the neighbours", RouteNetlinkMessage::GetNeighbour(message)).await?;
        Ok(found
            .iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewNeighbour(message) => parse(message),
                _ => None,
            })
            .filter(|neighbour| neighbour.ifindex == ifindex)
            .collect())
    }

    /// The entries of forwarding databases.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn fdb(&self, of: FdbOf) -> Result<Vec<FdbEntry>> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        match of {
            FdbOf::All => {}
            FdbOf::Device(ifindex) => message.header.ifindex = ifindex,
            FdbOf::Bridge(ifindex) => message.attributes.push(NeighbourAttribute::Controller(ifindex)),
        }
        let found = self.dump("listing the FDB", RouteNetlinkMessage::GetNeighbour(message)).await?;
        let wanted = |entry: &FdbEntry| match of {
            FdbOf::All => true,
            FdbOf::Device(ifindex) => entry.ifindex == ifindex,
            FdbOf::Bridge(ifindex) => entry.master == Some(ifindex),
        };
        Ok(found
            .iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewNeighbour(message) => parse_fdb(message),
                _ => None,
            })
            .filter(wanted)
            .collect())
    }
}

/// The message for a permanent neighbour; without a MAC address, to delete it.
pub(super) fn neighbour_message(ifindex: u32, address: Ipv4Addr, mac: Option<[u8; 6]>) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.ifindex = ifindex;
    message.header.state = WireState::Permanent;
    message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet(address)));
    message.attributes.extend(mac.map(|mac| NeighbourAttribute::LinkLayerAddress(mac.to_vec())));
    message
}

/// The message for an entry of a VXLAN device's FDB: `self`, `permanent`.
pub(super) fn fdb_message(ifindex: u32, mac: [u8; 6], dst: Ipv4Addr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = ifindex;
    message.header.state = WireState::Permanent;
    message.header.flags = NeighbourFlags::Own;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet(dst)));
    message
}

/// `None` for what is not an IPv4 neighbour.
pub(super) fn parse(message: &NeighbourMessage) -> Option<Neighbour> {
    if message.header.family != AddressFamily::Inet || message.header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => Some(*address),
        _ => None,
    })?;
    Some(Neighbour {
        ifindex: message.header.ifindex,
        address,
        mac: mac(&message.attributes),
        state: state(message.header.state),
    })
}

/// `None` for what is not an FDB entry with a MAC address.
pub(super) fn parse_fdb(message: &NeighbourMessage) -> Option<FdbEntry> {
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
            NeighbourAttribute::Destination(address) => entry.dst = vtep(address),
            NeighbourAttribute::Controller(master) => entry.master = Some(*master),
            NeighbourAttribute::Vlan(vlan) => entry.vlan = (*vlan != 0).then_some(*vlan),
            _ => {}
        }
    }
    Some(entry)
}

/// In the bridge family the crate leaves the address as bytes.
fn vtep(address: &NeighbourAddress) -> Option<Ipv4Addr> {
    match address {
        NeighbourAddress::Inet(address) => Some(*address),
        NeighbourAddress::Other(bytes) => <[u8; 4]>::try_from(bytes.as_slice()).ok().map(Ipv4Addr::from),
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
