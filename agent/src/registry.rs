//! The registry of leases: etcd, as flannel uses it. The only user of etcd-client. ([`crate::kube`] is the other place
//! of leases, with the same snapshots.)
//!
//! A [`Registry`] reads the network config and claims a lease; from then on a [`Keeper`] owns the lease, follows
//! the peers and publishes whole snapshots ([`Cluster`]). Every write is a transaction that compares what was
//! read, so no lease of another node is ever overwritten. While etcd is away the last snapshot stays true.

mod claim;
mod cluster;
mod connection;
mod endpoint;
mod grace;
mod keeper;
mod outage;
mod peers;
mod record;
mod selection;
mod standing;
mod stats;
mod store;

use std::{
    collections::BTreeSet,
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use thiserror::Error;

pub use self::{
    claim::{Claim, ClaimError, ClaimV6},
    cluster::{Cluster, ConfigState, Own},
    grace::GRACE,
    keeper::Keeper,
    peers::{LeaseChange, Peers},
    stats::EtcdHealth,
};
pub(crate) use self::{
    cluster::Halves,
    keeper::{Command, Heard},
    outage::{Outage, Waits},
};
use self::{connection::Connection, endpoint::Endpoint, record::Told, stats::Stats};
use crate::network::{ConfigError, NetworkConfig};

/// Where etcd is and who we are to it.
#[derive(Clone, Default)]
pub struct EtcdOptions {
    /// `http://HOST:PORT` or `https://HOST:PORT`, in no order.
    pub endpoints: Vec<String>,
    /// What all keys start with, flannel's default is `/coreos.com/network`.
    pub prefix: String,
    /// PEM file of the authorities that sign the servers' certificates; `None`: those of the system.
    pub ca_file: Option<PathBuf>,
    /// PEM file of our certificate.
    pub cert_file: Option<PathBuf>,
    /// PEM file of our certificate's key.
    pub key_file: Option<PathBuf>,
    /// User of etcd's own authentication.
    pub username: Option<String>,
    /// That user's password.
    pub password: Option<String>,
}

impl fmt::Debug for EtcdOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdOptions")
            .field("endpoints", &self.endpoints)
            .field("prefix", &self.prefix)
            .field("ca_file", &self.ca_file)
            .field("cert_file", &self.cert_file)
            .field("key_file", &self.key_file)
            .field("username", &self.username)
            .field("password", &self.password.as_ref().map(|_| "(set)"))
            .finish()
    }
}

/// Why the registry cannot answer.
#[derive(Debug, Error)]
pub enum RegistryError {
    /// The options cannot work, whatever etcd does.
    #[error("etcd: {0}")]
    Options(String),
    /// No endpoint answered; worth another try.
    #[error("etcd: cannot {what}: {tried}")]
    Unreachable {
        /// What was to be done.
        what: &'static str,
        /// What each endpoint failed with.
        tried: String,
    },
    /// etcd answered, and refused.
    #[error("etcd: cannot {what}: {reason}")]
    Refused {
        /// What was to be done.
        what: &'static str,
        /// Its answer.
        reason: String,
    },
    /// There is no network config: not made yet, or under another prefix.
    #[error(
        "no network config in etcd at {key}: create it (etcdctl put {key} '{{\"Network\": \"10.5.0.0/16\"}}') or set --etcd-prefix to where it is"
    )]
    NoConfig {
        /// The key that was read.
        key: String,
    },
    /// There is one, and it is wrong.
    #[error("{error} (in etcd at {key})")]
    Config {
        /// The key that was read.
        key: String,
        /// What is wrong.
        error: ConfigError,
    },
}

/// A connection to etcd, made when it is first needed and again whenever it breaks. Clones share it.
#[derive(Clone, Debug)]
pub struct Registry {
    connection: Arc<Connection>,
    prefix: Arc<str>,
    told: Arc<Mutex<Told>>,
    /// Ids of the etcd leases that were granted to this process and have not ended as far as it knows.
    granted: Arc<Mutex<BTreeSet<i64>>>,
    stats: Arc<Stats>,
}

impl Registry {
    /// Checks the options and reads the TLS files. Does not ask etcd anything: that it is away is no reason not to
    /// start.
    ///
    /// # Errors
    ///
    /// [`RegistryError::Options`], naming the option, its value and what would be right.
    pub async fn connect(options: EtcdOptions) -> Result<Self, RegistryError> {
        let prefix = prefix(&options.prefix)?.into();
        let connection = Arc::new(Connection::new(options).await?);
        let stats = Arc::clone(&connection.stats);
        Ok(Self { connection, prefix, told: Arc::default(), granted: Arc::default(), stats })
    }

    /// Reads the network config.
    ///
    /// # Errors
    ///
    /// Where etcd is away, there is no config, or it is wrong.
    pub async fn network_config(&self) -> Result<NetworkConfig, RegistryError> {
        let key = self.config_key();
        match self.read(&key).await? {
            None => Err(RegistryError::NoConfig { key }),
            Some(value) => parse_config(&value).map_err(|error| RegistryError::Config { key, error }),
        }
    }

    /// Starts the task that owns the lease from now on. The config must be the one that the lease was claimed with.
    #[must_use]
    pub fn keep(self, config: NetworkConfig, claim: Claim, lease: crate::lease::Lease) -> Keeper {
        Keeper::start(self, config, claim, lease)
    }

    /// How etcd is heard.
    pub(crate) fn health(&self) -> EtcdHealth {
        let (endpoints, member) = self.connection.endpoints();
        EtcdHealth {
            endpoints,
            member,
            requests: self.stats.requests.get(),
            errors: self.stats.errors.get(),
            renewals: self.stats.renewals.get(),
            broken_watches: self.stats.broken_watches.get(),
        }
    }

    /// The key of the network config.
    #[must_use]
    pub fn config_key(&self) -> String {
        format!("{}/config", self.prefix)
    }

    /// What the keys of all leases start with. flannel reads the same without the last slash.
    fn subnets_prefix(&self) -> String {
        format!("{}/subnets/", self.prefix)
    }
}

/// The prefix as flannel joins it (Go's `path.Join`): no empty segments, no slash at the end.
fn prefix(prefix: &str) -> Result<String, RegistryError> {
    if prefix.is_empty() {
        return Err(RegistryError::Options("the prefix is empty: flannel's is /coreos.com/network".into()));
    }
    let root = if prefix.starts_with('/') { "/" } else { "" };
    let segments: Vec<_> = prefix.split('/').filter(|segment| !segment.is_empty()).collect();
    Ok(format!("{root}{}", segments.join("/")).trim_end_matches('/').to_owned())
}

fn parse_config(value: &[u8]) -> Result<NetworkConfig, ConfigError> {
    let text = std::str::from_utf8(value).map_err(|_| ConfigError("not UTF-8".into()))?;
    NetworkConfig::parse(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_output_does_not_hold_the_password() {
        let password = Some("hunter2".to_owned());
        let options = EtcdOptions { password, username: Some("root".into()), ..EtcdOptions::default() };
        let text = format!("{options:?}");
        assert!(!text.contains("hunter2") && text.contains("root") && text.contains("(set)"), "{text}");
    }

    #[test]
    fn prefixes_are_joined_as_flannel_does() {
        for (given, joined) in
            [("/coreos.com/network", "/coreos.com/network"), ("/a//b/", "/a/b"), ("a/b", "a/b"), ("/", "")]
        {
            assert_eq!(prefix(given).unwrap(), joined, "{given}");
        }
        assert!(prefix("").is_err());
    }
}
