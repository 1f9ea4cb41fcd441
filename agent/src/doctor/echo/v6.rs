//! ICMPv6 echo (RFC 4443). The kernel writes headers and checksums, and no router cuts a packet of IPv6 in pieces.

use std::{
    io,
    net::{Ipv6Addr, SocketAddrV6},
    os::fd::AsRawFd as _,
    time::{Duration, Instant},
};

use nix::sys::socket::{SockaddrIn6, recvfrom, setsockopt, sockopt::Ipv6DontFrag};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::Requests;

/// Length of the smallest packet that is sent, in bytes: both headers, and eight bytes more.
pub(in crate::doctor) const SMALLEST: u16 = 56;

const IPV6_HEADER: usize = 40;
const ICMP_HEADER: usize = 8;
const UNREACHABLE: u8 = 1;
const TOO_BIG: u8 = 2;
const ECHO: u8 = 128;
const ECHO_REPLY: u8 = 129;

/// Sends to one address and hears what it answers.
pub(in crate::doctor) struct Pinger {
    address: Ipv6Addr,
    socket: Socket,
    requests: Requests,
}

impl Pinger {
    pub(in crate::doctor) fn to(address: Ipv6Addr) -> io::Result<Self> {
        let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
        // Nor does this host cut it.
        setsockopt(&socket, Ipv6DontFrag, &true)?;
        Ok(Self { address, socket, requests: Requests::new() })
    }

    /// How long the echo took; where none came back, what was heard instead.
    pub(in crate::doctor) fn echo(
        &mut self,
        size: u16,
        patience: Duration,
    ) -> Result<Duration, Option<String>> {
        let (icmp, identity) = self.requests.next(ECHO, usize::from(size) - IPV6_HEADER);
        let start = Instant::now();
        let to = SockAddr::from(SocketAddrV6::new(self.address, 0, 0, 0));
        self.socket.send_to(&icmp, &to).map_err(|error| Some(error.to_string()))?;
        loop {
            let left = patience.checked_sub(start.elapsed()).filter(|left| !left.is_zero()).ok_or(None)?;
            self.socket.set_read_timeout(Some(left)).map_err(|error| Some(error.to_string()))?;
            let mut buffer = [0; 2048];
            let heard = recvfrom::<SockaddrIn6>(self.socket.as_raw_fd(), &mut buffer);
            let Ok((length, Some(from))) = heard else { continue };
            let (icmp, from) = (&buffer[..length], from.ip());
            if icmp.len() < ICMP_HEADER {
                continue;
            }
            match icmp[0] {
                ECHO_REPLY if from == self.address && icmp[4..8] == identity => return Ok(start.elapsed()),
                UNREACHABLE | TOO_BIG if concerns(icmp, self.address, &identity) => {
                    return Err(Some(unreachable(from, icmp)));
                }
                _ => {}
            }
        }
    }
}

/// Whether an ICMPv6 error is about our echo to this address.
fn concerns(icmp: &[u8], address: Ipv6Addr, identity: &[u8]) -> bool {
    let about = &icmp[ICMP_HEADER..];
    let echo = about.get(IPV6_HEADER..IPV6_HEADER + ICMP_HEADER);
    about.get(24..IPV6_HEADER) == Some(&address.octets()[..])
        && echo.is_some_and(|echo| echo[0] == ECHO && echo[4..8] == *identity)
}

fn unreachable(from: Ipv6Addr, icmp: &[u8]) -> String {
    if icmp[0] == TOO_BIG {
        // RFC 4443, section 3.2: the MTU of the next hop.
        let mtu = u32::from_be_bytes([icmp[4], icmp[5], icmp[6], icmp[7]]);
        return format!("{from} says that its next hop carries {mtu} bytes");
    }
    format!("{from} says that it is unreachable (ICMPv6 code {})", icmp[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_about_the_packet_that_it_holds() {
        let to: Ipv6Addr = "fc00:0:0:2::".parse().unwrap();
        let mut error = vec![TOO_BIG, 0, 0, 0, 0, 0, 0x05, 0x78];
        let mut header = [0; IPV6_HEADER];
        header[24..].copy_from_slice(&to.octets());
        error.extend(header);
        error.extend([ECHO, 0, 0, 0, 3, 4, 5, 6]);
        assert!(concerns(&error, to, &[3, 4, 5, 6]));
        assert!(!concerns(&error, to, &[3, 4, 5, 7]));
        assert!(!concerns(&error, "fc00:0:0:3::".parse().unwrap(), &[3, 4, 5, 6]));
        assert!(!concerns(&error[..50], to, &[3, 4, 5, 6]), "cut off");
        assert!(unreachable(to, &error).contains("1400 bytes"));
    }
}
