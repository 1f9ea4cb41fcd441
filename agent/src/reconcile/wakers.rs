//! What wakes the loop besides rtnetlink's events: calls of the programs, and changes of the host's rules and IPsec
//! policies.

use aya::maps::{MapData, RingBuf};
use tokio::io::unix::AsyncFd;

use crate::{
    dataplane::Calls,
    kernel::{Kernel, RulesetEvents, xfrm::PolicyEvents},
};

pub(super) fn listen_for_rules(kernel: &Kernel) -> Option<RulesetEvents> {
    let events = kernel.ruleset_events();
    events
        .inspect_err(|error| tracing::warn!("changes of the host's rules take effect after 15 s: {error}"))
        .ok()
}

/// Completes when the host's rules have changed; never where the kernel does not tell.
pub(super) async fn ruled(ruleset: &mut Option<RulesetEvents>) {
    let Some(listening) = ruleset else { return std::future::pending().await };
    if let Err(error) = listening.changed().await {
        tracing::warn!("changes of the host's rules take effect after 15 s from now on: {error}");
        *ruleset = None;
    }
}

pub(super) fn listen_for_policies(kernel: &Kernel) -> Option<PolicyEvents> {
    let events = kernel.policy_events();
    // Most likely the kernel has no IPsec; the tick looks anyway.
    events.inspect_err(|error| tracing::debug!("changes of IPsec policies are not told: {error}")).ok()
}

/// Completes when the host's IPsec policies have changed; never where the kernel does not tell.
pub(super) async fn protected(policies: &mut Option<PolicyEvents>) {
    let Some(listening) = policies else { return std::future::pending().await };
    if let Err(error) = listening.changed().await {
        tracing::warn!("changes of IPsec policies take effect within 30 s from now on: {error}");
        *policies = None;
    }
}

/// What the programs call for.
pub(super) enum Call {
    /// They have seen addresses that the agent does not know.
    Sighted,
    /// The host gave tuples to flows that pods have already: what the ring held of them.
    Taken(Vec<Vec<u8>>),
}

/// Completes when the programs call; never where there are none.
pub(super) async fn called(calls: &mut Option<Calls>) -> Call {
    let Some(calls) = calls else { return std::future::pending().await };
    tokio::select! {
        // The map holds what was seen; the ring only wakes us.
        _ = read(&mut calls.new_sightings) => Call::Sighted,
        tuples = read(&mut calls.taken_tuples) => Call::Taken(tuples),
    }
}

/// Waits for records, and takes all that are there.
async fn read(ring: &mut AsyncFd<RingBuf<MapData>>) -> Vec<Vec<u8>> {
    let Ok(mut guard) = ring.readable_mut().await else { return std::future::pending().await };
    let ring = guard.get_inner_mut();
    let mut records = Vec::new();
    while let Some(record) = ring.next() {
        records.push(record.to_vec());
    }
    guard.clear_ready();
    records
}
