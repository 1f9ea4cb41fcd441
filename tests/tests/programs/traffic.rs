//! What is counted by peer and by endpoint: who, which way, how many packets and bytes.

use std::{collections::BTreeMap, net::Ipv4Addr};

use ipnet::Ipv4Net;
use loden_agent::dataplane::{
    Program::{FromOverlay, FromPod, FromWire, ToOverlay, ToWire},
    slow_reasons,
};
use loden_agent::family::V4;
use loden_ebpf::{
    abi::{Counter, Endpoint, Traffic},
    reason::Reason::{self, *},
};

use crate::{packet::*, rig::*, samples::*};

const OPEN: Mode = Mode { strict: false, drop_forged: true };
const STRICT: Mode = Mode { strict: true, drop_forged: true };
/// The IP packet of the samples: IPv4, UDP, payload.
const LEN: u64 = 20 + 8 + PAYLOAD as u64;

fn of_peer(rig: &Rig, subnet: &str) -> Traffic {
    rig.dataplane.half::<V4>().peer_traffic().unwrap().each[&subnet.parse::<Ipv4Net>().unwrap()]
}

fn of_pod(rig: &Rig, pod: Ipv4Addr) -> Traffic {
    rig.dataplane.half::<V4>().endpoint_traffic().unwrap().each[&pod].traffic
}

fn reasons(rig: &Rig, pod: Ipv4Addr) -> Vec<(Reason, u64)> {
    slow_reasons(&rig.dataplane.half::<V4>().endpoint_traffic().unwrap().each[&pod])
}

fn counter(packets: u64, bytes: u64) -> Counter {
    Counter { packets, bytes }
}

#[test]
fn what_goes_fast_counts_for_the_peer_and_the_endpoint() {
    Lab::run(|lab| {
        let mut rig = Rig::load(lab, OPEN);
        for _ in 0..3 {
            rig.run(FromPod, &sent_udp().build(), Context::default());
        }
        rig.run(FromWire, &outer().then(inner_udp()).build(), Context::default());
        rig.run(FromOverlay, &inner_udp().build(), Context::default());
        let expected = Traffic {
            sent_fast: counter(3, 3 * LEN),
            received_fast: counter(2, 2 * LEN),
            ..Traffic::default()
        };
        assert_eq!(of_peer(&rig, "10.5.2.0/24"), expected);
        assert_eq!(of_pod(&rig, POD), expected);
        assert_eq!(of_pod(&rig, OTHER_POD), Traffic::default());
        assert_eq!(reasons(&rig, POD), []);
        assert_eq!(rig.dataplane.half::<V4>().peer_traffic().unwrap().others, Traffic::default());
    });
}

#[test]
fn a_direct_peer_is_counted_at_the_uplink() {
    Lab::run(|lab| {
        let mut rig = Rig::load(lab, STRICT);
        let out = sent_udp().to(DIRECT_REMOTE).build();
        let into = Packet::ethernet(WIRE_MAC, ROUTER_MAC)
            .ipv4(DIRECT_REMOTE, POD)
            .udp(REMOTE_PORT, LOCAL_PORT)
            .payload(PAYLOAD)
            .build();
        rig.run(FromPod, &out, Context::default());
        assert_eq!(of_peer(&rig, "10.5.4.0/24"), Traffic::default(), "the host stack may still drop it");
        rig.run(ToWire, &out, Context::default());
        rig.run(FromWire, &into, Context::default());
        let slow = counter(1, LEN);
        let expected = Traffic { sent_slow: slow, received_slow: slow, ..Traffic::default() };
        assert_eq!(of_peer(&rig, "10.5.4.0/24"), expected);
        assert_eq!(of_pod(&rig, POD), expected);
        assert_eq!(reasons(&rig, POD), [(PassPodGate, 1), (PassDirect, 1)]);
    });
}

#[test]
fn what_the_host_stack_carries_is_counted_at_the_vxlan_device_with_its_reason() {
    Lab::run(|lab| {
        let mut rig = Rig::load(lab, STRICT);
        for packet in [sent_udp(), sent_tcp(SYN), sent_tcp(FIN)] {
            rig.run(FromPod, &packet.build(), Context::default());
            rig.run(ToOverlay, &packet.build(), Context::default());
        }
        rig.run(FromWire, &outer().then(inner_udp()).build(), Context::default());
        rig.run(FromOverlay, &inner_udp().build(), Context::default());
        rig.run(FromPod, &sent_udp().to(OUTSIDE).build(), Context::default());
        let traffic = of_peer(&rig, "10.5.2.0/24");
        assert_eq!(traffic.sent_slow, counter(3, 3 * LEN + 2 * 12), "a TCP header has 12 bytes more");
        assert_eq!(traffic.received_slow, counter(1, LEN));
        assert_eq!((traffic.sent_fast, traffic.received_fast), (counter(0, 0), counter(0, 0)));
        assert_eq!(of_pod(&rig, POD), traffic, "what goes outside is no traffic between pods");
        let mut expected =
            vec![(PassPodGate, 1), (PassPodTcpControl, 2), (PassWireGate, 1), (PassPodNoPeer, 1)];
        let mut found = reasons(&rig, POD);
        expected.sort();
        found.sort();
        assert_eq!(found, expected);
    });
}

#[test]
fn two_local_pods_are_both_counted() {
    Lab::run(|lab| {
        let frame = sent_udp().to(OTHER_POD).macs(OTHER_POD_MAC, POD_MAC).build();
        let one = counter(1, LEN);
        let mut rig = Rig::load(lab, OPEN);
        rig.run(FromPod, &frame, Context::default());
        assert_eq!(of_pod(&rig, POD), Traffic { sent_fast: one, ..Traffic::default() });
        assert_eq!(of_pod(&rig, OTHER_POD), Traffic { received_fast: one, ..Traffic::default() });
        let mut rig = Rig::load(lab, STRICT);
        rig.run(FromPod, &frame, Context::default());
        assert_eq!(of_pod(&rig, POD), Traffic { sent_slow: one, ..Traffic::default() });
        assert_eq!(of_pod(&rig, OTHER_POD), Traffic { received_slow: one, ..Traffic::default() });
        assert_eq!(reasons(&rig, POD), [(PassPodLocal, 1)]);
    });
}

#[test]
fn an_aggregate_counts_as_its_segments() {
    Lab::run(|lab| {
        let mut rig = Rig::load(lab, OPEN);
        // A test run cannot make room in an aggregate: those that need none are tried. The rig says 2 segments.
        let frame = sent_ip().to(DIRECT_REMOTE).udp(LOCAL_PORT, REMOTE_PORT).payload(1000).build();
        rig.run(FromPod, &frame, Context { gso_size: 500, ..Context::default() });
        assert_eq!(of_peer(&rig, "10.5.4.0/24").sent_fast, counter(2, 1028));
        // Where the kernel does not know how many they are, it follows from the sizes.
        let frame = sent_ip().to(DIRECT_REMOTE).udp(LOCAL_PORT, REMOTE_PORT).payload(1001).build();
        rig.run(FromPod, &frame, Context { gso_size: 500, gso_segs: Some(0), ..Context::default() });
        assert_eq!(of_pod(&rig, POD).sent_fast, counter(2 + 3, 1028 + 1029));
    });
}

#[test]
fn counters_go_on_with_the_same_peer_and_begin_anew_with_another() {
    Lab::run(|lab| {
        let mut rig = Rig::load(lab, OPEN);
        let send = |rig: &mut Rig| {
            rig.run(FromPod, &sent_udp().build(), Context::default());
            of_peer(rig, "10.5.2.0/24").sent_fast.packets
        };
        assert_eq!(send(&mut rig), 1);
        let mut peers = peers(lab);
        peers[0].vtep_mac = [2, 0, 0, 0, 9, 9];
        rig.dataplane.half_mut::<V4>().set_peers(&peers).unwrap();
        assert_eq!(send(&mut rig), 2, "the same node with another MAC");
        rig.dataplane.read_back().unwrap();
        rig.dataplane.half_mut::<V4>().set_peers(&peers).unwrap();
        assert_eq!(send(&mut rig), 3, "the next agent");
        peers[0].vtep = STRANGER;
        rig.dataplane.half_mut::<V4>().set_peers(&peers).unwrap();
        assert_eq!(send(&mut rig), 1, "another node with that subnet");
        rig.dataplane.half_mut::<V4>().set_peers(&[]).unwrap();
        rig.dataplane.half_mut::<V4>().set_peers(&peers).unwrap();
        assert_eq!(send(&mut rig), 1, "gone and back");
    });
}

#[test]
fn a_new_pod_with_an_old_address_begins_at_zero() {
    Lab::run(|lab| {
        let mut rig = Rig::load(lab, OPEN);
        rig.run(FromPod, &sent_udp().build(), Context::default());
        rig.run(FromPod, &sent_udp().to(OUTSIDE).build(), Context::default());
        assert_eq!(of_pod(&rig, POD).sent_fast.packets, 1);
        assert_eq!(reasons(&rig, POD), [(PassPodNoPeer, 1)]);
        let other = Endpoint { address: POD.octets(), ifindex: lab.pod, mac: [2; 6], ..Endpoint::default() };
        rig.dataplane.half_mut::<V4>().set_endpoints(&BTreeMap::from([(POD, other)])).unwrap();
        assert_eq!(of_pod(&rig, POD), Traffic::default());
        assert_eq!(reasons(&rig, POD), []);
    });
}
