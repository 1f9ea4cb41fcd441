//! A round: list where need be, settle, watch until the stream ends.

use std::pin::pin;

use futures::{FutureExt as _, StreamExt as _};
use kube_client::{Error, core::WatchEvent};
use thiserror::Error;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::Task;
use crate::{
    kube::{
        KubeError,
        connection::{Event, failed, refused},
        nodes::Nodes,
    },
    network::Backend,
    registry::Outage,
};

/// How a round that nothing has broken is over.
pub(super) enum Round {
    /// The server has ended the watch; it can go on from where it was.
    Again,
    /// The task has been asked to end.
    Ended,
}

/// Why a round is over.
#[derive(Debug, Error)]
pub(super) enum Broken {
    #[error(transparent)]
    Kube(#[from] KubeError),
    #[error("Kubernetes: the watch of the nodes has gone silent")]
    Silent,
}

const WATCH: &str = "go on watching the nodes";

impl Broken {
    /// Whether going on from the version that was reached cannot work: it is too old (410), from before a restore and
    /// so in the future, or not understood any more.
    pub(super) fn must_list(&self) -> bool {
        match self {
            Self::Kube(KubeError::Refused { code: 429, .. }) | Self::Silent => false,
            Self::Kube(KubeError::Refused { code: 400..500, .. }) => true,
            Self::Kube(KubeError::Refused { reason, .. }) => reason.contains("Too large resource version"),
            Self::Kube(_) => false,
        }
    }
}

impl Task {
    pub(super) async fn round(&mut self, outage: &mut Outage) -> Result<Round, Broken> {
        self.look_at_config();
        let version = match self.version.clone() {
            Some(version) => version,
            None => self.list().await?,
        };
        self.ask_for_unknown().await?;
        self.settle().await;
        let (stream, lasts) = self.api.watch(self.only().as_deref(), &version).await?;
        let mut stream = pin!(stream.fuse());
        self.connected = true;
        outage.over();
        self.publish();
        // Later than that the server would have ended it.
        let end = Instant::now() + lasts + self.api.options.limit;
        let ready = self.ready.clone();
        loop {
            let changed = tokio::select! {
                message = timeout_at(end, stream.next()) => {
                    let Some(message) = message.map_err(|_| Broken::Silent)? else { return Ok(Round::Again) };
                    let mut changed = self.take_event(message)?;
                    // What is there already belongs to one snapshot: a snapshot costs as much as the cluster is big.
                    while let Some(Some(message)) = stream.next().now_or_never() {
                        changed |= self.take_event(message)?;
                    }
                    changed
                }
                () = sleep_until(self.annotations.at), if self.annotations_wrong => true,
                () = async { sleep_until(self.condition.at).await; ready.wait().await }, if self.condition_due => {
                    self.set_condition().await;
                    true
                }
                command = self.commands.recv() => {
                    if self.obey(command) {
                        return Ok(Round::Ended);
                    }
                    true
                }
            };
            if changed {
                self.ask_for_unknown().await?;
                self.settle().await;
                self.publish();
            }
        }
    }

    /// With alloc others do the routing, so that other nodes do not matter.
    fn only(&self) -> Option<String> {
        (self.network.backend == Backend::Alloc).then(|| self.name.clone())
    }

    async fn list(&mut self) -> Result<String, KubeError> {
        let (names, own) = (self.api.annotations.clone(), self.name.clone());
        let mut nodes = Nodes::default();
        let mut values = None;
        let version = self
            .api
            .list(self.only().as_deref(), |node| {
                nodes.take(&node, &names);
                if node.metadata.name == own {
                    values = Some(node.metadata.annotations);
                }
            })
            .await?;
        self.nodes = nodes;
        self.values = values.unwrap_or_default();
        self.version = Some(version.clone());
        Ok(version)
    }

    /// Takes in one event; says whether it changes anything.
    fn take_event(&mut self, event: Result<Event, Error>) -> Result<bool, KubeError> {
        match event.map_err(|error| failed(WATCH, &error))? {
            WatchEvent::Added(node) | WatchEvent::Modified(node) => {
                self.version = Some(node.metadata.resource_version.clone());
                let node = self.api.cut(node);
                Ok(self.take(node))
            }
            WatchEvent::Deleted(node) => {
                self.version = Some(node.metadata.resource_version);
                Ok(self.nodes.remove(&node.metadata.name))
            }
            WatchEvent::Bookmark(bookmark) => {
                self.version = Some(bookmark.metadata.resource_version);
                Ok(false)
            }
            WatchEvent::Error(status) => Err(refused(WATCH, &status)),
        }
    }

    /// Asks for the podCIDRs that the watch does not tell.
    async fn ask_for_unknown(&mut self) -> Result<(), KubeError> {
        for name in self.nodes.unknown(&self.name) {
            match self.api.node(&name).await {
                Ok(node) => drop(self.take(node)),
                // The watch will tell of it as well.
                Err(KubeError::NoNode(_)) => drop(self.nodes.remove(&name)),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
