//! The snapshot that is published of the leases, wherever they come from: our lease, our peers, and how sure they are.

use std::{
    collections::{BTreeMap, HashMap},
    time::Instant,
};

use ipnet::{Ipv4Net, Ipv6Net};

use super::{
    peers::Peers,
    record::{Record, Records, Told},
};
use crate::{
    family::{Family, V4, V6},
    lease::{Lease, LeaseAttrs, LeaseKey},
    network::{Backend, NetworkConfig, quoted},
};

/// All that this node knows of the cluster's leases.
#[derive(Clone, Debug, PartialEq)]
pub struct Cluster {
    /// The lease of this node.
    pub own: Own,
    /// Leases of other nodes, with those halves that this node can use; never one that overlaps our own subnets. No
    /// subnet is in two of them. Empty and meaningless until [`Self::is_listed`].
    pub peers: Peers,
    /// etcd's revision, or Kubernetes' resourceVersion, of the newest news; 0 until the first listing.
    pub revision: i64,
    /// Whether the leases are being watched. While it is not, all else here is as it last was, and stays in force.
    pub connected: bool,
    /// Since when it is not.
    pub unheard: Option<Instant>,
    /// When etcd last confirmed the lease; `None` for a reservation and in
    /// Kubernetes, where it needs none.
    pub renewed: Option<Instant>,
    /// Whether the network config in etcd is still the one that this agent runs with.
    pub config: ConfigState,
}

impl Cluster {
    /// Whether the peers are known at all: before that, an empty map must not remove any of them.
    #[must_use]
    pub fn is_listed(&self) -> bool {
        self.revision > 0
    }
}

/// The lease of this node.
#[derive(Clone, Debug, PartialEq)]
pub enum Own {
    /// Held. Another subnet than before means that another node has that one now: subnet.env must be rewritten.
    Held(Lease),
    /// Lost, and not yet replaced; the keeper goes on trying. Containers keep running.
    Lost {
        /// The subnets that this node had.
        key: LeaseKey,
        /// What happened, for people.
        reason: String,
    },
}

/// How the network config in etcd compares with the one in force.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ConfigState {
    /// The same, or different only in what needs no restart.
    #[default]
    Current,
    /// Different in these keys, which take a restart of the agent.
    NeedsRestart(Vec<&'static str>),
    /// Deleted; the agent goes on with what it has.
    Missing,
    /// Not valid, for this reason; the agent goes on with what it has.
    Invalid(String),
}

/// Who counts as a peer.
pub(super) struct PeerRules<'a> {
    /// What this node publishes.
    pub(super) attrs: &'a LeaseAttrs,
    /// The network config in force.
    pub(super) config: &'a NetworkConfig,
    pub(super) halves: Halves<'a>,
}

/// Which halves of other nodes' leases this node can use.
pub(crate) struct Halves<'a> {
    /// The subnets of this node.
    pub(crate) own: LeaseKey,
    pub(crate) backend: &'a Backend,
    /// The network in force, and the one that the config now has where that is another; none where there is no IPv4.
    pub(crate) networks: Vec<Ipv4Net>,
    /// The same of IPv6.
    pub(crate) networks_v6: Vec<Ipv6Net>,
}

impl PeerRules<'_> {
    /// The leases of all other nodes with those halves that this node can use, whoever else may have them.
    pub(super) fn all_usable(&self, records: &Records, told: &mut Told) -> Vec<Lease> {
        records.iter().filter_map(|record| self.usable(record, Some(told))).collect()
    }

    /// A record's lease among those; `told` of what is wrong with it.
    pub(super) fn usable(&self, record: &Record, told: Option<&mut Told>) -> Option<Lease> {
        if record.is_of(self.attrs) {
            return None;
        }
        // Values that do not parse were warned of when they were read.
        let lease = record.lease()?;
        let (key, refused) = self.halves.of(lease.key, &lease.attrs);
        if let Some(told) = told {
            self.tell(record, &refused, told);
        }
        Some(Lease { key: key?, ..lease })
    }

    fn tell(&self, record: &Record, refused: &[String], told: &mut Told) {
        let name = || record.key.to_string();
        if !refused.is_empty() {
            return told.warn(&name(), format!("ignored: {}", refused.join("; ")));
        }
        let other_len = |len: &'static str, there: Option<u8>, here: Option<u8>| {
            let (there, here) = there.zip(here).filter(|(there, here)| there != here)?;
            Some(format!("a node runs with another network config: {len} is {there} there, and {here} here"))
        };
        let (v4, v6) = (record.key.subnet, record.key.subnet_v6);
        let (pool, pool_v6) = (&self.config.v4, &self.config.v6);
        let v4 = other_len("SubnetLen", v4.map(|it| it.prefix_len()), pool.map(|pool| pool.subnet_len));
        let v6 =
            other_len("IPv6SubnetLen", v6.map(|it| it.prefix_len()), pool_v6.map(|pool| pool.subnet_len));
        match v4.or(v6) {
            Some(reason) => told.warn(&name(), reason),
            None if told.is_empty() => {}
            None => told.forget(&name()),
        }
    }
}

impl Halves<'_> {
    /// The key with those halves of another node's lease that this node can use, and why it cannot use the others.
    /// Each family counts for itself: what is wrong in one is no reason to lose the other.
    pub(crate) fn of(&self, key: LeaseKey, attrs: &LeaseAttrs) -> (Option<LeaseKey>, Vec<String>) {
        if *attrs.backend_type != *self.backend.lease_type() {
            let ours = self.backend.lease_type();
            let theirs = quoted(&attrs.backend_type);
            return (None, vec![format!("its BackendType is {theirs}, this cluster's is {ours:?}")]);
        }
        let v4 = self.half::<V4>(key, attrs, &self.networks);
        let v6 = self.half::<V6>(key, attrs, &self.networks_v6);
        let mut refused = Vec::new();
        let mut half_of = |half: Option<Result<(), String>>| match half {
            Some(Ok(())) => true,
            Some(Err(reason)) => {
                refused.push(reason);
                false
            }
            None => false,
        };
        let subnet = key.subnet.filter(|_| half_of(v4));
        let subnet_v6 = key.subnet_v6.filter(|_| half_of(v6));
        let left = (subnet.is_some() || subnet_v6.is_some()).then_some(LeaseKey { subnet, subnet_v6 });
        if left.is_none() && refused.is_empty() {
            refused.push(format!("its subnet {} is of another family than this node's", key.subnets()));
        }
        (left, refused)
    }

    /// Whether a half can be used; `None` where one of both nodes does not have it.
    fn half<F: Family>(
        &self,
        key: LeaseKey,
        attrs: &LeaseAttrs,
        networks: &[F::Net],
    ) -> Option<Result<(), String>> {
        let (subnet, network) = (key.half::<F>()?, networks.first()?);
        let refuse = |reason: String| Some(Err(reason));
        if !networks.iter().any(|network| F::covers(*network, subnet)) {
            return refuse(format!("its subnet {subnet} is outside of the network {network}"));
        }
        if let Some(own) = self.own.half::<F>().filter(|own| F::overlap(subnet, *own)) {
            return refuse(format!("its subnet {subnet} overlaps this node's {own}"));
        }
        if attrs.public::<F>().is_none() {
            return refuse(format!("its subnet {subnet} has no public {} address", F::NAME));
        }
        let data = match self.backend {
            Backend::Vxlan(_) => attrs.vtep_of_family::<F>().map(drop),
            Backend::Wireguard(_) => attrs.wireguard::<F>().map(drop),
            Backend::HostGw | Backend::Alloc => Ok(()),
        };
        match data {
            Err(error) => refuse(error.to_string()),
            Ok(()) => Some(Ok(())),
        }
    }
}

/// The peers among usable leases.
pub(super) fn peers_of(usable: Vec<Lease>) -> BTreeMap<LeaseKey, Lease> {
    let peers = newest::<V6>(newest::<V4>(usable));
    peers.into_iter().map(|lease| (lease.key, lease)).collect()
}

/// Leaves each subnet of a family to the lease that was written last: one may stand under two keys, IPv4 and dual-stack,
/// and flannel's nodes do not rule out that two of them pick one IPv6 subnet.
fn newest<F: Family>(leases: Vec<Lease>) -> Vec<Lease> {
    let mut newest: HashMap<F::Net, i64> = HashMap::with_capacity(leases.len());
    for lease in &leases {
        if let Some(subnet) = lease.key.half::<F>() {
            let written = newest.entry(subnet).or_insert(lease.mod_revision);
            *written = lease.mod_revision.max(*written);
        }
    }
    let keep = |lease: Lease| {
        let written = lease.key.half::<F>().and_then(|subnet| newest.get(&subnet));
        let key = if written.is_none_or(|written| *written == lease.mod_revision) {
            Some(lease.key)
        } else {
            lease.key.without::<F>()
        };
        key.map(|key| Lease { key, ..lease })
    };
    leases.into_iter().filter_map(keep).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::lease::VtepData;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn record(key: &str, attrs: &str, mod_revision: i64) -> Record {
        let attrs = LeaseAttrs::parse(attrs.as_bytes());
        Record { key: key.parse().unwrap(), attrs, etcd_lease: None, mod_revision }
    }

    fn vxlan(ip: &str) -> String {
        LeaseAttrs::vxlan(ip.parse().unwrap(), VtepData { vni: 1, vtep_mac: [2, 0, 0, 0, 0, 1] }).to_json()
    }

    fn config(json: &str) -> NetworkConfig {
        NetworkConfig::parse(json).unwrap()
    }

    fn rules<'a>(config: &'a NetworkConfig, attrs: &'a LeaseAttrs, own: &str) -> PeerRules<'a> {
        let networks = config.v4.iter().map(|pool| pool.network).collect();
        let networks_v6 = config.v6.iter().map(|pool| pool.network).collect();
        let halves = Halves { own: own.parse().unwrap(), backend: &config.backend, networks, networks_v6 };
        PeerRules { attrs, config, halves }
    }

    impl PeerRules<'_> {
        fn peers(&self, records: &Records, told: &mut Told) -> BTreeMap<LeaseKey, Lease> {
            peers_of(self.all_usable(records, told))
        }
    }

    fn own() -> LeaseAttrs {
        LeaseAttrs::host_gw([10, 0, 0, 1].into())
    }

    #[test]
    fn every_refusal_has_its_reason_and_another_length_is_only_told_of() {
        let (config, own) = (config(r#"{"Network":"10.5.0.0/16"}"#), own());
        let records: Records = [
            record("10.5.2.0-24", &vxlan("10.0.0.2"), 1),
            record("10.5.3.0-26", &vxlan("10.0.0.3"), 1),
            record("10.6.4.0-24", &vxlan("10.0.0.4"), 1),
            record("10.5.1.0-26", &vxlan("10.0.0.5"), 1),
            record("10.5.6.0-24", r#"{"PublicIP":"10.0.0.6","BackendType":"host-gw"}"#, 1),
            record("10.5.7.0-24", r#"{"PublicIP":"10.0.0.7","BackendType":"vxlan"}"#, 1),
            record("10.5.8.0-24", &vxlan("10.0.0.1"), 1),
            record("10.5.2.0-24&fc00::-64", &vxlan("10.0.0.9"), 2),
        ]
        .into_iter()
        .collect();
        let mut told = Told::default();
        let peers = rules(&config, &own, "10.5.1.0-24").peers(&records, &mut told);
        assert_eq!(peers.keys().map(LeaseKey::to_string).collect::<Vec<_>>(), ["10.5.2.0-24", "10.5.3.0-26"]);
        let last = &peers[&LeaseKey::v4(net("10.5.2.0/24"))];
        assert_eq!(last.attrs.public_ip, Some([10, 0, 0, 9].into()), "the one written last");
        let told: Vec<_> = told.reasons().iter().map(|(key, reason)| format!("{key} {reason}")).collect();
        assert_eq!(
            told,
            [
                "10.5.1.0-26 ignored: its subnet 10.5.1.0/26 overlaps this node's 10.5.1.0/24",
                "10.5.3.0-26 a node runs with another network config: SubnetLen is 26 there, and 24 here",
                r#"10.5.6.0-24 ignored: its BackendType is "host-gw", this cluster's is "vxlan""#,
                "10.5.7.0-24 ignored: BackendData is missing",
                "10.6.4.0-24 ignored: its subnet 10.6.4.0/24 is outside of the network 10.5.0.0/16",
            ]
        );
    }

    #[test]
    fn each_half_of_a_lease_counts_for_itself() {
        let dual = config(r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48"}"#);
        let v6 = config(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48"}"#);
        let both = |n: u8| {
            let vtep = VtepData { vni: 1, vtep_mac: [2, 0, 0, 0, 0, n] };
            LeaseAttrs::vxlan([10, 0, 0, n].into(), vtep)
                .with_v6(format!("fd77::{n}").parse().unwrap(), Some(vtep))
        };
        let without_v4 = |n| LeaseAttrs { public_ip: None, backend_data: None, ..both(n) }.to_json();
        let records: Records = [
            record("10.5.2.0-24&fc00:0:0:2::-64", &both(2).to_json(), 1),
            record("0.0.0.0-0&fc00:0:0:3::-64", &without_v4(3), 1),
            record("10.5.4.0-24&fd00:0:0:4::-64", &both(4).to_json(), 1),
            record("10.5.1.0-24&fc00:0:0:5::-64", &both(5).to_json(), 1),
            record("10.5.6.0-24&fc00:0:0:6::-64", &LeaseAttrs { backend_data: None, ..both(6) }.to_json(), 1),
            record(
                "10.5.7.0-24&fc00:0:0:7::-64",
                &LeaseAttrs { backend_v6_data: None, ..both(7) }.to_json(),
                1,
            ),
            record("10.5.8.0-24", &vxlan("10.0.0.8"), 1),
            record("10.5.9.0-24&fc00:0:0:2::-64", &both(9).to_json(), 2),
            record("10.5.99.0-24&fc00:0:0:99::-64", &both(1).to_json(), 2),
        ]
        .into_iter()
        .collect();
        let peers = |config: &NetworkConfig, own: &LeaseAttrs, key: &str| -> Vec<String> {
            let peers = rules(config, own, key).peers(&records, &mut Told::default());
            peers
                .into_iter()
                .map(|(key, lease)| {
                    assert_eq!(key, lease.key);
                    key.to_string()
                })
                .collect()
        };
        assert_eq!(
            peers(&dual, &both(1), "10.5.1.0-24&fc00:0:0:1::-64"),
            [
                "0.0.0.0-0&fc00:0:0:3::-64",
                "0.0.0.0-0&fc00:0:0:5::-64",
                "0.0.0.0-0&fc00:0:0:6::-64",
                "10.5.2.0-24",
                "10.5.4.0-24",
                "10.5.7.0-24",
                "10.5.8.0-24",
                "10.5.9.0-24&fc00:0:0:2::-64",
            ]
        );
        let mut own = both(1);
        (own.public_ip, own.backend_data) = (None, None);
        assert_eq!(
            peers(&v6, &own, "0.0.0.0-0&fc00:0:0:1::-64"),
            ["fc00:0:0:2::-64", "fc00:0:0:3::-64", "fc00:0:0:5::-64", "fc00:0:0:6::-64"]
                .map(|half| format!("0.0.0.0-0&{half}"))
        );
    }

    proptest! {
        #[test]
        fn no_peer_is_ourselves_or_where_we_are(
            found in proptest::collection::vec((0_u32..1 << 18, 14_u8..=30, 1_u8..5, any::<bool>()), 0..30),
        ) {
            let (config, own) = (config(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}"#), own());
            let records: Records = found.into_iter().map(|(low, len, ip, host_gw)| {
                let subnet = Ipv4Net::new((0x0a04_0000 + low).into(), len).unwrap();
                let public_ip = [10, 0, 0, ip].into();
                let attrs = if host_gw { LeaseAttrs::host_gw(public_ip) } else { LeaseAttrs::alloc(public_ip) };
                Record { key: LeaseKey::v4(subnet), attrs: Ok(attrs), etcd_lease: None, mod_revision: 1 }
            }).collect();
            let rules = rules(&config, &own, "10.5.1.0-24");
            for (key, lease) in rules.peers(&records, &mut Told::default()) {
                prop_assert_eq!(key, lease.key);
                let (subnet, ours) = (key.subnet.unwrap(), rules.halves.own.subnet.unwrap());
                prop_assert!(rules.halves.networks[0].contains(&subnet) && !V4::overlap(subnet, ours));
                prop_assert!(lease.attrs.public_ip != own.public_ip && &*lease.attrs.backend_type == "host-gw");
            }
        }
    }
}
