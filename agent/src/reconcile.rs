//! The loop that keeps this node as it should be: desired minus actual, again and again.
//!
//! It runs on every change of the leases, on every netlink event that matters, on what the programs see, after a
//! failure with a growing wait, and every 30 seconds. Each pass reads what is and changes what differs; nothing
//! is remembered of events but that something happened, so a missed one costs time and never correctness.

mod containers;
mod facts;
mod follow;
mod half;
mod headroom;
mod ipsec;
mod ipv6;
mod pass;
mod path;
mod proxies;
mod report;
mod taken_tuples;
mod translations;
mod underlay;
mod wakers;
mod ways;
mod wireguard;
mod withdrawal;
mod work;

use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

use anyhow::{Result, bail};
use ipnet::IpNet;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, sleep_until};
use tokio_util::sync::CancellationToken;

pub use self::{half::Half, wireguard::Wireguard};
use self::{
    half::Kept,
    path::{Path, load, open_path, settings},
    translations::{Strays, strays},
    wakers::{Call, called, listen_for_policies, listen_for_rules, protected, ruled},
    work::Work,
};
use crate::{
    activity::Activity,
    config::Config,
    control,
    dataplane::{Calls, Dataplane},
    facts::Facts,
    family::{V4, V6},
    health::Readiness,
    kernel::{
        Events, Kernel, RulesetEvents, VxlanDevice, VxlanSpec,
        xfrm::{Policy, PolicyEvents},
    },
    lease::LeaseKey,
    network::{NetworkConfig, Vxlan},
    registry::{Cluster, Keeper},
    service::Heartbeat,
    state::State,
    status::document::Reconcile,
    uplink::Uplink,
};

/// The longest time for which somebody's change stays unnoticed where the kernel does not tell of it.
const TICK: Duration = Duration::from_secs(30);
/// How exactly it is known when a peer or an endpoint was last heard of.
const LOOK: Duration = Duration::from_secs(5);
/// How long the host's rules may go on changing before ours are looked at.
const RULES_SETTLE: Duration = Duration::from_secs(1);
/// How long new addresses of containers wait while one of those has more than are found: it may send from another with
/// each packet.
const CROWDED: Duration = Duration::from_secs(1);
/// How long the leases may go on changing before the facts are written: a file of all peers for many changes.
const FACTS_SETTLE: Duration = Duration::from_secs(1);
/// At most one in so many parts of the time goes into leaving them.
const FACTS_SHARE: u32 = 200;
/// How long events are gathered before a pass: containers come with a dozen of them.
const GATHER: Duration = Duration::from_millis(20);
/// First and longest wait after a failed pass.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// What this node is: fixed at the start, or changed by a pass that says so.
pub struct Node {
    /// The configuration.
    pub config: Config,
    /// The network config as it was when the agent started.
    pub network: NetworkConfig,
    /// The interface that carries the overlay.
    pub uplink: Uplink,
    /// The IPv4 half, in a network that has IPv4.
    pub v4: Option<Half<V4>>,
    /// The IPv6 half, in a network that has IPv6.
    pub v6: Option<Half<V6>>,
    /// The WireGuard devices, where the backend has them.
    pub wireguard: Option<Wireguard>,
}

/// The VXLAN device.
pub struct Overlay {
    /// The backend's part of the network config.
    pub vxlan: Vxlan,
    /// What the device should be.
    pub spec: VxlanSpec,
    /// What it is.
    pub device: VxlanDevice,
}

impl Node {
    /// Interface index of the device that carries IPv4; 0 where there is none.
    fn device(&self) -> u32 {
        self.v4.as_ref().map_or(0, Half::device)
    }

    /// The VXLAN device with an IPv4 underlay.
    fn overlay(&self) -> Option<&Overlay> {
        self.v4.as_ref()?.overlay.as_ref()
    }

    /// The VXLAN device with an IPv6 underlay.
    fn overlay_v6(&self) -> Option<&Overlay> {
        self.v6.as_ref()?.overlay.as_ref()
    }

    /// Names of the overlay's devices.
    fn device_names(&self) -> impl Iterator<Item = &str> {
        let overlays = self.overlay().into_iter().chain(self.overlay_v6());
        let tunnels = self.wireguard.iter().flat_map(Wireguard::tunnels);
        overlays
            .map(|overlay| overlay.spec.name.as_str())
            .chain(tunnels.map(|tunnel| tunnel.spec.name.as_str()))
    }

    /// MTU of the pods, in bytes: what every family here can carry.
    fn pod_mtu(&self) -> u32 {
        let overlays = self.overlay().into_iter().chain(self.overlay_v6()).map(|overlay| overlay.device.mtu);
        let tunnels = self.wireguard.iter().flat_map(Wireguard::tunnels).map(|tunnel| tunnel.device.mtu);
        overlays.chain(tunnels).min().unwrap_or(self.uplink.mtu)
    }

    /// The subnets that this node holds.
    fn key(&self) -> LeaseKey {
        LeaseKey {
            subnet: self.v4.as_ref().map(|half| half.subnet),
            subnet_v6: self.v6.as_ref().map(|half| half.subnet),
        }
    }
}

/// The loop's state.
pub struct Reconciler {
    node: Node,
    kernel: Kernel,
    events: Events,
    /// Tells when the host's rules change; `None` where the kernel cannot tell.
    ruleset: Option<RulesetEvents>,
    /// Tells when the host's IPsec policies change; `None` where the kernel cannot tell.
    policy_events: Option<PolicyEvents>,
    /// Those for what leaves the host, as they were last read.
    policies: Vec<Policy>,
    /// When to look at our own rules because somebody changed rules.
    rules_due: Option<Instant>,
    /// When to look at new addresses of containers.
    sightings_due: Option<Instant>,
    /// Pods that are perhaps gated without a reason.
    strays: Strays,
    keeper: Keeper,
    control: control::Requests,
    readiness: Readiness,
    heartbeat: Heartbeat,
    /// What `loden cleanup` will undo.
    state: State,
    path: Path,
    calls: Option<Calls>,
    v4: Kept<V4>,
    v6: Kept<V6>,
    /// What is wrong with the host's bridges, and what to do.
    advice: Vec<String>,
    /// The kernel has refused a port that asks for headroom.
    no_headroom: bool,
    /// When to leave the facts behind again.
    facts_due: Option<Instant>,
    /// How long it took the last time.
    facts_take: Duration,
    /// What was last written of the facts.
    facts_left: Option<Facts>,
    /// What could not be done, by the part of a pass that tried it last.
    failures: BTreeMap<Work, Vec<String>>,
    /// Passes, and those of them that had to change something.
    tally: Reconcile,
    repairs: u64,
    /// When peers and endpoints were last heard of.
    peer_activity: Activity<LeaseKey>,
    endpoint_activity: Activity<IpAddr>,
}

impl Reconciler {
    /// Loads the programs where they are wanted; nothing is attached before the first pass.
    ///
    /// # Errors
    ///
    /// Where the kernel grants no event socket, and with `--datapath=ebpf` where the programs cannot be loaded.
    pub fn new(
        node: Node,
        kernel: Kernel,
        keeper: Keeper,
        control: control::Requests,
        readiness: Readiness,
        heartbeat: Heartbeat,
        mut state: State,
    ) -> Result<Self> {
        let events = kernel.events()?;
        let path = open_path(&node)?;
        state.networks.extend(node.v4.as_ref().map(|v4| IpNet::from(v4.pool.network)));
        state.networks.extend(node.v6.as_ref().map(|v6| IpNet::from(v6.pool.network)));
        state.write(&node.config.run_dir)?;
        let (v4, v6): (Kept<V4>, Kept<V6>) = (Kept::of(&path), Kept::of(&path));
        let known = v4.endpoints.keys().copied().map(IpAddr::from);
        let known = known.chain(v6.endpoints.keys().copied().map(IpAddr::from));
        let mut reconciler = Self {
            state,
            node,
            ruleset: listen_for_rules(&kernel),
            policy_events: listen_for_policies(&kernel),
            policies: Vec::new(),
            kernel,
            events,
            rules_due: None,
            sightings_due: None,
            strays: strays(known),
            keeper,
            control,
            readiness,
            heartbeat,
            calls: None,
            v4,
            v6,
            path,
            advice: Vec::new(),
            no_headroom: false,
            facts_due: None,
            facts_take: Duration::ZERO,
            facts_left: None,
            failures: BTreeMap::new(),
            tally: Reconcile::default(),
            repairs: 0,
            peer_activity: Activity::default(),
            endpoint_activity: Activity::default(),
        };
        reconciler.listen_to_programs()?;
        Ok(reconciler)
    }

    /// Runs until told to stop.
    ///
    /// # Errors
    ///
    /// Where the kernel's event socket cannot be had any more.
    pub async fn run(mut self, stop: CancellationToken) -> Result<()> {
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tick.tick().await;
        let mut work = Work::Everything;
        let mut wait = RETRY.0;
        let mut retry = None;
        loop {
            self.pass(work).await;
            self.heartbeat.beat();
            if self.failures.is_empty() {
                (retry, wait) = (None, RETRY.0);
            } else if work == Work::Everything || retry.is_none() {
                // A smaller pass has not tried again what failed, and does not put it off.
                retry = Some(Instant::now() + wait);
                wait = (wait * 2).min(RETRY.1);
            }
            match self.wait(&stop, &mut tick, &mut looks, retry).await? {
                Some(next) => work = next,
                None => return self.end().await,
            }
        }
    }

    /// The lease stays for the next start, unless it was asked to be given back.
    async fn end(mut self) -> Result<()> {
        self.leave_facts();
        if self.node.config.release_lease {
            self.keeper.release().await?;
            tracing::info!(subnet = self.node.key().subnets(), "lease given back");
        }
        Ok(())
    }

    /// Waits for something to do, answering requests meanwhile; `None` when it is time to stop.
    async fn wait(
        &mut self,
        stop: &CancellationToken,
        tick: &mut Interval,
        looks: &mut Interval,
        retry: Option<Instant>,
    ) -> Result<Option<Work>> {
        let mut work: Option<Work> = None;
        let mut until: Option<Instant> = None;
        loop {
            let found = tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(None),
                () = sleep_until(until.unwrap_or_else(Instant::now)), if until.is_some() => return Ok(work),
                Some((request, back)) = self.control.recv() => {
                    // Who asked may be gone.
                    let _ = back.send(self.answer(request));
                    None
                }
                changed = self.keeper.cluster.changed() => {
                    if changed.is_err() { bail!("the lease's keeper has ended"); }
                    Some(Work::Peers)
                }
                event = self.events.next() => match event {
                    Some(event) => self.work_of(&event),
                    None => {
                        self.events = self.kernel.events()?;
                        Some(Work::Everything)
                    }
                },
                call = called(&mut self.calls) => match call {
                    Call::Sighted if self.is_crowded() => {
                        self.sightings_due.get_or_insert_with(|| Instant::now() + CROWDED);
                        None
                    }
                    Call::Sighted => Some(Work::Containers),
                    Call::Taken(tuples) => {
                        self.give_tuples(&tuples);
                        None
                    }
                },
                () = ruled(&mut self.ruleset) => {
                    self.rules_changed();
                    None
                }
                () = protected(&mut self.policy_events) => self.read_policies().then_some(Work::Overlay),
                () = sleep_until(self.rules_due.unwrap_or_else(Instant::now)), if self.rules_due.is_some() => {
                    self.rules_due = None;
                    Some(Work::Everything)
                }
                () = sleep_until(self.sightings_due.unwrap_or_else(Instant::now)), if self.sightings_due.is_some() => {
                    self.sightings_due = None;
                    Some(Work::Containers)
                }
                () = sleep_until(self.strays.front().map_or_else(Instant::now, |(until, _)| *until)), if !self.strays.is_empty() => {
                    if let Err(error) = self.look_again() {
                        tracing::warn!("{error:#}");
                    }
                    None
                }
                _ = looks.tick() => {
                    self.note_activity(std::time::Instant::now());
                    None
                }
                () = sleep_until(self.facts_due.unwrap_or_else(Instant::now)), if self.facts_due.is_some() => {
                    self.facts_due = None;
                    self.leave_facts();
                    None
                }
                _ = tick.tick() => {
                    self.v4.ways.doubt_some();
                    self.v6.ways.doubt_some();
                    Some(Work::Everything)
                }
                () = sleep_until(retry.unwrap_or_else(Instant::now)), if retry.is_some() && work.is_none() => Some(Work::Everything),
            };
            if let Some(found) = found {
                work = work.max(Some(found));
                until.get_or_insert_with(|| Instant::now() + GATHER);
            }
        }
    }

    /// Somebody changed the host's rules: what flows were allowed before, they must prove again, at once; whether
    /// our own rules are still there can wait until the changes have settled.
    fn rules_changed(&mut self) {
        if let Some(Err(error)) = self.dataplane().map(Dataplane::bump_epoch) {
            tracing::warn!("{error}");
        }
        self.rules_due.get_or_insert_with(|| Instant::now() + RULES_SETTLE);
    }

    /// Whether some container has more addresses than are found.
    fn is_crowded(&self) -> bool {
        !self.v4.crowded.is_empty() || !self.v6.crowded.is_empty()
    }

    /// The newest snapshot of the leases.
    fn cluster(&self) -> Arc<Cluster> {
        Arc::clone(&self.keeper.cluster.borrow())
    }

    fn dataplane(&mut self) -> Option<&mut Dataplane> {
        match &mut self.path {
            Path::Ebpf(dataplane) => Some(dataplane),
            Path::Kernel(_) => None,
        }
    }

    fn listen_to_programs(&mut self) -> Result<()> {
        self.calls = self.dataplane().map(Dataplane::take_calls).transpose()?.flatten();
        Ok(())
    }
}
