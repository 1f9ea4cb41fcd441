//! What the tests share: an API with nodes, and lease sources without an agent around them.

use std::{ops::Deref, path::PathBuf, sync::Arc, time::Duration};

use ipnet::Ipv4Net;
use loden_agent::{
    config::KubeConfig,
    health::Readiness,
    kube::{Api, KubeError, KubeOptions},
    lease::{LeaseAttrs, LeaseKey, VtepData},
    network::NetworkConfig,
    registry::{Cluster, Keeper, Own},
};

use crate::server::Server;

pub(crate) const PREFIX: &str = "flannel.alpha.coreos.com/";
pub(crate) const CONFIG: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;

/// Short times, so that silence is noticed while a test waits, and small pages.
pub(crate) fn options(url: &str) -> KubeOptions {
    let config = KubeConfig {
        api_url: Some(url.to_owned()),
        kubeconfig: None,
        annotation_prefix: PREFIX.to_owned(),
        net_config: PathBuf::from("/nonexistent/net-conf.json"),
        set_condition: true,
    };
    KubeOptions {
        watch: Duration::from_secs(60),
        limit: Duration::from_secs(2),
        page: 3,
        ..KubeOptions::new(config)
    }
}

pub(crate) fn network() -> NetworkConfig {
    NetworkConfig::parse(CONFIG).unwrap()
}

pub(crate) fn mac(n: u8) -> String {
    format!("02:00:00:00:00:{n:02x}")
}

pub(crate) fn attrs(n: u8) -> LeaseAttrs {
    LeaseAttrs::vxlan([192, 168, 64, n].into(), VtepData { vni: 1, vtep_mac: [2, 0, 0, 0, 0, n] })
}

/// An API with the nodes `n1` to `n<count>`, each with the podCIDR 10.244.<n>.0/24; all but the first as flannel leaves
/// them.
pub(crate) fn cluster_of(count: u8) -> Server {
    let server = Server::on_loopback();
    for n in 1..=count {
        let name = format!("n{n}");
        server.store().add_node(&name, Some(&format!("10.244.{n}.0/24")));
        if n > 1 {
            server.store().annotate_as_flannel(&name, &format!("192.168.64.{n}"), &mac(n));
        }
    }
    server
}

/// The lease source of one node.
pub(crate) struct Source {
    pub(crate) keeper: Keeper,
}

impl Deref for Source {
    type Target = Keeper;

    fn deref(&self) -> &Keeper {
        &self.keeper
    }
}

impl Source {
    /// Starts one for `n1` and waits until it follows the API.
    pub(crate) async fn start(server: &Server) -> Self {
        let source = Self::try_start(options(&server.url()), network(), 1).await.unwrap();
        source.until("it follows the API", |cluster| cluster.connected).await;
        source
    }

    pub(crate) async fn try_start(
        options: KubeOptions,
        network: NetworkConfig,
        n: u8,
    ) -> Result<Self, KubeError> {
        Self::try_start_as(options, network, n, attrs(n)).await
    }

    /// The same of a node that publishes this.
    pub(crate) async fn try_start_as(
        options: KubeOptions,
        mut network: NetworkConfig,
        n: u8,
        attrs: LeaseAttrs,
    ) -> Result<Self, KubeError> {
        let api = Api::connect(options).await?;
        let mut own = api.own_node(&format!("n{n}"), &network).await?;
        network.keep_families(own.given);
        network.take_subnet_len(own.key);
        let lease = api.publish(&mut own, &attrs).await?;
        // Without conditions it is ready from the start.
        Ok(Self { keeper: api.keep(own, network, attrs, lease, Readiness::new(&[])) })
    }

    /// Waits until a snapshot is as it should be, and returns it.
    pub(crate) async fn until(&self, what: &str, mut is: impl FnMut(&Cluster) -> bool) -> Arc<Cluster> {
        let mut cluster = self.keeper.cluster.clone();
        let wait = cluster.wait_for(|cluster| is(cluster));
        match tokio::time::timeout(Duration::from_secs(20), wait).await {
            Ok(cluster) => Arc::clone(&cluster.expect("the task goes on")),
            Err(_) => panic!("waited 20 s until {what}; now {:#?}", self.now()),
        }
    }

    /// Waits until the peers are those with these numbers and no others.
    pub(crate) async fn until_peers(&self, numbers: &[u8]) -> Arc<Cluster> {
        self.until(&format!("the peers are {numbers:?}"), |cluster| peers(cluster) == numbers).await
    }

    pub(crate) fn now(&self) -> Arc<Cluster> {
        Arc::clone(&self.keeper.cluster.borrow())
    }
}

/// The numbers of the peers, by their subnets.
pub(crate) fn peers(cluster: &Cluster) -> Vec<u8> {
    cluster.peers.keys().map(|key| key.subnet.map_or(0, |subnet| subnet.network().octets()[2])).collect()
}

pub(crate) fn subnet(n: u8) -> Ipv4Net {
    Ipv4Net::new([10, 244, n, 0].into(), 24).unwrap()
}

pub(crate) fn lost(cluster: &Cluster) -> Option<&str> {
    match &cluster.own {
        Own::Held(_) => None,
        Own::Lost { reason, .. } => Some(reason),
    }
}

/// The last octet of the MAC address of a peer's VTEP.
pub(crate) fn vtep(cluster: &Cluster, n: u8) -> Option<u8> {
    Some(cluster.peers.get(&LeaseKey::v4(subnet(n)))?.attrs.vtep().ok()?.vtep_mac[5])
}
