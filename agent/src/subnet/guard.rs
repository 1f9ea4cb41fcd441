//! Which keys in etcd must not exist for a subnet to be free: the condition of the transaction that takes it.
//!
//! flannel asks only for the subnet's own key to be absent, so two nodes with different `SubnetLen` in their
//! configs can both succeed, as can a dual-stack node and another. Asking for ranges of keys, in one transaction,
//! leaves no gap between the look and the leap.

use ipnet::Ipv4Net;

/// Beginnings of key segments: the key of a lease inside `network`, of /30 or shorter, begins with one of them if
/// and only if its subnet overlaps `subnet`.
///
/// They are 90 at most (etcd takes 128 comparisons in a transaction). For subnets that no one gives to a node (/17,
/// /9 and above) the longer ones inside are left out: there, two configs of different `SubnetLen` are kept apart by
/// the look before the leap only.
#[must_use]
pub fn guards(network: Ipv4Net, subnet: Ipv4Net) -> Vec<String> {
    let wider = (network.prefix_len()..subnet.prefix_len()).filter_map(|len| {
        let wider = Ipv4Net::new(subnet.network(), len).ok()?;
        Some(format!("{}-{len}", wider.network()))
    });
    inside(subnet).into_iter().chain(wider).collect()
}

/// Keys of subnets inside this one, itself included.
fn inside(subnet: Ipv4Net) -> Vec<String> {
    let [a, b, c, d] = subnet.network().octets();
    let octets = |first: u8, free_bits: u8| (u16::from(first)..).take(1 << free_bits);
    match subnet.prefix_len() {
        len @ 25..=30 => octets(d, 32 - len).step_by(4).map(|d| format!("{a}.{b}.{c}.{d}-")).collect(),
        len @ 18..=24 => octets(c, 24 - len).map(|c| format!("{a}.{b}.{c}.")).collect(),
        len @ 10..=16 => octets(b, 16 - len).map(|b| format!("{a}.{b}.")).collect(),
        len => vec![format!("{}-{len}", subnet.network())],
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        family::{Family as _, V4},
        lease::LeaseKey,
    };

    #[test]
    fn a_usual_subnet_has_a_handful_of_guards() {
        let guards = guards("10.5.0.0/16".parse().unwrap(), "10.5.34.0/24".parse().unwrap());
        assert_eq!(guards[..3], ["10.5.34.", "10.5.0.0-16", "10.5.0.0-17"]);
        assert_eq!(guards.last().unwrap(), "10.5.34.0-23");
        assert_eq!(guards.len(), 9);
    }

    proptest! {
        #[test]
        fn a_key_meets_a_guard_if_and_only_if_the_subnets_overlap(
            network_len in 8_u8..=22, more in 2_u8..=22, low in any::<u32>(), other_low in any::<u32>(),
            near in any::<bool>(), other_len in 8_u8..=30,
        ) {
            let network = Ipv4Net::new(std::net::Ipv4Addr::new(10, 5, 0, 0), network_len).unwrap().trunc();
            let at = |low: u32, len: u8| {
                let bits = u32::from(network.network()) | low & u32::from(network.hostmask());
                Ipv4Net::new(bits.into(), len.clamp(network_len, 30)).unwrap().trunc()
            };
            let subnet = at(low, network_len.saturating_add(more));
            prop_assume!(subnet.prefix_len() != 17 && subnet.prefix_len() != 9);
            let other = at(if near { low ^ (other_low % 1024) } else { other_low }, other_len);
            let guards = guards(network, subnet);
            prop_assert!(guards.len() <= 90, "{}", guards.len());
            let key = LeaseKey::v4(other).to_string();
            prop_assert_eq!(guards.iter().any(|guard| key.starts_with(guard)), V4::overlap(subnet, other), "{} {}", subnet, other);
        }
    }
}
