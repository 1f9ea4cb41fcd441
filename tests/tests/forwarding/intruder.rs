//! Who may send: VXLAN from a host that is no peer, and frames that no honest one would send.

use std::{collections::BTreeSet, net::Ipv4Addr, time::Duration};

use loden_tests::{
    capture::Capture,
    netns::Netns,
    packet::{self, ETHERNET_LEN, Ipv4, Vxlan},
    traffic::stream::{self, Until},
};

use crate::{
    family::{Family, each_family},
    stage::{OPEN_PORT, Stage, mac_of},
};

each_family!(only_peers_send_into_pods_and_only_from_their_own_subnets);

/// What marks a hostile packet inside, before its number.
const MARK: &[u8] = b"hostile!";
/// Enough of a frame to hold the mark, also where an error quotes it.
const HEAD: usize = 256;
const FRAMES: u32 = 100_000;

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

fn is_hostile(frame: &[u8]) -> bool {
    frame.windows(MARK.len()).any(|part| part == MARK)
}

/// The hostile frames that reached a pod, as far as their mark.
fn delivered<F: Family>(stage: &Stage<F>) -> Vec<Vec<u8>> {
    let pods = [&stage.at_sender, &stage.at_neighbour, &stage.at_destination];
    let mut frames: Vec<_> = pods.iter().flat_map(|pod| pod.drain_heads(HEAD).unwrap()).collect();
    frames.retain(|frame| is_hostile(frame));
    frames
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

/// What a family has that no honest packet would show.
trait Odd: Family {
    /// Sources and an outer source that are no pod's and no peer's.
    fn sources() -> Vec<Self::Address>;
    /// An address that nobody has.
    fn stranger() -> Self::Address;
    /// Writes what the family's own header fields may say.
    fn disturb(&mut self, random: &mut Random);
}

impl Odd for Ipv4 {
    fn sources() -> Vec<Ipv4Addr> {
        vec![[10, 5, 250, 9].into(), Ipv4Addr::LOCALHOST, Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST]
    }

    fn stranger() -> Ipv4Addr {
        [198, 51, 100, 1].into()
    }

    fn disturb(&mut self, random: &mut Random) {
        self.fragment = random.of(&[0, 0, 0, packet::DONT_FRAGMENT, packet::MORE_FRAGMENTS, 5]);
        self.options = random.of(&[vec![], vec![], vec![], vec![1; 8]]);
    }
}

fn hostile<F: Odd>(
    stage: &Stage<F>,
    intruder: &Intruder<F>,
    honest: &Vxlan<F>,
    number: u32,
    random: &mut Random,
) -> Hostile {
    let [peer, victim] = [0, 1].map(|n| stage.node(n));
    let [sender, pod] = stage.ends;
    let own = [sender, pod, stage.address(1, 1), stage.address(0, 200)];
    let source = random.of(&[&own[..], &F::sources()].concat());
    let destination = random.of(&[pod, sender, stage.address(1, 255), stage.address(1, 1)]);
    let data = [MARK, &number.to_be_bytes(), &vec![0xee; random.next() as usize % 200]].concat();
    let inner = match random.next() % 3 {
        0 => F::tcp(source, destination, (1, 2), random.next() as u8, &data),
        1 => F::icmp(source, destination, (random.of(&[0, 3, F::ECHO]), 0), 0, &data),
        _ => F::udp(source, destination, (1, OPEN_PORT), &data),
    };
    let mut inner = inner.class(random.next() as u8).hops(random.of(&[0, 1, 2, 64]));
    inner.disturb(random);
    let mut bytes = inner.bytes();
    // Any byte of the headers may be damaged, but not addresses: the oracle goes by these.
    if random.next().is_multiple_of(4) {
        let at = random.next() as usize % (F::HEADER_LEN - 2 * usize::from(F::BITS / 8));
        bytes[at] ^= 1 << (random.next() % 8);
    }
    let outsider = F::on_underlay(stage.cluster.underlay(), 5);
    let from = random.of(&[intruder.address, peer, victim, outsider, F::stranger()]);
    let flags = random.of(&[0x0800_0000, 0x0800_0000, 0, 0x8800_0000, 0x0c00_0001]);
    let vni = random.of(&[1, 1, 1, 0, 2, 0x00ff_ffff]);
    let frame = [&honest.frame[..ETHERNET_LEN], &bytes].concat();
    let outer = Vxlan { source: from, flags, vni, frame, ..honest.clone() };
    let outer =
        if random.next().is_multiple_of(8) { outer.packet_without_checksum() } else { outer.packet() };
    let mut outer = outer.class(random.next() as u8);
    if random.next().is_multiple_of(4) {
        outer = outer.padded();
    }
    if random.next().is_multiple_of(8) {
        // A length that lies.
        let length = &mut outer.payload_mut()[5];
        *length = length.wrapping_add(random.next() as u8);
    }
    let mut outer = outer.bytes();
    if random.next().is_multiple_of(8) {
        outer.truncate(F::HEADER_LEN + random.next() as usize % (outer.len() - F::HEADER_LEN));
    }
    // What lies in nobody's subnet may be a client that the peer forwards for: the kernel decides.
    let others = [pod, stage.address(1, 1)].contains(&source);
    Hostile { outer, allowed: from == peer && vni == 1 && flags == 0x0800_0000 && !others }
}

#[test]
fn a_hundred_thousand_hostile_frames_deliver_nothing_that_is_not_allowed_and_disturb_no_stream() {
    hostile_frames::<Ipv4>();
}

fn hostile_frames<F: Odd>() {
    let stage = Stage::<F>::set(&["--gate=open"]);
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
        let [from, to] = stage.hosts();
        let running = scope.spawn(move || stream::run(from, to, None, Until::Time(Duration::from_secs(4))));
        for n in 0..FRAMES {
            let hostile = hostile(&stage, &intruder, &honest, n, &mut random);
            if hostile.allowed {
                allowed.insert(n);
            }
            intruder.socket.send(&packet::ethernet(victim, own, F::ETHER_TYPE, &hostile.outer)).unwrap();
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
    assert_eq!(stream.source, stage.hosts()[0].address);
    assert!(stream.bytes > 10_000_000, "{stream:?}");
    // And nothing is broken.
    stream::run(stage.hosts()[0], stage.hosts()[1], None, Until::Bytes(20_000_000)).unwrap();
}
