//! IPv4 addresses of links.

use std::net::{IpAddr, Ipv4Addr};

use nix::errno::Errno;
use rtnetlink::{
    AddressMessageBuilder,
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{self as wire, AddressAttribute, AddressFlags, AddressMessage},
    },
};

use super::{How, Kernel, Result};

/// An IPv4 address of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// The link that has it.
    pub ifindex: u32,
    /// The address itself (`IFA_LOCAL`).
    pub address: Ipv4Addr,
    /// The prefix length, 0 to 32.
    pub prefix_len: u8,
    /// How far it is valid.
    pub scope: AddressScope,
    /// Has no lifetime (as against one from DHCP).
    pub permanent: bool,
    /// `IFA_F_SECONDARY`: one of the same network was there before. IPv6 calls the same bit temporary.
    pub secondary: bool,
    /// Not to be used for new connections.
    pub deprecated: bool,
}

/// How far an address is valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum AddressScope {
    /// Everywhere.
    Universe,
    /// On its link only.
    Link,
    /// On this host only.
    Host,
    /// Another scope, by its number.
    Other(u8),
}

impl Kernel {
    /// All IPv4 addresses of the namespace.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn addresses(&self) -> Result<Vec<Address>> {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        let found = self.dump("listing the addresses", RouteNetlinkMessage::GetAddress(message)).await?;
        Ok(found
            .iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewAddress(message) => parse(message),
                _ => None,
            })
            .collect())
    }

    /// Gives a link an address; that it has it already is not an error.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn add_address(&self, ifindex: u32, address: Ipv4Addr, prefix_len: u8) -> Result<()> {
        let what = || format!("adding the address {address}/{prefix_len} to link {ifindex}");
        let message = RouteNetlinkMessage::NewAddress(message(ifindex, address, prefix_len));
        self.change(what, message, How::Replace).await
    }

    /// Takes an address from a link; that it does not have it is not an error.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn delete_address(&self, ifindex: u32, address: Ipv4Addr, prefix_len: u8) -> Result<()> {
        let what = || format!("deleting the address {address}/{prefix_len} of link {ifindex}");
        let message = RouteNetlinkMessage::DelAddress(message(ifindex, address, prefix_len));
        match self.change(what, message, How::Existing).await {
            Err(error) if error.errno() == Some(Errno::EADDRNOTAVAIL) => Ok(()),
            done => done,
        }
    }
}

fn message(ifindex: u32, address: Ipv4Addr, prefix_len: u8) -> AddressMessage {
    AddressMessageBuilder::<Ipv4Addr>::new().index(ifindex).address(address, prefix_len).build()
}

/// `None` for IPv6 and for what has no address.
pub(super) fn parse(message: &AddressMessage) -> Option<Address> {
    let mut local = None;
    let mut other = None;
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(IpAddr::V4(address)) => local = Some(*address),
            AddressAttribute::Address(IpAddr::V4(address)) => other = Some(*address),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    // With a peer (point to point) IFA_ADDRESS is the other side; without one it may be all there is.
    Some(Address {
        ifindex: message.header.index,
        address: local.or(other)?,
        prefix_len: message.header.prefix_len,
        scope: scope(message.header.scope),
        permanent: flags.contains(AddressFlags::Permanent),
        secondary: flags.contains(AddressFlags::Secondary),
        deprecated: flags.contains(AddressFlags::Deprecated),
    })
}

fn scope(scope: wire::AddressScope) -> AddressScope {
    match scope {
        wire::AddressScope::Universe => AddressScope::Universe,
        wire::AddressScope::Link => AddressScope::Link,
        wire::AddressScope::Host => AddressScope::Host,
        other => AddressScope::Other(other.into()),
    }
}
