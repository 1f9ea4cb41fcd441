//! The requests that the registry makes, one function each. Writes compare what was read before.

use std::{sync::PoisonError, time::Duration};

use etcd_client::{
    Compare, CompareOp, Error as EtcdError, GetOptions, GetResponse, LeaseTimeToLiveOptions, PutOptions, Txn,
    TxnOp, TxnOpResponse, TxnResponse, WatchOptions, WatchStream,
};
use tracing::debug;

use super::{
    Registry, RegistryError,
    record::{Pair, Record, Records},
};
use crate::{
    lease::{Lease, LeaseKey},
    network::NetworkConfig,
    subnet,
};

/// Far above etcd's own limit to a database's keys that anybody has seen; tonic's default is 4 MiB.
const MAX_ANSWER: usize = 256 << 20;

/// gRPC's code for it (grpc/doc/statuscodes.md); etcd-client does not export tonic's type.
const NOT_FOUND: i32 = 5;

/// Everything under the prefix that matters, at one revision.
#[derive(Debug)]
pub(super) struct Listing {
    pub(super) cluster_id: u64,
    pub(super) revision: i64,
    pub(super) records: Records,
    /// The network config's text, where asked for and there.
    pub(super) config: Option<Vec<u8>>,
}

/// How a write that compares has ended.
#[derive(Debug)]
pub(super) enum Write {
    /// Done, at this revision.
    Done(i64),
    /// Something else was there.
    Raced,
}

impl Registry {
    /// The value at a key.
    pub(super) async fn read(&self, key: &str) -> Result<Option<Vec<u8>>, RegistryError> {
        let answer = self
            .connection
            .call("read the network config", |mut client| async move { client.get(key, None).await })
            .await?;
        Ok(answer.kvs().first().map(|pair| pair.value().to_vec()))
    }

    /// Every lease there is; a value that is none is left out.
    ///
    /// # Errors
    ///
    /// Where etcd is away or refuses.
    pub async fn leases(&self) -> Result<Vec<Lease>, RegistryError> {
        Ok(self.list().await?.records.iter().filter_map(Record::lease).collect())
    }

    /// All leases and the network config, in one request.
    pub(super) async fn list(&self) -> Result<Listing, RegistryError> {
        let txn = Txn::new().and_then([self.get_subnets(), TxnOp::get(self.config_key(), None)]);
        let answer = self.txn("list the leases", txn).await?;
        Ok(self.listing(&answer))
    }

    /// A new etcd lease; its id and its TTL, which etcd may have made longer.
    pub(super) async fn grant(&self, ttl: Duration) -> Result<(i64, Duration), RegistryError> {
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX).max(1);
        let what = "get an etcd lease";
        let grant = self
            .connection
            .call(what, |mut client| async move { client.lease_grant(seconds, None).await })
            .await?;
        let seconds = u64::try_from(grant.ttl()).unwrap_or(ttl.as_secs());
        self.granted.lock().unwrap_or_else(PoisonError::into_inner).insert(grant.id());
        Ok((grant.id(), Duration::from_secs(seconds)))
    }

    /// Whether an etcd lease was granted to this process. What lives by it is our own, though the answer to the write may
    /// have been lost.
    pub(super) fn has_granted(&self, id: i64) -> bool {
        self.granted.lock().unwrap_or_else(PoisonError::into_inner).contains(&id)
    }

    fn has_ended(&self, id: i64) {
        self.granted.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    /// Gives an etcd lease its whole TTL again; `false`: it has run out.
    pub(super) async fn keep_alive(&self, id: i64) -> Result<bool, RegistryError> {
        let what = "keep the lease alive";
        let alive = self
            .connection
            .call(what, |mut client| async move {
                // One request on a stream of its own: hours lie between two, and a stream that has silently died
                // in between would cost the time that the margin is for.
                match client.lease_keep_alive(id).await {
                    Ok(_) => Ok(true),
                    Err(EtcdError::LeaseKeepAliveError(_)) => Ok(false),
                    Err(error) => Err(error),
                }
            })
            .await?;
        if !alive {
            self.has_ended(id);
        }
        Ok(alive)
    }

    /// Ends an etcd lease, if it has not ended already; with it go the keys that live by it.
    pub(super) async fn revoke(&self, id: i64) -> Result<(), RegistryError> {
        let what = "give the etcd lease back";
        self.connection
            .call(what, |mut client| async move {
                match client.lease_revoke(id).await {
                    Err(EtcdError::GRpcStatus(status)) if status.code() as i32 == NOT_FOUND => Ok(()),
                    ended => ended.map(drop),
                }
            })
            .await?;
        self.has_ended(id);
        Ok(())
    }

    /// Ends an etcd lease that no key lives by any more. One that still has keys is left to run out: they are not
    /// ours. So is one that etcd does not want to tell us about.
    pub(super) async fn revoke_unused(&self, id: i64) {
        let keys = LeaseTimeToLiveOptions::new().with_keys();
        let what = "look at an etcd lease";
        let look = |mut client: etcd_client::Client| {
            let keys = keys.clone();
            async move { client.lease_time_to_live(id, Some(keys)).await }
        };
        let ended = match self.connection.call(what, look).await {
            Ok(lease) if lease.keys().is_empty() => self.revoke(id).await,
            Ok(_) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            debug!(id, %error, "an unused etcd lease is left to run out");
        }
    }

    /// Writes a key that must not be there, nor any that would overlap it. `at` is the revision of the listing by
    /// which it was chosen.
    pub(super) async fn create(
        &self,
        config: &NetworkConfig,
        key: LeaseKey,
        value: &str,
        etcd_lease: i64,
        at: i64,
    ) -> Result<Write, RegistryError> {
        let absent = |guard| Compare::version(self.key(guard), CompareOp::Equal, 0).with_prefix();
        let v4 = config.v4.zip(key.subnet);
        let v4 = v4.map(|(pool, subnet)| subnet::guards(pool.network, subnet)).unwrap_or_default();
        let mut guards: Vec<_> = v4.into_iter().map(absent).collect();
        // One of the guards covers it, but etcd before 3.3 compares no ranges and would not say so.
        guards.push(Compare::version(self.key(key), CompareOp::Equal, 0));
        guards.extend(key.subnet_v6.map(|_| self.nothing_new_since(at)));
        let put = TxnOp::put(self.key(key), value, Some(PutOptions::new().with_lease(etcd_lease)));
        self.write("take a subnet", guards, vec![put], (key, etcd_lease)).await
    }

    /// Writes over just this record, under `key`, which is its own or has a half of it. `at` is as for
    /// [`Self::create`].
    pub(super) async fn replace(
        &self,
        record: &Record,
        key: LeaseKey,
        value: &str,
        etcd_lease: Option<i64>,
        at: i64,
    ) -> Result<Write, RegistryError> {
        let etcd_lease = etcd_lease.unwrap_or(0);
        let mut compares = vec![self.unchanged(record)];
        let mut operations = Vec::new();
        if key != record.key {
            compares.push(Compare::version(self.key(key), CompareOp::Equal, 0));
            compares.extend(key.subnet_v6.map(|_| self.nothing_new_since(at)));
            // First, because peers take the two in this order, and both are about the same subnet.
            operations.push(TxnOp::delete(self.key(record.key), None));
        }
        operations.push(TxnOp::put(self.key(key), value, Some(PutOptions::new().with_lease(etcd_lease))));
        self.write("renew the lease's record", compares, operations, (key, etcd_lease)).await
    }

    /// Deletes just this record.
    pub(super) async fn delete(&self, record: &Record) -> Result<(), RegistryError> {
        let delete = TxnOp::delete(self.key(record.key), None);
        let txn = Txn::new().when([self.unchanged(record)]).and_then([delete]);
        self.txn("delete a lease", txn).await.map(drop)
    }

    /// Follows the leases and the network config from a revision on.
    pub(super) async fn watch(&self, revision: i64) -> Result<WatchStream, RegistryError> {
        let options = WatchOptions::new().with_start_revision(revision).with_progress_notify();
        let what = "watch the leases";
        self.connection
            .call(what, |client| {
                let (subnets, config) = (options.clone().with_prefix(), options.clone());
                async move {
                    let mut client = client.watch_client().max_decoding_message_size(MAX_ANSWER);
                    let mut stream = client.watch(self.subnets_prefix(), Some(subnets)).await?;
                    stream.watch(self.config_key(), Some(config)).await?;
                    Ok(stream)
                }
            })
            .await
    }

    /// A transaction that puts `(key, etcd lease)`.
    async fn write(
        &self,
        what: &'static str,
        compares: Vec<Compare>,
        operations: Vec<TxnOp>,
        (key, etcd_lease): (LeaseKey, i64),
    ) -> Result<Write, RegistryError> {
        let there = TxnOp::get(self.key(key), None);
        let txn = Txn::new().when(compares).and_then(operations).or_else([there]);
        let answer = self.txn(what, txn).await?;
        if answer.succeeded() {
            return Ok(Write::Done(answer.header().map_or(0, etcd_client::ResponseHeader::revision)));
        }
        // The answer to an earlier try may have been lost: an etcd lease that nobody else knows tells.
        match self.listing(&answer).records.get(key) {
            Some(record) if etcd_lease != 0 && record.etcd_lease == Some(etcd_lease) => {
                Ok(Write::Done(record.mod_revision))
            }
            _ => Ok(Write::Raced),
        }
    }

    async fn txn(&self, what: &'static str, txn: Txn) -> Result<TxnResponse, RegistryError> {
        self.connection
            .call(what, |client| {
                let txn = txn.clone();
                async move { client.kv_client().max_decoding_message_size(MAX_ANSWER).txn(txn).await }
            })
            .await
    }

    fn listing(&self, answer: &TxnResponse) -> Listing {
        let mut gets = answer.op_responses().into_iter().filter_map(|answer| match answer {
            TxnOpResponse::Get(get) => Some(get),
            _ => None,
        });
        let subnets = gets.next();
        let records = subnets.as_ref().map_or(&[][..], GetResponse::kvs);
        let config = gets.next().and_then(|get| Some(get.kvs().first()?.value().to_vec()));
        let (cluster_id, revision) = answer.header().map_or((0, 0), |at| (at.cluster_id(), at.revision()));
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let records = Records::parse(&self.subnets_prefix(), records.iter().map(Pair::from), &mut told);
        Listing { cluster_id, revision, records, config }
    }

    fn get_subnets(&self) -> TxnOp {
        TxnOp::get(self.subnets_prefix(), Some(GetOptions::new().with_prefix()))
    }

    fn unchanged(&self, record: &Record) -> Compare {
        Compare::mod_revision(self.key(record.key), CompareOp::Equal, record.mod_revision)
    }

    /// No lease was written since a listing. Keys begin with the IPv4 subnet, so that no range of them tells
    /// whether an IPv6 subnet is taken.
    fn nothing_new_since(&self, revision: i64) -> Compare {
        Compare::mod_revision(self.subnets_prefix(), CompareOp::Less, revision + 1).with_prefix()
    }

    fn key(&self, segment: impl std::fmt::Display) -> String {
        format!("{}{segment}", self.subnets_prefix())
    }
}
