//! What arrives from a peer, in either family, down to outer headers that no kernel writes.

use loden_tests::packet::{self, Vxlan};

use super::{Case, Frame, Twin};
use crate::stage::{Stage, pod_mac};

pub(crate) fn cases<F: Twin>(stage: &Stage<F>) -> Vec<Case> {
    [congestion(stage), outer(stage), lengths(stage), vxlan(stage), inner(stage), inner_frames(stage)]
        .concat()
}

pub(super) fn on_wire<F: Twin>(stage: &Stage<F>, name: impl Into<String>, outer: &F) -> Case {
    Case::on_wire(stage, name, &outer.bytes())
}

/// Each ECN codepoint inside, met by each outside (RFC 6040).
fn congestion<F: Twin>(stage: &Stage<F>) -> Vec<Case> {
    let mut cases = Vec::new();
    for inner_class in [0, 1, 2, 3, 0xb8, 0xba] {
        for outer_class in [0, 1, 2, 3, 0xb8, 0xbb] {
            let inner = stage.datagram(b"ecn").class(inner_class);
            let outer = stage.encapsulated(&inner.bytes()).packet().class(outer_class);
            let case = on_wire(stage, format!("ECN {inner_class:#x} in {outer_class:#x}"), &outer);
            cases.push(if outer_class & 3 == 3 && inner_class & 3 == 0 {
                case.second("pass_wire_ecn", 1)
            } else {
                case.arrives(1).second("fast_decap", 1)
            });
        }
    }
    cases
}

fn outer<F: Twin>(stage: &Stage<F>) -> Vec<Case> {
    let inner = stage.datagram(b"outer").bytes();
    let vxlan = stage.encapsulated(&inner);
    let outer = vxlan.packet();
    let pieces: Vec<Frame> =
        outer.fragments(56).iter().map(|f| Frame::OnTheWire(stage.on_the_wire(&f.bytes()))).collect();
    let reversed = pieces.iter().rev().cloned().collect();
    let mut wrong_sum = vxlan.packet_with_checksum();
    wrong_sum.payload_mut()[7] ^= 1;
    let mut broadcast = stage.on_the_wire(&outer.bytes());
    broadcast[..6].fill(0xff);
    // The kernel's, and behind it our program at the VXLAN device delivers.
    let unusual = |case: Case| case.arrives(1).second("pass_wire_outer", 1).second("fast_overlay", 1);
    vec![
        on_wire(stage, "as it should be", &outer).arrives(1).second("fast_decap", 1),
        on_wire(stage, "1 hop outside", &outer.clone().hops(1)).arrives(1).second("fast_decap", 1),
        on_wire(stage, "0 hops outside", &outer.clone().hops(0)).arrives(1).second("fast_decap", 1),
        unusual(on_wire(stage, "an option outside", &outer.clone().padded())),
        unusual(Case::new("fragments outside", pieces)),
        unusual(Case::new("fragments outside, last one first", reversed)),
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
fn lengths<F: Twin>(stage: &Stage<F>) -> Vec<Case> {
    let outer = stage.encapsulated(&stage.datagram(b"lengths").bytes()).packet();
    let whole = outer.bytes();
    let raw = |name: &str, packet: &[u8]| Case::on_wire(stage, name, packet);
    let lengthened = |name: &str, by: i16| {
        let mut packet = whole.clone();
        F::lengthen(&mut packet, by);
        raw(name, &packet).second("fast_decap", 0)
    };
    let udp_len = |name: &str, by: i16| {
        let mut outer = outer.clone();
        let len = outer.payload().len() as i16 + by;
        outer.payload_mut()[4..6].copy_from_slice(&len.to_be_bytes());
        on_wire(stage, name, &outer).second("fast_decap", 0)
    };
    let cut =
        |name: &str, len: usize| on_wire(stage, name, &outer.clone().with(outer.payload()[..len].to_vec()));
    vec![
        lengthened("an outer length of one less", -1),
        lengthened("an outer length of 30 less", -30),
        lengthened("an outer length of one more", 1),
        udp_len("a UDP length of one less", -1),
        udp_len("a UDP length of 30 less", -30),
        udp_len("a UDP length of one more", 1),
        raw("padding behind the outer packet", &[&whole[..], &[0; 18]].concat())
            .arrives(1)
            .second("pass_wire_outer", 1),
        raw("cut in the VXLAN header", &whole[..F::HEADER_LEN + 14]),
        raw("cut in the inner packet", &whole[..F::HEADER_LEN + 30 + F::HEADER_LEN + 10]),
        cut("nothing behind the VXLAN header", 16),
        cut("cut in the inner frame", 24),
    ]
}

fn vxlan<F: Twin>(stage: &Stage<F>) -> Vec<Case> {
    let vxlan = stage.encapsulated(&stage.datagram(b"vxlan").bytes());
    let flags = |name: &str, flags| {
        on_wire(stage, name, &Vxlan { flags, ..vxlan.clone() }.packet()).second("pass_wire_flags", 1)
    };
    let vni = |vni| {
        on_wire(stage, format!("VNI {vni}"), &Vxlan { vni, ..vxlan.clone() }.packet())
            .second("pass_wire_vni", 1)
    };
    vec![
        flags("no VNI flag", 0),
        flags("a group policy", 0x8800_0001),
        flags("a reserved bit", 0x0900_0000),
        vni(2),
        vni(0x00ff_ffff),
    ]
}

fn inner<F: Twin>(stage: &Stage<F>) -> Vec<Case> {
    let datagram = stage.datagram(b"inner");
    let case = |name: &str, packet: &F| on_wire(stage, name, &stage.encapsulated(&packet.bytes()).packet());
    let from_node = F::udp(stage.address(0, 0), stage.ends[1], (5555, 7777), b"inner");
    let pieces = datagram.fragments(8);
    vec![
        case("1 hop", &datagram.clone().hops(1)).comes_back(1).second("pass_wire_ttl", 1),
        case("2 hops", &datagram.clone().hops(2)).arrives(1).second("fast_decap", 1),
        case("an option", &datagram.clone().padded()).arrives(1).second("pass_wire_inner_packet", 1),
        case("a fragment", &pieces[0]).arrives(1).second("pass_wire_inner_packet", 1),
        case("a later fragment", &pieces[1]).arrives(1).second("pass_wire_inner_packet", 1),
        case("from the peer's VXLAN device", &from_node).arrives(1).second("fast_decap", 1),
        case("a fast protocol no more", &F::new(stage.ends[0], stage.ends[1], 47, vec![0x11; 32]))
            .arrives(1)
            .comes_back(1)
            .second("pass_wire_protocol", 1),
        case("to the node itself", &F::udp(stage.ends[0], stage.address(1, 1), (5555, 7777), b"node"))
            .comes_back(1)
            .second("pass_wire_no_endpoint", 1),
    ]
}

fn inner_frames<F: Twin>(stage: &Stage<F>) -> Vec<Case> {
    let datagram = stage.datagram(b"frame").bytes();
    let good = stage.encapsulated(&datagram).frame;
    let case = |name: &str, frame: Vec<u8>| on_wire(stage, name, &stage.encapsulated_frame(frame).packet());
    let to = |mac: [u8; 6]| [&mac[..], &good[6..]].concat();
    let typed = |ether_type: u16, payload: &[u8]| [&good[..12], &ether_type.to_be_bytes(), payload].concat();
    let tagged = |tag: u8| typed(0x8100, &[&[0, tag][..], &F::ETHER_TYPE.to_be_bytes(), &datagram].concat());
    vec![
        case("to another MAC", to([2, 0, 0, 0, 9, 9])).second("pass_wire_inner_frame", 1),
        case("to the pod's MAC", to(pod_mac(&stage.destination))).second("pass_wire_inner_frame", 1),
        case("to all", to([0xff; 6])).second("pass_wire_inner_frame", 1),
        case("to a group's MAC", to([1, 0, 0x5e, 0, 0, 1])).second("pass_wire_inner_frame", 1),
        case("from a MAC that the peer has not", [&good[..6], &[2, 0, 0, 0, 9, 9], &good[12..]].concat())
            .arrives(1)
            .second("fast_decap", 1),
        case("ARP", typed(packet::ARP, &[0; 28])).second("pass_wire_inner_frame", 1),
        case("the other family's type", typed(F::other_ether_type(), &datagram))
            .second("pass_wire_inner_frame", 1),
        case("VLAN 5", tagged(5)).second("drop_forged_peer_source", 1),
        case("VLAN 0", tagged(0)).stricter().second("drop_forged_peer_source", 1),
        case("padding behind the inner packet", [&good[..], &[0; 6]].concat())
            .arrives(1)
            .second("pass_wire_inner_packet", 1),
        case("a length", typed(46, &[0xaa; 46])).second("pass_wire_inner_frame", 1),
    ]
}
