//! Taking a lease: which record or subnet, and the writes that make it ours.
//!
//! flannel's order: the record with our public address, else the previous subnet where it is free, else a random one.
//! Before all but a reservation comes what flannel lacks: the previous subnet's record under any public IP, where
//! its VTEP MAC proves that it is this very node's. The choice is pure; a lost race chooses again from what there is
//! then.

use std::{net::IpAddr, time::Duration};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rand::Rng;
use thiserror::Error;
use tracing::{info, warn};

use super::{
    Registry, RegistryError,
    record::{Record, Records},
    store::Write,
};
use crate::{
    family::{Family, V4, V6},
    lease::{Lease, LeaseAttrs, LeaseKey},
    network::{NetworkConfig, Pool},
    subnet,
};

/// Every lost race is somebody else's success, so this is only reached where nodes keep coming and going.
const MAX_RACES: usize = 500;
/// The most that a node waits after its first lost race for an IPv6 subnet, and after its later ones, twice as much each.
/// Any write makes all others lose that are under way, so they must not come again all at once.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

/// What this node asks for.
#[derive(Clone, Debug)]
pub struct Claim {
    /// The value of the lease; its public address is the node's identity.
    pub attrs: LeaseAttrs,
    /// The subnet that this node had before (`FLANNEL_SUBNET` of subnet.env).
    pub previous: Option<Ipv4Net>,
    /// Routes and addresses of this host that are not the overlay's own; no subnet that overlaps one inside the
    /// network is taken. The default route and prefixes as wide as the network do not count.
    pub occupied: Vec<Ipv4Net>,
    /// Prefixes of this host's container bridges and single pods. The subnet that this node had before is what its
    /// bridge and pods were made for; any other subnet keeps away from them too.
    pub bridges: Vec<Ipv4Net>,
    /// The same of IPv6, for a network that has it.
    pub v6: ClaimV6,
    /// How long the lease outlives this node.
    pub ttl: Duration,
    /// The lease is renewed this long before it would run out, or when a third of its TTL has gone by if that is
    /// sooner.
    pub renew_margin: Duration,
}

/// What a node asks for of IPv6.
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

impl ClaimError {
    /// Whether waiting may help without anybody making room.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        !matches!(self, Self::OutOfSubnets { .. })
    }
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
        let mut grant = None;
        let lease = self.take(config, claim, &mut grant).await;
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
        grant: &mut Option<i64>,
    ) -> Result<Lease, ClaimError> {
        let value = claim.attrs.to_json();
        for lost in 0..MAX_RACES {
            let listing = self.list().await?;
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
                    return Ok(Lease { key, attrs, etcd_lease, mod_revision });
                }
                Write::Raced if key.subnet_v6.is_some() => tokio::time::sleep(pause(lost)).await,
                Write::Raced => {}
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
                warn!(subnet = record.key.subnets(), %error, "a useless lease of this node stays until it runs out");
            }
        }
        if let Target::Adopt(record, _) = target
            && let Some(id) = record.etcd_lease
        {
            self.revoke_unused(id).await;
        }
    }
}

/// A random wait after a lost race, before which so many were lost.
fn pause(lost: usize) -> Duration {
    let (first, most) = PAUSE;
    let most = first.saturating_mul(1 << lost.min(10)).min(most);
    rand::rng().random_range(Duration::ZERO..=most)
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
    let (v4, v6) = (claim.of_v4(config), claim.of_v6(config));
    let own = records.iter().filter(|record| record.is_of(&claim.attrs));
    let (mut fit, unfit): (Vec<_>, Vec<_>) = own.partition(|record| misfit(&v4, &v6, record).is_none());
    // Before what has our address: when nodes have swapped theirs, each must find its own subnet.
    let proven = |record: &&Record| is_proven(claim, config, record);
    fit.extend(records.iter().find(|record| proven(record) && misfit(&v4, &v6, record).is_none()));
    let rank = |record: &&Record| {
        (
            record.etcd_lease.is_some() || !record.is_of(&claim.attrs),
            !proven(record),
            !is_previous(claim, config, record),
        )
    };
    let own = fit.into_iter().min_by_key(rank);
    let stale =
        unfit.into_iter().filter(|record| is_stale(misfit(&v4, &v6, record), record)).cloned().collect();
    let key = LeaseKey {
        subnet: v4.map(|wants| wants.subnet(own, records, rng)).transpose()?,
        subnet_v6: v6.map(|wants| wants.subnet(own, records, rng)).transpose()?,
    };
    let target = match own {
        Some(record) => Target::Adopt(Box::new(record.clone()), key),
        None => Target::Create(key),
    };
    Ok(Choice { target, stale })
}

impl Claim {
    /// What is asked for of IPv4, in a network that has it.
    fn of_v4<'a>(&'a self, config: &NetworkConfig) -> Option<Wants<'a, V4>> {
        let (previous, occupied, bridges) = (self.previous, &self.occupied, &self.bridges);
        Some(Wants { pool: config.v4?, previous, occupied, bridges })
    }

    /// The same of IPv6.
    fn of_v6<'a>(&'a self, config: &NetworkConfig) -> Option<Wants<'a, V6>> {
        let ClaimV6 { previous, occupied, bridges } = &self.v6;
        Some(Wants { pool: config.v6?, previous: *previous, occupied, bridges })
    }
}

/// What is asked for of one family.
#[derive(Clone, Copy)]
struct Wants<'a, F: Family> {
    pool: Pool<F>,
    previous: Option<F::Net>,
    occupied: &'a [F::Net],
    bridges: &'a [F::Net],
}

impl<F: Family> Wants<'_, F> {
    /// The subnet that our record has, else the previous one, else a random one. A subnet of IPv6 only where no other
    /// record has it: no key of etcd's rules that out by itself.
    fn subnet(
        &self,
        own: Option<&Record>,
        records: &Records,
        rng: &mut impl Rng,
    ) -> Result<F::Net, ClaimError> {
        let taken: Vec<F::Net> = records.taken::<F>(own.map(|own| own.key)).collect();
        let free = |subnet: &F::Net| !taken.iter().any(|other| F::overlap(*other, *subnet));
        let usable = |subnet: &F::Net| self.misfit(*subnet).is_none();
        let had = own.and_then(|own| own.key.half::<F>()).filter(usable);
        let previous = self.previous.map(F::trunc).filter(|previous| usable(previous) && free(previous));
        if let Some(subnet) = had.filter(|had| F::BITS == V4::BITS || free(had)).or(previous) {
            return Ok(subnet);
        }
        let prefixes: Vec<_> = self.occupied.iter().chain(self.bridges).copied().collect();
        subnet::pick(&self.pool, taken, &prefixes, rng)
            .ok_or_else(|| out_of_subnets(&self.pool, &prefixes, records))
    }

    /// Why just this subnet, which the node may have had before, is of no use to it. Its own bridge and pods are no
    /// reason.
    fn misfit(&self, subnet: F::Net) -> Option<String> {
        let Self { pool, occupied, bridges, .. } = self;
        let is_a_pod = |prefix: &F::Net| F::prefix_len(*prefix) == F::BITS && F::covers(subnet, *prefix);
        let is_its = |prefix: &F::Net| F::trunc(*prefix) == subnet || is_a_pod(prefix);
        let bridges = bridges.iter().filter(|prefix| !is_its(prefix) || occupied.contains(prefix));
        let prefixes: Vec<_> = occupied.iter().chain(bridges).copied().collect();
        match subnet::conflict::<F>(pool.network, subnet, &prefixes) {
            Some(prefix) => Some(format!("this host has an address or a route in {prefix}")),
            None if pool.allows(subnet) => None,
            None => Some(format!(
                "the network config allows /{} from {} to {}",
                pool.subnet_len, pool.subnet_min, pool.subnet_max
            )),
        }
    }
}

/// Why this node can go on with nothing of a record of its own: by the IPv4 half where both have one, else by the other.
fn misfit(v4: &Option<Wants<'_, V4>>, v6: &Option<Wants<'_, V6>>, record: &Record) -> Option<String> {
    match (v4.as_ref().zip(record.key.subnet), v6.as_ref().zip(record.key.subnet_v6)) {
        (Some((wants, subnet)), _) => wants.misfit(subnet),
        (None, Some((wants, subnet))) => wants.misfit(subnet),
        (None, None) => Some("the network config has another family".into()),
    }
}

/// Says why a record of this node is of no use to it, and whether it may be deleted, as flannel would. A
/// reservation is the operator's and stays.
fn is_stale(why: Option<String>, record: &Record) -> bool {
    let reserved = record.etcd_lease.is_none();
    let kind = if reserved { "reservation" } else { "lease" };
    warn!(subnet = record.key.subnets(), kind, why, "this node's own record cannot be used");
    !reserved
}

/// Whether the record has the subnet that this node had before, by the family that counts.
fn is_previous(claim: &Claim, config: &NetworkConfig, record: &Record) -> bool {
    if config.v4.is_some() {
        claim.previous.is_some_and(|previous| record.key.subnet == Some(previous.trunc()))
    } else {
        claim.v6.previous.is_some_and(|previous| record.key.subnet_v6 == Some(previous.trunc()))
    }
}

/// Whether both halves of the proof are there: that this node had the subnet, and that the record has its VTEP's
/// MAC address, which is random, made on the node, and kept by its kernel. Then the record is this node's, whatever
/// public IP it has.
fn is_proven(claim: &Claim, config: &NetworkConfig, record: &Record) -> bool {
    let vtep = |attrs: &LeaseAttrs| if config.v4.is_some() { attrs.vtep() } else { attrs.vtep_v6() };
    let mac = |attrs: &LeaseAttrs| vtep(attrs).ok().map(|vtep| vtep.vtep_mac);
    let recorded = record.attrs.as_ref().ok().and_then(mac);
    is_previous(claim, config, record) && recorded.is_some() && recorded == mac(&claim.attrs)
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
            let wants = claim.of_v4(&config).unwrap();
            let usable = |subnet: Ipv4Net| wants.misfit(subnet).is_none();
            let clear = |subnet: Ipv4Net| {
                usable(subnet) && !records.taken::<V4>(None).any(|other| V4::overlap(other, subnet))
            };
            match choose(&config, &claim, &records, &mut StdRng::seed_from_u64(seed)) {
                Ok(Choice { target: Target::Create(key), .. }) => prop_assert!(clear(key.subnet.unwrap()), "{key}"),
                Ok(Choice { target: Target::Adopt(record, key), .. }) => {
                    prop_assert_eq!(key, record.key);
                    prop_assert!(usable(record.key.subnet.unwrap()));
                    prop_assert!(record.is_of(&claim.attrs) || is_proven(&claim, &config, &record), "{record:?}");
                }
                Err(error) => {
                    let full = matches!(error, ClaimError::OutOfSubnets { .. });
                    prop_assert!(full);
                    prop_assert!(!wants.pool.network.subnets(24).unwrap().any(clear));
                }
            }
        }
    }

    fn attrs_v6(ip: u8, mac: u8) -> LeaseAttrs {
        let address = std::net::Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, ip.into());
        LeaseAttrs::of_type("vxlan")
            .with_v6(address, Some(VtepData { vni: 1, vtep_mac: [2, 0, 0, 0, 6, mac] }))
    }

    prop_compose! {
        /// IPv6 records of few nodes, some with an IPv4 half besides.
        fn record_v6()(
            low in 0_u128..1 << 8, len in 60_u8..=66, ip in 1_u8..5, mac in 1_u8..5, dual in any::<bool>(),
            reserved in any::<bool>(),
        ) -> Record {
            let subnet = Ipv6Net::new(((0xfc00_u128 << 112) + (low << 62)).into(), len).unwrap();
            let v4 = Ipv4Net::new([10, 5, low as u8, 0].into(), 24).unwrap();
            let mut attrs = attrs_v6(ip, mac);
            if dual {
                attrs = attrs.with_v4([10, 0, 0, ip].into(), Some(VtepData { vni: 1, vtep_mac: [2, 0, 0, 0, 4, mac] }));
            }
            let key = LeaseKey { subnet: dual.then_some(v4), ..LeaseKey::v6(subnet) };
            Record { key, attrs: Ok(attrs), etcd_lease: (!reserved).then_some(7), mod_revision: 3 }
        }
    }

    proptest! {
        #[test]
        fn of_ipv6_alone_only_what_no_other_record_has_is_chosen(
            records in proptest::collection::vec(record_v6(), 0..30), seed in any::<u64>(),
            previous in proptest::option::of(0_u128..1 << 6), occupied in proptest::option::of(0_u128..1 << 8),
        ) {
            let net = |low: u128, len| Ipv6Net::new(((0xfc00_u128 << 112) + (low << 62)).into(), len).unwrap();
            let config = NetworkConfig::parse(
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/58","IPv6SubnetMin":"fc00:0:0:2::"}"#).unwrap();
            let v6 = ClaimV6 {
                previous: previous.map(|low| net(low << 2, 64)), occupied: occupied.map(|low| net(low, 66)).into_iter().collect(),
                bridges: Vec::new(),
            };
            let claim = Claim {
                attrs: attrs_v6(1, 1), previous: None, occupied: Vec::new(), bridges: Vec::new(), v6,
                ttl: Duration::from_secs(60), renew_margin: Duration::ZERO,
            };
            let records: Records = records.into_iter().collect();
            let wants = claim.of_v6(&config).unwrap();
            let clear = |subnet: Ipv6Net, own: Option<LeaseKey>| {
                wants.misfit(subnet).is_none() && !records.taken::<V6>(own).any(|other| V6::overlap(other, subnet))
            };
            match choose(&config, &claim, &records, &mut StdRng::seed_from_u64(seed)) {
                Ok(Choice { target: Target::Create(key), .. }) => {
                    prop_assert!(key.subnet.is_none() && clear(key.subnet_v6.unwrap(), None), "{}", key);
                }
                Ok(Choice { target: Target::Adopt(record, key), .. }) => {
                    prop_assert!(key.subnet.is_none() && clear(key.subnet_v6.unwrap(), Some(record.key)), "{}", key);
                    prop_assert!(record.is_of(&claim.attrs) || is_proven(&claim, &config, &record), "{:?}", record);
                }
                Err(error) => {
                    let full = matches!(error, ClaimError::OutOfSubnets { .. });
                    prop_assert!(full, "{}", error);
                }
            }
        }
    }
}
