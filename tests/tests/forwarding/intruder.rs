//! Who may send: VXLAN from a host that is no peer, and frames that no honest one would send.

use std::{collections::BTreeSet, net::Ipv4Addr, time::Duration};

use loden_tests::{
    capture::Capture,
    netns::Netns,
    packet::{self, ETHERNET_LEN, Ipv4, Vxlan},
    traffic::stream::{self, Until},
};

use crate::stage::{Stage, mac_of};

/// What marks a hostile packet inside, before its number.
const MARK: &[u8] = b"hostile!";
/// Enough of a frame to hold the mark, also where an error quotes it.
const HEAD: usize = 256;
const FRAMES: u32 = 100_000;

/// A host on the underlay that has no lease.
struct Intruder {
    socket: Capture,
    address: Ipv4Addr,
    netns: Netns,
}

impl Intruder {
    fn plug(stage: &Stage) -> Self {
        let netns = Netns::create("intruder").unwrap();
        let address = stage.cluster.underlay().plug(&netns, 66).unwrap();
        Self { socket: Capture::open(&netns, "eth0").unwrap(), address, netns }
    }

    /// Sends an outer packet to the second node.
    fn send(&self, to: packet::Mac, outer: &[u8]) {
        self.socket.send(&packet::ethernet(to, mac_of(&self.netns, "eth0"), packet::IPV4, outer)).unwrap();
    }
}

fn is_hostile(frame: &[u8]) -> bool {
    frame.windows(MARK.len()).any(|part| part == MARK)
}

/// The hostile frames that reached a pod, as far as their mark.
fn delivered(stage: &Stage) -> Vec<Vec<u8>> {
    let pods = [&stage.at_sender, &stage.at_neighbour, &stage.at_destination];
    let mut frames: Vec<_> = pods.iter().flat_map(|pod| pod.drain_heads(HEAD).unwrap()).collect();
    frames.retain(|frame| is_hostile(frame));
    frames
}

#[test]
fn only_peers_send_into_pods_and_only_from_their_own_subnets() {
    let stage = Stage::set(&["--gate=open"]);
    stage.warm_up();
    let intruder = Intruder::plug(&stage);
    let victim = mac_of(stage.cluster.nodes[1].netns(), "eth0");
    let inner = |source| Ipv4 { source, ..stage.datagram(MARK) }.bytes();
    let honest = stage.encapsulated(&inner(stage.sender.address()));
    let own = Vxlan { source: intruder.address, ..honest.clone() };
    let from = |source| stage.encapsulated(&inner(source));
    let mut bare = own.packet();
    bare.options = vec![1; 4];
    let forged = from(stage.destination.address()).packet();
    let mut lying = forged.clone();
    lying.payload.extend([0; 4]);
    let frame = from(stage.destination.address()).frame;
    let tagged = [&frame[..12], &[0x81, 0, 0, 0], &frame[12..]].concat();
    // Each outer packet, and the reason that the second node must count for it.
    let attempts: Vec<(&str, Ipv4, &str)> = vec![
        ("from no peer", own.packet(), "drop_unknown_vtep"),
        ("from no peer, with a checksum", own.packet_with_checksum(), "drop_unknown_vtep"),
        ("from no peer, with IP options", bare, "drop_unknown_vtep"),
        ("from no peer, the first fragment", own.packet().fragments(48).remove(0), "drop_unknown_vtep"),
        (
            "from no peer, a group policy",
            Vxlan { flags: 0x8800_0001, ..own.clone() }.packet(),
            "drop_unknown_vtep",
        ),
        (
            "from no peer, another MAC inside",
            Vxlan { frame: [&[2; 6], &own.frame[6..]].concat(), ..own.clone() }.packet(),
            "drop_unknown_vtep",
        ),
        ("from no peer, a foreign VNI", Vxlan { vni: 7, ..own }.packet(), "pass_wire_vni"),
        ("in a peer's name, a foreign VNI", Vxlan { vni: 7, ..honest }.packet(), "pass_wire_vni"),
        (
            "in a peer's name, from a pod of the victim",
            from(stage.destination.address()).packet(),
            "drop_forged_peer_source",
        ),
        (
            "in a peer's name, from the victim's gateway",
            from(stage.address(1, 1)).packet(),
            "drop_forged_peer_source",
        ),
        (
            "in a peer's name, hidden behind IP options",
            Ipv4 { options: vec![1; 4], ..forged.clone() },
            "drop_forged_peer_source",
        ),
        ("in a peer's name, hidden in a fragment", forged.fragments(48).remove(0), "drop_forged_peer_source"),
        (
            "in a peer's name, hidden in a small fragment",
            forged.fragments(40).remove(0),
            "drop_forged_peer_source",
        ),
        ("in a peer's name, hidden behind a wrong length", lying, "drop_forged_peer_source"),
        (
            "in a peer's name, hidden behind a tag",
            stage.encapsulated_frame(tagged).packet(),
            "drop_forged_peer_source",
        ),
        (
            "in the victim's own name",
            Vxlan { source: stage.cluster.nodes[1].address(), ..from(stage.sender.address()) }.packet(),
            "drop_unknown_vtep",
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

/// xorshift64*: repeatable, and no crate for it.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
    }

    fn of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.next() as usize % choices.len()].clone()
    }
}

/// One hostile packet: what was sent, and whether the rules allow that a pod gets it.
struct Hostile {
    outer: Vec<u8>,
    allowed: bool,
}

fn hostile(stage: &Stage, intruder: &Intruder, honest: &Vxlan, number: u32, random: &mut Random) -> Hostile {
    let [peer, victim] = [0, 1].map(|i: usize| stage.cluster.nodes[i].address());
    let sources = [
        stage.sender.address(),
        stage.destination.address(),
        stage.address(1, 1),
        stage.address(0, 200),
        Ipv4Addr::new(10, 5, 250, 9),
        Ipv4Addr::LOCALHOST,
        Ipv4Addr::UNSPECIFIED,
        Ipv4Addr::BROADCAST,
    ];
    let source = random.of(&sources);
    let destination = random.of(&[
        stage.destination.address(),
        stage.sender.address(),
        stage.address(1, 255),
        stage.address(1, 1),
    ]);
    let data = [MARK, &number.to_be_bytes(), &vec![0xee; random.next() as usize % 200]].concat();
    let mut inner = match random.next() % 3 {
        0 => Ipv4::tcp(source, destination, (1, 2), random.next() as u8, &data),
        1 => Ipv4::icmp(source, destination, (random.of(&[0, 3, 8]), 0), 0, &data),
        _ => Ipv4::udp(source, destination, (1, 7777), &data),
    };
    inner.tos = random.next() as u8;
    inner.ttl = random.of(&[0, 1, 2, 64]);
    inner.fragment = random.of(&[0, 0, 0, packet::DONT_FRAGMENT, packet::MORE_FRAGMENTS, 5]);
    inner.options = random.of(&[vec![], vec![], vec![], vec![1; 8]]);
    let mut bytes = inner.bytes();
    // Any byte of the headers may be damaged, but not addresses: the oracle goes by these.
    if random.next().is_multiple_of(4) {
        let at = random.next() as usize % 12;
        bytes[at] ^= 1 << (random.next() % 8);
    }
    let from = random.of(&[
        intruder.address,
        peer,
        victim,
        Ipv4Addr::new(192, 168, 64, 5),
        Ipv4Addr::new(198, 51, 100, 1),
    ]);
    let flags = random.of(&[0x0800_0000, 0x0800_0000, 0, 0x8800_0000, 0x0c00_0001]);
    let vni = random.of(&[1, 1, 1, 0, 2, 0x00ff_ffff]);
    let mut outer = Vxlan {
        source: from,
        flags,
        vni,
        frame: [&honest.frame[..ETHERNET_LEN], &bytes].concat(),
        ..honest.clone()
    }
    .packet();
    outer.tos = random.next() as u8;
    outer.options = random.of(&[vec![], vec![], vec![], vec![1; 4]]);
    if random.next().is_multiple_of(8) {
        // A length that lies.
        outer.payload[5] = outer.payload[5].wrapping_add(random.next() as u8);
    }
    let mut outer = outer.bytes();
    if random.next().is_multiple_of(8) {
        outer.truncate(20 + random.next() as usize % (outer.len() - 20));
    }
    // What lies in nobody's subnet may be a client that the peer forwards for: the kernel decides.
    let others = source.octets()[..3] == stage.destination.address().octets()[..3];
    Hostile { outer, allowed: from == peer && vni == 1 && flags == 0x0800_0000 && !others }
}

#[test]
fn a_hundred_thousand_hostile_frames_deliver_nothing_that_is_not_allowed_and_disturb_no_stream() {
    let stage = Stage::set(&["--gate=open"]);
    stage.warm_up();
    let intruder = Intruder::plug(&stage);
    let victim = mac_of(stage.cluster.nodes[1].netns(), "eth0");
    let own = mac_of(&intruder.netns, "eth0");
    let mut random = Random(0x10de_4c44);
    let honest = stage.encapsulated(&[]);
    let (mut allowed, mut arrived) = (BTreeSet::new(), BTreeSet::new());
    let before = stage.counters()[1].clone();
    let number = |frame: &[u8]| {
        let at = frame.windows(MARK.len()).position(|part| part == MARK).unwrap() + MARK.len();
        u32::from_be_bytes(frame[at..at + 4].try_into().unwrap())
    };
    let stream = std::thread::scope(|scope| {
        let (from, to) = (stage.sender.host(), stage.destination.host());
        let running = scope.spawn(move || stream::run(from, to, None, Until::Time(Duration::from_secs(4))));
        for n in 0..FRAMES {
            let hostile = hostile(&stage, &intruder, &honest, n, &mut random);
            if hostile.allowed {
                allowed.insert(n);
            }
            intruder.socket.send(&packet::ethernet(victim, own, packet::IPV4, &hostile.outer)).unwrap();
            if n % 1000 == 0 {
                arrived
                    .extend(delivered(&stage).iter().filter(|f| f.len() > ETHERNET_LEN).map(|f| number(f)));
            }
        }
        running.join().unwrap().unwrap()
    });
    stage.ping();
    arrived.extend(delivered(&stage).iter().map(|frame| number(frame)));
    let forbidden: Vec<_> = arrived.difference(&allowed).collect();
    assert!(forbidden.is_empty(), "{} of {} that arrived: {forbidden:?}", forbidden.len(), arrived.len());
    // The generator is worth something: a good part passes, and every kind of refusal was met.
    assert!(arrived.len() > 100, "{} arrived", arrived.len());
    let counted = stage.counters()[1].since(&before);
    for reason in [
        "drop_unknown_vtep",
        "drop_forged_peer_source",
        "pass_wire_vni",
        "pass_wire_flags",
        "pass_wire_outer",
    ] {
        assert!(counted.get(reason) > 500, "{reason}: {counted:?}");
    }
    assert_eq!(stream.source, stage.sender.address());
    assert!(stream.bytes > 10_000_000, "{stream:?}");
    // And nothing is broken.
    stream::run(stage.sender.host(), stage.destination.host(), None, Until::Bytes(20_000_000)).unwrap();
}
