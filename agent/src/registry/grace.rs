//! Peers of which a replaced or restored etcd does not know yet. Every node has to find out and put its lease back, while
//! its containers are where they were: until then it stays a peer, for a time. Pure.

use std::{collections::HashSet, net::Ipv4Addr, net::Ipv6Addr, time::Duration};

use tokio::time::Instant;

use super::{cluster::PeerRules, peers::Peers, record::Records};
use crate::{
    family::{V4, V6},
    lease::Lease,
    subnet::Ranges,
};

/// How long: until a node has noticed that its connection is dead (15 s), has waited for its next try (10 s at most) and
/// has come to an endpoint that answers.
pub const GRACE: Duration = Duration::from_secs(45);

/// The peers that are still awaited.
#[derive(Debug)]
pub(super) struct Grace {
    awaited: Peers,
    until: Instant,
}

impl Grace {
    /// Begins with the peers that were in force.
    pub(super) fn begin(peers: Peers, now: Instant) -> Self {
        Self { awaited: peers, until: now + GRACE }
    }

    /// Begins again: we could not hear whether anybody had come back.
    pub(super) fn begin_again(&mut self, now: Instant) {
        self.until = now + GRACE;
    }

    /// When those that have not come back are peers no longer.
    pub(super) fn until(&self) -> Instant {
        self.until
    }

    /// Whether all have come back, or their places are taken.
    pub(super) fn is_over(&self) -> bool {
        self.awaited.is_empty()
    }

    /// Adds to the peers, as the records tell them, those that are still awaited. Nobody is awaited any longer of whose
    /// node or subnet the records tell, be it somewhere else.
    pub(super) fn complete(&mut self, mut peers: Peers, rules: &PeerRules<'_>, records: &Records) -> Peers {
        let known = Known::of(records);
        let come: Vec<_> = self
            .awaited
            .values()
            .filter(|lease| {
                known.tells_of(lease) || rules.halves.of(lease.key, &lease.attrs).0 != Some(lease.key)
            })
            .map(|lease| lease.key)
            .collect();
        come.iter().for_each(|key| self.awaited.remove(key));
        self.awaited.values().for_each(|lease| peers.insert(lease.clone()));
        peers
    }
}

/// Subnets and nodes of all records.
struct Known {
    v4: Ranges<V4>,
    v6: Ranges<V6>,
    addresses: HashSet<Ipv4Addr>,
    addresses_v6: HashSet<Ipv6Addr>,
    /// Those of nodes without IPv4.
    addresses_v6_alone: HashSet<Ipv6Addr>,
}

impl Known {
    fn of(records: &Records) -> Self {
        let attrs = || records.iter().filter_map(|record| record.attrs.as_ref().ok());
        let alone = attrs().filter(|attrs| attrs.public_ip.is_none());
        Self {
            v4: Ranges::of(records.taken::<V4>(None)),
            v6: Ranges::of(records.taken::<V6>(None)),
            addresses: attrs().filter_map(|attrs| attrs.public_ip).collect(),
            addresses_v6: attrs().filter_map(|attrs| attrs.public_ipv6).collect(),
            addresses_v6_alone: alone.filter_map(|attrs| attrs.public_ipv6).collect(),
        }
    }

    fn tells_of(&self, lease: &Lease) -> bool {
        let taken = lease.key.half::<V4>().is_some_and(|subnet| self.v4.overlap(subnet))
            || lease.key.half::<V6>().is_some_and(|subnet| self.v6.overlap(subnet));
        // As `LeaseAttrs::is_of_node_of`, of all records at once.
        let same_v6 = |addresses: &HashSet<_>| {
            lease.attrs.public_ipv6.is_some_and(|address| addresses.contains(&address))
        };
        taken
            || match lease.attrs.public_ip {
                Some(address) => self.addresses.contains(&address) || same_v6(&self.addresses_v6_alone),
                None => same_v6(&self.addresses_v6),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{cluster::Halves, record::Record},
        *,
    };
    use crate::{
        lease::{LeaseAttrs, LeaseKey},
        network::NetworkConfig,
    };

    const CONFIG: &str = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{"Type":"host-gw"}}"#;

    /// Node `n`, and its lease at a key.
    fn lease(n: u8, key: &str) -> Lease {
        let attrs =
            LeaseAttrs::host_gw([10, 0, 0, n].into()).with_v6(format!("fd77::{n}").parse().unwrap(), None);
        Lease { key: key.parse().unwrap(), attrs, etcd_lease: Some(1), mod_revision: 9 }
    }

    fn v6_alone(n: u8, key: &str) -> Lease {
        let lease = lease(n, key);
        Lease { attrs: LeaseAttrs { public_ip: None, ..lease.attrs }, ..lease }
    }

    fn record(lease: &Lease) -> Record {
        Record {
            key: lease.key,
            attrs: Ok(lease.attrs.clone()),
            etcd_lease: lease.etcd_lease,
            mod_revision: 1,
        }
    }

    /// Who of these is still a peer when the records tell of those.
    fn left(grace: &mut Grace, own: &str, records: &[Lease]) -> Vec<String> {
        let config = NetworkConfig::parse(CONFIG).unwrap();
        let own_lease = lease(1, own);
        let halves = Halves {
            own: own_lease.key,
            backend: &config.backend,
            networks: config.v4.iter().map(|pool| pool.network).collect(),
            networks_v6: config.v6.iter().map(|pool| pool.network).collect(),
        };
        let rules = PeerRules { attrs: &own_lease.attrs, config: &config, halves };
        let records: Records = records.iter().map(record).collect();
        let peers = grace.complete(Peers::default(), &rules, &records);
        peers.keys().map(LeaseKey::to_string).collect()
    }

    #[test]
    fn a_peer_is_awaited_until_its_node_or_its_subnet_shows_anywhere() {
        const OWN: &str = "10.5.1.0-24&fc00:0:0:1::-64";
        const PEER: &str = "10.5.2.0-24&fc00:0:0:2::-64";
        for (what, own, records, stays) in [
            ("an empty store", OWN, vec![], true),
            ("others", OWN, vec![lease(3, "10.5.3.0-24&fc00:0:0:3::-64")], true),
            ("it is back", OWN, vec![lease(2, PEER)], false),
            ("it is elsewhere", OWN, vec![lease(2, "10.5.3.0-24&fc00:0:0:3::-64")], false),
            ("it has lost its IPv4", OWN, vec![v6_alone(2, "0.0.0.0-0&fc00:0:0:3::-64")], false),
            ("its subnet is another's", OWN, vec![lease(3, "10.5.2.0-24&fc00:0:0:3::-64")], false),
            ("a part of it is", OWN, vec![lease(3, "10.5.2.64-26")], false),
            ("its IPv6 subnet is", OWN, vec![v6_alone(3, "0.0.0.0-0&fc00:0:0:2::-64")], false),
            ("its subnet is ours", "10.5.2.0-24&fc00:0:0:1::-64", vec![], false),
        ] {
            let mut grace = Grace::begin([lease(2, PEER)].into_iter().collect(), Instant::now());
            let found = left(&mut grace, own, &records);
            assert_eq!(found, if stays { vec![PEER.to_owned()] } else { vec![] }, "{what}");
            assert_eq!(grace.is_over(), !stays, "{what}");
            // Who was there once and goes again has gone.
            assert_eq!(left(&mut grace, OWN, &[]).is_empty(), !stays, "{what}");
        }
    }

    #[test]
    fn a_peer_without_ipv4_is_known_by_its_ipv6_address() {
        let peer =
            || Grace::begin([v6_alone(2, "0.0.0.0-0&fc00:0:0:2::-64")].into_iter().collect(), Instant::now());
        let own = "0.0.0.0-0&fc00:0:0:1::-64";
        assert_eq!(left(&mut peer(), own, &[lease(3, "10.5.3.0-24")]).len(), 1);
        assert!(left(&mut peer(), own, &[lease(2, "10.5.3.0-24")]).is_empty());
    }

    #[test]
    fn the_grace_begins_again_when_nobody_could_be_heard() {
        let now = Instant::now();
        let mut grace = Grace::begin(Peers::default(), now);
        assert_eq!(grace.until(), now + GRACE);
        grace.begin_again(now + GRACE / 2);
        assert_eq!(grace.until(), now + GRACE + GRACE / 2);
    }
}
