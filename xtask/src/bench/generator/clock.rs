//! The time of a measurement, and what the machine did meanwhile.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{Tally, WARM_UP};

/// What the workers are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Phase {
    /// Work, uncounted.
    WarmUp = 0,
    /// Work, counted.
    Measure = 1,
    /// Stop.
    Over = 2,
}

/// Tells the workers the phase: reading it costs no system call.
#[derive(Clone, Debug, Default)]
pub(super) struct Signal(Arc<AtomicU8>);

impl Signal {
    #[inline]
    pub(super) fn phase(&self) -> Phase {
        match self.0.load(Ordering::Relaxed) {
            0 => Phase::WarmUp,
            1 => Phase::Measure,
            _ => Phase::Over,
        }
    }

    fn set(&self, phase: Phase) {
        self.0.store(phase as u8, Ordering::Relaxed);
    }
}

/// Counts what workers do in a given time.
#[derive(Debug)]
pub(super) struct Watch {
    time: Duration,
    cpus: Vec<usize>,
}

/// What a worker has done in the phase [`Phase::Measure`].
#[derive(Clone, Debug, Default)]
pub(super) struct Done {
    pub(super) units: u64,
    pub(super) lost: u64,
}

impl Watch {
    pub(super) fn new(time: Duration, cpus: Vec<usize>) -> Self {
        Self { time, cpus }
    }

    /// Runs the workers, each on a thread, and adds up what they have done. They get their phase by the signal.
    ///
    /// # Errors
    ///
    /// A worker's, or where the kernel's counters cannot be read.
    pub(super) fn run<W>(&self, workers: Vec<W>) -> Result<Tally>
    where
        W: FnOnce(&Signal) -> Result<Done> + Send + 'static,
    {
        let signal = Signal::default();
        let threads: Vec<_> = workers
            .into_iter()
            .map(|work| {
                let signal = signal.clone();
                thread::spawn(move || work(&signal))
            })
            .collect();
        thread::sleep(WARM_UP);
        let (idle, retransmitted, start) = (idle(&self.cpus)?, retransmitted()?, Instant::now());
        signal.set(Phase::Measure);
        thread::sleep(self.time);
        signal.set(Phase::Over);
        let seconds = start.elapsed().as_secs_f64();
        let busy = seconds * self.cpus.len() as f64 - (self::idle(&self.cpus)? - idle);
        let retransmitted = self::retransmitted()? - retransmitted;
        let mut tally = Tally { seconds, busy: busy.max(0.0), retransmitted, ..Tally::default() };
        for thread in threads {
            let done = thread.join().map_err(|_| anyhow::anyhow!("a client's thread panicked"))??;
            tally.units += done.units;
            tally.lost += done.lost;
        }
        Ok(tally)
    }
}

/// Idle time of these CPUs since the start of the machine, in seconds (proc(5): ticks of 10 ms).
fn idle(cpus: &[usize]) -> Result<f64> {
    let text = fs::read_to_string("/proc/stat")?;
    let mut ticks = 0;
    for cpu in cpus {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("cpu{cpu} ")));
        let line = line.with_context(|| format!("/proc/stat knows no cpu{cpu}"))?;
        // user nice system idle iowait …
        let columns = line.split(' ').skip(3).take(2);
        ticks += columns.filter_map(|ticks| ticks.parse::<u64>().ok()).sum::<u64>();
    }
    Ok(ticks as f64 / 100.0)
}

/// TCP segments sent again in this network namespace.
fn retransmitted() -> Result<u64> {
    let text = fs::read_to_string("/proc/self/net/snmp")?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
    let column = names.split(' ').position(|name| name == "RetransSegs");
    let value = column.and_then(|column| values.split(' ').nth(column));
    value.context("/proc/net/snmp has no RetransSegs")?.parse().context("RetransSegs")
}
