//! What only IPv4 has: options, a flag against fragments, a header checksum, broadcast, ARP.

use std::net::Ipv4Addr;

use loden_tests::packet::{self, DONT_FRAGMENT, ETHERNET_LEN, Ipv4, Packet as _};

use super::{
    Case, Frame, Twin,
    from_pod::{changed, to_group},
    from_wire::on_wire,
};
use crate::stage::{OPEN_PORT, Stage, pod_mac};

/// ICMP timestamp request and reply.
const TIMESTAMP: u8 = 13;
const TIMESTAMP_REPLY: u8 = 14;
/// Where the header behind IP starts.
const NEXT: usize = ETHERNET_LEN + 20;

impl Twin for Ipv4 {
    const FRAGMENT: &'static str = "pass_pod_fragment";
    const NOISY: &'static [&'static str] = &[];

    fn mark(stage: &Stage, sequence: u16) -> Self {
        let [from, to] = stage.ends;
        Self::icmp(from, to, (TIMESTAMP, 0), 0x4c44_0000 | u32::from(sequence), &[0; 12])
    }

    fn marked(frame: &[u8]) -> Option<Option<u16>> {
        if !is_ipv4(frame) || frame.len() < NEXT + 8 || frame[23] != packet::ICMP {
            return None;
        }
        match frame[NEXT] {
            TIMESTAMP => Some(None),
            TIMESTAMP_REPLY => Some(Some(u16::from_be_bytes([frame[NEXT + 6], frame[NEXT + 7]]))),
            _ => None,
        }
    }

    /// ARP from or about the gateways, and what kernels tell bridges of listeners to groups, in IGMP (RFC 3376: to
    /// 224.0.0.22) and to the groups of IPv6; that to the group to which nobody belongs is a case's own.
    fn is_noise(stage: &Stage, frame: &[u8]) -> bool {
        let of_gateway = |node| {
            let gateway = stage.address(node, 1).octets();
            frame[12..14] == packet::ARP.to_be_bytes()
                && frame.len() >= 42
                && (frame[28..32] == gateway || frame[38..42] == gateway)
        };
        let of_listeners =
            frame[..6] == [0x01, 0x00, 0x5e, 0, 0, 22] || (frame[..2] == [0x33, 0x33] && !is_ipv4(frame));
        of_listeners || of_gateway(0) || of_gateway(1)
    }

    fn blank(frame: &mut [u8]) {
        if is_ipv4(frame) && frame[14] == 0x45 {
            let header = &mut frame[ETHERNET_LEN..NEXT];
            if packet::checksum(header) == 0 {
                header[4..6].fill(0);
                header[10..12].fill(0);
            }
        }
    }

    fn sent_by_pods(stage: &Stage) -> Vec<Case> {
        [options(stage), may_be_cut(stage), groups(stage), arp(stage), damaged(stage), addresses(stage)]
            .concat()
    }

    fn sent_by_peers(stage: &Stage) -> Vec<Case> {
        [outer(stage), inner(stage)].concat()
    }

    fn whole(packet: Self) -> Self {
        Self { fragment: DONT_FRAGMENT, ..packet }
    }

    fn lengthen(packet: &mut [u8], by: i16) {
        let len = i16::from_be_bytes([packet[2], packet[3]]) + by;
        packet[2..4].copy_from_slice(&len.to_be_bytes());
        mend(packet);
    }

    fn errors() -> Vec<(&'static str, (u8, u8))> {
        vec![
            ("port unreachable", (3, 3)),
            ("fragmentation needed", (3, 4)),
            ("time exceeded", (11, 0)),
            ("redirect", (5, 1)),
        ]
    }

    /// UDP-lite it may know.
    fn protocols() -> Vec<(&'static str, u8, usize)> {
        vec![
            ("IP in IP", 4, 1),
            ("GRE", 47, 1),
            ("ESP", 50, 1),
            ("ICMPv6", 58, 1),
            ("SCTP", 132, 1),
            ("UDP-lite", 136, 0),
            ("254", 254, 1),
        ]
    }

    fn other_ether_type() -> u16 {
        packet::IPV6
    }
}

fn is_ipv4(frame: &[u8]) -> bool {
    frame.len() >= NEXT && frame[12..14] == packet::IPV4.to_be_bytes()
}

/// Makes the header's checksum right again.
fn mend(packet: &mut [u8]) {
    packet[10..12].fill(0);
    let sum = packet::checksum(&packet[..20]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

fn options(stage: &Stage) -> Vec<Case> {
    let to = stage.ends[1].octets();
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

/// What may be cut on the way, and a flag that nobody may set.
fn may_be_cut(stage: &Stage) -> Vec<Case> {
    let case = |size: usize| {
        let case = Case::sent(stage, format!("{size} bytes, no DF"), &stage.datagram(&vec![0x5a; size - 28]));
        if size <= 1450 { case.arrives(1).fast(1) } else { case.arrives(2).first("pass_pod_too_big", 1) }
    };
    let mut cases = [1449, 1450, 1451, 1500].map(case).to_vec();
    let evil = Ipv4 { fragment: 0x8000, ..stage.datagram(b"the reserved flag") };
    cases.push(Case::sent(stage, "the reserved flag", &evil).arrives(1).fast(1));
    let mut without = stage.datagram(b"no checksum");
    without.payload[6..8].fill(0);
    cases.push(Case::sent(stage, "UDP without a checksum", &without).arrives(1).fast(1));
    cases
}

fn groups(stage: &Stage) -> Vec<Case> {
    let everyone = [0xff; 6];
    let gateway = stage.gateway_mac(0);
    let group = Ipv4Addr::new(239, 1, 1, 1);
    let case = |name: &str, mac, destination| Case::new(name, to_group(stage, mac, destination));
    vec![
        case("broadcast", everyone, Ipv4Addr::BROADCAST).overheard(1),
        case("the subnet's broadcast", everyone, stage.address(0, 255)).overheard(1),
        case("the peer's subnet's broadcast, routed", gateway, stage.address(1, 255)),
        case("multicast", [0x01, 0x00, 0x5e, 1, 1, 1], group).overheard(1),
        case("multicast to the gateway alone", gateway, group),
    ]
}

fn arp(stage: &Stage) -> Vec<Case> {
    let (from, own) = (stage.ends[0], pod_mac(&stage.sender));
    let arp = |asked: Ipv4Addr| {
        let who = [&[0, 1, 8, 0, 6, 4, 0, 1][..], &own, &from.octets(), &[0; 6], &asked.octets()].concat();
        vec![Frame::FromSender(packet::ethernet([0xff; 6], own, packet::ARP, &who))]
    };
    vec![
        Case::new("ARP for the remote pod", arp(stage.ends[1])).overheard(1),
        Case::new("ARP for a foreign address", arp([203, 0, 113, 9].into())).overheard(1),
    ]
}

fn damaged(stage: &Stage) -> Vec<Case> {
    let damaged = |name: &str, at: usize, bits: u8| changed(stage, name, |packet| packet[at] ^= bits);
    let mended = |name: &str, bits: u8| {
        changed(stage, name, |packet| {
            packet[0] ^= bits;
            mend(packet);
        })
    };
    vec![
        damaged("a wrong header checksum", 10, 0x01),
        damaged("a header checksum made wrong by the TOS", 1, 0x04),
        damaged("a header checksum made wrong by the TTL", 8, 0x03),
        mended("version 6", 0x20),
        mended("a header of 16 bytes", 0x01),
    ]
}

fn addresses(stage: &Stage) -> Vec<Case> {
    let [own, far] = stage.ends;
    let from = |name: &str, source: Ipv4Addr| {
        let packet = Ipv4::udp(source, far, (5555, OPEN_PORT), b"from");
        Case::sent(stage, format!("from {name}"), &packet).first("fast_encap", 0)
    };
    let to = |name: &str, destination| {
        let packet = Ipv4::udp(own, destination, (5555, OPEN_PORT), b"to");
        Case::sent(stage, format!("to {name}"), &packet).first("pass_pod_no_peer", 1)
    };
    vec![
        from("the gateway", stage.address(0, 1)),
        from("0.0.0.0", Ipv4Addr::UNSPECIFIED),
        from("the broadcast address", Ipv4Addr::BROADCAST),
        from("loopback", Ipv4Addr::LOCALHOST),
        from("a group", [224, 0, 0, 1].into()),
        from("class E", [240, 0, 0, 1].into()).arrives(1),
        to("0.0.0.0", Ipv4Addr::UNSPECIFIED),
        to("loopback", Ipv4Addr::LOCALHOST),
        to("class E", [240, 0, 0, 1].into()),
    ]
}

fn outer(stage: &Stage) -> Vec<Case> {
    let vxlan = stage.encapsulated(&stage.datagram(b"outer").bytes());
    let outer = vxlan.packet();
    let mut damaged = outer.bytes();
    damaged[10] ^= 1;
    vec![
        on_wire(stage, "DF outside", &Ipv4 { fragment: DONT_FRAGMENT, ..outer })
            .arrives(1)
            .second("fast_decap", 1),
        Case::on_wire(stage, "a wrong header checksum outside", &damaged).second("pass_wire_outer", 1),
        on_wire(stage, "a UDP checksum outside", &vxlan.packet_with_checksum())
            .arrives(1)
            .second("fast_decap", 1),
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
    vec![
        damaged("a wrong header checksum", 10).second("pass_wire_inner_packet", 1),
        damaged("a wrong UDP checksum", 26).arrives(1).second("fast_decap", 1),
        on_wire(stage, "no checksum inside, one outside", &protected)
            .arrives(1)
            .second("pass_wire_checksum", 1),
        on_wire(stage, "no checksum inside, a wrong one outside", &broken).second("pass_wire_checksum", 1),
        case("to the broadcast address", &datagram.clone().to(stage.address(1, 255))),
        case("to a group", &datagram.clone().to([239, 1, 1, 1].into())),
        case("to loopback", &datagram.to(Ipv4Addr::LOCALHOST)),
    ]
}
