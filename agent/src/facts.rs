//! What the agent wants this node to be, for commands that compare it with what is: `loden doctor`, `loden explain`.
//!
//! A running agent answers with it at its control socket. It also writes it to `<run-dir>/facts.json`, soon after a
//! change (the more peers the later), on each tick and when it ends, so that a node can be looked at whose agent is gone.
//! There is no secret in it.

use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use crate::{
    control::{self, Request},
    dataplane::Settings,
    family::{Family, V4, V6},
    lease::LeaseKey,
    overlay::Desired,
    uplink::Uplink,
    wireguard::PublicKey,
};

/// The node as it ought to be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// Version of the agent.
    pub version: String,
    /// What it is in IPv4, in a network that has IPv4.
    pub v4: Option<Half<V4>>,
    /// What it is in IPv6, in a network that has IPv6.
    pub v6: Option<Half<V6>>,
    /// Why the lease of its subnets is lost, where it is.
    pub lost: Option<String>,
    /// `vxlan`, `host-gw`, `wireguard`; empty for alloc.
    pub backend: String,
    /// The interface that carries the overlay.
    pub uplink: Uplink,
    /// The WireGuard devices, where the backend has them.
    #[serde(default)]
    pub wireguard: Vec<Tunnel>,
    /// MTU of the pods, in bytes.
    pub pod_mtu: u32,
    /// What the programs are loaded with; `None` where the kernel alone carries the packets.
    pub programs: Option<Settings>,
    /// Why the kernel alone carries them.
    pub kernel_alone: Option<String>,
    /// Peers that are left out, and why.
    pub refused: BTreeSet<String>,
    /// Where the leases are.
    pub etcd: Etcd,
}

/// The node in one family.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(bound = "")]
pub struct Half<F: Family = V4> {
    /// The cluster's network.
    pub network: F::Net,
    /// This node's subnet.
    pub subnet: F::Net,
    /// The VXLAN device, where the backend has one.
    pub device: Option<Device>,
    /// Routes, neighbours and FDB entries of the peers; `None` where they are not known yet, or not ours to make.
    pub overlay: Option<Desired<F>>,
}

/// The VXLAN device as it ought to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// Its interface index.
    pub index: u32,
    /// Its MAC, as the lease says it.
    pub mac: [u8; 6],
    /// In bytes.
    pub mtu: u32,
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
}

/// A WireGuard device as it ought to be. No secret is here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tunnel {
    /// Its name.
    pub name: String,
    /// Its interface index.
    pub index: u32,
    /// In bytes.
    pub mtu: u32,
    /// UDP port.
    pub port: u16,
    /// This node's key, as the lease says it.
    pub public_key: PublicKey,
    /// The peers' keys.
    pub peers: BTreeSet<PublicKey>,
}

/// How etcd is reached. The password is not here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Etcd {
    /// URLs.
    pub endpoints: Vec<String>,
    /// What all keys start with.
    pub prefix: String,
    /// PEM files, as in `--etcd-cafile` and so on.
    pub ca_file: Option<PathBuf>,
    /// See `ca_file`.
    pub cert_file: Option<PathBuf>,
    /// See `ca_file`.
    pub key_file: Option<PathBuf>,
    /// User of etcd's own authentication.
    pub username: Option<String>,
}

/// Where the facts come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The running agent.
    Agent,
    /// The file; no agent answers, for this reason.
    File(String),
}

impl Facts {
    /// The subnets of this node.
    #[must_use]
    pub fn key(&self) -> LeaseKey {
        LeaseKey {
            subnet: self.v4.as_ref().map(|half| half.subnet),
            subnet_v6: self.v6.as_ref().map(|half| half.subnet),
        }
    }

    /// Asks the agent, and where none answers, reads the file.
    ///
    /// # Errors
    ///
    /// Where there is neither.
    pub async fn find(run_dir: &Path) -> Result<(Self, Source)> {
        match control::ask(run_dir, Request::Facts).await {
            Ok(answer) if answer["error"].is_string() => bail!("the agent answers: {}", answer["error"]),
            Ok(answer) => {
                let facts = serde_json::from_value(answer).context("the agent is of another version")?;
                Ok((facts, Source::Agent))
            }
            Err(silent) => match Self::read(run_dir) {
                Ok(facts) => Ok((facts, Source::File(format!("{silent:#}")))),
                Err(error) => bail!("{silent:#}; and there is nothing that one has left: {error:#}"),
            },
        }
    }

    fn read(run_dir: &Path) -> Result<Self> {
        let path = path(run_dir);
        let text = fs::read(&path).with_context(|| path.display().to_string())?;
        serde_json::from_slice(&text).with_context(|| {
            format!("{} is not of this version; it is written anew when the agent starts", path.display())
        })
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    ///
    /// Where the directory cannot be written.
    pub fn write(&self, run_dir: &Path) -> Result<()> {
        let mut file = NamedTempFile::new_in(run_dir).with_context(|| run_dir.display().to_string())?;
        // Whole, because a large cluster's has millions of words, and the serialiser writes each by itself.
        let mut text = serde_json::to_vec(self)?;
        text.push(b'\n');
        file.write_all(&text)?;
        file.persist(path(run_dir)).with_context(|| path(run_dir).display().to_string())?;
        Ok(())
    }
}

/// The file.
#[must_use]
pub fn path(run_dir: &Path) -> PathBuf {
    run_dir.join("facts.json")
}
