//! The two address families, so that one source serves both: what is generic takes a [`Family`] and is IPv4 where
//! none is named.
//!
//! A route of one family cannot be mixed up with one of the other: they are different types.

use std::{
    fmt::{Debug, Display},
    hash::Hash,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Serialize, de::DeserializeOwned};

/// An address family: [`V4`] or [`V6`].
pub trait Family: Copy + Debug + Default + Eq + Ord + Hash + Send + Sync + 'static {
    /// An address.
    type Addr: Copy
        + Debug
        + Display
        + Eq
        + Ord
        + Hash
        + FromStr
        + Into<IpAddr>
        + Serialize
        + DeserializeOwned
        + Send
        + Sync
        + 'static;
    /// A prefix; may have host bits.
    type Net: Copy
        + Debug
        + Default
        + Display
        + Eq
        + Ord
        + Hash
        + FromStr
        + From<Self::Addr>
        + Into<IpNet>
        + Serialize
        + DeserializeOwned
        + Send
        + Sync
        + 'static;

    /// How people call it.
    const NAME: &'static str;
    /// Bits of an address.
    const BITS: u8;
    /// The unspecified address.
    const UNSPECIFIED: Self::Addr;

    /// The address, where it is of this family.
    fn addr(address: IpAddr) -> Option<Self::Addr>;

    /// The prefix, where it is of this family.
    fn prefix(net: IpNet) -> Option<Self::Net>;

    /// The prefix of an address, host bits kept; `None` where the length is more than [`Self::BITS`].
    fn net(address: Self::Addr, prefix_len: u8) -> Option<Self::Net>;

    /// The first address of a prefix.
    fn base(net: Self::Net) -> Self::Addr;

    /// The prefix without host bits.
    fn trunc(net: Self::Net) -> Self::Net;

    /// The address as a number.
    fn number(address: Self::Addr) -> u128;

    /// The address that is this number; `None` where it has more than [`Self::BITS`] bits.
    fn of_number(number: u128) -> Option<Self::Addr>;

    /// The length of a prefix, in bits.
    fn prefix_len(net: Self::Net) -> u8 {
        net.into().prefix_len()
    }

    /// Whether an address lies in a prefix.
    fn contains(net: Self::Net, address: Self::Addr) -> bool {
        net.into().contains(&address.into())
    }

    /// Whether all of a prefix lies in another.
    fn covers(net: Self::Net, part: Self::Net) -> bool {
        net.into().contains(&part.into())
    }

    /// Whether two prefixes share an address.
    fn overlap(a: Self::Net, b: Self::Net) -> bool {
        Self::covers(a, b) || Self::covers(b, a)
    }

    /// Whether it can be the address of one host that others reach.
    fn is_host(address: Self::Addr) -> bool {
        let address = address.into();
        let broadcast = address == IpAddr::V4(Ipv4Addr::BROADCAST);
        !address.is_unspecified() && !address.is_multicast() && !address.is_loopback() && !broadcast
    }
}

/// IPv4.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct V4;

/// IPv6.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct V6;

impl Family for V4 {
    type Addr = Ipv4Addr;
    type Net = Ipv4Net;

    const NAME: &'static str = "IPv4";
    const BITS: u8 = 32;
    const UNSPECIFIED: Ipv4Addr = Ipv4Addr::UNSPECIFIED;

    fn addr(address: IpAddr) -> Option<Ipv4Addr> {
        match address {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        }
    }

    fn prefix(net: IpNet) -> Option<Ipv4Net> {
        match net {
            IpNet::V4(net) => Some(net),
            IpNet::V6(_) => None,
        }
    }

    fn net(address: Ipv4Addr, prefix_len: u8) -> Option<Ipv4Net> {
        Ipv4Net::new(address, prefix_len).ok()
    }

    fn base(net: Ipv4Net) -> Ipv4Addr {
        net.network()
    }

    fn trunc(net: Ipv4Net) -> Ipv4Net {
        net.trunc()
    }

    fn number(address: Ipv4Addr) -> u128 {
        u32::from(address).into()
    }

    fn of_number(number: u128) -> Option<Ipv4Addr> {
        u32::try_from(number).ok().map(Ipv4Addr::from)
    }
}

impl Family for V6 {
    type Addr = Ipv6Addr;
    type Net = Ipv6Net;

    const NAME: &'static str = "IPv6";
    const BITS: u8 = 128;
    const UNSPECIFIED: Ipv6Addr = Ipv6Addr::UNSPECIFIED;

    fn addr(address: IpAddr) -> Option<Ipv6Addr> {
        match address {
            IpAddr::V4(_) => None,
            IpAddr::V6(address) => Some(address),
        }
    }

    fn prefix(net: IpNet) -> Option<Ipv6Net> {
        match net {
            IpNet::V4(_) => None,
            IpNet::V6(net) => Some(net),
        }
    }

    fn net(address: Ipv6Addr, prefix_len: u8) -> Option<Ipv6Net> {
        Ipv6Net::new(address, prefix_len).ok()
    }

    fn base(net: Ipv6Net) -> Ipv6Addr {
        net.network()
    }

    fn trunc(net: Ipv6Net) -> Ipv6Net {
        net.trunc()
    }

    fn number(address: Ipv6Addr) -> u128 {
        address.into()
    }

    fn of_number(number: u128) -> Option<Ipv6Addr> {
        Some(number.into())
    }
}
