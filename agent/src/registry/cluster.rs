//! The snapshot that the registry publishes: our lease, our peers, and how sure they are.

use std::{collections::BTreeMap, net::Ipv4Addr, time::Instant};

use ipnet::Ipv4Net;

use super::record::{Record, Records, Told};
use crate::{lease::Lease, network::Backend, subnet};

/// All that this node knows of the cluster's leases.
#[derive(Clone, Debug, PartialEq)]
pub struct Cluster {
    /// The lease of this node.
    pub own: Own,
    /// Leases of other nodes, by subnet; never one that overlaps our own subnet. Empty and meaningless until
    /// [`Self::is_listed`].
    pub peers: BTreeMap<Ipv4Net, Lease>,
    /// etcd's revision of the newest news; 0 until the first listing.
    pub revision: i64,
    /// Whether etcd is being watched. While it is not, all else here is as it last was, and stays in force.
    pub connected: bool,
    /// When etcd last confirmed the lease; `None` for a reservation, which needs none.
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
    pub(super) backend: &'a Backend,
    /// The network in force, and the one that the config now has where that is another.
    pub(super) networks: Vec<Ipv4Net>,
}

impl PeerRules<'_> {
    pub(super) fn peers(&self, records: &Records, told: &mut Told) -> BTreeMap<Ipv4Net, Lease> {
        let mut peers: BTreeMap<Ipv4Net, Lease> = BTreeMap::new();
        for record in records.iter().filter(|record| !record.is_at(self.public_ip)) {
            let name = record.key.to_string();
            match self.refuse(record) {
                Some(reason) => told.warn(&name, reason),
                None => told.forget(&name),
            }
            let Some(lease) = record.lease().filter(|_| self.refuse(record).is_none()) else { continue };
            // One subnet under two keys, IPv4 and dual-stack: the one written last.
            let newest = peers.get(&lease.subnet).is_none_or(|other| other.mod_revision < lease.mod_revision);
            if newest {
                peers.insert(lease.subnet, lease);
            }
        }
        peers
    }

    /// Why a record is none of a peer's. Values that do not parse were warned of when they were read.
    fn refuse(&self, record: &Record) -> Option<String> {
        let attrs = record.attrs.as_ref().ok()?;
        let subnet = record.key.subnet;
        if !self.networks.iter().any(|network| network.contains(&subnet)) {
            return Some(format!("its subnet {subnet} is outside of the network {}", self.networks[0]));
        }
        if subnet::overlap(subnet, self.own) {
            return Some(format!("its subnet {subnet} overlaps this node's {}", self.own));
        }
        if attrs.backend_type != self.backend.lease_type() {
            let ours = self.backend.lease_type();
            return Some(format!("its BackendType is {:?}, this cluster's is {ours:?}", attrs.backend_type));
        }
        match (self.backend, attrs.vtep()) {
            (Backend::Vxlan(_), Err(error)) => Some(error.to_string()),
            _ => None,
        }
    }
}
