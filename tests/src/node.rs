//! A node: a namespace with an uplink, the agent in it, and a bridge for containers as Docker makes it.

use std::{
    fs::{self, File, OpenOptions},
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{ExitStatus, Output},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::{
    container::Container,
    netns::{self, Netns},
    process::{Process, wait_for},
};

/// The name of the containers' bridge, as Docker's.
pub const BRIDGE: &str = "docker0";

/// The bridge's MAC; Docker, too, gives it one.
const BRIDGE_MAC: &str = "02:42:00:00:00:01";

/// How long an agent may take to be ready.
const READY: Duration = Duration::from_secs(60);

/// What an agent promises in `subnet.env`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubnetEnv {
    /// `FLANNEL_NETWORK`, where the network has IPv4.
    pub network4: Option<Ipv4Net>,
    /// `FLANNEL_SUBNET`: the bridge's address with the length of the subnet.
    pub subnet4: Option<Ipv4Net>,
    /// `FLANNEL_IPV6_NETWORK`, where the network has IPv6.
    pub network6: Option<Ipv6Net>,
    /// `FLANNEL_IPV6_SUBNET`, as the other.
    pub subnet6: Option<Ipv6Net>,
    /// `FLANNEL_MTU`, bytes.
    pub mtu: u32,
    /// The file as it is.
    pub text: String,
}

impl SubnetEnv {
    /// Parses the file's text.
    ///
    /// # Errors
    ///
    /// Where a line is missing.
    pub fn parse(text: &str) -> Result<Self> {
        let entry = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        let value = |key: &str| entry(key).with_context(|| format!("subnet.env has no {key}: {text:?}"));
        ensure!(
            entry("FLANNEL_SUBNET").or(entry("FLANNEL_IPV6_SUBNET")).is_some(),
            "subnet.env has no subnet: {text:?}"
        );
        Ok(Self {
            network4: entry("FLANNEL_NETWORK").map(str::parse).transpose()?,
            subnet4: entry("FLANNEL_SUBNET").map(str::parse).transpose()?,
            network6: entry("FLANNEL_IPV6_NETWORK").map(str::parse).transpose()?,
            subnet6: entry("FLANNEL_IPV6_SUBNET").map(str::parse).transpose()?,
            mtu: value("FLANNEL_MTU")?.parse()?,
            text: text.to_owned(),
        })
    }

    /// The network of a node that has IPv4.
    ///
    /// # Panics
    ///
    /// Where it has none.
    #[must_use]
    pub fn network(&self) -> Ipv4Net {
        self.network4.expect("a network of IPv4")
    }

    /// The subnet, with the bridge's address, of a node that has IPv4.
    ///
    /// # Panics
    ///
    /// Where it has none.
    #[must_use]
    pub fn subnet(&self) -> Ipv4Net {
        self.subnet4.expect("a subnet of IPv4")
    }

    /// The subnets of the families that there are, without host bits.
    #[must_use]
    pub fn subnets(&self) -> Vec<IpNet> {
        let subnets = [self.subnet4.map(Into::into), self.subnet6.map(Into::into)];
        subnets.into_iter().flatten().map(|subnet: IpNet| subnet.trunc()).collect()
    }
}

/// The name of a container's veth, its addresses each with the bridge's, and its MTU in bytes.
struct Wiring {
    veth: String,
    addresses: Vec<(IpAddr, IpNet)>,
    mtu: u32,
}

/// A host of the cluster. Dropping it kills its agent and removes the namespace.
#[derive(Debug)]
pub struct Node {
    agent: Option<Process>,
    netns: Netns,
    name: String,
    address: Ipv4Addr,
    etcd: String,
    directory: PathBuf,
    bpffs: PathBuf,
    binary: PathBuf,
    environment: Vec<(String, String)>,
    veths: u32,
}

impl Node {
    /// Makes a node of a plugged namespace. Its files go below `directory`, its pins below `bpffs`.
    ///
    /// # Errors
    ///
    /// Where the directory cannot be made.
    pub fn new(
        name: &str,
        netns: Netns,
        address: Ipv4Addr,
        etcd: String,
        directory: PathBuf,
        bpffs: PathBuf,
        binary: PathBuf,
    ) -> Result<Self> {
        fs::create_dir_all(directory.join("run")).with_context(|| directory.display().to_string())?;
        Ok(Self {
            agent: None,
            netns,
            name: name.to_owned(),
            address,
            etcd,
            directory,
            bpffs,
            binary,
            environment: Vec::new(),
            veths: 0,
        })
    }

    /// Its name in the cluster, `n1` and so on.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Its address on the underlay.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Where its files are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where its agent pins maps and links.
    #[must_use]
    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    /// Where its agent has its control socket.
    #[must_use]
    pub fn run_directory(&self) -> PathBuf {
        self.directory.join("run")
    }

    /// Where its agent writes `subnet.env`.
    #[must_use]
    pub fn subnet_file(&self) -> PathBuf {
        self.directory.join("subnet.env")
    }

    /// Where its agent keeps its WireGuard key.
    #[must_use]
    pub fn wireguard_key_file(&self) -> PathBuf {
        self.directory.join("wgkey")
    }

    /// What its agents have logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    fn log_file(&self) -> PathBuf {
        self.directory.join("agent.log")
    }

    /// Sets a variable in the environment of the agents that are started from now on.
    pub fn set_env(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Starts the agent with these arguments besides those that tell it apart from other nodes, and waits until
    /// it is ready.
    ///
    /// # Errors
    ///
    /// Where it ends, or is not ready in time; the message holds the end of its log.
    pub fn start_agent(&mut self, args: &[&str]) -> Result<()> {
        self.launch_agent(args)?;
        self.wait_until_ready()
    }

    /// Starts the agent and does not wait for it.
    ///
    /// # Errors
    ///
    /// Where one runs already, or the binary is missing.
    pub fn launch_agent(&mut self, args: &[&str]) -> Result<()> {
        ensure!(self.agent.is_none(), "{} has an agent already", self.name);
        let log = OpenOptions::new().create(true).append(true).open(self.log_file())?;
        let mut command = self.netns.command(&self.binary.display().to_string());
        command
            .arg("agent")
            .args(self.agent_arguments())
            .args(args)
            .env("WIREGUARD_KEY_FILE", self.wireguard_key_file())
            .envs(self.environment.iter().cloned())
            .stdin(File::open("/dev/null")?)
            .stdout(log.try_clone()?)
            .stderr(log);
        self.agent = Some(Process::start(&mut command)?);
        Ok(())
    }

    /// The flags by which an agent is this node's: where etcd is, and the node's own files.
    #[must_use]
    pub fn agent_arguments(&self) -> Vec<String> {
        let subnet_file = self.subnet_file().display().to_string();
        let flags = ["--etcd-endpoints", &self.etcd, "--subnet-file", &subnet_file].map(str::to_owned);
        flags.into_iter().chain(self.own_paths()).collect()
    }

    /// The flags by which agent and subcommands find this node's files instead of the host's.
    fn own_paths(&self) -> [String; 4] {
        let path = |path: &Path| path.display().to_string();
        ["--run-dir".into(), path(&self.run_directory()), "--bpffs-dir".into(), path(&self.bpffs)]
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let outcome = wait_for("the agent to be ready", READY, || {
            let running = self.agent.as_mut().is_some_and(|agent| matches!(agent.ended(), Ok(None)));
            if !running {
                return Some(Err(anyhow::anyhow!("the agent has ended")));
            }
            let ready = self.status().is_ok_and(|status| status["ready"] == true);
            ready.then_some(Ok(()))
        });
        outcome.and_then(|ready| ready).with_context(|| {
            let log = self.log();
            let from = log.lines().count().saturating_sub(20);
            let end: Vec<&str> = log.lines().skip(from).collect();
            format!("{}; its log ends:\n{}", self.name, end.join("\n"))
        })
    }

    /// Asks the agent to stop (SIGTERM) and waits until it has.
    ///
    /// # Errors
    ///
    /// Where there is none, or it takes more than ten seconds.
    pub fn stop_agent(&mut self) -> Result<ExitStatus> {
        let mut agent = self.agent.take().with_context(|| format!("{} has no agent", self.name))?;
        agent.signal(Signal::SIGTERM)?;
        agent.wait(Duration::from_secs(10))
    }

    /// The process id of its agent.
    #[must_use]
    pub fn agent_id(&self) -> Option<u32> {
        self.agent.as_ref().map(Process::id)
    }

    /// Waits for an agent to end by itself.
    ///
    /// # Errors
    ///
    /// Where there is none, or it goes on past the limit.
    pub fn wait_until_ended(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.agent.take().with_context(|| format!("{} has no agent", self.name))?.wait(limit)
    }

    /// Takes another program for its agents and subcommands from now on.
    pub fn set_binary(&mut self, binary: PathBuf) {
        self.binary = binary;
    }

    /// Ends the agent at once (SIGKILL), as a crash does.
    pub fn kill_agent(&mut self) {
        self.agent = None;
    }

    /// Runs `loden` inside the node with these arguments and its own paths.
    ///
    /// # Errors
    ///
    /// Where it fails; the message holds what it printed.
    pub fn loden(&self, args: &[&str]) -> Result<String> {
        netns::output(
            self.netns.command(&self.binary.display().to_string()).args(args).args(self.own_paths()),
        )
    }

    /// The same, whatever its exit status.
    ///
    /// # Errors
    ///
    /// Where it cannot be started.
    pub fn loden_output(&self, args: &[&str]) -> Result<Output> {
        let mut command = self.netns.command(&self.binary.display().to_string());
        command.args(args).args(self.own_paths()).output().with_context(|| format!("{command:?}"))
    }

    /// `loden status --json`.
    ///
    /// # Errors
    ///
    /// Where the agent does not answer, or not in JSON.
    pub fn status(&self) -> Result<Value> {
        let text = self.loden(&["status", "--json"])?;
        serde_json::from_str(&text).with_context(|| format!("the status is not JSON: {text}"))
    }

    /// The same, asked at the control socket without a program in between: for what asks often.
    ///
    /// # Errors
    ///
    /// As [`Self::status`].
    pub fn status_at_socket(&self) -> Result<Value> {
        let path = self.run_directory().join("control.sock");
        let mut socket = UnixStream::connect(&path).with_context(|| path.display().to_string())?;
        socket.set_read_timeout(Some(READY))?;
        socket.write_all(b"status\n")?;
        let mut text = String::new();
        socket.read_to_string(&mut text).with_context(|| path.display().to_string())?;
        serde_json::from_str(&text).with_context(|| format!("the status is not JSON: {text}"))
    }

    /// The addresses of the containers that the agent knows.
    ///
    /// # Errors
    ///
    /// As [`Self::status_at_socket`], and where the status names none.
    pub fn endpoints(&self) -> Result<Vec<IpAddr>> {
        let status = self.status_at_socket()?;
        let endpoints = status["endpoints"].as_array().with_context(|| format!("no endpoints: {status}"))?;
        let address = |endpoint: &Value| Ok(endpoint["address"].as_str().unwrap_or_default().parse()?);
        endpoints.iter().map(address).collect()
    }

    /// Whether the agent says that flows of this container must qualify; `None` while it does not know it.
    pub fn gated(&self, address: impl Into<IpAddr>) -> Option<bool> {
        let status = self.status().ok()?;
        let address = address.into().to_string();
        status["endpoints"].as_array()?.iter().find(|endpoint| endpoint["address"] == address)?["gated"]
            .as_bool()
    }

    /// What `subnet.env` says.
    ///
    /// # Errors
    ///
    /// Where it is not written yet, or incomplete.
    pub fn subnet_env(&self) -> Result<SubnetEnv> {
        let file = self.subnet_file();
        SubnetEnv::parse(&fs::read_to_string(&file).with_context(|| file.display().to_string())?)
    }

    /// Makes `docker0` as `dockerd --bip=$FLANNEL_SUBNET --mtu=$FLANNEL_MTU` does, and with `--ipv6
    /// --fixed-cidr-v6=$FLANNEL_IPV6_SUBNET` where there is one.
    ///
    /// # Errors
    ///
    /// Without `subnet.env`.
    pub fn make_bridge(&self) -> Result<()> {
        let env = self.subnet_env()?;
        // Without a MAC of its own it would take a port's, and another with the next port.
        self.netns.ip(&format!("link add {BRIDGE} address {BRIDGE_MAC} mtu {} type bridge", env.mtu))?;
        if let Some(subnet) = env.subnet4 {
            self.netns.ip(&format!("address add {subnet} dev {BRIDGE}"))?;
        }
        if let Some(subnet) = env.subnet6 {
            self.netns.ip(&format!("-6 address add {subnet} dev {BRIDGE} nodad"))?;
        }
        self.netns.ip(&format!("link set {BRIDGE} up"))?;
        Ok(())
    }

    /// Drops forwarded packets of either family that nobody accepts, as dockerd does (`iptables -P FORWARD DROP`), and accepts
    /// what leaves the bridge or belongs to such a flow, as it does too.
    ///
    /// # Errors
    ///
    /// Where iptables is missing.
    pub fn docker_firewall(&self) -> Result<()> {
        let established = "-m conntrack --ctstate RELATED,ESTABLISHED";
        for iptables in ["iptables", "ip6tables"] {
            self.netns.exec(&format!("{iptables} -P FORWARD DROP"))?;
            self.netns.exec(&format!("{iptables} -A FORWARD -o {BRIDGE} {established} -j ACCEPT"))?;
            self.netns.exec(&format!("{iptables} -A FORWARD -i {BRIDGE} ! -o {BRIDGE} -j ACCEPT"))?;
        }
        Ok(())
    }

    /// Runs a container at the `host`-th address of the node's subnet, of each family that there is, from 2 on.
    ///
    /// # Errors
    ///
    /// Without a bridge, or where the address is not in the subnet.
    pub fn run_container(&mut self, host: u32) -> Result<Container> {
        let Wiring { veth, addresses, mtu } = self.wiring(host)?;
        Container::create(&self.netns, BRIDGE, &veth, &addresses, mtu)
    }

    /// The same, on a veth that has this index in the node.
    ///
    /// # Errors
    ///
    /// The same, and where the index is taken.
    pub fn run_container_at_index(&mut self, host: u32, index: u32) -> Result<Container> {
        let Wiring { veth, addresses, mtu } = self.wiring(host)?;
        Container::create_at_index(&self.netns, BRIDGE, (&veth, index), &addresses, mtu)
    }

    /// How a new container is wired.
    fn wiring(&mut self, host: u32) -> Result<Wiring> {
        let env = self.subnet_env()?;
        let mut addresses: Vec<(IpAddr, IpNet)> = Vec::new();
        if let Some(subnet) = env.subnet4 {
            let address = Ipv4Addr::from(u32::from(subnet.network()) + host);
            ensure!(subnet.contains(&address), "{subnet} has no host {host}");
            addresses.push((address.into(), subnet.into()));
        }
        if let Some(subnet) = env.subnet6 {
            let address = Ipv6Addr::from(u128::from(subnet.network()) + u128::from(host));
            addresses.push((address.into(), subnet.into()));
        }
        self.veths += 1;
        Ok(Wiring { veth: format!("veth{}", self.veths), addresses, mtu: env.mtu })
    }

    /// Whether the kernel has a route of its own to this subnet, not only the default one.
    ///
    /// # Errors
    ///
    /// Where `ip` fails.
    pub fn has_route(&self, subnet: impl Into<IpNet>) -> Result<bool> {
        let subnet = subnet.into().trunc();
        let family = if subnet.addr().is_ipv4() { "-4" } else { "-6" };
        Ok(!self.netns.ip(&format!("{family} route show exact {subnet}"))?.trim().is_empty())
    }
}

/// The built agent: `LODEN_BINARY`, or the one that cargo has put beside the running test.
///
/// # Errors
///
/// Where there is none.
pub fn binary() -> Result<PathBuf> {
    let beside = || {
        let executable = std::env::current_exe().ok()?;
        executable
            .ancestors()
            .skip(1)
            .take(2)
            .map(|directory| directory.join("loden"))
            .find(|path| path.is_file())
    };
    std::env::var_os("LODEN_BINARY")
        .map(PathBuf::from)
        .or_else(beside)
        .context("the agent is not built: cargo build --package loden-agent")
}
