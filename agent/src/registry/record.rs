//! What lies under the subnets' prefix in etcd, parsed: pure.

use std::collections::BTreeMap;

use etcd_client::KeyValue;
use ipnet::Ipv4Net;
use tracing::warn;

use crate::lease::{AttrsError, Lease, LeaseAttrs, LeaseKey};

/// One key whose name is a lease's, whatever its value.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Record {
    pub(super) key: LeaseKey,
    pub(super) attrs: Result<LeaseAttrs, AttrsError>,
    pub(super) etcd_lease: Option<i64>,
    pub(super) mod_revision: i64,
}

impl Record {
    /// As a lease, where its value is one.
    pub(super) fn lease(&self) -> Option<Lease> {
        let attrs = self.attrs.as_ref().ok()?.clone();
        let Self { key, etcd_lease, mod_revision, .. } = *self;
        Some(Lease { subnet: key.subnet, key, attrs, etcd_lease, mod_revision })
    }

    pub(super) fn is_at(&self, public_ip: std::net::Ipv4Addr) -> bool {
        self.attrs.as_ref().is_ok_and(|attrs| attrs.public_ip == public_ip)
    }
}

/// All records, by key.
#[derive(Clone, Debug, Default)]
pub(super) struct Records {
    records: BTreeMap<LeaseKey, Record>,
}

impl Records {
    /// Reads the answer to a range request. Keys that name no lease are warned of and left out.
    pub(super) fn parse(subnets_prefix: &str, pairs: &[KeyValue], told: &mut Told) -> Self {
        let mut records = Self::default();
        for pair in pairs {
            records.put(subnets_prefix, pair, told);
        }
        records
    }

    /// Takes in a key that was written, and returns which it was.
    pub(super) fn put(&mut self, subnets_prefix: &str, pair: &KeyValue, told: &mut Told) -> Option<LeaseKey> {
        let name = String::from_utf8_lossy(pair.key()).into_owned();
        let key = parse_key(subnets_prefix, &name, told)?;
        let attrs = LeaseAttrs::parse(pair.value());
        match &attrs {
            Ok(_) => told.forget(&name),
            Err(error) => told.warn(&name, format!("its value is no lease: {error}")),
        }
        let etcd_lease = Some(pair.lease()).filter(|id| *id != 0);
        let mod_revision = pair.mod_revision();
        if self.is_newer(key, mod_revision) {
            return None;
        }
        self.records.insert(key, Record { key, attrs, etcd_lease, mod_revision });
        Some(key)
    }

    /// Takes out a key that was deleted, and returns which it was.
    pub(super) fn delete(
        &mut self,
        subnets_prefix: &str,
        pair: &KeyValue,
        told: &mut Told,
    ) -> Option<LeaseKey> {
        let name = String::from_utf8_lossy(pair.key()).into_owned();
        told.forget(&name);
        let key = name.strip_prefix(subnets_prefix)?.parse().ok()?;
        if self.is_newer(key, pair.mod_revision()) {
            return None;
        }
        self.records.remove(&key).map(|record| record.key)
    }

    /// Whether an event is older than what is known: our own writes are known before the watch tells of what came
    /// before them.
    fn is_newer(&self, key: LeaseKey, revision: i64) -> bool {
        self.records.get(&key).is_some_and(|record| record.mod_revision > revision)
    }

    /// Takes in our own write, which is known before the watch tells.
    pub(super) fn insert(&mut self, lease: &Lease) {
        let Lease { key, attrs, etcd_lease, mod_revision, .. } = lease.clone();
        self.records.insert(key, Record { key, attrs: Ok(attrs), etcd_lease, mod_revision });
    }

    pub(super) fn get(&self, key: LeaseKey) -> Option<&Record> {
        self.records.get(&key)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Record> {
        self.records.values()
    }

    /// Every subnet that a key names, whatever its value.
    pub(super) fn taken(&self) -> impl Iterator<Item = Ipv4Net> {
        self.records.keys().map(|key| key.subnet)
    }
}

fn parse_key(subnets_prefix: &str, name: &str, told: &mut Told) -> Option<LeaseKey> {
    match name.strip_prefix(subnets_prefix)?.parse() {
        Ok(key) => Some(key),
        Err(error) => {
            told.warn(name, error.to_string());
            None
        }
    }
}

/// What was warned of already: each key once, until it says something else.
#[derive(Debug, Default)]
pub(super) struct Told {
    reasons: BTreeMap<String, String>,
}

impl Told {
    pub(super) fn warn(&mut self, key: &str, reason: String) {
        if self.reasons.get(key) != Some(&reason) {
            warn!(key, reason, "key in etcd ignored");
            self.reasons.insert(key.to_owned(), reason);
        }
    }

    pub(super) fn forget(&mut self, key: &str) {
        self.reasons.remove(key);
    }
}
