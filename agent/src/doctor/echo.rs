//! ICMP echo of a given length, with don't-fragment set.

pub(super) mod v4;
mod v6;

use std::{io, net::IpAddr, time::Duration};

/// Sends to one address and hears what it answers.
pub(super) enum Pinger {
    V4(v4::Pinger),
    V6(v6::Pinger),
}

impl Pinger {
    pub(super) fn to(address: IpAddr) -> io::Result<Self> {
        match address {
            IpAddr::V4(address) => v4::Pinger::to(address).map(Self::V4),
            IpAddr::V6(address) => v6::Pinger::to(address).map(Self::V6),
        }
    }

    /// How long the echo took, `size` being the length of the IP packet in bytes; where none came back, what was heard
    /// instead.
    pub(super) fn echo(&mut self, size: u16, patience: Duration) -> Result<Duration, Option<String>> {
        match self {
            Self::V4(pinger) => pinger.echo(size, patience),
            Self::V6(pinger) => pinger.echo(size, patience),
        }
    }
}

/// Length of the smallest packet to this address, in bytes.
pub(super) fn smallest(address: IpAddr) -> u16 {
    if address.is_ipv4() { v4::SMALLEST } else { v6::SMALLEST }
}
