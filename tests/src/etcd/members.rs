//! A cluster of three etcds.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result};

use super::{Etcd, free_port};

/// Three members on loopback.
#[derive(Debug)]
pub struct Members {
    /// All of them, running or not.
    pub all: Vec<Etcd>,
}

impl Members {
    /// Starts three members and waits until all are healthy.
    ///
    /// # Errors
    ///
    /// As [`Etcd::on_loopback`].
    pub fn start() -> Result<Self> {
        let mut all = Vec::new();
        for name in ["one", "two", "three"] {
            let mut member = Etcd::new(None, Ipv4Addr::LOCALHOST.into(), free_port()?, free_port()?)?;
            member.name = name.to_owned();
            all.push(member);
        }
        let peers: Vec<_> =
            all.iter().map(|member| format!("{}={}", member.name, member.peer_url())).collect();
        for member in &mut all {
            member.initial_cluster = peers.join(",");
            member.spawn()?;
        }
        for member in &mut all {
            member.wait_healthy()?;
        }
        Ok(Self { all })
    }

    /// Where clients connect.
    #[must_use]
    pub fn endpoints(&self) -> Vec<String> {
        self.all.iter().map(Etcd::endpoint).collect()
    }

    /// Which of them leads, as an index.
    ///
    /// # Errors
    ///
    /// Where none does.
    pub fn leader(&self) -> Result<usize> {
        let leads = |member: &Etcd| {
            let status = member.ctl(&["endpoint", "status", "--write-out", "fields"]).unwrap_or_default();
            let field = |name: &str| {
                let line = status.lines().find(|line| line.starts_with(&format!("\"{name}\"")))?;
                Some(line.rsplit(' ').next()?.to_owned())
            };
            matches!((field("MemberID"), field("Leader")), (Some(id), Some(leader)) if id == leader)
        };
        self.all.iter().position(leads).context("no member leads")
    }
}
