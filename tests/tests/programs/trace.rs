//! What listeners are told of verdicts, and that the verdicts are the same whether somebody listens or not.

use std::{mem, net::Ipv4Addr, thread, time::Duration};

use aya::maps::{Array, Map, MapData};
use loden_agent::dataplane::{
    Listener, Pins,
    Program::{self, *},
};
use loden_ebpf::{
    abi::map,
    reason::Reason::{self, *},
    trace::{ANY_PROTOCOL, Prefix, RING_BYTES, TRACERS_MAX, Tally, Traced, Tracer, mapped},
};

use crate::{packet::*, rig::*, samples::*};

const OPEN: Mode = Mode { strict: false, drop_forged: true };
pub(crate) const ALL: Tracer = Tracer {
    until: 0,
    owner: 0,
    reasons: u64::MAX,
    ends: [Prefix { address: [0; 2], mask: [0; 2] }; 2],
    every: 1,
    port: 0,
    protocol: ANY_PROTOCOL,
};
/// Header of a record in a ring (kernel/bpf/ringbuf.c), in bytes.
const RECORD_HEADER: usize = 8;

/// Runs `f` where a listener can wait.
fn in_runtime<T: Send>(f: impl FnOnce(&Lab, &tokio::runtime::Runtime) -> T + Send) -> T {
    Lab::run(|lab| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _inside = runtime.enter();
        f(lab, &runtime)
    })
}

/// All that the listener has been told by now.
pub(crate) fn told(runtime: &tokio::runtime::Runtime, listener: &mut Listener) -> Vec<Traced> {
    let mut told = Vec::new();
    runtime.block_on(async {
        loop {
            let before = told.len();
            let hear = listener.hear(|verdict| {
                told.push(verdict);
                Ok(true)
            });
            let heard = tokio::time::timeout(Duration::from_millis(20), hear).await;
            if heard.is_err() || told.len() == before {
                break;
            }
        }
    });
    told
}

fn tracing(rig: &Rig) -> u32 {
    let map = MapData::from_pin(Pins::below(&rig.bpffs_dir()).map(map::TRACING)).unwrap();
    Array::<_, u32>::try_from(Map::Array(map)).unwrap().get(&0, 0).unwrap()
}

fn end(address: Ipv4Addr, port: u16) -> ([u64; 2], u16) {
    (mapped(address.octets()), port)
}

/// Reason, source, destination and far VTEP.
type Expected = (Reason, ([u64; 2], u16), ([u64; 2], u16), [u64; 2]);

fn rows() -> Vec<(Program, Packet, Expected)> {
    let none = [0; 2];
    let (pod, remote) = (end(POD, LOCAL_PORT), end(REMOTE, REMOTE_PORT));
    let (peer, stranger) = (mapped(PEER_VTEP.octets()), mapped(STRANGER.octets()));
    let from_stranger = || outer().from(STRANGER).then(inner_udp());
    let echo = |address| end(address, 0);
    vec![
        (FromPod, sent_udp(), (FastEncap, pod, remote, peer)),
        (FromPod, sent_tcp(ACK), (FastEncap, pod, remote, peer)),
        (FromPod, sent_echo(8), (FastEncap, echo(POD), echo(REMOTE), peer)),
        (FromPod, sent_udp().to(DIRECT_REMOTE), (FastDirectOut, pod, end(DIRECT_REMOTE, REMOTE_PORT), none)),
        (FromPod, sent_udp().to(OUTSIDE), (PassPodNoPeer, pod, end(OUTSIDE, REMOTE_PORT), none)),
        (FromPod, sent_udp().ttl(1), (PassPodTtl, pod, remote, none)),
        (FromPod, sent_udp().options(&[1; 8]), (PassPodOptions, pod, remote, none)),
        (FromPod, sent_udp().fragment(9), (PassPodFragment, echo(POD), echo(REMOTE), none)),
        (
            FromPod,
            sent_udp().from(OTHER_POD),
            (DropForgedPodSource, end(OTHER_POD, LOCAL_PORT), remote, none),
        ),
        // To the port of VXLAN, and yet a pod's own.
        (
            FromPod,
            sent_ip().to(OUTSIDE).udp(LOCAL_PORT, PORT).payload(PAYLOAD),
            (PassPodNoPeer, pod, end(OUTSIDE, PORT), none),
        ),
        (
            FromPod,
            Packet::ethernet([0xff; 6], POD_MAC).ether_type(ARP).payload(28),
            (PassPodNotIp, (none, 0), (none, 0), none),
        ),
        (FromWire, outer().then(inner_udp()), (FastDecap, remote, pod, none)),
        (
            FromWire,
            outer().then(inner_ip().udp(REMOTE_PORT, PORT).payload(PAYLOAD)),
            (FastDecap, remote, end(POD, PORT), none),
        ),
        (
            FromWire,
            outer().then(inner_udp().to(UNKNOWN_POD)),
            (PassWireNoEndpoint, remote, end(UNKNOWN_POD, LOCAL_PORT), peer),
        ),
        (
            FromWire,
            outer().then(inner_udp().from(OTHER_POD)),
            (DropForgedPeerSource, end(OTHER_POD, REMOTE_PORT), pod, peer),
        ),
        (FromWire, from_stranger(), (DropUnknownVtep, (stranger, 50_000), end(VTEP, PORT), none)),
        (Guard, from_stranger(), (DropGuard, (stranger, 50_000), end(VTEP, PORT), none)),
        (FromOverlay, inner_udp(), (FastOverlay, remote, pod, none)),
        (ToPod, inner_udp(), (NoteTranslated, remote, pod, none)),
        (ToOverlay, sent_udp(), (NoteTranslated, pod, remote, none)),
        (ToWire, sent_udp(), (NoteTranslated, pod, remote, none)),
    ]
}

#[test]
fn every_program_tells_who_and_why_whatever_has_become_of_the_packet() {
    in_runtime(|lab, runtime| {
        let mut rig = Rig::load(lab, OPEN);
        let mut listener = Listener::open(&rig.bpffs_dir(), ALL).unwrap();
        for (program, packet, (reason, source, destination, vtep)) in rows() {
            rig.reset();
            let frame = packet.build();
            match program {
                Guard => _ = rig.guard(&frame),
                _ => _ = rig.run(program, &frame, Context::default()),
            }
            let ifindex = if program == Guard { 0 } else { rig.home(program) };
            let told = told(runtime, &mut listener);
            let what = format!("{program:?}, {reason:?}: {told:?}");
            assert_eq!(told.len(), 1, "{what}");
            let verdict = told[0];
            assert_eq!(verdict.reason, reason as u32, "{what}");
            assert_eq!((verdict.source, verdict.source_port), source, "{what}");
            assert_eq!((verdict.destination, verdict.destination_port), destination, "{what}");
            assert_eq!(verdict.vtep, vtep, "{what}");
            assert_eq!(verdict.len as usize, frame.len(), "{what}");
            assert_eq!(loden_ebpf::trace::Program::name(verdict.program), Some(program.name()), "{what}");
            if program != Guard {
                assert_eq!(verdict.ifindex, ifindex, "{what}");
            }
        }
    });
}

#[test]
fn ipv6_is_told_too() {
    in_runtime(|lab, runtime| {
        let mut rig = Rig::load(lab, OPEN);
        let mut listener = Listener::open(&rig.bpffs_dir(), ALL).unwrap();
        let (source, destination): ([u8; 16], [u8; 16]) = (
            [0xfd, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 1, 1, 1, 1, 2],
            [0xfd, 1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 2, 2, 2, 2, 9],
        );
        let header = [&[0x60, 0, 0, 0, 0, 20, TCP, 64][..], &source, &destination].concat();
        let frame = Packet::ethernet(GATEWAY_MAC, POD_MAC)
            .ether_type(IPV6)
            .bytes(&header)
            .bytes(&[0x9c, 0x41, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, ACK, 0, 0, 0, 0, 0, 0])
            .build();
        rig.run(FromPod, &frame, Context::default());
        let told = told(runtime, &mut listener);
        let bytes = |words: [u64; 2]| [words[0].to_ne_bytes(), words[1].to_ne_bytes()].concat();
        assert_eq!((bytes(told[0].source), bytes(told[0].destination)), (source.into(), destination.into()));
        assert_eq!((told[0].source_port, told[0].destination_port), (LOCAL_PORT, REMOTE_PORT));
        assert_eq!((told[0].protocol, told[0].family), (u16::from(TCP), 6));
    });
}

#[test]
fn only_what_is_wanted_reaches_the_ring_and_one_in_so_many() {
    in_runtime(|lab, runtime| {
        let mut rig = Rig::load(lab, OPEN);
        let gate = rig.bpffs_dir();
        let mask = [0, u64::from_be(0xffff_ffff_ffff_ff00)];
        let ends = [Prefix { address: [0, mapped(REMOTE.octets())[1] & mask[1]], mask }, Prefix::default()];
        let wanted = Tracer {
            reasons: 1 << FastEncap as u32,
            ends,
            every: 4,
            port: REMOTE_PORT,
            protocol: u16::from(UDP),
            ..ALL
        };
        let mut listener = Listener::open(&gate, wanted).unwrap();
        let mut beside = Listener::open(&gate, Tracer { reasons: 1 << PassPodNoPeer as u32, ..ALL }).unwrap();
        for _ in 0..10 {
            rig.run(FromPod, &sent_udp().build(), Context::default());
            // Each of these is what one of the filters alone would let through.
            rig.run(FromPod, &sent_tcp(ACK).build(), Context::default());
            rig.run(FromPod, &sent_udp().to(WIDE_REMOTE).build(), Context::default());
            rig.run(FromPod, &sent_udp().ttl(1).build(), Context::default());
            rig.run(FromPod, &sent_ip().udp(1, 2).payload(PAYLOAD).build(), Context::default());
            rig.run(FromPod, &sent_udp().to(OUTSIDE).build(), Context::default());
        }
        // The programs ran on one CPU or more, and each begins its own count.
        let heard = told(runtime, &mut listener).len();
        assert!((3..=4).contains(&heard), "{heard} of 10 at one in four");
        assert_eq!(listener.tally().unwrap(), Tally { wanted: 10, lost: 0 });
        assert_eq!(told(runtime, &mut beside).len(), 10, "the other listener has its own filter");
    });
}

#[test]
fn what_finds_no_room_is_counted_as_lost() {
    in_runtime(|lab, runtime| {
        let mut rig = Rig::load(lab, OPEN);
        let mut listener = Listener::open(&rig.bpffs_dir(), ALL).unwrap();
        let room = RING_BYTES / (size_of::<Traced>() + RECORD_HEADER);
        let sent = room + 500;
        let frame = sent_udp().to(OUTSIDE).build();
        for n in 0..sent {
            if n % 500 == 0 {
                listener.renew().unwrap();
            }
            rig.run(FromPod, &frame, Context::default());
        }
        let tally = listener.tally().unwrap();
        assert_eq!(tally.wanted, sent as u64);
        assert!((490..=510).contains(&tally.lost), "{tally:?}");
        assert_eq!(told(runtime, &mut listener).len() as u64, tally.wanted - tally.lost);
        rig.run(FromPod, &frame, Context::default());
        assert_eq!(told(runtime, &mut listener).len(), 1, "there is room again");
    });
}

#[test]
fn a_listener_that_was_killed_is_told_no_more_and_its_slot_is_anothers() {
    in_runtime(|lab, runtime| {
        let mut rig = Rig::load(lab, OPEN);
        let frame = sent_udp().build();
        assert_eq!(tracing(&rig), 0);
        let listeners: Vec<_> =
            (0..TRACERS_MAX).map(|_| Listener::open(&rig.bpffs_dir(), ALL).unwrap()).collect();
        let refused = Listener::open(&rig.bpffs_dir(), ALL).err().unwrap().to_string();
        assert!(refused.contains("4 traces run on this node already"), "{refused}");
        assert_eq!(tracing(&rig), 1);
        rig.run(FromPod, &frame, Context::default());
        assert_eq!(tracing(&rig), 1);

        // As SIGKILL leaves them: nobody says goodbye, nobody renews.
        let mut stood_still: Vec<_> = listeners.into_iter().map(mem::ManuallyDrop::new).collect();
        thread::sleep(Duration::from_millis(2100));
        rig.run(FromPod, &frame, Context::default());
        assert_eq!(tracing(&rig), 0, "the first packet after the term ends it");
        let mut after = Listener::open(&rig.bpffs_dir(), ALL).unwrap();
        assert_eq!(told(runtime, &mut after), [], "what the one before has not read is not the next one's");
        rig.run(FromPod, &frame, Context::default());
        assert_eq!(told(runtime, &mut after).len(), 1);
        let late = stood_still[0].renew().unwrap_err().to_string();
        assert!(late.contains("another one has taken its place"), "{late}");
        drop(mem::ManuallyDrop::into_inner(stood_still.remove(0)));
        rig.run(FromPod, &frame, Context::default());
        assert_eq!(told(runtime, &mut after).len(), 1, "one that comes too late takes nothing away");

        drop(after);
        rig.run(FromPod, &frame, Context::default());
        assert_eq!(tracing(&rig), 0, "one that ends in good order ends it at once");
    });
}

#[test]
fn listening_changes_no_verdict_and_no_byte_also_of_cut_frames() {
    in_runtime(|lab, _| {
        let mut rig = Rig::load(lab, OPEN);
        let mut frames: Vec<(Program, Vec<u8>)> = Vec::new();
        for (program, packet, _) in rows() {
            let frame = packet.build();
            // A test run wants an Ethernet and an IPv4 header.
            let lengths = [34, 38, 41, 42, 50, 58, 63, 64, 84, 90, frame.len()];
            let cut = lengths.into_iter().filter(|len| *len <= frame.len());
            frames.extend(cut.map(|len| (program, frame[..len].to_vec())));
        }
        let run = |rig: &mut Rig| -> Vec<_> {
            let each = frames.iter().map(|(program, frame)| {
                rig.reset();
                match program {
                    Guard => (rig.guard(frame) as i32, Vec::new()),
                    _ => {
                        let outcome = rig.run(*program, frame, Context::default());
                        (outcome.action, without_chance(outcome.frame))
                    }
                }
            });
            each.collect()
        };
        let unheard = run(&mut rig);
        let listener = Listener::open(&rig.bpffs_dir(), ALL).unwrap();
        let heard = run(&mut rig);
        assert!(listener.tally().unwrap().wanted > frames.len() as u64 / 2, "somebody listened");
        for ((frame, unheard), heard) in frames.iter().zip(&unheard).zip(&heard) {
            assert_eq!(unheard, heard, "{:?} on {} bytes", frame.0, frame.1.len());
        }
    });
}

/// An encapsulated frame's IP identification is a random number, and its checksum follows from it.
fn without_chance(mut frame: Vec<u8>) -> Vec<u8> {
    if frame.len() > 26 {
        frame[18..20].fill(0);
        frame[24..26].fill(0);
    }
    frame
}
