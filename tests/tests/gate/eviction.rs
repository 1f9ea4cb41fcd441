//! What the gate has forgotten: by time, by a flood of other flows, or because it was not there when the flow began.

use std::{
    net::{SocketAddr, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use aya::maps::{HashMap, Map, MapData};
use loden_ebpf::abi::{ABI_VERSION, FLOWS_MAX, Flow, FlowKey, Octets, map};
use loden_tests::{
    cluster::Cluster,
    family::Family,
    node::Node,
    packet::{Ipv4, Ipv6},
    process::wait_for,
    service::{self, Front, Tool, at},
    traffic::{
        Host,
        socket::{self, ask, open, pour, say, uninterrupted},
        wait_for_answer,
    },
};

use crate::{OPEN, STRICT, both_gates::under_both_gates, cluster, fast};

const PORT: u16 = 8080;

under_both_gates!(dual: translated_flows_live_on_when_the_gate_has_forgotten_them);
under_both_gates!(
    flows_translated_before_the_programs_came_are_left_to_the_host,
    a_new_pod_may_begin_with_a_service,
);

/// A connection and a pair of UDP sockets through a service.
struct Through {
    near: TcpStream,
    far: TcpStream,
    asker: UdpSocket,
    answerer: UdpSocket,
    seen: SocketAddr,
}

impl Through {
    fn open<F: Family>(cluster: &Cluster, client: Host<'_>, backend: Host<'_>) -> Self {
        let front = at(F::vip(1), 80);
        let fronts = [Front::new(front, &[at(backend.address, PORT)])];
        service::publish(cluster.nodes[0].netns(), Tool::Iptables, &fronts).unwrap();
        let listener = socket::listen(backend, PORT).unwrap();
        let (near, far) = open(client.netns, None, front, &listener).unwrap();
        let asker = socket::udp(client, 0).unwrap();
        let answerer = socket::udp(backend, PORT).unwrap();
        asker.connect(front).unwrap();
        let seen = ask(&asker, &answerer, "hello").unwrap();
        let through = Self { near, far, asker, answerer, seen };
        through.talk("at first");
        through
    }

    /// Both ways, the server first.
    fn talk(&self, when: &str) {
        say(&self.far, &self.near, "the server first").unwrap_or_else(|error| panic!("{when}: {error:#}"));
        pour(&self.near, &self.far, 5_000_000).unwrap_or_else(|error| panic!("{when}: {error:#}"));
        pour(&self.far, &self.near, 5_000_000).unwrap_or_else(|error| panic!("{when}: {error:#}"));
        self.answerer.send_to(b"the server first", self.seen).unwrap();
        uninterrupted(|| self.asker.recv(&mut [0; 64])).unwrap_or_else(|error| panic!("{when}: {error:#}"));
        ask(&self.asker, &self.answerer, when).unwrap_or_else(|error| panic!("{when}: {error:#}"));
    }
}

fn translated_flows_live_on_when_the_gate_has_forgotten_them(gate: &str) {
    // The nodes have both families.
    let (cluster, containers) = cluster::<Ipv6>(1, &[gate]);
    let (client, backend) = (&containers[0], &containers[1]);
    wait_for_answer(client, backend).unwrap();
    let node = &cluster.nodes[0];
    for address in client.addresses() {
        wait_for("the agent to know the container", Duration::from_secs(5), || node.gated(address)).unwrap();
    }
    let before = fast(node);
    let v4 = Through::open::<Ipv4>(&cluster, Ipv4::host(client), Ipv4::host(backend));
    let v6 = Through::open::<Ipv6>(&cluster, Ipv6::host(client), Ipv6::host(backend));
    // Longer than any qualification, and shorter than the host forgets a UDP flow.
    thread::sleep(Duration::from_secs(21));
    for through in [&v4, &v6] {
        through.talk("after a long pause");
    }
    for round in 0..3 {
        flood::<Ipv4>(node, round);
        flood::<Ipv6>(node, round);
        for through in [&v4, &v6] {
            through.talk("after a flood of other flows");
        }
    }
    assert_eq!(fast(node) - before, 0, "packets of translated flows that skipped the host");
    if gate == OPEN {
        for address in client.addresses() {
            assert_eq!(node.gated(address), Some(true), "{address}");
        }
    }
}

/// A family's table of flows.
trait Flows: Family {
    /// An address in it.
    type Octets: Octets;

    /// The `n`-th address of the network.
    fn numbered(n: u32) -> Self::Octets;
}

impl Flows for Ipv4 {
    type Octets = [u8; 4];

    fn numbered(n: u32) -> [u8; 4] {
        (0x0a05_0000 | n).to_be_bytes()
    }
}

impl Flows for Ipv6 {
    type Octets = [u8; 16];

    fn numbered(n: u32) -> [u8; 16] {
        (0xfc00 << 112 | u128::from(n)).to_be_bytes()
    }
}

/// Writes more flows into the table than it holds, as a pod does that talks to everybody.
fn flood<F: Flows>(node: &Node, round: u32) {
    let numbers = (1 + round * 2 * FLOWS_MAX as u32..).take(FLOWS_MAX * 3 / 2);
    let flow = |n: u32| FlowKey::of(17, (F::numbered(0xfe02), n as u16), (F::numbered(n >> 16), 53));
    let name = format!("{}{}", F::MAPS, map::FLOWS);
    let pin = node.bpffs().join(format!("v{ABI_VERSION}")).join(name);
    let flows = Map::LruHashMap(MapData::from_pin(&pin).unwrap());
    let mut flows: HashMap<MapData, FlowKey<F::Octets>, Flow> = flows.try_into().unwrap();
    for n in numbers {
        flows.insert(flow(n), Flow { outbound_seen: 1, ..Flow::default() }, 0).unwrap();
    }
}

fn flows_translated_before_the_programs_came_are_left_to_the_host<F: Family>(gate: &str) {
    let (mut cluster, containers) = cluster::<F>(1, &[STRICT]);
    let (client, backend) = (F::host(&containers[0]), F::host(&containers[1]));
    cluster.nodes[0].stop_agent().unwrap();
    cluster.nodes[0].start_agent(&["--datapath=kernel"]).unwrap();
    let through = Through::open::<F>(&cluster, client, backend);
    cluster.nodes[0].stop_agent().unwrap();
    cluster.nodes[0].start_agent(&[gate, "--datapath=ebpf"]).unwrap();
    wait_for("the agent to know the container", Duration::from_secs(5), || {
        cluster.nodes[0].gated(client.address)
    })
    .unwrap();
    through.talk("after the programs came");
    if gate == OPEN {
        assert_eq!(cluster.nodes[0].gated(client.address), Some(true));
    }
    // And once more after a crash.
    cluster.nodes[0].kill_agent();
    cluster.nodes[0].start_agent(&[gate, "--datapath=ebpf"]).unwrap();
    through.talk("after a crash of the agent");
}

fn a_new_pod_may_begin_with_a_service<F: Family>(gate: &str) {
    let (mut cluster, containers) = cluster::<F>(1, &[gate]);
    let backend = F::host(&containers[1]);
    let front = at(F::vip(1), 80);
    let fronts = [Front::new(front, &[at(backend.address, PORT)])];
    service::publish(cluster.nodes[0].netns(), Tool::Iptables, &fronts).unwrap();
    let listener = socket::listen(backend, PORT).unwrap();
    let answerer = socket::udp(backend, PORT).unwrap();
    for round in 0..10 {
        let pod = cluster.nodes[0].run_container(100 + round % 2).unwrap();
        let host = F::host(&pod);
        let asker = socket::udp(host, 0).unwrap();
        asker.connect(front).unwrap();
        // The backend is slow to answer: by then the agent knows the pod.
        asker.send(b"first").unwrap();
        let (_, peer) = uninterrupted(|| answerer.recv_from(&mut [0; 64])).unwrap();
        wait_for("the agent to know the pod", Duration::from_secs(5), || {
            cluster.nodes[0].gated(host.address)
        })
        .unwrap();
        answerer.send_to(b"late", peer).unwrap();
        uninterrupted(|| asker.recv(&mut [0; 64]))
            .unwrap_or_else(|error| panic!("UDP, round {round}: {error}"));
        let (near, far) = open(host.netns, None, front, &listener).unwrap();
        say(&far, &near, "hello").unwrap_or_else(|error| panic!("TCP, round {round}: {error:#}"));
    }
}
