//! One source port, two connections: to a service and straight to its backend. The host's connection table keeps them apart
//! where it knows both. Through the open gate it does not know the direct one, unless it is told.

use std::{
    net::{SocketAddr, TcpStream, UdpSocket},
    thread,
    time::Duration,
};

use loden_tests::{
    counters::Counters,
    family::Family,
    node::Node,
    process::wait_for,
    service::{self, Front, Tool, at},
    traffic::{
        Host,
        socket::{self, ask, open, say},
    },
};

use crate::{OPEN, both_gates::under_both_gates, cluster};

const PORT: u16 = 8080;
const HOST_PORT: u16 = 30_081;
/// Long enough for a flow to qualify and be used.
const ROUNDS: u32 = 150;

under_both_gates!(
    a_service_and_then_its_backend_are_reached_from_one_port,
    a_backend_and_then_its_service_are_reached_from_one_port_by_iptables,
    a_backend_and_then_its_service_are_reached_from_one_port_by_nft,
);

/// The direct flow is the second, so the host sees its first packet: the pod has a translated flow already.
fn a_service_and_then_its_backend_are_reached_from_one_port<F: Family>(gate: &str) {
    let (cluster, containers) = cluster::<F>(1, &[gate]);
    let (client, backend) = (F::host(&containers[0]), F::host(&containers[1]));
    let (front, straight) = (at(F::vip(1), 80), at(backend.address, PORT));
    service::publish(cluster.nodes[0].netns(), Tool::Iptables, &[Front::new(front, &[straight])]).unwrap();
    let mut flows = Flows::new(client, backend, 5000);
    flows.connect(front);
    flows.ask(front);
    flows.connect(straight);
    flows.ask(straight);
    flows.talk();
}

fn a_backend_and_then_its_service_are_reached_from_one_port_by_iptables<F: Family>(gate: &str) {
    a_backend_and_then_its_service_are_reached_from_one_port::<F>(gate, Tool::Iptables);
}

fn a_backend_and_then_its_service_are_reached_from_one_port_by_nft<F: Family>(gate: &str) {
    a_backend_and_then_its_service_are_reached_from_one_port::<F>(gate, Tool::Nft);
}

fn a_backend_and_then_its_service_are_reached_from_one_port<F: Family>(gate: &str, tool: Tool) {
    let (cluster, containers) = cluster::<F>(4, &[gate]);
    let (near, far) = (&cluster.nodes[0], &cluster.nodes[1]);
    let hosts: Vec<Host<'_>> = containers.iter().map(|container| F::host(container)).collect();
    let [tcp_first, udp_first, beside, local, remote, server, ..] = hosts[..] else { unreachable!() };
    let backend = |host: Host<'_>| at(host.address, PORT);
    let (of_remote, of_local) = (at(F::vip(1), 80), at(F::vip(2), 80));
    let fronts = [Front::new(of_remote, &[backend(remote)]), Front::new(of_local, &[backend(local)])];
    service::publish(near.netns(), tool, &fronts).unwrap();
    let of_server = at(F::of_node(&cluster, 1), HOST_PORT);
    service::publish(far.netns(), tool, &[Front::new(of_server, &[backend(server)])]).unwrap();

    let kept_apart = |client: Host<'_>, server: Host<'_>, front, is_tcp_first: bool, node: &Node| {
        let is_near = node.name() == near.name();
        let local = if is_near { client } else { server };
        if gate == OPEN {
            let what = "nothing of it was translated, so its direct flows pass the host by";
            assert_eq!(node.gated(local.address), Some(false), "{what}");
        }
        let dropped = || Counters::read(node).unwrap().get("drop_tuple_taken");
        let before = dropped();
        let mut flows = Flows::new(client, server, 5000);
        flows.connect(backend(server));
        flows.ask(backend(server));
        // Whichever comes second meets a direct flow from before the pod had any translated one.
        if is_tcp_first {
            flows.connect(front);
            flows.ask(front);
        } else {
            flows.ask(front);
            flows.connect(front);
        }
        flows.talk();
        if gate == OPEN {
            let dropped = dropped() - before;
            // A server's UDP socket is connected to nobody, so there the host takes the direct flow for the second one.
            let least = if is_near { 2 } else { 1 };
            assert!(dropped >= least, "{dropped} first translated packets to {front}, of {least}");
            assert_eq!(node.gated(local.address), Some(true), "translated flows since");
        } else {
            assert_eq!(dropped() - before, 0, "the host knows every connection");
        }
    };
    kept_apart(tcp_first, remote, of_remote, true, near);
    kept_apart(udp_first, remote, of_remote, false, near);
    kept_apart(beside, local, of_local, true, near);
    // The node of the server translates, what others send to its port.
    kept_apart(udp_first, server, of_server, false, far);
}

/// Flows of one client from one port to one server, which sees them from ports of their own.
struct Flows<'a> {
    client: Host<'a>,
    port: u16,
    listener: std::net::TcpListener,
    server: UdpSocket,
    connections: Vec<(TcpStream, TcpStream)>,
    askers: Vec<UdpSocket>,
}

impl<'a> Flows<'a> {
    fn new(client: Host<'a>, server: Host<'_>, port: u16) -> Self {
        Self {
            client,
            port,
            listener: socket::listen(server, PORT).unwrap(),
            server: socket::udp(server, PORT).unwrap(),
            connections: Vec::new(),
            askers: Vec::new(),
        }
    }

    fn connect(&mut self, to: SocketAddr) {
        let from = Some(at(self.client.address, self.port));
        let connection = open(self.client.netns, from, to, &self.listener)
            .unwrap_or_else(|error| panic!("TCP from port {} to {to}: {error:#}", self.port));
        self.connections.push(connection);
    }

    /// Sends until something arrives: the first datagram may be lost, as datagrams are.
    fn ask(&mut self, to: SocketAddr) {
        let asker = socket::udp(self.client, self.port).unwrap();
        asker.connect(to).unwrap();
        let patience = self.server.read_timeout().unwrap();
        self.server.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let mut sent = 0;
        wait_for(&format!("a datagram to {to}"), Duration::from_secs(10), || {
            asker.send(b"anybody there").unwrap();
            sent += 1;
            self.server.recv(&mut [0; 64]).ok()
        })
        .unwrap();
        // Those that were only late.
        while sent > 1 && self.server.recv(&mut [0; 64]).is_ok() {}
        self.server.set_read_timeout(patience).unwrap();
        self.askers.push(asker);
    }

    fn talk(&self) {
        for round in 0..ROUNDS {
            for (near, far) in &self.connections {
                let what = format!("round {round} on {:?}", near.peer_addr().unwrap());
                say(near, far, &what).unwrap_or_else(|error| panic!("{what}: {error:#}"));
                say(far, near, &what).unwrap_or_else(|error| panic!("{what}, back: {error:#}"));
            }
            let mut seen = Vec::new();
            for asker in &self.askers {
                let what = format!("datagram {round} on {:?}", asker.peer_addr().unwrap());
                let peer = ask(asker, &self.server, &what).unwrap_or_else(|e| panic!("{what}: {e:#}"));
                assert!(!seen.contains(&peer), "the server cannot tell its clients apart: {peer}");
                seen.push(peer);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}
