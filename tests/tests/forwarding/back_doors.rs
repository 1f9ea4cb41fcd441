//! The kernel's VXLAN socket takes packets at every interface, for every address of the host, and from pods: each way is
//! tried, with the programs and, to see that it is one, without them.

use std::{
    net::{Ipv4Addr, UdpSocket},
    time::Duration,
};

use loden_tests::{
    capture::Capture,
    netns::{Netns, join},
    packet::{self, Ipv4, Mac, Packet as _, Vxlan},
    process::wait_for,
    tap::Tap,
};
use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};

use crate::stage::{PATIENCE, Stage, mac_of};

/// What marks a packet inside.
const MARK: &[u8] = b"by the back door";
const BROADCAST: Mac = [0xff; 6];
/// Of a group that every host is in (224.0.0.1, RFC 1112).
const ALL_HOSTS: Mac = [1, 0, 0x5e, 0, 0, 1];
/// The second node at its second uplink, and a host there.
const SECOND: Ipv4Addr = Ipv4Addr::new(192, 168, 65, 2);
const STRANGER: Ipv4Addr = Ipv4Addr::new(192, 168, 65, 66);

/// One more interface of the second node, of each sort, with somebody behind it.
struct Doors {
    intruder: Netns,
    /// Of the intruder, at the second uplink.
    uplink: Capture,
    tun: Tap,
}

impl Doors {
    fn open(stage: &Stage) -> Self {
        let victim = stage.cluster.nodes[1].netns();
        let intruder = Netns::create("intruder").unwrap();
        join(&intruder, "eth0", victim, "eth1").unwrap();
        victim.ip(&format!("address add {SECOND}/24 dev eth1")).unwrap();
        intruder.ip(&format!("address add {STRANGER}/24 dev eth0")).unwrap();
        let tun = Tap::tun(victim, "tun0").unwrap();
        for node in &stage.cluster.nodes {
            for interface in ["all", "default", "eth0", "docker0"] {
                node.netns().exec(&format!("sysctl -qw net.ipv4.conf.{interface}.rp_filter=0")).unwrap();
            }
        }
        for interface in ["eth1", "tun0"] {
            victim.exec(&format!("sysctl -qw net.ipv4.conf.{interface}.rp_filter=0")).unwrap();
        }
        let uplink = Capture::open(&intruder, "eth0").unwrap();
        Self { intruder, uplink, tun }
    }
}

/// How a packet comes to the second node.
#[derive(Clone, Copy, Debug)]
enum Door {
    /// At the uplink of the overlay, to this MAC.
    First(Option<Mac>),
    Second(Option<Mac>),
    /// There, with these many priority tags.
    Tagged(usize),
    Tun,
    /// From the pod there.
    Pod,
    /// As [`Self::Second`] and [`Self::Pod`], from a socket of any user: two datagrams in one piece, of which only the
    /// headers up to UDP are in the packet's linear part.
    SecondInSegments,
    PodInSegments,
}

/// Sends what a packet has behind its UDP header twice, to where the packet is for, by one call.
fn send_in_segments(from: &Netns, packet: &[u8]) {
    let (to, payload) = (<[u8; 4]>::try_from(&packet[16..20]).unwrap(), &packet[28..]);
    let socket = from.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap());
    setsockopt(&socket, UdpGsoSegment, &(payload.len() as i32)).unwrap();
    socket.send_to(&payload.repeat(2), (Ipv4Addr::from(to), 8472)).unwrap();
}

fn go_through(stage: &Stage, doors: &Doors, door: Door, outer: &[u8]) {
    let victim = stage.cluster.nodes[1].netns();
    let (eth0, eth1) = (mac_of(victim, "eth0"), mac_of(victim, "eth1"));
    let from = mac_of(&doors.intruder, "eth0");
    let frame = |to| packet::ethernet(to, from, packet::IPV4, outer);
    match door {
        Door::First(to) => stage.at_wire[0].send(&frame(to.unwrap_or(eth0))),
        Door::Second(to) => doors.uplink.send(&frame(to.unwrap_or(eth1))),
        Door::Tagged(tags) => {
            let plain = frame(eth1);
            doors.uplink.send(&[&plain[..12], &[0x81, 0, 0, 0].repeat(tags), &plain[12..]].concat())
        }
        Door::Tun => doors.tun.deliver(outer),
        Door::SecondInSegments => return send_in_segments(&doors.intruder, outer),
        Door::PodInSegments => return send_in_segments(stage.destination.netns(), outer),
        Door::Pod => stage.at_destination.send(&stage.sent_by_destination(outer)),
    }
    .unwrap();
}

/// What is tried, by which door, and what the programs must count for it.
fn attempts(stage: &Stage) -> Vec<(&'static str, Door, Vec<u8>, &'static str)> {
    let [peer, victim] = [0, 1].map(|i: usize| stage.cluster.nodes[i].address());
    let honest = stage.encapsulated(&stage.datagram(MARK).bytes());
    let vxlan = |source, destination| Vxlan { source, destination, ..honest.clone() }.packet().bytes();
    let stranger = |destination| vxlan(STRANGER, destination);
    let everybody = Ipv4Addr::BROADCAST;
    let segment = Ipv4Addr::new(192, 168, 65, 255);
    let group = [224, 0, 0, 1].into();
    let of_victim = Ipv4 { source: stage.address(1, 9), ..stage.datagram(MARK) }.bytes();
    let forged = stage.encapsulated(&of_victim).packet().bytes();
    let (unknown, pod) = ("drop_unknown_vtep", "drop_pod_vxlan");
    let pods_own = stage.destination.address();
    vec![
        ("a second uplink, to the VTEP's address", Door::Second(None), stranger(victim), unknown),
        ("a second uplink, to its own address", Door::Second(None), stranger(SECOND), unknown),
        ("a second uplink, to all", Door::Second(Some(BROADCAST)), stranger(everybody), unknown),
        ("a second uplink, to its segment", Door::Second(Some(BROADCAST)), stranger(segment), unknown),
        (
            "a second uplink, from nobody to nobody",
            Door::Second(Some(BROADCAST)),
            vxlan(Ipv4Addr::UNSPECIFIED, Ipv4Addr::UNSPECIFIED),
            unknown,
        ),
        ("a second uplink, to a group", Door::Second(Some(ALL_HOSTS)), stranger(group), unknown),
        ("a second uplink, with a priority tag", Door::Tagged(1), stranger(victim), unknown),
        ("a second uplink, with three", Door::Tagged(3), stranger(victim), unknown),
        ("a second uplink, in a peer's name, forged", Door::Second(None), forged, "drop_forged_peer_source"),
        ("the uplink, to another address", Door::First(None), stranger(SECOND), unknown),
        ("the uplink, to all", Door::First(Some(BROADCAST)), stranger(everybody), unknown),
        ("the uplink, to a group", Door::First(Some(ALL_HOSTS)), stranger(group), unknown),
        ("a second uplink, in segments", Door::SecondInSegments, stranger(SECOND), unknown),
        ("a tunnel without Ethernet", Door::Tun, stranger(victim), unknown),
        ("a pod", Door::Pod, vxlan(pods_own, victim), pod),
        ("a pod, to its gateway", Door::Pod, vxlan(pods_own, stage.address(1, 1)), pod),
        ("a pod, in segments", Door::PodInSegments, vxlan(pods_own, victim), pod),
        ("a pod, in a peer's name", Door::Pod, vxlan(peer, victim), pod),
    ]
}

fn arrived(stage: &Stage) -> usize {
    let frames = stage.at_destination.drain().unwrap();
    frames.iter().filter(|frame| frame.ends_with(MARK)).count()
}

/// Waits until the agent has seen every interface.
fn wait_for_programs(stage: &Stage, doors: &Doors) {
    let attempts = attempts(stage);
    for (what, door, outer, reason) in &attempts {
        wait_for(what, PATIENCE, || {
            let before = stage.counters()[1].clone();
            go_through(stage, doors, *door, outer);
            (stage.counters()[1].since(&before).get(reason) == 1).then_some(())
        })
        .unwrap();
    }
}

#[test]
fn vxlan_by_other_interfaces_for_other_addresses_and_from_pods_delivers_nothing() {
    let mut stage = Stage::set(&["--gate=open"]);
    stage.warm_up();
    let doors = Doors::open(&stage);
    wait_for_programs(&stage, &doors);
    arrived(&stage);
    for (what, door, outer, reason) in attempts(&stage) {
        let before = stage.counters()[1].clone();
        go_through(&stage, &doors, door, &outer);
        stage.ping();
        assert_eq!(arrived(&stage), 0, "{what}");
        let counted = stage.counters()[1].since(&before);
        assert_eq!(counted.get(reason), 1, "{what}: {counted:?}");
    }
    // A peer that comes by any of them is a peer all the same.
    let honest = stage.encapsulated(&stage.datagram(MARK).bytes()).packet().bytes();
    for door in [Door::Second(None), Door::Tagged(1), Door::Tun] {
        go_through(&stage, &doors, door, &honest);
        stage.at_destination.until("a peer's packet", PATIENCE, |frame| frame.ends_with(MARK)).unwrap();
    }
    // Each of them was a way in: the kernel alone takes them all, as flannel's node does.
    stage.restart(&["--datapath=kernel"]);
    stage.ping();
    arrived(&stage);
    for (what, door, outer, _) in attempts(&stage) {
        go_through(&stage, &doors, door, &outer);
        let there = |frame: &[u8]| frame.ends_with(MARK);
        let waited = stage.at_destination.until(what, Duration::from_secs(2), there);
        assert!(waited.is_ok(), "{what}: not even the kernel lets it in");
    }
}
