//! The outer headers: what ECMP, RSS and reassembly on the underlay depend on.

use std::{
    collections::BTreeSet,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream, UdpSocket},
};

use loden_tests::{
    each_family,
    family::Family,
    packet::{self, ETHERNET_LEN, Ipv4, Ipv6},
};

use crate::stage::{PATIENCE, Stage};

each_family!(outer_headers_are_the_kernels, a_connection_keeps_its_outer_source_port_when_it_changes_paths,);

/// Where the UDP header is in a frame.
const fn udp<F: Family>() -> usize {
    ETHERNET_LEN + F::HEADER_LEN
}

/// The inner IP packet of VXLAN.
fn inner<F: Family>(frame: &[u8]) -> Option<&[u8]> {
    let port = frame.get(udp::<F>() + 2..udp::<F>() + 4)?;
    let is_vxlan = frame[12..14] == F::ETHER_TYPE.to_be_bytes() && port == 8472_u16.to_be_bytes();
    frame.get(udp::<F>() + 16 + ETHERNET_LEN..).filter(|inner| is_vxlan && inner.len() > F::HEADER_LEN)
}

/// Sends the packets from the pod and returns what the other node's uplink receives of them.
fn on_the_underlay<F: Family>(stage: &Stage<F>, packets: &[F]) -> Vec<Vec<u8>> {
    stage.at_wire[1].drain().unwrap();
    for packet in packets {
        stage.at_sender.send(&stage.sent_by_sender(&packet.bytes())).unwrap();
    }
    // Both addresses stand at the end of either family's header, and nothing else goes from pod to pod.
    let ends = stage.ends.map(F::octets).concat();
    let marked = |frame: &[u8]| inner::<F>(frame).is_some_and(|it| it[..F::HEADER_LEN].ends_with(&ends));
    let mut frames = Vec::new();
    while frames.len() < packets.len() {
        let more = stage.at_wire[1].until("an outer packet", PATIENCE, marked).unwrap();
        frames.extend(more.into_iter().filter(|frame| marked(frame)));
    }
    frames
}

fn outer_source_port<F: Family>(frame: &[u8]) -> u16 {
    u16::from_be_bytes([frame[udp::<F>()], frame[udp::<F>() + 1]])
}

/// What of the outer headers is the kernel's own choice, and what is compared.
trait Outer: Family {
    /// Packets that the family's own fields tell apart.
    fn further(stage: &Stage<Self>) -> Vec<Self>;
    /// Blanks what differs by nature.
    fn blank(frame: &mut [u8]);
}

impl Outer for Ipv4 {
    fn further(stage: &Stage) -> Vec<Self> {
        let of = |fragment| Self { fragment, ..stage.datagram(&[7; 1422]) };
        [0, packet::DONT_FRAGMENT].map(of).to_vec()
    }

    /// The identification, and with it the header's checksum; the kernel writes a UDP checksum, and the programs none.
    fn blank(frame: &mut [u8]) {
        let udp = udp::<Self>();
        assert_eq!(packet::checksum(&frame[ETHERNET_LEN..udp]), 0, "the header's checksum");
        frame[ETHERNET_LEN + 4..ETHERNET_LEN + 6].fill(0);
        frame[ETHERNET_LEN + 10..ETHERNET_LEN + 12].fill(0);
        frame[udp + 6..udp + 8].fill(0);
    }
}

impl Outer for Ipv6 {
    fn further(stage: &Stage<Self>) -> Vec<Self> {
        let of = |label| Self { label, ..stage.datagram(b"label") };
        [1, 0x12345, 0xf_ffff].map(of).to_vec()
    }

    /// Nothing: the checksum, too, is the kernel's to the bit.
    fn blank(frame: &mut [u8]) {
        let udp = udp::<Self>();
        let addresses = &frame[ETHERNET_LEN + 8..udp];
        let pseudo =
            [addresses, &((frame.len() - udp) as u32).to_be_bytes(), &[0, 0, 0, packet::UDP]].concat();
        assert_eq!(packet::checksum(&[&pseudo, &frame[udp..]].concat()), 0, "the UDP checksum");
    }
}

/// Flows of every kind: each has a hash of its own.
fn flows<F: Outer>(stage: &Stage<F>) -> Vec<F> {
    let [from, to] = stage.ends;
    let mut packets = Vec::new();
    for i in 0..40 {
        packets.push(F::udp(from, to, (1000 + i, 7777), b"flow"));
        packets.push(F::tcp(from, to, (2000 + i * 7, 80), 16, b"flow"));
        packets.push(F::icmp(from, to, (F::ECHO, 0), u32::from(i) << 16, b"flow"));
    }
    packets.extend([0, 1, 2, 3, 0xb8, 0xbb].map(|class| stage.datagram(b"class").class(class)));
    packets.extend(F::further(stage));
    packets
}

fn outer_headers_are_the_kernels<F: Outer>() {
    let mut stage = Stage::<F>::set(&["--gate=open"]);
    // Else the kernel would leave its checksums to the device.
    stage.cluster.nodes[0].netns().exec("ethtool -K eth0 tx off").unwrap();
    stage.warm_up();
    let flows = flows(&stage);
    let before = stage.counters();
    let fast = on_the_underlay(&stage, &flows);
    let counted = stage.counters()[0].since(&before[0]);
    assert!(counted.get("fast_encap") >= flows.len() as u64, "{counted:?}");
    let has_checksum = |frame: &Vec<u8>| frame[udp::<F>() + 6..udp::<F>() + 8] != [0, 0];
    assert!(fast.iter().all(|frame| has_checksum(frame) == F::NEEDS_CHECKSUM), "RFC 7348, RFC 8200");
    stage.restart(&["--datapath=kernel"]);
    stage.ping();
    let kernel = on_the_underlay(&stage, &flows);
    let comparable = |frame: &Vec<u8>| {
        let mut frame = frame.clone();
        F::blank(&mut frame);
        frame
    };
    for ((fast, kernel), flow) in fast.iter().zip(&kernel).zip(&flows) {
        assert_eq!(comparable(fast), comparable(kernel), "{flow:?}");
    }
    let ports: BTreeSet<u16> = fast.iter().map(|frame| outer_source_port::<F>(frame)).collect();
    // Echoes of one pair of hosts are one flow to the kernel, whatever their identifiers.
    assert!(ports.len() > 75, "{} source ports for 80 flows", ports.len());
}

#[test]
fn identifications_differ_so_that_fragments_are_never_mixed_up() {
    let stage = Stage::<Ipv4>::set(&["--gate=open"]);
    stage.warm_up();
    let packets = vec![stage.datagram(b"id"); 1000];
    let frames = on_the_underlay(&stage, &packets);
    let ids: BTreeSet<&[u8]> =
        frames.iter().map(|frame| &frame[ETHERNET_LEN + 4..ETHERNET_LEN + 6]).collect();
    // Of 1000 random ones among 65 536, 992 differ on average; fewer than 970 do not happen.
    assert!(ids.len() >= 970, "{} of 1000 differ", ids.len());
}

/// The source port of the last outer packet of this inner protocol that carries the marker.
fn port_of<F: Family>(stage: &Stage<F>, protocol: u8, marker: &[u8]) -> u16 {
    // Neither options nor extension headers: the number stands where it stands in a plain header.
    let at = if F::HEADER_LEN == 20 { 9 } else { 6 };
    let carries = |frame: &[u8]| {
        inner::<F>(frame)
            .is_some_and(|it| it[at] == protocol && it.windows(marker.len()).any(|part| part == marker))
    };
    let frames = stage.at_wire[1].until("the flow's packet", PATIENCE, carries).unwrap();
    outer_source_port::<F>(frames.last().unwrap())
}

fn a_connection_keeps_its_outer_source_port_when_it_changes_paths<F: Family>() {
    let mut stage = Stage::<F>::set(&["--gate=open"]);
    stage.warm_up();
    let [from, to] = stage.hosts().map(|host| host.address);
    let listener = stage.destination.netns().run(|| TcpListener::bind((to, 0)).unwrap());
    let address = listener.local_addr().unwrap();
    let mut near = stage.sender.netns().run(|| TcpStream::connect(address).unwrap());
    let (mut far, _) = listener.accept().unwrap();
    let datagrams = stage.sender.netns().run(|| UdpSocket::bind((from, 0)).unwrap());
    datagrams.connect((to, 7777)).unwrap();
    let mut ports = |stage: &Stage<F>, marker: &[u8]| {
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
