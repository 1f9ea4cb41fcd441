//! What wakes the loop besides netlink's events: sightings of the programs, and changes of the host's rules.

use aya::maps::{MapData, RingBuf};
use tokio::io::unix::AsyncFd;

use crate::kernel::{Kernel, RulesetEvents};

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

/// Completes when the programs have told of a sighting; never where there are no programs.
pub(super) async fn sighted(ring: &mut Option<AsyncFd<RingBuf<MapData>>>) {
    let Some(ring) = ring else { return std::future::pending().await };
    match ring.readable_mut().await {
        Ok(mut guard) => {
            // The map holds what was seen; the ring only wakes us.
            while guard.get_inner_mut().next().is_some() {}
            guard.clear_ready();
        }
        Err(_) => std::future::pending().await,
    }
}
