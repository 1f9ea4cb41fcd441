//! Two nodes, a pod with a neighbour on the first, a pod on the second, and a packet socket at each.

use std::{
    net::{IpAddr, UdpSocket},
    time::Duration,
};

use loden_tests::{
    capture::Capture,
    cluster::Cluster,
    container::Container,
    counters::Counters,
    cpu,
    family::Family,
    netns::Netns,
    node::{BRIDGE, Node},
    packet::{self, Ipv4, Mac, Vxlan},
    process::wait_for,
    traffic::{Host, ping},
};

/// A UDP port at which both pods listen, so that what arrives there is not answered.
pub(crate) const OPEN_PORT: u16 = 7777;
/// How long anything here may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
/// How long it may take until a pod that has just come is reached: of IPv6 nobody asks for a neighbour before its own
/// link-local address is known to be its own alone, which takes a second or two.
const FIRST_ANSWER: Duration = Duration::from_secs(20);

/// The set. Everything runs on one CPU, so that packets are handled in the order in which they were sent.
pub(crate) struct Stage<F: Family = Ipv4> {
    pub(crate) at_sender: Capture,
    pub(crate) at_neighbour: Capture,
    pub(crate) at_destination: Capture,
    /// The uplink of each node.
    pub(crate) at_wire: [Capture; 2],
    _listeners: [UdpSocket; 2],
    pub(crate) sender: Container,
    pub(crate) neighbour: Container,
    pub(crate) destination: Container,
    /// The sender's and the destination's address.
    pub(crate) ends: [F::Address; 2],
    pub(crate) cluster: Cluster,
}

impl<F: Family> Stage<F> {
    pub(crate) fn set(args: &[&str]) -> Self {
        cpu::stay_on_one();
        let mut cluster = Cluster::start(&F::plan(), args).unwrap();
        let sender = cluster.nodes[0].run_container(2).unwrap();
        let neighbour = cluster.nodes[0].run_container(3).unwrap();
        let destination = cluster.nodes[1].run_container(2).unwrap();
        for netns in [sender.netns(), neighbour.netns(), destination.netns()] {
            if sender.address6().is_none() {
                netns.exec("sysctl -qw net.ipv6.conf.all.disable_ipv6=1").unwrap();
            }
            // The pod may send what is longer than the overlay carries.
            netns.ip("link set eth0 mtu 1500").unwrap();
        }
        let nodes = cluster.nodes.iter().map(Node::netns);
        for netns in nodes.chain([sender.netns(), destination.netns()]) {
            // An error for each packet, not one a second.
            netns.exec("sysctl -qw net.ipv4.icmp_ratelimit=0").unwrap();
            netns.exec("sysctl -qw net.ipv6.icmp.ratelimit=0").unwrap();
        }
        cluster.nodes[0].netns().ip("link set veth1 mtu 1500").unwrap();
        cluster.nodes[1].netns().ip("link set veth1 mtu 1500").unwrap();
        let eth0 = |netns: &Netns| Capture::open(netns, "eth0").unwrap();
        let listener =
            |pod: &Container| pod.netns().run(|| UdpSocket::bind((F::of(pod).into(), OPEN_PORT)).unwrap());
        for pod in [&sender, &neighbour] {
            let answers = || ping(pod.netns(), F::of(&destination), 1).ok();
            wait_for("the first answer", FIRST_ANSWER, answers).unwrap();
        }
        Self {
            at_sender: eth0(sender.netns()),
            at_neighbour: eth0(neighbour.netns()),
            at_destination: eth0(destination.netns()),
            at_wire: [eth0(cluster.nodes[0].netns()), eth0(cluster.nodes[1].netns())],
            _listeners: [listener(&sender), listener(&destination)],
            ends: [F::of(&sender), F::of(&destination)],
            sender,
            neighbour,
            destination,
            cluster,
        }
    }

    /// Starts both agents anew with these arguments.
    pub(crate) fn restart(&mut self, args: &[&str]) {
        for node in &mut self.cluster.nodes {
            node.stop_agent().unwrap();
            node.start_agent(args).unwrap();
        }
    }

    /// Waits until a packet is fast at both nodes, each way.
    pub(crate) fn warm_up(&self) {
        self.wait_for_endpoints();
        wait_for("the fast path", PATIENCE, || {
            let before = self.counters();
            self.ping();
            let after = self.counters();
            let fast = |i: usize, name| after[i].since(&before[i]).get(name) > 0;
            (0..2).all(|i| fast(i, "fast_encap") && fast(i, "fast_decap")).then_some(())
        })
        .unwrap();
    }

    /// Waits until the flow of [`Self::datagram`] is fast at both nodes: the strict gate knows flows, not pods.
    pub(crate) fn warm_up_flow(&self) {
        self.wait_for_endpoints();
        let frame = self.sent_by_sender(&self.datagram(b"warm").bytes());
        wait_for("the fast flow", PATIENCE, || {
            let before = self.counters();
            self.at_sender.send(&frame).unwrap();
            self.at_destination.until("the datagram", PATIENCE, |frame| frame.ends_with(b"warm")).unwrap();
            let after = self.counters();
            let fast = |i: usize, name| after[i].since(&before[i]).get(name) > 0;
            (fast(0, "fast_encap") && fast(1, "fast_decap")).then_some(())
        })
        .unwrap();
    }

    /// Lets every pod say something, and waits until the agents know where each is.
    fn wait_for_endpoints(&self) {
        for (node, pod) in [(0, &self.sender), (0, &self.neighbour), (1, &self.destination)] {
            let address: IpAddr = F::of(pod).into();
            wait_for("the agent to know the pod", PATIENCE, || {
                let to = if node == 0 { self.ends[1] } else { self.ends[0] };
                ping(pod.netns(), to, 1).ok()?;
                self.cluster.nodes[node].endpoints().unwrap().contains(&address).then_some(())
            })
            .unwrap_or_else(|error| panic!("{address}: {error:#}"));
        }
    }

    pub(crate) fn ping(&self) {
        ping(self.sender.netns(), self.ends[1], 1).unwrap();
    }

    /// The pods as ends of a conversation.
    pub(crate) fn hosts(&self) -> [Host<'_>; 2] {
        [F::host(&self.sender), F::host(&self.destination)]
    }

    pub(crate) fn counters(&self) -> [Counters; 2] {
        [0, 1].map(|i| Counters::read(&self.cluster.nodes[i]).unwrap())
    }

    /// A frame from the sending pod to its gateway.
    pub(crate) fn sent_by_sender(&self, packet: &[u8]) -> Vec<u8> {
        packet::ethernet(self.gateway_mac(0), pod_mac(&self.sender), F::ETHER_TYPE, packet)
    }

    /// A frame from the destination pod to its gateway.
    pub(crate) fn sent_by_destination(&self, packet: &[u8]) -> Vec<u8> {
        packet::ethernet(self.gateway_mac(1), pod_mac(&self.destination), F::ETHER_TYPE, packet)
    }

    /// A frame from the first node's uplink to the second's.
    pub(crate) fn on_the_wire(&self, packet: &[u8]) -> Vec<u8> {
        let mac = |i: usize| mac_of(self.cluster.nodes[i].netns(), "eth0");
        packet::ethernet(mac(1), mac(0), F::ETHER_TYPE, packet)
    }

    /// What the first node's kernel would make of a packet that its pod sends to the other, routed once.
    pub(crate) fn encapsulated(&self, inner: &[u8]) -> Vxlan<F> {
        let mac = |i: usize| mac_of(self.cluster.nodes[i].netns(), F::DEVICE);
        self.encapsulated_frame(packet::ethernet(mac(1), mac(0), F::ETHER_TYPE, inner))
    }

    pub(crate) fn encapsulated_frame(&self, frame: Vec<u8>) -> Vxlan<F> {
        let [source, destination] = [0, 1].map(|i| self.node(i));
        Vxlan { source, destination, ports: (40_000, 8472), flags: 0x0800_0000, vni: 1, frame }
    }

    pub(crate) fn gateway_mac(&self, node: usize) -> Mac {
        mac_of(self.cluster.nodes[node].netns(), BRIDGE)
    }

    /// A node's address on the underlay.
    pub(crate) fn node(&self, n: usize) -> F::Address {
        F::of_node(&self.cluster, n)
    }

    /// The address with this host part in a node's subnet.
    pub(crate) fn address(&self, node: usize, host: u8) -> F::Address {
        F::in_subnet_of(self.ends[node], host)
    }

    /// A datagram between the pods to where nobody answers.
    pub(crate) fn datagram(&self, data: &[u8]) -> F {
        F::udp(self.ends[0], self.ends[1], (5555, OPEN_PORT), data)
    }
}

pub(crate) fn pod_mac(pod: &Container) -> Mac {
    let [a, b, c, d] = pod.address().octets();
    [0x02, 0x42, a, b, c, d]
}

pub(crate) fn mac_of(netns: &Netns, interface: &str) -> Mac {
    let json = netns.ip(&format!("-json link show {interface}")).unwrap();
    let links: serde_json::Value = serde_json::from_str(&json).unwrap();
    let text = links[0]["address"].as_str().unwrap();
    let bytes: Vec<u8> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}
