//! What the tests share: an etcd with a network config, and nodes that are lease clients and nothing else.

use std::{
    net::Ipv4Addr,
    ops::Deref,
    sync::Arc,
    time::{Duration, Instant},
};

use ipnet::Ipv4Net;
pub(crate) use loden_agent::lease::LeaseKey;
use loden_agent::{
    lease::{Lease, LeaseAttrs, VtepData},
    network::NetworkConfig,
    registry::{Claim, ClaimError, ClaimV6, Cluster, EtcdOptions, Keeper, Own, Registry},
};
use loden_tests::etcd::Etcd;

pub(crate) const PREFIX: &str = "/coreos.com/network";
pub(crate) const CONFIG: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;

/// What a node publishes: its number makes its public IP (10.0.0.N) and its VTEP MAC.
pub(crate) fn attrs(number: u8) -> LeaseAttrs {
    vxlan(number, number)
}

pub(crate) fn vxlan(ip: u8, mac: u8) -> LeaseAttrs {
    let vtep = VtepData { vni: 1, vtep_mac: [2, 0, 0, 0, 0, mac] };
    LeaseAttrs::vxlan(Ipv4Addr::new(10, 0, 0, ip), vtep)
}

pub(crate) fn claim(number: u8) -> Claim {
    Claim {
        attrs: attrs(number),
        previous: None,
        occupied: vec![],
        bridges: vec![],
        v6: ClaimV6::default(),
        ttl: Duration::from_secs(60),
        renew_margin: Duration::ZERO,
    }
}

pub(crate) fn net(text: &str) -> Ipv4Net {
    text.parse().unwrap()
}

pub(crate) fn key(subnet: Ipv4Net) -> String {
    format!("{PREFIX}/subnets/{}-{}", subnet.network(), subnet.prefix_len())
}

pub(crate) fn options(endpoints: &[String]) -> EtcdOptions {
    EtcdOptions { endpoints: endpoints.to_vec(), prefix: PREFIX.to_owned(), ..EtcdOptions::default() }
}

pub(crate) async fn connect(etcd: &Etcd) -> Registry {
    Registry::connect(options(&[etcd.endpoint()])).await.unwrap()
}

/// An etcd on loopback that holds this network config.
pub(crate) fn etcd_with(config: &str) -> Etcd {
    let etcd = Etcd::on_loopback().unwrap();
    etcd.ctl(&["put", &format!("{PREFIX}/config"), config]).unwrap();
    etcd
}

/// A node that has claimed its lease and keeps it.
pub(crate) struct Node {
    pub(crate) lease: Lease,
    pub(crate) keeper: Keeper,
}

impl Deref for Node {
    type Target = Keeper;

    fn deref(&self) -> &Keeper {
        &self.keeper
    }
}

impl Node {
    pub(crate) async fn join(registry: &Registry, claim: Claim) -> Result<Self, ClaimError> {
        let config = registry.network_config().await?;
        Self::join_with(registry, config, claim).await
    }

    pub(crate) async fn join_with(
        registry: &Registry,
        config: NetworkConfig,
        claim: Claim,
    ) -> Result<Self, ClaimError> {
        let lease = registry.claim(&config, &claim).await?;
        let keeper = registry.clone().keep(config, claim, lease.clone());
        Ok(Self { lease, keeper })
    }

    pub(crate) async fn start(etcd: &Etcd, number: u8) -> Self {
        let node = Self::join(&connect(etcd).await, claim(number)).await.unwrap();
        node.until("it follows etcd", |cluster| cluster.connected).await;
        node
    }

    /// Waits until a snapshot is as it should be, and returns it.
    pub(crate) async fn until(&self, what: &str, is: impl FnMut(&Cluster) -> bool) -> Arc<Cluster> {
        self.within(Duration::from_secs(20), what, is).await
    }

    pub(crate) async fn within(
        &self,
        limit: Duration,
        what: &str,
        mut is: impl FnMut(&Cluster) -> bool,
    ) -> Arc<Cluster> {
        let mut cluster = self.keeper.cluster.clone();
        let wait = cluster.wait_for(|cluster| is(cluster));
        match tokio::time::timeout(limit, wait).await {
            Ok(cluster) => Arc::clone(&cluster.expect("the keeper's task goes on")),
            Err(_) => panic!("waited {limit:?} until {what}; now {:#?}", self.now()),
        }
    }

    pub(crate) fn now(&self) -> Arc<Cluster> {
        Arc::clone(&self.keeper.cluster.borrow())
    }
}

/// What most of these tests ask of a lease.
pub(crate) trait OfIpv4 {
    fn subnet(&self) -> Ipv4Net;
}

impl OfIpv4 for Lease {
    fn subnet(&self) -> Ipv4Net {
        self.key.subnet.expect("an IPv4 half")
    }
}

pub(crate) fn held(cluster: &Cluster) -> Option<&Lease> {
    match &cluster.own {
        Own::Held(lease) => Some(lease),
        Own::Lost { .. } => None,
    }
}

/// The number of the node that publishes this: the end of its address, whichever family it is of.
pub(crate) fn number(attrs: &LeaseAttrs) -> u8 {
    match attrs.identity() {
        Some(std::net::IpAddr::V4(address)) => address.octets()[3],
        Some(std::net::IpAddr::V6(address)) => address.octets()[15],
        None => 0,
    }
}

/// Whether the peers are those with these numbers and no others.
pub(crate) fn peers_are(cluster: &Cluster, numbers: &[u8]) -> bool {
    let mut found: Vec<_> = cluster.peers.values().map(|lease| number(&lease.attrs)).collect();
    found.sort_unstable();
    found == numbers
}

/// Asks a condition again and again for ten seconds.
pub(crate) async fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < Duration::from_secs(10), "waited 10 s until {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
