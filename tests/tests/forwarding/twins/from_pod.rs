//! What a pod sends, in either family.

use loden_tests::packet::{self, Mac};

use super::{Case, Frame, Twin};
use crate::stage::{OPEN_PORT, Stage, pod_mac};

/// A port at which nobody listens.
const CLOSED: u16 = 33_434;
const SYN: u8 = 2;
const ACK: u8 = 16;

pub(crate) fn cases<F: Twin>(stage: &Stage<F>) -> Vec<Case> {
    [
        hops(stage),
        service_class(stage),
        sizes(stage),
        fragments(stage),
        answers(stage),
        to_other_macs(stage),
        not_ip(stage),
        protocols(stage),
        damaged(stage),
        cut(stage),
        tagged(stage),
        addresses(stage),
    ]
    .concat()
}

fn hops<F: Twin>(stage: &Stage<F>) -> Vec<Case> {
    let of = |hops: u8| stage.datagram(b"hops").hops(hops);
    let case = |hops: u8| Case::sent(stage, format!("{hops} hops"), &of(hops));
    let mut cases = vec![
        case(0).comes_back(1).first("pass_pod_ttl", 1),
        case(1).comes_back(1).first("pass_pod_ttl", 1),
        case(2).comes_back(1).first("fast_encap", 1).second("pass_wire_ttl", 1),
        case(3).arrives(1).fast(1),
        case(64).arrives(1).fast(1),
        case(255).arrives(1).fast(1),
    ];
    // As traceroute's three kinds: two errors on the way, then the destination's own answer.
    let [from, to] = stage.ends;
    let probes: [(&str, F); 3] = [
        ("UDP", F::udp(from, to, (5555, CLOSED), b"probe")),
        ("ICMP", F::icmp(from, to, (F::ECHO, 0), 0x1234_0001, b"probe")),
        ("TCP", F::tcp(from, to, (5555, CLOSED), SYN, b"")),
    ];
    for (name, probe) in probes {
        let probe = |hops: u8| Frame::FromSender(stage.sent_by_sender(&probe.clone().hops(hops).bytes()));
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

fn service_class<F: Twin>(stage: &Stage<F>) -> Vec<Case> {
    // Every ECN codepoint, with DSCP 0, EF and the highest.
    let classes = [0x00, 0x01, 0x02, 0x03, 0xb8, 0xb9, 0xba, 0xbb, 0xff];
    let case = |class: u8| {
        let packet = stage.datagram(b"class").class(class);
        Case::sent(stage, format!("class {class:#04x}"), &packet).arrives(1).fast(1)
    };
    classes.into_iter().map(case).collect()
}

/// Of what may not be cut on the way.
fn sizes<F: Twin>(stage: &Stage<F>) -> Vec<Case> {
    let largest = 1500 - F::ENCAP_LEN;
    let case = |size: usize| {
        let packet = F::whole(stage.datagram(&vec![0x5a; size - F::HEADER_LEN - 8]));
        let case = Case::sent(stage, format!("{size} bytes, whole"), &packet);
        if size <= largest {
            case.arrives(1).fast(1)
        } else {
            case.comes_back(1).first("pass_pod_too_big", 1)
        }
    };
    [largest - 1, largest, largest + 1, 1500].map(case).to_vec()
}

fn fragments<F: Twin>(stage: &Stage<F>) -> Vec<Case> {
    /// With every header these fit the smaller of both families' overlays.
    const SIZE: usize = 1368;
    let data: Vec<u8> = (0..8192_u32).map(|i| (i * 7) as u8).collect();
    let [from, to] = stage.ends;
    let sent = |packet: &F, size: usize| -> Vec<Frame> {
        packet.fragments(size).iter().map(|f| Frame::FromSender(stage.sent_by_sender(&f.bytes()))).collect()
    };
    let whole = stage.datagram(&data);
    let there = sent(&whole, SIZE);
    let back = F::udp(to, from, (5555, OPEN_PORT), &data)
        .fragments(SIZE)
        .iter()
        .map(|f| Frame::FromDestination(stage.sent_by_destination(&f.bytes())))
        .collect();
    let reversed = there.iter().rev().cloned().collect();
    let lone = vec![there[1].clone()];
    let tiny = sent(&stage.datagram(b"sixteen bytes..."), 8);
    vec![
        Case::new("8 KB in fragments", there).arrives(6).first(F::FRAGMENT, 6),
        Case::new("8 KB in fragments, back", back).comes_back(6).second(F::FRAGMENT, 6),
        Case::new("8 KB in fragments, last one first", reversed).arrives(6).first(F::FRAGMENT, 6),
        Case::new("a fragment without its first", lone).arrives(1).first(F::FRAGMENT, 1),
        Case::new("fragments of eight bytes", tiny).arrives(3).first(F::FRAGMENT, 3),
    ]
}

/// What the destination's kernel answers, and what it makes of errors.
fn answers<F: Twin>(stage: &Stage<F>) -> Vec<Case> {
    let [from, to] = stage.ends;
    let quoted = F::udp(to, from, (OPEN_PORT, 5555), b"quoted").bytes();
    let error = |(name, kind): (&'static str, (u8, u8))| {
        let packet = F::icmp(from, to, kind, 0, &quoted);
        Case::sent(stage, format!("the error {name}"), &packet)
            .arrives(1)
            .first("pass_pod_protocol", 1)
            .first("fast_encap", 0)
    };
    let mut cases = vec![
        Case::sent(stage, "a closed UDP port", &F::udp(from, to, (5555, CLOSED), b"hello"))
            .arrives(1)
            .comes_back(1)
            .fast(1)
            .second("pass_pod_protocol", 1),
        Case::sent(stage, "a closed TCP port", &F::tcp(from, to, (5555, CLOSED), SYN, b""))
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
        Case::sent(stage, "data to no connection", &F::tcp(from, to, (5555, CLOSED), ACK, b"data"))
            .arrives(1)
            .comes_back(1)
            .fast(1),
        Case::sent(stage, "an echo request", &F::icmp(from, to, (F::ECHO, 0), 0x7777_0001, b"ping"))
            .arrives(1)
            .comes_back(1)
            .fast(1)
            .second("fast_encap", 1),
        Case::sent(
            stage,
            "an echo request of code 7",
            &F::icmp(from, to, (F::ECHO, 7), 0x7777_0001, b"ping"),
        )
        .arrives(1)
        .comes_back(1)
        .fast(1),
    ];
    cases.extend(F::errors().into_iter().map(error));
    cases
}

fn to_other_macs<F: Twin>(stage: &Stage<F>) -> Vec<Case> {
    let packet = stage.datagram(b"all").bytes();
    let case = |name: &str, mac: Mac| {
        let frame = packet::ethernet(mac, pod_mac(&stage.sender), F::ETHER_TYPE, &packet);
        Case::new(format!("a remote pod's address {name}"), vec![Frame::FromSender(frame)])
            .overheard(1)
            .first("pass_pod_not_for_gateway", 1)
    };
    vec![
        case("in a broadcast frame", [0xff; 6]),
        case("in a multicast frame of IPv4", [0x01, 0x00, 0x5e, 1, 1, 1]),
        case("in a multicast frame of IPv6", [0x33, 0x33, 0, 1, 0, 1]),
        case("to the neighbour's MAC", pod_mac(&stage.neighbour)),
        case("to a MAC that nobody has", [2, 0, 0, 0, 9, 9]),
    ]
}

fn not_ip<F: Twin>(stage: &Stage<F>) -> Vec<Case> {
    let gateway = stage.gateway_mac(0);
    let frame = |mac, ether_type, payload: &[u8]| {
        vec![Frame::FromSender(packet::ethernet(mac, pod_mac(&stage.sender), ether_type, payload))]
    };
    let datagram = stage.datagram(b"inside").bytes();
    vec![
        Case::new("a local experiment", frame(gateway, 0x88b5, &[7; 50])).first("pass_pod_not_ip", 1),
        Case::new("MPLS around IP", frame(gateway, 0x8847, &[&[0, 1, 1, 64][..], &datagram].concat()))
            .first("pass_pod_not_ip", 1),
        Case::new("the other family's type", frame(gateway, F::other_ether_type(), &datagram))
            .first("fast_encap", 0),
        Case::new("LLDP", frame([1, 0x80, 0xc2, 0, 0, 0x0e], 0x88cc, &[2; 50])),
        Case::new("a frame with a length", frame(gateway, 46, &[0xaa; 46])),
    ]
}

/// What the destination has no protocol for, it answers with an error.
fn protocols<F: Twin>(stage: &Stage<F>) -> Vec<Case> {
    let [from, to] = stage.ends;
    let case = |(name, number, errors): (&str, u8, usize)| {
        Case::sent(stage, format!("protocol {name}"), &F::new(from, to, number, vec![0x11; 32]))
            .arrives(1)
            .comes_back(errors)
            .first("pass_pod_protocol", 1)
    };
    F::protocols().into_iter().map(case).collect()
}

fn damaged<F: Twin>(stage: &Stage<F>) -> Vec<Case> {
    let [from, to] = stage.ends;
    let case = |name: &str, at: usize, good: F| {
        let mut packet = good.clone();
        packet.payload_mut()[at] ^= 0x40;
        Case::sent(stage, format!("a wrong {name} checksum"), &packet)
            .qualified_by(stage, &good)
            .arrives(1)
            .fast(1)
    };
    let good = stage.datagram(b"length").bytes();
    let lengthened = |name: &str, by: i16| {
        let mut packet = good.clone();
        F::lengthen(&mut packet, by);
        Case::new(name, vec![Frame::FromSender(stage.sent_by_sender(&packet))]).first("pass_pod_malformed", 1)
    };
    vec![
        case("UDP", 6, stage.datagram(b"damaged")),
        case("TCP", 16, F::tcp(from, to, (5555, CLOSED), ACK, b"data")),
        case("ICMP", 2, F::icmp(from, to, (F::ECHO, 0), 1, b"ping")),
        lengthened("a length above what is there", 64),
        lengthened("a length below what is there", -1).arrives(1),
    ]
}

fn cut<F: Twin>(stage: &Stage<F>) -> Vec<Case> {
    let [from, to] = stage.ends;
    let raw =
        |name: &str, packet: &[u8]| Case::new(name, vec![Frame::FromSender(stage.sent_by_sender(packet))]);
    let udp = stage.datagram(b"data");
    let udp_len = |len: u8| {
        let mut packet = udp.clone();
        packet.payload_mut()[5] = len;
        packet
    };
    let whole = udp.bytes();
    let mut cases = vec![
        raw("half an IP header", &whole[..F::HEADER_LEN / 2]),
        raw("an IP header without its packet", &whole[..F::HEADER_LEN]),
        Case::sent(stage, "an empty packet", &udp.clone().with(Vec::new())).arrives(1),
        Case::sent(stage, "half a UDP header", &udp.clone().with(udp.payload()[..4].to_vec())).arrives(1),
        Case::sent(stage, "a UDP length of 200", &udp_len(200)).arrives(1).fast(1),
        Case::sent(stage, "a UDP length of 9", &udp_len(9)).arrives(1).fast(1),
        Case::sent(stage, "a UDP length of 0", &udp_len(0)).arrives(1).fast(1),
    ];
    let tcp = F::tcp(from, to, (5555, CLOSED), ACK, b"");
    for len in [8, 12, 13, 16, 19] {
        let cut = tcp.clone().with(tcp.payload()[..len].to_vec());
        cases.push(Case::sent(stage, format!("{len} bytes of a TCP header"), &cut).arrives(1));
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

fn tagged<F: Twin>(stage: &Stage<F>) -> Vec<Case> {
    let [from, to] = stage.ends;
    // Ports of their own: point 2 must know the flow from these very packets.
    let datagram = F::udp(from, to, (5556, OPEN_PORT), b"tagged").bytes();
    let gateway = stage.gateway_mac(0);
    let frame = |tags: &[u8]| {
        let payload = [tags, &F::ETHER_TYPE.to_be_bytes(), &datagram].concat();
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

fn addresses<F: Twin>(stage: &Stage<F>) -> Vec<Case> {
    let [own, far] = stage.ends;
    let from = |name: &str, source| {
        let packet = F::udp(source, far, (5555, OPEN_PORT), b"from");
        Case::sent(stage, format!("from {name}"), &packet).first("fast_encap", 0)
    };
    let to = |name: &str, destination| {
        Case::sent(stage, format!("to {name}"), &F::udp(own, destination, (5555, OPEN_PORT), b"to"))
    };
    vec![
        from("another pod of this node", F::of(&stage.neighbour))
            .stricter()
            .first("drop_forged_pod_source", 1),
        from("the destination itself", far).stricter().second("drop_forged_peer_source", 1),
        from("another pod of the peer", stage.address(1, 99)).stricter().second("drop_forged_peer_source", 1),
        // Kernels pace their redirects.
        to("itself", own).comes_back(2).first("pass_pod_local", 1).once(),
        to("the gateway", stage.address(0, 1)).comes_back(1).first("pass_pod_no_peer", 1),
        to("the peer's gateway", stage.address(1, 1))
            .comes_back(1)
            .first("fast_encap", 1)
            .second("pass_wire_no_endpoint", 1),
        to("the peer's VXLAN device", stage.address(1, 0))
            .comes_back(1)
            .first("fast_encap", 1)
            .second("pass_wire_no_endpoint", 1),
    ]
}

/// A datagram to this address in a frame to this MAC.
pub(super) fn to_group<F: Twin>(stage: &Stage<F>, mac: Mac, destination: F::Address) -> Vec<Frame> {
    let packet = F::udp(stage.ends[0], destination, (5555, OPEN_PORT), b"all").bytes();
    vec![Frame::FromSender(packet::ethernet(mac, pod_mac(&stage.sender), F::ETHER_TYPE, &packet))]
}

/// A datagram of the sender's whose packet was changed at one place.
pub(super) fn changed<F: Twin>(stage: &Stage<F>, name: &str, change: impl Fn(&mut Vec<u8>)) -> Case {
    let mut packet = stage.datagram(b"changed").bytes();
    change(&mut packet);
    Case::new(name, vec![Frame::FromSender(stage.sent_by_sender(&packet))]).first("fast_encap", 0)
}
