//! A real etcd.

mod gateway;
mod members;
mod tls;

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    sched::{CloneFlags, setns},
    sys::signal::Signal,
};
use tempfile::TempDir;

pub use self::{
    gateway::{Gateway, Write},
    members::Members,
    tls::{Authority, Pair},
};

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
    address: IpAddr,
    client_port: u16,
    peer_port: u16,
    netns: Option<String>,
    name: String,
    /// The members that the cluster begins with, `NAME=PEER URL`; itself alone where empty.
    initial_cluster: String,
    tls: Option<Tls>,
    flags: Vec<String>,
}

/// What makes an etcd speak TLS to clients.
#[derive(Clone, Debug)]
struct Tls {
    authority: Arc<Authority>,
    /// Whether clients must show a certificate.
    mutual: bool,
}

impl Etcd {
    /// Starts one on loopback, at ports that are free now.
    ///
    /// # Errors
    ///
    /// Where etcd is missing or not healthy within ten seconds.
    pub fn on_loopback() -> Result<Self> {
        Self::start(None, Ipv4Addr::LOCALHOST.into(), free_port()?, free_port()?)
    }

    /// Starts one inside a namespace, at 2379 of an address that the namespace has.
    ///
    /// # Errors
    ///
    /// As [`Self::on_loopback`].
    pub fn inside(netns: &Netns, address: impl Into<IpAddr>) -> Result<Self> {
        Self::start(Some(netns.name().to_owned()), address.into(), 2379, 2380)
    }

    /// Starts one on loopback with more flags.
    ///
    /// # Errors
    ///
    /// As [`Self::on_loopback`].
    pub fn with_flags(flags: &[&str]) -> Result<Self> {
        let mut etcd = Self::new(None, Ipv4Addr::LOCALHOST.into(), free_port()?, free_port()?)?;
        etcd.flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
        etcd.restart()?;
        Ok(etcd)
    }

    /// Starts one on loopback that speaks TLS, by a certificate of this authority; `mutual`: and wants one of the
    /// client.
    ///
    /// # Errors
    ///
    /// As [`Self::on_loopback`].
    pub fn with_tls(authority: Arc<Authority>, mutual: bool) -> Result<Self> {
        let mut etcd = Self::new(None, Ipv4Addr::LOCALHOST.into(), free_port()?, free_port()?)?;
        etcd.tls = Some(Tls { authority, mutual });
        etcd.restart()?;
        Ok(etcd)
    }

    fn start(netns: Option<String>, address: IpAddr, client_port: u16, peer_port: u16) -> Result<Self> {
        let mut etcd = Self::new(netns, address, client_port, peer_port)?;
        etcd.restart()?;
        Ok(etcd)
    }

    /// One that does not run yet.
    fn new(netns: Option<String>, address: IpAddr, client_port: u16, peer_port: u16) -> Result<Self> {
        let data = remains::directory("etcd")?;
        let (process, tls) = (None, None);
        let (name, initial_cluster, flags) = ("one".to_owned(), String::new(), Vec::new());
        Ok(Self { process, data, address, client_port, peer_port, netns, name, initial_cluster, tls, flags })
    }

    /// Where clients connect, `http://ADDRESS:PORT` or `https://ADDRESS:PORT`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", SocketAddr::new(self.address, self.client_port))
    }

    fn peer_url(&self) -> String {
        format!("http://{}", SocketAddr::new(self.address, self.peer_port))
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
        self.spawn()?;
        self.wait_healthy()
    }

    /// Starts it with nothing stored, as after the loss of its disk.
    ///
    /// # Errors
    ///
    /// As [`Self::on_loopback`].
    pub fn restart_empty(&mut self) -> Result<()> {
        self.kill();
        fs::remove_dir_all(self.data.path())?;
        fs::create_dir(self.data.path())?;
        self.restart()
    }

    /// Keeps it from running (SIGSTOP): connections stay and nothing comes back over them.
    ///
    /// # Errors
    ///
    /// Where it does not run.
    pub fn freeze(&self) -> Result<()> {
        self.running()?.signal(Signal::SIGSTOP)
    }

    /// Lets it go on (SIGCONT).
    ///
    /// # Errors
    ///
    /// Where it does not run.
    pub fn thaw(&self) -> Result<()> {
        self.running()?.signal(Signal::SIGCONT)
    }

    fn running(&self) -> Result<&Process> {
        self.process.as_ref().context("etcd does not run")
    }

    fn spawn(&mut self) -> Result<()> {
        self.kill();
        let (client, peer) = (self.endpoint(), self.peer_url());
        let alone = format!("{}={peer}", self.name);
        let members = if self.initial_cluster.is_empty() { &alone } else { &self.initial_cluster };
        let mut command = self.command("etcd");
        command
            .args(["--name", &self.name, "--log-level", "error"])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", members])
            .args(&self.flags)
            .arg("--data-dir")
            .arg(self.data.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if let Some(Tls { authority, mutual }) = &self.tls {
            command.arg("--cert-file").arg(&authority.server().cert);
            command.arg("--key-file").arg(&authority.server().key);
            if *mutual {
                command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(authority.certificate());
            }
        }
        self.process = Some(Process::start(&mut command)?);
        Ok(())
    }

    fn wait_healthy(&mut self) -> Result<()> {
        wait_for("etcd to be healthy", Duration::from_secs(20), || {
            match self.ctl(&["endpoint", "health"]) {
                Ok(_) => Some(()),
                // With authentication on, a refusal is as much of an answer.
                Err(error) => format!("{error:#}").contains("user name is empty").then_some(()),
            }
        })?;
        // Somebody else's etcd may have answered, at a port that was free when we looked.
        let ended = self.process.as_mut().context("etcd was not started")?.ended()?;
        anyhow::ensure!(ended.is_none(), "etcd ended at once: is port {} taken?", self.client_port);
        Ok(())
    }

    /// Runs `etcdctl` with these arguments against it.
    ///
    /// # Errors
    ///
    /// Where etcdctl fails.
    pub fn ctl(&self, args: &[&str]) -> Result<String> {
        netns::output(&mut self.etcdctl(args))
    }

    /// Carries out these operations in one transaction, each as `etcdctl txn` takes it: text in double quotes.
    ///
    /// # Errors
    ///
    /// As [`Self::ctl`].
    pub fn at_once(&self, operations: &[String]) -> Result<String> {
        let file = self.data.path().join("txn");
        // No comparison, the operations, and none for a comparison that fails.
        fs::write(&file, format!("\n{}\n\n\n", operations.join("\n")))?;
        netns::output(self.etcdctl(&["txn"]).stdin(File::open(&file)?))
    }

    fn etcdctl(&self, args: &[&str]) -> Command {
        let mut command = self.command("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &self.endpoint()]);
        command.args(["--dial-timeout", "20s", "--command-timeout", "20s"]);
        if let Some(Tls { authority, mutual }) = &self.tls {
            command.arg("--cacert").arg(authority.certificate());
            if *mutual {
                command.arg("--cert").arg(&authority.client().cert).arg("--key").arg(&authority.client().key);
            }
        }
        command.args(args);
        command
    }

    /// How often clients have called each method so far (`KV/Range`, `Lease/LeaseGrant`, …): etcd's own count.
    ///
    /// # Errors
    ///
    /// Where its metrics cannot be read; with TLS they cannot.
    pub fn calls(&self) -> Result<Vec<(String, u64)>> {
        let mut stream = self.dial()?;
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let lines = text.lines().filter_map(|line| line.strip_prefix("grpc_server_started_total{"));
        let calls = lines.filter_map(|line| {
            let label = |name: &str| line.split(&format!("{name}=\"")).nth(1)?.split('"').next();
            let service = label("grpc_service")?.strip_prefix("etcdserverpb.")?;
            let count: f64 = line.rsplit(' ').next()?.parse().ok()?;
            Some((format!("{service}/{}", label("grpc_method")?), count as u64))
        });
        Ok(calls.filter(|(_, count)| *count > 0).collect())
    }

    /// A connection to its clients' port, made in its namespace.
    fn dial(&self) -> Result<TcpStream> {
        let connect = || Ok(TcpStream::connect((self.address, self.client_port))?);
        let Some(netns) = &self.netns else { return connect() };
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(File::open(Path::new("/run/netns").join(netns))?, CloneFlags::CLONE_NEWNET)?;
                connect()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
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
