//! Settles whether our lease is still ours, and does what follows.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{error, info, warn};

use super::{Task, renew_every};
use crate::{
    lease::Lease,
    registry::{
        ClaimError, RegistryError,
        record::Record,
        standing::{Standing, standing},
        store::Write,
    },
};

/// The first and the longest wait for a lease where there is none to get.
pub(super) const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);
/// Each turn but the last has met somebody else's write to our very key.
const MAX_TURNS: usize = 10;

impl Task {
    /// Compares our lease with etcd's record of it until both agree, or until it is clear that they cannot.
    pub(super) async fn settle(&mut self) -> Result<(), RegistryError> {
        for _ in 0..MAX_TURNS {
            let record = self.records.get(self.own.key).cloned();
            let granted = |id| self.registry.has_granted(id);
            match (standing(&self.own, record.as_ref(), self.alive, granted), record) {
                (Standing::Ours, Some(record)) => {
                    self.own.mod_revision = record.mod_revision;
                    self.hold(self.own.clone());
                    return Ok(());
                }
                (Standing::Rewrite, Some(record)) => {
                    warn!(
                        subnet = self.own.key.subnets(),
                        "our lease's record is not as it should be; writing it again"
                    );
                    let etcd_lease = self.usable_etcd_lease(&record).await?;
                    self.write(&record, etcd_lease).await?;
                }
                (Standing::Unanswered(id), Some(record)) => {
                    info!(
                        subnet = self.own.key.subnets(),
                        "an earlier write of ours has succeeded after all"
                    );
                    let old = self.own.etcd_lease.filter(|_| self.alive);
                    self.own =
                        Lease { etcd_lease: Some(id), mod_revision: record.mod_revision, ..self.own.clone() };
                    // Some of its time has gone by already.
                    (self.alive, self.renew_at, self.lost) = (true, Instant::now(), None);
                    if let Some(id) = old {
                        self.registry.revoke_unused(id).await;
                    }
                }
                (Standing::Reserved, Some(record)) => {
                    info!(
                        subnet = self.own.key.subnets(),
                        "our subnet has become a reservation: it does not run out any more"
                    );
                    let old = self.own.etcd_lease;
                    self.write(&record, None).await?;
                    if let Some(id) = old.filter(|_| self.own.etcd_lease.is_none()) {
                        self.registry.revoke_unused(id).await;
                    }
                }
                (Standing::OtherAgent, _) => {
                    let ip = self.own.attrs.identity().map(|ip| ip.to_string()).unwrap_or_default();
                    self.lose(format!(
                        "another agent with this node's public IP {ip} has taken the lease over"
                    ));
                    return Ok(());
                }
                (Standing::OtherNode(public_ip), _) => {
                    let node = public_ip.map_or_else(|| "somebody".to_owned(), |ip| format!("node {ip}"));
                    self.lose(format!("{node} has taken subnet {}", self.own.key.subnets()));
                    return self.reclaim().await;
                }
                (Standing::Gone, _) | (_, None) => {
                    self.lose(
                        "its record is gone from etcd: it ran out, was deleted, or etcd was replaced".into(),
                    );
                    return self.reclaim().await;
                }
            }
        }
        self.lose(format!("something else keeps writing to its record ({MAX_TURNS} times in a row)"));
        self.schedule_retry();
        Ok(())
    }

    /// The etcd lease to write our record with: the one we have, or a new one where that has run out or the record
    /// lives by another.
    async fn usable_etcd_lease(&mut self, record: &Record) -> Result<Option<i64>, RegistryError> {
        match self.own.etcd_lease {
            None => Ok(None),
            Some(id) if self.alive && record.etcd_lease.is_none_or(|other| other == id) => Ok(Some(id)),
            Some(_) => Ok(Some(self.registry.grant(self.claim.ttl).await?.0)),
        }
    }

    /// Writes our value over this record. Where that meets another write, what is there now is taken in.
    async fn write(&mut self, record: &Record, etcd_lease: Option<i64>) -> Result<(), RegistryError> {
        let (key, value) = (self.own.key, self.own.attrs.to_json());
        match self.registry.replace(record, key, &value, etcd_lease, self.revision).await? {
            Write::Done(mod_revision) => {
                self.hold(Lease { etcd_lease, mod_revision, ..self.own.clone() });
            }
            Write::Raced => {
                if let Some(id) = etcd_lease.filter(|id| Some(*id) != self.own.etcd_lease) {
                    self.registry.revoke_unused(id).await;
                }
                self.records = self.registry.list().await?.records;
            }
        }
        Ok(())
    }

    /// Takes the same subnet back if it is free, another one otherwise.
    async fn reclaim(&mut self) -> Result<(), RegistryError> {
        self.publish();
        let mut claim = self.claim.clone();
        claim.previous = self.own.key.subnet.or(claim.previous);
        claim.v6.previous = self.own.key.subnet_v6.or(claim.v6.previous);
        match self.registry.claim(&self.config, &claim).await {
            Ok(lease) => {
                if lease.key == self.own.key {
                    warn!(subnet = lease.key.subnets(), "the lost subnet is ours again");
                } else {
                    error!(was = %self.own.key, is = %lease.key, "THE SUBNET OF THIS NODE HAS CHANGED: restart its containers");
                }
                let old = self.own.etcd_lease.filter(|id| self.alive && lease.etcd_lease != Some(*id));
                self.hold(lease);
                if let Some(id) = old {
                    self.registry.revoke_unused(id).await;
                }
                Ok(())
            }
            Err(ClaimError::Registry(error)) => Err(error),
            Err(error) => {
                self.lose(error.to_string());
                self.schedule_retry();
                Ok(())
            }
        }
    }

    fn hold(&mut self, lease: Lease) {
        self.records.insert(&lease);
        if lease.etcd_lease != self.own.etcd_lease || self.lost.is_some() {
            let now = Instant::now();
            self.alive = true;
            self.renewed = lease.etcd_lease.map(|_| now);
            self.renew_at = now + renew_every(&self.claim);
        }
        self.own = lease;
        self.lost = None;
        self.retry_wait = FIRST_RETRY;
    }

    fn lose(&mut self, reason: String) {
        if self.lost.as_ref() != Some(&reason) {
            error!(
                subnet = self.own.key.subnets(),
                reason, "THE LEASE OF THIS NODE IS LOST; its containers keep running"
            );
        }
        self.lost = Some(reason);
        // Until something changes at our key: then this is asked again at once.
        self.retry_at = Instant::now() + LAST_RETRY;
    }

    fn schedule_retry(&mut self) {
        self.retry_at = Instant::now() + self.retry_wait;
        self.retry_wait = (self.retry_wait * 2).min(LAST_RETRY);
    }
}
