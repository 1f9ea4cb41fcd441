//! While the place of the leases is away: how long to wait between two rounds, and what is told meanwhile.

use std::{fmt, time::Duration};

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use tokio::time::Instant;
use tracing::{info, warn};

/// First and longest wait between rounds, to which jitter adds as much again: a cluster must not come back all at
/// once.
const WAIT: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// A round that has lasted this long was a good one: the next wait is short again.
const GOOD_ROUND: Duration = Duration::from_secs(1);
/// How often an outage is told of while it lasts.
const REMIND: Duration = Duration::from_secs(60);

/// The waits between rounds, each longer than the one before.
pub(crate) struct Waits(ExponentialBackoff);

impl Waits {
    /// Nothing has failed yet.
    pub(crate) fn new() -> Self {
        let (first, longest) = WAIT;
        let backoff = ExponentialBuilder::default().with_min_delay(first).with_max_delay(longest);
        Self(backoff.with_jitter().without_max_times().build())
    }

    /// Takes note of how long a round has lasted; says whether it was a good one.
    pub(crate) fn after(&mut self, round: Duration) -> bool {
        let good = round > GOOD_ROUND;
        if good {
            *self = Self::new();
        }
        good
    }

    pub(crate) fn next(&mut self) -> Duration {
        self.0.next().unwrap_or(WAIT.1)
    }
}

/// Tells of an outage when it begins, each minute while it lasts, and when it is over.
pub(crate) struct Outage {
    of: &'static str,
    since: Option<Instant>,
    told: Option<Instant>,
}

impl Outage {
    /// Nothing has failed yet of what is named.
    pub(crate) fn of(of: &'static str) -> Self {
        Self { of, since: None, told: None }
    }

    pub(crate) fn tell(&mut self, broken: &dyn fmt::Display) {
        let now = Instant::now();
        let since = *self.since.get_or_insert(now);
        if self.told.is_none_or(|told| now - told >= REMIND) {
            let seconds = (now - since).as_secs();
            warn!(%broken, seconds, "not following {}; peers and routes stay as they are", self.of);
            self.told = Some(now);
        }
    }

    pub(crate) fn over(&mut self) {
        if let Some(since) = self.since.take() {
            info!(seconds = since.elapsed().as_secs(), "following {} again", self.of);
        }
        self.told = None;
    }
}
