//! The guard at the driver: it drops what it is sure of and leaves the rest to the program behind it.

use loden_ebpf::reason::Reason;

use crate::{case::save, packet::*, rig::*, samples::*};

/// What an XDP program returns (linux/bpf.h).
const DROP: u32 = 1;
const PASS: u32 = 2;

fn rows() -> Vec<(&'static str, Packet, u32)> {
    let stranger = || outer().from(STRANGER);
    let foreign =
        Packet::ethernet(WIRE_MAC, ROUTER_MAC).ipv4(STRANGER, VTEP).udp(50_000, PORT).vxlan(VNI + 1);
    vec![
        ("a stranger's VXLAN", stranger().then(inner_udp()), DROP),
        ("a stranger's, with nothing inside", stranger(), DROP),
        ("a stranger's first fragment", stranger().fragment(MF).then(inner_udp()), DROP),
        ("a peer's", outer().then(inner_udp()), PASS),
        (
            "a peer's, forged inside: not the guard's to judge",
            outer().then(inner_udp().from(OTHER_POD)),
            PASS,
        ),
        ("a stranger's later fragment", stranger().fragment(9).then(inner_udp()), PASS),
        ("a stranger's, with options", stranger().options(&[1; 4]).then(inner_udp()), PASS),
        ("another overlay's", foreign.then(inner_udp()), PASS),
        ("for another address", stranger().to(PEER_VTEP).then(inner_udp()), PASS),
        ("another port", sent_ip().from(STRANGER).to(VTEP).udp(1, 53).payload(60), PASS),
        ("TCP", sent_ip().from(STRANGER).to(VTEP).tcp(1, PORT, SYN).payload(60), PASS),
        ("ARP", Packet::ethernet([0xff; 6], ROUTER_MAC).ether_type(ARP).payload(28), PASS),
        ("a tagged frame", stranger().then(inner_udp()).vlan(4), PASS),
    ]
}

#[test]
fn the_guard_drops_strangers_vxlan_and_nothing_else() {
    Lab::run(|lab| {
        let mut rig = Rig::load(lab, Mode { strict: true, drop_forged: true });
        for (what, packet, expected) in rows() {
            let frame = packet.build();
            let earlier = rig.dataplane.counters().unwrap();
            let action = rig.guard(&frame);
            let counted = rig.counted_since(&earlier);
            let path = || save("guard", [&frame[..]]).display().to_string();
            assert_eq!(action, expected, "{what}, see {}", path());
            let dropped = [(Reason::DropGuard, 1, frame.len() as u64)];
            assert_eq!(counted, if expected == DROP { &dropped[..] } else { &[] }, "{what}, see {}", path());
        }
    });
}

#[test]
fn the_guard_passes_what_is_cut_before_it_is_clear() {
    Lab::run(|lab| {
        let mut rig = Rig::load(lab, Mode { strict: true, drop_forged: true });
        let frame = outer().from(STRANGER).then(inner_udp()).build();
        // Ethernet, IPv4, UDP and VXLAN headers.
        for len in 14..frame.len() {
            let expected = if len < 14 + 20 + 8 + 8 { PASS } else { DROP };
            assert_eq!(rig.guard(&frame[..len]), expected, "{len} bytes");
        }
    });
}
