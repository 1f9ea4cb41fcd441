//! A packet of the flow, as the programs would get it.

use std::net::{IpAddr, SocketAddr};

use loden_ebpf::{
    abi::{FlowKey, way},
    checksum, ethernet,
    flow::Direction,
    ipv4, ipv6,
    transport::{self, ECHO_V4, ECHO_V6, Echo},
    vxlan::{ENCAP_LEN, ENCAP_LEN_V6, Outer},
};

use super::{Protocol, evidence::Known};
use crate::dataplane::{FamilySettings, Mapped, VxlanSettings};

/// What the frame says that does not matter to any verdict.
const TTL: u8 = 64;
const SOMEBODY: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// Addresses and ports; an echo has its identifier for the source port and its type for the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Packet<F: Mapped> {
    protocol: Protocol,
    pub(super) source: (F::Addr, u16),
    pub(super) destination: (F::Addr, u16),
}

impl<F: Mapped> Packet<F> {
    pub(super) fn new(protocol: Protocol, source: (F::Addr, u16), destination: (F::Addr, u16)) -> Self {
        let destination = match protocol {
            Protocol::Icmp => (destination.0, echo::<F>().request.into()),
            Protocol::Tcp | Protocol::Udp => destination,
        };
        Self { protocol, source, destination }
    }

    /// A packet of this flow that goes this way.
    pub(super) fn of_flow(protocol: Protocol, key: &FlowKey<F::Octets>, direction: Direction) -> Self {
        let local = (F::of_octets(key.local), u16::from_be_bytes(key.local_port));
        let remote = (F::of_octets(key.remote), u16::from_be_bytes(key.remote_port));
        let (source, destination) = match direction {
            Direction::Outbound => (local, remote),
            Direction::Inbound => (remote, local),
        };
        if u32::from(number::<F>(protocol)) != key.protocol {
            // No address of a flow: it is like no other packet.
            return Self { protocol, source: (F::UNSPECIFIED, 0), destination };
        }
        Self { protocol, source, destination }
    }

    /// Whether both have these addresses, and the ports that are given.
    pub(super) fn is_like(&self, other: &Self, source_port: Option<u16>, port: Option<u16>) -> bool {
        let port = if self.protocol == Protocol::Icmp { Some(echo::<F>().request.into()) } else { port };
        (self.source.0, self.destination.0) == (other.source.0, other.destination.0)
            && source_port.is_none_or(|port| port == self.source.1)
            && port.is_none_or(|port| port == self.destination.1)
    }

    /// What comes back.
    pub(super) fn answer(&self) -> Self {
        let (source, destination) = match self.protocol {
            Protocol::Icmp => {
                ((self.destination.0, self.source.1), (self.source.0, echo::<F>().reply.into()))
            }
            Protocol::Tcp | Protocol::Udp => (self.destination, self.source),
        };
        Self { protocol: self.protocol, source, destination }
    }

    /// The flow that the gate looks up.
    pub(super) fn key(&self, direction: Direction) -> FlowKey<F::Octets> {
        let end = |(address, port): (F::Addr, u16)| (F::octets(address), port);
        let (source, destination) = (end(self.source), end(self.destination));
        match direction {
            Direction::Outbound => FlowKey::of(number::<F>(self.protocol), source, destination),
            Direction::Inbound => FlowKey::of(number::<F>(self.protocol), destination, source),
        }
    }

    pub(super) fn sender(&self) -> String {
        match self.protocol {
            Protocol::Icmp => format!("{} id {}", self.source.0, self.source.1),
            Protocol::Tcp | Protocol::Udp => socket::<F>(self.source).to_string(),
        }
    }

    pub(super) fn receiver(&self) -> String {
        let (address, port) = self.destination;
        match self.protocol {
            Protocol::Icmp if port == u16::from(echo::<F>().request) => format!("{address} icmp echo"),
            Protocol::Icmp => format!("{address} icmp echo reply"),
            Protocol::Tcp => format!("{} tcp", socket::<F>(self.destination)),
            Protocol::Udp => format!("{} udp", socket::<F>(self.destination)),
        }
    }

    /// As the pod's veth gets it, and the veth's index where that is known.
    pub(super) fn at_veth(&self, known: &Known<F>, size: u16) -> (Vec<u8>, Option<u32>) {
        let sender = known.sender;
        // On its own bridge a pod addresses the other pod itself, everything else the gateway.
        let to = match (known.receiver, sender) {
            (Some(receiver), _) => receiver.mac,
            (None, Some(sender)) => sender.gateway_mac,
            (None, None) => SOMEBODY,
        };
        let frame = ethernet_frame::<F>(to, sender.map_or(SOMEBODY, |sender| sender.mac), &self.ip(size));
        (frame, sender.map(|sender| sender.ifindex))
    }

    /// As the uplink gets it, encapsulated by the peer that has the sender unless that is a direct one.
    pub(super) fn at_uplink(
        &self,
        known: &Known<F>,
        settings: &FamilySettings<F>,
        source_port: u16,
        uplink_mac: [u8; 6],
        size: u16,
    ) -> (Vec<u8>, Option<u32>) {
        let inner = self.ip(size);
        let Some((_, peer)) = known.peer.filter(|(_, peer)| peer.way == way::ENCAPSULATED) else {
            return (ethernet_frame::<F>(uplink_mac, SOMEBODY, &inner), None);
        };
        let vxlan = settings.vxlan.unwrap_or_default();
        let outer = match (F::of_octets(peer.vtep).into(), settings.vtep.into(), inner.first_chunk()) {
            (IpAddr::V4(source), IpAddr::V4(destination), _) => {
                let mut headers = [0; ENCAP_LEN];
                let (source, destination) = (source.octets(), destination.octets());
                outer(source, destination, source_port, vxlan, peer.vtep_mac, size).write(&mut headers);
                headers.to_vec()
            }
            (IpAddr::V6(source), IpAddr::V6(destination), Some(inner)) => {
                let mut headers = [0; ENCAP_LEN_V6];
                let (source, destination) =
                    (ipv6::words(&source.octets()), ipv6::words(&destination.octets()));
                outer(source, destination, source_port, vxlan, peer.vtep_mac, size)
                    .write(&mut headers, inner);
                headers.to_vec()
            }
            // A family's addresses are of that family, and a packet is longer than its header.
            _ => Vec::new(),
        };
        let uplink = (peer.uplink != 0).then_some(peer.uplink);
        (ethernet_frame::<F>(uplink_mac, SOMEBODY, &[&outer[..], &inner].concat()), uplink)
    }

    /// The IP packet: data, not the begin or the end of a connection.
    fn ip(&self, size: u16) -> Vec<u8> {
        const ACK: u8 = 0x10;
        let mut packet = vec![0; usize::from(size)];
        let protocol = number::<F>(self.protocol);
        let header = header(&mut packet, protocol, self.source.0.into(), self.destination.0.into());
        let next = &mut packet[header..];
        let checksum = match self.protocol {
            Protocol::Icmp => {
                // One byte: a type that is none of them is no echo.
                next[0] = self.destination.1 as u8;
                next[4..6].copy_from_slice(&self.source.1.to_be_bytes());
                2
            }
            Protocol::Tcp | Protocol::Udp => {
                next[0..2].copy_from_slice(&self.source.1.to_be_bytes());
                next[2..4].copy_from_slice(&self.destination.1.to_be_bytes());
                if self.protocol == Protocol::Tcp {
                    (next[12], next[13]) = (5 << 4, ACK);
                    16
                } else {
                    next[4..6].copy_from_slice(&(size - header as u16).to_be_bytes());
                    6
                }
            }
        };
        // IPv6 has no UDP without one. What stands before the transport is the addresses, in either family.
        let addresses = if header == ipv6::LEN { 8 } else { 12 };
        let pseudo = u32::from(size - header as u16) + u32::from(protocol);
        let sum = checksum::finish(fold(&packet[addresses..]) + pseudo);
        packet[header + checksum..header + checksum + 2].copy_from_slice(&sum.to_be_bytes());
        packet
    }
}

/// Writes the IP header of a packet with this length; returns its own.
fn header(packet: &mut [u8], protocol: u8, source: IpAddr, destination: IpAddr) -> usize {
    let size = packet.len() as u16;
    match (source, destination) {
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            packet[0] = 0x60;
            packet[4..6].copy_from_slice(&(size - ipv6::LEN as u16).to_be_bytes());
            (packet[6], packet[7]) = (protocol, TTL);
            packet[8..24].copy_from_slice(&source.octets());
            packet[24..40].copy_from_slice(&destination.octets());
            ipv6::LEN
        }
        (source, destination) => {
            let octets = |address| match address {
                IpAddr::V4(address) => address.octets(),
                IpAddr::V6(_) => [0; 4],
            };
            packet[0] = 0x45;
            packet[2..4].copy_from_slice(&size.to_be_bytes());
            packet[4..6].copy_from_slice(&1u16.to_be_bytes());
            (packet[8], packet[9]) = (TTL, protocol);
            packet[12..16].copy_from_slice(&octets(source));
            packet[16..20].copy_from_slice(&octets(destination));
            let sum = checksum::finish(fold(&packet[..ipv4::LEN]));
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
            ipv4::LEN
        }
    }
}

/// The sum of 16-bit words; of a packet it does not overflow.
fn fold(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0))).sum()
}

fn outer<A>(
    source: A,
    destination: A,
    source_port: u16,
    vxlan: VxlanSettings,
    peer_mac: [u8; 6],
    inner_len: u16,
) -> Outer<A> {
    Outer {
        source,
        destination,
        tos: 0,
        ttl: TTL,
        id: 1,
        source_port,
        port: vxlan.port,
        vni: vxlan.vni,
        peer_mac: vxlan.mac,
        own_mac: peer_mac,
        inner_len,
    }
}

fn echo<F: Mapped>() -> Echo {
    if F::BITS == 32 { ECHO_V4 } else { ECHO_V6 }
}

fn number<F: Mapped>(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => transport::TCP,
        Protocol::Udp => transport::UDP,
        Protocol::Icmp => echo::<F>().protocol,
    }
}

fn socket<F: Mapped>((address, port): (F::Addr, u16)) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

fn ethernet_frame<F: Mapped>(to: [u8; 6], from: [u8; 6], payload: &[u8]) -> Vec<u8> {
    let ether_type = if F::BITS == 32 { ethernet::IPV4 } else { ethernet::IPV6 };
    [&to[..], &from, &ether_type.to_be_bytes(), payload].concat()
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;
    use crate::family::{V4, V6};

    const A: Ipv4Addr = Ipv4Addr::new(10, 5, 1, 2);
    const B: Ipv4Addr = Ipv4Addr::new(10, 5, 2, 9);
    const A6: Ipv6Addr = Ipv6Addr::new(0xfc00, 0, 0, 1, 0, 0, 0, 2);
    const B6: Ipv6Addr = Ipv6Addr::new(0xfc00, 0, 0, 2, 0, 0, 0, 9);

    #[test]
    fn an_answer_is_the_same_flow_but_for_an_echos() {
        let request = Packet::<V4>::new(Protocol::Tcp, (A, 4000), (B, 80));
        assert_eq!(request.key(Direction::Outbound), request.answer().key(Direction::Inbound));
        let echo = Packet::<V4>::new(Protocol::Icmp, (A, 7), (B, 0));
        assert_eq!(echo.key(Direction::Outbound), FlowKey::new(1, (A.into(), 7), (B.into(), 8)));
        assert_eq!(echo.answer().key(Direction::Inbound), FlowKey::new(1, (A.into(), 0), (B.into(), 7)));
        let echo = Packet::<V6>::new(Protocol::Icmp, (A6, 7), (B6, 0));
        let of = |local: u16, remote: u16| FlowKey::of(58, (A6.octets(), local), (B6.octets(), remote));
        assert_eq!(echo.key(Direction::Outbound), of(7, 128));
        assert_eq!(echo.answer().key(Direction::Inbound), of(129, 7));
    }

    #[test]
    fn the_programs_own_parser_reads_the_packet_as_it_was_meant() {
        for (protocol, size) in [(Protocol::Tcp, 60), (Protocol::Udp, 100), (Protocol::Icmp, 1450)] {
            let packet = Packet::<V4>::new(protocol, (A, 4000), (B, 80));
            let bytes = packet.ip(size);
            let header: &ipv4::Header = bytes[..ipv4::LEN].try_into().unwrap();
            assert!(ipv4::is_plain(header) && ipv4::has_right_checksum(header));
            assert_eq!((ipv4::total_len(header), bytes.len()), (size, usize::from(size)));
            assert_eq!((ipv4::source(header), ipv4::destination(header)), (A.into(), B.into()));
            let next = bytes[ipv4::LEN..ipv4::LEN + 8].try_into().unwrap();
            let ports = transport::ports(number::<V4>(protocol), ECHO_V4, next);
            assert_eq!(ports, Some((4000, packet.destination.1)));
        }
    }

    #[test]
    fn a_packet_of_ipv6_is_right_to_the_last_checksum() {
        for (protocol, size) in [(Protocol::Tcp, 60), (Protocol::Udp, 101), (Protocol::Icmp, 1430)] {
            let packet = Packet::<V6>::new(protocol, (A6, 4000), (B6, 80));
            let bytes = packet.ip(size);
            let header: &ipv6::Header = bytes[..ipv6::LEN].try_into().unwrap();
            assert!(ipv6::is_plain(header));
            assert_eq!(usize::from(ipv6::payload_len(header)) + ipv6::LEN, bytes.len());
            assert_eq!(ipv6::octets(ipv6::destination(header)), B6.octets());
            let next = bytes[ipv6::LEN..ipv6::LEN + 8].try_into().unwrap();
            let ports = transport::ports(ipv6::next_header(header), ECHO_V6, next);
            assert_eq!(ports, Some((4000, packet.destination.1)));
            let pseudo = u32::from(ipv6::payload_len(header)) + u32::from(ipv6::next_header(header));
            assert_eq!(checksum::finish(fold(&bytes[8..]) + pseudo), 0);
        }
    }

    #[test]
    fn a_flow_is_found_by_what_is_known_of_it() {
        let key = FlowKey::new(6, (A.into(), 4000), (B.into(), 80));
        let pattern = Packet::<V4>::new(Protocol::Tcp, (A, 0), (B, 80));
        let like = |key: &FlowKey, source_port, port| {
            Packet::of_flow(Protocol::Tcp, key, Direction::Outbound).is_like(&pattern, source_port, port)
        };
        assert!(like(&key, None, Some(80)) && like(&key, Some(4000), None));
        assert!(!like(&key, None, Some(81)) && !like(&key, Some(4001), None));
        assert!(!like(&FlowKey { protocol: 17, ..key }, None, Some(80)));
        assert!(!like(&key.reversed(), None, None));
    }
}
