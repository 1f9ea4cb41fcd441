//! What the agent's programs have counted, as the status document has it.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{container::Container, node::Node, process::wait_for};

/// Packets encapsulated by the fast path.
pub const FAST_ENCAP: &str = "fast_encap";
/// Packets delivered by the fast path: decapsulated by it, or by the kernel just before it.
pub const FAST_DELIVERED: [&str; 3] = ["fast_decap", "fast_overlay", "fast_direct_in"];
/// Packets that the fast path sent to a peer, encapsulated or not.
pub const FAST_SENT: [&str; 3] = [FAST_ENCAP, "fast_overlay_out", "fast_direct_out"];

/// A node's counters, by reason, summed over its CPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters(BTreeMap<String, u64>);

impl Counters {
    /// Reads them; a node without programs has none.
    ///
    /// # Errors
    ///
    /// Where the agent does not answer.
    pub fn read(node: &Node) -> Result<Self> {
        let status = node.status_at_socket()?;
        let Some(counters) = status["counters"].as_object() else { return Ok(Self::default()) };
        let number = |(name, value): (&String, &Value)| {
            Ok((name.clone(), value.as_u64().with_context(|| format!("counter {name} is {value}"))?))
        };
        Ok(Self(counters.iter().map(number).collect::<Result<_>>()?))
    }

    /// One of them; what was never counted is zero.
    #[must_use]
    pub fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// What has been counted since an earlier reading.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let grown = |(name, &value): (&String, &u64)| (name.clone(), value.saturating_sub(earlier.get(name)));
        Self(self.0.iter().map(grown).filter(|(_, value)| *value > 0).collect())
    }

    /// All of them by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().map(|(name, &value)| (name.as_str(), value))
    }
}

/// Which part of the packets that containers sent took the fast path, at each end of the underlay.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// Packets that the containers sent, by their own devices' counters: what the others are compared with.
    pub sent: u64,
    /// Packets that the programs sent to a peer, encapsulated or not.
    pub encapsulated: u64,
    /// Packets that the programs put into the containers at the far end.
    pub delivered: u64,
}

/// Within which agents know a new container.
const KNOWN: Duration = Duration::from_secs(5);

impl Share {
    /// The smaller of both parts, from 0 to 1.
    #[must_use]
    pub fn smaller(&self) -> f64 {
        // Exact below 2^53 packets.
        self.encapsulated.min(self.delivered) as f64 / self.sent.max(1) as f64
    }

    /// Counts while `work` runs, which must be the only traffic of these containers, all of it between nodes. Begins when
    /// the agents know the containers: one that was just made goes by the kernel until then.
    ///
    /// # Errors
    ///
    /// Those of `work`, and where a counter cannot be read.
    pub fn during<T>(
        nodes: &[Node],
        containers: &[&Container],
        work: impl FnOnce() -> Result<T>,
    ) -> Result<(T, Self)> {
        wait_until_known(nodes, containers);
        let meter = Meter::start(nodes, containers)?;
        let result = work()?;
        Ok((result, meter.stop(nodes, containers)?))
    }
}

/// Waits until the agents have endpoints for the containers, by either address: an agent learns of one when it is used.
/// Nothing is promised, since the count shows it: agents that are away, or that are to know nothing of a container, cost
/// the limit at most.
fn wait_until_known(nodes: &[Node], containers: &[&Container]) {
    let known = || nodes.iter().map(Node::endpoints).collect::<Result<Vec<_>>>();
    // Of an agent that is away, what was there when it went is there still.
    if known().is_ok() {
        let all = || {
            let addresses = known().ok()?.concat();
            let is_known =
                |container: &&Container| container.addresses().any(|address| addresses.contains(&address));
            containers.iter().all(is_known).then_some(())
        };
        let _ = wait_for("the agents to know the containers", KNOWN, all);
    }
}

/// A count that has begun: see [`Share::during`], which is this around a closure.
#[derive(Debug)]
pub struct Meter {
    sent: u64,
    counters: Vec<Counters>,
}

impl Meter {
    /// Reads what has been counted so far.
    ///
    /// # Errors
    ///
    /// Where a counter cannot be read.
    pub fn start(nodes: &[Node], containers: &[&Container]) -> Result<Self> {
        let sent = containers.iter().map(|container| container.packets_sent()).sum::<Result<u64>>()?;
        let counters = nodes.iter().map(Counters::read).collect::<Result<Vec<_>>>()?;
        Ok(Self { sent, counters })
    }

    /// Reads it again; nodes and containers must be the same ones.
    ///
    /// # Errors
    ///
    /// Where a counter cannot be read.
    pub fn stop(self, nodes: &[Node], containers: &[&Container]) -> Result<Share> {
        let now = Self::start(nodes, containers)?;
        let grown = |name: &str| -> u64 {
            let pairs = now.counters.iter().zip(&self.counters);
            pairs.map(|(after, before)| after.get(name).saturating_sub(before.get(name))).sum()
        };
        Ok(Share {
            sent: now.sent - self.sent,
            encapsulated: FAST_SENT.into_iter().map(grown).sum(),
            delivered: FAST_DELIVERED.into_iter().map(grown).sum(),
        })
    }
}
