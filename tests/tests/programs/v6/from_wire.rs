//! What comes from the wire over IPv6.

use super::*;

pub(super) const TABLES: &[Table] = &[delivered, odd];

#[test]
fn a_peer_s_packet_is_delivered_whose_checksum_follows_from_its_headers() {
    Lab::run(delivered);
}

fn delivered(lab: &Lab) -> Produced {
    let mut rig = Rig::load(lab, false, false);
    let ip = Ip::new(REMOTE, POD);
    let delivered = |packet: &[u8]| {
        let mut frame = ethernet(POD_MAC, GATEWAY_MAC, packet);
        frame[14 + 7] -= 1;
        frame
    };
    for (what, packet) in [
        ("UDP", ip.udp(53, 5000, b"odd")),
        ("TCP data", ip.tcp(80, 5000, 0x10, &[7; 500])),
        ("TCP SYN, not gated", ip.tcp(80, 5000, 0x12, b"")),
        ("echo", ip.icmp(128, 7, b"0123456789")),
        ("echo reply", ip.class(0xb8).icmp(129, 7, b"0123456789")),
    ] {
        rig.row(what, FromWire, &arrived(PEER_VTEP, &packet), Some(FastDecap), Some(&delivered(&packet)));
    }
    let packet = ip.class(2).udp(53, 5000, b"congested");
    let outer = vxlan(PEER_VTEP, VTEP, &ethernet(VTEP_MAC, PEER_VTEP_MAC, &packet));
    let congested = |mut outer: Vec<u8>| {
        outer[1] |= 3 << 4;
        ethernet(WIRE_MAC, PEER_VTEP_MAC, &outer)
    };
    let mut expected = delivered(&packet);
    expected[14 + 1] |= 3 << 4;
    rig.row("congestion on the way", FromWire, &congested(outer), Some(FastDecap), Some(&expected));
    let packet = ip.udp(53, 5000, b"no ECN");
    let outer = vxlan(PEER_VTEP, VTEP, &ethernet(VTEP_MAC, PEER_VTEP_MAC, &packet));
    rig.passes("congestion of what knows no ECN", FromWire, &congested(outer), PassWireEcn);
    rig.produced
}

#[test]
fn what_is_odd_on_the_wire_is_the_kernels_and_strangers_end_there() {
    Lab::run(odd);
}

fn odd(lab: &Lab) -> Produced {
    let mut rig = Rig::load(lab, false, false);
    let ip = Ip::new(REMOTE, POD);
    let udp = ip.udp(53, 5000, b"payload");
    let good = arrived(PEER_VTEP, &udp);
    let changed = |at: usize, bits: u8| {
        let mut frame = good.clone();
        frame[at] ^= bits;
        frame
    };
    let (outer, inner) = (14, 14 + 40 + 16 + 14);
    for (what, frame, reason) in [
        ("a wrong outer checksum", changed(outer + 46, 1), PassWireChecksum),
        ("a damaged flow label inside", changed(inner + 3, 1), PassWireChecksum),
        ("a damaged inner MAC", changed(inner - 3, 1), PassWireChecksum),
        ("another VNI", changed(outer + 40 + 12, 1), PassWireVni),
        ("an extension of VXLAN", changed(outer + 40 + 8, 0x80), PassWireFlags),
        ("a wrong outer length", changed(outer + 5, 1), PassWireOuter),
        ("not for our device", changed(inner - 14 + 5, 1), PassWireInnerFrame),
        ("ARP inside", changed(inner - 1, 1), PassWireInnerFrame),
        ("a wrong inner length", changed(inner + 5, 1), PassWireInnerPacket),
        ("hop limit 1", arrived(PEER_VTEP, &ip.hops(1).udp(1, 2, b"")), PassWireTtl),
        (
            "a fragment inside",
            arrived(PEER_VTEP, &ip.next(44, &[17, 0, 0, 1, 0, 0, 0, 9])),
            PassWireInnerPacket,
        ),
        ("ESP inside", arrived(PEER_VTEP, &ip.next(50, &[0; 40])), PassWireProtocol),
        ("a TCP header of 19 bytes inside", arrived(PEER_VTEP, &ip.next(6, &[0; 19])), PassWireProtocol),
        (
            "to an unknown pod",
            arrived(PEER_VTEP, &Ip::new(REMOTE, UNKNOWN_POD).udp(1, 2, b"")),
            PassWireNoEndpoint,
        ),
        (
            "from a client outside",
            arrived(PEER_VTEP, &Ip::new(OUTSIDE, POD).udp(1, 2, b"")),
            PassWireForeignSource,
        ),
        ("from a stranger", arrived(STRANGER, &udp), DropUnknownVtep),
        (
            "from another peer's pod",
            arrived(PEER_VTEP, &Ip::new(DIRECT_REMOTE, POD).udp(1, 2, b"")),
            DropForgedPeerSource,
        ),
        (
            "from our own subnet",
            arrived(PEER_VTEP, &Ip::new(OTHER_POD, POD).udp(1, 2, b"")),
            DropForgedPeerSource,
        ),
    ] {
        rig.row(what, FromWire, &frame, Some(reason), None);
    }
    let mut without = good.clone();
    without[outer + 46..outer + 48].fill(0);
    rig.passes("no outer checksum at all", FromWire, &without, PassWireChecksum);
    let tcp = arrived(PEER_VTEP, &ip.tcp(80, 5000, 0x10, &[7; 500]));
    rig.passes_in_segments("an aggregate", FromWire, &tcp, 100, PassWireNoRoom);
    rig.passes_in_segments("an aggregate of datagrams", FromWire, &good, 1000, PassWireAggregate);
    let direct = ethernet(WIRE_MAC, PEER_VTEP_MAC, &Ip::new(DIRECT_REMOTE, POD).hops(1).udp(1, 2, b"x"));
    rig.passes("hop limit 1, not encapsulated", FromWire, &direct, PassDirect);
    rig.row("for another port", FromWire, &changed(outer + 43, 1), None, None);
    rig.row("for another address", FromWire, &changed(outer + 39, 1), None, None);
    rig.produced
}
