//! `cargo xtask scale`: one node against thousands of peers that are leases in a real etcd, with a release build.

mod cpu;

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};
use loden_tests::{
    cluster::{Cluster, Plan},
    crowd::{self, Crowd, Peers},
    etcd::Gateway,
    node::Node,
    packet::{Ipv4, Ipv6},
    process::wait_for,
};
use nix::unistd::geteuid;
use serde_json::Value;

use crate::{
    build, interrupt,
    progress::{Step, heading},
    setup,
    table::table,
};

/// How many of the changes are timed.
const SAMPLES: u32 = 10;
/// How many changes are made one at a time.
const SINGLE: u32 = 15;
/// After one of those, until the next: longer than a pass takes, and than facts wait for to be left.
const CALM: Duration = Duration::from_millis(2500);
/// When all that a change asks for at once is done.
const DONE: Duration = Duration::from_millis(700);
/// How often the agent looks at everything of its own accord.
const TICK: Duration = Duration::from_secs(30);

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
    /// Ticks of the agent that are waited for, 30 s each
    #[arg(long, default_value_t = 3)]
    ticks: u32,
    /// This family alone
    #[arg(long)]
    family: Option<Only>,
    /// An agent that is built already, instead of one that is built now
    #[arg(long, value_name = "PATH")]
    agent: Option<PathBuf>,
}

/// One family of both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Only {
    V4,
    V6,
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
    let mut columns: Vec<(&str, Figures)> = Vec::new();
    if options.family != Some(Only::V6) {
        columns.push(("IPv4", measure_family::<Ipv4>(&agent, options)?));
    }
    if options.family != Some(Only::V4) {
        columns.push(("IPv6", measure_family::<Ipv6>(&agent, options)?));
    }
    let peers = format!("{} peers", options.peers);
    let mut table = match columns.as_slice() {
        [(one, _), (other, _)] => table([&peers, one, other], 1),
        _ => table([&peers, columns[0].0], 1),
    };
    for row in 0..columns[0].1.len() {
        let name = columns[0].1[row].0;
        table.add_row([name].into_iter().chain(columns.iter().map(|(_, figures)| figures[row].1.as_str())));
    }
    println!("{table}");
    Ok(())
}

fn measure_family<F: Peers>(agent: &Path, options: &Options) -> Result<Figures> {
    heading("one node, one etcd, a crowd of leases");
    let mut cluster = Cluster::create(&Plan { binary: Some(agent.to_owned()), ..F::wide(1) })?;
    let step = Step::start(format!("{} leases", options.peers));
    let mut crowd = Crowd::<F>::gather(Gateway::connect(cluster.etcd())?, options.peers)?;
    step.done("written");
    let mut figures = Figures::new();
    start::<F>(&mut cluster, options.peers, "first start", &mut figures)?;
    let (agent, maps) = memory(&cluster.nodes[0])?;
    figures.push(("memory of the agent (RSS)", format!("{agent:.0} MiB")));
    figures.push(("memory of the maps", format!("{maps:.1} MiB")));
    ensure!(cluster.nodes[0].stop_agent()?.success(), "the agent does not end well");
    start::<F>(&mut cluster, options.peers, "restart", &mut figures)?;
    change_one_at_a_time(&cluster, &mut crowd, &mut figures)?;
    wait_for_ticks(&cluster.nodes[0], options.ticks, &mut figures)?;
    change(&cluster, &mut crowd, options, &mut figures)?;
    let (agent, _) = memory(&cluster.nodes[0])?;
    figures.push(("memory of the agent (RSS) at the end", format!("{agent:.0} MiB")));
    Ok(figures)
}

/// Starts the agent and waits until it says that all is programmed; then the kernel is asked, too.
fn start<F: Peers>(
    cluster: &mut Cluster,
    peers: u32,
    what: &'static str,
    figures: &mut Figures,
) -> Result<()> {
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
    for listing in ["route show proto 76", "neigh show nud permanent"] {
        let listing = format!("ip {} {listing} dev {}", F::FLAG, F::DEVICE);
        let lines = node.netns().exec(&listing)?.lines().count();
        ensure!(lines == peers as usize, "{listing}: {lines} lines");
    }
    let cpu = cpu::time(node)?;
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

/// Changes one lease, and another when all is calm again.
fn change_one_at_a_time<F: Peers>(
    cluster: &Cluster,
    crowd: &mut Crowd<F>,
    figures: &mut Figures,
) -> Result<()> {
    let node = &cluster.nodes[0];
    let step = Step::start(format!("{SINGLE} changes, one at a time"));
    thread::sleep(CALM);
    let begin = (Instant::now(), cpu::time(node)?);
    let mut each = Vec::new();
    for i in 0..SINGLE {
        let n = crowd.size() / SINGLE * i;
        let before = cpu::time(node)?;
        let mac = crowd.change(n, 0x40)?;
        wait_until_known::<F>(node, n, &mac)?;
        thread::sleep(DONE);
        each.push(cpu::time(node)? - before);
        thread::sleep(CALM - DONE);
    }
    let (took, all) = (begin.0.elapsed(), cpu::time(node)? - begin.1);
    let single = format!("{:.1} ms", cpu::median(each).as_secs_f64() * 1e3);
    step.done(format!("{single} of CPU time each"));
    figures.push(("CPU time of a single change, median", single));
    figures.push(("CPU at one change in 2.5 s, all included", share(all, took)));
    Ok(())
}

/// Waits while nothing happens: a tick takes most of what the agent does then.
fn wait_for_ticks(node: &Node, ticks: u32, figures: &mut Figures) -> Result<()> {
    let during = TICK * ticks + TICK / 6;
    let step = Step::start(format!("nothing for {during:?}"));
    thread::sleep(CALM);
    let mut bursts = cpu::bursts(node, during)?;
    let idle = share(bursts.iter().sum(), during);
    step.done(format!("{idle} of a CPU, in {} bursts", bursts.len()));
    figures.push(("CPU while nothing happens", idle));
    bursts.sort_unstable();
    let of_ticks = bursts.split_off(bursts.len().saturating_sub(ticks as usize));
    ensure!(!of_ticks.is_empty(), "no tick in {during:?}");
    let tick = cpu::median(of_ticks).as_secs_f64() * 1e3;
    figures.push(("  CPU time of a tick, median", format!("{tick:.0} ms")));
    Ok(())
}

fn share(of: Duration, in_time: Duration) -> String {
    format!("{:.1} %", 100.0 * of.as_secs_f64() / in_time.as_secs_f64())
}

/// Changes leases at a fixed rate, and looks how soon the node's kernel knows.
fn change<F: Peers>(
    cluster: &Cluster,
    crowd: &mut Crowd<F>,
    options: &Options,
    figures: &mut Figures,
) -> Result<()> {
    let node = &cluster.nodes[0];
    let step = Step::start(format!("{} changes a second for {} s", options.rate, options.seconds));
    let before = (cpu::time(node)?, kernel_requests(&node.status()?)?);
    let all = options.rate * options.seconds;
    let begin = Instant::now();
    let mut last = (0, String::new());
    let mut lags: Vec<Duration> = Vec::new();
    for i in 0..all {
        let n = i % crowd.size();
        let mac = crowd.change(n, 1 + (i / crowd.size()) as u8)?;
        let written = Instant::now();
        if i % (all / SAMPLES).max(1) == 0 {
            wait_until_known::<F>(node, n, &mac)?;
            lags.push(written.elapsed());
        }
        last = (n, mac);
        let due = begin + Duration::from_secs(1) * (i + 1) / options.rate;
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    let took = begin.elapsed();
    let written = Instant::now();
    wait_until_known::<F>(node, last.0, &last.1)?;
    lags.push(written.elapsed());
    let cpu = cpu::time(node)? - before.0;
    let requests = kernel_requests(&node.status()?)? - before.1;
    for n in 0..all.min(crowd.size()) {
        let mac = crowd::mac_at::<F>(node, n)?;
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
    figures.push(("  CPU of the agent", share(cpu, took)));
    figures.push(("  netlink requests a change", format!("{:.1}", requests as f64 / f64::from(all))));
    Ok(())
}

fn wait_until_known<F: Peers>(node: &Node, n: u32, mac: &str) -> Result<()> {
    let start = Instant::now();
    while crowd::mac_at::<F>(node, n).ok().as_deref() != Some(mac) {
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
