//! Two nodes for each mode, all up at once: switching between modes is sending elsewhere.
//!
//! The nodes of a mode are joined by a veth pair and nothing else. etcd and the agents speak over a network of their
//! own, which the measured packets never touch.

mod pair;
mod programs;
mod rules;

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result};
use ipnet::{Ipv4Net, Ipv6Net};
use loden_tests::{
    bpffs::Bpffs,
    etcd::Etcd,
    netns::{Netns, join},
    process::wait_for,
    remains,
};
use tempfile::TempDir;

pub(super) use self::pair::{Pair, service};
use super::{mode::Mode, plan::Family};
use crate::{build::Agent, progress::Step};

/// The network of etcd and the agents.
const MANAGEMENT: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 65, 0), 24);

/// Everything that is measured. Dropping it removes it.
#[derive(Debug)]
pub(super) struct Stage {
    /// In the order of the modes.
    pub(super) pairs: Vec<Pair>,
    // Only held: dropped after the pairs.
    _management: Management,
    _bpffs: Bpffs,
    _directory: TempDir,
}

/// etcd, and what it is reached by.
#[derive(Debug)]
pub(super) struct Management {
    pub(super) etcd: Etcd,
    netns: Netns,
    plugged: u32,
}

impl Management {
    fn create() -> Result<Self> {
        let netns = Netns::create("etcd")?;
        netns.ip("link add br0 type bridge")?;
        let address = host(MANAGEMENT, 1);
        netns.ip(&format!("address add {address}/{} dev br0", MANAGEMENT.prefix_len()))?;
        netns.ip("link set br0 up")?;
        let etcd = Etcd::inside(&netns, address)?;
        Ok(Self { etcd, netns, plugged: 1 })
    }

    /// Gives a node an interface by which it reaches etcd.
    pub(super) fn plug(&mut self, node: &Netns) -> Result<()> {
        self.plugged += 1;
        let port = format!("port{}", self.plugged);
        join(node, "mgmt0", &self.netns, &port)?;
        self.netns.ip(&format!("link set {port} master br0"))?;
        let address = host(MANAGEMENT, self.plugged);
        node.ip(&format!("address add {address}/{} dev mgmt0", MANAGEMENT.prefix_len())).map(drop)
    }
}

impl Stage {
    /// Makes the nodes and pods of these modes, for work of this family.
    ///
    /// # Errors
    ///
    /// Without root, or where a program is missing.
    pub(super) fn create(modes: &[Mode], family: Family, agent: &Agent) -> Result<Self> {
        let directory = remains::directory("bench")?;
        let bpffs = Bpffs::mount(&directory.path().join("bpf"))?;
        let mut management = Management::create()?;
        let mut pairs = Vec::new();
        for &mode in modes {
            let step = Step::start(format!("two nodes: {}", mode.name()));
            let place = pair::Place {
                family,
                directory: directory.path().join(mode.name()),
                bpffs: bpffs.path().to_owned(),
                binary: agent.binary.clone(),
                programs: agent.programs.with_file_name("loden-bench-programs"),
            };
            let pair = Pair::create(mode, &place, &mut management).with_context(|| mode.name())?;
            step.done("up");
            pairs.push(pair);
        }
        let step = Step::start("every pair reaches its other end");
        for pair in &pairs {
            pair.settle().with_context(|| pair.mode.name())?;
        }
        step.done("by the way that it is for");
        Ok(Self { pairs, _management: management, _bpffs: bpffs, _directory: directory })
    }
}

/// The `n`-th address of a network.
pub(super) fn host(network: Ipv4Net, n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(network.network()) + n)
}

/// The same of an IPv6 network.
pub(super) fn host6(network: Ipv6Net, n: u32) -> Ipv6Addr {
    Ipv6Addr::from(u128::from(network.network()) + u128::from(n))
}

/// As [`wait_for`], ten seconds at most.
fn soon<T>(what: &str, ask: impl FnMut() -> Option<T>) -> Result<T> {
    wait_for(what, std::time::Duration::from_secs(10), ask)
}
