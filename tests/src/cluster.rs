//! A whole cluster on one machine: an underlay, a real etcd, nodes with agents, containers on them.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use tempfile::TempDir;

use crate::{
    bpffs::Bpffs,
    container::Container,
    etcd::Etcd,
    netns::Netns,
    node::{self, Node},
    process::wait_for,
    remains,
    traffic::wait_for_answer,
    underlay::Underlay,
};

/// Where flannel keeps its keys.
pub const PREFIX: &str = "/coreos.com/network";

/// The host part of etcd's address on the underlay; nodes start at [`FIRST_NODE`].
const ETCD: u32 = 5;
const FIRST_NODE: u32 = 11;

/// The key under which a node's lease is in etcd. What has no IPv4 subnet has all of IPv4's zeros in it.
///
/// # Errors
///
/// Where the node has no `subnet.env` yet.
pub fn lease_key(node: &Node) -> Result<String> {
    let env = node.subnet_env()?;
    let segment = |subnet: IpNet| format!("{}-{}", subnet.network(), subnet.prefix_len());
    let v4 = env.subnet4.map_or_else(|| "0.0.0.0-0".to_owned(), |v4| segment(v4.into()));
    let v6 = env.subnet6.map_or_else(String::new, |v6| format!("&{}", segment(v6.into())));
    Ok(format!("{PREFIX}/subnets/{v4}{v6}"))
}

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How many nodes.
    pub nodes: u32,
    /// The network config, JSON.
    pub config: String,
    /// The nodes' own addresses.
    pub underlay: Ipv4Net,
    /// Their IPv6 addresses, where they have any.
    pub underlay6: Option<Ipv6Net>,
    /// Whether the nodes have IPv4 addresses at all.
    pub ipv4: bool,
    /// The uplinks' MTU, bytes.
    pub mtu: u32,
    /// The agent's binary; where none is named, [`node::binary`] finds it.
    pub binary: Option<PathBuf>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            nodes: 3,
            config: r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#.to_owned(),
            underlay: Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 64, 0), 24),
            underlay6: None,
            ipv4: true,
            mtu: 1500,
            binary: None,
        }
    }
}

impl Plan {
    /// Nodes and network with addresses of both families.
    #[must_use]
    pub fn dual() -> Self {
        let config = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"Type":"vxlan"}}"#;
        let underlay6 = Ipv6Net::new_assert(Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 0), 64);
        Self { config: config.to_owned(), underlay6: Some(underlay6), ..Self::default() }
    }

    /// Nodes and network without any IPv4 address.
    #[must_use]
    pub fn ipv6_only() -> Self {
        let config =
            r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"Type":"vxlan"}}"#;
        Self { config: config.to_owned(), ipv4: false, ..Self::dual() }
    }
}

/// A running cluster. Dropping it removes everything: agents, containers, etcd, namespaces, pins, files.
#[derive(Debug)]
pub struct Cluster {
    /// The nodes in order; the agents do not run yet when a cluster is made.
    pub nodes: Vec<Node>,
    etcd: Etcd,
    // Only held: dropped after the nodes.
    _etcd_netns: Netns,
    underlay: Underlay,
    bpffs: Bpffs,
    directory: TempDir,
    binary: PathBuf,
}

impl Cluster {
    /// Makes underlay, etcd and nodes, and writes the network config; starts no agent.
    ///
    /// # Errors
    ///
    /// Without root, or where a program is missing.
    pub fn create(plan: &Plan) -> Result<Self> {
        let directory = remains::directory("cluster")?;
        let bpffs = Bpffs::mount(&directory.path().join("bpf"))?;
        let underlay = Underlay::create(plan.underlay, plan.ipv4, plan.underlay6, plan.mtu)?;
        let etcd_netns = Netns::create("etcd")?;
        let address = underlay.plug(&etcd_netns, ETCD)?;
        let address6 = underlay.address6(ETCD).filter(|_| !plan.ipv4);
        let etcd = Etcd::inside(&etcd_netns, address6.map_or(address.into(), IpAddr::V6))?;
        // On a busy disk a fresh etcd may take longer over its first write than its own limit for a request.
        wait_for("etcd to take the network config", Duration::from_secs(30), || {
            etcd.ctl(&["put", &format!("{PREFIX}/config"), &plan.config]).ok()
        })?;
        let binary = plan.binary.clone().map_or_else(node::binary, Ok)?;
        let mut cluster =
            Self { binary, nodes: Vec::new(), etcd, _etcd_netns: etcd_netns, underlay, bpffs, directory };
        for _ in 0..plan.nodes {
            cluster.add_node()?;
        }
        Ok(cluster)
    }

    /// As [`Self::create`], then starts an agent with these arguments on each node, makes the bridges, and waits
    /// until each node has a route to every other.
    ///
    /// # Errors
    ///
    /// As [`Self::create`], and where an agent is not ready in time.
    pub fn start(plan: &Plan, args: &[&str]) -> Result<Self> {
        let mut cluster = Self::create(plan)?;
        for node in &mut cluster.nodes {
            node.start_agent(args)?;
            node.make_bridge()?;
        }
        cluster.wait_for_routes()?;
        Ok(cluster)
    }

    /// As [`Self::start`], with a container on each node, and waits until each reaches the next in every family that they
    /// have.
    ///
    /// # Errors
    ///
    /// As [`Self::start`], and where a container is not reached in time.
    pub fn start_with_containers(plan: &Plan, args: &[&str]) -> Result<(Self, Vec<Container>)> {
        let mut cluster = Self::start(plan, args)?;
        let containers = cluster.run_containers(1)?;
        for pair in containers.windows(2) {
            wait_for_answer(&pair[0], &pair[1])?;
        }
        Ok((cluster, containers))
    }

    /// Plugs one more node in, without an agent.
    ///
    /// # Errors
    ///
    /// Without root.
    pub fn add_node(&mut self) -> Result<&mut Node> {
        let n = u32::try_from(self.nodes.len()).context("too many nodes")?;
        let name = format!("n{}", n + 1);
        let netns = Netns::create(&name)?;
        let address = self.underlay.plug(&netns, FIRST_NODE + n)?;
        let directory = self.directory.path().join(&name);
        let bpffs = self.bpffs.path().join(&name);
        self.nodes.push(Node::new(
            &name,
            netns,
            address,
            self.etcd.endpoint(),
            directory,
            bpffs,
            self.binary.clone(),
        )?);
        self.nodes.last_mut().context("just pushed")
    }

    /// The cluster's etcd.
    #[must_use]
    pub fn etcd(&self) -> &Etcd {
        &self.etcd
    }

    /// The same, to kill and restart it.
    pub fn etcd_mut(&mut self) -> &mut Etcd {
        &mut self.etcd
    }

    /// The network between the nodes.
    #[must_use]
    pub fn underlay(&self) -> &Underlay {
        &self.underlay
    }

    /// The IPv6 address of the n-th node on the underlay, counted from 0, where the nodes have any.
    #[must_use]
    pub fn node_address6(&self, n: u32) -> Option<Ipv6Addr> {
        self.underlay.address6(FIRST_NODE + n)
    }

    /// The host part of the n-th node's addresses on the underlay, counted from 0.
    ///
    /// # Panics
    ///
    /// Where there cannot be so many.
    #[must_use]
    pub fn host_of_node(&self, n: usize) -> u32 {
        FIRST_NODE + u32::try_from(n).expect("so many nodes")
    }

    /// Where the nodes' pins are.
    #[must_use]
    pub fn bpffs(&self) -> &Path {
        self.bpffs.path()
    }

    /// The directory of the cluster's files.
    #[must_use]
    pub fn directory(&self) -> PathBuf {
        self.directory.path().to_owned()
    }

    /// Waits until each node that has a subnet has a route to that of every other one.
    ///
    /// # Errors
    ///
    /// Where one is missing after ten seconds.
    pub fn wait_for_routes(&self) -> Result<()> {
        let subnets: Vec<Vec<IpNet>> = self
            .nodes
            .iter()
            .map(|node| node.subnet_env().map_or_else(|_| Vec::new(), |env| env.subnets()))
            .collect();
        for (i, node) in self.nodes.iter().enumerate().filter(|(i, _)| !subnets[*i].is_empty()) {
            for (_, &subnet) in subnets
                .iter()
                .enumerate()
                .filter(|(j, _)| *j != i)
                .flat_map(|(j, subnets)| subnets.iter().map(move |it| (j, it)))
            {
                let what = format!("a route on {} to {subnet}", node.name());
                wait_for(&what, Duration::from_secs(10), || node.has_route(subnet).ok()?.then_some(()))?;
            }
        }
        Ok(())
    }

    /// Runs `each` containers on every node, node by node.
    ///
    /// # Errors
    ///
    /// Where a node has no bridge.
    pub fn run_containers(&mut self, each: u32) -> Result<Vec<Container>> {
        let mut containers = Vec::new();
        for node in &mut self.nodes {
            for host in 0..each {
                containers.push(node.run_container(2 + host)?);
            }
        }
        Ok(containers)
    }

    /// The leases in etcd: key and value of each, in order.
    ///
    /// # Errors
    ///
    /// Where etcd does not answer.
    pub fn leases(&self) -> Result<Vec<(String, String)>> {
        let text = self.etcd.ctl(&["get", "--prefix", &format!("{PREFIX}/subnets/")])?;
        let lines: Vec<&str> = text.lines().collect();
        Ok(lines.chunks_exact(2).map(|pair| (pair[0].to_owned(), pair[1].to_owned())).collect())
    }
}
