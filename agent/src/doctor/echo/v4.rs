//! ICMP echo (RFC 792).

use std::{
    io::{self, Read as _},
    net::{Ipv4Addr, SocketAddrV4},
    time::{Duration, Instant},
};

use loden_ebpf::{checksum, ipv4, transport};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::Requests;

/// Length of the smallest packet that is sent, in bytes: both headers, and eight bytes more.
pub(in crate::doctor) const SMALLEST: u16 = 36;

const ICMP_HEADER: usize = 8;
const ECHO: u8 = 8;
const ECHO_REPLY: u8 = 0;
const UNREACHABLE: u8 = 3;
const FRAGMENTATION_NEEDED: u8 = 4;
const PORT_UNREACHABLE: u8 = 3;
/// The packet's own headers are given; its source, identification, length and checksum the kernel writes (raw(7)).
const IPPROTO_RAW: i32 = 255;

/// Sends to one address and hears what it answers.
pub(in crate::doctor) struct Pinger {
    address: Ipv4Addr,
    sending: Socket,
    hearing: Socket,
    requests: Requests,
}

impl Pinger {
    pub(in crate::doctor) fn to(address: Ipv4Addr) -> io::Result<Self> {
        Ok(Self {
            address,
            sending: Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(IPPROTO_RAW)))?,
            hearing: Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4))?,
            requests: Requests::new(),
        })
    }

    /// How long the echo took; where none came back, what was heard instead.
    pub(in crate::doctor) fn echo(
        &mut self,
        size: u16,
        patience: Duration,
    ) -> Result<Duration, Option<String>> {
        let (mut icmp, identity) = self.requests.next(ECHO, usize::from(size) - ipv4::LEN);
        let sum = checksum_of(&icmp);
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());
        let start = Instant::now();
        self.send(transport::ICMP, &icmp).map_err(|error| Some(error.to_string()))?;
        self.hear(start, patience, |from, icmp| match icmp[0] {
            ECHO_REPLY if from == self.address && icmp[4..8] == identity => Some(Ok(start.elapsed())),
            UNREACHABLE
                if concerns(
                    icmp,
                    self.address,
                    &[&[ECHO, 0][..], &sum.to_be_bytes(), &identity].concat(),
                ) =>
            {
                Some(Err(Some(unreachable(from, icmp))))
            }
            _ => None,
        })
        .unwrap_or(Err(None))
    }

    /// Sends a datagram without a checksum to a closed port; whether the peer says that it is closed.
    pub(in crate::doctor) fn unchecked_datagram(&self, port: u16, patience: Duration) -> io::Result<bool> {
        const LEN: u16 = 64;
        let mut udp = vec![0; usize::from(LEN)];
        // A port of our own choice: nobody waits for an answer but the raw socket.
        let source = 1024 + self.requests.id % 60_000;
        udp[0..2].copy_from_slice(&source.to_be_bytes());
        udp[2..4].copy_from_slice(&port.to_be_bytes());
        udp[4..6].copy_from_slice(&LEN.to_be_bytes());
        let start = Instant::now();
        self.send(transport::UDP, &udp)?;
        let heard = self.hear(start, patience, |_, icmp| {
            let closed = icmp[0] == UNREACHABLE && icmp[1] == PORT_UNREACHABLE;
            (closed && concerns(icmp, self.address, &udp[..8])).then_some(())
        });
        Ok(heard.is_some())
    }

    fn send(&self, protocol: u8, payload: &[u8]) -> io::Result<()> {
        let mut header = [0; ipv4::LEN];
        header[0] = 0x45;
        header[6] = 0x40;
        header[8] = 64;
        header[9] = protocol;
        header[16..20].copy_from_slice(&self.address.octets());
        let packet = [&header[..], payload].concat();
        self.sending.send_to(&packet, &SockAddr::from(SocketAddrV4::new(self.address, 0)))?;
        Ok(())
    }

    /// The first ICMP message that `answers` takes, given its sender and the message from its type on.
    fn hear<T>(
        &self,
        start: Instant,
        patience: Duration,
        answers: impl Fn(Ipv4Addr, &[u8]) -> Option<T>,
    ) -> Option<T> {
        let mut buffer = vec![0; 1 << 16];
        loop {
            let left = patience.checked_sub(start.elapsed()).filter(|left| !left.is_zero())?;
            self.hearing.set_read_timeout(Some(left)).ok()?;
            let Ok(length) = (&self.hearing).read(&mut buffer) else { continue };
            let packet = &buffer[..length];
            let Some(header) = packet.first_chunk::<{ ipv4::LEN }>() else { continue };
            let Some(icmp) = packet.get(ipv4::header_len(header)..) else { continue };
            if icmp.len() < ICMP_HEADER {
                continue;
            }
            if let Some(answer) = answers(Ipv4Addr::from(ipv4::source(header)), icmp) {
                return Some(answer);
            }
        }
    }
}

/// Whether an ICMP error is about a packet to this address whose next header begins so.
fn concerns(icmp: &[u8], address: Ipv4Addr, next: &[u8]) -> bool {
    let about = &icmp[ICMP_HEADER..];
    let Some(header) = about.first_chunk::<{ ipv4::LEN }>() else { return false };
    ipv4::destination(header) == u32::from(address)
        && about.get(ipv4::header_len(header)..).is_some_and(|rest| rest.starts_with(next))
}

fn unreachable(from: Ipv4Addr, icmp: &[u8]) -> String {
    if icmp[1] == FRAGMENTATION_NEEDED {
        // RFC 1191: the MTU of the next hop.
        return format!(
            "{from} says that its next hop carries {} bytes",
            u16::from_be_bytes([icmp[6], icmp[7]])
        );
    }
    format!("{from} says that it is unreachable (ICMP code {})", icmp[1])
}

fn checksum_of(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0));
    // 65 535 bytes are 32 768 words: their sum fits.
    checksum::finish(bytes.chunks(2).map(word).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_covers_an_odd_byte() {
        assert_eq!(checksum_of(&[8, 0, 0, 0, 1]), !(0x0800 + 0x0100));
    }

    #[test]
    fn an_error_is_about_the_packet_that_it_holds() {
        let to = Ipv4Addr::new(10, 5, 2, 0);
        let mut error = vec![UNREACHABLE, FRAGMENTATION_NEEDED, 0, 0, 0, 0, 0x05, 0x78];
        let mut header = [0; 20];
        header[0] = 0x45;
        header[16..20].copy_from_slice(&to.octets());
        error.extend(header);
        error.extend([8, 0, 1, 2, 3, 4, 5, 6]);
        assert!(concerns(&error, to, &[8, 0, 1, 2]));
        assert!(!concerns(&error, to, &[8, 0, 1, 3]));
        assert!(!concerns(&error, Ipv4Addr::new(10, 5, 3, 0), &[8, 0]));
        assert!(!concerns(&error[..20], to, &[]), "cut off");
        assert!(unreachable(to, &error).contains("1400 bytes"));
    }
}
