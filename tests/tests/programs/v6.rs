//! The programs on IPv6, in a network that has nothing else: verdict, frame and count of each row, and the outer UDP
//! checksum added up the long way, over all of the packet.

pub(crate) mod frame;
mod from_pod;
mod from_wire;
mod gate;
mod reasons;
mod strangers;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv6Addr,
};

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
const KERNEL_VTEP: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x13);
const DIRECT_VTEP: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x15);
const STRANGER: Ipv6Addr = Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0x66);
pub(crate) const POD: Ipv6Addr = pod(0x1, 2);
const OTHER_POD: Ipv6Addr = pod(0x1, 3);
const ROUTED_POD: Ipv6Addr = pod(0x1, 4);
const UNKNOWN_POD: Ipv6Addr = pod(0x1, 77);
pub(crate) const REMOTE: Ipv6Addr = pod(0x2, 9);
const KERNEL_REMOTE: Ipv6Addr = pod(0x3, 9);
const DIRECT_REMOTE: Ipv6Addr = pod(0x4, 9);
const VACANT: Ipv6Addr = pod(0x99, 1);
const OUTSIDE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);

/// A pod of the network fc00::/48, cut into /64.
const fn pod(subnet: u16, host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfc00, 0, 0, subnet, 0, 0, 0, host)
}

/// Reasons that were counted, so that none goes without a row.
type Produced = BTreeSet<Reason>;

/// Rows that need a sequence or a rig of their own; what they have counted.
type Table = fn(&Lab) -> Produced;

struct Rig<'a> {
    produced: Produced,
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
        Self {
            produced: Produced::new(),
            lab,
            dataplane,
            flows: HashMap::try_from(Map::LruHashMap(flows)).unwrap(),
            hash,
        }
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
        self.produced.extend(&counted);
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

    /// As [`Self::passes`], of a packet of these segments.
    fn passes_in_segments(
        &mut self,
        what: &str,
        program: Program,
        frame: &[u8],
        gso_size: u32,
        reason: Reason,
    ) {
        let (outcome, counted) = self.run(program, frame, Context { gso_size, ..Context::default() });
        assert_eq!((outcome.action, counted), (UNSPEC, Some(reason)), "{what}");
        assert_eq!(outcome.frame, frame, "{what}");
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
        PeerPath { underlay: None, ..peer("fc00:0:0:3::/64", KERNEL_VTEP, Way::Encapsulated) },
    ]
}

fn endpoints(lab: &Lab) -> BTreeMap<Ipv6Addr, Endpoint<[u8; 16]>> {
    // Any negative number is the namespace where the program runs.
    let endpoint = |address: Ipv6Addr, ifindex, mac, gateway_mac| {
        (
            address,
            Endpoint {
                address: address.octets(),
                ifindex,
                mac,
                gateway_mac,
                netns: -1,
                ..Endpoint::default()
            },
        )
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
