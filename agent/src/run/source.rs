//! Where the node's lease comes from: etcd, or the Kubernetes API.

use std::{fmt::Display, time::Duration};

use anyhow::Result;

use crate::{
    config::{Config, EtcdConfig},
    health::Readiness,
    kube::{self, Api, KubeError, KubeOptions, OwnNode},
    lease::Lease,
    network::NetworkConfig,
    registry::{Claim, ClaimError, EtcdOptions, Keeper, Registry},
};

/// How often the network config, or this node, is asked for while there is none, as flannel does.
const RETRY: Duration = Duration::from_secs(1);
/// How often the absence is told of: the first time, then every so many tries.
const REMIND: u32 = 30;

/// Where the lease comes from.
pub(super) enum Source {
    /// A subnet is claimed there.
    Etcd(Registry),
    /// The subnet is this node's podCIDR.
    Kube(Box<(Api, OwnNode)>),
}

impl Source {
    /// Waits until there is a network config, and in Kubernetes until this node has a subnet. What people have set for
    /// the node there overrules `config`.
    ///
    /// # Errors
    ///
    /// Where options cannot work, and where the node's subnet is outside of the network.
    pub(super) async fn open(config: &mut Config) -> Result<(Self, NetworkConfig)> {
        let Some(kube) = &config.kube else {
            let registry = Registry::connect(etcd_options(&config.etcd)).await?;
            let network = until("network config", async || registry.network_config().await, |_| true).await?;
            return Ok((Self::Etcd(registry), network));
        };
        let api = Api::connect(KubeOptions::new(kube.clone())).await?;
        let may_pass = KubeError::may_pass;
        let mut network = until("network config", async || kube::network_config(kube), may_pass).await?;
        let env = |name: &str| std::env::var(name).ok();
        let name = until("name of this node", async || api.node_name(&env).await, may_pass).await?;
        let own =
            until("subnet for this node", async || api.own_node(&name, &network).await, may_pass).await?;
        tracing::info!(node = name, subnet = own.key.subnets(), "podCIDR found");
        let wanted = network.families();
        network.keep_families(own.given);
        if network.families() != wanted {
            tracing::warn!(
                given = own.given.subnets(),
                "the network config has a family of which this node has no podCIDR: that one is not carried here"
            );
        }
        network.take_subnet_len(own.key);
        config.uplink.public_ip = own.public_ip.or(config.uplink.public_ip);
        config.uplink.public_ipv6 = own.public_ipv6.or(config.uplink.public_ipv6);
        Ok((Self::Kube(Box::new((api, own))), network))
    }

    /// The MAC address that peers know of this node's VTEP.
    pub(super) fn vtep_mac(&self) -> Option<[u8; 6]> {
        match self {
            Self::Etcd(_) => None,
            Self::Kube(kube) => kube.1.vtep_mac,
        }
    }

    /// The same of the VTEP with an IPv6 underlay.
    pub(super) fn vtep_mac_v6(&self) -> Option<[u8; 6]> {
        match self {
            Self::Etcd(_) => None,
            Self::Kube(kube) => kube.1.vtep_mac_v6,
        }
    }

    /// Takes the lease, waiting while its place is away, and starts the task that keeps it.
    ///
    /// # Errors
    ///
    /// Where there is none to be had.
    pub(super) async fn take(
        self,
        network: &NetworkConfig,
        claim: Claim,
        readiness: &Readiness,
    ) -> Result<(Lease, Keeper)> {
        match self {
            Self::Etcd(registry) => {
                let claimed = async || registry.claim(network, &claim).await;
                let lease = until("lease", claimed, ClaimError::may_pass).await?;
                Ok((lease.clone(), registry.keep(network.clone(), claim, lease)))
            }
            Self::Kube(kube) => {
                let ((api, mut own), attrs) = (*kube, claim.attrs);
                let lease =
                    until("lease", async || api.publish(&mut own, &attrs).await, KubeError::may_pass).await?;
                tracing::info!(subnet = lease.key.subnets(), "lease published");
                Ok((lease.clone(), api.keep(own, network.clone(), attrs, lease, readiness.clone())))
            }
        }
    }
}

fn etcd_options(etcd: &EtcdConfig) -> EtcdOptions {
    EtcdOptions {
        endpoints: etcd.endpoints.clone(),
        prefix: etcd.prefix.clone(),
        ca_file: etcd.ca_file.clone(),
        cert_file: etcd.cert_file.clone(),
        key_file: etcd.key_file.clone(),
        username: etcd.username.clone(),
        password: etcd.password.as_ref().map(|password| password.expose().to_owned()),
    }
}

/// Asks until there is an answer, or an error that waiting does not mend.
async fn until<T, E: Display>(
    what: &str,
    mut ask: impl AsyncFnMut() -> Result<T, E>,
    may_pass: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let mut tries = 0;
    let mut told = String::new();
    loop {
        match ask().await {
            Ok(answer) => return Ok(answer),
            Err(error) if !may_pass(&error) => return Err(error),
            Err(error) if tries % REMIND == 0 || told != error.to_string() => {
                tracing::warn!("no {what} yet, trying every second: {error}");
                told = error.to_string();
            }
            Err(error) => tracing::debug!("no {what} yet: {error}"),
        }
        tries += 1;
        tokio::time::sleep(RETRY).await;
    }
}
