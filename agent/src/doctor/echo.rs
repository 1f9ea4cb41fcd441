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

/// The requests of one pinger, laid out as in RFC 792 and as in RFC 4443.
struct Requests {
    id: u16,
    sequence: u16,
}

impl Requests {
    fn new() -> Self {
        Self { id: rand::random(), sequence: 0 }
    }

    /// The next one: `len` bytes of ICMP, without a checksum, and the four bytes by which its answer is known.
    fn next(&mut self, kind: u8, len: usize) -> (Vec<u8>, [u8; 4]) {
        self.sequence = self.sequence.wrapping_add(1);
        let identity = (u32::from(self.id) << 16 | u32::from(self.sequence)).to_be_bytes();
        let mut icmp = vec![0; len];
        icmp[0] = kind;
        icmp[4..8].copy_from_slice(&identity);
        (icmp, identity)
    }
}
