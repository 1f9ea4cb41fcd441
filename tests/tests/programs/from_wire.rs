//! Rows for `from_wire`: what arrives from the underlay.

use std::net::Ipv4Addr;

use loden_agent::dataplane::Program::FromWire;
use loden_ebpf::reason::Reason::*;

use crate::{case::Case, packet::*, rig::*, samples::*};

#[test]
fn what_the_underlay_brings_is_delivered_passed_on_unchanged_or_dropped() {
    crate::case::run("from_wire", &cases());
}

pub(crate) fn cases() -> Vec<Case> {
    [
        fast(),
        direct(),
        ttl(),
        ecn(),
        not_ours(),
        outer_headers(),
        vxlan_headers(),
        inner_frame(),
        senders(),
        destinations(),
        inner_packet(),
        checksums(),
        cut(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

fn case(what: &str, packet: &Packet) -> Case {
    Case::new(what, FromWire, packet)
}

fn arriving(what: &str, inner: Packet) -> Case {
    case(what, &outer().then(inner))
}

fn fast() -> Vec<Case> {
    let whole = |what, inner: Packet| arriving(what, inner.clone()).delivers(FastDecap, delivered(inner));
    let to_other = inner_udp().to(ROUTED_POD);
    vec![
        whole("TCP data", inner_tcp(ACK)),
        whole("TCP SYN for an endpoint that is not gated", inner_tcp(SYN)),
        whole("UDP", inner_udp()),
        whole("UDP without a checksum, nor one outside", inner_udp().udp_checksum(0)),
        whole("echo request", inner_echo(8)),
        whole("echo reply", inner_echo(0)),
        whole("no payload", inner_ip().udp(1, 2)),
        whole("from the peer's VXLAN device", inner_udp().from([10, 5, 2, 0].into())),
        arriving("a wrong inner header checksum is the kernel's to drop", inner_udp().checksum_error(0x1234))
            .passes(PassWireInnerPacket),
        arriving("another pod gets it with its own MACs", to_other.clone())
            .delivers(FastDecap, to_other.macs(ROUTED_POD_MAC, OTHER_GATEWAY_MAC).ttl(62)),
        arriving("the mark is the host's and comes off", inner_udp())
            .mark(0xbeef)
            .delivers(FastDecap, delivered(inner_udp())),
        case("any source MAC inside", &outer().then(inner_udp().macs(VTEP_MAC, STRANGER_MAC)))
            .delivers(FastDecap, delivered(inner_udp())),
        case("a peer with a wide subnet", &outer().from(WIDE_PEER_VTEP).then(inner_udp().from(WIDE_REMOTE)))
            .delivers(FastDecap, delivered(inner_udp().from(WIDE_REMOTE))),
        case(
            "a peer that this node reaches by the kernel alone",
            &outer().from(KERNEL_PEER_VTEP).then(inner_udp().from(KERNEL_REMOTE)),
        )
        .delivers(FastDecap, delivered(inner_udp().from(KERNEL_REMOTE))),
        arriving("an aggregate: the kernel takes no room from a GSO packet of unknown type", inner_tcp(ACK))
            .gso(1000)
            .passes(PassWireNoRoom),
        arriving("an aggregate of datagrams", inner_udp()).gso(60).passes(PassWireAggregate),
        arriving("an aggregate of datagrams, strict", inner_udp())
            .strict()
            .after(qualify)
            .gso(60)
            .passes(PassWireAggregate),
    ]
}

/// From a peer that does not encapsulate: an IP packet on the underlay.
fn direct() -> Vec<Case> {
    let ip = || Packet::ethernet(WIRE_MAC, ROUTER_MAC).ipv4(DIRECT_REMOTE, POD);
    let udp = || ip().udp(REMOTE_PORT, LOCAL_PORT).payload(PAYLOAD);
    let tcp = |flags| ip().tcp(REMOTE_PORT, LOCAL_PORT, flags).payload(PAYLOAD);
    let arrives = |what, packet: Packet| {
        let delivered = packet.clone().macs(POD_MAC, GATEWAY_MAC).ttl(63);
        case(what, &packet).mark(5).delivers(FastDirectIn, delivered)
    };
    let slow = |what, packet: Packet| case(what, &packet).passes(PassDirect);
    let whole = (20 + 8 + PAYLOAD) as u16;
    vec![
        arrives("direct: UDP", udp()),
        arrives("direct: TCP", tcp(ACK)),
        arrives("direct: SYN", tcp(SYN)),
        arrives("direct: echo", ip().icmp(8, 0, ECHO, 1)),
        arrives("direct: an aggregate", tcp(ACK)).gso(60),
        slow("direct: TTL 1", udp().ttl(1)),
        slow("direct: options", udp().options(&[1; 4])),
        slow("direct: first fragment", udp().fragment(MF)),
        slow("direct: later fragment", udp().fragment(4)),
        slow("direct: SCTP", udp().protocol(SCTP)),
        slow("direct: ICMP error", ip().icmp(3, 1, 0, 0).payload(28)),
        slow("direct: total length one too small", udp().total_len(whole - 1)),
        slow("direct: total length one too large", udp().total_len(whole + 1)),
        slow("direct: not qualified", udp()).strict(),
        case("direct: to an unknown pod", &udp().to(UNKNOWN_POD)).ignores(),
        case("direct: to the node", &udp().to(VTEP)).ignores(),
        case("direct: for another host", &udp().macs(STRANGER_MAC, ROUTER_MAC)).ignores(),
        case("not encapsulated, from a peer that does encapsulate", &udp().from(REMOTE)).ignores(),
        case("not encapsulated, from another local pod", &udp().from(OTHER_POD)).ignores(),
        case("not encapsulated, from outside", &udp().from(OUTSIDE)).ignores(),
        arriving("encapsulated, from the pod of a direct peer", inner_udp().from(DIRECT_REMOTE))
            .drops(DropForgedPeerSource),
        case(
            "encapsulated by a direct peer, which sees this node elsewhere",
            &outer().from(DIRECT_PEER_VTEP).then(inner_udp().from(DIRECT_REMOTE)),
        )
        .delivers(FastDecap, delivered(inner_udp().from(DIRECT_REMOTE))),
    ]
}

const STRANGER_MAC: Mac = [2, 0, 0, 0, 0x66, 0x66];

fn ttl() -> Vec<Case> {
    let expires = |ttl| arriving(&format!("inner TTL {ttl}"), inner_udp().ttl(ttl)).passes(PassWireTtl);
    let goes_on = |ttl: u8| {
        arriving(&format!("inner TTL {ttl}"), inner_udp().ttl(ttl))
            .delivers(FastDecap, delivered(inner_udp()).ttl(ttl - 1))
    };
    let outer_ends = case("outer TTL 1: it ends here, as it should", &outer().ttl(1).then(inner_udp()))
        .delivers(FastDecap, delivered(inner_udp()));
    vec![expires(0), expires(1), goes_on(2), goes_on(255), outer_ends]
}

/// All sixteen, from the table in RFC 6040 section 4.2 as Linux follows it (`INET_ECN_decapsulate`): rows by outer
/// field, columns by inner one, `None` for a drop.
fn ecn() -> Vec<Case> {
    const CE: u8 = 3;
    let merged: [[Option<u8>; 4]; 4] = [
        [Some(0), Some(1), Some(2), Some(3)],
        [Some(0), Some(1), Some(1), Some(3)],
        [Some(0), Some(1), Some(2), Some(3)],
        [None, Some(CE), Some(CE), Some(CE)],
    ];
    let mut cases = Vec::new();
    for (outer_ecn, row) in (0u8..).zip(merged) {
        for (inner_ecn, result) in (0u8..).zip(row) {
            // With and without a DSCP on either side, which must neither be lost nor move inside.
            for (outer_dscp, inner_dscp) in [(0, 0), (0xb8, 0), (0, 0x28), (0xfc, 0x28)] {
                let packet =
                    outer().tos(outer_dscp | outer_ecn).then(inner_udp().tos(inner_dscp | inner_ecn));
                let what = format!(
                    "TOS {:#04x} outside, {:#04x} inside",
                    outer_dscp | outer_ecn,
                    inner_dscp | inner_ecn
                );
                cases.push(match result {
                    Some(ecn) => {
                        case(&what, &packet).delivers(FastDecap, delivered(inner_udp()).tos(inner_dscp | ecn))
                    }
                    None => case(&what, &packet).passes(PassWireEcn),
                });
            }
        }
    }
    cases
}

fn not_ours() -> Vec<Case> {
    let elsewhere = Packet::ethernet(WIRE_MAC, ROUTER_MAC).ipv4(PEER_VTEP, VTEP);
    let other_port = |options: &[u8]| {
        let ip = Packet::ethernet(WIRE_MAC, ROUTER_MAC).ipv4(STRANGER, VTEP).options(options);
        ip.udp(50_000, 4789).vxlan(VNI).then(inner_udp())
    };
    vec![
        case("ARP", &Packet::ethernet([0xff; 6], ROUTER_MAC).ether_type(ARP).payload(28)).ignores(),
        case("IPv6", &Packet::ethernet(WIRE_MAC, ROUTER_MAC).ether_type(IPV6).payload(60)).ignores(),
        case("a VLAN tag", &outer().then(inner_udp()).vlan(7)).ignores(),
        case("TCP", &elsewhere.clone().tcp(22, PORT, ACK).payload(40)).ignores(),
        case("ICMP", &elsewhere.clone().icmp(8, 0, 1, 1).payload(80)).ignores(),
        case("UDP to another port", &other_port(&[])).ignores(),
        case("UDP to another port, with options", &other_port(&[1; 4])).ignores(),
        case("VXLAN for another address", &outer().to(PEER_VTEP).then(inner_udp())).ignores(),
        case("VXLAN for broadcast", &outer().to([255; 4].into()).then(inner_udp())).ignores(),
        case("a frame for another host", &outer().macs(STRANGER_MAC, ROUTER_MAC).then(inner_udp())).ignores(),
        case("a broadcast frame", &outer().macs([0xff; 6], ROUTER_MAC).then(inner_udp())).ignores(),
        case("a multicast frame", &outer().macs([1, 0, 0x5e, 1, 1, 1], ROUTER_MAC).then(inner_udp()))
            .ignores(),
        case("a later outer fragment, which says no port", &outer().fragment(64).then(inner_udp())).ignores(),
        case(
            "a later outer fragment of a stranger",
            &outer().from(STRANGER).fragment(MF | 64).then(inner_udp()),
        )
        .ignores(),
    ]
}

fn outer_headers() -> Vec<Case> {
    let len = (20 + 8 + 8 + 14 + 20 + 8 + PAYLOAD) as u16;
    vec![
        case("outer options", &outer().options(&[1, 1, 1, 0]).then(inner_udp())).passes(PassWireOuter),
        case("outer options of a stranger", &outer().from(STRANGER).options(&[1; 8]).then(inner_udp()))
            .drops(DropUnknownVtep),
        case("first outer fragment", &outer().fragment(MF).then(inner_udp())).passes(PassWireOuter),
        case("first outer fragment of a stranger", &outer().from(STRANGER).fragment(MF).then(inner_udp()))
            .drops(DropUnknownVtep),
        case("outer DF", &outer().fragment(DF).then(inner_udp())).delivers(FastDecap, delivered(inner_udp())),
        case("outer total length one too small", &outer().total_len(len - 1).then(inner_udp()))
            .passes(PassWireOuter),
        case("outer total length one too large", &outer().total_len(len + 1).then(inner_udp()))
            .passes(PassWireOuter),
        case("outer UDP length one too small", &outer().udp_len(len - 21).then(inner_udp()))
            .passes(PassWireOuter),
        case("outer UDP length one too large", &outer().udp_len(len - 19).then(inner_udp()))
            .passes(PassWireOuter),
        case("outer UDP length 0", &outer().udp_len(0).then(inner_udp())).passes(PassWireOuter),
    ]
}

fn vxlan_headers() -> Vec<Case> {
    let ours = VNI << 8;
    let foreign = (VNI + 1) << 8;
    let with = |flags, vni| {
        Packet::ethernet(WIRE_MAC, ROUTER_MAC)
            .ipv4(PEER_VTEP, VTEP)
            .fragment(0)
            .udp(50_000, PORT)
            .udp_checksum(0)
            .vxlan_words(flags, vni)
    };
    let odd = [
        ("group policy (GBP)", 0x8800_0000, ours),
        ("a group (GBP)", 0x8800_1234, ours),
        ("protocol extension (GPE)", 0x0c00_0001, ours),
        ("remote checksum offload", 0x0820_0000, ours),
        ("a reserved flag", 0x0900_0000, ours),
        ("a reserved bit in the first word", 0x0800_0001, ours),
        ("a reserved bit behind the VNI", 0x0800_0000, ours | 1),
        ("no VNI flag", 0, ours),
    ];
    let odd = odd.into_iter().flat_map(|(what, flags, vni)| {
        [
            case(what, &with(flags, vni).then(inner_udp())).passes(PassWireFlags),
            case(&format!("{what}, from a stranger"), &with(flags, vni).from(STRANGER).then(inner_udp()))
                .drops(DropUnknownVtep),
        ]
    });
    // Two overlays of a host may share a port; only the VNI tells them apart, and their VTEPs are not ours to judge.
    let others = vec![
        case("another overlay's VNI", &with(0x0800_0000, foreign).then(inner_udp())).passes(PassWireVni),
        case(
            "another overlay's VNI from a VTEP of its own",
            &with(0x0800_0000, foreign).from(STRANGER).then(inner_udp()),
        )
        .passes(PassWireVni),
        case(
            "another overlay's VNI with flags of its own",
            &with(0x8800_0001, foreign).from(STRANGER).then(inner_udp()),
        )
        .passes(PassWireVni),
        case(
            "another overlay's VNI in a first fragment",
            &with(0x0800_0000, foreign).from(STRANGER).fragment(MF).then(inner_udp()),
        )
        .passes(PassWireVni),
        case("VNI 0", &with(0x0800_0000, 0).then(inner_udp())).passes(PassWireVni),
    ];
    odd.chain(others).collect()
}

fn inner_frame() -> Vec<Case> {
    let arp = Packet::ethernet(VTEP_MAC, PEER_VTEP_MAC).ether_type(ARP).payload(46);
    let ipv6 = Packet::ethernet(VTEP_MAC, PEER_VTEP_MAC).ether_type(IPV6).payload(60);
    vec![
        arriving("inner frame for another MAC", inner_udp().macs(STRANGER_MAC, PEER_VTEP_MAC))
            .passes(PassWireInnerFrame),
        arriving("inner frame for the pod itself", inner_udp().macs(POD_MAC, PEER_VTEP_MAC))
            .passes(PassWireInnerFrame),
        arriving("inner broadcast", inner_udp().macs([0xff; 6], PEER_VTEP_MAC)).passes(PassWireInnerFrame),
        arriving("inner ARP", arp.clone()).passes(PassWireInnerFrame),
        arriving("inner IPv6", ipv6).passes(PassWireInnerFrame),
        arriving("inner VLAN tag, which hides the source", inner_udp().vlan(3)).drops(DropForgedPeerSource),
        case("inner ARP of a stranger", &outer().from(STRANGER).then(arp)).drops(DropUnknownVtep),
    ]
}

fn senders() -> Vec<Case> {
    let forged = |what: &str, source: Ipv4Addr| {
        let inner = inner_udp().from(source);
        [
            arriving(&format!("a peer, from {what}"), inner.clone()).drops(DropForgedPeerSource),
            arriving(&format!("a peer, from {what}, where the kernel decides"), inner.clone())
                .keep_forged()
                .passes(PassWireForeignSource),
            case(&format!("a stranger, from {what}"), &outer().from(STRANGER).then(inner.clone()))
                .drops(DropUnknownVtep),
            case(
                &format!("a stranger, from {what}, where the kernel decides on sources"),
                &outer().from(STRANGER).then(inner),
            )
            .keep_forged()
            .drops(DropUnknownVtep),
        ]
    };
    let foreign = |what: &str, source| {
        [
            arriving(&format!("a peer, from {what}"), inner_udp().from(source)).passes(PassWireForeignSource),
            case(&format!("a stranger, from {what}"), &outer().from(STRANGER).then(inner_udp().from(source)))
                .drops(DropUnknownVtep),
        ]
    };
    let stranger = |what, inner| case(what, &outer().from(STRANGER).then(inner)).drops(DropUnknownVtep);
    let rows = vec![
        stranger("a stranger who is right in all else", inner_udp()),
        stranger("a stranger, to no endpoint", inner_udp().to(UNKNOWN_POD)),
        stranger("a stranger, from its own address", inner_udp().from(STRANGER)),
        case("this node's own VTEP as the sender", &outer().from(VTEP).then(inner_udp()))
            .drops(DropUnknownVtep),
        case("a stranger, cut behind the UDP header", &outer_udp().from(STRANGER)).drops(DropUnknownVtep),
    ];
    rows.into_iter()
        .chain(forged("another peer's pod", WIDE_REMOTE))
        .chain(forged("a pod of this node", OTHER_POD))
        .chain(forged("the very pod it is for", POD))
        .chain(foreign("outside the network", OUTSIDE))
        .chain(foreign("a subnet that nobody has", VACANT))
        .chain(foreign("the peer's own address", PEER_VTEP))
        .chain(foreign("this node's address", VTEP))
        .collect()
}

/// Ethernet, IP and UDP headers, and then nothing.
fn outer_udp() -> Packet {
    Packet::ethernet(WIRE_MAC, ROUTER_MAC).ipv4(PEER_VTEP, VTEP).fragment(0).udp(50_000, PORT).udp_checksum(0)
}

fn destinations() -> Vec<Case> {
    let to = [
        ("a pod that is not known", UNKNOWN_POD),
        ("the subnet's gateway", [10, 5, 1, 1].into()),
        ("the subnet's broadcast address", [10, 5, 1, 255].into()),
        ("the peer's own subnet", REMOTE),
        ("outside the network", OUTSIDE),
        ("this node's address", VTEP),
        ("multicast", [224, 0, 0, 251].into()),
    ];
    to.into_iter()
        .map(|(what, destination)| {
            arriving(&format!("to {what}"), inner_udp().to(destination)).passes(PassWireNoEndpoint)
        })
        .collect()
}

fn inner_packet() -> Vec<Case> {
    let whole = (20 + 8 + PAYLOAD) as u16;
    let other_protocols = [SCTP, GRE, ESP, 0, 255].map(|protocol| {
        arriving(&format!("protocol {protocol}"), inner_udp().protocol(protocol)).passes(PassWireProtocol)
    });
    let other_icmp = [3, 4, 5, 11, 12].map(|kind| {
        let inner = inner_ip().icmp(kind, 0, 0, 0).payload(28);
        arriving(&format!("ICMP type {kind}"), inner).passes(PassWireProtocol)
    });
    let rows = vec![
        arriving("inner options", inner_udp().options(&[1, 1, 1, 0])).passes(PassWireInnerPacket),
        arriving("inner version 6", inner_udp().version(6)).passes(PassWireInnerPacket),
        arriving("first inner fragment", inner_udp().fragment(MF)).passes(PassWireInnerPacket),
        arriving("middle inner fragment", inner_udp().fragment(MF | 9)).passes(PassWireInnerPacket),
        arriving("last inner fragment", inner_udp().fragment(9)).passes(PassWireInnerPacket),
        arriving("inner total length one too small", inner_udp().total_len(whole - 1))
            .passes(PassWireInnerPacket),
        arriving("inner total length one too large", inner_udp().total_len(whole + 1))
            .passes(PassWireInnerPacket),
        arriving("inner total length 0", inner_udp().total_len(0)).passes(PassWireInnerPacket),
        arriving("an inner IP header and four bytes", inner_ip().protocol(UDP).payload(4))
            .passes(PassWireProtocol),
    ];
    rows.into_iter().chain(other_protocols).chain(other_icmp).collect()
}

fn checksums() -> Vec<Case> {
    let summed = |inner: Packet| {
        let plain = outer().then(inner.clone()).build();
        // The outer checksum covers all behind the outer IP header.
        outer().udp_checksum(outer_checksum(&plain)).then(inner)
    };
    let sum = outer_checksum(&outer().then(inner_udp()).build());
    let off_by_one = outer().udp_checksum(sum ^ 1).then(inner_udp());
    vec![
        // Nobody has verified the checksum of a frame that a test makes.
        case("an outer checksum beside an inner one", &summed(inner_udp()))
            .delivers(FastDecap, delivered(inner_udp())),
        case("an outer checksum beside TCP's", &summed(inner_tcp(ACK)))
            .delivers(FastDecap, delivered(inner_tcp(ACK))),
        case("an outer checksum beside an echo's", &summed(inner_echo(8)))
            .delivers(FastDecap, delivered(inner_echo(8))),
        case("an outer checksum beside an odd length", &summed(inner_ip().udp(1, 2).payload(7)))
            .delivers(FastDecap, delivered(inner_ip().udp(1, 2).payload(7))),
        case("an outer checksum that is off by one", &off_by_one).passes(PassWireChecksum),
        case("an outer checksum over UDP that has none", &summed(inner_udp().udp_checksum(0)))
            .passes(PassWireChecksum),
        case("an outer checksum with a low byte of zero", &outer().udp_checksum(0x0100).then(inner_udp()))
            .passes(PassWireChecksum),
        case("an outer checksum with a high byte of zero", &outer().udp_checksum(0x0001).then(inner_udp()))
            .passes(PassWireChecksum),
        case("no checksum at all", &outer().then(inner_udp().udp_checksum(0)))
            .delivers(FastDecap, delivered(inner_udp().udp_checksum(0))),
    ]
}

fn outer_checksum(frame: &[u8]) -> u16 {
    let udp = &frame[34..];
    let len = (udp.len() as u16).to_be_bytes();
    internet_checksum(&[&PEER_VTEP.octets(), &VTEP.octets(), &[0, UDP], &len, udp])
}

fn cut() -> Vec<Case> {
    vec![
        case("nothing behind the UDP header", &outer_udp()).passes(PassWireOuter),
        case("half a VXLAN header", &outer_udp().payload(4)).passes(PassWireOuter),
        case("nothing behind the VXLAN header", &outer()).passes(PassWireOuter),
        case("half an inner Ethernet header", &outer().bytes(&VTEP_MAC)).passes(PassWireOuter),
        case("half an inner IP header", &outer().then(Packet::ethernet(VTEP_MAC, PEER_VTEP_MAC).payload(10)))
            .passes(PassWireOuter),
    ]
}
