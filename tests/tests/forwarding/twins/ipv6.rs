//! What only IPv6 has: extension headers, a flow label, checksums that must be there, neighbour discovery.

use std::net::Ipv6Addr;

use loden_tests::packet::{
    self, DESTINATION_OPTIONS, ETHERNET_LEN, FRAGMENT, HOP_BY_HOP, Ipv6, Mac, Packet as _, ROUTING,
};

use super::{
    Case, Frame, Twin,
    from_pod::{changed, to_group},
    from_wire::on_wire,
};
use crate::stage::{OPEN_PORT, Stage, pod_mac};

/// Authentication (RFC 4302), and no header at all behind this one.
const AUTHENTICATION: u8 = 51;
const NO_NEXT_HEADER: u8 = 59;
/// For experiments (RFC 3692): who does not know it says so, which is what marks the end of a case.
const EXPERIMENT: u8 = 253;
/// Types of ICMPv6 (RFC 4443, RFC 4861, RFC 2710, RFC 3810).
const PARAMETER_PROBLEM: u8 = 4;
const ROUTER_SOLICITATION: u8 = 133;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const LISTENER_MESSAGES: [u8; 4] = [130, 131, 132, 143];
/// A nonce (RFC 3971), by which a solicitation of a case's own is told from the kernels'.
const NONCE: [u8; 8] = [14, 1, b'L', b'o', b'd', b'e', b'n', b'!'];
/// Where the header behind IP starts.
const NEXT: usize = ETHERNET_LEN + 40;
/// Padding of an extension header of eight bytes.
const PADDING: [u8; 6] = [1, 4, 0, 0, 0, 0];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

impl Twin for Ipv6 {
    const FRAGMENT: &'static str = "pass_pod_options";
    const NOISY: &'static [&'static str] = &["pass_pod_no_peer", "pass_pod_local", "pass_pod_foreign_source"];

    fn mark(stage: &Stage<Self>, sequence: u16) -> Self {
        let [from, to] = stage.ends;
        Self::new(from, to, EXPERIMENT, [b"mark", &[0; 2][..], &sequence.to_be_bytes()].concat())
    }

    fn marked(frame: &[u8]) -> Option<Option<u16>> {
        let quoted = NEXT + 8;
        match protocol(frame)? {
            EXPERIMENT => Some(None),
            packet::ICMPV6 if frame[NEXT] == PARAMETER_PROBLEM && *frame.get(quoted + 6)? == EXPERIMENT => {
                let sequence = frame.get(quoted + 46..quoted + 48)?;
                Some(Some(u16::from_be_bytes([sequence[0], sequence[1]])))
            }
            _ => None,
        }
    }

    /// ARP, and of IPv6 what finds routers, listeners and neighbours, unless it is a case's own.
    fn is_noise(stage: &Stage<Self>, frame: &[u8]) -> bool {
        if frame[12..14] == packet::ARP.to_be_bytes() {
            return true;
        }
        match (protocol(frame), frame.get(NEXT)) {
            // Listener messages stand behind a hop-by-hop header with a router alert.
            (Some(HOP_BY_HOP), _) => frame.get(NEXT + 8).is_some_and(|kind| LISTENER_MESSAGES.contains(kind)),
            (Some(packet::ICMPV6), Some(&ROUTER_SOLICITATION)) => true,
            (Some(packet::ICMPV6), Some(&NEIGHBOUR_SOLICITATION)) => !frame.ends_with(&NONCE),
            // Asked by a case, or its own to all; pods answer each other's kernels, too.
            (Some(packet::ICMPV6), Some(&NEIGHBOUR_ADVERTISEMENT)) => {
                let neighbour = stage.neighbour.address6().unwrap().octets();
                let is_neighbours = frame.get(NEXT + 8..NEXT + 24).is_some_and(|target| target == neighbour);
                !is_neighbours && frame[..6] != group_mac(ALL_NODES)
            }
            _ => false,
        }
    }

    fn blank(_: &mut [u8]) {}

    fn sent_by_pods(stage: &Stage<Self>) -> Vec<Case> {
        [
            extension_headers(stage),
            own_fields(stage),
            groups(stage),
            neighbour_discovery(stage),
            damaged(stage),
            addresses(stage),
        ]
        .concat()
    }

    fn sent_by_peers(stage: &Stage<Self>) -> Vec<Case> {
        [outer(stage), inner(stage)].concat()
    }

    fn whole(packet: Self) -> Self {
        packet
    }

    fn lengthen(packet: &mut [u8], by: i16) {
        let len = i16::from_be_bytes([packet[4], packet[5]]) + by;
        packet[4..6].copy_from_slice(&len.to_be_bytes());
    }

    fn errors() -> Vec<(&'static str, (u8, u8))> {
        vec![
            ("port unreachable", (1, 4)),
            ("packet too big", (2, 0)),
            ("time exceeded", (3, 0)),
            ("parameter problem", (PARAMETER_PROBLEM, 1)),
            ("redirect, from afar", (137, 0)),
        ]
    }

    /// UDP-lite it may know.
    fn protocols() -> Vec<(&'static str, u8, usize)> {
        vec![
            ("ICMP", 1, 1),
            ("GRE", 47, 1),
            ("ESP", 50, 1),
            ("none", NO_NEXT_HEADER, 0),
            ("SCTP", 132, 1),
            ("UDP-lite", 136, 0),
            ("254", 254, 1),
        ]
    }

    fn other_ether_type() -> u16 {
        packet::IPV4
    }
}

/// The number of the next header, of an IPv6 packet that has more than that.
fn protocol(frame: &[u8]) -> Option<u8> {
    (frame.len() > NEXT && frame[12..14] == packet::IPV6.to_be_bytes()).then(|| frame[20])
}

/// What it is, the extension headers, and how many packets arrive and come back.
type Chain = (&'static str, Vec<(u8, Vec<u8>)>, usize, usize);

fn extension_headers(stage: &Stage<Ipv6>) -> Vec<Case> {
    // An unknown option: its upper bits say what becomes of the packet (RFC 8200, section 4.2).
    let unknown = |action: u8| vec![action << 6 | 0x1e, 4, 0, 0, 0, 0];
    let authentication = [&[0; 2][..], &7_u32.to_be_bytes(), &[0; 16]].concat();
    let chains: Vec<Chain> = vec![
        ("hop-by-hop padding", vec![(HOP_BY_HOP, PADDING.to_vec())], 1, 0),
        ("a router alert", vec![(HOP_BY_HOP, vec![5, 2, 0, 0, 1, 0])], 1, 0),
        ("an unknown hop-by-hop option to skip", vec![(HOP_BY_HOP, unknown(0))], 1, 0),
        ("an unknown hop-by-hop option to drop", vec![(HOP_BY_HOP, unknown(1))], 0, 0),
        ("an unknown hop-by-hop option to tell of", vec![(HOP_BY_HOP, unknown(2))], 0, 1),
        ("destination padding", vec![(DESTINATION_OPTIONS, PADDING.to_vec())], 1, 0),
        ("an unknown destination option to tell of", vec![(DESTINATION_OPTIONS, unknown(2))], 1, 1),
        ("a routing header of no segments left", vec![(ROUTING, vec![0; 6])], 1, 0),
        ("a routing header of type 0 with a segment left", vec![(ROUTING, vec![0, 1, 0, 0, 0, 0])], 1, 1),
        ("an atomic fragment", vec![(FRAGMENT, vec![0, 0, 0, 0, 0, 7])], 1, 0),
        ("authentication", vec![(AUTHENTICATION, authentication)], 1, 1),
        (
            "each kind, one after the other",
            vec![
                (HOP_BY_HOP, PADDING.to_vec()),
                (DESTINATION_OPTIONS, PADDING.to_vec()),
                (ROUTING, vec![0; 6]),
                (FRAGMENT, vec![0, 0, 0, 0, 0, 7]),
            ],
            1,
            0,
        ),
    ];
    let case = |(name, extensions, arrives, comes_back): Chain| {
        let packet = Ipv6 { extensions, ..stage.datagram(b"extensions") };
        Case::sent(stage, name, &packet)
            .arrives(arrives)
            .comes_back(comes_back)
            .first("pass_pod_options", 1)
            .first("fast_encap", 0)
    };
    chains.into_iter().map(case).collect()
}

fn own_fields(stage: &Stage<Ipv6>) -> Vec<Case> {
    let label = |label: u32| {
        let packet = Ipv6 { label, class: 0xb9, ..stage.datagram(b"label") };
        Case::sent(stage, format!("flow label {label:#x}"), &packet).arrives(1).fast(1)
    };
    let mut without = stage.datagram(b"no checksum");
    without.payload[6..8].fill(0);
    let mut cases = [0, 1, 0x12345, 0xf_ffff].map(label).to_vec();
    cases
        .push(Case::sent(stage, "UDP without a checksum", &without).arrives(1).first("pass_pod_checksum", 1));
    cases
}

/// The MAC of a group (RFC 2464).
fn group_mac(group: Ipv6Addr) -> Mac {
    let [.., a, b, c, d] = group.octets();
    [0x33, 0x33, a, b, c, d]
}

fn groups(stage: &Stage<Ipv6>) -> Vec<Case> {
    let gateway = stage.gateway_mac(0);
    let group = Ipv6Addr::new(0xff0e, 0, 0, 0, 0, 0, 1, 1);
    let case = |name: &str, mac, destination| {
        Case::new(name, to_group(stage, mac, destination)).first("pass_pod_no_peer", 1)
    };
    vec![
        case("to all nodes of the link", group_mac(ALL_NODES), ALL_NODES).overheard(1),
        case("multicast", group_mac(group), group).overheard(1),
        case("multicast to the gateway alone", gateway, group),
        case("all nodes of the link, to the gateway alone", gateway, ALL_NODES),
    ]
}

/// The group of those who may have an address (RFC 4291, section 2.7.1).
fn solicited(address: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = address.octets();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), u16::from(b) << 8 | u16::from(c))
}

/// What neighbours say goes where it went without the programs: never to a peer, never nowhere.
fn neighbour_discovery(stage: &Stage<Ipv6>) -> Vec<Case> {
    let (own, mac) = (stage.ends[0], pod_mac(&stage.sender));
    let neighbour = stage.neighbour.address6().unwrap();
    let link_address = |kind: u8| [&[kind, 1][..], &mac].concat();
    let solicit = |name: &str, to: Mac, destination: Ipv6Addr, target: Ipv6Addr| {
        let options = [&target.octets()[..], &link_address(1), &NONCE].concat();
        let packet = Ipv6::icmp(own, destination, (NEIGHBOUR_SOLICITATION, 0), 0, &options).hops(255);
        let frame = packet::ethernet(to, mac, packet::IPV6, &packet.bytes());
        Case::new(format!("a solicitation {name}"), vec![Frame::FromSender(frame)]).first("fast_encap", 0)
    };
    let of_group = |name: &str, target: Ipv6Addr| {
        let group = solicited(target);
        solicit(name, group_mac(group), group, target).first("pass_pod_no_peer", 1)
    };
    let far = stage.ends[1];
    let advertised = [&own.octets()[..], &link_address(2)].concat();
    let advertisement =
        Ipv6::icmp(own, ALL_NODES, (NEIGHBOUR_ADVERTISEMENT, 0), 0x2000_0000, &advertised).hops(255);
    let advertisement = packet::ethernet(group_mac(ALL_NODES), mac, packet::IPV6, &advertisement.bytes());
    vec![
        of_group("for the neighbour", neighbour).overheard(1).comes_back(1),
        solicit("of the neighbour alone", pod_mac(&stage.neighbour), neighbour, neighbour)
            .overheard(1)
            .comes_back(1)
            .first("pass_pod_local", 1),
        of_group("for the remote pod", far).overheard(1),
        solicit("to the remote pod itself, by way of the gateway", stage.gateway_mac(0), far, far)
            .arrives(1)
            .first("pass_pod_protocol", 1),
        Case::new("an advertisement to all", vec![Frame::FromSender(advertisement)])
            .overheard(1)
            .first("pass_pod_no_peer", 1),
    ]
}

fn damaged(stage: &Stage<Ipv6>) -> Vec<Case> {
    vec![
        changed(stage, "version 4", |packet| packet[0] ^= 0x20),
        changed(stage, "a length of nothing", |packet| packet[4..6].fill(0)).arrives(1),
    ]
}

fn addresses(stage: &Stage<Ipv6>) -> Vec<Case> {
    let [own, far] = stage.ends;
    let from = |name: &str, source: Ipv6Addr| {
        let packet = Ipv6::udp(source, far, (5555, OPEN_PORT), b"from");
        Case::sent(stage, format!("from {name}"), &packet).first("pass_pod_foreign_source", 1)
    };
    let to = |name: &str, destination| {
        let packet = Ipv6::udp(own, destination, (5555, OPEN_PORT), b"to");
        Case::sent(stage, format!("to {name}"), &packet).first("pass_pod_no_peer", 1)
    };
    vec![
        from("the gateway", stage.address(0, 1)).arrives(1),
        from("::", Ipv6Addr::UNSPECIFIED),
        from("loopback", Ipv6Addr::LOCALHOST),
        from("a group", ALL_NODES),
        from("outside", [0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into()).arrives(1),
        to("::", Ipv6Addr::UNSPECIFIED),
        to("loopback", Ipv6Addr::LOCALHOST),
    ]
}

fn outer(stage: &Stage<Ipv6>) -> Vec<Case> {
    let vxlan = stage.encapsulated(&stage.datagram(b"outer").bytes());
    let outer = vxlan.packet();
    let behind = |name: &str, number: u8, rest: Vec<u8>| {
        let packet = Ipv6 { extensions: vec![(number, rest)], ..outer.clone() };
        on_wire(stage, format!("{name} outside"), &packet)
            .arrives(1)
            .second("pass_wire_outer", 1)
            .second("fast_overlay", 1)
    };
    vec![
        on_wire(stage, "a flow label outside", &Ipv6 { label: 0x12345, ..outer.clone() })
            .arrives(1)
            .second("fast_decap", 1),
        behind("hop-by-hop options", HOP_BY_HOP, PADDING.to_vec()),
        behind("a routing header", ROUTING, vec![0; 6]),
        behind("an atomic fragment", FRAGMENT, vec![0, 0, 0, 0, 0, 7]),
        // Without the option `udp6zerocsumrx`, which flannel does not set either, the kernel drops it.
        on_wire(stage, "no UDP checksum outside", &vxlan.packet_without_checksum())
            .second("pass_wire_checksum", 1)
            .second("fast_overlay", 0),
    ]
}

fn inner(stage: &Stage<Ipv6>) -> Vec<Case> {
    let datagram = stage.datagram(b"inner");
    let [from, to] = stage.ends;
    let case =
        |name: &str, packet: &Ipv6| on_wire(stage, name, &stage.encapsulated(&packet.bytes()).packet());
    let behind = |name: &str, number: u8, rest: Vec<u8>| {
        case(name, &Ipv6 { extensions: vec![(number, rest)], ..datagram.clone() })
            .arrives(1)
            .second("pass_wire_inner_packet", 1)
    };
    let mut damaged = datagram.clone();
    damaged.payload[6] ^= 1;
    let mut no_checksum = datagram.clone();
    no_checksum.payload[6..8].fill(0);
    let target = [&to.octets()[..], &NONCE].concat();
    let solicitation = Ipv6::icmp(from, to, (NEIGHBOUR_SOLICITATION, 0), 0, &target).hops(255);
    let quoted = Ipv6::udp(to, from, (OPEN_PORT, 5555), b"quoted").bytes();
    let too_big = Ipv6::icmp(from, to, (2, 0), 1400, &quoted);
    vec![
        case("a flow label", &Ipv6 { label: 0x54321, ..datagram.clone() }).arrives(1).second("fast_decap", 1),
        behind("hop-by-hop options", HOP_BY_HOP, PADDING.to_vec()),
        behind("a routing header", ROUTING, vec![0; 6]),
        behind("an atomic fragment", FRAGMENT, vec![0, 0, 0, 0, 0, 7]),
        // The outer checksum is right and does not follow from the headers: the kernel adds it up.
        case("a wrong UDP checksum", &damaged)
            .arrives(1)
            .second("pass_wire_checksum", 1)
            .second("fast_overlay", 1),
        case("UDP without a checksum", &no_checksum).arrives(1).second("pass_wire_checksum", 1),
        case("a neighbour solicitation", &solicitation).arrives(1).second("pass_wire_protocol", 1),
        case("packet too big", &too_big).arrives(1).second("pass_wire_protocol", 1),
        case("to a group", &datagram.clone().to([0xff0e, 0, 0, 0, 0, 0, 1, 1].into())),
        case("to all nodes of the link", &datagram.clone().to(ALL_NODES)),
        case("to loopback", &datagram.to(Ipv6Addr::LOCALHOST)),
    ]
}
