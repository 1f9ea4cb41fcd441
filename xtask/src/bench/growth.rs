//! `cargo xtask bench --growth`: what a transaction and the memory cost as peers, endpoints and flows become many.
//!
//! Two clusters of two nodes are up at once, both with the strict gate. One grows, step by step; the other stays as it
//! is, and each figure is compared with the other's of the same round.

use std::{
    fmt::Write as _,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    thread,
    time::Duration,
};

use anyhow::Result;
use clap::ValueEnum;
use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    counters::Share,
    crowd::{self, Crowd},
    etcd::Gateway,
    netns::{self},
    packet::Ipv4,
    process::{Process, wait_for},
    traffic::ping,
};
use serde::{Deserialize, Serialize};

use super::{
    MEASURED_CPU, OTHER_CPU, Options,
    generator::{self, Port, Tally},
    measure::{ourselves, serve},
    results::{Origin, Stored},
    rounds::Extent,
    statistics::Median,
};
use crate::{
    build::Agent,
    progress::{Step, heading},
    scale,
    table::table,
};

/// The file of the results.
pub(super) const FILE: &str = "growth.json";

/// What becomes many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// Endpoints on a node
    Endpoints,
    /// Flows between two pods, a packet of each in turn
    Flows,
    /// Nodes of the cluster
    Peers,
    /// As many nodes as the network has subnets: minutes go by until the agents and kernels know all of them
    FullNetwork,
}

impl Kind {
    fn title(self) -> &'static str {
        match self {
            Self::Endpoints => "endpoints",
            Self::Flows => "flows in turn",
            Self::Peers | Self::FullNetwork => "peers",
        }
    }
}

/// Peers that are leases of nodes elsewhere in a real etcd, besides the cluster's own; [`Kind::FullNetwork`] is
/// [`crowd::MAX`] of them.
const PEERS: [u32; 3] = [10, 1000, 10_000];
/// How long the agents may take over the largest of them, on a busy machine.
const KNOWN: Duration = Duration::from_secs(900);
/// How long they are left alone between two looks: to list tens of thousands of routes takes the CPU that they work on.
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);
/// Endpoints on the first node.
const ENDPOINTS: [u32; 3] = [1, 100, 1000];
/// The address in the subnet from which on the further endpoints are.
const FIRST_OF_CROWD: u32 = 10;
/// Addresses of one of the containers that have them: fewer than the agent finds of a port that the host never asked for.
const OF_A_CONTAINER: usize = 60;
/// Flows that take turns, a packet each way at a time.
const FLOWS: [u32; 4] = [1, 1000, 10_000, 100_000];
/// A network with as many subnets, each with room for [`ENDPOINTS`].
const WIDE_SUBNETS: &str = r#"{"Network":"10.0.0.0/8","SubnetLen":21,"Backend":{"Type":"vxlan"}}"#;

/// Two nodes with a pod each, and a server in the second.
struct Site {
    cluster: Cluster,
    pods: Vec<Container>,
    // Only held: ended when dropped.
    _server: Process,
}

impl Site {
    fn create(config: &str, agent: &Agent) -> Result<Self> {
        let plan = Plan {
            nodes: 2,
            config: config.to_owned(),
            binary: Some(agent.binary.clone()),
            ..Plan::default()
        };
        let mut cluster = Cluster::start(&plan, &["--gate=strict", "--datapath=ebpf"])?;
        let pods = cluster.run_containers(1)?;
        let server = serve(pods[1].netns(), pods[1].address().into(), MEASURED_CPU)?;
        let site = Self { cluster, pods, _server: server };
        wait_for("packets to take the fast path", Duration::from_secs(10), || {
            let pinged = || ping(site.pods[0].netns(), site.pods[1].address(), 5);
            let ((), share) = Share::during(&site.cluster.nodes, &site.both(), pinged).ok()?;
            (share.smaller() > 0.5).then_some(())
        })?;
        Ok(site)
    }

    fn both(&self) -> Vec<&Container> {
        self.pods.iter().collect()
    }

    /// Transactions a second between the pods, and which part of the packets was fast.
    fn rate(&self, flows: u32, millis: u64) -> Result<(f64, f64)> {
        let mut command = ourselves(self.pods[0].netns())?;
        let (cpu, millis, flows) = (MEASURED_CPU.to_string(), millis.to_string(), flows.to_string());
        let to = self.pods[1].address().to_string();
        let arguments = ["traffic", "drive", "--cpu", &cpu, "--to", &to, "--work", "udp-rr"];
        command.args(arguments).args(["--millis", &millis, "--flows", &flows, "--count", &cpu]);
        let work = || -> Result<Tally> { Ok(serde_json::from_str(&netns::output(&mut command)?)?) };
        let (tally, share) = Share::during(&self.cluster.nodes, &self.both(), work)?;
        // Exact below 2^53 transactions.
        Ok((tally.units as f64 / tally.seconds, share.smaller()))
    }
}

/// What was found at one step.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Row {
    kind: Kind,
    size: u32,
    rounds: u32,
    millis: u64,
    rate: f64,
    to_small: Median,
    fast: f64,
    agent_mib: f64,
    maps_mib: f64,
}

/// Grows a cluster in each of these ways, with agents as they are shipped, and keeps what was found.
///
/// # Errors
///
/// Where a cluster cannot be set up or does not grow.
pub(super) fn run(kinds: &[Kind], options: &Options) -> Result<()> {
    heading("building the agent (release)");
    let agent = Agent::build_release()?;
    let (origin, file) = (Origin::here(&agent.binary)?, options.out.join(FILE));
    if options.add {
        Stored::<Vec<Row>>::ensure_from(&file, &origin)?;
    }
    generator::pin(OTHER_CPU)?;
    heading("the cluster that stays as it is");
    let small = Site::create(crowd::CONFIG, &agent)?;
    let mut rows = Vec::new();
    let mut measure = |kind: Kind, size, site: &Site, flows| -> Result<()> {
        let step = Step::start(format!("{size} {}", kind.title()));
        rows.push(compared((kind, size), site, &small, flows, options)?);
        step.done("measured");
        Ok(())
    };
    for &kind in kinds {
        heading(&format!("a cluster with more and more {}", kind.title()));
        let config = if kind == Kind::Endpoints { WIDE_SUBNETS } else { crowd::CONFIG };
        let mut site = Site::create(config, &agent)?;
        match kind {
            Kind::Endpoints => {
                for endpoints in ENDPOINTS {
                    add_endpoints(&mut site, endpoints)?;
                    measure(kind, endpoints, &site, 1)?;
                }
            }
            Kind::Flows => {
                for flows in FLOWS {
                    // Twice: the first run lets each flow qualify.
                    site.rate(flows, 1)?;
                    measure(kind, flows, &site, flows)?;
                }
            }
            Kind::Peers | Kind::FullNetwork => {
                let sizes: &[u32] = if kind == Kind::Peers { &PEERS } else { &[crowd::MAX] };
                for &peers in sizes {
                    add_peers(&site, peers)?;
                    measure(kind, peers, &site, 1)?;
                }
            }
        }
    }
    println!("{}", shown(&rows));
    let earlier = if options.add { Stored::<Vec<Row>>::load(&file)? } else { None };
    let mut all = earlier.map_or_else(Vec::new, |stored| stored.results);
    // What was measured again replaces what was there.
    all.retain(|row| rows.iter().all(|new| (new.kind, new.size) != (row.kind, row.size)));
    all.extend(rows);
    all.sort_by_key(|row| (row.kind, row.size));
    Stored { origin, results: all }.save(&file)
}

/// Measures both clusters in turn.
fn compared(
    (kind, size): (Kind, u32),
    site: &Site,
    small: &Site,
    flows: u32,
    options: &Options,
) -> Result<Row> {
    let Extent { rounds, millis, .. } = options.extent();
    let (mut rates, mut ratios, mut fast) = (Vec::new(), Vec::new(), f64::INFINITY);
    for round in 0..rounds {
        let ((rate, share), other) = if round % 2 == 0 {
            let first = site.rate(flows, millis)?;
            (first, small.rate(1, millis)?)
        } else {
            let first = small.rate(1, millis)?;
            (site.rate(flows, millis)?, first)
        };
        rates.push(rate);
        ratios.push(rate / other.0);
        fast = fast.min(share);
    }
    let (agent_mib, maps_mib) = scale::memory(&site.cluster.nodes[0])?;
    let (rate, to_small) = (Median::of(rates).value, Median::of(ratios));
    Ok(Row { kind, size, rounds, millis, rate, to_small, fast, agent_mib, maps_mib })
}

/// Gives further containers on the first node addresses until the node has so many endpoints, and lets each speak. Not
/// a container each: that takes minutes, and to the programs it makes no difference.
fn add_endpoints(site: &mut Site, all: u32) -> Result<()> {
    let to = Port::Silent.at(site.pods[1].address().into());
    for (first, pod) in (1..all).step_by(OF_A_CONTAINER).zip(2..) {
        if site.pods.len() == pod {
            let container = site.cluster.nodes[0].run_container(FIRST_OF_CROWD + first)?;
            site.pods.push(container);
        }
        give_addresses(&site.pods[pod], all.min(first + OF_A_CONTAINER as u32) - first, to)?;
    }
    let node = &site.cluster.nodes[0];
    wait_for("the agent to know every endpoint", Duration::from_secs(60), || {
        let status = node.status().ok()?;
        let known = status["endpoints"].as_array().map_or(0, Vec::len);
        (known >= all as usize).then_some(())
    })
}

/// Gives a container so many addresses, its own being the first, and sends a datagram from each.
fn give_addresses(container: &Container, addresses: u32, to: SocketAddr) -> Result<()> {
    let first = u32::from(container.address());
    let addresses: Vec<Ipv4Addr> = (first..first + addresses).map(Ipv4Addr::from).collect();
    // Those of an earlier step are there already.
    let list = addresses[1..].iter().map(Ipv4Addr::to_string).collect::<Vec<_>>().join(" ");
    let add = format!("for a in {list}; do ip address replace $a/32 dev eth0; done");
    netns::output(container.netns().command("sh").args(["-c", &add]))?;
    container.netns().run(|| {
        addresses.iter().try_for_each(|address| UdpSocket::bind((*address, 0))?.send_to(b"x", to).map(drop))
    })?;
    Ok(())
}

/// Writes leases until there are so many peers besides the cluster's own, and waits until the first node's kernel has a
/// route to each and its agent nothing more to do.
fn add_peers(site: &Site, all: u32) -> Result<()> {
    Crowd::<Ipv4>::gather(Gateway::connect(site.cluster.etcd())?, all)?;
    let node = &site.cluster.nodes[0];
    wait_for("a route to every peer", KNOWN, || {
        thread::sleep(BETWEEN_LOOKS);
        let routes = node.netns().ip("route show dev flannel.1").ok()?;
        let has_all = routes.lines().count() > all as usize;
        (has_all && node.status().ok()?["ready"] == true).then_some(())
    })
}

const HEADER: [&str; 6] = ["", "UDP_RR, 1/s", "to the small cluster", "fast", "agent, MiB", "maps, MiB"];

impl Row {
    fn cells(&self) -> [String; 6] {
        let Median { value, low, high } = self.to_small;
        [
            format!("{} {}", self.size, self.kind.title()),
            format!("{:.0}", self.rate),
            format!("{value:.2} [{low:.2} {high:.2}]"),
            format!("{:.4}", self.fast),
            format!("{:.0}", self.agent_mib),
            format!("{:.1}", self.maps_mib),
        ]
    }
}

fn shown(rows: &[Row]) -> comfy_table::Table {
    let mut shown = table(HEADER, 1);
    for row in rows {
        shown.add_row(row.cells());
    }
    shown
}

/// The block for the documents.
pub(super) fn block(stored: &Stored<Vec<Row>>) -> String {
    let (Some(least), Some(millis)) = (
        stored.results.iter().map(|row| row.rounds).min(),
        stored.results.iter().map(|row| row.millis).min(),
    ) else {
        return String::new();
    };
    let mut block = format!(
        "{}; both ends on one CPU, strict gate, {least} rounds of {millis} ms.\n\n| {} |\n| --- | ---: | --- | ---: | ---: | ---: |\n",
        stored.origin.machine,
        HEADER.join(" | "),
    );
    for row in &stored.results {
        let _ = writeln!(block, "| {} |", row.cells().join(" | "));
    }
    block
}
