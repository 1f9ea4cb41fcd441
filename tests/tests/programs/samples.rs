//! Good frames at each hook, which the rows bend.

use loden_ebpf::abi::{Flow, FlowKey};

use crate::{packet::*, rig::*};

/// Ports of the pod and of its remote in all samples.
pub(crate) const LOCAL_PORT: u16 = 40_001;
pub(crate) const REMOTE_PORT: u16 = 80;
/// Identifier of the samples' echoes.
pub(crate) const ECHO: u16 = 0x0b0b;
/// Bytes behind the transport header.
pub(crate) const PAYLOAD: usize = 90;

/// From the pod to its gateway, IP header included.
pub(crate) fn sent_ip() -> Packet {
    Packet::ethernet(GATEWAY_MAC, POD_MAC).ipv4(POD, REMOTE)
}

pub(crate) fn sent_tcp(flags: u8) -> Packet {
    sent_ip().tcp(LOCAL_PORT, REMOTE_PORT, flags).payload(PAYLOAD)
}

pub(crate) fn sent_udp() -> Packet {
    sent_ip().udp(LOCAL_PORT, REMOTE_PORT).payload(PAYLOAD)
}

pub(crate) fn sent_echo(kind: u8) -> Packet {
    sent_ip().icmp(kind, 0, ECHO, 1).payload(PAYLOAD)
}

/// What from_pod must make of a sent packet, whose TTL it has taken one off: outer headers to the peer, then `inner`
/// between the two VXLAN devices.
pub(crate) fn encapsulated(inner: Packet) -> Packet {
    encapsulated_to(inner, (PEER_VTEP, PEER_VTEP_MAC), 0)
}

pub(crate) fn encapsulated_to(inner: Packet, (vtep, mac): (std::net::Ipv4Addr, Mac), tos: u8) -> Packet {
    // The outer MACs are still the pod's: bpf_redirect_neigh writes them, which a test run does not reach.
    Packet::ethernet(GATEWAY_MAC, POD_MAC)
        .ipv4(VTEP, vtep)
        .fragment(0)
        .ttl(OUTER_TTL)
        .tos(tos)
        .udp(0, PORT)
        .udp_checksum(0)
        .vxlan(VNI)
        .then(inner.macs(mac, VTEP_MAC))
}

/// Outer headers as the peer sends them to this node.
pub(crate) fn outer() -> Packet {
    Packet::ethernet(WIRE_MAC, ROUTER_MAC)
        .ipv4(PEER_VTEP, VTEP)
        .fragment(0)
        .udp(50_000, PORT)
        .udp_checksum(0)
        .vxlan(VNI)
}

/// Inner headers as the peer sends them, IP header included.
pub(crate) fn inner_ip() -> Packet {
    Packet::ethernet(VTEP_MAC, PEER_VTEP_MAC).ipv4(REMOTE, POD).ttl(63)
}

pub(crate) fn inner_tcp(flags: u8) -> Packet {
    inner_ip().tcp(REMOTE_PORT, LOCAL_PORT, flags).payload(PAYLOAD)
}

pub(crate) fn inner_udp() -> Packet {
    inner_ip().udp(REMOTE_PORT, LOCAL_PORT).payload(PAYLOAD)
}

pub(crate) fn inner_echo(kind: u8) -> Packet {
    inner_ip().icmp(kind, 0, ECHO, 1).payload(PAYLOAD)
}

/// What the pod must get of an inner packet: its own MACs, one hop less.
pub(crate) fn delivered(inner: Packet) -> Packet {
    inner.macs(POD_MAC, GATEWAY_MAC).ttl(62)
}

/// The samples' flow of TCP or UDP.
pub(crate) fn flow(protocol: u8) -> FlowKey {
    key(protocol, LOCAL_PORT, REMOTE_PORT)
}

/// The samples' flows: TCP, UDP, and echo requests and replies each way, of which the sender's port is the
/// identifier and the receiver's the type.
pub(crate) fn flows() -> [FlowKey; 6] {
    let echo = |local, remote| key(ICMP, local, remote);
    [flow(TCP), flow(UDP), echo(ECHO, 8), echo(ECHO, 0), echo(8, ECHO), echo(0, ECHO)]
}

fn key(protocol: u8, local_port: u16, remote_port: u16) -> FlowKey {
    FlowKey {
        local: POD.octets(),
        remote: REMOTE.octets(),
        local_port: local_port.to_be_bytes(),
        remote_port: remote_port.to_be_bytes(),
        protocol: u32::from(protocol),
    }
}

/// Qualifies the samples' flows both ways, for longer than any test runs.
pub(crate) fn qualify(rig: &mut Rig) {
    for key in flows() {
        let entry =
            Flow { inbound_until: u64::MAX, outbound_until: u64::MAX, epoch: rig.epoch(), ..Flow::default() };
        rig.set_flow(key, entry);
    }
}
