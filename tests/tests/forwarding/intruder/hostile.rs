//! Packets that no honest host would send, by chance and of every kind that a family has.

use std::net::{Ipv4Addr, Ipv6Addr};

use loden_tests::{
    family::Family,
    packet::{self, ETHERNET_LEN, Ipv4, Ipv6, Mac, Vxlan},
};

use crate::stage::{OPEN_PORT, Stage};

/// What marks a hostile packet inside, before its number.
pub(super) const MARK: &[u8] = b"hostile!";

pub(super) fn is_hostile(frame: &[u8]) -> bool {
    frame.windows(MARK.len()).any(|part| part == MARK)
}

/// The number of a hostile packet, wherever it is quoted.
pub(super) fn number(frame: &[u8]) -> u32 {
    let at = frame.windows(MARK.len()).position(|part| part == MARK).unwrap() + MARK.len();
    u32::from_be_bytes(frame[at..at + 4].try_into().unwrap())
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

    fn below(&mut self, end: usize) -> usize {
        self.next() as usize % end
    }

    fn one_in(&mut self, n: u32) -> bool {
        self.next().is_multiple_of(n)
    }

    fn of<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())].clone()
    }
}

/// What a family has that no honest packet would show.
pub(super) trait Odd: Family {
    /// Types of the family's ICMP: errors, echoes, and what speaks of neighbours, routers and groups.
    const KINDS: &'static [u8];

    /// Sources and an outer source that are no pod's and no peer's.
    fn sources() -> Vec<Self::Address>;
    /// Destinations that are no host's.
    fn destinations() -> Vec<Self::Address>;
    /// An address that nobody has.
    fn stranger() -> Self::Address;
    /// What follows the first eight bytes of an ICMP message: about `target`, and with `data` somewhere.
    fn message(kind: u8, target: Self::Address, mac: Mac, data: &[u8]) -> Vec<u8>;
    /// Writes what the family's own header fields may say.
    fn disturb(&mut self, choose: &mut Choice<'_>);
}

/// What [`Odd::disturb`] may ask of chance.
pub(super) struct Choice<'a>(&'a mut Random);

impl Choice<'_> {
    fn of<T: Clone>(&mut self, choices: &[T]) -> T {
        self.0.of(choices)
    }
}

impl Odd for Ipv4 {
    /// Replies, unreachable, redirect, request, router advertisement, time exceeded, timestamp (RFC 792, RFC 1256).
    const KINDS: &'static [u8] = &[0, 3, 5, 8, 9, 11, 13];

    fn sources() -> Vec<Ipv4Addr> {
        vec![[10, 5, 250, 9].into(), Ipv4Addr::LOCALHOST, Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST]
    }

    fn destinations() -> Vec<Ipv4Addr> {
        vec![Ipv4Addr::BROADCAST, [224, 0, 0, 1].into()]
    }

    fn stranger() -> Ipv4Addr {
        [198, 51, 100, 1].into()
    }

    fn message(_: u8, _: Ipv4Addr, _: Mac, data: &[u8]) -> Vec<u8> {
        data.to_vec()
    }

    fn disturb(&mut self, choose: &mut Choice<'_>) {
        self.fragment = choose.of(&[0, 0, 0, packet::DONT_FRAGMENT, packet::MORE_FRAGMENTS, 5]);
        self.options = choose.of(&[vec![], vec![], vec![], vec![1; 8]]);
    }
}

impl Odd for Ipv6 {
    /// Unreachable, packet too big, time exceeded, echoes, MLD (RFC 2710), ND (RFC 4861), MLDv2 (RFC 3810).
    const KINDS: &'static [u8] = &[1, 2, 3, 128, 129, 130, 131, 132, 133, 134, 135, 136, 137, 143];

    fn sources() -> Vec<Ipv6Addr> {
        vec![
            [0xfc00, 0, 0, 0xfa, 0, 0, 0, 9].into(),
            Ipv6Addr::LOCALHOST,
            Ipv6Addr::UNSPECIFIED,
            [0xff02, 0, 0, 0, 0, 0, 0, 1].into(),
            [0xfe80, 0, 0, 0, 0, 0, 0, 1].into(),
            Ipv4Addr::new(10, 5, 1, 2).to_ipv6_mapped(),
        ]
    }

    fn destinations() -> Vec<Ipv6Addr> {
        vec![
            [0xff02, 0, 0, 0, 0, 0, 0, 1].into(),
            // Routers, of the site as well: what is forwarded asks for more than what is of one link.
            [0xff05, 0, 0, 0, 0, 0, 0, 2].into(),
            Ipv4Addr::new(10, 5, 1, 2).to_ipv6_mapped(),
        ]
    }

    fn stranger() -> Ipv6Addr {
        [0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into()
    }

    /// Of ND the target, its link-layer address as source's and target's option, and the data as an option that nobody
    /// knows, as RFC 4861 cuts them (section 4.6); of MLDv2 a report of one group; of MLD the group.
    fn message(kind: u8, target: Ipv6Addr, mac: Mac, data: &[u8]) -> Vec<u8> {
        let option = |number, body: &[u8]| {
            let units = (body.len() + 2).div_ceil(8);
            let mut option = vec![number, units as u8];
            option.extend(body);
            option.resize(units * 8, 0);
            option
        };
        let options = [option(1, &mac), option(2, &mac), option(253, data)].concat();
        match kind {
            // Reachable time and retransmission timer; of a redirect the destination, too.
            134 => [vec![0; 8], options].concat(),
            133 => options,
            135 | 136 => [target.octets().to_vec(), options].concat(),
            137 => [target.octets(), target.octets()].concat().into_iter().chain(options).collect(),
            130..=132 => [&target.octets()[..], data].concat(),
            143 => [&[4, 0, 0, 0][..], &target.octets(), data].concat(),
            _ => data.to_vec(),
        }
    }

    fn disturb(&mut self, choose: &mut Choice<'_>) {
        let fragment =
            |word: u16| (packet::FRAGMENT, [&word.to_be_bytes()[..], &[0, 0, 0x4c, 0x44]].concat());
        let options = |number| (number, vec![1, 4, 0, 0, 0, 0]);
        let jumbo = (packet::HOP_BY_HOP, vec![0xc2, 4, 0, 1, 0, 0]);
        self.label = choose.of(&[0, 0, 0x12345, 0xf_ffff]);
        self.extensions = choose.of(&[
            vec![],
            vec![],
            vec![],
            vec![],
            vec![],
            vec![options(packet::HOP_BY_HOP)],
            // Says that the packet has 65 536 bytes (RFC 2675).
            vec![jumbo],
            // Router alert, as MLD has (RFC 2711).
            vec![(packet::HOP_BY_HOP, vec![5, 2, 0, 0, 1, 0])],
            vec![options(packet::DESTINATION_OPTIONS); 9],
            // Type 0 is no longer obeyed (RFC 5095); the addresses in it are none.
            vec![(packet::ROUTING, [&[0, 1, 0, 0, 0, 0][..], &[0xfd; 16]].concat())],
            // Alone, first, later, and one in another.
            vec![fragment(0)],
            vec![fragment(1)],
            vec![fragment(8)],
            vec![fragment(0), fragment(0)],
            vec![options(packet::DESTINATION_OPTIONS), fragment(1)],
        ]);
    }
}

/// One hostile packet: what is sent, and whether the rules allow that a pod gets it.
pub(super) struct Hostile {
    /// What stands behind its mark.
    pub(super) number: u32,
    pub(super) packet: Vec<u8>,
    pub(super) allowed: bool,
}

/// Makes hostile packets: each run makes the same ones.
pub(super) struct Generator<F: Odd> {
    random: Random,
    /// Of the nodes.
    peer: F::Address,
    victim: F::Address,
    /// Of pods: one of the peer, one beside it, one of the victim.
    sender: F::Address,
    neighbour: F::Address,
    pod: F::Address,
    /// In the victim's subnet: the gateway, and nobody.
    gateway: F::Address,
    nobody: F::Address,
    /// In the peer's, nobody's.
    of_peer: F::Address,
    /// Outer sources of no peer.
    strangers: [F::Address; 3],
    honest: Vxlan<F>,
    number: u32,
}

impl<F: Odd> Generator<F> {
    pub(super) fn new(stage: &Stage<F>, intruder: F::Address) -> Self {
        let [sender, pod] = stage.ends;
        Self {
            random: Random(0x10de_4c44),
            peer: stage.node(0),
            victim: stage.node(1),
            sender,
            neighbour: F::of(&stage.neighbour),
            pod,
            gateway: stage.address(1, 1),
            nobody: stage.address(1, 255),
            of_peer: stage.address(0, 200),
            strangers: [intruder, F::on_underlay(stage.cluster.underlay(), 5), F::stranger()],
            honest: stage.encapsulated(&[]),
            number: 0,
        }
    }

    fn data(&mut self) -> Vec<u8> {
        self.number += 1;
        [MARK, &(self.number - 1).to_be_bytes(), &vec![0xee; self.random.below(200)]].concat()
    }

    /// A packet from here to there, in which any byte of the header may be damaged, but not addresses: by these it is
    /// known whether it may be delivered.
    fn packet(&mut self, source: F::Address, destination: F::Address) -> Vec<u8> {
        let data = self.data();
        let random = &mut self.random;
        let packet = match random.next() % 3 {
            0 => F::tcp(source, destination, (1, 2), random.next() as u8, &data),
            1 => {
                let kind = random.of(F::KINDS);
                let target = random.of(&[self.peer, self.sender, self.pod, self.gateway, F::stranger()]);
                let message = F::message(kind, target, [2, 0, 0, 0, 0, 0x66], &data);
                // As an advertisement's flags (RFC 4861), a router's lifetime, an MTU, nothing.
                let rest = random.of(&[0, 0xe000_0000, 1800, 1280]);
                F::icmp(source, destination, (kind, 0), rest, &message)
            }
            _ => F::udp(source, destination, (1, OPEN_PORT), &data),
        };
        let mut packet = packet.class(random.next() as u8).hops(random.of(&[0, 1, 2, 64, 255]));
        packet.disturb(&mut Choice(random));
        let mut bytes = packet.bytes();
        if random.one_in(4) {
            let at = random.below(F::HEADER_LEN - 2 * usize::from(F::BITS / 8));
            bytes[at] ^= 1 << (random.next() % 8);
        }
        bytes
    }

    /// VXLAN for the victim, from anybody: with an inner packet from anybody to anybody.
    pub(super) fn outer(&mut self) -> Hostile {
        let own = [self.sender, self.pod, self.gateway, self.of_peer];
        let source = self.random.of(&[&own[..], &F::sources()].concat());
        let own = [self.pod, self.pod, self.sender, self.nobody, self.gateway, self.gateway];
        let destination = self.random.of(&[&own[..], &F::destinations()].concat());
        let inner = self.packet(source, destination);
        let random = &mut self.random;
        let from = random.of(&[&[self.peer, self.victim][..], &self.strangers].concat());
        let flags = random.of(&[0x0800_0000, 0x0800_0000, 0, 0x8800_0000, 0x0c00_0001]);
        let vni = random.of(&[1, 1, 1, 0, 2, 0x00ff_ffff]);
        let frame = [&self.honest.frame[..ETHERNET_LEN], &inner].concat();
        let outer = Vxlan { source: from, flags, vni, frame, ..self.honest.clone() };
        let outer = if random.one_in(8) { outer.packet_without_checksum() } else { outer.packet() };
        let mut outer = outer.class(random.next() as u8);
        if random.one_in(4) {
            outer = outer.padded();
        }
        if random.one_in(8) {
            // A length that lies.
            let length = &mut outer.payload_mut()[5];
            *length = length.wrapping_add(random.next() as u8);
        }
        let mut packet = outer.bytes();
        if random.one_in(8) {
            packet.truncate(F::HEADER_LEN + random.below(packet.len() - F::HEADER_LEN));
        }
        // What lies in nobody's subnet may be a client that the peer forwards for: the kernel decides.
        let others = [self.pod, self.gateway].contains(&source);
        Hostile {
            number: self.number - 1,
            packet,
            allowed: from == self.peer && vni == 1 && flags == 0x0800_0000 && !others,
        }
    }

    /// What the peer's pod sends: packets from anybody, and VXLAN for either node.
    pub(super) fn of_pod(&mut self) -> Hostile {
        let source = self.random.of(&[&[self.sender, self.neighbour, self.pod][..], &F::sources()].concat());
        let own = [self.pod, self.pod, self.gateway, self.nobody, self.neighbour];
        let destination = self.random.of(&[&own[..], &F::destinations()].concat());
        let mut packet = self.packet(source, destination);
        let is_vxlan = self.random.one_in(3);
        if is_vxlan {
            let source = self.random.of(&[self.sender, self.peer, self.victim, F::stranger()]);
            let destination = self.random.of(&[self.peer, self.victim]);
            let frame = [&self.honest.frame[..ETHERNET_LEN], &packet].concat();
            let outer = Vxlan { source, destination, frame, ..self.honest.clone() }.packet();
            packet = if self.random.one_in(2) { outer.padded() } else { outer }.bytes();
        }
        // Another pod's name is known to be another's, on the way to any pod. What goes elsewhere is the host's to judge,
        // which answers to that name: an echo to all nodes, or that there is no way.
        let is_elsewhere = F::destinations().contains(&destination);
        let allowed = !is_vxlan && (source != self.neighbour || is_elsewhere);
        Hostile { number: self.number - 1, packet, allowed }
    }
}
