//! Rows for `from_other`, for what `from_wire` leaves to it, and for what a pod sends to nodes: VXLAN that the kernel's
//! socket would take.
//!
//! The lab's host does not forward, so every destination is its own.

use loden_agent::dataplane::Program::{FromOther, FromPod, FromWire};
use loden_ebpf::reason::Reason::*;

use crate::{case::Case, packet::*, rig::*, samples::*};

#[test]
fn vxlan_by_another_way_is_dropped_unless_it_is_a_peers_own() {
    crate::case::run("from_other", &cases());
}

pub(crate) fn cases() -> Vec<Case> {
    [passed(), strangers(), forged(), uplink(), pods()].into_iter().flatten().collect()
}

fn case(what: &str, packet: &Packet) -> Case {
    Case::new(what, FromOther, packet)
}

fn stranger() -> Packet {
    outer().from(STRANGER)
}

/// Another overlay's, from a VTEP of its own.
fn foreign() -> Packet {
    Packet::ethernet(WIRE_MAC, ROUTER_MAC).ipv4(STRANGER, VTEP).udp(50_000, PORT).vxlan(VNI + 1)
}

fn tags(packet: Packet, ids: &[u16]) -> Packet {
    ids.iter().fold(packet, |packet, id| packet.vlan(*id))
}

fn passed() -> Vec<Case> {
    let udp = |port| Packet::ethernet(WIRE_MAC, ROUTER_MAC).ipv4(STRANGER, VTEP).udp(50_000, port);
    vec![
        case("a peer's", &outer().then(inner_udp())).ignores(),
        case("a peer's, with a priority tag", &outer().then(inner_udp()).vlan(0)).ignores(),
        case("a peer's, with options", &outer().options(&[1; 4]).then(inner_udp())).ignores(),
        case(
            "a peer's ARP",
            &outer().then(Packet::ethernet([0xff; 6], PEER_VTEP_MAC).ether_type(ARP).payload(28)),
        )
        .ignores(),
        case("a client's that the peer forwards for", &outer().then(inner_udp().from(OUTSIDE))).ignores(),
        case("a source that nobody leases", &outer().then(inner_udp().from(VACANT))).ignores(),
        case("the peer's own processes'", &outer().then(inner_udp().from(PEER_VTEP))).ignores(),
        case("another overlay's", &foreign().then(inner_udp())).ignores(),
        case("another overlay's first fragment", &foreign().fragment(MF).then(inner_udp())).ignores(),
        case("another port", &udp(53).payload(90)).ignores(),
        case("cut behind the UDP header", &udp(PORT)).ignores(),
        case("a stranger's later fragment", &stranger().fragment(9).then(inner_udp())).ignores(),
        case(
            "a stranger's TCP",
            &Packet::ethernet(WIRE_MAC, ROUTER_MAC).ipv4(STRANGER, VTEP).tcp(1, PORT, SYN),
        )
        .ignores(),
        case("a stranger's, in a VLAN", &tags(stranger().then(inner_udp()), &[7])).ignores(),
        case("a stranger's, in a VLAN behind a priority", &tags(stranger().then(inner_udp()), &[7, 0]))
            .ignores(),
        case("a stranger's, for another host", &stranger().macs(OTHER_POD_MAC, ROUTER_MAC).then(inner_udp()))
            .ignores(),
        case("ARP", &Packet::ethernet([0xff; 6], ROUTER_MAC).ether_type(ARP).payload(28)).ignores(),
        case("IPv6", &Packet::ethernet(WIRE_MAC, ROUTER_MAC).ether_type(IPV6).payload(60)).ignores(),
    ]
}

fn strangers() -> Vec<Case> {
    let drops = |what, packet: &Packet| case(what, packet).drops(DropUnknownVtep);
    let to = |address: [u8; 4]| stranger().to(address.into()).then(inner_udp());
    let headers = || Packet::ethernet(WIRE_MAC, ROUTER_MAC).ipv4(STRANGER, VTEP);
    vec![
        drops("a stranger's", &stranger().then(inner_udp())),
        drops("a stranger's, where the kernel decides on sources", &stranger().then(inner_udp()))
            .keep_forged(),
        drops("a stranger's, through the strict gate", &stranger().then(inner_udp())).strict(),
        drops("this node's own", &outer().from(VTEP).then(inner_udp())),
        drops("a stranger's, with nothing inside", &stranger()),
        drops("a stranger's, with options", &stranger().options(&[1; 40]).then(inner_udp())),
        drops("a stranger's first fragment", &stranger().fragment(MF).then(inner_udp())),
        drops("a stranger's first fragment, which hides the VNI", &headers().fragment(MF).udp(50_000, PORT)),
        drops("a stranger's, with a priority tag", &stranger().then(inner_udp()).vlan(0)),
        drops("a stranger's, with four of them", &tags(stranger().then(inner_udp()), &[0; 4])),
        drops("with so many that nobody looks behind them", &tags(outer().then(inner_udp()), &[0; 5])),
        drops("a stranger's, a broadcast frame", &stranger().macs([0xff; 6], ROUTER_MAC).then(inner_udp())),
        drops("a stranger's, for all", &to([255; 4])),
        drops("a stranger's, for a group", &to([224, 0, 0, 1])),
        drops("a stranger's, for another address of this host", &to([192, 0, 2, 1])),
        drops("a stranger's, for a peer", &to(PEER_VTEP.octets())),
    ]
}

fn forged() -> Vec<Case> {
    let drops = |what, packet: &Packet| case(what, packet).drops(DropForgedPeerSource);
    vec![
        drops("a peer's, from another peer's pod", &outer().then(inner_udp().from(WIDE_REMOTE))),
        drops("a peer's, from a pod of this node", &outer().then(inner_udp().from(OTHER_POD))),
        drops("a peer's, from that pod, tagged", &outer().then(inner_udp().from(OTHER_POD)).vlan(0)),
        drops("a peer's, hidden behind a tag inside", &outer().then(inner_udp().vlan(3))),
        drops("a peer's, hidden in a small fragment", &outer().fragment(MF)),
        case("a peer's, where the kernel decides", &outer().then(inner_udp().from(OTHER_POD)))
            .keep_forged()
            .ignores(),
        case("a peer's small fragment, where the kernel decides", &outer().fragment(MF))
            .keep_forged()
            .ignores(),
    ]
}

/// What `from_wire` itself takes for none of its business.
fn uplink() -> Vec<Case> {
    let drops = |what: &str, packet: &Packet| {
        Case::new(format!("uplink: {what}"), FromWire, packet).drops(DropUnknownVtep)
    };
    let to = |address: [u8; 4]| stranger().to(address.into()).then(inner_udp());
    vec![
        drops("a stranger's, with a priority tag", &stranger().then(inner_udp()).vlan(0)),
        drops("a stranger's, a broadcast frame", &stranger().macs([0xff; 6], ROUTER_MAC).then(inner_udp())),
        drops("a stranger's, for all", &to([255; 4])),
        drops("a stranger's, for a group", &to([224, 0, 0, 1])),
        drops("a stranger's, for another address of this host", &to([192, 0, 2, 1])),
        Case::new("uplink: a peer's, with a priority tag", FromWire, &outer().then(inner_udp()).vlan(0))
            .ignores(),
        Case::new(
            "uplink: a peer's, from a pod of this node, tagged",
            FromWire,
            &outer().then(inner_udp().from(OTHER_POD)).vlan(0),
        )
        .drops(DropForgedPeerSource),
    ]
}

fn pods() -> Vec<Case> {
    let sent = |from, to| sent_ip().from(from).to(to).udp(50_000, PORT);
    let drops =
        |what: &str, packet: &Packet| Case::new(format!("pod: {what}"), FromPod, packet).drops(DropPodVxlan);
    let passes = |what: &str, packet: &Packet| {
        Case::new(format!("pod: {what}"), FromPod, packet).passes(PassPodNoPeer)
    };
    vec![
        drops("to its node", &sent(POD, VTEP).vxlan(VNI).then(inner_udp())),
        drops("to its node, in a peer's name", &sent(PEER_VTEP, VTEP).vxlan(VNI).then(inner_udp())),
        drops("to another node, whose node would be taken for the sender", &sent(POD, PEER_VTEP).vxlan(VNI)),
        drops("to all", &sent(POD, [255; 4].into()).vxlan(VNI).then(inner_udp())),
        drops("tagged", &sent(POD, VTEP).vxlan(VNI).then(inner_udp()).vlan(0)),
        drops("behind five tags", &tags(sent(POD, VTEP).vxlan(VNI).then(inner_udp()), &[0; 5])),
        passes("another overlay's", &sent(POD, VTEP).vxlan(VNI + 1).then(inner_udp())),
        passes("to another port", &sent_ip().to(VTEP).udp(50_000, 53).payload(60)),
        Case::new(
            "pod: an overlay between pods",
            FromPod,
            &sent(POD, UNKNOWN_POD).vxlan(VNI).then(inner_udp()),
        )
        .drops(DropPodVxlan),
    ]
}
