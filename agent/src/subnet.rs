//! The choice of a subnet for this node: pure.
//!
//! As flannel: random among the first 100 free ones, so that nodes which start together rarely meet. Unlike
//! flannel, a subnet also counts as taken where it overlaps a lease of another length, or a route or an address
//! of this host.

mod guard;

use std::marker::PhantomData;

use rand::{Rng, seq::IndexedRandom as _};

use crate::{family::Family, network::Pool};

pub use self::guard::guards;

/// How many free subnets a node picks from.
const CHOICES: usize = 100;

/// The prefixes of this host that a subnet must keep away from: those that lie inside the network. A route that
/// covers the whole network (the default route, or an operator's route to all of it) would leave nothing to pick,
/// and the subnets' own routes are more specific.
#[must_use]
pub fn conflicting<F: Family>(network: F::Net, occupied: &[F::Net]) -> Vec<F::Net> {
    let inside = |prefix: &F::Net| F::covers(network, *prefix) && *prefix != network;
    occupied.iter().map(|prefix| F::trunc(*prefix)).filter(inside).collect()
}

/// The first of `occupied` that the subnet overlaps.
#[must_use]
pub fn conflict<F: Family>(network: F::Net, subnet: F::Net, occupied: &[F::Net]) -> Option<F::Net> {
    conflicting::<F>(network, occupied).into_iter().find(|prefix| F::overlap(*prefix, subnet))
}

/// Picks a subnet that overlaps none of `taken` (all leases) and none of `occupied` (this host's prefixes, see
/// [`conflicting`]); `None` where there is none left.
pub fn pick<F: Family>(
    pool: &Pool<F>,
    taken: impl IntoIterator<Item = F::Net>,
    occupied: &[F::Net],
    rng: &mut impl Rng,
) -> Option<F::Net> {
    let taken = taken.into_iter().chain(conflicting::<F>(pool.network, occupied)).collect();
    free(pool, taken).take(CHOICES).collect::<Vec<_>>().choose(rng).copied()
}

/// The free subnets, in order of their address.
fn free<F: Family>(pool: &Pool<F>, taken: Vec<F::Net>) -> impl Iterator<Item = F::Net> {
    let (len, size) = (pool.subnet_len, pool.subnet_size());
    let mut taken = merge::<F>(taken.into_iter()).into_iter().peekable();
    // `None`: past the last address that there is.
    let mut next = Some(F::number(pool.subnet_min));
    let last = F::number(pool.subnet_max);
    std::iter::from_fn(move || {
        while let Some(base) = next.filter(|base| *base <= last) {
            while taken.next_if(|range| range.1 < base).is_some() {}
            match taken.peek() {
                Some(range) if range.0 <= base + (size - 1) => {
                    next = (range.1 - range.1 % size).checked_add(size);
                }
                _ => {
                    next = base.checked_add(size);
                    return F::net(F::of_number(base)?, len);
                }
            }
        }
        None
    })
}

/// All addresses of many prefixes.
#[derive(Debug)]
pub(crate) struct Ranges<F: Family> {
    merged: Vec<(u128, u128)>,
    family: PhantomData<F>,
}

impl<F: Family> Ranges<F> {
    /// Those of these.
    pub(crate) fn of(prefixes: impl Iterator<Item = F::Net>) -> Self {
        Self { merged: merge::<F>(prefixes), family: PhantomData }
    }

    /// Whether one of them is in this prefix.
    pub(crate) fn overlap(&self, prefix: F::Net) -> bool {
        let (first, last) = range::<F>(prefix);
        let at = self.merged.partition_point(|range| range.1 < first);
        self.merged.get(at).is_some_and(|range| range.0 <= last)
    }
}

/// First and last address.
fn range<F: Family>(prefix: F::Net) -> (u128, u128) {
    let first = F::number(F::base(prefix));
    let host_bits = u32::from(F::BITS - F::prefix_len(prefix));
    (first, first + u128::MAX.checked_shr(128 - host_bits).unwrap_or(0))
}

/// First and last addresses, in order, overlapping ones joined.
fn merge<F: Family>(prefixes: impl Iterator<Item = F::Net>) -> Vec<(u128, u128)> {
    let mut ranges: Vec<_> = prefixes.map(range::<F>).collect();
    ranges.sort_unstable();
    let mut merged: Vec<(u128, u128)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(before) if first <= before.1 => before.1 = before.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use ipnet::{Ipv4Net, Ipv6Net};
    use proptest::prelude::*;
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;
    use crate::{
        family::{V4, V6},
        network::NetworkConfig,
    };

    fn config(json: &str) -> Pool<V4> {
        NetworkConfig::parse(json).unwrap().v4.unwrap()
    }

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn rng() -> StdRng {
        StdRng::seed_from_u64(1)
    }

    #[test]
    fn the_pick_is_among_the_first_hundred_free_ones() {
        let config = config(r#"{"Network":"10.0.0.0/8"}"#);
        let mut rng = rng();
        let picks: BTreeSet<_> = (0..5000).filter_map(|_| pick(&config, [], &[], &mut rng)).collect();
        assert_eq!(picks.len(), 100);
        assert_eq!(picks.first(), Some(&net("10.0.1.0/24")));
        assert_eq!(picks.last(), Some(&net("10.0.100.0/24")));
    }

    #[test]
    fn a_host_inside_the_network_keeps_its_own_prefix() {
        let config =
            config(r#"{"Network":"192.168.0.0/16","SubnetMin":"192.168.162.0","SubnetMax":"192.168.164.0"}"#);
        let occupied =
            [net("0.0.0.0/0"), net("192.168.0.0/16"), net("192.168.163.10/24"), net("192.168.164.9/32")];
        let picks: BTreeSet<_> = (0..100).filter_map(|_| pick(&config, [], &occupied, &mut rng())).collect();
        assert_eq!(picks, BTreeSet::from([net("192.168.162.0/24")]));
    }

    #[test]
    fn a_full_network_has_nothing_to_pick() {
        let config = config(r#"{"Network":"10.5.0.0/28"}"#);
        let taken = ["10.5.0.4/30", "10.5.0.8/30", "10.5.0.12/30"].map(net);
        assert_eq!(pick(&config, taken, &[], &mut rng()), None);
        assert_eq!(pick(&config, taken[..2].to_vec(), &[], &mut rng()), Some(taken[2]));
        assert_eq!(pick(&config, [net("10.0.0.0/8")], &[], &mut rng()), None);
    }

    #[test]
    fn a_lease_of_another_length_is_not_overlapped() {
        let config = config(r#"{"Network":"10.5.0.0/16","SubnetMin":"10.5.16.0","SubnetMax":"10.5.35.0"}"#);
        let taken = [net("10.5.16.0/20"), net("10.5.33.128/26"), net("10.5.34.0/23")];
        assert_eq!(pick(&config, taken, &[], &mut rng()), Some(net("10.5.32.0/24")));
    }

    #[test]
    fn ipv6_is_picked_by_the_same_rules() {
        let json = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/56"}"#;
        let pool = NetworkConfig::parse(json).unwrap().v6.unwrap();
        let net = |text: &str| text.parse::<Ipv6Net>().unwrap();
        let picks: BTreeSet<_> = (0..5000).filter_map(|_| pick(&pool, [], &[], &mut rand::rng())).collect();
        assert_eq!(picks.len(), 100);
        assert_eq!(picks.first(), Some(&net("fc00:0:0:1::/64")));
        let taken = [net("fc00:0:0:80::/57"), net("fc00:0:0:40::/58"), net("fc00::/59")];
        let occupied = [net("fc00:0:0:21::1/128"), net("::/0"), net("fc00:0:0:22::/63")];
        let left: BTreeSet<_> =
            (0..5000).filter_map(|_| pick(&pool, taken, &occupied, &mut rand::rng())).collect();
        assert_eq!(left.len(), 0x20 - 3);
        assert!(
            left.iter().all(|subnet| !taken.iter().chain(&occupied[2..]).any(|it| V6::overlap(*it, *subnet)))
        );
    }

    fn prefix() -> impl Strategy<Value = Ipv4Net> {
        (0_u32..1 << 16, 14_u8..=32)
            .prop_map(|(low, len)| Ipv4Net::new((0x0a05_0000 + low).into(), len).unwrap())
    }

    proptest! {
        #[test]
        fn a_pick_overlaps_nothing_and_nothing_left_means_nothing_left(
            taken in proptest::collection::vec(prefix(), 0..40),
            occupied in proptest::collection::vec(prefix(), 0..5),
            subnet_len in 18_u8..=30, seed in any::<u64>(),
        ) {
            let config = config(&format!(r#"{{"Network":"10.5.0.0/16","SubnetLen":{subnet_len}}}"#));
            let conflicts = conflicting::<V4>(config.network, &occupied);
            let clear = |subnet: &Ipv4Net| !taken.iter().chain(&conflicts).any(|other| V4::overlap(*other, *subnet));
            match pick(&config, taken.clone(), &occupied, &mut StdRng::seed_from_u64(seed)) {
                Some(subnet) => prop_assert!(config.allows(subnet) && clear(&subnet)),
                None => prop_assert!(!config.network.subnets(subnet_len).unwrap().any(|subnet| config.allows(subnet) && clear(&subnet))),
            }
        }

        #[test]
        fn the_free_ones_are_all_and_only_those_that_are_clear(taken in proptest::collection::vec(prefix(), 0..20)) {
            let config = config(r#"{"Network":"10.5.0.0/16","SubnetLen":22}"#);
            let found: Vec<_> = free(&config, taken.clone()).collect();
            let expected: Vec<_> = config.network.subnets(22).unwrap()
                .filter(|subnet| config.allows(*subnet) && !taken.iter().any(|other| V4::overlap(*other, *subnet)))
                .collect();
            prop_assert_eq!(found, expected);
        }
    }
}
