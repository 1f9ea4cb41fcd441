//! Neighbour discovery answered for others (NDP proxy): what a bridge says for addresses that its hosts believe to be on
//! their link and that are not. Of IPv4 a single sysctl (`proxy_arp`) does that; here each address has an entry.

use std::{collections::BTreeSet, net::Ipv6Addr};

use nix::errno::Errno;
use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage},
    route::RouteProtocol,
};

use super::{How, Kernel, POD_ROUTE_PROTOCOL, Result, wire_family};
use crate::family::V6;

impl Kernel {
    /// The addresses for which a link answers because of [`Self::answer_for`]; those of others are theirs.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn answered_for(&self, ifindex: u32) -> Result<BTreeSet<Ipv6Addr>> {
        let mut message = NeighbourMessage::default();
        message.header.family = wire_family::<V6>();
        message.header.flags = NeighbourFlags::Proxy;
        let message = RouteNetlinkMessage::GetNeighbour(message);
        let found = self.dump("listing the proxied neighbours", message).await?;
        Ok(found.iter().filter_map(|message| own(message, ifindex)).collect())
    }

    /// Makes a link answer for an address; that it does already is not an error.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn answer_for(&self, ifindex: u32, address: Ipv6Addr) -> Result<()> {
        let what = || format!("making link {ifindex} answer for {address}");
        self.change(what, RouteNetlinkMessage::NewNeighbour(message(ifindex, address)), How::Replace).await
    }

    /// Ends that; that it does not answer is not an error.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn stop_answering_for(&self, ifindex: u32, address: Ipv6Addr) -> Result<()> {
        let what = || format!("making link {ifindex} answer for {address} no longer");
        let message = RouteNetlinkMessage::DelNeighbour(message(ifindex, address));
        match self.change(what, message, How::Existing).await {
            Err(error) if error.errno() == Some(Errno::ENOENT) => Ok(()),
            done => done,
        }
    }
}

fn message(ifindex: u32, address: Ipv6Addr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = wire_family::<V6>();
    message.header.ifindex = ifindex;
    message.header.flags = NeighbourFlags::Proxy;
    message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)));
    message.attributes.push(NeighbourAttribute::Protocol(RouteProtocol::Other(POD_ROUTE_PROTOCOL)));
    message
}

fn own(message: &RouteNetlinkMessage, ifindex: u32) -> Option<Ipv6Addr> {
    let RouteNetlinkMessage::NewNeighbour(message) = message else { return None };
    let protocol = NeighbourAttribute::Protocol(RouteProtocol::Other(POD_ROUTE_PROTOCOL));
    if message.header.ifindex != ifindex || !message.attributes.contains(&protocol) {
        return None;
    }
    message.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => Some(*address),
        _ => None,
    })
}
