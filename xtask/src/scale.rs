//! `cargo xtask scale`: one node against thousands of peers that are leases in a real etcd, with a release build.

use std::{
    fs,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use loden_tests::{
    cluster::{Cluster, Plan},
    crowd::{self, Crowd},
    etcd::Gateway,
    node::Node,
    packet::Ipv4,
    process::wait_for,
};
use nix::unistd::{SysconfVar, geteuid, sysconf};
use serde_json::Value;

use crate::{
    build, interrupt,
    progress::{Step, heading},
    setup,
    table::table,
};

/// How many of the changes are timed.
const SAMPLES: u32 = 10;

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Peers, at most 65 000
    #[arg(long, default_value_t = 5000)]
    peers: u32,
    /// Lease changes a second
    #[arg(long, default_value_t = 100)]
    rate: u32,
    /// Seconds of changes
    #[arg(long, default_value_t = 10)]
    seconds: u32,
    /// An agent that is built already, instead of one that is built now
    #[arg(long, value_name = "PATH")]
    agent: Option<PathBuf>,
}

/// What was found, in the order of the table.
type Figures = Vec<(&'static str, String)>;

/// Runs it.
///
/// # Errors
///
/// Where the node does not get to know all peers, or loses one of the changes.
pub(crate) fn run(options: &Options) -> Result<()> {
    ensure!(geteuid().is_root(), "this makes network namespaces and loads programs: run it as root");
    interrupt::clear_away()?;
    let outcome = setup::run().and_then(|()| measure(options));
    interrupt::wait_if_interrupted();
    outcome
}

fn measure(options: &Options) -> Result<()> {
    let agent = match &options.agent {
        Some(binary) => binary.clone(),
        None => {
            heading("building the agent (release)");
            build::Agent::build_release()?.binary
        }
    };
    heading("one node, one etcd, a crowd of leases");
    let plan = Plan { nodes: 1, config: crowd::CONFIG.to_owned(), binary: Some(agent), ..Plan::default() };
    let mut cluster = Cluster::create(&plan)?;
    let step = Step::start(format!("{} leases", options.peers));
    let mut crowd: Crowd = Crowd::gather(Gateway::connect(cluster.etcd())?, options.peers)?;
    step.done("written");
    let mut figures = Figures::new();
    start(&mut cluster, options.peers, "first start", &mut figures)?;
    let (agent, maps) = memory(&cluster.nodes[0])?;
    figures.push(("memory of the agent (RSS)", format!("{agent:.0} MiB")));
    figures.push(("memory of the maps", format!("{maps:.1} MiB")));
    ensure!(cluster.nodes[0].stop_agent()?.success(), "the agent does not end well");
    start(&mut cluster, options.peers, "restart", &mut figures)?;
    change(&cluster, &mut crowd, options, &mut figures)?;
    let mut table = table(["", &format!("{} peers", options.peers)], 1);
    for (what, value) in figures {
        table.add_row([what.to_owned(), value]);
    }
    println!("{table}");
    Ok(())
}

/// Starts the agent and waits until it says that all is programmed; then the kernel is asked, too.
fn start(cluster: &mut Cluster, peers: u32, what: &'static str, figures: &mut Figures) -> Result<()> {
    let step = Step::start(what);
    let calls = etcd_calls(cluster)?;
    let begin = Instant::now();
    cluster.nodes[0].launch_agent(&[])?;
    let node = &cluster.nodes[0];
    let status = wait_for("all peers", Duration::from_secs(120), || {
        node.status().ok().filter(|status| status["ready"] == true)
    })
    .with_context(|| node.log())?;
    let time = begin.elapsed();
    for listing in ["ip route show dev flannel.1", "ip neigh show dev flannel.1 nud permanent"] {
        let lines = node.netns().exec(listing)?.lines().count();
        ensure!(lines == peers as usize, "{listing}: {lines} lines");
    }
    let cpu = cpu_time(node)?;
    let requests = kernel_requests(&status)?;
    let calls = etcd_calls(cluster)? - calls;
    step.done(format!("{time:?}"));
    figures.push((
        if what == "restart" { "restart to all programmed" } else { "start to all programmed" },
        format!("{:.2} s", time.as_secs_f64()),
    ));
    figures.push(("  of it CPU time of the agent", format!("{:.2} s", cpu.as_secs_f64())));
    figures.push(("  netlink requests", requests.to_string()));
    figures.push(("  etcd requests", calls.to_string()));
    Ok(())
}

/// What the agent of a node takes (RSS), and what its maps take, in MiB.
///
/// # Errors
///
/// Where the kernel or bpftool does not tell.
pub(crate) fn memory(node: &Node) -> Result<(f64, f64)> {
    let pid = node.agent_id().context("no agent")?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let resident = |name: &str| -> Result<f64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).context("no such line")?;
        Ok(line.split_whitespace().next().context("no number")?.parse::<f64>()? / 1024.0)
    };
    let mut maps = 0;
    for pin in fs::read_dir(node.bpffs().join("v1"))? {
        let pin = pin?.path();
        if pin.is_file() {
            let shown = node.netns().exec(&format!("bpftool -j map show pinned {}", pin.display()))?;
            let shown: Value = serde_json::from_str(&shown)?;
            maps += shown["bytes_memlock"].as_u64().context("bpftool tells no size")?;
        }
    }
    Ok((resident("VmRSS:")?, maps as f64 / (1 << 20) as f64))
}

/// Changes leases at a fixed rate, and looks how soon the node's kernel knows.
fn change(cluster: &Cluster, crowd: &mut Crowd, options: &Options, figures: &mut Figures) -> Result<()> {
    let node = &cluster.nodes[0];
    let step = Step::start(format!("{} changes a second for {} s", options.rate, options.seconds));
    let before = (cpu_time(node)?, kernel_requests(&node.status()?)?);
    let all = options.rate * options.seconds;
    let begin = Instant::now();
    let mut last = (0, String::new());
    let mut lags: Vec<Duration> = Vec::new();
    for i in 0..all {
        let n = i % crowd.size();
        let mac = crowd.change(n, 1 + (i / crowd.size()) as u8)?;
        let written = Instant::now();
        if i % (all / SAMPLES).max(1) == 0 {
            wait_until_known(node, n, &mac)?;
            lags.push(written.elapsed());
        }
        last = (n, mac);
        let due = begin + Duration::from_secs(1) * (i + 1) / options.rate;
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    let took = begin.elapsed();
    let written = Instant::now();
    wait_until_known(node, last.0, &last.1)?;
    lags.push(written.elapsed());
    let cpu = cpu_time(node)? - before.0;
    let requests = kernel_requests(&node.status()?)? - before.1;
    for n in 0..all.min(crowd.size()) {
        let mac = crowd::mac_at::<Ipv4>(node, n)?;
        ensure!(mac.starts_with("0a:") && !mac.starts_with("0a:00"), "the change of peer {n} is lost: {mac}");
    }
    lags.sort_unstable();
    step.done(format!("{took:?}"));
    let millis = |lag: Duration| lag.as_secs_f64() * 1e3;
    let (median, worst) = (lags[lags.len() / 2], lags[lags.len() - 1]);
    figures.push(("lease changes a second", format!("{:.0}", f64::from(all) / took.as_secs_f64())));
    figures.push((
        "  from etcd to the kernel, median (worst)",
        format!("{:.0} ({:.0}) ms", millis(median), millis(worst)),
    ));
    figures.push(("  CPU of the agent", format!("{:.0} %", 100.0 * cpu.as_secs_f64() / took.as_secs_f64())));
    figures.push(("  netlink requests a change", format!("{:.1}", requests as f64 / f64::from(all))));
    Ok(())
}

fn wait_until_known(node: &Node, n: u32, mac: &str) -> Result<()> {
    let start = Instant::now();
    while crowd::mac_at::<Ipv4>(node, n).ok().as_deref() != Some(mac) {
        ensure!(start.elapsed() < Duration::from_secs(20), "peer {n} is not known as {mac}: {}", node.log());
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

fn etcd_calls(cluster: &Cluster) -> Result<u64> {
    Ok(cluster.etcd().calls()?.iter().map(|(_, count)| count).sum())
}

fn kernel_requests(status: &Value) -> Result<u64> {
    status["kernel_requests"].as_u64().context("the status tells no kernel_requests")
}

/// User and system time of a node's agent so far.
fn cpu_time(node: &Node) -> Result<Duration> {
    let pid = node.agent_id().context("no agent")?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Fields 14 and 15 of proc(5), the first two of them before the end of the name in parentheses.
    let fields: Vec<&str> = stat.rsplit(')').next().context("no fields")?.split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    let per_second = sysconf(SysconfVar::CLK_TCK)?.context("no clock tick")?;
    Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}
