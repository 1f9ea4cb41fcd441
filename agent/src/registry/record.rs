//! What lies under the subnets' prefix in etcd, parsed: pure.

use std::collections::BTreeMap;

use etcd_client::KeyValue;
use tracing::warn;

use crate::{
    family::Family,
    lease::{AttrsError, Lease, LeaseAttrs, LeaseKey, subnets_in_flannels_eyes},
};

/// A key and its value as they come from etcd.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pair<'a> {
    pub(super) key: &'a [u8],
    pub(super) value: &'a [u8],
    /// 0: none.
    pub(super) etcd_lease: i64,
    /// Of a deleted key: the revision of the deletion.
    pub(super) mod_revision: i64,
}

impl<'a> From<&'a KeyValue> for Pair<'a> {
    fn from(pair: &'a KeyValue) -> Self {
        let (etcd_lease, mod_revision) = (pair.lease(), pair.mod_revision());
        Self { key: pair.key(), value: pair.value(), etcd_lease, mod_revision }
    }
}

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
        Some(Lease { key, attrs, etcd_lease, mod_revision })
    }

    /// Whether it is of the node that publishes this.
    pub(super) fn is_of(&self, node: &LeaseAttrs) -> bool {
        self.attrs.as_ref().is_ok_and(|attrs| attrs.is_of_node_of(node))
    }
}

/// All records, by key.
#[derive(Clone, Debug, Default)]
pub(super) struct Records {
    records: BTreeMap<LeaseKey, Record>,
    /// What was there before, at the keys where something has changed.
    changed: Changed,
    /// Subnets of keys that are none of a lease by our reading, but by flannel's.
    odd: BTreeMap<String, LeaseKey>,
}

/// Records as they were before they changed, `None` where there was none.
pub(super) type Before = BTreeMap<LeaseKey, Option<Record>>;

/// What has changed since somebody asked.
#[derive(Clone, Debug, Default)]
enum Changed {
    /// Whatever there is: nobody has asked yet.
    #[default]
    All,
    /// At these keys, of which there are few.
    At(Before),
}

impl Records {
    /// Reads the answer to a range request. Keys that name no lease are warned of and left out.
    pub(super) fn parse<'a>(
        subnets_prefix: &str,
        pairs: impl Iterator<Item = Pair<'a>>,
        told: &mut Told,
    ) -> Self {
        let mut records = Self::default();
        for pair in pairs {
            records.put(subnets_prefix, pair, told);
        }
        records
    }

    /// Takes in a key that was written, and returns which it was.
    pub(super) fn put(&mut self, subnets_prefix: &str, pair: Pair<'_>, told: &mut Told) -> Option<LeaseKey> {
        let name = String::from_utf8_lossy(pair.key).into_owned();
        let segment = name.strip_prefix(subnets_prefix)?;
        let key: LeaseKey = match segment.parse() {
            Ok(key) => key,
            Err(error) => {
                told.warn(&name, format!("ignored: {error}"));
                let subnets = subnets_in_flannels_eyes(segment)?;
                self.odd.insert(name, subnets);
                return None;
            }
        };
        let attrs = LeaseAttrs::parse(pair.value);
        match &attrs {
            Ok(_) => told.forget(&name),
            Err(error) => told.warn(&name, format!("ignored: its value is no lease: {error}")),
        }
        let etcd_lease = Some(pair.etcd_lease).filter(|id| *id != 0);
        if self.is_newer(key, pair.mod_revision) {
            return None;
        }
        self.set(key, Some(Record { key, attrs, etcd_lease, mod_revision: pair.mod_revision }));
        Some(key)
    }

    /// Takes out a key that was deleted, and returns which it was.
    pub(super) fn delete(
        &mut self,
        subnets_prefix: &str,
        pair: Pair<'_>,
        told: &mut Told,
    ) -> Option<LeaseKey> {
        let name = String::from_utf8_lossy(pair.key).into_owned();
        told.forget(&name);
        self.odd.remove(&name);
        let key = name.strip_prefix(subnets_prefix)?.parse().ok()?;
        if self.is_newer(key, pair.mod_revision) {
            return None;
        }
        self.set(key, None).map(|record| record.key)
    }

    /// Sets or takes out a record, and returns what was there.
    fn set(&mut self, key: LeaseKey, record: Option<Record>) -> Option<Record> {
        let before = match record {
            Some(record) => self.records.insert(key, record),
            None => self.records.remove(&key),
        };
        if let Changed::At(changed) = &mut self.changed {
            changed.entry(key).or_insert_with(|| before.clone());
        }
        before
    }

    /// Where records have changed since this was last asked, and what they were then; `None`: perhaps everywhere.
    pub(super) fn take_changed(&mut self) -> Option<Before> {
        match std::mem::replace(&mut self.changed, Changed::At(Before::new())) {
            Changed::All => None,
            Changed::At(before) => Some(before),
        }
    }

    /// Whether an event is older than what is known: our own writes are known before the watch tells of what came
    /// before them.
    fn is_newer(&self, key: LeaseKey, revision: i64) -> bool {
        self.records.get(&key).is_some_and(|record| record.mod_revision > revision)
    }

    /// Takes in our own write, which is known before the watch tells.
    pub(super) fn insert(&mut self, lease: &Lease) {
        let Lease { key, attrs, etcd_lease, mod_revision, .. } = lease.clone();
        self.set(key, Some(Record { key, attrs: Ok(attrs), etcd_lease, mod_revision }));
    }

    pub(super) fn get(&self, key: LeaseKey) -> Option<&Record> {
        self.records.get(&key)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Record> {
        self.records.values()
    }

    /// Every subnet of a family that a key names, whatever its value, but those of `own`.
    pub(super) fn taken<F: Family>(&self, own: Option<LeaseKey>) -> impl Iterator<Item = F::Net> {
        let others = self.records.keys().filter(move |key| Some(**key) != own);
        others.chain(self.odd.values()).filter_map(LeaseKey::half::<F>)
    }
}

/// The records count, not who knows of their changes.
impl PartialEq for Records {
    fn eq(&self, other: &Self) -> bool {
        (&self.records, &self.odd) == (&other.records, &other.odd)
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
            warn!(key, reason, "something is wrong with a key in etcd");
            self.reasons.insert(key.to_owned(), reason);
        }
    }

    #[cfg(test)]
    pub(super) fn reasons(&self) -> &BTreeMap<String, String> {
        &self.reasons
    }

    /// Whether nothing was.
    pub(super) fn is_empty(&self) -> bool {
        self.reasons.is_empty()
    }

    pub(super) fn forget(&mut self, key: &str) {
        self.reasons.remove(key);
    }
}

#[cfg(test)]
impl FromIterator<Record> for Records {
    fn from_iter<I: IntoIterator<Item = Record>>(records: I) -> Self {
        let records = records.into_iter().map(|record| (record.key, record)).collect();
        Self { records, ..Self::default() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PREFIX: &str = "/net/subnets/";
    const KEYS: [&str; 6] =
        ["10.5.1.0-24", "10.5.2.0-24", "10.5.2.0-24&fc00::-64", "10.5.0.0-16", "no key", ""];

    /// etcd, as far as a watcher can tell: the latest value of each key, and when it was written.
    type Store = BTreeMap<String, (Vec<u8>, i64, i64)>;

    fn listed(store: &Store) -> Records {
        let pairs = store.iter().map(|(key, (value, etcd_lease, mod_revision))| {
            let (etcd_lease, mod_revision) = (*etcd_lease, *mod_revision);
            Pair { key: key.as_bytes(), value, etcd_lease, mod_revision }
        });
        Records::parse(PREFIX, pairs, &mut Told::default())
    }

    fn value() -> impl Strategy<Value = Vec<u8>> {
        let ip = (1_u8..4).prop_map(|ip| format!(r#"{{"PublicIP":"10.0.0.{ip}"}}"#).into_bytes());
        prop_oneof![4 => ip, 1 => proptest::collection::vec(any::<u8>(), 0..6)]
    }

    proptest! {
        /// Missing events and seeing them comes to the same, and so does seeing some of them twice.
        #[test]
        fn following_the_events_ends_where_a_listing_does(
            events in proptest::collection::vec((0_usize..6, proptest::option::of(value()), 0_i64..3), 0..40),
            start in any::<prop::sample::Index>(), again in any::<prop::sample::Index>(),
        ) {
            let start = start.index(events.len() + 1);
            let (mut store, mut records, mut told) = (Store::new(), Records::default(), Told::default());
            for (n, (key, value, etcd_lease)) in events.iter().enumerate() {
                if n == start {
                    records = listed(&store);
                }
                let (key, mod_revision) = (format!("{PREFIX}{}", KEYS[*key]), n as i64 + 2);
                match value {
                    Some(value) => drop(store.insert(key, (value.clone(), *etcd_lease, mod_revision))),
                    None => drop(store.remove(&key)),
                }
                let seen_from = if n >= start && again.index(3) == 0 { start } else { n };
                for (n, (key, value, etcd_lease)) in events.iter().enumerate().take(n + 1).skip(seen_from) {
                    let (key, mod_revision) = (format!("{PREFIX}{}", KEYS[*key]), n as i64 + 2);
                    let (key, etcd_lease) = (key.as_bytes(), *etcd_lease);
                    let pair = Pair { key, value: value.as_deref().unwrap_or_default(), etcd_lease, mod_revision };
                    match value {
                        Some(_) => records.put(PREFIX, pair, &mut told),
                        None => records.delete(PREFIX, pair, &mut told),
                    };
                }
            }
            if start == events.len() {
                records = listed(&store);
            }
            prop_assert_eq!(records, listed(&store));
        }
    }

    #[test]
    fn an_event_from_before_our_own_write_does_not_undo_it() {
        let mut told = Told::default();
        let key = format!("{PREFIX}10.5.1.0-24");
        let pair = Pair {
            key: key.as_bytes(),
            value: br#"{"PublicIP":"10.0.0.1"}"#,
            etcd_lease: 7,
            mod_revision: 9,
        };
        let ours = Records::parse(PREFIX, [pair].into_iter(), &mut told);
        let mut records = ours.clone();
        let before = Pair { mod_revision: 8, ..pair };
        assert_eq!(records.delete(PREFIX, before, &mut told), None);
        assert_eq!(records.put(PREFIX, Pair { value: b"{}", ..before }, &mut told), None);
        assert_eq!(records, ours);
        assert!(records.delete(PREFIX, Pair { mod_revision: 10, ..pair }, &mut told).is_some());
    }
}
