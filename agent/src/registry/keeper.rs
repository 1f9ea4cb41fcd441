//! The task that owns the lease: renews it, follows the peers, and gets back on its feet by itself.
//!
//! A round lists everything, settles whether our lease is still ours, and watches from there until the stream
//! breaks; then comes the next round. What was missed in between, a compaction, a restored or replaced etcd: the
//! listing shows what is, so none of them is a special case.

mod round;
mod settle;

use std::{sync::Arc, time::Duration};

use ipnet::{Ipv4Net, Ipv6Net};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::Instant,
};

use self::round::Ended;
use super::{
    Claim, Cluster, ConfigState, EtcdHealth, Own, Registry, RegistryError,
    cluster::{Halves, PeerRules},
    grace::Grace,
    outage::{Outage, Waits},
    peers::Peers,
    record::{Records, Told},
    selection::Selection,
};
use crate::{
    family::Family,
    lease::{Lease, LeaseAttrs},
    network::{NetworkConfig, Pool},
};

/// The running task. Dropping it ends the task; the lease stays until it runs out.
#[derive(Debug)]
pub struct Keeper {
    /// The latest snapshot. That it cannot change any more (an error of the receiver) means that the task has ended.
    pub cluster: watch::Receiver<Arc<Cluster>>,
    commands: mpsc::UnboundedSender<Command>,
    task: JoinHandle<()>,
    heard: Heard,
}

/// Where leases come from.
#[derive(Debug)]
pub(crate) enum Heard {
    /// From there.
    Etcd(Registry),
    /// From the Kubernetes API at this URL.
    Kube(String),
}

/// What a keeper asks of its task.
#[derive(Debug)]
pub(crate) enum Command {
    /// See [`Keeper::set_attrs`].
    SetAttrs(LeaseAttrs),
    /// See [`Keeper::set_occupied`].
    SetOccupied { occupied: Vec<Ipv4Net>, bridges: Vec<Ipv4Net>, v6: (Vec<Ipv6Net>, Vec<Ipv6Net>) },
    /// See [`Keeper::release`].
    Release(oneshot::Sender<Result<(), RegistryError>>),
}

impl Keeper {
    /// The keeper of a task that publishes `cluster` and takes what is sent to `commands`: leases from elsewhere than
    /// etcd look the same to everybody else.
    pub(crate) fn of(
        cluster: watch::Receiver<Arc<Cluster>>,
        commands: mpsc::UnboundedSender<Command>,
        task: impl Future<Output = ()> + Send + 'static,
        heard: Heard,
    ) -> Self {
        Self { cluster, commands, task: tokio::spawn(task), heard }
    }

    pub(super) fn start(registry: Registry, config: NetworkConfig, claim: Claim, lease: Lease) -> Self {
        let (commands, receiver) = mpsc::unbounded_channel();
        let (task, cluster) = Task::new(registry.clone(), config, claim, lease, receiver);
        Self::of(cluster, commands, task.run(), Heard::Etcd(registry))
    }

    /// How etcd, or what stands in its place, is heard.
    #[must_use]
    pub fn etcd_health(&self) -> EtcdHealth {
        match &self.heard {
            Heard::Etcd(registry) => registry.health(),
            Heard::Kube(url) => EtcdHealth {
                endpoints: vec![url.clone()],
                member: Some(url.clone()),
                ..EtcdHealth::default()
            },
        }
    }

    /// Publishes the lease with another value (a new VTEP MAC, a new public address), on the same subnets.
    pub fn set_attrs(&self, attrs: LeaseAttrs) {
        // The task ends after the keeper only.
        let _ = self.commands.send(Command::SetAttrs(attrs));
    }

    /// Sets which prefixes of this host a new subnet, should one be needed, must keep away from.
    pub fn set_occupied(
        &self,
        occupied: Vec<Ipv4Net>,
        bridges: Vec<Ipv4Net>,
        v6: (Vec<Ipv6Net>, Vec<Ipv6Net>),
    ) {
        let _ = self.commands.send(Command::SetOccupied { occupied, bridges, v6 });
    }

    /// Gives the lease back, so that the subnet is free at once, and ends the task. A reservation stays.
    ///
    /// # Errors
    ///
    /// Where etcd is away: then the lease runs out by itself.
    pub async fn release(self) -> Result<(), RegistryError> {
        let (sender, answer) = oneshot::channel();
        let _ = self.commands.send(Command::Release(sender));
        // The task answers before it ends; if it has panicked, there is nobody to give the lease back.
        answer.await.unwrap_or(Ok(()))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// All that the task knows.
struct Task {
    registry: Registry,
    commands: mpsc::UnboundedReceiver<Command>,
    publish: watch::Sender<Arc<Cluster>>,
    /// The config in force.
    config: NetworkConfig,
    /// The config in etcd, where its networks are others.
    new_config: Option<NetworkConfig>,
    config_state: ConfigState,
    claim: Claim,
    /// The lease that we hold, or held last.
    own: Lease,
    /// Why we hold it no longer.
    lost: Option<String>,
    /// Whether etcd knew our etcd lease when last asked.
    alive: bool,
    renewed: Option<Instant>,
    /// When to renew next.
    renew_at: Instant,
    /// When to try again for a lease where there was none to get, and how long to wait after that.
    retry_at: Instant,
    retry_wait: Duration,
    records: Records,
    revision: i64,
    cluster_id: u64,
    connected: bool,
    /// Since when the watch is down.
    unheard: Option<Instant>,
    /// When a snapshot was made last.
    published: Instant,
    told_of_peers: Told,
    selection: Selection,
    /// Peers of before etcd was replaced.
    grace: Option<Grace>,
}

impl Task {
    fn new(
        registry: Registry,
        config: NetworkConfig,
        claim: Claim,
        own: Lease,
        commands: mpsc::UnboundedReceiver<Command>,
    ) -> (Self, watch::Receiver<Arc<Cluster>>) {
        let now = Instant::now();
        let renewed = own.etcd_lease.map(|_| now);
        let (publish, cluster) = watch::channel(Arc::new(Cluster {
            own: Own::Held(own.clone()),
            peers: Peers::default(),
            revision: 0,
            connected: false,
            unheard: Some(now.into_std()),
            renewed: renewed.map(Instant::into_std),
            config: ConfigState::Current,
        }));
        let task = Self {
            registry,
            commands,
            publish,
            new_config: None,
            config_state: ConfigState::Current,
            renew_at: now + renew_every(&claim),
            config,
            claim,
            own,
            lost: None,
            alive: true,
            renewed,
            retry_at: now,
            retry_wait: settle::FIRST_RETRY,
            records: Records::default(),
            revision: 0,
            cluster_id: 0,
            connected: false,
            unheard: Some(now),
            published: now,
            told_of_peers: Told::default(),
            selection: Selection::default(),
            grace: None,
        };
        (task, cluster)
    }

    async fn run(mut self) {
        let mut waits = Waits::new();
        let mut outage = Outage::of("etcd");
        loop {
            let start = Instant::now();
            let broken = match self.round(&mut outage).await {
                Ok(Ended) => return,
                Err(broken) => broken,
            };
            waits.after(start.elapsed());
            outage.tell(&broken);
            self.registry.stats.broken_watches.add();
            if self.connected || self.unheard.is_none() {
                self.unheard = Some(Instant::now());
            }
            self.connected = false;
            self.publish();
            if self.pause(waits.next()).await.is_some() {
                return;
            }
        }
    }

    /// Waits, and does what is asked for meanwhile.
    async fn pause(&mut self, wait: Duration) -> Option<Ended> {
        let until = Instant::now() + wait;
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => return None,
                command = self.commands.recv() => {
                    if let Some(ended) = self.obey(command).await {
                        return Some(ended);
                    }
                }
            }
        }
    }

    /// Does what is asked for, as far as that needs no etcd; the next round does the rest.
    async fn obey(&mut self, command: Option<Command>) -> Option<Ended> {
        match command {
            Some(Command::SetAttrs(attrs)) => {
                self.claim.attrs = attrs.clone();
                self.own.attrs = attrs;
                None
            }
            Some(Command::SetOccupied { occupied, bridges, v6 }) => {
                self.claim.occupied = occupied;
                self.claim.bridges = bridges;
                (self.claim.v6.occupied, self.claim.v6.bridges) = v6;
                None
            }
            Some(Command::Release(answer)) => {
                let _ = answer.send(self.release().await);
                Some(Ended)
            }
            None => Some(Ended),
        }
    }

    async fn release(&self) -> Result<(), RegistryError> {
        match self.own.etcd_lease {
            Some(id) if self.alive => self.registry.revoke(id).await,
            _ => Ok(()),
        }
    }

    fn publish(&mut self) {
        let rules = PeerRules {
            attrs: &self.own.attrs,
            config: &self.config,
            halves: Halves {
                own: self.own.key,
                backend: &self.config.backend,
                networks: networks(self.config.v4, self.new_config.as_ref().and_then(|config| config.v4)),
                networks_v6: networks(self.config.v6, self.new_config.as_ref().and_then(|config| config.v6)),
            },
        };
        let mut peers = self.selection.update(&rules, &mut self.records, &mut self.told_of_peers);
        if let Some(grace) = &mut self.grace {
            peers = grace.complete(peers, &rules, &self.records);
        }
        self.grace.take_if(|grace| grace.is_over());
        let own = match &self.lost {
            None => Own::Held(self.own.clone()),
            Some(reason) => Own::Lost { key: self.own.key, reason: reason.clone() },
        };
        let cluster = Cluster {
            own,
            peers,
            revision: self.revision,
            connected: self.connected,
            unheard: self.unheard.filter(|_| !self.connected).map(Instant::into_std),
            renewed: self.renewed.map(Instant::into_std),
            config: self.config_state.clone(),
        };
        self.published = Instant::now();
        self.publish.send_if_modified(|current| {
            let modified = **current != cluster;
            if modified {
                *current = Arc::new(cluster);
            }
            modified
        });
    }
}

/// The network in force, and the one that the config now has; none of a family that is not in force.
fn networks<F: Family>(ours: Option<Pool<F>>, new: Option<Pool<F>>) -> Vec<F::Net> {
    let new = new.filter(|_| ours.is_some());
    ours.into_iter().chain(new).map(|pool| pool.network).collect()
}

/// Between two renewals: a third of the TTL, or until the margin begins if that is sooner; a second at least.
fn renew_every(claim: &Claim) -> Duration {
    let third = claim.ttl / 3;
    let before_margin = claim.ttl.saturating_sub(claim.renew_margin);
    third.min(before_margin).max(Duration::from_secs(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewals_come_at_a_third_of_the_ttl_or_earlier_by_the_margin() {
        let attrs = LeaseAttrs::host_gw([10, 0, 0, 1].into());
        let every = |ttl, margin| {
            let (ttl, renew_margin) = (Duration::from_secs(ttl), Duration::from_secs(margin));
            let claim = Claim {
                attrs: attrs.clone(),
                previous: None,
                occupied: vec![],
                bridges: vec![],
                v6: crate::registry::ClaimV6::default(),
                ttl,
                renew_margin,
            };
            renew_every(&claim).as_secs()
        };
        assert_eq!(every(86400, 3600), 28800);
        assert_eq!(every(86400, 82800), 3600);
        assert_eq!(every(86400, 90000), 1);
        assert_eq!(every(2, 0), 1);
    }
}
