//! The peers among the records, kept from one snapshot to the next: only records that have changed are looked at, as
//! long as everything else is as before. Pure.

use std::collections::HashSet;

use ipnet::IpNet;

use super::{
    cluster::{PeerRules, peers_of},
    peers::Peers,
    record::{Before, Records, Told},
};
use crate::{
    lease::{Lease, LeaseAttrs, LeaseKey},
    network::NetworkConfig,
};

/// The peers as last published, and what they were made by.
#[derive(Debug, Default)]
pub(super) struct Selection {
    peers: Peers,
    /// The rules that they were made by.
    basis: Option<Basis>,
    /// The subnets of all usable leases.
    subnets: HashSet<IpNet>,
    /// Two leases have one subnet. Who has it is a matter of all of them, so all are looked at for every change.
    contested: bool,
}

/// All that [`PeerRules`] depend on.
#[derive(Debug, PartialEq)]
struct Basis {
    attrs: LeaseAttrs,
    config: NetworkConfig,
    own: LeaseKey,
    networks: Vec<IpNet>,
}

impl Basis {
    fn of(rules: &PeerRules<'_>) -> Self {
        let (v4, v6) = (rules.halves.networks.iter(), rules.halves.networks_v6.iter());
        Self {
            attrs: rules.attrs.clone(),
            config: rules.config.clone(),
            own: rules.halves.own,
            networks: v4.map(|net| (*net).into()).chain(v6.map(|net| (*net).into())).collect(),
        }
    }
}

impl Selection {
    /// The peers by these rules: [`peers_of`] all that are usable, whichever way they are found.
    pub(super) fn update(&mut self, rules: &PeerRules<'_>, records: &mut Records, told: &mut Told) -> Peers {
        let changed = records.take_changed();
        let basis = Some(Basis::of(rules));
        let followed = match changed {
            Some(changed) if self.basis == basis && !self.contested => {
                self.follow(rules, records, changed, told)
            }
            _ => false,
        };
        if !followed {
            self.basis = basis;
            self.select(rules, records, told);
        }
        self.peers.clone()
    }

    fn select(&mut self, rules: &PeerRules<'_>, records: &Records, told: &mut Told) {
        self.subnets = HashSet::new();
        self.contested = false;
        let usable = rules.all_usable(records, told);
        for lease in &usable {
            self.contested |= !self.claim(lease.key);
        }
        self.peers.become_these(peers_of(usable));
    }

    /// Whether the changes could be followed; where not, all must be selected anew.
    fn follow(&mut self, rules: &PeerRules<'_>, records: &Records, changed: Before, told: &mut Told) -> bool {
        let mut come: Vec<Lease> = Vec::new();
        for (key, before) in changed {
            if let Some(lease) = before.and_then(|record| rules.usable(&record, None)) {
                for subnet in subnets(lease.key) {
                    self.subnets.remove(&subnet);
                }
                self.peers.remove(&lease.key);
            }
            come.extend(records.get(key).and_then(|record| rules.usable(record, Some(told))));
        }
        for lease in come {
            if !self.claim(lease.key) {
                return false;
            }
            self.peers.insert(lease);
        }
        true
    }

    /// Notes who has the subnets; `false` where another lease has one of them.
    fn claim(&mut self, key: LeaseKey) -> bool {
        let mut free = true;
        for subnet in subnets(key) {
            free &= self.subnets.insert(subnet);
        }
        free
    }
}

fn subnets(key: LeaseKey) -> impl Iterator<Item = IpNet> {
    key.subnet.map(IpNet::V4).into_iter().chain(key.subnet_v6.map(IpNet::V6))
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, option, prelude::*};

    use super::{super::cluster::Halves, *};
    use crate::{
        lease::VtepData,
        registry::record::{Pair, Record},
    };

    const PREFIX: &str = "/net/subnets/";
    /// One network of both families: subnets of one node under several keys, a neighbour's, our own, one outside.
    const KEYS: [&str; 9] = [
        "10.5.2.0-24&fc00:0:0:2::-64",
        "10.5.2.0-24",
        "0.0.0.0-0&fc00:0:0:2::-64",
        "10.5.3.0-24&fc00:0:0:2::-64",
        "10.5.3.0-24",
        "10.5.4.0-24&fc00:0:0:4::-64",
        "10.5.1.0-24&fc00:0:0:5::-64",
        "10.5.0.0-20",
        "10.9.2.0-24&fc00:0:0:6::-64",
    ];

    fn attrs(node: u8, halves: u8) -> LeaseAttrs {
        let vtep = Some(VtepData { vni: 1, vtep_mac: [2, 0, 0, 0, 0, node] });
        let none = LeaseAttrs::of_type("vxlan");
        let v4 = if halves & 1 == 0 { none } else { none.with_v4([10, 0, 0, node].into(), vtep) };
        let v6 = format!("fd77::{node}").parse().unwrap();
        if halves & 2 == 0 { v4 } else { v4.with_v6(v6, vtep.filter(|_| halves & 4 == 0)) }
    }

    #[derive(Clone, Debug)]
    enum Step {
        /// A key is written or deleted.
        Write(usize, Option<(u8, u8)>),
        /// Two keys at once.
        Move(usize, usize, u8),
        /// A snapshot.
        Publish,
        /// This node has another subnet, or another address.
        Own(bool, u8),
        /// All is listed anew.
        List,
    }

    fn step() -> impl Strategy<Value = Step> {
        let key = 0..KEYS.len();
        prop_oneof![
            6 => (key.clone(), option::of((1_u8..5, 1_u8..8))).prop_map(|(key, said)| Step::Write(key, said)),
            2 => (key.clone(), key, 1_u8..5).prop_map(|(from, to, node)| Step::Move(from, to, node)),
            6 => Just(Step::Publish),
            1 => (any::<bool>(), 1_u8..3).prop_map(|(other, node)| Step::Own(other, node)),
            1 => Just(Step::List),
        ]
    }

    fn write(records: &mut Records, told: &mut Told, key: usize, said: Option<(u8, u8)>, mod_revision: i64) {
        let key = format!("{PREFIX}{}", KEYS[key]);
        let value = said.map(|(node, halves)| attrs(node, halves).to_json()).unwrap_or_default();
        let pair = Pair { key: key.as_bytes(), value: value.as_bytes(), etcd_lease: 0, mod_revision };
        match said {
            Some(_) => records.put(PREFIX, pair, told),
            None => records.delete(PREFIX, pair, told),
        };
    }

    proptest! {
        #[test]
        fn following_the_changes_selects_the_same_peers_as_looking_at_all(steps in vec(step(), 0..60)) {
            let json = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48"}"#;
            let config = NetworkConfig::parse(json).unwrap();
            let networks: Vec<_> = config.v4.iter().map(|pool| pool.network).collect();
            let networks_v6: Vec<_> = config.v6.iter().map(|pool| pool.network).collect();
            let (mut records, mut selection) = (Records::default(), Selection::default());
            let (mut told, mut told_of_all) = (Told::default(), Told::default());
            let (mut own, mut own_attrs) = ("10.5.1.0-24&fc00:0:0:1::-64", attrs(1, 3));
            for (revision, step) in steps.into_iter().enumerate() {
                let revision = revision as i64 + 1;
                match step {
                    Step::Write(key, said) => {
                        write(&mut records, &mut Told::default(), key, said, revision);
                    }
                    Step::Move(from, to, node) => {
                        write(&mut records, &mut Told::default(), from, None, revision);
                        write(&mut records, &mut Told::default(), to, Some((node, 3)), revision);
                    }
                    Step::Own(other, node) => {
                        own = if other { "10.5.4.0-24&fc00:0:0:4::-64" } else { "10.5.1.0-24&fc00:0:0:1::-64" };
                        own_attrs = attrs(node, 3);
                    }
                    Step::List => records = records.iter().cloned().collect::<Vec<Record>>().into_iter().collect(),
                    Step::Publish => {
                        let rules = PeerRules {
                            attrs: &own_attrs,
                            config: &config,
                            halves: Halves {
                                own: own.parse().unwrap(),
                                backend: &config.backend,
                                networks: networks.clone(),
                                networks_v6: networks_v6.clone(),
                            },
                        };
                        let peers = selection.update(&rules, &mut records, &mut told);
                        let all: Peers = peers_of(rules.all_usable(&records, &mut told_of_all)).into_values().collect();
                        prop_assert_eq!(peers, all);
                        prop_assert_eq!(told.reasons(), told_of_all.reasons());
                    }
                }
            }
        }
    }
}
