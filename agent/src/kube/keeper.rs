//! The task that follows the nodes and keeps this node's annotations as they should be.
//!
//! A round goes on from the version that was reached (or lists, where there is none or it is too old), sees to our own
//! node, and watches until the stream ends; then comes the next round. The server ends each watch after a while, so an
//! end is nothing unusual.

mod round;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use tracing::{error, info, warn};

use self::round::Round;
use super::{
    Api, KubeError, OwnNode,
    annotations::Values,
    network_config,
    node::Node,
    nodes::{Nodes, PeerRules, Told},
    own::{
        SET_CONDITION, WRITE_ANNOTATIONS, annotations_patch, condition_patch, lease, own_subnets, published,
    },
};
use crate::{
    health::Readiness,
    lease::{Lease, LeaseAttrs, LeaseKey},
    network::NetworkConfig,
    registry::{Cluster, Command, ConfigState, Halves, Heard, Keeper, Outage, Own, Peers, Waits},
};

/// First and longest wait between two writes of the same thing: something else may write otherwise, and every write goes
/// to every node.
const REWRITE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// When to write next.
struct Pace {
    at: Instant,
    wait: Duration,
}

impl Pace {
    fn new() -> Self {
        Self { at: Instant::now(), wait: REWRITE.0 }
    }

    /// Notes that it was tried just now.
    fn tried(&mut self) {
        let now = Instant::now();
        // What was quiet for long enough begins anew.
        self.wait = if now >= self.at + REWRITE.1 { REWRITE.0 } else { (self.wait * 2).min(REWRITE.1) };
        self.at = now + self.wait;
    }
}

/// All that the task knows.
struct Task {
    api: Api,
    network: NetworkConfig,
    config_state: ConfigState,
    /// This node's name.
    name: String,
    uid: String,
    /// What we are, whatever people want published.
    attrs: LeaseAttrs,
    /// Our node's annotations as they were last seen.
    values: Values,
    /// All podCIDRs of this node, also of a family that the network does not have.
    given: LeaseKey,
    /// The lease that we hold, or held last.
    own: Lease,
    /// Why we hold it no longer.
    lost: Option<String>,
    /// The other annotation that cannot be used, as it was told.
    told_of_overwrite: Option<String>,
    nodes: Nodes,
    told: Told,
    /// The version that was reached; `None`: list.
    version: Option<String>,
    connected: bool,
    /// Since when it is not.
    unheard: Option<Instant>,
    annotations: Pace,
    annotations_wrong: bool,
    condition: Pace,
    /// The condition is to be set, once the node is ready.
    condition_due: bool,
    ready: Readiness,
    commands: mpsc::UnboundedReceiver<Command>,
    publish: watch::Sender<Arc<Cluster>>,
}

impl Api {
    /// Starts the task that follows the nodes from now on. `attrs` is what [`Self::publish`] was given, `lease` what it
    /// returned. Once `ready` is, the condition is set, where that is wanted.
    #[must_use]
    pub fn keep(
        self,
        own: OwnNode,
        network: NetworkConfig,
        attrs: LeaseAttrs,
        lease: Lease,
        ready: Readiness,
    ) -> Keeper {
        let (sender, commands) = mpsc::unbounded_channel();
        let (publish, cluster) = watch::channel(Arc::new(Cluster {
            own: Own::Held(lease.clone()),
            peers: Peers::default(),
            revision: 0,
            connected: false,
            unheard: Some(std::time::Instant::now()),
            renewed: None,
            config: ConfigState::Current,
        }));
        let heard = Heard::Kube(self.url.clone());
        let task = Task {
            network,
            config_state: ConfigState::Current,
            name: own.name,
            uid: own.node.metadata.uid,
            attrs,
            values: own.node.metadata.annotations,
            given: own.given,
            own: lease,
            lost: None,
            told_of_overwrite: None,
            nodes: Nodes::default(),
            told: Told::default(),
            version: None,
            connected: false,
            unheard: Some(Instant::now()),
            annotations: Pace::new(),
            annotations_wrong: false,
            condition: Pace::new(),
            condition_due: self.options.config.set_condition,
            ready,
            commands,
            publish,
            api: self,
        };
        Keeper::of(cluster, sender, task.run(), heard)
    }
}

impl Task {
    async fn run(mut self) {
        let mut waits = Waits::new();
        let mut outage = Outage::of("the Kubernetes API");
        loop {
            let start = Instant::now();
            let end = self.round(&mut outage).await;
            let good = waits.after(start.elapsed());
            match end {
                Ok(Round::Ended) => return,
                Ok(Round::Again) if good => continue,
                Ok(Round::Again) => {}
                Err(broken) => {
                    if broken.must_list() {
                        self.version = None;
                    }
                    outage.tell(&broken);
                    if self.connected || self.unheard.is_none() {
                        self.unheard = Some(Instant::now());
                    }
                    self.connected = false;
                    self.publish();
                }
            }
            if self.pause(waits.next()).await {
                return;
            }
        }
    }

    /// Waits, and does what is asked for meanwhile; says whether that was to end.
    async fn pause(&mut self, wait: Duration) -> bool {
        let until = Instant::now() + wait;
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => return false,
                command = self.commands.recv() => if self.obey(command) { return true; },
            }
        }
    }

    /// Does what is asked for, as far as that needs no API; says whether it is to end.
    fn obey(&mut self, command: Option<Command>) -> bool {
        match command {
            Some(Command::SetAttrs(attrs)) => {
                self.attrs = attrs;
                false
            }
            // The subnet is given, not chosen.
            Some(Command::SetOccupied { .. }) => false,
            Some(Command::Release(answer)) => {
                // Nothing is held that could be given back.
                let _ = answer.send(Ok(()));
                true
            }
            None => true,
        }
    }

    /// Takes in what the API says of a node, if that is news.
    fn take(&mut self, node: Node) -> bool {
        let Some(mut changed) = self.nodes.take(&node, &self.api.annotations) else { return false };
        if node.metadata.name == self.name {
            changed |= self.values != node.metadata.annotations;
            self.values = node.metadata.annotations;
        }
        changed
    }

    /// Sees to it that our own node is as it should be.
    async fn settle(&mut self) {
        let (uid, subnet) = match self.nodes.get(&self.name) {
            None => {
                return self.lose(
                    "the node is gone from the Kubernetes API: the kubelet must register it again".into(),
                );
            }
            Some((uid, cidr)) => (uid.to_owned(), own_subnets(&self.name, cidr, &self.network)),
        };
        if uid != self.uid {
            info!(node = self.name, "the node has been registered anew");
            self.uid = uid;
            self.condition_due = self.api.options.config.set_condition;
        }
        match subnet {
            Err(error) => return self.lose(error.to_string()),
            Ok((key, _)) if key.families() != self.own.key.families() => {
                return self.lose(format!(
                    "the node has podCIDR {} now, of other families than {}: restart the agent",
                    key.subnets(),
                    self.own.key.subnets()
                ));
            }
            Ok((key, given)) => {
                self.given = given;
                self.hold(key);
            }
        }
        self.annotations_wrong = false;
        let Some(patch) = annotations_patch(&self.api.annotations, &self.values, &self.own.attrs) else {
            return;
        };
        self.annotations_wrong = true;
        if Instant::now() < self.annotations.at {
            return;
        }
        self.annotations.tried();
        match self.api.patch(WRITE_ANNOTATIONS, &self.name, &patch).await {
            Ok(node) => {
                info!(node = self.name, "annotations written");
                self.take(node);
                self.annotations_wrong = false;
            }
            Err(error) => warn!("{error}; trying again in {:?}", self.annotations.wait),
        }
    }

    fn hold(&mut self, key: LeaseKey) {
        if key != self.own.key {
            error!(
                was = self.own.key.subnets(),
                is = key.subnets(),
                "THE SUBNET OF THIS NODE HAS CHANGED: restart its pods"
            );
        } else if self.lost.is_some() {
            warn!(subnet = key.subnets(), "the lost subnet is ours again");
        }
        let (attrs, wrong) = published(&self.api.annotations, &self.values, &self.attrs);
        if let Some(reason) = wrong.as_ref().filter(|reason| self.told_of_overwrite.as_ref() != Some(*reason))
        {
            warn!("{reason}");
        }
        self.told_of_overwrite = wrong;
        self.own = lease(key, attrs);
        self.lost = None;
    }

    fn lose(&mut self, reason: String) {
        if self.lost.as_ref() != Some(&reason) {
            error!(
                subnet = self.own.key.subnets(),
                reason, "THE LEASE OF THIS NODE IS LOST; its pods keep running"
            );
        }
        self.lost = Some(reason);
    }

    async fn set_condition(&mut self) {
        self.condition.tried();
        let patch = condition_patch(jiff::Timestamp::now());
        match self.api.patch(SET_CONDITION, &self.name, &patch).await {
            Ok(node) => {
                info!(node = self.name, "the node's condition NetworkUnavailable is False");
                self.condition_due = false;
                self.take(node);
            }
            Err(error) => warn!("{error}; trying again in {:?}", self.condition.wait),
        }
    }

    /// Whether the file still says what this agent runs with.
    fn look_at_config(&mut self) {
        let state = match network_config(&self.api.options.config) {
            Ok(mut config) => {
                config.keep_families(self.given);
                config.take_subnet_len(self.own.key);
                let given = ["SubnetLen", "IPv6SubnetLen"];
                let keys = self.network.differs_in(&config).into_iter();
                let keys: Vec<_> = keys.filter(|key| !given.contains(key)).collect();
                if keys.is_empty() { ConfigState::Current } else { ConfigState::NeedsRestart(keys) }
            }
            Err(KubeError::NetConfig { .. }) if !self.api.options.config.net_config.exists() => {
                ConfigState::Missing
            }
            Err(error) => ConfigState::Invalid(error.to_string()),
        };
        if state != self.config_state {
            match &state {
                ConfigState::Current => info!("the network config is again the one in force"),
                ConfigState::NeedsRestart(keys) => {
                    warn!(?keys, "the network config has changed; restart the agent to take it over");
                }
                ConfigState::Missing => warn!("the network config is gone; the one in force stays"),
                ConfigState::Invalid(reason) => warn!(reason, "the network config in force stays"),
            }
            self.config_state = state;
        }
    }

    fn publish(&mut self) {
        let rules = PeerRules {
            own: &self.name,
            halves: Halves {
                own: self.own.key,
                backend: &self.network.backend,
                networks: self.network.v4.iter().map(|pool| pool.network).collect(),
                networks_v6: self.network.v6.iter().map(|pool| pool.network).collect(),
            },
        };
        // Without a listing there is nothing to tell of the peers, and so nothing is told.
        let listed = self.connected || self.publish.borrow().is_listed();
        let mut peers = self.publish.borrow().peers.clone();
        peers.become_these(match listed {
            true => self.nodes.peers(&rules, &mut self.told),
            false => BTreeMap::new(),
        });
        let own = match &self.lost {
            None => Own::Held(self.own.clone()),
            Some(reason) => Own::Lost { key: self.own.key, reason: reason.clone() },
        };
        let reached = self.version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(1).max(1);
        let (connected, config) = (self.connected, self.config_state.clone());
        let unheard = self.unheard.filter(|_| !connected).map(Instant::into_std);
        self.publish.send_if_modified(|current| {
            let revision = if listed { reached } else { 0 };
            let cluster =
                Cluster { own, peers, revision: current.revision, connected, unheard, renewed: None, config };
            // Every node's heartbeat is a new version: only what matters to us is news.
            let modified = **current != cluster;
            if modified {
                *current = Arc::new(Cluster { revision, ..cluster });
            }
            modified
        });
    }
}
