//! The peers' leases as a snapshot that costs little to take and to compare with an earlier one: leases in order, in
//! chunks that snapshots share. Pure.

use std::{collections::BTreeMap, iter, ops::Index, sync::Arc};

use crate::lease::{Lease, LeaseKey};

/// The most leases of a chunk: copying one and looking through the list of all take about the same then, in the largest
/// network.
const CHUNK: usize = 256;

/// Leases by their keys. A clone shares all of them, and a change copies one chunk.
#[derive(Clone, Debug, Default)]
pub struct Peers {
    /// Each sorted, none empty, and each before the next.
    chunks: Vec<Arc<Vec<Lease>>>,
}

/// What another snapshot has at a key.
pub type LeaseChange<'a> = (LeaseKey, Option<&'a Lease>, Option<&'a Lease>);

impl Peers {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.len()).sum()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// The leases, in the order of their keys.
    pub fn values(&self) -> impl Iterator<Item = &Lease> {
        self.chunks.iter().flat_map(|chunk| chunk.iter())
    }

    /// The keys, in order.
    pub fn keys(&self) -> impl Iterator<Item = &LeaseKey> {
        self.values().map(|lease| &lease.key)
    }

    /// The lease at a key.
    #[must_use]
    pub fn get(&self, key: &LeaseKey) -> Option<&Lease> {
        let chunk = self.chunks.get(self.chunk_of(key)?)?;
        chunk.get(find(chunk, key).ok()?)
    }

    /// Whether there is a lease at a key.
    #[must_use]
    pub fn contains_key(&self, key: &LeaseKey) -> bool {
        self.get(key).is_some()
    }

    /// Puts a lease at its key, in the place of another.
    pub fn insert(&mut self, lease: Lease) {
        let Some(at) = self.chunk_of(&lease.key) else {
            return self.chunks.push(Arc::new(vec![lease]));
        };
        let chunk = Arc::make_mut(&mut self.chunks[at]);
        match find(chunk, &lease.key) {
            Ok(found) => chunk[found] = lease,
            Err(place) => chunk.insert(place, lease),
        }
        if chunk.len() > CHUNK {
            let rest = chunk.split_off(CHUNK / 2);
            self.chunks.insert(at + 1, Arc::new(rest));
        }
    }

    /// Takes the lease at a key out.
    pub fn remove(&mut self, key: &LeaseKey) {
        let Some(at) = self.chunk_of(key) else { return };
        let Ok(found) = find(&self.chunks[at], key) else { return };
        let chunk = Arc::make_mut(&mut self.chunks[at]);
        chunk.remove(found);
        if chunk.is_empty() {
            self.chunks.remove(at);
        }
    }

    /// Makes these the leases; what stays the same stays shared.
    pub fn become_these(&mut self, leases: BTreeMap<LeaseKey, Lease>) {
        let leases: Self = leases.into_values().collect();
        let before = self.clone();
        for (key, _, new) in before.changes_to(&leases) {
            match new {
                Some(lease) => self.insert(lease.clone()),
                None => self.remove(&key),
            }
        }
    }

    /// Where `other` differs: the key, what is here and what is there. Chunks that both share are passed over.
    #[must_use]
    pub fn changes_to<'a>(&'a self, other: &'a Self) -> Vec<LeaseChange<'a>> {
        let (ours, theirs) = (self.not_in(other), other.not_in(self));
        let (mut ours, mut theirs) = (ours.into_iter().peekable(), theirs.into_iter().peekable());
        let next = || {
            let first = match (ours.peek(), theirs.peek()) {
                (Some(our), Some(their)) => our.key.min(their.key),
                (Some(one), None) | (None, Some(one)) => one.key,
                (None, None) => return None,
            };
            let is_first = |lease: &&Lease| lease.key == first;
            Some((first, ours.next_if(is_first), theirs.next_if(is_first)))
        };
        iter::from_fn(next).filter(|(_, ours, theirs)| ours != theirs).collect()
    }

    /// The leases of chunks that the other does not share. A key of a shared chunk is in no other of either.
    fn not_in<'a>(&'a self, other: &Self) -> Vec<&'a Lease> {
        let mut shared: Vec<_> = other.chunks.iter().map(Arc::as_ptr).collect();
        shared.sort_unstable();
        let own = |chunk: &&Arc<Vec<Lease>>| shared.binary_search(&Arc::as_ptr(chunk)).is_err();
        self.chunks.iter().filter(own).flat_map(|chunk| chunk.iter()).collect()
    }

    /// The chunk where a key is or would be; `None` where there are none.
    fn chunk_of(&self, key: &LeaseKey) -> Option<usize> {
        let behind =
            self.chunks.partition_point(|chunk| chunk.first().is_some_and(|first| first.key <= *key));
        (!self.is_empty()).then(|| behind.saturating_sub(1))
    }
}

fn find(chunk: &[Lease], key: &LeaseKey) -> Result<usize, usize> {
    chunk.binary_search_by(|lease| lease.key.cmp(key))
}

impl PartialEq for Peers {
    fn eq(&self, other: &Self) -> bool {
        self.changes_to(other).is_empty()
    }
}

/// Of leases in the order of their keys, each at a key of its own.
impl FromIterator<Lease> for Peers {
    fn from_iter<I: IntoIterator<Item = Lease>>(leases: I) -> Self {
        let mut leases = leases.into_iter().peekable();
        let mut chunks = Vec::new();
        while leases.peek().is_some() {
            // Half full, so that those that come are not soon too many.
            chunks.push(Arc::new(leases.by_ref().take(CHUNK / 2).collect()));
        }
        Self { chunks }
    }
}

impl Index<&LeaseKey> for Peers {
    type Output = Lease;

    /// # Panics
    ///
    /// Where there is none at the key.
    fn index(&self, key: &LeaseKey) -> &Lease {
        self.get(key).expect("a lease at the key")
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::lease::LeaseAttrs;

    fn lease(n: u16, revision: i64) -> Lease {
        let [a, b] = n.to_be_bytes();
        let key = LeaseKey::v4(ipnet::Ipv4Net::new([10, a, b, 0].into(), 24).unwrap());
        let attrs = LeaseAttrs::host_gw([192, 168, a, b].into());
        Lease { key, attrs, etcd_lease: None, mod_revision: revision }
    }

    fn all(leases: &BTreeMap<LeaseKey, Lease>) -> Vec<&Lease> {
        leases.values().collect()
    }

    proptest! {
        /// Against a map that shares nothing, with few keys in some stretches and many in others.
        #[test]
        fn it_is_a_map_and_tells_what_has_changed(
            first in 0_u16..600, steps in vec(vec((0_u16..700, proptest::option::of(0_i64..3)), 0..40), 0..12),
        ) {
            let mut model: BTreeMap<_, _> = (0..first).map(|n| lease(n, 0)).map(|lease| (lease.key, lease)).collect();
            let mut peers: Peers = model.values().cloned().collect();
            for step in steps {
                let (before, model_before) = (peers.clone(), model.clone());
                for (n, written) in step {
                    let key = lease(n, 0).key;
                    match written {
                        Some(revision) => {
                            model.insert(key, lease(n, revision));
                            peers.insert(lease(n, revision));
                        }
                        None => {
                            model.remove(&key);
                            peers.remove(&key);
                        }
                    }
                }
                prop_assert_eq!(peers.values().collect::<Vec<_>>(), all(&model));
                prop_assert_eq!(peers.len(), model.len());
                prop_assert!((0..700).all(|n| peers.get(&lease(n, 0).key) == model.get(&lease(n, 0).key)));
                prop_assert_eq!(before.values().collect::<Vec<_>>(), all(&model_before), "a snapshot stays");
                let keys = model_before.keys().chain(model.keys()).copied().collect::<std::collections::BTreeSet<_>>();
                let differ = keys.into_iter().map(|key| (key, model_before.get(&key), model.get(&key)));
                let differ: Vec<_> = differ.filter(|(_, old, new)| old != new).collect();
                prop_assert_eq!(before.changes_to(&peers), differ);
                let mut again = before.clone();
                again.become_these(model.clone());
                prop_assert_eq!(again, peers.clone());
            }
        }
    }

    #[test]
    fn a_change_copies_one_chunk() {
        let before: Peers = (0..10_000).map(|n| lease(n, 0)).collect();
        let mut after = before.clone();
        after.insert(lease(5000, 1));
        assert!(after.not_in(&before).len() <= CHUNK);
        let mut again = before.clone();
        again.become_these(after.values().map(|lease| (lease.key, lease.clone())).collect());
        assert!(again.not_in(&before).len() <= CHUNK, "what is the same is shared");
    }
}
