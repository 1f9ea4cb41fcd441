//! The ends of the measured traffic: processes of their own, as clients and servers are, each pinned to a CPU.
//!
//! They do little besides their system calls: nothing is compared, and the clock is read once a transaction only
//! where latency is what is measured. A client prints one line of JSON, a [`Tally`].

mod clock;
mod datagrams;
mod streams;
mod transactions;

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    process, thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};
use nix::{
    sched::{CpuSet, sched_setaffinity},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use super::work::{FLOWS_MAX, Work};

/// How long a client may take beyond its time before it gives up: a lost packet must not hold the run.
const PATIENCE: Duration = Duration::from_secs(5);
/// And beyond that for each flow that takes its turn before the clock starts.
const FLOW_PATIENCE: Duration = Duration::from_micros(200);
/// Traffic before the clock starts: neighbours are resolved and flows are known by then.
const WARM_UP: Duration = Duration::from_millis(60);

/// One end.
#[derive(Debug, Subcommand)]
pub(crate) enum End {
    /// Answers every kind of work until it is ended
    Serve(Server),
    /// Does one kind of work for some time
    Drive(Client),
}

#[derive(Debug, Args)]
pub(crate) struct Server {
    #[arg(long)]
    cpu: usize,
    #[arg(long)]
    address: IpAddr,
}

#[derive(Debug, Args)]
pub(crate) struct Client {
    #[arg(long)]
    cpu: usize,
    #[arg(long)]
    to: IpAddr,
    #[arg(long, value_enum)]
    work: Work,
    #[arg(long)]
    millis: u64,
    /// Of UDP_RR: so many flows, a transaction of each in turn
    #[arg(long, default_value_t = 1)]
    flows: u32,
    /// The CPUs whose time is counted
    #[arg(long, value_delimiter = ',')]
    count: Vec<usize>,
}

/// What a client has measured.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Tally {
    /// Transactions, bytes or datagrams.
    pub(crate) units: u64,
    /// In this time.
    pub(crate) seconds: f64,
    /// CPU time of the counted CPUs that was not idle, in seconds.
    pub(crate) busy: f64,
    /// TCP segments sent again by the client's host.
    pub(crate) retransmitted: u64,
    /// Datagrams without an answer.
    pub(crate) lost: u64,
    /// p50, p99 and p99.9 of a transaction, in microseconds, where it was measured.
    pub(crate) latency: Option<[f64; 3]>,
}

/// A server's port for each way to answer.
#[derive(Clone, Copy, Debug)]
pub(super) enum Port {
    /// TCP: a byte for a byte.
    Echo = 7001,
    /// TCP: a byte for a byte, then the end.
    EchoOnce = 7002,
    /// TCP: reads and is silent.
    Sink = 7003,
    /// UDP: a byte for a datagram.
    Datagrams = 7004,
    /// UDP: a byte for every [`datagrams::BATCH`] datagrams.
    Counted = 7005,
    /// UDP: reads and is silent.
    Silent = 7006,
}

/// The ports that work through a service goes to.
pub(super) const SERVED: [u16; 2] = [Port::Echo as u16, Port::EchoOnce as u16];

impl Port {
    pub(super) fn at(self, address: IpAddr) -> SocketAddr {
        SocketAddr::new(address, self as u16)
    }
}

/// Where a client's socket is, which may be at any address of the server's family.
fn anywhere(to: IpAddr) -> IpAddr {
    if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

/// Is one end of the traffic.
///
/// # Errors
///
/// Where a socket fails, or the CPU is not there.
pub(crate) fn run(end: &End) -> Result<()> {
    match end {
        End::Serve(Server { cpu, address }) => {
            pin(*cpu)?;
            serve(*address)
        }
        End::Drive(client) => {
            pin(client.cpu)?;
            let limit =
                WARM_UP + Duration::from_millis(client.millis) + PATIENCE + FLOW_PATIENCE * client.flows;
            thread::spawn(move || {
                thread::sleep(limit);
                eprintln!("no answer for {PATIENCE:?}");
                process::exit(1);
            });
            println!("{}", serde_json::to_string(&drive(client)?)?);
            // Threads that wait for an answer end with the process.
            process::exit(0);
        }
    }
}

/// Runs this process, and what it starts from now on, on one CPU.
pub(super) fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("no CPU {cpu}"))
}

/// Who connects to the last port, [`Port::Sink`], finds all of them.
fn serve(address: IpAddr) -> Result<()> {
    let datagrams = |port: Port| UdpSocket::bind(port.at(address)).context("a port for datagrams");
    let listener = |port: Port| TcpListener::bind(port.at(address)).context("a port to listen at");
    let echoes = transactions::datagram_sockets(address)?;
    let (counted, silent) = (datagrams(Port::Counted)?, datagrams(Port::Silent)?);
    let (echo, once, sink) = (listener(Port::Echo)?, listener(Port::EchoOnce)?, listener(Port::Sink)?);
    let mut ends = vec![
        thread::spawn(move || datagrams::acknowledge(&counted)),
        thread::spawn(move || datagrams::swallow(&silent)),
        thread::spawn(move || transactions::echo(&echo)),
        thread::spawn(move || transactions::echo_once(&once)),
        thread::spawn(move || streams::sink(&sink)),
    ];
    ends.extend(
        echoes.into_iter().map(|socket| thread::spawn(move || transactions::echo_datagrams(&socket))),
    );
    for end in ends {
        end.join().map_err(|_| anyhow::anyhow!("a server's thread panicked"))??;
    }
    Ok(())
}

fn drive(client: &Client) -> Result<Tally> {
    let to = client.to;
    let watch = clock::Watch::new(Duration::from_millis(client.millis), client.count.clone());
    match client.work {
        Work::TcpRr | Work::VipTcpRr => transactions::tcp(to, 1, watch),
        Work::TcpRr16 => transactions::tcp(to, 16, watch),
        Work::TcpCrr | Work::VipTcpCrr => transactions::connections(to, watch),
        Work::UdpRr if client.flows > 1 => transactions::udp_in_turn(to, client.flows, watch),
        Work::UdpRr => transactions::udp(to, 1, watch),
        Work::UdpRr16 => transactions::udp(to, 16, watch),
        Work::Latency => transactions::timed(to, watch),
        Work::TcpStream => streams::pour(to, 1, 128 * 1024, watch),
        Work::TcpStream4 => streams::pour(to, 4, 128 * 1024, watch),
        Work::SmallWrites => streams::pour(to, 1, 128, watch),
        Work::Udp64 => datagrams::windowed(to, 64, watch),
        Work::Udp1400 => datagrams::windowed(to, 1400, watch),
        Work::UdpPaced => datagrams::paced(to, watch),
    }
}
