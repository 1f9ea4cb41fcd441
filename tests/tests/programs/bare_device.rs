//! The overlay's device where its packets have no Ethernet header, as WireGuard's have none. A trial run gives every packet
//! one, so here the programs are attached: to a pod's veth, and to a tun device, which stands for that of WireGuard and
//! whose other end is the test's.
//!
//! Each packet is sent on a node with the programs and on one without, and what comes of it is compared to the byte.

mod stage;

use std::net::Ipv4Addr;

use loden_agent::dataplane::Listener;
use loden_ebpf::{
    reason::Reason::{
        self, DropForgedPodSource, FastOverlay, FastOverlayOut, NoteTranslated, PassOverlay, PassPodFragment,
        PassPodGate, PassPodNoPeer, PassPodOptions, PassPodProtocol, PassPodTcpControl, PassPodTooBig,
        PassPodTtl,
    },
    trace::mapped,
};
use loden_tests::{netns, process::wait_for};

use self::stage::{End, Gate, LIMIT, MTU, Make, Stage};
use crate::{
    packet::{ACK, MF, Packet, SCTP, SYN},
    rig::{GATEWAY_MAC, OTHER_POD, POD, POD_MAC, REMOTE},
    trace,
    v6::{self, frame::Ip},
};

/// Ports of the pod and of its remote.
const PORTS: (u16, u16) = (40_001, 80);
/// An address that the host translates to the remote's.
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);

/// An IPv4 header, without anything in front of it.
fn ip(from: End) -> Packet {
    let header = Packet::ethernet(GATEWAY_MAC, POD_MAC);
    if from == End::Pod { header.ipv4(POD, REMOTE) } else { header.ipv4(REMOTE, POD) }
}

fn ports(from: End) -> (u16, u16) {
    if from == End::Pod { PORTS } else { (PORTS.1, PORTS.0) }
}

/// The packet of a frame.
fn bare(packet: &Packet) -> Vec<u8> {
    packet.build().split_off(14)
}

fn ip6(from: End) -> Ip {
    if from == End::Pod { Ip::new(v6::POD, v6::REMOTE) } else { Ip::new(v6::REMOTE, v6::POD) }
}

/// What it is, what the programs say of it, and where it, or the kernel's answer, comes out.
type Row = (&'static str, Reason, End, Box<Make>);

fn rows(from: End) -> Vec<Row> {
    let (fast, to) = match from {
        End::Pod => (FastOverlayOut, End::Device),
        End::Device => (FastOverlay, End::Pod),
    };
    let (a, b) = ports(from);
    let slow = |of_pod| if from == End::Pod { of_pod } else { PassOverlay };
    let udp = move |payload: &[u8]| ip(from).udp(a, b).bytes(payload);
    let padded = |marker: &[u8], len: usize| [marker, &vec![7; len - marker.len()]].concat();
    let room = usize::from(MTU) - 28;
    let mut rows: Vec<Row> = vec![
        ("UDP", fast, to, Box::new(move |marker| bare(&udp(marker)))),
        ("TOS", fast, to, Box::new(move |marker| bare(&udp(marker).tos(0xbb)))),
        ("TCP", fast, to, Box::new(move |marker| bare(&ip(from).tcp(a, b, ACK).bytes(marker)))),
        ("SYN", fast, to, Box::new(move |marker| bare(&ip(from).tcp(a, b, SYN).bytes(marker)))),
        ("echo", fast, to, Box::new(move |marker| bare(&ip(from).icmp(8, 0, 7, 1).bytes(marker)))),
        ("the MTU", fast, to, Box::new(move |marker| bare(&udp(&padded(marker, room))))),
        ("TTL 2", fast, to, Box::new(move |marker| bare(&udp(marker).ttl(2)))),
        ("TTL 1", slow(PassPodTtl), from, Box::new(move |marker| bare(&udp(marker).ttl(1)))),
        ("a fragment", slow(PassPodFragment), to, Box::new(move |marker| bare(&udp(marker).fragment(MF)))),
        ("options", slow(PassPodOptions), to, Box::new(move |marker| bare(&udp(marker).options(&[1; 4])))),
        ("SCTP", slow(PassPodProtocol), to, Box::new(move |marker| bare(&udp(marker).protocol(SCTP)))),
        ("IPv6: UDP", fast, to, Box::new(move |marker| ip6(from).udp(a, b, marker))),
        (
            "IPv6: class, label",
            fast,
            to,
            Box::new(move |marker| ip6(from).class(0xbb).label(0x12345).udp(a, b, marker)),
        ),
        ("IPv6: TCP", fast, to, Box::new(move |marker| ip6(from).tcp(a, b, ACK, marker))),
        ("IPv6: echo", fast, to, Box::new(move |marker| ip6(from).icmp(128, 7, marker))),
        ("IPv6: the MTU", fast, to, Box::new(move |marker| ip6(from).udp(a, b, &padded(marker, room - 20)))),
        (
            "IPv6: hop limit 1",
            slow(PassPodTtl),
            from,
            Box::new(move |marker| ip6(from).hops(1).udp(a, b, marker)),
        ),
    ];
    if from == End::Pod {
        // Of the kernel's own making: what the device does not take.
        rows.push((
            "too big",
            PassPodTooBig,
            from,
            Box::new(move |marker| bare(&udp(&padded(marker, room + 1)))),
        ));
        rows.push((
            "IPv6: too big",
            PassPodTooBig,
            from,
            Box::new(move |marker| ip6(from).udp(a, b, &padded(marker, room - 19))),
        ));
    } else {
        // WireGuard would not have let it in.
        let stranger = move |marker: &[u8]| bare(&udp(marker).from([10, 5, 77, 1].into()));
        rows.push(("from nobody's subnet", PassOverlay, to, Box::new(stranger)));
    }
    rows
}

/// What the kernel makes itself has an id of its own: of that, what it says.
fn said(found: &[u8], from: End, to: End) -> &[u8] {
    let ip = if to == End::Pod { 14 } else { 0 };
    if from != to {
        return found;
    }
    &found[ip + if found[ip] >> 4 == 6 { 40 } else { 20 }..]
}

fn compare(from: End) {
    Stage::run(Some(Gate::Open), |stage| {
        Stage::run(None, |other| {
            for (what, reason, to, packet) in rows(from) {
                let (before, marker) = (stage.counted(reason), stage.marker());
                let packet = packet(&marker);
                let with = stage.send(from, &packet, marker, to);
                assert_eq!(stage.counted(reason) - before, 1, "{what}: {}", reason.name());
                let without = other.send(from, &packet, marker, to);
                assert_eq!(said(&with, from, to), said(&without, from, to), "{what}");
            }
        });
    });
}

#[test]
fn what_a_pod_sends_comes_out_of_the_device_as_the_kernel_would_send_it() {
    compare(End::Pod);
}

#[test]
fn what_the_device_receives_comes_to_the_pod_as_the_kernel_would_deliver_it() {
    compare(End::Device);
}

#[test]
fn through_the_strict_gate_a_direction_is_fast_after_the_kernel_has_passed_it() {
    Stage::run(Some(Gate::Strict), |stage| {
        for (from, to, slow, fast) in [
            (End::Pod, End::Device, PassPodGate, FastOverlayOut),
            (End::Device, End::Pod, PassOverlay, FastOverlay),
        ] {
            let (a, b) = ports(from);
            let udp = move |marker: &[u8]| bare(&ip(from).udp(a, b).bytes(marker));
            let udp6 = move |marker: &[u8]| ip6(from).udp(a, b, marker);
            let syn = move |marker: &[u8]| bare(&ip(from).tcp(a, b, SYN).bytes(marker));
            let ack = move |marker: &[u8]| bare(&ip(from).tcp(a, b, ACK).bytes(marker));
            let control = if from == End::Pod { PassPodTcpControl } else { PassOverlay };
            stage.judged("the first", from, slow, to, &udp);
            stage.judged("the second", from, fast, to, &udp);
            stage.judged("the first of IPv6", from, slow, to, &udp6);
            stage.judged("the second of IPv6", from, fast, to, &udp6);
            stage.judged("SYN", from, control, to, &syn);
            stage.judged("the first ACK", from, slow, to, &ack);
            stage.judged("the second ACK", from, fast, to, &ack);
            stage.judged("another SYN", from, control, to, &syn);
            stage.judged("the first ACK after that", from, slow, to, &ack);
        }
        assert_eq!(stage.counted(NoteTranslated), 0);
    });
}

#[test]
fn a_listener_is_told_the_addresses_whether_there_is_an_ethernet_header_or_not() {
    Stage::run(Some(Gate::Strict), |stage| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _inside = runtime.enter();
        let mut listener = Listener::open(&stage.pins, trace::ALL).unwrap();
        for (from, to, slow, fast) in [
            (End::Pod, End::Device, PassPodGate, FastOverlayOut),
            (End::Device, End::Pod, PassOverlay, FastOverlay),
        ] {
            let (a, b) = ports(from);
            let ends = if from == End::Pod { (POD, REMOTE) } else { (REMOTE, POD) };
            for reason in [slow, fast] {
                stage.judged("UDP", from, reason, to, &move |marker| bare(&ip(from).udp(a, b).bytes(marker)));
                let told = trace::told(&runtime, &mut listener);
                let of_reason: Vec<_> =
                    told.iter().filter(|verdict| verdict.reason == reason as u32).collect();
                assert_eq!(of_reason.len(), 1, "{told:?}");
                let (source, destination) = (mapped(ends.0.octets()), mapped(ends.1.octets()));
                assert_eq!((of_reason[0].source, of_reason[0].source_port), (source, a), "{told:?}");
                assert_eq!(
                    (of_reason[0].destination, of_reason[0].destination_port),
                    (destination, b),
                    "{told:?}"
                );
            }
        }
    });
}

#[test]
fn a_flow_that_the_host_translates_takes_its_way_through_the_open_gate() {
    Stage::run(Some(Gate::Open), |stage| {
        let (a, b) = PORTS;
        let direct = move |marker: &[u8]| bare(&ip(End::Pod).udp(a, b).bytes(marker));
        let answer = move |marker: &[u8]| bare(&ip(End::Device).udp(b, a).bytes(marker));
        stage.judged("not translated", End::Pod, FastOverlayOut, End::Device, &direct);
        netns::run(
            "nft",
            &["add table ip nat; add chain ip nat pre { type nat hook prerouting priority -100; }; \
                add rule ip nat pre ip daddr 10.96.0.1 dnat to 10.5.2.9"],
        )
        .unwrap();
        let service = move |marker: &[u8]| bare(&ip(End::Pod).to(SERVICE).udp(a, b).bytes(marker));
        let noted = stage.counted(NoteTranslated);
        let sent = stage.judged("to the service", End::Pod, PassPodNoPeer, End::Device, &service);
        assert_eq!(sent[16..20], REMOTE.octets());
        assert_eq!(stage.counted(NoteTranslated) - noted, 1);
        let back = stage.judged("its answer", End::Device, PassOverlay, End::Pod, &answer);
        assert_eq!(back[26..30], SERVICE.octets(), "from the address that the pod has spoken to");
    });
}

#[test]
fn a_pod_that_sends_from_another_ones_address_reaches_nobody() {
    Stage::run(Some(Gate::Open), |stage| {
        let before = stage.counted(DropForgedPodSource);
        let forged = stage.marker();
        let (a, b) = PORTS;
        stage.put(End::Pod, &bare(&ip(End::Pod).from(OTHER_POD).udp(a, b).bytes(&forged)));
        // Behind it on the same way.
        let marker = stage.marker();
        stage.put(End::Pod, &bare(&ip(End::Pod).udp(a, b).bytes(&marker)));
        wait_for("the packet behind the forged one", LIMIT, || {
            let packet = stage.device.next().unwrap()?;
            assert!(!packet.windows(8).any(|bytes| bytes == forged), "{packet:02x?}");
            packet.windows(8).any(|bytes| bytes == marker).then_some(())
        })
        .unwrap();
        assert_eq!(stage.counted(DropForgedPodSource) - before, 1);
    });
}
