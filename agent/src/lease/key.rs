//! The last segment of a lease's key: `10.5.34.0-24`, dual-stack `10.5.34.0-24&fc00:0:0:22::-64`, IPv6 alone
//! `0.0.0.0-0&fc00:0:0:22::-64`, which is what flannel makes of an IPv4 subnet that is not there.

use std::{
    fmt::{self, Display},
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use thiserror::Error;

use crate::{family::Family, uplink::Families};

/// A parsed key. Displays as flannel writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseKey {
    /// The IPv4 subnet, host bits cleared.
    pub subnet: Option<Ipv4Net>,
    /// The IPv6 subnet, host bits cleared.
    pub subnet_v6: Option<Ipv6Net>,
}

/// Why a key is none of a lease.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "{key:?} is no lease key: {reason}; it must look like \"10.5.34.0-24\", \"10.5.34.0-24&fc00:0:0:22::-64\" or \"0.0.0.0-0&fc00:0:0:22::-64\""
)]
pub struct KeyError {
    key: String,
    reason: &'static str,
}

impl LeaseKey {
    /// The key of an IPv4 lease.
    #[must_use]
    pub fn v4(subnet: Ipv4Net) -> Self {
        Self { subnet: Some(subnet.trunc()), subnet_v6: None }
    }

    /// The key of an IPv6 lease.
    #[must_use]
    pub fn v6(subnet: Ipv6Net) -> Self {
        Self { subnet: None, subnet_v6: Some(subnet.trunc()) }
    }

    /// Of which families there are subnets.
    #[must_use]
    pub fn families(&self) -> Families {
        Families { v4: self.subnet.is_some(), v6: self.subnet_v6.is_some() }
    }

    /// The subnet of a family.
    #[must_use]
    pub fn half<F: Family>(&self) -> Option<F::Net> {
        let halves = [self.subnet.map(IpNet::V4), self.subnet_v6.map(IpNet::V6)];
        halves.into_iter().flatten().find_map(F::prefix)
    }

    /// The same without the subnet of a family; `None` where nothing is left.
    #[must_use]
    pub fn without<F: Family>(&self) -> Option<Self> {
        let subnet = self.subnet.filter(|subnet| F::prefix((*subnet).into()).is_none());
        let subnet_v6 = self.subnet_v6.filter(|subnet| F::prefix((*subnet).into()).is_none());
        (subnet.is_some() || subnet_v6.is_some()).then_some(Self { subnet, subnet_v6 })
    }

    /// The subnets for people: `10.5.34.0/24 and fc00:0:0:22::/64`.
    #[must_use]
    pub fn subnets(&self) -> String {
        let v4 = self.subnet.map(|subnet| subnet.to_string());
        let v6 = self.subnet_v6.map(|subnet| subnet.to_string());
        v4.into_iter().chain(v6).collect::<Vec<_>>().join(" and ")
    }
}

/// The subnets that flannel finds in a key, also in one that it would never write: it takes whatever comes before, and
/// host bits (its pattern is not anchored at the left).
#[must_use]
pub fn subnets_in_flannels_eyes(key: &str) -> Option<LeaseKey> {
    let (v4, v6) = key.split_once('&').map_or((key, None), |(v4, v6)| (v4, Some(v6)));
    let (before, len) = v4.rsplit_once('-')?;
    let start = before.rfind(|c: char| !c.is_ascii_digit() && c != '.').map_or(0, |at| at + 1);
    let address: Ipv4Addr = before.get(start..)?.parse().ok()?;
    let subnet = Ipv4Net::new(address, length(len)?).ok()?.trunc();
    let subnet_v6 = match v6 {
        None => None,
        Some(v6) => {
            let (address, len) = v6.split_once('-')?;
            Some(Ipv6Net::new(address.parse().ok()?, length(len)?).ok()?.trunc())
        }
    };
    Some(LeaseKey { subnet: Some(subnet).filter(is_one), subnet_v6 })
}

/// Whether it is not what stands for no IPv4 subnet.
fn is_one(subnet: &Ipv4Net) -> bool {
    *subnet != Ipv4Net::default()
}

impl Display for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let v4 = self.subnet.unwrap_or_default();
        write!(f, "{}-{}", v4.network(), v4.prefix_len())?;
        match self.subnet_v6 {
            Some(v6) => write!(f, "&{}-{}", v6.network(), v6.prefix_len()),
            None => Ok(()),
        }
    }
}

impl FromStr for LeaseKey {
    type Err = KeyError;

    fn from_str(key: &str) -> Result<Self, KeyError> {
        let refuse = |reason| KeyError { key: key.chars().take(100).collect(), reason };
        let (v4, v6) = match key.split_once('&') {
            Some((v4, v6)) => (v4, Some(v6)),
            None => (key, None),
        };
        let (address, len) = v4.split_once('-').ok_or_else(|| refuse("no \"-\" before the prefix length"))?;
        let address: Ipv4Addr = address.parse().map_err(|_| refuse("no IPv4 address before \"-\""))?;
        let subnet = Ipv4Net::new(address, length(len).ok_or_else(|| refuse("no prefix length"))?)
            .map_err(|_| refuse("a prefix length above 32"))?;
        if subnet != subnet.trunc() {
            return Err(refuse("the address has host bits set"));
        }
        let subnet_v6 = v6.map(|v6| parse_v6(v6).map_err(refuse)).transpose()?;
        let subnet = Some(subnet).filter(is_one);
        if subnet.is_none() && subnet_v6.is_none() {
            return Err(refuse("no subnet of either family"));
        }
        Ok(Self { subnet, subnet_v6 })
    }
}

fn parse_v6(text: &str) -> Result<Ipv6Net, &'static str> {
    let (address, len) = text.split_once('-').ok_or("no \"-\" before the IPv6 prefix length")?;
    let written = address;
    let address: Ipv6Addr = address.parse().map_err(|_| "no IPv6 address after \"&\"")?;
    let len = length(len).ok_or("no IPv6 prefix length")?;
    let subnet = Ipv6Net::new(address, len).map_err(|_| "an IPv6 prefix length above 128")?;
    if subnet != subnet.trunc() {
        return Err("the IPv6 address has host bits set");
    }
    // One subnet, one key: what is written otherwise would not be found again where it is looked for.
    if address.to_string() == written {
        Ok(subnet)
    } else {
        Err("the IPv6 address is not as RFC 5952 writes it")
    }
}

/// As it is written back: `u8::from_str` would take a plus sign and zeros in front as well, and two keys would be one.
fn length(text: &str) -> Option<u8> {
    let len: u8 = text.parse().ok()?;
    (len.to_string() == text).then_some(len)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::family::{V4, V6};

    #[test]
    fn keys_of_flannel_are_read_and_written_back_to_the_byte() {
        for key in ["10.5.34.0-24", "10.5.34.0-24&fc00:0:0:22::-64", "10.5.0.4-30", "0.0.0.0-0&fc00::-64"] {
            assert_eq!(key.parse::<LeaseKey>().unwrap().to_string(), key);
        }
    }

    #[test]
    fn what_is_no_key_is_refused_with_a_reason() {
        for (key, reason) in [
            ("", "no \"-\""),
            ("10.5.34.0", "no \"-\""),
            ("10.5.34.0-", "no prefix length"),
            ("10.5.34.0-+24", "no prefix length"),
            ("10.5.34.0-33", "above 32"),
            ("10.5.34.1-24", "host bits"),
            ("10.5.034.0-24", "no IPv4 address"),
            ("x10.5.34.0-24", "no IPv4 address"),
            ("10.5.34.0-24&", "IPv6"),
            ("10.5.34.0-24&fc00::1-64", "host bits"),
            ("10.5.34.0-24&fc00::-129", "above 128"),
            ("10.5.34.0-024", "no prefix length"),
            ("0.0.0.0-0", "no subnet of either family"),
            ("0.0.0.0-0&FC00::-64", "RFC 5952"),
            ("0.0.0.0-0&fc00:0:0:0::-64", "RFC 5952"),
            ("0.0.0.0-0&fc00::-064", "no IPv6 prefix length"),
            ("0.0.0.0-0&fc00::-64&fc01::-64", "no IPv6 prefix length"),
        ] {
            let error = key.parse::<LeaseKey>().unwrap_err().to_string();
            assert!(error.contains(reason), "{key}: {error}");
        }
    }

    #[test]
    fn flannel_sees_a_subnet_in_more_keys_than_it_writes() {
        for (key, subnets) in [
            ("10.5.34.0-24", Some("10.5.34.0-24")),
            ("10.5.34.7-24", Some("10.5.34.0-24")),
            ("old/10.5.34.0-24", Some("10.5.34.0-24")),
            ("x10.5.34.0-24&fc00::1-64", Some("10.5.34.0-24&fc00::-64")),
            ("0.0.0.0-0&FC00:0::1-64", Some("0.0.0.0-0&fc00::-64")),
            ("10.5.34.0-24-old", None),
            ("10.5.34.0", None),
            ("é-24", None),
        ] {
            let subnets = subnets.map(|key| key.parse().unwrap());
            assert_eq!(subnets_in_flannels_eyes(key), subnets, "{key}");
        }
    }

    #[test]
    fn a_key_is_taken_apart_by_family() {
        let key: LeaseKey = "10.5.34.0-24&fc00:0:0:22::-64".parse().unwrap();
        assert_eq!(key.half::<V4>(), key.subnet);
        assert_eq!(key.half::<V6>(), key.subnet_v6);
        assert_eq!(key.subnets(), "10.5.34.0/24 and fc00:0:0:22::/64");
        assert_eq!(key.without::<V6>(), Some("10.5.34.0-24".parse().unwrap()));
        assert_eq!(key.without::<V4>(), Some("0.0.0.0-0&fc00:0:0:22::-64".parse().unwrap()));
        assert_eq!(key.without::<V4>().unwrap().without::<V6>(), None);
    }

    proptest! {
        #[test]
        fn any_key_survives_the_way_there_and_back(
            v4 in proptest::option::of((any::<u32>(), 1_u8..=32)), v6 in proptest::option::of((any::<u128>(), 0_u8..=128)),
        ) {
            let key = LeaseKey {
                subnet: v4.map(|(bits, len)| Ipv4Net::new(bits.into(), len).unwrap().trunc()),
                subnet_v6: v6.map(|(bits, len)| Ipv6Net::new(bits.into(), len).unwrap().trunc()),
            };
            prop_assume!(key.subnet.is_some() || key.subnet_v6.is_some());
            prop_assert_eq!(key.to_string().parse::<LeaseKey>().unwrap(), key);
        }

        #[test]
        fn a_key_that_is_read_is_the_only_one_of_its_subnets(text in "(0.0.0.0-0|10\\.5\\.[0-9]{1,3}\\.0-[0-9]{1,3})(&[fF]c00:[0:]{0,12}-[0-9]{1,4})?") {
            if let Ok(key) = text.parse::<LeaseKey>() {
                prop_assert_eq!(key.to_string(), text);
            }
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,60}") {
            let _ = text.parse::<LeaseKey>();
            let _ = subnets_in_flannels_eyes(&text);
        }
    }
}
