//! The kernel's VXLAN socket takes packets at every interface, for every address of the host, and from pods: each way is
//! tried, with the programs and, to see that it is one, without them.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket},
    time::Duration,
};

use loden_tests::{
    capture::Capture,
    counters::Counters,
    each_family,
    family::Family,
    netns::{Netns, join},
    packet::{self, Ipv4, Ipv6, Mac, Vxlan},
    process::wait_for,
    tap::Tap,
};
use nix::sys::socket::{setsockopt, sockopt::UdpGsoSegment};

use crate::stage::{PATIENCE, Stage, mac_of};

each_family!(vxlan_by_other_interfaces_for_other_addresses_and_from_pods_delivers_nothing);

/// What marks a packet inside.
const MARK: &[u8] = b"by the back door";

/// A family's ways of reaching a host without its address.
trait Reach: Family {
    /// Addresses for many that a host listens to, each with the MAC for it.
    fn for_many() -> Vec<(&'static str, Self::Address, Mac)>;
    /// Who has no address.
    fn unspecified() -> Self::Address;
    /// An address for all of a segment, or for whoever routes it: of this address's.
    fn of_segment(address: Self::Address) -> Self::Address;
}

impl Reach for Ipv4 {
    /// All, and a group that every host is in (RFC 1112).
    fn for_many() -> Vec<(&'static str, Ipv4Addr, Mac)> {
        vec![
            ("all", Ipv4Addr::BROADCAST, [0xff; 6]),
            ("a group", [224, 0, 0, 1].into(), [1, 0, 0x5e, 0, 0, 1]),
        ]
    }

    fn unspecified() -> Ipv4Addr {
        Ipv4Addr::UNSPECIFIED
    }

    fn of_segment(address: Ipv4Addr) -> Ipv4Addr {
        Self::in_subnet_of(address, 255)
    }
}

impl Reach for Ipv6 {
    /// Nodes of the link, of the interface's own scope too, and routers, which every node is (RFC 4291, section 2.7.1).
    fn for_many() -> Vec<(&'static str, Ipv6Addr, Mac)> {
        vec![
            ("all nodes", [0xff02, 0, 0, 0, 0, 0, 0, 1].into(), [0x33, 0x33, 0, 0, 0, 1]),
            ("all routers", [0xff02, 0, 0, 0, 0, 0, 0, 2].into(), [0x33, 0x33, 0, 0, 0, 2]),
            ("the site's routers", [0xff05, 0, 0, 0, 0, 0, 0, 2].into(), [0x33, 0x33, 0, 0, 0, 2]),
        ]
    }

    fn unspecified() -> Ipv6Addr {
        Ipv6Addr::UNSPECIFIED
    }

    /// The routers' anycast address (RFC 4291, section 2.6.1).
    fn of_segment(address: Ipv6Addr) -> Ipv6Addr {
        Self::in_subnet_of(address, 0)
    }
}

/// One more interface of the second node, of each sort, with somebody behind it.
struct Doors<F: Family> {
    intruder: Netns,
    /// Of the intruder, at the second uplink.
    uplink: Capture,
    tun: Tap,
    /// The second node at its second uplink, and the intruder there.
    second: F::Address,
    stranger: F::Address,
}

impl<F: Family> Doors<F> {
    fn open(stage: &Stage<F>) -> Self {
        let victim = stage.cluster.nodes[1].netns();
        let intruder = Netns::create("intruder").unwrap();
        join(&intruder, "eth0", victim, "eth1").unwrap();
        let [(second, len), (stranger, _)] = [2, 66].map(|host| F::on_segment(1, host));
        victim.ip(&format!("address add {second}/{len} dev eth1")).unwrap();
        intruder.ip(&format!("address add {stranger}/{len} dev eth0")).unwrap();
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
        Self { intruder, uplink, tun, second, stranger }
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

/// Sends what a VXLAN packet has behind its UDP header twice, to there, by one call.
fn send_in_segments<F: Family>(from: &Netns, to: F::Address, packet: &[u8]) {
    let payload = &packet[F::HEADER_LEN + 8..];
    let to: IpAddr = to.into();
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = from.run(|| UdpSocket::bind((any, 0)).unwrap());
    setsockopt(&socket, UdpGsoSegment, &(payload.len() as i32)).unwrap();
    socket.send_to(&payload.repeat(2), (to, 8472)).unwrap();
}

fn go_through<F: Family>(stage: &Stage<F>, doors: &Doors<F>, attempt: &Attempt<F>) {
    let victim = stage.cluster.nodes[1].netns();
    let (eth0, eth1) = (mac_of(victim, "eth0"), mac_of(victim, "eth1"));
    let from = mac_of(&doors.intruder, "eth0");
    let outer = attempt.outer.packet().bytes();
    let frame = |to| packet::ethernet(to, from, F::ETHER_TYPE, &outer);
    match attempt.door {
        Door::First(to) => stage.at_wire[0].send(&frame(to.unwrap_or(eth0))),
        Door::Second(to) => doors.uplink.send(&frame(to.unwrap_or(eth1))),
        Door::Tagged(tags) => {
            let plain = frame(eth1);
            doors.uplink.send(&[&plain[..12], &[0x81, 0, 0, 0].repeat(tags), &plain[12..]].concat())
        }
        Door::Tun => doors.tun.deliver(&outer),
        Door::SecondInSegments => {
            return send_in_segments::<F>(&doors.intruder, attempt.outer.destination, &outer);
        }
        Door::PodInSegments => {
            return send_in_segments::<F>(stage.destination.netns(), attempt.outer.destination, &outer);
        }
        Door::Pod => stage.at_destination.send(&stage.sent_by_destination(&outer)),
    }
    .unwrap();
}

/// What is tried.
struct Attempt<F: Family> {
    what: String,
    door: Door,
    outer: Vxlan<F>,
    /// What the programs must count for it.
    reason: &'static str,
}

fn attempts<F: Reach>(stage: &Stage<F>, doors: &Doors<F>) -> Vec<Attempt<F>> {
    let [peer, victim] = [0, 1].map(|i| stage.node(i));
    let (second, pod) = (doors.second, stage.ends[1]);
    let honest = stage.encapsulated(&stage.datagram(MARK).bytes());
    let mut attempts = Vec::new();
    let mut add = |what: &str, door, source, destination, reason| {
        let outer = Vxlan { source, destination, ..honest.clone() };
        attempts.push(Attempt { what: what.to_owned(), door, outer, reason });
    };
    let unknown = "drop_unknown_vtep";
    let mut strangers = |what: &str, door, destination| add(what, door, doors.stranger, destination, unknown);
    strangers("a second uplink, to the VTEP's address", Door::Second(None), victim);
    strangers("a second uplink, to its own address", Door::Second(None), second);
    strangers("a second uplink, with a priority tag", Door::Tagged(1), victim);
    strangers("a second uplink, with three", Door::Tagged(3), victim);
    strangers("a second uplink, in segments", Door::SecondInSegments, second);
    strangers("a tunnel without Ethernet", Door::Tun, victim);
    strangers("the uplink, to another address", Door::First(None), second);
    let (_, everybody, broadcast) = F::for_many()[0];
    let segment = F::of_segment(second);
    let to_segment = if F::BITS == 32 { Some(broadcast) } else { None };
    strangers("a second uplink, to its segment", Door::Second(to_segment), segment);
    for (what, group, mac) in F::for_many() {
        strangers(&format!("a second uplink, to {what}"), Door::Second(Some(mac)), group);
        strangers(&format!("the uplink, to {what}"), Door::First(Some(mac)), group);
    }
    let nobody = if F::BITS == 32 { F::unspecified() } else { everybody };
    add("a second uplink, from nobody", Door::Second(Some(broadcast)), F::unspecified(), nobody, unknown);
    add("a pod", Door::Pod, pod, victim, "drop_pod_vxlan");
    add("a pod, to its gateway", Door::Pod, pod, stage.address(1, 1), "drop_pod_vxlan");
    add("a pod, in segments", Door::PodInSegments, pod, victim, "drop_pod_vxlan");
    add("a pod, in a peer's name", Door::Pod, peer, victim, "drop_pod_vxlan");
    let of_victim = stage.datagram(MARK).from(stage.address(1, 9)).bytes();
    let forged = stage.encapsulated(&of_victim);
    attempts.push(Attempt {
        what: "a second uplink, in a peer's name, forged".to_owned(),
        door: Door::Second(None),
        outer: forged,
        reason: "drop_forged_peer_source",
    });
    attempts
}

fn arrived<F: Family>(stage: &Stage<F>) -> usize {
    let frames = stage.at_destination.drain().unwrap();
    frames.iter().filter(|frame| frame.ends_with(MARK)).count()
}

/// Waits until the agent has seen every interface.
fn wait_for_programs<F: Reach>(stage: &Stage<F>, doors: &Doors<F>) {
    for attempt in attempts(stage, doors) {
        let mut last = Counters::default();
        wait_for(&attempt.what, PATIENCE, || {
            let before = stage.counters()[1].clone();
            go_through(stage, doors, &attempt);
            last = stage.counters()[1].since(&before);
            (last.get(attempt.reason) == 1).then_some(())
        })
        .unwrap_or_else(|error| panic!("{error:#}: {last:?}"));
    }
}

fn vxlan_by_other_interfaces_for_other_addresses_and_from_pods_delivers_nothing<F: Reach>() {
    let mut stage = Stage::<F>::set(&["--gate=open"]);
    stage.warm_up();
    let doors = Doors::open(&stage);
    wait_for_programs(&stage, &doors);
    arrived(&stage);
    for attempt in attempts(&stage, &doors) {
        let before = stage.counters()[1].clone();
        go_through(&stage, &doors, &attempt);
        stage.ping();
        assert_eq!(arrived(&stage), 0, "{}", attempt.what);
        let counted = stage.counters()[1].since(&before);
        assert_eq!(counted.get(attempt.reason), 1, "{}: {counted:?}", attempt.what);
    }
    // A peer that comes by any of them is a peer all the same.
    let honest = stage.encapsulated(&stage.datagram(MARK).bytes());
    for door in [Door::Second(None), Door::Tagged(1), Door::Tun] {
        let attempt = Attempt { what: "a peer's".to_owned(), door, outer: honest.clone(), reason: "" };
        go_through(&stage, &doors, &attempt);
        stage.at_destination.until("a peer's packet", PATIENCE, |frame| frame.ends_with(MARK)).unwrap();
    }
    // Each of them was a way in: the kernel alone takes them all, as flannel's node does.
    stage.restart(&["--datapath=kernel"]);
    stage.ping();
    arrived(&stage);
    let mut closed = Vec::new();
    for attempt in attempts(&stage, &doors) {
        go_through(&stage, &doors, &attempt);
        let there = |frame: &[u8]| frame.ends_with(MARK);
        if stage.at_destination.until(&attempt.what, Duration::from_secs(2), there).is_err() {
            closed.push(attempt.what);
        }
    }
    assert!(closed.is_empty(), "not even the kernel lets these in: {closed:?}");
}
