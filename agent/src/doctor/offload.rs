//! Whether checksums and segments that are left to the devices on the way come out right at the far end.
//!
//! A datagram to a closed port is answered by ICMP, if it arrives whole. The kernel leaves its checksum to the device; one
//! without a checksum (RFC 768) needs nothing of any device. Where only the second is answered, the checksum is broken.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};

use super::{echo::v4::Pinger, snapshot::Offload};

/// The first port of traceroute's, which nobody listens on.
const CLOSED: u16 = 33_434;
/// A host answers one such datagram a second (icmp_ratelimit of icmp(7)), after a few at once.
const RATE: Duration = Duration::from_millis(1100);

/// A datagram of IPv6 without a checksum is none (RFC 8200, section 8.1): there a lost one tells of no reason.
pub(super) fn ask(address: IpAddr, mtu: u16, patience: Duration) -> Offload {
    if !answered_again(|| datagram(address, 64, None, patience)) {
        let unchecked = match address {
            IpAddr::V4(address) => {
                Pinger::to(address).and_then(|pinger| pinger.unchecked_datagram(CLOSED, patience))
            }
            IpAddr::V6(_) => Ok(false),
        };
        return match unchecked {
            Ok(true) => Offload::BadChecksum,
            // A firewall there, or its limit: TCP's answer has none.
            _ if refuses_tcp(address, patience) => Offload::Fine,
            _ => Offload::Silent,
        };
    }
    // What the headers of IP and UDP leave.
    let segment = mtu - if address.is_ipv4() { 28 } else { 48 };
    if answered_again(|| datagram(address, usize::from(segment) * 2, Some(segment), patience)) {
        Offload::Fine
    } else {
        Offload::BadSegments
    }
}

fn answered_again(ask: impl Fn() -> io::Result<bool>) -> bool {
    let answered = || ask().unwrap_or(false);
    answered() || {
        thread::sleep(RATE);
        answered()
    }
}

/// Sends so many bytes, cut into segments by whoever can; whether the peer says that the port is closed.
fn datagram(address: IpAddr, len: usize, segment: Option<u16>, patience: Duration) -> io::Result<bool> {
    let any: IpAddr = match address {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect((address, CLOSED))?;
    socket.set_read_timeout(Some(patience))?;
    if let Some(segment) = segment {
        setsockopt(&socket, UdpGsoSegment, &i32::from(segment))?;
    }
    socket.send(&vec![0; len])?;
    match socket.recv(&mut [0; 1]) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(true),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
            Ok(false)
        }
        Err(error) => Err(error),
        // Somebody listens there after all: it has arrived.
        Ok(_) => Ok(true),
    }
}

fn refuses_tcp(address: IpAddr, patience: Duration) -> bool {
    match TcpStream::connect_timeout(&SocketAddr::from((address, CLOSED)), patience) {
        Err(error) => error.kind() == io::ErrorKind::ConnectionRefused,
        Ok(_) => true,
    }
}
