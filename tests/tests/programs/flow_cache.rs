//! What a CPU remembers of fast flows: it spares look-ups, and outlives nothing but an expiry, by some timer ticks.

use std::{thread::sleep, time::Duration};

use loden_agent::dataplane::Program::{FromOverlay, FromPod, FromWire, ToOverlay};
use loden_ebpf::{
    abi::{Flow, FlowKey},
    flow::Direction,
    flow_cache::slot,
    reason::Reason,
};

use loden_tests::cpu;

use crate::{packet::*, rig::*, samples::*};

const STRICT: Mode = Mode { strict: true, drop_forged: true };
/// Longer than a note holds: eight ticks, of which a kernel has at least a hundred a second.
const LONGER_THAN_A_NOTE: Duration = Duration::from_millis(100);

/// Runs `from_pod`: for which reason it did what.
fn send(rig: &mut Rig, packet: &Packet) -> Reason {
    let before = rig.dataplane.counters().unwrap();
    rig.run(FromPod, &packet.build(), Context::default());
    let counted = rig.counted_since(&before);
    assert_eq!(counted.len(), 1, "{counted:?}");
    counted[0].0
}

fn qualify_outbound(rig: &mut Rig, key: FlowKey, seen: u64) {
    let flow = Flow { outbound_seen: seen, outbound_until: u64::MAX, epoch: rig.epoch(), ..Flow::default() };
    rig.set_flow(key, flow);
}

#[test]
fn a_note_spares_the_look_up_and_ends_soon_after_its_flow() {
    Lab::run(|lab| {
        let mut rig = Rig::load(lab, STRICT);
        cpu::stay_on_end(false);
        // A busy machine may let a note grow old between two runs, but not every time.
        let spared = (0..100).any(|_| {
            qualify_outbound(&mut rig, flow(UDP), 0);
            assert_eq!(send(&mut rig, &sent_udp()), Reason::FastEncap);
            rig.remove_flow(&flow(UDP));
            send(&mut rig, &sent_udp()) == Reason::FastEncap
        });
        assert!(spared, "each packet looks its flow up");
        qualify_outbound(&mut rig, flow(UDP), 0);
        assert_eq!(send(&mut rig, &sent_udp()), Reason::FastEncap);
        let expired = Flow { outbound_until: 1, epoch: rig.epoch(), ..Flow::default() };
        rig.set_flow(flow(UDP), expired);
        sleep(LONGER_THAN_A_NOTE);
        assert_eq!(send(&mut rig, &sent_udp()), Reason::PassPodGate);
    });
}

#[test]
fn a_note_ends_at_once_with_its_epoch() {
    Lab::run(|lab| {
        let mut rig = Rig::load(lab, STRICT);
        cpu::stay_on_end(false);
        for _ in 0..20 {
            qualify_outbound(&mut rig, flow(UDP), 0);
            assert_eq!(send(&mut rig, &sent_udp()), Reason::FastEncap);
            rig.dataplane.bump_epoch().unwrap();
            assert_eq!(send(&mut rig, &sent_udp()), Reason::PassPodGate);
        }
    });
}

#[test]
fn a_note_ends_at_once_when_another_cpu_sees_its_flow_translated() {
    Lab::run(|lab| {
        let mut rig = Rig::load(lab, STRICT);
        for _ in 0..20 {
            let cpu = cpu::stay_on_end(false);
            // Its packet went in too long ago for the one that will come out.
            qualify_outbound(&mut rig, flow(UDP), 1);
            assert_eq!(send(&mut rig, &sent_udp()), Reason::FastEncap);
            let other_cpu = cpu::stay_on_end(true);
            assert_ne!(cpu, other_cpu, "this takes two CPUs");
            rig.run(ToOverlay, &sent_udp().ttl(63).build(), Context::default());
            let seen = rig.flow(&flow(UDP)).unwrap();
            assert_eq!((seen.translated, seen.outbound_until), (1, 0));
            cpu::stay_on_end(false);
            assert_eq!(send(&mut rig, &sent_udp()), Reason::PassPodGate);
        }
    });
}

#[test]
fn a_note_ends_at_once_when_another_cpu_sees_a_new_connection_of_its_tuple() {
    Lab::run(|lab| {
        let mut rig = Rig::load(lab, STRICT);
        for _ in 0..20 {
            let cpu = cpu::stay_on_end(false);
            qualify_outbound(&mut rig, flow(TCP), 0);
            assert_eq!(send(&mut rig, &sent_tcp(ACK)), Reason::FastEncap);
            let other_cpu = cpu::stay_on_end(true);
            assert_ne!(cpu, other_cpu, "this takes two CPUs");
            rig.run(FromOverlay, &inner_tcp(SYN).build(), Context::default());
            assert_eq!(rig.flow(&flow(TCP)).unwrap().outbound_until, 0);
            cpu::stay_on_end(false);
            assert_eq!(send(&mut rig, &sent_tcp(ACK)), Reason::PassPodGate);
        }
    });
}

#[test]
fn flows_that_were_never_qualified_end_no_notes() {
    Lab::run(|lab| {
        let mut rig = Rig::load(lab, STRICT);
        cpu::stay_on_end(false);
        let spared = (0..100).any(|_| {
            qualify_outbound(&mut rig, flow(TCP), 0);
            assert_eq!(send(&mut rig, &sent_tcp(ACK)), Reason::FastEncap);
            rig.remove_flow(&flow(TCP));
            // A service's flow: it comes out without having gone in, packet after packet.
            for _ in 0..2 {
                rig.run(ToOverlay, &sent_udp().ttl(63).build(), Context::default());
            }
            send(&mut rig, &sent_tcp(ACK)) == Reason::FastEncap
        });
        assert!(spared, "a service's packets end what is remembered of other flows");
    });
}

#[test]
fn a_note_is_of_one_direction_of_one_flow() {
    Lab::run(|lab| {
        let mut rig = Rig::load(lab, STRICT);
        cpu::stay_on_end(false);
        let (one, other) = colliding();
        let key = |port: u16| FlowKey { local_port: port.to_be_bytes(), ..flow(UDP) };
        let packet = |port: u16| sent_ip().udp(port, REMOTE_PORT).payload(PAYLOAD);
        qualify_outbound(&mut rig, key(one), 0);
        for _ in 0..3 {
            assert_eq!(send(&mut rig, &packet(one)), Reason::FastEncap);
            assert_eq!(send(&mut rig, &packet(other)), Reason::PassPodGate, "in the same slot");
        }
        qualify_outbound(&mut rig, key(other), 0);
        for _ in 0..3 {
            assert_eq!(send(&mut rig, &packet(one)), Reason::FastEncap);
            assert_eq!(send(&mut rig, &packet(other)), Reason::FastEncap);
        }
        let before = rig.dataplane.counters().unwrap();
        let inbound = inner_ip().udp(REMOTE_PORT, one).payload(PAYLOAD);
        rig.run(FromWire, &outer().then(inbound).build(), Context::default());
        assert_eq!(rig.counted_since(&before)[0].0, Reason::PassWireGate, "the other direction");
    });
}

/// Two local ports whose flows share a slot.
fn colliding() -> (u16, u16) {
    let at = |port: u16| slot(&FlowKey { local_port: port.to_be_bytes(), ..flow(UDP) }, Direction::Outbound);
    let other = (2..=u16::MAX).find(|port| at(*port) == at(1));
    (1, other.expect("65 535 flows, 2 048 slots"))
}
