//! `/healthz` and `/readyz`: whether the agent runs, and whether this node carries packets.
//!
//! `/healthz` is 200 unless the loop that keeps the node as it should be hangs, so that a liveness probe restarts what
//! hangs and not what waits for etcd. `/readyz` is 200 when every condition holds, else 503 with a line for each that does
//! not. Conditions are set by those who know them, through a shared [`Readiness`].

mod listener;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::service::Heartbeat;
use listener::GuardedListener;

/// How long requests under way may take to end once the agent stops.
const FAREWELL: Duration = Duration::from_secs(1);

type Conditions = BTreeMap<&'static str, Result<(), String>>;

/// The conditions under which the node is ready. Clones share them.
#[derive(Debug, Clone)]
pub struct Readiness(Arc<watch::Sender<Conditions>>);

impl Readiness {
    /// Knows these conditions, none of which holds yet. One that is not named here counts from when it is first set.
    #[must_use]
    pub fn new(conditions: &[&'static str]) -> Self {
        let not_yet = |name: &&'static str| (*name, Err("not yet".to_owned()));
        Self(Arc::new(watch::Sender::new(conditions.iter().map(not_yet).collect())))
    }

    /// Says that a condition holds, or why it does not. A change is logged, once.
    pub fn set(&self, condition: &'static str, state: Result<(), String>) {
        let changed = self.0.send_if_modified(|conditions| match conditions.get(condition) {
            Some(current) if *current == state => false,
            _ => {
                conditions.insert(condition, state.clone());
                true
            }
        });
        match state {
            _ if !changed => {}
            Ok(()) => info!(condition, "ready"),
            Err(reason) => warn!(condition, reason, "not ready"),
        }
    }

    /// The conditions that do not hold, each with its reason; the node is ready if there are none.
    #[must_use]
    pub fn missing(&self) -> Vec<(&'static str, String)> {
        missing(&self.0.borrow())
    }

    /// Tells of every change, and of how it is now.
    pub(crate) fn changes(&self) -> watch::Receiver<Conditions> {
        let mut changes = self.0.subscribe();
        changes.mark_changed();
        changes
    }

    /// Waits until every condition holds.
    pub async fn wait(&self) {
        // The sender is `self`'s own, so the channel cannot close meanwhile.
        let _ = self.0.subscribe().wait_for(|conditions| missing(conditions).is_empty()).await;
    }
}

fn missing(conditions: &Conditions) -> Vec<(&'static str, String)> {
    conditions.iter().filter_map(|(name, state)| Some((*name, state.as_ref().err()?.clone()))).collect()
}

/// The routes `/healthz` and `/readyz`.
pub fn routes(readiness: Readiness, heartbeat: Heartbeat) -> Router {
    let healthz = get(healthz).with_state(heartbeat);
    Router::new().route("/healthz", healthz).route("/readyz", get(readyz).with_state(readiness))
}

/// Serves routes on a socket that listens already, until `stop`: to few clients at a time, and to none for long.
///
/// # Errors
///
/// If the socket fails.
pub async fn serve_routes(
    listener: TcpListener,
    routes: Router,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    serve_guarded(GuardedListener::new(listener), routes, stop).await
}

async fn serve_guarded(
    listener: GuardedListener,
    routes: Router,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let served = axum::serve(listener, routes).with_graceful_shutdown(stop.clone().cancelled_owned());
    let overdue = async {
        stop.cancelled().await;
        tokio::time::sleep(FAREWELL).await;
    };
    tokio::select! {
        result = served => result.context("serving HTTP failed"),
        () = overdue => Ok(()),
    }
}

#[allow(clippy::unused_async, reason = "axum's handlers are async")]
async fn healthz(State(heartbeat): State<Heartbeat>) -> (StatusCode, String) {
    match heartbeat.age() {
        Some(age) if !heartbeat.is_alive() => {
            let answer = format!("loden hangs: its loop came by {} s ago\n", age.as_secs());
            (StatusCode::SERVICE_UNAVAILABLE, answer)
        }
        _ => (StatusCode::OK, "loden is running\n".into()),
    }
}

#[allow(clippy::unused_async, reason = "axum's handlers are async")]
async fn readyz(State(readiness): State<Readiness>) -> (StatusCode, String) {
    let missing = readiness.missing();
    if missing.is_empty() {
        return (StatusCode::OK, "loden is ready\n".into());
    }
    let lines: String = missing
        .iter()
        .map(|(name, reason)| format!("{name}: {}\n", reason.replace(char::is_control, " ")))
        .collect();
    (StatusCode::SERVICE_UNAVAILABLE, format!("loden is not ready\n{lines}"))
}

#[cfg(test)]
mod tests;
