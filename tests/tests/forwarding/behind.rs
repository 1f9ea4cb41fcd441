//! Pods that send on what they get: a container nested in one, a virtual machine behind one.
//!
//! What the programs have decapsulated keeps traces of the tunnel (`SKB_GSO_UDP_TUNNEL`, `skb->encapsulation`, offsets
//! of inner headers) that a TCP socket never looks at, but segmentation and forwarding do. Segmentation is what a UDP
//! socket without UDP_GRO asks for, too: datagrams in one piece are left to the kernel to decapsulate.

use std::{
    marker::PhantomData,
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use loden_tests::{
    cluster::Cluster,
    container::Container,
    counters::Share,
    cpu, each_family,
    family::Family,
    netns::{Netns, join},
    nic,
    process::wait_for,
    tap::{Tap, Traffic, carry},
    traffic::{
        Host, Service, ping,
        stream::{self, Until},
    },
};

use crate::bulk::{Taking, udp_bursts};

each_family!(
    a_nested_container_gets_bulk_tcp_through_its_pod,
    a_nested_container_gets_aggregates_of_a_segmented_underlay_through_its_pod,
    a_nested_container_gets_datagrams_that_came_in_one_piece_through_its_pod,
    a_machine_behind_a_tap_gets_intact_frames,
    a_machine_behind_a_tap_with_offloads_gets_intact_frames,
);

const BULK: u64 = 50_000_000;
const PORT: u16 = 8080;
/// A segment of the pod's own, and who is where there.
const SEGMENT: u8 = 9;
const OUTSIDE: u8 = 1;
const INSIDE: u8 = 2;

/// A cluster whose second pod forwards its port to what is behind it, and hides that behind its own address.
struct Forwarder<F> {
    inside: Netns,
    containers: Vec<Container>,
    cluster: Cluster,
    /// Whether the underlay carries segments alone.
    segmented: bool,
    family: PhantomData<F>,
}

impl<F: Family> Forwarder<F> {
    /// The pod and what is behind it have no link to each other yet.
    fn start(gate: &str, segmented: bool) -> Self {
        cpu::stay_on_one();
        let mut cluster = Cluster::start(&F::plan(), &[gate]).unwrap();
        let containers = cluster.run_containers(1).unwrap();
        let pod = containers[1].netns();
        if segmented {
            nic::segment_underlay(&cluster).unwrap();
            nic::aggregate(pod, "eth0").unwrap();
        }
        F::make_router(pod);
        let (inside, iptables) = (Self::inside(), F::IPTABLES);
        for protocol in ["tcp", "udp"] {
            let arriving = format!("PREROUTING -i eth0 -p {protocol} --dport {PORT}");
            pod.exec(&format!("{iptables} -t nat -A {arriving} -j DNAT --to {inside}")).unwrap();
        }
        pod.exec(&format!("{iptables} -t nat -A POSTROUTING -o eth0 -j MASQUERADE")).unwrap();
        for (from, to) in [(0, 1), (1, 0)] {
            let (from, to) = (containers[from].netns(), F::of(&containers[to]));
            // Of IPv6 nobody asks for a neighbour before its own link-local address is known to be its own alone.
            wait_for("the first answer", Duration::from_secs(20), || ping(from, to, 1).ok()).unwrap();
            ping(from, to, 20).unwrap();
        }
        Self { inside: Netns::create("inside").unwrap(), containers, cluster, segmented, family: PhantomData }
    }

    /// The address of what is behind the pod.
    fn inside() -> IpAddr {
        F::on_segment(SEGMENT, INSIDE).0.into()
    }

    /// Gives both ends of the link their addresses.
    fn address(&self, outside: &str, inside: &str) {
        let pod = self.containers[1].netns();
        for (netns, interface, host) in [(pod, outside, OUTSIDE), (&self.inside, inside, INSIDE)] {
            let (address, len) = F::on_segment(SEGMENT, host);
            netns.ip(&format!("address add {address}/{len} dev {interface} nodad")).unwrap();
            // As the overlay's, which Docker and hypervisors pass on too.
            let mtu = Self::mtu();
            netns.ip(&format!("link set {interface} up mtu {mtu} txqueuelen 10000")).unwrap();
        }
        let gateway = F::on_segment(SEGMENT, OUTSIDE).0;
        self.inside.ip(&format!("route add default via {gateway}")).unwrap();
    }

    /// What the overlay carries, bytes.
    const fn mtu() -> usize {
        1500 - F::ENCAP_LEN
    }

    /// From the other node's pod to what is behind this one, by the address of this one, and back.
    fn ways(&self) -> [(Host<'_>, Host<'_>, Option<Service>); 2] {
        let (far, pod) = (F::host(&self.containers[0]), F::host(&self.containers[1]));
        let inside = Host { netns: &self.inside, address: Self::inside() };
        let service = Service { front: SocketAddr::from((pod.address, PORT)), backend: PORT };
        [(far, inside, Some(service)), (inside, far, None)]
    }

    /// Bulk TCP, both ways.
    fn assert_bulk(&self, what: &str) {
        let (far, pod) = (&self.containers[0], &self.containers[1]);
        for (from, to, service) in self.ways() {
            let before = [far.netns(), &self.inside].map(|netns| nic::retransmitted_in(netns).unwrap());
            let work = || stream::run(from, to, service, Until::Bytes(BULK));
            let (stream, share) = Share::during(&self.cluster.nodes, &[far, pod], work).unwrap();
            let after = [far.netns(), &self.inside].map(|netns| nic::retransmitted_in(netns).unwrap());
            let again = after[0] + after[1] - before[0] - before[1];
            println!("{what}: {share:?}, {again} sent again, {:.0} MB/s", stream.megabytes_per_second());
            assert_eq!(stream.bytes, BULK);
            // Hand decapsulation, aggregates and all, is what is proven safe here.
            assert!(share.encapsulated as f64 / share.sent as f64 >= 0.98, "{what}: {share:?}");
            // What has an outer checksum is aggregated on the way, also where its sender sent segments: fewer are delivered.
            let aggregated = self.segmented && F::NEEDS_CHECKSUM;
            assert!(aggregated || share.smaller() >= 0.98, "{what}: {share:?}");
            assert!(again <= 50, "{what}: {again} segments were sent again");
        }
    }
}

fn nested<F: Family>(gate: &str, segmented: bool, segmented_inside: bool) -> Forwarder<F> {
    let forwarder = Forwarder::<F>::start(gate, segmented);
    let pod = forwarder.containers[1].netns();
    join(pod, "inner0", &forwarder.inside, "eth0").unwrap();
    forwarder.address("inner0", "eth0");
    if segmented_inside {
        nic::segment(pod, "inner0").unwrap();
        nic::segment(&forwarder.inside, "eth0").unwrap();
    }
    forwarder
}

fn assert_nested<F: Family>(gate: &str, segmented: bool, segmented_inside: bool) {
    let forwarder = nested::<F>(gate, segmented, segmented_inside);
    forwarder.assert_bulk(&format!("{gate}, segmented: {segmented}, inside: {segmented_inside}"));
}

fn a_nested_container_gets_bulk_tcp_through_its_pod<F: Family>() {
    assert_nested::<F>("--gate=open", false, false);
    assert_nested::<F>("--gate=open", false, true);
    assert_nested::<F>("--gate=strict", false, true);
}

fn a_nested_container_gets_aggregates_of_a_segmented_underlay_through_its_pod<F: Family>() {
    assert_nested::<F>("--gate=open", true, false);
    assert_nested::<F>("--gate=open", true, true);
    assert_nested::<F>("--gate=strict", true, true);
}

fn a_nested_container_gets_datagrams_that_came_in_one_piece_through_its_pod<F: Family>() {
    for segmented_inside in [false, true] {
        let forwarder = nested::<F>("--gate=open", false, segmented_inside);
        let pods: Vec<_> = forwarder.containers.iter().collect();
        for (from, to, service) in forwarder.ways() {
            let bursts = || udp_bursts(from, to, service, Taking::OneByOne);
            let (overtaken, share) = Share::during(&forwarder.cluster.nodes, &pods, bursts).unwrap();
            println!("inside: {segmented_inside}: {share:?}");
            assert_eq!(overtaken, 0);
            assert!(share.smaller() >= 0.98, "{share:?}");
        }
    }
}

fn assert_machine<F: Family>(gate: &str, segmented: bool, vnet: bool) {
    let forwarder = Forwarder::<F>::start(gate, segmented);
    let outside = Tap::create(forwarder.containers[1].netns(), "tap0", vnet).unwrap();
    let inside = Tap::create(&forwarder.inside, "eth0", vnet).unwrap();
    forwarder.address("tap0", "eth0");
    let (traffic, stop) = (Traffic::default(), AtomicBool::new(false));
    thread::scope(|scope| {
        let carried = scope.spawn(|| carry(&outside, &inside, &traffic, &stop));
        // Stops the carrier also where the assertion fails: the scope waits for it.
        let stopped = StopOnDrop(&stop);
        forwarder.assert_bulk(&format!("{gate}, segmented: {segmented}, vnet: {vnet}"));
        drop(stopped);
        carried.join().unwrap().unwrap();
    });
    let largest = traffic.largest.load(Ordering::Relaxed);
    println!("{traffic:?}");
    assert!(
        vnet || largest <= Forwarder::<F>::mtu() as u64 + 14,
        "a frame of {largest} bytes on a tap without offloads"
    );
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn a_machine_behind_a_tap_gets_intact_frames<F: Family>() {
    assert_machine::<F>("--gate=open", false, false);
    assert_machine::<F>("--gate=open", true, false);
}

fn a_machine_behind_a_tap_with_offloads_gets_intact_frames<F: Family>() {
    assert_machine::<F>("--gate=open", false, true);
    assert_machine::<F>("--gate=open", true, true);
}
