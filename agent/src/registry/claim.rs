//! Taking a lease: which record or subnet, and the writes that make it ours.
//!
//! flannel's order: the record with our public IP, else the previous subnet where it is free, else a random one.
//! Before all but a reservation comes what flannel lacks: the previous subnet's record under any public IP, where
//! its VTEP MAC proves that it is this very node's. The choice is pure; a lost race chooses again from what etcd
//! answered.

use std::{net::IpAddr, time::Duration};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rand::Rng;
use thiserror::Error;
use tracing::{info, warn};

use super::{
    Registry, RegistryError,
    record::{Record, Records},
    store::{Listing, Write},
};
use crate::{
    family::{Family, V4, V6},
    lease::{Lease, LeaseAttrs, LeaseKey},
    network::{NetworkConfig, Pool},
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
    /// Prefixes of this host's container bridges. The subnet that this node had before is what its bridge was made
    /// for; any other subnet keeps away from them too.
    pub bridges: Vec<Ipv4Net>,
    /// The same of IPv6, for a dual-stack network.
    pub v6: ClaimV6,
    /// How long the lease outlives this node.
    pub ttl: Duration,
    /// The lease is renewed this long before it would run out, or when a third of its TTL has gone by if that is
    /// sooner.
    pub renew_margin: Duration,
}

/// What a node asks for in a dual-stack network besides.
#[derive(Clone, Debug, Default)]
pub struct ClaimV6 {
    /// The subnet that this node had before (`FLANNEL_IPV6_SUBNET` of subnet.env).
    pub previous: Option<Ipv6Net>,
    /// As [`Claim::occupied`].
    pub occupied: Vec<Ipv6Net>,
    /// As [`Claim::bridges`].
    pub bridges: Vec<Ipv6Net>,
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
        network: IpNet,
        /// Prefix length of subnets.
        subnet_len: u8,
        /// First subnet's base.
        min: IpAddr,
        /// Last subnet's base.
        max: IpAddr,
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
    /// Make this record ours, under this key: it is this node's already.
    Adopt(Box<Record>, LeaseKey),
    /// Take subnets that are free.
    Create(LeaseKey),
}

impl Registry {
    /// Takes a lease.
    ///
    /// # Errors
    ///
    /// Where etcd is away or refuses, and where no subnet is left.
    pub async fn claim(&self, config: &NetworkConfig, claim: &Claim) -> Result<Lease, ClaimError> {
        let listing = self.list().await?;
        let mut grant = None;
        let lease = self.take(config, claim, listing, &mut grant).await;
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
        mut listing: Listing,
        grant: &mut Option<i64>,
    ) -> Result<Lease, ClaimError> {
        let value = claim.attrs.to_json();
        for _ in 0..MAX_RACES {
            let Choice { target, stale } = choose(config, claim, &listing.records, &mut rand::rng())?;
            let reserved = matches!(&target, Target::Adopt(record, _) if record.etcd_lease.is_none());
            let etcd_lease = if reserved { None } else { Some(self.granted(claim, grant).await?) };
            let (key, write) = match &target {
                Target::Adopt(record, key) => {
                    (*key, self.replace(record, *key, &value, etcd_lease, listing.revision).await?)
                }
                Target::Create(key) => {
                    let etcd_lease = etcd_lease.unwrap_or(0);
                    (*key, self.create(config, *key, &value, etcd_lease, listing.revision).await?)
                }
            };
            match write {
                Write::Done(mod_revision) => {
                    self.clean_up(&target, &stale).await;
                    let attrs = claim.attrs.clone();
                    info!(subnet = %key, mod_revision, how = target.how(), "lease claimed");
                    return Ok(Lease { subnet: key.subnet, key, attrs, etcd_lease, mod_revision });
                }
                Write::Raced(now) => listing = now,
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
        if let Target::Adopt(record, _) = target
            && let Some(id) = record.etcd_lease
        {
            self.revoke_unused(id).await;
        }
    }
}

impl Target {
    fn how(&self) -> &'static str {
        match self {
            Self::Adopt(record, _) if record.etcd_lease.is_none() => "reservation",
            Self::Adopt(..) => "own record found",
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
    let previous = claim.previous.map(|previous| previous.trunc());
    let own = records.iter().filter(|record| record.is_at(claim.attrs.public_ip));
    let (mut fit, unfit): (Vec<_>, Vec<_>) = own.partition(|record| usable(config, claim, record.key.subnet));
    // Before what has our address: when nodes have swapped theirs, each must find its own subnet.
    fit.extend(previous.and_then(|previous| proven(config, claim, previous, records)));
    let rank = |record: &&Record| {
        let is_previous = Some(record.key.subnet) == previous;
        (
            record.etcd_lease.is_some() || !record.is_at(claim.attrs.public_ip),
            !is_proven(claim, record),
            !is_previous,
        )
    };
    let own = fit.into_iter().min_by_key(rank);
    let stale = unfit.into_iter().filter(|record| is_stale(config, claim, record)).cloned().collect();
    if let Some(record) = own {
        let subnet_v6 = v6_half(config, claim, records, Some(record), rng)?;
        let key = LeaseKey { subnet: record.key.subnet, subnet_v6 };
        return Ok(Choice { target: Target::Adopt(Box::new(record.clone()), key), stale });
    }
    let free = |subnet: &Ipv4Net| {
        usable(config, claim, *subnet) && !records.taken().any(|other| V4::overlap(other, *subnet))
    };
    let subnet = match previous.filter(free) {
        Some(previous) => previous,
        None => {
            let own = claim.prefixes();
            subnet::pick(&config.v4(), records.taken(), &own, rng)
                .ok_or_else(|| out_of_subnets(&config.v4(), &own, records))?
        }
    };
    let subnet_v6 = v6_half(config, claim, records, None, rng)?;
    Ok(Choice { target: Target::Create(LeaseKey { subnet, subnet_v6 }), stale })
}

/// The IPv6 subnet of a dual-stack network: the one that our record has, else the previous one, else a random one;
/// only what no other record has.
fn v6_half(
    config: &NetworkConfig,
    claim: &Claim,
    records: &Records,
    own: Option<&Record>,
    rng: &mut impl Rng,
) -> Result<Option<Ipv6Net>, ClaimError> {
    let Some(pool) = &config.v6 else { return Ok(None) };
    let ClaimV6 { previous, occupied, bridges } = &claim.v6;
    let taken: Vec<_> = records
        .iter()
        .filter(|record| own.is_none_or(|own| own.key != record.key))
        .filter_map(|record| record.key.subnet_v6)
        .collect();
    let free = |subnet: &Ipv6Net| {
        pool.allows(*subnet)
            && conflict(pool, *subnet, occupied, bridges).is_none()
            && !taken.iter().any(|other| V6::overlap(*other, *subnet))
    };
    let had = own.and_then(|own| own.key.subnet_v6);
    if let Some(subnet) = had.into_iter().chain(previous.map(|it| it.trunc())).find(free) {
        return Ok(Some(subnet));
    }
    let prefixes: Vec<_> = occupied.iter().chain(bridges).copied().collect();
    let subnet = subnet::pick(pool, taken, &prefixes, rng);
    subnet.map(Some).ok_or_else(|| out_of_subnets(pool, &prefixes, records))
}

fn usable(config: &NetworkConfig, claim: &Claim, subnet: Ipv4Net) -> bool {
    config.allows(subnet) && claim.conflict(config, subnet).is_none()
}

impl Claim {
    /// Everything of this host that a subnet picked at random keeps away from.
    fn prefixes(&self) -> Vec<Ipv4Net> {
        self.occupied.iter().chain(&self.bridges).copied().collect()
    }

    /// What of this host stands against taking just this subnet, which it may have had before.
    fn conflict(&self, config: &NetworkConfig, subnet: Ipv4Net) -> Option<Ipv4Net> {
        conflict(&config.v4(), subnet, &self.occupied, &self.bridges)
    }
}

/// What of this host stands against taking just this subnet. Its own bridge does not.
fn conflict<F: Family>(
    pool: &Pool<F>,
    subnet: F::Net,
    occupied: &[F::Net],
    bridges: &[F::Net],
) -> Option<F::Net> {
    let is_its_bridge = |prefix: &F::Net| F::trunc(*prefix) == subnet && !occupied.contains(prefix);
    let bridges = bridges.iter().filter(|prefix| !is_its_bridge(prefix));
    let prefixes: Vec<_> = occupied.iter().chain(bridges).copied().collect();
    subnet::conflict::<F>(pool.network, subnet, &prefixes)
}

/// Says why a record of this node is of no use to it, and whether it may be deleted, as flannel would. A
/// reservation is the operator's and stays.
fn is_stale(config: &NetworkConfig, claim: &Claim, record: &Record) -> bool {
    let subnet = record.key.subnet;
    let why = match claim.conflict(config, subnet) {
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

/// The record of the previous subnet, where it is provably this node's, whatever public IP it has.
fn proven<'a>(
    config: &NetworkConfig,
    claim: &Claim,
    previous: Ipv4Net,
    records: &'a Records,
) -> Option<&'a Record> {
    let mut at_previous = records.iter().filter(|record| record.key.subnet == previous);
    at_previous.find(|record| is_proven(claim, record)).filter(|_| usable(config, claim, previous))
}

/// Whether both halves of the proof are there: that this node had the subnet, and that the record has its VTEP's
/// MAC address, which is random, made on the node, and kept by its kernel.
fn is_proven(claim: &Claim, record: &Record) -> bool {
    let mac = |attrs: &LeaseAttrs| attrs.vtep().ok().map(|vtep| vtep.vtep_mac);
    let recorded = record.attrs.as_ref().ok().and_then(mac);
    let had = claim.previous.is_some_and(|previous| previous.trunc() == record.key.subnet);
    had && recorded.is_some() && recorded == mac(&claim.attrs)
}

fn out_of_subnets<F: Family>(pool: &Pool<F>, own: &[F::Net], records: &Records) -> ClaimError {
    let conflicts = subnet::conflicting::<F>(pool.network, own);
    let host = match conflicts.as_slice() {
        [] => String::new(),
        some => {
            let some: Vec<_> = some.iter().map(ToString::to_string).collect();
            format!(" or this host's own {}", some.join(", "))
        }
    };
    ClaimError::OutOfSubnets {
        network: pool.network.into(),
        subnet_len: pool.subnet_len,
        min: pool.subnet_min.into(),
        max: pool.subnet_max.into(),
        leases: records.iter().count(),
        host,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;
    use crate::lease::VtepData;

    fn attrs(ip: u8, mac: u8) -> LeaseAttrs {
        LeaseAttrs::vxlan([10, 0, 0, ip].into(), VtepData { vni: 1, vtep_mac: [2, 0, 0, 0, 0, mac] })
    }

    prop_compose! {
        /// Records in and around the network, of few nodes, so that much of it is about us.
        fn record()(
            low in 0_u32..1 << 12, len in 20_u8..=28, ip in 1_u8..5, mac in 1_u8..5, broken in prop::bool::weighted(0.1),
            reserved in any::<bool>(),
        ) -> Record {
            let subnet = Ipv4Net::new((0x0a05_0000 + low).into(), len).unwrap();
            let attrs = if broken { LeaseAttrs::parse(b"{") } else { Ok(attrs(ip, mac)) };
            Record { key: LeaseKey::v4(subnet), attrs, etcd_lease: (!reserved).then_some(7), mod_revision: 3 }
        }
    }

    proptest! {
        #[test]
        fn only_our_own_record_or_a_clear_subnet_is_chosen(
            records in proptest::collection::vec(record(), 0..30), seed in any::<u64>(),
            previous in proptest::option::of((0_u32..1 << 12, 22_u8..=26)),
            occupied in proptest::option::of((0_u32..1 << 12, 16_u8..=32)),
        ) {
            let net = |(low, len): (u32, u8)| Ipv4Net::new((0x0a05_0000 + low).into(), len).unwrap();
            let config = NetworkConfig::parse(
                r#"{"Network":"10.5.0.0/20","SubnetLen":24,"SubnetMin":"10.5.2.0"}"#).unwrap();
            let claim = Claim {
                attrs: attrs(1, 1), previous: previous.map(net), occupied: occupied.map(net).into_iter().collect(),
                bridges: Vec::new(), v6: ClaimV6::default(),
                ttl: Duration::from_secs(60), renew_margin: Duration::ZERO,
            };
            let records: Records = records.into_iter().collect();
            let clear = |subnet: Ipv4Net| {
                usable(&config, &claim, subnet) && !records.taken().any(|other| V4::overlap(other, subnet))
            };
            match choose(&config, &claim, &records, &mut StdRng::seed_from_u64(seed)) {
                Ok(Choice { target: Target::Create(key), .. }) => prop_assert!(clear(key.subnet), "{key}"),
                Ok(Choice { target: Target::Adopt(record, key), .. }) => {
                    prop_assert_eq!(key, LeaseKey::v4(record.key.subnet));
                    prop_assert!(usable(&config, &claim, record.key.subnet));
                    prop_assert!(record.is_at(claim.attrs.public_ip) || is_proven(&claim, &record), "{record:?}");
                }
                Err(error) => {
                    let full = matches!(error, ClaimError::OutOfSubnets { .. });
                    prop_assert!(full);
                    prop_assert!(!config.network.subnets(24).unwrap().any(clear));
                }
            }
        }
    }
}
