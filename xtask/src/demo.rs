//! `cargo xtask demo`: a whole cluster on this machine, shown and measured, and removed again.

mod compare;
mod keep;
mod reach;
mod report;
mod screenshot;

use std::{mem, path::PathBuf, process, time::Duration};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use loden_tests::{
    cluster::{Cluster, Plan},
    container::Container,
    counters::{Counters, Share},
    process::wait_for,
    remains::{self, host},
    traffic::{
        Host, ping,
        stream::{self, Until},
    },
};
use nix::unistd::geteuid;

use crate::{
    build, interrupt,
    progress::{Step, heading},
    setup,
};

/// Containers a node.
const EACH: u32 = 2;
/// The part of bulk TCP's packets that must take the fast path.
const LEAST_SHARE: f64 = 0.99;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Addresses of both families for nodes and containers
    #[arg(long)]
    dual: bool,
    /// Leave the cluster up and say how to look around
    #[arg(long)]
    keep: bool,
    /// Remove what kept or killed runs have left, and do nothing else
    #[arg(long, exclusive = true)]
    clean: bool,
    /// Print the result as JSON on standard output
    #[arg(long)]
    json: bool,
    /// Save a picture of the first node's web page, a PNG, taken while there is traffic
    #[arg(long, value_name = "FILE")]
    screenshot: Option<PathBuf>,
    /// How many times the fast path and the kernel's are measured in turn
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Milliseconds of each measurement
    #[arg(long, default_value_t = 700)]
    millis: u64,
}

/// What the demo has found.
#[derive(Debug)]
struct Findings {
    nodes: Vec<report::NodeFacts>,
    leases: Vec<(String, String)>,
    reach: reach::Matrix,
    bulk: Bulk,
    /// The same over IPv6, where there is that.
    bulk6: Option<Bulk>,
    comparison: Vec<compare::Comparison>,
}

/// Bulk TCP between all nodes.
#[derive(Debug)]
struct Bulk {
    bytes: u64,
    share: Share,
}

/// Runs the demo.
///
/// # Errors
///
/// Where something cannot be set up, a container does not reach another, less than 99 % of bulk TCP's packets of a family
/// take the fast path, or something is left behind.
pub(crate) fn run(options: &Options) -> Result<()> {
    ensure!(geteuid().is_root(), "the demo makes network namespaces and loads programs: run it as root");
    if options.clean {
        return keep::clean();
    }
    interrupt::clear_away()?;
    let outcome = setup::run().and_then(|()| show(options));
    interrupt::wait_if_interrupted();
    outcome
}

fn show(options: &Options) -> Result<()> {
    heading("building the agent and its programs");
    let agent = build::Agent::build()?;
    let before = host::Host::now()?;
    heading("three nodes, six containers");
    let plan = if options.dual { Plan::dual() } else { Plan::default() };
    let plan = Plan { binary: Some(agent.binary.clone()), ..plan };
    // For the picture, and for whoever looks around in a kept cluster.
    let args: &[&str] = if options.screenshot.is_some() || options.keep {
        &["--web-addr", screenshot::WEB_ADDR]
    } else {
        &[]
    };
    let mut cluster = start(&plan, args)?;
    let containers = cluster.run_containers(EACH)?;
    let findings = examine(&mut cluster, &containers, options);
    if options.keep {
        keep::explain(&agent.binary, &cluster, &containers);
        mem::forget((cluster, containers));
        return report::print(&findings?, None, options.json);
    }
    if findings.is_err() {
        interrupt::wait_if_interrupted();
        report::show_logs(&cluster);
    }
    let step = Step::start("removing everything");
    let maps = host::pinned_maps(cluster.bpffs())?;
    drop((cluster, containers));
    let mut leftovers = remains::of(process::id())?;
    leftovers.extend(host::Host::now()?.since(&before));
    leftovers.extend(host::maps_left(&maps));
    step.done(if leftovers.is_empty() { "nothing is left" } else { "something is LEFT BEHIND" });
    report::print(&findings?, Some(&leftovers), options.json)
}

/// Brings nodes, etcd, agents and bridges up.
fn start(plan: &Plan, args: &[&str]) -> Result<Cluster> {
    let step = Step::start("underlay, etcd and nodes");
    let mut cluster = Cluster::create(plan)?;
    step.done(format!("etcd at {}", cluster.etcd().endpoint()));
    for node in &mut cluster.nodes {
        let step = Step::start(format!("{}: agent at {}", node.name(), node.address()));
        node.start_agent(args)?;
        node.make_bridge()?;
        let subnets: Vec<String> = node.subnet_env()?.subnets().iter().map(ToString::to_string).collect();
        step.done(format!("subnet {}", subnets.join(" and ")));
    }
    let step = Step::start("routes between the nodes");
    cluster.wait_for_routes()?;
    step.done("there");
    Ok(cluster)
}

fn examine(cluster: &mut Cluster, containers: &[Container], options: &Options) -> Result<Findings> {
    let leases = cluster.leases()?;
    let reach = reach::all(containers);
    let first: Vec<&Container> = containers.iter().step_by(EACH as usize).collect();
    let bulk = bulk(cluster, &first, options, "bulk TCP between the nodes", &|it| Some(it.host()))?;
    let bulk6 = options.dual.then(|| {
        self::bulk(cluster, &first, options, "bulk TCP between the nodes over IPv6", &Container::host6)
    });
    let bulk6 = bulk6.transpose()?;
    if let Some(file) = &options.screenshot {
        screenshot::take(cluster, containers, file)?;
    }
    let nodes = cluster.nodes.iter().map(report::NodeFacts::of).collect::<Result<_>>()?;
    let comparison = compare::run(cluster, containers, options)?;
    Ok(Findings { nodes, leases, reach, bulk, bulk6, comparison })
}

/// Sends bulk TCP from the container of every node to that of every other node; `end` says by which address.
fn bulk(
    cluster: &Cluster,
    first: &[&Container],
    options: &Options,
    what: &str,
    end: &dyn Fn(&Container) -> Option<Host<'_>>,
) -> Result<Bulk> {
    settle(cluster, first, end)?;
    let step = Step::start(what);
    let ends = first.iter().map(|it| end(it).context("a container without such an address"));
    let ends: Vec<Host<'_>> = ends.collect::<Result<_>>()?;
    let work = || {
        let mut bytes = 0;
        for from in &ends {
            for to in ends.iter().filter(|to| to.address != from.address) {
                step.note(&format!("{} to {}", from.address, to.address));
                let stream = stream::run(*from, *to, None, Until::Time(millis(options)))?;
                ensure!(stream.source == from.address, "{} came from {}", from.address, stream.source);
                bytes += stream.bytes;
            }
        }
        Ok(bytes)
    };
    let (bytes, share) = Share::during(&cluster.nodes, first, work)?;
    step.done(format!(
        "{:.1} GB arrived as sent, {:.2} % of the packets by the fast path",
        bytes as f64 / 1e9,
        share.smaller() * 100.0
    ));
    Ok(Bulk { bytes, share })
}

/// Waits until packets between these containers take the fast path: until the agents know them all. `end` says by which
/// address.
fn settle(
    cluster: &Cluster,
    containers: &[&Container],
    end: &dyn Fn(&Container) -> Option<Host<'_>>,
) -> Result<()> {
    for pair in containers.windows(2) {
        let Some((from, to)) = end(pair[0]).zip(end(pair[1])) else { continue };
        wait_for("the fast path to take a ping's packets", Duration::from_secs(10), || {
            let work = || ping(from.netns, to.address, 10);
            let ((), share) = Share::during(&cluster.nodes, pair, work).ok()?;
            (share.smaller() > 0.5).then_some(())
        })
        .with_context(|| {
            let counters: Vec<_> = cluster.nodes.iter().map(Counters::read).collect();
            format!("between {} and {}: {counters:?}", from.address, to.address)
        })?;
    }
    Ok(())
}

fn millis(options: &Options) -> Duration {
    Duration::from_millis(options.millis)
}
