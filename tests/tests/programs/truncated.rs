//! Good frames, cut after every byte: what is not whole is nobody's to redirect or to change.

use loden_agent::dataplane::Program::{self, *};

use crate::{
    case::{REDIRECT, UNSPEC, save},
    packet::*,
    rig::*,
    samples::*,
};

/// The kernel refuses to run a program on less than an Ethernet and an IPv4 header (`bpf_prog_test_run_skb`).
const SHORTEST: usize = 34;

fn frames() -> Vec<(Program, Packet)> {
    let direct = || Packet::ethernet(WIRE_MAC, ROUTER_MAC).ipv4(DIRECT_REMOTE, POD);
    vec![
        (FromPod, sent_tcp(ACK)),
        (FromPod, sent_udp()),
        (FromPod, sent_echo(8)),
        (FromPod, sent_udp().to(DIRECT_REMOTE)),
        (FromPod, sent_udp().to(OTHER_POD).macs(OTHER_POD_MAC, POD_MAC)),
        (FromWire, outer().then(inner_tcp(ACK))),
        (FromWire, outer().then(inner_udp())),
        (FromWire, outer().then(inner_echo(0))),
        (FromWire, direct().udp(1, 2).payload(30)),
        (FromOverlay, inner_tcp(ACK)),
        (FromOverlay, inner_udp()),
        (FromOverlay, inner_echo(8)),
    ]
}

fn every_prefix_passes_unchanged(mode: Mode) {
    Lab::run(|lab| {
        let mut rig = Rig::load(lab, mode);
        qualify(&mut rig);
        for (program, packet) in frames() {
            let frame = packet.build();
            for len in SHORTEST..frame.len() {
                let cut = &frame[..len];
                let outcome = rig.run(program, cut, Context::default());
                if (outcome.action, &outcome.frame[..]) != (UNSPEC, cut) {
                    let path = save("truncated", [cut, &outcome.frame]);
                    let action = outcome.action;
                    panic!(
                        "{program:?}: {action} for {len} of {} bytes, see {}",
                        frame.len(),
                        path.display()
                    );
                }
            }
            if !mode.strict {
                let whole = rig.run(program, &frame, Context::default());
                assert_eq!(whole.action, REDIRECT, "{program:?}: the whole frame is a good one");
            }
        }
        // The programs that only look take a cut frame for what is left of it.
        for program in [ToOverlay, ToWire, ToPod] {
            for (_, packet) in frames() {
                let frame = packet.build();
                for len in SHORTEST..=frame.len() {
                    let outcome = rig.run(program, &frame[..len], Context::default());
                    assert_eq!(
                        (outcome.action, &outcome.frame[..]),
                        (UNSPEC, &frame[..len]),
                        "{program:?}, {len}"
                    );
                }
            }
        }
    });
}

#[test]
fn a_frame_cut_anywhere_passes_unchanged_through_the_open_gate() {
    every_prefix_passes_unchanged(Mode { strict: false, drop_forged: true });
}

#[test]
fn a_frame_cut_anywhere_passes_unchanged_through_the_strict_gate() {
    every_prefix_passes_unchanged(Mode { strict: true, drop_forged: true });
}
