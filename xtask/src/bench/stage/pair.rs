//! The two nodes of a mode, and the pods on them.

use std::{net::Ipv4Addr, path::PathBuf};

use anyhow::{Context as _, Result};
use ipnet::Ipv4Net;
use loden_tests::{
    cluster::PREFIX,
    container::Container,
    counters::Share,
    flannel::FlannelNode,
    netns::{Netns, join},
    nic,
    node::{BRIDGE, Node},
    process::wait_for,
    traffic::ping,
};

use super::{Management, host, rules, soon, tunnel::Tunnel};
use crate::bench::{
    generator::SERVED,
    mode::{Kind, Mode},
};

/// The network between two nodes.
const UNDERLAY: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 64, 0), 24);
/// The pods' network.
const NETWORK: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 5, 0, 0), 16);
/// The service that work goes through.
pub(in crate::bench) const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// Pods a node: the open gate watches the flows of a pod that uses services, so those work from pods of their own.
const PODS: u32 = 2;

/// Where a mode's files go.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) directory: PathBuf,
    pub(super) bpffs: PathBuf,
    pub(super) binary: PathBuf,
    /// The object with the programs that only the bench has.
    pub(super) programs: PathBuf,
}

/// The nodes of one mode and what is in them.
#[derive(Debug)]
pub(in crate::bench) struct Pair {
    pub(in crate::bench) mode: Mode,
    /// Pods of the first node, then those of the second; none where the sockets are in the nodes.
    pods: Vec<Container>,
    nodes: Nodes,
}

#[derive(Debug)]
enum Nodes {
    Plain([Netns; 2]),
    Tunnel {
        /// Only held: the programs around the nodes' VXLAN devices.
        _programs: Vec<Tunnel>,
        nodes: [Netns; 2],
    },
    Flannel([FlannelNode; 2]),
    Loden(Vec<Node>),
}

impl Pair {
    /// Makes both nodes, their pods and their rules.
    pub(super) fn create(mode: Mode, place: &Place, management: &mut Management) -> Result<Self> {
        let wires = [wired(mode, 1)?, wired(mode, 2)?];
        join(&wires[0], "eth0", &wires[1], "eth0")?;
        for (netns, n) in wires.iter().zip(1..) {
            netns.ip(&format!("address add {}/{} dev eth0", host(UNDERLAY, n), UNDERLAY.prefix_len()))?;
            netns.exec("sysctl -qw net.ipv4.ip_forward=1")?;
        }
        let mut pair = match mode.kind() {
            Kind::Sockets => Self { mode, pods: Vec::new(), nodes: Nodes::Plain(wires) },
            Kind::Routes => Self::routed(mode, wires)?,
            Kind::Tunnel => Self::tunnel(mode, wires, place)?,
            Kind::Flannel => Self::flannel(mode, wires, management)?,
            Kind::Loden { backend, flags } => Self::loden(mode, wires, backend, flags, place, management)?,
        };
        pair.add_rules()?;
        Ok(pair)
    }

    fn routed(mode: Mode, wires: [Netns; 2]) -> Result<Self> {
        let mut pods = Vec::new();
        for (netns, n) in wires.iter().zip(1..) {
            pods.extend(bridged(netns, n, 1500)?);
            netns.ip(&format!("route add {} via {} dev eth0", own(3 - n), host(UNDERLAY, 3 - n)))?;
        }
        Ok(Self { mode, pods, nodes: Nodes::Plain(wires) })
    }

    fn tunnel(mode: Mode, wires: [Netns; 2], place: &Place) -> Result<Self> {
        let (mut pods, mut tunnels) = (Vec::new(), Vec::new());
        for (netns, n) in wires.iter().zip(1..) {
            let own_pods = bridged(netns, n, 1450)?;
            let veths: Vec<_> = own_pods.iter().zip(0..).map(|(pod, index)| (veth(index), pod)).collect();
            let other = (own(3 - n), host(UNDERLAY, 3 - n));
            tunnels.push(Tunnel::create(netns, &place.programs, &veths, other)?);
            pods.extend(own_pods);
        }
        Ok(Self { mode, pods, nodes: Nodes::Tunnel { _programs: tunnels, nodes: wires } })
    }

    fn flannel(mode: Mode, wires: [Netns; 2], management: &mut Management) -> Result<Self> {
        let [first, second] = wires;
        let node = |netns, n| FlannelNode::create(netns, host(UNDERLAY, n), own(n), &management.etcd);
        let mut nodes = [node(first, 1)?, node(second, 2)?];
        let [first, second] = &nodes;
        first.add_peer(second.subnet(), second.address(), second.mac(), false)?;
        second.add_peer(first.subnet(), first.address(), first.mac(), false)?;
        let mut pods = Vec::new();
        for node in &mut nodes {
            for _ in 0..PODS {
                pods.push(node.run_container()?);
            }
        }
        Ok(Self { mode, pods, nodes: Nodes::Flannel(nodes) })
    }

    fn loden(
        mode: Mode,
        wires: [Netns; 2],
        backend: &str,
        flags: &[&str],
        place: &Place,
        management: &mut Management,
    ) -> Result<Self> {
        let prefix = format!("{PREFIX}/{}", mode.name());
        let config = format!(r#"{{"Network":"{NETWORK}","Backend":{{"Type":"{backend}"}}}}"#);
        management.etcd.ctl(&["put", &format!("{prefix}/config"), &config])?;
        let mut nodes = Vec::new();
        for (netns, n) in wires.into_iter().zip(1..) {
            management.plug(&netns)?;
            let name = format!("n{n}");
            let mut node = Node::new(
                &name,
                netns,
                host(UNDERLAY, n),
                management.etcd.endpoint(),
                place.directory.join(&name),
                place.bpffs.join(format!("{}-{name}", mode.name())),
                place.binary.clone(),
            )?;
            let common = ["--etcd-prefix", &prefix, "--iface", "eth0", "--ip-masq"];
            node.start_agent(&[&common, flags].concat())?;
            node.make_bridge()?;
            nodes.push(node);
        }
        let subnets = [nodes[0].subnet_env()?.subnet, nodes[1].subnet_env()?.subnet];
        for (node, subnet) in nodes.iter().zip(subnets.iter().rev()) {
            soon("the route to the other node", || node.has_route(*subnet).ok()?.then_some(()))?;
        }
        let mut pods = Vec::new();
        for node in &mut nodes {
            for pod in 0..PODS {
                pods.push(node.run_container(2 + pod)?);
            }
        }
        Ok(Self { mode, pods, nodes: Nodes::Loden(nodes) })
    }

    /// Gives both nodes the rules of their mode.
    fn add_rules(&mut self) -> Result<()> {
        let Some(services) = self.mode.services() else { return Ok(()) };
        let backend = self.pods.get(3).map_or(host(UNDERLAY, 2), Container::address);
        for (node, n) in self.netns().into_iter().zip(1..) {
            if !matches!(self.nodes, Nodes::Loden(_)) {
                rules::flannel(node, NETWORK, own(n))?;
            }
            rules::kube_proxy(node, services, SERVICE, backend, &SERVED)?;
            // Thousands of connections a second must not fill the table for the modes that come after.
            node.exec("sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_time_wait=1")?;
            node.exec("sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_close=1")?;
        }
        Ok(())
    }

    /// Waits until packets take the way that the mode is for.
    pub(super) fn settle(&self) -> Result<()> {
        for through_service in [false, true] {
            let (client, server) = self.ends(through_service);
            let reach = || ping(client.0, server.1, 5);
            let Nodes::Loden(nodes) = &self.nodes else {
                wait_for("a ping to arrive", std::time::Duration::from_secs(5), || reach().ok())?;
                continue;
            };
            let pods: Vec<&Container> = self.pods.iter().collect();
            soon("packets to take the mode's way", || {
                let ((), share) = Share::during(nodes, &pods, reach).ok()?;
                (!self.mode.is_fast() || share.smaller() > 0.5).then_some(())
            })?;
        }
        Ok(())
    }

    /// Client and server: where their sockets are, and the server's own address.
    pub(in crate::bench) fn ends(&self, through_service: bool) -> ((&Netns, Ipv4Addr), (&Netns, Ipv4Addr)) {
        let end = |n: usize| {
            let pod = self.pods.get(n * PODS as usize + usize::from(through_service));
            let nodes = self.netns();
            pod.map_or_else(|| (nodes[n], host(UNDERLAY, n as u32 + 1)), |pod| (pod.netns(), pod.address()))
        };
        (end(0), end(1))
    }

    /// Whether it has pods that a service of the host's rules can be in front of. Cilium-like programs take replies past
    /// those rules: Cilium has its own services in their place.
    pub(in crate::bench) fn has_services(&self) -> bool {
        !self.pods.is_empty() && self.mode.services().is_some() && self.mode.kind() != Kind::Tunnel
    }

    /// Loden's nodes and the pods on them, where it has any.
    pub(in crate::bench) fn loden_nodes(&self) -> Option<(&[Node], Vec<&Container>)> {
        match &self.nodes {
            Nodes::Loden(nodes) => Some((nodes, self.pods.iter().collect())),
            _ => None,
        }
    }

    /// Makes the wire like that of NICs without offloads: segments on it, and GRO behind it.
    pub(in crate::bench) fn segment_wire(&self) -> Result<()> {
        for node in self.netns() {
            nic::segment(node, "eth0")?;
            nic::aggregate(node, "eth0")?;
        }
        Ok(())
    }

    fn netns(&self) -> Vec<&Netns> {
        match &self.nodes {
            Nodes::Plain(nodes) | Nodes::Tunnel { nodes, .. } => nodes.iter().collect(),
            Nodes::Flannel(nodes) => nodes.iter().map(FlannelNode::netns).collect(),
            Nodes::Loden(nodes) => nodes.iter().map(Node::netns).collect(),
        }
    }
}

/// A bridge with pods on it, as Docker makes them, in the subnet of the `n`-th node.
fn bridged(node: &Netns, n: u32, mtu: u32) -> Result<Vec<Container>> {
    let gateway = Ipv4Net::new(host(own(n), 1), 24)?;
    node.ip(&format!("link add {BRIDGE} mtu {mtu} type bridge"))?;
    node.ip(&format!("address add {gateway} dev {BRIDGE}"))?;
    node.ip(&format!("link set {BRIDGE} up"))?;
    let pod = |index| Container::create(node, BRIDGE, &veth(index), host(own(n), 2 + index), gateway, mtu);
    (0..PODS).map(pod).collect()
}

/// The host side of a pod's interface.
fn veth(index: u32) -> String {
    format!("veth{index}")
}

/// A namespace for the `n`-th node of a mode.
fn wired(mode: Mode, n: u32) -> Result<Netns> {
    Netns::create(&format!("{}-{n}", mode.name())).context("a node's namespace")
}

/// The subnet of the `n`-th node, where it is not the agent that chooses it.
fn own(n: u32) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::from(u32::from(NETWORK.network()) + (n << 8)), 24)
}
