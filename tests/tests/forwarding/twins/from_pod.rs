//! What a pod sends.

use std::net::Ipv4Addr;

use loden_tests::packet::{self, DONT_FRAGMENT, Ipv4};

use super::{Case, Frame};
use crate::stage::{Stage, pod_mac};

/// A port at which nobody listens.
const CLOSED: u16 = 33_434;
const SYN: u8 = 2;
const ACK: u8 = 16;

pub(crate) fn cases(stage: &Stage) -> Vec<Case> {
    [
        ttl(stage),
        service_class(stage),
        options(stage),
        sizes(stage),
        fragments(stage),
        answers(stage),
        groups(stage),
        not_ip(stage),
        protocols(stage),
        damaged(stage),
        cut(stage),
        tagged(stage),
        addresses(stage),
    ]
    .concat()
}

fn ttl(stage: &Stage) -> Vec<Case> {
    let of = |ttl: u8| Ipv4 { ttl, ..stage.datagram(b"ttl") };
    let case = |ttl: u8| Case::sent(stage, format!("TTL {ttl}"), &of(ttl));
    let mut cases = vec![
        case(0).comes_back(1).first("pass_pod_ttl", 1),
        case(1).comes_back(1).first("pass_pod_ttl", 1),
        case(2).comes_back(1).first("fast_encap", 1).second("pass_wire_ttl", 1),
        case(3).arrives(1).fast(1),
        case(64).arrives(1).fast(1),
        case(255).arrives(1).fast(1),
    ];
    // As traceroute's three kinds: two errors on the way, then the destination's own answer.
    let (from, to) = (stage.sender.address(), stage.destination.address());
    let probes: [(&str, Ipv4); 3] = [
        ("UDP", Ipv4::udp(from, to, (5555, CLOSED), b"probe")),
        ("ICMP", Ipv4::icmp(from, to, (8, 0), 0x1234_0001, b"probe")),
        ("TCP", Ipv4::tcp(from, to, (5555, CLOSED), SYN, b"")),
    ];
    for (name, probe) in probes {
        let probe = |ttl: u8| Frame::FromSender(stage.sent_by_sender(&Ipv4 { ttl, ..probe.clone() }.bytes()));
        let case = Case::new(format!("traceroute by {name}"), (1..=4).map(probe).collect())
            .arrives(2)
            .comes_back(4)
            .first("pass_pod_ttl", 1)
            .first("fast_encap", 3)
            .second("fast_decap", 2);
        cases.push(if name == "TCP" {
            case.strictly(0, "pass_pod_tcp_control", 3).strictly(0, "fast_encap", 0).strictly(
                1,
                "fast_decap",
                0,
            )
        } else {
            case
        });
    }
    cases
}

fn service_class(stage: &Stage) -> Vec<Case> {
    // Every ECN codepoint, with DSCP 0, EF and the highest.
    let classes = [0x00, 0x01, 0x02, 0x03, 0xb8, 0xb9, 0xba, 0xbb, 0xff];
    let case = |tos: u8| {
        let packet = Ipv4 { tos, ..stage.datagram(b"tos") };
        Case::sent(stage, format!("TOS {tos:#04x}"), &packet).arrives(1).fast(1)
    };
    classes.into_iter().map(case).collect()
}

fn options(stage: &Stage) -> Vec<Case> {
    let to = stage.destination.address().octets();
    let kinds: [(&str, Vec<u8>, usize, usize); 7] = [
        ("no operation", vec![1, 1, 1, 1], 1, 0),
        ("record route", vec![7, 15, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 1, 0),
        ("timestamp, full", vec![68, 8, 9, 0, 0, 0, 0, 0], 1, 0),
        ("router alert", vec![148, 4, 0, 0], 1, 0),
        ("loose source route", [&[131, 7, 4][..], &to, &[0]].concat(), 0, 0),
        ("strict source route", [&[137, 7, 4][..], &to, &[0]].concat(), 0, 0),
        ("a broken length", vec![7, 40, 4, 0], 0, 1),
    ];
    let case = |(name, options, arrives, comes_back): (&str, Vec<u8>, usize, usize)| {
        let packet = Ipv4 { options, ..stage.datagram(b"options") };
        Case::sent(stage, format!("option {name}"), &packet)
            .arrives(arrives)
            .comes_back(comes_back)
            .first("pass_pod_options", 1)
            .first("fast_encap", 0)
    };
    kinds.into_iter().map(case).collect()
}

fn sizes(stage: &Stage) -> Vec<Case> {
    // 28 bytes of headers; the overlay carries 1450.
    let mut cases = Vec::new();
    for (size, fits) in [(1449, true), (1450, true), (1451, false), (1500, false)] {
        for (name, fragment) in [("DF", DONT_FRAGMENT), ("no DF", 0)] {
            let packet = Ipv4 { fragment, ..stage.datagram(&vec![0x5a; size - 28]) };
            let case = Case::sent(stage, format!("{size} bytes, {name}"), &packet);
            cases.push(match (fits, fragment) {
                (true, _) => case.arrives(1).fast(1),
                (false, DONT_FRAGMENT) => case.comes_back(1).first("pass_pod_too_big", 1),
                (false, _) => case.arrives(2).first("pass_pod_too_big", 1),
            });
        }
    }
    cases
}

fn fragments(stage: &Stage) -> Vec<Case> {
    let data: Vec<u8> = (0..8192_u32).map(|i| (i * 7) as u8).collect();
    let there = stage.datagram(&data);
    let back = Ipv4 { source: there.destination, destination: there.source, ..there.clone() };
    let there = |size: usize| -> Vec<Frame> {
        there.fragments(size).iter().map(|f| Frame::FromSender(stage.sent_by_sender(&f.bytes()))).collect()
    };
    let back = back
        .fragments(1400)
        .iter()
        .map(|f| Frame::FromDestination(stage.sent_by_destination(&f.bytes())))
        .collect();
    let reversed = there(1400).into_iter().rev().collect();
    let lone = there(1400).drain(1..2).collect();
    let tiny = stage.datagram(b"sixteen bytes...").fragments(8);
    let tiny = tiny.iter().map(|f| Frame::FromSender(stage.sent_by_sender(&f.bytes()))).collect();
    let evil = Ipv4 { fragment: 0x8000, ..stage.datagram(b"the reserved flag") };
    vec![
        Case::new("8 KB in fragments", there(1400)).arrives(6).first("pass_pod_fragment", 6),
        Case::new("8 KB in fragments, back", back).comes_back(6).second("pass_pod_fragment", 6),
        Case::new("8 KB in fragments, last one first", reversed).arrives(6).first("pass_pod_fragment", 6),
        Case::new("a fragment without its first", lone).arrives(1).first("pass_pod_fragment", 1),
        Case::new("fragments of eight bytes", tiny).arrives(3).first("pass_pod_fragment", 3),
        Case::sent(stage, "the reserved flag", &evil).arrives(1).fast(1),
    ]
}

/// What the destination's kernel answers, and what it makes of errors.
fn answers(stage: &Stage) -> Vec<Case> {
    let (from, to) = (stage.sender.address(), stage.destination.address());
    let quoted = Ipv4::udp(to, from, (OPEN, 5555), b"quoted").bytes();
    let error = |kind| Ipv4::icmp(from, to, kind, 0, &quoted);
    let slow = |name, kind| {
        Case::sent(stage, name, &error(kind)).arrives(1).first("pass_pod_protocol", 1).first("fast_encap", 0)
    };
    const OPEN: u16 = crate::stage::OPEN_PORT;
    vec![
        Case::sent(stage, "a closed UDP port", &Ipv4::udp(from, to, (5555, CLOSED), b"hello"))
            .arrives(1)
            .comes_back(1)
            .fast(1)
            .second("pass_pod_protocol", 1),
        Case::sent(stage, "a closed TCP port", &Ipv4::tcp(from, to, (5555, CLOSED), SYN, b""))
            .arrives(1)
            .comes_back(1)
            .fast(1)
            .second("fast_encap", 1)
            .first("fast_decap", 1)
            .strictly(0, "pass_pod_tcp_control", 1)
            .strictly(0, "fast_encap", 0)
            .strictly(1, "pass_pod_tcp_control", 1)
            .strictly(1, "fast_encap", 0)
            .strictly(1, "fast_decap", 0)
            .strictly(0, "fast_decap", 0),
        Case::sent(stage, "data to no connection", &Ipv4::tcp(from, to, (5555, CLOSED), ACK, b"data"))
            .arrives(1)
            .comes_back(1)
            .fast(1),
        Case::sent(stage, "an echo request", &Ipv4::icmp(from, to, (8, 0), 0x7777_0001, b"ping"))
            .arrives(1)
            .comes_back(1)
            .fast(1)
            .second("fast_encap", 1),
        Case::sent(stage, "an echo request of code 7", &Ipv4::icmp(from, to, (8, 7), 0x7777_0001, b"ping"))
            .arrives(1)
            .comes_back(1)
            .fast(1),
        slow("the error port unreachable", (3, 3)),
        slow("the error fragmentation needed", (3, 4)),
        slow("the error time exceeded", (11, 0)),
        slow("a redirect", (5, 1)),
    ]
}

fn groups(stage: &Stage) -> Vec<Case> {
    let from = stage.sender.address();
    let everyone = [0xff; 6];
    let to = |destination: Ipv4Addr| Ipv4::udp(from, destination, (5555, OPEN_PORT), b"all").bytes();
    const OPEN_PORT: u16 = crate::stage::OPEN_PORT;
    let frame = |mac, destination| {
        Frame::FromSender(packet::ethernet(mac, pod_mac(&stage.sender), packet::IPV4, &to(destination)))
    };
    let own_broadcast = stage.address(0, 255);
    let far_broadcast = stage.address(1, 255);
    let group = Ipv4Addr::new(239, 1, 1, 1);
    let group_mac = [0x01, 0x00, 0x5e, 1, 1, 1];
    let gateway = stage.gateway_mac(0);
    let far = stage.destination.address();
    vec![
        Case::new("broadcast", vec![frame(everyone, Ipv4Addr::BROADCAST)]).overheard(1),
        Case::new("the subnet's broadcast", vec![frame(everyone, own_broadcast)]).overheard(1),
        Case::new("the peer's subnet's broadcast, routed", vec![frame(gateway, far_broadcast)]),
        Case::new("multicast", vec![frame(group_mac, group)]).overheard(1),
        Case::new("multicast to the gateway alone", vec![frame(gateway, group)]),
        Case::new("a pod's address in a broadcast frame", vec![frame(everyone, far)])
            .overheard(1)
            .first("pass_pod_not_for_gateway", 1),
        Case::new("a pod's address in a multicast frame", vec![frame(group_mac, far)])
            .overheard(1)
            .first("pass_pod_not_for_gateway", 1),
        Case::new(
            "a remote pod's address to the neighbour's MAC",
            vec![frame(pod_mac(&stage.neighbour), far)],
        )
        .overheard(1)
        .first("pass_pod_not_for_gateway", 1),
        Case::new("to a MAC that nobody has", vec![frame([2, 0, 0, 0, 9, 9], far)])
            .overheard(1)
            .first("pass_pod_not_for_gateway", 1),
    ]
}

fn not_ip(stage: &Stage) -> Vec<Case> {
    let (from, own) = (stage.sender.address(), pod_mac(&stage.sender));
    let everyone = [0xff; 6];
    let gateway = stage.gateway_mac(0);
    let arp = |asked: Ipv4Addr| {
        let who = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &own, &from.octets(), &[0; 6], &asked.octets()].concat();
        Frame::FromSender(packet::ethernet(everyone, own, packet::ARP, &who))
    };
    let frame =
        |mac, ether_type, payload: &[u8]| Frame::FromSender(packet::ethernet(mac, own, ether_type, payload));
    let datagram = stage.datagram(b"inside").bytes();
    vec![
        Case::new("ARP for the remote pod", vec![arp(stage.destination.address())]).overheard(1),
        Case::new("ARP for a foreign address", vec![arp(Ipv4Addr::new(203, 0, 113, 9))]).overheard(1),
        Case::new("IPv6", vec![frame(gateway, 0x86dd, &[0x60; 60])]).first("pass_pod_not_ip", 1),
        Case::new("a local experiment", vec![frame(gateway, 0x88b5, &[7; 50])]).first("pass_pod_not_ip", 1),
        Case::new(
            "MPLS around IPv4",
            vec![frame(gateway, 0x8847, &[&[0, 1, 1, 64][..], &datagram].concat())],
        )
        .first("pass_pod_not_ip", 1),
        Case::new("LLDP", vec![frame([1, 0x80, 0xc2, 0, 0, 0x0e], 0x88cc, &[2; 50])]),
        Case::new("a frame with a length", vec![frame(gateway, 46, &[0xaa; 46])]),
    ]
}

fn protocols(stage: &Stage) -> Vec<Case> {
    let (from, to) = (stage.sender.address(), stage.destination.address());
    // What the destination has no protocol for, it answers with an error; UDP-lite it may know.
    let numbers = [
        ("IP in IP", 4, 1),
        ("GRE", 47, 1),
        ("ESP", 50, 1),
        ("ICMPv6", 58, 1),
        ("SCTP", 132, 1),
        ("UDP-lite", 136, 0),
        ("254", 254, 1),
    ];
    let mut cases: Vec<Case> = numbers
        .into_iter()
        .map(|(name, number, errors)| {
            let packet = Ipv4::new(from, to, number, vec![0x11; 32]);
            Case::sent(stage, format!("protocol {name}"), &packet)
                .arrives(1)
                .comes_back(errors)
                .first("pass_pod_protocol", 1)
        })
        .collect();
    let mut without = stage.datagram(b"no checksum");
    without.payload[6..8].fill(0);
    cases.push(Case::sent(stage, "UDP without a checksum", &without).arrives(1).fast(1));
    cases
}

fn damaged(stage: &Stage) -> Vec<Case> {
    let (from, to) = (stage.sender.address(), stage.destination.address());
    let good = stage.datagram(b"damaged").bytes();
    let changed = |name: &str, at: usize, change: u8| {
        let mut packet = good.clone();
        packet[at] ^= change;
        Case::new(name, vec![Frame::FromSender(stage.sent_by_sender(&packet))])
    };
    // With the header's checksum made right again.
    let mended = |name: &str, at: usize, change: u8| {
        let mut packet = good.clone();
        packet[at] ^= change;
        packet[10..12].fill(0);
        let sum = packet::checksum(&packet[..20]);
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        Case::new(name, vec![Frame::FromSender(stage.sent_by_sender(&packet))])
    };
    let mut tcp = Ipv4::tcp(from, to, (5555, CLOSED), ACK, b"data");
    tcp.payload[16] ^= 0x40;
    let mut icmp = Ipv4::icmp(from, to, (8, 0), 1, b"ping");
    icmp.payload[2] ^= 0x40;
    vec![
        changed("a wrong header checksum", 10, 0x01).first("fast_encap", 0),
        changed("a header checksum made wrong by the TOS", 1, 0x04).first("fast_encap", 0),
        changed("a header checksum made wrong by the TTL", 8, 0x03).first("fast_encap", 0),
        changed("a wrong UDP checksum", 26, 0x01).arrives(1).fast(1),
        Case::sent(stage, "a wrong TCP checksum", &tcp).arrives(1).fast(1),
        Case::sent(stage, "a wrong ICMP checksum", &icmp).arrives(1).fast(1),
        mended("version 6", 0, 0x20).first("fast_encap", 0),
        mended("a header of 16 bytes", 0, 0x01).first("fast_encap", 0),
        mended("a total length above what is there", 3, 0x40).first("pass_pod_malformed", 1),
        mended("a total length below what is there", 3, 0x01).arrives(1).first("pass_pod_malformed", 1),
    ]
}

fn cut(stage: &Stage) -> Vec<Case> {
    let (from, to) = (stage.sender.address(), stage.destination.address());
    let raw =
        |name: &str, packet: &[u8]| Case::new(name, vec![Frame::FromSender(stage.sent_by_sender(packet))]);
    let tcp = Ipv4::tcp(from, to, (5555, CLOSED), ACK, b"");
    let tcp_of = |len: usize| Ipv4 { payload: tcp.payload[..len].to_vec(), ..tcp.clone() };
    let udp = stage.datagram(b"data");
    let udp_len = |len: u8| {
        let mut packet = udp.clone();
        packet.payload[5] = len;
        packet
    };
    let whole = udp.bytes();
    let mut cases = vec![
        raw("half an IP header", &whole[..10]),
        raw("an IP header without its packet", &whole[..20]),
        Case::sent(stage, "an empty packet", &Ipv4::new(from, to, packet::UDP, Vec::new())).arrives(1),
        Case::sent(stage, "half a UDP header", &Ipv4 { payload: udp.payload[..4].to_vec(), ..udp.clone() })
            .arrives(1),
        Case::sent(stage, "a UDP length of 200", &udp_len(200)).arrives(1).fast(1),
        Case::sent(stage, "a UDP length of 9", &udp_len(9)).arrives(1).fast(1),
        Case::sent(stage, "a UDP length of 0", &udp_len(0)).arrives(1).fast(1),
    ];
    for len in [8, 12, 13, 16, 19] {
        cases.push(Case::sent(stage, format!("{len} bytes of a TCP header"), &tcp_of(len)).arrives(1));
    }
    for (name, padding) in [("zeroes", [0; 18]), ("garbage", [0xa5; 18])] {
        cases.push(
            raw(&format!("{name} behind the packet"), &[&whole[..], &padding].concat())
                .arrives(1)
                .first("pass_pod_malformed", 1),
        );
    }
    cases
}

fn tagged(stage: &Stage) -> Vec<Case> {
    let (from, to) = (stage.sender.address(), stage.destination.address());
    // Ports of their own: point 2 must know the flow from these very packets.
    let datagram = Ipv4::udp(from, to, (5556, crate::stage::OPEN_PORT), b"tagged").bytes();
    let gateway = stage.gateway_mac(0);
    let frame = |tags: &[u8]| {
        let payload = [tags, &packet::IPV4.to_be_bytes(), &datagram].concat();
        vec![Frame::FromSender(packet::ethernet(gateway, pod_mac(&stage.sender), 0x8100, &payload))]
    };
    vec![
        Case::new("VLAN 5", frame(&[0, 5])).first("pass_pod_not_ip", 1),
        // No VLAN, only a priority: the kernel takes the tag off and routes.
        Case::new("VLAN 0", frame(&[0xe0, 0])).arrives(1).first("pass_pod_not_ip", 1),
        Case::new("two tags", frame(&[0, 5, 0x81, 0, 0, 6])).first("pass_pod_not_ip", 1),
        Case::sent(stage, "and without a tag again", &stage.datagram(b"untagged")).arrives(1).fast(1),
    ]
}

fn addresses(stage: &Stage) -> Vec<Case> {
    let far = stage.destination.address();
    let from = |source: Ipv4Addr| Ipv4 { source, ..stage.datagram(b"from") };
    let to = |destination: Ipv4Addr| Ipv4::udp(stage.sender.address(), destination, (5555, OPEN_PORT), b"to");
    const OPEN_PORT: u16 = crate::stage::OPEN_PORT;
    let source =
        |name: &str, source| Case::sent(stage, format!("from {name}"), &from(source)).first("fast_encap", 0);
    let destination = |name: &str, destination| {
        Case::sent(stage, format!("to {name}"), &to(destination)).first("pass_pod_no_peer", 1)
    };
    vec![
        source("0.0.0.0", Ipv4Addr::UNSPECIFIED),
        source("the broadcast address", Ipv4Addr::BROADCAST),
        source("loopback", Ipv4Addr::LOCALHOST),
        source("a group", Ipv4Addr::new(224, 0, 0, 1)),
        source("the gateway", stage.address(0, 1)),
        source("another pod of this node", stage.neighbour.address())
            .stricter()
            .first("drop_forged_pod_source", 1),
        source("the destination itself", far).stricter().second("drop_forged_peer_source", 1),
        source("another pod of the peer", stage.address(1, 99))
            .stricter()
            .second("drop_forged_peer_source", 1),
        source("class E", Ipv4Addr::new(240, 0, 0, 1)).arrives(1),
        destination("0.0.0.0", Ipv4Addr::UNSPECIFIED),
        destination("loopback", Ipv4Addr::LOCALHOST),
        destination("class E", Ipv4Addr::new(240, 0, 0, 1)),
        // Kernels pace their redirects.
        Case::sent(stage, "to itself", &to(stage.sender.address()))
            .comes_back(2)
            .first("pass_pod_local", 1)
            .once(),
        destination("the gateway", stage.address(0, 1)).comes_back(1),
        Case::sent(stage, "to the peer's gateway", &to(stage.address(1, 1)))
            .comes_back(1)
            .first("fast_encap", 1)
            .second("pass_wire_no_endpoint", 1),
        Case::sent(stage, "to the peer's VXLAN device", &to(stage.address(1, 0)))
            .comes_back(1)
            .first("fast_encap", 1)
            .second("pass_wire_no_endpoint", 1),
    ]
}
