//! Taking a lease: which record or subnet, and the writes that make it ours.
//!
//! flannel's order: the record with our public IP, else the previous subnet where it is free, else a random one.
//! In between, what flannel lacks: the previous subnet's record under an old public IP, where its VTEP MAC proves
//! that it is this very node's. The choice is pure; a lost race chooses again from what etcd answered.

use std::{net::Ipv4Addr, time::Duration};

use ipnet::Ipv4Net;
use rand::Rng;
use thiserror::Error;
use tracing::{info, warn};

use super::{
    Registry, RegistryError,
    record::{Record, Records, Told},
    store::Write,
};
use crate::{
    lease::{Lease, LeaseAttrs, LeaseKey},
    network::NetworkConfig,
    subnet,
};

/// Every lost race is somebody else's success, so this is only reached where nodes keep coming and going.
const MAX_RACES: usize = 500;

/// What this node asks for.
#[derive(Clone, Debug)]
pub struct Claim {
    /// The value of the lease; its public IP is the node's identity.
    pub attrs: LeaseAttrs,
    /// The subnet that this node had before (`FLANNEL_SUBNET` of subnet.env).
    pub previous: Option<Ipv4Net>,
    /// Routes and addresses of this host that are not the overlay's own; no subnet that overlaps one inside the
    /// network is taken. The default route and prefixes as wide as the network do not count.
    pub occupied: Vec<Ipv4Net>,
    /// How long the lease outlives this node.
    pub ttl: Duration,
    /// The lease is renewed this long before it would run out, or when a third of its TTL has gone by if that is
    /// sooner.
    pub renew_margin: Duration,
}

/// Why there is no lease.
#[derive(Debug, Error)]
pub enum ClaimError {
    /// etcd is away or refuses.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Nothing is left between `SubnetMin` and `SubnetMax`.
    #[error(
        "out of subnets: every /{subnet_len} from {min} to {max} of {network} overlaps one of {leases} leases{host}; enlarge Network, raise SubnetLen, or delete leases of nodes that are gone"
    )]
    OutOfSubnets {
        /// The cluster's network.
        network: Ipv4Net,
        /// Prefix length of subnets.
        subnet_len: u8,
        /// First subnet's base.
        min: Ipv4Addr,
        /// Last subnet's base.
        max: Ipv4Addr,
        /// How many leases there are.
        leases: usize,
        /// This host's own prefixes in the way, as text.
        host: String,
    },
    /// Other nodes took what was chosen, again and again.
    #[error("lost {0} races for a subnet in a row")]
    Races(usize),
}

/// What to write.
#[derive(Debug)]
struct Choice {
    target: Target,
    /// Records of this node that it cannot use.
    stale: Vec<Record>,
}

#[derive(Debug)]
enum Target {
    /// Make this record ours: it is this node's already.
    Adopt(Record),
    /// Take a subnet that is free.
    Create(Ipv4Net),
}

impl Registry {
    /// Takes a lease.
    ///
    /// # Errors
    ///
    /// Where etcd is away or refuses, and where no subnet is left.
    pub async fn claim(&self, config: &NetworkConfig, claim: &Claim) -> Result<Lease, ClaimError> {
        let mut told = Told::default();
        let records = self.list(&mut told).await?.records;
        let mut grant = None;
        let lease = self.take(config, claim, records, &mut grant, &mut told).await;
        match (&lease, grant) {
            (Ok(lease), Some(id)) if lease.etcd_lease == Some(id) => {}
            (_, Some(id)) => self.revoke_unused(id).await,
            (_, None) => {}
        }
        lease
    }

    async fn take(
        &self,
        config: &NetworkConfig,
        claim: &Claim,
        mut records: Records,
        grant: &mut Option<i64>,
        told: &mut Told,
    ) -> Result<Lease, ClaimError> {
        let value = claim.attrs.to_json();
        for _ in 0..MAX_RACES {
            let Choice { target, stale } = choose(config, claim, &records, &mut rand::rng())?;
            let reserved = matches!(&target, Target::Adopt(record) if record.etcd_lease.is_none());
            let etcd_lease = if reserved { None } else { Some(self.granted(claim, grant).await?) };
            let (key, write) = match &target {
                Target::Adopt(record) => {
                    let key = LeaseKey::v4(record.key.subnet);
                    (key, self.replace(record, key, &value, etcd_lease, told).await?)
                }
                Target::Create(subnet) => {
                    let key = LeaseKey::v4(*subnet);
                    (key, self.create(config, key, &value, etcd_lease.unwrap_or(0), told).await?)
                }
            };
            match write {
                Write::Done(mod_revision) => {
                    self.clean_up(&target, &stale).await;
                    let attrs = claim.attrs.clone();
                    info!(subnet = %key.subnet, mod_revision, how = target.how(), "lease claimed");
                    return Ok(Lease { subnet: key.subnet, key, attrs, etcd_lease, mod_revision });
                }
                Write::Raced(listing) => records = listing.records,
            }
        }
        Err(ClaimError::Races(MAX_RACES))
    }

    /// The etcd lease of this claim, got when it is first needed.
    async fn granted(&self, claim: &Claim, grant: &mut Option<i64>) -> Result<i64, RegistryError> {
        if let Some(id) = grant {
            return Ok(*id);
        }
        let (id, ttl) = self.grant(claim.ttl).await?;
        if ttl != claim.ttl {
            info!(asked = ?claim.ttl, granted = ?ttl, "etcd has its own mind about the lease's TTL");
        }
        *grant = Some(id);
        Ok(id)
    }

    /// Removes what the claim has made useless. Nothing of it matters enough to fail.
    async fn clean_up(&self, target: &Target, stale: &[Record]) {
        for record in stale {
            if let Err(error) = self.delete(record).await {
                warn!(subnet = %record.key.subnet, %error, "a useless lease of this node stays until it runs out");
            }
        }
        if let Target::Adopt(Record { etcd_lease: Some(id), .. }) = target {
            self.revoke_unused(*id).await;
        }
    }
}

impl Target {
    fn how(&self) -> &'static str {
        match self {
            Self::Adopt(Record { etcd_lease: None, .. }) => "reservation",
            Self::Adopt(_) => "own record found",
            Self::Create(_) => "free subnet",
        }
    }
}

fn choose(
    config: &NetworkConfig,
    claim: &Claim,
    records: &Records,
    rng: &mut impl Rng,
) -> Result<Choice, ClaimError> {
    let mut own: Vec<_> = records.iter().filter(|record| record.is_at(claim.attrs.public_ip)).collect();
    // Where there are several: a reservation first, then what this node had last.
    own.sort_by_key(|record| (record.etcd_lease.is_some(), Some(record.key.subnet) != claim.previous));
    let (fit, unfit): (Vec<_>, Vec<_>) =
        own.into_iter().partition(|record| usable(config, claim, record.key.subnet));
    let stale = unfit.into_iter().filter(|record| is_stale(config, claim, record)).cloned().collect();
    let own = fit.first().copied().or_else(|| proven(config, claim, records));
    if let Some(record) = own {
        return Ok(Choice { target: Target::Adopt(record.clone()), stale });
    }
    let free = |subnet: &Ipv4Net| {
        usable(config, claim, *subnet) && !records.taken().any(|other| subnet::overlap(other, *subnet))
    };
    let subnet = match claim.previous.map(|previous| previous.trunc()).filter(free) {
        Some(previous) => previous,
        None => subnet::pick(config, records.taken(), &claim.occupied, rng)
            .ok_or_else(|| out_of_subnets(config, claim, records))?,
    };
    Ok(Choice { target: Target::Create(subnet), stale })
}

fn usable(config: &NetworkConfig, claim: &Claim, subnet: Ipv4Net) -> bool {
    config.allows(subnet) && subnet::conflict(config.network, subnet, &claim.occupied).is_none()
}

/// Says why a record of this node is of no use to it, and whether it may be deleted, as flannel would. A
/// reservation is the operator's and stays.
fn is_stale(config: &NetworkConfig, claim: &Claim, record: &Record) -> bool {
    let subnet = record.key.subnet;
    let why = match subnet::conflict(config.network, subnet, &claim.occupied) {
        Some(prefix) => format!("this host has an address or a route in {prefix}"),
        None => format!(
            "the network config allows /{} from {} to {}",
            config.subnet_len, config.subnet_min, config.subnet_max
        ),
    };
    let reserved = record.etcd_lease.is_none();
    let kind = if reserved { "reservation" } else { "lease" };
    warn!(%subnet, kind, why, "this node's own record cannot be used");
    !reserved
}

/// The record of the previous subnet under another public IP, where it is provably this node's: the MAC address
/// of a VTEP is random, made on the node, and kept by its kernel.
fn proven<'a>(config: &NetworkConfig, claim: &Claim, records: &'a Records) -> Option<&'a Record> {
    let previous = claim.previous?.trunc();
    let ours = claim.attrs.vtep().ok()?.vtep_mac;
    let is_ours = |record: &&Record| {
        let vtep = record.attrs.as_ref().ok().and_then(|attrs| attrs.vtep().ok());
        record.key.subnet == previous && vtep.is_some_and(|vtep| vtep.vtep_mac == ours)
    };
    records.iter().find(is_ours).filter(|_| usable(config, claim, previous))
}

fn out_of_subnets(config: &NetworkConfig, claim: &Claim, records: &Records) -> ClaimError {
    let conflicts = subnet::conflicting(config.network, &claim.occupied);
    let host = match conflicts.as_slice() {
        [] => String::new(),
        some => {
            let some: Vec<_> = some.iter().map(ToString::to_string).collect();
            format!(" or this host's own {}", some.join(", "))
        }
    };
    let (network, subnet_len) = (config.network, config.subnet_len);
    let (min, max, leases) = (config.subnet_min, config.subnet_max, records.iter().count());
    ClaimError::OutOfSubnets { network, subnet_len, min, max, leases, host }
}
