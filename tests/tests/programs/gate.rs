//! Rows for the flow gate at `from_pod` and `from_wire`: what is fast depends on what was observed.

use loden_agent::dataplane::Program::{FromPod, FromWire};
use loden_ebpf::{
    abi::{Flow, FlowKey},
    reason::Reason::{self, *},
};

use crate::{case::Case, packet::*, rig::*, samples::*};

#[test]
fn a_gated_flow_is_fast_only_while_it_is_qualified() {
    crate::case::run("gate", &cases());
}

/// Until when: after any clock that `CLOCK_MONOTONIC` reaches, and before any.
const FOREVER: u64 = u64::MAX;
const EXPIRED: u64 = 1;

pub(crate) fn cases() -> Vec<Case> {
    [outbound(), inbound()].into_iter().flatten().collect()
}

fn set(rig: &mut Rig, key: FlowKey, change: impl FnOnce(&mut Flow)) {
    let mut entry = Flow { epoch: rig.epoch(), ..Flow::default() };
    change(&mut entry);
    rig.set_flow(key, entry);
}

fn all_out(rig: &mut Rig) {
    for key in flows() {
        set(rig, key, |flow| flow.outbound_until = FOREVER);
    }
}

fn all_in(rig: &mut Rig) {
    for key in flows() {
        set(rig, key, |flow| flow.inbound_until = FOREVER);
    }
}

fn outbound() -> Vec<Case> {
    let case = |what: &str, packet: &Packet| Case::new(format!("from_pod: {what}"), FromPod, packet).strict();
    let mut cases = Vec::new();
    let fast = [
        ("TCP data", sent_tcp(ACK)),
        ("TCP data with PSH", sent_tcp(ACK | PSH)),
        ("TCP without flags", sent_tcp(0)),
        ("UDP", sent_udp()),
        ("echo request", sent_echo(8)),
        ("echo reply", sent_echo(0)),
    ];
    for (what, packet) in fast {
        cases.push(case(&format!("{what}, unknown flow"), &packet).passes(PassPodGate).then(noted_out));
        cases.push(
            case(&format!("{what}, qualified"), &packet)
                .after(all_out)
                .encapsulates(encapsulated(packet.clone().ttl(63))),
        );
        cases.push(
            case(&format!("{what}, the other way qualified"), &packet).after(all_in).passes(PassPodGate),
        );
    }
    for flags in (0..=255u8).filter(|flags| flags & (SYN | FIN | RST) != 0) {
        cases.push(
            case(&format!("TCP flags {flags:#04x}, qualified"), &sent_tcp(flags))
                .after(all_out)
                .passes(PassPodTcpControl)
                .then(noted_out),
        );
    }
    // Whatever else sends it into the host stack is noted too, so that point 2 knows it.
    let slow: [(&str, Packet, Reason); 7] = [
        ("TTL 1", sent_udp().ttl(1), PassPodTtl),
        ("options", sent_udp().options(&[1; 8]), PassPodOptions),
        ("a first fragment", sent_udp().fragment(MF), PassPodFragment),
        ("a MAC that is not the gateway's", sent_udp().macs(OTHER_POD_MAC, POD_MAC), PassPodNotForGateway),
        ("no uplink", sent_udp().to(KERNEL_REMOTE), PassPodNoUplink),
        ("too big", sent_ip().udp(LOCAL_PORT, REMOTE_PORT).payload(1400), PassPodTooBig),
        ("lengths that disagree", sent_udp().total_len(40), PassPodMalformed),
    ];
    for (what, packet, reason) in slow {
        for gate in ["strict", "open"] {
            let case = case(&format!("{what}, {gate}"), &packet).passes(reason).then(|rig| {
                let flows = rig.flows();
                assert_eq!(flows.len(), 1);
                assert!(flows[0].1.outbound_seen > 0);
            });
            cases.push(if gate == "open" { case.open() } else { case });
        }
    }
    cases.extend([
        case("a later fragment is of no flow", &sent_udp().fragment(9))
            .passes(PassPodFragment)
            .then(|rig| assert!(rig.flows().is_empty())),
        case("SCTP is of no flow", &sent_udp().protocol(SCTP))
            .passes(PassPodProtocol)
            .then(|rig| assert!(rig.flows().is_empty())),
        case("TCP cut before its flags", &sent_ip().protocol(TCP).payload(13)).passes(PassPodProtocol),
        case("TCP cut before its flags, open", &sent_ip().protocol(TCP).payload(13))
            .open()
            .passes(PassPodProtocol),
        case("expired", &sent_udp())
            .after(|rig| set(rig, flow(UDP), |flow| flow.outbound_until = EXPIRED))
            .passes(PassPodGate),
        case("the epoch before", &sent_udp())
            .after(all_out)
            .after(|rig| rig.dataplane.bump_epoch().unwrap())
            .passes(PassPodGate),
        case("another flow of the endpoint", &sent_ip().udp(1, 2)).after(all_out).passes(PassPodGate),
        case("the same ports of another protocol", &sent_udp())
            .after(|rig| set(rig, flow(TCP), |flow| flow.outbound_until = FOREVER))
            .passes(PassPodGate),
        case("no outbound entry makes another pod's source right", &sent_udp().from(OTHER_POD))
            .after(all_out)
            .drops(DropForgedPodSource),
        case("fast packets write nothing", &sent_udp())
            .after(all_out)
            .encapsulates(encapsulated(sent_udp().ttl(63)))
            .then(|rig| assert_eq!(rig.flow(&flow(UDP)).unwrap().outbound_seen, 0)),
        case("open: an endpoint whose flows nobody has looked at", &sent_udp())
            .open()
            .after(|rig| rig.unprove(POD))
            .passes(PassPodGate),
        case("open: the same, the flow qualified", &sent_udp())
            .open()
            .after(|rig| rig.unprove(POD))
            .after(all_out)
            .encapsulates(encapsulated(sent_udp().ttl(63))),
        case("open: fast packets know no flow", &sent_udp())
            .open()
            .encapsulates(encapsulated(sent_udp().ttl(63)))
            .then(|rig| assert!(rig.flows().is_empty())),
    ]);
    cases
}

fn noted_out(rig: &mut Rig) {
    let flows = rig.flows();
    assert!(flows.iter().any(|(_, flow)| flow.outbound_seen > 0 && flow.inbound_seen == 0), "{flows:?}");
}

fn inbound() -> Vec<Case> {
    let case = |what: &str, inner: &Packet| {
        Case::new(format!("from_wire: {what}"), FromWire, &outer().then(inner.clone())).strict()
    };
    let mut cases = Vec::new();
    let fast = [
        ("TCP data", inner_tcp(ACK)),
        ("TCP data with PSH", inner_tcp(ACK | PSH)),
        ("UDP", inner_udp()),
        ("echo request", inner_echo(8)),
        ("echo reply", inner_echo(0)),
    ];
    for (what, packet) in fast {
        // The kernel decapsulates it; point 1 is the VXLAN device's.
        cases.push(
            case(&format!("{what}, unknown flow"), &packet)
                .passes(PassWireGate)
                .then(|rig| assert!(rig.flows().is_empty())),
        );
        cases.push(
            case(&format!("{what}, qualified"), &packet)
                .after(all_in)
                .delivers(FastDecap, delivered(packet.clone())),
        );
        cases.push(
            case(&format!("{what}, the other way qualified"), &packet).after(all_out).passes(PassWireGate),
        );
    }
    for flags in (0..=255u8).filter(|flags| flags & (SYN | FIN | RST) != 0) {
        cases.push(
            case(&format!("TCP flags {flags:#04x}, qualified"), &inner_tcp(flags))
                .after(all_in)
                .passes(PassWireTcpControl),
        );
    }
    cases.extend([
        case("expired", &inner_udp())
            .after(|rig| set(rig, flow(UDP), |flow| flow.inbound_until = EXPIRED))
            .passes(PassWireGate),
        case("the epoch before", &inner_udp())
            .after(all_in)
            .after(|rig| rig.dataplane.bump_epoch().unwrap())
            .passes(PassWireGate),
        case("TCP cut before its flags", &inner_ip().protocol(TCP).payload(13)).passes(PassWireProtocol),
        case("TCP cut before its flags, open", &inner_ip().protocol(TCP).payload(13))
            .open()
            .passes(PassWireProtocol),
        case("a qualified flow does not excuse a forged source", &inner_udp().from(WIDE_REMOTE))
            .after(all_in)
            .drops(DropForgedPeerSource),
        Case::new(
            "from_wire: a qualified flow does not excuse a stranger",
            FromWire,
            &outer().from(STRANGER).then(inner_udp()),
        )
        .strict()
        .after(all_in)
        .drops(DropUnknownVtep),
    ]);
    cases
}
