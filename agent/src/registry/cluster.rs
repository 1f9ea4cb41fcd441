//! The snapshot that is published of the leases, wherever they come from: our lease, our peers, and how sure they are.

use std::{collections::BTreeMap, net::Ipv4Addr, time::Instant};

use ipnet::Ipv4Net;

use super::record::{Record, Records, Told};
use crate::{
    family::{Family as _, V4},
    lease::{Lease, LeaseAttrs},
    network::{Backend, quoted},
};

/// All that this node knows of the cluster's leases.
#[derive(Clone, Debug, PartialEq)]
pub struct Cluster {
    /// The lease of this node.
    pub own: Own,
    /// Leases of other nodes, by subnet; never one that overlaps our own subnet. Empty and meaningless until
    /// [`Self::is_listed`].
    pub peers: BTreeMap<Ipv4Net, Lease>,
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
#[expect(clippy::large_enum_variant, reason = "one a snapshot, and nearly always held")]
pub enum Own {
    /// Held. Another subnet than before means that another node has that one now: subnet.env must be rewritten.
    Held(Lease),
    /// Lost, and not yet replaced; the keeper goes on trying. Containers keep running.
    Lost {
        /// The subnet that this node had.
        subnet: Ipv4Net,
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
    pub(super) own: Ipv4Net,
    pub(super) public_ip: Ipv4Addr,
    pub(super) subnet_len: u8,
    pub(super) backend: &'a Backend,
    /// The network in force, and the one that the config now has where that is another.
    pub(super) networks: Vec<Ipv4Net>,
}

impl PeerRules<'_> {
    pub(super) fn peers(&self, records: &Records, told: &mut Told) -> BTreeMap<Ipv4Net, Lease> {
        let mut peers: BTreeMap<Ipv4Net, Lease> = BTreeMap::new();
        for record in records.iter().filter(|record| !record.is_at(self.public_ip)) {
            let refused = self.refuse(record);
            self.tell(record, refused.as_deref(), told);
            let Some(lease) = record.lease().filter(|_| refused.is_none()) else { continue };
            // One subnet under two keys, IPv4 and dual-stack: the one written last.
            let newest = peers.get(&lease.subnet).is_none_or(|other| other.mod_revision < lease.mod_revision);
            if newest {
                peers.insert(lease.subnet, lease);
            }
        }
        peers
    }

    fn tell(&self, record: &Record, refused: Option<&str>, told: &mut Told) {
        let (name, len) = (record.key.to_string(), record.key.subnet.prefix_len());
        match refused {
            Some(reason) => told.warn(&name, format!("ignored: {reason}")),
            None if len != self.subnet_len => told.warn(
                &name,
                format!(
                    "a node runs with another network config: SubnetLen is {len} there, and {} here",
                    self.subnet_len
                ),
            ),
            None => told.forget(&name),
        }
    }

    /// Why a record is none of a peer's. Values that do not parse were warned of when they were read.
    fn refuse(&self, record: &Record) -> Option<String> {
        let attrs = record.attrs.as_ref().ok()?;
        refuse(record.key.subnet, attrs, self.own, self.backend, &self.networks)
    }
}

/// Why another node's lease makes it no peer of the node that has the subnet `own`.
pub(crate) fn refuse(
    subnet: Ipv4Net,
    attrs: &LeaseAttrs,
    own: Ipv4Net,
    backend: &Backend,
    networks: &[Ipv4Net],
) -> Option<String> {
    if !networks.iter().any(|network| network.contains(&subnet)) {
        return Some(format!("its subnet {subnet} is outside of the network {}", networks[0]));
    }
    if V4::overlap(subnet, own) {
        return Some(format!("its subnet {subnet} overlaps this node's {own}"));
    }
    if attrs.backend_type != backend.lease_type() {
        let ours = backend.lease_type();
        return Some(format!(
            "its BackendType is {}, this cluster's is {ours:?}",
            quoted(&attrs.backend_type)
        ));
    }
    match (backend, attrs.vtep()) {
        (Backend::Vxlan(_), Err(error)) => Some(error.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        lease::{LeaseKey, VtepData},
        network::Vxlan,
    };

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

    fn rules(backend: &Backend) -> PeerRules<'_> {
        let (own, public_ip) = (net("10.5.1.0/24"), [10, 0, 0, 1].into());
        PeerRules { own, public_ip, subnet_len: 24, backend, networks: vec![net("10.5.0.0/16")] }
    }

    #[test]
    fn every_refusal_has_its_reason_and_another_length_is_only_told_of() {
        let backend = Backend::Vxlan(Vxlan::default());
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
        let peers = rules(&backend).peers(&records, &mut told);
        assert_eq!(peers.keys().copied().collect::<Vec<_>>(), ["10.5.2.0/24", "10.5.3.0/26"].map(net));
        assert_eq!(peers[&net("10.5.2.0/24")].attrs.public_ip.octets()[3], 9, "the one written last");
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

    proptest! {
        #[test]
        fn no_peer_is_ourselves_or_where_we_are(
            found in proptest::collection::vec((0_u32..1 << 18, 14_u8..=30, 1_u8..5, any::<bool>()), 0..30),
        ) {
            let backend = Backend::HostGw;
            let records: Records = found.into_iter().map(|(low, len, ip, host_gw)| {
                let subnet = Ipv4Net::new((0x0a04_0000 + low).into(), len).unwrap();
                let public_ip = [10, 0, 0, ip].into();
                let attrs = if host_gw { LeaseAttrs::host_gw(public_ip) } else { LeaseAttrs::alloc(public_ip) };
                Record { key: LeaseKey::v4(subnet), attrs: Ok(attrs), etcd_lease: None, mod_revision: 1 }
            }).collect();
            let rules = rules(&backend);
            for (subnet, lease) in rules.peers(&records, &mut Told::default()) {
                prop_assert_eq!(subnet, lease.subnet);
                prop_assert!(rules.networks[0].contains(&subnet) && !V4::overlap(subnet, rules.own));
                prop_assert!(lease.attrs.public_ip != rules.public_ip && lease.attrs.backend_type == "host-gw");
            }
        }
    }
}
