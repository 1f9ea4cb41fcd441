//! Rows for `from_overlay`: what the kernel decapsulated.

use loden_agent::dataplane::Program::FromOverlay;
use loden_ebpf::reason::Reason::*;

use crate::{case::Case, packet::*, rig::*, samples::*};

#[test]
fn what_the_kernel_decapsulated_is_delivered_or_passed_on_unchanged() {
    crate::case::run("from_overlay", &cases());
}

pub(crate) fn cases() -> Vec<Case> {
    let whole = (20 + 8 + PAYLOAD) as u16;
    let mut cases = vec![
        arrives("TCP data", inner_tcp(ACK)),
        arrives("TCP SYN for an endpoint that is not gated", inner_tcp(SYN)),
        arrives("UDP", inner_udp()),
        arrives("echo request", inner_echo(8)),
        arrives("echo reply", inner_echo(0)),
        arrives("an aggregate", inner_tcp(ACK)).gso(60),
        arrives("an aggregate of datagrams", inner_udp()).gso(60),
        arrives("CE, merged by the kernel", inner_udp().tos(3)),
        arrives("TOS stays", inner_udp().tos(0xb9)),
        case("TTL 2", &inner_udp().ttl(2)).delivers(FastOverlay, delivered(inner_udp()).ttl(1)),
        slow("TTL 1", &inner_udp().ttl(1)),
        slow("TTL 0", &inner_udp().ttl(0)),
        slow("options", &inner_udp().options(&[1; 4])),
        slow("version 6", &inner_udp().version(6)),
        slow("first fragment", &inner_udp().fragment(MF)),
        slow("later fragment", &inner_udp().fragment(9)),
        slow("SCTP", &inner_udp().protocol(SCTP)),
        slow("ICMP error", &inner_ip().icmp(3, 4, 0, 1400).payload(28)),
        slow("total length one too small", &inner_udp().total_len(whole - 1)),
        slow("total length one too large", &inner_udp().total_len(whole + 1)),
        slow("ARP", &Packet::ethernet([0xff; 6], PEER_VTEP_MAC).ether_type(ARP).payload(28)),
        slow("IPv6", &Packet::ethernet(VTEP_MAC, PEER_VTEP_MAC).ether_type(IPV6).payload(48)),
        slow("VLAN tag", &inner_udp().vlan(3)),
        slow("for another MAC", &inner_udp().macs(POD_MAC, PEER_VTEP_MAC)),
        slow("broadcast frame", &inner_udp().macs([0xff; 6], PEER_VTEP_MAC)),
        slow("to an unknown pod", &inner_udp().to(UNKNOWN_POD)),
        slow("to the node's own address in the overlay", &inner_udp().to([10, 5, 1, 0].into())),
        slow("to another subnet", &inner_udp().to(WIDE_REMOTE)),
        slow("from outside the network", &inner_udp().from(OUTSIDE)),
        slow("from a vacant subnet", &inner_udp().from(VACANT)),
        slow("from the own subnet", &inner_udp().from(OTHER_POD)),
        slow("strict: not qualified", &inner_tcp(ACK)).strict().then(|rig| {
            let flow = rig.flow(&flow(TCP)).expect("point 1 is noted");
            assert!(flow.inbound_seen > 0 && flow.outbound_seen == 0);
        }),
        slow("strict: SYN is noted too", &inner_tcp(SYN))
            .strict()
            .then(|rig| assert!(rig.flow(&flow(TCP)).is_some())),
        slow("a peer's packet of no flow is not noted", &inner_udp().protocol(SCTP))
            .then(|rig| assert!(rig.flows().is_empty())),
        slow("open: the slow first fragment is noted", &inner_udp().fragment(MF))
            .then(|rig| assert!(rig.flow(&flow(UDP)).is_some())),
    ];
    for (name, packet) in [
        ("TCP", inner_tcp(ACK)),
        ("UDP", inner_udp()),
        ("echo request", inner_echo(8)),
        ("echo reply", inner_echo(0)),
    ] {
        cases.push(arrives(&format!("strict: a qualified {name}"), packet).strict().after(qualify));
    }
    cases
}

fn case(what: &str, packet: &Packet) -> Case {
    Case::new(format!("overlay: {what}"), FromOverlay, packet)
}

fn arrives(what: &str, packet: Packet) -> Case {
    case(what, &packet).mark(7).delivers(FastOverlay, delivered(packet))
}

fn slow(what: &str, packet: &Packet) -> Case {
    case(what, packet).mark(7).passes(PassOverlay)
}
