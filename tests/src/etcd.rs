//! A real etcd.

use std::{
    net::{Ipv4Addr, TcpListener},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

use crate::{
    netns::{self, Netns},
    process::{Process, wait_for},
    remains,
};

/// A single etcd with a data directory of its own.
#[derive(Debug)]
pub struct Etcd {
    process: Option<Process>,
    data: TempDir,
    address: Ipv4Addr,
    client_port: u16,
    peer_port: u16,
    netns: Option<String>,
}

impl Etcd {
    /// Starts one on loopback, at ports that are free now.
    ///
    /// # Errors
    ///
    /// Where etcd is missing or not healthy within ten seconds.
    pub fn on_loopback() -> Result<Self> {
        Self::start(None, Ipv4Addr::LOCALHOST, free_port()?, free_port()?)
    }

    /// Starts one inside a namespace, at 2379 of an address that the namespace has.
    ///
    /// # Errors
    ///
    /// As [`Self::on_loopback`].
    pub fn inside(netns: &Netns, address: Ipv4Addr) -> Result<Self> {
        Self::start(Some(netns.name().to_owned()), address, 2379, 2380)
    }

    fn start(netns: Option<String>, address: Ipv4Addr, client_port: u16, peer_port: u16) -> Result<Self> {
        let data = remains::directory("etcd")?;
        let mut etcd = Self { process: None, data, address, client_port, peer_port, netns };
        etcd.restart()?;
        Ok(etcd)
    }

    /// Where clients connect, `http://ADDRESS:PORT`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}:{}", self.address, self.client_port)
    }

    /// The directory that holds what it stores.
    #[must_use]
    pub fn data(&self) -> &Path {
        self.data.path()
    }

    /// Ends it at once (SIGKILL), as a crash does.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Starts it again on the same data (ends it first where it runs) and waits until it is healthy.
    ///
    /// # Errors
    ///
    /// As [`Self::on_loopback`].
    pub fn restart(&mut self) -> Result<()> {
        self.kill();
        let client = self.endpoint();
        let peer = format!("http://{}:{}", self.address, self.peer_port);
        let mut command = self.command("etcd");
        command
            .args(["--name", "one", "--log-level", "error"])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("one={peer}")])
            .arg("--data-dir")
            .arg(self.data.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        self.process = Some(Process::start(&mut command)?);
        wait_for("etcd to be healthy", Duration::from_secs(10), || self.ctl(&["endpoint", "health"]).ok())?;
        Ok(())
    }

    /// Runs `etcdctl` with these arguments against it.
    ///
    /// # Errors
    ///
    /// Where etcdctl fails.
    pub fn ctl(&self, args: &[&str]) -> Result<String> {
        let mut command = self.command("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &self.endpoint(), "--dial-timeout", "2s"]);
        netns::output(command.args(args))
    }

    fn command(&self, program: &str) -> Command {
        match &self.netns {
            None => Command::new(program),
            Some(name) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/run/netns/{name}")).arg(program);
                command
            }
        }
    }
}

/// A TCP port of loopback that nobody listens on now.
///
/// # Errors
///
/// Where none is left.
pub fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("no free port on loopback")?;
    Ok(listener.local_addr()?.port())
}
