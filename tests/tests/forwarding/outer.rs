//! The outer headers: what ECMP, RSS and reassembly on the underlay depend on.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream, UdpSocket},
};

use loden_tests::packet::{self, ETHERNET_LEN, Ipv4};

use crate::stage::{PATIENCE, Stage};

/// Where the UDP header, the VXLAN header and the inner IP header are in a frame.
const UDP: usize = ETHERNET_LEN + 20;
const INNER_IP: usize = UDP + 16 + ETHERNET_LEN;

fn is_vxlan(frame: &[u8]) -> bool {
    frame.len() > INNER_IP + 20
        && frame[12..14] == packet::IPV4.to_be_bytes()
        && frame[23] == packet::UDP
        && frame[UDP + 2..UDP + 4] == 8472_u16.to_be_bytes()
}

/// Sends the packets from the pod and returns what the other node's uplink receives of them.
fn on_the_underlay(stage: &Stage, packets: &[Ipv4]) -> Vec<Vec<u8>> {
    stage.at_wire[1].drain().unwrap();
    for packet in packets {
        stage.at_sender.send(&stage.sent_by_sender(&packet.bytes())).unwrap();
    }
    let marked =
        |frame: &[u8]| is_vxlan(frame) && frame[INNER_IP + 4..INNER_IP + 6] == 0x4c44_u16.to_be_bytes();
    let mut frames = Vec::new();
    while frames.len() < packets.len() {
        let more = stage.at_wire[1].until("an outer packet", PATIENCE, marked).unwrap();
        frames.extend(more.into_iter().filter(|frame| marked(frame)));
    }
    frames
}

fn outer_source_port(frame: &[u8]) -> u16 {
    u16::from_be_bytes([frame[UDP], frame[UDP + 1]])
}

/// Flows of every kind: each has a hash of its own.
fn flows(stage: &Stage) -> Vec<Ipv4> {
    let (from, to) = (stage.sender.address(), stage.destination.address());
    let mut packets = Vec::new();
    for i in 0..40 {
        packets.push(Ipv4::udp(from, to, (1000 + i, 7777), b"flow"));
        packets.push(Ipv4::tcp(from, to, (2000 + i * 7, 80), 16, b"flow"));
        packets.push(Ipv4::icmp(from, to, (8, 0), u32::from(i) << 16, b"flow"));
    }
    for tos in [0, 1, 2, 3, 0xb8, 0xbb] {
        packets.push(Ipv4 { tos, ..stage.datagram(b"tos") });
    }
    for fragment in [0, packet::DONT_FRAGMENT] {
        packets.push(Ipv4 { fragment, ..stage.datagram(&[7; 1422]) });
    }
    packets
}

#[test]
fn outer_headers_are_the_kernels_but_for_identification_and_checksum() {
    let mut stage = Stage::set(&["--gate=open"]);
    stage.warm_up();
    let flows = flows(&stage);
    let before = stage.counters();
    let fast = on_the_underlay(&stage, &flows);
    let counted = stage.counters()[0].since(&before[0]);
    assert!(counted.get("fast_encap") >= flows.len() as u64, "{counted:?}");
    assert!(fast.iter().all(|frame| frame[UDP + 6..UDP + 8] == [0, 0]), "no UDP checksum: RFC 7348");
    stage.restart(&["--datapath=kernel"]);
    stage.ping();
    let kernel = on_the_underlay(&stage, &flows);
    let comparable = |frame: &Vec<u8>| {
        let mut frame = frame.clone();
        assert_eq!(packet::checksum(&frame[ETHERNET_LEN..UDP]), 0, "the header's checksum");
        frame[ETHERNET_LEN + 4..ETHERNET_LEN + 6].fill(0);
        frame[ETHERNET_LEN + 10..ETHERNET_LEN + 12].fill(0);
        frame[UDP + 6..UDP + 8].fill(0);
        frame
    };
    for ((fast, kernel), flow) in fast.iter().zip(&kernel).zip(&flows) {
        assert_eq!(comparable(fast), comparable(kernel), "{flow:?}");
    }
    let ports: BTreeSet<u16> = fast.iter().map(|frame| outer_source_port(frame)).collect();
    // Echoes of one pair of hosts are one flow to the kernel, whatever their identifiers.
    assert!(ports.len() > 75, "{} source ports for 80 flows", ports.len());
}

#[test]
fn identifications_differ_so_that_fragments_are_never_mixed_up() {
    let stage = Stage::set(&["--gate=open"]);
    stage.warm_up();
    let packets = vec![stage.datagram(b"id"); 1000];
    let frames = on_the_underlay(&stage, &packets);
    let ids: BTreeSet<&[u8]> =
        frames.iter().map(|frame| &frame[ETHERNET_LEN + 4..ETHERNET_LEN + 6]).collect();
    // Of 1000 random ones among 65 536, 992 differ on average; fewer than 970 do not happen.
    assert!(ids.len() >= 970, "{} of 1000 differ", ids.len());
}

/// The source port of the last outer packet that carries this inner protocol and payload length or more.
fn port_of(stage: &Stage, protocol: u8, marker: &[u8]) -> u16 {
    let carries = |frame: &[u8]| {
        is_vxlan(frame)
            && frame[INNER_IP + 9] == protocol
            && frame.windows(marker.len()).any(|part| part == marker)
    };
    let frames = stage.at_wire[1].until("the flow's packet", PATIENCE, carries).unwrap();
    outer_source_port(frames.last().unwrap())
}

#[test]
fn a_connection_keeps_its_outer_source_port_when_it_changes_paths() {
    let mut stage = Stage::set(&["--gate=open"]);
    stage.warm_up();
    let to = stage.destination.address();
    let listener = stage.destination.netns().run(|| TcpListener::bind((to, 0)).unwrap());
    let address = listener.local_addr().unwrap();
    let mut near = stage.sender.netns().run(|| TcpStream::connect(address).unwrap());
    let (mut far, _) = listener.accept().unwrap();
    let datagrams = stage.sender.netns().run(|| UdpSocket::bind((stage.sender.address(), 0)).unwrap());
    datagrams.connect((to, 7777)).unwrap();
    let mut ports = |stage: &Stage, marker: &[u8]| {
        stage.at_wire[1].drain().unwrap();
        near.write_all(marker).unwrap();
        far.read_exact(&mut vec![0; marker.len()]).unwrap();
        let tcp = port_of(stage, packet::TCP, marker);
        datagrams.send(marker).unwrap();
        (tcp, port_of(stage, packet::UDP, marker))
    };
    let before = stage.counters();
    let fast = ports(&stage, b"by the fast path");
    assert!(stage.counters()[0].since(&before[0]).get("fast_encap") >= 2);
    stage.restart(&["--datapath=kernel"]);
    assert_eq!(ports(&stage, b"by the kernel alone"), fast);
}
