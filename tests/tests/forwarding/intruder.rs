//! Who may send: VXLAN from a host that is no peer, and frames that no honest one would send.

mod hostile;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use loden_tests::{
    capture::Capture,
    counters::Counters,
    each_family,
    family::Family,
    netns::Netns,
    packet::{self, Ipv4, Ipv6, Packet as _, Vxlan},
    process::wait_for,
    traffic::{
        ping,
        stream::{self, Until},
    },
};

use self::hostile::{Generator, Hostile, MARK, Odd, is_hostile, number};
use crate::stage::{OPEN_PORT, PATIENCE, Stage, mac_of, pod_mac};

each_family!(
    only_peers_send_into_pods_and_only_from_their_own_subnets,
    a_hundred_thousand_hostile_frames_deliver_nothing_that_is_not_allowed_and_disturb_no_stream,
);

/// Enough of a frame to hold the mark, also where an error quotes it.
const HEAD: usize = 512;
const FRAMES: u32 = 100_000;
/// Of them, those of a pod.
const OF_POD: u32 = 20_000;

/// A host on the underlay that has no lease.
struct Intruder<F: Family> {
    socket: Capture,
    address: F::Address,
    netns: Netns,
}

impl<F: Family> Intruder<F> {
    fn plug(stage: &Stage<F>) -> Self {
        let netns = Netns::create("intruder").unwrap();
        let underlay = stage.cluster.underlay();
        underlay.plug(&netns, 66).unwrap();
        Self { socket: Capture::open(&netns, "eth0").unwrap(), address: F::on_underlay(underlay, 66), netns }
    }

    /// Sends an outer packet to the second node.
    fn send(&self, to: packet::Mac, outer: &[u8]) {
        self.socket.send(&packet::ethernet(to, mac_of(&self.netns, "eth0"), F::ETHER_TYPE, outer)).unwrap();
    }
}

/// The hostile frames that reached a pod, as far as their mark.
fn delivered<F: Family>(stage: &Stage<F>) -> Vec<Vec<u8>> {
    let pods = [&stage.at_sender, &stage.at_neighbour, &stage.at_destination];
    let mut frames: Vec<_> = pods.iter().flat_map(|pod| pod.drain_heads(HEAD).unwrap()).collect();
    frames.retain(|frame| is_hostile(frame));
    frames
}

/// One packet from a pod of this node to that of the second, in a tunnel of its own family and in the other's.
fn through<Inner: Family, Outer: Family>(stage: &Stage<Ipv6>, from: usize) -> Vxlan<Outer> {
    let pods = [&stage.sender, &stage.destination].map(Inner::of);
    let inner = Inner::udp(Inner::in_subnet_of(pods[from], 9), pods[1], (5555, OPEN_PORT), MARK).bytes();
    let mac = |n: usize| mac_of(stage.cluster.nodes[n].netns(), Outer::DEVICE);
    let frame = packet::ethernet(mac(1), mac(0), Inner::ETHER_TYPE, &inner);
    let [source, destination] = [0, 1].map(|n| Outer::of_node(&stage.cluster, n));
    Vxlan { source, destination, ports: (40_000, 8472), flags: 0x0800_0000, vni: 1, frame }
}

/// A family's pods are looked for in its own tunnel alone: the other's would be a way round every check of the source.
#[test]
fn a_pods_name_in_the_other_familys_tunnel_is_forged_whosever_it_is() {
    let stage = Stage::<Ipv6>::set(&["--gate=open"]);
    stage.warm_up();
    let intruder = Intruder::plug(&stage);
    let [victim, own] = [stage.cluster.nodes[1].netns(), &intruder.netns].map(|netns| mac_of(netns, "eth0"));
    let send = |ether_type, outer: &[u8]| {
        intruder.socket.send(&packet::ethernet(victim, own, ether_type, outer)).unwrap();
        stage.ping();
        delivered(&stage).len()
    };
    for node in [0, 1] {
        for (what, ether_type, outer) in [
            ("IPv4 in IPv6", packet::IPV6, through::<Ipv4, Ipv6>(&stage, node).packet().bytes()),
            ("the same, padded", packet::IPV6, through::<Ipv4, Ipv6>(&stage, node).packet().padded().bytes()),
            ("IPv6 in IPv4", packet::IPV4, through::<Ipv6, Ipv4>(&stage, node).packet().bytes()),
            ("the same, padded", packet::IPV4, through::<Ipv6, Ipv4>(&stage, node).packet().padded().bytes()),
        ] {
            let before = stage.counters()[1].clone();
            assert_eq!(send(ether_type, &outer), 0, "{what}, from a pod of node {node}");
            let counted = stage.counters()[1].since(&before);
            assert_eq!(counted.get("drop_forged_peer_source"), 1, "{what}: {counted:?}");
        }
    }
    assert_eq!(send(packet::IPV6, &through::<Ipv6, Ipv6>(&stage, 0).packet().bytes()), 1, "the peer's own");
    assert_eq!(send(packet::IPV4, &through::<Ipv4, Ipv4>(&stage, 0).packet().bytes()), 1, "the peer's own");
}

fn only_peers_send_into_pods_and_only_from_their_own_subnets<F: Family>() {
    let stage = Stage::<F>::set(&["--gate=open"]);
    stage.warm_up();
    let intruder = Intruder::plug(&stage);
    let victim = mac_of(stage.cluster.nodes[1].netns(), "eth0");
    let inner = |source| stage.datagram(MARK).from(source).bytes();
    let [sender, destination] = stage.ends;
    let honest = stage.encapsulated(&inner(sender));
    let own = Vxlan { source: intruder.address, ..honest.clone() };
    let forged_from = |source| stage.encapsulated(&inner(source));
    let forged = forged_from(destination).packet();
    let mut lying = forged.clone();
    lying.payload_mut().extend([0; 4]);
    let frame = forged_from(destination).frame;
    let tagged = [&frame[..12], &[0x81, 0, 0, 0], &frame[12..]].concat();
    let (stranger, liar) = ("drop_unknown_vtep", "drop_forged_peer_source");
    // Each outer packet, and the reason that the second node must count for it.
    let attempts: Vec<(&str, F, &str)> = vec![
        ("from no peer", own.packet(), stranger),
        ("from no peer, with a checksum", own.packet_with_checksum(), stranger),
        ("from no peer, without", own.packet_without_checksum(), stranger),
        ("from no peer, with options", own.packet().padded(), stranger),
        ("from no peer, the first fragment", own.packet().fragments(48).remove(0), stranger),
        ("from no peer, a group policy", Vxlan { flags: 0x8800_0001, ..own.clone() }.packet(), stranger),
        (
            "from no peer, another MAC inside",
            Vxlan { frame: [&[2; 6], &own.frame[6..]].concat(), ..own.clone() }.packet(),
            stranger,
        ),
        ("from no peer, a foreign VNI", Vxlan { vni: 7, ..own }.packet(), "pass_wire_vni"),
        ("in a peer's name, a foreign VNI", Vxlan { vni: 7, ..honest }.packet(), "pass_wire_vni"),
        ("in a peer's name, from a pod of the victim", forged.clone(), liar),
        ("in a peer's name, from the victim's gateway", forged_from(stage.address(1, 1)).packet(), liar),
        ("in a peer's name, hidden behind options", forged.clone().padded(), liar),
        ("in a peer's name, hidden in a fragment", forged.fragments(56).remove(0), liar),
        ("in a peer's name, hidden in a small fragment", forged.fragments(40).remove(0), liar),
        ("in a peer's name, hidden behind a wrong length", lying, liar),
        ("in a peer's name, hidden behind a tag", stage.encapsulated_frame(tagged).packet(), liar),
        (
            "in the victim's own name",
            Vxlan { source: stage.node(1), ..forged_from(sender) }.packet(),
            stranger,
        ),
    ];
    for (what, outer, reason) in attempts {
        let before = stage.counters()[1].clone();
        intruder.send(victim, &outer.bytes());
        // What comes after it has overtaken nothing: everything here runs on one CPU.
        stage.ping();
        assert_eq!(delivered(&stage), Vec::<Vec<u8>>::new(), "{what}");
        let counted = stage.counters()[1].since(&before);
        assert_eq!(counted.get(reason), 1, "{what}: {counted:?}");
    }
}

/// Frames between two looks at the pods.
const BATCH: u32 = 500;

/// A flood, and what came of it.
struct Flood {
    sent: BTreeSet<u32>,
    allowed: BTreeSet<u32>,
    arrived: BTreeSet<u32>,
}

impl Flood {
    /// Sends so many packets and watches every pod.
    fn send<F: Odd>(
        stage: &Stage<F>,
        frames: u32,
        mut hostile: impl FnMut() -> Hostile,
        mut send: impl FnMut(&[u8]),
    ) -> Self {
        let mut flood = Self { sent: BTreeSet::new(), allowed: BTreeSet::new(), arrived: BTreeSet::new() };
        for n in 0..frames {
            let hostile = hostile();
            flood.sent.insert(hostile.number);
            if hostile.allowed {
                flood.allowed.insert(hostile.number);
            }
            send(&hostile.packet);
            if n % BATCH == 0 {
                flood.watch(stage);
            }
        }
        flood.watch(stage);
        flood
    }

    fn watch<F: Family>(&mut self, stage: &Stage<F>) {
        self.arrived.extend(delivered(stage).iter().map(|frame| number(frame)));
    }

    /// The generator is worth something, and of these classes at least as many are counted as may not arrive.
    fn assert_counted(&self, counted: &Counters, classes: &[&str]) {
        assert!(self.arrived.len() > 100, "{} arrived", self.arrived.len());
        let refused = counted.iter().filter(|(name, _)| classes.iter().any(|class| name.starts_with(class)));
        let refused: u64 = refused.map(|(_, packets)| packets).sum();
        let forbidden = (self.sent.len() - self.allowed.len()) as u64;
        assert!(refused >= forbidden, "{refused} of {forbidden} are counted: {counted:?}");
    }
}

/// Nothing arrived that may not. What the first flood sent may come when the second has begun.
fn assert_only_allowed(floods: [&Flood; 2]) {
    let allowed = |number: &u32| floods.iter().any(|flood| flood.allowed.contains(number));
    let arrived = floods.iter().flat_map(|flood| &flood.arrived);
    let forbidden: Vec<_> = arrived.filter(|number| !allowed(number)).collect();
    assert!(forbidden.is_empty(), "{} arrived: {forbidden:?}", forbidden.len());
}

/// Who is behind each address, by interface, as a namespace has learnt it or was told; nobody where it asks in vain.
fn neighbours<F: Family>(netns: &Netns) -> BTreeMap<(String, String), Option<String>> {
    let family = if F::BITS == 32 { 4 } else { 6 };
    let shown = netns.ip(&format!("-json -{family} neighbour show")).unwrap();
    let shown: Vec<serde_json::Value> = serde_json::from_str(&shown).unwrap();
    let text = |it: &serde_json::Value, name: &str| it[name].as_str().map(str::to_owned);
    let known = |it| (text(it, "dev").unwrap(), text(it, "dst").unwrap());
    shown.iter().map(|it| (known(it), text(it, "lladdr"))).collect()
}

/// The neighbours of nodes and pods.
fn all_neighbours<F: Family>(stage: &Stage<F>) -> Vec<BTreeMap<(String, String), Option<String>>> {
    let nodes = stage.cluster.nodes.iter().map(|node| node.netns());
    let pods = [&stage.sender, &stage.neighbour, &stage.destination].map(|pod| pod.netns());
    nodes.chain(pods).map(neighbours::<F>).collect()
}

/// Nobody is thought to be behind another MAC than before, and few strangers are thought to be anywhere.
fn assert_neighbours_are<F: Family>(stage: &Stage<F>, before: &[BTreeMap<(String, String), Option<String>>]) {
    for (before, after) in before.iter().zip(all_neighbours(stage)) {
        let moved = |(of, mac): &(&(String, String), &Option<String>)| {
            mac.is_some() && after.get(*of).is_some_and(|now| now != *mac)
        };
        let moved: Vec<_> = before.iter().filter(moved).collect();
        assert!(moved.is_empty(), "{moved:?} were before, and now there are {after:?}");
        // The kernel keeps 1024 of all namespaces together, by default (gc_thresh3).
        assert!(after.len() < before.len() + 32, "{after:?}");
    }
}

fn a_hundred_thousand_hostile_frames_deliver_nothing_that_is_not_allowed_and_disturb_no_stream<F: Odd>() {
    let stage = Stage::<F>::set(&["--gate=open"]);
    stage.warm_up();
    let intruder = Intruder::plug(&stage);
    let victim = mac_of(stage.cluster.nodes[1].netns(), "eth0");
    let own = mac_of(&intruder.netns, "eth0");
    let mut generator = Generator::new(&stage, intruder.address);
    let (before, known) = (stage.counters(), all_neighbours(&stage));
    let (outer, of_pod, stream) = std::thread::scope(|scope| {
        let [from, to] = stage.hosts();
        let running = scope.spawn(move || stream::run(from, to, None, Until::Time(Duration::from_secs(4))));
        let send = |outer: &[u8]| {
            intruder.socket.send(&packet::ethernet(victim, own, F::ETHER_TYPE, outer)).unwrap();
        };
        let outer = Flood::send(&stage, FRAMES - OF_POD, || generator.outer(), send);
        let (gateway, pod) = (stage.gateway_mac(0), pod_mac(&stage.sender));
        let send = |packet: &[u8]| {
            stage.at_sender.send(&packet::ethernet(gateway, pod, F::ETHER_TYPE, packet)).unwrap();
        };
        let of_pod = Flood::send(&stage, OF_POD, || generator.of_pod(), send);
        (outer, of_pod, running.join().unwrap().unwrap())
    });
    // Whatever the machine is busy with: an answer must come, and from then on each.
    let answers = || ping(stage.sender.netns(), stage.ends[1], 1).ok();
    wait_for("an answer after the flood", PATIENCE, answers)
        .unwrap_or_else(|error| panic!("{error:#}: {:#?}", all_neighbours(&stage)));
    let after = stage.counters();
    let counted = [0, 1].map(|i| after[i].since(&before[i]));
    assert_only_allowed([&outer, &of_pod]);
    outer.assert_counted(&counted[1], &["drop_", "pass_wire_"]);
    of_pod.assert_counted(&counted[0], &["drop_", "pass_pod_"]);
    // Every kind of refusal was met.
    for (node, reason) in [
        (1, "drop_unknown_vtep"),
        (1, "drop_forged_peer_source"),
        (1, "pass_wire_vni"),
        (1, "pass_wire_flags"),
        (1, "pass_wire_outer"),
        (0, "drop_pod_vxlan"),
        (0, "drop_forged_pod_source"),
    ] {
        assert!(counted[node].get(reason) > 500, "{reason}: {:?}", counted[node]);
    }
    assert_eq!(stream.source, stage.hosts()[0].address);
    assert!(stream.bytes > 10_000_000, "{stream:?}");
    // And nothing is broken.
    assert_neighbours_are(&stage, &known);
    stream::run(stage.hosts()[0], stage.hosts()[1], None, Until::Bytes(20_000_000)).unwrap();
    ping(stage.destination.netns(), stage.ends[0], 3).unwrap();
}
