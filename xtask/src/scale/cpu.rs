//! CPU time of an agent, to the nanosecond, and in which bursts it takes it.

use std::{
    fs, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use loden_tests::node::Node;

/// How often the agent's CPU time is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// What a node's agent has taken so far, all of its threads that still are.
///
/// # Errors
///
/// Where there is no agent, or no `/proc` of it.
pub(super) fn time(node: &Node) -> Result<Duration> {
    let pid = node.agent_id().context("no agent")?;
    let mut nanoseconds = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end meanwhile. The first of three numbers is the time on a CPU. (sched-stats.rst)
        let Ok(stat) = fs::read_to_string(task?.path().join("schedstat")) else { continue };
        nanoseconds += stat.split_whitespace().next().context("no schedstat")?.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanoseconds))
}

/// Looks on for a while; returns the CPU time of each stretch in which the agent was never idle for two looks.
///
/// # Errors
///
/// As [`time`].
pub(super) fn bursts(node: &Node, during: Duration) -> Result<Vec<Duration>> {
    let end = Instant::now() + during;
    let (mut bursts, mut burst, mut idle) = (Vec::new(), Duration::ZERO, 0);
    let mut before = time(node)?;
    while Instant::now() < end {
        thread::sleep(LOOK);
        let now = time(node)?;
        // Timers and the like take microseconds.
        if now - before < LOOK / 1000 {
            idle += 1;
        } else {
            (burst, idle) = (burst + (now - before), 0);
        }
        if idle == 2 && !burst.is_zero() {
            bursts.push(std::mem::take(&mut burst));
        }
        before = now;
    }
    bursts.extend((!burst.is_zero()).then_some(burst));
    Ok(bursts)
}

/// The one in the middle.
///
/// # Panics
///
/// Where there is none.
pub(super) fn median<T: Ord + Copy>(mut of: Vec<T>) -> T {
    of.sort_unstable();
    of[of.len() / 2]
}
