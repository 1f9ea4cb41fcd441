//! Room for the overlay's headers in front of what pods send.
//!
//! A socket leaves as much room in front of a packet as the device asks for by which it goes, and a veth asks for none: where
//! the programs grow such a packet, the kernel allocates a larger one and copies. (TCP leaves enough by itself.) What a
//! veth asks for is set by its bridge, to what the neediest port asks for. So a VXLAN device, which asks for as much as
//! encapsulation takes, becomes a port of the pods' bridge. It is never up: no packet passes it, and it has no socket.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    link::{InfoVxlan, LinkAttribute, LinkMessage},
};

use super::{How, Kernel, Link, LinkKind, Result, VxlanAttrs, vxlan::vxlan_info};

/// What the devices' names begin with; the bridge's index follows.
const PREFIX: &str = "loden-hr";
/// UDP's discard: nobody's VXLAN has it, and a device that is not up does not listen.
const PORT: u16 = 9;
/// The highest of all: a bridge without a MAC of its own takes the lowest of its ports'.
const MAC: [u8; 6] = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff];
/// The largest: a bridge without an MTU of its own takes the smallest of its ports'. In bytes.
const MTU: u32 = 65_535;

impl Link {
    /// For which family's headers ([`room_for`]) this device asks for room, if it is here for that.
    #[must_use]
    pub fn asks_for_room(&self) -> Option<IpAddr> {
        match self.kind {
            LinkKind::Vxlan(VxlanAttrs { port: PORT, local, .. }) if self.name.starts_with(PREFIX) => local,
            _ => None,
        }
    }
}

/// The device's local address, by which the kernel knows for which outer header to ask.
#[must_use]
pub fn room_for(outer_v6: bool) -> IpAddr {
    if outer_v6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() }
}

impl Kernel {
    /// Gives the bridge a port that asks for room for outer headers of this family ([`room_for`]).
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn ask_for_room(&self, bridge: u32, local: IpAddr) -> Result<()> {
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(format!("{PREFIX}{bridge}")),
            LinkAttribute::Address(MAC.to_vec()),
            LinkAttribute::Mtu(MTU),
            LinkAttribute::Controller(bridge),
            vxlan_info(vec![
                // No two devices may have both VNI and port.
                InfoVxlan::Id(bridge & 0xff_ffff),
                match local {
                    IpAddr::V4(local) => InfoVxlan::Local(local),
                    IpAddr::V6(local) => InfoVxlan::Local6(local),
                },
                InfoVxlan::Learning(false),
                InfoVxlan::Port(PORT),
            ]),
        ];
        let what = || format!("creating a port of bridge {bridge} that asks for headroom");
        self.change(what, RouteNetlinkMessage::NewLink(message), How::Create).await
    }

    /// Removes the devices that ask for room; says which.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn ask_for_no_room(&self) -> Result<Vec<String>> {
        let mut removed = Vec::new();
        for link in self.links().await? {
            if link.asks_for_room().is_some() {
                self.delete_link(link.index).await?;
                removed.push(link.name);
            }
        }
        Ok(removed)
    }
}
