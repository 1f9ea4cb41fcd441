//! Leases from the Kubernetes API, as `flanneld --kube-subnet-mgr` takes them. The only user of kube-client.
//!
//! Kubernetes gives each node its subnets (`spec.podCIDRs`, one of each family); the node says by annotations where and what it is. So there
//! is nothing to claim and nothing that runs out: this node's part is to read its subnet, write its annotations, and
//! say once that the network is there (the condition `NetworkUnavailable`). A [`registry::Keeper`](crate::registry::Keeper)
//! then follows the other nodes and publishes the same snapshots as for etcd. While the API is away the last one stays
//! true.
//!
//! Of a node only name, uid, podCIDRs and flannel's annotations are kept. The listing comes in pages of whole nodes,
//! each read into these and dropped; the watch asks for metadata alone (`PartialObjectMetadata`), which spares API
//! server and network the status that every node rewrites all the time; and a podCIDR, which never changes once it is
//! set, is fetched for a node that is new.

mod annotations;
mod connection;
mod keeper;
mod node;
mod nodes;
mod own;

use std::{path::PathBuf, time::Duration};

use thiserror::Error;

pub use self::{annotations::Annotations, connection::Api, own::OwnNode};
use crate::{
    config::KubeConfig,
    family::{Family, V6},
    network::{ConfigError, NetworkConfig},
};

/// What is to be known to follow the nodes.
#[derive(Clone, Debug)]
pub struct KubeOptions {
    /// Where the API is and which annotations count.
    pub config: KubeConfig,
    /// How long a watch lasts before it is asked for anew; the server gets up to as much again, at random. A
    /// connection that has died without a word is noticed after this time, and [`Self::limit`].
    pub watch: Duration,
    /// How long any other request may take, and how much longer than it should a watch.
    pub limit: Duration,
    /// How many nodes come in one page of a listing.
    pub page: u32,
}

impl KubeOptions {
    /// The usual times. A page of 100 whole nodes is some 1.5 MB of JSON.
    #[must_use]
    pub fn new(config: KubeConfig) -> Self {
        Self { config, watch: Duration::from_secs(90), limit: Duration::from_secs(10), page: 100 }
    }
}

/// Why there is no answer from the Kubernetes API, or none that helps.
#[derive(Debug, Error)]
pub enum KubeError {
    /// The options cannot work, whatever the API does.
    #[error("Kubernetes: {0}")]
    Options(String),
    /// Nobody answered; worth another try.
    #[error("Kubernetes: cannot {what}: {reason}")]
    Unreachable {
        /// What was to be done.
        what: &'static str,
        /// What went wrong.
        reason: String,
    },
    /// We are not who may do that, or not known at all.
    #[error(
        "Kubernetes: may not {what}: {reason}; the agent's ClusterRole must allow get, list and watch of nodes, patch of nodes/status, and get of pods unless NODE_NAME is set"
    )]
    Denied {
        /// What was to be done.
        what: &'static str,
        /// The answer.
        reason: String,
    },
    /// It answered, and refused.
    #[error("Kubernetes: cannot {what}: {code} {reason}")]
    Refused {
        /// What was to be done.
        what: &'static str,
        /// The HTTP status.
        code: u16,
        /// The answer.
        reason: String,
    },
    /// There is no such node.
    #[error(
        "Kubernetes has no node {0:?}: NODE_NAME (or the pod of POD_NAMESPACE and POD_NAME) must name the node that this agent runs on, as kubectl get nodes shows it"
    )]
    NoNode(String),
    /// The node has no subnet, or none that can be used.
    #[error("node {node:?}: {reason}")]
    PodCidr {
        /// The node.
        node: String,
        /// What is wrong, and what would be right.
        reason: String,
        /// Whether it may come right by itself.
        awaited: bool,
    },
    /// The network config cannot be read, or is wrong.
    #[error("{path}: {error} (--net-config-path)")]
    NetConfig {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        error: String,
    },
}

impl KubeError {
    /// Whether waiting may help. What people must put right counts as such: an API server that has only just started
    /// denies everything as well.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Options(_) => false,
            Self::PodCidr { awaited, .. } => *awaited,
            Self::Unreachable { .. } | Self::Denied { .. } | Self::Refused { .. } => true,
            Self::NoNode(_) | Self::NetConfig { .. } => true,
        }
    }
}

/// Reads the network config from its file, which in a cluster is part of a ConfigMap.
///
/// # Errors
///
/// Where it cannot be read or is wrong; the error names the file.
pub fn network_config(config: &KubeConfig) -> Result<NetworkConfig, KubeError> {
    let path = &config.net_config;
    let wrong = |error: String| KubeError::NetConfig { path: path.clone(), error };
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    NetworkConfig::parse_for_given_subnets(&text).map_err(|error: ConfigError| wrong(error.to_string()))
}

/// The subnet of the node if it lies where it should.
fn inside<F: Family>(network: F::Net, subnet: F::Net, node: &str) -> Result<F::Net, KubeError> {
    let refuse = |reason| Err(KubeError::PodCidr { node: node.to_owned(), reason, awaited: false });
    if !F::covers(network, subnet) {
        let key = if F::BITS == V6::BITS { "IPv6Network" } else { "Network" };
        return refuse(format!(
            "its podCIDR {subnet} is outside of the network {network}: {key} in net-conf.json must be the cluster CIDR (--cluster-cidr of kube-controller-manager)"
        ));
    }
    let longest = F::BITS - 2;
    if F::prefix_len(subnet) > longest {
        return refuse(format!(
            "its podCIDR {subnet} has no room for pods: the longest useful prefix is /{longest}"
        ));
    }
    Ok(subnet)
}
