//! What arrives from a peer, down to outer headers that no kernel writes.

use loden_tests::packet::{self, Ipv4, Vxlan};

use super::{Case, Frame};
use crate::stage::{Stage, pod_mac};

pub(crate) fn cases(stage: &Stage) -> Vec<Case> {
    [congestion(stage), outer(stage), lengths(stage), vxlan(stage), inner(stage), inner_frames(stage)]
        .concat()
}

fn on_wire(stage: &Stage, name: impl Into<String>, outer: &Ipv4) -> Case {
    raw(stage, name, &outer.bytes())
}

fn raw(stage: &Stage, name: impl Into<String>, packet: &[u8]) -> Case {
    Case::new(name, vec![Frame::OnTheWire(stage.on_the_wire(packet))])
}

/// Each ECN codepoint inside, met by each outside (RFC 6040).
fn congestion(stage: &Stage) -> Vec<Case> {
    let mut cases = Vec::new();
    for inner_tos in [0, 1, 2, 3, 0xb8, 0xba] {
        for outer_tos in [0, 1, 2, 3, 0xb8, 0xbb] {
            let inner = Ipv4 { tos: inner_tos, ..stage.datagram(b"ecn") };
            let outer = Ipv4 { tos: outer_tos, ..stage.encapsulated(&inner.bytes()).packet() };
            let case = on_wire(stage, format!("ECN {inner_tos:#x} in {outer_tos:#x}"), &outer);
            cases.push(if outer_tos & 3 == 3 && inner_tos & 3 == 0 {
                case.second("pass_wire_ecn", 1)
            } else {
                case.arrives(1).second("fast_decap", 1)
            });
        }
    }
    cases
}

fn outer(stage: &Stage) -> Vec<Case> {
    let inner = stage.datagram(b"outer").bytes();
    let vxlan = stage.encapsulated(&inner);
    let outer = vxlan.packet();
    let with = |change: fn(&mut Ipv4)| {
        let mut outer = outer.clone();
        change(&mut outer);
        outer
    };
    let pieces: Vec<Frame> =
        outer.fragments(48).iter().map(|f| Frame::OnTheWire(stage.on_the_wire(&f.bytes()))).collect();
    let reversed = pieces.iter().rev().cloned().collect();
    let mut damaged = outer.bytes();
    damaged[10] ^= 1;
    let mut wrong_sum = vxlan.packet_with_checksum();
    wrong_sum.payload[7] ^= 1;
    let mut broadcast = stage.on_the_wire(&outer.bytes());
    broadcast[..6].fill(0xff);
    vec![
        on_wire(stage, "as it should be", &outer).arrives(1).second("fast_decap", 1),
        on_wire(stage, "TTL 1 outside", &with(|o| o.ttl = 1)).arrives(1).second("fast_decap", 1),
        on_wire(stage, "TTL 0 outside", &with(|o| o.ttl = 0)).arrives(1).second("fast_decap", 1),
        on_wire(stage, "DF outside", &with(|o| o.fragment = packet::DONT_FRAGMENT))
            .arrives(1)
            .second("fast_decap", 1),
        on_wire(stage, "an option outside", &with(|o| o.options = vec![1; 4]))
            .arrives(1)
            .second("pass_wire_outer", 1)
            .second("fast_overlay", 1),
        Case::new("fragments outside", pieces)
            .arrives(1)
            .second("pass_wire_outer", 1)
            .second("fast_overlay", 1),
        Case::new("fragments outside, last one first", reversed)
            .arrives(1)
            .second("pass_wire_outer", 1)
            .second("fast_overlay", 1),
        raw(stage, "a wrong header checksum outside", &damaged).second("pass_wire_outer", 1),
        on_wire(stage, "a UDP checksum outside", &vxlan.packet_with_checksum())
            .arrives(1)
            .second("fast_decap", 1),
        on_wire(stage, "a wrong UDP checksum outside", &wrong_sum)
            .second("pass_wire_checksum", 1)
            .second("fast_overlay", 0),
        Case::new("in a broadcast frame", vec![Frame::OnTheWire(broadcast)]).arrives(1),
        on_wire(stage, "a low source port", &Vxlan { ports: (1, 8472), ..vxlan.clone() }.packet())
            .arrives(1)
            .second("fast_decap", 1),
        on_wire(stage, "another port", &Vxlan { ports: (40_000, 4789), ..vxlan }.packet())
            .second("fast_decap", 0),
    ]
}

/// The outer lengths say less or more than there is.
fn lengths(stage: &Stage) -> Vec<Case> {
    let outer = stage.encapsulated(&stage.datagram(b"lengths").bytes()).packet();
    let whole = outer.bytes();
    let mended = |name: &str, by: i16| {
        let mut packet = whole.clone();
        let len = whole.len() as i16 + by;
        packet[2..4].copy_from_slice(&len.to_be_bytes());
        packet[10..12].fill(0);
        let sum = packet::checksum(&packet[..20]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        raw(stage, name, &packet)
    };
    let udp_len = |name: &str, by: i16| {
        let mut outer = outer.clone();
        let len = outer.payload.len() as i16 + by;
        outer.payload[4..6].copy_from_slice(&len.to_be_bytes());
        on_wire(stage, name, &outer)
    };
    vec![
        mended("an outer length of one less", -1).second("fast_decap", 0),
        mended("an outer length of 30 less", -30).second("fast_decap", 0),
        mended("an outer length of one more", 1).second("fast_decap", 0),
        udp_len("a UDP length of one less", -1).second("fast_decap", 0),
        udp_len("a UDP length of 30 less", -30).second("fast_decap", 0),
        udp_len("a UDP length of one more", 1).second("fast_decap", 0),
        raw(stage, "padding behind the outer packet", &[&whole[..], &[0; 18]].concat())
            .arrives(1)
            .second("pass_wire_outer", 1),
        raw(stage, "cut in the VXLAN header", &whole[..34]),
        raw(stage, "cut in the inner packet", &whole[..80]),
        on_wire(
            stage,
            "nothing behind the VXLAN header",
            &Ipv4 { payload: outer.payload[..16].to_vec(), ..outer.clone() },
        ),
        on_wire(
            stage,
            "cut in the inner frame",
            &Ipv4 { payload: outer.payload[..24].to_vec(), ..outer.clone() },
        ),
    ]
}

fn vxlan(stage: &Stage) -> Vec<Case> {
    let vxlan = stage.encapsulated(&stage.datagram(b"vxlan").bytes());
    let flags = |name: &str, flags| {
        on_wire(stage, name, &Vxlan { flags, ..vxlan.clone() }.packet()).second("pass_wire_flags", 1)
    };
    let vni = |vni| on_wire(stage, format!("VNI {vni}"), &Vxlan { vni, ..vxlan.clone() }.packet());
    vec![
        flags("no VNI flag", 0),
        flags("a group policy", 0x8800_0001),
        flags("a reserved bit", 0x0900_0000),
        vni(2).second("pass_wire_vni", 1),
        vni(0x00ff_ffff).second("pass_wire_vni", 1),
    ]
}

fn inner(stage: &Stage) -> Vec<Case> {
    let datagram = stage.datagram(b"inner");
    let case =
        |name: &str, packet: &Ipv4| on_wire(stage, name, &stage.encapsulated(&packet.bytes()).packet());
    let damaged = |name: &str, at: usize| {
        let mut packet = datagram.bytes();
        packet[at] ^= 1;
        on_wire(stage, name, &stage.encapsulated(&packet).packet())
    };
    let mut no_checksum = datagram.clone();
    no_checksum.payload[6..8].fill(0);
    let protected = stage.encapsulated(&no_checksum.bytes()).packet_with_checksum();
    let mut broken = protected.clone();
    broken.payload[7] ^= 1;
    let from_node = Ipv4 { source: stage.address(0, 0), ..datagram.clone() };
    let pieces = datagram.fragments(8);
    vec![
        case("TTL 1", &Ipv4 { ttl: 1, ..datagram.clone() }).comes_back(1).second("pass_wire_ttl", 1),
        case("TTL 2", &Ipv4 { ttl: 2, ..datagram.clone() }).arrives(1).second("fast_decap", 1),
        case("an option", &Ipv4 { options: vec![1; 4], ..datagram.clone() })
            .arrives(1)
            .second("pass_wire_inner_packet", 1),
        case("a fragment", &pieces[0]).arrives(1).second("pass_wire_inner_packet", 1),
        case("a later fragment", &pieces[1]).arrives(1).second("pass_wire_inner_packet", 1),
        damaged("a wrong header checksum", 10).second("pass_wire_inner_packet", 1),
        damaged("a wrong UDP checksum", 26).arrives(1).second("fast_decap", 1),
        on_wire(stage, "no checksum inside, one outside", &protected)
            .arrives(1)
            .second("pass_wire_checksum", 1),
        on_wire(stage, "no checksum inside, a wrong one outside", &broken).second("pass_wire_checksum", 1),
        case("from the peer's VXLAN device", &from_node).arrives(1).second("fast_decap", 1),
        case("a fast protocol no more", &Ipv4 { protocol: 47, ..datagram.clone() })
            .arrives(1)
            .comes_back(1)
            .second("pass_wire_protocol", 1),
        case("to the node itself", &Ipv4::udp(datagram.source, stage.address(1, 1), (5555, 7777), b"node"))
            .comes_back(1)
            .second("pass_wire_no_endpoint", 1),
        case("to the broadcast address", &Ipv4 { destination: stage.address(1, 255), ..datagram.clone() }),
        case("to a group", &Ipv4 { destination: [239, 1, 1, 1].into(), ..datagram.clone() }),
        case("to loopback", &Ipv4 { destination: [127, 0, 0, 1].into(), ..datagram }),
    ]
}

fn inner_frames(stage: &Stage) -> Vec<Case> {
    let datagram = stage.datagram(b"frame").bytes();
    let good = stage.encapsulated(&datagram).frame;
    let case = |name: &str, frame: Vec<u8>| on_wire(stage, name, &stage.encapsulated_frame(frame).packet());
    let to = |mac: [u8; 6]| [&mac[..], &good[6..]].concat();
    let typed = |ether_type: u16, payload: &[u8]| [&good[..12], &ether_type.to_be_bytes(), payload].concat();
    vec![
        case("to another MAC", to([2, 0, 0, 0, 9, 9])).second("pass_wire_inner_frame", 1),
        case("to the pod's MAC", to(pod_mac(&stage.destination))).second("pass_wire_inner_frame", 1),
        case("to all", to([0xff; 6])).second("pass_wire_inner_frame", 1),
        case("to a group's MAC", to([1, 0, 0x5e, 0, 0, 1])).second("pass_wire_inner_frame", 1),
        case("from a MAC that the peer has not", [&good[..6], &[2, 0, 0, 0, 9, 9], &good[12..]].concat())
            .arrives(1)
            .second("fast_decap", 1),
        case("ARP", typed(packet::ARP, &[0; 28])).second("pass_wire_inner_frame", 1),
        case("IPv6", typed(0x86dd, &[0x60; 60])).second("pass_wire_inner_frame", 1),
        case("VLAN 5", typed(0x8100, &[&[0, 5][..], &packet::IPV4.to_be_bytes(), &datagram].concat()))
            .second("drop_forged_peer_source", 1),
        case("VLAN 0", typed(0x8100, &[&[0, 0][..], &packet::IPV4.to_be_bytes(), &datagram].concat()))
            .stricter()
            .second("drop_forged_peer_source", 1),
        case("padding behind the inner packet", [&good[..], &[0; 6]].concat())
            .arrives(1)
            .second("pass_wire_inner_packet", 1),
        case("a length", typed(46, &[0xaa; 46])).second("pass_wire_inner_frame", 1),
    ]
}
