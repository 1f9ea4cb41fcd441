//! The programs on IPv6, in a network that has nothing else: verdict, frame and count of each row, and the outer UDP
//! checksum added up the long way, over all of the packet.

pub(crate) mod frame;

use std::{collections::BTreeMap, net::Ipv6Addr};

use aya::{
    maps::{HashMap, Map, MapData},
    programs::SchedClassifier,
};
use loden_agent::{
    dataplane::{
        Dataplane, FamilySettings, PeerPath, Pins, Program,
        Program::{FromOther, FromOverlay, FromPod, FromWire, ToOverlay, ToPod},
        Settings, Underlay, VxlanSettings, Way,
    },
    family::V6,
};
use loden_ebpf::{
    abi::{Endpoint, Flow, FlowKey, SightingKeyV6, map},
    reason::Reason::{self, *},
};

use self::frame::*;
use crate::{
    hash,
    rig::{
        Context, GATEWAY_MAC, Lab, OTHER_GATEWAY_MAC, OTHER_POD_MAC, OUTER_TTL, Outcome, PEER_MTU,
        PEER_VTEP_MAC, POD_MAC, PORT, ROUTED_POD_MAC, SOURCE_PORTS, VNI, VTEP_MAC, WIRE_MAC, test_run,
    },
};

/// `TC_ACT_SHOT`, `TC_ACT_REDIRECT` of linux/pkt_cls.h, and `TC_ACT_UNSPEC`.
const SHOT: i32 = 2;
const REDIRECT: i32 = 7;
const UNSPEC: i32 = -1;

const VTEP: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x11);
const PEER_VTEP: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x12);
const DIRECT_VTEP: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x15);
const STRANGER: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x66);
pub(crate) const POD: Ipv6Addr = pod(0x1, 2);
const OTHER_POD: Ipv6Addr = pod(0x1, 3);
const ROUTED_POD: Ipv6Addr = pod(0x1, 4);
const UNKNOWN_POD: Ipv6Addr = pod(0x1, 77);
pub(crate) const REMOTE: Ipv6Addr = pod(0x2, 9);
const DIRECT_REMOTE: Ipv6Addr = pod(0x4, 9);
const VACANT: Ipv6Addr = pod(0x99, 1);
const OUTSIDE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);

/// A pod of the network fc00::/48, cut into /64.
const fn pod(subnet: u16, host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfc00, 0, 0, subnet, 0, 0, 0, host)
}

struct Rig<'a> {
    lab: &'a Lab,
    dataplane: Dataplane,
    flows: HashMap<MapData, FlowKey<[u8; 16]>, Flow>,
    hash: SchedClassifier,
}

impl<'a> Rig<'a> {
    fn load(lab: &'a Lab, strict: bool, log_packets: bool) -> Self {
        let settings = Settings {
            v4: None,
            v6: Some(FamilySettings {
                network: "fc00::/48".parse().unwrap(),
                subnet_len: 64,
                subnet: "fc00:0:0:1::/64".parse().unwrap(),
                vtep: VTEP,
                vxlan: Some(VxlanSettings { ifindex: lab.overlay, mac: VTEP_MAC, vni: VNI, port: PORT }),
                outer_ttl: OUTER_TTL,
            }),
            source_ports: SOURCE_PORTS,
            strict,
            drop_forged: true,
            bare_device: false,
            log_packets,
        };
        let pins = lab.bpffs.path().join(format!("v6-strict-{strict}-log-{log_packets}"));
        let mut dataplane = Dataplane::load(&settings, &pins).unwrap();
        let flows = MapData::from_pin(Pins::below(&pins).map(map::V6_FLOWS)).unwrap();
        let hash = hash::load(&pins.join("hash"));
        let half = dataplane.half_mut::<V6>();
        half.set_peers(&peers(lab)).unwrap();
        half.set_endpoints(&endpoints(lab)).unwrap();
        for address in [POD, OTHER_POD, ROUTED_POD] {
            half.prove_endpoint(address, false).unwrap();
        }
        Self { lab, dataplane, flows: HashMap::try_from(Map::LruHashMap(flows)).unwrap(), hash }
    }

    /// Runs a program on a frame, and says what it counted.
    fn run(&mut self, program: Program, frame: &[u8], context: Context) -> (Outcome, Option<Reason>) {
        let home = match program {
            FromPod | ToPod => self.lab.pod,
            FromOverlay | ToOverlay => self.lab.overlay,
            _ => self.lab.wire,
        };
        let ifindex = if context.ifindex == 0 { home } else { context.ifindex };
        let before = self.dataplane.counters().unwrap();
        let outcome =
            test_run(self.dataplane.program(program).unwrap(), frame, Context { ifindex, ..context });
        let after = self.dataplane.counters().unwrap();
        let counted: Vec<Reason> =
            after.keys().copied().filter(|reason| after[reason] != before[reason]).collect();
        assert!(counted.len() <= 1, "{counted:?}");
        (outcome, counted.first().copied())
    }

    /// A row: the frame becomes another one, for a reason, or stays what it was.
    fn row(
        &mut self,
        what: &str,
        program: Program,
        frame: &[u8],
        reason: Option<Reason>,
        out: Option<&[u8]>,
    ) {
        let (outcome, counted) = self.run(program, frame, Context::default());
        assert_eq!(counted, reason, "{what}");
        let class = reason.map_or("pass", |reason| reason.name().split('_').next().unwrap());
        let action = match class {
            "fast" => REDIRECT,
            "drop" => SHOT,
            _ => UNSPEC,
        };
        assert_eq!(outcome.action, action, "{what}");
        assert_eq!(outcome.frame, out.unwrap_or(frame), "{what}");
    }

    fn passes(&mut self, what: &str, program: Program, frame: &[u8], reason: Reason) {
        self.row(what, program, frame, Some(reason), None);
    }

    fn source_port(&self, frame: &[u8]) -> u16 {
        let hash = test_run(&self.hash, frame, Context { ifindex: self.lab.pod, ..Context::default() }).action
            as u32;
        let hash = hash ^ (hash << 16);
        let (min, max) = SOURCE_PORTS;
        ((u64::from(hash) * u64::from(max - min)) >> 32) as u16 + min
    }
}

fn peers(lab: &Lab) -> Vec<PeerPath<V6>> {
    let peer = |subnet: &str, vtep, way| PeerPath {
        subnet: subnet.parse().unwrap(),
        vtep,
        vtep_mac: PEER_VTEP_MAC,
        way,
        underlay: Some(Underlay { uplink: lab.wire, next_hop: vtep, source: VTEP, mtu: PEER_MTU }),
    };
    vec![
        peer("fc00:0:0:2::/64", PEER_VTEP, Way::Encapsulated),
        peer("fc00:0:0:4::/64", DIRECT_VTEP, Way::Direct),
    ]
}

fn endpoints(lab: &Lab) -> BTreeMap<Ipv6Addr, Endpoint<[u8; 16]>> {
    let endpoint = |address: Ipv6Addr, ifindex, mac, gateway_mac| {
        (address, Endpoint { address: address.octets(), ifindex, mac, gateway_mac, ..Endpoint::default() })
    };
    BTreeMap::from([
        endpoint(POD, lab.pod, POD_MAC, GATEWAY_MAC),
        endpoint(OTHER_POD, lab.other_pod, OTHER_POD_MAC, GATEWAY_MAC),
        endpoint(ROUTED_POD, lab.other_pod, ROUTED_POD_MAC, OTHER_GATEWAY_MAC),
    ])
}

/// A frame from the pod to its gateway.
fn sent(packet: &[u8]) -> Vec<u8> {
    ethernet(GATEWAY_MAC, POD_MAC, packet)
}

/// A frame from the wire: VXLAN from a VTEP around a frame between the VXLAN devices.
fn arrived(from: Ipv6Addr, inner: &[u8]) -> Vec<u8> {
    ethernet(WIRE_MAC, PEER_VTEP_MAC, &vxlan(from, VTEP, &ethernet(VTEP_MAC, PEER_VTEP_MAC, inner)))
}

fn vxlan(from: Ipv6Addr, to: Ipv6Addr, frame: &[u8]) -> Vec<u8> {
    let header = [&[8, 0, 0, 0][..], &(VNI << 8).to_be_bytes()].concat();
    Ip::new(from, to).udp(40_000, PORT, &[&header, frame].concat())
}

#[test]
fn a_packet_to_a_peer_is_encapsulated_with_a_checksum_that_covers_it_all() {
    Lab::run(|lab| {
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
    });
}

#[test]
fn what_the_fast_path_is_not_for_goes_to_the_kernel_unchanged() {
    Lab::run(|lab| {
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
        rig.passes(
            "not for the gateway",
            FromPod,
            &ethernet(OTHER_POD_MAC, POD_MAC, &udp),
            PassPodNotForGateway,
        );
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
    });
}

/// The context of IPv4 is of no use here: any packet will do.
fn sent_v4() -> Vec<u8> {
    let mut packet = vec![0; 40];
    (packet[0], packet[3], packet[8], packet[9]) = (0x45, 40, 64, 17);
    [&GATEWAY_MAC[..], &POD_MAC, &[8, 0], &packet].concat()
}

#[test]
fn an_aggregate_goes_into_the_vxlan_device_as_a_router_passes_it_on() {
    Lab::run(|lab| {
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
    });
}

#[test]
fn a_peer_s_packet_is_delivered_whose_checksum_follows_from_its_headers() {
    Lab::run(|lab| {
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
    });
}

#[test]
fn what_is_odd_on_the_wire_is_the_kernels_and_strangers_end_there() {
    Lab::run(|lab| {
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
        rig.row("for another port", FromWire, &changed(outer + 43, 1), None, None);
        rig.row("for another address", FromWire, &changed(outer + 39, 1), None, None);
    });
}

/// An extension header of eight bytes, whose first byte is the next one's number.
const OPTIONS: &[u8] = &[0, 0, 1, 4, 0, 0, 0, 0];
/// The same of a fragment that holds what follows, and of one that does not.
const FIRST_FRAGMENT: &[u8] = &[0, 0, 0, 1, 0, 0, 0, 9];
const LATER_FRAGMENT: &[u8] = &[0, 0, 0, 9, 0, 0, 0, 9];

/// VXLAN for this node behind a chain of extension headers.
fn hidden(from: Ipv6Addr, headers: &[(u8, &[u8])]) -> Vec<u8> {
    let udp = Ip::new(REMOTE, POD).udp(53, 5000, b"payload");
    let outer = vxlan(from, VTEP, &ethernet(VTEP_MAC, PEER_VTEP_MAC, &udp));
    let mut payload = outer[40..].to_vec();
    let mut next = 17;
    for (number, header) in headers.iter().rev() {
        let mut header = header.to_vec();
        header[0] = next;
        payload = [header, payload].concat();
        next = *number;
    }
    ethernet(WIRE_MAC, PEER_VTEP_MAC, &Ip::new(from, VTEP).next(next, &payload))
}

#[test]
fn extension_headers_hide_no_stranger() {
    Lab::run(|lab| {
        let mut rig = Rig::load(lab, false, false);
        let chains: [&[(u8, &[u8])]; 4] = [
            &[(60, OPTIONS)],
            &[(44, FIRST_FRAGMENT)],
            &[(0, OPTIONS), (60, OPTIONS), (44, FIRST_FRAGMENT)],
            &[(60, OPTIONS); 9],
        ];
        for chain in chains {
            rig.row("a stranger's", FromWire, &hidden(STRANGER, chain), Some(DropUnknownVtep), None);
            rig.passes("a peer's", FromWire, &hidden(PEER_VTEP, chain), PassWireOuter);
        }
        rig.row("a later fragment", FromWire, &hidden(STRANGER, &[(44, LATER_FRAGMENT)]), None, None);
        let tcp = Ip::new(STRANGER, VTEP).next(60, &[&[6, 0, 1, 4, 0, 0, 0, 0][..], &[0; 20]].concat());
        rig.row("TCP to the node", FromWire, &ethernet(WIRE_MAC, PEER_VTEP_MAC, &tcp), None, None);
    });
}

#[test]
fn local_pods_and_direct_peers_are_reached_without_encapsulation() {
    Lab::run(|lab| {
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
    });
}

#[test]
fn the_gate_lets_a_direction_pass_that_came_out_of_the_host_unchanged() {
    Lab::run(|lab| {
        let mut rig = Rig::load(lab, true, false);
        let out = Ip::new(POD, REMOTE).udp(5000, 53, b"a query of some length");
        rig.passes("a new flow", FromPod, &sent(&out), PassPodGate);
        let left = ethernet(
            PEER_VTEP_MAC,
            VTEP_MAC,
            &Ip::new(POD, REMOTE).hops(63).udp(5000, 53, b"a querY of some length"),
        );
        rig.row("another packet leaves", ToOverlay, &left, None, None);
        rig.passes("which proves nothing", FromPod, &sent(&out), PassPodGate);
        let left = ethernet(
            PEER_VTEP_MAC,
            VTEP_MAC,
            &Ip::new(POD, REMOTE).hops(63).udp(5000, 53, b"a query of some length"),
        );
        rig.row("the same leaves", ToOverlay, &left, None, None);
        assert_eq!(rig.run(FromPod, &sent(&out), Context::default()).1, Some(FastEncap));
        let back = Ip::new(REMOTE, POD).udp(53, 5000, b"the answer");
        rig.passes("the other direction", FromWire, &arrived(PEER_VTEP, &back), PassWireGate);
        rig.passes(
            "as the kernel decapsulates it",
            FromOverlay,
            &ethernet(VTEP_MAC, PEER_VTEP_MAC, &back),
            PassOverlay,
        );
        let delivered = Ip::new(REMOTE, POD).hops(63).udp(53, 5000, b"the answer");
        rig.row("into the pod", ToPod, &ethernet(POD_MAC, GATEWAY_MAC, &delivered), None, None);
        assert_eq!(rig.run(FromWire, &arrived(PEER_VTEP, &back), Context::default()).1, Some(FastDecap));
        let syn = Ip::new(POD, REMOTE).tcp(5000, 80, 0x02, b"");
        rig.passes("SYN", FromPod, &sent(&syn), PassPodTcpControl);
        rig.dataplane.bump_epoch().unwrap();
        rig.passes("another epoch", FromPod, &sent(&out), PassPodGate);
    });
}

#[test]
fn a_flow_that_the_host_translates_gates_its_pod() {
    Lab::run(|lab| {
        let mut rig = Rig::load(lab, false, false);
        // What a pod sent to a service leaves for a backend: nobody saw that go in.
        let out = Ip::new(POD, REMOTE).hops(63).tcp(5000, 80, 0x10, b"x");
        rig.passes("point 2", ToOverlay, &ethernet(PEER_VTEP_MAC, VTEP_MAC, &out), NoteTranslated);
        let back = Ip::new(REMOTE, POD).tcp(80, 5000, 0x10, b"y");
        rig.passes("its answer", FromWire, &arrived(PEER_VTEP, &back), PassWireGate);
        let key = FlowKey::of(6, (POD.octets(), 5000), (REMOTE.octets(), 80));
        assert_eq!(rig.flows.get(&key, 0).unwrap().translated, 1);
        let endpoints = rig.dataplane.half::<V6>().endpoints().unwrap();
        assert_eq!(endpoints.iter().filter(|endpoint| endpoint.gated != 0).count(), 1);
    });
}

#[test]
fn the_guard_drops_strangers_vxlan_of_ipv6_and_the_programs_load_that_tell_of_packets() {
    Lab::run(|lab| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _inside = runtime.enter();
        let mut rig = Rig::load(lab, true, true);
        let udp = Ip::new(REMOTE, POD).udp(53, 5000, b"payload");
        for (from, action) in [(STRANGER, 1), (PEER_VTEP, 2)] {
            let frame = arrived(from, &udp);
            let mut options = aya::programs::TestRunOptions::new();
            options.data_in = Some(&frame);
            let guard = rig.dataplane.guard().unwrap();
            let result = aya::programs::TestRun::test_run(guard, options).unwrap();
            assert_eq!(result.return_value, action, "XDP_DROP is 1, XDP_PASS 2");
        }
        let frame = sent(&Ip::new(POD, REMOTE).udp(5000, 53, b"told of"));
        assert_eq!(rig.run(FromPod, &frame, Context::default()).1, Some(PassPodGate));
    });
}

#[test]
fn vxlan_by_another_way_is_dropped_unless_it_is_a_peers_own() {
    /// All nodes of the link (RFC 4291).
    const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    Lab::run(|lab| {
        let mut rig = Rig::load(lab, true, false);
        let inner = ethernet(VTEP_MAC, PEER_VTEP_MAC, &Ip::new(REMOTE, POD).udp(1, 2, b"x"));
        let forged = ethernet(VTEP_MAC, PEER_VTEP_MAC, &Ip::new(OTHER_POD, POD).udp(1, 2, b"x"));
        let came = |from, to, inner: &[u8]| ethernet(WIRE_MAC, PEER_VTEP_MAC, &vxlan(from, to, inner));
        for (what, to) in [
            ("for this node", VTEP),
            ("for all", ALL_NODES),
            ("for another address of the host", OUTSIDE),
            ("for a peer", PEER_VTEP),
        ] {
            let frame = came(STRANGER, to, &inner);
            rig.row(&format!("a stranger's, {what}"), FromOther, &frame, Some(DropUnknownVtep), None);
        }
        rig.row(
            "a stranger's, for all, at the uplink",
            FromWire,
            &came(STRANGER, ALL_NODES, &inner),
            Some(DropUnknownVtep),
            None,
        );
        rig.row("a peer's", FromOther, &came(PEER_VTEP, VTEP, &inner), None, None);
        rig.row(
            "a peer's, forged",
            FromOther,
            &came(PEER_VTEP, VTEP, &forged),
            Some(DropForgedPeerSource),
            None,
        );
        let other_port = ethernet(WIRE_MAC, PEER_VTEP_MAC, &Ip::new(STRANGER, VTEP).udp(1, 53, &[0; 90]));
        rig.row("another port", FromOther, &other_port, None, None);
        for chain in [&[(60, OPTIONS)][..], &[(44, FIRST_FRAGMENT)], &[(60, OPTIONS); 9]] {
            rig.row("a stranger's, hidden", FromOther, &hidden(STRANGER, chain), Some(DropUnknownVtep), None);
        }
        rig.row("a later fragment", FromOther, &hidden(STRANGER, &[(44, LATER_FRAGMENT)]), None, None);
        for (what, to) in [("to its node", VTEP), ("to another node", PEER_VTEP), ("to all", ALL_NODES)] {
            rig.row(
                &format!("a pod's, {what}"),
                FromPod,
                &sent(&vxlan(POD, to, &inner)),
                Some(DropPodVxlan),
                None,
            );
        }
    });
}
