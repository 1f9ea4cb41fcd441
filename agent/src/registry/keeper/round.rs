//! A round: list, settle, watch until something breaks.

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use etcd_client::{EventType, WatchResponse};
use futures::FutureExt as _;
use thiserror::Error;
use tokio::time::{Instant, sleep_until};
use tracing::{error, info, warn};

use super::{Outage, Task, renew_every};
use crate::registry::{
    ConfigState, RegistryError, connection::one_line, grace::Grace, parse_config, store::Listing,
};

/// The least time between two snapshots in a storm of changes; in calm, the first change is told of at once.
const BETWEEN_SNAPSHOTS: Duration = Duration::from_millis(100);

/// What comes out of a watch.
type Message = Result<Option<WatchResponse>, etcd_client::Error>;

/// The task has been asked to end.
pub(super) struct Ended;

/// Why a round is over.
#[derive(Debug, Error)]
pub(super) enum Broken {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error("etcd: the watch ended: {0}")]
    Watch(String),
    #[error("etcd: our etcd lease has run out")]
    LeaseRanOut,
}

impl Task {
    pub(super) async fn round(&mut self, outage: &mut Outage) -> Result<Ended, Broken> {
        // First of all, because it may be late; a lease that has run out shows in the listing.
        self.renew().await?;
        let listing = self.registry.list().await?;
        self.take_listing(listing);
        let from = self.revision + 1;
        self.settle().await?;
        self.publish();
        let written = if self.lost.is_none() { self.own.mod_revision } else { 0 };
        let known = self.revision.max(written);
        let mut stream = self.registry.watch(from).await?;
        // When to tell of what has come.
        let mut due: Option<Instant> = None;
        loop {
            tokio::select! {
                message = stream.message() => {
                    self.take_message(message, known).await?;
                    // What is there already belongs to one snapshot: a snapshot costs as much as the cluster is big.
                    while let Some(message) = stream.message().now_or_never() {
                        self.take_message(message, known).await?;
                    }
                    self.connected = true;
                    outage.over();
                    if Instant::now() < *due.get_or_insert(self.published + BETWEEN_SNAPSHOTS) {
                        continue;
                    }
                }
                () = sleep_until(due.unwrap_or(self.renew_at)), if due.is_some() => {}
                () = sleep_until(self.renew_at), if self.renews() => {
                    if !self.renew().await? {
                        return Err(Broken::LeaseRanOut);
                    }
                }
                () = sleep_until(self.retry_at), if self.lost.is_some() => self.settle().await?,
                () = sleep_until(self.grace.as_ref().map_or(self.renew_at, Grace::until)), if self.grace.is_some() => {
                    warn!("peers of before etcd was replaced have not come back, and are peers no longer");
                    self.grace = None;
                }
                command = self.commands.recv() => {
                    if let Some(ended) = self.obey(command).await {
                        return Ok(ended);
                    }
                    self.settle().await?;
                }
            }
            due = None;
            self.publish();
        }
    }

    fn renews(&self) -> bool {
        self.own.etcd_lease.is_some() && self.alive
    }

    /// Renews our etcd lease, if we have one; `false`: it has run out.
    pub(super) async fn renew(&mut self) -> Result<bool, RegistryError> {
        let Some(id) = self.own.etcd_lease.filter(|_| self.alive) else { return Ok(true) };
        self.alive = self.registry.keep_alive(id).await?;
        if self.alive {
            self.registry.stats.renewals.add();
            self.renewed = Some(Instant::now());
            self.renew_at = Instant::now() + renew_every(&self.claim);
        } else {
            warn!(subnet = self.own.key.subnets(), "the etcd lease of our subnet has run out");
        }
        Ok(self.alive)
    }

    pub(super) fn take_listing(&mut self, listing: Listing) {
        let Listing { cluster_id, revision, records, config } = listing;
        if self.revision != 0 && (cluster_id != self.cluster_id || revision < self.revision) {
            error!(
                was = %format_args!("{:x}@{}", self.cluster_id, self.revision),
                is = %format_args!("{cluster_id:x}@{revision}"),
                "etcd was replaced or restored: our lease is put back, and peers that it does not have are awaited"
            );
            self.grace = Some(Grace::begin(self.publish.borrow().peers.clone(), Instant::now()));
        } else if let Some(grace) = &mut self.grace {
            grace.begin_again(Instant::now());
        }
        (self.cluster_id, self.revision, self.records) = (cluster_id, revision, records);
        self.take_config(config.as_deref());
    }

    /// Takes in what the watch says. `known` is the revision that etcd had reached before the watch began: an etcd
    /// that is not there yet was restored in between (or is a member far behind), and would say nothing until then.
    async fn take_message(&mut self, message: Message, known: i64) -> Result<(), Broken> {
        let message = message
            .map_err(|error| Broken::Watch(one_line(&error)))?
            .ok_or_else(|| Broken::Watch("etcd closed it".into()))?;
        if message.canceled() {
            let reason = match message.compact_revision() {
                0 => message.cancel_reason().to_owned(),
                revision => format!("the history before revision {revision} is compacted"),
            };
            return Err(Broken::Watch(reason));
        }
        if let Some(header) = message.header() {
            if header.cluster_id() != self.cluster_id {
                return Err(Broken::Watch("another cluster answers".into()));
            }
            if header.revision() < known {
                let revision = header.revision();
                return Err(Broken::Watch(format!(
                    "etcd is at revision {revision}, and was at {known} before"
                )));
            }
            self.revision = self.revision.max(header.revision());
        }
        if self.take_events(&message) { Ok(self.settle().await?) } else { Ok(()) }
    }

    /// Whether our own key is among them.
    fn take_events(&mut self, message: &WatchResponse) -> bool {
        let (prefix, config_key) = (self.registry.subnets_prefix(), self.registry.config_key());
        let told = Arc::clone(&self.registry.told);
        let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
        let mut own = false;
        for event in message.events() {
            let Some(pair) = event.kv() else { continue };
            let deleted = event.event_type() == EventType::Delete;
            if pair.key() == config_key.as_bytes() {
                self.take_config((!deleted).then(|| pair.value()));
                continue;
            }
            let key = if deleted {
                self.records.delete(&prefix, pair.into(), &mut told)
            } else {
                self.records.put(&prefix, pair.into(), &mut told)
            };
            own |= key == Some(self.own.key);
        }
        own
    }

    /// Compares the config in etcd with the one in force, and takes over what does no harm: the bounds, which
    /// only matter to the next pick.
    fn take_config(&mut self, config: Option<&[u8]>) {
        let state = match config.map(parse_config) {
            None => ConfigState::Missing,
            Some(Err(error)) => ConfigState::Invalid(error.to_string()),
            Some(Ok(config)) => {
                let keys = self.config.differs_in(&config);
                if keys.is_empty() && config != self.config {
                    info!("network config changed: new bounds for the next subnet");
                    self.config = config.clone();
                }
                self.new_config = Some(config).filter(|_| !keys.is_empty());
                if keys.is_empty() { ConfigState::Current } else { ConfigState::NeedsRestart(keys) }
            }
        };
        if state != self.config_state {
            match &state {
                ConfigState::Current => info!("the network config in etcd is the one in force"),
                ConfigState::NeedsRestart(keys) => {
                    warn!(keys = keys.join(", "), "network config changed: restart the agent to follow")
                }
                ConfigState::Missing => warn!("the network config is gone from etcd; the one in force stays"),
                ConfigState::Invalid(error) => {
                    warn!(error, "network config changed and is wrong; the old one stays")
                }
            }
            self.config_state = state;
        }
    }
}
