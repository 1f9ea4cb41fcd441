//! Rows for `to_overlay`, `to_wire` and `to_pod`: point 2 of the flow gate, which only looks.

use loden_agent::dataplane::Program::{self, FromOverlay, FromPod, ToOverlay, ToPod, ToWire};
use loden_ebpf::{
    abi::{Flow, FlowKey},
    reason::Reason::*,
};

use nix::sys::socket::SockType;

use crate::{case::Case, packet::*, rig::*, samples::*};

#[test]
fn point_two_tells_translated_flows_from_those_that_went_in_as_they_came_out() {
    crate::case::run("observe", &cases());
}

pub(crate) fn cases() -> Vec<Case> {
    [outbound(ToOverlay), outbound(ToWire), inbound(), taken_tuples(), sequences(), handshakes()]
        .into_iter()
        .flatten()
        .collect()
}

fn outbound(program: Program) -> Vec<Case> {
    // As it leaves: the MACs are the device's, which nobody looks at here.
    let ip = || Packet::ethernet(PEER_VTEP_MAC, VTEP_MAC).ipv4(POD, REMOTE).ttl(63);
    let udp = || ip().udp(LOCAL_PORT, REMOTE_PORT).payload(PAYLOAD);
    let name = program.name();
    let case = |what: &str, packet: &Packet| Case::new(format!("{name}: {what}"), program, packet);
    let gates = |rig: &mut Rig| {
        assert!(rig.is_gated(POD) && !rig.is_gated(OTHER_POD), "the flow's endpoint alone is gated");
        assert_eq!(rig.flow(&flow(UDP)).map(|flow| flow.translated), Some(1));
    };
    vec![
        case("a flow that never went in, open gate", &udp()).passes(NoteTranslated).then(gates),
        case("a flow that never went in, strict gate", &udp()).strict().passes(NoteTranslated).then(gates),
        case("a first fragment that never went in", &udp().fragment(MF)).passes(NoteTranslated),
        case("options that never went in", &udp().options(&[1; 4])).passes(NoteTranslated).then(gates),
        case("TCP that never went in", &ip().tcp(1, 2, SYN)).passes(NoteTranslated),
        case("an echo that never went in", &ip().icmp(0, 0, 7, 1)).passes(NoteTranslated),
        case("a flow that went in too long ago", &udp())
            .after(|rig| rig.set_flow(flow(UDP), Flow { outbound_seen: 1, ..Flow::default() }))
            .passes(NoteTranslated)
            .then(gates),
        case("a flow that went in the other way only", &udp())
            .after(|rig| {
                rig.run(FromOverlay, &inner_udp().fragment(MF).build(), Context::default());
            })
            .passes(NoteTranslated)
            .then(gates),
        case("to no peer", &udp().to(OUTSIDE)).ignores().then(nothing_known),
        case("to another local pod", &udp().to(OTHER_POD)).ignores().then(nothing_known),
        case("from no endpoint", &udp().from(UNKNOWN_POD)).ignores().then(nothing_known),
        case("from the node", &udp().from(VTEP)).ignores().then(nothing_known),
        case("a later fragment", &udp().fragment(8)).ignores().then(nothing_known),
        case("SCTP", &udp().protocol(SCTP)).ignores().then(nothing_known),
        case("an ICMP error", &ip().icmp(11, 0, 0, 0).payload(28)).ignores().then(nothing_known),
        case("ARP", &Packet::ethernet([0xff; 6], VTEP_MAC).ether_type(ARP).payload(28)).ignores(),
        case("IPv6", &Packet::ethernet(PEER_VTEP_MAC, VTEP_MAC).ether_type(IPV6).payload(60)).ignores(),
        case("a tagged frame", &udp().vlan(3)).ignores(),
    ]
}

fn inbound() -> Vec<Case> {
    let ip = || Packet::ethernet(POD_MAC, GATEWAY_MAC).ipv4(REMOTE, POD).ttl(62);
    let udp = || ip().udp(REMOTE_PORT, LOCAL_PORT).payload(PAYLOAD);
    let case = |what: &str, packet: &Packet| Case::new(format!("to_pod: {what}"), ToPod, packet);
    vec![
        case("a flow that never went in, open gate", &udp()).passes(NoteTranslated).then(|rig| {
            assert!(rig.is_gated(POD) && !rig.is_gated(OTHER_POD));
        }),
        case("a flow that never went in, strict gate", &udp()).strict().passes(NoteTranslated),
        case("TCP that never went in", &ip().tcp(80, 9, ACK)).passes(NoteTranslated),
        case("from no peer", &udp().from(OUTSIDE)).ignores().then(nothing_known),
        case("from another local pod, never gone in", &udp().from(OTHER_POD))
            .passes(NoteTranslated)
            .then(|rig| assert!(rig.is_gated(POD) && rig.is_gated(OTHER_POD), "both ends are gated")),
        case("flooded by a bridge: to another pod's address", &udp().to(OTHER_POD))
            .ignores()
            .then(nothing_known),
        case("to no endpoint", &udp().to(UNKNOWN_POD)).ignores().then(nothing_known),
        case("a later fragment", &udp().fragment(8)).ignores().then(nothing_known),
        case("an ICMP error", &ip().icmp(3, 3, 0, 0).payload(28)).ignores().then(nothing_known),
        case("ARP", &Packet::ethernet([0xff; 6], GATEWAY_MAC).ether_type(ARP).payload(28)).ignores(),
    ]
}

/// The tuple of a connection that the pod has itself.
fn taken_tuples() -> Vec<Case> {
    fn has_tcp(rig: &mut Rig) {
        rig.open_socket(SockType::Stream, LOCAL_PORT, Some(REMOTE_PORT));
    }
    fn has_udp(rig: &mut Rig) {
        rig.open_socket(SockType::Datagram, LOCAL_PORT, Some(REMOTE_PORT));
    }
    fn is_held(rig: &mut Rig, protocol: u8) {
        assert!(!rig.is_gated(POD), "its connection stays fast");
        let flow = rig.flow(&flow(protocol)).expect("the connection is known");
        assert!(flow.outbound_until > 0 && flow.inbound_until > 0 && flow.translated == 0);
    }
    let out = |what: &str, packet: &Packet| Case::new(format!("to_overlay: {what}"), ToOverlay, packet);
    let tcp = |flags| sent_tcp(flags).ttl(63);
    let udp = || sent_udp().ttl(63);
    vec![
        out("a SYN of the connection's tuple", &tcp(SYN))
            .after(has_tcp)
            .drops(DropTupleTaken)
            .then(|rig| is_held(rig, TCP)),
        out("not its later packets", &tcp(ACK)).after(has_tcp).passes(NoteTranslated),
        out("nor its answer", &tcp(SYN | ACK)).after(has_tcp).passes(NoteTranslated),
        out("the host keeps tuples apart by itself, strict gate", &tcp(SYN))
            .strict()
            .after(has_tcp)
            .passes(NoteTranslated),
        out("of another port", &tcp(SYN))
            .after(|rig| rig.open_socket(SockType::Stream, LOCAL_PORT, Some(REMOTE_PORT + 1)))
            .passes(NoteTranslated),
        out("another protocol's", &tcp(SYN)).after(has_udp).passes(NoteTranslated),
        out("a datagram of a connected socket's tuple", &udp())
            .after(has_udp)
            .drops(DropTupleTaken)
            .then(|rig| is_held(rig, UDP)),
        out("a datagram of a flow that is known to be translated", &udp())
            .after(has_udp)
            .after(|rig| rig.set_flow(flow(UDP), Flow { translated: 1, ..Flow::default() }))
            .passes(NoteTranslated),
        out("a datagram where the socket is connected to nobody", &udp())
            .after(|rig| rig.open_socket(SockType::Datagram, LOCAL_PORT, None))
            .passes(NoteTranslated),
        Case::new("to_pod: a SYN of the connection's tuple", ToPod, &delivered(inner_tcp(SYN)))
            .after(has_tcp)
            .drops(DropTupleTaken)
            .then(|rig| is_held(rig, TCP)),
        Case::new("to_pod: a datagram of a connected socket's tuple", ToPod, &delivered(inner_udp()))
            .after(has_udp)
            .drops(DropTupleTaken)
            .then(|rig| is_held(rig, UDP)),
        Case::new("from_pod: the connection of a gated pod goes on past the host", FromPod, &sent_udp())
            .after(has_udp)
            .after(|rig| {
                let another = sent_ip().udp(LOCAL_PORT + 1, REMOTE_PORT).ttl(63);
                for translated in [another, sent_udp().ttl(63)] {
                    rig.run(ToOverlay, &translated.build(), Context::default());
                }
                assert!(rig.is_gated(POD), "by the other flow");
            })
            .encapsulates(encapsulated(sent_udp().ttl(63))),
    ]
}

fn nothing_known(rig: &mut Rig) {
    assert!(rig.flows().is_empty());
    assert!(!rig.is_gated(POD));
}

/// Through the host stack, simulated: point 1, then point 2.
fn sequences() -> Vec<Case> {
    fn goes_in(rig: &mut Rig) {
        rig.run(FromPod, &sent_udp().build(), Context::default());
    }
    fn comes_out(rig: &mut Rig) {
        rig.run(ToOverlay, &sent_udp().ttl(63).build(), Context::default());
    }
    fn arrives(rig: &mut Rig) {
        rig.run(FromOverlay, &inner_udp().build(), Context::default());
    }
    fn is_delivered(rig: &mut Rig) {
        rig.run(ToPod, &delivered(inner_udp()).build(), Context::default());
    }
    fn flow_of(rig: &Rig, key: &FlowKey) -> Flow {
        rig.flow(key).expect("the flow is known")
    }
    let pod = |what, packet| Case::new(what, FromPod, packet).strict();
    let fast = || encapsulated(sent_udp().ttl(63));
    vec![
        Case::new("outbound: comes out as it went in", ToOverlay, &sent_udp().ttl(63))
            .strict()
            .after(goes_in)
            .ignores()
            .then(|rig| {
                let flow = flow_of(rig, &flow(UDP));
                assert!(flow.outbound_until > flow.outbound_seen && flow.inbound_until == 0);
                assert!(!rig.is_gated(POD));
            }),
        Case::new("inbound: comes out as it went in", ToPod, &delivered(inner_udp()))
            .strict()
            .after(arrives)
            .ignores()
            .then(|rig| {
                let flow = flow_of(rig, &flow(UDP));
                assert!(flow.inbound_until > flow.inbound_seen && flow.outbound_until == 0);
            }),
        pod("outbound: another packet of the tuple proves nothing", &sent_udp())
            .after(goes_in)
            .after(|rig| {
                rig.run(ToOverlay, &sent_udp().ttl(63).id(0x4321).build(), Context::default());
                assert!(!rig.is_gated(POD), "nor does it count as translated");
            })
            .passes(PassPodGate),
        pod("outbound: point 1 alone proves nothing", &sent_udp()).after(goes_in).passes(PassPodGate),
        pod("outbound: fast after both points", &sent_udp())
            .after(goes_in)
            .after(comes_out)
            .encapsulates(fast()),
        pod("outbound: not what inbound has proven", &sent_udp())
            .after(arrives)
            .after(is_delivered)
            .passes(PassPodGate),
        pod("outbound: not in the next epoch", &sent_udp())
            .after(goes_in)
            .after(comes_out)
            .after(|rig| rig.dataplane.bump_epoch().unwrap())
            .passes(PassPodGate),
        pod("outbound: not what went in before the epoch and came out in it", &sent_udp())
            .after(goes_in)
            .after(|rig| rig.dataplane.bump_epoch().unwrap())
            .after(comes_out)
            .passes(PassPodGate),
        pod("outbound: in the next epoch, after both points again", &sent_udp())
            .after(goes_in)
            .after(comes_out)
            .after(|rig| rig.dataplane.bump_epoch().unwrap())
            .after(goes_in)
            .after(comes_out)
            .encapsulates(fast()),
        pod("outbound: not another port", &sent_ip().udp(LOCAL_PORT + 1, REMOTE_PORT))
            .after(goes_in)
            .after(comes_out)
            .passes(PassPodGate),
        Case::new("inbound: fast after both points", FromOverlay, &inner_udp())
            .strict()
            .after(arrives)
            .after(is_delivered)
            .delivers(FastOverlay, delivered(inner_udp())),
        Case::new(
            "inbound at the uplink: fast after both points",
            Program::FromWire,
            &outer().then(inner_udp()),
        )
        .strict()
        .after(arrives)
        .after(is_delivered)
        .delivers(FastDecap, delivered(inner_udp())),
        Case::new("open: what came out translated gates the endpoint's next packet", FromPod, &sent_udp())
            .after(comes_out)
            .passes(PassPodGate),
        Case::new("open: and its SYN", FromPod, &sent_tcp(SYN)).after(comes_out).passes(PassPodTcpControl),
        Case::new("open: and what arrives for it", Program::FromWire, &outer().then(inner_udp()))
            .after(comes_out)
            .passes(PassWireGate),
        Case::new("open: and its SYN that arrives", Program::FromWire, &outer().then(inner_tcp(SYN)))
            .after(comes_out)
            .passes(PassWireTcpControl),
        Case::new(
            "open: a flow of the gated endpoint is fast again once it has qualified",
            FromPod,
            &sent_udp(),
        )
        .after(comes_out)
        .after(goes_in)
        .after(comes_out)
        .encapsulates(fast()),
    ]
}

/// The host's conntrack wants to see a connection's SYN, its answer, and what the SYN's sender says to that.
fn handshakes() -> Vec<Case> {
    fn leaves<const FLAGS: u8>(rig: &mut Rig) {
        rig.run(FromPod, &sent_tcp(FLAGS).build(), Context::default());
        rig.run(ToOverlay, &sent_tcp(FLAGS).ttl(63).build(), Context::default());
        assert!(!rig.is_gated(POD));
    }
    fn arrives<const FLAGS: u8>(rig: &mut Rig) {
        rig.run(FromOverlay, &inner_tcp(FLAGS).build(), Context::default());
        rig.run(ToPod, &delivered(inner_tcp(FLAGS)).build(), Context::default());
        assert!(!rig.is_gated(POD));
    }
    const ANSWER: u8 = SYN | ACK;
    let sends = |what: &str| Case::new(format!("TCP: {what}"), FromPod, &sent_tcp(ACK)).strict();
    let gets = |what: &str| {
        let packet = outer().then(inner_tcp(ACK));
        Case::new(format!("TCP: {what}"), Program::FromWire, &packet).strict()
    };
    let sent = || encapsulated(sent_tcp(ACK).ttl(63));
    let got = || delivered(inner_tcp(ACK));
    vec![
        sends("not fast after its SYN alone").after(leaves::<SYN>).passes(PassPodGate),
        sends("nor after the answer").after(leaves::<SYN>).after(arrives::<ANSWER>).passes(PassPodGate),
        sends("fast after its ACK")
            .after(leaves::<SYN>)
            .after(arrives::<ANSWER>)
            .after(leaves::<ACK>)
            .encapsulates(sent()),
        sends("the server's fast after its answer")
            .after(arrives::<SYN>)
            .after(leaves::<ANSWER>)
            .encapsulates(sent()),
        gets("what arrives is not fast after a SYN alone").after(arrives::<SYN>).passes(PassWireGate),
        gets("nor after this side's answer")
            .after(arrives::<SYN>)
            .after(leaves::<ANSWER>)
            .passes(PassWireGate),
        gets("what arrives is fast after an ACK that did")
            .after(arrives::<SYN>)
            .after(leaves::<ANSWER>)
            .after(arrives::<ACK>)
            .delivers(FastDecap, got()),
        gets("what arrives is fast after the answer that did")
            .after(leaves::<SYN>)
            .after(arrives::<ANSWER>)
            .delivers(FastDecap, got()),
        sends("a SYN ends what the tuple had").after(qualify).after(leaves::<SYN>).passes(PassPodGate),
        gets("a SYN ends what the tuple had the other way")
            .after(qualify)
            .after(leaves::<SYN>)
            .passes(PassWireGate),
        gets("a SYN that arrives ends what the tuple had")
            .after(qualify)
            .after(arrives::<SYN>)
            .passes(PassWireGate),
        sends("a SYN that arrives ends what the tuple had the other way")
            .after(qualify)
            .after(arrives::<SYN>)
            .passes(PassPodGate),
        sends("an answer ends nothing").after(qualify).after(arrives::<ANSWER>).encapsulates(sent()),
        Case::new("TCP: a SYN of another tuple ends nothing", FromPod, &sent_udp())
            .strict()
            .after(qualify)
            .after(leaves::<SYN>)
            .encapsulates(encapsulated(sent_udp().ttl(63))),
        Case::new("TCP: open, the handshake of a gated pod's connection", FromPod, &sent_tcp(ACK))
            .after(|rig| {
                rig.run(ToOverlay, &sent_udp().ttl(63).build(), Context::default());
                assert!(rig.is_gated(POD), "by a translated flow");
                rig.run(FromPod, &sent_tcp(SYN).build(), Context::default());
                rig.run(ToOverlay, &sent_tcp(SYN).ttl(63).build(), Context::default());
            })
            .passes(PassPodGate),
    ]
}
