//! One measurement: some work in one mode, and what the counters say of it.

use std::{
    net::{IpAddr, TcpStream},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum as _;
use loden_tests::{
    container::Container,
    counters::{Counters, FAST_DELIVERED, FAST_SENT},
    netns::{self, Netns},
    node::Node,
    process::{Process, wait_for},
};
use serde::{Deserialize, Serialize};

use super::{
    generator::{Port, Tally},
    plan::{Family, Variant},
    stage::{Pair, service},
    work::Work,
};

/// The part of the packets that must take the fast path. With the strict gate SYN, FIN and RST are left out, which may
/// not, and the ACK that ends each handshake, whose answer has proven the other direction. What else is missing are flows
/// that qualify again, a packet each way every 5 to 15 seconds.
const LEAST_SHARE: f64 = 0.99;
/// Paced work leaves the CPU idle, and its time is counted in ticks of 10 ms: it needs more of them.
const PACED_FACTOR: u64 = 4;

/// What one measurement came to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Sample {
    /// One for each metric of the work.
    pub(super) values: Vec<f64>,
    /// CPU time of one unit of work, in microseconds.
    pub(super) cpu_micros: f64,
    /// TCP segments sent again.
    pub(super) retransmitted: u64,
    /// Datagrams lost.
    pub(super) lost: u64,
    /// Which part of the packets took the fast path, of those that may.
    pub(super) share: Option<f64>,
}

/// The servers of a pair, which wait for work.
#[derive(Debug)]
pub(super) struct Servers {
    // Only held: ended when dropped.
    _processes: Vec<Process>,
}

impl Servers {
    /// Starts them on the server's CPU.
    pub(super) fn start(pair: &Pair, family: Family, variant: Variant) -> Result<Self> {
        let serve = |through_service| {
            let (_, (netns, address)) = pair.ends(through_service, family);
            serve(netns, address, variant.server_cpu())
        };
        let both: &[bool] = if pair.has_services() { &[false, true] } else { &[false] };
        let processes = both.iter().map(|&through_service| serve(through_service)).collect::<Result<_>>()?;
        Ok(Self { _processes: processes })
    }
}

/// Starts the servers of one address on a CPU, and waits until they listen.
///
/// # Errors
///
/// Where they do not within five seconds.
pub(super) fn serve(netns: &Netns, address: IpAddr, cpu: usize) -> Result<Process> {
    let mut command = ourselves(netns)?;
    command.args(["traffic", "serve", "--cpu", &cpu.to_string(), "--address", &address.to_string()]);
    let process = Process::start(&mut command)?;
    let there = || netns.run(|| TcpStream::connect(Port::Sink.at(address))).ok();
    wait_for("the servers to listen", Duration::from_secs(5), there)?;
    Ok(process)
}

/// This program, to be run in a namespace. Not with a priority of its own: the kernel's own threads, which carry packets
/// when there are many, would have to wait for it.
pub(super) fn ourselves(netns: &Netns) -> Result<std::process::Command> {
    let executable = std::env::current_exe().context("where is this program?")?;
    Ok(netns.command(&executable.display().to_string()))
}

/// Does one kind of work in one mode. Every packet of the pair's pods meanwhile is the work's.
pub(super) fn run(pair: &Pair, work: Work, family: Family, variant: Variant, millis: u64) -> Result<Sample> {
    let ((client, _), (_, server)) = pair.ends(work.is_through_service(), family);
    let to = if work.is_through_service() { service(family) } else { server };
    let mut command = ourselves(client)?;
    let millis = if work == Work::UdpPaced { millis * PACED_FACTOR } else { millis };
    let name = work.to_possible_value().context("a work has a name")?.get_name().to_owned();
    let (cpu, count) = (variant.client_cpu().to_string(), variant.cpus());
    let (to, millis) = (to.to_string(), millis.to_string());
    let drive = [
        "traffic", "drive", "--cpu", &cpu, "--to", &to, "--work", &name, "--millis", &millis, "--count",
        &count,
    ];
    command.args(drive);
    let mut work_on = || -> Result<Tally> { Ok(serde_json::from_str(&netns::output(&mut command)?)?) };
    let (tally, share) = match pair.loden_nodes() {
        Some((nodes, pods)) if pair.mode.is_fast() && !work.is_through_service() => {
            let (tally, share) = counted(nodes, &pods, work_on)?;
            ensure!(
                share.part >= LEAST_SHARE,
                "only {:.4} of the packets took the fast path: {share:?}",
                share.part
            );
            (tally, Some(share.part))
        }
        _ => (work_on()?, None),
    };
    ensure!(tally.units > 0, "nothing got through");
    Ok(Sample {
        values: work.values(&tally),
        cpu_micros: work.cpu_micros(&tally),
        retransmitted: tally.retransmitted,
        lost: tally.lost,
        share,
    })
}

/// Packets that may be fast, and which part of them was, at the worse end.
#[derive(Debug)]
#[expect(dead_code, reason = "told where the part is too small")]
struct FastShare {
    part: f64,
    sent: u64,
    reasons: Vec<Counters>,
}

/// Counts the packets of all pods while `work` runs.
fn counted<T>(
    nodes: &[Node],
    pods: &[&Container],
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, FastShare)> {
    let sent = || pods.iter().map(|pod| pod.packets_sent()).sum::<Result<u64>>();
    let counters = || nodes.iter().map(Counters::read).collect::<Result<Vec<_>>>();
    let (sent_before, before) = (sent()?, counters()?);
    let result = work()?;
    let (sent_after, after) = (sent()?, counters()?);
    let reasons: Vec<Counters> =
        after.iter().zip(&before).map(|(after, before)| after.since(before)).collect();
    let sum = |names: &[&str]| -> u64 {
        names.iter().flat_map(|name| reasons.iter().map(|counters| counters.get(name))).sum()
    };
    let sent = sent_after - sent_before;
    // Those that may not be fast are known where they set out; at the far end they are the kernel's, for one reason or
    // another.
    let control = sum(&["pass_pod_tcp_control"]);
    // A connection has four of them, SYN and FIN each way, and one ACK that ends the handshake.
    let acks = sum(&["pass_pod_gate"]).min(control / 4);
    let may = sent.saturating_sub(control + acks).max(1) as f64;
    let part = |fast: &[&str]| sum(fast) as f64 / may;
    let part = part(&FAST_SENT).min(part(&FAST_DELIVERED));
    Ok((result, FastShare { part, sent, reasons }))
}
