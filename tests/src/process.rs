//! A child process that ends with its owner.

use std::{
    os::unix::process::CommandExt as _,
    process::{Child, Command, ExitStatus},
    sync::OnceLock,
    thread::{self, ThreadId},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A running program. Dropping it sends SIGKILL and waits.
#[derive(Debug)]
pub struct Process {
    child: Child,
}

impl Process {
    /// Starts the command, in a process group of its own: Ctrl-C reaches only us, and we end it in good order.
    ///
    /// # Errors
    ///
    /// Where the program is missing.
    pub fn start(command: &mut Command) -> Result<Self> {
        let child =
            command.process_group(0).spawn().with_context(|| format!("{command:?} cannot be started"))?;
        Ok(Self { child })
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to it, if it is still there.
    ///
    /// # Errors
    ///
    /// Where it has ended already.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).context("a process id is positive")?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("{signal} to {pid}"))
    }

    /// The exit status, once it has ended.
    ///
    /// # Errors
    ///
    /// Where the kernel cannot tell.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits until it has ended, `limit` at most.
    ///
    /// # Errors
    ///
    /// Where it goes on past the limit.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        wait_for("the process to end", limit, || self.ended().ok().flatten())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself: then there is nothing to kill, and wait only collects it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The thread that alone may start programs, once there is one.
static CLEARING: OnceLock<ThreadId> = OnceLock::new();

/// From now on only the calling thread starts programs; every other thread stops where it would start one. For
/// clearing away what those threads were about to use.
pub fn hold_others() {
    CLEARING.get_or_init(|| thread::current().id());
}

/// Stops the calling thread for good where another one clears away.
pub(crate) fn wait_if_held() {
    while CLEARING.get().is_some_and(|clearing| *clearing != thread::current().id()) {
        thread::park();
    }
}

/// How many times as long as usual things may take: `LODEN_SLOWNESS`, where the machine is an emulated one, or 1.
pub(crate) fn slowness() -> u32 {
    static SLOWNESS: OnceLock<u32> = OnceLock::new();
    *SLOWNESS.get_or_init(|| std::env::var("LODEN_SLOWNESS").ok().and_then(|n| n.parse().ok()).unwrap_or(1))
}

/// Asks until there is an answer, every 20 ms.
///
/// # Errors
///
/// Where there is none within `limit` (times `LODEN_SLOWNESS`, where that is set).
pub fn wait_for<T>(what: &str, limit: Duration, mut ask: impl FnMut() -> Option<T>) -> Result<T> {
    let (start, limit) = (Instant::now(), limit * slowness());
    loop {
        if let Some(answer) = ask() {
            return Ok(answer);
        }
        anyhow::ensure!(start.elapsed() < limit, "waited {limit:?} for {what}");
        thread::sleep(Duration::from_millis(20));
    }
}
