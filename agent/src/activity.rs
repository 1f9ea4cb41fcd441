//! When somebody was last heard of: from counters that grow, so that the programs need not read a clock. Pure.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// Packets by key, and when they last became more.
#[derive(Clone, Debug)]
pub struct Activity<K> {
    seen: BTreeMap<K, Seen>,
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    known: Instant,
    packets: u64,
    grown: Option<Instant>,
}

impl<K> Default for Activity<K> {
    fn default() -> Self {
        Self { seen: BTreeMap::new() }
    }
}

impl<K: Ord + Clone> Activity<K> {
    /// Takes in how many packets everybody has; who is not among them is forgotten. What was there at the first look
    /// says nothing about when.
    pub fn note(&mut self, packets: impl IntoIterator<Item = (K, u64)>, now: Instant) {
        let earlier = std::mem::take(&mut self.seen);
        let seen = |(key, packets)| {
            let seen = match earlier.get(&key) {
                Some(seen) if seen.packets < packets => Seen { packets, grown: Some(now), ..*seen },
                // Fewer than before: another counter, which began anew.
                Some(seen) => Seen { packets, ..*seen },
                None => Seen { known: now, packets, grown: None },
            };
            (key, seen)
        };
        // At once, which is less work than one by one.
        self.seen = packets.into_iter().map(seen).collect();
    }

    /// How long the key has been known.
    #[must_use]
    pub fn known(&self, key: &K, now: Instant) -> Option<Duration> {
        Some(now.saturating_duration_since(self.seen.get(key)?.known))
    }

    /// How long ago the packets last became more, as far as that was seen.
    #[must_use]
    pub fn last_seen(&self, key: &K, now: Instant) -> Option<Duration> {
        Some(now.saturating_duration_since(self.seen.get(key)?.grown?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_dated_and_nothing_else_is() {
        let mut activity = Activity::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        activity.note([("a", 5), ("b", 0)], at(0));
        assert_eq!(activity.last_seen(&"a", at(1)), None, "counted before anybody looked");
        activity.note([("a", 5), ("b", 1)], at(10));
        assert_eq!(activity.last_seen(&"a", at(11)), None);
        assert_eq!(activity.last_seen(&"b", at(13)), Some(Duration::from_secs(3)));
        activity.note([("b", 0)], at(20));
        assert_eq!(activity.last_seen(&"b", at(23)), Some(Duration::from_secs(13)), "a counter began anew");
        assert_eq!(activity.known(&"b", at(23)), Some(Duration::from_secs(23)));
        assert_eq!(activity.known(&"a", at(23)), None, "gone");
    }
}
