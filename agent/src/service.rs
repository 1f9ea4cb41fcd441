//! What the service manager is told (`sd_notify(3)`): that the agent is ready, that it stops, and that it is alive.
//!
//! Without `NOTIFY_SOCKET` in the environment nobody listens, and all of this does nothing.

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use tracing::warn;

/// The loop comes by at least every 30 s; after this long without it, it hangs.
const STUCK: Duration = Duration::from_secs(120);

/// A sign of life that one part of the agent gives and others watch. Clones share it.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    start: Instant,
    /// After how long without a sign nobody is alive there.
    limit: Duration,
    /// When the last sign was given, in milliseconds since the start and at least 1; 0 before the first.
    last: Arc<AtomicU64>,
}

impl Default for Heartbeat {
    fn default() -> Self {
        Self::with_limit(STUCK)
    }
}

impl Heartbeat {
    /// One without a sign yet, that is given up after this long without another.
    pub(crate) fn with_limit(limit: Duration) -> Self {
        Self { start: Instant::now(), limit, last: Arc::default() }
    }

    /// Gives the sign.
    pub fn beat(&self) {
        // Milliseconds of u64 last longer than any agent.
        self.last.store((self.start.elapsed().as_millis() as u64).max(1), Ordering::Relaxed);
    }

    /// Whether there was a sign lately, or none was ever given: before the first there is nothing to be stuck in, since
    /// every wait of the agent's start has a limit of its own or is for others.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.age().is_none_or(|age| age < self.limit)
    }

    /// How long ago the last sign was, if there was one.
    #[must_use]
    pub fn age(&self) -> Option<Duration> {
        let last = self.last.load(Ordering::Relaxed);
        (last > 0).then(|| self.start.elapsed().saturating_sub(Duration::from_millis(last)))
    }
}

/// The service manager that started the agent, if one wants to be told.
#[derive(Debug, Default)]
pub struct ServiceManager {
    socket: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl ServiceManager {
    /// Finds the service manager by `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID`, which `env` looks up; `pid` is
    /// this process's own. What cannot be understood is logged and taken as unset.
    #[must_use]
    pub fn find(env: &dyn Fn(&str) -> Option<String>, pid: u32) -> Self {
        let Some(name) = env("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else { return Self::default() };
        let socket = match connect(&name) {
            Ok(socket) => Some(socket),
            Err(error) => {
                warn!(socket = name, %error, "cannot tell the service manager anything: NOTIFY_SOCKET must be a \
                                              socket's absolute path, or @ and an abstract name");
                None
            }
        };
        Self { socket, watchdog: watchdog(env, pid) }
    }

    /// The agent is up: `Type=notify` units that wait for it may start.
    pub fn ready(&self) {
        self.tell("READY=1");
    }

    /// The agent ends because it was asked to.
    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }

    /// One line for `systemctl status`.
    pub fn status(&self, line: &str) {
        self.tell(&format!("STATUS={}", line.replace(char::is_control, " ")));
    }

    /// Feeds the service manager's watchdog until `stop`, twice in each of its intervals, for as long as `is_alive`
    /// says so; after that the service manager restarts the agent. Returns at once if there is no watchdog.
    pub async fn feed_watchdog(&self, is_alive: impl Fn() -> bool, stop: CancellationToken) {
        let Some(interval) = self.watchdog.filter(|_| self.socket.is_some()) else { return };
        let mut ticks = tokio::time::interval(interval / 2);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut starving = false;
        while stop.run_until_cancelled(ticks.tick()).await.is_some() {
            let alive = is_alive();
            if alive {
                self.tell("WATCHDOG=1");
            } else if !starving {
                warn!(?interval, "no progress; the watchdog is not fed");
            }
            starving = !alive;
        }
    }

    /// Never blocks: a manager that does not read its socket must not stop the agent.
    fn tell(&self, state: &str) {
        let Some((socket, manager)) = &self.socket else { return };
        if let Err(error) = socket.send_to_addr(state.as_bytes(), manager) {
            warn!(state, %error, "cannot tell the service manager");
        }
    }
}

fn connect(name: &str) -> io::Result<(UnixDatagram, SocketAddr)> {
    let manager = match name.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None if name.starts_with('/') => SocketAddr::from_pathname(name)?,
        None => return Err(io::ErrorKind::InvalidInput.into()),
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    Ok((socket, manager))
}

/// The interval in which the service manager wants a sign of life from this process.
fn watchdog(env: &dyn Fn(&str) -> Option<String>, pid: u32) -> Option<Duration> {
    let text = env("WATCHDOG_USEC").filter(|text| !text.is_empty())?;
    let is_ours = match env("WATCHDOG_PID").filter(|text| !text.is_empty()) {
        Some(text) => text.parse() == Ok(pid),
        None => true,
    };
    match text.parse::<u64>() {
        // Below a millisecond the agent would do nothing else.
        Ok(microseconds) if microseconds >= 1000 => is_ours.then(|| Duration::from_micros(microseconds)),
        _ => {
            warn!(value = text, "no watchdog: WATCHDOG_USEC must be a number of microseconds, at least 1000");
            None
        }
    }
}

#[cfg(test)]
mod tests;
