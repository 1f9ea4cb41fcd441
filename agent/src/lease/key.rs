//! The last segment of a lease's key: `10.5.34.0-24`, dual-stack `10.5.34.0-24&fc00:0:0:22::-64`.

use std::{
    fmt::{self, Display},
    net::{Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

use ipnet::{Ipv4Net, Ipv6Net};
use thiserror::Error;

/// A parsed key. Displays as flannel writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseKey {
    /// The IPv4 subnet, host bits cleared.
    pub subnet: Ipv4Net,
    /// The IPv6 subnet of a dual-stack lease, host bits cleared.
    pub subnet_v6: Option<Ipv6Net>,
}

/// Why a key is none of a lease.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "{key:?} is no lease key: {reason}; it must look like \"10.5.34.0-24\" or \"10.5.34.0-24&fc00:0:0:22::-64\""
)]
pub struct KeyError {
    key: String,
    reason: &'static str,
}

impl LeaseKey {
    /// The key of an IPv4 lease.
    #[must_use]
    pub fn v4(subnet: Ipv4Net) -> Self {
        Self { subnet: subnet.trunc(), subnet_v6: None }
    }
}

/// The IPv4 subnet that flannel finds in a key, also in one that it would never write: it takes whatever comes
/// before, and host bits (its pattern is not anchored at the left).
#[must_use]
pub fn subnet_in_flannels_eyes(key: &str) -> Option<Ipv4Net> {
    let v4 = key.split_once('&').map_or(key, |(v4, _)| v4);
    let (before, len) = v4.rsplit_once('-')?;
    let start = before.rfind(|c: char| !c.is_ascii_digit() && c != '.').map_or(0, |at| at + 1);
    let address: Ipv4Addr = before.get(start..)?.parse().ok()?;
    Ipv4Net::new(address, length(len)?).ok().map(|subnet| subnet.trunc())
}

impl Display for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.subnet.network(), self.subnet.prefix_len())?;
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
        Ok(Self { subnet, subnet_v6 })
    }
}

fn parse_v6(text: &str) -> Result<Ipv6Net, &'static str> {
    let (address, len) = text.split_once('-').ok_or("no \"-\" before the IPv6 prefix length")?;
    let address: Ipv6Addr = address.parse().map_err(|_| "no IPv6 address after \"&\"")?;
    let len = length(len).ok_or("no IPv6 prefix length")?;
    let subnet = Ipv6Net::new(address, len).map_err(|_| "an IPv6 prefix length above 128")?;
    if subnet == subnet.trunc() { Ok(subnet) } else { Err("the IPv6 address has host bits set") }
}

/// Digits only: `u8::from_str` would take a plus sign as well.
fn length(text: &str) -> Option<u8> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

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
        ] {
            let error = key.parse::<LeaseKey>().unwrap_err().to_string();
            assert!(error.contains(reason), "{key}: {error}");
        }
    }

    #[test]
    fn flannel_sees_a_subnet_in_more_keys_than_it_writes() {
        for (key, subnet) in [
            ("10.5.34.0-24", Some("10.5.34.0/24")),
            ("10.5.34.7-24", Some("10.5.34.0/24")),
            ("old/10.5.34.0-24", Some("10.5.34.0/24")),
            ("x10.5.34.0-24&fc00::1-64", Some("10.5.34.0/24")),
            ("10.5.34.0-24-old", None),
            ("10.5.34.0", None),
            ("é-24", None),
        ] {
            assert_eq!(subnet_in_flannels_eyes(key), subnet.map(|subnet| subnet.parse().unwrap()), "{key}");
        }
    }

    proptest! {
        #[test]
        fn any_key_survives_the_way_there_and_back(
            v4 in any::<u32>(), len in 0_u8..=32, v6 in proptest::option::of((any::<u128>(), 0_u8..=128)),
        ) {
            let key = LeaseKey {
                subnet: Ipv4Net::new(v4.into(), len).unwrap().trunc(),
                subnet_v6: v6.map(|(bits, len)| Ipv6Net::new(bits.into(), len).unwrap().trunc()),
            };
            prop_assert_eq!(key.to_string().parse::<LeaseKey>().unwrap(), key);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,60}") {
            let _ = text.parse::<LeaseKey>();
            let _ = subnet_in_flannels_eyes(&text);
        }
    }
}
