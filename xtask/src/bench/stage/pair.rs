//! The two nodes of a mode, and the pods on them.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use ipnet::{Ipv4Net, Ipv6Net};
use loden_tests::{
    cluster::PREFIX,
    container::Container,
    counters::Share,
    flannel::{FlannelNode, Half},
    netns::{Netns, join},
    nic,
    node::{BRIDGE, Node},
    process::wait_for,
    traffic::ping,
};

use super::{
    Management, host, host6,
    programs::{Ends, Programs},
    rules, soon,
};
use crate::bench::{
    generator::SERVED,
    mode::{Kind, Mode},
    plan::Family,
};

/// The network between two nodes.
const UNDERLAY: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 64, 0), 24);
/// The pods' network.
const NETWORK: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(10, 5, 0, 0), 16);
/// The IPv6 networks beside them.
const UNDERLAY6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0), 64);
const NETWORK6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0), 48);
/// Of pods and bridge where the outer header is IPv6's. flanneld tells its pods of 20 bytes more, which do not fit, and
/// leaves it to path MTU discovery; here every mode has the same.
const MTU6: u32 = 1430;
/// Pods a node: the open gate watches the flows of a pod that uses services, so those work from pods of their own.
const PODS: u32 = 2;
/// A node's link to the other one.
pub(super) const UPLINK: &str = "eth0";

/// The service that work goes through.
pub(in crate::bench) fn service(family: Family) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::new(10, 96, 0, 10).into(),
        Family::V6 => Ipv6Addr::new(0xfd96, 0, 0, 0, 0, 0, 0, 10).into(),
    }
}

/// What the nodes are for, and where a mode's files go.
#[derive(Debug)]
pub(super) struct Place {
    /// With IPv6 they have both.
    pub(super) family: Family,
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
    family: Family,
    /// Pods of the first node, then those of the second; none where the sockets are in the nodes.
    pods: Vec<Container>,
    nodes: Nodes,
}

#[derive(Debug)]
enum Nodes {
    Plain([Netns; 2]),
    Programs {
        /// Only held: of each node.
        _programs: Vec<Programs>,
        nodes: [Netns; 2],
    },
    Flannel([FlannelNode; 2]),
    Loden(Vec<Node>),
}

impl Pair {
    /// Makes both nodes, their pods and their rules.
    pub(super) fn create(mode: Mode, place: &Place, management: &mut Management) -> Result<Self> {
        let family = place.family;
        let wires = [wired(mode, 1)?, wired(mode, 2)?];
        join(&wires[0], UPLINK, &wires[1], UPLINK)?;
        for (netns, n) in wires.iter().zip(1..) {
            netns.ip(&format!("address add {}/{} dev {UPLINK}", host(UNDERLAY, n), UNDERLAY.prefix_len()))?;
            netns.exec("sysctl -qw net.ipv4.ip_forward=1")?;
            if place.family == Family::V6 {
                let (address, length) = (host6(UNDERLAY6, n), UNDERLAY6.prefix_len());
                netns.ip(&format!("-6 address add {address}/{length} dev {UPLINK} nodad"))?;
                netns.exec("sysctl -qw net.ipv6.conf.all.forwarding=1")?;
            }
        }
        let mut pair = match mode.kind() {
            Kind::Sockets => Self { mode, family, pods: Vec::new(), nodes: Nodes::Plain(wires) },
            Kind::Routes => Self::routed(mode, wires, family)?,
            Kind::Redirect => Self::programs(mode, wires, 1500, place, Programs::redirect)?,
            Kind::Tunnel => Self::programs(mode, wires, 1450, place, Programs::tunnel)?,
            Kind::Flannel => Self::flannel(mode, wires, family, management)?,
            Kind::Loden { backend, flags } => Self::loden(mode, wires, backend, flags, place, management)?,
        };
        pair.add_rules()?;
        Ok(pair)
    }

    fn routed(mode: Mode, wires: [Netns; 2], family: Family) -> Result<Self> {
        let mut pods = Vec::new();
        for (netns, n) in wires.iter().zip(1..) {
            let mut own_pods = bridged(netns, n, 1500)?;
            netns.ip(&format!("route add {} via {} dev eth0", own(3 - n), host(UNDERLAY, 3 - n)))?;
            if family == Family::V6 {
                netns.ip(&format!("-6 address add {} dev {BRIDGE} nodad", gateway6(own6(n))?))?;
                let (subnet, via) = (own6(3 - n), host6(UNDERLAY6, 3 - n));
                netns.ip(&format!("-6 route add {subnet} via {via} dev eth0"))?;
                give_ipv6(&mut own_pods, own6(n))?;
            }
            pods.extend(own_pods);
        }
        Ok(Self { mode, family, pods, nodes: Nodes::Plain(wires) })
    }

    /// Pods behind programs that only the bench has. The nodes have no route to each other's pods: without the programs
    /// nothing arrives.
    fn programs(
        mode: Mode,
        wires: [Netns; 2],
        mtu: u32,
        place: &Place,
        attach: fn(&Path, &Ends<'_>) -> Result<Programs>,
    ) -> Result<Self> {
        let (mut pods, mut programs) = (Vec::new(), Vec::new());
        for (node, n) in wires.iter().zip(1..) {
            let own_pods = bridged(node, n, mtu)?;
            let (other_subnet, other) = (own(3 - n), host(UNDERLAY, 3 - n));
            let ends = Ends { node, subnet: own(n), pods: &own_pods, other_subnet, other };
            programs.push(attach(&place.programs, &ends)?);
            pods.extend(own_pods);
        }
        let nodes = Nodes::Programs { _programs: programs, nodes: wires };
        Ok(Self { mode, family: place.family, pods, nodes })
    }

    fn flannel(mode: Mode, wires: [Netns; 2], family: Family, management: &mut Management) -> Result<Self> {
        let [first, second] = wires;
        let node = |netns, n| {
            let mut halves = vec![Half::new(host(UNDERLAY, n).into(), own(n).into())];
            if family == Family::V6 {
                halves.push(Half::new(host6(UNDERLAY6, n).into(), own6(n).into()));
            }
            FlannelNode::create(netns, halves, &management.etcd)
        };
        let mut nodes = [node(first, 1)?, node(second, 2)?];
        let [first, second] = &nodes;
        first.add_peer(second.halves(), false)?;
        second.add_peer(first.halves(), false)?;
        let mut pods = Vec::new();
        for node in &mut nodes {
            for _ in 0..PODS {
                let pod = node.run_container()?;
                if family == Family::V6 {
                    pod.netns().ip(&format!("link set eth0 mtu {MTU6}"))?;
                }
                pods.push(pod);
            }
            if family == Family::V6 {
                node.netns().ip(&format!("link set {BRIDGE} mtu {MTU6}"))?;
            }
        }
        Ok(Self { mode, family, pods, nodes: Nodes::Flannel(nodes) })
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
        let family = place.family;
        let ipv6 = match family {
            Family::V4 => String::new(),
            Family::V6 => format!(r#""EnableIPv6":true,"IPv6Network":"{NETWORK6}","#),
        };
        let config = format!(r#"{{"Network":"{NETWORK}",{ipv6}"Backend":{{"Type":"{backend}"}}}}"#);
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
        let subnets = [nodes[0].subnet_env()?.subnets(), nodes[1].subnet_env()?.subnets()];
        for (node, subnets) in nodes.iter().zip(subnets.iter().rev()) {
            for subnet in subnets {
                soon("the route to the other node", || node.has_route(*subnet).ok()?.then_some(()))?;
            }
        }
        let mut pods = Vec::new();
        for node in &mut nodes {
            for pod in 0..PODS {
                pods.push(node.run_container(2 + pod)?);
            }
        }
        Ok(Self { mode, family, pods, nodes: Nodes::Loden(nodes) })
    }

    /// Gives both nodes the rules of their mode.
    fn add_rules(&mut self) -> Result<()> {
        let Some(services) = self.mode.services() else { return Ok(()) };
        let backend = self.pods.get(3).map_or(host(UNDERLAY, 2), Container::address);
        let backend6 = self.pods.get(3).and_then(Container::address6).unwrap_or(host6(UNDERLAY6, 2));
        for (node, n) in self.netns().into_iter().zip(1..) {
            let is_bare = !matches!(self.nodes, Nodes::Loden(_));
            if is_bare {
                rules::flannel(node, NETWORK.into(), own(n).into())?;
            }
            if services > 0 {
                rules::kube_proxy(node, services, service(Family::V4), backend.into(), &SERVED)?;
            }
            if self.family == Family::V6 {
                if is_bare {
                    rules::flannel(node, NETWORK6.into(), own6(n).into())?;
                }
                if services > 0 {
                    rules::kube_proxy(node, services, service(Family::V6), backend6.into(), &SERVED)?;
                }
            }
            // Thousands of connections a second must not fill the table for the modes that come after.
            node.exec("sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_time_wait=1")?;
            node.exec("sysctl -qw net.netfilter.nf_conntrack_tcp_timeout_close=1")?;
        }
        Ok(())
    }

    /// Waits until packets take the way that the mode is for.
    pub(super) fn settle(&self) -> Result<()> {
        let ends = [false, true].map(|through_service| self.ends(through_service, self.family));
        let reach =
            |((client, _), (_, server)): ((&Netns, IpAddr), (&Netns, IpAddr))| ping(client, server, 5);
        // All first: an agent knows no pod before it has sent something, and a share is that of all pods.
        for ends in ends {
            wait_for("a ping to arrive", Duration::from_secs(5), || reach(ends).ok())?;
        }
        let (true, Some((nodes, pods))) = (self.mode.is_fast(), self.loden_nodes()) else { return Ok(()) };
        ends.into_iter().try_for_each(|ends| {
            soon("packets to take the fast path", || {
                let ((), share) = Share::during(nodes, &pods, || reach(ends)).ok()?;
                (share.smaller() > 0.5).then_some(())
            })
        })
    }

    /// Client and server: where their sockets are, and the server's own address.
    pub(in crate::bench) fn ends(
        &self,
        through_service: bool,
        family: Family,
    ) -> ((&Netns, IpAddr), (&Netns, IpAddr)) {
        let nodes = self.netns();
        let own_pod = |n: usize| self.pods.get(n * PODS as usize + usize::from(through_service));
        let end = |n: usize| {
            let pod = own_pod(n);
            let netns = pod.map_or(nodes[n], Container::netns);
            let last = n as u32 + 1;
            let address: IpAddr = match family {
                Family::V4 => pod.map_or_else(|| host(UNDERLAY, last), Container::address).into(),
                Family::V6 => pod.and_then(Container::address6).unwrap_or(host6(UNDERLAY6, last)).into(),
            };
            (netns, address)
        };
        (end(0), end(1))
    }

    /// Whether it has pods that a service of the host's rules can be in front of. Programs that only the bench has take
    /// replies past those rules: Cilium has its own services in their place.
    pub(in crate::bench) fn has_services(&self) -> bool {
        !self.pods.is_empty()
            && self.mode.services().is_some_and(|services| services > 0)
            && !matches!(self.nodes, Nodes::Programs { .. })
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
            nic::segment(node, UPLINK)?;
            nic::aggregate(node, UPLINK)?;
        }
        Ok(())
    }

    fn netns(&self) -> Vec<&Netns> {
        match &self.nodes {
            Nodes::Plain(nodes) | Nodes::Programs { nodes, .. } => nodes.iter().collect(),
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
    let addresses = |index| [(host(own(n), 2 + index).into(), gateway.into())];
    let pod = |index| Container::create(node, BRIDGE, &veth(index), &addresses(index), mtu);
    (0..PODS).map(pod).collect()
}

/// The host side of a pod's interface.
pub(super) fn veth(index: u32) -> String {
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

/// The same of IPv6.
fn own6(n: u32) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::from(u128::from(NETWORK6.network()) + (u128::from(n) << 64)), 64)
}

/// The bridge's address in a node's subnet.
fn gateway6(subnet: Ipv6Net) -> Result<Ipv6Net> {
    Ok(Ipv6Net::new(host6(subnet, 1), subnet.prefix_len())?)
}

/// Gives pods on a bridge addresses of IPv6, and the way out.
fn give_ipv6(pods: &mut [Container], subnet: Ipv6Net) -> Result<()> {
    let gateway = gateway6(subnet)?;
    pods.iter_mut().zip(2..).try_for_each(|(pod, n)| pod.add(host6(subnet, n).into(), gateway.into()))
}
