//! The one CPU that a test stays on.

use std::sync::{
    LazyLock,
    atomic::{AtomicUsize, Ordering},
};

use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

/// The CPUs that the process may use, as it was before anybody stayed on one.
static CPUS: LazyLock<Vec<usize>> = LazyLock::new(|| {
    let all = sched_getaffinity(Pid::this()).expect("the process's own CPUs");
    (0..CpuSet::count()).filter(|cpu| all.is_set(*cpu) == Ok(true)).collect()
});

/// How many have asked for a CPU.
static ASKED: AtomicUsize = AtomicUsize::new(0);

/// Keeps this thread, and what it starts from now on, on one CPU: on the next one each time, so that tests that run
/// side by side take all of them.
///
/// Softirqs run where the packet was sent, and queues between devices are per CPU, first in, first out: a sender that
/// moves to another CPU overtakes itself in any datapath.
///
/// # Panics
///
/// Where the kernel does not let it.
pub fn stay_on_one() {
    stay_on(CPUS[ASKED.fetch_add(1, Ordering::Relaxed) % CPUS.len()]);
}

/// Keeps this thread on the first or the last CPU that the process may use, and says which it is.
///
/// # Panics
///
/// Where the kernel does not let it.
pub fn stay_on_end(last: bool) -> usize {
    let cpu = if last { CPUS[CPUS.len() - 1] } else { CPUS[0] };
    stay_on(cpu);
    cpu
}

fn stay_on(cpu: usize) {
    let mut one = CpuSet::new();
    one.set(cpu).expect("a CPU's number");
    sched_setaffinity(Pid::from_raw(0), &one).expect("to stay on one CPU");
}
