//! Pods that send on what they get: a container nested in one, a virtual machine behind one.
//!
//! What the programs have decapsulated keeps traces of the tunnel (`SKB_GSO_UDP_TUNNEL`, `skb->encapsulation`, offsets
//! of inner headers) that a socket never looks at, but segmentation and forwarding do.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    counters::Share,
    netns::{Netns, join},
    nic,
    tap::{Tap, Traffic, carry},
    traffic::{
        Host, Service, ping,
        stream::{self, Until},
    },
};

use crate::stage::stay_on_one_cpu;

const BULK: u64 = 50_000_000;
const PORT: u16 = 8080;
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 1);
const INSIDE: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 2);

/// A cluster whose second pod forwards its port to what is behind it, and hides that behind its own address.
struct Forwarder {
    inside: Netns,
    containers: Vec<Container>,
    cluster: Cluster,
}

impl Forwarder {
    /// The pod and what is behind it have no link to each other yet.
    fn start(gate: &str, segmented: bool) -> Self {
        stay_on_one_cpu();
        let mut cluster = Cluster::start(&Plan { nodes: 2, ..Plan::default() }, &[gate]).unwrap();
        let containers = cluster.run_containers(1).unwrap();
        let pod = containers[1].netns();
        if segmented {
            nic::segment_underlay(&cluster).unwrap();
            nic::aggregate(pod, "eth0").unwrap();
        }
        pod.exec("sysctl -qw net.ipv4.ip_forward=1").unwrap();
        pod.exec(&format!(
            "iptables -t nat -A PREROUTING -i eth0 -p tcp --dport {PORT} -j DNAT --to {INSIDE}"
        ))
        .unwrap();
        pod.exec("iptables -t nat -A POSTROUTING -o eth0 -j MASQUERADE").unwrap();
        ping(containers[0].netns(), containers[1].address(), 20).unwrap();
        ping(pod, containers[0].address(), 20).unwrap();
        Self { inside: Netns::create("inside").unwrap(), containers, cluster }
    }

    /// Gives both ends of the link their addresses.
    fn address(&self, outside: &str, inside: &str) {
        let pod = self.containers[1].netns();
        pod.ip(&format!("address add {OUTSIDE}/24 dev {outside}")).unwrap();
        self.inside.ip(&format!("address add {INSIDE}/24 dev {inside}")).unwrap();
        // As the overlay's, which Docker and hypervisors pass on too.
        pod.ip(&format!("link set {outside} up mtu 1450 txqueuelen 10000")).unwrap();
        self.inside.ip(&format!("link set {inside} up mtu 1450 txqueuelen 10000")).unwrap();
        self.inside.ip(&format!("route add default via {OUTSIDE}")).unwrap();
    }

    /// Bulk TCP from the other node's pod to what is behind this one, and back.
    fn assert_bulk(&self, what: &str) {
        let (far, pod) = (&self.containers[0], &self.containers[1]);
        let inside = Host { netns: &self.inside, address: INSIDE.into() };
        let service = Service { front: SocketAddr::from((pod.address(), PORT)), backend: PORT };
        for (from, to, service) in [(far.host(), inside, Some(service)), (inside, far.host(), None)] {
            let before = [far.netns(), &self.inside].map(|netns| nic::retransmitted_in(netns).unwrap());
            let work = || stream::run(from, to, service, Until::Bytes(BULK));
            let (stream, share) = Share::during(&self.cluster.nodes, &[far, pod], work).unwrap();
            let after = [far.netns(), &self.inside].map(|netns| nic::retransmitted_in(netns).unwrap());
            let again = after[0] + after[1] - before[0] - before[1];
            println!("{what}: {share:?}, {again} sent again, {:.0} MB/s", stream.megabytes_per_second());
            assert_eq!(stream.bytes, BULK);
            // Hand decapsulation, aggregates and all, is what is proven safe here.
            assert!(share.smaller() >= 0.98, "{what}: {share:?}");
            assert!(again <= 50, "{what}: {again} segments were sent again");
        }
    }
}

fn assert_nested(gate: &str, segmented: bool, segmented_inside: bool) {
    let forwarder = Forwarder::start(gate, segmented);
    let pod = forwarder.containers[1].netns();
    join(pod, "inner0", &forwarder.inside, "eth0").unwrap();
    forwarder.address("inner0", "eth0");
    if segmented_inside {
        nic::segment(pod, "inner0").unwrap();
        nic::segment(&forwarder.inside, "eth0").unwrap();
    }
    forwarder.assert_bulk(&format!("{gate}, segmented: {segmented}, inside: {segmented_inside}"));
}

#[test]
fn a_nested_container_gets_bulk_tcp_through_its_pod() {
    assert_nested("--gate=open", false, false);
    assert_nested("--gate=open", false, true);
    assert_nested("--gate=strict", false, true);
}

#[test]
fn a_nested_container_gets_aggregates_of_a_segmented_underlay_through_its_pod() {
    assert_nested("--gate=open", true, false);
    assert_nested("--gate=open", true, true);
    assert_nested("--gate=strict", true, true);
}

fn assert_machine(gate: &str, segmented: bool, vnet: bool) {
    let forwarder = Forwarder::start(gate, segmented);
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
    assert!(vnet || largest <= 1464, "a frame of {largest} bytes on a tap without offloads");
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_machine_behind_a_tap_gets_intact_frames() {
    assert_machine("--gate=open", false, false);
    assert_machine("--gate=open", true, false);
}

#[test]
fn a_machine_behind_a_tap_with_offloads_gets_intact_frames() {
    assert_machine("--gate=open", false, true);
    assert_machine("--gate=open", true, true);
}
