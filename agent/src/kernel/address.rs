//! IP addresses of links.

use nix::errno::Errno;
use rtnetlink::packet_route::{
    RouteNetlinkMessage,
    address::{self as wire, AddressAttribute, AddressFlags, AddressMessage},
};

use super::{How, Kernel, Result, wire_family};
use crate::family::{Family, V4};

/// An IP address of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address<F: Family = V4> {
    /// The link that has it.
    pub ifindex: u32,
    /// The address itself (`IFA_LOCAL`).
    pub address: F::Addr,
    /// The prefix length, in bits.
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
        self.addresses_of().await
    }

    /// All addresses of a family in the namespace.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn addresses_of<F: Family>(&self) -> Result<Vec<Address<F>>> {
        let mut message = AddressMessage::default();
        message.header.family = wire_family::<F>();
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
    pub async fn add_address<F: Family>(&self, ifindex: u32, address: F::Addr, prefix_len: u8) -> Result<()> {
        let what = || format!("adding the address {address}/{prefix_len} to link {ifindex}");
        let message = RouteNetlinkMessage::NewAddress(message::<F>(ifindex, address, prefix_len));
        self.change(what, message, How::Replace).await
    }

    /// Takes an address from a link; that it does not have it is not an error.
    ///
    /// # Errors
    ///
    /// As the kernel says.
    pub async fn delete_address<F: Family>(
        &self,
        ifindex: u32,
        address: F::Addr,
        prefix_len: u8,
    ) -> Result<()> {
        let what = || format!("deleting the address {address}/{prefix_len} of link {ifindex}");
        let message = RouteNetlinkMessage::DelAddress(message::<F>(ifindex, address, prefix_len));
        match self.change(what, message, How::Existing).await {
            Err(error) if error.errno() == Some(Errno::EADDRNOTAVAIL) => Ok(()),
            done => done,
        }
    }
}

fn message<F: Family>(ifindex: u32, address: F::Addr, prefix_len: u8) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = wire_family::<F>();
    message.header.index = ifindex;
    message.header.prefix_len = prefix_len;
    // Both the same: no other end.
    message.attributes.push(AddressAttribute::Address(address.into()));
    message.attributes.push(AddressAttribute::Local(address.into()));
    if F::BITS != 32 {
        // Nobody else can have it; while others were asked (RFC 4862) it would not answer.
        message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    message
}

/// `None` for another family and for what has no address.
pub(super) fn parse<F: Family>(message: &AddressMessage) -> Option<Address<F>> {
    let mut local = None;
    let mut other = None;
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = F::addr(*address),
            AddressAttribute::Address(address) => other = F::addr(*address),
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
