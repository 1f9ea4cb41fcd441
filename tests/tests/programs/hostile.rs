//! Frames that nobody would send: good ones, bent by chance, and garbage. Each run prints its seed; `LODEN_SEED`
//! repeats it.

use std::time::{SystemTime, UNIX_EPOCH};

use loden_agent::dataplane::Program::{self, *};
use loden_ebpf::reason::Reason;

use crate::{
    case::{REDIRECT, SHOT, UNSPEC, save},
    oracle,
    packet::*,
    rig::*,
    samples::*,
};

const OPEN_FRAMES: usize = 100_000;
const STRICT_FRAMES: usize = 25_000;
/// Frames between two readings of the counters.
const BATCH: usize = 5_000;

/// SplitMix64 (Steele, Lea and Flood, 2014).
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

const ADDRESSES: [std::net::Ipv4Addr; 15] = [
    POD,
    OTHER_POD,
    ROUTED_POD,
    UNKNOWN_POD,
    REMOTE,
    KERNEL_REMOTE,
    WIDE_REMOTE,
    DIRECT_REMOTE,
    VACANT,
    OUTSIDE,
    VTEP,
    PEER_VTEP,
    WIDE_PEER_VTEP,
    DIRECT_PEER_VTEP,
    STRANGER,
];
const BYTES: [u8; 14] = [0, 1, 2, 3, 4, 5, 6, 8, 17, 0x40, 0x45, 0x46, 0x7f, 0xff];

fn good_frames(program: Program) -> Vec<Vec<u8>> {
    let direct = || Packet::ethernet(WIRE_MAC, ROUTER_MAC).ipv4(DIRECT_REMOTE, POD);
    let packets = match program {
        FromPod | ToOverlay | ToWire => vec![
            sent_tcp(ACK),
            sent_udp(),
            sent_echo(8),
            sent_udp().to(WIDE_REMOTE),
            sent_udp().to(DIRECT_REMOTE),
            sent_udp().to(OTHER_POD).macs(OTHER_POD_MAC, POD_MAC),
            sent_udp().to(ROUTED_POD),
            sent_ip().udp(LOCAL_PORT, REMOTE_PORT).payload(usize::from(PEER_MTU) - 78),
        ],
        FromWire | FromOther => vec![
            outer().then(inner_tcp(ACK)),
            outer().then(inner_udp()),
            outer().then(inner_echo(0)),
            outer().from(WIDE_PEER_VTEP).then(inner_udp().from(WIDE_REMOTE)),
            direct().tcp(REMOTE_PORT, LOCAL_PORT, ACK).payload(9),
        ],
        FromOverlay => vec![inner_tcp(ACK), inner_udp(), inner_echo(0), inner_udp().from(WIDE_REMOTE)],
        ToPod | Guard => vec![delivered(inner_tcp(ACK)), delivered(inner_udp()), delivered(inner_echo(0))],
    };
    packets.iter().map(Packet::build).collect()
}

fn frame(chance: &mut Chance, good: &[Vec<u8>]) -> Vec<u8> {
    let mut frame = good[chance.below(good.len())].clone();
    match chance.below(16) {
        0 => {}
        1 => {
            let len = 14 + chance.below(200);
            let keep = chance.below(40).min(len);
            frame.resize(len, 0);
            frame[keep..].fill_with(|| chance.next() as u8);
        }
        _ => {
            for _ in 0..=chance.below(3) {
                bend(chance, &mut frame);
            }
            if chance.below(3) == 0 {
                mend_lengths(&mut frame);
            }
        }
    }
    // The kernel runs no program on less than the header that the EtherType promises (`bpf_prog_test_run_skb`).
    match frame[12..14] {
        [0x08, 0x00] if frame.len() < 34 => frame.resize(34, 0),
        [0x86, 0xdd] if frame.len() < 54 => frame.resize(54, 0),
        _ => {}
    }
    frame
}

fn bend(chance: &mut Chance, frame: &mut Vec<u8>) {
    // Headers are where it matters.
    let at = chance.below(frame.len().min(110));
    match chance.below(8) {
        0 | 1 => frame[at] ^= 1 << chance.below(8),
        2 => frame[at] = chance.next() as u8,
        3 | 4 => frame[at] = chance.of(&BYTES),
        5 => {
            let address = chance.of(&ADDRESSES);
            let at = chance.of(&[26, 30, 76, 80]);
            if let Some(field) = frame.get_mut(at..at + 4) {
                field.copy_from_slice(&address.octets());
            }
        }
        6 => frame.truncate(14 + chance.below(frame.len() - 13)),
        _ => {
            let more = chance.below(70);
            frame.extend((0..more).map(|_| chance.next() as u8));
        }
    }
}

/// Makes the IP and UDP lengths of both layers say what is there, where they have room.
fn mend_lengths(frame: &mut [u8]) {
    let len = frame.len();
    let encapsulated = len > 84 && frame[23] == UDP && frame[36..38] == PORT.to_be_bytes();
    let fields: &[(usize, usize)] = if encapsulated { &[(16, 14), (38, 34), (66, 64)] } else { &[(16, 14)] };
    for (at, start) in fields {
        if len > at + 2 {
            frame[*at..at + 2].copy_from_slice(&((len - start) as u16).to_be_bytes());
        }
    }
}

fn hostile(program: Program) {
    let seed = std::env::var("LODEN_SEED").map_or_else(
        |_| SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64,
        |seed| seed.parse().unwrap(),
    );
    println!("LODEN_SEED={seed}");
    let test = format!("hostile-{}", program.name());
    let mut chance = Chance(seed);
    let good = good_frames(program);
    Lab::run(|lab| {
        for (strict, frames) in [(false, OPEN_FRAMES), (true, STRICT_FRAMES)] {
            let mut rig = Rig::load(lab, Mode { strict, drop_forged: true });
            qualify(&mut rig);
            let mut redirected = 0;
            for _ in 0..frames / BATCH {
                redirected += batch(&mut rig, program, strict, &test, || frame(&mut chance, &good));
            }
            let share = redirected as f64 / frames as f64;
            let acts = [FromPod, FromWire, FromOverlay].contains(&program);
            assert_eq!(
                share > 0.02,
                acts,
                "{share} of the frames were redirected: is the run worth anything?"
            );
        }
    });
}

/// Returns how many frames were redirected.
fn batch(
    rig: &mut Rig,
    program: Program,
    strict: bool,
    test: &str,
    mut frame: impl FnMut() -> Vec<u8>,
) -> u64 {
    let earlier = rig.dataplane.counters().unwrap();
    let (mut redirected, mut dropped) = (0, 0);
    for _ in 0..BATCH {
        let frame = frame();
        let outcome = rig.run(program, &frame, Context::default());
        let allowed = oracle::allowed(program, &frame, strict);
        let hash = || rig.hash(&frame, rig.home(program));
        let verdict = match (outcome.action, &allowed) {
            (REDIRECT, Some(allowed)) if allowed.agrees(&frame, &outcome.frame, hash) => {
                redirected += 1;
                Ok(())
            }
            (REDIRECT, Some(_)) => Err("is redirected as another frame than it should be"),
            (REDIRECT, None) => Err("is redirected, and must not be"),
            (_, Some(_)) => Err("should be redirected"),
            (UNSPEC | SHOT, _) if outcome.frame != frame => Err("is changed"),
            (SHOT, _) if !oracle::may_drop(program, &frame) => Err("is dropped for no reason"),
            (SHOT, _) => {
                dropped += 1;
                Ok(())
            }
            (UNSPEC, _) => {
                // It may have been a SYN, which ends what its tuple was qualified for.
                if strict && [FromPod, FromOverlay].contains(&program) {
                    qualify(rig);
                }
                Ok(())
            }
            _ => Err("gets an answer that means nothing"),
        };
        if let Err(what) = verdict {
            let path = save(test, [&frame[..], &outcome.frame]);
            panic!("{program:?}, strict {strict}: {} {what}, see {}", hex(&frame), path.display());
        }
    }
    let counted = rig.counted_since(&earlier);
    let of = |class: &str| {
        let rises = counted.iter().filter(|(reason, ..)| reason.name().starts_with(class));
        rises.map(|(_, packets, _)| packets).sum::<u64>()
    };
    assert_eq!((of("fast_"), of("drop_")), (redirected, dropped), "{counted:?}");
    assert!(counted.iter().all(|(reason, ..)| *reason != Reason::DropRedirect));
    redirected
}

#[test]
fn from_pod_withstands_hostile_frames() {
    hostile(FromPod);
}

#[test]
fn from_wire_withstands_hostile_frames() {
    hostile(FromWire);
}

#[test]
fn from_other_withstands_hostile_frames() {
    hostile(FromOther);
}

#[test]
fn from_overlay_withstands_hostile_frames() {
    hostile(FromOverlay);
}

#[test]
fn to_overlay_withstands_hostile_frames() {
    hostile(ToOverlay);
}

#[test]
fn to_wire_withstands_hostile_frames() {
    hostile(ToWire);
}

#[test]
fn to_pod_withstands_hostile_frames() {
    hostile(ToPod);
}
