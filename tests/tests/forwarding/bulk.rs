//! Large packets: segmentation offload, aggregation, checksums that are finished later.

use std::{net::UdpSocket, time::Duration};

use anyhow::{Context as _, Result, ensure};
use loden_tests::{
    cluster::Cluster,
    container::Container,
    counters::Share,
    cpu, each_family,
    family::Family,
    nic,
    packet::{Ipv4, Ipv6},
    process::wait_for,
    traffic::{
        Host, PATIENCE, Service, converse, ping,
        socket::uninterrupted,
        stream::{self, Until},
    },
};
use nix::sys::socket::{
    setsockopt,
    sockopt::{UdpGroSegment, UdpGsoSegment},
};

each_family!(
    bulk_tcp_crosses_in_large_packets,
    bulk_tcp_crosses_a_segmented_underlay,
    udp_segments_cross_in_large_packets,
    udp_segments_cross_a_segmented_underlay,
    udp_segments_reach_a_socket_that_takes_them_one_by_one,
);

const BULK: u64 = 100_000_000;
/// So many of the 71 000 segments may be sent again: a flow that becomes fast overtakes itself once.
const AGAIN: u64 = 50;

fn start<F: Family>(gate: &str, segmented: bool) -> (Cluster, Vec<Container>) {
    cpu::stay_on_one();
    let mut cluster = Cluster::start(&F::plan(), &[gate]).unwrap();
    let containers = cluster.run_containers(1).unwrap();
    if segmented {
        nic::segment_underlay(&cluster).unwrap();
        for container in &containers {
            nic::aggregate(container.netns(), "eth0").unwrap();
        }
    }
    for (a, b) in [(0, 1), (1, 0)] {
        let (from, to) = (containers[a].netns(), F::of(&containers[b]));
        // Of IPv6 nobody asks for a neighbour before its own link-local address is known to be its own alone.
        wait_for("the first answer", Duration::from_secs(20), || ping(from, to, 1).ok()).unwrap();
        ping(from, to, 20).unwrap();
    }
    (cluster, containers)
}

/// How many packets a host has forwarded, of a family.
trait Forwarded: Family {
    /// The counter's name.
    const COUNTER: &'static str;
}

impl Forwarded for Ipv4 {
    const COUNTER: &'static str = "IpForwDatagrams";
}

impl Forwarded for Ipv6 {
    const COUNTER: &'static str = "Ip6OutForwDatagrams";
}

fn assert_bulk_tcp<F: Forwarded>(gate: &str, segmented: bool) {
    let (cluster, containers) = start::<F>(gate, segmented);
    for (from, to) in [(&containers[0], &containers[1]), (&containers[1], &containers[0])] {
        let before = nic::retransmitted(from).unwrap();
        let work = || stream::run(F::host(from), F::host(to), None, Until::Bytes(BULK));
        let (stream, share) = Share::during(&cluster.nodes, &[from, to], work).unwrap();
        let again = nic::retransmitted(from).unwrap() - before;
        assert_eq!(stream.source, F::host(from).address);
        println!(
            "{gate}, segmented: {segmented}: {share:?}, {again} sent again, {:.0} MB/s",
            stream.megabytes_per_second()
        );
        let encapsulated = share.encapsulated as f64 / share.sent as f64;
        assert!(encapsulated >= 0.99, "{share:?}");
        // Aggregated on the way, fewer packets are delivered than were sent.
        assert!(segmented || share.smaller() >= 0.99, "{share:?}");
        assert!(again <= AGAIN, "{again} segments were sent again");
    }
    // Whatever is not delivered by the programs would be here.
    for node in &cluster.nodes {
        let forwarded = node.netns().exec(&format!("nstat -asz {}", F::COUNTER)).unwrap();
        let count: u64 = forwarded.split_whitespace().rev().nth(1).unwrap().parse().unwrap();
        assert!(count < 500, "{count} packets were forwarded by the kernel: {forwarded}");
    }
}

fn bulk_tcp_crosses_in_large_packets<F: Forwarded>() {
    assert_bulk_tcp::<F>("--gate=strict", false);
    assert_bulk_tcp::<F>("--gate=open", false);
}

fn bulk_tcp_crosses_a_segmented_underlay<F: Forwarded>() {
    assert_bulk_tcp::<F>("--gate=strict", true);
    assert_bulk_tcp::<F>("--gate=open", true);
}

/// What QUIC does: many datagrams in one call, aggregated again at the other end. They fit either family's overlay.
const DATAGRAM: usize = 1372;
const DATAGRAMS: usize = 29;
const BURSTS: usize = 500;

/// A datagram that tells from its first bytes which one it is.
fn datagram(burst: usize, i: usize) -> Vec<u8> {
    let filling = (4..DATAGRAM).map(|at| (at / 7 + at + burst * 31 + i * 57) as u8);
    (burst as u16).to_be_bytes().into_iter().chain((i as u16).to_be_bytes()).chain(filling).collect()
}

/// How a socket takes datagrams that arrive in one piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taking {
    /// As they come: it has UDP_GRO.
    Whole,
    /// As most do: the kernel takes them apart first.
    OneByOne,
}

/// Sends the bursts, to the other end or to what leads there, compares every byte, and returns how many datagrams were
/// overtaken after the first burst: while that is on its way, its flow changes from the slow path to the fast one.
pub(crate) fn udp_bursts(
    from: Host<'_>,
    to: Host<'_>,
    service: Option<Service>,
    taking: Taking,
) -> Result<usize> {
    let serve = |tell: &dyn Fn(u16)| {
        let socket = UdpSocket::bind((to.address, service.map_or(0, |service| service.backend)))?;
        socket.set_read_timeout(Some(*PATIENCE))?;
        setsockopt(&socket, UdpGroSegment, &(taking == Taking::Whole))?;
        tell(socket.local_addr()?.port());
        let (mut buffer, mut overtaken) = (vec![0; 70_000], 0);
        for burst in 0..BURSTS {
            let mut missing: Vec<usize> = (0..DATAGRAMS).collect();
            while !missing.is_empty() {
                let (len, peer) = uninterrupted(|| socket.recv_from(&mut buffer))
                    .with_context(|| format!("of burst {burst} these are missing: {missing:?}"))?;
                for piece in buffer[..len].chunks(DATAGRAM) {
                    let i = usize::from(u16::from_be_bytes([piece[2], piece[3]]));
                    ensure!(piece == datagram(burst, i), "burst {burst} differs at {i}");
                    let place = missing.iter().position(|m| *m == i).context("a datagram came twice")?;
                    overtaken += usize::from(burst > 0 && place > 0);
                    missing.remove(place);
                }
                if missing.is_empty() {
                    socket.send_to(b"next", peer)?;
                }
            }
        }
        Ok(overtaken)
    };
    let speak = |port: u16| {
        let socket = UdpSocket::bind((from.address, 0))?;
        socket.set_read_timeout(Some(*PATIENCE))?;
        setsockopt(&socket, UdpGsoSegment, &(DATAGRAM as i32))?;
        socket.connect(service.map_or((to.address, port).into(), |service| service.front))?;
        for burst in 0..BURSTS {
            socket.send(&(0..DATAGRAMS).flat_map(|i| datagram(burst, i)).collect::<Vec<u8>>())?;
            uninterrupted(|| socket.recv(&mut [0; 8]))
                .with_context(|| format!("no answer to burst {burst}"))?;
        }
        Ok(())
    };
    converse(to.netns, from.netns, serve, speak).map(|(overtaken, ())| overtaken)
}

fn assert_udp_bursts<F: Family>(gate: &str, segmented: bool, taking: Taking) {
    let (cluster, containers) = start::<F>(gate, segmented);
    let (a, b) = (&containers[0], &containers[1]);
    let bursts = || udp_bursts(F::host(a), F::host(b), None, taking);
    let (overtaken, share) = Share::during(&cluster.nodes, &[a, b], bursts).unwrap();
    println!("{gate}, segmented: {segmented}, {taking:?}: {share:?}");
    assert_eq!(overtaken, 0);
    assert!(share.encapsulated as f64 / share.sent as f64 >= 0.99, "{share:?}");
    assert!(segmented || share.smaller() >= 0.99, "{share:?}");
}

fn udp_segments_cross_in_large_packets<F: Family>() {
    assert_udp_bursts::<F>("--gate=strict", false, Taking::Whole);
    assert_udp_bursts::<F>("--gate=open", false, Taking::Whole);
}

fn udp_segments_cross_a_segmented_underlay<F: Family>() {
    assert_udp_bursts::<F>("--gate=strict", true, Taking::Whole);
    assert_udp_bursts::<F>("--gate=open", true, Taking::Whole);
}

fn udp_segments_reach_a_socket_that_takes_them_one_by_one<F: Family>() {
    assert_udp_bursts::<F>("--gate=strict", false, Taking::OneByOne);
    assert_udp_bursts::<F>("--gate=open", false, Taking::OneByOne);
    assert_udp_bursts::<F>("--gate=open", true, Taking::OneByOne);
}
