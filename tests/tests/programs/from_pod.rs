//! Rows for `from_pod`: what a pod sends.

use loden_agent::dataplane::Program::{FromPod, ToOverlay};
use loden_agent::family::V4;
use loden_ebpf::{abi::SightingKey, reason::Reason::*};

use crate::{case::Case, packet::*, rig::*, samples::*};

#[test]
fn what_a_pod_sends_is_encapsulated_or_passed_on_unchanged() {
    crate::case::run("from_pod", &cases());
}

pub(crate) fn cases() -> Vec<Case> {
    [fast(), direct(), local(), routed(), ttl(), ecn(), addresses(), sightings(), not_plain(), lengths()]
        .into_iter()
        .flatten()
        .collect()
}

fn case(what: &str, packet: &Packet) -> Case {
    Case::new(what, FromPod, packet)
}

fn fast() -> Vec<Case> {
    let one_hop_less = |packet: Packet| encapsulated(packet.ttl(63));
    let wide = (WIDE_PEER_VTEP, WIDE_PEER_VTEP_MAC);
    vec![
        case("TCP data", &sent_tcp(ACK)).encapsulates(one_hop_less(sent_tcp(ACK))),
        case("TCP SYN of an endpoint that is not gated", &sent_tcp(SYN))
            .encapsulates(one_hop_less(sent_tcp(SYN))),
        case("UDP", &sent_udp()).encapsulates(one_hop_less(sent_udp())),
        case("UDP without a checksum", &sent_udp().udp_checksum(0))
            .encapsulates(one_hop_less(sent_udp().udp_checksum(0))),
        case("echo request", &sent_echo(8)).encapsulates(one_hop_less(sent_echo(8))),
        case("echo reply", &sent_echo(0)).encapsulates(one_hop_less(sent_echo(0))),
        case("no DF", &sent_udp().fragment(0)).encapsulates(one_hop_less(sent_udp().fragment(0))),
        case("a mark stays, it is the host's", &sent_udp())
            .mark(0xbeef)
            .encapsulates(one_hop_less(sent_udp())),
        case("no payload", &sent_ip().udp(1, 2)).encapsulates(one_hop_less(sent_ip().udp(1, 2))),
        case("the third slot of a peer with a wide subnet", &sent_udp().to(WIDE_REMOTE))
            .encapsulates(encapsulated_to(sent_udp().to(WIDE_REMOTE).ttl(63), wide, 0)),
        case("a wrong header checksum is the kernel's to drop", &sent_udp().checksum_error(0x1234))
            .passes(PassPodMalformed),
    ]
}

/// To a peer that is a hop away: the frame with one hop less, whose MACs bpf_redirect_neigh will write.
fn direct() -> Vec<Case> {
    let room = usize::from(PEER_MTU) - 20 - 8;
    let of = |payload| sent_ip().to(DIRECT_REMOTE).udp(LOCAL_PORT, REMOTE_PORT).payload(payload);
    let routed = |what, packet: Packet| case(what, &packet).mark(5).routes(FastDirectOut, packet.ttl(63));
    vec![
        routed("direct: TCP", sent_tcp(ACK).to(DIRECT_REMOTE)),
        routed("direct: UDP", sent_udp().to(DIRECT_REMOTE)),
        routed("direct: echo", sent_echo(8).to(DIRECT_REMOTE)),
        routed("direct: exactly the peer's MTU", of(room)),
        routed("direct: TOS stays", sent_udp().to(DIRECT_REMOTE).tos(0xbb)),
        case("direct: one byte more", &of(room + 1)).passes(PassPodTooBig),
        case("direct: TTL 1", &of(1).ttl(1)).passes(PassPodTtl),
        case("direct: a GSO packet needs no room", &of(1000))
            .gso(500)
            .routes(FastDirectOut, of(1000).ttl(63)),
    ]
}

/// To a pod beside it. On a bridge the frame goes over as it is, without the host's mark.
fn local() -> Vec<Case> {
    let over = |packet: Packet| packet.to(OTHER_POD).macs(OTHER_POD_MAC, POD_MAC);
    let goes = |what, packet: Packet| {
        let packet = over(packet);
        case(what, &packet).mark(5).delivers(FastLocal, packet)
    };
    let stays = |what, packet: Packet| case(what, &over(packet)).mark(5).passes(PassPodLocal);
    let whole = (20 + 8 + PAYLOAD) as u16;
    let unknown = sent_udp().to(UNKNOWN_POD).macs(OTHER_POD_MAC, POD_MAC);
    vec![
        goes("local: TCP", sent_tcp(ACK)),
        goes("local: SYN", sent_tcp(SYN)),
        goes("local: UDP", sent_udp()),
        goes("local: echo", sent_echo(8)),
        goes("local: TTL 1, which no router takes", sent_udp().ttl(1)),
        goes("local: a GSO packet", sent_tcp(ACK)).gso(30),
        stays("local: options", sent_udp().options(&[1; 4])),
        stays("local: first fragment", sent_udp().fragment(MF)),
        stays("local: later fragment", sent_udp().fragment(7)),
        stays("local: SCTP", sent_udp().protocol(SCTP)),
        stays("local: ICMP error", sent_ip().icmp(3, 3, 0, 0).payload(28)),
        stays("local: total length one too small", sent_udp().total_len(whole - 1)),
        stays("local: total length one too large", sent_udp().total_len(whole + 1)),
        stays("local: not qualified", sent_udp()).strict(),
        stays("local: SYN, strict", sent_tcp(SYN)).strict(),
        case("local: through the gateway, the host routes it", &sent_udp().to(OTHER_POD))
            .passes(PassPodLocal),
        case("local: to itself", &sent_udp().to(POD).macs(POD_MAC, POD_MAC)).passes(PassPodLocal),
        case("local: broadcast frame", &sent_udp().to(OTHER_POD).macs([0xff; 6], POD_MAC))
            .passes(PassPodLocal),
        case("local: from the other's own address", &over(sent_udp().from(OTHER_POD)))
            .drops(DropForgedPodSource),
        case("local: from a peer's address", &over(sent_udp().from(REMOTE))).passes(PassPodForeignSource),
        case("local: to a pod that nobody knows", &unknown).passes(PassPodNoPeer),
        case("local: neither end known", &unknown.clone().from([10, 5, 1, 78].into()))
            .passes(PassPodForeignSource)
            .then(|rig| assert_eq!(rig.dataplane.half_mut::<V4>().take_sightings().unwrap().len(), 1)),
    ]
}

/// To a pod beside it that has another gateway: the host is a router between them, and so is the program.
fn routed() -> Vec<Case> {
    let goes = |what, packet: Packet| {
        let packet = packet.to(ROUTED_POD);
        case(what, &packet)
            .mark(5)
            .delivers(FastLocal, packet.clone().macs(ROUTED_POD_MAC, OTHER_GATEWAY_MAC).ttl(63))
    };
    let stays = |what, packet: Packet| case(what, &packet.to(ROUTED_POD)).mark(5).passes(PassPodLocal);
    vec![
        goes("routed: TCP", sent_tcp(ACK)),
        goes("routed: SYN", sent_tcp(SYN)),
        goes("routed: UDP", sent_udp()),
        goes("routed: echo", sent_echo(8)),
        goes("routed: a GSO packet", sent_tcp(ACK)).gso(30),
        stays("routed: TTL 1 ends here", sent_udp().ttl(1)),
        stays("routed: a wrong header checksum", sent_udp().checksum_error(0x1234)),
        stays("routed: options", sent_udp().options(&[1; 4])),
        stays("routed: first fragment", sent_udp().fragment(MF)),
        stays("routed: SCTP", sent_udp().protocol(SCTP)),
        stays("routed: not qualified", sent_udp()).strict(),
        stays("routed: SYN, strict", sent_tcp(SYN)).strict(),
        stays("routed: past the gateway, by the pod's own MAC", sent_udp().macs(ROUTED_POD_MAC, POD_MAC)),
        case("routed: from the other's own address", &sent_udp().to(ROUTED_POD).from(ROUTED_POD))
            .drops(DropForgedPodSource),
    ]
}

fn ttl() -> Vec<Case> {
    let expires = |ttl| case(&format!("TTL {ttl}"), &sent_tcp(ACK).ttl(ttl)).passes(PassPodTtl);
    let goes_on = |ttl: u8| {
        case(&format!("TTL {ttl}"), &sent_tcp(ACK).ttl(ttl))
            .encapsulates(encapsulated(sent_tcp(ACK).ttl(ttl - 1)))
    };
    // Identifications move the checksum through its carries.
    let carries = (0..=255u16).map(|high| {
        let packet = sent_udp().id(high << 8 | 0xa5);
        case(&format!("identification {high:#04x}a5"), &packet).encapsulates(encapsulated(packet.ttl(63)))
    });
    [expires(0), expires(1), goes_on(2), goes_on(3), goes_on(128), goes_on(255)]
        .into_iter()
        .chain(carries)
        .collect()
}

/// RFC 6040, normal mode, as Linux has it: the outer field is the inner one, and ECT(0) for CE; Linux' VXLAN devices
/// leave the outer DSCP at zero.
fn ecn() -> Vec<Case> {
    [(0x00, 0), (0x01, 1), (0x02, 2), (0x03, 2), (0xb8, 0), (0xb9, 1), (0xfe, 2), (0xff, 2)]
        .into_iter()
        .map(|(inner, outer)| {
            let peer = (PEER_VTEP, PEER_VTEP_MAC);
            case(&format!("TOS {inner:#04x}"), &sent_udp().tos(inner)).encapsulates(encapsulated_to(
                sent_udp().tos(inner).ttl(63),
                peer,
                outer,
            ))
        })
        .collect()
}

fn addresses() -> Vec<Case> {
    let no_peer = [
        ("the own subnet's gateway", [10, 5, 1, 1].into()),
        ("a slot without a peer", VACANT),
        ("outside the network", OUTSIDE),
        ("just below the network", [10, 4, 255, 255].into()),
        ("just above the network", [10, 6, 0, 0].into()),
        ("a VTEP", PEER_VTEP),
        ("multicast", [224, 0, 0, 251].into()),
        ("broadcast", [255, 255, 255, 255].into()),
        ("all zeroes", [0, 0, 0, 0].into()),
    ];
    let no_peer = no_peer.into_iter().map(|(what, destination)| {
        case(&format!("to {what}"), &sent_udp().to(destination)).passes(PassPodNoPeer)
    });
    let foreign = [
        ("outside the network", OUTSIDE),
        ("a peer's subnet", REMOTE),
        ("the node", VTEP),
        ("nobody", [0, 0, 0, 0].into()),
    ];
    let foreign = foreign.into_iter().map(|(what, source)| {
        case(&format!("from an address of {what}"), &sent_udp().from(source))
            .passes(PassPodForeignSource)
            .then(|rig| {
                assert!(rig.dataplane.half_mut::<V4>().take_sightings().unwrap().is_empty(), "no sighting")
            })
    });
    let other_macs = [
        ("another host on the bridge", OTHER_POD_MAC),
        ("everybody", [0xff; 6]),
        ("a multicast group", [1, 0, 0x5e, 0, 0, 0xfb]),
        ("a MAC that differs in its last bit", [2, 0, 0, 0, 1, 0]),
    ];
    let not_for_gateway = other_macs.into_iter().map(|(what, mac)| {
        case(&format!("frame for {what}"), &sent_udp().macs(mac, POD_MAC)).passes(PassPodNotForGateway)
    });
    let no_uplink =
        case("to a peer that only the kernel reaches", &sent_udp().to(KERNEL_REMOTE)).passes(PassPodNoUplink);
    no_peer.chain(foreign).chain(not_for_gateway).chain([no_uplink]).collect()
}

fn sightings() -> Vec<Case> {
    let unknown = sent_udp().from(UNKNOWN_POD);
    let anothers = sent_udp().from(OTHER_POD);
    fn check_unknown(rig: &mut Rig) {
        check(rig, UNKNOWN_POD);
    }
    fn check_others(rig: &mut Rig) {
        check(rig, OTHER_POD);
    }
    fn check(rig: &mut Rig, address: std::net::Ipv4Addr) {
        let seen = rig.dataplane.half_mut::<V4>().take_sightings().unwrap();
        let key = SightingKey { ifindex: rig.lab.pod, address: address.octets() };
        assert_eq!(seen.len(), 1);
        assert_eq!((seen[0].0, seen[0].1.mac, seen[0].1.gateway_mac), (key, POD_MAC, GATEWAY_MAC));
    }
    vec![
        case("from an address that the agent does not know yet", &unknown)
            .passes(PassPodForeignSource)
            .then(check_unknown),
        case("the same twice is one sighting", &unknown)
            .after(|rig| {
                let frame = sent_udp().from(UNKNOWN_POD).build();
                rig.run(FromPod, &frame, Context::default());
            })
            .passes(PassPodForeignSource)
            .then(check_unknown),
        case("from another pod's address", &anothers).drops(DropForgedPodSource).then(check_others),
        case("from another pod's address, where the kernel decides", &anothers)
            .keep_forged()
            .passes(PassPodForeignSource)
            .then(check_others),
    ]
}

fn not_plain() -> Vec<Case> {
    let ended = [0x07, 0x03, 0x04, 0x00];
    let other_protocols = [SCTP, GRE, ESP, 0, 2, 41, 255].map(|protocol| {
        case(&format!("protocol {protocol}"), &sent_udp().protocol(protocol)).passes(PassPodProtocol)
    });
    let other_icmp = [3, 4, 5, 9, 11, 12, 13, 14].map(|kind| {
        let packet = sent_ip().icmp(kind, 0, 0, 0).payload(28);
        case(&format!("ICMP type {kind}"), &packet).passes(PassPodProtocol)
    });
    let rows = vec![
        case("ARP", &Packet::ethernet([0xff; 6], POD_MAC).ether_type(ARP).payload(28)).passes(PassPodNotIp),
        case("IPv6", &Packet::ethernet(GATEWAY_MAC, POD_MAC).ether_type(IPV6).payload(60))
            .passes(PassPodNotIp),
        case("a VLAN tag", &sent_udp().vlan(5)).passes(PassPodNotIp),
        case("a length instead of an EtherType", &sent_udp().ether_type(100)).passes(PassPodNotIp),
        case("IP options", &sent_udp().options(&ended)).passes(PassPodOptions),
        case("all the options there can be", &sent_udp().options(&[1; 40])).passes(PassPodOptions),
        case("version 6 behind IPv4's EtherType", &sent_udp().version(6)).passes(PassPodOptions),
        case("first fragment", &sent_udp().fragment(MF)).passes(PassPodFragment),
        case("middle fragment", &sent_udp().fragment(MF | 64)).passes(PassPodFragment),
        case("last fragment", &sent_udp().fragment(64)).passes(PassPodFragment),
        case("last fragment at the largest offset", &sent_udp().fragment(0x1fff)).passes(PassPodFragment),
    ];
    rows.into_iter().chain(other_protocols).chain(other_icmp).collect()
}

fn lengths() -> Vec<Case> {
    let overhead = 20 + 8;
    let room = usize::from(PEER_MTU) - 50 - overhead;
    let of = |payload: usize| sent_ip().udp(LOCAL_PORT, REMOTE_PORT).payload(payload);
    let whole = (20 + 8 + PAYLOAD) as u16;
    let mut short = sent_tcp(ACK).build();
    short.truncate(14 + 20 + 7);
    vec![
        case("exactly the peer's MTU", &of(room)).encapsulates(encapsulated(of(room).ttl(63))),
        case("one byte more", &of(room + 1)).passes(PassPodTooBig),
        case("far more", &of(2000)).passes(PassPodTooBig),
        case("total length one too small", &sent_udp().total_len(whole - 1)).passes(PassPodMalformed),
        case("total length one too large", &sent_udp().total_len(whole + 1)).passes(PassPodMalformed),
        case("total length of the header alone", &sent_udp().total_len(20)).passes(PassPodMalformed),
        case("total length 0", &sent_udp().total_len(0)).passes(PassPodMalformed),
        case("padded to Ethernet's shortest frame", &of(1).total_len(29).bytes(&[0; 17]))
            .passes(PassPodMalformed),
        case("segments that fit: the kernel makes no room in a GSO packet of unknown type", &sent_tcp(ACK))
            .gso(u32::from(PEER_MTU) - 50 - 40)
            .passes(PassPodNoRoom)
            .then(is_noted),
        case("segments one byte too large", &sent_tcp(ACK))
            .gso(u32::from(PEER_MTU) - 50 - 39)
            .passes(PassPodTooBig),
        case("UDP segments that fit", &sent_udp())
            .gso(u32::from(PEER_MTU) - 50 - 28)
            .passes(PassPodNoRoom)
            .then(is_noted),
        case("UDP segments that fit, strict", &sent_udp())
            .strict()
            .after(qualify)
            .gso(u32::from(PEER_MTU) - 50 - 28)
            .passes(PassPodNoRoom)
            .then(is_noted),
        case("UDP segments one byte too large", &sent_udp())
            .gso(u32::from(PEER_MTU) - 50 - 27)
            .passes(PassPodTooBig),
        Case::of_bytes("cut in the transport header, lengths agreeing", FromPod, cut_to_agree(21))
            .passes(PassPodMalformed),
        Case::of_bytes("an IP header and nothing else", FromPod, cut_to_agree(20)).passes(PassPodMalformed),
        Case::of_bytes("cut in the transport header", FromPod, short).passes(PassPodMalformed),
    ]
}

/// It has point 1 behind it, so it comes out of the host as no translated packet.
fn is_noted(rig: &mut Rig) {
    let flows = rig.flows();
    let seen: Vec<_> = flows.iter().filter(|(_, flow)| flow.outbound_seen > 0).collect();
    assert_eq!(seen.len(), 1, "{flows:?}");
    let tcp = seen[0].0 == flow(TCP);
    let sent = if tcp { sent_tcp(ACK) } else { sent_udp() };
    rig.run(ToOverlay, &sent.ttl(63).build(), Context::default());
    assert!(!rig.is_gated(POD));
}

/// A packet of so many bytes at IP, whose total length says so.
fn cut_to_agree(total_len: u16) -> Vec<u8> {
    let mut frame = sent_udp().total_len(total_len).build();
    frame.truncate(14 + usize::from(total_len));
    frame
}
