//! What the connection to etcd and the keeper count.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Counters since the start; clones of a [`Registry`](super::Registry) share them.
#[derive(Debug, Default)]
pub(super) struct Stats {
    pub(super) requests: Count,
    pub(super) errors: Count,
    pub(super) renewals: Count,
    pub(super) broken_watches: Count,
}

/// A counter.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    pub(super) fn add(&self) {
        self.0.fetch_add(1, Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// How etcd is heard, as the keeper tells it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EtcdHealth {
    /// Where it may be.
    pub endpoints: Vec<String>,
    /// The endpoint in use, once one has answered.
    pub member: Option<String>,
    /// Requests since the start.
    pub requests: u64,
    /// Those of them that no endpoint answered, or that were refused.
    pub errors: u64,
    /// Renewals of the lease.
    pub renewals: u64,
    /// How often the watch broke.
    pub broken_watches: u64,
}
