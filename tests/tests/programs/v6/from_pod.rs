//! What a pod sends over IPv6.

use super::*;

pub(super) const TABLES: &[Table] = &[encapsulated, slow, aggregates, unencapsulated];

/// The context of IPv4 is of no use here: any packet will do.
fn sent_v4() -> Vec<u8> {
    let mut packet = vec![0; 40];
    (packet[0], packet[3], packet[8], packet[9]) = (0x45, 40, 64, 17);
    [&GATEWAY_MAC[..], &POD_MAC, &[8, 0], &packet].concat()
}

#[test]
fn a_packet_to_a_peer_is_encapsulated_with_a_checksum_that_covers_it_all() {
    Lab::run(encapsulated);
}

fn encapsulated(lab: &Lab) -> Produced {
    let mut rig = Rig::load(lab, false, false);
    let ip = Ip::new(POD, REMOTE);
    for (what, ip, ecn) in [
        ("plain", ip, 0),
        ("ECT", ip.class(0x02), 2),
        ("CE, DSCP and label", ip.class(0xbb).label(0x12345), 2),
    ] {
        for (kind, packet) in [
            ("UDP", ip.udp(5000, 53, b"odd")),
            ("UDP without payload", ip.udp(5000, 53, b"")),
            ("TCP data", ip.tcp(5000, 80, 0x10, &[7; 500])),
            ("TCP SYN, not gated", ip.tcp(5000, 80, 0x02, b"")),
            ("echo", ip.icmp(128, 7, b"0123456789")),
            ("echo reply", ip.icmp(129, 7, b"0123456789")),
        ] {
            let what = format!("{what} {kind}");
            let frame = sent(&packet);
            let mut inner = packet.clone();
            inner[7] -= 1;
            let header = [&[8, 0, 0, 0][..], &(VNI << 8).to_be_bytes()].concat();
            let payload = [&header[..], &ethernet(PEER_VTEP_MAC, VTEP_MAC, &inner)].concat();
            let outer = Ip::new(VTEP, PEER_VTEP).hops(OUTER_TTL).class(ecn);
            let outer = outer.udp(rig.source_port(&frame), PORT, &payload);
            // The redirect writes the outer MACs; before it they are the inner frame's.
            let expected = sent(&outer);
            rig.row(&what, FromPod, &frame, Some(FastEncap), Some(&expected));
        }
    }
    rig.produced
}

#[test]
fn what_the_fast_path_is_not_for_goes_to_the_kernel_unchanged() {
    Lab::run(slow);
}

fn slow(lab: &Lab) -> Produced {
    let mut rig = Rig::load(lab, false, false);
    let ip = Ip::new(POD, REMOTE);
    let udp = ip.udp(5000, 53, b"payload");
    let mut no_checksum = udp.clone();
    no_checksum[46..48].fill(0);
    let mut short = udp.clone();
    short[5] -= 1;
    let solicitation = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &REMOTE.octets()].concat();
    for (what, packet, reason) in [
        ("hop limit 1", ip.hops(1).udp(5000, 53, b""), PassPodTtl),
        ("hop limit 0", ip.hops(0).udp(5000, 53, b""), PassPodTtl),
        ("hop-by-hop options", ip.next(0, &[17, 0, 5, 2, 0, 0, 1, 0, 0, 0, 0, 0]), PassPodOptions),
        ("destination options", ip.next(60, &[17, 0, 1, 4, 0, 0, 0, 0, 0, 0, 0, 0]), PassPodOptions),
        ("a fragment", ip.next(44, &[17, 0, 0, 1, 0, 0, 0, 9, 0, 0, 0, 0]), PassPodOptions),
        ("ESP", ip.next(50, &[0; 40]), PassPodProtocol),
        ("SCTP", ip.next(132, &[0; 40]), PassPodProtocol),
        ("a TCP header of 19 bytes", ip.next(6, &[0; 19]), PassPodProtocol),
        ("packet too big", ip.icmp(2, 0, &[0; 60]), PassPodProtocol),
        ("a neighbour solicitation", ip.next(58, &solicitation), PassPodProtocol),
        ("UDP without a checksum", no_checksum, PassPodChecksum),
        ("a length one too small", short, PassPodMalformed),
        ("too big by one", ip.udp(1, 2, &vec![0; usize::from(PEER_MTU) - 70 - 48 + 1]), PassPodTooBig),
        ("to nobody's subnet", Ip::new(POD, VACANT).udp(1, 2, b""), PassPodNoPeer),
        (
            "to a peer that only the kernel reaches",
            Ip::new(POD, KERNEL_REMOTE).udp(1, 2, b""),
            PassPodNoUplink,
        ),
        ("to the outside", Ip::new(POD, OUTSIDE).udp(1, 2, b""), PassPodNoPeer),
        ("multicast", Ip::new(POD, "ff02::1".parse().unwrap()).udp(1, 2, b""), PassPodNoPeer),
        (
            "link-local",
            Ip::new("fe80::2".parse().unwrap(), "fe80::1".parse().unwrap()).udp(1, 2, b""),
            PassPodNoPeer,
        ),
        ("another's source", Ip::new(OUTSIDE, REMOTE).udp(1, 2, b""), PassPodForeignSource),
    ] {
        rig.passes(what, FromPod, &sent(&packet), reason);
    }
    rig.passes("not for the gateway", FromPod, &ethernet(OTHER_POD_MAC, POD_MAC, &udp), PassPodNotForGateway);
    let arp = [&[0xff; 6][..], &POD_MAC, &[8, 6], &[0; 28]].concat();
    rig.passes("ARP", FromPod, &arp, PassPodNotIp);
    let itself = ethernet(POD_MAC, POD_MAC, &Ip::new(POD, POD).udp(1, 2, b""));
    rig.passes("to itself", FromPod, &itself, PassPodLocal);
    rig.passes("IPv4, which the network has not", FromPod, &sent_v4(), PassPodNoPeer);
    let largest = ip.udp(1, 2, &vec![0; usize::from(PEER_MTU) - 70 - 48]);
    assert_eq!(rig.run(FromPod, &sent(&largest), Context::default()).1, Some(FastEncap), "just fits");
    let forged = sent(&Ip::new(OTHER_POD, REMOTE).udp(1, 2, b""));
    rig.row("another pod's source", FromPod, &forged, Some(DropForgedPodSource), None);
    let unknown = sent(&Ip::new(UNKNOWN_POD, REMOTE).udp(1, 2, b""));
    rig.passes("an unknown pod", FromPod, &unknown, PassPodForeignSource);
    let seen = rig.dataplane.half_mut::<V6>().take_sightings().unwrap();
    let key = |address: Ipv6Addr| SightingKeyV6 { address: address.octets(), ifindex: lab.pod, pad: 0 };
    assert!(seen.iter().any(|(found, _)| *found == key(UNKNOWN_POD)), "{seen:?}");
    rig.produced
}

#[test]
fn an_aggregate_goes_into_the_vxlan_device_as_a_router_passes_it_on() {
    Lab::run(aggregates);
}

fn aggregates(lab: &Lab) -> Produced {
    let mut rig = Rig::load(lab, false, false);
    let packet = Ip::new(POD, REMOTE).tcp(5000, 80, 0x10, &[7; 2400]);
    let context = Context { gso_size: 1200, ..Context::default() };
    let (outcome, reason) = rig.run(FromPod, &sent(&packet), context);
    assert_eq!((outcome.action, reason), (REDIRECT, Some(FastOverlayOut)));
    let mut expected = ethernet(PEER_VTEP_MAC, VTEP_MAC, &packet);
    expected[14 + 7] -= 1;
    assert_eq!(outcome.frame, expected);
    let context = Context { gso_size: PEER_MTU as u32, ..context };
    let (outcome, reason) = rig.run(FromPod, &sent(&packet), context);
    assert_eq!((outcome.action, reason), (UNSPEC, Some(PassPodTooBig)));
    rig.produced
}

#[test]
fn local_pods_and_direct_peers_are_reached_without_encapsulation() {
    Lab::run(unencapsulated);
}

fn unencapsulated(lab: &Lab) -> Produced {
    let mut rig = Rig::load(lab, false, false);
    let packet = Ip::new(POD, OTHER_POD).udp(1, 2, b"x");
    let frame = ethernet(OTHER_POD_MAC, POD_MAC, &packet);
    rig.row("on one bridge", FromPod, &frame, Some(FastLocal), Some(&frame));
    let packet = Ip::new(POD, ROUTED_POD).udp(1, 2, b"x");
    let mut expected = ethernet(ROUTED_POD_MAC, OTHER_GATEWAY_MAC, &packet);
    expected[14 + 7] -= 1;
    rig.row("behind another gateway", FromPod, &sent(&packet), Some(FastLocal), Some(&expected));
    let packet = Ip::new(POD, DIRECT_REMOTE).udp(1, 2, b"x");
    let mut expected = sent(&packet);
    expected[14 + 7] -= 1;
    rig.row("to a direct peer", FromPod, &sent(&packet), Some(FastDirectOut), Some(&expected));
    let packet = Ip::new(DIRECT_REMOTE, POD).udp(1, 2, b"x");
    let mut expected = ethernet(POD_MAC, GATEWAY_MAC, &packet);
    expected[14 + 7] -= 1;
    let frame = ethernet(WIRE_MAC, PEER_VTEP_MAC, &packet);
    rig.row("from a direct peer", FromWire, &frame, Some(FastDirectIn), Some(&expected));
    let packet = Ip::new(REMOTE, POD).udp(1, 2, b"x");
    let mut expected = ethernet(POD_MAC, GATEWAY_MAC, &packet);
    expected[14 + 7] -= 1;
    let frame = ethernet(VTEP_MAC, PEER_VTEP_MAC, &packet);
    rig.row("decapsulated by the kernel", FromOverlay, &frame, Some(FastOverlay), Some(&expected));
    rig.produced
}
