//! The choice of a subnet for this node: pure.
//!
//! As flannel: random among the first 100 free ones, so that nodes which start together rarely meet. Unlike
//! flannel, a subnet also counts as taken where it overlaps a lease of another length, or a route or an address
//! of this host.

mod guard;

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use rand::{Rng, seq::IndexedRandom as _};

use crate::network::NetworkConfig;

pub use self::guard::guards;

/// How many free subnets a node picks from.
const CHOICES: usize = 100;

/// Whether two prefixes share an address.
#[must_use]
pub fn overlap(a: Ipv4Net, b: Ipv4Net) -> bool {
    a.contains(&b) || b.contains(&a)
}

/// The prefixes of this host that a subnet must keep away from: those that lie inside the network. A route that
/// covers the whole network (the default route, or an operator's route to all of it) would leave nothing to pick,
/// and the subnets' own routes are more specific.
#[must_use]
pub fn conflicting(network: Ipv4Net, occupied: &[Ipv4Net]) -> Vec<Ipv4Net> {
    let inside = |prefix: &&Ipv4Net| network.contains(*prefix) && **prefix != network;
    occupied.iter().map(Ipv4Net::trunc).collect::<Vec<_>>().iter().filter(inside).copied().collect()
}

/// The first of `occupied` that the subnet overlaps.
#[must_use]
pub fn conflict(network: Ipv4Net, subnet: Ipv4Net, occupied: &[Ipv4Net]) -> Option<Ipv4Net> {
    conflicting(network, occupied).into_iter().find(|prefix| overlap(*prefix, subnet))
}

/// Picks a subnet that overlaps none of `taken` (all leases) and none of `occupied` (this host's prefixes, see
/// [`conflicting`]); `None` where there is none left.
pub fn pick(
    config: &NetworkConfig,
    taken: impl IntoIterator<Item = Ipv4Net>,
    occupied: &[Ipv4Net],
    rng: &mut impl Rng,
) -> Option<Ipv4Net> {
    let taken = taken.into_iter().chain(conflicting(config.network, occupied)).collect();
    free(config, taken).take(CHOICES).collect::<Vec<_>>().choose(rng).copied()
}

/// The free subnets, in order of their address.
fn free(config: &NetworkConfig, taken: Vec<Ipv4Net>) -> impl Iterator<Item = Ipv4Net> {
    let len = config.subnet_len;
    // 64 bits, so that the step after 255.255.255.255 is a number as well.
    let size = 1_u64 << (32 - len);
    let mut taken = merge(taken).into_iter().peekable();
    let mut base = number(config.subnet_min);
    let last = number(config.subnet_max);
    std::iter::from_fn(move || {
        while base <= last {
            while taken.next_if(|range| range.1 < base).is_some() {}
            let end = base + size - 1;
            match taken.peek() {
                Some(range) if range.0 <= end => base = (range.1 / size + 1) * size,
                _ => {
                    let subnet =
                        u32::try_from(base).ok().and_then(|base| Ipv4Net::new(base.into(), len).ok());
                    base += size;
                    return subnet;
                }
            }
        }
        None
    })
}

/// First and last addresses, in order, overlapping ones joined.
fn merge(prefixes: Vec<Ipv4Net>) -> Vec<(u64, u64)> {
    let mut ranges: Vec<_> =
        prefixes.iter().map(|prefix| (number(prefix.network()), number(prefix.broadcast()))).collect();
    ranges.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(before) if first <= before.1 => before.1 = before.1.max(last),
            _ => merged.push((first, last)),
        }
    }
    merged
}

fn number(address: Ipv4Addr) -> u64 {
    u32::from(address).into()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;

    fn config(json: &str) -> NetworkConfig {
        NetworkConfig::parse(json).unwrap()
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
            let conflicts = conflicting(config.network, &occupied);
            let clear = |subnet: &Ipv4Net| !taken.iter().chain(&conflicts).any(|other| overlap(*other, *subnet));
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
                .filter(|subnet| config.allows(*subnet) && !taken.iter().any(|other| overlap(*other, *subnet)))
                .collect();
            prop_assert_eq!(found, expected);
        }
    }
}
