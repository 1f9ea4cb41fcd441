//! `loden trace`: the programs' verdicts as they are given, filtered and sampled by the programs themselves.
//!
//! It works by the pins alone, so also while no agent runs, and goes on when one is restarted. What the programs do for
//! it stands in `ebpf/src/programs/trace.rs`.

mod filter;
mod line;

use std::{
    io::{self, BufWriter, Write},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::ValueEnum;
use loden_ebpf::{reason::Reason, trace::Tally};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, MissedTickBehavior, interval, sleep_until},
};

use self::line::Lines;
use crate::dataplane::{Listener, RENEWAL};

/// The flags of `loden trace`.
#[derive(Clone, Debug, clap::Args)]
pub struct TraceArgs {
    /// Only packets from or to this address or prefix; with two of them, only those between both
    #[arg(value_name = "ADDRESS[/LEN]", num_args = 0..=2, value_parser = filter::prefix)]
    pub ends: Vec<filter::Net>,
    /// Only packets with this port at either end
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    pub port: Option<u16>,
    /// Only packets of this protocol: tcp, udp, icmp, icmpv6, or its number
    #[arg(long, value_name = "PROTOCOL", value_parser = filter::protocol)]
    pub proto: Option<u8>,
    /// Only these verdicts
    #[arg(long, value_enum, value_delimiter = ',')]
    pub verdict: Vec<Verdict>,
    /// Only verdicts of this reason, by its name as in `loden status`, such as pass_pod_gate
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = filter::reason)]
    pub reason: Vec<Reason>,
    /// Tell one in N of them
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub sample: u32,
    /// End after N lines
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// End after so many seconds
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u32).range(1..))]
    pub seconds: Option<u32>,
    /// Print each as a JSON document on a line of its own
    #[arg(long)]
    pub json: bool,
    /// Directory of the agent's pinned maps
    #[arg(long, default_value = "/sys/fs/bpf/loden", value_name = "DIR")]
    pub bpffs_dir: PathBuf,
    /// Accepted so that the agent's own list of paths can be given as it is
    #[arg(long, hide = true, value_name = "DIR")]
    pub run_dir: Option<PathBuf>,
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Verdict {
    /// It skipped the host's stack.
    Fast,
    /// It went on into the host's stack, unchanged.
    Pass,
    /// It ended.
    Drop,
    /// It came out of the host's stack as a flow that the host translates.
    Note,
}

/// Listens and prints until the count is reached, the time is over, or it is interrupted; what was lost is said on
/// standard error.
///
/// # Errors
///
/// Where filters rule each other out, no programs are pinned, as many traces as can be run already, or the programs go.
pub async fn run(args: &TraceArgs) -> Result<()> {
    let wanted = filter::tracer(args)?;
    let mut listener = Listener::open(&args.bpffs_dir, wanted)?;
    let mut lines = Lines::new(args.json);
    // A closed standard error leaves nobody to tell.
    let _ = writeln!(io::stderr(), "loden: listening; Ctrl-C ends it");
    let shown = listen(args, &mut listener, &mut lines).await?;
    let tally = listener.tally()?;
    let _ = writeln!(io::stderr(), "{}", summary(args, shown, tally));
    Ok(())
}

/// Prints what is heard; returns how many.
async fn listen(args: &TraceArgs, listener: &mut Listener, lines: &mut Lines) -> Result<u64> {
    let mut interrupted = signal(SignalKind::interrupt()).context("waiting for Ctrl-C")?;
    let mut terminated = signal(SignalKind::terminate()).context("waiting for SIGTERM")?;
    let mut renewal = interval(RENEWAL);
    renewal.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let end = args.seconds.map(|seconds| Instant::now() + Duration::from_secs(u64::from(seconds)));
    let mut out = BufWriter::new(io::stdout());
    let mut shown = 0;
    loop {
        let over = async {
            match end {
                Some(end) => sleep_until(end).await,
                None => std::future::pending().await,
            }
        };
        let heard = tokio::select! {
            biased;
            _ = interrupted.recv() => return Ok(shown),
            _ = terminated.recv() => return Ok(shown),
            () = over => return Ok(shown),
            _ = renewal.tick() => {
                listener.renew()?;
                continue;
            }
            heard = listener.hear(|verdict| {
                out.write_all(lines.line(&verdict).as_bytes())?;
                shown += 1;
                Ok(args.count.is_none_or(|count| shown < count))
            }) => heard,
        };
        match heard.and_then(|more| Ok(out.flush().map(|()| more)?)) {
            Ok(true) => {}
            Ok(false) => return Ok(shown),
            // Whoever read has read enough.
            Err(error) if is_broken_pipe(&error) => return Ok(shown),
            Err(error) => return Err(error),
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn summary(args: &TraceArgs, shown: u64, Tally { wanted, lost }: Tally) -> String {
    if args.json {
        return serde_json::json!({ "shown": shown, "wanted": wanted, "lost": lost }).to_string();
    }
    let lost = match lost {
        0 => "none lost".to_owned(),
        lost => format!("{lost} lost, for which there was no room: --sample and filters make it fewer"),
    };
    format!("loden: {shown} shown of {wanted}, {lost}")
}
