//! A packet of the flow, as the programs would get it.

use std::net::Ipv4Addr;

use loden_ebpf::{
    abi::FlowKey,
    checksum, ethernet,
    flow::Direction,
    ipv4,
    vxlan::{ENCAP_LEN, Outer},
};

use super::{Protocol, evidence::Known};
use crate::dataplane::Settings;

/// ICMP types (RFC 792).
const ECHO: u16 = 8;
const ECHO_REPLY: u16 = 0;
/// What the frame says that does not matter to any verdict.
const TTL: u8 = 64;
const SOMEBODY: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// Addresses and ports; an echo has its identifier for the source port and its type for the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    protocol: Protocol,
    pub(super) source: (Ipv4Addr, u16),
    pub(super) destination: (Ipv4Addr, u16),
}

impl Packet {
    pub(super) fn new(protocol: Protocol, source: (Ipv4Addr, u16), destination: (Ipv4Addr, u16)) -> Self {
        let destination = match protocol {
            Protocol::Icmp => (destination.0, ECHO),
            Protocol::Tcp | Protocol::Udp => destination,
        };
        Self { protocol, source, destination }
    }

    /// A packet of this flow that goes this way.
    pub(super) fn of_flow(protocol: Protocol, key: &FlowKey, direction: Direction) -> Self {
        let local = (Ipv4Addr::from(key.local), u16::from_be_bytes(key.local_port));
        let remote = (Ipv4Addr::from(key.remote), u16::from_be_bytes(key.remote_port));
        let (source, destination) = match direction {
            Direction::Outbound => (local, remote),
            Direction::Inbound => (remote, local),
        };
        if u32::from(number(protocol)) != key.protocol {
            // No address of a flow: it is like no other packet.
            return Self { protocol, source: (Ipv4Addr::UNSPECIFIED, 0), destination };
        }
        Self { protocol, source, destination }
    }

    /// Whether both have these addresses, and the ports that are given.
    pub(super) fn is_like(&self, other: &Self, source_port: Option<u16>, port: Option<u16>) -> bool {
        let port = if self.protocol == Protocol::Icmp { Some(ECHO) } else { port };
        (self.source.0, self.destination.0) == (other.source.0, other.destination.0)
            && source_port.is_none_or(|port| port == self.source.1)
            && port.is_none_or(|port| port == self.destination.1)
    }

    /// What comes back.
    pub(super) fn answer(&self) -> Self {
        let (source, destination) = match self.protocol {
            Protocol::Icmp => ((self.destination.0, self.source.1), (self.source.0, ECHO_REPLY)),
            Protocol::Tcp | Protocol::Udp => (self.destination, self.source),
        };
        Self { protocol: self.protocol, source, destination }
    }

    /// The flow that the gate looks up.
    pub(super) fn key(&self, direction: Direction) -> FlowKey {
        let end = |(address, port): (Ipv4Addr, u16)| (u32::from(address), port);
        let (source, destination) = (end(self.source), end(self.destination));
        match direction {
            Direction::Outbound => FlowKey::new(number(self.protocol), source, destination),
            Direction::Inbound => FlowKey::new(number(self.protocol), destination, source),
        }
    }

    pub(super) fn sender(&self) -> String {
        match self.protocol {
            Protocol::Icmp => format!("{} id {}", self.source.0, self.source.1),
            Protocol::Tcp | Protocol::Udp => format!("{}:{}", self.source.0, self.source.1),
        }
    }

    pub(super) fn receiver(&self) -> String {
        let (address, port) = self.destination;
        match self.protocol {
            Protocol::Icmp if port == ECHO => format!("{address} icmp echo"),
            Protocol::Icmp => format!("{address} icmp echo reply"),
            Protocol::Tcp => format!("{address}:{port} tcp"),
            Protocol::Udp => format!("{address}:{port} udp"),
        }
    }

    /// As the pod's veth gets it, and the veth's index where that is known.
    pub(super) fn at_veth(&self, known: &Known, size: u16) -> (Vec<u8>, Option<u32>) {
        let sender = known.sender.map(|(_, endpoint)| endpoint);
        // On its own bridge a pod addresses the other pod itself, everything else the gateway.
        let to = match (known.receiver, sender) {
            (Some((_, receiver)), _) => receiver.mac,
            (None, Some(sender)) => sender.gateway_mac,
            (None, None) => SOMEBODY,
        };
        let frame = ethernet_frame(to, sender.map_or(SOMEBODY, |sender| sender.mac), &self.ip(size));
        (frame, sender.map(|sender| sender.ifindex))
    }

    /// As the uplink gets it, encapsulated by the peer that has the sender unless that is a direct one.
    pub(super) fn at_uplink(
        &self,
        known: &Known,
        settings: &Settings,
        uplink_mac: [u8; 6],
        size: u16,
    ) -> (Vec<u8>, Option<u32>) {
        let inner = self.ip(size);
        let Some((_, peer)) = known.peer.filter(|(_, peer)| peer.direct == 0) else {
            return (ethernet_frame(uplink_mac, SOMEBODY, &inner), None);
        };
        let vxlan = settings.vxlan.unwrap_or_default();
        let mut outer = [0; ENCAP_LEN];
        Outer {
            source: peer.vtep,
            destination: settings.vtep.octets(),
            tos: 0,
            ttl: TTL,
            id: 1,
            source_port: settings.source_ports.0,
            port: vxlan.port,
            vni: vxlan.vni,
            peer_mac: vxlan.mac,
            own_mac: peer.vtep_mac,
            inner_len: size,
        }
        .write(&mut outer);
        let uplink = (peer.uplink != 0).then_some(peer.uplink);
        (ethernet_frame(uplink_mac, SOMEBODY, &[&outer[..], &inner].concat()), uplink)
    }

    /// The IP packet: data, not the begin or the end of a connection.
    fn ip(&self, size: u16) -> Vec<u8> {
        const ACK: u8 = 0x10;
        let mut packet = vec![0; usize::from(size)];
        packet[0] = 0x45;
        packet[2..4].copy_from_slice(&size.to_be_bytes());
        packet[4..6].copy_from_slice(&1u16.to_be_bytes());
        packet[8] = TTL;
        packet[9] = number(self.protocol);
        packet[12..16].copy_from_slice(&self.source.0.octets());
        packet[16..20].copy_from_slice(&self.destination.0.octets());
        let sum =
            packet[..ipv4::LEN].chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
        packet[10..12].copy_from_slice(&checksum::finish(sum).to_be_bytes());
        let next = &mut packet[ipv4::LEN..];
        match self.protocol {
            Protocol::Icmp => {
                // One byte: a type that is none of them is no echo.
                next[0] = self.destination.1 as u8;
                next[4..6].copy_from_slice(&self.source.1.to_be_bytes());
            }
            Protocol::Tcp | Protocol::Udp => {
                next[0..2].copy_from_slice(&self.source.1.to_be_bytes());
                next[2..4].copy_from_slice(&self.destination.1.to_be_bytes());
                if self.protocol == Protocol::Tcp {
                    (next[12], next[13]) = (5 << 4, ACK);
                } else {
                    next[4..6].copy_from_slice(&(size - ipv4::LEN as u16).to_be_bytes());
                }
            }
        }
        packet
    }
}

fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => ipv4::TCP,
        Protocol::Udp => ipv4::UDP,
        Protocol::Icmp => ipv4::ICMP,
    }
}

fn ethernet_frame(to: [u8; 6], from: [u8; 6], payload: &[u8]) -> Vec<u8> {
    [&to[..], &from, &ethernet::IPV4.to_be_bytes(), payload].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Ipv4Addr = Ipv4Addr::new(10, 5, 1, 2);
    const B: Ipv4Addr = Ipv4Addr::new(10, 5, 2, 9);

    #[test]
    fn an_answer_is_the_same_flow_but_for_an_echos() {
        let request = Packet::new(Protocol::Tcp, (A, 4000), (B, 80));
        assert_eq!(request.key(Direction::Outbound), request.answer().key(Direction::Inbound));
        let echo = Packet::new(Protocol::Icmp, (A, 7), (B, 0));
        assert_eq!(echo.key(Direction::Outbound), FlowKey::new(1, (A.into(), 7), (B.into(), 8)));
        assert_eq!(echo.answer().key(Direction::Inbound), FlowKey::new(1, (A.into(), 0), (B.into(), 7)));
    }

    #[test]
    fn the_programs_own_parser_reads_the_packet_as_it_was_meant() {
        for (protocol, size) in [(Protocol::Tcp, 60), (Protocol::Udp, 100), (Protocol::Icmp, 1450)] {
            let packet = Packet::new(protocol, (A, 4000), (B, 80));
            let bytes = packet.ip(size);
            let header: &ipv4::Header = bytes[..ipv4::LEN].try_into().unwrap();
            assert!(ipv4::is_plain(header) && ipv4::has_right_checksum(header));
            assert_eq!((ipv4::total_len(header), bytes.len()), (size, usize::from(size)));
            assert_eq!((ipv4::source(header), ipv4::destination(header)), (A.into(), B.into()));
            let next = bytes[ipv4::LEN..ipv4::LEN + 8].try_into().unwrap();
            assert_eq!(ipv4::ports(number(protocol), next), Some((4000, packet.destination.1)));
        }
    }

    #[test]
    fn a_flow_is_found_by_what_is_known_of_it() {
        let key = FlowKey::new(6, (A.into(), 4000), (B.into(), 80));
        let pattern = Packet::new(Protocol::Tcp, (A, 0), (B, 80));
        let like = |key: &FlowKey, source_port, port| {
            Packet::of_flow(Protocol::Tcp, key, Direction::Outbound).is_like(&pattern, source_port, port)
        };
        assert!(like(&key, None, Some(80)) && like(&key, Some(4000), None));
        assert!(!like(&key, None, Some(81)) && !like(&key, Some(4001), None));
        assert!(!like(&FlowKey { protocol: 17, ..key }, None, Some(80)));
        assert!(!like(&key.reversed(), None, None));
    }
}
