//! Packets sent to the peers, and what comes back: nothing is believed of a path that was not tried.
//!
//! Only ICMP echo and closed ports are needed at the far end, so flannel's nodes answer as well as ours.

use std::{
    net::IpAddr,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use ipnet::IpNet;

use super::{
    echo::{Pinger, smallest},
    offload,
    snapshot::{Overlay, Probe, Reach},
};

/// Peers that are asked at once.
const AT_ONCE: usize = 32;
/// How often an echo is sent before it counts as lost.
const TRIES: u32 = 2;

/// Whom to ask, and how large a packet should get there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    /// The peer's subnet.
    pub(super) subnet: IpNet,
    /// Its public address.
    pub(super) vtep: IpAddr,
    /// What the way to it carries, in bytes.
    pub(super) underlay_mtu: u16,
    /// The peer's own address in the overlay, where it has one, and what the overlay carries.
    pub(super) overlay: Option<(IpAddr, u16)>,
}

/// Asks all, and waits for each answer at most this long.
pub(super) fn probe_all(targets: &[Target], patience: Duration) -> Vec<Probe> {
    let next = AtomicUsize::new(0);
    let probes = Mutex::new(Vec::new());
    // Threads, since every one of them waits most of the time; they are in the namespace of this one.
    thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(targets.len()) {
            scope.spawn(|| {
                while let Some(target) = targets.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let probe = probe(target, patience);
                    probes.lock().unwrap_or_else(PoisonError::into_inner).push(probe);
                }
            });
        }
    });
    let mut probes = probes.into_inner().unwrap_or_else(PoisonError::into_inner);
    probes.sort_by_key(|probe| probe.subnet);
    probes
}

fn probe(target: &Target, patience: Duration) -> Probe {
    let underlay = reach(target.vtep, target.underlay_mtu, patience);
    let overlay = target.overlay.map(|(address, mtu)| {
        let echo = reach(address, mtu, patience);
        let offload = echo.is_full().then(|| offload::ask(address, mtu, patience));
        Overlay { echo, offload }
    });
    Probe { subnet: target.subnet, vtep: target.vtep, underlay, overlay }
}

/// The largest echo that comes back, up to `wanted` bytes.
fn reach(address: IpAddr, wanted: u16, patience: Duration) -> Reach {
    let mut pinger = match Pinger::to(address) {
        Ok(pinger) => pinger,
        Err(error) => return Reach::Unsent(error.to_string()),
    };
    let smallest = smallest(address);
    let mut heard = None;
    let mut comes_back = |size: u16, tries: u32, patience: Duration| {
        for _ in 0..tries {
            match pinger.echo(size, patience) {
                Ok(took) => return Some(took),
                Err(reason) => heard = reason.or(heard.take()),
            }
        }
        None
    };
    if let Some(took) = comes_back(wanted, TRIES, patience) {
        return Reach::Full { size: wanted, took };
    }
    let Some(took) = comes_back(smallest, TRIES, patience) else { return Reach::Nothing(heard) };
    // Whoever answers small packets in this time answers larger ones in not much more.
    let patience = (took * 4).clamp(Duration::from_millis(100), patience);
    let (mut passes, mut fails) = (smallest, wanted);
    while fails - passes > 1 {
        let middle = passes + (fails - passes) / 2;
        if comes_back(middle, 1, patience).is_some() {
            passes = middle;
        } else {
            fails = middle;
        }
    }
    Reach::Smaller { size: passes, wanted }
}
